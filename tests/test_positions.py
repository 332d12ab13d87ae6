"""How far a group's partitions are handed out and stored, without a broker: each rule, and all of them in any order.

`Anything` plays a member's shell and a broker with the real rules of a row (`broker/groups.py`): transactions and plain
commits are under way in any order and end in any way, while partitions are sought, revoked, lost and granted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idemq.broker.groups import OffsetRow, granted, refusal, released, sought
from idemq.broker.groups import moved as row_after
from idemq.client import wire
from idemq.client.errors import (
    InvalidRequest,
    LeaseLost,
    OffsetConflict,
    OutcomeUnknown,
    TransactionAborted,
    UnknownTopic,
    from_refusal,
)
from idemq.client.membership import Changes
from idemq.client.positions import (
    Leased,
    Move,
    PlainCommit,
    Positions,
    aborted,
    closed,
    moves,
    opened,
    plan,
    rewind,
    stored,
)
from idemq.client.source import Batch
from idemq.client.wire import TopicPartition

from .support import messages

TOPICS = {7: "t", 8: "u"}
KEYS = [TopicPartition(7, 0), TopicPartition(7, 1)]
END = 12
"""Both partitions hold so many messages."""


class Member:
    """A member's positions, and what its shell was asked to do."""

    def __init__(self, group: str = "g") -> None:
        self.looked = 0
        self.taken_back: list[tuple[Leased, wire.Offset | None]] = []
        self.positions = Positions(group, self._look, lambda *what: self.taken_back.append(what))

    def _look(self) -> None:
        self.looked += 1

    def grant(self, at: int = 0, *, partition: int = 0, lease: int = 1, attempts: int = 0, handed: int = 0) -> Leased:
        changes = Changes([wire.Lease(7, partition, lease, at, attempts, 5, b"note")], [], [])
        ((leased,), _, _) = self.positions.take(changes, TOPICS)
        return self.hand_out(leased, handed or at)

    def hand_out(self, leased: Leased, end: int) -> Leased:
        leased.reading.delivered = end
        self.positions.handed(leased)
        return leased

    def revoke(self, leased: Leased) -> None:
        leased.reading.paused = True
        self.positions.take(Changes([], [leased.reading.key], []), TOPICS)

    def lose(self, leased: Leased) -> None:
        self.positions.take(Changes([], [], [leased.reading.key]), TOPICS)

    def now(self, partition: int = 0) -> Leased:
        return self.positions.held[TopicPartition(7, partition)]


def begin(*moved: Move) -> list[wire.Offset]:
    return plan([(move, None) for move in moved])


def refusal_of(code: str, leased: Leased, at: int | None = None, **other: Any) -> Any:
    where = {"group": leased.positions.group, "topic_id": 7, "partition": leased.reading.key.partition, "next": at}
    return from_refusal(wire.Failed(code, "", where | other))


# --------------------------------------------------------------------------------------------------- transactions


def test_a_message_is_handed_out_planned_taken_back_handed_out_again_and_stored() -> None:
    member = Member()
    leased = member.grant(3, handed=5)
    move = Move(leased, 3, 5)
    assert plan([(move, b"mine")]) == [wire.Offset("g", 7, 0, 1, 3, 5, b"mine")]
    assert (leased.committed, leased.planned, leased.pending) == (3, 5, 1)
    aborted([move])
    rewind([move])
    assert (leased.state, leased.pending, leased.committed) == ("stale", 0, 3)
    [(again, ended)] = member.taken_back
    assert (again, ended) == (member.now(), None)
    assert (again.reading.fetched, again.reading.delivered, again.state) == (3, 3, "held")
    with pytest.raises(OffsetConflict, match="message 4 of partition 0 of 't' is handed out again") as conflict:
        begin(Move(leased, 4, 5))
    assert conflict.value.expected == 3
    rewind([move], conflict.value)
    assert member.now() is again, "and takes nothing back a second time"
    move = Move(member.hand_out(again, 5), 3, 5)
    assert begin(move) == [wire.Offset("g", 7, 0, 1, 3, 5)]
    stored([move])
    assert (again.committed, again.planned, again.pending, member.now()) == (5, 5, 0, again)


def test_transactions_under_way_follow_each_other_and_what_is_behind_one_that_failed_is_refused() -> None:
    member = Member()
    leased = member.grant(handed=6)
    first, second = Move(leased, 0, 2), Move(leased, 2, 4)
    assert [begin(move)[0][4:6] for move in (first, second)] == [(0, 2), (2, 4)]
    assert leased.pending == 2
    with pytest.raises(OffsetConflict, match="was committed before") as conflict:
        begin(Move(leased, 1, 6))
    assert conflict.value.expected == 0, "what is under way may fail"
    stored([first])
    assert (leased.committed, leased.planned) == (2, 4)
    aborted([second])
    rewind([second], refusal_of("OFFSET_CONFLICT", leased, 2))
    assert member.now().reading.fetched == 2


