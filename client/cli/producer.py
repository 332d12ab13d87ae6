"""`idemq producer`: the names the broker keeps, and their last numbers."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from ..client import Client
from ..engine import ProducerInfo
from . import reach
from .arguments import Command, Parser, add_yes, confirm, text
from .errors import OK
from .output import counted, done, moment, number, record, say, table, text_or_base64

_SHOWN = {"id": number, "epoch": number, "last_seq": number, "last_seen": moment}


def _ls(args: Namespace) -> int:
    columns = ("name", "id", "epoch", "last_seq", "last_holder", "last_seen")
    found = reach.run(args, Client.producers)
    named = found if args.all else [one for one in found if not one.name.startswith("~")]
    table(args, columns, [[_fields(one)[column] for column in columns] for one in named], _SHOWN)
    if len(named) < len(found) and sys.stdout.isatty() and not args.json:
        say(f"Not listed: {counted(len(found) - len(named), 'anonymous producer')} (--all lists them, too).")
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


def _ls_arguments(parser: Parser) -> None:
    parser.add_argument("--all", action="store_true", help="anonymous ones too, whose names begin with ~")


def _name(parser: Parser) -> None:
    parser.add_argument("name", metavar="PRODUCER", type=text)


def _rm_arguments(parser: Parser) -> None:
    _name(parser)
    add_yes(parser)


COMMANDS = (
    Command("producer ls", "list producer names", _ls_arguments, _ls),
    Command("producer describe", "show a producer: last number, token, who held it last", _name, _describe),
    Command("producer rm", "forget a producer and its numbers", _rm_arguments, _rm),
)
