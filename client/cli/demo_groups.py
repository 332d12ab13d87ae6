"""Workers of a group, for `idemq demo`: killed, stopped past their leases and woken up, behind a network that cuts.

Act two: what workers make of messages is stored together with their positions, so each input has one output.
The effects: what workers write elsewhere is no part of that, and is written again, unless each write is idempotent.
Both are judged by what is found in the end, and fail when too little went wrong to show anything.
"""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..client import Client, GroupInfo, connect
from ..errors import UnknownGroup
from ..link import Counts, Faults, Link
from ..records import Record
from ..testing import BrokerProcess
from .errors import CommandError
from .output import Progress, say
from .worker import BATCH_S, GROUP, INPUTS, OUTPUTS, SCHEMA, TABLES, Said, output

MESSAGES = 12_000
EFFECTS = 6_000
PARTITIONS = 6
KEYS = 50
WORKERS = 3
MEMBER_TIMEOUT_MS = 1000
"""So soon a worker that is not heard of counts as gone. (The broker's default is meant for real networks.)"""
VICTIMS = ["worker"] * 4 + ["zombie"] * 3 + ["broker"] * 2
EFFECTS_VICTIMS = ["worker"] * 5 + ["broker"]
POLL_S = 0.05
"""How often the group is asked how far it is."""
WOKEN_S_MAX = 2.0
"""How long a woken worker may take to say what became of what it had in hand, if it had anything."""
FAULTS = Faults(
    cut_replies_per_kb=0.01,
    cut_requests_per_kb=0.005,
    lose_replies_per_kb=0.005,
    hold_requests_per_kb=0.005,
)
"""Mean distances of 100 to 200 KiB. Nearly all bytes of replies are fetched messages, and so most cuts fall there."""


def value(index: int) -> bytes:
    """The message with this number."""
    return b"message %06d " % index + b"." * 150


@dataclass
class GroupResult:
    """Act two: what went in and came out, and what had been done to the workers on the way."""

    inputs: int = MESSAGES
    outputs: int = 0
    lost: int = 0
    """Inputs without an output."""
    duplicated: int = 0
    unexpected: int = 0
    """Outputs that no input explains."""
    worker_kills: int = 0
    broker_kills: int = 0
    zombies: int = 0
    """Workers that were stopped until others had their partitions, and then woke up."""
    zombies_refused: int = 0
    """Those that had results in hand which were refused, since the leases were others'."""
    lease_refusals: int = 0
    """The same of all workers."""
    cuts: int = 0
    replies_lost: int = 0
    late_deliveries: int = 0
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """Was the promise not kept?"""
        return bool(self.lost or self.duplicated or self.unexpected)

    @property
    def tried(self) -> bool:
        """Were there faults enough for the result to mean anything?"""
        return min(self.worker_kills, self.broker_kills, self.cuts, self.zombies_refused) > 0

    @property
    def shown(self) -> bool:
        """Each input has one output, whatever was done to the workers."""
        return self.tried and not self.broken


@dataclass
class EffectsResult:
    """What workers wrote to a database, with and without a key."""

    seed: int
    inputs: int = EFFECTS
    plain_rows: int = 0
    plain_doubled: int = 0
    """Rows too many."""
    plain_lost: int = 0
    keyed_rows: int = 0
    keyed_doubled: int = 0
    keyed_lost: int = 0
    worker_kills: int = 0
    broker_kills: int = 0
    cuts: int = 0
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """At least once is promised, and with a key it is once: was that not kept?"""
        return bool(self.plain_lost or self.keyed_lost or self.keyed_doubled)

    @property
    def shown(self) -> bool:
        """Rows were doubled without the key, and none with it."""
        return min(self.plain_doubled, self.worker_kills, self.broker_kills, self.cuts) > 0 and not self.broken


async def groups(seed: int, directory: Path, progress: Progress) -> GroupResult:
    """Act two. Raises CommandError if a process ends by itself."""
    result = GroupResult()
    shift = _Shift(seed, MESSAGES, VICTIMS, progress)

    async def judge(mq: Client) -> None:
        found = await read_back(mq, OUTPUTS)
        result.outputs = found.total()
        result.lost, result.unexpected, result.duplicated = compare({output(one) for one in shift.values}, found)

    counts = await shift.run(directory, judge)
    result.worker_kills, result.broker_kills = shift.done_to["worker"], shift.done_to["broker"]
    result.zombies, result.zombies_refused = shift.done_to["zombie"], shift.zombies_refused
    result.lease_refusals = shift.refusals
    result.cuts, result.replies_lost = counts.cuts, counts.replies_lost
    result.late_deliveries = counts.late_deliveries
    return result


