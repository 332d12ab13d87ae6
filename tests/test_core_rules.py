"""Guards of the core, each with the shortest run that notices when it is gone. The numbers are those of PROTOCOL.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from idemq.broker.core import Damaged, Read
from idemq.broker.fetches import collect
from idemq.broker.producers import Advance, ProducerRow, last_seq_of, result_of
from idemq.broker.store import MemoryStore
from idemq.broker.topics import Ends, Mark
from idemq.client import wire
from idemq.client.wire import Code, Committed

from .support import CoreBroker, commit

HOUR_MS = 3600 * 1000

# ------------------------------------------------------------------------------------------------ commits are refused


@pytest.mark.parametrize("numbers", [(-1, -1), (0, 0), (1, 0)])
def test_rule_1_a_commit_takes_at_least_one_number(numbers: tuple[int, int]) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    producer = broker.open(connection)
    if numbers[1] == 0:
        assert not broker.ask(connection, *commit(producer, -1, 0)).duplicate
    refused = broker.ask(connection, *commit(producer, *numbers))
    assert (refused.code, refused.text) == (
        Code.BAD_REQUEST,
        "a commit must take at least one number: last_seq > prev_seq",
    )


@pytest.mark.parametrize("moves", [[(1, 3)], [(1, 0)], [(1, 1), (1, 1)], [(1, 1), (1, 2)]])
def test_rule_7_a_position_moves_once_and_forward_and_within_its_partition(moves: list[tuple[int, int]]) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    for _ in range(2):
        broker.append(connection, topic_id)
    key = broker.hold(topic_id, next=1)
    producer = broker.open(connection)
    entries = [wire.Offset(*key, 9, start, end) for start, end in moves]
    assert broker.ask(connection, *commit(producer, -1, 0, offsets=entries)).code == Code.BAD_REQUEST
    row = broker.store.offset(key)
    assert row is not None
    assert row.next == 1
    good = wire.Offset(*key, 9, 1, 2)
    assert broker.ask(connection, *commit(producer, -1, 0, offsets=[good])) == Committed(False, [])


@pytest.mark.parametrize("number", [0, 2])
def test_rule_7_a_batch_has_only_numbers_that_its_commit_takes(number: int) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    producer = broker.open(connection)
    assert not broker.ask(connection, *commit(producer, -1, 0)).duplicate
    refused = broker.ask(connection, *commit(producer, 0, 1, (topic_id, 0, number)))
    assert (refused.code, refused.text) == (Code.BAD_REQUEST, "the batch has numbers that the commit does not take")
    assert not broker.ask(connection, *commit(producer, 0, 1, (topic_id, 0, 1))).duplicate


class Flawed(MemoryStore):
    """The store in memory, in which one partition cannot be read."""

    flawed = False

    def partition(self, topic_id: int, partition: int) -> Ends | None:
        """See `Rows.partition`."""
        if self.flawed and partition == 1:
            raise Damaged("a flipped bit")
        return super().partition(topic_id, partition)


def test_rule_8_a_partition_that_cannot_be_read_refuses_the_commit_before_anything_is_decided() -> None:
    store = Flawed()
    topic_id = CoreBroker(store).topic(CoreBroker(store).connect(), partitions=2)
    broker = CoreBroker(store)  # which has read none of the partitions yet
    connection = broker.connect()
    producer = broker.open(connection)
    store.flawed = True
    assert broker.step(connection, *commit(producer, -1, 0, (topic_id, 0, 0), (topic_id, 1, 0))) is None
    [refused] = broker.make_durable(broker.begin())
    assert refused.code == Code.STORE_DAMAGED
    assert store.oldest(topic_id, 0, 1) == []
    store.flawed = False
    stored = broker.ask(connection, *commit(producer, -1, 0, (topic_id, 0, 0), (topic_id, 1, 0)))
    assert (stored.duplicate, [position.offset for position in stored.positions]) == (False, [0, 0])


# ----------------------------------------------------------------------------------------- connections and takeovers


def test_rule_4_serials_are_kept_as_long_as_an_older_connection_is_open() -> None:
    broker = CoreBroker(rows_cached_max=1)
    old, new = broker.connect(), broker.connect()
    names = [broker.open(new, name) for name in ("p", "q")]
    for producer in names:
        assert not broker.ask(new, *commit(producer, -1, 0)).duplicate
    broker.core.disconnect(broker.connect())
    for producer in names:
        assert broker.ask(old, *commit(producer, 0, 1)).code == Code.STALE_CONNECTION
    broker.core.disconnect(old)
    assert broker.core._serials == {}


def test_rule_10_a_takeover_may_come_over_an_older_connection() -> None:
    broker = CoreBroker()
    old, new = broker.connect(), broker.connect()
    first = broker.open(new)
    assert not broker.ask(new, *commit(first, -1, 0)).duplicate
    second = broker.open(old, expected_epoch=first.epoch)
    assert broker.ask(old, *commit(second, 0, 1)) == Committed(False, [])
    assert broker.ask(new, *commit(first, 1, 2)).code == Code.PRODUCER_FENCED


def test_rule_3_the_ends_of_the_last_four_epochs_are_told() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    epochs = [broker.open(connection)]
    for number in range(5):
        assert not broker.ask(connection, *commit(epochs[-1], number - 1, number)).duplicate
        epochs.append(broker.open(connection, expected_epoch=epochs[-1].epoch))
    refusals = [broker.ask(connection, *commit(producer, 50, 51)) for producer in epochs[:-1]]
    assert {refused.code for refused in refusals} == {Code.PRODUCER_FENCED}
    assert [refused.details["ended_at"] for refused in refusals] == [None, 1, 2, 3, 4]


def test_rule_5_what_is_older_than_the_remembered_results_is_a_duplicate_without_positions() -> None:
    broker = CoreBroker(remembered=2)
    connection = broker.connect()
    topic_id = broker.topic(connection)
    producer = broker.open(connection)
    commits = [commit(producer, number - 1, number, (topic_id, 0, number)) for number in range(3)]
    first = [broker.ask(connection, *one).positions for one in commits]
    assert [broker.ask(connection, *one) for one in commits] == [
        Committed(True, None),
        Committed(True, first[1]),
        Committed(True, first[2]),
    ]
    other = commit(producer, 0, 1)
    assert broker.ask(connection, *other).code == Code.SEQUENCE_CONFLICT, "remembered, and not the same"


def test_rule_5_a_repetition_is_equal_in_all_that_would_be_stored() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection, partitions=2)
    broker.append(connection, topic_id)
    key = broker.hold(topic_id)
    row = broker.store.offset(key)
    assert row is not None

    def one_of(kind: str, producer: Any) -> tuple[wire.Commit, bytes]:
        if kind == "two batches":
            return commit(producer, -1, 1, (topic_id, 0, 0), (topic_id, 1, 1))
        request, payload = commit(producer, -1, 1, (topic_id, 0, 0))
        if kind == "with a token":
            request = request._replace(token=b"token")
        if kind == "with a position":
            request = request._replace(offsets=[wire.Offset(*key, 9, 0, 0, b"metadata")])
        return request, payload

    kinds = ("one batch", "two batches", "with a token", "with a position")
    for stored in kinds:
        producer = broker.open(connection, stored)
        first = broker.ask(connection, *one_of(stored, producer))
        assert not first.duplicate
        for kind in kinds:
            answer = broker.ask(connection, *one_of(kind, producer))
            if kind == stored:
                assert answer == Committed(True, first.positions)
            else:
                assert answer.code == Code.SEQUENCE_CONFLICT, (stored, kind)


def test_what_is_stored_of_a_commit_of_one_batch_holds_its_checksum() -> None:
    """No other fingerprint, whatever is faster: stores hold it, and a repetition may come after an update."""
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    producer = broker.open(connection)
    request, payload = commit(producer, -1, 0, (topic_id, 0, 0))
    [position] = broker.ask(connection, request, payload).positions
    row = broker.store.producer(producer.producer_id)
    assert row is not None
    assert row.results == (result_of(0, wire.batch_header(payload).checksum, [position]),)


def test_a_group_tells_of_a_producer_what_is_new() -> None:
    broker = CoreBroker(remembered=2)
    connection = broker.connect()
    assert broker.step(connection, wire.Open("p", "session", 0, False)) is None
    group = broker.begin()
    [(producer_id, row)] = group.producers.items()
    assert isinstance(row, ProducerRow), "all of it when it is opened"
    [producer] = broker.make_durable(group)

    def advance(first: int, count: int) -> Advance:
        for number in range(first, first + count):
            assert broker.step(connection, *commit(producer, number - 1, number)) is None
        group = broker.begin()
        broker.make_durable(group)
        told = group.producers[producer_id]
        assert isinstance(told, Advance)
        row = broker.store.producer(producer_id)
        assert row is not None
        assert list(map(last_seq_of, row.results)) == [*range(first + count)][-2:]
        return told

    assert list(map(last_seq_of, advance(0, 3).results)) == [1, 2], "no more than are remembered"
    for number in range(3, 5):
        told = advance(number, 1)
        assert list(map(last_seq_of, told.results)) == [number]
        assert told.kept == 2
    broker = CoreBroker(broker.store, remembered=2)
    connection = broker.connect()
    assert list(map(last_seq_of, advance(5, 1).results)) == [5], "also when it comes from the store"


@pytest.mark.parametrize("durable", [False, True])
def test_no_more_results_are_remembered_than_were_announced(durable: bool) -> None:
    broker = CoreBroker(remembered=2)
    connection = broker.connect()
    producer = broker.open(connection)
    commits = [commit(producer, number - 1, number) for number in range(4)]
    for one in commits:
        assert broker.step(connection, *one) is None
    if durable:
        broker.make_durable(broker.begin())
    for one in commits:
        assert broker.step(connection, *one) is None
    answers = broker.make_durable(broker.begin())[-4:]
    assert answers == [Committed(True, None), Committed(True, None), Committed(True, []), Committed(True, [])]


@pytest.mark.parametrize("parts", [1, 2])
def test_rule_5_a_repetition_that_was_damaged_on_the_way_is_no_conflict(parts: int) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection, partitions=2)
    producer = broker.open(connection)
    request, payload = commit(producer, -1, parts - 1, *[(topic_id, index, index) for index in range(parts)])
    assert not broker.ask(connection, request, payload).duplicate
    damaged = bytes([payload[0] ^ 1]) + payload[1:]
    # A definite refusal would tell the client that it is not stored (C5).
    assert broker.ask(connection, request, damaged).code == Code.CHECKSUM_MISMATCH
    assert broker.ask(connection, request, payload).duplicate


def test_rule_3_an_epoch_that_is_over_still_gets_its_results_and_one_that_never_was_is_another_stores() -> None:
    broker = CoreBroker()
    connection, newer = broker.connect(), broker.connect()
    topic_id = broker.topic(connection)
    first = broker.open(connection)
    one = commit(first, -1, 0, (topic_id, 0, 0))
    stored = broker.ask(connection, *one).positions
    second = broker.open(connection, expected_epoch=first.epoch)
    assert broker.ask(newer, *commit(second, 0, 1)) == Committed(False, [])
    # Before rule 4, and without a trace of it.
    assert broker.ask(connection, *one) == Committed(True, stored)
    assert broker.ask(broker.connect(), *commit(first, 1, 2)).code == Code.PRODUCER_FENCED
    assert broker.ask(newer, *commit(second, 1, 2)) == Committed(False, [])
    ahead = second._replace(epoch=second.epoch + 1)
    assert broker.ask(newer, *commit(ahead, 2, 3)).code == Code.STORE_REPLACED


@pytest.mark.parametrize("numbers", [(-1, 0), (5, 6)])
def test_rule_4_a_refusal_and_a_duplicate_leave_the_serial(numbers: tuple[int, int]) -> None:
    broker = CoreBroker()
    old, new = broker.connect(), broker.connect()
    producer = broker.open(old)
    assert broker.ask(old, *commit(producer, -1, 0)) == Committed(False, [])
    broker.ask(new, *commit(producer, *numbers))
    assert broker.ask(old, *commit(producer, 0, 1)).code == Code.STALE_CONNECTION


@pytest.mark.parametrize("prev_seq", [-1, 1])
def test_rule_6_a_commit_follows_the_last_one(prev_seq: int) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    producer = broker.open(connection)
    assert broker.ask(connection, *commit(producer, -1, 0)) == Committed(False, [])
    refused = broker.ask(connection, *commit(producer, prev_seq, 2))
    assert (refused.code, refused.details) == (Code.SEQUENCE_GAP, {"expected": 0})


@pytest.mark.parametrize("field", ["topic_id", "partition", "producer_id"])
def test_rule_7_a_batch_is_stored_only_where_and_for_whom_it_was_made(field: str) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topics = [broker.topic(connection, name, partitions=2) for name in ("t", "u")]
    producer, other = broker.open(connection), broker.open(connection, "q")
    request, payload = commit(producer, -1, 0, (topics[0], 0, 0))
    [append] = request.appends
    if field == "producer_id":
        request = request._replace(producer_id=other.producer_id, epoch=other.epoch)
    else:
        elsewhere = {"topic_id": topics[1]} if field == "topic_id" else {"partition": 1}
        request = request._replace(appends=[append._replace(**elsewhere)])
    refused = broker.ask(connection, request, payload)
    assert (refused.code, refused.text) == (
        Code.BAD_REQUEST,
        "the batch was made for another topic, partition or producer",
    )


def test_what_is_decided_in_one_group_is_known_to_whatever_follows_in_it() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    first = broker.open(connection)
    one = commit(first, -1, 0, (topic_id, 0, 0))
    requests = [
        (one[0]._replace(token=b"mine"), one[1]),
        (one[0]._replace(token=b"mine"), one[1]),
        commit(first, -1, 0),
        commit(first, 0, 1),  # says nothing of the token
        commit(first, 5, 6),
        commit(first, 1, 2),
        (wire.Open("p", "another", first.epoch, False), b""),
        commit(first, 2, 3),
    ]
    for request in requests:
        assert broker.step(connection, *request) is None
    stored, again, conflict, _, gap, _, opened, fenced = broker.make_durable(broker.begin())
    assert again == Committed(True, stored.positions)
    assert conflict.code == Code.SEQUENCE_CONFLICT
    assert gap.details == {"expected": 1}
    assert (opened.last_seq, opened.token) == (2, b"mine")
    assert fenced.details["ended_at"] == 2


def test_a_producer_that_was_forgotten_has_the_token_that_it_had() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    producer = broker.open(connection)
    request, payload = commit(producer, -1, 0)
    assert broker.ask(connection, request._replace(token=b"mine"), payload) == Committed(False, [])
    broker = CoreBroker(broker.store)
    connection = broker.connect()
    for number in range(2):
        assert broker.ask(connection, *commit(producer, number, number + 1)) == Committed(False, [])
    row = broker.store.producer(producer.producer_id)
    assert row is not None
    assert (row.last_seq, row.token, list(map(last_seq_of, row.results))) == (2, b"mine", [0, 1, 2])


def test_only_who_knows_the_epoch_deletes_a_producer() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    first = broker.open(connection)
    second = broker.open(connection, expected_epoch=first.epoch)
    refused = broker.ask(connection, wire.DeleteProducer(first.producer_id, first.epoch))
    assert refused.code == Code.PRODUCER_FENCED
    assert broker.ask(connection, *commit(second, -1, 0)) == Committed(False, [])
    assert broker.ask(connection, wire.DeleteProducer(second.producer_id, second.epoch)) == wire.Done()
    assert broker.ask(connection, *commit(second, 0, 1)).code == Code.UNKNOWN_PRODUCER


# ---------------------------------------------------------------------------------------------------- time and its end


def test_the_times_in_a_partition_never_go_back() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    [first] = broker.append(connection, topic_id).positions
    broker.wall_ms -= HOUR_MS
    [second] = broker.append(connection, topic_id).positions
    assert first.timestamp_ms == second.timestamp_ms
    broker.wall_ms += 2 * HOUR_MS
    [third] = broker.append(connection, topic_id).positions
    assert third.timestamp_ms > first.timestamp_ms


def test_a_clock_that_jumps_makes_nothing_old() -> None:
    broker = CoreBroker(anonymous_idle_ms=HOUR_MS, clock_pause_ms=HOUR_MS // 2)
    connection = broker.connect()
    topic_id = broker.topic(connection, retention_ms=HOUR_MS)
    broker.append(connection, topic_id)
    broker.open(connection, anonymous=True)
    broker.tick(1000)
    broker.wall_ms += 10 * HOUR_MS
    for _ in range(3):
        broker.tick(1000)
        assert broker.core.alarm
        assert len(broker.store.oldest(topic_id, 0, 1)) == broker.store.producer_count() == 1
    broker.tick(HOUR_MS // 2)
    assert broker.core.alarm == ""
    assert len(broker.store.oldest(topic_id, 0, 1)) == broker.store.producer_count() == 0


def test_an_anonymous_producer_that_commits_stays_also_after_a_restart() -> None:
    broker = CoreBroker(anonymous_idle_ms=HOUR_MS)
    connection = broker.connect()
    producer = broker.open(connection, anonymous=True)
    broker.tick(HOUR_MS - 1000)
    broker.ask(connection, *commit(producer, -1, 0))
    row = broker.store.producer(producer.producer_id)
    assert row is not None
    assert row.seen_ms == broker.now().wall_ms, "what is stored tells of the commit"


def test_rule_5_the_same_batch_under_another_number_is_no_repetition() -> None:
    """The fingerprint of one batch is its checksum, which does not cover the commit's own number."""
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    producer = broker.open(connection)
    broker.ask(connection, *commit(producer, -1, 0, (topic_id, 0, 0)))
    broker.ask(connection, *commit(producer, 0, 5))
    request, payload = commit(producer, -1, 3, (topic_id, 0, 0))
    assert broker.ask(connection, request, payload).code == Code.SEQUENCE_CONFLICT


