"""Producers: the row of a name, what commits make of it, and the rules that need nothing but that row.

Pure: no clock, no store, no connection. A rule takes the row as it is decided and returns what it becomes, or
the refusal. The numbers are those of PROTOCOL.md.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from idemq.client.wire import Code, Commit, Failed, Open, Position

TAKEOVERS_REMEMBERED = 4
"""Ends of earlier epochs kept in a row; an older asker is told that its outcome is unknown."""


Result = tuple[int, int, tuple[Position, ...]]
"""What a commit was answered, kept for its repetition: (last_seq, fingerprint, positions). Every commit makes one, and
one with names would take eight times as long."""


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
    """What commits changed in a row: all that has to be stored of it where the row before is known."""

    seen_ms: int
    token: bytes | None
    kept: int
    """How many results the row has afterwards."""
    results: tuple[Result, ...]
    """The new ones, at least one."""


class Producer:
    """A producer as it is decided. A commit changes it in place; its row is made once for all commits of a group."""

    __slots__ = ("_remember", "_results", "_row", "_seen_ms", "_token", "epoch", "last_seq", "name")

    def __init__(self, row: ProducerRow, remember: int) -> None:
        """The last `remember` results stay."""
        self._row = row
        self._remember = remember
        self._results: list[Result] = []
        """Those that the row has not yet."""
        self.name = row.name
        self.epoch = row.epoch
        self.last_seq = row.last_seq
        self._token = row.token
        self._seen_ms = row.seen_ms

    def commit(
        self, last_seq: int, token: bytes | None, fingerprint: int, positions: tuple[Position, ...], now_ms: int
    ) -> None:
        """Rule 8: a commit is applied."""
        self.last_seq = last_seq
        if token is not None:
            self._token = token
        self._seen_ms = now_ms
        self._results.append((last_seq, fingerprint, positions))

    def row(self) -> ProducerRow:
        """As it is decided now."""
        if self._results:
            # The constructor and not `_replace`, which takes three times as long: every group comes through here.
            number, name, epoch, session, _, _, holder, address, opened_ms, _, anonymous, takeovers, results = self._row
            self._row = ProducerRow(
                number,
                name,
                epoch,
                session,
                self.last_seq,
                self._token,
                holder,
                address,
                opened_ms,
                self._seen_ms,
                anonymous,
                takeovers,
                (*results, *self._results)[-self._remember :],
            )
            self._results = []
        return self._row


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


def remembered(row: ProducerRow, last_seq: int, fingerprint: int) -> tuple[Position, ...] | None:
    """What exactly this commit was answered, if it is among the last K."""
    return next((positions for *commit, positions in row.results if commit == [last_seq, fingerprint]), None)


def fenced(row: ProducerRow, epoch: int) -> Failed:
    """Rule 3's refusal: who holds the name now, and where the asker's epoch ended (None: no longer known)."""
    ended_at = next((takeover.ended_at for takeover in row.takeovers if takeover.epoch == epoch), None)
    return Failed(
        Code.PRODUCER_FENCED,
        f"producer {row.name!r} was opened by {row.holder or 'another client'} from {row.address or 'elsewhere'}",
        {"holder": row.holder, "address": row.address, "opened_ms": row.opened_ms, "ended_at": ended_at},
    )


def conflict(row: ProducerRow, commit: Commit) -> Failed | None:
    """Rule 5 for a number that is stored with no equal result: a conflict inside the remembered range, else nothing."""
    if row.results and commit.last_seq >= row.results[0][0]:
        return Failed(
            Code.SEQUENCE_CONFLICT, f"number {commit.last_seq} of producer {row.name!r} was stored with other content"
        )
    return None


def gap(row: ProducerRow, commit: Commit) -> Failed:
    """Rule 6's refusal: what the commit must follow."""
    return Failed(
        Code.SEQUENCE_GAP,
        f"producer {row.name!r} is at {row.last_seq}, the commit follows {commit.prev_seq}",
        {"expected": row.last_seq},
    )


def advance(known: ProducerRow, row: ProducerRow) -> Advance | None:
    """What leads from `known` to `row`; None when not commits alone lie between them: an Open gives a new epoch."""
    new = row.results[bisect_left(row.results, (known.last_seq + 1,)) :]
    if not new or row.epoch != known.epoch:
        return None
    return Advance(row.seen_ms, row.token, len(row.results), new)


def advanced_by(row: ProducerRow, advance: Advance) -> ProducerRow:
    """The row after what `advance` tells. One that is there already changes nothing, so that it may be told again."""
    if advance.results[-1][0] <= row.last_seq:
        return row
    new = advance.results[bisect_left(advance.results, (row.last_seq + 1,)) :]
    return row._replace(
        last_seq=new[-1][0],
        token=advance.token,
        seen_ms=advance.seen_ms,
        results=(row.results + new)[-advance.kept :],
    )
