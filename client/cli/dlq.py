"""`idemq dlq`: messages that handlers could not handle; to be read, sent back to where they came from, or dropped."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError, Namespace
from typing import Any

from ..client import Client
from ..dead_letters import DEAD_LETTER, DeadLetters, NoDeadLetter, Place, facts, origin, original_headers
from ..records import Message
from . import reach
from .arguments import Command, Parser, add_yes, confirm, text
from .errors import OK, USAGE, CommandError
from .output import columns, counted, emit, moment, number, plain, record, say, table, text_or_base64, wrapped

_SHOWN = {"time": moment, "offset": number}
_COLUMNS = ("place", "time", "topic", "partition", "offset", "group", "attempts", "error", "reason")
_NUMBERS = frozenset({"time", "partition", "offset", "attempts"})


def _place(value: str) -> Place:
    match = re.fullmatch(r"(\d+):(\d+)", value, re.ASCII)
    if not match:
        raise ArgumentTypeError(f"{value!r} is no PARTITION:OFFSET such as 0:17")
    return Place(int(match[1]), int(match[2]))


def _facts(message: Message) -> dict[str, Any]:
    """What the dead letter says; `place` is its own, the others are those of the message that it was."""
    said: dict[str, Any] = {}
    for name, value in facts(DEAD_LETTER, message.headers).items():  # anybody may have written them
        said[name] = int(value) if name in _NUMBERS and value.isdecimal() and len(value) < 20 else value
    place = {"place": str(Place(message.partition, message.offset))}
    return place | said | place


def _ls(args: Namespace) -> int:
    others = 0

    async def rows(mq: Client) -> list[list[Any]]:
        nonlocal others
        found: list[list[Any]] = []
        async for message in DeadLetters(mq, args.topic).left():
            try:
                origin(message)
            except NoDeadLetter:
                others += 1
            else:
                said = _facts(message)
                found.append([said.get(column) for column in _COLUMNS])
        return found

    table(args, _COLUMNS, reach.run(args, rows), _SHOWN)
    if others:
        say(f"Not listed: {counted(others, 'message')} of {args.topic}, with no word of where from: no dead letters.")
    return OK


def _show(args: Namespace) -> int:
    async def find(mq: Client) -> Message:
        async for message in DeadLetters(mq, args.topic).left([args.place]):
            origin(message)
            return message
        raise _gone(args.place, args.topic)

    message = reach.run(args, find)
    said = _facts(message)
    trace = said.pop("traceback", None)
    headers: dict[str, Any] = {}
    for name, value in original_headers(DEAD_LETTER, message.headers).items():
        headers |= text_or_base64(name, value)
    shown = said | text_or_base64("key", message.key) | text_or_base64("value", message.value)
    if args.json:
        emit(shown | {"headers": headers, "traceback": trace})
        return OK
    record(args, shown | {f"header {name}": value for name, value in headers.items()}, _SHOWN)
    if trace is not None and sys.stdout.isatty():
        sys.stdout.writelines(f"{plain(line)}\n" for line in trace.splitlines())
    elif trace is not None:
        record(args, {"traceback": trace})
    return OK


def _gone(place: Place, topic: str) -> CommandError:
    return CommandError(f"There is no dead letter {place} in {topic} (any more): see idemq dlq ls.")


async def _count(mq: Client, topic: str, places: list[Place] | None) -> int:
    """How many are left (of these). Raises CommandError or NoDeadLetter where `DeadLetters.drop` would refuse."""
    found: set[Place] = set()
    async for message in DeadLetters(mq, topic).left(places):
        origin(message)
        found.add(Place(message.partition, message.offset))
    for place in places or ():
        if place not in found:
            raise _gone(place, topic)
    return len(found)


def _places(args: Namespace) -> list[Place] | None:
    """None: all."""
    if bool(args.places) == args.all:
        raise CommandError("Name messages, PARTITION:OFFSET as idemq dlq ls prints them, or say --all.", USAGE)
    return args.places or None


def _requeue(args: Namespace) -> int:
    places = _places(args)
    record(args, {"requeued": reach.run(args, lambda mq: DeadLetters(mq, args.topic).requeue(places))})
    return OK


def _drop(args: Namespace) -> int:
    places = _places(args)
    if not args.yes:
        count = reach.run(args, lambda mq: _count(mq, args.topic, places))
        if count:  # about nothing nobody is asked
            confirm(args, f"This drops {counted(count, 'message')} of {args.topic}, for good.")
    record(args, {"dropped": reach.run(args, lambda mq: DeadLetters(mq, args.topic).drop(places))})
    return OK


def _topic(parser: Parser) -> None:
    parser.add_argument("topic", metavar="TOPIC", type=text)


def _show_arguments(parser: Parser) -> None:
    _topic(parser)
    parser.add_argument("place", metavar="PARTITION:OFFSET", type=_place)


def _places_arguments(parser: Parser) -> None:
    _topic(parser)
    parser.add_argument("places", metavar="PARTITION:OFFSET", type=_place, nargs="*")
    parser.add_argument("--all", action="store_true", help="all that are left")


def _requeue_arguments(parser: Parser) -> None:
    _places_arguments(parser)
    parser.epilog = "\n".join(
        wrapped(
            "What goes back is a new message, with a uid of its own: every group of its topic gets it, those that had "
            "handled it too.",
            columns(),
        )
    )


def _drop_arguments(parser: Parser) -> None:
    _places_arguments(parser)
    add_yes(parser)


COMMANDS = (
    Command("dlq ls", "list the dead letters that are left in a topic", _topic, _ls),
    Command("dlq show", "show a dead letter: the message, why it failed, the traceback", _show_arguments, _show),
    Command("dlq requeue", "send dead letters back to where they came from, each once", _requeue_arguments, _requeue),
    Command("dlq drop", "take dead letters out for good", _drop_arguments, _drop),
)
