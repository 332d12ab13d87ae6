"""`idemq pub`: a value, or a line a message from stdin. With --producer the line number is the sequence.

So killing it and running it again with the same input is exact: the broker knows the last line it stored, what is at or
below it is skipped, and what was stored without our hearing of it is found again by its number. Skipped lines are not
compared with what is stored, so a run that skips says so, and an input with fewer lines than were sent is refused.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys
from argparse import Namespace
from collections.abc import AsyncIterator

from ..client import Client
from ..errors import IdemqError, MessageTooLarge, OutcomeUnknown
from ..records import Record
from ..wire import MESSAGE_BYTES_MAX
from . import reach
from .arguments import Command, Parser, text
from .errors import OK, RETRY_LATER, USAGE, CommandError
from .output import Progress, counted, moment, number, record, say

READ_BYTES = 1 << 20
"""What is read, sent and waited for at a time; a killed run loses no more than the reading of it."""
PIPE_BYTES = 64 << 10
"""What a pipe holds, and so all that one read of it gives."""


def _pub(args: Namespace) -> int:
    if args.id is not None:
        raise CommandError("--id is not offered yet: --producer makes a repeated run exact.", USAGE)
    key = None if args.key is None else os.fsencode(args.key)
    value = None if args.value in (None, "-") else os.fsencode(args.value)
    if value is not None and args.producer is not None:
        raise CommandError(
            "--producer numbers the lines of an input: give them on stdin. A single VALUE would be line 0 each time.",
            USAGE,
        )
    if value is not None:
        try:
            receipt = reach.run(args, lambda mq: mq.send(args.topic, value, key=key))
        except OutcomeUnknown as error:
            raise _unknown(args, error) from error
        record(args, receipt._asdict(), {"timestamp": moment, "offset": number, "seq": number})
    else:
        reach.run(args, lambda mq: _lines(args, mq, key))
    return OK


def _unknown(args: Namespace, error: OutcomeUnknown) -> CommandError:
    """What may be stored and may be not: sending it again is right where numbers tell."""
    if args.producer is not None:
        text = f"{error.text}. Run the same command again: what is stored will be skipped. ({error.code})"
        return CommandError(text, RETRY_LATER)
    return CommandError(
        f"{error.text}: what was not answered may be stored, or not. Look before it is sent again (idemq sub "
        f"{args.topic}). With --producer, running the same command again stores nothing twice. ({error.code})"
    )


async def _lines(args: Namespace, mq: Client, key: bytes | None) -> None:
    await mq.describe_topic(args.topic)  # an input without a line would never ask for it, nor a person who types
    typed = sys.stdin.isatty()
    if typed:
        say("Every line is a message; Ctrl-D ends.")
    total = _size(sys.stdin.fileno())
    stored = skipped = lines = read_bytes = 0
    async with mq.producer(args.producer) as producer:
        known = producer.last_seq + 1
        if known:
            say(
                f"{args.producer} had already sent {counted(known, 'line')} (last_seq {producer.last_seq}): as many at "
                "the start of this input are skipped by number. One producer name belongs to one input, over all "
                "topics."
            )
        with Progress("lines", total) as progress:

            def tell(text: str) -> None:
                progress.clear()
                say(text)

            try:
                async with reach.watched(mq, tell):
                    async for chunk in _read_lines(sys.stdin.fileno()):
                        numbers = range(lines, lines + len(chunk))
                        records = [
                            Record(line, key, seq=None if args.producer is None else seq)
                            for line, seq in zip(chunk, numbers, strict=True)
                        ]
                        summary = await producer.send_many(args.topic, records)
                        stored += summary.stored
                        skipped += summary.duplicates
                        lines += len(chunk)
                        read_bytes += sum(map(len, chunk)) + len(chunk)
                        if not typed:  # a progress line would be written into what is typed
                            progress.update(lines, read_bytes)
            except asyncio.CancelledError:
                if args.producer is not None:
                    tell(
                        f"Stored: at least {counted(producer.last_seq + 1, 'line')}. The same command with the same "
                        "input goes on behind what is stored."
                    )
                raise
            except IdemqError as error:
                progress.clear()
                if lines:
                    say(f"Sent before: {counted(lines, 'line')}, {stored:,} stored now, {skipped:,} stored before.")
                if isinstance(error, OutcomeUnknown):
                    raise _unknown(args, error) from error
                raise
        last_seq = producer.last_seq
    if lines < known:
        raise CommandError(
            f"This input has {counted(lines, 'line')}, and {args.producer} had sent {known:,}: it is not the same "
            "input. Nothing was stored; give it a producer name of its own.",
            USAGE,
        )
    fields = {"stored": stored, "duplicates": skipped}
    record(args, fields | ({} if args.producer is None else {"last_seq": last_seq}), {"last_seq": number})


def _size(descriptor: int) -> int | None:
    """How much a regular file holds from here on; None of anything else."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None
    return max(0, status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR))


async def _read_lines(descriptor: int) -> AsyncIterator[list[bytes]]:
    """Lines without their line ends, as many as can be had at once, waiting without holding up the loop."""
    rest = b""
    number = 0
    async for data in _read(descriptor):
        *lines, rest = (rest + data).split(b"\n")
        number += len(lines)
        if lines:
            yield lines
        if len(rest) > MESSAGE_BYTES_MAX:
            raise MessageTooLarge(f"line {number + 1} is longer than a message may be, {MESSAGE_BYTES_MAX} bytes")
    if rest:
        say("The last line has no line end: it is sent as it is.")
        yield [rest]


async def _read(descriptor: int) -> AsyncIterator[bytes]:
    """What can be read at once, READ_BYTES and a little more at most, again and again until the end.

    Files are always ready, and the loop cannot wait for them; everything else is asked first, so that Ctrl-C works.
    """
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        while data := os.read(descriptor, READ_BYTES):
            yield data
        return
    pieces: list[bytes] = []
    while True:
        ready, _, _ = select.select([descriptor], [], [], 0)
        if pieces and (not ready or sum(map(len, pieces)) >= READ_BYTES):
            yield b"".join(pieces)
            pieces = []
        elif not ready:
            await _readable(descriptor)
        elif piece := os.read(descriptor, PIPE_BYTES):
            pieces.append(piece)
        else:
            break
    if pieces:
        yield b"".join(pieces)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def _arguments(parser: Parser) -> None:
    parser.add_argument("topic", metavar="TOPIC", type=text)
    parser.add_argument("value", metavar="VALUE", nargs="?", help="the message; without it, or as -, lines from stdin")
    parser.add_argument("-k", "--key", metavar="KEY", help="messages with the same key share a partition")
    parser.add_argument("--id", help="not offered yet")
    parser.add_argument(
        "--producer",
        metavar="NAME",
        type=text,
        help="number stdin's lines (from 0) under this name: running it again with the same input stores only what is "
        "new. Lines already sent are skipped by number, not compared: each input needs a name of its own, over all "
        "topics",
    )


COMMANDS = (Command("pub", "send a message, or a line a message from stdin", _arguments, _pub),)
