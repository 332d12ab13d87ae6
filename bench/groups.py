"""What is measured of consumer groups: transactions, rebalancing, lag. Each figure is as those of `figures.py`."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import idemq
from idemq import Client, Message, Record, Subscription, Transaction

from .figures import Plan, Row, Rows, into_lmdb, sample_rows, values_batch
from .measure import Sample, Stopwatch, broker, spread

SOURCE, TARGET, GROUP = "bench-in", "bench-out", "bench"
PARTITIONS = 4
IN_FLIGHT = 16
"""Transactions at once: as many commits as a producer may have unanswered."""

MEMBERS = (1, 10, 100)
"""`--quick` leaves the last out."""
MEMBERS_PARTITIONS = 128
MEMBERS_PROCESSES = 2
MEMBER_TIMEOUT_S = 2.0
"""Lower than the default, so that nobody waits long until a crash is noticed: what is measured follows that."""
WINDOW_S = 1.0
"""The longest gap is looked for in this time from the beginning of a rebalance, and in as much time without one."""
ANSWER_S_MAX = 60.0

LAG_RATE = 5_000
LAG_S = 10
LAG_TICK_S = 0.002
LAG_LOOK_S = 0.05
TIMESTAMP = struct.Struct("<d")

Way = Callable[[Client, Subscription, Stopwatch, int, int], Awaitable[Sample]]
"""How so many transactions of so many messages are made."""


# ---------------------------------------------------------------------------------------------------- transactions


async def txn(plan: Plan) -> Rows:
    """Consume, process, produce: as many messages out as in; one transaction at a time, several in flight, `process`.

    Beside them the bound of those one at a time: as large batches straight into LMDB, one in a commit.
    """
    value = os.urandom(plan.sizes[0])
    for each, full in ((1, 1_000), (10, 1_000), (100, 500)):
        count = plan.messages(full)
        ways: dict[str, tuple[int, Way]] = {
            "one at a time": (count, partial(_by_hand, in_flight=1)),
            f"{IN_FLIGHT} in flight": (4 * count, partial(_by_hand, in_flight=IN_FLIGHT)),
            "process()": (count, _by_process),
        }
        samples: dict[str, list[Sample]] = {how: [] for how in ways}
        raw: list[float] = []
        batch = values_batch([value] * each)
        async with broker() as process, idemq.connect(process.url, timeout=60) as mq:
            for topic in (SOURCE, TARGET):
                await mq.create_topic(topic, partitions=PARTITIONS)
            async with mq.producer() as producer:
                await producer.send_many(SOURCE, [value] * (4 * count * each))
            watch = Stopwatch(process)
            for number in range(plan.rounds + 1):
                for how, (transactions, way) in ways.items():
                    # A new group each time, so from the topic's beginning; joining is not counted.
                    async with mq.subscribe(SOURCE, group=f"{how} {number}") as sub:
                        sample = await way(mq, sub, watch, each, transactions)
                    if number:
                        samples[how].append(sample)
                with TemporaryDirectory(prefix="idemq-bench-raw-") as directory:
                    rate = await asyncio.to_thread(into_lmdb, directory, number, batch, count, count)
                    if number:
                        raw.append(rate)
        for how, taken in samples.items():
            name = f"txn {each} in, {each} out, {how}"
            rates = [one.rate / each for one in taken]
            yield Row(name, "transactions/s", spread(rates))
            for row in sample_rows(name, taken)[1:]:
                yield row
            yield Row(f"{name} / raw LMDB", "ratio", spread(a / b for a, b in zip(rates, raw, strict=True)))
        yield Row(f"raw LMDB, {each} in a commit", "commits/s", spread(raw))


async def _by_hand(
    mq: Client, sub: Subscription, watch: Stopwatch, each: int, transactions: int, in_flight: int
) -> Sample:
    async with mq.producer() as producer:
        free = asyncio.Semaphore(in_flight)

        async def one(batch: Sequence[Message]) -> None:
            async with producer.transaction(batch) as tx:
                for message in batch:
                    tx.send(TARGET, message.value)
            free.release()

        watch.start()
        async with asyncio.TaskGroup() as running:
            left = transactions
            async for batch in sub.batches(max_messages=each):
                await free.acquire()
                running.create_task(one(batch))
                left -= 1
                if not left:
                    break
        return watch.stop(transactions * each)


async def _by_process(mq: Client, sub: Subscription, watch: Stopwatch, each: int, transactions: int) -> Sample:
    done = 0

    async def handle(message: Message, tx: Transaction) -> None:
        nonlocal done
        tx.send(TARGET, message.value)
        done += 1
        if done == transactions * each:
            sub.stop()

    watch.start()
    await sub.process(handle, max_messages=each)
    return watch.stop(done)


# ----------------------------------------------------------------------------------------------------- rebalancing


class Workers:
    """Processes with members of a group (`members.py`), and who holds which partition, by what they tell."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._processes: list[asyncio.subprocess.Process] = []
        self._readers: list[asyncio.Task[None]] = []
        self._answers: dict[tuple[int, str], asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self._holders: dict[int, tuple[int, str]] = {}
        """Partition -> (process, member)."""
        self._assigned_at: list[float] = []
        """When something was assigned last, of each process."""
        self._changed = asyncio.Event()

    async def start(self) -> int:
        """A new process, without members; returns its number."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "idemq.bench.members", self._url, SOURCE, GROUP),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        number = len(self._processes)
        self._processes.append(process)
        self._assigned_at.append(0.0)
        self._readers.append(asyncio.create_task(self._read(number)))
        await self.tell(number, "ready")
        return number

    async def tell(self, number: int, verb: str, argument: Any = None) -> Any:
        """Have a process do something; returns its answer, the time (monotonic) at which it began but for "gaps"."""
        stdin = self._processes[number].stdin
        assert stdin is not None
        stdin.write(json.dumps([verb, argument]).encode() + b"\n")
        async with asyncio.timeout(ANSWER_S_MAX):
            return await self._answers[number, verb].get()

    async def settled(self, members: int) -> float:
        """Wait until every partition is assigned, evenly to so many; returns when the last was (monotonic)."""
        fair = {MEMBERS_PARTITIONS // members, -(-MEMBERS_PARTITIONS // members)}
        async with asyncio.timeout(ANSWER_S_MAX):
            while True:
                loads = Counter(self._holders.values())
                if loads.total() == MEMBERS_PARTITIONS and len(loads) == members and fair.issuperset(loads.values()):
                    return max(self._assigned_at)
                self._changed.clear()
                await self._changed.wait()

    async def kill(self, number: int) -> float:
        """SIGKILL; returns when it was assigned something last: just before that its last heartbeat was sent."""
        self._processes[number].kill()
        await self._readers[number]
        for partition in [one for one, (process, _) in self._holders.items() if process == number]:
            del self._holders[partition]
        return self._assigned_at[number]

    async def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        await asyncio.gather(*self._readers)

    async def _read(self, number: int) -> None:
        stdout = self._processes[number].stdout
        assert stdout is not None
        async for line in stdout:
            verb, value = json.loads(line)
            if verb == "assigned":
                self._assigned_at[number], member, partitions = value
                self._holders.update(dict.fromkeys(partitions, (number, member)))
            elif verb == "revoked":
                member, partitions = value
                for partition in partitions:
                    if self._holders.get(partition) == (number, member):
                        del self._holders[partition]
            else:
                self._answers[number, verb].put_nowait(value)
            self._changed.set()


async def rebalance(plan: Plan) -> Rows:
    """How long until every partition is assigned again, and how long members that keep theirs get nothing meanwhile."""
    for members in MEMBERS if plan.scale == 1 else MEMBERS[:-1]:
        seconds: dict[str, list[float]] = {"join": [], "leave": [], "crash": []}
        gaps: dict[str, list[float]] = {"nothing": [], "nothing again": [], "join": [], "leave": [], "crash": []}
        async with (
            broker("--member-timeout-ms", str(round(MEMBER_TIMEOUT_S * 1000))) as process,
            idemq.connect(process.url, timeout=60) as mq,
            _steady(mq, max(0.02, members / 2000)),
        ):
            workers = Workers(process.url)
            try:
                await _rebalance(workers, members, plan.rounds, seconds, gaps)
            finally:
                await workers.close()
        label = f"{members} member{'s' * (members > 1)}"
        for what, values in seconds.items():
            yield Row(f"{label}: {what} to all assigned", "s", spread(values))
        for what, values in gaps.items():
            yield Row(f"{label}: longest gap, {what}", "ms", spread(1000 * value for value in values))


async def _rebalance(
    workers: Workers, members: int, rounds: int, seconds: dict[str, list[float]], gaps: dict[str, list[float]]
) -> None:
    staying = [await workers.start() for _ in range(min(members, MEMBERS_PROCESSES))]
    for number in staying:
        await workers.tell(number, "join", members // len(staying))
    await workers.settled(members)

    async def gap(what: str, start: float) -> None:
        """The longest gap of any member that stays, in the window that begins then."""
        await asyncio.sleep(max(0.0, start + 1.25 * WINDOW_S - time.monotonic()))
        found = [await workers.tell(number, "gaps", [start, start + WINDOW_S]) for number in staying]
        gaps[what].append(max(one for some in found for one in some))

    for _ in range(rounds):
        other = await workers.start()
        for number in staying:
            await workers.tell(number, "forget")
        for what in ("nothing", "nothing again"):
            await gap(what, time.monotonic())
        for what, verb in (("join", "join"), ("leave", "leave")):
            started = await workers.tell(other, verb, 1)
            seconds[what].append(await workers.settled(members + (what == "join")) - started)
            await gap(what, started)
        await workers.tell(other, "join", 1)
        await workers.settled(members + 1)
        started = await workers.kill(other) + MEMBER_TIMEOUT_S
        seconds["crash"].append(await workers.settled(members) - started)
        await gap("crash", started)


@asynccontextmanager
async def _steady(mq: Client, tick_s: float) -> AsyncIterator[None]:
    """A message for every partition at every tick."""
    await mq.create_topic(SOURCE, partitions=MEMBERS_PARTITIONS)
    records = [Record(b"", partition=index) for index in range(MEMBERS_PARTITIONS)]

    async def produce() -> None:
        async with mq.producer(dedup=False) as producer:
            due = time.monotonic()
            while True:
                await producer.send_many(SOURCE, records)
                due += tick_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(produce())
        yield
        task.cancel()


# ------------------------------------------------------------------------------------------------------------- lag


async def lag(plan: Plan) -> Rows:
    """A steady producer and a group that transforms: how far behind it is, and how old messages are when done."""
    count = plan.messages(LAG_S * LAG_RATE)
    behind: dict[str, list[float]] = {"median": [], "p99": [], "max": []}
    late: dict[str, dict[str, list[float]]] = {"handed out": {}, "result stored": {}}
    samples: list[Sample] = []
    async with broker() as process, idemq.connect(process.url, timeout=60) as mq:
        for topic in (SOURCE, TARGET):
            await mq.create_topic(topic, partitions=PARTITIONS)
        watch = Stopwatch(process)
        for number in range(plan.rounds + 1):
            looks, latencies, sample = await _follow(mq, watch, f"{GROUP}-{number}", count, plan.sizes[0])
            if number:
                samples.append(sample)
                for name, share in (("median", 0.5), ("p99", 0.99), ("max", 1.0)):
                    behind[name].append(_quantile(looks, share))
                for what, values in latencies.items():
                    for name, share in (("p50", 0.5), ("p99", 0.99)):
                        late[what].setdefault(name, []).append(1000 * _quantile(values, share))
    title = f"{LAG_RATE:,} messages/s"
    for name, values in behind.items():
        yield Row(f"{title}: lag, {name}", "messages", spread(values))
    for what, quantiles in late.items():
        for name, values in quantiles.items():
            yield Row(f"{title}: sent to {what}, {name}", "ms", spread(values))
    for row in sample_rows(title, samples)[1:]:
        yield row


async def _follow(
    mq: Client, watch: Stopwatch, group: str, count: int, size: int
) -> tuple[list[float], dict[str, list[float]], Sample]:
    """One round: lags as the broker tells them, latencies in s."""
    looks: list[float] = []
    latencies: dict[str, list[float]] = {"handed out": [], "result stored": []}

    async def look() -> None:
        while True:
            await asyncio.sleep(LAG_LOOK_S)
            looks.append(sum(one.lag for one in (await mq.describe_group(group)).offsets))

    async def produce(tasks: asyncio.TaskGroup) -> None:
        # A message's age counts from when it was due, so that a sender held up by the machine hides nothing.
        started, sent = time.monotonic(), 0
        while sent < count:
            due = min(count, round((time.monotonic() - started) * LAG_RATE))
            for number in range(sent, due):
                value = TIMESTAMP.pack(started + number / LAG_RATE).ljust(size, b".")
                tasks.create_task(mq.send(SOURCE, value, key=b"%d" % number))
            sent = due
            await asyncio.sleep(LAG_TICK_S)

    async with mq.subscribe(SOURCE, group=group, start="latest") as sub, mq.producer() as producer:
        watch.start()
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(look())
            tasks.create_task(produce(tasks))
            left = count
            async for batch in sub.batches(max_messages=500, max_wait=0):
                now = time.monotonic()
                born = [TIMESTAMP.unpack_from(message.value)[0] for message in batch]
                async with producer.transaction(batch) as tx:
                    for message in batch:
                        tx.send(TARGET, message.value, key=message.key)
                stored = time.monotonic()
                latencies["handed out"] += [now - at for at in born]
                latencies["result stored"] += [stored - at for at in born]
                left -= len(batch)
                if not left:
                    break
            looking.cancel()
        return looks, latencies, watch.stop(count)


def _quantile(values: list[float], share: float) -> float:
    found = sorted(values)
    return found[min(len(found) - 1, int(share * len(found)))]


FIGURES: dict[str, Callable[[Plan], Rows]] = {"txn": txn, "rebalance": rebalance, "lag": lag}
