"""`idemq sub`: read a topic, values as they are or JSON lines.

Without a group all partitions are read and nothing is stored. With one the group's positions follow what was written
to stdout, never what was only read: whoever is killed on the way, nothing is missed. What a pipe took counts as
written: nobody tells us what its reader has read when it ends (`| head`), which may be 64 KiB less.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
from argparse import Namespace
from contextlib import aclosing
from typing import Any

from ..client import Client
from ..consumer import Subscription
from ..errors import LeaseLost, OutcomeUnknown, RetriableError
from ..records import Message
from ..source import Batch
from . import reach
from .arguments import Command, Parser, count, start, text
from .errors import OK, UNREACHABLE, CommandError
from .output import say, text_or_base64

BATCH_MESSAGES_MAX = 1000
LOOK_S = 1.0
"""With --exit-at-end: how often one looks what is left while nothing comes."""
WRITE_BYTES = select.PIPE_BUF
"""What a pipe that is ready takes without blocking."""


def _sub(args: Namespace) -> int:
    reach.run(args, lambda mq: _copy(args, mq))
    return OK


async def _copy(args: Namespace, mq: Client) -> None:
    loop = asyncio.get_running_loop()
    # Where the topic ended when we came: with a writer at work there is no other end.
    topic = await mq.describe_topic(args.topic)
    ends = {(topic.name, one.index): one.next for one in topic.partitions}
    # Messages that are stored must come in time; for those that are not, one waits as long as one likes.
    limit: float = args.timeout or reach.TIMEOUT_S
    line = _json if args.json else _plain
    left: int | None = args.count
    async with reach.watched(mq), mq.subscribe(args.topic, group=args.group, start=args.start) as sub:
        came_at = loop.time()
        while left is None or left:
            if args.exit_at_end:
                if all(at >= ends.get(where, 0) for where, at in sub.positions().items()):
                    if args.group is None or await _passed(mq, sub, args.group, ends):
                        return
                    came_at = loop.time()  # others have the rest; it comes to us only if they go
                elif loop.time() - came_at >= limit:
                    raise CommandError(
                        f"Messages that the broker has did not come within {limit:g} s: "
                        "check that it runs (idemq ping).",
                        UNREACHABLE,
                    )
            # Once for each batch, as each may be smaller than the one before it.
            size = BATCH_MESSAGES_MAX if left is None else min(left, BATCH_MESSAGES_MAX)
            batch = await _next(sub, size, min(limit, LOOK_S) if args.exit_at_end else None)
            if batch is None:
                continue
            came_at = loop.time()
            await _write(sys.stdout.fileno(), b"".join(map(line, batch)))
            if args.group is not None:
                await _commit(sub, batch, patient=not args.exit_at_end)
            if left is not None:
                left -= len(batch)


async def _next(sub: Subscription, size: int, wait_s: float | None) -> Batch | None:
    """The next messages; None: nothing came for so long."""
    async with aclosing(sub.batches(max_messages=size, max_wait=0.0)) as batches:
        try:
            async with asyncio.timeout(wait_s):
                return await anext(batches)
        except TimeoutError:
            return None


async def _passed(mq: Client, sub: Subscription, group: str, ends: dict[tuple[str, int], int]) -> bool:
    """Is the group past the ends also in what is not read here?"""
    here = sub.positions()
    group_offsets = (await mq.describe_group(group)).offsets
    at = {(one.topic, one.partition): one.next for one in group_offsets}
    return all(where in here or at.get(where, 0) >= end for where, end in ends.items())


async def _write(descriptor: int, data: bytes) -> None:
    """Write all of it. Where the reader takes its time the loop goes on: heartbeats are sent, and Ctrl-C works."""
    rest = memoryview(data)
    while rest:
        if not select.select([], [descriptor], [], 0)[1]:
            await _writable(descriptor)
        rest = rest[os.write(descriptor, rest[:WRITE_BYTES]) :]


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)


async def _commit(sub: Subscription, batch: Batch, patient: bool) -> None:
    """Move the group's position behind what was printed. `patient`: for as long as it takes."""
    while True:
        try:
            return await sub.commit(batch)
        except LeaseLost as lost:
            return say(f"{lost.text}: what was printed of it here may be printed again.")
        except (RetriableError, OutcomeUnknown):  # repeating it does no harm
            if not patient:
                raise


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
    parser.add_argument(
        "-g",
        "--group",
        metavar="GROUP",
        type=text,
        help="share the messages with the group's other members, and remember how far it came: behind what was printed "
        "(into a pipe: also what its reader leaves there)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="WHERE",
        type=start,
        default="earliest",
        help="earliest (default), latest, an offset, or a time such as 2026-01-31T12:00; with -g only for a new group",
    )
    parser.add_argument("-n", dest="count", metavar="N", type=count, help="end after N messages")
    parser.add_argument(
        "--exit-at-end",
        action="store_true",
        help="end where the topic ended when this began, with -g when the group has come that far",
    )


COMMANDS = (Command("sub", "print a topic's messages, one a line", _arguments, _sub),)
