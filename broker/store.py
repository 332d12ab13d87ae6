"""The store: what is durable. Two of them behind one protocol, LMDB and its twin in memory.

It knows rows, keys and files, and no rule: what is stored was decided by the core. One call of `commit` is one LMDB
transaction, on the disk when it returns. `commit` belongs to one thread, reads may come from others meanwhile: each is
a short LMDB read transaction of its own, over what is committed.

Producer rows are the dear case: each commit changes some, and in its place in the B-tree each dirties a page and is
written whole. So the core tells what is new of a row (`Advance`), and a commit writes it into one small delta, which
lies where the store's state lies that it writes anyway, and the rows reach their places later, many commits in one (see
`_Lazy`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice, starmap, takewhile
from pathlib import Path
from typing import Any, Protocol

import lmdb

from idemq.client.wire import record_count

from . import schema
from .core import ROW_BYTES, Damaged, Group, Rows, Space, Stored
from .groups import OffsetKey, OffsetRow
from .pages import Broken, Pages
from .producers import Advance, ProducerRow, advanced_by
from .schema import Table
from .topics import Ends, Mark, TopicRow

MAP_BYTES = 1 << 40
"""Address space for the map, not disk. Where the system grants less, the store asks for less."""
MAP_BYTES_MIN = 1 << 30
LAZY_BYTES_MAX = 8 << 20
"""Bytes at which a generation of deltas is full. What three of them tell may be in memory; two are read at start."""
LAZY_DELTAS_MAX = 256
"""Deltas at which it is full, so that removing them stays cheap."""
LAZY_FEW_ROWS = 4
LAZY_FEW_BYTES_MAX = 1700
"""Bytes at which a generation is full that is about so few producers, with what LMDB keeps beside each delta. Two of
small deltas fit into one page; a second would be written with each commit."""
LAZY_STEP_ROWS = 16
"""Rows moved into the B-tree by one commit, at least."""
_NODE_BYTES = 18
"""What LMDB keeps in a page beside a delta's value: its key, a header and a pointer."""

READ_BATCHES_MAX = 4096
"""Batches that one read returns at most: small ones cost their number, and the loop waits for it (about 3 µs each)."""

LOCK_FILE = "lock"
STORE_FOLDER = "store"
_NEW_PREFIX = "store.new-"
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "afs", "virtiofs", "vboxsf"}
)
_LAYERED = frozenset({"overlay", "aufs", "unionfs", "ecryptfs"})

Batch = tuple[int, int, bytes]
"""(offset of the first record, timestamp_ms, bytes)."""


class Reason(StrEnum):
    """Why a data directory is refused."""

    STORE_LOCKED = "STORE_LOCKED"
    STORE_FILESYSTEM = "STORE_FILESYSTEM"
    STORE_UNREADABLE = "STORE_UNREADABLE"
    STORE_NOT_OURS = "STORE_NOT_OURS"
    STORE_NEWER = "STORE_NEWER"
    STORE_DAMAGED = "STORE_DAMAGED"


