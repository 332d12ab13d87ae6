"""The worker that `idemq demo` kills: loads numbered messages, and says after each chunk how far it came.

    python -c 'from idemq.client.cli.loader import main; main()' URL COUNT [POSITION_FILE]

With dedup (no POSITION_FILE) it asks the broker where it stands and gives each message its number. Without, it does
what retrying clients elsewhere do: it sends without numbers, writes its position down after each acknowledged chunk and
goes on from there when it comes back. Each line of stdout is a JSON object, see `Said`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from ..client import connect
from ..records import Record

TOPIC = "demo"
NAME = "demo-loader"
CHUNK = 250
"""Messages sent together and waited for: what a loader that is killed can have in the air."""
BATCH_BYTES = 1024
"""Small batches, so that a chunk is many requests and replies, and faults fall between them."""
TIMEOUT_S = 60.0
"""Longer than any broker is down here."""


class Said(NamedTuple):
    """Where the loader stands. `stored` and `duplicates` count this process's messages by the broker's answers."""

    done: int
    """Messages that it knows to be stored: the next to be sent."""
    stored: int
    duplicates: int


def value(index: int) -> bytes:
    """The message with this number."""
    return b"message %06d" % index


def _read_position(path: Path) -> int:
    return int(path.read_text())


def write_position(path: Path, done: int) -> None:
    """Replace the file: whoever is killed on the way leaves a whole position."""
    beside = path.with_suffix(".new")
    beside.write_text(str(done))
    beside.rename(path)


async def _load(url: str, count: int, position: Path | None) -> None:
    # Its stdin ends with the demo, whatever ended that: nobody would ever end this one.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 1)
    stored = duplicates = 0
    async with connect(url, timeout=TIMEOUT_S) as mq:
        if position is None:
            producer = mq.producer(NAME, batch_bytes=BATCH_BYTES)
        else:
            producer = mq.producer(dedup=False, batch_bytes=BATCH_BYTES)
        async with producer:
            done = producer.last_seq + 1 if position is None else _read_position(position)
            _say(done, 0, 0)
            while done < count:
                numbers = range(done, min(done + CHUNK, count))
                records = [Record(value(one), seq=one if position is None else None) for one in numbers]
                summary = await producer.send_many(TOPIC, records)
                stored += summary.stored
                duplicates += summary.duplicates
                done = numbers.stop
                if position is not None:
                    write_position(position, done)
                _say(done, stored, duplicates)


def _say(done: int, stored: int, duplicates: int) -> None:
    print(json.dumps(Said(done, stored, duplicates)._asdict()), flush=True)


def main() -> None:
    """Load, as the command line says."""
    url, count, *position = sys.argv[1:]
    asyncio.run(_load(url, int(count), Path(position[0]) if position else None))
