"""Consumer groups by hand: members that join, stay, give back, leave or vanish, on a clock that the test moves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemq.broker import core as core_module
from idemq.broker import groups
from idemq.broker.core import Core, Limits, Reply
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.client import records, wire
from idemq.client.membership import Changes, Membership
from idemq.client.wire import Code, TopicPartition

from .support import WALL_MS, CoreBroker

TIMEOUT_MS = Limits().member_timeout_ms
RELEASE_MS = Limits().release_ms_max
LONG_MS = 60_000
"""Longer than a heartbeat is ever held back."""


class Cluster(CoreBroker):
    """A core whose answers are kept until somebody asks for them."""

    def __init__(self, **limits: int) -> None:
        super().__init__(None, **limits)
        self.limits = Limits(**limits)
        self.answers: dict[int, Any] = {}
        self.admin = self.connect()

    def keep(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            if isinstance(output, Reply):
                self.answers[output.correlation] = output.message

    def flush(self) -> None:
        """Make durable what was decided."""
        while (group := self.core.begin()) is not None:
            if group.writes:
                self.store.commit(group)
            self.keep(self.core.committed())

    def ask(self, connection: Any, request: Any, payload: bytes = b"") -> Any:
        answer = self.step(connection, request, payload)
        number = self.number
        if answer is not None:
            self.keep([answer])
        self.flush()
        return self.answers.pop(number)

    def admin_asks(self, request: Any) -> Any:
        return self.ask(self.admin, request)

    def wait(self, duration_ms: int) -> None:
        """Let time pass; the core is woken when it asked for it."""
        end_ms = self.mono_ms + duration_ms
        while True:
            due_ms, outputs = self.core.tick(self.now())
            self.keep(outputs)
            self.flush()
            if self.mono_ms == end_ms:
                return
            self.mono_ms = min(max(due_ms, self.mono_ms + 1), end_ms)

    def restart(self) -> None:
        """The broker starts again on what is durable."""
        self.core = Core(self.store, self.limits)
        self.admin = self.connect()

    def make_topic(self, partitions: int = 1, name: str = "t", messages: int = 0) -> int:
        topic_id: int = self.admin_asks(wire.CreateTopic(name, partitions, wire.Settings())).topic.topic_id
        for index in range(partitions):
            self.fill(topic_id, messages, index)
        return topic_id

    def batch(self, topic_id: int, count: int, partition: int = 0) -> tuple[wire.Commit, bytes]:
        body = records.pack([b"x"] * count, None, None, None, wire.Codec.NONE)
        batch = wire.make_batch(wire.Codec.NONE, count, topic_id, partition, 0, 0, count - 1, body)
        return wire.Commit(0, 0, -1, 0, [wire.Append(topic_id, partition, len(batch))]), batch

    def fill(self, topic_id: int, count: int, partition: int = 0) -> None:
        if count:
            assert isinstance(self.ask(self.admin, *self.batch(topic_id, count, partition)), wire.Committed)

    def row(self, topic_id: int, partition: int = 0, group: str = "g") -> OffsetRow:
        """What is stored."""
        self.flush()
        row = self.store.offset(OffsetKey(group, topic_id, partition))
        assert row is not None
        return row

    def seek(
        self, topic_id: int, expected: int, to: int, partition: int = 0, nonce: str = "n", group: str = "g"
    ) -> Any:
        return self.admin_asks(wire.Seek(group, topic_id, partition, nonce, expected, to))


class Worker:
    """A member of a group, with the client's own rules of what it holds."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        *topics: int,
        group: str = "g",
        in_hand_max: int = 0,
        start_ms: int = 0,
        start_offset: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.name = name
        self.connection = cluster.connect(name)
        self.membership = Membership(group, name, topics, start_ms, start_offset)
        self.membership.in_hand_max = in_hand_max
        self.group = group
        self.leases: dict[TopicPartition, wire.Lease] = {}

    def take(self, answer: Any) -> Changes:
        assert isinstance(answer, wire.Assignment), answer
        changes = self.membership.take(answer)
        for lease in changes.granted:
            self.leases[TopicPartition(lease.topic_id, lease.partition)] = lease
        return changes

    def beat(self) -> Changes:
        """A heartbeat that is answered at once."""
        return self.take(self.cluster.ask(self.connection, self.membership.report(0)))

    def refused(self) -> wire.Failed:
        answer = self.cluster.ask(self.connection, self.membership.report(0))
        assert isinstance(answer, wire.Failed), answer
        return answer

    def park(self) -> int:
        """A heartbeat that waits: its number."""
        assert self.cluster.step(self.connection, self.membership.report(LONG_MS)) is None
        number = self.cluster.number
        self.cluster.flush()
        assert number not in self.cluster.answers, self.cluster.answers[number]
        return number

    def told(self, number: int) -> Changes:
        """What a heartbeat that waited was answered."""
        return self.take(self.cluster.answers.pop(number))

    def reconnect(self) -> None:
        self.connection = self.cluster.connect(self.name)

    def leave(self) -> None:
        self.membership.leave()
        assert self.beat() == Changes([], [], [])

    def give_back(self, *keys: TopicPartition) -> None:
        for key in keys:
            self.membership.give_back(key)

    @property
    def held(self) -> set[int]:
        """The partitions it holds and is not to give back."""
        return {key.partition for key, held in self.membership.held.items() if not held.releasing}

    def lease(self, topic_id: int, partition: int = 0) -> int:
        return self.membership.held[TopicPartition(topic_id, partition)].lease

    def entry(self, topic_id: int, end: int, start: int = 0, partition: int = 0, **more: Any) -> wire.Offset:
        lease = self.leases[TopicPartition(topic_id, partition)].lease
        return wire.Offset(self.group, topic_id, partition, lease, start, end, **more)

    def commit(self, topic_id: int, end: int, start: int = 0, partition: int = 0, **more: Any) -> Any:
        """Without a producer, under the lease it was granted last."""
        entry = self.entry(topic_id, end, start, partition, **more)
        return self.cluster.ask(self.connection, wire.Commit(0, 0, -1, 0, [], [entry]))


STORED = wire.Committed(False, [])


# ------------------------------------------------------------------------------------------------- join, stay, leave


def test_who_joins_alone_gets_all_and_hears_no_more_of_it() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(3, messages=5)
    worker = Worker(cluster, "a", topic_id)
    granted = worker.beat().granted
    assert [(lease.partition, lease.next, lease.attempts, lease.suspects_end) for lease in granted] == [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (2, 0, 0, 0),
    ]
    numbers = [lease.lease for lease in granted]
    assert len({topic_id, *numbers}) == 4, "leases come from the counter that topics have, too"
    assert [cluster.row(topic_id, index).lease for index in range(3)] == numbers
    assert worker.beat() == Changes([], [], [])
    assert [cluster.row(topic_id, index).lease for index in range(3)] == numbers


def test_a_grant_is_told_when_it_is_durable() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    assert cluster.step(worker.connection, worker.membership.report(0)) is None
    number = cluster.number
    group = cluster.begin()
    assert cluster.step(worker.connection, worker.membership.report(0)) is None  # the same, while that is on its way
    again = cluster.number
    assert cluster.core.begin() is None
    cluster.store.commit(group)
    cluster.keep(cluster.core.committed())
    first, second = cluster.answers[number], cluster.answers[again]
    assert first.leases[0].lease == second.leases[0].lease == cluster.row(topic_id).lease


