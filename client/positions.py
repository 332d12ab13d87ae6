"""Where reading stands in each partition, pure: what is fetched, handed out, about to be stored and stored.

    committed <= planned <= delivered <= fetched

The rules of a group's positions:

- What is handed out of a partition under one lease, from the stored position on, belongs together (`Leased`), until it
  is taken back: then all that is not stored is handed out again, as another. The old messages move nothing any more,
  though the lease would allow it: what is handed out again is in front of them. What was under way for them may be
  stored yet, and is then not handed out again.
- A transaction begins where those under way end (`planned`), so that several follow each other, and none is stored
  behind one that is not. Whatever ends badly, or nobody knows how, is taken back; the broker compares positions, so
  that what was stored after all is stored once. Whoever learns where the position is goes on there.
- What an open block is about (`opened`) is passed by no transaction: it was handed out, and is not done with.
- A plain commit (`PlainCommit`) is forward only. It moves what may be moved, and says of the rest why not. A position
  whose lease ended where it was to be, or behind, is moved already (C6 of `broker/PROTOCOL.md`).
- Under another lease nothing of this one moves: a seek begins anew. The user goes on having the partition; that it
  comes and goes he is told by turns.
- A partition that is revoked is given back when nothing of it is in hand: handed out and not done with, or on its way
  to the broker.
- That an attempt begins or has ended is numbered (rule 18 of `broker/PROTOCOL.md`): taking back ends the one that is
  under way, and a position that moves ends it by itself.

It may not know a task, a clock, a connection, nor who reads and handles; what it decides is done by `group.py` and, for
transactions, by `transaction.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from . import wire
from .errors import IdemqError, InvalidRequest, LeaseLost, OffsetConflict, TransactionAborted
from .membership import Changes
from .records import UNLEASED, Delivery, Message, StoredBatch
from .wire import TopicPartition

Piece = tuple[StoredBatch, int, int]
"""Some messages of one batch: it, the first index, behind the last."""


class Reading:
    """Where reading one partition stands."""

    __slots__ = ("bytes", "delivered", "delivery", "end", "fetched", "key", "paused", "pieces", "served_last", "topic")

    def __init__(self, topic: str, key: TopicPartition, start: int, end: int, delivery: Delivery = UNLEASED) -> None:
        self.topic = topic
        self.key = key
        self.fetched = start
        """The next offset to fetch."""
        self.delivered = start
        """The next offset to hand out."""
        self.end = end
        """Where the partition ended at the last fetch."""
        self.delivery = delivery
        self.paused = False
        """Nothing is fetched or handed out."""
        self.pieces: deque[Piece] = deque()
        """What is fetched and not handed out."""
        self.bytes = 0
        self.served_last = 0
        """When it last got something, or nobody did, as a rising number: the lowest is asked for first."""

    @property
    def name(self) -> tuple[str, int]:
        """(topic, partition), for people."""
        return self.topic, self.key.partition


class Leased(Delivery):
    """One partition under one lease, and what of it was handed out since its messages were last taken back."""

    __slots__ = (
        "committed",
        "metadata",
        "open",
        "pending",
        "planned",
        "positions",
        "reading",
        "state",
        "tenure",
        "turns",
    )

    def __init__(self, positions: Positions, lease: wire.Lease, topic: str) -> None:
        super().__init__(lease.lease, lease.next, lease.attempts, lease.suspects_end)
        self.positions = positions
        key = TopicPartition(lease.topic_id, lease.partition)
        self.reading = Reading(topic, key, lease.next, lease.next, self)
        self.metadata = lease.metadata
        """What the position's last mover stored with it."""
        self.committed = lease.next
        """The stored position, as far as is known."""
        self.planned = lease.next
        """Where it will be once the transactions under way are stored."""
        self.open: set[Move] = set()
        """Of transactions whose block has not ended."""
        self.pending = 0
        """Transactions and commits under way."""
        self.state: Literal["held", "releasing", "gone", "stale"] = "held"
        """held -> releasing -> gone, or at once; stale: its messages are handed out again by another in its place."""
        self.tenure = lease.lease
        """The first lease since the partition was granted: it stays the same over taking back and seeking."""
        self.turns = 0
        """How often the broker was told that an attempt begins or has ended (`wire.Offset`): odd, while one is under
        way, which is at `head`."""

    def moved(self, end: int) -> None:
        """The position is stored at `end`."""
        if end > self.committed:
            self.committed = self.head = end
            self.attempts = 0
            self.turns += self.turns % 2
        self.planned = max(self.planned, self.committed)

    def attempt_entry(self, offset: int, attempts: int, begins: bool) -> wire.Offset:
        """What tells the broker how often the head was tried in vain, and that one more attempt begins, or that none is
        under way."""
        self.head, self.attempts = offset, attempts
        self.turns += self.turns % 2 + begins
        return self.entry(offset, offset)._replace(attempts=attempts, turns=self.turns)

    def entry(self, start: int, end: int, metadata: bytes | None = None) -> wire.Offset:
        """What moves the position."""
        return wire.Offset(self.positions.group, *self.reading.key, self.lease, start, end, metadata)

    def again(self, lease: wire.Lease | None = None) -> Leased:
        """The same partition from the stored position on, or under another lease."""
        same = wire.Lease(
            *self.reading.key, self.lease, self.committed, self.attempts, self.suspects_end, self.metadata
        )
        leased = Leased(self.positions, lease or same, self.reading.topic)
        leased.reading.end, leased.reading.paused = self.reading.end, self.reading.paused
        leased.tenure = self.tenure
        leased.turns = 0 if lease else self.turns
        return leased