def test_only_anonymous_producers_expire() -> None:
    broker = CoreBroker(anonymous_idle_ms=HOUR_MS)
    connection = broker.connect()
    broker.open(connection, "named")
    for name in ("idle", "busy"):
        producer = broker.open(connection, name, anonymous=True)
    broker.tick(HOUR_MS)
    assert broker.ask(connection, *commit(producer, -1, 0)) == Committed(False, [])
    broker.tick(HOUR_MS)
    assert [name for name in ("named", "idle", "busy") if broker.store.producer_id(name)] == ["named", "busy"]


# ---------------------------------------------------------------------------- decided, and not yet where others look


def test_a_deleted_topics_row_outlives_its_last_append() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    broker.step(connection, *commit(None, -1, 0, (topic_id, 0, 0)))
    broker.step(connection, wire.DeleteTopic(topic_id))
    broker.core.tick(broker.now())  # the append lies in the same group as the deletion
    group = broker.begin()
    assert len(group.appends) == 1
    broker.make_durable(group)
    for _ in range(3):
        broker.tick(1000)
    assert list(broker.store.topics()) == []
    assert broker.store.oldest(topic_id, 0, 1) == [], "no batch without a topic is left behind"


def test_rows_of_the_group_being_built_are_not_forgotten() -> None:
    broker = CoreBroker(rows_cached_max=1)
    connection = broker.connect()
    topic_id = broker.topic(connection)
    for _ in range(2):
        broker.append(connection, topic_id)
    producer, other = broker.open(connection), broker.open(connection, "other")
    key, other_key = broker.hold(topic_id), broker.hold(topic_id, "other")

    def move(of: Any, number: int) -> tuple[wire.Commit, bytes]:
        return commit(of, number - 1, number, offsets=[wire.Offset(*key, 9, number, number + 1)])

    broker.step(connection, *commit(other, -1, 0, offsets=[wire.Offset(*other_key, 9, 0, 1)]))
    in_flight = broker.begin()
    assert broker.step(connection, *move(producer, 0)) is None
    for name in ("new", "newer"):
        assert broker.step(connection, wire.Open(name, "a session", 0, False)) is None
    broker.make_durable(in_flight)
    assert broker.step(connection, wire.Open("new", "another session", 0, False)) is None
    assert broker.step(connection, *move(producer, 1)) is None
    first, opened, _, raced, second = broker.make_durable(broker.begin())
    assert first == second == Committed(False, [])
    assert isinstance(opened, wire.Opened)
    assert raced.code == Code.OPEN_RACE
    for cache in (broker.core._producers, broker.core._names, broker.core._offsets):
        assert len(cache) <= 1


