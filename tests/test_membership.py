"""What a member of a group reports, and what an answer changes: without a broker."""

from __future__ import annotations

from idemq.client.membership import Changes, Membership
from idemq.client.wire import Assignment, Held, Lease, TopicPartition

ONE, TWO = TopicPartition(1, 0), TopicPartition(1, 1)


def lease(key: TopicPartition, number: int) -> Lease:
    return Lease(*key, number, 0, 0, 0, None)


def test_what_is_granted_is_reported_until_it_is_given_back() -> None:
    member = Membership("g", "m", [1])
    assert member.report(5).held == []
    granted = [lease(ONE, 7), lease(TWO, 8)]
    assert member.take(Assignment(granted, [], [], 100)) == Changes(granted, [], [])
    assert member.report(5).held == [Held(*ONE, 7), Held(*TWO, 8)]
    assert member.take(Assignment([], [ONE], [], 100)) == Changes([], [ONE], [])
    assert member.report(5).held == [Held(*ONE, 7, True), Held(*TWO, 8)]
    assert member.take(Assignment([], [ONE], [], 100)) == Changes([], [], []), "it knows"
    member.give_back(ONE)
    member.give_back(ONE)
    assert member.report(5).held == [Held(*TWO, 8)]
    member.leave()
    assert (member.report(5).topics, member.report(5).held) == ([], [])


def test_an_answer_that_is_repeated_changes_nothing() -> None:
    member = Membership("g", "m", [1])
    answer = Assignment([lease(ONE, 7)], [], [], 100)
    member.take(answer)
    assert member.take(answer) == Changes([], [], [])
    member.take(Assignment([], [ONE], [], 100))
    assert member.take(answer) == Changes([], [], []), "also while it is being released"
    assert member.report(0).held[0].releasing


def test_what_is_lost_and_granted_again_has_the_new_lease() -> None:
    member = Membership("g", "m", [1])
    member.take(Assignment([lease(ONE, 7)], [], [], 100))
    assert member.take(Assignment([lease(ONE, 9)], [], [ONE], 100)) == Changes([lease(ONE, 9)], [], [ONE])
    assert member.report(0).held == [Held(*ONE, 9)]
    assert member.take(Assignment([], [], [TWO], 100)) == Changes([], [], []), "never held"
    member.sought(ONE, 11)
    assert member.report(0).held == [Held(*ONE, 11)]


def test_the_start_and_the_promise_go_with_every_report() -> None:
    member = Membership("g", "m", [1, 2], start_ms=5, start_offset=6)
    member.in_hand_max = 3
    report = member.report(1000)
    assert report[:3] == ("g", "m", [1, 2])
    assert (report.start_ms, report.start_offset, report.in_hand_max, report.wait_ms) == (5, 6, 3, 1000)
