"""What is measured. Each figure is a coroutine that yields its rows as they are known."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import NamedTuple

import lmdb

import idemq
from idemq import Client, Record
from idemq.client import records, wire
from idemq.client.engine import BATCH_BYTES

from .measure import Sample, Spread, Stopwatch, anonymous_mb, broker, confidence, directory_mb, metric, spread

TOPIC = "bench"
RATIO = "ratio of CPU"
DEDUP_BLOCKS = 100
"""Blocks of `dedup` for each round of the others: a block takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    sizes: tuple[int, ...]
    rounds: int
    scale: float
    """1 for the real thing; `--quick` takes a small part of the messages, or of `dedup`'s blocks."""

    def messages(self, full: int) -> int:
        """A part of the full number."""
        return max(50, int(full * self.scale))


class Row(NamedTuple):
    """One line of the table: what, in which unit, the figure."""

    figure: str
    unit: str
    value: Spread


Rows = AsyncIterator[Row]
Work = Callable[[Client], Awaitable[None]]


def sample_rows(name: str, samples: list[Sample]) -> list[Row]:
    """The rate, and the CPU of either side."""
    return [
        Row(name, "messages/s", spread(sample.rate for sample in samples)),
        Row(name, "client CPU µs/message", spread(sample.client_us for sample in samples)),
        Row(name, "broker CPU µs/message", spread(sample.broker_us for sample in samples)),
    ]


async def _sampled(plan: Plan, messages: int, work: Work, *, partitions: int = 1) -> list[Sample]:
    """The work in rounds, on a new broker, after one round that is not counted."""
    samples: list[Sample] = []
    async with broker() as process, idemq.connect(process.url, timeout=60) as mq:
        await mq.create_topic(TOPIC, partitions=partitions)
        watch = Stopwatch(process)
        for number in range(plan.rounds + 1):
            watch.start()
            await work(mq)
            if number:
                samples.append(watch.stop(messages))
    return samples


async def produce(plan: Plan) -> Rows:
    """Durable, pipelined sends: plain values, and keyed records ready-made and made on the way."""
    for size in plan.sizes:
        count = plan.messages(1_000_000 if size < 500 else 200_000)
        values = [os.urandom(size)] * count

        async def plain(mq: Client, values: list[bytes] = values) -> None:
            async with mq.producer() as producer:
                await producer.send_many(TOPIC, values)

        for row in sample_rows(f"produce plain {size} B", await _sampled(plan, count, plain)):
            yield row
        count = plan.messages(300_000 if size < 500 else 100_000)
        keys = [b"key-%d" % (number % 1000) for number in range(count)]
        ready = [Record(value, key) for value, key in zip(values, keys, strict=False)]

        async def keyed(mq: Client, ready: list[Record] = ready) -> None:
            async with mq.producer() as producer:
                await producer.send_many(TOPIC, ready)

        async def fresh(mq: Client, values: list[bytes] = values, keys: list[bytes] = keys) -> None:
            async with mq.producer() as producer:
                pairs = zip(values, keys, strict=False)
                await producer.send_many(TOPIC, (Record(value, key) for value, key in pairs))

        for name, work in (("ready-made", keyed), ("fresh", fresh)):
            for row in sample_rows(f"produce keyed, {name} {size} B", await _sampled(plan, count, work, partitions=4)):
                yield row