def test_what_an_open_block_is_about_is_passed_by_no_transaction() -> None:
    member = Member()
    leased = member.grant(handed=6)
    begin(Move(leased, 0, 1))
    first, same, behind = Move(leased, 1, 2), Move(leased, 1, 3), Move(leased, 3, 6)
    for _ in range(2):  # it may be said again
        opened([first, behind])
    with pytest.raises(OffsetConflict, match=r"message 3 .* follows others whose transaction has not ended"):
        begin(behind)
    assert (leased.planned, leased.pending) == (1, 1)
    closed([first])
    assert begin(same) == [wire.Offset("g", 7, 0, 1, 1, 3)], "what is behind it holds up nothing"
    assert begin(behind) == [wire.Offset("g", 7, 0, 1, 3, 6)], "nor does it hold up itself"
    closed([behind])


def test_of_positions_that_move_together_all_are_planned_or_none() -> None:
    member = Member()
    good, bad = member.grant(handed=2), member.grant(4, partition=1, handed=6)
    with pytest.raises(OffsetConflict):
        begin(Move(good, 0, 2), Move(bad, 3, 6))
    assert (good.planned, good.pending, bad.planned, bad.pending) == (0, 0, 4, 0)


def test_what_was_refused_for_what_it_holds_may_be_stored_in_another_way() -> None:
    leased = Member().grant(handed=4)
    whole = Move(leased, 0, 4)
    begin(whole)
    aborted([whole])
    assert begin(Move(leased, 0, 2)) == [wire.Offset("g", 7, 0, 1, 0, 2)]


def test_under_a_lost_lease_nothing_is_taken_back_and_the_broker_is_asked() -> None:
    member = Member()
    leased = member.grant(handed=2)
    move = Move(leased, 0, 2)
    begin(move)
    member.lose(leased)
    aborted([move])
    rewind([move], refusal_of("LEASE_LOST", leased, 2))
    assert (leased.state, leased.committed, member.taken_back, member.positions.held) == ("gone", 0, [], {})
    assert begin(move) == [wire.Offset("g", 7, 0, 1, 0, 2)], "nobody else may have it yet"


@pytest.mark.parametrize(
    ("code", "other", "expected"),
    [
        ("OFFSET_CONFLICT", {}, 3),
        ("OFFSET_CONFLICT", {"group": "h"}, 0),
        ("OFFSET_CONFLICT", {"topic_id": 8}, 0),
        ("OFFSET_CONFLICT", {"partition": 1}, 0),
        ("OFFSET_CONFLICT", {"next": None}, 0),
        ("LEASE_LOST", {}, 0),
    ],
)
def test_whoever_is_told_where_the_position_is_goes_on_there(code: str, other: dict[str, Any], expected: int) -> None:
    member = Member()
    move = Move(member.grant(handed=4), 0, 4)
    begin(move)
    aborted([move])
    rewind([move], refusal_of(code, move.leased, 3, **other))
    assert (member.now().reading.fetched, member.now().planned) == (expected, expected)


def test_where_an_earlier_lease_was_says_nothing_of_a_later_one() -> None:
    member = Member()
    early = Move(member.grant(2, handed=4), 2, 4)
    rewind([early])
    sought = member.positions.sought(member.now(), wire.Sought(5, 0))
    assert sought is not None
    late = Move(member.hand_out(sought, 2), 0, 2)
    with pytest.raises(OffsetConflict) as conflict:
        begin(late, early)
    assert conflict.value.expected == 2
    rewind([late, early], conflict.value)
    assert member.now().reading.fetched == 0


def test_errors_that_are_not_ours_say_nothing_of_positions() -> None:
    member = Member()
    rewind([Move(member.grant(handed=4), 0, 4)], OSError())
    assert member.now().reading.fetched == 0


def test_of_two_leases_of_one_partition_only_the_later_one_moves_it() -> None:
    member, other = Member(), Member("h")
    old = member.grant(handed=4)
    member.lose(old)
    new, theirs = member.grant(1, lease=5, handed=4), other.grant(handed=4)
    for moved in ([Move(new, 1, 3), Move(old, 0, 4)], [Move(old, 0, 4), Move(new, 1, 3)]):
        with pytest.raises(LeaseLost, match="partition 0 of 't' was lost") as lost:
            begin(*moved)
        assert lost.value.partitions == [(7, 0)]
        commit = PlainCommit([*moved, Move(theirs, 0, 2)])
        assert {entry[:6] for entry in commit.entries()} == {("g", 7, 0, 5, 1, 3), ("h", 7, 0, 1, 0, 2)}
        commit.refused(OutcomeUnknown())
    assert len(begin(Move(new, 1, 3), Move(theirs, 0, 2))) == 2


# ------------------------------------------------------------------------------------- what is known after a take-back


def test_what_is_stored_after_it_was_taken_back_is_not_handed_out_again() -> None:
    member = Member()
    early, late = Move(member.grant(handed=4), 0, 2), Move(member.now(), 2, 4)
    begin(early)
    rewind([late])
    again = member.now()
    stored([early])
    assert (again.state, member.now().reading.fetched, len(member.taken_back)) == ("stale", 2, 2)


def test_what_was_handed_out_beyond_it_meanwhile_stays_in_hand() -> None:
    member = Member()
    move = Move(member.grant(handed=4), 0, 2)
    begin(move)
    rewind([move])
    again = member.hand_out(member.now(), 3)
    stored([move])
    assert (member.now(), again.committed, again.planned) == (again, 2, 2)
    with pytest.raises(OffsetConflict, match="was committed before"):
        begin(Move(again, 0, 3))
    assert begin(Move(again, 2, 3)) == [wire.Offset("g", 7, 0, 1, 2, 3)]


