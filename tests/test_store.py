"""One conformance suite for both stores, what only LMDB must do, and the two held against each other step by step."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idemq.broker import store
from idemq.broker.core import Group, Stored, Trim
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.broker.producers import ProducerRow, Result, Takeover
from idemq.broker.store import MemoryStore, Storage, Store, StoreBroken
from idemq.broker.topics import Ends, Mark, TopicRow
from idemq.client import wire
from idemq.client.wire import Position, Settings


def batch(
    topic_id: int, partition: int, count: int, body: bytes = b"body", producer_id: int = 0, first: int = 0
) -> bytes:
    return wire.make_batch(0, count, topic_id, partition, producer_id, first, first + count - 1, body)


def producer(producer_id: int, last_seq: int = -1, name: str = "", results: tuple[Result, ...] = ()) -> ProducerRow:
    return ProducerRow(
        producer_id, name or f"name-{producer_id}", producer_id, "session", last_seq, b"token", "holder", "address",
        1, 2, False, (Takeover(3, 4),), results,
    )  # fmt: skip


def created(*rows: ProducerRow) -> Group:
    return Group(producers={row.producer_id: row for row in rows}, names={row.name: row.producer_id for row in rows})


def topic(topic_id: int, partitions: int = 2) -> TopicRow:
    return TopicRow(topic_id, f"topic-{topic_id}", Settings(retention_ms=1000), (0,) * partitions, "nonce", False)


def log(topic_id: int, partition: int, counts: list[int], start: int = 0, step_ms: int = 10) -> list[Stored]:
    """Batches with these numbers of records, one after the other; each lies `step_ms` after the one before."""
    found: list[Stored] = []
    offset, position = start, 0
    for index, count in enumerate(counts):
        data = batch(topic_id, partition, count, bytes([index % 256]) * (10 + index))
        found.append(Stored(topic_id, partition, offset, 1000 + index * step_ms, position, data))
        offset += count
        position += len(data)
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(params=["lmdb", "memory"])
def any_store(request: pytest.FixtureRequest, directory: Path) -> Iterator[Storage]:
    made: Storage = Store(directory) if request.param == "lmdb" else MemoryStore()
    yield made
    made.close()


@pytest.fixture
def lmdb_store(directory: Path) -> Iterator[Store]:
    made = Store(directory)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------------- both stores


def test_new_store_is_empty(any_store: Storage) -> None:
    assert len(any_store.incarnation()) == 16
    assert any_store.counter() == 0
    assert any_store.space().txn_id == 0
    assert list(any_store.topics()) == []
    assert any_store.producer_count() == 0
    assert any_store.producer(1) is None
    assert any_store.producer_id("nobody") is None
    assert any_store.producer_names("", 10) == []
    assert any_store.producers_from(0, 10) == []
    assert any_store.offset(OffsetKey("group", 1, 0)) is None
    assert any_store.partition(1, 0) is None
    assert any_store.oldest(1, 0, 10) == []
    assert any_store.offset_at(1, 0, 0) is None
    assert any_store.read(1, 0, 0, 1000, 1000) == []


def test_commit_counts_and_keeps_the_counter(any_store: Storage) -> None:
    assert any_store.commit(Group(counter=7)).txn_id == 1
    assert any_store.commit(Group(topics={7: topic(7)})).txn_id == 2
    assert any_store.counter() == 7
    assert any_store.space().txn_id == 2


def test_rows_come_back(any_store: Storage) -> None:
    results = (Result(1, 11, ()), Result(2, 12, (Position(5, 6), Position(7, 8))))
    row = producer(4, 2, "näme", results)
    key = OffsetKey("grüppe", 9, 1)
    position = OffsetRow(3, 4, "session", None, 5, 6)
    group = created(row)
    group.offsets[key] = position
    group.topics[9] = topic(9)
    any_store.commit(group)
    assert any_store.producer(4) == row
    assert any_store.producer_id("näme") == 4
    assert any_store.offset(key) == position
    assert any_store.offset(OffsetKey("grüppe", 9, 0)) is None
    assert list(any_store.topics()) == [topic(9)]
    assert any_store.producer_count() == 1


def test_rows_are_replaced_and_removed(any_store: Storage) -> None:
    key = OffsetKey("group", 9, 1)
    group = created(producer(4), producer(5))
    group.offsets[key] = OffsetRow(0, 1, "s", None, 0, 0)
    any_store.commit(group)
    any_store.commit(Group(producers={4: producer(4, 10)}, offsets={key: OffsetRow(8, 1, "s", b"m", 0, 0)}))
    assert any_store.producer(4) == producer(4, 10)
    assert any_store.offset(key) == OffsetRow(8, 1, "s", b"m", 0, 0)
    any_store.commit(Group(producers={4: None}, names={"name-4": None}, offsets={key: None}))
    assert any_store.producer(4) is None
    assert any_store.producer_id("name-4") is None
    assert any_store.offset(key) is None
    assert any_store.producer_count() == 1
    assert any_store.producers_from(0, 10) == [producer(5)]


def test_a_name_goes_and_comes_back_in_one_group(any_store: Storage) -> None:
    any_store.commit(created(producer(4, name="same")))
    any_store.commit(Group(producers={4: None, 6: producer(6, name="same")}, names={"same": 6}))
    assert any_store.producer_id("same") == 6
    assert any_store.producer(4) is None
    assert any_store.producer_count() == 1


def test_producers_are_listed_by_name_and_by_id(any_store: Storage) -> None:
    names = {3: "b", 1: "c", 2: "a", 900: "ä"}
    any_store.commit(created(*[producer(number, name=name) for number, name in names.items()]))
    assert any_store.producer_names("", 2) == [("a", 2), ("b", 3)]
    assert any_store.producer_names("b", 5) == [("c", 1), ("ä", 900)]
    assert any_store.producer_names("ä", 5) == []
    assert [row.producer_id for row in any_store.producers_from(2, 2)] == [2, 3]
    assert [row.producer_id for row in any_store.producers_from(4, 9)] == [900]
    assert any_store.producers_from(901, 9) == []


def test_many_rows_in_one_group_are_the_same(any_store: Storage) -> None:
    """More rows than go straight into the B-tree: replaced, deleted and added to while they wait."""
    rows = {number: producer(number) for number in range(1, 2 * store.DIRECT_ROWS_MAX)}
    any_store.commit(created(*rows.values()))
    any_store.commit(Group(producers={3: producer(3, 99), 4: None}, names={"name-4": None}))
    rows[3] = producer(3, 99)
    del rows[4]
    any_store.commit(created(producer(500)))
    rows[500] = producer(500)
    assert any_store.producers_from(0, 1000) == list(rows.values())
    assert any_store.producers_from(3, 2) == [rows[3], rows[5]]
    assert any_store.producer(3) == rows[3]
    assert any_store.producer(4) is None
    assert any_store.producer_count() == len(rows)


def test_reading_begins_with_the_batch_that_holds_the_offset(any_store: Storage) -> None:
    stored = log(1, 0, [3, 1, 5])
    any_store.commit(Group(appends=[*stored, *log(1, 1, [2]), *log(2, 0, [2])]))
    every = [(one.offset, one.timestamp_ms, one.batch) for one in stored]
    assert any_store.read(1, 0, 0, 1 << 20, 9) == every
    assert any_store.read(1, 0, 2, 1 << 20, 9) == every
    assert any_store.read(1, 0, 3, 1 << 20, 9) == every[1:]
    assert any_store.read(1, 0, 8, 1 << 20, 9) == every[2:]
    assert any_store.read(1, 0, 9, 1 << 20, 9) == []
    assert any_store.read(1, 0, 9, 1 << 20, 20) == []
    assert any_store.read(1, 2, 0, 1 << 20, 20) == []
    assert any_store.read(0, 0, 5, 1 << 20, 20) == []
    assert any_store.read(3, 0, 5, 1 << 20, 20) == []


def test_reading_stops_at_its_limits(any_store: Storage) -> None:
    stored = log(1, 0, [3, 1, 5])
    any_store.commit(Group(appends=stored))
    every = [(one.offset, one.timestamp_ms, one.batch) for one in stored]
    sizes = [len(one.batch) for one in stored]
    assert any_store.read(1, 0, 0, 1, 9) == every[:1]
    assert any_store.read(1, 0, 0, sizes[0] + sizes[1], 9) == every[:2]
    assert any_store.read(1, 0, 0, sizes[0] + sizes[1] - 1, 9) == every[:1]
    assert any_store.read(1, 0, 0, 1 << 20, 4) == every[:2]
    assert any_store.read(1, 0, 3, 1 << 20, 3) == []


def test_ends_and_marks(any_store: Storage) -> None:
    stored = log(1, 1, [3, 1, 5], start=20)
    any_store.commit(Group(appends=[*log(1, 0, [1]), *stored, *log(1, 2, [1])]))
    sizes = [len(one.batch) for one in stored]
    assert any_store.partition(1, 1) == Ends(20, 0, 29, sum(sizes), 1020)
    assert any_store.oldest(1, 1, 2) == [Mark(20, 23, 1000, sizes[0]), Mark(23, 24, 1010, sizes[0] + sizes[1])]
    assert len(any_store.oldest(1, 1, 10)) == 3


def test_trims_remove_what_lies_below(any_store: Storage) -> None:
    stored = log(1, 1, [3, 1, 5])
    any_store.commit(Group(appends=[*log(1, 0, [1]), *stored, *log(1, 2, [1]), *log(2, 1, [1])]))
    any_store.commit(Group(trims=[Trim(1, 1, 4)]))
    ends = any_store.partition(1, 1)
    assert ends is not None
    assert (ends.first_offset, ends.first_position, ends.next) == (4, stored[2].position, 9)
    assert any_store.read(1, 1, 0, 1 << 20, 9) == [(4, 1020, stored[2].batch)]
    any_store.commit(Group(trims=[Trim(1, 1, 9)], appends=[stored[0]._replace(offset=9)]))
    assert any_store.read(1, 1, 0, 1 << 20, 20) == [(9, 1000, stored[0].batch)]
    any_store.commit(Group(trims=[Trim(1, 1, 12), Trim(7, 7, 1)]))
    assert any_store.partition(1, 1) is None
    assert all(any_store.partition(*where) is not None for where in ((1, 0), (1, 2), (2, 1)))


def test_a_deleted_topic_takes_its_positions(any_store: Storage) -> None:
    keys = [OffsetKey(group, topic_id, 0) for topic_id in (1, 2, 3) for group in ("a", "b")]
    row = OffsetRow(0, 1, "s", None, 0, 0)
    any_store.commit(Group(topics={1: topic(1), 2: topic(2)}, offsets=dict.fromkeys(keys, row)))
    any_store.commit(Group(topics={2: None}, offsets={keys[2]: row}))
    assert [any_store.offset(key) for key in keys] == [row, row, None, None, row, row]
    assert list(any_store.topics()) == [topic(1)]


def test_offset_at_a_time(any_store: Storage) -> None:
    counts = [1, 7, 1, 300, 2, 2, 1, 50]
    stored = log(1, 1, counts)
    stored[3:6] = [one._replace(timestamp_ms=stored[3].timestamp_ms) for one in stored[3:6]]
    any_store.commit(Group(appends=[*log(1, 0, [5]), *stored, *log(1, 2, [5])]))
    for time_ms in range(990, 1090):
        expected = next((one.offset for one in stored if one.timestamp_ms >= time_ms), None)
        assert any_store.offset_at(1, 1, time_ms) == expected, time_ms


def test_an_offset_that_is_taken_stops_the_store(any_store: Storage) -> None:
    any_store.commit(Group(appends=log(1, 0, [3, 3])))
    with pytest.raises(StoreBroken):
        any_store.commit(Group(appends=log(1, 0, [4]), counter=50))
    assert any_store.counter() == 0
    assert any_store.read(1, 0, 0, 1, 6)[0][2] == log(1, 0, [3])[0].batch


def test_space_grows_and_shrinks(any_store: Storage) -> None:
    before = any_store.space()
    body = os.urandom(1 << 20)
    stored = [Stored(1, 0, offset, 1, 0, batch(1, 0, 1, body)) for offset in range(4)]
    full = any_store.commit(Group(appends=stored))
    assert full.used_bytes >= before.used_bytes + (4 << 20)
    assert full.used_bytes <= before.used_bytes + (4 << 20) + 20 * 4096
    after = any_store.commit(Group(trims=[Trim(1, 0, 4)]))
    assert after.used_bytes < before.used_bytes + (1 << 20)
    assert after.disk_bytes > 0


def test_the_copy_of_a_memory_store_stands_alone() -> None:
    one = MemoryStore()
    group = created(producer(4))
    group.appends = log(1, 0, [3])
    group.topics[1] = topic(1)
    one.commit(group)
    other = one.copy()
    one.commit(
        Group(appends=[log(1, 0, [3], start=3)[0]], producers={4: None}, names={"name-4": None}, topics={1: None})
    )
    assert other.producer(4) == producer(4)
    assert other.producer_names("", 9) == [("name-4", 4)]
    assert len(other.read(1, 0, 0, 1000, 99)) == 1
    assert list(other.topics()) == [topic(1)]
    assert other.space().txn_id == 1


# ------------------------------------------------------------------------------------------ the two against each other


class BothStores(RuleBasedStateMachine):
    """The same groups go to both; every read must agree, also after the LMDB store was closed and opened."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.memory = MemoryStore()
        self.disk = Store(self.directory / "data")
        self.ends: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.rows: dict[int, ProducerRow] = {}
        self.number = 0

    def teardown(self) -> None:
        self.disk.close()
        shutil.rmtree(self.directory)

    def commit(self, group: Group) -> None:
        self.memory.commit(group)
        self.disk.commit(group)

    @rule(
        appends=st.lists(
            st.tuples(st.integers(1, 2), st.integers(0, 1), st.integers(1, 50), st.sampled_from([0, 100, 5000, 9000])),
            max_size=5,
        ),
        later_ms=st.integers(0, 3),
    )
    def append(self, appends: list[tuple[int, int, int, int]], later_ms: int) -> None:
        group = Group(counter=self.number)
        for topic_id, partition, count, size in appends:
            offset, position, time_ms = self.ends.get((topic_id, partition), (0, 0, 0))
            data = batch(topic_id, partition, count, os.urandom(size))
            group.appends.append(Stored(topic_id, partition, offset, time_ms + later_ms, position, data))
            self.ends[topic_id, partition] = (offset + count, position + len(data), time_ms + later_ms)
        self.commit(group)

    @rule(topic_id=st.integers(1, 2), partition=st.integers(0, 1), count=st.integers(1, 4))
    def trim(self, topic_id: int, partition: int, count: int) -> None:
        marks = self.memory.oldest(topic_id, partition, count)
        if marks:
            self.commit(Group(trims=[Trim(topic_id, partition, marks[-1].end)]))

    @rule(count=st.sampled_from([1, 2, store.DIRECT_ROWS_MAX + 1, 30]))
    def create(self, count: int) -> None:
        rows = [producer(self.number + 1 + index) for index in range(count)]
        self.number += count
        self.rows |= {row.producer_id: row for row in rows}
        group = created(*rows)
        group.counter = self.number
        self.commit(group)

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        if not self.rows:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, max_size=25, unique=True))
        rows = {number: self.rows[number]._replace(last_seq=self.rows[number].last_seq + 1) for number in chosen}
        self.rows |= rows
        self.commit(Group(producers=dict(rows)))

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if not self.rows:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, max_size=12, unique=True))
        names = {self.rows.pop(number).name: None for number in chosen}
        self.commit(Group(producers=dict.fromkeys(chosen), names=dict(names)))

    @rule(
        group=st.sampled_from("abc"),
        topic_id=st.integers(1, 2),
        partition=st.integers(0, 1),
        position=st.integers(0, 99),
    )
    def move(self, group: str, topic_id: int, partition: int, position: int) -> None:
        self.commit(Group(offsets={OffsetKey(group, topic_id, partition): OffsetRow(position, 1, "s", None, 0, 0)}))

    @rule(topic_id=st.integers(1, 2), there=st.booleans())
    def topic_comes_or_goes(self, topic_id: int, there: bool) -> None:
        self.commit(Group(topics={topic_id: topic(topic_id) if there else None}))

    @rule()
    def open_again(self) -> None:
        self.disk.close()
        self.disk = Store(self.directory / "data")

    @invariant()
    def reads_agree(self) -> None:
        one, other = self.memory, self.disk
        assert one.counter() == other.counter()
        assert one.space().txn_id == other.space().txn_id
        assert list(one.topics()) == list(other.topics())
        assert one.producer_count() == other.producer_count()
        assert one.producers_from(0, 1000) == other.producers_from(0, 1000)
        assert one.producers_from(self.number // 2, 3) == other.producers_from(self.number // 2, 3)
        assert one.producer_names("name-2", 5) == other.producer_names("name-2", 5)
        assert [one.producer(number) for number in range(5)] == [other.producer(number) for number in range(5)]
        for topic_id, partition in ((1, 0), (1, 1), (2, 0), (2, 1)):
            assert one.partition(topic_id, partition) == other.partition(topic_id, partition)
            assert one.oldest(topic_id, partition, 3) == other.oldest(topic_id, partition, 3)
            end = self.ends.get((topic_id, partition), (0, 0, 0))[0]
            for offset in (0, end // 2, end - 1):
                for bytes_max in (1, 10_000):
                    found = one.read(topic_id, partition, max(0, offset), bytes_max, end)
                    assert found == other.read(topic_id, partition, max(0, offset), bytes_max, end)
            for time_ms in (0, 1, 5, 50):
                assert one.offset_at(topic_id, partition, time_ms) == other.offset_at(topic_id, partition, time_ms)
            for group in "abc":
                key = OffsetKey(group, topic_id, partition)
                assert one.offset(key) == other.offset(key)


TestBothStores = BothStores.TestCase
TestBothStores.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _small_generations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait in deltas move on within a few commits here, so that every stage of it is seen."""
    monkeypatch.setattr(store, "LAZY_BYTES_MAX", 4000)
    monkeypatch.setattr(store, "LAZY_DELTAS_MAX", 6)
    monkeypatch.setattr(store, "LAZY_STEP_ROWS", 3)
