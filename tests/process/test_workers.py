"""The flights job by groups of workers, through real failures: exact totals, whatever was killed, stopped or cut."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from zlib import crc32

import pytest

import idemq
from idemq import Message, Record, testing
from idemq.broker import check

from .loader import lines
from .worker import SOURCES, delay

FLIGHTS = str(Path(__file__).parent.parent / "data" / "flights-2013-01.csv.xz")
ROOT = Path(__file__).parent.parent.parent
SEEDS = [int(seed) for seed in os.environ.get("WORKERS_SEEDS", "1").split(",")]

CREW = {"delays": 3, "totals": 2}
"""Workers of each stage."""
PARTITIONS = {"flights": 4, "delays": 3, "totals": 1}
PLANNED = {"kill": 4, "stop": 3, "cut off": 2, "cut": 4, "broker": 2}
"""What is done to a worker that has a batch in hand (and to the broker). A stop outlasts the worker's lease."""
REFUSALS = ("LEASE_LOST", "OFFSET_CONFLICT")
MEMBER_TIMEOUT_MS = 600
BUSY_S_MAX = 5.0
"""Whoever has no batch by then gets none before more is sent."""
IN_VAIN_MAX = 50
WAIT_S_MAX = 60.0
"""What the job waits for comes within this time, or never: then it says how everything stands."""
FAULTS = testing.Faults(
    cut_replies_per_kb=0.004,
    cut_requests_per_kb=0.002,
    lose_replies_per_kb=0.004,
    hold_requests_per_kb=0.002,
    stall_per_kb=0.01,
)