def test_a_repeated_heartbeat_gets_the_same_lease() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=1)
    worker = Worker(cluster, "a", topic_id)
    report = worker.membership.report(0)
    lost = cluster.ask(worker.connection, report)
    worker.reconnect()
    assert cluster.ask(worker.connection, report) == lost
    worker.take(lost)
    assert worker.beat() == Changes([], [], [])


def test_a_partition_moves_in_two_phases() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=9)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    assert one.held == {0, 1}
    parked = one.park()
    assert two.beat() == Changes([], [], []), "nothing is free yet"
    [moving] = one.told(parked).revoked
    old = one.lease(*moving)
    waiting = two.park()
    assert one.beat() == Changes([], [], []), "it knows, and goes on finishing"
    assert one.commit(topic_id, 4, partition=moving.partition) == STORED
    one.give_back(moving)
    assert cluster.step(one.connection, one.membership.report(0)) is None
    number, group = cluster.number, cluster.begin()
    assert not {number, waiting} & cluster.answers.keys(), "not before the disk has it"
    cluster.store.commit(group)
    cluster.keep(cluster.core.committed())
    assert cluster.answers[number].leases == []
    [lease] = two.told(waiting).granted
    assert (lease.partition, lease.next) == (moving.partition, 4)
    assert lease.lease > old
    assert (len(one.held), len(two.held)) == (1, 1)


def test_nothing_is_granted_that_another_holds() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(4)
    workers = [Worker(cluster, name, topic_id) for name in "abc"]
    for _ in range(6):
        for worker in workers:
            worker.give_back(*[key for key, held in worker.membership.held.items() if held.releasing])
            worker.beat()
            together = [key for one in workers for key in one.membership.held]
            assert len(together) == len(set(together))
    assert sorted(len(worker.held) for worker in workers) == [1, 1, 2]
    assert set().union(*(worker.held for worker in workers)) == {0, 1, 2, 3}


def test_what_is_not_given_back_in_time_is_taken() -> None:
    cluster = Cluster(release_ms_max=500)
    topic_id = cluster.make_topic(2, messages=9)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    two.beat()
    [moving] = one.beat().revoked
    waiting, parked = two.park(), one.park()
    cluster.wait(400)
    assert waiting not in cluster.answers
    cluster.wait(300)
    [lease] = two.told(waiting).granted
    assert lease.partition == moving.partition
    assert one.told(parked).lost == [moving]
    failed = one.commit(topic_id, 4, partition=moving.partition)
    assert (failed.code, failed.details["next"]) == (Code.LEASE_LOST, 0)
    assert cluster.row(*moving) == OffsetRow(0, lease.lease, "b", None, one.leases[moving].lease, 0)


def test_who_else_joins_gives_nobody_more_time() -> None:
    cluster = Cluster(release_ms_max=1000)
    topic_id = cluster.make_topic(2)
    one, two, three = (Worker(cluster, name, topic_id) for name in "abc")
    one.beat()
    two.beat()
    [moving] = one.beat().revoked
    cluster.wait(600)
    three.beat()
    cluster.wait(600)
    assert cluster.row(*moving).holder == ""


def test_what_was_taken_by_force_is_not_taken_back() -> None:
    cluster = Cluster(release_ms_max=500)
    topic_id = cluster.make_topic(2)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    two.beat()
    [moving] = one.beat().revoked
    cluster.wait(700)  # nobody waits, so nobody has it
    assert one.beat().lost == [moving]
    [lease] = two.beat().granted
    assert lease.partition == moving.partition


def test_a_revocation_that_is_taken_back_keeps_the_lease() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    two.beat()
    [moving] = one.beat().revoked
    lease = one.lease(*moving)
    two.leave()
    one.give_back(moving)  # on its way already
    [back] = one.beat().granted
    assert (back.partition, back.lease) == (moving.partition, lease)
    for _ in range(4):
        cluster.wait(RELEASE_MS // 3)
        assert one.beat() == Changes([], [], []), "the deadline of the revocation counts no more"


def test_who_leaves_is_replaced_at_once_and_nobody_is_blamed() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=1)
    one, two = Worker(cluster, "a", topic_id, in_hand_max=1), Worker(cluster, "b", topic_id)
    one.beat()
    waiting = two.park()
    one.leave()
    [lease] = two.told(waiting).granted
    assert (lease.next, lease.attempts, lease.suspects_end) == (0, 0, 0)
    [member] = cluster.admin_asks(wire.Members(None)).members
    assert member.member == "b"


def test_the_last_one_leaves_nothing_behind_but_its_position() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=3)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    worker.commit(topic_id, 2)
    lease = worker.lease(topic_id)
    worker.leave()
    assert cluster.core._groups == {}
    assert cluster.row(topic_id) == OffsetRow(2, lease, "", None, 0, 0)
    worker.leave()  # again: its answer was lost
    assert cluster.core._groups == {}


def test_who_is_silent_is_gone() -> None:
    cluster = Cluster(member_timeout_ms=3000)
    topic_id = cluster.make_topic(2, messages=1)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    cluster.wait(2000)
    two.beat()
    parked = two.park()
    cluster.wait(900)
    assert parked not in cluster.answers
    cluster.wait(200)
    assert {lease.partition for lease in two.told(parked).granted} == {0, 1}


def test_a_heartbeat_is_held_back_for_less_than_a_member_may_be_silent() -> None:
    cluster = Cluster(member_timeout_ms=3000)
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    for _ in range(5):
        parked = worker.park()
        cluster.wait(1100)
        assert worker.told(parked) == Changes([], [], [])
    assert worker.held == {0}


def test_a_newer_heartbeat_answers_the_one_that_waits() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    older = worker.park()
    newer = worker.park()
    assert worker.told(older) == Changes([], [], [])
    assert newer not in cluster.answers


def test_a_heartbeat_waits_as_long_as_it_asked_for() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    assert cluster.step(worker.connection, worker.membership.report(500)) is None
    number = cluster.number
    cluster.wait(400)
    assert number not in cluster.answers
    cluster.wait(200)
    assert worker.told(number) == Changes([], [], [])


def test_nothing_is_granted_to_a_connection_that_is_closed() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=1)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id, in_hand_max=1)
    one.beat()
    parked = two.park()
    cluster.core.disconnect(two.connection)
    one.leave()
    assert parked not in cluster.answers
    assert cluster.row(topic_id).holder == "", "it cannot be to blame for what it never had"
    two.reconnect()
    assert [lease.partition for lease in two.beat().granted] == [0]


def test_a_late_copy_from_an_older_connection_changes_nothing() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    late = worker.membership.report(0)  # holds nothing
    worker.beat()
    old = worker.connection
    worker.reconnect()
    worker.beat()
    assert cluster.ask(old, late).code == Code.STALE_CONNECTION
    worker.membership.leave()
    assert cluster.ask(old, worker.membership.report(0)).code == Code.STALE_CONNECTION
    assert cluster.row(topic_id).holder == "a"


def test_a_broker_that_stood_still_blames_nobody_for_it() -> None:
    cluster = Cluster(release_ms_max=4000)
    topic_id = cluster.make_topic(2, messages=1)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    two.beat()
    [moving] = one.beat().revoked
    cluster.wait(1000)
    cluster.mono_ms += 60_000  # its process was stopped: no tick, nothing read
    cluster.wait(0)
    assert {cluster.row(topic_id, index).holder for index in range(2)} == {"a"}
    cluster.wait(3900)
    assert cluster.row(*moving).holder == "a"
    cluster.wait(300)
    assert cluster.row(*moving).holder == "", "then time counts again"
    cluster.wait(TIMEOUT_MS)
    assert cluster.core._groups == {}


