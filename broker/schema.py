"""The bytes of the store: keys, values and their checksums, and the version of it all.

Pure: it knows neither LMDB nor files. LMDB has no checksums, so each value begins with one: CRC-32 over the table's
name, the key and the rest of the value, verified whenever the value is decoded. So a value that lies under a wrong
key or in a wrong table is found too.

    table           key                                         value behind the checksum
    log             u64 topic id, u32 partition, u64 offset     u64 timestamp_ms, u64 position, batch
    producers       u64 producer id                             ProducerRow without its id
    producer_names  name                                        u64 producer id
    offsets         u64 topic id, u32 partition, group          OffsetRow
    topics          u64 topic id                                TopicRow without its id
    deltas          u64 number, rising                          State, {producer id: producers value | Advance | nil}
    meta            "format"                                    "idemq", u32 FORMAT_VERSION
    meta            "incarnation"                               16 random bytes, made with the store

Integers are big-endian, so that keys sort as numbers; a row is msgpack of its fields in their declared order, with each
Result as `producers.py` packs it. Producers are kept by id, because commits name ids; their names are an index. Offsets
begin with the topic, so that a deleted topic's rows are one range. `position` is how many bytes were ever stored in the
partition before this batch. The checksum of a log value ends with the batch's fixed header: the batch's own checksum
covers its body, which is not read a second time on its way to the disk.

Every commit writes a delta: the store's state (three u64: counter, commits, topics removed; the last delta has the one
that counts), and the producers it changed. Their rows are those in `producers` after all deltas, in order. A delta goes
when its rows stand there, or when later ones tell all that counts of them; one that names no producer is overwritten by
the next.

What earlier formats left stays as it is until it changes. The rows of positions of format 1 lack `turns`, which is 0
then; formats 1 to 3 had results as lists of numbers.

To change the format:
 1. Any change to a key, a value, a row's fields (ProducerRow, OffsetRow, TopicRow, Settings, Result, Takeover, Advance,
    State), a batch's fixed header, `wire.fingerprint` or what `core.py` takes in its place raises FORMAT_VERSION by
    one. tests/test_schema.py holds the bytes still.
 2. `store.py` upgrades the version before in ONE transaction at start, before anything is served; a store of a later
    version is refused. The "format" row keeps its place and shape for ever.
 3. A data directory made by the version before stays in tests/data/format-N/, and a test opens it.
 4. CHANGELOG.md says that there is no way back except from a copy made before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import starmap
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

import msgpack

from idemq.client.wire import BATCH_HEADER, Position, Settings, crc32

from .core import Damaged, Stored
from .groups import OffsetKey, OffsetRow
from .producers import Advance, ProducerRow, Result, Takeover, advanced_by, result_of
from .topics import TopicRow

FORMAT_VERSION = 4
MAGIC = b"idemq"
INCARNATION_BYTES = 16


class Table(StrEnum):
    """The named tables of a store."""

    LOG = "log"
    PRODUCERS = "producers"
    PRODUCER_NAMES = "producer_names"
    OFFSETS = "offsets"
    TOPICS = "topics"
    DELTAS = "deltas"
    META = "meta"


FORMAT_KEY = b"format"
INCARNATION_KEY = b"incarnation"

ID_KEY = Struct(">Q")
PARTITION_KEY = Struct(">QI")
LOG_KEY = Struct(">QIQ")
_LOG_PREFIX = Struct(">IQQ")
LOG_PREFIX_BYTES = _LOG_PREFIX.size
"""What stands before the batch in a value of the log."""
_LOG_COVERED = _LOG_PREFIX.size + BATCH_HEADER.size
_STAMP = Struct(">QQ")
_FORMAT = Struct(f">{len(MAGIC)}sI")
_STATE = Struct(">QQQ")
_pack = msgpack.Packer(autoreset=True).pack
_SEEDS: dict[Table, int] = {table: crc32(table.encode()) for table in Table}


class LogRow(NamedTuple):
    """A value of the log without the batch's bytes."""

    offset: int
    end: int
    """The offset behind its last record."""
    timestamp_ms: int
    position: int
    length: int
    """Bytes of the batch."""


def damaged(table: Table, key: bytes | memoryview, why: str) -> Damaged:
    """The error that names a broken row."""
    return Damaged(f"table {table}, key {bytes(key).hex()}: {why}")


def _seal(table: Table, key: bytes, body: bytes) -> bytes:
    checksum: int = crc32(body, crc32(key, _SEEDS[table]))
    return checksum.to_bytes(4, "big") + body


