"""One conformance suite for both stores, what only LMDB must do, and the two held against each other step by step."""

from __future__ import annotations

import errno
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from idemq.broker import schema, store
from idemq.broker.core import Damaged, Group, Stored, Trim
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.broker.pages import Pages
from idemq.broker.producers import (
    Advance,
    Producer,
    ProducerRow,
    Result,
    Takeover,
    advanced_by,
    last_seq_of,
    result_of,
)
from idemq.broker.schema import Table
from idemq.broker.store import MemoryStore, Reason, Storage, Store, StoreBroken, StoreError, StoreFull
from idemq.broker.topics import Ends, Mark, TopicRow
from idemq.client import wire
from idemq.client.wire import Position, Settings

from .rows import producer_rows


def batch(
    topic_id: int, partition: int, count: int, body: bytes = b"body", producer_id: int = 0, first: int = 0
) -> bytes:
    return wire.make_batch(0, count, topic_id, partition, producer_id, first, first + count - 1, body)


def producer(producer_id: int, last_seq: int = -1, name: str = "", results: tuple[Result, ...] = ()) -> ProducerRow:
    return ProducerRow(
        producer_id, name or f"name-{producer_id}", producer_id, "session", last_seq, b"token", "holder", "address",
        1, 2, False, (Takeover(3, 4),), results,
    )  # fmt: skip


def after_commit(row: ProducerRow, remembered: int = 3) -> ProducerRow:
    """With one commit more, of a producer whose last results are remembered."""
    number = row.last_seq
    token = row.token if number % 2 else b"token-%d" % number
    results = (*row.results, result_of(number + 1, number + 5, [Position(number + 2, 7)]))[-remembered:]
    return row._replace(last_seq=number + 1, token=token, seen_ms=row.seen_ms + 1, results=results)


def told(before: ProducerRow, after: ProducerRow) -> Advance:
    """What a group tells of the commits that lie between."""
    return Advance(
        after.seen_ms,
        after.token,
        len(after.results),
        tuple([one for one in after.results if last_seq_of(one) > before.last_seq]),
    )


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
    assert producer_rows(any_store, 0, 10) == []
    assert any_store.offset(OffsetKey("group", 1, 0)) is None
    assert any_store.offsets_from(None, 10) == []
    assert any_store.offset_count() == 0
    assert any_store.partition(1, 0) is None
    assert any_store.oldest(1, 0, 10) == []
    assert any_store.offset_at(1, 0, 0) is None
    assert any_store.read(1, 0, 0, 1000, 1000) == []


def test_commit_counts_and_keeps_the_counter(any_store: Storage) -> None:
    any_store.commit(Group(counter=7))
    assert any_store.space().txn_id == 1
    any_store.commit(Group(topics={7: topic(7)}))
    assert any_store.counter() == 7
    assert any_store.space().txn_id == 2


def test_rows_come_back(any_store: Storage) -> None:
    results = ((1, 11), (2, 12, 5, 6, 7, 8))
    row = producer(4, 2, "näme", results)
    key = OffsetKey("grüppe", 9, 1)
    position = OffsetRow(3, 4, "holder", None, 5, 6)
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
    assert producer_rows(any_store, 0, 10) == [producer(5)]


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
    assert [row.producer_id for row in producer_rows(any_store, 2, 2)] == [2, 3]
    assert [row.producer_id for row in producer_rows(any_store, 4, 9)] == [900]
    assert producer_rows(any_store, 901, 9) == []


def test_many_rows_in_one_group_are_the_same(any_store: Storage) -> None:
    """Replaced, deleted and added to while they wait for their places."""
    rows = {number: producer(number) for number in range(1, 16)}
    any_store.commit(created(*rows.values()))
    any_store.commit(Group(producers={3: producer(3, 99), 4: None}, names={"name-4": None}))
    rows[3] = producer(3, 99)
    del rows[4]
    any_store.commit(created(producer(500)))
    rows[500] = producer(500)
    assert producer_rows(any_store, 0, 1000) == list(rows.values())
    assert producer_rows(any_store, 3, 2) == [rows[3], rows[5]]
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
    assert any_store.offset_count() == 4