# ------------------------------------------------------------------------------------------------------ zombies


def test_a_zombies_commit_is_refused_and_it_is_told_where_its_lease_ended() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    zombie = Worker(cluster, "a", topic_id)
    zombie.beat()
    zombie.commit(topic_id, 3)
    cluster.wait(TIMEOUT_MS + 200)
    other = Worker(cluster, "b", topic_id)
    [lease] = other.beat().granted
    assert lease.next == 3
    assert other.commit(topic_id, 5, 3) == STORED
    refused = zombie.commit(topic_id, 4, 3)
    assert (refused.code, refused.details["next"]) == (Code.LEASE_LOST, 3)
    assert cluster.row(topic_id).next == 5
    assert zombie.beat().lost == [TopicPartition(topic_id, 0)]


def test_where_an_older_lease_ended_is_not_made_up() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    workers = [Worker(cluster, name, topic_id) for name in "abc"]
    for worker in workers:
        worker.beat()
        worker.leave()
    refused = workers[0].commit(topic_id, 4)
    assert (refused.code, refused.details["next"]) == (Code.LEASE_LOST, None)


def test_an_expired_lease_that_nobody_took_still_commits() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.core._groups == {}
    assert worker.commit(topic_id, 4) == STORED
    assert cluster.row(topic_id).next == 4


def test_who_comes_back_keeps_what_nobody_took() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    leases = [worker.lease(topic_id, index) for index in range(2)]
    cluster.wait(TIMEOUT_MS + 200)
    assert worker.beat() == Changes([], [], [])
    assert [cluster.row(topic_id, index)[1:3] for index in range(2)] == [(lease, "a") for lease in leases]
    cluster.wait(TIMEOUT_MS + 200)
    other = Worker(cluster, "b", topic_id)
    other.membership.held.clear()
    assert {lease.partition for lease in other.beat().granted} == {0, 1}
    assert {key.partition for key in worker.beat().lost} == {0, 1}


def test_who_comes_back_before_another_asks_keeps_its_share() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    cluster.wait(TIMEOUT_MS + 200)
    other = Worker(cluster, "b", topic_id)
    cluster.ask(other.connection, other.membership.report(0)._replace(topics=[topic_id], held=[]))
    assert {key.partition for key in worker.beat().lost} == {0, 1}, "the other has both"


def test_who_comes_back_after_another_had_it_gets_a_number_of_its_own() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker, other = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    worker.beat()
    cluster.wait(TIMEOUT_MS + 200)
    other.beat()
    cluster.wait(TIMEOUT_MS + 200)  # it is gone, too, and its lease still commits
    changes = worker.beat()
    assert changes.lost == [TopicPartition(topic_id, 0)]
    assert worker.lease(topic_id) > other.lease(topic_id)


def test_a_lease_that_is_anothers_is_not_had_by_reporting_it() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker, other = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    worker.beat()
    other.membership.held.update(worker.membership.held)
    assert other.beat() == Changes([], [], [TopicPartition(topic_id, 0)])
    assert worker.beat() == Changes([], [], [])
    cluster.restart()
    other.reconnect()
    other.membership.held.update(worker.membership.held)
    assert other.beat() == Changes([], [], [TopicPartition(topic_id, 0)])


def test_a_lease_of_a_deleted_topic_is_not_taken_up_again() -> None:
    cluster = Cluster()
    one, two = cluster.make_topic(1, "one", 1), cluster.make_topic(1, "two")
    worker = Worker(cluster, "a", one, two)
    worker.beat()
    cluster.wait(TIMEOUT_MS + 200)
    cluster.admin_asks(wire.DeleteTopic(one))
    cluster.wait(5000)  # its rows go, too
    worker.membership._topics = [two]
    assert worker.beat().lost == [TopicPartition(one, 0)]
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.core._groups == {}
    assert cluster.store.offset(OffsetKey("g", one, 0)) is None


# ----------------------------------------------------------------------------------------------- a broker that restarts


def test_after_a_restart_holders_keep_their_leases() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(4, messages=1)
    one, two = Worker(cluster, "a", topic_id), Worker(cluster, "b", topic_id)
    one.beat()
    two.beat()
    one.give_back(*one.beat().revoked)
    one.beat()
    two.beat()
    before = [cluster.row(topic_id, index) for index in range(4)]
    counter = cluster.store.counter()
    cluster.restart()
    for worker in (two, one, two):
        worker.reconnect()
        assert worker.beat() == Changes([], [], [])
    assert [cluster.row(topic_id, index) for index in range(4)] == before
    assert cluster.store.counter() == counter


def test_after_a_restart_holders_that_are_not_heard_of_are_waited_for() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=1)
    gone = Worker(cluster, "a", topic_id, in_hand_max=1)
    gone.beat()
    cluster.restart()
    cluster.mono_ms += 100_000
    cluster.wait(50)
    other = Worker(cluster, "b", topic_id)
    assert other.beat() == Changes([], [], [])
    assert [member.member for member in cluster.admin_asks(wire.Members("g")).members] == ["b"], "of whom was heard"
    for _ in range(3):
        cluster.wait(3000)
        assert other.beat() == Changes([], [], [])
    parked = other.park()
    cluster.wait(1200)
    granted = other.told(parked).granted
    assert {lease.partition for lease in granted} == {0, 1}
    assert {(lease.attempts, lease.suspects_end) for lease in granted} == {(0, 0)}, "nobody is blamed for a restart"


def test_after_a_restart_who_lost_its_report_gets_the_lease_it_has() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    cluster.ask(worker.connection, worker.membership.report(0))  # the answer is lost
    lease = cluster.row(topic_id).lease
    cluster.restart()
    worker.reconnect()
    assert [one.lease for one in worker.beat().granted] == [lease]


def test_after_a_restart_a_holder_that_wants_more_than_its_rows_say_gets_it() -> None:
    cluster = Cluster()
    one, two = cluster.make_topic(1, "one"), cluster.make_topic(2, "two")
    a, b = Worker(cluster, "a", one, two), Worker(cluster, "b", two)
    a.beat()
    b.beat()
    a.give_back(*a.beat().revoked)
    a.beat()
    assert [lease.topic_id for lease in b.beat().granted] == [two]
    cluster.restart()
    cluster.admin_asks(wire.AlterTopic(one, 2, wire.Settings()))
    for worker in (b, a):  # by what b asks about, a is known as one that wants the second topic only
        worker.reconnect()
        changes = worker.beat()
    assert [(lease.topic_id, lease.partition) for lease in changes.granted] == [(one, 1)]


def test_a_second_topic_after_a_restart_is_looked_at_too() -> None:
    cluster = Cluster()
    one, two = cluster.make_topic(1, "one"), cluster.make_topic(1, "two")
    a, b = Worker(cluster, "a", one), Worker(cluster, "b", two)
    a.beat()
    b.beat()
    cluster.restart()
    both = Worker(cluster, "c", one)
    both.beat()
    both.membership._topics = [one, two]
    assert both.beat().granted == []
    for worker in (a, b):
        worker.reconnect()
        worker.beat()
    assert (cluster.row(one).holder, cluster.row(two).holder) in (("a", "b"), ("a", "b"))


def test_a_group_commit_that_failed_grants_nothing() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    worker = Worker(cluster, "a", topic_id)
    assert cluster.step(worker.connection, worker.membership.report(0)) is None
    number = cluster.number
    cluster.begin()  # and the disk is full: the server makes a new core (rule 13)
    cluster.restart()
    assert number not in cluster.answers
    other = Worker(cluster, "b", topic_id)
    [lease] = other.beat().granted
    worker.reconnect()
    assert worker.beat() == Changes([], [], [])
    assert cluster.row(topic_id)[1:3] == (lease.lease, "b")


