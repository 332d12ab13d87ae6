"""What one producer has in line: its commits, whose records they hold and who waits for what. Pure.

State, and the rules that need nothing but that state; what is sent when, and what an answer does to it, the session
decides (`session.py`). It may not know a socket, a clock, a task or a future, nor the session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

from . import records, wire
from .errors import IdemqError
from .records import Receipt, Record
from .wire import Failed

# ---------------------------------------------------------------------------------------------------------- waiters

Waiter = Any
"""Whoever waits for an outcome; the session hands it back with a value or an exception and never looks into it."""


class Pending:
    """An outcome that nobody waits for right now, but somebody may ask for (`OutcomeUnknown.outcome()`)."""

    __slots__ = ("done", "value", "waiters")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.waiters: list[Waiter] = []


class Joined(NamedTuple):
    """Two waiters for one record: the second gave a number that was already in line."""

    first: Waiter
    second: Waiter


class Prefixed(NamedTuple):
    """A transaction's waiter, and the receipts of its records that were stored before."""

    duplicates: list[Receipt]
    waiter: Waiter
    alone: bool = False


def without(held: Waiter, gone: Waiter) -> Waiter:
    """`held`, with a Pending in the place of one that waits no more."""
    if held is gone:
        return Pending()
    if type(held) is Joined:
        return Joined(without(held.first, gone), without(held.second, gone))
    if type(held) is Prefixed:
        return held._replace(waiter=without(held.waiter, gone))
    return held


def is_waited(waiter: Waiter) -> bool:
    """Will somebody hear what this waiter is told?"""
    if type(waiter) is Joined:
        return is_waited(waiter.first) or is_waited(waiter.second)
    if type(waiter) is Prefixed:
        return is_waited(waiter.waiter)
    if type(waiter) is Pending:
        return bool(waiter.waiters)
    return waiter is not None


class _Progress:
    """Somebody waits for many commits; the deadline starts again with each that is answered."""

    __slots__ = ("deadline", "timeout", "waiter")

    def __init__(self, waiter: Waiter = None, timeout: float = inf, now: float = 0.0) -> None:
        self.waiter = waiter
        self.timeout = timeout
        self.deadline = now + timeout


class Tally(_Progress):
    """What becomes of the records of one `send_many`, and who waits for the last of them."""

    __slots__ = ("abandoned", "duplicates", "error", "pending", "stored")

    def __init__(self) -> None:
        super().__init__()
        self.abandoned = False
        """Nobody waits any more: what fails is told by flush or close."""
        self.stored = 0
        self.duplicates = 0
        self.error: IdemqError | None = None
        """The first failure."""
        self.pending = 0
        """Commits that hold records of it."""


class Barrier(_Progress):
    """Somebody waits until everything a producer had enqueued is decided (`flush`)."""

    __slots__ = ("last",)

    def __init__(self, waiter: Waiter, timeout: float, now: float, last: int) -> None:
        super().__init__(waiter, timeout, now)
        self.last = last
        """The last commit it waits for, by its place in the producer's line."""


# -------------------------------------------------------------------------------------------------- what is in line


class Topic(NamedTuple):
    """What a producer must know of a topic."""

    name: str
    topic_id: int
    partitions: int


