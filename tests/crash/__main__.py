"""Crash experiments on the store; each prints one JSON object: `python -m tests.crash EXPERIMENT [options]`.

    states   every state of the disk that a power cut could leave, at every system call of a recorded run: a sync makes
             earlier writes durable; of the others any subset of their sectors may be there, the file grown or not
    sweep    SIGKILL before the nth system call, for every n; then recover and go on
    errors   the nth system call fails with ENOSPC, EDQUOT or EIO, for every n
    flips    single flipped bits: each is noticed or harmless

A process of its own without threads, because it forks for every state: damage may kill who looks at it.
"""

from __future__ import annotations

import argparse
import collections
import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lmdb

from idemq.broker import check, store
from idemq.broker.core import Damaged, Group
from idemq.broker.pages import Pages
from idemq.broker.store import STORE_FOLDER, Store, StoreBroken, StoreError, StoreFull
from idemq.client import wire

from . import faults, workload
from .faults import Sync, Write
from .workload import Content

SECTOR_BYTES = 512
"""What a disk writes whole: LMDB relies on it for its meta record."""
ISOLATED_SECONDS = 60

Summary = dict[str, Any]


def isolated(function: Callable[[], Any]) -> tuple[str, Any]:
    """Call in a forked child: ("ok", result), ("raised", text) or ("died", signal's name)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a killed LMDB complains there
        signal.alarm(ISOLATED_SECONDS)
        try:
            result = ("ok", function())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            result = ("raised", f"{type(error).__name__}: {error}")
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    if not told:
        return "died", signal.Signals(os.WTERMSIG(status)).name
    outcome: tuple[str, Any] = pickle.loads(told)
    return outcome


def scratch() -> Path:
    """A folder in memory where there is one: what is measured here is not the disk."""
    return Path(tempfile.mkdtemp(prefix="crash-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def quiet(what: str, index: int) -> None:
    """Nobody listens."""


def apply(directory: Path, groups: list[Group], mark: Callable[[str, int], None]) -> Content:
    """Open the store and commit what it does not have yet. Returns what it holds."""
    opened = Store(directory)
    mark("ack", opened.space().txn_id)
    for index in range(opened.space().txn_id, len(groups)):
        mark("begin", index + 1)
        opened.commit(groups[index])
        mark("ack", index + 1)
    found = workload.content(opened)
    opened.close()
    return found


def verdict(directory: Path, contents: list[Content], groups: list[Group], acknowledged: int, begun: int) -> str:
    """Recover, look at everything, go on by one commit. Empty when nothing acknowledged is lost and nothing is torn."""

    def recover() -> str:
        Store(directory).close()  # makes it, where the cut came before it was there
        report = check.walk(directory)
        if not report.clean:
            return f"found by check: {report.findings[0]}"
        opened = Store(directory)
        found = workload.content(opened)
        at = found[0]
        if found != contents[min(at, len(contents) - 1)]:
            return "torn"
        if at < acknowledged:
            return "lost"
        if at > begun:
            return "from the future"
        if at < len(groups):
            opened.commit(groups[at])
            if workload.content(opened) != contents[at + 1]:
                return "wrong after going on"
        opened.close()
        return ""

    outcome, told = isolated(recover)
    return str(told) if outcome == "ok" else f"{outcome}: {told}"


# ------------------------------------------------------------------------------------------------------------- states

Event = tuple[str, Any]


def record(groups: list[Group], planted: str) -> list[Event]:
    """Everything that the disk is told while the groups are committed, from the making of the store on."""
    events: list[Event] = []

    def handler(event: Write | Sync) -> int:
        events.append(("write", event) if isinstance(event, Write) else ("sync", None))
        return 0

    def sync(path: str) -> None:
        if planted != "unsynced creation":
            real_sync(path)
            events.append(("sync" if path.endswith("data.mdb") else "folder", path))

    def rename(old: Any, new: Any) -> None:
        events.append(("rename", None))
        real_rename(old, new)

    def mark(what: str, index: int) -> None:
        if planted == "early reply" and what == "begin":
            events.append(("ack", index))
        events.append((what, index))

    real_sync, real_rename, real_open = store._sync, os.rename, lmdb.open
    unsafe = {"sync": False} if planted == "sync=False" else {}
    faults.install(handler)
    directory = scratch()
    with (
        mock.patch.object(store, "_sync", sync),
        mock.patch.object(os, "rename", rename),
        mock.patch.object(lmdb, "open", lambda path, **options: real_open(path, **{**options, **unsafe})),
    ):
        apply(directory / "data", groups, mark)
    shutil.rmtree(directory)
    return events


def put(image: bytearray, offset: int, data: bytes) -> None:
    image.extend(bytes(max(0, offset - len(image))))
    image[offset : offset + len(data)] = data


def sectors(write: Write) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start < len(write.data):
        size = min(SECTOR_BYTES - (write.offset + start) % SECTOR_BYTES, len(write.data) - start)
        yield write.offset + start, write.data[start : start + size]
        start += size


def images(durable: bytearray, pending: list[Write], dice: random.Random, count: int) -> Iterator[bytes]:
    """What may be on the disk: nothing, all, all but one sector, one sector, and random subsets of what is pending."""
    parts = [part for write in pending for part in sectors(write)]
    every = frozenset(range(len(parts)))

    def build(kept: frozenset[int], grown: bool) -> bytes:
        image = bytearray(durable)
        for index, (offset, data) in enumerate(parts):
            if index in kept:
                put(image, offset, data)
            elif grown:
                put(image, max(len(image), offset + len(data)), b"")
        return bytes(image)

    yield bytes(durable)
    if not parts:
        return
    yield build(every, True)
    yield build(frozenset(), True)
    for index in dice.sample(range(len(parts)), min(count, len(parts))):
        yield build(every - {index}, True)
        yield build(frozenset({index}), dice.random() < 0.5)
        yield build(frozenset(range(index)), dice.random() < 0.5)
    for _ in range(count):
        part = dice.random()
        yield build(frozenset(index for index in every if dice.random() < part), dice.random() < 0.5)


def states(seed: int, commits: int, each: int, planted: str) -> Summary:
    """Enumerate; every state must recover to what was acknowledged, or to the commit that was under way."""
    groups, contents = workload.history(seed, commits)
    recorded = record(groups, planted)
    dice = random.Random(seed)
    durable, pending = bytearray(), []
    folders: tuple[str, ...] = ("store.new-cut",)
    acknowledged = begun = 0
    outcomes: collections.Counter[str] = collections.Counter()
    examples: dict[str, Any] = {}
    seen: set[int] = set()
    directory = scratch()
    for number, (what, event) in enumerate(recorded):
        if what == "ack":
            acknowledged = event
        elif what == "begin":
            begun = event
        elif what == "write":
            pending.append(event)
        elif what == "sync":
            for write in pending:
                put(durable, write.offset, write.data)
            pending = []
        elif what == "rename":
            folders = ("store.new-cut", STORE_FOLDER)
        elif folders[-1] == STORE_FOLDER:
            folders = (STORE_FOLDER,)
        for image in images(durable, pending, dice, each):
            for folder in folders:
                key = hash((image, folder, acknowledged, begun))
                if key in seen:
                    continue
                seen.add(key)
                data = directory / "data"
                shutil.rmtree(data, ignore_errors=True)
                (data / folder).mkdir(parents=True)
                (data / folder / "data.mdb").write_bytes(image)
                wrong = verdict(data, contents, groups, acknowledged, begun).split("\n")[0][:120]
                outcomes[wrong or "ok"] += 1
                if wrong:
                    examples.setdefault(wrong, [number, what, acknowledged, begun, folder])
        if what == "write" and event.synced:  # that write alone is durable when the call returned
            pending.remove(event)
            put(durable, event.offset, event.data)
    shutil.rmtree(directory)
    good = outcomes.pop("ok", 0)
    return {"events": len(recorded), "states": good + outcomes.total(), "wrong": dict(outcomes), "examples": examples}


# ------------------------------------------------------------------------------------------------------ sweep, errors


def counting(at: int, then: Callable[[], int]) -> None:
    """Put `then` under the nth system call of this process that changes the disk."""
    calls = 0

    def handler(event: Write | Sync) -> int:
        nonlocal calls
        calls += 1
        return then() if calls == at else 0

    def sync(path: str) -> None:
        error = handler(Sync())
        if error:
            raise OSError(error, os.strerror(error))
        real_sync(path)

    def rename(old: Any, new: Any) -> None:
        error = handler(Sync())
        if error:
            raise OSError(error, os.strerror(error))
        real_rename(old, new)

    real_sync, real_rename = store._sync, os.rename
    mock.patch.object(store, "_sync", sync).start()
    mock.patch.object(os, "rename", rename).start()
    faults.install(handler)


def sweep(seed: int, commits: int) -> Summary:
    """Kill at every point."""
    groups, contents = workload.history(seed, commits)
    directory = scratch()
    marks = directory / "marks"
    wrong: dict[int, str] = {}
    at = 0
    while True:
        at += 1
        data = directory / "data"
        shutil.rmtree(data, ignore_errors=True)
        marks.write_text("")

        def run(at: int = at, data: Path = data) -> Content:
            def die() -> int:
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

            counting(at, die)
            with marks.open("a", buffering=1) as file:
                return apply(data, groups, partial(print, file=file))

        outcome, _ = isolated(run)
        told = [line.split() for line in marks.read_text().splitlines()]
        acknowledged = max((int(index) for what, index in told if what == "ack"), default=0)
        begun = max((int(index) for what, index in told if what == "begin"), default=0)
        if outcome == "ok":
            break
        found = verdict(data, contents, groups, acknowledged, begun)
        outcome, result = isolated(partial(apply, data, groups, quiet))
        if not found and (outcome != "ok" or result != contents[-1]):
            found = f"not to the end: {outcome} {str(result)[:100]}"
        if found:
            wrong[at] = found
    shutil.rmtree(directory)
    return {"points": at - 1, "commits": acknowledged, "wrong": wrong}


def errors(seed: int, commits: int) -> Summary:
    """Fail at every point: with a full disk, with a full quota and with a bad disk."""
    groups, contents = workload.history(seed, commits)
    directory = scratch()
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: dict[str, str] = {}
    for error in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        at = 0
        while True:
            at += 1
            name = f"{errno.errorcode[error]} at {at}"
            data = directory / "data"
            shutil.rmtree(data, ignore_errors=True)
            outcome, told = isolated(partial(suffer, data, groups, contents, at, error))
            if outcome == "ok" and told == "no error":
                break
            outcomes[f"{errno.errorcode[error]}: {told}"] += 1
            if outcome != "ok" or told.startswith("wrong"):
                wrong[name] = f"{outcome}: {told}"
            outcome, told = isolated(partial(apply, data, groups, quiet))
            if outcome != "ok" or told != contents[-1] or not check.walk(data).clean:
                wrong[name] = f"not to the end: {outcome} {str(told)[:100]}"
    shutil.rmtree(directory)
    return {"outcomes": dict(outcomes), "wrong": wrong}


def suffer(directory: Path, groups: list[Group], contents: list[Content], at: int, error: int) -> str:
    """Commit all groups while one call fails; says how the store took it."""
    hit = False

    def fail() -> int:
        nonlocal hit
        hit = True
        return error

    counting(at, fail)
    try:
        opened = Store(directory)
    except StoreError as refused:
        return f"refused to start, {refused.code}" if hit else f"wrong: {refused}"
    told = "no error"
    for index, group in enumerate(groups):
        hit_before = hit
        try:
            opened.commit(group)
        except StoreFull:
            if hit == hit_before or workload.content(opened) != contents[index]:
                return "wrong: full for no reason, or something of the group is there"
            opened.commit(group)
            told = "full, nothing stored, went on"
        except StoreBroken:
            try:
                opened.commit(group)
            except StoreBroken:
                return "broken, and stays so"
            return "wrong: it went on after a broken commit"
        if hit and not hit_before and told == "no error":
            return "wrong: the failed call went unnoticed"
        if workload.content(opened) != contents[index + 1]:
            return f"wrong: content after commit {index + 1}"
    opened.close()
    return told


# -------------------------------------------------------------------------------------------------------------- flips


def flips(seed: int, count: int) -> Summary:
    """Flip one bit in a page that is in use: reads must answer the same, refuse or die, or `check` must find it."""
    groups, contents = workload.history(seed, 40)
    directory = scratch()
    apply(directory / "data", groups, quiet)
    with Pages(str(directory / "data" / STORE_FOLDER / "data.mdb")) as pages:
        page_bytes = pages.meta.page_bytes
        used = sorted(set(range(pages.meta.last_page + 1)) - pages.free_pages())
    dice = random.Random(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for _ in range(count):
        data = directory / "flipped"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(directory / "data", data)
        page, bit = dice.choice(used), dice.randrange(page_bytes * 8)
        place = page * page_bytes + bit // 8
        with (data / STORE_FOLDER / "data.mdb").open("r+b") as file:
            file.seek(place)
            (old,) = file.read(1)
            file.seek(place)
            file.write(bytes([old ^ 1 << bit % 8]))

        def read(data: Path = data) -> Content | None:
            try:
                found = workload.content(Store(data))
                for _, batches in found[4]:
                    for _, _, batch in batches:
                        wire.verified_header(batch)  # as the client does
            except (Damaged, StoreError, wire.WireError):
                return None
            return found

        def look(data: Path = data) -> bool:
            return check.walk(data).clean

        outcome, told = isolated(read)
        same = outcome == "ok" and told == contents[-1]
        refused = outcome == "ok" and told is None
        outcome_walk, clean = isolated(look)
        found = outcome_walk != "ok" or not clean
        how = "the same" if same else "refused" if refused else "died or raised" if outcome != "ok" else "other values"
        outcomes[f"{how}, {'found' if found else 'not found'} by check"] += 1
        if not found and not same:
            wrong.append(f"byte {place} of page {page}, bit {bit % 8}: {how}: {str(told)[:200]}")
    shutil.rmtree(directory)
    return {"outcomes": dict(outcomes), "wrong": wrong}


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash")
    parser.add_argument("experiment", choices=("states", "sweep", "errors", "flips"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commits", type=int, default=12, help="group commits of the recorded run")
    parser.add_argument("--each", type=int, default=6, help="states: how many sectors are tried at each system call")
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--planted", default="", choices=("", "sync=False", "early reply", "unsynced creation"))
    options = parser.parse_args()
    # In few commits the end of a generation is met only so: of odd seeds with another one's deltas behind it.
    workload.hurry(deltas=1, rows=3 if options.seed % 2 else 64)
    if options.experiment == "states":
        summary = states(options.seed, options.commits, options.each, options.planted)
    elif options.experiment == "sweep":
        summary = sweep(options.seed, options.commits)
    elif options.experiment == "errors":
        summary = errors(options.seed, options.commits)
    else:
        summary = flips(options.seed, options.flips)
    json.dump(summary, sys.stdout)


if __name__ == "__main__":
    main()