def _open(table: Table, key: bytes | memoryview, value: bytes | memoryview) -> bytes:
    body = bytes(value[4:])
    if crc32(body, crc32(key, _SEEDS[table])) != int.from_bytes(value[:4], "big"):
        raise damaged(table, key, "the row does not match its checksum")
    return body


# --------------------------------------------------------------------------------------------------------------- log


def log_key(topic_id: int, partition: int, offset: int) -> bytes:
    """Where a batch lies."""
    return LOG_KEY.pack(topic_id, partition, offset)


def log_value(key: bytes, stored: Stored) -> bytes:
    """A batch as it is stored: prefix, then the batch unchanged."""
    batch = stored.batch
    stamp = _STAMP.pack(stored.timestamp_ms, stored.position)
    checksum: int = crc32(b"".join((key, stamp, batch[: BATCH_HEADER.size])), _SEEDS[Table.LOG])
    return b"".join((checksum.to_bytes(4, "big"), stamp, batch))


def log_row(key: bytes | memoryview, value: bytes | memoryview) -> LogRow:
    """Decode and verify everything but the batch's body. Raises Damaged."""
    if crc32(value[4:_LOG_COVERED], crc32(key, _SEEDS[Table.LOG])) != int.from_bytes(value[:4], "big"):
        raise damaged(Table.LOG, key, "the head of the batch does not match its checksum")
    length = len(value) - LOG_PREFIX_BYTES
    try:
        _, timestamp_ms, position = _LOG_PREFIX.unpack_from(value)
        header = BATCH_HEADER.unpack_from(value, LOG_PREFIX_BYTES)
    except StructError as error:
        raise damaged(Table.LOG, key, str(error)) from None
    if header[9] != length - BATCH_HEADER.size:
        raise damaged(Table.LOG, key, "the batch is longer or shorter than its header says")
    offset = LOG_KEY.unpack(key)[2]
    return LogRow(offset, offset + header[3], timestamp_ms, position, length)


# --------------------------------------------------------------------------------------------------------- producers


def producer_value(key: bytes, row: ProducerRow) -> bytes:
    """A producer's row."""
    return _seal(Table.PRODUCERS, key, _pack(row[1:]))


def producer_row(key: bytes, value: bytes) -> ProducerRow:
    """Decode and verify. Raises Damaged."""
    *fields, takeovers, results = msgpack.unpackb(_open(Table.PRODUCERS, key, value), use_list=False)
    ended = tuple([Takeover(*takeover) for takeover in takeovers])
    return ProducerRow._make((ID_KEY.unpack(key)[0], *fields, ended, tuple(map(_result, results))))


def _result(stored: bytes | tuple[Any, ...]) -> Result:
    """Format 3 had a list of numbers, formats 1 and 2 in it a list of positions, and so an odd number of fields."""
    if isinstance(stored, bytes):
        return stored
    last_seq, fingerprint, *rest = stored
    positions = rest[0] if len(rest) == 1 else zip(rest[::2], rest[1::2], strict=True)
    return result_of(last_seq, fingerprint, starmap(Position, positions))


def name_value(key: bytes, producer_id: int) -> bytes:
    """The entry of the index of names; `key` is the name."""
    return _seal(Table.PRODUCER_NAMES, key, ID_KEY.pack(producer_id))


def name_id(key: bytes, value: bytes) -> int:
    """Decode and verify. Raises Damaged."""
    producer_id: int = ID_KEY.unpack(_open(Table.PRODUCER_NAMES, key, value))[0]
    return producer_id


# ------------------------------------------------------------------------------------------------------------ deltas


class State(NamedTuple):
    """What every commit writes."""

    counter: int
    """The last number given to a topic, producer, epoch or lease."""
    commits: int
    topics_removed: int
    """Tells a log that is gone with its topic from one that is lost."""


Change = ProducerRow | bytes | Advance | None
"""What became of a producer: its row, or its value in `producers`; what commits made of the row before; deleted."""


class Delta(NamedTuple):
    """What one commit writes, but for the tables that it changes in place."""

    state: State
    producers: dict[int, Change]
    """A whole row is its value in `producers`."""


def delta_value(key: bytes, state: State, producers: Mapping[int, Change]) -> bytes:
    """A delta."""
    told = {
        producer_id: producer_value(ID_KEY.pack(producer_id), change) if isinstance(change, ProducerRow) else change
        for producer_id, change in producers.items()
    }
    return _seal(Table.DELTAS, key, _STATE.pack(*state) + _pack(told))