async def send(plan: Plan) -> Rows:
    """Awaited sends: each task sends its next message when the last is durable."""
    value = os.urandom(plan.sizes[0])
    for tasks, full in ((1, 3_000), (16, 40_000), (256, 200_000)):
        each = max(1, plan.messages(full) // tasks)

        async def work(mq: Client, tasks: int = tasks, each: int = each) -> None:
            async def one() -> None:
                for _ in range(each):
                    await mq.send(TOPIC, value)

            await asyncio.gather(*[one() for _ in range(tasks)])

        name = f"awaited sends, {tasks} task{'s' * (tasks > 1)}, {plan.sizes[0]} B"
        for row in sample_rows(name, await _sampled(plan, tasks * each, work)):
            yield row


async def consume(plan: Plan) -> Rows:
    """Read back what is stored, looking at each value."""
    for size in plan.sizes:
        count = plan.messages(1_000_000 if size < 500 else 200_000)
        async with broker() as process, idemq.connect(process.url, timeout=60) as mq:
            await mq.create_topic(TOPIC)
            async with mq.producer() as producer:
                await producer.send_many(TOPIC, [os.urandom(size)] * count)
            watch = Stopwatch(process)
            samples: dict[str, list[Sample]] = {"batches": [], "async for": []}
            for number in range(plan.rounds + 1):
                for name, taken in samples.items():
                    watch.start()
                    await (_by_batches if name == "batches" else _one_by_one)(mq, count)
                    if number:
                        taken.append(watch.stop(count))
        for name, taken in samples.items():
            for row in sample_rows(f"consume by {name} {size} B", taken):
                yield row


async def _by_batches(mq: Client, count: int) -> None:
    async with mq.subscribe(TOPIC) as sub:
        async for batch in sub.batches(max_messages=5000, max_wait=0.001):
            for message in batch:
                message.value  # noqa: B018 - looked at, as a reader does
            count -= len(batch)
            if not count:
                return


async def _one_by_one(mq: Client, count: int) -> None:
    async with mq.subscribe(TOPIC) as sub:
        async for message in sub:
            message.value  # noqa: B018 - looked at, as a reader does
            count -= 1
            if not count:
                return


async def dedup(plan: Plan) -> Rows:
    """What deduplication costs: CPU with it against CPU without, beside without against without (the noise).

    In short blocks, one after the other: what else happens on the machine then falls on all alike.
    """
    size = plan.sizes[0]
    rounds = max(6, int(DEDUP_BLOCKS * plan.rounds * plan.scale))  # with fewer no two values enclose 95 %
    order = random.Random(1)
    for each, count in ((1, 300), (10, 1_500), (100, 5_000), (1000, 30_000)):
        values = [os.urandom(size)] * count
        cpu: dict[str, list[tuple[float, float]]] = {"off": [], "on": [], "off again": []}
        async with broker() as process, idemq.connect(process.url, timeout=60) as mq, AsyncExitStack() as opened:
            await mq.create_topic(TOPIC)
            producers = {
                name: await opened.enter_async_context(
                    mq.producer(dedup=name == "on", batch_bytes=each * (size + records.RECORD_BYTES))
                )
                for name in cpu
            }
            watch = Stopwatch(process)
            for number in range(rounds + 1):
                for name in order.sample(list(cpu), len(cpu)):
                    watch.start()
                    await producers[name].send_many(TOPIC, values)
                    sample = watch.stop(count)
                    if number:
                        cpu[name].append((sample.client_us, sample.broker_us))
        label = f"{each} a batch"
        for side, index in (("client", 0), ("broker", 1)):
            for name in ("off", "on"):
                unit = f"{side} CPU µs/message"
                yield Row(f"dedup {name}, {label}", unit, confidence(one[index] for one in cpu[name]))
        for name, title in (("on", "dedup on / off"), ("off again", "off / off (noise)")):
            pairs = zip(cpu[name], cpu["off"], strict=True)
            yield Row(f"{title}, {label}", RATIO, confidence(sum(one) / sum(other) for one, other in pairs))


async def raw(plan: Plan) -> Rows:
    """The same batches straight into LMDB, as many bytes in a commit as the broker had, in turn with the broker."""
    for size in plan.sizes:
        count = plan.messages(1_000_000 if size < 500 else 200_000)
        each = BATCH_BYTES // (size + records.RECORD_BYTES)
        value = os.urandom(size)
        values = [value] * count
        batch = values_batch([value] * each)
        ours: list[float] = []
        theirs: list[float] = []
        commits_seen: list[float] = []
        async with broker() as process, idemq.connect(process.url, timeout=60) as mq:
            await mq.create_topic(TOPIC)
            with TemporaryDirectory(prefix="idemq-bench-raw-") as directory:
                for number in range(plan.rounds + 1):
                    commits = await metric(process, "idemq_group_commit_seconds_count")
                    started = time.perf_counter()
                    async with mq.producer() as producer:
                        await producer.send_many(TOPIC, values)
                    mine = count / (time.perf_counter() - started)
                    commits = await metric(process, "idemq_group_commit_seconds_count") - commits
                    batches = max(1, count // each)
                    other = await asyncio.to_thread(into_lmdb, directory, number, batch, batches, commits)
                    if number:
                        ours.append(mine)
                        theirs.append(other * each)
                        commits_seen.append(batches * len(batch) / commits / 1000)
        yield Row(f"idemq, {size} B", "messages/s", spread(ours))
        yield Row(f"raw LMDB, {size} B", "messages/s", spread(theirs))
        yield Row(f"idemq / raw LMDB, {size} B", "ratio", spread(a / b for a, b in zip(ours, theirs, strict=True)))
        yield Row(f"in a commit, {size} B", "kB", spread(commits_seen))


def values_batch(values: list[bytes]) -> bytes:
    """Plain values as the log stores them."""
    body = records.pack(values, None, None, None, wire.Codec.NONE)
    return wire.make_batch(wire.Codec.NONE, len(values), 1, 0, 1, 0, len(values) - 1, body)


def into_lmdb(directory: str, number: int, batch: bytes, batches: int, commits: float) -> float:
    """Batches a second, in about `commits` transactions, synced as the broker's are."""
    environment = lmdb.open(directory, map_size=1 << 36)
    together = max(1, round(batches / max(1.0, commits)))
    started = time.perf_counter()
    try:
        for first in range(0, batches, together):
            with environment.begin(write=True) as txn:
                for index in range(first, min(first + together, batches)):
                    stored = txn.put(b"%08d%012d" % (number, index), batch)
                    assert stored, "each key is new"
        return batches / (time.perf_counter() - started)
    finally:
        environment.close()


async def restart(plan: Plan) -> Rows:
    """SIGKILL with a large log, and start again: how long until it is ready, and what it takes in memory."""
    size = 1024
    count = plan.messages(1_000_000)
    seconds: list[float] = []
    memory: dict[str, list[float]] = {"idle": [], "after the load": [], "after the restart": []}
    async with broker() as process:
        memory["idle"].append(anonymous_mb(process.pid))
        async with idemq.connect(process.url, timeout=60) as mq:
            await mq.create_topic(TOPIC, partitions=4)
            async with mq.producer("loader") as producer:
                await producer.send_many(TOPIC, (b"%0*d" % (size, number) for number in range(count)))
        memory["after the load"].append(anonymous_mb(process.pid))
        stored = directory_mb(process.data_dir)
        for _ in range(plan.rounds):
            await process.kill()
            started = time.perf_counter()
            await process.restart()
            seconds.append(time.perf_counter() - started)
            async with idemq.connect(process.url) as mq:
                found = await mq.describe_producer("loader")
                assert found.last_seq == count - 1, "everything is there"
            memory["after the restart"].append(anonymous_mb(process.pid))
    yield Row("log", "MB", spread([stored]))
    yield Row("restart after SIGKILL, start of the process to ready", "s", spread(seconds))
    for when, values in memory.items():
        yield Row(f"broker's anonymous memory, {when}", "MB", spread(values))


FIGURES: dict[str, Callable[[Plan], Rows]] = {
    "produce": produce,
    "send": send,
    "consume": consume,
    "dedup": dedup,
    "raw": raw,
    "restart": restart,
}
