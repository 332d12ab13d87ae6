"""How commands are declared, and what their arguments are made of. argparse, with suggestions instead of lists.

Every command is parsed by a parser of its own, made when it is called: options may stand between and behind positional
arguments (argparse's sub-commands cannot do that), and a start costs one parser.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from .errors import USAGE, CommandError
from .output import columns, wrapped


class Parser(argparse.ArgumentParser):
    """argparse's, with the nearest name in place of all of them."""

    def __init__(self, prog: str, description: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        shown = "\n".join(wrapped(description, columns()))
        super().__init__(prog=prog, description=shown, allow_abbrev=False, formatter_class=raw)

    @property
    def options(self) -> list[str]:
        """All it knows, as they are written."""
        return [option for action in self._actions for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """One line, and where to read more."""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse(self, argv: Sequence[str], known: argparse.Namespace | None = None) -> argparse.Namespace:
        """The arguments of a command, added to those that stood before it."""
        args, extra = self.parse_known_intermixed_args(argv, known)
        if extra:
            hint = nearest(extra[0].partition("=")[0], self.options) if extra[0].startswith("-") else ""
            self.error(f"{extra[0]!r} is not expected here{hint}")
        return args


class Command(NamedTuple):
    """A command of our own. `run` returns the exit code."""

    name: str
    about: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]
    asks_broker: bool = True
    """It reaches a running broker, so that it takes the options that say how."""

    @property
    def options(self) -> set[str]:
        """The common options that it takes."""
        return set(COMMON) if self.asks_broker else {"json"}


class Delegated(NamedTuple):
    """A command with a parser elsewhere: `run` gets its arguments as they are."""

    name: str
    about: str
    run: Callable[[list[str]], int]
    options: frozenset[str] = frozenset()
    """It takes none of the common ones here."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`: did you mean NAME?`, or nothing when no name is near."""
    found = difflib.get_close_matches(word, [one for one in known if one != word], n=1, cutoff=0.5)
    return f": did you mean {found[0]}?" if found else ""


def add_common(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Those of the common options; absent from the namespace unless given, so that they may stand before it too."""
    group = parser.add_argument_group("common options")
    for name in COMMON:
        if name in names:
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, **COMMON[name])


def add_yes(parser: Parser) -> None:
    """For commands that destroy something."""
    parser.add_argument("--yes", action="store_true", help="do not ask")


def confirm(args: argparse.Namespace, what: str) -> None:
    """Ask before something is destroyed. Raises CommandError unless the answer is yes."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{what} Nobody can be asked here: add --yes to do it.", USAGE)
    sys.stderr.write(f"{what} Go on? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("Nothing was changed.")


# --------------------------------------------------------------------------------------------------- argument types
# Raise ArgumentTypeError: argparse puts the option's name before the text.


def text(value: str) -> str:
    """Text that is UTF-8: everything that has a name."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def seconds(value: str) -> float:
    """A number of seconds above 0."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1e9:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds above 0")
    return number


def count(value: str) -> int:
    """A whole number above 0."""
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number above 0")
    return int(value)


def index(value: str) -> int:
    """A whole number from 0 on."""
    if not value.isascii() or not value.isdigit():
        raise argparse.ArgumentTypeError(f"{value!r} is no whole number from 0 on")
    return int(value)


def span(value: str) -> str | float | None:
    """A length of time, `7d` or a number of seconds, as the client takes it; None for `none`."""
    if value == "none":
        return None
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else text(value)


def byte_count(value: str) -> int | None:
    """A number of bytes, `10GiB` or plain; None for `none`."""
    if value == "none":
        return None
    match = re.fullmatch(r"(\d+)\s*(|KiB|MiB|GiB|TiB)", value, re.ASCII)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{value!r} is no size such as 10GiB, nor a number of bytes")
    shift: int = 10 * ("", "KiB", "MiB", "GiB", "TiB").index(match[2])
    return int(match[1]) << shift


def start(value: str) -> Any:
    """Where to read from, as the client takes it: earliest, latest, an offset, or a time."""
    if value in ("earliest", "latest"):
        return value
    if value.isascii() and value.isdigit():
        return int(value)
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone() if moment.tzinfo is None else moment
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{value!r} is none of earliest, latest, an offset, a time such as 2026-01-31T12:00"
        ) from None


COMMON: dict[str, dict[str, Any]] = {
    "url": {"type": text, "help": "the broker (default $IDEMQ_URL, then idemq://localhost:7750)"},
    "token": {"type": text, "help": "its token; better in $IDEMQ_TOKEN or $IDEMQ_TOKEN_FILE, which others cannot see"},
    "timeout": {"type": seconds, "metavar": "SECONDS", "help": "how long to wait for an answer (default 10)"},
    "json": {"action": "store_true", "help": "print JSON"},
}
"""Options with one meaning for all commands."""