def delta(key: bytes, value: bytes) -> Delta:
    """Decode and verify. Raises Damaged."""
    body = _open(Table.DELTAS, key, value)
    told = msgpack.unpackb(body[_STATE.size :], use_list=False, strict_map_key=False)
    for producer_id, change in told.items():
        if isinstance(change, tuple):
            *fields, results = change
            told[producer_id] = Advance._make((*fields, tuple(map(_result, results))))
    return Delta(State(*_STATE.unpack_from(body)), told)


def changed(producer_id: int, changes: Sequence[Change]) -> ProducerRow | None:
    """The row after these changes, the first of which is whole. Raises Damaged.

    Deltas tell a deletion after it was done in `producers`: what advances no row counts for nothing.
    """
    row: ProducerRow | bytes | None = None
    advances: list[Advance] = []
    for change in changes:
        if isinstance(change, Advance):
            advances.append(change)
        else:
            row, advances = change, []
    if isinstance(row, bytes):
        row = producer_row(ID_KEY.pack(producer_id), row)
    return None if row is None else advanced_by(row, advances)


def checked(key: bytes, value: bytes | None) -> bytes | None:
    """A value in `producers` as it is, verified. Raises Damaged."""
    if value is not None:
        _open(Table.PRODUCERS, key, value)
    return value


# --------------------------------------------------------------------------------------------------- offsets, topics


def offset_key(key: OffsetKey) -> bytes:
    """Where a group's position lies."""
    return PARTITION_KEY.pack(key.topic_id, key.partition) + key.group.encode()


def offset_key_of(key: bytes) -> OffsetKey:
    """The inverse of `offset_key`."""
    topic_id, partition = PARTITION_KEY.unpack_from(key)
    return OffsetKey(key[PARTITION_KEY.size :].decode(), topic_id, partition)


def offset_value(key: bytes, row: OffsetRow) -> bytes:
    """A group's position."""
    return _seal(Table.OFFSETS, key, _pack(row))


def offset_row(key: bytes, value: bytes) -> OffsetRow:
    """Decode and verify. Raises Damaged."""
    return OffsetRow(*msgpack.unpackb(_open(Table.OFFSETS, key, value), use_list=False))


def topic_value(key: bytes, row: TopicRow) -> bytes:
    """A topic."""
    return _seal(Table.TOPICS, key, _pack(row[1:]))


def topic_row(key: bytes, value: bytes) -> TopicRow:
    """Decode and verify. Raises Damaged."""
    fields: Any = msgpack.unpackb(_open(Table.TOPICS, key, value), use_list=False)
    name, settings, floors, nonce, deleted = fields
    return TopicRow(ID_KEY.unpack(key)[0], name, Settings(*settings), floors, nonce, deleted)


# -------------------------------------------------------------------------------------------------------------- meta


def format_value() -> bytes:
    """The row that says whose store this is, and of which version."""
    return _seal(Table.META, FORMAT_KEY, _FORMAT.pack(MAGIC, FORMAT_VERSION))


def format_version(value: bytes) -> int | None:
    """The version of a store; None when the row is not ours. Raises Damaged."""
    body = _open(Table.META, FORMAT_KEY, value)
    if len(body) != _FORMAT.size or not body.startswith(MAGIC):
        return None
    version: int = _FORMAT.unpack(body)[1]
    return version


def incarnation_value(incarnation: bytes) -> bytes:
    """The store's name for ever."""
    return _seal(Table.META, INCARNATION_KEY, incarnation)


def incarnation(value: bytes) -> bytes:
    """Decode and verify. Raises Damaged."""
    return _open(Table.META, INCARNATION_KEY, value)


# ---------------------------------------------------------------------------------------------------------- format 1
# The state was a row of its own, and a delta held values as they stand in `producers`, and was keyed by its commit.

STATE_KEY_1 = b"state"


def state_1(value: bytes) -> State:
    """Decode and verify. Raises Damaged."""
    return State(*_STATE.unpack(_open(Table.META, STATE_KEY_1, value)))


def delta_1(key: bytes, value: bytes) -> list[tuple[int, bytes | None]]:
    """Decode and verify. Raises Damaged."""
    rows: list[tuple[int, bytes | None]] = msgpack.unpackb(_open(Table.DELTAS, key, value), use_list=False)
    return rows