def test_no_lease_is_given_twice() -> None:
    cluster = Cluster(member_timeout_ms=1000, release_ms_max=200)
    topic_id = cluster.make_topic(3, messages=3)
    holders: dict[int, tuple[str, int]] = {}
    workers: list[Worker] = []
    for step in range(40):
        if step % 4 == 0:
            workers.append(Worker(cluster, f"w{step}", topic_id))
        if step % 7 == 6:
            cluster.seek(topic_id, cluster.row(topic_id).lease, 1, nonce=f"n{step}")
        if step % 13 == 12:
            cluster.restart()
            for worker in workers:
                worker.reconnect()
        workers = workers[-3:]
        for worker in workers:
            for lease in worker.beat().granted:
                holder = (worker.name, lease.partition)
                assert holders.setdefault(lease.lease, holder) == holder
        cluster.wait(150)
    assert len(holders) > 10


# -------------------------------------------------------------------------------------------------- where it begins


def test_a_group_begins_where_its_first_member_says_and_never_again() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=4)
    latest = Worker(cluster, "a", topic_id, start_ms=WALL_MS * 2)
    assert [lease.next for lease in latest.beat().granted] == [4, 4]
    cluster.fill(topic_id, 5)
    latest.leave()
    earliest = Worker(cluster, "b", topic_id)
    assert [lease.next for lease in earliest.beat().granted] == [4, 4]


def test_a_group_begins_at_a_time() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=4)
    cluster.wait(5000)
    cluster.fill(topic_id, 3)
    worker = Worker(cluster, "a", topic_id, start_ms=WALL_MS + 2500)
    assert [lease.next for lease in worker.beat().granted] == [4]


def test_a_group_begins_at_an_offset_that_is_there() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=4)
    cluster.fill(topic_id, 3)
    refused = Worker(cluster, "a", topic_id, start_offset=5).refused()
    assert (refused.code, refused.text) == (Code.BAD_REQUEST, "partition 1 of topic 't' ends at 4, before 5")
    assert cluster.store.offset_count() == 0
    assert cluster.core._groups == {}
    assert [lease.next for lease in Worker(cluster, "a", topic_id, start_offset=4).beat().granted] == [4, 4]


def test_a_group_begins_behind_what_is_gone() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=4)
    cluster.admin_asks(wire.PurgeTopic(topic_id, [4]))
    assert [lease.next for lease in Worker(cluster, "a", topic_id).beat().granted] == [4]


def test_new_partitions_are_assigned_at_once_and_begin_at_their_earliest() -> None:
    cluster = Cluster(offsets_max=1)
    topic_id = cluster.make_topic(1, messages=2)
    worker = Worker(cluster, "a", topic_id, start_ms=WALL_MS * 2)
    worker.beat()
    parked = worker.park()
    cluster.admin_asks(wire.AlterTopic(topic_id, 3, wire.Settings()))
    assert [(lease.partition, lease.next) for lease in worker.told(parked).granted] == [(1, 0), (2, 0)]


def test_new_partitions_begin_at_their_earliest_though_nobody_was_there() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=2)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    worker.leave()
    cluster.admin_asks(wire.AlterTopic(topic_id, 2, wire.Settings()))
    cluster.fill(topic_id, 5, 1)
    late = Worker(cluster, "b", topic_id, start_ms=WALL_MS * 2)
    assert [(lease.partition, lease.next) for lease in late.beat().granted] == [(0, 0), (1, 0)]


def test_where_somebody_sought_before_the_group_begins_it_begins_there() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=4)
    assert isinstance(cluster.seek(topic_id, 0, 3, partition=1), wire.Sought)
    worker = Worker(cluster, "a", topic_id)
    assert [(lease.partition, lease.next) for lease in worker.beat().granted] == [(0, 0), (1, 3)]


# ------------------------------------------------------------------------------------------------- several topics


def test_members_of_a_group_may_want_different_topics() -> None:
    cluster = Cluster()
    one, two, three = (cluster.make_topic(2, name) for name in ("one", "two", "three"))
    a, b = Worker(cluster, "a", one, two), Worker(cluster, "b", two, three)
    for _ in range(3):
        for worker in (a, b):
            worker.give_back(*worker.beat().revoked)
            worker.beat()
    assert {key.topic_id for key in a.membership.held} >= {one}
    assert {key.topic_id for key in b.membership.held} >= {three}
    both = [*a.membership.held, *b.membership.held]
    assert sorted(both) == [TopicPartition(topic, index) for topic in (one, two, three) for index in range(2)]
    assert abs(len(a.held) - len(b.held)) <= 1


def test_what_a_member_no_longer_wants_it_gives_back() -> None:
    cluster = Cluster()
    one, two = cluster.make_topic(1, "one"), cluster.make_topic(1, "two")
    worker = Worker(cluster, "a", one, two)
    worker.beat()
    worker.membership._topics = [two]
    assert worker.beat().revoked == [TopicPartition(one, 0)]
    worker.give_back(TopicPartition(one, 0))
    worker.beat()
    assert (cluster.row(one).holder, cluster.row(two).holder) == ("", "a")


def test_a_member_that_waits_is_told_that_its_topic_is_deleted() -> None:
    cluster = Cluster()
    one, two = cluster.make_topic(1, "one"), cluster.make_topic(1, "two", 3)
    worker = Worker(cluster, "a", one, two)
    worker.beat()
    parked = worker.park()
    assert cluster.step(cluster.admin, wire.DeleteTopic(one)) is None
    group = cluster.begin()
    assert parked not in cluster.answers, "not before the disk has it"
    cluster.store.commit(group)
    cluster.keep(cluster.core.committed())
    failed = cluster.answers.pop(parked)
    assert (failed.code, failed.text) == (Code.UNKNOWN_TOPIC, f"there is no topic {one} (any more)")
    assert worker.refused().code == Code.UNKNOWN_TOPIC
    assert worker.commit(two, 2) == STORED, "its other leases hold"
    worker.membership._topics = [two]
    assert worker.beat().lost == [TopicPartition(one, 0)]
    cluster.wait(5000)
    assert cluster.store.offset(OffsetKey("g", one, 0)) is None


def test_a_subscription_is_no_larger_than_one_member_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LEASES_MAX", 4)
    cluster = Cluster()
    topic_id = cluster.make_topic(3)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    parked = worker.park()
    cluster.admin_asks(wire.AlterTopic(topic_id, 5, wire.Settings()))
    failed = cluster.answers.pop(parked)
    assert (failed.code, failed.text) == (Code.TOO_LARGE, "a subscription has at most 4 partitions, and not 5")
    assert worker.refused() == failed


# ------------------------------------------------------------------------------------------------------------ seek


