"""What a client needs of an engine, and the values that pass between them.

The seam for a second engine (Kafka, later): `client.py`, `producer.py`, `transaction.py`, `source.py` and what they
are made of speak to these protocols only; idemq's own broker is `native.py`. What an engine cannot do raises
Unsupported when the object is opened, never later. Lengths of time are seconds here, points in time ms since 1970 (the
wire's unit).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from . import wire
from .membership import Changes
from .pipeline import Tally
from .records import Receipt, Record
from .wire import TopicPartition


class PartitionInfo(NamedTuple):
    """One partition: its first stored offset, the next to be given, and its stored bytes."""

    index: int  # type: ignore[assignment]  # the contract's name, and a tuple's method
    earliest: int
    next: int
    bytes: int


class TopicInfo(NamedTuple):
    """A topic. `retention` and `dedup_window` are seconds, `retention_bytes` counts for each partition; None: none."""

    name: str
    id: int
    partitions: list[PartitionInfo]
    retention: float | None
    retention_bytes: int | None
    dedup_window: float | None
    cleanup: str


class ProducerInfo(NamedTuple):
    """A producer name as the broker keeps it. `last_seen` is ms since 1970."""

    name: str
    id: int
    epoch: int
    last_seq: int
    token: bytes | None
    holder: str
    last_seen: int


class TopicSettings(NamedTuple):
    """What can be set on a topic; units as in TopicInfo."""

    retention: float | None = None
    retention_bytes: int | None = None
    dedup_window: float | None = None
    cleanup: str = "delete"


class FetchedBatch(NamedTuple):
    """A batch as it was read, not decoded yet."""

    offset: int
    timestamp: int
    data: bytes


class FetchedPart(NamedTuple):
    """What a fetch found in one partition: its ends, and batches, or why there are none."""

    topic_id: int
    partition: int
    earliest: int
    next: int
    batches: list[FetchedBatch]
    code: str
    text: str


BATCH_BYTES = 256 << 10
"""A batch is closed when it holds as much; one larger record makes a batch of its own."""


class ProducerOptions(NamedTuple):
    """How a producer works; `linger` is seconds."""

    dedup: bool = True
    linger: float = 0.0
    batch_bytes: int = BATCH_BYTES
    in_flight: int = wire.IN_FLIGHT_MAX
    compression: str | None = None


class EngineProducer(Protocol):
    """One producer of an engine."""

    @property
    def name(self) -> str:
        """Its name; a random one when none was given."""

    @property
    def id(self) -> int:
        """The broker's number for this name; 0 before it is known."""

    @property
    def epoch(self) -> int:
        """Which opening of the name this is; 0 before it is known."""

    @property
    def last_seq(self) -> int:
        """The highest number known to be stored; -1: none."""

    @property
    def highest_seq(self) -> int:
        """The highest number given to a record; -1: none."""

    @property
    def token(self) -> bytes | None:
        """The token stored last."""

    @property
    def batch_bytes(self) -> int:
        """A batch is closed when it holds as much."""

    @property
    def opened(self) -> bool:
        """Was the name taken?"""

    @property
    def ended(self) -> bool:
        """Was it fenced or forgotten, so that it takes no more messages?"""

    @property
    def unsettled(self) -> bool:
        """Is anything not decided yet, or failed and nobody was told?"""

    async def open(self, timeout: float) -> None:
        """Take the name; id, epoch, last_seq and token are known then."""

    async def send(self, topic: str, record: Record, timeout: float) -> Receipt:
        """Enqueue before the first await, return when durable."""

    async def enqueue(self, topic: str, chunk: Sequence[bytes | Record], tally: Tally, timeout: float) -> int:
        """Put a chunk in line, once the buffer has room; returns how many of it were taken before that was full."""

    async def finish(self, tally: Tally, timeout: float) -> None:
        """Wait until all of a tally is decided."""

    def abandon(self, tally: Tally) -> None:
        """Nobody waits for it any more: its failures are told by flush or close."""

    async def transact(
        self, sends: Sequence[tuple[str, Record]], offsets: Sequence[wire.Offset], token: bytes | None, timeout: float
    ) -> list[Receipt]:
        """Store everything or nothing."""

    async def flush(self, timeout: float) -> None:
        """Wait until everything enqueued is decided; raises the first failure nobody was told."""

    def end(self) -> list[Exception]:
        """Give it up; returns what was never reported."""


