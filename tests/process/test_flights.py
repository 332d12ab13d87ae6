"""Real input through real failures: every row of the file is stored once, whatever was killed or cut on the way."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import sys
from pathlib import Path

import pytest

import idemq
from idemq import testing
from idemq.broker import check

from .loader import lines

FLIGHTS = str(Path(__file__).parent.parent / "data" / "flights-2013-01.csv.xz")
ROOT = Path(__file__).parent.parent.parent
SEEDS = [int(seed) for seed in os.environ.get("FLIGHTS_SEEDS", "1,2").split(",")]

FAULTS = testing.Faults(
    refuse=0.05,
    cut_replies_per_kb=0.05,
    cut_requests_per_kb=0.002,
    lose_replies_per_kb=0.05,
    hold_requests_per_kb=0.002,
    stall_per_kb=0.002,
)


async def _load_and_kill(seed: int, directory: Path) -> None:
    rng = random.Random(seed)
    rows = lines(FLIGHTS)
    kills = collections.Counter[str]()
    victims = ["broker"] * 5 + ["loader"] * 5 + ["link"] * 5
    rng.shuffle(victims)
    starts: list[int] = []
    async with (
        testing.BrokerProcess(directory) as broker,
        testing.Link(broker.host, broker.port, seed=seed, faults=FAULTS) as link,
    ):
        async with idemq.connect(broker.url) as mq:
            await mq.create_topic("flights", partitions=4)
        summary = None
        while summary is None:
            loader = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.process.loader",
                link.url,
                "flights",
                FLIGHTS,
                cwd=ROOT,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            output = asyncio.create_task(loader.communicate())
            try:
                while not output.done():
                    await asyncio.wait([output], timeout=rng.uniform(0.1, 0.6))
                    if output.done() or not victims:
                        continue
                    victim = victims.pop()
                    kills[victim] += 1
                    if victim == "broker":
                        await broker.kill()
                        await broker.restart()
                    elif victim == "loader":
                        loader.kill()
                        break
                    else:
                        link.cut(hold=rng.random() < 0.5)
            finally:
                if loader.returncode is None and not output.done() and sys.exc_info()[0] is not None:
                    loader.kill()
                stdout, stderr = await output
            told = [json.loads(line) for line in stdout.splitlines()]
            starts += [one["start"] for one in told if "start" in one]
            if loader.returncode == 0:
                summary = told[-1]
            else:
                assert loader.returncode == -9, stderr.decode()
        await link.heal()
        assert summary["last_seq"] == len(rows) - 1
        await _compare(broker.url, rows)
        assert await broker.terminate() == 0
    report = check.verify(directory)
    assert not report.findings
    assert not report.died
    print(f"seed {seed}: {dict(kills)}, {link.counts}")
    assert not victims, "the loader was done before everything had been killed"
    assert len(set(starts)) > 1, "no loader was killed at its work"
    assert link.counts.cuts
    assert link.counts.replies_lost


async def _compare(url: str, rows: list[bytes]) -> None:
    """What is stored, row for row: number n holds line n, once, and each partition is in the file's order."""
    found: dict[int, bytes] = {}
    async with idemq.connect(url) as mq, mq.subscribe("flights") as sub:
        wanted = sum(one.next for one in (await mq.describe_topic("flights")).partitions)
        assert wanted == len(rows), f"{wanted} messages are stored, the file has {len(rows)} rows"
        last: dict[int, int] = {}
        read = 0
        async for message in sub:
            assert message.seq is not None
            assert message.seq not in found, f"row {message.seq} is stored twice"
            assert message.seq > last.get(message.partition, -1), "a partition is out of order"
            assert message.key == message.value.split(b",")[9]
            last[message.partition] = message.seq
            found[message.seq] = message.value
            read += 1
            if read == wanted:
                break
    assert [found[number] for number in range(len(rows))] == rows


@pytest.mark.process
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_is_stored_once_while_everything_is_killed(seed: int, tmp_path: Path) -> None:
    asyncio.run(_load_and_kill(seed, tmp_path / "data"))