def test_its_holder_seeks_and_goes_on_holding() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    worker.commit(topic_id, 6, metadata=b"m", attempts=2)
    old, key = worker.lease(topic_id), TopicPartition(topic_id, 0)
    parked = worker.park()
    request = wire.Seek("g", topic_id, 0, "nonce", old, 2, "a")
    sought = cluster.ask(worker.connection, request)
    assert sought == wire.Sought(cluster.row(topic_id).lease, 2)
    assert cluster.row(topic_id) == OffsetRow(2, sought.lease, "a", None, old, 6, sought_by="nonce")
    assert cluster.ask(worker.connection, request) == sought, "the same one again, its answer was lost"
    assert worker.commit(topic_id, 7, 6).details["next"] == 6, "the lease before ended there"
    worker.membership.sought(key, sought.lease)
    cluster.admin_asks(wire.AlterTopic(topic_id, 2, wire.Settings()))
    changes = worker.told(parked)
    assert (changes.lost, [lease.partition for lease in changes.granted]) == ([], [1]), "it knows what it set itself"
    assert worker.beat() == Changes([], [], [])
    worker.leases[key] = worker.leases[key]._replace(lease=sought.lease)
    assert worker.commit(topic_id, 3, 2) == STORED


def test_a_holder_whose_answer_was_lost_hears_of_it_with_the_next_heartbeat() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    sought = cluster.ask(worker.connection, wire.Seek("g", topic_id, 0, "nonce", worker.lease(topic_id), 2, "a"))
    changes = worker.beat()
    assert changes.lost == [TopicPartition(topic_id, 0)]
    assert [(lease.lease, lease.next) for lease in changes.granted] == [(sought.lease, 2)]


def test_an_administrator_seeks_and_the_holder_is_told_at_once() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    worker.commit(topic_id, 6)
    old, parked = worker.lease(topic_id), worker.park()
    sought = cluster.seek(topic_id, old, 1)
    changes = worker.told(parked)
    assert changes.lost == [TopicPartition(topic_id, 0)]
    [lease] = changes.granted
    assert (lease.next, lease.lease > sought.lease > old) == (1, True)
    refused = cluster.ask(
        worker.connection, wire.Commit(0, 0, -1, 0, [], [worker.entry(topic_id, 7)._replace(lease=old)])
    )
    assert refused.code == Code.LEASE_LOST
    assert cluster.seek(topic_id, old, 1).lease == lease.lease, "the same one again changes nothing"
    assert cluster.row(topic_id).lease == lease.lease


def test_of_two_who_seek_one_wins() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    Worker(cluster, "a", topic_id).beat()
    lease = cluster.row(topic_id).lease
    won = cluster.seek(topic_id, lease, 3, nonce="one")
    raced = cluster.seek(topic_id, lease, 5, nonce="two")
    assert (raced.code, raced.details["epoch"]) == (Code.OPEN_RACE, won.lease)
    assert cluster.row(topic_id).next == 3
    assert cluster.seek(topic_id, won.lease, 5, nonce="two").next == 5


def test_a_seek_repeated_by_a_member_that_lost_the_partition_tells_it_no_lease() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    gone = Worker(cluster, "a", topic_id)
    gone.beat()
    request = wire.Seek("g", topic_id, 0, "nonce", gone.lease(topic_id), 2, "a")
    cluster.ask(gone.connection, request)  # the answer is lost
    cluster.wait(TIMEOUT_MS + 200)
    other = Worker(cluster, "b", topic_id)
    [lease] = other.beat().granted
    raced = cluster.ask(gone.connection, request)
    assert (raced.code, raced.details["epoch"]) == (Code.OPEN_RACE, lease.lease)


def test_who_does_not_hold_it_does_not_hold_it_by_seeking() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    holder = Worker(cluster, "a", topic_id)
    holder.beat()
    cluster.admin_asks(wire.Seek("g", topic_id, 0, "nonce", holder.lease(topic_id), 2, "b"))
    assert cluster.row(topic_id).holder == ""
    cluster.restart()  # nobody is waited for
    assert [lease.next for lease in Worker(cluster, "c", topic_id).beat().granted] == [2]


def test_a_seek_goes_nowhere_where_nothing_is_yet() -> None:
    cluster = Cluster(offsets_max=1)
    topic_id = cluster.make_topic(2, messages=3)
    for refused in (
        cluster.seek(topic_id, 0, 4),
        cluster.seek(topic_id, 0, 0, partition=2),
        cluster.seek(topic_id + 9, 0, 0),
        cluster.seek(topic_id, 7, 0),
    ):
        assert refused.code in (Code.BAD_REQUEST, Code.UNKNOWN_TOPIC, Code.OPEN_RACE)
    assert cluster.store.offset_count() == 0
    assert cluster.seek(topic_id, 0, 3).next == 3
    assert cluster.seek(topic_id, 0, 3, partition=1).code == Code.QUOTA_EXCEEDED
    assert cluster.store.offset_count() == 1
    assert isinstance(cluster.admin_asks(wire.AlterTopic(topic_id, 3, wire.Settings())), wire.TopicIs)


# ---------------------------------------------------------------------------------------------- positions and attempts


def test_attempts_only_rise_and_go_when_the_position_moves() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    for attempts, expected in ((2, 2), (1, 2), (None, 2), (3, 3)):
        assert worker.commit(topic_id, 0, attempts=attempts) == STORED
        assert cluster.row(topic_id).attempts == expected
    worker.commit(topic_id, 4)
    assert cluster.row(topic_id)[0] == 4
    assert cluster.row(topic_id).attempts == 0
    worker.commit(topic_id, 5, 4, attempts=1)
    assert cluster.row(topic_id).attempts == 1
    worker.commit(topic_id, 3, 0, attempts=7)  # a late copy, from before
    assert (cluster.row(topic_id).next, cluster.row(topic_id).attempts) == (5, 1)
    cluster.wait(TIMEOUT_MS * 2)
    [lease] = Worker(cluster, "b", topic_id).beat().granted
    assert (lease.next, lease.attempts) == (5, 1)


def test_what_is_told_of_attempts_late_or_twice_does_nothing() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    told = ((0, 1), (0, 2), (0, 1), (0, 3), (1, 4), (0, 3), (1, 5), (1, 4), (None, 6), (2, 0))
    seen = []
    for attempts, turns in told:
        assert worker.commit(topic_id, 0, attempts=attempts, turns=turns) == STORED
        seen.append((cluster.row(topic_id).attempts, cluster.row(topic_id).turns))
    assert seen == [(0, 1), (0, 2), (0, 2), (0, 3), (1, 4), (1, 4), (1, 5), (1, 5), (1, 6), (2, 6)]
    worker.commit(topic_id, 4)
    assert (cluster.row(topic_id).attempts, cluster.row(topic_id).turns) == (0, 0)
    worker.commit(topic_id, 0, attempts=1, turns=7)
    assert (cluster.row(topic_id).attempts, cluster.row(topic_id).turns) == (0, 0)
    worker.commit(topic_id, 5, 4, attempts=0, turns=7)  # behind what retention removed
    assert (cluster.row(topic_id).next, cluster.row(topic_id).turns) == (5, 7)


def test_attempts_are_stored_in_a_transaction_too() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    opened = cluster.ask(worker.connection, wire.Open("p", "s", 0))
    entry = worker.entry(topic_id, 0, attempts=1)
    commit = wire.Commit(opened.producer_id, opened.epoch, -1, 0, [], [entry])
    assert cluster.ask(worker.connection, commit) == STORED
    assert cluster.row(topic_id).attempts == 1
    conflict = commit._replace(prev_seq=0, last_seq=1, offsets=[entry._replace(start=1, end=2)])
    failed = cluster.ask(worker.connection, conflict)
    assert (failed.code, failed.details["next"]) == (Code.OFFSET_CONFLICT, 0)


def test_a_begun_position_is_nobodys_to_move() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=9)
    entry = wire.Offset("g", topic_id, 0, 1, 0, 4)
    assert cluster.ask(cluster.admin, wire.Commit(0, 0, -1, 0, [], [entry])).code == Code.LEASE_LOST