class Move:
    """One position that a commit or transaction moves."""

    __slots__ = ("end", "first", "leased")

    def __init__(self, leased: Leased, first: int, end: int) -> None:
        self.leased = leased
        self.first = first
        """The first message it is about."""
        self.end = end


def moves(what: object) -> list[Move]:
    """Where positions go when these are done with: a message, a batch, or messages. Raises InvalidRequest."""
    found: dict[Leased, Move] = {}
    for batch, start, stop in _pieces(what):
        leased = batch.delivery
        if not isinstance(leased, Leased):
            raise InvalidRequest("a position belongs to a group: subscribe(…, group=NAME)")
        move = found.setdefault(leased, Move(leased, batch.offset + start, 0))
        move.first = min(move.first, batch.offset + start)
        move.end = max(move.end, batch.offset + stop)
    return list(found.values())


def _pieces(what: object) -> Iterable[Piece]:
    if isinstance(what, Message):
        return [(what[0], what[1], what[1] + 1)]
    pieces = getattr(what, "pieces", None)
    if isinstance(pieces, list):
        return pieces
    if isinstance(what, Sequence) and all(isinstance(one, Message) for one in what):
        return [(one[0], one[1], one[1] + 1) for one in what]
    raise InvalidRequest(f"a message, a batch or a list of messages can be committed, not {type(what).__name__}")


# ------------------------------------------------------------------------------------------------- in a transaction


def opened(moved: Iterable[Move]) -> None:
    """The block of a transaction that moves these is under way; `closed` when it ends, before `plan`."""
    for move in moved:
        move.leased.open.add(move)


def closed(moved: Iterable[Move]) -> None:
    """The block has ended."""
    for move in moved:
        move.leased.open.discard(move)


def plan(moved: Sequence[tuple[Move, bytes | None]]) -> list[wire.Offset]:
    """The entries with which a transaction moves these positions, with metadata. Raises OffsetConflict, LeaseLost.

    It is under way then, until `stored` or `aborted`.
    """
    entries: list[wire.Offset] = []
    immovable = _immovable(move for move, _ in moved)
    for move, metadata in moved:
        leased = move.leased
        if leased in immovable:
            raise immovable[leased]
        if move.first < leased.planned:
            raise _conflict(move, "was committed before")
        if any(leased.planned <= other.first < move.first for other in leased.open):
            raise _conflict(move, "follows others whose transaction has not ended")
        entries.append(leased.entry(leased.planned, move.end, metadata))
    for move, _ in moved:
        move.leased.planned = move.end
        move.leased.pending += 1
    return entries


def stored(moved: Sequence[Move]) -> None:
    """What was under way is stored."""
    for move in moved:
        _learned(move.leased, move.end)
    _ended(moved)


def _learned(leased: Leased, at: int) -> None:
    """The position is stored there. What was taken back since knows it, too: nothing in front is handed out again."""
    leased.moved(at)
    now = leased.positions.held.get(leased.reading.key)
    if now is not None and now is not leased and now.lease == leased.lease:
        now.moved(at)
        if now.reading.delivered < at:
            leased.positions.take_back(now)


def aborted(moved: Iterable[Move]) -> None:
    """What was under way is not stored, or nobody knows. `rewind` follows; or nothing else was under way there, and it
    stays in hand, to be stored in another way."""
    for move in moved:
        move.leased.planned = move.leased.committed
    _ended(moved)