@pytest.mark.parametrize("below", [0, 2, 3])
def test_what_is_trimmed_between_the_decision_and_the_reading_is_told(below: int) -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection, partitions=2)
    for _ in range(3):
        broker.append(connection, topic_id)
    broker.ask(connection, *commit(None, -1, 0, (topic_id, 1, 0), value=b"of the other partition"))
    read = broker.step(connection, wire.Fetch([wire.Range(topic_id, 0, 0), wire.Range(topic_id, 1, 0)], 1 << 20, 0))
    assert isinstance(read, Read)
    assert broker.ask(connection, wire.PurgeTopic(topic_id, [below, 0])) == wire.Done()
    broker.tick(1000)
    [part, other], payload = collect(broker.store.read, read, 1 << 20)
    assert (part.earliest, part.code) == (below, Code.OFFSET_TRUNCATED if below else "")
    assert other.code == ""
    # The reader cuts the payload by what the parts say.
    assert [one.length for one in [*part.batches, *other.batches]] == [len(batch) for batch in payload]
    assert b"of the other partition" in payload[-1]


# --------------------------------------------------------------------------------------------------------- damage


class DamagedStore(MemoryStore):
    """Some rows of it do not match their checksums."""

    damaged_producer = damaged_topic = 0

    def producer(self, producer_id: int) -> ProducerRow | None:
        if producer_id == self.damaged_producer:
            raise Damaged(f"producer {producer_id}")
        return super().producer(producer_id)

    def oldest(self, topic_id: int, partition: int, limit: int) -> Sequence[Mark]:
        if (topic_id, partition) == (self.damaged_topic, 0):
            raise Damaged(f"topic {topic_id}")
        return super().oldest(topic_id, partition, limit)


