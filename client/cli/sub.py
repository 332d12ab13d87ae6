"""`idemq sub`: read a topic, values as they are or JSON lines. Reads all partitions and stores nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ..client import Client
from ..consumer import Batch, Subscription
from ..records import Message
from . import reach
from .arguments import Command, Parser, count, start, text
from .errors import OK, UNREACHABLE, USAGE, CommandError
from .output import text_or_base64

BATCH_MESSAGES_MAX = 1000


def _sub(args: Namespace) -> int:
    if args.group is not None:
        raise CommandError(
            "--group is not offered yet: without it all partitions are read, and nothing is stored.", USAGE
        )
    reach.run(args, lambda mq: _copy(args, mq))
    return OK


async def _copy(args: Namespace, mq: Client) -> None:
    left: int | None = args.count
    async with mq.subscribe(args.topic, start=args.start) as sub:
        # Where the topic ended when we came: with a writer at work there is no other end.
        ends = {where: at + sub.lag()[where] for where, at in sub.positions().items()}
        if args.exit_at_end and _reached(sub, ends):
            return
        # Messages that are stored must come in time; for those that are not, one waits as long as one likes.
        limit = (args.timeout or reach.TIMEOUT_S) if args.exit_at_end else None
        while left is None or left:
            # Once for each batch, as each may be smaller than the one before it.
            size = BATCH_MESSAGES_MAX if left is None else min(left, BATCH_MESSAGES_MAX)
            async with aclosing(sub.batches(max_messages=size, max_wait=0.0)) as batches:  # type: ignore[type-var]
                batch = await _next(batches, limit)
            line = _json if args.json else _plain
            sys.stdout.buffer.write(b"".join(map(line, batch)))
            sys.stdout.buffer.flush()
            if left is not None:
                left -= len(batch)
            if args.exit_at_end and _reached(sub, ends):
                return


async def _next(batches: AsyncIterator[Batch], limit: float | None) -> Batch:
    try:
        async with asyncio.timeout(limit):
            return await anext(batches)
    except TimeoutError:
        raise CommandError(
            f"Messages that the broker has did not come within {limit:g} s: check that it runs (idemq ping).",
            UNREACHABLE,
        ) from None


def _reached(sub: Subscription, ends: dict[tuple[str, int], int]) -> bool:
    return all(sub.positions()[where] >= end for where, end in ends.items())


def _plain(message: Message) -> bytes:
    return message.value + b"\n"


def _json(message: Message) -> bytes:
    return json.dumps(fields(message), ensure_ascii=False).encode() + b"\n"


def fields(message: Message) -> dict[str, Any]:
    """A message as JSON: text where the bytes are UTF-8, else base64 and `…_base64: true`; `uid` in hexadecimal."""
    document: dict[str, Any] = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
    document |= text_or_base64("key", message.key)
    document |= text_or_base64("value", message.value)
    headers: dict[str, Any] = {}
    for name, value in message.headers.items():
        headers |= text_or_base64(name, value)
    return document | {
        "headers": headers,
        "timestamp": message.timestamp,
        "seq": message.seq,
        "uid": message.uid.hex(),
    }


def _arguments(parser: Parser) -> None:
    parser.add_argument("topic", metavar="TOPIC", type=text)
    parser.add_argument("-g", "--group", help="not offered yet")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="WHERE",
        type=start,
        default="earliest",
        help="earliest (default), latest, an offset, or a time such as 2026-01-31T12:00",
    )
    parser.add_argument("-n", dest="count", metavar="N", type=count, help="end after N messages")
    parser.add_argument("--exit-at-end", action="store_true", help="end where the topic ended when this began")


COMMANDS = (Command("sub", "print a topic's messages, one a line", _arguments, _sub),)