def test_what_is_stored_under_one_lease_says_nothing_of_another() -> None:
    member = Member()
    move = Move(member.grant(handed=4), 0, 4)
    begin(move)
    member.lose(move.leased)
    other = member.grant(1, lease=5)
    stored([move])
    assert (other.committed, member.now()) == (1, other)


# ---------------------------------------------------------------------------------------------- without a transaction


def test_a_commit_is_forward_only_and_has_nothing_to_say_of_what_is_stored() -> None:
    leased = Member().grant(3, handed=6)
    commit = PlainCommit([Move(leased, 3, 5)])
    assert commit.entries() == [wire.Offset("g", 7, 0, 1, 3, 5)]
    assert leased.pending == 1
    commit.stored()
    assert (leased.committed, leased.planned, leased.pending) == (5, 5, 0)
    assert commit.entries() == []
    assert PlainCommit([Move(leased, 3, 4), Move(leased, 3, 5)]).entries() == []


def test_a_commit_beside_a_transaction_leaves_its_plan() -> None:
    leased = Member().grant(handed=6)
    begin(Move(leased, 0, 4))
    commit = PlainCommit([Move(leased, 0, 2)])
    commit.entries()
    commit.stored()
    assert (leased.committed, leased.planned, leased.pending) == (2, 4, 1)
    commit = PlainCommit([Move(leased, 0, 3)])
    commit.entries()
    assert not commit.refused(OutcomeUnknown())
    assert (leased.committed, leased.planned, leased.pending) == (2, 4, 1)


def test_of_a_commit_what_is_lost_or_taken_back_does_not_hold_up_the_others() -> None:
    member = Member()
    back, lost, good = (member.grant(partition=index, handed=2) for index in range(3))
    rewind([Move(back, 0, 1)])
    commit = PlainCommit([Move(one, 0, 2) for one in (back, lost, good)])
    assert [entry.partition for entry in commit.entries()] == [1, 2]
    assert commit.refused(refusal_of("LEASE_LOST", lost))
    assert [entry.partition for entry in commit.entries()] == [2]
    assert (lost.pending, good.pending) == (0, 1)
    commit.stored()
    assert (good.committed, good.pending, lost.committed) == (2, 0, 0)
    with pytest.raises(OffsetConflict, match="message 0 of partition 0 of 't' is handed out again"):
        commit.entries()


@pytest.mark.parametrize("ended_at", [2, 3], ids=["there", "behind"])
def test_a_position_whose_lease_ended_where_it_was_to_be_or_behind_is_moved_and_the_others_are_not_yet(
    ended_at: int,
) -> None:
    member, other = Member(), Member("h")
    lost, good, theirs = member.grant(handed=2), member.grant(partition=1, handed=2), other.grant(handed=1)
    commit = PlainCommit([Move(theirs, 0, 1), Move(lost, 0, 2), Move(good, 0, 2)])
    commit.entries()
    assert commit.refused(refusal_of("LEASE_LOST", lost, ended_at))
    assert (lost.committed, good.committed, theirs.committed) == (2, 0, 0)
    assert [entry[0:3:2] for entry in commit.entries()] == [("h", 0), ("g", 1)]
    assert (lost.pending, good.pending, theirs.pending) == (0, 1, 1)
    commit.stored()
    assert commit.entries() == [], "and nothing was refused"


@pytest.mark.parametrize("ended_at", [1, None], ids=["in front of it", "nobody knows where"])
def test_a_position_whose_lease_ended_elsewhere_is_lost(ended_at: int | None) -> None:
    lost = Member().grant(handed=2)
    commit = PlainCommit([Move(lost, 0, 2)])
    commit.entries()
    assert commit.refused(error := refusal_of("LEASE_LOST", lost, ended_at))
    with pytest.raises(LeaseLost) as raised:
        commit.entries()
    assert (raised.value, lost.committed, lost.pending) == (error, 0, 0)


def test_what_is_too_much_for_one_request_is_asked_for_in_several_and_stays_in_hand_until_it_is_stored() -> None:
    member = Member()
    held = [member.grant(partition=index, handed=1) for index in range(wire.APPENDS_MAX + 2)]
    commit = PlainCommit([Move(leased, 0, 1) for leased in held])
    assert len(commit.entries()) == wire.APPENDS_MAX
    assert {leased.pending for leased in held} == {1}
    commit.stored()
    assert [leased.committed for leased in held] == [1] * wire.APPENDS_MAX + [0, 0]
    assert [entry.partition for entry in commit.entries()] == [wire.APPENDS_MAX, wire.APPENDS_MAX + 1]
    assert commit.refused(refusal_of("LEASE_LOST", held[-1]))
    assert [entry.partition for entry in commit.entries()] == [wire.APPENDS_MAX]
    commit.stored()
    with pytest.raises(LeaseLost):
        commit.entries()
    assert {leased.pending for leased in held} == {0}


