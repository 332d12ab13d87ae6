"""A loader to be killed: `python -m tests.process.loader URL TOPIC FILE.xz` sends each line as the producer "loader".

The line number is the sequence, so it goes on where the broker says it is. Small batches and short rests, so that a
kill finds it at work. Prints a JSON line when it begins (where) and when all is stored (what).
"""

from __future__ import annotations

import asyncio
import json
import lzma
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import idemq
from idemq import Record


def lines(path: str) -> list[bytes]:
    """The file's lines without the header."""
    return lzma.decompress(Path(path).read_bytes()).splitlines()[1:]


async def load(url: str, topic: str, path: str) -> None:
    """Send what the broker has not got."""
    rows = lines(path)
    async with idemq.connect(url, timeout=60) as mq, mq.producer("loader", batch_bytes=2048, in_flight=4) as producer:
        print(json.dumps({"start": producer.last_seq}), flush=True)

        async def records() -> AsyncIterator[Record]:
            for number, row in enumerate(rows):
                yield Record(row, key=row.split(b",")[9], seq=number)
                if number > producer.last_seq and number % 20 == 0:
                    await asyncio.sleep(0.002)

        summary = await producer.send_many(topic, records())
        print(json.dumps(summary._asdict()), flush=True)


if __name__ == "__main__":
    asyncio.run(load(*sys.argv[1:4]))
