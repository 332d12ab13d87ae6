"""`idemq group`: who reads a topic together, and how far they came."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from ..client import Client, GroupInfo
from ..errors import UnknownGroup
from . import reach
from .arguments import Command, Parser, add_yes, confirm, index, nearest, start, text
from .errors import OK, USAGE, CommandError
from .output import counted, done, emit, number, record, table, text_or_base64

_SHOWN = {"next": number, "before": number}


def _lag(group: GroupInfo) -> int:
    return sum(one.lag for one in group.offsets)


def _topics(group: GroupInfo) -> list[str]:
    """Those it has a position in."""
    return list(dict.fromkeys(one.topic for one in group.offsets))


def _ls(args: Namespace) -> int:
    found = reach.run(args, Client.groups)
    columns = ("name", "topics", "partitions", "lag", "members")
    rows = [
        (
            one.name,
            _topics(one) if args.json else ", ".join(_topics(one)),
            len(one.offsets),
            _lag(one),
            len(one.members),
        )
        for one in found
    ]
    table(args, columns, rows)
    return OK


def _describe(args: Namespace) -> int:
    group = reach.run(args, lambda mq: mq.describe_group(args.name))
    holders = {partition: member for member in group.members for partition in member.assigned}
    if args.json:
        offsets: list[dict[str, Any]] = []
        for one in group.offsets:
            holder = holders.get((one.topic, one.partition))
            fields = one._asdict() | {"member": None if holder is None else holder.id}
            offsets.append(fields | text_or_base64("metadata", fields.pop("metadata")))
        members = [
            one._asdict() | {"assigned": [{"topic": topic, "partition": number} for topic, number in one.assigned]}
            for one in group.members
        ]
        emit({"name": group.name, "lag": _lag(group), "members": members, "offsets": offsets})
        return OK
    record(args, {"name": group.name, "lag": _lag(group), "members": len(group.members)})
    if group.offsets:
        rows = []
        for one in group.offsets:
            holder = holders.get((one.topic, one.partition))
            about = (None if holder is None else holder.client, text_or_base64("metadata", one.metadata)["metadata"])
            rows.append(("partition", one.topic, one.partition, one.next, one.lag, one.attempts, *about))
        table(args, ("", "topic", "index", "next", "lag", "attempts", "held_by", "metadata"), rows, _SHOWN)
    if group.members:
        present = [("member", one.client, one.address, len(one.assigned), one.id) for one in group.members]
        table(args, ("", "client", "address", "partitions", "id"), present)
    return OK


def _seek(args: Namespace) -> int:
    before = reach.run(args, lambda mq: _known_positions(mq, args))
    if not args.yes:
        where = f"topic {args.topic}" if args.partition is None else f"partition {args.partition} of topic {args.topic}"
        to = args.to if isinstance(args.to, str | int) else args.to.isoformat(" ")
        which = f"group {args.name}" if before is not None else f"group {args.name}, which is new,"
        confirm(
            args,
            f"This sets {which} to {to} in {where}: messages are skipped, or handled again, and what its members have "
            "in hand cannot be committed.",
        )

    # What was set, and not what is there now: a member may have gone on meanwhile.
    after = reach.run(args, lambda mq: mq.seek_group(args.name, args.topic, args.to, partition=args.partition))
    rows = [(args.topic, one, (before or {}).get(one), next) for one, next in after.items()]
    table(args, ("topic", "partition", "before", "next"), rows, _SHOWN)
    return OK


async def _known_positions(mq: Client, args: Namespace) -> dict[int, int] | None:
    """{partition: next}; None: there is no such group.

    Raises CommandError for a group that has no position in this topic, unless it is to be new there, and for a
    partition that the topic does not have.
    """
    partitions = len((await mq.describe_topic(args.topic)).partitions)
    if args.partition is not None and args.partition >= partitions:
        raise CommandError(f"Topic {args.topic} has partitions 0 .. {partitions - 1}, not {args.partition}.", USAGE)
    try:
        group = await mq.describe_group(args.name)
    except UnknownGroup:
        if args.create:
            return None
        hint = nearest(args.name, [one.name for one in await mq.groups()]) or "."
        raise CommandError(f"There is no group {args.name}{hint} With --create a new one begins there.") from None
    if args.topic not in _topics(group) and not args.create:
        raise CommandError(f"Group {args.name} has no position in topic {args.topic}: with --create it begins there.")
    return {one.partition: one.next for one in group.offsets if one.topic == args.topic}


def _rm(args: Namespace) -> int:
    group = reach.run(args, lambda mq: mq.describe_group(args.name))
    if group.members:
        raise CommandError(
            f"Group {group.name} is at work ({_few(one.client for one in group.members)}): stop its members first. "
            f"idemq group describe {group.name} shows them."
        )
    confirm(
        args,
        f"This forgets where group {group.name} stands in {_few(_topics(group))}, {counted(_lag(group), 'message')} "
        "before the end: whoever reads in its name begins anew, and messages are skipped or handled again.",
    )
    reach.run(args, lambda mq: mq.delete_group(args.name))
    done(args, "deleted", args.name)
    return OK


def _few(names: Iterable[str]) -> str:
    """Three of them, and how many more there are."""
    some = list(names)
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")


def _name(parser: Parser) -> None:
    parser.add_argument("name", metavar="GROUP", type=text)


def _seek_arguments(parser: Parser) -> None:
    _name(parser)
    parser.add_argument("topic", metavar="TOPIC", type=text)
    parser.add_argument(
        "--to",
        metavar="WHERE",
        type=start,
        required=True,
        help="earliest, latest, an offset, or a time such as 2026-01-31T12:00",
    )
    parser.add_argument("--partition", metavar="N", type=index, help="in this partition only (default: all)")
    parser.add_argument("--create", action="store_true", help="though the group has no position in the topic yet")
    add_yes(parser)


def _rm_arguments(parser: Parser) -> None:
    _name(parser)
    add_yes(parser)


COMMANDS = (
    Command("group ls", "list consumer groups, and how far they are behind", lambda parser: None, _ls),
    Command("group describe", "show a group's positions and members", _name, _describe),
    Command("group seek", "set where a group goes on in a topic", _seek_arguments, _seek),
    Command("group rm", "forget a group's positions", _rm_arguments, _rm),
)