async def effects(seed: int, directory: Path, progress: Progress) -> EffectsResult:
    """The effects. Raises CommandError if a process ends by itself."""
    result = EffectsResult(seed)
    database = directory / "effects.db"
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA)
        shift = _Shift(seed, EFFECTS, EFFECTS_VICTIMS, progress, database)

        async def judge(mq: Client) -> None:
            rows = {table: Counter(one for (one,) in db.execute(f"SELECT value FROM {table}")) for table in TABLES}
            result.plain_rows, result.keyed_rows = rows["plain"].total(), rows["keyed"].total()
            result.plain_lost, _, result.plain_doubled = compare(set(shift.values), rows["plain"])
            result.keyed_lost, _, result.keyed_doubled = compare(set(shift.values), rows["keyed"])

        counts = await shift.run(directory, judge)
    result.worker_kills, result.broker_kills = shift.done_to["worker"], shift.done_to["broker"]
    result.cuts = counts.cuts
    return result


def compare(wanted: set[bytes], found: Counter[bytes]) -> tuple[int, int, int]:
    """(lost, unexpected, duplicated)."""
    return len(wanted - found.keys()), len(found.keys() - wanted), found.total() - len(found)


async def read_back(mq: Client, topic: str) -> Counter[bytes]:
    """Everything in a topic, counted."""
    found: Counter[bytes] = Counter()
    async with mq.subscribe(topic) as sub:
        while any(sub.lag().values()):
            async for batch in sub.batches(max_messages=1000):
                found.update(message.value for message in batch)
                if not any(sub.lag().values()):
                    break
    return found


async def kill(broker: BrokerProcess) -> None:
    """SIGKILL and a new start. Raises CommandError if there was nothing to kill."""
    code = await broker.kill()
    if code != -signal.SIGKILL:
        raise CommandError(f"The broker ended by itself, with code {code}: {broker.stderr or '(it said nothing)'}")
    await broker.restart()


