"""How commands print: aligned tables on a terminal, tab-separated without a header in a pipe, JSON when asked for.

Results go to stdout, everything said about them to stderr. What came from elsewhere (a client's name, a holder) is
printed with its control characters escaped: it may not steer the terminal, nor break a line in two.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

Shown = Mapping[str, Callable[[Any], str]]
"""How a terminal shows the values of a field; a pipe and JSON get them raw."""

REFRESH_S = 0.1


def say(text: str) -> None:
    """A sentence for people, on stderr."""
    sys.stderr.write(f"{plain(text)}\n")
    sys.stderr.flush()


def tell(paragraph: str) -> None:
    """Sentences for people, on stderr: a terminal gets them in lines of its width, a pipe in one."""
    for line in wrapped(plain(paragraph), columns()) if sys.stderr.isatty() else [plain(paragraph)]:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def wrapped(paragraph: str, columns: int, indent: str = "") -> list[str]:
    """Its lines; `indent` stands before all but the first. Words, options with dashes in them too, stay whole."""
    return textwrap.wrap(paragraph, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def columns() -> int:
    """The width of the terminal; 80 where there is none."""
    return shutil.get_terminal_size().columns


def listing(names: Mapping[str, str]) -> str:
    """Names and what is said about them, for a help text."""
    width = max(map(len, names))
    return "\n".join(
        line
        for name, about in names.items()
        for line in wrapped(f"  {name.ljust(width)}  {about}", columns(), " " * (width + 4))
    )


def emit(document: Any) -> None:
    """One JSON document (or one of several lines of them)."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")


def table(args: Namespace, columns: Sequence[str], rows: Sequence[Sequence[Any]], shown: Shown | None = None) -> None:
    """Rows of equal columns. As JSON: one list of objects."""
    if args.json:
        emit([dict(zip(columns, row, strict=True)) for row in rows])
    elif not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(map(_raw, row)) + "\n" for row in rows)
    elif rows:
        cells = [[_show(name, value, shown) for name, value in zip(columns, row, strict=True)] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        numeric = [all(isinstance(row[index], int | None) for row in rows) for index in range(len(columns))]
        for line in (columns, *cells):
            padded = (
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            )
            sys.stdout.write("  ".join(padded).rstrip() + "\n")
    else:
        say("There is none.")


def record(args: Namespace, fields: Mapping[str, Any], shown: Shown | None = None) -> None:
    """One thing: a line for each field, name and value. As JSON: one object."""
    if args.json:
        emit(fields)
    elif not sys.stdout.isatty():
        sys.stdout.writelines(f"{name}\t{_raw(value)}\n" for name, value in fields.items())
    else:
        width = max(map(len, fields))
        for name, value in fields.items():
            sys.stdout.write(f"{name.replace('_', ' ').ljust(width)}  {_show(name, value, shown)}\n")


def done(args: Namespace, verb: str, name: str) -> None:
    """What was done to something, which is gone now: said as JSON, `{"deleted": NAME}`, and else by the exit code."""
    if args.json:
        emit({verb: name})


def _raw(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else plain(str(value))


def _show(name: str, value: Any, shown: Shown | None) -> str:
    if value is None:
        return "-"
    if shown and name in shown:
        return plain(shown[name](value))
    return f"{value:,}" if type(value) is int else _raw(value)


def plain(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def size(count: int) -> str:
    """Bytes, for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def counted(count: int, what: str) -> str:
    """So many of something, the plural made with an s."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as the largest unit that divides them, the way `--retention` takes them."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds * 1000:.0f}ms"


def moment(milliseconds: int) -> str:
    """A time since 1970 in this machine's time zone; the number, where that is no time."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return str(milliseconds)


def number(value: int) -> str:
    """An identifier: no separators."""
    return str(value)


def text_or_base64(name: str, value: bytes | None) -> dict[str, Any]:
    """Bytes as JSON fields: text where they are UTF-8; else base64, and a second field says so."""
    if value is None:
        return {name: None}
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {name: base64.b64encode(value).decode(), f"{name}_base64": True}


class Progress:
    """A line on stderr with count, rate and time left, rewritten in place; silent when stderr is no terminal."""

    def __init__(self, unit: str, total: int | None = None) -> None:
        self._unit = unit
        """What is counted, in the plural."""
        self.total = total
        """What `done` comes to in the end; None while that is not known."""
        self._terminal = sys.stderr.isatty()
        self._started = self._shown_at = time.monotonic()
        self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def update(self, count: int, done: int | None = None, extra: str = "") -> None:
        """`count` units so far; `done` of `total` (bytes, say) where that is another measure than the units."""
        now = time.monotonic()
        if not self._terminal or now - self._shown_at < REFRESH_S:
            return
        self._shown_at, elapsed = now, now - self._started
        unit = self._unit.removesuffix("s") if count == 1 else self._unit
        line = f"{count:,} {unit}, {count / elapsed:,.0f}/s"
        done = count if done is None else done
        if self.total and done:
            left = round(elapsed * max(self.total - done, 0) / done)
            line += f", {min(done / self.total, 1):.0%}, {left // 60}:{left % 60:02} left"
        if extra:
            line += f", {extra}"
        # A line that the terminal must wrap could not be taken back; the last column stays free for the cursor.
        sys.stderr.write(f"\r{line[: columns() - 1]}\x1b[K")
        sys.stderr.flush()
        self._drawn = True

    def clear(self) -> None:
        """Take the line away, so that something else can be written."""
        if self._drawn:
            self._drawn = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
