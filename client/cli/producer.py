"""`idemq producer`: the names the broker keeps, and their last numbers."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..client import Client
from ..engine import ProducerInfo
from . import reach
from .arguments import Command, Parser, add_yes, confirm, text
from .errors import OK
from .output import done, moment, number, record, table, text_or_base64

_SHOWN = {"id": number, "epoch": number, "last_seq": number, "last_seen": moment}


def _ls(args: Namespace) -> int:
    columns = ("name", "id", "epoch", "last_seq", "last_holder", "last_seen")
    found = reach.run(args, Client.producers)
    table(args, columns, [[_fields(one)[column] for column in columns] for one in found], _SHOWN)
    return OK


def _fields(one: ProducerInfo) -> dict[str, Any]:
    fields = one._asdict()
    fields["last_holder"] = fields.pop("holder")  # it may be gone: the broker keeps names, not their processes
    fields["last_seen"] = fields.pop("last_seen")  # the order shown
    return fields | text_or_base64("token", fields.pop("token"))


def _describe(args: Namespace) -> int:
    record(args, _fields(reach.run(args, lambda mq: mq.describe_producer(args.name))), _SHOWN)
    return OK


def _rm(args: Namespace) -> int:
    if not args.yes:
        one = reach.run(args, lambda mq: mq.describe_producer(args.name))
        confirm(
            args,
            f"This forgets producer {one.name} and its last number {one.last_seq}: "
            "what it sent before is stored a second time if it is sent again.",
        )
    reach.run(args, lambda mq: mq.delete_producer(args.name))
    done(args, "deleted", args.name)
    return OK


def _name(parser: Parser) -> None:
    parser.add_argument("name", metavar="PRODUCER", type=text)


def _rm_arguments(parser: Parser) -> None:
    _name(parser)
    add_yes(parser)


COMMANDS = (
    Command("producer ls", "list producer names; those that begin with ~ are anonymous", lambda parser: None, _ls),
    Command("producer describe", "show a producer: last number, token, who held it last", _name, _describe),
    Command("producer rm", "forget a producer and its numbers", _rm_arguments, _rm),
)
