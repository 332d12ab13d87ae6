"""The worker that `idemq demo` kills, stops and wakes up: a member of a group that says what it does.

    python -c 'from idemq.client.cli.worker import main; main()' URL NAME [DATABASE]

It turns each message into another one, and stores those and its position in one transaction. With a DATABASE it writes
each message there instead, in two ways, and commits its position afterwards. Each line of stdout is a word, see `Said`.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import AsyncIterator
from enum import StrEnum

from ..client import Client, connect
from ..consumer import Subscription
from ..errors import LeaseLost, OutcomeUnknown, RetriableError, TransactionAborted
from ..source import Batch

INPUTS = "demo-inputs"
OUTPUTS = "demo-outputs"
GROUP = "demo-workers"
BATCH_MESSAGES = 25
"""Handled, and stored or committed, together."""
BATCH_S = 0.02
"""What handling them takes, so that whoever is killed or stopped has some in hand."""
PREFETCH_BYTES = 64 << 10
"""Little, so that what is fetched comes in many replies, and faults fall into them."""
TIMEOUT_S = 60.0
"""Longer than any broker is down here."""

TABLES = ("plain", "keyed")
"""The tables of DATABASE: one with a row for each time that a message was handled, one with a row for each message."""
SCHEMA = """
    CREATE TABLE plain (value BLOB NOT NULL);
    CREATE TABLE keyed (uid BLOB PRIMARY KEY, value BLOB NOT NULL);
"""


class Said(StrEnum):
    """What a worker does."""

    BEGUN = "begun"
    """It has messages in hand."""
    STORED = "stored"
    """It stored what came of them, or committed its position behind them."""
    REFUSED = "refused"
    """It was not let, since the partition is another member's."""
    FAILED = "failed"
    """It does not know, or nothing was stored; they are handed out again."""


def output(value: bytes) -> bytes:
    """What comes of a message."""
    return value.upper()


async def _work(url: str, name: str, database: str | None) -> None:
    # Its stdin ends with the demo, whatever ended that: nobody would ever end this one.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 1)
    async with (
        connect(url, timeout=TIMEOUT_S, name=name) as mq,
        mq.subscribe(INPUTS, group=GROUP, prefetch_bytes=PREFETCH_BYTES) as sub,
    ):
        await (_transform(mq, sub) if database is None else _write(sub, database))


async def _transform(mq: Client, sub: Subscription) -> None:
    async with mq.producer() as producer:
        async for batch in _batches(sub):
            await asyncio.sleep(BATCH_S)
            try:
                async with producer.transaction(batch) as tx:
                    for message in batch:
                        tx.send(OUTPUTS, output(message.value), key=message.key)
            except LeaseLost:
                _say(Said.REFUSED)
            except (TransactionAborted, RetriableError, OutcomeUnknown):
                _say(Said.FAILED)
            else:
                _say(Said.STORED)


async def _write(sub: Subscription, database: str) -> None:
    db = sqlite3.connect(database, timeout=TIMEOUT_S)
    # Kills are survived without it, and this is no demonstration of the database's.
    db.execute("PRAGMA synchronous = OFF")
    async for batch in _batches(sub):
        for message in batch:
            with db:  # each is a transaction of its own, as the effects of real handlers are
                db.execute("INSERT INTO plain (value) VALUES (?)", (message.value,))
                db.execute(
                    "INSERT INTO keyed (uid, value) VALUES (?, ?) ON CONFLICT DO NOTHING", (message.uid, message.value)
                )
            await asyncio.sleep(BATCH_S / BATCH_MESSAGES)
        try:
            await sub.commit(batch)
        except LeaseLost:
            _say(Said.REFUSED)
        except (RetriableError, OutcomeUnknown):
            _say(Said.FAILED)
        else:
            _say(Said.STORED)


async def _batches(sub: Subscription) -> AsyncIterator[Batch]:
    async for batch in sub.batches(max_messages=BATCH_MESSAGES, max_wait=0.0):
        _say(Said.BEGUN)
        yield batch


def _say(what: Said) -> None:
    print(what, flush=True)


def main() -> None:
    """Work, as the command line says, until killed."""
    url, name, *database = sys.argv[1:]
    asyncio.run(_work(url, name, database[0] if database else None))