def test_positions_are_listed_by_topic_partition_and_group(any_store: Storage) -> None:
    keys = [OffsetKey(group, topic_id, index) for topic_id in (1, 256) for index in (0, 3) for group in ("a", "b", "ä")]
    rows = {key: OffsetRow(number, 1, "s", b"m", 0, 0, 2, 9, "n") for number, key in enumerate(keys)}
    any_store.commit(Group(offsets=dict(sorted(rows.items()))))
    everything = [(key, rows[key]) for key in keys]
    assert any_store.offset_count() == 12
    assert any_store.offsets_from(None, 100) == everything
    for index, key in enumerate(keys):
        assert any_store.offsets_from(key, 100) == everything[index + 1 :]
        assert any_store.offsets_from(key, 2) == everything[index + 1 : index + 3]
    assert any_store.offsets_from(OffsetKey("aa", 1, 0), 1) == [everything[1]], "behind a key that is not there"
    assert any_store.offsets_from(OffsetKey("a", 2, 0), 1) == [everything[6]]
    any_store.commit(Group(offsets={keys[0]: None}))
    assert any_store.offsets_from(None, 1) == [everything[1]]
    assert any_store.offset_count() == 11


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
    any_store.commit(Group(appends=stored))
    full = any_store.space()
    assert full.used_bytes >= before.used_bytes + (4 << 20)
    assert full.used_bytes <= before.used_bytes + (4 << 20) + 20 * 4096
    any_store.commit(Group(trims=[Trim(1, 0, 4)]))
    after = any_store.space()
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

    @rule(count=st.sampled_from([1, 2, 9, 30]))
    def create(self, count: int) -> None:
        rows = [producer(self.number + 1 + index) for index in range(count)]
        self.number += count
        self.rows |= {row.producer_id: row for row in rows}
        group = created(*rows)
        group.counter = self.number
        self.commit(group)

    @rule(data=st.data(), commits=st.sampled_from([1, 1, 2, 5]), opened=st.sampled_from([False, False, True]))
    def change(self, data: st.DataObject, commits: int, opened: bool) -> None:
        if not self.rows:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, max_size=25, unique=True))
        changes: dict[int, ProducerRow | Advance | None] = {}
        for number in chosen:
            before = row = self.rows[number]
            if opened:
                self.number += 1
                row = row._replace(epoch=self.number, holder=f"holder-{self.number}")
            for _ in range(commits):
                row = after_commit(row)
            self.rows[number] = row
            changes[number] = row if opened else told(before, row)
        self.commit(Group(producers=changes, counter=self.number))

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
        assert producer_rows(one, 0, 1000) == producer_rows(other, 0, 1000)
        assert producer_rows(one, self.number // 2, 3) == producer_rows(other, self.number // 2, 3)
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
                assert one.offsets_from(key, 3) == other.offsets_from(key, 3)
        assert one.offset_count() == other.offset_count()
        assert one.offsets_from(None, 99) == other.offsets_from(None, 99)


TestBothStores = BothStores.TestCase
TestBothStores.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _small_generations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait in deltas move on within a few commits here, so that every stage of it is seen."""
    monkeypatch.setattr(store, "LAZY_BYTES_MAX", 4000)
    monkeypatch.setattr(store, "LAZY_DELTAS_MAX", 6)
    monkeypatch.setattr(store, "LAZY_STEP_ROWS", 3)
    monkeypatch.setattr(store, "LAZY_FEW_ROWS", 2)
    monkeypatch.setattr(store, "LAZY_FEW_BYTES_MAX", 250)


# --------------------------------------------------------------------------------------------------------- LMDB alone


def raw(directory: Path, change: Callable[[Any, Callable[[Table], Any]], object]) -> None:
    """Change a closed store behind its back; `change` gets a transaction and what opens a table."""
    environment = lmdb.open(str(directory / store.STORE_FOLDER), map_size=1 << 30, max_dbs=len(Table))
    tables = {table: environment.open_db(table.encode()) for table in Table}
    with environment.begin(write=True) as txn:
        change(txn, tables.__getitem__)
    environment.close()


def placed(opened: Store, txn: Any, number: int) -> ProducerRow | None:
    """A producer's row as it stands in its place, whatever the deltas tell."""
    key = schema.ID_KEY.pack(number)
    value = txn.get(key, db=opened._tables[Table.PRODUCERS])
    return None if value is None else schema.producer_row(key, value)


def refused(directory: Path, code: Reason, text: str | None = None) -> str:
    """The store must refuse this directory, leave it as it is, and let go of its lock."""
    with pytest.raises(StoreError, match=text) as caught:
        Store(directory)
    assert caught.value.code == code
    with pytest.raises(StoreError) as again:
        Store(directory)
    assert again.value.code == code
    return caught.value.text


def test_a_store_is_the_same_after_it_was_closed(directory: Path) -> None:
    first = Store(directory)
    group = created(producer(4))
    group.appends, group.topics, group.counter = log(1, 0, [3]), {1: topic(1)}, 9
    first.commit(group)
    incarnation = first.incarnation()
    first.close()
    second = Store(directory)
    assert second.incarnation() == incarnation
    assert second.counter() == 9
    assert second.space().txn_id == 1
    assert second.producer(4) == producer(4)
    assert list(second.topics()) == [topic(1)]
    second.close()


def test_two_stores_have_two_incarnations(tmp_path: Path) -> None:
    stores = [Store(tmp_path / name) for name in "ab"]
    assert stores[0].incarnation() != stores[1].incarnation()
    for one in stores:
        one.close()


def test_rows_that_wait_stay_bounded(directory: Path) -> None:
    """Rows in deltas move on into the B-tree, whatever is written: many at once, one alone, or none."""
    opened = Store(directory)
    rows = {number: producer(number) for number in range(1, 61)}
    opened.commit(created(*rows.values()))
    dice = random.Random(1)
    for step in range(200):
        chosen = dice.sample(sorted(rows), dice.choice((0, 1, 1, 20)))
        before = rows.copy()
        rows |= {number: after_commit(rows[number]) for number in chosen}
        opened.commit(Group(producers={number: told(before[number], rows[number]) for number in chosen}))
        with opened._environment.begin() as txn:
            assert txn.stat(opened._tables[Table.DELTAS])["entries"] < 60
        if step % 50 == 25:
            opened.close()
            opened = Store(directory)
    for _ in range(100):
        opened.commit(Group(counter=1))
    opened.commit(Group(producers={5: None}, names={"name-5": None}))
    del rows[5]
    assert producer_rows(opened, 0, 100) == [rows[number] for number in sorted(rows)]
    with opened._environment.begin() as txn:
        behind = sum(placed(opened, txn, number) != rows.get(number) for number in range(1, 61))
    assert behind < 45, "most rows stand in the B-tree too"
    opened.close()


def test_a_commit_writes_what_is_new_of_a_producer(lmdb_store: Store) -> None:
    """And not the other results again."""

    def deltas() -> list[schema.Delta]:
        with lmdb_store._environment.begin() as txn:
            return [schema.delta(key, value) for key, value in txn.cursor(lmdb_store._tables[Table.DELTAS])]

    row = producer(4)
    lmdb_store.commit(created(row))
    for _ in range(30):
        before, row = row, after_commit(after_commit(row))
        lmdb_store.commit(Group(producers={4: told(before, row)}))
        change = deltas()[-1].producers[4]
        assert change == Advance(row.seen_ms, row.token, len(row.results), row.results[-2:])
        assert schema.changed(4, [schema.producer_value(schema.ID_KEY.pack(4), before), change]) == row
        assert lmdb_store.producer(4) == row
    other = row._replace(epoch=9, session="other")
    lmdb_store.commit(Group(producers={4: other}))
    value = schema.producer_value(schema.ID_KEY.pack(4), other)
    assert deltas()[-1].producers == {4: value}, "an opened producer is written whole"
    assert lmdb_store.producer(4) == other
    lmdb_store.commit(Group(producers={4: None}, names={"name-4": None}))
    assert deltas()[-1].producers == {4: None}
    for counter in range(1, 40):
        lmdb_store.commit(Group(counter=counter))
        assert len(deltas()) < 10, "a delta without producers is overwritten"
    assert deltas()[-1] == schema.Delta(schema.State(39, 72, 0), {})


def test_a_damaged_row_under_what_the_deltas_tell_is_refused_at_start(directory: Path) -> None:
    """Before it is written anew, and looks whole."""
    opened = Store(directory)
    rows = {number: producer(number) for number in (4, 5)}
    opened.commit(created(*rows.values()))
    for step in range(20):
        before, rows[5] = rows[5], after_commit(rows[5])
        opened.commit(Group(producers={5: told(before, rows[5])} if step else dict(rows)))
    opened.close()
    key = schema.ID_KEY.pack(5)

    def flip(txn: Any, open_table: Callable[[Table], Any]) -> None:
        value = bytearray(txn.get(key, db=open_table(Table.PRODUCERS)))
        value[9] ^= 4
        assert txn.put(key, bytes(value), db=open_table(Table.PRODUCERS))

    raw(directory, flip)
    refused(directory, Reason.STORE_DAMAGED, f"table producers, key {key.hex()}")
    number = schema.ID_KEY.pack(1000)
    whole = {5: schema.producer_value(key, rows[5])}
    value = schema.delta_value(number, schema.State(0, 1000, 0), dict(whole))
    raw(directory, lambda txn, table: txn.drop(table(Table.DELTAS), delete=False))
    raw(directory, lambda txn, table: txn.put(number, value, db=table(Table.DELTAS)))
    opened = Store(directory)
    assert opened.producer(5) == rows[5], "what is told whole needs no row before"
    opened.close()


def test_a_row_that_was_damaged_meanwhile_is_not_built_upon(directory: Path) -> None:
    """What advances it would be lost with it: nothing of the group is stored, and the others are as they were."""
    opened = Store(directory)
    rows = {number: producer(number) for number in (4, 5)}
    opened.commit(created(*rows.values()))
    opened.close()
    opened = Store(directory)  # the rows reach their places with the next commit, and are known from there
    for counter in range(20):
        opened.commit(Group(counter=counter, producers={6: producer(6, counter)}))
    key = schema.ID_KEY.pack(5)
    with opened._environment.begin(write=True) as txn:
        value = bytearray(txn.get(key, db=opened._tables[Table.PRODUCERS]))
        value[9] ^= 4
        txn.put(key, bytes(value), db=opened._tables[Table.PRODUCERS])
    after = {number: told(row, after_commit(row)) for number, row in rows.items()}
    with pytest.raises(StoreBroken, match=f"table producers, key {key.hex()}"):
        opened.commit(Group(producers=dict(after)))
    opened.close()
    opened = Store(directory)
    assert opened.producer(4) == rows[4]
    with pytest.raises(Damaged):
        opened.producer(5)
    opened.close()


def test_what_is_known_of_producers_stays_bounded(lmdb_store: Store) -> None:
    """However often they commit: as much as the deltas tell, and these are bounded."""
    rows = {number: producer(number) for number in range(1, 31)}
    lmdb_store.commit(created(*rows.values()))
    for step in range(100):
        after = {number: after_commit(row) for number, row in rows.items() if step % 2 or number % 3}
        lmdb_store.commit(Group(producers={number: told(rows[number], row) for number, row in after.items()}))
        rows |= after
        lazy = lmdb_store._lazy
        with lmdb_store._environment.begin() as txn:
            deltas = [(key, value) for key, value in txn.cursor(lmdb_store._tables[Table.DELTAS])]
        assert [schema.ID_KEY.unpack(key)[0] for key, _ in deltas] == list(range(lazy.old, lazy.next))
        assert len(deltas) <= 2 * store.LAZY_DELTAS_MAX + 2
        young = deltas[lazy.young - lazy.old :]
        assert lazy.young_bytes == sum(len(value) + store._NODE_BYTES for _, value in young)
        assert max(map(len, lazy.told.values())) <= 3 * store.LAZY_DELTAS_MAX
        assert producer_rows(lmdb_store, 0, 100) == [rows[number] for number in sorted(rows)]


def test_the_deltas_of_many_producers_stay_bounded_in_bytes(lmdb_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LAZY_DELTAS_MAX", 1000)
    for step in range(60):
        lmdb_store.commit(Group(producers={number: producer(number, step) for number in range(1, 11)}))
        with lmdb_store._environment.begin() as txn:
            sizes = [len(value) for _, value in txn.cursor(lmdb_store._tables[Table.DELTAS])]
        assert sum(sizes) <= 2 * (store.LAZY_BYTES_MAX + max(sizes))


@pytest.mark.parametrize("count", [1, 10])
def test_the_deltas_stay_bounded_however_often_a_store_is_opened(directory: Path, count: int) -> None:
    rows = {number: producer(number) for number in range(1, count + 1)}
    opened = Store(directory)
    opened.commit(created(*rows.values()))
    for _ in range(40):
        after = {number: after_commit(row) for number, row in rows.items()}
        opened.commit(Group(producers={number: told(rows[number], row) for number, row in after.items()}))
        rows = after
        with opened._environment.begin() as txn:
            assert txn.stat(opened._tables[Table.DELTAS])["entries"] <= 2 * store.LAZY_DELTAS_MAX
        opened.close()
        opened = Store(directory)
        assert producer_rows(opened, 0, 100) == [*rows.values()]
    opened.close()


def test_a_group_that_is_not_stored_leaves_nothing_of_its_producers(
    lmdb_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each one, on a full disk, would leave more."""
    row = producer(4)
    lmdb_store.commit(created(row))
    while 4 in lmdb_store._lazy.told:
        lmdb_store.commit(Group(producers={5: producer(5)}))

    def no_room(*_: object) -> bytes:
        raise lmdb.MapFullError("the test's disk is full")

    change = Group(producers={4: told(row, after_commit(row))})
    with monkeypatch.context() as full:
        full.setattr(schema, "delta_value", no_room)
        with pytest.raises(StoreFull):
            lmdb_store.commit(change)
    assert 4 not in lmdb_store._lazy.told
    lmdb_store.commit(change)
    row = after_commit(row)
    assert lmdb_store.producer(4) == row
    with monkeypatch.context() as full:
        full.setattr(schema, "delta_value", no_room)
        with pytest.raises(StoreFull):
            lmdb_store.commit(Group(producers={4: told(row, after_commit(row)), 7: producer(7)}))
    other = row._replace(last_seq=1, results=(*row.results, result_of(1, 77, [])))
    lmdb_store.commit(Group(producers={4: told(row, other)}))
    assert lmdb_store.producer(4) == other
    assert lmdb_store.producer(7) is None


@pytest.mark.parametrize("late", [False, True])
def test_a_row_that_is_moved_while_it_is_read_is_read(lmdb_store: Store, late: bool) -> None:
    """Before or after the reader looked into what was told: it is never in neither."""
    row = after_commit(producer(4))
    lmdb_store.commit(created(producer(4)))
    lmdb_store.commit(Group(producers={4: told(producer(4), row)}))
    of = lmdb_store._lazy.of

    def meanwhile(producer_id: int) -> list[schema.Change]:
        found = of(producer_id) if late else []
        del lmdb_store._lazy.of
        while 4 in lmdb_store._lazy.told:
            lmdb_store.commit(Group(producers={other: producer(other) for other in range(5, 10)}))
        return found or of(producer_id)

    lmdb_store._lazy.of = meanwhile
    assert lmdb_store.producer(4) == row
    assert 4 not in lmdb_store._lazy.told
    row = after_commit(row)
    lmdb_store.commit(Group(producers={4: told(after_commit(producer(4)), row)}))
    lmdb_store._lazy.of = meanwhile
    assert lmdb_store.producer_ids(4, 1) == [4]
    assert 4 not in lmdb_store._lazy.told


def test_what_leaves_while_a_row_is_read_is_not_missed(lmdb_store: Store) -> None:
    """Of a producer whose row is not moved, because the young generation tells all of it."""
    rows = [producer(4)]
    lmdb_store.commit(created(*rows))

    def commit() -> None:
        rows.append(after_commit(rows[-1]))
        lmdb_store.commit(Group(producers={4: told(*rows[-2:])}))

    class Told(dict[int, Any]):
        def get(self, *arguments: Any) -> Any:
            lmdb_store._lazy.told = dict(self)
            for _ in range(30):
                commit()
            return lmdb_store._lazy.told.get(*arguments)

    for _ in range(20):
        commit()
    lmdb_store._lazy.told = Told(lmdb_store._lazy.told)
    assert lmdb_store.producer(4) == rows[-1]
    with lmdb_store._environment.begin() as txn:
        there = placed(lmdb_store, txn, 4)
    assert there is not None
    assert there.last_seq < 10, "it was not moved meanwhile"


def test_what_a_commit_tells_is_not_seen_before_it_is_durable(
    lmdb_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {number: producer(number) for number in (4, 5)}
    lmdb_store.commit(created(*rows.values()))
    seen: list[Any] = []

    def look() -> None:
        seen.append((producer_rows(lmdb_store, 0, 10), lmdb_store.producer(6)))

    def delta_value(*arguments: Any) -> bytes:
        reader = threading.Thread(target=look)
        reader.start()
        reader.join()
        return original(*arguments)

    original = schema.delta_value
    after = {4: told(rows[4], after_commit(rows[4])), 5: None, 6: producer(6)}
    monkeypatch.setattr(schema, "delta_value", delta_value)
    lmdb_store.commit(Group(producers=after, names={"name-5": None, "name-6": 6}))
    look()
    assert seen == [
        ([rows[4], rows[5]], None),
        ([after_commit(rows[4]), producer(6)], producer(6)),
    ]


ONE, THREE = (Advance(0, None, 3, (result_of(0, 0, []),) * count) for count in (1, 3))


@pytest.mark.parametrize(
    ("old", "young", "moved"),
    [
        ([ONE], [], True),
        ([producer(4)], [], True),
        ([ONE], [THREE], False),
        ([ONE], [ONE, ONE, ONE], False),
        ([ONE], [ONE, ONE], True),  # what counts is three results
        ([producer(4)], [THREE], True),  # nothing else tells who opened it
        ([ONE], [producer(4)], False),
        ([producer(4)], [ONE, producer(4), ONE], False),
        ([ONE], [None], False),
        ([None], [], True),
        ([], [ONE], False),
        ([], [producer(4)], False),
    ],
)
def test_a_row_is_moved_unless_the_young_generation_tells_all_of_it(
    lmdb_store: Store, old: list[schema.Change], young: list[schema.Change], moved: bool
) -> None:
    lazy = lmdb_store._lazy
    lazy.tell(5, producer(5))
    for change in old:
        lazy.tell(4, change)
        lazy.stored(0)
    lazy.young = lazy.next = 10
    for change in young:
        lazy.tell(4, change)
        lazy.stored(store.LAZY_FEW_BYTES_MAX)
    lazy.stored(store.LAZY_FEW_BYTES_MAX)
    assert lazy.leaves()
    assert lazy.waiting == [5, 4][: 1 + moved]


@pytest.mark.parametrize(("remembered", "least", "most"), [(3, 1, 2), (32, 20, 100)])
def test_the_deltas_of_few_producers_stay_in_one_page_and_their_rows_where_they_are(
    directory: Path, monkeypatch: pytest.MonkeyPatch, remembered: int, least: int, most: int
) -> None:
    """With the figures of production: a second page would be written with each commit, and so would rows that move."""
    monkeypatch.undo()
    opened = Store(directory)
    rows = {number: producer(number) for number in range(1, store.LAZY_FEW_ROWS + 1)}
    opened.commit(created(*rows.values()))
    seen: set[ProducerRow | None] = set()
    for step in range(600):
        after = {number: after_commit(row, remembered) for number, row in rows.items() if step % number == 0}
        opened.commit(Group(producers={number: told(rows[number], row) for number, row in after.items()}))
        rows |= after
        with opened._environment.begin() as txn:
            assert txn.stat(opened._tables[Table.DELTAS])["depth"] == 1
            seen.add(placed(opened, txn, 1))
        if step % 50 == 0:
            assert producer_rows(opened, 0, 100) == [*rows.values()]
        assert len(opened._lazy.told.get(1, ())) < 80, "what the deltas before told is let go"
    assert least <= len(seen - {None}) <= most
    opened.close()
    opened = Store(directory)
    assert producer_rows(opened, 0, 100) == [*rows.values()]
    opened.close()


def test_a_result_that_is_forgotten_is_let_go() -> None:
    """Else every producer in memory would hold twice as many as are remembered."""
    result = result_of(6, 0, [])
    known = Producer(producer(4, 6, results=(result,)), 1, stored=True)
    assert sys.getrefcount(result) > 2
    known.untold.append(result_of(7, 0, []))
    known.tell()
    assert known.results() == (result_of(7, 0, []),)
    assert sys.getrefcount(result) == 2, "ours and the call's"


def test_an_advance_that_was_told_before_changes_nothing() -> None:
    """The deltas are read again over rows that are in their places already, in part or all."""
    rows = [producer(4)]
    for _ in range(7):
        rows.append(after_commit(rows[-1]))
    advances = [told(one, other) for one, other in pairwise(rows[::2] + rows[-1:])]
    assert len(advances) == 4
    for start, row in enumerate(rows):
        assert advanced_by(row, advances) == rows[-1], start
        for advance in advances:
            row = advanced_by(row, [advance])
        assert row == rows[-1], start


def test_reads_from_other_threads_see_whole_commits(lmdb_store: Store) -> None:
    """Rows move from delta to B-tree under the readers: none vanishes and none goes back."""
    numbers = range(1, 41)
    lmdb_store.commit(created(*[producer(number, 0) for number in numbers]))
    done = threading.Event()
    wrong: list[str] = []

    def look() -> None:
        seen = dict.fromkeys(numbers, 0)
        while not done.is_set():
            listed = {row.producer_id: row for row in producer_rows(lmdb_store, 0, 100)}
            if len(listed) != len(numbers):
                wrong.append(f"{len(listed)} rows")
            for number in numbers:
                row = lmdb_store.producer(number)
                if row is None or row.last_seq < max(seen[number], listed[number].last_seq):
                    wrong.append(f"{number}: {row and row.last_seq} after {seen[number]}")
                else:
                    seen[number] = row.last_seq
            ends = lmdb_store.partition(1, 0)
            if ends is not None and not lmdb_store.read(1, 0, ends.first_offset, 1 << 20, ends.next):
                wrong.append("an end without a batch")

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    dice = random.Random(1)
    offset = position = 0
    for step in range(1, 300):
        stored = log(1, 0, [2], start=offset)[0]._replace(position=position)
        offset, position = offset + 2, position + len(stored.batch)
        chosen = dice.sample(numbers, dice.choice((1, 20)))
        lmdb_store.commit(Group(appends=[stored], producers={number: producer(number, step) for number in chosen}))
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_a_put_that_lmdb_does_not_do_is_noticed(lmdb_store: Store) -> None:
    with lmdb_store._environment.begin(write=True) as txn:
        lmdb_store._put_checked(txn, Table.DELTAS, b"a", b"", overwrite=False)
        with pytest.raises(StoreBroken, match="deltas"):
            lmdb_store._put_checked(txn, Table.DELTAS, b"a", b"", overwrite=False)


def test_a_full_map_refuses_the_group_and_goes_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAP_BYTES", 1 << 20)
    opened = Store(directory)
    opened.commit(Group(appends=log(1, 0, [1]), counter=1))
    body = os.urandom(2 << 20)
    with pytest.raises(StoreFull):
        opened.commit(Group(appends=[Stored(1, 0, 1, 5000, 99, batch(1, 0, 1, body))], counter=2))
    assert opened.counter() == 1
    assert opened.space().txn_id == 1
    opened.commit(Group(appends=[log(1, 0, [1], start=1)[0]], counter=3))
    assert [one[0] for one in opened.read(1, 0, 0, 1 << 20, 9)] == [0, 1]
    opened.close()


class FullAt:
    """An LMDB environment whose next write transaction has no room for this call."""

    def __init__(self, environment: Any, call: str) -> None:
        self._environment, self._call = environment, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def begin(self, **options: Any) -> Any:
        txn = self._environment.begin(**options)
        return FullTransaction(txn, self._call) if options.get("write") else txn


class FullTransaction:
    def __init__(self, txn: Any, call: str) -> None:
        self._txn, self._call = txn, call

    def __getattr__(self, name: str) -> Any:
        return self._no_room if name == self._call else getattr(self._txn, name)

    def _no_room(self, *_: Any, **__: Any) -> Any:
        if self._call == "commit":
            self._txn.abort()  # as LMDB does
        raise lmdb.MapFullError("the test's map is full")


@pytest.mark.parametrize("call", ["put", "commit"])
def test_a_group_for_which_there_is_no_room_changes_nothing(
    lmdb_store: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Before anything is noted of its producers, and when LMDB has it all."""
    row = producer(4)
    lmdb_store.commit(created(row))
    before, row = row, after_commit(row)
    group = Group(producers={4: told(before, row)}, topics={1: topic(1)}, counter=5)
    lmdb_store.commit(group)
    with monkeypatch.context() as full:
        full.setattr(lmdb_store, "_refuse_when_panicked", lambda error: None)
        full.setattr(lmdb_store, "_environment", FullAt(lmdb_store._environment, call))
        failing = Group(
            appends=log(1, 0, [1]), producers={4: told(row, after_commit(row))}, topics={1: None}, counter=6
        )
        for _ in range(3):
            with pytest.raises(StoreFull):
                lmdb_store.commit(failing)
    assert lmdb_store.producer(4) == row
    assert (lmdb_store.counter(), lmdb_store.space().txn_id) == (5, 2)
    assert lmdb_store._state == schema.State(5, 2, 0)
    other = row._replace(last_seq=1, results=(*row.results, result_of(1, 77, [])))
    lmdb_store.commit(Group(producers={4: told(row, other)}))
    assert lmdb_store.producer(4) == other


def test_after_a_commit_whose_outcome_is_unknown_there_is_none(
    lmdb_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(schema, "delta_value", fail)
        with pytest.raises(StoreBroken, match="outcome is unknown"):
            lmdb_store.commit(Group(counter=1))
    with pytest.raises(StoreBroken, match="an earlier commit failed"):
        lmdb_store.commit(Group(counter=2))
    assert lmdb_store.counter() == 0


def test_less_address_space_is_enough(directory: Path) -> None:
    program = (
        "import resource, sys; from idemq.broker.store import Store;"
        "resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30)); Store(sys.argv[1]).close()"
    )
    subprocess.run([sys.executable, "-c", program, str(directory)], check=True)


@pytest.mark.parametrize("table", ["log", "producers", "offsets", "producer_names"])
def test_a_damaged_row_refuses_and_hurts_no_other(directory: Path, table: str) -> None:
    opened = Store(directory)
    group = created(producer(4), producer(5))
    group.appends = [*log(1, 0, [3, 4, 2]), *log(1, 1, [1])]
    keys = [OffsetKey("group", 1, 0), OffsetKey("group", 1, 1)]
    group.offsets = dict.fromkeys(keys, OffsetRow(0, 1, "s", None, 0, 0))
    opened.commit(group)
    for _ in range(20):
        opened.commit(Group(producers={9: None}))  # so that the others move on to their places
    opened.close()
    broken = {
        "log": schema.log_key(1, 0, 3),
        "producers": schema.ID_KEY.pack(4),
        "offsets": schema.offset_key(keys[0]),
        "producer_names": b"name-4",
    }[table]

    def flip(txn: Any, open_table: Callable[[Table], Any]) -> None:
        value = bytearray(txn.get(broken, db=open_table(Table(table))))
        value[9] ^= 4
        assert txn.put(broken, bytes(value), db=open_table(Table(table)))

    raw(directory, flip)
    opened = Store(directory)
    reads: dict[str, Callable[[], object]] = {
        "log": lambda: opened.read(1, 0, 3, 100, 9),
        "producers": lambda: opened.producer(4),
        "offsets": lambda: opened.offset(keys[0]),
        "producer_names": lambda: opened.producer_id("name-4"),
    }
    for name, read in reads.items():
        if name == table:
            with pytest.raises(Damaged, match=f"table {table}"):
                read()
        else:
            read()
    assert opened.offset_count() == 2
    if table == "offsets":
        for after in (None, OffsetKey("a", 1, 0)):
            with pytest.raises(Damaged, match="table offsets"):
                opened.offsets_from(after, 9)
    assert opened.offsets_from(keys[0], 9) == [(keys[1], group.offsets[keys[1]])]
    if table == "log":
        assert [one[0] for one in opened.read(1, 0, 0, 1 << 20, 9)] == [0], "what lies before it can be read"
        with pytest.raises(Damaged):
            opened.oldest(1, 0, 9)
        assert opened.read(1, 1, 0, 100, 9)
    assert opened.producer(5) == producer(5)
    assert opened.offset(keys[1]) is not None
    opened.close()


@pytest.mark.parametrize("key", [b"short", schema.offset_key(OffsetKey("group", 1, 0)) + b"\xff"])
def test_a_position_under_a_key_that_is_none_is_damage(directory: Path, key: bytes) -> None:
    opened = Store(directory)
    group = Group(offsets={OffsetKey("group", 1, 0): OffsetRow(0, 1, "s", None, 0, 0)})
    opened.commit(group)
    opened.close()
    value = schema.offset_value(schema.offset_key(OffsetKey("group", 1, 0)), OffsetRow(0, 1, "s", None, 0, 0))
    raw(directory, lambda txn, table: txn.put(key, value, db=table(Table.OFFSETS)))
    opened = Store(directory)
    with pytest.raises(Damaged, match="table offsets"):
        opened.offsets_from(None, 9)
    opened.close()


def test_a_hole_in_the_log_is_damage(directory: Path) -> None:
    opened = Store(directory)
    opened.commit(Group(appends=log(1, 0, [3, 4, 2])))
    opened.close()
    raw(directory, lambda txn, table: txn.delete(schema.log_key(1, 0, 3), db=table(Table.LOG)))
    opened = Store(directory)
    assert [one[0] for one in opened.read(1, 0, 0, 1 << 20, 9)] == [0]
    assert [one[0] for one in opened.read(1, 0, 3, 1 << 20, 9)] == [7], "the caller sees that its offset is not there"
    opened.close()


# -------------------------------------------------------------------------------------------------------- directories


def test_a_second_broker_is_refused_and_told_by_whom(directory: Path) -> None:
    directory.mkdir()
    (directory / store.LOCK_FILE).write_text("123456789012\n")  # of a broker that ran before
    opened = Store(directory)
    text = refused(directory, Reason.STORE_LOCKED)
    assert f"process {os.getpid()}:" in text
    program = (
        "import sys; from idemq.broker.store import *\n"
        "try: Store(sys.argv[1])\nexcept StoreError as error: print(error.code, error.text)"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(f"STORE_LOCKED {directory} is in use by process {os.getpid()}")
    opened.close()
    Store(directory).close()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "fuseblk", "overlay", "9p"])
def test_unsafe_file_systems_are_refused_unless_forced(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(store, "_filesystem", lambda path: kind)
    assert kind in refused(directory, Reason.STORE_FILESYSTEM)
    Store(directory, force_filesystem=True).close()


@pytest.mark.parametrize(("path", "kind"), [("/proc/self/fd", "proc"), ("/sys/kernel", "sysfs")])
def test_the_file_system_is_known(path: str, kind: str) -> None:
    assert store._filesystem(Path(path)) == kind


def test_what_a_crash_left_of_a_new_store_is_removed(directory: Path) -> None:
    left = directory / "store.new-abc"
    left.mkdir(parents=True)
    (left / "data.mdb").write_bytes(b"half")
    Store(directory).close()
    assert sorted(entry.name for entry in directory.iterdir()) == ["lock", "store"]


def test_a_new_store_appears_whole_or_not_at_all(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    refused(directory, Reason.STORE_UNREADABLE, "No space left")
    assert not (directory / "store").exists()
    monkeypatch.undo()
    Store(directory).close()


def test_a_folder_of_somebody_else_is_refused(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.txt").write_text("mine")
    (directory / "store.new-photos").mkdir()
    refused(directory, Reason.STORE_NOT_OURS, r"thesis\.txt")
    assert sorted(entry.name for entry in directory.iterdir()) == ["store.new-photos", "thesis.txt"], "it is as it was"


def test_a_start_beside_another_that_is_only_just_making_its_store_says_who_has_the_lock(directory: Path) -> None:
    (directory / "store.new-abc").mkdir(parents=True)
    lock = store._lock_directory(directory, False)
    refused(directory, Reason.STORE_LOCKED)
    os.close(lock)


def test_somebody_elses_lmdb_is_refused(directory: Path) -> None:
    (directory / "store").mkdir(parents=True)
    environment = lmdb.open(str(directory / "store"), max_dbs=1)
    with environment.begin(write=True) as txn:
        assert txn.put(b"key", b"value")
    environment.close()
    refused(directory, Reason.STORE_NOT_OURS, "another directory")


def test_a_later_format_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "FORMAT_VERSION", schema.FORMAT_VERSION + 1)
    Store(directory).close()
    monkeypatch.undo()
    refused(directory, Reason.STORE_NEWER, "later idemq")


def test_a_path_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(path, Reason.STORE_UNREADABLE, f"{path} is a file, or lies below one: use another")
    refused(Path("/proc/idemq"), Reason.STORE_UNREADABLE, "check its owner")


def test_a_store_without_its_file_is_refused(directory: Path) -> None:
    Store(directory).close()
    (directory / "store" / "data.mdb").unlink()
    refused(
        directory, Reason.STORE_DAMAGED, r"store has no data\.mdb: restore it from a copy; or, where no broker ever"
    )


@pytest.mark.parametrize("table", list(Table))
def test_a_store_without_a_table_is_refused(directory: Path, table: Table) -> None:
    Store(directory).close()
    raw(directory, lambda txn, open_table: txn.drop(open_table(table)))
    refused(directory, Reason.STORE_NOT_OURS if table == Table.META else Reason.STORE_DAMAGED)


@pytest.mark.parametrize(
    ("table", "key"),
    [(Table.META, schema.FORMAT_KEY), (Table.META, schema.INCARNATION_KEY), (Table.DELTAS, schema.ID_KEY.pack(0))],
)
def test_damage_to_what_is_read_at_start_is_refused(directory: Path, table: Table, key: bytes) -> None:
    Store(directory).close()
    raw(directory, lambda txn, open_table: txn.put(key, b"\0" * 12, db=open_table(table)))
    refused(directory, Reason.STORE_DAMAGED, "idemq verify")


def test_a_store_without_its_state_is_refused(directory: Path) -> None:
    Store(directory).close()
    raw(directory, lambda txn, table: txn.delete(schema.ID_KEY.pack(0), db=table(Table.DELTAS)))
    refused(directory, Reason.STORE_DAMAGED, "no state")


def test_a_damaged_topic_is_refused_at_start(directory: Path) -> None:
    opened = Store(directory)
    opened.commit(Group(topics={1: topic(1)}))
    opened.close()
    raw(directory, lambda txn, table: txn.put(schema.ID_KEY.pack(1), b"\0" * 40, db=table(Table.TOPICS)))
    refused(directory, Reason.STORE_DAMAGED, "table topics")


def test_a_file_that_is_not_lmdbs_is_refused(directory: Path) -> None:
    Store(directory).close()
    file = directory / "store" / "data.mdb"
    whole = file.read_bytes()
    for content in (b"", b"short", b"\0" * 8192, b"\0" * 20 + whole[20:], whole[:4096]):
        file.write_bytes(content)
        refused(directory, Reason.STORE_DAMAGED, "idemq verify")


def test_a_file_that_was_cut_off_is_refused_before_it_kills(directory: Path) -> None:
    opened = Store(directory)
    opened.commit(Group(appends=log(1, 0, [1] * 300)))
    opened.close()
    file = directory / "store" / "data.mdb"
    whole = file.read_bytes()
    for pages in (1, 2, 10):
        file.write_bytes(whole[: -4096 * pages])
        refused(directory, Reason.STORE_DAMAGED, "cut off|behind the end")
    file.write_bytes(whole)
    Store(directory).close()


def test_a_healthy_file_may_be_shorter_than_lmdb_counts(directory: Path) -> None:
    """LMDB does not write a page that a transaction took at the end of the file and gave back."""
    Store(directory).close()
    file = directory / "store" / "data.mdb"
    dice = random.Random(1)
    rows: set[int] = set()
    short = 0
    environment = lmdb.open(str(file.parent), map_size=1 << 30, max_dbs=len(Table), sync=False)
    table = environment.open_db(Table.OFFSETS.encode())
    for _ in range(1000):
        with environment.begin(write=True, db=table) as txn:
            for _ in range(dice.randint(1, 60)):
                first = dice.randint(0, 5000)
                if dice.random() < 0.5:
                    for number in [number for number in rows if first <= number < first + dice.randint(1, 500)]:
                        assert txn.delete(number.to_bytes(8, "big"))
                        rows.discard(number)
                else:
                    assert txn.put(first.to_bytes(8, "big"), dice.randbytes(dice.choice((30, 300, 1500, 9000))))
                    rows.add(first)
        with Pages(str(file)) as pages:
            pages.walk()
            short = len(pages.missing)
        if short:
            break
    environment.close()
    assert short, "the case did not come up"
    Store(directory).close()


def test_the_allocator_can_be_tuned() -> None:
    program = "from idemq.broker.store import tune_allocator; print(tune_allocator())"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(sys.platform == "linux" and platform.libc_ver()[0] == "glibc")