# ------------------------------------------------------------------------------------------------------------- blame


def blamed(in_hand_max: int, messages: Sequence[int], committed: int = 0, **changed: Any) -> list[tuple[int, int]]:
    """(attempts, suspects_end) of each partition's row after its member vanished."""
    cluster = Cluster()
    topic_id = cluster.make_topic(len(messages))
    for index, count in enumerate(messages):
        cluster.fill(topic_id, count, index)
    worker = Worker(cluster, "a", topic_id, in_hand_max=in_hand_max)
    worker.beat()
    if committed:
        worker.commit(topic_id, committed)
    if changed:
        key = OffsetKey("g", topic_id, 0)
        cluster.core._put_offset(key, cluster.row(topic_id)._replace(**changed))
    cluster.wait(TIMEOUT_MS + 200)
    rows = [cluster.row(topic_id, index) for index in range(len(messages))]
    assert {row.holder for row in rows} == {""}
    return [(row.attempts, row.suspects_end) for row in rows]


def test_what_may_have_been_in_hand_is_suspected_and_nobody_blamed() -> None:
    assert blamed(5, [1]) == [(0, 1)], "not even one alone: it may have come when its member was gone already"
    assert blamed(5, [2]) == [(0, 2)]
    assert blamed(5, [1, 0, 3]) == [(0, 1), (0, 0), (0, 3)]
    assert blamed(5, [2], attempts=2) == [(2, 2)]


def test_suspects_are_no_more_than_the_member_promised() -> None:
    assert blamed(3, [9]) == [(0, 3)]
    assert blamed(3, [9], committed=4) == [(0, 7)]
    assert blamed(30, [9], committed=4) == [(0, 9)]


def test_without_a_promise_the_next_message_is_suspected() -> None:
    assert blamed(0, [9], committed=4) == [(0, 5)]


def test_a_suspect_counts_for_itself() -> None:
    assert blamed(5, [9], committed=4, suspects_end=5) == [(0, 5)]
    assert blamed(5, [5], committed=4, suspects_end=5, attempts=1) == [(1, 5)]
    assert blamed(5, [9], committed=4, suspects_end=4) == [(0, 9)], "those before it are done with"


def test_where_nothing_was_nothing_is_suspected() -> None:
    assert blamed(5, [0]) == [(0, 0)]
    assert blamed(5, [3], committed=3) == [(0, 0)]


def test_a_second_worker_that_dies_of_it_is_counted_by_itself_alone() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=3)
    Worker(cluster, "a", topic_id, in_hand_max=3).beat()
    cluster.wait(TIMEOUT_MS + 200)
    second = Worker(cluster, "b", topic_id, in_hand_max=3)
    [lease] = second.beat().granted
    assert (lease.attempts, lease.suspects_end) == (0, 3)
    second.commit(topic_id, 0, attempts=0, turns=1)  # before it begins with the first suspect
    cluster.wait(TIMEOUT_MS + 200)
    third = Worker(cluster, "c", topic_id, in_hand_max=3)
    [lease] = third.beat().granted
    assert (lease.attempts, lease.suspects_end) == (1, 3)
    third.commit(topic_id, 1)
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id)[6:8] == (0, 3), "the next suspect is not to blame for it"


def test_what_is_taken_by_force_blames_nobody() -> None:
    cluster = Cluster(release_ms_max=500)
    topic_id = cluster.make_topic(2, messages=1)
    one, two = Worker(cluster, "a", topic_id, in_hand_max=1), Worker(cluster, "b", topic_id, in_hand_max=1)
    one.beat()
    two.beat()
    [moving] = one.beat().revoked
    one.commit(topic_id, 0, partition=moving.partition, attempts=0, turns=1)
    cluster.wait(700)
    assert cluster.row(*moving)[6:8] == (0, 0)
    one.commit(topic_id, 0, partition=moving.partition, attempts=1, turns=2)
    assert cluster.row(*moving)[6:8] == (1, 0), "it has failed, and nobody else has the lease yet"


def at_work() -> tuple[Cluster, int, Worker]:
    """A member that has begun with the first of two suspects."""
    cluster = Cluster()
    topic_id = cluster.make_topic(1, messages=2)
    Worker(cluster, "a", topic_id, in_hand_max=2).beat()
    cluster.wait(TIMEOUT_MS + 200)
    worker = Worker(cluster, "b", topic_id, in_hand_max=2)
    worker.beat()
    assert worker.commit(topic_id, 0, attempts=0, turns=1) == STORED
    return cluster, topic_id, worker


def test_the_attempt_of_a_member_that_vanished_counts_once() -> None:
    cluster, topic_id, _ = at_work()
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id)[6:8] == (1, 2)
    assert Worker(cluster, "c", topic_id).beat().granted[0].attempts == 1
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id)[6:8] == (1, 2), "the next one has begun nothing"


@pytest.mark.parametrize("how", ["leaves", "gives back", "ends it", "is never heard of", "is overruled"])
def test_an_attempt_that_is_cut_short_does_not_count(how: str) -> None:
    cluster, topic_id, worker = at_work()
    if how == "leaves":
        worker.leave()
    elif how == "gives back":
        other = Worker(cluster, "z", topic_id)
        worker.membership._topics = [cluster.make_topic(1, "other")]  # it wants another topic from now on
        worker.give_back(TopicPartition(topic_id, 0))
        worker.beat()
        other.beat()
        other.leave()
    elif how == "ends it":
        assert worker.commit(topic_id, 0, attempts=0, turns=2) == STORED
    elif how == "is never heard of":
        cluster.restart()
        Worker(cluster, "z", topic_id).beat()
    else:
        assert cluster.seek(topic_id, worker.lease(topic_id), 0).next == 0
    cluster.wait(TIMEOUT_MS + 200)
    row = cluster.row(topic_id)
    assert (row.holder, row.attempts, row.turns % 2) == ("", 0, 0)
    assert Worker(cluster, "c", topic_id).beat().granted[0].attempts == 0
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id).attempts == 0, "nor later"


def test_after_a_restart_the_attempt_of_a_member_that_is_heard_of_counts() -> None:
    cluster, topic_id, worker = at_work()
    cluster.restart()
    worker.reconnect()
    assert worker.beat() == Changes([], [], [])
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id).attempts == 1


def test_one_attempt_counts_once_though_its_member_comes_back() -> None:
    cluster, topic_id, worker = at_work()
    cluster.wait(TIMEOUT_MS + 200)
    assert worker.beat() == Changes([], [], [])
    assert cluster.row(topic_id).attempts == 1
    cluster.wait(TIMEOUT_MS + 200)
    assert worker.beat() == Changes([], [], [])
    assert cluster.row(topic_id).attempts == 1
    worker.commit(topic_id, 0, attempts=1, turns=2)
    assert cluster.row(topic_id).attempts == 1, "it failed: that is the one which counts"
    worker.commit(topic_id, 0, attempts=1, turns=3)
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id).attempts == 2


def test_an_attempt_that_is_told_when_its_lease_has_ended_is_nobodys() -> None:
    cluster, topic_id, worker = at_work()
    worker.commit(topic_id, 1)
    cluster.wait(TIMEOUT_MS + 200)
    worker.commit(topic_id, 1, 1, attempts=0, turns=3)  # it was on its way when its sender died
    assert (cluster.row(topic_id).holder, cluster.row(topic_id).turns) == ("", 3)
    [lease] = Worker(cluster, "c", topic_id).beat().granted
    assert (lease.attempts, cluster.row(topic_id).turns) == (0, 0)
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id).attempts == 0


