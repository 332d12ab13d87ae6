"""`idemq verify`: walk a data directory that no broker uses, and name every broken invariant. Changes nothing."""

from __future__ import annotations

import os
from argparse import Namespace

from ..wire import DATA_DIR
from .arguments import Command, Parser
from .errors import CONFIGURATION, FAILURE, OK, CommandError
from .output import Progress, emit, record, say, table


def _verify(args: Namespace) -> int:
    from idemq.broker.check import verify
    from idemq.broker.store import StoreError

    directory = args.directory or os.environ.get("IDEMQ_DATA_DIR") or DATA_DIR
    with Progress("MiB") as progress:

        def show(read_bytes: int, file_bytes: int) -> None:
            progress.total = file_bytes >> 20
            progress.update(read_bytes >> 20)

        try:
            report = verify(directory, show)
        except StoreError as error:
            raise CommandError(str(error), CONFIGURATION) from error
    summary = {"directory": directory, "clean": report.clean}
    if args.json:
        findings = [one._asdict() for one in report.findings]
        emit(summary | {"died": report.died or None, "rows": report.rows, "findings": findings})
    else:
        died = {"died": report.died} if report.died else {}
        record(args, summary | died | {f"rows of {name}": count for name, count in report.rows.items()})
        if report.findings:
            table(args, ("where", "text"), report.findings)
    if report.clean:
        return OK
    say("Damaged: keep a copy of the directory as it is before anything is tried on it.")
    return FAILURE


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", help=f"the data directory (default $IDEMQ_DATA_DIR, then {DATA_DIR})"
    )


COMMANDS = (Command("verify", "check a data directory that no broker uses", _arguments, _verify, asks_broker=False),)
