"""The bytes of the store: they come back, they never change within a format version, and no flipped bit goes unseen."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemq.broker import schema
from idemq.broker.core import Damaged, Stored
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.broker.producers import (
    Advance,
    ProducerRow,
    Result,
    Takeover,
    last_seq_of,
    positions_of,
    result_of,
    single_result,
)
from idemq.broker.topics import TopicRow
from idemq.client import wire
from idemq.client.wire import NUMBER_MAX, Position, Settings
from tests.crash import workload

numbers = st.integers(0, NUMBER_MAX)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=50)
results = st.builds(
    result_of,
    st.integers(-1, NUMBER_MAX),
    st.integers(0, 2**32 - 1),
    st.lists(st.builds(Position, numbers, numbers), max_size=3),
)
producers = st.builds(
    ProducerRow,
    numbers,
    names,
    numbers,
    names,
    st.integers(-1, NUMBER_MAX),
    st.none() | st.binary(max_size=100),
    names,
    names,
    numbers,
    numbers,
    st.booleans(),
    st.lists(st.builds(Takeover, numbers, st.integers(-1, NUMBER_MAX)), max_size=4).map(tuple),
    st.lists(results, max_size=32).map(tuple),
)
advances = st.builds(
    Advance,
    numbers,
    st.none() | st.binary(max_size=100),
    st.integers(1, 32),
    st.lists(results, min_size=1, max_size=3).map(tuple),
)
offsets = st.builds(
    OffsetRow,
    numbers,
    numbers,
    names,
    st.none() | st.binary(max_size=100),
    numbers,
    numbers,
    numbers,
    numbers,
    names,
    numbers,
)
limits = st.none() | st.integers(1, NUMBER_MAX)
topics = st.builds(
    TopicRow,
    numbers,
    names,
    st.builds(Settings, limits, limits, limits, st.just("delete")),
    st.lists(numbers, min_size=1, max_size=20).map(tuple),
    names,
    st.booleans(),
)

ROW = ProducerRow(
    7, "näme", 9, "session", 41, b"token", "holder", "address", 1, 2, True, (Takeover(7, 5),),
    (result_of(40, 1, []), result_of(41, 2**32 - 1, [Position(5, 6), Position(7, 8)])),
)  # fmt: skip
POSITION = OffsetRow(3, 4, "session", b"metadata", 5, 6, 7, 8, "nonce", 9)
TOPIC = TopicRow(8, "topic", Settings(1, 2, None, "delete"), (3, 0), "nonce", False)
BATCH = wire.make_batch(0, 3, 8, 1, 7, 39, 41, b"the body")
STORED = Stored(8, 1, 11, 1234, 5678, BATCH)


@given(producers)
def test_producer_rows_come_back(row: ProducerRow) -> None:
    key = schema.ID_KEY.pack(row.producer_id)
    assert schema.producer_row(key, schema.producer_value(key, row)) == row


@given(
    st.builds(schema.State, numbers, numbers, numbers),
    st.dictionaries(numbers, st.none() | st.binary(max_size=100) | advances, max_size=3),
)
def test_deltas_come_back(state: schema.State, changes: dict[int, schema.Change]) -> None:
    key = schema.ID_KEY.pack(5)
    assert schema.delta(key, schema.delta_value(key, state, changes)) == schema.Delta(state, changes)


@given(names, offsets, numbers, st.integers(0, 1023))
def test_offset_rows_come_back(group: str, row: OffsetRow, topic_id: int, partition: int) -> None:
    where = OffsetKey(group, topic_id, partition)
    key = schema.offset_key(where)
    assert schema.offset_key_of(key) == where
    assert schema.offset_row(key, schema.offset_value(key, row)) == row


@given(topics)
def test_topic_rows_come_back(row: TopicRow) -> None:
    key = schema.ID_KEY.pack(row.topic_id)
    assert schema.topic_row(key, schema.topic_value(key, row)) == row


def test_rows_have_their_own_types() -> None:
    key = schema.ID_KEY.pack(7)
    row = schema.producer_row(key, schema.producer_value(key, ROW))
    assert type(row.takeovers[0]) is Takeover
    advance = Advance(3, None, 2, (result_of(42, 1, [Position(1, 2)]),))
    value = schema.delta_value(key, schema.State(1, 2, 3), {7: advance, 8: ROW})
    told = schema.delta(key, value).producers
    assert type(told[7]) is Advance
    assert schema.changed(8, [told[8]]) == ROW._replace(producer_id=8)
    assert schema.changed(7, [row, told[7]]) == ROW._replace(
        last_seq=42, seen_ms=3, token=None, results=(ROW.results[1], result_of(42, 1, [Position(1, 2)]))
    )
    key = schema.ID_KEY.pack(8)
    assert type(schema.topic_row(key, schema.topic_value(key, TOPIC)).settings) is Settings


def test_what_advances_no_row_counts_for_nothing() -> None:
    """A row is deleted in its place before the deltas that told of it are dropped."""
    advance = Advance(3, None, 2, (result_of(42, 1, []),))
    assert schema.changed(7, [None, advance]) is None
    value = schema.producer_value(schema.ID_KEY.pack(7), ROW)
    assert schema.changed(7, [None, advance, value]) == ROW
    assert schema.changed(7, [value, None, advance]) is None


@given(
    st.integers(-1, NUMBER_MAX), st.integers(0, 2**32 - 1), st.lists(st.builds(Position, numbers, numbers), max_size=3)
)
def test_a_result_is_what_was_answered(last_seq: int, fingerprint: int, positions: list[Position]) -> None:
    result = result_of(last_seq, fingerprint, positions)
    assert last_seq_of(result) == last_seq
    assert positions_of(result) == positions
    assert workload.numbers(result)[1] == fingerprint
    if len(positions) == 1:
        assert single_result(last_seq, fingerprint, *positions[0]) == result


@pytest.mark.parametrize("nested", [True, False])
@given(row=producers, advance=advances)
def test_results_of_earlier_formats_are_read(nested: bool, row: ProducerRow, advance: Advance) -> None:
    """Up to format 3 they were lists of numbers, of which formats 1 and 2 had those of the positions in another."""

    def as_it_was(results: tuple[Result, ...]) -> list[Any]:
        found = map(workload.numbers, results)
        return [(one[0], one[1], list(zip(one[2::2], one[3::2], strict=True))) if nested else one for one in found]

    key = schema.ID_KEY.pack(row.producer_id)
    body = msgpack.packb((*row[1:-1], as_it_was(row.results)))
    assert schema.producer_row(key, schema._seal(schema.Table.PRODUCERS, key, body)) == row
    body = bytes(24) + msgpack.packb({7: (*advance[:-1], as_it_was(advance.results))})
    assert schema.delta(key, schema._seal(schema.Table.DELTAS, key, body)).producers == {7: advance}


def test_a_batch_is_stored_unchanged() -> None:
    key = schema.log_key(8, 1, 11)
    value = schema.log_value(key, STORED)
    assert value[schema.LOG_PREFIX_BYTES :] == BATCH
    assert schema.log_row(key, value) == schema.LogRow(11, 14, 1234, 5678, len(BATCH))


@given(st.lists(st.tuples(numbers, numbers, names), min_size=2, max_size=20))
def test_keys_sort_as_their_numbers(found: list[tuple[int, int, str]]) -> None:
    by_key = sorted(found, key=lambda one: schema.log_key(one[0], one[1] % 1024, one[1]))
    assert by_key == sorted(found, key=lambda one: (one[0], one[1] % 1024, one[1]))
    by_key = sorted(found, key=lambda one: schema.offset_key(OffsetKey(one[2], one[0], 0)))
    assert by_key == sorted(found, key=lambda one: (one[0], one[2]))


Case = tuple[bytes, bytes, Callable[[bytes, bytes], Any]]


def cases() -> dict[str, Case]:
    seven, eight, where = schema.ID_KEY.pack(7), schema.ID_KEY.pack(8), schema.offset_key(OffsetKey("grüppe", 8, 1))
    batch = schema.log_key(8, 1, 11)
    value = schema.producer_value(seven, ROW)
    changes: dict[int, schema.Change] = {7: value, 8: Advance(3, b"token", 2, ROW.results), 9: None}
    return {
        "log": (batch, schema.log_value(batch, STORED), schema.log_row),
        "producers": (seven, schema.producer_value(seven, ROW), schema.producer_row),
        "producer_names": ("näme".encode(), schema.name_value("näme".encode(), 7), schema.name_id),
        "offsets": (where, schema.offset_value(where, POSITION), schema.offset_row),
        "topics": (eight, schema.topic_value(eight, TOPIC), schema.topic_row),
        "deltas": (seven, schema.delta_value(seven, schema.State(1, 2, 3), changes), schema.delta),
        "format": (schema.FORMAT_KEY, schema.format_value(), lambda _, value: schema.format_version(value)),
        "incarnation": (
            schema.INCARNATION_KEY,
            schema.incarnation_value(bytes(range(16))),
            lambda _, value: schema.incarnation(value),
        ),
    }  # fmt: skip


DIGESTS = {
    "log": "fa736e4e4ece20e8",
    "producers": "6ac047375f4f6cae",
    "producer_names": "50c6567406dced49",
    "offsets": "bdf8a9af02c901b3",
    "topics": "b9bd9bbeca59169c",
    "deltas": "d33203637c819f51",
    "format": "c33f35baeb28d6fc",
    "incarnation": "bf0da717c9a73f97",
}


@pytest.mark.parametrize("name", cases())
def test_the_bytes_of_this_format_stand_still(name: str) -> None:
    """When this fails, the format changed: follow the procedure at the head of schema.py, then renew the digests."""
    key, value, _ = cases()[name]
    assert schema.FORMAT_VERSION == 4
    assert hashlib.sha256(key + b"|" + value).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", cases())
def test_every_flipped_bit_is_seen(name: str) -> None:
    """In the value, and in the key under which it is found. The body of a batch has the batch's own checksum."""
    key, value, decode = cases()[name]
    decode(key, value)
    covered = len(value) - len(b"the body") if name == "log" else len(value)
    for bit in range(covered * 8):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            decode(key, bytes(flipped))
    if name in ("format", "incarnation"):
        return  # their keys are fixed
    for bit in range(len(key) * 8):
        wrong = bytearray(key)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            decode(bytes(wrong), value)


@pytest.mark.parametrize("name", cases())
def test_a_value_cut_short_is_seen(name: str) -> None:
    key, value, decode = cases()[name]
    for length in range(len(value)):
        with pytest.raises(Damaged):
            decode(key, value[:length])


def test_a_row_in_the_wrong_table_is_seen() -> None:
    key = schema.ID_KEY.pack(7)
    with pytest.raises(Damaged):
        schema.topic_row(key, schema.producer_value(key, ROW))


def test_damage_says_where() -> None:
    key, value, decode = cases()["producers"]
    broken = bytearray(value)
    broken[random.Random(1).randrange(len(value))] ^= 1
    with pytest.raises(Damaged, match=f"table producers, key {key.hex()}: "):
        decode(key, bytes(broken))


def test_a_row_of_somebody_else_is_not_ours() -> None:
    value = schema._seal(schema.Table.META, schema.FORMAT_KEY, b"other\x00\x00\x00\x01")
    assert schema.format_version(value) is None