@pytest.mark.parametrize("turns", [1, 2])
def test_who_gives_back_what_it_is_to_hold_is_granted_it_anew(turns: int) -> None:
    """And not told the lease that it has: under that one it has told of attempts, and must not begin to count again."""
    cluster, topic_id, worker = at_work()
    worker.commit(topic_id, 0, attempts=0, turns=turns)
    old = worker.leases[TopicPartition(topic_id, 0)]
    worker.give_back(TopicPartition(topic_id, 0))
    [lease] = worker.beat().granted
    assert (lease.lease > old.lease, lease.attempts) == (True, 0)
    assert cluster.row(topic_id).turns == 0
    assert worker.beat() == Changes([], [], [])
    late = wire.Commit(0, 0, -1, 0, [], [worker.entry(topic_id, 0, attempts=0, turns=1)._replace(lease=old.lease)])
    assert cluster.ask(worker.connection, late).code == Code.LEASE_LOST
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.row(topic_id).attempts == 0


def test_attempts_stay_within_what_the_wire_can_say() -> None:
    cluster, topic_id, worker = at_work()
    worker.commit(topic_id, 0, attempts=wire.NUMBER_MAX, turns=wire.NUMBER_MAX)
    cluster.wait(TIMEOUT_MS + 200)
    [lease] = Worker(cluster, "c", topic_id).beat().granted
    assert lease.attempts == wire.NUMBER_MAX


# ------------------------------------------------------------------------------------------------ deleting, quotas


def test_positions_are_deleted_when_the_group_has_no_members() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2, messages=5)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    worker.commit(topic_id, 3)
    delete = wire.DeleteOffsets("g", topic_id)
    assert cluster.admin_asks(delete).code == Code.BAD_REQUEST
    worker.leave()
    assert cluster.admin_asks(delete._replace(group="other")) == wire.Done()
    assert cluster.store.offset_count() == 2
    assert cluster.admin_asks(delete) == cluster.admin_asks(delete) == wire.Done()
    assert cluster.store.offset_count() == 0
    assert cluster.admin_asks(wire.DeleteOffsets("g", topic_id + 9)) == wire.Done()
    assert worker.commit(topic_id, 4).code == Code.LEASE_LOST
    again = Worker(cluster, "b", topic_id, start_ms=WALL_MS * 2)
    granted = again.beat().granted
    assert [lease.next for lease in granted] == [5, 5], "as if it had never been"
    assert min(lease.lease for lease in granted) > max(lease.lease for lease in worker.leases.values())


def test_after_a_restart_positions_of_a_holder_are_not_deleted_before_it_is_gone() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(messages=5)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    worker.commit(topic_id, 3)
    cluster.restart()
    delete = wire.DeleteOffsets("g", topic_id)
    assert cluster.admin_asks(delete).code == Code.BAD_REQUEST
    worker.reconnect()
    assert worker.beat() == Changes([], [], [])
    assert worker.commit(topic_id, 4, 3) == STORED
    cluster.restart()
    assert cluster.admin_asks(delete).code == Code.BAD_REQUEST
    cluster.wait(TIMEOUT_MS + 200)
    assert cluster.admin_asks(delete) == wire.Done()
    assert cluster.store.offset_count() == 0


def test_positions_have_a_quota() -> None:
    cluster = Cluster(offsets_max=4)
    topic_id = cluster.make_topic(3)
    worker = Worker(cluster, "a", topic_id)
    worker.beat()
    counter = cluster.store.counter()
    refused = Worker(cluster, "b", topic_id, group="other").refused()
    assert (refused.code, refused.text) == (
        Code.QUOTA_EXCEEDED,
        "this broker keeps 4 positions of groups (offsets_max)",
    )
    assert (cluster.store.offset_count(), cluster.store.counter()) == (3, counter)
    assert list(cluster.core._groups) == ["g"]
    small = cluster.make_topic(1, "small")
    entries = [worker.entry(topic_id, 0, partition=index, attempts=1) for index in range(3)]
    cluster.step(worker.connection, wire.Commit(0, 0, -1, 0, [], entries))  # stored already: they do not count twice
    assert cluster.step(worker.connection, Worker(cluster, "c", small, group="c").membership.report(0)) is None
    assert cluster.step(worker.connection, Worker(cluster, "d", small, group="d").membership.report(0)) is None
    number = cluster.number
    cluster.flush()
    assert cluster.answers[number].code == Code.QUOTA_EXCEEDED, "what is not durable yet counts, too"
    assert cluster.store.offset_count() == 4


def test_a_group_has_so_many_members() -> None:
    cluster = Cluster(group_members_max=2)
    topic_id = cluster.make_topic()
    for name in "ab":
        Worker(cluster, name, topic_id).beat()
    refused = Worker(cluster, "c", topic_id).refused()
    assert (refused.code, refused.text) == (Code.QUOTA_EXCEEDED, "group 'g' has 2 members (group_members_max)")
    Worker(cluster, "a", topic_id).beat()  # who is one already is not refused
    assert len(cluster.admin_asks(wire.Members(None)).members) == 2
    Worker(cluster, "c", topic_id, group="other").beat()


# ----------------------------------------------------------------------------------------------------------- listings


def offsets(cluster: Cluster, group: str | None) -> tuple[list[wire.OffsetEntry], int]:
    """(all, in so many pages)."""
    found: list[wire.OffsetEntry] = []
    after, pages = None, 0
    while True:
        page = cluster.admin_asks(wire.Offsets(group, after))
        found += page.offsets
        pages += 1
        after = page.after
        if after is None:
            return found, pages


def test_positions_are_listed_as_they_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(3, messages=5)
    workers = [Worker(cluster, f"w{index}", topic_id, group=f"g{index}") for index in range(3)]
    for worker in workers:
        worker.beat()
    workers[1].commit(topic_id, 2, partition=2, metadata=b"m")
    cluster.step(workers[1].connection, wire.Commit(0, 0, -1, 0, [], [workers[1].entry(topic_id, 0, attempts=4)]))
    number = cluster.step(cluster.admin, wire.Offsets("g1"))
    assert number is None, "the answer waits for what it shows (rule 9)"
    cluster.flush()
    listed, _ = offsets(cluster, "g1")
    leases = [workers[1].lease(topic_id, index) for index in range(3)]
    assert listed == cluster.answers[cluster.number - 1].offsets
    assert listed == [
        wire.OffsetEntry("g1", topic_id, 0, 0, leases[0], "w1", 4, None),
        wire.OffsetEntry("g1", topic_id, 1, 0, leases[1], "w1", 0, None),
        wire.OffsetEntry("g1", topic_id, 2, 2, leases[2], "w1", 0, b"m"),
    ]
    everything, pages = offsets(cluster, None)
    assert pages == 1
    assert [(one.partition, one.group) for one in everything] == [
        (index, f"g{group}") for index in range(3) for group in range(3)
    ]
    for rows in (1, 2, 4, 9):
        monkeypatch.setattr(core_module, "SCAN_ROWS", rows)
        assert offsets(cluster, "g1")[0] == listed
        assert offsets(cluster, None)[0] == everything
        assert offsets(cluster, "nobody")[0] == []
    workers[0].leave()
    cluster.admin_asks(wire.DeleteOffsets("g0", topic_id))
    assert offsets(cluster, None)[0] == [one for one in everything if one.group != "g0"]