def test_a_damaged_row_in_the_way_of_housekeeping_hurts_no_other_and_is_the_operators_alarm() -> None:
    store = DamagedStore()
    broker = CoreBroker(store, anonymous_idle_ms=HOUR_MS)
    connection = broker.connect()
    topic_id = broker.topic(connection, partitions=2, retention_ms=HOUR_MS)
    for partition in (0, 1):
        broker.ask(connection, *commit(None, -1, 0, (topic_id, partition, 0)))
        assert store.oldest(topic_id, partition, 1)
    damaged = broker.open(connection, "damaged", anonymous=True)
    broker.open(connection, "idle", anonymous=True)
    # A core that starts again has read nothing yet.
    broker = CoreBroker(store, anonymous_idle_ms=HOUR_MS)
    store.damaged_producer, store.damaged_topic = damaged.producer_id, topic_id
    broker.tick(2 * HOUR_MS)
    broker.tick(1000)
    assert f"producer {damaged.producer_id}" in broker.core.alarm
    assert "idemq verify" in broker.core.alarm, "what to do is said, too"
    assert list(store.producer_ids(0, 10)) == [damaged.producer_id]
    store.damaged_producer = 0
    broker = CoreBroker(store, anonymous_idle_ms=HOUR_MS)
    broker.tick(2 * HOUR_MS)
    assert f"topic {topic_id}" in broker.core.alarm
    assert "idemq verify" in broker.core.alarm
    assert store.oldest(topic_id, 1, 1) == [], "the other partition's retention goes on"
    broker.ask(broker.connect(), wire.DeleteTopic(topic_id))
    broker.tick(1000)
    broker.tick(1000)
    assert [topic.topic_id for topic in store.topics()] == [topic_id], "what cannot be read is not removed, either"
