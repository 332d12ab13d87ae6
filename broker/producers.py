"""Producers: the row of a name, what commits make of it, and the rules that need nothing but that.

Pure: no clock, no store, no connection. A rule takes the producer as it is decided, or its row, and returns
what becomes of it, what it was answered, or the refusal. The numbers are those of PROTOCOL.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain, starmap
from struct import Struct
from typing import NamedTuple

from idemq.client.wire import Code, Failed, Open, Position

TAKEOVERS_REMEMBERED = 4
"""Ends of earlier epochs kept in a row; an older asker is told that its outcome is unknown."""

Result = bytes
"""What a commit was answered, kept for its repetition: last_seq i64, fingerprint u32, then of each batch offset and
timestamp_ms i64, little-endian. Packed at once, because every commit leaves one."""
_HEAD = Struct("<qI")
_POSITION = Struct("<qq")
single_result = Struct("<qIqq").pack
"""Of a commit with one batch: (last_seq, fingerprint, offset, timestamp_ms)."""


class Takeover(NamedTuple):
    """Where an earlier epoch ended: all of its commits up to `ended_at` are stored, and none above."""

    epoch: int
    ended_at: int


class ProducerRow(NamedTuple):
    """Everything the broker knows of a producer name. Immutable: what is in flight to the disk never changes."""

    producer_id: int
    name: str
    epoch: int
    session: str
    last_seq: int
    token: bytes | None
    holder: str
    """Who opened this epoch, as it called itself, for people."""
    address: str
    opened_ms: int
    seen_ms: int
    anonymous: bool
    takeovers: tuple[Takeover, ...]
    results: tuple[Result, ...]


class Advance(NamedTuple):
    """What commits made of a row, in as much as it is new: all that has to be stored where the row before is known."""

    seen_ms: int
    token: bytes | None
    kept: int
    """How many results the row has afterwards."""
    results: tuple[Result, ...]
    """The new ones, at least one."""


class Producer:
    """A producer as it is decided. What is new is told once for all of a group.

    The core applies commits in place (rule 8): a method's call was a quarter of what deduplication cost there.
    """

    __slots__ = (
        "_results_max",
        "_row",
        "_stored",
        "_told",
        "epoch",
        "last_seq",
        "name",
        "seen_ms",
        "serial",
        "token",
        "untold",
    )

    def __init__(self, row: ProducerRow, results_max: int, stored: bool) -> None:
        """The last `results_max` results stay. `stored`: the row comes from the store."""
        self._row = row._replace(results=())
        """As it was, without its results, which go when others come: they are in `_told`."""
        self._results_max = results_max
        self._stored = stored
        self._told = deque(row.results, results_max)
        self.untold: list[Result] = []
        """Of the commits since then. Empty unless the group being built will ask."""
        self.name = row.name
        self.epoch = row.epoch
        self.last_seq = row.last_seq
        self.token = row.token
        self.seen_ms = row.seen_ms
        self.serial = 0
        """The newest connection, as the core's `_serials` have it, which a commit need not ask then; 0: ask."""

    def results(self) -> tuple[Result, ...]:
        """Of the last commits."""
        return (*self._told, *self.untold)[-self._results_max :]

    def row(self) -> ProducerRow:
        """As it is decided now."""
        return self._row._replace(
            last_seq=self.last_seq, token=self.token, seen_ms=self.seen_ms, results=self.results()
        )

    def tell(self) -> ProducerRow | Advance:
        """What of it is to be stored, after at least one commit, or because the row is new.

        The whole row every time was most of what deduplication cost.
        """
        untold, self.untold = self.untold, []
        self._told.extend(untold)
        if self._stored:
            return Advance(self.seen_ms, self.token, len(self._told), tuple(untold[-self._results_max :]))
        self._stored = True
        return self.row()