def _ended(moved: Iterable[Move]) -> None:
    for move in moved:
        move.leased.pending -= 1
        move.leased.positions.progressed()


def rewind(moved: Iterable[Move], error: BaseException | None = None) -> None:
    """Take back what is not committed of these partitions, and hand it out again.

    Safe also when the outcome is not known: a second run finds the position moved, if the first was stored.
    """
    for leased in [move.leased for move in moved]:
        if isinstance(error, OffsetConflict) and error.expected is not None and _names(error, leased):
            _learned(leased, error.expected)  # an earlier run was stored after all
        if leased.state in ("held", "releasing"):
            leased.positions.take_back(leased)


# --------------------------------------------------------------------------------------------- without a transaction


class PlainCommit:
    """Positions that move forward without a transaction: those that are lost or were taken back do not hold up the
    others. Ask for `entries()`, say how it ended (`stored`, `refused`), and again, until nothing is to be asked for."""

    def __init__(self, moved: Sequence[Move]) -> None:
        self._left = list(moved)
        """What is asked for, and, behind the first `wire.APPENDS_MAX`, what will be."""
        self._refusal: TransactionAborted | None = None
        """Of the first that was refused."""

    def entries(self) -> list[wire.Offset]:
        """What is to be asked for now, at once. With nothing left it raises LeaseLost or OffsetConflict, if any was
        refused."""
        left, self._left = self._left, []
        immovable = _immovable(left)
        for move in left:
            if move.end <= move.leased.committed:
                continue
            if move.leased in immovable:
                self._refusal = self._refusal or immovable[move.leased]
            else:
                self._left.append(move)
                move.leased.pending += 1
        if not self._left and self._refusal is not None:
            raise self._refusal
        return [move.leased.entry(move.leased.committed, move.end) for move in self._left[: wire.APPENDS_MAX]]

    def stored(self) -> None:
        """All that was asked for is."""
        for move in self._left[: wire.APPENDS_MAX]:
            _learned(move.leased, move.end)
        _ended(self._left)

    def refused(self, error: BaseException) -> bool:
        """Nothing of it is, or nobody knows. Are the others to be asked for, without the one that this names?"""
        _ended(self._left)
        named = next((move for move in self._left if _names(error, move.leased)), None)
        if named is None or not isinstance(error, LeaseLost):
            return False
        ended_at = error.details.get("next")
        if isinstance(ended_at, int) and ended_at >= named.end:
            _learned(named.leased, named.end)
        else:
            self._left.remove(named)
            self._refusal = self._refusal or error
        return True


def _immovable(moved: Iterable[Move]) -> dict[Leased, TransactionAborted]:
    """Where nothing moves any more, and why: messages that are handed out again, and all leases of a partition but the
    last of these."""
    found: dict[Leased, TransactionAborted] = {}
    last: dict[tuple[str, TopicPartition], Leased] = {}
    for move in sorted(moved, key=lambda move: move.leased.lease, reverse=True):
        leased = move.leased
        if leased.state == "stale":
            found[leased] = _conflict(move, "is handed out again")
        elif last.setdefault((leased.positions.group, leased.reading.key), leased) is not leased:
            found[leased] = lease_lost(leased)
    return found


# --------------------------------------------------------------------------------------------------- what is held