class StoreError(Exception):
    """A data directory cannot be opened; nothing in it was changed. `text` says why, and what to do."""

    def __init__(self, code: Reason, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class StoreFull(Exception):
    """No room for this group: nothing of it is stored, and the store goes on."""


class StoreBroken(Exception):
    """A commit failed with its outcome unknown: the process must end, and the next start finds out."""


class Storage(Rows, Protocol):
    """What the server needs of a store: the committed rows, and one way to change them."""

    def commit(self, group: Group) -> None:
        """Make a group durable, all of it or nothing. Raises StoreFull (nothing stored) or StoreBroken (unknown)."""

    def read(self, topic_id: int, partition: int, offset: int, bytes_max: int, limit_offset: int) -> list[Batch]:
        """Batches from the one that contains `offset`, in order, below `limit_offset`.

        At least one, however large, then while they fit into `bytes_max` and READ_BATCHES_MAX; what was trimmed is
        skipped. Raises Damaged when the first is broken; a later one ends the answer.
        """

    def close(self) -> None:
        """Let go of everything. Nothing is written."""


def tune_allocator() -> bool:
    """Keep glibc from mapping and unmapping each large page that LMDB makes; False where there is no such allocator.

    That costs a quarter to a third of the broker's CPU otherwise. Call once, before a store is opened.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    settings = ((mmap_threshold, 32 << 20), (trim_threshold, 64 << 20), (top_pad, 16 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


# -------------------------------------------------------------------------------------------------------------- LMDB


class _Lazy:
    """The deltas, and what they told of producers whose rows do not stand in the B-tree, or only in part.

    Two generations: commits add deltas to the young one, and the old one leaves. First its rows are moved into the
    B-tree, in order of id, some with each commit; then it is removed, and the young one is old. With few producers
    it leaves when the young one is full: what that tells is mostly all that counts of them, and no row is moved.

    Readers are in other threads. What a delta tells is noted before the commit, and is there for them as soon as `next`
    has passed it: what is done after the disk was waited for costs three times as much.
    """

    def __init__(self) -> None:
        self.told: dict[int, list[tuple[int, schema.Change]]] = {}
        """Of each producer whose row in the B-tree is behind: in which delta, and what. A list grows at its end, where
        what was not stored is taken back, or another takes its place."""
        self.old = 0
        """The number of the first delta of the old generation. What was told before may still be in `told`, and changes
        nothing there."""
        self.young = 0
        """The number of the first one of the young generation."""
        self.young_bytes = 0
        self.next = 0
        """The number of the next delta."""
        self.waiting: list[int] = []
        """Rows to be moved before the old generation is removed, the largest id first."""

    def of(self, producer_id: int) -> list[schema.Change]:
        """What was told of it; to be had before its row in the B-tree: what is moved in between is then in both."""
        told = self.told.get(producer_id, ())
        behind = self.next  # after the list: one that is fetched later may have lost what comes before it
        return [change for number, change in told if number < behind]

    def tell(self, producer_id: int, change: schema.Change) -> None:
        """The next delta will tell this."""
        told = self.told.get(producer_id)
        if told is None:
            self.told[producer_id] = [(self.next, change)]
        else:
            told.append((self.next, change))

    def take_back(self, producer_ids: Iterable[int]) -> None:
        """The next delta was not stored."""
        for producer_id in producer_ids:
            told = self.told.get(producer_id, [])
            if told and told[-1][0] == self.next:
                told.pop()
                self._put(producer_id, told)

    def stored(self, size_bytes: int) -> None:
        """The next delta was."""
        self.young_bytes += size_bytes + _NODE_BYTES
        self.next += 1

    def moved(self, producer_ids: Sequence[int]) -> None:
        """Their rows in the B-tree have now what was told before the next delta."""
        for producer_id in producer_ids:
            self._put(producer_id, _from(self.told[producer_id], self.next))
        del self.waiting[len(self.waiting) - len(producer_ids) :]

    def age(self) -> None:
        """The old generation is gone."""
        self.old, self.young, self.young_bytes = self.young, self.next, 0

    def leaves(self) -> bool:
        """Does the old generation leave? When it begins to, the rows that need it are put into `waiting`."""
        if self.waiting:
            return True
        few = len(self.told) <= LAZY_FEW_ROWS
        small = self.young_bytes < (LAZY_FEW_BYTES_MAX if few else LAZY_BYTES_MAX)
        if small and self.next - self.young < LAZY_DELTAS_MAX and (few or self.old == self.young):
            return False
        for producer_id, told in list(self.told.items()):
            if told[0][0] < self.old:
                self.told[producer_id] = _from(told, self.old)
        self.waiting = sorted([one for one, told in self.told.items() if _needs(told, self.young)], reverse=True)
        return True

    def _put(self, producer_id: int, told: list[tuple[int, schema.Change]]) -> None:
        if told:
            self.told[producer_id] = told
        else:
            del self.told[producer_id]


def _from(told: list[tuple[int, schema.Change]], first: int) -> list[tuple[int, schema.Change]]:
    """What was told from this delta on."""
    return told[bisect_left(told, (first,)) :]


def _needs(told: list[tuple[int, schema.Change]], behind: int) -> bool:
    """Does a row, of which this was told, need the deltas before this one, so that it must be moved first?"""
    staying = [change for _, change in _from(told, behind)]
    advances = [change for change in staying if isinstance(change, Advance)]
    if len(staying) == len(told) or len(advances) < len(staying):
        return False  # they tell nothing of it, or it was told whole since
    if not all(isinstance(change, Advance) for _, change in told):
        return True
    return not advances or sum([len(advance.results) for advance in advances]) < advances[-1].kept


class Store:
    """An LMDB store in a directory, which is made when it does not exist.

    Raises StoreError. `force_filesystem` takes network and layered file systems too, at the owner's risk.
    """

    def __init__(self, directory: str | Path, force_filesystem: bool = False) -> None:
        self._directory = Path(directory)
        self._lock = _lock_directory(self._directory, force_filesystem)
        try:
            path = self._directory / STORE_FOLDER
            for leftover in self._directory.glob(f"{_NEW_PREFIX}*"):
                shutil.rmtree(leftover)
            if not path.exists():
                _create(self._directory)
            _check_file(path)
            self._environment = _open_environment(str(path), create=False)
            try:
                self._load()
            except BaseException:
                self._environment.close()
                raise
        except (OSError, lmdb.Error, Broken) as error:
            os.close(self._lock)
            raise _refusal(self._directory, error) from error
        except BaseException:
            os.close(self._lock)
            raise

    def _load(self) -> None:
        version = _format(self._environment, self._directory)
        self._tables = {table: self._environment.open_db(table.encode(), create=False) for table in Table}
        self._lazy = _Lazy()
        self._broken = False
        try:
            if version < schema.FORMAT_VERSION:
                self._upgrade(version)
            with self._environment.begin() as txn:
                meta = self._tables[Table.META]
                self._incarnation = schema.incarnation(txn.get(schema.INCARNATION_KEY, b"", meta))
                self._state = self._read_deltas(txn)
            self.topics()  # the core needs each of them, so the start is where to say that one is broken
        except Damaged as damage:
            raise _refusal(self._directory, damage) from damage

    def _read_deltas(self, txn: Any) -> schema.State:
        """Learn what they tell; returns the state. Raises Damaged."""
        lazy = self._lazy
        last: schema.Delta | None = None
        for key, value in txn.cursor(self._tables[Table.DELTAS]):
            lazy.next = schema.ID_KEY.unpack(key)[0]
            if last is None:
                lazy.old = lazy.young = lazy.next
            last = schema.delta(key, value)
            self._tell(txn, last.producers)
            if last.producers:  # else the next takes its place
                lazy.stored(len(value))
        if last is None:
            raise schema.damaged(Table.DELTAS, b"", "there is no delta, and so no state")
        # All of it is old, and if it is large it leaves at once: else it would grow with every start.
        lazy.old, lazy.young = lazy.young, lazy.next
        return last.state

    def _tell(self, txn: Any, changes: Mapping[int, schema.Change]) -> None:
        """Of the next delta. What advances a row that is damaged would be lost with it. Raises Damaged."""
        for producer_id, change in changes.items():
            if isinstance(change, Advance) and producer_id not in self._lazy.told:
                self._placed(txn, producer_id)
            self._lazy.tell(producer_id, change)

    def _placed(self, txn: Any, producer_id: int) -> bytes | None:
        """A producer's value in its place, verified. Raises Damaged."""
        key = schema.ID_KEY.pack(producer_id)
        return schema.checked(key, txn.get(key, db=self._tables[Table.PRODUCERS]))

    def _upgrade(self, version: int) -> None:
        """From an earlier format. Raises Damaged."""
        with self._environment.begin(write=True) as txn:
            if version == 1:
                self._upgrade_1(txn)
            self._put_checked(txn, Table.META, schema.FORMAT_KEY, schema.format_value())

    def _upgrade_1(self, txn: Any) -> None:
        """The rows in the deltas to their places, and the state into the first delta. Raises Damaged."""
        deltas, meta = self._tables[Table.DELTAS], self._tables[Table.META]
        state = schema.state_1(txn.get(schema.STATE_KEY_1, b"", meta))
        for key, value in txn.cursor(deltas):
            for producer_id, row in schema.delta_1(key, value):
                self._write_producer(txn, schema.ID_KEY.pack(producer_id), row)
        txn.drop(deltas, delete=False)
        key = schema.ID_KEY.pack(0)
        self._put_checked(txn, Table.DELTAS, key, schema.delta_value(key, state, {}))
        txn.delete(schema.STATE_KEY_1, db=meta)

    def close(self) -> None:
        """Let go of the files and of the lock. Nothing is written."""
        self._environment.close()
        os.close(self._lock)

    # ------------------------------------------------------------------------------------------------- commit

    def commit(self, group: Group) -> None:
        """See `Storage.commit`. After StoreBroken every further commit raises it too."""
        if self._broken:
            raise StoreBroken("an earlier commit failed: this process must end")
        try:
            self._commit(group)
        except Exception as error:
            if _is_full(error):
                self._lazy.take_back(group.producers)
                self._refuse_when_panicked(error)
                raise StoreFull(f"no room in {self._directory}: {error}") from error
            self._broken = True
            raise StoreBroken(f"a commit failed, its outcome is unknown: {type(error).__name__}: {error}") from error

    def _refuse_when_panicked(self, error: Exception) -> None:
        """A full disk is a definite failure, except in the very last write: then LMDB takes no further transaction."""
        try:
            self._environment.begin(write=True).abort()
        except lmdb.Error as panic:
            self._broken = True
            raise StoreBroken(f"a commit failed, its outcome is unknown: {error}; {panic}") from error

    def _commit(self, group: Group) -> None:
        state = schema.State(
            self._state.counter if group.counter is None else group.counter,
            self._state.commits + 1,
            self._state.topics_removed + sum([row is None for row in group.topics.values()]),
        )
        lazy = self._lazy
        leaves = lazy.leaves()
        txn = self._environment.begin(write=True)
        try:
            for stored in group.appends:
                key = schema.log_key(stored.topic_id, stored.partition, stored.offset)
                self._put_checked(txn, Table.LOG, key, schema.log_value(key, stored), overwrite=False)
            for trim in group.trims:
                first = schema.log_key(trim.topic_id, trim.partition, 0)
                self._delete_range(txn, Table.LOG, first, schema.log_key(trim.topic_id, trim.partition, trim.below))
            self._write_names(txn, group.names)
            self._write_offsets(txn, group.offsets)
            self._write_topics(txn, group.topics)
            moved = self._move_lazy(txn, len(group.producers), leaves)
            self._tell(txn, group.producers)
            size_bytes = self._write_delta(txn, state, group.producers)
        except BaseException:
            txn.abort()
            raise
        txn.commit()
        self._state = state
        # Readers look into what was told first and then into the B-tree, so a row is never in neither.
        if moved:
            lazy.moved(moved)  # before `next` rises: what this commit told is not in them
        if group.producers:  # a delta without any is overwritten by the next
            lazy.stored(size_bytes)
        if leaves and not lazy.waiting:
            lazy.age()

    def _put_checked(self, txn: Any, table: Table, key: bytes, value: bytes, overwrite: bool = True) -> None:
        """LMDB answers a put that it did not do by returning False."""
        if not txn.put(key, value, overwrite=overwrite, db=self._tables[table]):
            raise StoreBroken(f"table {table} did not take key {key.hex()}: there is one already")

    def _delete_range(self, txn: Any, table: Table, first: bytes, behind: bytes) -> None:
        """Remove the keys from `first` and below `behind`."""
        with txn.cursor(self._tables[table]) as cursor:
            found = cursor.set_range(first)
            while found and first <= cursor.key() < behind:
                found = cursor.delete()

    def _write_names(self, txn: Any, names: dict[str, int | None]) -> None:
        for name, producer_id in names.items():
            key = name.encode()
            if producer_id is None:
                txn.delete(key, db=self._tables[Table.PRODUCER_NAMES])
            else:
                self._put_checked(txn, Table.PRODUCER_NAMES, key, schema.name_value(key, producer_id))

    def _write_offsets(self, txn: Any, offsets: dict[OffsetKey, OffsetRow | None]) -> None:
        for where, row in offsets.items():
            key = schema.offset_key(where)
            if row is None:
                txn.delete(key, db=self._tables[Table.OFFSETS])
            else:
                self._put_checked(txn, Table.OFFSETS, key, schema.offset_value(key, row))

    def _write_topics(self, txn: Any, topics: dict[int, TopicRow | None]) -> None:
        """A topic that is gone takes its groups' positions with it."""
        for topic_id, row in topics.items():
            key = schema.ID_KEY.pack(topic_id)
            if row is None:
                txn.delete(key, db=self._tables[Table.TOPICS])
                self._delete_range(txn, Table.OFFSETS, key, schema.ID_KEY.pack(topic_id + 1))
            else:
                self._put_checked(txn, Table.TOPICS, key, schema.topic_value(key, row))

    def _write_delta(self, txn: Any, state: schema.State, changes: Mapping[int, schema.Change]) -> int:
        """What every commit writes; returns its bytes."""
        key = schema.ID_KEY.pack(self._lazy.next)
        value = schema.delta_value(key, state, changes)
        self._put_checked(txn, Table.DELTAS, key, value)
        return len(value)

    def _write_producer(self, txn: Any, key: bytes, value: bytes | None) -> None:
        if value is None:
            txn.delete(key, db=self._tables[Table.PRODUCERS])
        else:
            self._put_checked(txn, Table.PRODUCERS, key, value)

    def _move_lazy(self, txn: Any, rows: int, leaves: bool) -> list[int]:
        """Move the next rows into the B-tree, at least as many as came in, and after the last remove the deltas.

        Returns the ids of those that it moved. Raises Damaged.
        """
        lazy = self._lazy
        moved = lazy.waiting[-max(rows, LAZY_STEP_ROWS) :]
        for producer_id in reversed(moved):
            key, row = schema.ID_KEY.pack(producer_id), self._row(txn, producer_id, lazy.of(producer_id))
            self._write_producer(txn, key, None if row is None else schema.producer_value(key, row))
        if leaves and len(moved) == len(lazy.waiting):
            self._delete_range(txn, Table.DELTAS, schema.ID_KEY.pack(0), schema.ID_KEY.pack(lazy.young))
        return moved

    # -------------------------------------------------------------------------------------------------- reads

    def incarnation(self) -> bytes:
        """The store's name for ever."""
        return self._incarnation

    def counter(self) -> int:
        """The last number given to a topic, producer, epoch or lease."""
        return self._state.counter

    def space(self) -> Space:
        """As measured now."""
        with self._environment.begin() as txn:
            stats = [txn.stat(table) for table in self._tables.values()]
        page_bytes = stats[0]["psize"]
        used = sum([stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats])
        free = max(0, self._environment.info()["last_pgno"] + 1 - used)
        disk = os.statvfs(self._directory)
        return Space(used * page_bytes, free * page_bytes + disk.f_bavail * disk.f_frsize, self._state.commits)

    def topics(self) -> Iterable[TopicRow]:
        """All topics, also those being deleted. Raises Damaged."""
        with self._environment.begin() as txn:
            return [schema.topic_row(key, value) for key, value in txn.cursor(self._tables[Table.TOPICS])]

    def partition(self, topic_id: int, partition: int) -> Ends | None:
        """See `Rows.partition`. Raises Damaged."""
        with self._environment.begin(buffers=True) as txn, txn.cursor(self._tables[Table.LOG]) as cursor:
            first = next(_log_rows(cursor, topic_id, partition, 0), None)
            if first is None:
                return None
            last = _last_row(cursor, topic_id, partition)
        return Ends(first.offset, first.position, last.end, last.position + last.length, last.timestamp_ms)

    def oldest(self, topic_id: int, partition: int, limit: int) -> Sequence[Mark]:
        """See `Rows.oldest`. Raises Damaged."""
        with self._environment.begin(buffers=True) as txn, txn.cursor(self._tables[Table.LOG]) as cursor:
            return [
                Mark(row.offset, row.end, row.timestamp_ms, row.position + row.length)
                for row in islice(_log_rows(cursor, topic_id, partition, 0), limit)
            ]

    def offset_at(self, topic_id: int, partition: int, timestamp_ms: int) -> int | None:
        """See `Rows.offset_at`. A binary search: the times in a partition never go back. Raises Damaged."""
        with self._environment.begin(buffers=True) as txn, txn.cursor(self._tables[Table.LOG]) as cursor:
            first = next(_log_rows(cursor, topic_id, partition, 0), None)
            if first is None:
                return None
            last = _last_row(cursor, topic_id, partition)
            if last.timestamp_ms < timestamp_ms:
                return None
            low, high = first.offset, last.offset
            while low < high:
                middle = next(_log_rows(cursor, topic_id, partition, (low + high) // 2))
                if middle.timestamp_ms < timestamp_ms:
                    low = middle.end
                elif middle.offset < high:
                    high = middle.offset
                else:  # no batch begins between the middle and `high`
                    high = (low + high) // 2
            return next(_log_rows(cursor, topic_id, partition, low)).offset

    def read(self, topic_id: int, partition: int, offset: int, bytes_max: int, limit_offset: int) -> list[Batch]:
        """See `Storage.read`."""
        batches: list[Batch] = []
        if offset >= limit_offset:
            return batches
        with self._environment.begin(buffers=True) as txn, txn.cursor(self._tables[Table.LOG]) as cursor:
            size = 0
            next_offset = None
            start = _start_of(cursor, topic_id, partition, offset)
            for key, value in _log_items(cursor, topic_id, partition, start):
                try:
                    row = schema.log_row(key, value)
                    if next_offset is not None and row.offset != next_offset:
                        raise schema.damaged(Table.LOG, key, f"the batch before ends at {next_offset}")
                except Damaged:
                    if not batches:
                        raise
                    break
                if row.end <= offset:
                    continue
                size += row.length
                if row.offset >= limit_offset or (batches and size > bytes_max) or len(batches) >= READ_BATCHES_MAX:
                    break
                batches.append((row.offset, row.timestamp_ms, bytes(value[schema.LOG_PREFIX_BYTES :])))
                next_offset = row.end
        return batches

    def producer(self, producer_id: int) -> ProducerRow | None:
        """A producer by id. Raises Damaged."""
        told = self._lazy.of(producer_id)
        with self._environment.begin() as txn:
            return self._row(txn, producer_id, told)

    def _row(self, txn: Any, producer_id: int, told: list[schema.Change]) -> ProducerRow | None:
        """What was told, over what stands in the B-tree. Raises Damaged."""
        if not told or isinstance(told[0], Advance):
            told = [self._placed(txn, producer_id), *told]
        return schema.changed(producer_id, told)

    def producer_id(self, name: str) -> int | None:
        """A producer's id by name. Raises Damaged."""
        key = name.encode()
        with self._environment.begin() as txn:
            value = txn.get(key, db=self._tables[Table.PRODUCER_NAMES])
        return None if value is None else schema.name_id(key, value)

    def producer_names(self, after: str, limit: int) -> Sequence[tuple[str, int]]:
        """Names behind `after`, in order, with their ids. Raises Damaged."""
        start = after.encode()
        with self._environment.begin() as txn, txn.cursor(self._tables[Table.PRODUCER_NAMES]) as cursor:
            found = (item for item in _items_from(cursor, start) if item[0] != start)
            return [(key.decode(), schema.name_id(key, value)) for key, value in islice(found, limit)]

    def producer_ids(self, first: int, limit: int) -> Sequence[int]:
        """See `Rows.producer_ids`. Decodes no row of the B-tree."""
        lazy: dict[int, bool] = {}
        for one in [one for one in list(self._lazy.told) if one >= first]:
            told = self._lazy.of(one)
            if told:  # else it has reached its place meanwhile, where it is looked for next
                lazy[one] = told[-1] is not None
        with self._environment.begin() as txn, txn.cursor(self._tables[Table.PRODUCERS]) as cursor:
            keys = cursor.iternext(values=False) if cursor.set_range(schema.ID_KEY.pack(first)) else ()
            stored = [schema.ID_KEY.unpack(key)[0] for key in islice(keys, limit + len(lazy))]
        return sorted([*[one for one in stored if one not in lazy], *[one for one, there in lazy.items() if there]])[
            :limit
        ]

    def producer_count(self) -> int:
        """How many rows there are."""
        with self._environment.begin() as txn:
            count: int = txn.stat(self._tables[Table.PRODUCER_NAMES])["entries"]
        return count

    def offset(self, key: OffsetKey) -> OffsetRow | None:
        """A group's position. Raises Damaged."""
        where = schema.offset_key(key)
        with self._environment.begin() as txn:
            value = txn.get(where, db=self._tables[Table.OFFSETS])
        return None if value is None else schema.offset_row(where, value)

    def offsets_from(self, after: OffsetKey | None, limit: int) -> Sequence[tuple[OffsetKey, OffsetRow]]:
        """Positions behind `after`, by topic, partition and group. Raises Damaged."""
        first = b"" if after is None else schema.offset_key(after) + b"\x00"
        with self._environment.begin() as txn, txn.cursor(self._tables[Table.OFFSETS]) as cursor:
            # The row first: its checksum covers the key.
            rows = [
                (bytes(key), schema.offset_row(bytes(key), value))
                for key, value in islice(_items_from(cursor, first), limit)
            ]
        return [(schema.offset_key_of(key), row) for key, row in rows]

    def offset_count(self) -> int:
        """How many positions there are."""
        with self._environment.begin() as txn:
            count: int = txn.stat(self._tables[Table.OFFSETS])["entries"]
        return count


def _is_full(error: Exception) -> bool:
    """Is there no room: in the map, on the disk, or in the quota, which LMDB's binding tells by its text alone?"""
    return isinstance(error, lmdb.MapFullError | lmdb.DiskError) or (
        isinstance(error, lmdb.Error) and str(error).endswith(os.strerror(errno.EDQUOT))
    )


def _items_from(cursor: Any, key: bytes) -> Iterator[tuple[Any, Any]]:
    """(key, value) of the entries from `key` on. A cursor that found nothing would begin at the table's start."""
    if cursor.set_range(key):
        yield from cursor.iternext()


def _log_items(cursor: Any, topic_id: int, partition: int, offset: int) -> Iterator[tuple[Any, Any]]:
    """(key, value) of a partition's batches that begin at or behind `offset`."""
    key = schema.log_key(topic_id, partition, offset)
    prefix = key[: schema.PARTITION_KEY.size]
    return takewhile(lambda item: item[0][: len(prefix)] == prefix, _items_from(cursor, key))


def _log_rows(cursor: Any, topic_id: int, partition: int, offset: int) -> Iterator[schema.LogRow]:
    """The same, decoded and verified."""
    return starmap(schema.log_row, _log_items(cursor, topic_id, partition, offset))


def _start_of(cursor: Any, topic_id: int, partition: int, offset: int) -> int:
    """The first offset of the last batch that begins at or before `offset`, or `offset`."""
    key = schema.log_key(topic_id, partition, offset)
    if not cursor.set_range(key):
        cursor.last()
    elif cursor.key() != key:
        cursor.prev()
    where = bytes(cursor.key())
    same = where[: schema.PARTITION_KEY.size] == key[: schema.PARTITION_KEY.size]
    return schema.LOG_KEY.unpack(where)[2] if same else offset


def _last_row(cursor: Any, topic_id: int, partition: int) -> schema.LogRow:
    """The last batch of a partition that has one."""
    if cursor.set_range(schema.log_key(topic_id, partition + 1, 0)):
        cursor.prev()
    else:
        cursor.last()
    return schema.log_row(*cursor.item())


# ------------------------------------------------------------------------------------------------------- directories


def _lock_directory(directory: Path, force_filesystem: bool) -> int:
    """Make the directory, look at where and what it is, and lock it; returns the lock's file descriptor.

    Raises StoreError, and has made no lock in a directory that holds other things and no store.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = _filesystem(directory)
        if not force_filesystem and (kind in _NETWORK or kind in _LAYERED or kind.startswith("fuse")):
            raise StoreError(
                Reason.STORE_FILESYSTEM,
                f"{directory} lies on {kind}, where a committed write may be lost: use a local disk (a volume, in a"
                " container), or force it at your own risk",
            )
        _refuse_strangers(directory)
        lock = _flock(directory, os.O_RDWR | os.O_CREAT)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock
    except OSError as error:
        raise _refusal(directory, error) from error


def _refuse_strangers(directory: Path) -> None:
    """Raises StoreError for a directory that holds other things and no store. One that is being made holds none yet."""
    names = {entry.name for entry in directory.iterdir() if not entry.name.startswith(_NEW_PREFIX)}
    strangers = sorted(names - {LOCK_FILE, "lost+found"})
    if strangers and not (directory / STORE_FOLDER).exists():
        raise StoreError(
            Reason.STORE_NOT_OURS,
            f"{directory} holds other things ({', '.join(strangers[:3])}) and no store: use an empty or new directory",
        )


def _flock(directory: Path, flags: int) -> int:
    """A lock of our own: LMDB would let a second process in."""
    lock = os.open(directory / LOCK_FILE, flags | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise StoreError(
            Reason.STORE_LOCKED,
            f"{directory} is in use by process {holder or 'unknown'}: stop it first, or use another directory",
        ) from None
    return lock


def _filesystem(directory: Path) -> str:
    """The type of the file system that a directory lies on; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except FileNotFoundError:
        return ""
    path = str(directory.resolve())
    best, kind = "", ""
    for line in lines:
        mount, _, source = line.partition(" - ")
        point = mount.split(" ")[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of two on one point the later hides the earlier
            best, kind = point, source.split(" ")[0]
    return kind


def _create(directory: Path) -> None:
    """A new store appears whole or not at all, so that one which cannot be opened is always damage."""
    new = tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=directory)
    environment = _open_environment(new, create=True)
    tables = {table: environment.open_db(table.encode()) for table in Table}
    with environment.begin(write=True) as txn:
        first = schema.ID_KEY.pack(0)
        incarnation = secrets.token_bytes(schema.INCARNATION_BYTES)
        rows = (
            (Table.META, schema.FORMAT_KEY, schema.format_value()),
            (Table.META, schema.INCARNATION_KEY, schema.incarnation_value(incarnation)),
            (Table.DELTAS, first, schema.delta_value(first, schema.State(0, 0, 0), {})),
        )
        if not all(txn.put(key, value, db=tables[table]) for table, key, value in rows):
            raise StoreBroken("a new store did not take its first rows")
    environment.close()
    _sync(os.path.join(new, "data.mdb"))
    _sync(new)
    os.rename(new, directory / STORE_FOLDER)
    _sync(str(directory))
    _sync(str(directory.resolve().parent))


def _sync(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _open_environment(path: str, create: bool, **reading: bool) -> Any:
    """Open LMDB the one way that is durable: no NOSYNC, no NOMETASYNC, no WRITEMAP."""
    map_bytes = MAP_BYTES
    while True:
        try:
            return lmdb.open(
                path,
                map_size=map_bytes,
                max_dbs=len(Table),
                sync=True,
                metasync=True,
                create=create,
                mode=0o600,
                **reading,
            )
        except lmdb.MemoryError:
            if map_bytes <= MAP_BYTES_MIN:
                raise
            map_bytes //= 4


class Snapshot:
    """A data directory opened for reading alone, for `check.py`: one long LMDB transaction, and the lock.

    A damaged file may kill the process. Raises StoreError. Use it in a `with` statement.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.data_file = self.directory / STORE_FOLDER / "data.mdb"
        try:
            if not self.data_file.exists():
                raise StoreError(
                    Reason.STORE_NOT_OURS,
                    f"there is no {STORE_FOLDER}/data.mdb in {self.directory}: name a broker's data directory, or"
                    " restore it from a copy",
                )
            # A copy of a data directory may have no lock file, and then nobody runs on it.
            locked = (self.directory / LOCK_FILE).exists()
            self._lock = _flock(self.directory, os.O_RDONLY) if locked else None
        except OSError as error:
            raise _refusal(self.directory, error) from error

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    @contextmanager
    def tables(self) -> Iterator[tuple[Any, dict[Table, Any]]]:
        """(LMDB transaction, table handles), once it is known to be ours and of a version that is known."""
        try:
            environment = _open_environment(str(self.data_file.parent), create=False, readonly=True, lock=False)
            try:
                _format(environment, self.directory)
                tables = {table: environment.open_db(table.encode(), create=False) for table in Table}
                with environment.begin() as txn:
                    yield txn, tables
            finally:
                environment.close()
        except lmdb.Error as error:
            raise _refusal(self.directory, error) from error


def _check_file(path: Path) -> None:
    """Refuse a store without its file, and a file that would kill whoever maps it. Raises StoreError, Broken, OSError.

    A healthy file may be shorter than its meta says: LMDB counts a page that a transaction took at the end and gave
    back, and does not write it. Such a page is on the list of free pages; a page that was cut off is not.
    """
    if path.is_dir() and not (path / "data.mdb").exists():
        raise StoreError(
            Reason.STORE_DAMAGED,
            f"{path} has no data.mdb: restore it from a copy; or, where no broker ever ran, remove the folder",
        )
    with Pages(str(path / "data.mdb")) as pages:
        if pages.missing and not pages.free_pages().issuperset(pages.missing):
            raise Broken(f"the file is cut off: {len(pages.missing)} of {pages.meta.last_page + 1} pages are missing")


def _format(environment: Any, directory: Path) -> int:
    """The store's version. Raises StoreError."""
    try:
        meta = environment.open_db(Table.META.encode(), create=False)
        with environment.begin() as txn:
            value = txn.get(schema.FORMAT_KEY, None, meta)
        version = None if value is None else schema.format_version(value)
    except (lmdb.NotFoundError, lmdb.IncompatibleError):
        version = None
    except Damaged as damage:
        raise _refusal(directory, damage) from damage
    if version is None:
        raise StoreError(Reason.STORE_NOT_OURS, f"{directory} holds somebody else's LMDB data: use another directory")
    if version > schema.FORMAT_VERSION:
        raise StoreError(
            Reason.STORE_NEWER,
            f"{directory} was written by a later idemq (format {version}, this one knows {schema.FORMAT_VERSION}):"
            " install that version again",
        )
    return version


def _refusal(directory: Path, error: Exception) -> StoreError:
    # LMDB's own complaints have their classes; those of the system have these, or none.
    system = OSError | lmdb.LockError | lmdb.ReadonlyError | lmdb.DiskError | lmdb.MemoryError
    if isinstance(error, FileExistsError | NotADirectoryError):
        return StoreError(
            Reason.STORE_UNREADABLE,
            f"{directory} cannot be used: {error.filename} is a file, or lies below one: use another directory",
        )
    if isinstance(error, system) or type(error) is lmdb.Error:
        return StoreError(
            Reason.STORE_UNREADABLE,
            f"{directory} cannot be used: {error}: check its owner, its permissions, the mount and the free space",
        )
    return StoreError(
        Reason.STORE_DAMAGED,
        f"{directory} is damaged: {error}; nothing was changed: run idemq verify on it, and restore it from a copy",
    )


# ------------------------------------------------------------------------------------------------------------ memory


class MemoryStore:
    """The same in memory, for tests and the simulator. What is committed here counts as durable."""

    def __init__(self, incarnation: bytes = b"\x00" * schema.INCARNATION_BYTES, disk_bytes: int = 1 << 40) -> None:
        self.disk_bytes = disk_bytes
        """What `space()` reports as free; a test may change it."""
        self._incarnation = incarnation
        self._counter = 0
        self._commits = 0
        self._used_bytes = 0
        self._logs: dict[tuple[int, int], list[Stored]] = {}
        self._producers: dict[int, ProducerRow] = {}
        self._producer_ids: list[int] = []
        self._names: dict[str, int] = {}
        self._sorted_names: list[str] = []
        self._offsets: dict[OffsetKey, OffsetRow] = {}
        self._topics: dict[int, TopicRow] = {}

    def copy(self) -> MemoryStore:
        """As it stands now. Rows are shared, they never change."""
        other = MemoryStore(self._incarnation, self.disk_bytes)
        other._counter, other._commits, other._used_bytes = self._counter, self._commits, self._used_bytes
        other._logs = {key: log.copy() for key, log in self._logs.items()}
        other._producers, other._producer_ids = self._producers.copy(), self._producer_ids.copy()
        other._names, other._sorted_names = self._names.copy(), self._sorted_names.copy()
        other._offsets, other._topics = self._offsets.copy(), self._topics.copy()
        return other

    def close(self) -> None:
        """Nothing to let go of."""

    def commit(self, group: Group) -> None:
        """See `Storage.commit`. Raises StoreBroken before anything is changed."""
        for stored in group.appends:
            log = self._logs.get((stored.topic_id, stored.partition))
            if log and stored.offset <= log[-1].offset:
                index = bisect_left(log, stored.offset, key=_offset_of)
                if log[index].offset == stored.offset:
                    raise StoreBroken(f"table log did not take offset {stored.offset}: there is one already")
        for stored in group.appends:
            insort(self._logs.setdefault((stored.topic_id, stored.partition), []), stored, key=_offset_of)
            self._used_bytes += len(stored.batch) + ROW_BYTES
        for trim in group.trims:
            log = self._logs.get((trim.topic_id, trim.partition), [])
            count = bisect_left(log, trim.below, key=_offset_of)
            self._used_bytes -= sum([len(stored.batch) + ROW_BYTES for stored in log[:count]])
            del log[:count]
        for name, producer_id in group.names.items():
            _set(self._names, self._sorted_names, name, producer_id)
        for producer_id, change in group.producers.items():
            row = advanced_by(self._producers[producer_id], [change]) if isinstance(change, Advance) else change
            _set(self._producers, self._producer_ids, producer_id, row)
        for key, position in group.offsets.items():
            if position is None:
                self._offsets.pop(key, None)
            else:
                self._offsets[key] = position
        for topic_id, topic in group.topics.items():
            if topic is None:
                self._topics.pop(topic_id, None)
                self._offsets = {key: row for key, row in self._offsets.items() if key.topic_id != topic_id}
            else:
                self._topics[topic_id] = topic
        if group.counter is not None:
            self._counter = group.counter
        self._commits += 1

    def read(self, topic_id: int, partition: int, offset: int, bytes_max: int, limit_offset: int) -> list[Batch]:
        """See `Storage.read`."""
        log = self._logs.get((topic_id, partition), [])
        start = max(0, bisect_right(log, offset, key=_offset_of) - 1)
        batches: list[Batch] = []
        size = 0
        for stored in islice(log, start, None):
            if _end(stored) <= offset:
                continue
            size += len(stored.batch)
            full = (batches and size > bytes_max) or len(batches) >= READ_BATCHES_MAX
            if max(stored.offset, offset) >= limit_offset or full:
                break
            batches.append((stored.offset, stored.timestamp_ms, stored.batch))
        return batches

    def incarnation(self) -> bytes:
        """The store's name for ever."""
        return self._incarnation

    def counter(self) -> int:
        """The last number given to a topic, producer, epoch or lease."""
        return self._counter

    def space(self) -> Space:
        """As measured now."""
        return Space(self._used_bytes, self.disk_bytes, self._commits)

    def topics(self) -> Iterable[TopicRow]:
        """All topics, also those being deleted."""
        return [self._topics[topic_id] for topic_id in sorted(self._topics)]

    def partition(self, topic_id: int, partition: int) -> Ends | None:
        """See `Rows.partition`."""
        log = self._logs.get((topic_id, partition))
        if not log:
            return None
        first, last = log[0], log[-1]
        return Ends(first.offset, first.position, _end(last), last.position + len(last.batch), last.timestamp_ms)

    def oldest(self, topic_id: int, partition: int, limit: int) -> Sequence[Mark]:
        """See `Rows.oldest`."""
        return [
            Mark(stored.offset, _end(stored), stored.timestamp_ms, stored.position + len(stored.batch))
            for stored in self._logs.get((topic_id, partition), [])[:limit]
        ]

    def offset_at(self, topic_id: int, partition: int, timestamp_ms: int) -> int | None:
        """See `Rows.offset_at`."""
        log = self._logs.get((topic_id, partition), [])
        index = bisect_left(log, timestamp_ms, key=_timestamp_of)
        return log[index].offset if index < len(log) else None

    def producer(self, producer_id: int) -> ProducerRow | None:
        """A producer by id."""
        return self._producers.get(producer_id)

    def producer_id(self, name: str) -> int | None:
        """A producer's id by name."""
        return self._names.get(name)

    def producer_names(self, after: str, limit: int) -> Sequence[tuple[str, int]]:
        """Names behind `after`, in order, with their ids."""
        start = bisect_right(self._sorted_names, after)
        return [(name, self._names[name]) for name in self._sorted_names[start : start + limit]]

    def producer_ids(self, first: int, limit: int) -> Sequence[int]:
        """See `Rows.producer_ids`."""
        start = bisect_left(self._producer_ids, first)
        return self._producer_ids[start : start + limit]

    def producer_count(self) -> int:
        """How many rows there are."""
        return len(self._names)

    def offset(self, key: OffsetKey) -> OffsetRow | None:
        """A group's position."""
        return self._offsets.get(key)

    def offsets_from(self, after: OffsetKey | None, limit: int) -> Sequence[tuple[OffsetKey, OffsetRow]]:
        """Positions behind `after`, by topic, partition and group."""
        first = b"" if after is None else schema.offset_key(after)
        keys = sorted((schema.offset_key(key), key) for key in self._offsets)
        return [(key, self._offsets[key]) for where, key in keys if where > first][:limit]

    def offset_count(self) -> int:
        """How many positions there are."""
        return len(self._offsets)


def _offset_of(stored: Stored) -> int:
    return stored.offset


def _timestamp_of(stored: Stored) -> int:
    return stored.timestamp_ms


def _end(stored: Stored) -> int:
    return stored.offset + record_count(stored.batch)


def _set(rows: dict[Any, Any], keys: list[Any], key: Any, row: Any) -> None:
    """Put or remove a row and keep the list of keys in order."""
    if row is None:
        if rows.pop(key, None) is not None:
            del keys[bisect_left(keys, key)]
        return
    if key not in rows:
        insort(keys, key)
    rows[key] = row