def test_messages_that_are_handed_out_again_do_not_hold_up_the_same_once_they_are() -> None:
    member = Member()
    stale = member.grant(handed=2)
    rewind([Move(stale, 0, 2)])
    new = member.hand_out(member.now(), 2)
    for moved in ([stale, new], [new, stale]):
        commit = PlainCommit([Move(leased, 0, 2) for leased in moved])
        assert [entry[4:6] for entry in commit.entries()] == [(0, 2)]
        assert (stale.pending, new.pending) == (0, 1)
        assert not commit.refused(OutcomeUnknown())


def test_the_first_refusal_is_the_one_that_is_told() -> None:
    member = Member()
    commit = PlainCommit([Move(member.grant(partition=index, handed=2), 0, 2) for index in range(3)])
    commit.entries()
    assert commit.refused(first := refusal_of("LEASE_LOST", member.now(0)))
    commit.entries()
    rewind([Move(member.now(2), 0, 2)])
    assert commit.refused(refusal_of("LEASE_LOST", member.now(1)))
    with pytest.raises(LeaseLost) as told:
        commit.entries()
    assert told.value is first
    old, back = member.now(0), member.now(1)
    member.lose(old)
    new = member.grant(lease=5, handed=2)
    rewind([Move(back, 0, 2)])
    for moved, error in (([back, old, new], OffsetConflict), ([old, new, back], LeaseLost)):
        commit = PlainCommit([Move(leased, 0, 2) for leased in moved])
        assert [entry.lease for entry in commit.entries()] == [5]
        assert commit.refused(refusal_of("LEASE_LOST", new))
        with pytest.raises(error):
            commit.entries()


def test_what_is_taken_back_while_a_commit_is_under_way_is_not_asked_for_again() -> None:
    member = Member()
    lost, back = member.grant(handed=2), member.grant(partition=1, handed=2)
    commit = PlainCommit([Move(lost, 0, 2), Move(back, 0, 2)])
    commit.entries()
    rewind([Move(back, 0, 2)])
    error = refusal_of("LEASE_LOST", lost)
    assert commit.refused(error)
    with pytest.raises(LeaseLost) as raised:
        commit.entries()
    assert raised.value is error


def test_a_refusal_that_names_none_of_them_ends_a_commit() -> None:
    member = Member()
    leased = member.grant(handed=2)
    for error in (
        refusal_of("LEASE_LOST", leased, group="h"),
        refusal_of("LEASE_LOST", leased, partition=1),
        refusal_of("UNKNOWN_TOPIC", leased),
        OutcomeUnknown(),
        KeyboardInterrupt(),
    ):
        commit = PlainCommit([Move(leased, 0, 2)])
        commit.entries()
        assert not commit.refused(error)
        assert leased.pending == 0


# --------------------------------------------------------------------------------------------------- what is held


def test_what_is_lost_is_held_no_longer_when_it_is_granted_again() -> None:
    member = Member()
    old = member.grant()
    key, unknown, looked = old.reading.key, TopicPartition(7, 9), member.looked
    lease = wire.Lease(7, 0, 5, 2, 1, 4, b"theirs")
    (new,), revoked, lost = member.positions.take(Changes([lease], [unknown], [key, unknown]), TOPICS)
    assert (lost, revoked, old.state, new.state, member.now()) == ([old], [], "gone", "held", new)
    assert member.looked > looked, "whoever waits to give it back need not"
    assert (new.lease, new.committed, new.head, new.attempts, new.suspects_end, new.metadata) == (
        5,
        2,
        2,
        1,
        4,
        b"theirs",
    )
    assert (new.reading.name, new.reading.delivery, new.reading.fetched) == (("t", 0), new, 2)


def test_a_partition_is_given_back_when_nothing_of_it_is_in_hand() -> None:
    member = Member()
    leased = member.grant(handed=2)
    key, positions = leased.reading.key, member.positions
    assert positions.releasing([key, TopicPartition(7, 9)]) == []
    member.revoke(leased)
    assert positions.releasing([key]) == [leased]
    assert positions.in_hand(leased), "until the loop comes back"
    begin(Move(leased, 0, 2))
    looked = member.looked
    positions.returned()
    assert member.looked > looked
    assert positions.in_hand(leased), "on its way"
    looked = member.looked
    stored([Move(leased, 0, 2)])
    assert member.looked > looked
    assert not positions.in_hand(leased)
    positions.busy = lambda one: one is leased
    assert positions.in_hand(leased), "a handler has it"
    positions.busy = lambda _: False
    positions.handed(leased)
    assert not positions.in_hand(leased), "handlers know better"
    assert positions.give_back([leased]) == [key]
    assert (leased.state, positions.held, positions.give_back([leased])) == ("gone", {}, [])


def test_what_was_taken_meanwhile_is_not_given_back() -> None:
    member = Member()
    lost, back, sought = (member.grant(partition=index) for index in range(3))
    for leased in (lost, back, sought):
        member.revoke(leased)
    member.lose(lost)
    member.grant(lease=5)
    rewind([Move(back, 0, 1)])
    member.positions.sought(sought, wire.Sought(6, 0))
    assert member.positions.give_back([lost, back, sought]) == []
    assert [member.now(index).state for index in range(3)] == ["held", "releasing", "held"]


