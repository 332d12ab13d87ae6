"""A history of group commits, the same for the same seed, and what a store holds after each of them.

The groups come from a real core, so that every invariant of a data directory holds in them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

from idemq.broker import store
from idemq.broker.core import Connection, Core, Group, Limits, Now
from idemq.broker.groups import OffsetKey
from idemq.broker.producers import ProducerRow, Result, last_seq_of, positions_of
from idemq.broker.store import MemoryStore, Storage
from idemq.broker.topics import TopicRow
from idemq.client import wire
from idemq.client.wire import Settings, TopicPartition
from tests.rows import producer_rows

PARTITIONS = 2
PRODUCERS = 14
GROUPS = ("alpha", "beta")
BODIES = (0, 40, 300, 1500, 5000, 9000, 30_000)
START_MS = 1_700_000_000_000

Content = tuple[Any, ...]


def hurry(deltas: int = 4, rows: int = 3) -> None:
    """Let rows that wait in deltas move on within a few commits, in this process, so that each stage of it is met.

    After so many deltas, at least so many rows in each commit.
    """
    store.LAZY_BYTES_MAX = 3000
    store.LAZY_DELTAS_MAX = deltas
    store.LAZY_STEP_ROWS = rows
    store.LAZY_FEW_BYTES_MAX = 250


def content(of: Storage) -> Content:
    """All that a store answers."""
    topics = list(of.topics())
    where = [(topic.topic_id, index) for topic in topics for index in range(len(topic.floors))]
    logs = []
    for topic_id, index in where:
        ends = of.partition(topic_id, index)
        first = 0 if ends is None else ends.first_offset
        logs.append((ends, of.read(topic_id, index, first, 1 << 30, 1 << 60)))
    keys = [OffsetKey(group, *one) for group in GROUPS for one in where]
    names = of.producer_names("", 1000)
    producers = map(_shown, producer_rows(of, 0, 1000))
    return (
        of.space().txn_id,
        of.counter(),
        of.producer_count(),
        tuple(topics),
        tuple(logs),
        tuple([of.offset(key) for key in keys]),
        tuple(names),
        tuple(producers),
        tuple([_shown(of.producer(producer_id)) for _, producer_id in names]),
        tuple(of.offsets_from(None, 1000)),
        of.offset_count(),
    )


def numbers(result: Result) -> tuple[int, ...]:
    """Last number, fingerprint, then of each batch offset and time."""
    return (last_seq_of(result), int.from_bytes(result[8:12], "little"), *chain.from_iterable(positions_of(result)))


def _shown(row: ProducerRow | None) -> ProducerRow | None:
    """The same in all formats."""
    return row and ProducerRow._make((*row[:-1], tuple(map(numbers, row.results))))


def history(seed: int, count: int) -> tuple[list[Group], list[Content]]:
    """(groups, what is stored before the first of them and after each)."""
    memory = MemoryStore()
    groups: list[Group] = []
    contents = [content(memory)]
    for group in _groups(memory, random.Random(seed)):
        memory.commit(group)
        groups.append(group)
        contents.append(content(memory))
        if len(groups) == count:
            return groups, contents
    raise AssertionError("the history has no end")


def _groups(memory: MemoryStore, dice: random.Random) -> Iterator[Group]:
    """Each group must be committed to `memory` before the next is asked for."""
    core = Core(memory, Limits())
    connection = core.connect("address")
    assert isinstance(connection, Connection)
    core.step(Now(0, START_MS), connection, 0, wire.Hello(wire.VERSION, "workload"), b"")
    step = 0
    while True:
        now = Now(step * 1500, START_MS + step * 1500)
        core.tick(now)
        if step == 0:
            core.step(now, connection, 0, wire.CreateTopic("events", PARTITIONS, Settings()), b"")
            core.step(now, connection, 0, wire.CreateTopic("kept", PARTITIONS, Settings(retention_bytes=40_000)), b"")
        else:
            for request, payload in _requests(memory, dice, step):
                core.step(now, connection, 0, request, payload)
        step += 1
        group = core.begin()
        if group is None:
            continue
        if group.writes:
            yield group
        core.committed()


def _requests(memory: MemoryStore, dice: random.Random, step: int) -> Iterator[tuple[Any, bytes]]:
    topics = [topic for topic in memory.topics() if not topic.deleted]
    known = producer_rows(memory, 0, 1000)
    names = [f"producer-{index}" for index in range(PRODUCERS)]
    for name in names if step == 1 else dice.sample(names, 1):
        yield wire.Open(name, f"session-{step}", _epoch(memory, name), name.endswith("3")), b""
    if len(topics) < 2:
        yield wire.CreateTopic(f"topic-{step}", PARTITIONS, Settings()), b""
    for row in dice.sample(known, min(len(known), dice.choice((0, 1, 2, 12)))):
        yield from _commits(memory, dice, row, [topic.topic_id for topic in topics])
    for group in GROUPS:
        yield from _group(memory, dice, group, topics, step)
    if step % 7 == 5:
        topic = dice.choice(topics)
        ends = [memory.partition(topic.topic_id, index) for index in range(PARTITIONS)]
        yield (
            wire.PurgeTopic(topic.topic_id, [0 if end is None else (end.first_offset + end.next) // 2 for end in ends]),
            b"",
        )
    if step % 11 == 10:
        yield wire.DeleteTopic(dice.choice(topics).topic_id), b""
    if step % 6 == 4 and known:
        row = dice.choice(known)
        yield wire.DeleteProducer(row.producer_id, row.epoch), b""


def _group(
    memory: MemoryStore, dice: random.Random, group: str, topics: list[TopicRow], step: int
) -> Iterator[tuple[Any, bytes]]:
    """Two members take turns: one joins, stays, leaves, or is not heard of for so long that it counts as gone."""
    rows = {
        TopicPartition(topic.topic_id, index): row
        for topic in topics
        for index in range(PARTITIONS)
        if (row := memory.offset(OffsetKey(group, topic.topic_id, index))) is not None
    }
    if step % 4 == 2:
        member = f"member-{step // 4 % 2}"
        held = [wire.Held(*key, row.lease) for key, row in rows.items() if row.holder == member]
        wanted = [topic.topic_id for topic in topics] if dice.random() < 0.8 else []
        yield wire.Heartbeat(group, member, wanted, held, in_hand_max=dice.choice((0, 1, 5))), b""
    if step % 9 == 7 and rows:
        key, row = dice.choice(list(rows.items()))
        yield wire.Seek(group, *key, f"seek-{step}", row.lease, row.next // 2, dice.choice(("", row.holder))), b""


def _epoch(memory: MemoryStore, name: str) -> int:
    producer_id = memory.producer_id(name)
    row = None if producer_id is None else memory.producer(producer_id)
    return 0 if row is None else row.epoch


def _commits(
    memory: MemoryStore, dice: random.Random, row: ProducerRow, topic_ids: list[int]
) -> Iterator[tuple[Any, bytes]]:
    """A few commits of one producer, one behind the other; the last carries a group's position."""
    seq = row.last_seq
    for last in (False, False, True)[-dice.randint(1, 3) :]:
        appends, batches = [], []
        first = seq + 1
        for _ in range(dice.randint(1, 2)):
            count = dice.randint(1, 5)
            topic_id, index = dice.choice(topic_ids), dice.randrange(PARTITIONS)
            body = dice.randbytes(dice.choice(BODIES))
            batch = wire.make_batch(0, count, topic_id, index, row.producer_id, first, first + count - 1, body)
            appends.append(wire.Append(topic_id, index, len(batch)))
            batches.append(batch)
            first += count
        offsets = []
        key = OffsetKey(dice.choice(GROUPS), dice.choice(topic_ids), 0)
        position, ends = memory.offset(key), memory.partition(key.topic_id, 0)
        if last and position is not None and position.lease and ends is not None and ends.next > position.next:
            tried = (position.next, position.attempts + 1, position.turns + 1)
            end, attempts, turns = dice.choice(((ends.next, None, 0), tried))
            offsets.append(wire.Offset(*key, position.lease, position.next, end, b"metadata", attempts, turns))
        yield wire.Commit(row.producer_id, row.epoch, seq, first - 1, appends, offsets, b"token"), b"".join(batches)
        seq = first - 1
