"""`idemq topic`: list, create, describe, alter, purge and remove topics."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from typing import Any

from ..client import Client
from ..engine import TopicInfo
from ..errors import TopicExists
from . import reach
from .arguments import Command, Parser, add_yes, byte_count, confirm, count, span, text
from .errors import OK, USAGE, CommandError
from .output import counted, done, duration, emit, number, record, say, size, table

_SHOWN = {"id": number, "bytes": size, "retention": duration, "retention_bytes": size}


def _messages(topic: TopicInfo) -> int:
    return sum(one.next - one.earliest for one in topic.partitions)


def _bytes(topic: TopicInfo) -> int:
    return sum(one.bytes for one in topic.partitions)


def _summary(topic: TopicInfo) -> dict[str, Any]:
    return {
        "name": topic.name,
        "id": topic.id,
        "partitions": len(topic.partitions),
        "messages": _messages(topic),
        "bytes": _bytes(topic),
        "retention": topic.retention,
        "retention_bytes": topic.retention_bytes,
        "cleanup": topic.cleanup,
    }


def _ls(args: Namespace) -> int:
    topics = reach.run(args, Client.topics)
    columns = ("name", "partitions", "messages", "bytes", "retention", "retention_bytes")
    table(args, columns, [[_summary(topic)[column] for column in columns] for topic in topics], _SHOWN)
    return OK


def _describe(args: Namespace) -> int:
    _show(args, reach.run(args, lambda mq: mq.describe_topic(args.name)))
    return OK


def _show(args: Namespace, topic: TopicInfo) -> None:
    if args.json:
        emit(_summary(topic) | {"partitions": [one._asdict() for one in topic.partitions]})
        return
    record(args, _summary(topic), _SHOWN)
    rows = [("partition", *one) for one in topic.partitions]
    table(args, ("", "index", "earliest", "next", "bytes"), rows, _SHOWN)


def _create(args: Namespace) -> int:
    async def create(mq: Client) -> TopicInfo:
        try:
            return await mq.create_topic(
                args.name,
                args.partitions,
                retention=args.retention,
                retention_bytes=args.retention_bytes,
                exist_ok=args.exist_ok,
            )
        except TopicExists as error:
            hint = "Change it with idemq topic alter" if args.exist_ok else "--exist-ok accepts it with these settings"
            raise CommandError(f"{error.text}. {hint}, or choose another name. ({error.code})") from error

    record(args, _summary(reach.run(args, create)), _SHOWN)
    return OK


def _alter(args: Namespace) -> int:
    given = vars(args)
    if not given.keys() & {"partitions", "retention", "retention_bytes"}:
        raise CommandError("Say what to change: --partitions, --retention or --retention-bytes.", USAGE)

    before: TopicInfo | None = None

    async def alter(mq: Client) -> TopicInfo:
        nonlocal before
        # The client sets all of a topic's settings at once; what is not named here stays as it is.
        known = before = await mq.describe_topic(args.name)
        return await mq.alter_topic(
            args.name,
            given.get("partitions"),
            retention=given.get("retention", known.retention),
            retention_bytes=given.get("retention_bytes", known.retention_bytes),
        )

    topic = reach.run(args, alter)
    record(args, _summary(topic), _SHOWN)
    if before is not None and len(before.partitions) < len(topic.partitions) and _messages(before):
        say("Keys lead to other partitions from now on: what is sent with a key may overtake what is stored with it.")
    return OK


def _ask(args: Namespace, verb: str) -> None:
    if not args.yes:
        topic = reach.run(args, lambda mq: mq.describe_topic(args.name))
        confirm(args, f"This {verb} topic {args.name}: {counted(_messages(topic), 'message')}, {size(_bytes(topic))}.")


def _purge(args: Namespace) -> int:
    _ask(args, "removes everything in")
    reach.run(args, lambda mq: mq.purge_topic(args.name))
    done(args, "purged", args.name)
    return OK


def _rm(args: Namespace) -> int:
    _ask(args, "deletes")
    reach.run(args, lambda mq: mq.delete_topic(args.name))
    done(args, "deleted", args.name)
    return OK


def _name(parser: Parser) -> None:
    parser.add_argument("name", metavar="TOPIC", type=text)


def _create_arguments(parser: Parser) -> None:
    _name(parser)
    parser.add_argument("--partitions", metavar="N", type=count, default=1, help="default 1")
    parser.add_argument(
        "--retention", metavar="TIME", type=span, help="drop what is older, such as 7d (a plain number is seconds)"
    )
    parser.add_argument(
        "--retention-bytes", metavar="SIZE", type=byte_count, help="drop the oldest beyond this size of a partition"
    )
    parser.add_argument("--exist-ok", action="store_true", help="accept a topic that is there with the same settings")


def _alter_arguments(parser: Parser) -> None:
    _name(parser)
    for option, metavar, kind, about in (
        ("--partitions", "N", count, "as many; they can only grow, and keys lead to other ones then"),
        ("--retention", "TIME", span, "drop what is older, such as 7d (a plain number is seconds), or none"),
        ("--retention-bytes", "SIZE", byte_count, "drop the oldest beyond this size of a partition, or none"),
    ):
        parser.add_argument(option, metavar=metavar, type=kind, default=SUPPRESS, help=about)


def _destroy_arguments(parser: Parser) -> None:
    _name(parser)
    add_yes(parser)


COMMANDS = (
    Command("topic ls", "list topics", lambda parser: None, _ls),
    Command("topic create", "create a topic", _create_arguments, _create),
    Command("topic describe", "show a topic's settings and partitions", _name, _describe),
    Command("topic alter", "change a topic's retention, add partitions", _alter_arguments, _alter),
    Command("topic purge", "remove everything stored in a topic; offsets go on", _destroy_arguments, _purge),
    Command("topic rm", "delete a topic with everything in it", _destroy_arguments, _rm),
)