def test_what_is_taken_back_while_it_goes_goes_on_going() -> None:
    member = Member()
    leased = member.grant(attempts=2, handed=2)
    leased.reading.end = 9
    member.revoke(leased)
    rewind([Move(leased, 0, 2)])
    again = member.now()
    assert (again.state, again.reading.paused, again.reading.end) == ("releasing", True, 9)
    assert (again.lease, again.attempts, again.suspects_end, again.metadata) == (1, 2, 5, b"note")
    assert not member.positions.in_hand(again)


def test_of_each_partition_the_user_hears_that_it_comes_and_then_that_it_goes() -> None:
    member = Member()
    positions, first = member.positions, member.grant(handed=1)
    rewind([Move(first, 0, 1)])
    again = member.now()
    assert positions.news([again], False) == [], "nobody was told that it came"
    assert positions.news([first], True) == [first]
    assert positions.news([again], True) == []
    member.revoke(again)
    rewind([Move(again, 0, 1)])
    assert positions.news([again], False) == [again], "it goes all the same"
    again = member.now()
    assert positions.news([again], False) == []
    held_on = positions.sought(again, wire.Sought(5, 0))
    assert held_on is not None
    assert positions.news([held_on], True) == [held_on], "sought while it went, and held on"
    member.revoke(held_on)
    anew = positions.sought(held_on, wire.Sought(6, 0))
    assert positions.news([held_on], False) == [], "the same, before he was told that it goes"
    assert anew is not None
    member.lose(anew)
    other = member.grant(lease=7)
    assert positions.news([anew], False) == [anew]
    assert positions.news([other], True) == [other]
    assert positions.news([other], False) == [other], "he leaves"
    late = positions.sought(other, wire.Sought(8, 0))
    assert late is not None
    member.positions.end()
    assert positions.news([late], True) == []


def test_in_the_end_nothing_is_held() -> None:
    member = Member()
    leased = member.grant()
    member.positions.end()
    assert (leased.state, member.positions.held) == ("gone", {})


def test_everything_handed_out_and_not_stored() -> None:
    member = Member()
    moved = [(move.leased, move.first, move.end) for move in [*member.positions.delivered()]]
    assert moved == []
    one, two = member.grant(2, handed=5), member.grant(3, partition=1)
    assert [(move.leased, move.first, move.end) for move in member.positions.delivered()] == [(one, 2, 5), (two, 3, 3)]


# ------------------------------------------------------------------------------------------------- seeks and attempts


def test_a_seek_begins_anew_under_another_lease() -> None:
    member = Member()
    leased = member.grant(3, attempts=2, handed=5)
    leased.reading.end = 9
    leased.attempt_entry(3, 2, begins=True)
    member.positions.news([leased], True)
    again = member.positions.sought(leased, wire.Sought(5, 1))
    assert again is member.now()
    assert again is not None
    assert (again.lease, again.committed, again.reading.fetched, again.reading.end) == (5, 1, 1, 9)
    assert (again.attempts, again.suspects_end, again.metadata, again.turns, again.state) == (0, 0, None, 0, "held")
    assert (leased.state, member.taken_back) == ("gone", [])
    assert member.positions.sought(leased, wire.Sought(5, 1)) is None, "a heartbeat had told it already"
    with pytest.raises(LeaseLost, match="partition 0 of 't' was lost") as lost:
        member.positions.sought(leased, wire.Sought(6, 1))
    assert lost.value.details == {"group": "g", "topic_id": 7, "partition": 0, "lease": 1}
    member.lose(again)
    with pytest.raises(LeaseLost):
        member.positions.sought(again, wire.Sought(7, 1))


def test_whoever_paused_a_partition_finds_it_paused_after_a_seek_and_what_was_going_is_read_on() -> None:
    member = Member()
    leased = member.grant()
    leased.reading.paused = True
    again = member.positions.sought(leased, wire.Sought(5, 0))
    assert again is not None
    assert again.reading.paused
    member.revoke(again)
    again = member.positions.sought(again, wire.Sought(6, 0))
    assert again is not None
    assert (again.reading.paused, again.state) == (False, "held")


def test_attempts_are_numbered_and_taking_back_ends_the_one_that_is_under_way() -> None:
    member = Member()
    leased = member.grant(3, handed=4)
    assert leased.attempt_entry(3, 0, begins=True) == wire.Offset("g", 7, 0, 1, 3, 3, None, 0, 1)
    assert leased.attempt_entry(3, 1, begins=False) == wire.Offset("g", 7, 0, 1, 3, 3, None, 1, 2)
    assert leased.attempt_entry(3, 1, begins=False).turns == 2
    assert leased.attempt_entry(3, 1, begins=True).turns == 3
    assert leased.attempt(3) == 3, "tried once in vain, and a suspect"
    rewind([Move(leased, 3, 4)])
    [(again, ended)] = member.taken_back
    assert ended == wire.Offset("g", 7, 0, 1, 3, 3, None, 1, 4)
    assert (again.turns, again.head, again.attempts) == (4, 3, 1)
    assert again.attempt_entry(3, 1, begins=True).turns == 5