def test_a_page_of_positions_fits_into_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(200, messages=1)
    worker = Worker(cluster, "w", topic_id)
    worker.beat()
    entries = [worker.entry(topic_id, 1, partition=index, metadata=bytes(4096)) for index in range(200)]
    assert cluster.ask(worker.connection, wire.Commit(0, 0, -1, 0, [], entries)) == STORED
    listed, pages = offsets(cluster, None)
    assert (len(listed), pages) == (200, 2)
    assert len(wire.encode(1, cluster.admin_asks(wire.Offsets(None)))) <= core_module.PAGE_BYTES_MAX
    monkeypatch.setattr(wire, "NAMES_MAX", 30)
    assert offsets(cluster, None) == (listed, 7)


def test_an_assignment_fits_into_a_frame() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(200, messages=1)
    worker = Worker(cluster, "w", topic_id)
    worker.beat()
    entries = [worker.entry(topic_id, 1, partition=index, metadata=bytes(4096)) for index in range(200)]
    cluster.ask(worker.connection, wire.Commit(0, 0, -1, 0, [], entries))
    worker.leave()
    other = Worker(cluster, "o", topic_id)
    pages = [other.beat().granted for _ in range(3)]
    assert [len(page) > 0 for page in pages] == [True, True, False]
    assert {lease.partition for page in pages for lease in page} == set(range(200))
    assert {cluster.row(topic_id, index).holder for index in range(200)} == {"o"}
    assert len(wire.encode(1, wire.Assignment(pages[0], [], [], 1))) <= core_module.PAGE_BYTES_MAX + 5000


def test_members_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic(2)
    for group in ("g", "h"):
        for name in "ab":
            Worker(cluster, name, topic_id, group=group).beat()
    everything = cluster.admin_asks(wire.Members(None))
    assert everything.more is False
    assert [(one.group, one.member, one.client, one.address) for one in everything.members] == [
        (group, name, "test", "test") for group in ("g", "h") for name in "ab"
    ]
    assert everything.members[0].held == [TopicPartition(topic_id, 0), TopicPartition(topic_id, 1)]
    assert cluster.admin_asks(wire.Members("h")).members == everything.members[2:]
    assert cluster.admin_asks(wire.Members("i")).members == []
    monkeypatch.setattr(wire, "NAMES_MAX", 1)
    found: list[wire.MemberEntry] = []
    page = cluster.admin_asks(wire.Members(None))
    while True:
        found += page.members
        if not page.more:
            break
        page = cluster.admin_asks(wire.Members(None, found[-1].group, found[-1].member))
    assert found == everything.members


def test_a_page_of_members_fits_into_a_frame() -> None:
    cluster = Cluster()
    topic_id = cluster.make_topic()
    for index in range(200):
        worker = Worker(cluster, f"w{index}", topic_id)
        worker.connection.client = "x" * 4000
        worker.beat()
    page = cluster.admin_asks(wire.Members(None))
    assert page.more
    assert len(wire.encode(1, page)) <= core_module.PAGE_BYTES_MAX


# -------------------------------------------------------------------------------------------------- who holds what

Topics = dict[int, int]


@st.composite
def subscriptions(draw: st.DrawFn) -> tuple[dict[str, frozenset[int]], Topics, dict[TopicPartition, str]]:
    """(members and what they want, topics, who holds what now)."""
    partitions = draw(st.dictionaries(st.integers(1, 5), st.integers(1, 12), min_size=1))
    wanted = st.frozensets(st.sampled_from(sorted(partitions)), min_size=1)
    subscribed = draw(st.dictionaries(st.sampled_from("abcdefgh"), wanted, max_size=8))
    keys = [TopicPartition(topic_id, index) for topic_id, count in partitions.items() for index in range(count)]
    holders = draw(st.lists(st.sampled_from([*"abcdefgh", "", "", "gone"]), min_size=len(keys), max_size=len(keys)))
    return subscribed, partitions, {key: holder for key, holder in zip(keys, holders, strict=True) if holder}


def by_partition(targets: dict[str, list[TopicPartition]]) -> dict[TopicPartition, str]:
    holders = {key: member for member, keys in targets.items() for key in keys}
    assert len(holders) == sum(map(len, targets.values())), "one partition, one member"
    return holders


@given(subscriptions())
def test_every_partition_has_one_member_that_wants_it(
    case: tuple[dict[str, frozenset[int]], Topics, dict[TopicPartition, str]],
) -> None:
    subscribed, partitions, held = case
    targets = groups.assigned(subscribed, partitions, held)
    assert targets.keys() == subscribed.keys()
    holders = by_partition(targets)
    wanted = {topic_id for topics in subscribed.values() for topic_id in topics}
    assert holders.keys() == {
        TopicPartition(topic_id, index) for topic_id in wanted for index in range(partitions[topic_id])
    }
    for key, member in holders.items():
        assert key.topic_id in subscribed[member]
    for one, keys in targets.items():
        for other, others in targets.items():
            if subscribed[one] == subscribed[other]:
                assert abs(len(keys) - len(others)) <= 1
    backwards = dict(reversed(subscribed.items()))
    assert groups.assigned(backwards, dict(reversed(partitions.items())), dict(reversed(held.items()))) == targets
    assert by_partition(groups.assigned(subscribed, partitions, holders)) == holders, "what is even stays"


@given(st.integers(1, 9), st.dictionaries(st.integers(1, 4), st.integers(1, 12), min_size=1), st.booleans())
def test_no_more_partitions_move_than_must(members: int, partitions: Topics, joins: bool) -> None:
    wanted = frozenset(partitions)
    before = {f"m{index}": wanted for index in range(members)}
    holders = by_partition(groups.assigned(before, partitions, {}))
    after = dict(before)
    if joins:
        after["new"] = wanted
    else:
        del after["m0"]
    moved = [
        key
        for key, member in by_partition(groups.assigned(after, partitions, holders)).items()
        if holders[key] != member
    ]
    count = sum(partitions.values())
    if joins:
        assert len(moved) == count // (members + 1)
    else:
        assert len(moved) == (0 if members == 1 else sum(1 for member in holders.values() if member == "m0"))


def calls_of(function: Callable[[], object]) -> int:
    """How many functions are called on the way."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


CALLS_MAX = 20
"""Of a partition and rebalance. The broker does nothing else meanwhile."""


@pytest.mark.parametrize(("members", "share"), [(300, 1.0), (50, 0.5), (50, 0.1)])
def test_members_that_want_unlike_topics_take_no_more_work_than_those_that_want_the_same(
    members: int, share: float
) -> None:
    rng = Random(7)
    partitions = dict.fromkeys(range(300), 8)
    subscribed = {f"m{n}": frozenset(one for one in partitions if rng.random() < share) for n in range(members)}
    assert calls_of(lambda: groups.assigned(subscribed, partitions, {})) < CALLS_MAX * sum(partitions.values())


def test_who_can_give_nothing_is_not_asked_again_and_again() -> None:
    partitions = dict.fromkeys(range(120), 8)
    members = [(f"m{n:02}", frozenset(range(2 * n + 2))) for n in range(60)]
    targets = groups.assigned(dict(members), partitions, {})
    assert {len(keys) for keys in targets.values()} == {16}, "first of all what only few want has its place"
    Random(1).shuffle(members)

    def one_after_the_other() -> None:
        present: dict[str, frozenset[int]] = {}
        held: dict[TopicPartition, str] = {}
        for member, wanted in members:
            present[member] = wanted
            held = by_partition(groups.assigned(present, partitions, held))

    assert calls_of(one_after_the_other) < CALLS_MAX * sum(partitions.values()) * len(members)