class QueuedPart:
    """The records of one commit for one partition, in columns; a column nobody uses stays None."""

    __slots__ = (
        "deadlines",
        "first_seq",
        "headers",
        "keys",
        "last_seq",
        "partition",
        "seqs",
        "topic",
        "values",
        "waiters",
    )

    def __init__(self, topic: Topic, partition: int, first_seq: int) -> None:
        self.topic = topic
        self.partition = partition
        self.first_seq = first_seq
        self.last_seq = first_seq - 1
        self.values: list[bytes] = []
        self.keys: list[bytes | None] | None = None
        self.headers: list[records.Headers | None] | None = None
        self.seqs: list[int] | None = None
        self.waiters: list[Waiter] | None = None
        self.deadlines: list[float] = []
        """Parallel to `waiters`."""

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of its records."""
        return range(self.first_seq, self.last_seq + 1) if self.seqs is None else self.seqs

    def seq(self, index: int) -> int:
        """The number of one record."""
        return self.first_seq + index if self.seqs is None else self.seqs[index]

    def add(
        self,
        value: bytes,
        key: bytes | None,
        headers: records.Headers | None,
        seq: int,
        waiter: Waiter = None,
        deadline: float = inf,
    ) -> None:
        """Put a record behind the others; its waiter is answered until `deadline`."""
        count = len(self.values)
        if key is not None:
            if self.keys is None:
                self.keys = [None] * count
            self.keys.append(key)
        elif self.keys is not None:
            self.keys.append(None)
        if headers is not None:
            if self.headers is None:
                self.headers = [None] * count
            self.headers.append(dict(headers))
        elif self.headers is not None:
            self.headers.append(None)
        if self.seqs is not None:
            self.seqs.append(seq)
        elif seq != self.last_seq + 1:
            self.seqs = [*range(self.first_seq, self.last_seq + 1), seq]
        if waiter is not None:
            if self.waiters is None:
                self.waiters = [None] * count
                self.deadlines = [inf] * count
            self.waiters.append(waiter)
            self.deadlines.append(deadline)
        elif self.waiters is not None:
            self.waiters.append(None)
            self.deadlines.append(inf)
        self.values.append(value)
        self.last_seq = seq

    def batch(self, producer_id: int, codec: int) -> bytes:
        """The bytes to store."""
        deltas = None if self.seqs is None else [seq - self.first_seq for seq in self.seqs]
        body = records.pack(self.values, self.keys, self.headers, deltas, codec)
        topic_id, count = self.topic.topic_id, len(self.values)
        return wire.make_batch(codec, count, topic_id, self.partition, producer_id, self.first_seq, self.last_seq, body)

    def receipt(self, index: int, position: wire.Position | None, duplicate: bool, dedup: bool) -> Receipt:
        """What the waiter of one record is told once it is stored. `position`: the batch's, if it is remembered."""
        seq = self.seq(index) if dedup else None
        offset = None if position is None else position.offset + index
        timestamp = None if position is None else position.timestamp_ms
        return Receipt(self.topic.name, self.partition, offset, seq, timestamp, duplicate)


class Unresolved(NamedTuple):
    """A numbered record whose topic is not known yet."""

    record: Record
    seq: int
    waiter: Waiter = None
    deadline: float = inf
    tally: Tally | None = None


class QueuedCommit:
    """One commit of a producer's queue: open for more records, or frozen when first sent (C1)."""

    __slots__ = (
        "appends",
        "bytes",
        "deadline",
        "ever_sent",
        "last_seq",
        "linger_until",
        "offsets",
        "open",
        "order",
        "parts",
        "payload",
        "place",
        "prev_seq",
        "records",
        "refusal",
        "sent",
        "sent_before",
        "tallies",
        "token",
        "topic",
        "transaction",
        "unresolved",
        "waiter",
    )

    def __init__(self, place: int, topic: str, *, transaction: bool) -> None:
        self.place = place
        self.topic = topic
        """Plain sends of one commit share a topic, so that a refused topic fails nobody else's sends."""
        self.transaction = transaction
        self.open = not transaction
        self.parts: dict[tuple[int, int], QueuedPart] = {}
        self.order: list[tuple[QueuedPart, int]] = []
        """A transaction's records in the order they were sent: (part, index in it)."""
        self.unresolved: list[Unresolved] = []
        """Numbered records whose topic is still being looked up."""
        self.offsets: list[wire.Offset] = []
        self.token: bytes | None = None
        self.tallies: dict[Tally, int] = {}
        """How many of the records belong to which `send_many`."""
        self.waiter: Waiter = None
        self.deadline = inf
        self.linger_until = 0.0
        self.prev_seq: int | None = None
        self.last_seq = -1
        self.bytes = 0
        self.records = 0
        self.appends: list[wire.Append] = []
        self.payload: list[bytes] = []
        self.sent = False
        """On the current connection."""
        self.ever_sent = False
        self.sent_before = False
        """On an earlier connection: that copy may be stored."""
        self.refusal: Failed | None = None

    @property
    def frozen(self) -> bool:
        """Was it sent, so that nothing of it changes any more (C1)?"""
        return self.prev_seq is not None

    def part(self, topic: Topic, partition: int, seq: int) -> QueuedPart:
        """Its records for one partition; `seq` is the first number of a part that is new."""
        key = (topic.topic_id, partition)
        part = self.parts.get(key)
        if part is None:
            part = self.parts[key] = QueuedPart(topic, partition, seq)
        return part

    def count(self, tally: Tally, records: int) -> None:
        """So many more of its records belong to this `send_many`."""
        if tally not in self.tallies:
            tally.pending += 1
            self.tallies[tally] = 0
        self.tallies[tally] += records