def test_an_attempt_that_ended_well_is_over_with_the_position() -> None:
    member = Member()
    leased = member.grant(3, attempts=2, handed=4)
    leased.attempt_entry(3, 2, begins=True)
    begin(move := Move(leased, 3, 4))
    stored([move])
    assert (leased.head, leased.attempts, leased.turns) == (4, 0, 2)
    assert leased.attempt_entry(5, 1, begins=True).turns == 3
    assert (leased.head, leased.attempts) == (5, 1)
    leased.moved(4)
    assert (leased.head, leased.attempts, leased.turns) == (5, 1, 3), "that is known"
    rewind([Move(leased, 5, 6)], refusal_of("OFFSET_CONFLICT", leased, 6))
    assert member.taken_back[-1][1] is None, "moved by an earlier run: the broker knows"


# --------------------------------------------------------------------------------------------- what can be committed


def test_a_message_a_batch_or_messages_move_each_partition_behind_the_last() -> None:
    member = Member()
    one, two = member.grant(), member.grant(partition=1)
    first = messages([b""] * 4, offset=10, delivery=one)
    second = messages([b""] * 4, offset=20, delivery=two)

    def moved(what: object) -> list[tuple[Leased, int, int]]:
        return [(move.leased, move.first, move.end) for move in moves(what)]

    assert moved(first[1]) == [(one, 11, 12)]
    assert moved([first[2], second[0], first[1], second[3]]) == [(one, 11, 13), (two, 20, 24)]
    assert moved(Batch([(first[0][0], 1, 3), (second[0][0], 0, 2), (first[0][0], 0, 1)])) == [
        (one, 10, 13),
        (two, 20, 22),
    ]
    assert moved([]) == []


@pytest.mark.parametrize("what", [7, "text", [7], {}, None, SimpleNamespace(pieces=3)])
def test_nothing_else_can_be_committed(what: object) -> None:
    with pytest.raises(InvalidRequest, match="a message, a batch or a list of messages"):
        moves(what)


def test_a_message_without_a_group_has_no_position() -> None:
    with pytest.raises(InvalidRequest, match="belongs to a group"):
        moves(messages([b""]))


# ---------------------------------------------------------------------------------------- everything, in any order


@dataclass(eq=False)
class Request:
    """Something under way: what the broker makes of it, and who is told."""

    decide: Callable[[], Any]
    """Returns its answer."""
    answered: Callable[[Any], None]
    is_refusable: bool = False
    """For what it holds."""
    answer: Any = None
    is_decided: bool = False


