"""The broker's whole decision logic, pure.

    step(now, connection, correlation, request, payload)    decides one request in memory
    begin()                                                 hands out the writes decided so far, to be made durable
    committed()                                             they are durable: here are the replies
    tick(now)                                               does what is due, says when to come again

It may not know a socket, a clock, a thread, a file or LMDB: time comes in as an argument, committed rows through
`Rows`, connections as opaque handles. Decisions are made on the decided state (committed rows under everything decided
since); a reply that rests on it leaves only through `committed()`, when all it rests on is durable (PROTOCOL rule 9).
So "no acknowledgement before durable" is a property of this file and not a habit of the server. After a group commit
failed nothing here is worth keeping: the server closes every connection and makes a new Core from the store (rule 13).

A handler decides first and writes then: every check stands before the first change, so a refusal leaves no trace.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple, Protocol, TypeVar

from idemq.client import wire
from idemq.client.wire import Code, Failed, TopicPartition

from . import groups, producers, topics
from .groups import ConsumerGroup, Member, OffsetKey, OffsetRow
from .producers import Advance, Producer, ProducerRow, single_result
from .topics import Ends, Mark, Partition, TopicRow

Row = TypeVar("Row")

ROW_BYTES = 4096
"""What a stored batch costs beyond its own bytes, at most: a page (see `Limits.store_bytes_max`)."""
PAGE_BYTES_MAX = wire.HEADER_BYTES_MAX // 2
"""What the rows of one page of a listing may come to, so that it fits into a frame's header."""
TRIM_BATCHES = 256
"""Batches removed from one partition in one group commit, so that trimming never holds up senders for long."""
TRIM_MS = 1000
"""How often retention and expiry look around when nothing is left to remove."""
SWEEP_ROWS = 500
"""Producer rows looked at for expiry in one sweep."""
MEMBERS_MS = 100
"""How often members of groups are looked at, and so how late their deadlines may strike."""
SCAN_ROWS = 2_500
"""Positions looked at for one page of a listing: a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the core refuses beyond. Each but the last is a setting of the broker (see `config.py`)."""

    store_bytes_max: int = 64 << 30
    """Size of the store at which appends are refused with STORE_FULL."""
    store_bytes_headroom: int = 64 << 20
    """Kept free below it (and on the disk) so that offsets, trims and deletions always work."""
    group_bytes_max: int = 64 << 20
    """Payload waiting for one group commit; more is refused with BUSY."""
    topics_max: int = 10_000
    offsets_max: int = 1_000_000
    """Positions of groups, one for each partition that a group reads; refused with QUOTA_EXCEEDED."""
    group_members_max: int = 1000
    member_timeout_ms: int = 10_000
    """A member of a group that is not heard of for so long is gone: others get its partitions."""
    release_ms_max: int = 10_000
    """A member that is to give a partition back has so long to finish; then it is taken."""
    producers_max: int = 1_000_000
    """Producer names, anonymous ones included; never evicted, refused with QUOTA_EXCEEDED."""
    connections_max: int = 10_000
    fetches_max: int = 64
    """Fetches that one connection may have waiting."""
    anonymous_idle_ms: int = 24 * 3600 * 1000
    """An anonymous producer's row goes after this time without a commit."""
    clock_jump_ms: int = 60_000
    """A wall clock that departs this far from the monotonic one has jumped: retention and expiry pause."""
    clock_pause_ms: int = 3600 * 1000
    rows_cached_max: int = 100_000
    """Producer and offset rows kept in memory."""
    remembered: int = wire.REMEMBERED


class Now(NamedTuple):
    """The two clocks: durations use `mono_ms`, what is stored and shown uses `wall_ms`."""

    mono_ms: int
    wall_ms: int


class Space(NamedTuple):
    """What the store measured; the core adds what was stored since."""

    used_bytes: int
    """Live pages of all tables."""
    disk_bytes: int
    """What can still be written: free pages of the file and the disk's free space."""
    txn_id: int


class Stored(NamedTuple):
    """One batch as the log stores it."""

    topic_id: int
    partition: int
    offset: int
    timestamp_ms: int
    position: int
    batch: bytes


class Trim(NamedTuple):
    """Remove the batches of one partition that lie below this offset, which is the start of a batch."""

    topic_id: int
    partition: int
    below: int


@dataclass(slots=True)
class Group:
    """One group commit: writes that become durable together, and the replies that wait for them. None deletes a row."""

    appends: list[Stored] = field(default_factory=list)
    changed: dict[int, Producer | None] = field(default_factory=dict)
    """Producers as they are decided; `begin()` asks each what is to be stored of it."""
    producers: dict[int, ProducerRow | Advance | None] = field(default_factory=dict)
    names: dict[str, int | None] = field(default_factory=dict)
    offsets: dict[OffsetKey, OffsetRow | None] = field(default_factory=dict)
    topics: dict[int, TopicRow | None] = field(default_factory=dict)
    trims: list[Trim] = field(default_factory=list)
    counter: int | None = None
    payload_bytes: int = 0
    replies: list[Reply] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Is there anything to store?"""
        return bool(
            self.appends or self.changed or self.offsets or self.topics or self.trims or self.counter is not None
        )


class Damaged(Exception):
    """A stored row does not match its checksum. Raised by the store's readers; refuses the request, changes nothing."""


class Rows(Protocol):
    """The committed rows, read only. The store implements it; tests and the simulator use the store in memory."""

    def incarnation(self) -> bytes:
        """The store's name for ever."""

    def counter(self) -> int:
        """The last number given to a topic, producer, epoch or lease."""

    def space(self) -> Space:
        """As measured now."""

    def topics(self) -> Iterable[TopicRow]:
        """All topics, also those being deleted."""

    def partition(self, topic_id: int, partition: int) -> Ends | None:
        """The ends of a partition's log; None when it holds nothing."""

    def oldest(self, topic_id: int, partition: int, limit: int) -> Sequence[Mark]:
        """The first stored batches."""

    def offset_at(self, topic_id: int, partition: int, timestamp_ms: int) -> int | None:
        """First offset of the first batch at or after this time."""

    def producer(self, producer_id: int) -> ProducerRow | None:
        """A producer by id."""

    def producer_id(self, name: str) -> int | None:
        """A producer's id by name."""

    def producer_names(self, after: str, limit: int) -> Sequence[tuple[str, int]]:
        """Names behind `after`, in order, with their ids."""

    def producer_ids(self, first: int, limit: int) -> Sequence[int]:
        """Those that are at least `first`, in order."""

    def producer_count(self) -> int:
        """How many rows there are."""

    def offset(self, key: OffsetKey) -> OffsetRow | None:
        """A group's position."""

    def offsets_from(self, after: OffsetKey | None, limit: int) -> Sequence[tuple[OffsetKey, OffsetRow]]:
        """Positions behind `after`, by topic, partition and group."""

    def offset_count(self) -> int:
        """How many positions there are."""


@dataclass(slots=True, eq=False)
class Connection:
    """One connection as the core knows it. `serial` is given at Hello and rises (PROTOCOL rule 4)."""

    address: str
    serial: int = 0
    client: str = ""
    session: str = ""
    waiters: dict[_Waiter, None] = field(default_factory=dict)
    """Its fetches that wait."""
    closed: bool = False


class Reply(NamedTuple):
    """Send this. `close`: and then close the connection, its peer broke the protocol."""

    connection: Connection
    correlation: int
    message: Any
    close: bool = False


class Read(NamedTuple):
    """Read these ranges, each up to its partition's durable end, and send them with the parts already known."""

    connection: Connection
    correlation: int
    ranges: list[ReadRange]
    parts: list[wire.Part]
    bytes_max: int