class EngineMember(Protocol):
    """One member of a group."""

    @property
    def name(self) -> str:
        """The member's name, random."""

    async def changes(self) -> Changes:
        """Report what is held, again and again, until something is to be changed."""

    def promise(self, in_hand_max: int) -> None:
        """From now on so many messages of a partition are in hand at once, at most; 0: no promise."""

    def give_back(self, key: TopicPartition) -> None:
        """This partition is finished with."""

    def sought(self, key: TopicPartition, lease: int) -> None:
        """The member set the position itself, and holds the partition under this lease now."""

    async def leave(self, timeout: float) -> None:
        """Give everything back and be gone."""


class Engine(Protocol):
    """What a `Client` needs. Every coroutine raises IdemqError, and returns within `timeout` seconds."""

    @property
    def incarnation(self) -> bytes:
        """The store's name."""

    async def start(self, timeout: float) -> None:
        """Connect."""

    async def close(self) -> None:
        """Give everything up."""

    async def ping(self, timeout: float) -> int:
        """The broker's wall clock, ms since 1970."""

    async def create_topic(
        self, name: str, partitions: int, settings: TopicSettings, exist_ok: bool, timeout: float
    ) -> TopicInfo:
        """Create a topic; with `exist_ok` one with the same settings may be there."""

    async def alter_topic(self, name: str, partitions: int, settings: TopicSettings, timeout: float) -> TopicInfo:
        """Give a topic these settings and this many partitions; it may not have more."""

    async def delete_topic(self, name: str, timeout: float) -> None:
        """Delete a topic and everything in it."""

    async def purge_topic(self, name: str, timeout: float) -> None:
        """Remove everything that is stored now."""

    async def topics(self, names: Sequence[str] | None, timeout: float) -> list[TopicInfo]:
        """These topics, or all. Names that do not exist are left out."""

    async def producers(self, names: Sequence[str] | None, timeout: float) -> list[ProducerInfo]:
        """These producers, or all."""

    async def delete_producer(self, name: str, timeout: float) -> None:
        """Forget a producer's name, numbers and token."""

    async def fetch(
        self, ranges: Sequence[tuple[int, int, int]], bytes_max: int, wait: float, reader: int
    ) -> list[FetchedPart]:
        """Batches from (topic id, partition, offset) on; waits for the first for `wait` seconds, and for a connection
        for as long as it takes. `reader`: who asks, above 0; whoever asks again waits for what he asked before no more.
        """

    async def offset_at(self, topic_id: int, partition: int, timestamp: int, timeout: float) -> int:
        """The first offset stored at or after this time."""

    def producer(self, name: str | None, options: ProducerOptions) -> EngineProducer:
        """A producer: named, anonymous (a random name) or without dedup."""

    async def member(
        self, group: str, topic_ids: Sequence[int], start_ms: int, start_offset: int | None, timeout: float
    ) -> tuple[EngineMember, Changes]:
        """Join a group: the member, and what it holds at once. `start…`: where the group begins, if it is new."""

    async def commit_offsets(self, offsets: Sequence[wire.Offset], timeout: float) -> None:
        """Move at most `wire.APPENDS_MAX` positions forward, all or none. Raises LeaseLost, which names one of them."""

    async def seek(
        self, group: str, key: TopicPartition, lease: int, to: int, timeout: float, member: str = ""
    ) -> wire.Sought:
        """Set a group's position in one partition, if its lease is still this one; `member`: who holds it and goes on
        holding it. Raises ProducerFenced when it is another, and OutcomeUnknown when it is and an earlier copy of the
        request may have been applied."""

    async def offsets(self, group: str | None, timeout: float) -> list[wire.OffsetEntry]:
        """The stored positions of a group, or of all."""

    async def members(self, group: str | None, timeout: float) -> list[wire.MemberEntry]:
        """The members of a group, or of all."""

    async def delete_offsets(self, group: str, topic_id: int, timeout: float) -> None:
        """Forget a group's positions in a topic."""
