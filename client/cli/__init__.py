"""The `idemq` command. Finds the command, parses its arguments, and turns what goes wrong into a sentence and a code.

Nothing of the broker is imported before a command needs it, so that `idemq ping` starts as fast as the client does.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import REMAINDER, SUPPRESS, Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from . import demo, dlq, group, probe, producer, pub, serve, sub, topic, verify
from .arguments import COMMON, Command, Delegated, Parser, add_common, nearest
from .errors import INTERRUPTED, OK, TERMINATED, USAGE, explain
from .output import listing, plain

ABOUT = "A self-hosted message broker for effectively-once processing: what is sent again is stored once."

COMMANDS: dict[str, Command | Delegated] = {
    command.name: command
    for command in (
        serve.SERVE,
        *demo.COMMANDS,
        *probe.COMMANDS,
        *topic.COMMANDS,
        *pub.COMMANDS,
        *sub.COMMANDS,
        *group.COMMANDS,
        *producer.COMMANDS,
        *dlq.COMMANDS,
        *verify.COMMANDS,
        serve.BENCH,
    )
}
"""By their full names, in the order in which help lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Never raises for what a user can do."""
    with _terminated_as_interrupted() as terminated:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    return TERMINATED if code == INTERRUPTED and terminated else code


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """Have SIGTERM do what Ctrl-C does: children are ended, temporary directories removed. Yields those that came."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handler = signal.getsignal(signal.SIGINT)  # asyncio has its own; a shell's background job ignores it
        (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(argv: list[str]) -> int:
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal's encoding lacks is printed escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = _dispatch(argv)
        except SystemExit as end:  # argparse: help was printed, or what is wrong
            code = end.code if isinstance(end.code, int) else USAGE
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough: no failure of ours, and the interpreter must not try to write again.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        sentence, code = explained
        sys.stderr.write("\n".join(map(plain, f"idemq: {sentence}".splitlines())) + "\n")
    return code


def _dispatch(argv: list[str]) -> int:
    top = Parser("idemq", ABOUT)
    top.usage = "idemq [OPTIONS] COMMAND ..."
    top.epilog = f"commands:\n{_listing(COMMANDS)}\n\n`idemq COMMAND --help` tells more."
    add_common(top, COMMON)
    top.add_argument("--version", action="store_true", help="print the version")
    top.add_argument("words", nargs=REMAINDER, help=SUPPRESS)
    given, extra = top.parse_known_args(argv)
    words: list[str] = given.words
    if extra:
        top.error(f"{extra[0]!r} is not expected here{nearest(extra[0], top.options)}")
    if given.version:
        from idemq import __version__

        sys.stdout.write(f"idemq {__version__}\n")
        return OK
    if not words:
        top.print_help(sys.stderr)
        return USAGE
    name = words.pop(0)
    family = [known for known in COMMANDS if known.startswith(f"{name} ")]
    if family:
        if not words or words[0] in ("-h", "--help"):
            shown = f"usage: idemq {name} COMMAND ...\n\n{_listing(family)}\n"
            (sys.stdout if words else sys.stderr).write(shown)
            return OK if words else USAGE
        name = f"{name} {words.pop(0)}"
    command = COMMANDS.get(name)
    if command is None:
        heads = family or list(dict.fromkeys(known.split()[0] for known in COMMANDS))
        top.error(f"there is no command {name!r}{nearest(name, heads)}")
    before = vars(given)
    del before["words"], before["version"]
    strange = before.keys() - command.options
    if strange:
        top.error(f"--{min(strange)} is no option of {name}")
    if isinstance(command, Delegated):
        return command.run(words)
    parser = Parser(f"idemq {name}", f"{command.about[0].upper()}{command.about[1:]}.")
    command.arguments(parser)
    add_common(parser, command.options)
    defaults = dict.fromkeys(COMMON) | {"json": False}
    return command.run(parser.parse(words, Namespace(**(defaults | before))))


def _listing(names: Iterable[str]) -> str:
    return listing({name: COMMANDS[name].about for name in names})