class Producer:
    """One producer of a session. Fields without an underscore may be read by the shell; methods are the session's."""

    def __init__(
        self,
        name: str,
        *,
        anonymous: bool,
        dedup: bool,
        linger_s: float,
        batch_bytes: int,
        in_flight: int,
        codec: int,
        buffer_bytes: int,
    ) -> None:
        self.name = name
        self.anonymous = anonymous
        self.dedup = dedup
        self.linger_s = linger_s
        self.batch_bytes = batch_bytes
        self.in_flight_max = in_flight
        self.codec = codec
        self.buffer_bytes_max = buffer_bytes
        self.instance = ""
        """Tells this producer's repeated Open from that of any other, also of this name and session (rule 10)."""
        self.id = 0
        self.epoch = 0
        self.opened = not dedup
        """The broker knows it (a producer without dedup needs no opening)."""
        self.opening: Any = None
        """The session's call that opens it, while that is under way."""
        self.error: IdemqError | None = None
        """Why it ended; None while it lives."""
        self.token: bytes | None = None
        self.last_seq = -1
        """The highest number known to be stored."""
        self.highest = -1
        """The highest number given to a record."""
        self.given: bool | None = None
        """True: the application gives the numbers; False: they are counted; None: not decided yet."""
        self.queue: deque[QueuedCommit] = deque()
        self.places = 0
        """How many commits were ever put in line."""
        self.buffered_bytes = 0
        self.sent = 0
        """How many commits at the head of the queue are sent on the current connection and not answered well."""
        self.refused = False
        """A refusal came: nothing new is sent until all that was sent is answered (C4)."""
        self.retry_at = 0.0
        self.failures = 0
        self.breaks = 0
        """How often the line of given numbers broke: whoever waited to be put in line then must not be."""
        self.sticky: dict[str, int] = {}
        self.barriers: list[Barrier] = []
        self.tallies: list[Tally] = []
        """Those somebody waits for."""
        self.room_waiters: deque[Waiter] = deque()
        self.unreported: list[IdemqError] = []
        """Failures of records that nobody waits for: told by the next flush or close."""

    @property
    def room(self) -> bool:
        """May more records be enqueued?"""
        return self.buffered_bytes < self.buffer_bytes_max

    def check_alive(self) -> None:
        """Raise why it ended."""
        if self.error is not None:
            raise self.error

    def close_tail(self) -> None:
        """What is enqueued next begins another commit."""
        if self.queue:
            self.queue[-1].open = False

    def freeze(self, commit: QueuedCommit) -> None:
        """The next to be sent. C1: its cut, bytes and numbers never change from here on. C2: what it follows."""
        commit.open = False
        commit.prev_seq = self.last_seq if self.dedup else -1
        if self.dedup and self.sent and (sent_seq := self.queue[self.sent - 1].last_seq) > commit.prev_seq:
            commit.prev_seq = sent_seq
        for part in commit.parts.values():
            batch = part.batch(self.id, self.codec)
            commit.appends.append(wire.Append(part.topic.topic_id, part.partition, len(batch)))
            commit.payload.append(batch)

    def report(self) -> IdemqError | None:
        """The first failure that nobody was told of; it and the others are then told."""
        unreported, self.unreported = self.unreported, []
        return unreported[0] if unreported else None
