"""`idemq bench`: which figures, how many rounds, and how they are shown."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence

from idemq.client.cli.arguments import Parser, count, nearest
from idemq.client.cli.output import listing

from . import figures, groups
from .figures import RATIO, Plan, Row
from .measure import fsync_ms, machine

FIGURES = {**figures.FIGURES, **groups.FIGURES}

QUICK_SCALE = 0.02


def main(argv: Sequence[str]) -> int:
    """Measure, print, return the exit code."""
    arguments = _parser().parse(argv)
    names = list(FIGURES) if arguments.figure == "all" else [arguments.figure]
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    plan = Plan(tuple(arguments.size or (100, 1024)), rounds, QUICK_SCALE if arguments.quick else 1.0)
    directory = tempfile.gettempdir()
    where = machine(directory) | {"fsync_ms": f"{fsync_ms(directory):.2f}"}
    if not arguments.json:
        print("  ".join(f"{name} {value}" for name, value in where.items()))
        print(f"median (min to max) of {rounds} rounds; of dedup in short blocks (and where it lies, to 95 %)")
    rows = asyncio.run(_measure(names, plan, quiet=arguments.json))
    if arguments.json:
        found = [{"figure": row.figure, "unit": row.unit, **row.value._asdict()} for row in rows]
        print(json.dumps({"machine": where, "rounds": rounds, "quick": arguments.quick, "figures": found}))
    return 0


async def _measure(names: list[str], plan: Plan, *, quiet: bool) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        if sys.stderr.isatty():
            print(f"measuring {name} …", file=sys.stderr)
        async for row in FIGURES[name](plan):
            rows.append(row)
            if not quiet:
                median, low, high = (_short(value, row.unit) for value in row.value)
                print(f"{row.figure:<54}{median:>12} {row.unit:<24}({low} to {high})", flush=True)
    return rows


def _short(value: float, unit: str) -> str:
    if unit == RATIO:  # what counts lies close to 1
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _parser() -> Parser:
    parser = Parser(
        "idemq bench",
        "Measure this machine, on a broker of its own in $TMPDIR. Compare ratios taken in one run. "
        "All figures take about 20 minutes, with --quick about two.",
    )
    abouts = {name: (measure.__doc__ or "").partition("\n")[0] for name, measure in FIGURES.items()}
    parser.epilog = f"figures:\n{listing(abouts)}"
    parser.add_argument("figure", metavar="FIGURE", nargs="?", default="all", type=_figure, help="default all")
    parser.add_argument(
        "--size", type=count, action="append", metavar="BYTES", help="of a value; may be repeated (default 100, 1024)"
    )
    parser.add_argument("--rounds", type=count, metavar="N", help="rounds of each figure (default 5, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="a small part of the messages: does it work here?")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _figure(text: str) -> str:
    if text != "all" and text not in FIGURES:
        raise argparse.ArgumentTypeError(f"there is no figure {text!r}{nearest(text, FIGURES)}")
    return text
