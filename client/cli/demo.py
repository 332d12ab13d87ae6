"""`idemq demo`: the promise, shown. Act one, sending: a broker and a loader are killed, replies get lost, old requests
arrive late. Act two, a group's workers, and the effects, which are not promised: `demo_groups.py`.

It judges by what lies in the log at the end, read back after a last kill, and fails when nothing went wrong on the way:
a demonstration in which no retry had to be absorbed would have demonstrated nothing.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from ..client import connect
from ..link import Faults, Link
from ..testing import BrokerProcess
from . import demo_groups
from .arguments import Command, Parser, index
from .demo_groups import EffectsResult, GroupResult, compare, kill, read_back
from .errors import FAILURE, OK, CommandError
from .loader import CHUNK, TOPIC, Said, value, write_position
from .output import Progress, counted, emit, record, say, tell

MESSAGES = 20_000
PARTITIONS = 3
KILLS = 4
"""Of the broker while it loads, and of the loader."""
KILL_DELAY_S_MAX = 0.01
"""A kill follows the loader's word within this time, so that it falls into the next chunk at any place."""
SECONDS_MAX = 120.0
"""Something hangs. Each act takes about 10 s."""
FAULTS = Faults(
    cut_replies_per_kb=0.5,
    cut_requests_per_kb=0.01,
    lose_replies_per_kb=0.7,
    hold_requests_per_kb=0.04,
)
"""Mean distances of 1.5 to 2 KiB of replies (some 30 bytes each) and 25 to 100 KiB of requests (1 KiB each)."""


ActResult = TypeVar("ActResult", "Result", GroupResult, EffectsResult)


@dataclass
class Result:
    """Act one: what went in, what was found, and what had been done to it on the way."""

    seed: int
    dedup: bool
    messages_in: int = 0
    """Acknowledged to the loader, which ended when these were all."""
    messages_out: int = 0
    lost: int = 0
    duplicated: int = 0
    unexpected: int = 0
    """Found, and never sent."""
    retries_absorbed: int = 0
    """Messages that were sent again and answered by the broker as stored before."""
    stored_unheard: int = 0
    """Messages that a killed loader had stored without hearing of it, and that its successor did not send again."""
    broker_kills: int = 0
    loader_kills: int = 0
    cuts: int = 0
    replies_lost: int = 0
    late_deliveries: int = 0
    seconds: float = 0.0

    @property
    def tried(self) -> bool:
        """Were there faults enough for the result to mean anything?"""
        return min(self.broker_kills, self.loader_kills, self.cuts, self.replies_lost) > 0

    @property
    def shown(self) -> bool:
        """With dedup: each message once, although retries came. Without: duplicates, and nothing lost."""
        whole = self.tried and not self.lost and not self.unexpected
        if self.dedup:
            return whole and not self.duplicated and self.retries_absorbed > 0
        return whole and self.duplicated > 0