class Positions:
    """One member's positions of a group, in the partitions that it holds."""

    def __init__(
        self, group: str, progressed: Callable[[], None], taken_back: Callable[[Leased, wire.Offset | None], None]
    ) -> None:
        self.group = group
        self.held: dict[TopicPartition, Leased] = {}
        self.busy: Callable[[Leased], bool] | None = None
        """Is anything of this partition in hand? None: until the loop comes back for more."""
        self.progressed = progressed
        """Something in hand was finished: whoever waits to give it back looks again."""
        self._told: set[int] = set()
        """Of these tenures the user was told that they began, and not yet that they ended."""
        self._taken_back = taken_back
        """A partition is read by this from now on; if there is an entry, the broker is to know it before more is handed
        out."""
        self._handed: set[Leased] = set()
        """Of these the user's loop was handed messages, and did not come back for more."""

    def take(self, changes: Changes, topics: Mapping[int, str]) -> tuple[list[Leased], list[Leased], list[Leased]]:
        """What is granted, to be released, and lost, by this answer to a heartbeat. `topics`: {id: name}."""
        lost = [self.held.pop(key) for key in changes.lost if key in self.held]
        for leased in lost:
            leased.state = "gone"
            self.progressed()
        revoked = [self.held[key] for key in changes.revoked if key in self.held]
        for leased in revoked:
            leased.state = "releasing"
        granted = [Leased(self, lease, topics[lease.topic_id]) for lease in changes.granted]
        self.held.update({leased.reading.key: leased for leased in granted})
        return granted, revoked, lost

    def news(self, partitions: Iterable[Leased], assigned: bool) -> list[Leased]:
        """Of which of these the user is to be told, now: of each that it is assigned, then, once, that it no longer is.

        Not of what is gone again already, nor that it goes if he has sought there meanwhile, and it is held on."""
        news: list[Leased] = []
        for leased in partitions:
            now = self.held.get(leased.reading.key, leased)
            if now.tenure != leased.tenure:
                now = leased
            is_over = now.state == "gone" if assigned else now is not leased and now.state == "held"
            if (leased.tenure in self._told) != assigned and not is_over:
                self._told ^= {leased.tenure}
                news.append(leased)
        return news

    def releasing(self, keys: Iterable[TopicPartition]) -> list[Leased]:
        """Which of these are yet to be given back."""
        return [self.held[key] for key in keys if key in self.held and self.held[key].state == "releasing"]

    def give_back(self, finished: Iterable[Leased]) -> list[TopicPartition]:
        """Give these back, unless they were taken meanwhile, or handed out again. Returns which are."""
        given = [leased.reading.key for leased in finished if leased.state == "releasing"]
        for key in given:
            self.held.pop(key).state = "gone"
        return given

    def end(self) -> None:
        """Nothing is held any more."""
        for leased in self.held.values():
            leased.state = "gone"
        self.held.clear()

    # ----------------------------------------------------------------------------------------------- what is in hand

    def handed(self, leased: Leased) -> None:
        """Messages of it are handed out."""
        self._handed.add(leased)

    def returned(self) -> None:
        """The user's loop comes back for more: it is done with what it was handed before."""
        self._handed.clear()
        self.progressed()

    def in_hand(self, leased: Leased) -> bool:
        """Is anything of it not finished?"""
        if leased.pending:
            return True
        return self.busy(leased) if self.busy is not None else leased in self._handed

    def delivered(self) -> list[Move]:
        """Everything handed out."""
        return [Move(leased, leased.committed, leased.reading.delivered) for leased in self.held.values()]

    # ------------------------------------------------------------------------------------------- what begins again

    def take_back(self, leased: Leased) -> None:
        """What of a partition was handed out and not committed is handed out again. An attempt under way is over."""
        ended = leased.attempt_entry(leased.head, leased.attempts, begins=False) if leased.turns % 2 else None
        again = leased.again()
        again.state, leased.state = leased.state, "stale"
        self.held[leased.reading.key] = again
        self._taken_back(again, ended)

    def sought(self, leased: Leased, answer: wire.Sought) -> Leased | None:
        """A partition was set elsewhere under this lease: what it is from now on. None: the answer to a heartbeat came
        first, and it is held from there already. Raises LeaseLost."""
        key = leased.reading.key
        held = self.held.get(key)
        if held is None or held.lease not in (leased.lease, answer.lease):
            raise lease_lost(leased)
        if held.lease == answer.lease:
            return None
        again = held.again(wire.Lease(*key, answer.lease, answer.next, 0, 0, None))
        again.reading.paused &= held.state != "releasing"  # it is held anew, until it is to be given back again
        held.state = "gone"  # messages and transactions of the old lease move nothing any more
        self.held[key] = again
        return again


def lease_lost(leased: Leased) -> LeaseLost:
    """The error that says so."""
    return LeaseLost(f"{_place(leased)} was lost", details=_where(leased))


def _conflict(move: Move, why: str) -> OffsetConflict:
    # Not where it is once what is under way is stored: that may fail.
    details = {**_where(move.leased), "next": move.leased.committed}
    return OffsetConflict(f"message {move.first} of {_place(move.leased)} {why}", details=details)


def _place(leased: Leased) -> str:
    return f"partition {leased.reading.key.partition} of {leased.reading.topic!r}"


def _where(leased: Leased) -> dict[str, int | str | None]:
    key = leased.reading.key
    where = {"topic_id": key.topic_id, "partition": key.partition, "lease": leased.lease}
    return {"group": leased.positions.group, **where}


def _names(error: BaseException, leased: Leased) -> bool:
    """Is this error about this group's position in this partition?"""
    if not isinstance(error, IdemqError):
        return False
    where = _where(leased)
    details = {"lease": leased.lease, **error.details}  # the broker names none: it is asked about one only
    return {name: details.get(name) for name in where} == where