class ReadRange(NamedTuple):
    """What may be read of one partition."""

    topic_id: int
    partition: int
    offset: int
    earliest: int
    next: int


Output = Reply | Read


@dataclass(slots=True, eq=False)
class _Waiter:
    """A fetch that found nothing yet."""

    connection: Connection
    correlation: int
    request: wire.Fetch
    deadline_ms: int
    done: bool = False


_ANSWERED = wire.Fetch([], 1, 0)


class GroupFigures(NamedTuple):
    """What there is to watch of a group."""

    members: int
    behind: dict[str, int]
    """Topic -> messages stored behind the group's positions."""


class _Waiting(NamedTuple):
    """A heartbeat that waits for something to change."""

    connection: Connection
    correlation: int
    reported: dict[TopicPartition, wire.Held]
    deadline_ms: int


class Core:
    """See the file's head. Not thread-safe: one caller, one call at a time."""

    def __init__(self, rows: Rows, limits: Limits, access_token: str = "", version: str = "") -> None:
        self._rows = rows
        self._limits = limits
        self._access_token = access_token
        self._version = version
        self._building = Group()
        self._in_flight: Group | None = None
        self._incarnation = rows.incarnation()
        self._counter = rows.counter()
        self._space = rows.space()
        self._producer_count = rows.producer_count()
        self._producers: dict[int, Producer | None] = {}
        self._names: dict[str, int | None] = {}
        self._offsets: dict[OffsetKey, OffsetRow | None] = {}
        self._topics: dict[int, TopicRow] = {}
        self._topic_ids: dict[str, int] = {}
        self._partitions: dict[tuple[int, int], Partition] = {}
        for row in rows.topics():
            self._put_topic(row)
        self._serial = 0
        self._serials: dict[int, int] = {}
        self._connections: dict[int, Connection] = {}
        self._sessions: dict[str, tuple[int, int]] = {}
        """Of each client session its newest connection's serial, and how many are open: the last takes it along."""
        self._connection_count = 0
        self._waiters: dict[tuple[int, int], list[_Waiter]] = {}
        self._deadlines: list[tuple[int, int, _Waiter]] = []
        self._waiter_number = 0
        self._groups: dict[str, ConsumerGroup] = {}
        self._members_at_ms = 0
        self._clock_offset_ms: int | None = None
        self._paused_until_ms = 0
        self._swept_to = 0
        self._trim_at_ms = 0
        self._clock_alarm = ""
        self._damage = ""
        """What housekeeping could not read. It stays: nothing here mends it."""

    # ------------------------------------------------------------------------------------------ connections

    def connect(self, address: str) -> Connection | Failed:
        """A connection was accepted; refused when there are too many."""
        if self._connection_count >= self._limits.connections_max:
            return Failed(Code.BUSY, f"this broker takes {self._limits.connections_max} connections (connections_max)")
        self._connection_count += 1
        return Connection(address)

    def disconnect(self, connection: Connection) -> None:
        """A connection is gone: nothing more comes from it, and nothing is sent to it."""
        connection.closed = True
        self._connection_count -= 1
        for waiter in list(connection.waiters):
            self._forget_waiter(waiter)
        self._connections.pop(connection.serial, None)
        if connection.session:
            newest, still_open = self._sessions.pop(connection.session)
            if still_open > 1:
                self._sessions[connection.session] = (newest, still_open - 1)
        if len(self._serials) > self._limits.rows_cached_max:
            # A serial matters only while an older connection is open that it could refuse.
            oldest = min(self._connections, default=self._serial + 1)
            self._serials = {key: serial for key, serial in self._serials.items() if serial > oldest}

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._connection_count

    @property
    def groups(self) -> dict[str, GroupFigures]:
        """What there is to watch of each group that has members, from what is in memory."""
        figures: dict[str, GroupFigures] = {}
        for name, group in sorted(self._groups.items()):
            behind: dict[str, int] = {}
            for topic in filter(None, map(self._topic, sorted(group.topics))):
                behind[topic.name] = 0
                for index in range(len(topic.floors)):
                    row = self._offsets.get(OffsetKey(name, topic.topic_id, index))
                    partition = self._partitions.get((topic.topic_id, index))
                    if row is not None and partition is not None:
                        behind[topic.name] += partition.durable_next - min(row.next, partition.durable_next)
            figures[name] = GroupFigures(sum(member.heard for member in group.members.values()), behind)
        return figures

    @property
    def alarm(self) -> str:
        """What an operator must know now; empty when all is well."""
        return "; ".join(filter(None, (self._clock_alarm, self._damage)))

    @property
    def space(self) -> Space:
        """As the store measured last, and what was stored since at the most."""
        return self._space

    @property
    def building_bytes(self) -> int:
        """Payload that waits for the next group commit: the server stops reading when it grows."""
        return self._building.payload_bytes

    # ------------------------------------------------------------------------------- decide, persist, reply

    def step(self, now: Now, connection: Connection, correlation: int, request: Any, payload: bytes) -> Output | None:
        """Decide one request. Returns what rests on durable state alone; everything else waits for `committed()`."""
        facts = wire.REQUESTS.get(type(request))
        if facts is None:
            return Reply(connection, correlation, Failed(Code.BAD_REQUEST, "a reply is not a request"), close=True)
        if not connection.serial and type(request) is not wire.Hello:
            return Reply(connection, correlation, Failed(Code.BAD_REQUEST, "the first frame must be Hello"), close=True)
        try:
            if facts.decided and self._is_stale(connection, request):
                answer: Any = Failed(Code.STALE_CONNECTION, "this client has a newer connection")
            else:
                answer = _HANDLERS[type(request)](self, now, connection, correlation, request, payload)
        except Damaged as damage:
            answer = Failed(Code.STORE_DAMAGED, str(damage))
        except wire.WireError as error:
            answer = Failed(error.code, error.text)
        if answer is None or type(answer) is Read:
            return answer
        close = type(answer) is Failed and (answer.code in _CLOSING or type(request) is wire.Hello)
        reply = Reply(connection, correlation, answer, close)
        if not facts.decided:
            return reply
        self._release(reply)
        return None

    def _release(self, reply: Reply) -> None:
        """Rule 9, for refusals too: what is being decided belongs to the group being built, else to that in flight."""
        group = self._building
        if not group.writes and self._in_flight is not None:
            group = self._in_flight
        group.replies.append(reply)

    def _is_stale(self, connection: Connection, request: Any) -> bool:
        """Rule 4 for what is no commit: a copy from an older connection, read late, must not undo what followed."""
        newest, _ = self._sessions.get(connection.session, (0, 0))
        return connection.serial < newest and type(request) is not wire.Commit

    def begin(self) -> Group | None:
        """The next group to make durable; None when one is in flight or there is nothing to do.

        A group without writes needs no disk: call `committed()` at once.
        """
        group = self._building
        if self._in_flight is not None or not (group.writes or group.replies):
            return None
        for producer_id, producer in group.changed.items():
            group.producers[producer_id] = None if producer is None else producer.tell()
        self._building, self._in_flight = Group(), group
        return group

    def committed(self) -> list[Output]:
        """The group in flight is durable: what to send."""
        group = self._in_flight
        assert group is not None, "committed() follows begin()"
        self._in_flight = None
        if group.writes:
            # Measuring with every commit took 4 % of all CPU; `tick` does it every second, and puts right what small
            # batches are counted too much.
            used_bytes, disk_bytes, txn_id = self._space
            size = group.payload_bytes
            self._space = Space(used_bytes + size, disk_bytes - size, txn_id + 1)
        outputs: list[Output] = list(group.replies)
        for stored in group.appends:
            partition = self._partitions.get((stored.topic_id, stored.partition))
            if partition is not None:
                partition.durable_next = stored.offset + wire.record_count(stored.batch)
        for key in dict.fromkeys((stored.topic_id, stored.partition) for stored in group.appends):
            outputs += self._wake(key)
        for topic_id, row in group.topics.items():
            if row is not None:
                # Only now: a reader may be told that something is gone when it cannot come back (rule 9).
                for index, floor in enumerate(row.floors):
                    partition = self._partitions.get((topic_id, index)) if floor else None
                    if partition is not None:
                        partition.earliest = max(partition.earliest, floor)
            if row is None or row.deleted:
                for key in [key for key in self._waiters if key[0] == topic_id]:
                    outputs += self._wake(key)
        self._forget_cold_rows()
        return outputs

    def tick(self, now: Now) -> tuple[int, list[Output]]:
        """Do what is due; returns (`mono_ms` to come again at the latest, what to send)."""
        outputs: list[Output] = []
        while self._deadlines and (self._deadlines[0][0] <= now.mono_ms or self._deadlines[0][2].done):
            waiter = heappop(self._deadlines)[2]
            if not waiter.done:
                outputs += self._answer_waiter(waiter)
        if self._trim_at_ms <= now.mono_ms and self._in_flight is None:
            self._watch_clock(now)
            self._space = self._rows.space()  # what was removed, and what others did to the disk
            more = self._trim(now)
            self._sweep(now)
            self._trim_at_ms = now.mono_ms + (1 if more else TRIM_MS)
        if self._members_at_ms <= now.mono_ms:
            self._watch_members(now)
            self._members_at_ms = now.mono_ms + MEMBERS_MS
        deadline = self._deadlines[0][0] if self._deadlines else self._trim_at_ms
        if self._groups:
            deadline = min(deadline, self._members_at_ms)
        return min(deadline, max(self._trim_at_ms, now.mono_ms + 1)), outputs

    # ------------------------------------------------------------------------------------------ decided rows

    def _number(self) -> int:
        """The next of the one counter that topics, producers, epochs and leases share; it never goes back."""
        self._counter += 1
        self._building.counter = self._counter
        return self._counter

    def _producer(self, producer_id: int) -> Producer | None:
        if producer_id not in self._producers:
            row = self._rows.producer(producer_id)
            self._producers[producer_id] = None if row is None else Producer(row, self._limits.remembered, stored=True)
        return self._producers[producer_id]

    def _producer_row(self, producer_id: int) -> ProducerRow | None:
        producer = self._producer(producer_id)
        return None if producer is None else producer.row()

    def _producer_named(self, name: str) -> ProducerRow | None:
        if name not in self._names:
            self._names[name] = self._rows.producer_id(name)
        producer_id = self._names[name]
        return None if producer_id is None else self._producer_row(producer_id)

    def _put_producer(self, row: ProducerRow) -> None:
        producer = Producer(row, self._limits.remembered, stored=False)
        self._producers[row.producer_id] = self._building.changed[row.producer_id] = producer

    def _create_producer(self, row: ProducerRow) -> None:
        self._put_producer(row)
        self._names[row.name] = self._building.names[row.name] = row.producer_id
        self._producer_count += 1

    def _remove_producer(self, row: ProducerRow) -> None:
        self._producers[row.producer_id] = self._building.changed[row.producer_id] = None
        self._names[row.name] = self._building.names[row.name] = None
        self._producer_count -= 1

    def _offset(self, key: OffsetKey) -> OffsetRow | None:
        if key not in self._offsets:
            self._offsets[key] = self._rows.offset(key)
        return self._offsets[key]

    def _put_offset(self, key: OffsetKey, row: OffsetRow) -> None:
        self._offsets[key] = self._building.offsets[key] = row

    def _put_topic(self, row: TopicRow) -> None:
        self._topics[row.topic_id] = row
        if not row.deleted:
            self._topic_ids[row.name] = row.topic_id

    def _write_topic(self, row: TopicRow) -> None:
        self._put_topic(row)
        self._building.topics[row.topic_id] = row

    def _topic(self, topic_id: int) -> TopicRow | None:
        row = self._topics.get(topic_id)
        return None if row is None or row.deleted else row

    def _lacking(self, topic_id: int, index: int, reading: bool = False) -> Failed | None:
        """The refusal of a request that names a partition which is not there."""
        topic = self._topics.get(topic_id)
        if topic is not None and topic.deleted and not (reading and self._is_being_deleted(topic_id)):
            topic = None
        if topic is not None and index < len(topic.floors):
            return None
        return Failed(Code.UNKNOWN_TOPIC, f"there is no topic {topic_id} with a partition {index} (any more)")

    def _is_being_deleted(self, topic_id: int) -> bool:
        """Deleted, and not durably so: a reader must not be told yet, since it may come back (rule 9)."""
        undurable = [self._building] if self._in_flight is None else [self._building, self._in_flight]
        return any((row := group.topics.get(topic_id)) is not None and row.deleted for group in undurable)

    def _partition(self, topic_id: int, index: int) -> Partition:
        partition = self._partitions.get((topic_id, index))
        if partition is None:
            ends = self._rows.partition(topic_id, index)
            partition = self._partitions[topic_id, index] = Partition(ends, self._topics[topic_id].floors[index])
        return partition

    def _topic_entry(self, row: TopicRow) -> wire.TopicEntry:
        return topics.entry(row, [self._partition(row.topic_id, index) for index in range(len(row.floors))])

    def _forget_cold_rows(self) -> None:
        """Keep the caches bounded. Rows of the group being built are not committed yet and must stay."""
        excess = len(self._producers) - self._limits.rows_cached_max
        if excess > 0:
            for key in [key for key in self._producers if key not in self._building.changed][: excess * 2]:
                del self._producers[key]
        excess = len(self._names) - self._limits.rows_cached_max
        if excess > 0:
            for name in [name for name in self._names if name not in self._building.names][: excess * 2]:
                del self._names[name]
        excess = len(self._offsets) - self._limits.rows_cached_max
        if excess > 0:
            for position in [key for key in self._offsets if key not in self._building.offsets][: excess * 2]:
                del self._offsets[position]

    # ---------------------------------------------------------------------------------------------- handlers

    def _hello(
        self, now: Now, connection: Connection, correlation: int, request: wire.Hello, payload: bytes
    ) -> wire.Welcome | Failed:
        if connection.serial:
            raise wire.WireError(Code.BAD_REQUEST, "Hello comes once")
        if self._access_token and not hmac.compare_digest(request.token.encode(), self._access_token.encode()):
            seen = "the one that was sent is wrong" if request.token else "none was sent"
            return Failed(Code.AUTH_FAILED, f"this broker asks for its token, and {seen}")
        self._serial += 1
        connection.serial = self._serial
        connection.client = request.client
        if request.session:
            connection.session = request.session
            _, still_open = self._sessions.get(request.session, (0, 0))
            self._sessions[request.session] = (self._serial, still_open + 1)
        self._connections[connection.serial] = connection
        return wire.Welcome(wire.VERSION, self._version, self._incarnation, self._space.txn_id, self._limits.remembered)

    def _ping(
        self, now: Now, connection: Connection, correlation: int, request: wire.Ping, payload: bytes
    ) -> wire.Pong:
        return wire.Pong(now.wall_ms)

    def _open(
        self, now: Now, connection: Connection, correlation: int, request: wire.Open, payload: bytes
    ) -> wire.Opened | Failed:
        row = self._producer_named(request.name)
        opened = producers.opening(row, request, self._counter + 1, connection.client, connection.address, now.wall_ms)
        if type(opened) is Failed:
            return opened
        assert isinstance(opened, ProducerRow)
        if row is None:
            if self._producer_count >= self._limits.producers_max:
                limit = self._limits.producers_max
                return Failed(Code.QUOTA_EXCEEDED, f"this broker keeps {limit} producer names (producers_max)")
            self._number()
            self._create_producer(opened)
        elif opened is not row:
            self._number()
            self._put_producer(opened)
            # The new epoch keeps the old holder out; its serial would only refuse a new holder's older connection.
            self._serials.pop(opened.producer_id, None)
        return wire.Opened(opened.producer_id, opened.epoch, opened.last_seq, opened.token)

    def _commit(
        self, now: Now, connection: Connection, correlation: int, request: wire.Commit, payload: bytes
    ) -> wire.Committed | Failed:
        """The broker's rules of PROTOCOL.md, in their order."""
        producer_id, epoch, prev_seq, last_seq, appends, offsets, token = request
        batches = wire.slices([append.length for append in appends], payload)
        headers = [wire.batch_header(batch) for batch in batches]
        producer: Producer | None = None
        fingerprint = 0
        if producer_id:
            # 1
            if last_seq <= prev_seq:
                return Failed(Code.BAD_REQUEST, "a commit must take at least one number: last_seq > prev_seq")
            # 2
            producer = self._producers.get(producer_id) or self._producer(producer_id)  # a call less, mostly
            if producer is None:
                return Failed(Code.UNKNOWN_PRODUCER, f"there is no producer {producer_id} (any more)")
            # 3
            if len(headers) == 1 and not offsets and token is None:  # a call less for what is sent most
                fingerprint = headers[0].checksum
            else:
                fingerprint = wire.fingerprint(request, headers)
            known = last_seq <= producer.last_seq
            answered = producers.remembered(producer, last_seq, fingerprint) if known else None
            if epoch != producer.epoch:
                if epoch > producer.epoch:
                    return Failed(Code.STORE_REPLACED, f"producer {producer.name!r} has not reached epoch {epoch}")
                if answered is not None:
                    return wire.Committed(True, answered)
                return producers.fenced(producer.row(), epoch)
            # 4
            if connection.serial != producer.serial:
                if connection.serial < self._serials.get(producer_id, 0):
                    return Failed(Code.STALE_CONNECTION, f"producer {producer.name!r} has a newer connection")
                self._serials[producer_id] = producer.serial = connection.serial
            # 5
            if known:
                if answered is not None:
                    return wire.Committed(True, answered)
                conflict = producers.conflict(producer, last_seq)
                if conflict is None:
                    return wire.Committed(True, None)
                for header, batch in zip(headers, batches, strict=True):
                    wire.verify(header, batch)  # a copy whose checksum was damaged on the way looks like another commit
                return conflict
            # 6
            if prev_seq != producer.last_seq:
                return producers.gap(producer, prev_seq)
        # 7
        refusal = self._offsets_refused(request) or self._appends_refused(request, batches, headers)
        if refusal is not None:
            return refusal
        # 8
        positions = [self._append(now, header, batch) for header, batch in zip(headers, batches, strict=True)]
        for entry in offsets:
            key = OffsetKey(entry.group, entry.topic_id, entry.partition)
            position = self._offset(key)
            assert position is not None, "rule 7 found it"
            moved = groups.moved(position, entry)
            if moved is not position:
                self._put_offset(key, moved)
        if producer is not None:
            if not producer.untold:
                self._building.changed[producer_id] = producer
            producer.last_seq, producer.seen_ms = last_seq, now.wall_ms
            if token is not None:
                producer.token = token
            if len(positions) == 1:  # a call less, mostly
                offset, timestamp_ms = positions[0]
                producer.untold.append(single_result(last_seq, fingerprint, offset, timestamp_ms))
            else:
                producer.untold.append(producers.result_of(last_seq, fingerprint, positions))
        return wire.Committed(False, positions)

    def _offsets_refused(self, request: wire.Commit) -> Failed | None:
        forward_only = not request.producer_id and not request.appends
        seen: set[OffsetKey] = set()
        for entry in request.offsets:
            key = OffsetKey(entry.group, entry.topic_id, entry.partition)
            if key in seen or entry.end < entry.start:
                return Failed(Code.BAD_REQUEST, "a commit moves a position once, and forward")
            seen.add(key)
            refusal = groups.refusal(self._offset(key), entry, forward_only)
            if refusal is not None:
                return refusal
        for entry in request.offsets:
            refusal = self._lacking(entry.topic_id, entry.partition)
            if refusal is not None:
                return refusal
            if entry.end > self._partition(entry.topic_id, entry.partition).next:
                return Failed(Code.BAD_REQUEST, f"position {entry.end} lies beyond the partition's end")
        return None

    def _appends_refused(
        self, request: wire.Commit, batches: Sequence[bytes], headers: Sequence[wire.BatchHeader]
    ) -> Failed | None:
        producer_id, _, prev_seq, last_seq, appends, _, _ = request
        size = 0
        for (topic_id, partition, _), batch, header in zip(appends, batches, headers, strict=True):
            refusal = self._lacking(topic_id, partition)
            if refusal is not None:
                return refusal
            wire.verify(header, batch)
            if (header.topic_id, header.partition, header.producer_id) != (topic_id, partition, producer_id):
                return Failed(Code.BAD_REQUEST, "the batch was made for another topic, partition or producer")
            if producer_id and (header.first_seq <= prev_seq or header.last_seq > last_seq):
                return Failed(Code.BAD_REQUEST, "the batch has numbers that the commit does not take")
            self._partition(topic_id, partition)  # read now: damage must refuse before anything changes
            size += len(batch) + ROW_BYTES
        if size > wire.COMMIT_BYTES_MAX + len(batches) * ROW_BYTES:
            return Failed(Code.TOO_LARGE, f"a commit holds at most {wire.COMMIT_BYTES_MAX} bytes")
        if appends:
            building = self._building.payload_bytes
            if building + size > self._limits.group_bytes_max and building:
                return Failed(Code.BUSY, "too much waits for the disk (group_bytes_max)")
            waiting = building + (self._in_flight.payload_bytes if self._in_flight is not None else 0) + size
            space, limits = self._space, self._limits
            if space.used_bytes + waiting > limits.store_bytes_max - limits.store_bytes_headroom:
                return Failed(Code.STORE_FULL, f"the store is full at {limits.store_bytes_max} bytes (store_bytes_max)")
            if waiting > space.disk_bytes - limits.store_bytes_headroom:
                return Failed(Code.STORE_FULL, "the disk under the data directory is full")
        return None

    def _append(self, now: Now, header: wire.BatchHeader, batch: bytes) -> wire.Position:
        topic_id, index = header.topic_id, header.partition
        partition = self._partition(topic_id, index)
        offset = partition.next
        timestamp_ms = max(partition.timestamp_ms, now.wall_ms)
        self._building.appends.append(Stored(topic_id, index, offset, timestamp_ms, partition.end_position, batch))
        self._building.payload_bytes += len(batch) + ROW_BYTES
        partition.next = offset + header.records
        partition.end_position += len(batch)
        partition.timestamp_ms = timestamp_ms
        return wire.Position(offset, timestamp_ms)

    # ------------------------------------------------------------------------------------------------- groups

    def _heartbeat(
        self, now: Now, connection: Connection, correlation: int, request: wire.Heartbeat, payload: bytes
    ) -> wire.Assignment | Failed | None:
        refusal = self._subscription_refused(request.topics)
        if refusal is not None:
            return refusal
        group = self._groups.get(request.group) or ConsumerGroup()
        member = group.members.get(request.member)
        if member is None and len(group.members) >= self._limits.group_members_max:
            limit = self._limits.group_members_max
            return Failed(Code.QUOTA_EXCEEDED, f"group {request.group!r} has {limit} members (group_members_max)")
        reported = {TopicPartition(held.topic_id, held.partition): held for held in request.held}
        rows = self._group_rows(request.group, group, request.topics)
        begun = self._beginning(request, rows)
        if type(begun) is Failed:
            return begun
        assert isinstance(begun, dict)
        returning = self._returning(request, reported) if member is None else {}
        self._groups[request.group] = group
        for position, row in begun.items():
            self._put_offset(position, row)
        joins = member is None
        changed = member is None or member.topics != frozenset(request.topics)
        self._take_holders(now, group, request.topics, rows)
        member = group.members.setdefault(request.member, Member(request.member, now.mono_ms))
        if member.waiting is not None:
            self._answer_heartbeat(member, self._nothing_changed())
        member.client, member.address = connection.client, connection.address
        member.topics, member.in_hand_max = frozenset(request.topics), request.in_hand_max
        member.seen_ms = now.mono_ms
        for key, row in returning.items():
            group.hold(member, key, row.lease)
            self._put_offset(OffsetKey(request.group, *key), row)
        for key in list(member.held):
            # What it does not report it has given back; but what it is to hold it has only not heard of yet, unless it
            # has told of an attempt there. Of one that joins it is not known yet what it is to hold.
            if request.topics and key in reported:
                continue
            if request.topics and (joins or key in member.targets) and not self._held_row(request.group, key).turns:
                continue
            self._give_back(request.group, group, key)
            changed = True
        if not request.topics:
            del group.members[member.name]
        if changed:
            self._rebalance(now, request.group, group)
        if not request.topics:
            return self._nothing_changed()
        answer = self._assignment(request.group, group, member, reported)
        # One that waited for longer than its member may be silent would be the end of it.
        wait_ms = min(request.wait_ms, self._limits.member_timeout_ms // 3)
        if not wait_ms or not _is_nothing(answer):
            return answer
        member.waiting = _Waiting(connection, correlation, reported, now.mono_ms + wait_ms)
        return None

    def _subscription_refused(self, topic_ids: Iterable[int]) -> Failed | None:
        partitions = 0
        for topic_id in topic_ids:
            topic = self._topic(topic_id)
            if topic is None:
                return Failed(Code.UNKNOWN_TOPIC, f"there is no topic {topic_id} (any more)")
            partitions += len(topic.floors)
        if partitions > wire.LEASES_MAX:  # the last member of a group holds all of it
            return Failed(
                Code.TOO_LARGE, f"a subscription has at most {wire.LEASES_MAX} partitions, and not {partitions}"
            )
        return None

    def _group_rows(
        self, name: str, group: ConsumerGroup, topic_ids: Iterable[int]
    ) -> dict[TopicPartition, OffsetRow | None]:
        """The rows of the topics that nobody in the group wanted before."""
        return {
            TopicPartition(topic_id, index): self._offset(OffsetKey(name, topic_id, index))
            for topic_id in topic_ids
            if topic_id not in group.topics
            for index in range(len(self._topics[topic_id].floors))
        }

    def _beginning(
        self, request: wire.Heartbeat, rows: dict[TopicPartition, OffsetRow | None]
    ) -> dict[OffsetKey, OffsetRow] | Failed:
        """The rows with which a group begins in topics that are new to it."""
        begun: dict[OffsetKey, OffsetRow] = {}
        for (topic_id, index), row in rows.items():
            if row is not None or rows[TopicPartition(topic_id, 0)] is not None:
                continue  # partitions that were added later begin when they are granted, at their earliest
            partition = self._partition(topic_id, index)
            start = request.start_offset
            if start is None:
                found = self._rows.offset_at(topic_id, index, request.start_ms) if request.start_ms else 0
                start = max(partition.durable_next if found is None else found, partition.earliest)
            elif start > partition.durable_next:
                name, end = self._topics[topic_id].name, partition.durable_next
                return Failed(Code.BAD_REQUEST, f"partition {index} of topic {name!r} ends at {end}, before {start}")
            begun[OffsetKey(request.group, topic_id, index)] = groups.beginning(start)
        return self._offsets_full(len(begun)) or begun

    def _offsets_full(self, wanted: int) -> Failed | None:
        if not wanted:
            return None
        undurable = {**self._building.offsets, **(self._in_flight.offsets if self._in_flight is not None else {})}
        count, limit = self._rows.offset_count() + wanted, self._limits.offsets_max
        if count + len(undurable) > limit:  # only then it matters which of them are stored already
            count += sum([1 for key in undurable if self._rows.offset(key) is None])
            if count > limit:
                return Failed(Code.QUOTA_EXCEEDED, f"this broker keeps {limit} positions of groups (offsets_max)")
        return None

    def _returning(
        self, request: wire.Heartbeat, reported: dict[TopicPartition, wire.Held]
    ) -> dict[TopicPartition, OffsetRow]:
        """What a member that was thought to be gone still holds: what nobody else was granted since."""
        rows: dict[TopicPartition, OffsetRow] = {}
        for key, held in reported.items():
            if key.topic_id in request.topics:
                row = self._offset(OffsetKey(request.group, *key))
                if row is not None and row.lease == held.lease and not row.holder:
                    rows[key] = row._replace(holder=request.member)
        return rows

    def _take_holders(
        self, now: Now, group: ConsumerGroup, topic_ids: Iterable[int], rows: dict[TopicPartition, OffsetRow | None]
    ) -> None:
        """Stored holders are members, too: they may not have come back to this broker yet."""
        group.topics.update(topic_ids)
        for key, row in rows.items():
            if row is not None and row.holder:
                holder = group.members.setdefault(row.holder, Member(row.holder, now.mono_ms))
                holder.topics |= {key.topic_id}
                group.hold(holder, key, row.lease)

    def _held_row(self, name: str, key: TopicPartition) -> OffsetRow:
        row = self._offset(OffsetKey(name, *key))
        assert row is not None, "what is held has a row"
        return row

    def _give_back(self, name: str, group: ConsumerGroup, key: TopicPartition) -> None:
        row = self._held_row(name, key)
        group.drop(key)
        self._put_offset(OffsetKey(name, *key), groups.released(row))

    def _assignment(
        self, name: str, group: ConsumerGroup, member: Member, reported: dict[TopicPartition, wire.Held]
    ) -> wire.Assignment:
        """What is to be changed for a member; what is free and should be its own is granted (rule 14)."""
        lost, revoked = member.lost(reported), member.revoked(reported)  # before anything is granted
        leases: list[wire.Lease] = []
        bytes_left = PAGE_BYTES_MAX
        for key in member.targets:
            holder = group.holders.get(key)
            if holder is not None and (
                holder is not member or (key in reported and reported[key].lease == member.held[key])
            ):
                continue
            if bytes_left < 0:
                break  # the rest with the next heartbeat
            position = OffsetKey(name, *key)
            row = self._offset(position)
            if holder is None:
                if row is None:  # whatever offsets_max says: a group that reads a topic reads all of it
                    row = groups.beginning(self._partition(*key).earliest)
                row = groups.granted(row, member.name, self._number())
                self._put_offset(position, row)
                group.hold(member, key, row.lease)
            assert row is not None, "what is held has a row"
            bytes_left -= 64 + len(row.metadata or b"")
            leases.append(wire.Lease(*key, row.lease, row.next, row.attempts, row.suspects_end, row.metadata))
        return wire.Assignment(leases, revoked, lost, self._limits.member_timeout_ms)

    def _nothing_changed(self) -> wire.Assignment:
        return wire.Assignment([], [], [], self._limits.member_timeout_ms)

    def _answer_heartbeat(self, member: Member, answer: wire.Assignment | Failed) -> None:
        waiting, member.waiting = member.waiting, None
        if not waiting.connection.closed:
            self._release(Reply(waiting.connection, waiting.correlation, answer))

    def _rebalance(self, now: Now, name: str, group: ConsumerGroup) -> None:
        """Members, topics or partitions have changed: decide anew, and tell those who wait."""
        subscribed = {topic_id for member in group.members.values() for topic_id in member.topics}
        partitions = {row.topic_id: len(row.floors) for row in map(self._topic, subscribed) if row is not None}
        group.rebalance(partitions, now.mono_ms + self._limits.release_ms_max)
        self._settle(name, group)
        if not group.members:
            del self._groups[name]

    def _settle(self, name: str, group: ConsumerGroup) -> None:
        """Whoever waits and has something to be changed is told. Who is not there to hear it is granted nothing."""
        for member in group.members.values():
            if member.waiting is None or member.waiting.connection.closed:
                continue
            refusal = self._subscription_refused(member.topics)
            if refusal is not None:
                self._answer_heartbeat(member, refusal)
                continue
            answer = self._assignment(name, group, member, member.waiting.reported)
            if not _is_nothing(answer):
                self._answer_heartbeat(member, answer)

    def _topic_changed(self, now: Now, topic_id: int) -> None:
        for name, group in list(self._groups.items()):
            if topic_id in group.topics:
                if self._topic(topic_id) is None:
                    group.topics.discard(topic_id)
                    for key in [key for key in group.holders if key.topic_id == topic_id]:
                        group.drop(key)  # its rows go with it
                self._rebalance(now, name, group)

    def _watch_members(self, now: Now) -> None:
        """Members that are not heard of, partitions that are not given back, heartbeats that waited long enough."""
        held_up = now.mono_ms - self._members_at_ms > self._limits.member_timeout_ms // 2
        for name, group in list(self._groups.items()):
            if held_up:
                group.start_anew(now.mono_ms, now.mono_ms + self._limits.release_ms_max)
            gone = group.gone(now.mono_ms, self._limits.member_timeout_ms)
            for member in gone:
                self._end_uncleanly(name, group, member)
                del group.members[member.name]
            late = group.late(now.mono_ms)
            for key in late:
                self._give_back(name, group, key)
            if gone:
                self._rebalance(now, name, group)
            elif late:
                self._settle(name, group)
            for member in group.members.values():
                if member.waiting is not None and member.waiting.deadline_ms <= now.mono_ms:
                    self._answer_heartbeat(member, self._nothing_changed())

    def _end_uncleanly(self, name: str, group: ConsumerGroup, member: Member) -> None:
        """Whatever a member that vanished held is free, and what it may have had in hand is remembered."""
        in_hand_max, rows = member.in_hand_max, {key: self._held_row(name, key) for key in member.held}
        for key, row in rows.items():
            group.drop(key)
            if in_hand_max is None:  # it may be that it ended well, while no broker was there to be told
                ended = groups.released(row)
            else:
                ended = groups.ended_uncleanly(row, self._partition(*key).next, in_hand_max)
            self._put_offset(OffsetKey(name, *key), ended)

    def _seek(
        self, now: Now, connection: Connection, correlation: int, request: wire.Seek, payload: bytes
    ) -> wire.Sought | Failed:
        refusal = self._lacking(request.topic_id, request.partition)
        if refusal is not None:
            return refusal
        end = self._partition(request.topic_id, request.partition).durable_next
        if request.to > end:
            return Failed(Code.BAD_REQUEST, f"position {request.to} lies beyond the partition's end at {end}")
        position = OffsetKey(request.group, request.topic_id, request.partition)
        row = self._offset(position)
        if row is None:
            refusal = self._offsets_full(1)
            if refusal is not None:
                return refusal
        sought = groups.sought(row, request, self._counter + 1)
        if type(sought) is Failed:
            return sought
        assert isinstance(sought, OffsetRow)
        if sought is not row:
            self._number()
            self._put_offset(position, sought)
            group, key = self._groups.get(request.group), TopicPartition(request.topic_id, request.partition)
            holder = group.holders.get(key) if group is not None else None
            if group is not None and holder is not None:
                if holder.name == request.member:
                    holder.held[key] = sought.lease
                    if holder.waiting is not None and key in holder.waiting.reported:
                        # What waits was said before: else it would be told that it lost what it has just set.
                        reported = holder.waiting.reported
                        reported[key] = reported[key]._replace(lease=sought.lease)
                else:
                    group.drop(key)
                    self._settle(request.group, group)
        return wire.Sought(sought.lease, sought.next)

    def _list_offsets(
        self, now: Now, connection: Connection, correlation: int, request: wire.Offsets, payload: bytes
    ) -> wire.OffsetsAre:
        """The committed rows, each as it is decided: one that is created right now may be missing."""
        after = None if request.after is None else OffsetKey(request.after.group, *request.after[:2])
        entries: list[wire.OffsetEntry] = []
        bytes_left = PAGE_BYTES_MAX
        stored = self._rows.offsets_from(after, SCAN_ROWS)
        more = len(stored) == SCAN_ROWS
        for key, committed in stored:
            row = self._offsets.get(key, committed)
            if row is not None and request.group in (None, key.group):
                bytes_left -= 128 + 4 * (len(key.group) + len(row.holder)) + len(row.metadata or b"")
                if entries and (bytes_left < 0 or len(entries) == wire.NAMES_MAX):
                    more = True
                    break
                entries.append(wire.OffsetEntry(*key, row.next, row.lease, row.holder, row.attempts, row.metadata))
            after = key
        return wire.OffsetsAre(
            entries, wire.OffsetAfter(after.topic_id, after.partition, after.group) if more and after else None
        )

    def _list_members(
        self, now: Now, connection: Connection, correlation: int, request: wire.Members, payload: bytes
    ) -> wire.MembersAre:
        behind = (request.after_group, request.after_member)
        members = sorted(
            [
                (name, member.name, member)
                for name, group in self._groups.items()
                for member in group.members.values()
                if request.group in (None, name) and (name, member.name) > behind and member.heard
            ],
            key=lambda one: one[:2],
        )
        page, more = _page(
            members,
            lambda one: 128 + 4 * len(one[0] + one[1] + one[2].client + one[2].address) + 16 * len(one[2].held),
        )
        entries = [
            wire.MemberEntry(name, member.name, member.client, member.address, sorted(member.held))
            for name, _, member in page
        ]
        return wire.MembersAre(entries, more)

    def _delete_offsets(
        self, now: Now, connection: Connection, correlation: int, request: wire.DeleteOffsets, payload: bytes
    ) -> wire.Done | Failed:
        group = self._groups.get(request.group) or ConsumerGroup()
        if self._topic(request.topic_id) is not None:  # a holder that has not come back to this broker yet is a member
            rows = self._group_rows(request.group, group, [request.topic_id])
            self._take_holders(now, group, [request.topic_id], rows)
        if group.members:
            self._groups[request.group] = group
            return Failed(Code.BAD_REQUEST, f"group {request.group!r} has members: stop them first")
        row = self._topics.get(request.topic_id)
        for index in range(len(row.floors) if row is not None else 0):
            key = OffsetKey(request.group, request.topic_id, index)
            if self._offset(key) is not None:
                self._offsets[key] = self._building.offsets[key] = None
        return wire.Done()

    # ------------------------------------------------------------------------------------------------- topics

    def _create_topic(
        self, now: Now, connection: Connection, correlation: int, request: wire.CreateTopic, payload: bytes
    ) -> wire.TopicIs | Failed:
        refusal = _unsupported(request.settings)
        if refusal is not None:
            return refusal
        topic_id = self._topic_ids.get(request.name)
        if topic_id is not None:
            row = self._topics[topic_id]
            if request.nonce and row.nonce == request.nonce:
                return wire.TopicIs(self._topic_entry(row))
            if not request.exist_ok:
                return Failed(Code.TOPIC_EXISTS, f"topic {request.name!r} exists")
            differing = _differing(row, request)
            if differing:
                return Failed(Code.TOPIC_EXISTS, f"topic {request.name!r} exists with other settings: {differing}")
            return wire.TopicIs(self._topic_entry(row))
        if len(self._topics) >= self._limits.topics_max:
            return Failed(Code.QUOTA_EXCEEDED, f"this broker keeps {self._limits.topics_max} topics (topics_max)")
        row = TopicRow(
            self._number(), request.name, request.settings, (0,) * request.partitions, request.nonce, deleted=False
        )
        self._write_topic(row)
        return wire.TopicIs(self._topic_entry(row))

    def _alter_topic(
        self, now: Now, connection: Connection, correlation: int, request: wire.AlterTopic, payload: bytes
    ) -> wire.TopicIs | Failed:
        row = self._topic(request.topic_id)
        if row is None:
            return Failed(Code.UNKNOWN_TOPIC, f"there is no topic {request.topic_id} (any more)")
        refusal = _unsupported(request.settings)
        if refusal is not None:
            return refusal
        if request.partitions < len(row.floors):
            return Failed(Code.BAD_REQUEST, f"a topic's partitions never get fewer: {len(row.floors)} now")
        grown = (0,) * (request.partitions - len(row.floors))
        altered = row._replace(settings=request.settings, floors=row.floors + grown)
        if altered != row:
            self._write_topic(altered)
        if grown:
            self._topic_changed(now, row.topic_id)
        return wire.TopicIs(self._topic_entry(altered))

    def _delete_topic(
        self, now: Now, connection: Connection, correlation: int, request: wire.DeleteTopic, payload: bytes
    ) -> wire.Done | Failed:
        row = self._topic(request.topic_id)
        if row is None:
            if request.topic_id > self._counter:
                return Failed(Code.UNKNOWN_TOPIC, f"there never was a topic {request.topic_id}")
            return wire.Done()
        del self._topic_ids[row.name]
        self._write_topic(row._replace(deleted=True))
        self._topic_changed(now, row.topic_id)
        self._trim_at_ms = 0
        return wire.Done()

    def _purge_topic(
        self, now: Now, connection: Connection, correlation: int, request: wire.PurgeTopic, payload: bytes
    ) -> wire.Done | Failed:
        row = self._topic(request.topic_id)
        if row is None:
            return Failed(Code.UNKNOWN_TOPIC, f"there is no topic {request.topic_id} (any more)")
        if len(request.before) != len(row.floors):
            return Failed(Code.BAD_REQUEST, f"topic {row.name!r} has {len(row.floors)} partitions")
        partitions = [self._partition(row.topic_id, index) for index in range(len(row.floors))]
        for partition, before in zip(partitions, request.before, strict=True):
            if before > partition.durable_next:
                return Failed(Code.BAD_REQUEST, f"nothing is stored up to {before} yet")
        floors = tuple(
            [
                max(floor, partition.earliest, before)
                for floor, partition, before in zip(row.floors, partitions, request.before, strict=True)
            ]
        )
        if floors != row.floors:
            self._write_topic(row._replace(floors=floors))
            self._trim_at_ms = 0
        return wire.Done()

    def _metadata(
        self, now: Now, connection: Connection, correlation: int, request: wire.Metadata, payload: bytes
    ) -> wire.Topics:
        asked = self._topic_ids if request.names is None else dict.fromkeys(request.names)
        names = sorted([name for name in asked if name in self._topic_ids and name > request.after])
        rows = (self._topics[self._topic_ids[name]] for name in names)
        page, more = _page(rows, lambda row: 64 + len(row.name) + 28 * len(row.floors))
        return wire.Topics([self._topic_entry(row) for row in page], more)

    def _fetch(
        self, now: Now, connection: Connection, correlation: int, request: wire.Fetch, payload: bytes
    ) -> Read | Failed | None:
        for waiter in [one for one in connection.waiters if request.reader and one.request.reader == request.reader]:
            self._forget_waiter(waiter)
            self._release(Reply(connection, waiter.correlation, wire.Fetched([])))
        read = self._look(connection, correlation, request)
        if request.wait_ms == 0 or read.parts or any(one.offset < one.next for one in read.ranges):
            return read
        if len(connection.waiters) >= self._limits.fetches_max:
            return Failed(Code.BUSY, f"a connection waits for {self._limits.fetches_max} fetches at once (fetches_max)")
        waiter = _Waiter(connection, correlation, request, now.mono_ms + request.wait_ms)
        connection.waiters[waiter] = None
        self._waiter_number += 1
        heappush(self._deadlines, (waiter.deadline_ms, self._waiter_number, waiter))
        for one in read.ranges:
            self._waiters.setdefault((one.topic_id, one.partition), []).append(waiter)
        return None

    def _look(self, connection: Connection, correlation: int, request: wire.Fetch) -> Read:
        """What a fetch can get now: ranges to read, and parts that are answered without reading."""
        read = Read(connection, correlation, [], [], request.bytes_max)
        for topic_id, index, offset in request.ranges:
            refusal = self._lacking(topic_id, index, reading=True)
            if refusal is not None:
                read.parts.append(wire.Part(topic_id, index, 0, 0, [], refusal.code, refusal.text))
                continue
            partition = self._partition(topic_id, index)
            earliest, end = partition.earliest, partition.durable_next
            if offset < earliest:
                text = f"offset {offset} of partition {index} is gone, the earliest is {earliest}"
                read.parts.append(wire.Part(topic_id, index, earliest, end, [], Code.OFFSET_TRUNCATED, text))
            elif offset > end:
                text = f"offset {offset} of partition {index} lies beyond its end at {end}"
                read.parts.append(wire.Part(topic_id, index, earliest, end, [], Code.BAD_REQUEST, text))
            else:
                read.ranges.append(ReadRange(topic_id, index, offset, earliest, end))
        return read

    def _wake(self, key: tuple[int, int]) -> list[Output]:
        outputs: list[Output] = []
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done:
                outputs += self._answer_waiter(waiter)
        return outputs

    def _answer_waiter(self, waiter: _Waiter) -> list[Output]:
        request = self._forget_waiter(waiter)
        if waiter.connection.closed:
            return []
        return [self._look(waiter.connection, waiter.correlation, request)]

    def _forget_waiter(self, waiter: _Waiter) -> wire.Fetch:
        waiter.done = True
        del waiter.connection.waiters[waiter]
        request, waiter.request = waiter.request, _ANSWERED  # its deadline may be far, and a request large
        for topic_id, partition, _ in request.ranges:
            waiting = self._waiters.get((topic_id, partition))
            if waiting is not None:
                waiting.remove(waiter)
                if not waiting:
                    del self._waiters[topic_id, partition]
        return request

    def _offset_at(
        self, now: Now, connection: Connection, correlation: int, request: wire.OffsetAt, payload: bytes
    ) -> wire.OffsetIs | Failed:
        refusal = self._lacking(request.topic_id, request.partition, reading=True)
        if refusal is not None:
            return refusal
        partition = self._partition(request.topic_id, request.partition)
        found = self._rows.offset_at(request.topic_id, request.partition, request.timestamp_ms)
        end = partition.durable_next
        return wire.OffsetIs(min(max(end if found is None else found, partition.earliest), end))

    def _list_producers(
        self, now: Now, connection: Connection, correlation: int, request: wire.Producers, payload: bytes
    ) -> wire.ProducersAre:
        rows: Iterable[ProducerRow | None]
        if request.names is None:
            rows = self._producers_behind(request.after)
        else:
            names = sorted([name for name in dict.fromkeys(request.names) if name > request.after])
            rows = (self._producer_named(name) for name in names)
        there = (row for row in rows if row is not None)
        page, more = _page(there, lambda row: 128 + 4 * len(row.name + row.holder) + len(row.token or b""))
        entries = [
            wire.ProducerEntry(row.name, row.producer_id, row.epoch, row.last_seq, row.token, row.holder, row.seen_ms)
            for row in page
        ]
        return wire.ProducersAre(entries, more)

    def _producers_behind(self, after: str) -> Iterator[ProducerRow | None]:
        """The committed names, each as it is decided: one that is created right now may be missing."""
        while names := self._rows.producer_names(after, wire.NAMES_MAX):
            for after, _ in names:
                yield self._producer_named(after)

    def _delete_producer(
        self, now: Now, connection: Connection, correlation: int, request: wire.DeleteProducer, payload: bytes
    ) -> wire.Done | Failed:
        row = self._producer_row(request.producer_id)
        if row is None:
            if request.producer_id > self._counter:
                return Failed(Code.UNKNOWN_PRODUCER, f"there never was a producer {request.producer_id}")
            return wire.Done()
        if row.epoch != request.epoch:
            return producers.fenced(row, request.epoch)
        self._remove_producer(row)
        return wire.Done()

    # ------------------------------------------------------------------------------------------- housekeeping

    def _watch_clock(self, now: Now) -> None:
        """A wall clock that jumps must not make retention and expiry delete what is young."""
        offset_ms = now.wall_ms - now.mono_ms
        known, self._clock_offset_ms = self._clock_offset_ms, offset_ms
        if known is not None and abs(offset_ms - known) > self._limits.clock_jump_ms:
            self._paused_until_ms = now.mono_ms + self._limits.clock_pause_ms
            self._clock_alarm = f"the wall clock jumped by {offset_ms - known} ms: retention and expiry are paused"
        elif self._clock_alarm and now.mono_ms >= self._paused_until_ms:
            self._clock_alarm = ""

    def _trim(self, now: Now) -> bool:
        """Remove a bounded number of batches that no longer count; True when there is more to do."""
        more = False
        now_ms = now.wall_ms if now.mono_ms >= self._paused_until_ms else 0
        for row in list(self._topics.values()):
            gone = row.deleted
            for index in range(len(row.floors)):
                try:
                    more |= self._trim_partition(row, index, now_ms)
                except Damaged as damage:  # what cannot be read is left as it is, and hurts no other
                    self._damage = f"of a partition nothing is removed: {damage}. {_MEND}"
                    gone = False
            if gone and not more:
                self._remove_deleted(row)
        return more

    def _trim_partition(self, row: TopicRow, index: int, now_ms: int) -> bool:
        """`now_ms`: 0 while nothing gets older."""
        floor = row.floors[index]
        wanted = row.deleted or row.settings.retention_ms is not None or row.settings.retention_bytes is not None
        if not wanted and not (floor and (row.topic_id, index) in self._partitions):
            return False
        partition = self._partition(row.topic_id, index)
        # One row tells whether there is anything to do: this runs for every partition every second.
        if not topics.removable(row, partition, floor, self._rows.oldest(row.topic_id, index, 1), now_ms):
            return False
        marks = self._rows.oldest(row.topic_id, index, TRIM_BATCHES)
        count = topics.removable(row, partition, floor, marks, now_ms)
        if not count:
            return False
        below = marks[count - 1].end
        partition.first_position = marks[count - 1].end_position
        self._building.trims.append(Trim(row.topic_id, index, below))
        latest = self._topics[row.topic_id]
        floors = (*latest.floors[:index], max(floor, below), *latest.floors[index + 1 :])
        self._write_topic(latest._replace(floors=floors))
        return count == TRIM_BATCHES

    def _remove_deleted(self, row: TopicRow) -> None:
        """The last of a deleted topic: its row goes when no batch is left, decided or stored."""
        if self._building.trims or any(
            self._rows.oldest(row.topic_id, index, 1) or self._undurable(row.topic_id, index)
            for index in range(len(row.floors))
        ):
            return
        self._building.topics[row.topic_id] = None
        del self._topics[row.topic_id]
        for index in range(len(row.floors)):
            self._partitions.pop((row.topic_id, index), None)

    def _undurable(self, topic_id: int, index: int) -> bool:
        partition = self._partitions.get((topic_id, index))
        return partition is not None and partition.durable_next < partition.next

    def _sweep(self, now: Now) -> None:
        """Anonymous producers that were idle for long go, a page of rows at a time."""
        if now.mono_ms < self._paused_until_ms:
            return
        ids = self._rows.producer_ids(self._swept_to, SWEEP_ROWS)
        self._swept_to = ids[-1] + 1 if len(ids) == SWEEP_ROWS else 0
        for producer_id in ids:
            try:
                stored = self._rows.producer(producer_id)
                row = self._producer_row(producer_id) if stored is not None and stored.anonymous else None
            except Damaged as damage:
                self._damage = f"a producer cannot be read: {damage}. {_MEND}"
                continue
            if row is not None and row.seen_ms < now.wall_ms - self._limits.anonymous_idle_ms:
                self._remove_producer(row)


_MEND = wire.REMEDIES[Code.STORE_DAMAGED].remedy
_CLOSING = frozenset({Code.PROTOCOL_MISMATCH, Code.AUTH_FAILED, Code.CHECKSUM_MISMATCH})
"""Refusals after which the bytes of a connection count for nothing more."""


def _page(rows: Iterable[Row], size: Callable[[Row], int]) -> tuple[list[Row], bool]:
    """(the first rows, are there more). `size`: what a row takes in the reply, in bytes at most."""
    page: list[Row] = []
    bytes_left = PAGE_BYTES_MAX
    for row in rows:
        bytes_left -= size(row)
        if page and (bytes_left < 0 or len(page) == wire.NAMES_MAX):
            return page, True
        page.append(row)
    return page, False


def _is_nothing(answer: wire.Assignment) -> bool:
    return not (answer.leases or answer.revoked or answer.lost)


def _unsupported(settings: wire.Settings) -> Failed | None:
    if settings.dedup_window_ms is not None:
        return Failed(Code.UNSUPPORTED, "dedup_window (message ids) is not offered yet")
    if settings.cleanup != "delete":
        return Failed(Code.UNSUPPORTED, f"cleanup {settings.cleanup!r} is not offered, only 'delete'")
    return None


def _differing(row: TopicRow, request: wire.CreateTopic) -> str:
    """Names what an existing topic has otherwise, with both values."""
    have = {"partitions": len(row.floors), **row.settings._asdict()}
    want = {"partitions": request.partitions, **request.settings._asdict()}
    return ", ".join(f"{name} is {have[name]} and not {want[name]}" for name in have if have[name] != want[name])


# Returns its reply: a handler that forgets it does not type-check. None: the request waits, and is answered later.
_Handler = Callable[[Core, Now, Connection, int, Any, bytes], Any]

_HANDLERS: dict[type[Any], _Handler] = {
    wire.Hello: Core._hello,
    wire.Ping: Core._ping,
    wire.Commit: Core._commit,
    wire.Open: Core._open,
    wire.Heartbeat: Core._heartbeat,
    wire.Seek: Core._seek,
    wire.Offsets: Core._list_offsets,
    wire.Members: Core._list_members,
    wire.DeleteOffsets: Core._delete_offsets,
    wire.CreateTopic: Core._create_topic,
    wire.AlterTopic: Core._alter_topic,
    wire.DeleteTopic: Core._delete_topic,
    wire.PurgeTopic: Core._purge_topic,
    wire.Metadata: Core._metadata,
    wire.Fetch: Core._fetch,
    wire.OffsetAt: Core._offset_at,
    wire.Producers: Core._list_producers,
    wire.DeleteProducer: Core._delete_producer,
}
assert _HANDLERS.keys() == wire.REQUESTS.keys(), "every request has its handler"