class _Demo:
    """One run: what is planned, how far the loader came, what was counted."""

    def __init__(self, seed: int, dedup: bool, directory: Path, progress: Progress) -> None:
        self.result = Result(seed, dedup)
        self._random = Random(seed)
        self._directory = directory
        self._progress = progress
        self._position = None if dedup else directory / "position"
        self._done = 0
        """Where the loader said it stands."""
        kills = ["broker"] * KILLS + ["loader"] * KILLS
        self._random.shuffle(kills)
        places = sorted(self._random.sample(range(CHUNK, int(MESSAGES * 0.9)), len(kills)))
        self._plan = list(zip(places, kills, strict=True))

    async def run(self) -> None:
        result = self.result
        # The data lives for seconds, and is to survive kills and no power cut: any file system will do.
        async with (
            BrokerProcess(self._directory / "data", "--force-filesystem") as broker,
            Link(broker.host, broker.port, seed=result.seed, faults=FAULTS) as link,
        ):
            async with connect(broker.url) as mq:
                await mq.create_topic(TOPIC, PARTITIONS)
            if self._position is not None:
                write_position(self._position, 0)
            while not await self._load(broker, link):
                result.loader_kills += 1
            await link.heal()  # what is still held reaches the broker now, long after its successors
            await self._kill_broker(broker)
            counts = link.counts
            result.cuts, result.replies_lost = counts.cuts, counts.replies_lost
            result.late_deliveries = counts.late_deliveries
            await self._read_back(broker)

    async def _load(self, broker: BrokerProcess, link: Link) -> bool:
        """One life of the loader. True: it came to its end; False: it was killed."""
        known = self._done
        said = Said(0, 0, 0)
        first = True
        async with self._loader(link.url) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            killed = False
            try:
                while line := await process.stdout.readline():
                    said = Said(**json.loads(line))
                    self._done = said.done
                    if first and self.result.dedup:
                        self.result.stored_unheard += said.done - known
                    first = False
                    self._show(link)
                    while self._plan and self._plan[0][0] <= said.done < MESSAGES and not killed:
                        _, victim = self._plan.pop(0)
                        await asyncio.sleep(self._random.uniform(0, KILL_DELAY_S_MAX))
                        if victim == "broker":
                            await self._kill_broker(broker)
                        elif process.returncode is None:
                            process.send_signal(signal.SIGKILL)
                            killed = True
                            self._tell("the loader was killed, and another one goes on")
            finally:
                self.result.retries_absorbed += said.duplicates
            errors = (await process.stderr.read()).decode(errors="replace").strip()
            code = await process.wait()
        if killed and code == -signal.SIGKILL:
            return False
        if code:
            raise CommandError(f"The loader ended with code {code}: {errors.splitlines()[-1] if errors else ''}")
        self.result.messages_in = said.done
        return True

    @asynccontextmanager
    async def _loader(self, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
        position = [] if self._position is None else [str(self._position)]
        # Not -m: this module has imported it, and Python warns of a second copy.
        code = "from idemq.client.cli.loader import main; main()"
        command = [sys.executable, "-c", code, url, str(MESSAGES), *position]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        try:
            yield process
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it ended by itself
                    process.kill()
                await process.wait()

    async def _kill_broker(self, broker: BrokerProcess) -> None:
        await kill(broker)
        self.result.broker_kills += 1
        self._tell("the broker was killed (SIGKILL) and started again")

    async def _read_back(self, broker: BrokerProcess) -> None:
        async with connect(broker.url) as mq:
            found = await read_back(mq, TOPIC)
        result = self.result
        result.messages_out = found.total()
        sent = {value(index) for index in range(result.messages_in)}
        result.lost, result.unexpected, result.duplicated = compare(sent, found)

    def _show(self, link: Link) -> None:
        counts = link.counts
        faults = f"cuts: {counts.cuts}, replies lost: {counts.replies_lost}, late: {counts.late_deliveries}"
        self._progress.update(self._done, extra=faults)

    def _tell(self, what: str) -> None:
        self._progress.clear()
        say(f"{self._done:>6,} of {MESSAGES:,} messages acknowledged: {what}")


def _demo(args: Namespace) -> int:
    seed = args.seed if args.seed is not None else secrets.randbelow(1 << 32)
    if args.effects:
        return _effects(args, seed)
    loaded = _load(args, seed)
    if args.without_dedup:
        if args.json:
            emit(_fields(loaded) | {"ok": loaded.shown})
        return OK if loaded.shown else FAILURE
    say("")
    worked = _work(args, seed)
    shown = loaded.shown and worked.shown
    if args.json:
        emit(_fields(loaded) | {"groups": asdict(worked), "ok": shown})
    return OK if shown else FAILURE


def _load(args: Namespace, seed: int) -> Result:
    act = "" if args.without_dedup else "Act one. "
    tell(
        f"{act}A broker, a worker that loads {MESSAGES:,} messages, and a network between them that cuts, loses "
        f"replies and delivers late. Both processes are killed on the way. Seed {seed}."
    )

    async def load(directory: Path, progress: Progress) -> Result:
        demo = _Demo(seed, not args.without_dedup, directory, progress)
        await demo.run()
        return demo.result

    result = _timed(seed, MESSAGES, load)
    if not args.json:
        record(args, _fields(result), {"seed": str})
        _conclude(result)
    return result


def _work(args: Namespace, seed: int) -> GroupResult:
    count, workers = demo_groups.MESSAGES, demo_groups.WORKERS
    tell(
        f"Act two. A group of {workers} workers turns each of {count:,} messages into another one, behind such a "
        "network. Workers are killed, or stopped until others have their partitions and then woken up: zombies."
    )
    result = _timed(seed, count, lambda directory, progress: demo_groups.groups(seed, directory, progress))
    if not args.json:
        record(args, {f"groups_{name}": value for name, value in asdict(result).items()})
        _conclude_groups(result, seed)
    return result


def _effects(args: Namespace, seed: int) -> int:
    count, workers = demo_groups.EFFECTS, demo_groups.WORKERS
    tell(
        f"A group of {workers} workers writes each of {count:,} messages to a database in two ways: as a plain row, "
        "and as a row with message.uid as its key (ON CONFLICT DO NOTHING). Then it commits its position. Workers and "
        f"the broker are killed on the way. Seed {seed}."
    )
    result = _timed(seed, count, lambda directory, progress: demo_groups.effects(seed, directory, progress))
    if args.json:
        emit(asdict(result) | {"ok": result.shown})
    else:
        record(args, asdict(result), {"seed": str})
        _conclude_effects(result)
    return OK if result.shown else FAILURE


def _timed(seed: int, messages: int, act: Callable[[Path, Progress], Coroutine[Any, Any, ActResult]]) -> ActResult:
    """Play one act in a directory of its own. Raises CommandError if it hangs."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="idemq-demo-") as directory, Progress("messages", messages) as progress:
        try:
            result = asyncio.run(asyncio.wait_for(act(Path(directory), progress), SECONDS_MAX))
        except TimeoutError:
            raise CommandError(f"This did not end within {SECONDS_MAX:.0f} s. Again: --seed {seed}.") from None
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _fields(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    given = {name: fields.pop(name) for name in ("seed", "dedup")}
    return given | {"in": fields.pop("messages_in"), "out": fields.pop("messages_out")} | fields


def _conclude(result: Result) -> None:
    """What was promised, what was seen, and what follows."""
    if result.lost or result.unexpected or (result.dedup and result.duplicated):
        tell(f"FAILED: the promise does not hold. Please report this, with --seed {result.seed}.")
    elif not result.tried:
        tell(f"FAILED: too little went wrong for this to show anything. Try another seed than {result.seed}.")
    elif not result.shown:
        what = "no retry had to be absorbed" if result.dedup else "no duplicate was made"
        tell(f"FAILED: {what}, so nothing was shown. Try another seed than {result.seed}.")
    elif result.dedup:
        tell("Promised: what is sent again is stored once, whatever is killed and whatever the network does.")
        tell(
            f"Shown: {result.messages_in:,} messages sent, {result.retries_absorbed:,} of them more than once, and "
            "each found exactly once when the log was read back: the broker knew them by their numbers."
        )
        tell("Not shown, nor promised: the loss of the disk.")
        tell(f"The same kind of faults without dedup: idemq demo --without-dedup --seed {result.seed}")
    else:
        doubled = counted(result.duplicated, "message")
        tell(f"Shown: without dedup retries stored {doubled} again, and nothing was lost.")
        tell("That is at least once, and what a retry does where nobody remembers numbers.")
        tell(f"The same kind of faults with dedup: idemq demo --seed {result.seed}")


def _conclude_groups(result: GroupResult, seed: int) -> None:
    if result.broken:
        tell(f"FAILED: the promise does not hold. Please report this, with --seed {seed}.")
    elif not result.shown:
        tell(f"FAILED: too little went wrong for this to show anything. Try another seed than {seed}.")
    else:
        tell("Promised: what a worker makes of a message is stored together with its group's position, or not at all.")
        tell(
            f"Shown: {result.inputs:,} messages, and exactly one output of each when the log was read back, although "
            f"{counted(result.zombies_refused, 'zombie')} came with results that others had stored by then: they were "
            "refused."
        )
        tell("Not promised: once for what a worker does elsewhere, as in your database. See: idemq demo --effects")


def _conclude_effects(result: EffectsResult) -> None:
    if result.broken:
        tell(f"FAILED: the promise does not hold. Please report this, with --seed {result.seed}.")
    elif not result.shown:
        tell(f"FAILED: nothing was doubled, or too little went wrong. Try another seed than {result.seed}.")
    else:
        tell(
            f"Shown: {counted(result.plain_doubled, 'plain row')} too many. When a worker is killed behind its "
            "write and before the commit of its position, another one is handed the same messages: at least once. No "
            "broker can know."
        )
        tell("With message.uid as the key there is none: it stays the same, however often a message is delivered.")


def _arguments(parser: Parser) -> None:
    about = "the same kind of faults, and a worker that retries as everyone else's does: duplicates"
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--without-dedup", action="store_true", help=about)
    about = "what workers write elsewhere is doubled by kills, unless each write is idempotent"
    only.add_argument("--effects", action="store_true", help=about)
    parser.add_argument("--seed", type=index, metavar="N", help="where the faults and kills fall (default: random)")


COMMANDS = (Command("demo", "the promise, shown: kills, cuts and lost replies", _arguments, _demo, asks_broker=False),)