class _Worker:
    """One process, and what was done to it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.killed = False
        self.woken_at: float | None = None
        """Since then (loop's time) nothing is known of what it had in hand."""

    def send(self, number: signal.Signals) -> None:
        """A signal; if it ended by itself, that is noticed where its words end."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)


class _Shift:
    """Messages, workers that work them off, and what is done to them meanwhile: one after the other, in one loop."""

    def __init__(
        self, seed: int, messages: int, victims: Sequence[str], progress: Progress, database: Path | None = None
    ) -> None:
        self.values = [value(index) for index in range(messages)]
        self.done_to: Counter[str] = Counter()
        self.refusals = 0
        self.zombies_refused = 0
        self._seed = seed
        self._random = Random(seed)
        self._progress = progress
        self._database = database
        self._done = 0
        self._hired = 0
        self._workers: list[_Worker] = []
        self._zombie: _Worker | None = None
        """It is stopped now."""
        self._said: asyncio.Queue[tuple[_Worker, Said | None]] = asyncio.Queue()
        self._listeners: set[asyncio.Task[None]] = set()
        places = sorted(self._random.sample(range(messages // 20, messages * 2 // 3), len(victims)))
        self._plan = deque(zip(places, self._random.sample(victims, len(victims)), strict=True))

    async def run(self, directory: Path, judge: Callable[[Client], Awaitable[None]]) -> Counts:
        """Have all of it worked off, kill the broker once more, and judge what is found then."""
        arguments = ("--force-filesystem", "--member-timeout-ms", str(MEMBER_TIMEOUT_MS))
        async with (
            BrokerProcess(directory / "data", *arguments) as broker,
            Link(broker.host, broker.port, seed=self._seed, faults=FAULTS) as link,
            connect(broker.url) as mq,
        ):
            for topic in (INPUTS, OUTPUTS):
                await mq.create_topic(topic, PARTITIONS)
            async with mq.producer() as producer:
                records = [Record(one, b"key %d" % (index % KEYS)) for index, one in enumerate(self.values)]
                await producer.send_many(INPUTS, records)
            try:
                await self._work_off(broker, link, mq)
            finally:
                for worker in self._workers:
                    worker.send(signal.SIGKILL)
                    await worker.process.wait()
                await asyncio.gather(*self._listeners)
            await link.heal()  # what is still held reaches the broker now, long after its successors
            await self._kill_broker(broker)
            await judge(mq)
        return link.counts

    async def _work_off(self, broker: BrokerProcess, link: Link, mq: Client) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(WORKERS):
            await self._hire(link)
        look_at = loop.time()
        while self._done < len(self.values) or self._zombie is not None or self._waking(loop.time()):
            try:
                async with asyncio.timeout_at(look_at):
                    worker, said = await self._said.get()
            except TimeoutError:
                await self._look(mq, link)
                look_at = loop.time() + POLL_S
                continue
            if said is None:
                await self._ended(worker)
                await self._hire(link)
            elif said is not Said.BEGUN:
                self._settled(worker, said is Said.REFUSED)
            elif self._due(worker):
                await self._strike(self._plan.popleft()[1], worker, broker)

    def _due(self, worker: _Worker) -> bool:
        """Is something to be done now, and does this worker have messages in hand? (Old news does not tell.)"""
        if not self._plan or self._plan[0][0] > self._done or not self._said.empty():
            return False
        return not worker.killed and worker is not self._zombie and (self._plan[0][1] != "zombie" or not self._zombie)

    async def _strike(self, victim: str, worker: _Worker, broker: BrokerProcess) -> None:
        if victim == "zombie":
            self._zombie = worker
            worker.send(signal.SIGSTOP)
            return
        await asyncio.sleep(self._random.uniform(0, 1.2 * BATCH_S))  # anywhere, also while it stores, and behind that
        if victim == "broker":
            await self._kill_broker(broker)
        else:
            worker.killed = True
            worker.send(signal.SIGKILL)
            self.done_to["worker"] += 1
            self._tell("a worker was killed (SIGKILL), and another one comes")

    def _settled(self, worker: _Worker, refused: bool) -> None:
        """It knows what became of what it had in hand."""
        self.refusals += refused
        if worker.woken_at is not None:
            worker.woken_at = None
            self.zombies_refused += refused

    def _waking(self, now: float) -> bool:
        return any(one.woken_at is not None and now < one.woken_at + WOKEN_S_MAX for one in self._workers)

    async def _look(self, mq: Client, link: Link) -> None:
        """How far is the group? Has it done without the one that is stopped for long enough?"""
        try:
            group = await mq.describe_group(GROUP)
        except UnknownGroup:
            return
        if len(group.offsets) < PARTITIONS:
            return  # its first member is only just coming
        self._done = len(self.values) - sum(one.lag for one in group.offsets)
        counts = link.counts
        self._progress.update(self._done, extra=f"kills and zombies: {self.done_to.total()}, cuts: {counts.cuts}")
        zombie = self._zombie
        if zombie is not None and _without(group, zombie.name):
            self._zombie = None
            zombie.woken_at = asyncio.get_running_loop().time()
            zombie.send(signal.SIGCONT)
            self.done_to["zombie"] += 1
            self._tell("a worker wakes up (SIGCONT) that was stopped until others had its partitions")

    async def _hire(self, link: Link) -> None:
        name = f"worker {self._hired}"
        self._hired += 1
        database = [] if self._database is None else [str(self._database)]
        # Not -m: this module has imported it, and Python warns of a second copy.
        code = "from idemq.client.cli.worker import main; main()"
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, link.url, name, *database, stdin=pipe, stdout=pipe, stderr=pipe
        )
        worker = _Worker(name, process)
        self._workers.append(worker)
        task = asyncio.create_task(self._listen(worker))
        self._listeners.add(task)

    async def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        while line := await worker.process.stdout.readline():
            self._said.put_nowait((worker, Said(line.decode().strip())))
        self._said.put_nowait((worker, None))

    async def _ended(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        assert worker.process.stderr is not None
        errors = (await worker.process.stderr.read()).decode(errors="replace").strip()
        code = await worker.process.wait()
        if not worker.killed:
            raise CommandError(f"A worker ended with code {code}: {errors.splitlines()[-1] if errors else ''}")

    async def _kill_broker(self, broker: BrokerProcess) -> None:
        await kill(broker)
        self.done_to["broker"] += 1
        self._tell("the broker was killed (SIGKILL) and started again")

    def _tell(self, what: str) -> None:
        self._progress.clear()
        say(f"{self._done:>6,} of {len(self.values):,} messages worked off: {what}")


def _without(group: GroupInfo, name: str) -> bool:
    """Do others hold everything?"""
    return len({one for member in group.members if member.client != name for one in member.assigned}) == PARTITIONS