def opening(
    row: ProducerRow | None, request: Open, number: int, holder: str, address: str, now_ms: int
) -> ProducerRow | Failed:
    """Rule 10: the row after this Open, or OPEN_RACE. `number` is the next of the store-wide counter."""
    if row is None:
        if request.expected_epoch:
            return Failed(Code.OPEN_RACE, f"producer {request.name!r} does not exist", {"epoch": 0})
        return ProducerRow(
            producer_id=number,
            name=request.name,
            epoch=number,
            session=request.session,
            last_seq=-1,
            token=None,
            holder=holder,
            address=address,
            opened_ms=now_ms,
            seen_ms=now_ms,
            anonymous=request.anonymous,
            takeovers=(),
            results=(),
        )
    if row.session == request.session:
        return row
    if request.expected_epoch != row.epoch:
        return Failed(Code.OPEN_RACE, f"producer {request.name!r} is at another epoch", {"epoch": row.epoch})
    return row._replace(
        epoch=number,
        session=request.session,
        holder=holder,
        address=address,
        opened_ms=now_ms,
        seen_ms=now_ms,
        takeovers=(*row.takeovers, Takeover(row.epoch, row.last_seq))[-TAKEOVERS_REMEMBERED:],
    )


def remembered(producer: Producer, last_seq: int, fingerprint: int) -> list[Position] | None:
    """What exactly this commit was answered, if it is among the last K."""
    head = _HEAD.pack(last_seq, fingerprint)
    return next((positions_of(result) for result in producer.results() if result.startswith(head)), None)


def result_of(last_seq: int, fingerprint: int, positions: Iterable[Position]) -> Result:
    """What a commit was answered, to be kept."""
    return b"".join((_HEAD.pack(last_seq, fingerprint), *starmap(_POSITION.pack, positions)))


def last_seq_of(result: Result) -> int:
    """The last number of its commit."""
    last_seq: int = _HEAD.unpack_from(result)[0]
    return last_seq


def positions_of(result: Result) -> list[Position]:
    """Where its batches lie."""
    return list(map(Position._make, _POSITION.iter_unpack(result[_HEAD.size :])))


def fenced(row: ProducerRow, epoch: int) -> Failed:
    """Rule 3's refusal: who holds the name now, and where the asker's epoch ended (None: no longer known)."""
    ended_at = next((takeover.ended_at for takeover in row.takeovers if takeover.epoch == epoch), None)
    return Failed(
        Code.PRODUCER_FENCED,
        f"producer {row.name!r} was opened by {row.holder or 'another client'} from {row.address or 'elsewhere'}",
        {"holder": row.holder, "address": row.address, "opened_ms": row.opened_ms, "ended_at": ended_at},
    )


def conflict(producer: Producer, last_seq: int) -> Failed | None:
    """Rule 5 for a number that is stored with no equal result: a conflict inside the remembered range, else nothing."""
    results = producer.results()
    if results and last_seq >= last_seq_of(results[0]):
        return Failed(
            Code.SEQUENCE_CONFLICT, f"number {last_seq} of producer {producer.name!r} was stored with other content"
        )
    return None


def gap(producer: Producer, prev_seq: int) -> Failed:
    """Rule 6's refusal: what the commit must follow."""
    return Failed(
        Code.SEQUENCE_GAP,
        f"producer {producer.name!r} is at {producer.last_seq}, the commit follows {prev_seq}",
        {"expected": producer.last_seq},
    )


def advanced_by(row: ProducerRow, advances: Sequence[Advance]) -> ProducerRow:
    """The row after these, in their order. What it has already changes nothing, so that it may be told again."""
    results = list(chain.from_iterable([advance.results for advance in advances]))
    new = results[bisect_left(results, row.last_seq + 1, key=last_seq_of) :]
    if not new:
        return row
    last = advances[-1]
    return row._replace(
        last_seq=last_seq_of(new[-1]),
        token=last.token,
        seen_ms=last.seen_ms,
        results=(*row.results, *new)[-last.kept :],
    )