class Anything(RuleBasedStateMachine):
    """What must never be is asserted where something is asked for, applied, heard or handed out; what must come in the
    end, in `teardown`."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions("g", lambda: None, self.taken_back)
        self.counter = 0
        self.rows = {key: OffsetRow(0, 0, "", None, 0, 0) for key in KEYS}
        self.requests: list[Request] = []
        self.generations: list[Leased] = []
        self.endings: list[Request] = []
        """Until the broker knows of these nothing is handed out."""
        self.holder: dict[tuple[TopicPartition, int], Leased] = {}
        """As whose a message was handed out last."""
        self.known: dict[int, int] = {}
        """{lease: where the member was told that the position is}"""
        self.handed: set[Leased] = set()
        self.running: dict[Leased, int] = {}
        """An attempt at this message is under way."""
        self.failed: dict[tuple[int, int], int] = {}
        """{(lease, offset): failed attempts}"""
        self.told: dict[TopicPartition, bool] = dict.fromkeys(KEYS, False)
        self.calls: list[Callable[[], None]] = []
        """Callbacks, which wait for each other."""
        self.heartbeat()

    @property
    def held(self) -> list[Leased]:
        return list(self.positions.held.values())

    def number(self) -> int:
        self.counter += 1
        return self.counter

    # ------------------------------------------------------------------------------------------- the member's shell

    def taken_back(self, again: Leased, ended: wire.Offset | None) -> None:
        self.generations.append(again)
        if ended is not None:
            self.endings.append(self.ask([ended], lambda answer: None))

    def ask(
        self, entries: list[wire.Offset], answered: Callable[[Any], None], moved: list[Move] | None = None
    ) -> Request:
        """Ask for these: with moves for a transaction, without them forward only."""
        request = Request(lambda: self.commit(entries, forward_only=moved is None), answered, moved is not None)
        self.requests.append(request)
        return request

    def check_owned(self, moved: Iterable[Move], entries: Iterable[wire.Offset]) -> None:
        """(1) No position passes what was handed out again, and is not stored by whoever has it now."""
        asking = {move.leased for move in moved}
        for entry in entries:
            for offset in range(entry.start, entry.end):
                holder = self.holder[TopicPartition(entry.topic_id, entry.partition), offset]
                assert holder in asking or holder.lease > entry.lease

    def learned(self, leased: Leased, at: int) -> None:
        self.known[leased.lease] = max(self.known.get(leased.lease, 0), at)

    def some(self, data: st.DataObject) -> list[Move]:
        """Something of what was ever handed out, of one partition or of both; and a little more is handed out."""
        found: list[Move] = []
        for key in data.draw(st.sampled_from([KEYS[:1], KEYS[1:], KEYS])):
            self.hand_out(key, data.draw(st.integers(0, 2)))
            those = [
                one
                for one in self.generations
                if one.reading.key == key and one.reading.fetched < one.reading.delivered
            ]
            back = data.draw(st.lists(st.integers(1, len(those)), min_size=1, max_size=2, unique=True)) if those else []
            for leased in [those[-number] for number in back]:
                first = data.draw(st.integers(leased.reading.fetched, leased.reading.delivered - 1))
                found.append(Move(leased, first, data.draw(st.integers(first + 1, leased.reading.delivered))))
        return found

    @rule(data=st.data(), fails=st.integers(0, 4).map(lambda number: not number), kept=st.booleans())
    def transaction(self, data: st.DataObject, fails: bool, kept: bool) -> None:
        self.transact(self.some(data), fails, kept)

    def transact(self, moved: list[Move], fails: bool = False, kept: bool = False) -> None:
        try:
            if fails:
                raise ValueError("the block")
            entries = begin(*moved)
        except (ValueError, TransactionAborted) as error:
            rewind(moved, error)
            return
        if not entries:
            return
        self.check_owned(moved, entries)

        def answered(answer: Any) -> None:
            if not isinstance(answer, Exception):
                for move in moved:
                    self.learned(move.leased, move.end)
                stored(moved)
                return
            aborted(moved)
            if kept and isinstance(answer, UnknownTopic) and not any(move.leased.pending for move in moved):
                return  # it stays in hand
            for move in moved:
                if isinstance(answer, OffsetConflict) and answer.details["partition"] == move.leased.reading.key[1]:
                    self.learned(move.leased, int(answer.details["next"] or 0))
            rewind(moved, answer)

        self.ask(entries, answered, moved)

    @rule(data=st.data(), everything=st.booleans())
    def plainly(self, data: st.DataObject, everything: bool) -> None:
        moved = self.positions.delivered() if everything else self.some(data)
        self.go_on(PlainCommit(moved), moved)

    def go_on(self, commit: PlainCommit, moved: list[Move]) -> None:
        try:
            entries = commit.entries()
        except TransactionAborted:
            return
        if not entries:
            return
        self.check_owned(moved, entries)

        def answered(answer: Any) -> None:
            if not isinstance(answer, Exception):
                for move in moved:
                    if any(
                        (one.partition, one.end) == (move.leased.reading.key.partition, move.end) for one in entries
                    ):
                        self.learned(move.leased, move.end)
                commit.stored()
            elif not commit.refused(answer):
                return
            self.go_on(commit, moved)

        self.ask(entries, answered)

    def hand_out(self, key: TopicPartition, count: int) -> None:
        leased = self.positions.held.get(key)
        if leased is None or leased.state != "held" or not all(request.is_decided for request in self.endings):
            return
        assert not leased.reading.paused
        start = leased.reading.delivered
        assert leased.reading.delivery is leased
        assert start >= self.known.get(leased.lease, 0), "(2) what is known to be stored is not handed out again"
        leased.reading.delivered = min(start + count, END)
        for offset in range(start, leased.reading.delivered):
            self.holder[key, offset] = leased
        self.positions.handed(leased)
        self.handed.add(leased)

    @rule()
    def come_back(self) -> None:
        self.positions.returned()
        self.handed.clear()

    @rule(key=st.sampled_from(KEYS))
    def begin_or_fail(self, key: TopicPartition) -> None:
        """An attempt at the head, with nothing else of the partition under way."""
        leased = self.positions.held.get(key)
        self.hand_out(key, 1)
        if leased is None or leased.pending or leased.reading.delivered <= leased.committed:
            return
        at = leased.committed
        begins = self.running.pop(leased, None) != at
        attempts = leased.attempts if leased.head == at else 0
        if begins:
            self.running[leased] = at
        else:
            attempts += 1
            self.failed[leased.lease, at] = attempts
        self.ask([leased.attempt_entry(at, attempts, begins)], lambda answer: None)

    @rule(key=st.sampled_from(KEYS), to=st.integers(0, END // 2))
    def seek(self, key: TopicPartition, to: int) -> None:
        leased = self.positions.held.get(key)
        if leased is None:
            return
        request = wire.Seek("g", *key, f"nonce {self.number()}", leased.lease, to, "me")

        def answered(answer: Any) -> None:
            if isinstance(answer, wire.Sought):
                with suppress(LeaseLost):
                    again = self.positions.sought(leased, answer)
                    if again is not None:
                        assert (again.reading.fetched, again.reading.paused) == (answer.next, False)
                        self.generations.append(again)
                        self.calls.append(lambda: self.tell([again], True))

        self.requests.append(Request(lambda: self.set_position(key, request), answered))

    def set_position(self, key: TopicPartition, request: wire.Seek) -> Any:
        row = sought(self.rows[key], request, self.number())
        if isinstance(row, wire.Failed):
            return from_refusal(row)
        self.rows[key] = row
        return wire.Sought(row.lease, row.next)

    # ---------------------------------------------------------------------------------------- heartbeats and callbacks

    @rule()
    def heartbeat(self) -> None:
        lost = [key for key, leased in self.positions.held.items() if self.rows[key][1:3] != (leased.lease, "me")]
        leases = []
        for key, row in self.rows.items():
            if (key in lost or key not in self.positions.held) and row.holder in ("", "me"):
                if row.holder == "" or row.turns:
                    row = self.rows[key] = granted(row, "me", self.number())
                leases.append(wire.Lease(*key, row.lease, row.next, row.attempts, row.suspects_end, row.metadata))
        new, _, gone = self.positions.take(Changes(leases, [], lost), TOPICS)
        assert [one.reading.key for one in gone] == lost
        self.generations += new
        if gone:
            self.calls.append(lambda: self.tell(gone, False))
        if new:
            self.calls.append(lambda: self.tell(new, True))

    @rule(key=st.sampled_from(KEYS))
    def revoke(self, key: TopicPartition) -> None:
        leased = self.positions.held.get(key)
        if leased is not None and leased.state == "held":
            self.positions.take(Changes([], [key], []), TOPICS)
            leased.reading.paused = True

    @rule()
    def finish(self) -> None:
        finished = [one for one in self.positions.releasing(KEYS) if not self.positions.in_hand(one)]
        assert not any(one.pending or one in self.handed for one in finished)
        if finished:
            self.calls.append(lambda: self.give_back(finished))

    def give_back(self, finished: list[Leased]) -> None:
        self.tell(finished, False)
        held = {one.reading.key for one in self.held if one in finished and one.state == "releasing"}
        assert set(self.positions.give_back(finished)) == held
        for key in held:
            if self.rows[key].holder == "me":
                self.rows[key] = released(self.rows[key])

    @precondition(lambda self: self.calls)
    @rule()
    def call(self) -> None:
        self.calls.pop(0)()

    def tell(self, partitions: list[Leased], assigned: bool) -> None:
        for leased in self.positions.news(partitions, assigned):
            assert self.told[leased.reading.key] is not assigned, "assigned, then no longer, by turns"
            self.told[leased.reading.key] = assigned

    # ---------------------------------------------------------------------------------------------------- the broker

    def commit(self, entries: list[wire.Offset], forward_only: bool) -> Any:
        keys = [TopicPartition(entry.topic_id, entry.partition) for entry in entries]
        assert len(set(keys)) == len(keys), "a commit moves a position once"
        for key, entry in zip(keys, entries, strict=True):
            failed = refusal(self.rows[key], entry, forward_only)
            if failed is not None:
                return from_refusal(failed)
        for key, entry in zip(keys, entries, strict=True):
            assert entry.attempts is None or entry.end <= self.rows[key].next, "to tell of attempts moves nothing"
            self.rows[key] = row_after(self.rows[key], entry)
        return None

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), refused=st.integers(0, 4).map(lambda number: not number))
    def decide(self, data: st.DataObject, refused: bool) -> None:
        self.decided(data.draw(st.sampled_from(self.requests)), refused)

    def decided(self, request: Request, refused: bool = False) -> None:
        if not request.is_decided:
            request.is_decided = True
            request.answer = UnknownTopic() if refused and request.is_refusable else request.decide()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), unknown=st.integers(0, 4).map(lambda number: not number))
    def answer(self, data: st.DataObject, unknown: bool) -> None:
        self.hear(data.draw(st.sampled_from(self.requests)), unknown)

    def hear(self, request: Request, unknown: bool = False) -> None:
        """`unknown`: nobody waits for it any more; it may be decided yet."""
        if unknown:
            request.answered(OutcomeUnknown())
            request.answered = lambda answer: None
        elif request.is_decided:
            self.requests.remove(request)
            request.answered(request.answer)

    @rule()
    def settle(self) -> None:
        for request in list(self.requests):
            self.decided(request)
            self.hear(request)

    @rule(key=st.sampled_from(KEYS), by=st.integers(0, 2), heard=st.booleans())
    def vanish(self, key: TopicPartition, by: int, heard: bool) -> None:
        """The member counts as gone, and another has the partition for a while."""
        row = granted(self.rows[key], "other", self.number())
        self.rows[key] = released(row._replace(next=min(row.next + by, END), attempts=0))
        if heard:
            self.heartbeat()

    # ------------------------------------------------------------------------------------------------- what must hold

    @invariant()
    def nothing_is_skipped(self) -> None:
        """(3) Whatever is not stored was handed out as what is held now, or is yet to be."""
        for leased in self.held:
            row = self.rows[leased.reading.key]
            if leased.lease == row.lease:
                assert leased.reading.fetched <= row.next
                assert leased.committed <= row.next
                assert self.known.get(leased.lease, 0) <= row.next

    @invariant()
    def the_broker_knows_what_is_attempted(self) -> None:
        if not all(request.is_decided for request in self.requests):
            return
        for leased in self.held:
            row = self.rows[leased.reading.key]
            if leased.lease == row.lease:
                assert row.turns % 2 == (self.running.get(leased) == row.next)
                assert row.attempts == self.failed.get((row.lease, row.next), row.attempts)

    def teardown(self) -> None:
        """What is under way ends, and the rest is handled: all of it is stored, and nothing is left to be done."""
        for _ in range(6):
            self.settle()
            self.come_back()
            self.finish()
            while self.calls:
                self.call()
            self.heartbeat()
            rewind([move for move in self.positions.delivered() if move.first < move.end])
            for request in self.endings:
                self.decided(request)
            for key in KEYS:
                self.hand_out(key, END)
            self.transact([move for move in self.positions.delivered() if move.first < move.end])
        assert [row.next for row in self.rows.values()] == [END, END]
        assert {one.pending for one in self.generations} == {0}, "(4)"
        assert not self.requests
        assert all(self.told.values())
        self.come_back()
        assert not any(self.positions.in_hand(one) for one in self.generations)


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=300, stateful_step_count=50)