class Worker:
    """One worker process, behind a link of its own."""

    def __init__(self, name: str, stage: str, process: asyncio.subprocess.Process, link: testing.Link) -> None:
        self.name = name
        self.stage = stage
        self.process = process
        self.link = link
        self.said: collections.Counter[str] = collections.Counter()
        """What became of its batches: "stored", or a refusal's code."""
        self.in_hand = False
        self._heard = asyncio.Event()
        self._reading = asyncio.create_task(self._read())
        assert process.stderr is not None
        self._errors = asyncio.create_task(process.stderr.read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                told = json.loads(line)
            except ValueError:  # the last line of one that was killed
                continue
            self.in_hand = "in_hand" in told
            self.said[told.get("refused") or next(iter(told))] += 1
            self._heard.set()
        self._heard.set()

    async def hear(self, condition: Callable[[], bool]) -> None:
        """Wait until what it said makes this true. Raises when it ends instead."""
        while not condition():
            assert not self._reading.done(), f"{self.name} ended: {(await self._errors).decode()}"
            self._heard.clear()
            await self._heard.wait()

    async def takes(self) -> None:
        """Wait until it has a batch in hand."""
        await self.hear(lambda: self.in_hand)

    @property
    def decided(self) -> int:
        """Batches of which it knows what became of them."""
        return self.said["stored"] + self.refusals

    @property
    def refusals(self) -> int:
        """Batches that were another's by then."""
        return sum([self.said[code] for code in REFUSALS])

    async def end(self, number: signal.Signals) -> None:
        """End it, and it must end by that."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        code = await self.process.wait()
        await self._reading
        errors = (await self._errors).decode()
        assert code == (0 if number == signal.SIGTERM else -number), f"{self.name} ended with {code}: {errors}"


class Job:
    """The job under way: a broker, its workers, and the rows that they do not have yet."""

    def __init__(self, seed: int, broker: testing.BrokerProcess, mq: idemq.Client, stack: AsyncExitStack) -> None:
        self.rng = random.Random(seed)
        self.broker = broker
        self.mq = mq
        self.workers: list[Worker] = []
        self.ended: list[Worker] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self._seed = seed
        self._stack = stack

    async def hire(self, stage: str) -> None:
        """One more worker."""
        number = len(self.workers) + len(self.ended)
        link = testing.Link(self.broker.host, self.broker.port, seed=1000 * self._seed + number, faults=FAULTS)
        await self._stack.enter_async_context(link)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.process.worker",
            link.url,
            f"{stage} {number}",
            stage,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.workers.append(Worker(f"{stage} {number}", stage, process, link))

    async def busy(self) -> Worker | None:
        """A worker that has a batch in hand right now; None: nobody gets one, all that was sent is done."""
        candidates = self.rng.sample(self.workers, len(self.workers))
        hearing = [asyncio.create_task(worker.takes()) for worker in candidates]
        try:
            await asyncio.wait(hearing, timeout=BUSY_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            for worker, task in zip(candidates, hearing, strict=True):
                if task.done():
                    task.result()
                    return worker
        finally:
            for task in hearing:
                task.cancel()
        return None

    async def do(self, what: str) -> bool:
        """Do this to whoever has a batch in hand; False if the batch was out of its hands already."""
        worker = await self.busy()
        if worker is None:
            return False
        if what == "kill":
            self.workers.remove(worker)
            self.ended.append(worker)
            await worker.end(signal.SIGKILL)
            await self.hire(worker.stage)
        elif what == "broker":
            await self.broker.kill()
            await self.broker.restart()
        elif what == "cut":
            worker.link.cut(hold=self.rng.random() < 0.5)
        elif what == "stop":
            worker.process.send_signal(signal.SIGSTOP)
            try:
                await self._taken_from(worker)
            finally:
                worker.process.send_signal(signal.SIGCONT)
            return await self._is_refused(worker)
        elif what == "cut off":
            worker.link.stall()
            await self._taken_from(worker)
            worker.link.resume()
            return await self._is_refused(worker)
        return True

    async def _taken_from(self, worker: Worker) -> None:
        """The broker gave all that this worker held to the others."""
        async with self._in_time(f"what {worker.name} held is given to others"):
            while True:
                members = (await self.mq.describe_group(worker.stage)).members
                held = [one for member in members if member.client != worker.name for one in member.assigned]
                if len(held) == PARTITIONS[SOURCES[worker.stage]]:
                    return
                await asyncio.sleep(0.02)

    async def _is_refused(self, worker: Worker) -> bool:
        """What becomes of the batch that it had in hand meanwhile."""
        if not worker.in_hand:
            return False  # it was stored just before, and there may be no other batch for it
        refusals, decided = worker.refusals, worker.decided
        async with self._in_time(f"{worker.name} says what became of the batch that it had in hand"):
            await worker.hear(lambda: worker.decided > decided)
        return worker.refusals > refusals

    async def finished(self) -> None:
        """Both groups have done everything."""
        for stage, source in SOURCES.items():
            async with self._in_time(f"{stage} is through"):
                while True:
                    if not any(one.lag for one in (await self.mq.describe_group(stage)).offsets):
                        break
                    await asyncio.sleep(0.05)
            assert len((await self.mq.describe_group(stage)).offsets) == PARTITIONS[source]

    @asynccontextmanager
    async def _in_time(self, what: str) -> AsyncIterator[None]:
        """What is waited for within this block comes in time, or the test fails and tells how everything stands."""
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                yield
        except TimeoutError:
            async with asyncio.timeout(WAIT_S_MAX):
                groups = [await self.mq.describe_group(stage) for stage in SOURCES]
            workers = [f"{one.name}: in_hand={one.in_hand} {dict(one.said)}" for one in self.workers]
            raise AssertionError("\n".join([f"never: {what}", *workers, *map(str, groups)])) from None


@asynccontextmanager
async def _sending(mq: idemq.Client, rows: list[bytes]) -> AsyncIterator[Callable[[int], asyncio.Task[None]]]:
    """Yields what sends the rows up to a number, beside what else is done."""
    async with mq.producer("loader", batch_bytes=8192) as producer:

        async def send(end: int) -> None:
            start = producer.last_seq + 1
            await producer.send_many(
                "flights",
                [Record(rows[number], key=rows[number].split(b",")[10], seq=number) for number in range(start, end)],
            )

        yield lambda end: asyncio.create_task(send(end))


async def _work_and_kill(seed: int, directory: Path) -> None:
    rows = lines(FLIGHTS)
    async with AsyncExitStack() as stack:
        broker = testing.BrokerProcess(directory, "--member-timeout-ms", str(MEMBER_TIMEOUT_MS))
        await stack.enter_async_context(broker)
        mq = await stack.enter_async_context(idemq.connect(broker.url, timeout=60))
        for topic, partitions in PARTITIONS.items():
            await mq.create_topic(topic, partitions=partitions)
        job = Job(seed, broker, mq, stack)
        try:
            for stage, count in CREW.items():
                for _ in range(count):
                    await job.hire(stage)
            async with _sending(mq, rows) as send:
                await _misfortunes(job, send, len(rows))
            await job.finished()
            for worker in job.workers:
                await worker.link.heal()
            for worker in job.workers:
                await worker.end(signal.SIGTERM)
            for stage in SOURCES:
                assert (await mq.describe_group(stage)).members == []
            await _compare(mq, rows)
        finally:
            for worker in job.workers:
                if worker.process.returncode is None:
                    worker.process.kill()
                    await worker.process.wait()
        assert await broker.terminate() == 0
    report = check.verify(directory)
    assert not report.findings
    assert not report.died
    _report(seed, job)


async def _misfortunes(job: Job, send: Callable[[int], asyncio.Task[None]], count: int) -> None:
    """All that is planned, in the seed's order, each while there are rows to work on."""
    todo = [what for what, times in PLANNED.items() for _ in range(times)]
    job.rng.shuffle(todo)
    sent = 0
    while todo:
        sent += (count - sent) // (len(todo) + 2)
        sending = send(sent)
        await asyncio.sleep(job.rng.uniform(0.0, 0.1))
        what = todo.pop()
        if await job.do(what):
            job.counts[what] += 1
        else:
            job.counts["in vain"] += 1
            assert job.counts["in vain"] <= IN_VAIN_MAX, job.counts
            todo.append(what)  # the batch was stored just before: once more
        await sending
    await send(count)


def _report(seed: int, job: Job) -> None:
    workers = job.workers + job.ended
    said = sum((worker.said for worker in workers), collections.Counter[str]())
    cuts = sum(worker.link.counts.cuts for worker in workers)
    late = sum(worker.link.counts.late_deliveries for worker in workers)
    print(f"seed {seed}: {dict(job.counts)}, {dict(said)}, {cuts} cuts, {late} late deliveries")
    assert {what: job.counts[what] for what in PLANNED} == PLANNED
    assert all(PLANNED.values())
    assert sum(worker.refusals for worker in workers) >= PLANNED["stop"] + PLANNED["cut off"]
    assert cuts >= PLANNED["cut"]


async def _compare(mq: idemq.Client, rows: list[bytes]) -> None:
    """Each input has exactly one output, in order; and the last totals are those of the file."""
    delays = await _read(mq, "delays")
    found: dict[int, Message] = {}
    last: dict[tuple[int, bytes | None], int] = {}
    for message in delays:
        number, minutes = map(int, message.value.split(b","))
        assert number not in found, f"row {number} has two outputs"
        found[number] = message
        carrier, expected = delay(rows[number])
        assert (message.key, minutes) == (carrier.encode(), expected), f"row {number} has another's output"
        source = crc32(rows[number].split(b",")[10]) % PARTITIONS["flights"], message.key
        assert number > last.get(source, -1), "a partition's outputs are out of order"
        last[source] = number
    assert len(found) == len(rows), f"{len(rows)} rows have {len(found)} outputs"
    totals: dict[str, tuple[int, int]] = {}
    for row in rows:
        carrier, minutes = delay(row)
        flights, sum_ = totals.get(carrier, (0, 0))
        totals[carrier] = flights + 1, sum_ + minutes
    running: dict[str, tuple[int, int]] = {}
    for message in await _read(mq, "totals"):
        assert message.key is not None
        carrier = message.key.decode()
        flights, minutes = map(int, message.value.split(b","))
        assert flights > running.get(carrier, (0, 0))[0], f"{carrier} was counted twice"
        running[carrier] = flights, minutes
    assert running == totals


async def _read(mq: idemq.Client, topic: str) -> list[Message]:
    """Everything stored."""
    found: list[Message] = []
    async with mq.subscribe(topic) as sub:
        while sum(sub.lag().values()):
            async for batch in sub.batches(max_wait=0):
                found += batch
                break
    return found


@pytest.mark.process
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", SEEDS)
def test_totals_are_exact_while_workers_die_stop_and_are_cut_off(seed: int, tmp_path: Path) -> None:
    try:
        asyncio.run(_work_and_kill(seed, tmp_path / "data"))
    except BaseException as error:
        error.add_note(f"replay: WORKERS_SEEDS={seed} python -m pytest tests/process/test_workers.py")
        raise
