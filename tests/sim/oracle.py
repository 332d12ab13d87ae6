"""The oracle: knows every record that was ever given, every answer a user got, and what each group commit stored.

It watches from outside: groups as they become durable, answers as the waiters get them. It knows nothing of the core's
or the session's state, and it keeps a log of its own. A breach of the promise raises `Violation`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from idemq.broker.core import Connection, Group
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.broker.producers import Advance, ProducerRow, advanced_by
from idemq.client import wire
from idemq.client.errors import IdemqError, LeaseLost, OutcomeUnknown
from idemq.client.pipeline import Producer
from idemq.client.records import Receipt
from idemq.client.session import Session

HEADER_BYTES = wire.BATCH_HEADER.size
LogKey = tuple[int, int]


SURFACING = frozenset(
    {
        "OUTCOME_UNKNOWN",
        "PRODUCER_FENCED",
        "OPEN_RACE",
        "UNKNOWN_TOPIC",
        "UNKNOWN_PRODUCER",
        "STORE_REPLACED",
        "CLIENT_CLOSED",
        "QUOTA_EXCEEDED",
        "NOT_STORED",
        "TRANSACTION_ABORTED",
        "LEASE_LOST",
        "OFFSET_CONFLICT",
    }
)
"""How a record may fail that was given rightly. All else is the library's own business: to try again, or a bug."""


class Violation(AssertionError):
    """The promise is broken."""


class Source:
    """What a named producer reads: positions with gaps, the same for every instance of the name."""

    __slots__ = ("index", "name", "positions")

    def __init__(self, name: str, positions: list[int]) -> None:
        self.name = name
        self.positions = positions
        self.index = {seq: at for at, seq in enumerate(positions)}


class Ask:
    """One record that was given to a producer. Its value names it, and no other record has the same."""

    __slots__ = (
        "answer",
        "app",
        "input",
        "is_dead_letter",
        "number",
        "partition",
        "producer",
        "seq",
        "session",
        "source",
        "topic",
        "tx",
    )

    def __init__(
        self, app: Any, session: Session, producer: Producer, source: Source | None, topic: str, partition: int | None
    ) -> None:
        self.app = app
        self.session = session
        self.producer = producer
        self.source = source
        self.topic = topic
        self.partition = partition
        self.number = -1
        self.seq = -1
        self.tx: Transaction | None = None
        self.input: Input | None = None
        """What it is the output of."""
        self.is_dead_letter = False
        self.answer: Any = None

    def settled(self, value: Any) -> None:
        """It is a waiter: here is its outcome."""
        self.app.settled(self, value)


class Input(NamedTuple):
    """One message that a group has to handle."""

    key: OffsetKey
    offset: int


class Transaction:
    """Records, and perhaps a token and moves of a group, that are stored whole or not at all."""

    __slots__ = ("answer", "app", "asks", "block", "number", "offsets", "producer", "session", "token")

    def __init__(self, app: Any, session: Session, producer: Producer, token: bytes | None) -> None:
        self.app = app
        self.session = session
        self.producer = producer
        self.token = token
        self.asks: list[Ask] = []
        self.offsets: list[wire.Offset] = []
        self.block: Any = None
        """What the application handles with it."""
        self.number = 0
        self.answer: Any = None

    def settled(self, value: Any) -> None:
        """It is a waiter: here is its outcome."""
        self.app.settled(self, value)


class Place(NamedTuple):
    """Where a group stands in one partition, by what the broker answered."""

    next: int
    lease: int
    attempts: int = 0
    turns: int = 0
    """Odd: an attempt was said to begin, and neither was said to have ended nor given back."""
    begun_at: float = 0.0
    """That was later than this."""
    ended_at: float = 0.0
    """When it became durable that the last one has ended, if that was said."""


class Life:
    """What is durable in one store. A restored copy begins a new life."""

    __slots__ = (
        "applied",
        "batches",
        "counter",
        "ends",
        "floors",
        "holders",
        "incarnation",
        "logs",
        "names",
        "numbers",
        "offsets",
        "order",
        "owners",
        "place",
        "places",
        "progress",
        "rows",
        "sought",
        "tokens",
    )

    def __init__(self, incarnation: bytes) -> None:
        self.incarnation = incarnation
        self.logs: dict[LogKey, list[int]] = {}
        """What lies at which offset: every ask ever stored, also those trimmed since."""
        self.batches: dict[tuple[LogKey, int], tuple[bytes, int]] = {}
        """(log, offset) -> the batch that was stored there, and where it ends."""
        self.place: dict[int, tuple[LogKey, int]] = {}
        self.numbers: dict[tuple[int, int], int] = {}
        """(producer id, seq) -> ask."""
        self.order: dict[tuple[int, LogKey], int] = {}
        self.progress: dict[int, int] = {}
        """Producer id -> how many positions of its source are stored."""
        self.rows: dict[int, ProducerRow | None] = {}
        self.owners: dict[int, str] = {}
        """Producer id -> name, also of those deleted."""
        self.offsets: dict[OffsetKey, OffsetRow] = {}
        self.places: dict[OffsetKey, Place] = {}
        self.applied: dict[wire.Offset, None] = {}
        """Entries of transactions that have moved a position."""
        self.ends: dict[tuple[OffsetKey, int], int] = {}
        """Where a lease ended."""
        self.sought: dict[str, None] = {}
        """Nonces of the seeks that are done."""
        self.floors: dict[LogKey, int] = {}
        self.names: dict[int, str] = {}
        self.holders: dict[tuple[Any, int], str] = {}
        """(producer id or position, epoch or lease) -> the one session it was given to."""
        self.tokens: dict[int, bytes | None] = {}
        self.counter = 0

    def copy(self) -> Life:
        other = Life(self.incarnation)
        for name in Life.__slots__:
            value = getattr(self, name)
            setattr(other, name, value.copy() if isinstance(value, dict) else value)
        other.logs = {key: log.copy() for key, log in self.logs.items()}
        return other


class Oracle:
    """See the file's head."""

    def __init__(self, incarnation: bytes, remember: int) -> None:
        self.remember = remember
        self.life = Life(incarnation)
        self.lives = {incarnation: self.life}
        self.asks: list[Ask] = []
        self.open = 0
        """Answers that are still owed."""
        self.starts: dict[str, list[tuple[int, int | None]]] = {}
        """Group -> (start_ms, start_offset) as its members asked for."""
        self.attempts_max = 0
        """What is handled so often in vain is a dead letter."""
        self.member_timeout_s = 0.0
        self.heard_at: dict[str, float] = {}
        """Member -> when this broker took its last report."""
        self.silent_until: dict[str, float] = {}
        """Member -> when it was heard of again after it had said nothing for so long that it counted as gone."""
        self.durable_at = (0.0, 0.0)
        """When the last two groups became durable: what comes next was decided behind the first of them."""
        self.tokens: dict[bytes, Transaction] = {}
        self.asked_at: dict[str, float] = {}
        """When an instance first asked for a name, by the name it asks under."""
        self.died_at: dict[str, float] = {}
        """When a session's process died."""

    # -------------------------------------------------------------------------------------------- what is given

    def give(self, ask: Ask) -> bytes:
        """A record is about to be enqueued: its value."""
        ask.number = len(self.asks)
        self.asks.append(ask)
        return b"%d" % ask.number

    def stray(self) -> bytes:
        """The value of a record that must never be stored."""
        number = len(self.asks)
        ask = Ask(None, None, None, None, "", None)  # type: ignore[arg-type]  # nobody's
        ask.number = number
        ask.answer = Violation("a wrong request was stored")
        self.asks.append(ask)
        return b"%d" % number

    # ------------------------------------------------------------------------------------------ what is durable

    def durable(self, group: Group, asked: Callable[[Connection, int], Any], now: float) -> None:
        """A group commit is on the disk. `asked`: the request of this connection and correlation, if it counts."""
        life = self.life
        seqs: dict[int, list[int]] = {}
        touched: dict[Transaction, None] = {}
        outputs: Counter[Input] = Counter()
        if group.counter is not None:
            if group.counter < life.counter:
                raise Violation(f"the counter went back from {life.counter} to {group.counter}")
            life.counter = group.counter
        for topic_id, topic in group.topics.items():
            if topic is not None:
                life.names[topic_id] = topic.name
                for index, floor in enumerate(topic.floors):
                    if floor:
                        life.floors[topic_id, index] = floor
        for stored in group.appends:
            key = (stored.topic_id, stored.partition)
            log = life.logs.get(key)
            if log is None:
                log = life.logs[key] = []
            if stored.offset != len(log):
                raise Violation(f"{key}: a batch at {stored.offset}, the log ends at {len(log)}")
            header = wire.BATCH_HEADER.unpack_from(stored.batch)
            body: Any = memoryview(stored.batch)[HEADER_BYTES:]
            if header[2]:
                body = zlib.decompress(body)
            values, _, _, deltas = msgpack.unpackb(body)
            count, producer_id, first = header[3], header[6], header[7]
            if header[4:6] != key or count != len(values):
                raise Violation(f"{key}: a batch of {len(values)} records for {header[4:6]} says that it has {count}")
            life.batches[key, stored.offset] = (stored.batch, stored.offset + count)
            for index, value in enumerate(values):
                seq = first + (index if deltas is None else deltas[index])
                ask = self.asks[int(value)]
                self._append(life, key, len(log), ask, producer_id, seq)
                log.append(ask.number)
                if producer_id:
                    seqs.setdefault(producer_id, []).append(seq)
                if ask.tx is not None:
                    touched[ask.tx] = None
                if ask.input is not None:
                    outputs[ask.input] += 1
                    if ask.is_dead_letter:
                        self._dead(life, ask.input)
        for producer_id, change in group.producers.items():
            row = life.rows.get(producer_id)
            if not isinstance(change, Advance):
                row = change
            elif row is not None:
                row = advanced_by(row, [change])
            else:
                raise Violation(f"producer {producer_id} is not there, and commits of it are stored")
            if row is not None:
                self._row(life, row)
            life.rows[producer_id] = row
        for producer_id, numbers in seqs.items():
            self._numbers(life, producer_id, numbers)
        for tx in touched:
            for ask in tx.asks:
                if ask.number not in life.place:
                    raise Violation(f"half a transaction is stored: {ask.number} of {tx.asks[0].number} is missing")
            for entry in tx.offsets:
                if OffsetKey(entry.group, entry.topic_id, entry.partition) not in group.offsets:
                    raise Violation(f"a transaction is stored and its position {entry} did not move")
        self._positions(life, group, asked, outputs, now)
        self.durable_at = (self.durable_at[1], now)

    def _append(self, life: Life, key: LogKey, offset: int, ask: Ask, producer_id: int, seq: int) -> None:
        number, producer = ask.number, ask.producer
        if isinstance(ask.answer, Violation):
            raise ask.answer
        if isinstance(ask.answer, IdemqError) and not isinstance(ask.answer, OutcomeUnknown):
            raise Violation(f"record {number}: its sender was told {ask.answer!r}, and it is stored")
        if ask.session.incarnation != life.incarnation:
            raise Violation(f"record {number} was meant for another store")
        if life.names.get(key[0]) != ask.topic or (ask.partition is not None and ask.partition != key[1]):
            raise Violation(f"record {number} lies in {key}, it was sent to {ask.topic} {ask.partition}")
        if producer_id:
            if producer.id != producer_id or ask.seq != seq:
                raise Violation(f"record {number} of {producer_id}, {seq} was given as {producer.id}, {ask.seq}")
            if (producer_id, seq) in life.numbers:
                raise Violation(f"record {number}: {life.numbers[producer_id, seq]} has its seq {seq} of {producer_id}")
            life.numbers[producer_id, seq] = number
            if life.order.get((producer_id, key), -1) >= seq:
                raise Violation(f"record {number}, seq {seq}, lies behind seq {life.order[producer_id, key]}")
            life.order[producer_id, key] = seq
        elif producer.dedup:
            raise Violation(f"record {number} was stored without its producer")
        life.place[number] = (key, offset)

    def _row(self, life: Life, row: ProducerRow) -> None:
        old = life.rows.get(row.producer_id)
        life.owners[row.producer_id] = row.name
        if old is not None and (row.last_seq < old.last_seq or row.epoch < old.epoch):
            raise Violation(
                f"producer {row.name} went back: {old.last_seq}, {old.epoch} to {row.last_seq}, {row.epoch}"
            )
        if old is not None and old.session != row.session:
            self._taken(f"producer {row.name}", old.session, row.session)
        if row.token is not None and (old is None or row.token != old.token):
            tx = self.tokens[row.token]
            if tx.producer.id != row.producer_id or any(ask.number not in life.place for ask in tx.asks):
                raise Violation(f"the token {row.token!r} is stored, and its transaction is not")
            for end in row.takeovers:
                if end.epoch == tx.producer.epoch and tx.asks and tx.asks[-1].seq > end.ended_at:
                    raise Violation(f"the token {row.token!r} of a fenced epoch is stored")

    def _taken(self, what: str, before: str, after: str) -> None:
        """A name changed hands: never to somebody who was dead before its holder came."""
        died_at = self.died_at.get(after.split(".")[0])
        if died_at is not None and died_at < self.asked_at[before]:
            raise Violation(f"{what} was taken from {before} by {after}, who was dead before {before} came")

    def _numbers(self, life: Life, producer_id: int, numbers: list[int]) -> None:
        """The numbers of one producer in one group."""
        numbers.sort()
        row = life.rows.get(producer_id)
        ends = {} if row is None else {takeover.epoch: takeover.ended_at for takeover in row.takeovers}
        if row is not None and row.last_seq < numbers[-1]:
            raise Violation(f"producer {row.name} is at {row.last_seq}, {numbers[-1]} is stored")
        at = life.progress.get(producer_id, 0)
        for seq in numbers:
            ask = self.asks[life.numbers[producer_id, seq]]
            epoch = ask.producer.epoch
            if row is not None and epoch != row.epoch and (epoch > row.epoch or seq > ends.get(epoch, seq)):
                raise Violation(
                    f"record {ask.number}: epoch {epoch} was fenced at {ends.get(epoch)}, seq {seq} is stored"
                )
            if ask.source is not None:
                if ask.source.positions[at] != seq:
                    raise Violation(
                        f"{ask.source.name}: position {seq} is stored, {ask.source.positions[at]} before it is not"
                    )
                at += 1
        life.progress[producer_id] = at

    # -------------------------------------------------------------------------------------------------- groups

    def _positions(
        self, life: Life, group: Group, asked: Callable[[Connection, int], Any], outputs: Counter[Input], now: float
    ) -> None:
        """The positions of a group commit: they must come about by its answers, one after the other."""
        events: list[tuple[int, OffsetKey, Any, Any]] = []
        for connection, correlation, message, _ in group.replies:
            kind = type(message)
            if kind is wire.Assignment:
                request = asked(connection, correlation)
                events += [
                    (lease.lease, OffsetKey(request.group, *lease[:2]), request, lease) for lease in message.leases
                ]
            elif kind is wire.Sought:
                request = asked(connection, correlation)
                key = OffsetKey(request.group, request.topic_id, request.partition)
                events.append((message.lease, key, request, message))
            elif kind is wire.Committed and not message.duplicate:
                request = asked(connection, correlation)
                events += [
                    (entry.lease, OffsetKey(entry.group, *entry[1:3]), request, entry)
                    for entry in (request.offsets if request is not None else ())
                ]
            elif kind is wire.Done and type(request := asked(connection, correlation)) is wire.DeleteOffsets:
                before = {key: place.lease for key, place in life.places.items()}
                for order, key, _, _ in events:
                    before[key] = max(before.get(key, 0), order)
                for key, order in before.items():
                    if key.group == request.group and key.topic_id == request.topic_id:
                        events.append((order, key, request, None))
        # A lease that a request brought about may be announced to another member before the request is answered.
        events.sort(key=lambda event: event[0])
        for _, key, request, what in events:
            kind = type(what)
            if kind is wire.Offset:
                self._entry(life, key, request, what, outputs, now)
            elif kind is wire.Lease:
                self._lease(life, key, request.member, what, now)
            elif kind is wire.Sought:
                self._seek(life, key, request, what)
            else:
                life.places.pop(key, None)
        wrong = +outputs
        if wrong:
            raise Violation(f"outputs are stored and the position of their input did not move: {wrong}")
        for key, row in group.offsets.items():
            self._row_of_group(life, key, row, now)

    def _entry(
        self, life: Life, key: OffsetKey, request: wire.Commit, entry: wire.Offset, outputs: Counter[Input], now: float
    ) -> None:
        """A position was moved by a commit."""
        place = life.places.get(key)
        if place is None or place.lease != entry.lease:
            raise Violation(f"{key} was moved under the lease {entry.lease}, it stands at {place}")
        plain = not request.producer_id and not request.appends
        if not plain:
            if entry.start != place.next:
                raise Violation(f"{key} stands at {place}, and was moved from {entry.start}")
            if entry in life.applied and entry.end > entry.start:
                raise Violation(f"{entry} was applied twice")
            life.applied[entry] = None
        if entry.end > place.next:
            if entry.end > len(life.logs.get((key.topic_id, key.partition), ())):
                raise Violation(f"{key} was moved to {entry.end}, which is not durable")
            if key.group == "worker":
                floor = life.floors.get((key.topic_id, key.partition), 0)
                for offset in range(place.next, entry.end):
                    message = Input(key, offset)
                    if outputs[message]:
                        outputs[message] -= 1
                    elif offset >= floor:
                        raise Violation(f"{message} has no output, and the position is {entry.end}")
            life.places[key] = Place(entry.end, place.lease, entry.attempts or 0, entry.turns, self.durable_at[0])
        elif entry.end == place.next:
            place = place._replace(attempts=max(place.attempts, entry.attempts or 0))
            if entry.turns > place.turns and entry.turns % 2:
                place = place._replace(turns=entry.turns, begun_at=self.durable_at[0])
            elif entry.turns > place.turns:
                place = place._replace(turns=entry.turns, ended_at=now)
            life.places[key] = place

    def _lease(self, life: Life, key: OffsetKey, member: str, lease: wire.Lease, now: float) -> None:
        """A lease was granted, or told again."""
        place = life.places.get(key)
        if place is None:
            self._begins(life, key, lease.next)
            place = Place(lease.next, 0)
        if lease.next != place.next or lease.lease < place.lease:
            raise Violation(f"{key} stands at {place}, and {member} was given {lease}")
        self._attempts(life, key, place, lease.attempts, now)
        if lease.lease > place.lease:
            life.ends[key, place.lease] = place.next
            place = place._replace(lease=lease.lease, turns=0)
        self._held(life, key, lease.lease, member)
        life.places[key] = place._replace(attempts=lease.attempts)

    def _attempts(self, life: Life, key: OffsetKey, place: Place, attempts: int, now: float) -> None:
        """Attempts count as they are told; and one does that was under way when its member said nothing for so long
        that it counts as gone, which the broker that says so must have heard of."""
        if attempts == place.attempts:
            return
        member = life.holders.get((key, place.lease), "")
        gone = self.silent_until.get(member, -1.0) >= place.begun_at or (
            now - self.heard_at.get(member, now) >= self.member_timeout_s
        )
        under_way = place.turns % 2 or place.ended_at == now
        if attempts != place.attempts + 1 or not under_way or not gone:
            raise Violation(f"{key} stands at {place}, {member} is {'' if gone else 'not '}gone: {attempts} attempts")

    def _seek(self, life: Life, key: OffsetKey, request: wire.Seek, sought: wire.Sought) -> None:
        """A position was set, or that was told again."""
        place = life.places.get(key)
        if request.nonce not in life.sought:
            if (0 if place is None else place.lease) != request.expected_lease or sought.next != request.to:
                raise Violation(f"{key} stands at {place}, and {request} was done: {sought}")
            if place is not None:
                life.ends[key, place.lease] = place.next
            life.places[key] = Place(sought.next, sought.lease)
            life.sought[request.nonce] = None
        if request.member:
            self._held(life, key, sought.lease, request.member)

    def _held(self, life: Life, key: OffsetKey, lease: int, member: str) -> None:
        holder = life.holders.setdefault((key, lease), member)
        if holder != member:
            raise Violation(f"{key}: the lease {lease} was given to {holder} and to {member}")

    def _begins(self, life: Life, key: OffsetKey, start: int) -> None:
        """A group begins in a partition: where its members asked for, or at its earliest."""
        log = (key.topic_id, key.partition)
        if start <= life.floors.get(log, 0):
            return
        for start_ms, start_offset in self.starts.get(key.group, ()):
            if start == start_offset or (start_ms and start_offset is None and start <= len(life.logs.get(log, ()))):
                return
        raise Violation(f"{key} begins at {start}, nobody asked for that")

    def _row_of_group(self, life: Life, key: OffsetKey, row: OffsetRow | None, now: float) -> None:
        """What is stored is what was answered; a lease that nobody could be told of any more goes without."""
        if row is None:
            life.offsets.pop(key, None)
            if key in life.places:
                raise Violation(f"{key} was deleted, nobody asked for that")
            return
        life.offsets[key] = row
        place = life.places.get(key)
        if place is None:
            self._begins(life, key, row.next)
            place = Place(row.next, 0)
        if row.next != place.next or row.lease < place.lease:
            raise Violation(f"{key} is stored as {row}, by the answers it stands at {place}")
        self._attempts(life, key, place, row.attempts, now)
        if row.lease > place.lease:
            life.ends[key, place.lease] = place.next
        # Once that was counted it is over, and what the row says was told after it.
        turns = place.turns if (row.lease, row.attempts) == (place.lease, place.attempts) else row.turns
        if not row.holder:
            turns += turns % 2
        life.places[key] = place._replace(lease=row.lease, attempts=row.attempts, turns=turns)

    def _dead(self, life: Life, message: Input) -> None:
        """Only what was tried so often is a dead letter (see `_attempts`)."""
        place = life.places[message.key]
        if place.next != message.offset or place.attempts < self.attempts_max:
            raise Violation(f"{message} is a dead letter, and {message.key} stands at {place}")

    def heard(self, member: str, now: float) -> None:
        """The broker has taken a member's report."""
        if now - self.heard_at.get(member, now) >= self.member_timeout_s:
            self.silent_until[member] = now
        self.heard_at[member] = now

    def starts_anew(self, member_timeout_s: float) -> None:
        """A broker starts, and has heard of nobody."""
        self.member_timeout_s = member_timeout_s
        self.heard_at.clear()
        self.silent_until.clear()

    # ---------------------------------------------------------------------------------------- what is answered

    def answered(self, ask: Ask, value: Any) -> None:
        """The waiter of one record got its outcome."""
        if ask.answer is not None and not isinstance(ask.answer, OutcomeUnknown):
            raise Violation(f"record {ask.number} was answered twice: {ask.answer!r}, {value!r}")
        ask.answer = value
        life = self.lives.get(ask.session.incarnation)
        if isinstance(value, Receipt):
            assert life is not None
            self._receipt(life, ask, value)
        elif value.code not in SURFACING:
            raise Violation(f"record {ask.number} failed by {value!r}, which is no business of its sender")
        elif not isinstance(value, OutcomeUnknown) and life is not None:
            self._not_stored(life, ask, value)

    def answered_whole(self, tx: Transaction, value: Any) -> None:
        """The waiter of a transaction got its outcome."""
        if tx.answer is not None and not isinstance(tx.answer, OutcomeUnknown):
            raise Violation(f"a transaction was answered twice: {tx.answer!r}, {value!r}")
        tx.answer = value
        life = self.lives.get(tx.session.incarnation)
        if isinstance(value, list):
            assert life is not None
            if len(value) != len(tx.asks):
                raise Violation(f"a transaction of {len(tx.asks)} records got {len(value)} receipts")
            for ask, receipt in zip(tx.asks, value, strict=True):
                ask.answer = receipt
                self._receipt(life, ask, receipt)
            row = life.rows.get(tx.producer.id)
            if not tx.asks and row is not None and row.last_seq < tx.producer.last_seq:
                raise Violation("a transaction was answered before it was durable")
            for entry in tx.offsets:
                if entry not in life.applied:
                    raise Violation(f"a transaction was answered, and did not move its position: {entry}")
            if tx.token is not None and row is not None:
                stored = None if row.token is None else self.tokens[row.token]
                if stored is None or (stored.producer is tx.producer and stored.number < tx.number):
                    raise Violation(f"the token {tx.token!r} was acknowledged, {row.token!r} is stored")
            return
        if value.code not in SURFACING:
            raise Violation(f"a transaction failed by {value!r}, which is no business of its sender")
        if life is not None:
            self.lease_lost(life, tx.offsets, value)
        for ask in tx.asks:
            ask.answer = value
            if not isinstance(value, OutcomeUnknown) and life is not None:
                self._not_stored(life, ask, value)

    def moved_plainly(self, session: Session, offsets: list[wire.Offset], value: Any) -> None:
        """A commit of nothing but positions was answered."""
        life = self.lives.get(session.incarnation)
        if life is None:
            return
        for entry in offsets:
            row = life.offsets.get(OffsetKey(entry.group, entry.topic_id, entry.partition))
            if type(value) is wire.Committed and row is not None and row.lease == entry.lease and row.next < entry.end:
                raise Violation(f"a position was acknowledged at {entry.end} and is {row}")
        self.lease_lost(life, offsets, value)

    def lease_lost(self, life: Life, offsets: list[wire.Offset], value: Any) -> None:
        """Whoever is told where its lease ended is told right."""
        if isinstance(value, LeaseLost) and isinstance(value.details.get("next"), int):
            for entry in offsets:
                key = OffsetKey(entry.group, entry.topic_id, entry.partition)
                if [key.topic_id, key.partition] == [value.details["topic_id"], value.details["partition"]]:
                    ended_at = life.ends.get((key, entry.lease))
                    if ended_at != value.details["next"]:
                        raise Violation(f"{entry} was told that its lease ended at {value.details}, not {ended_at}")

    def _receipt(self, life: Life, ask: Ask, receipt: Receipt) -> None:
        place = life.place.get(ask.number)
        if place is None and receipt.duplicate and ask.source is not None:
            again = life.numbers.get((ask.producer.id, ask.seq))
            place = None if again is None else life.place[again]
        if place is None:
            raise Violation(f"record {ask.number} was acknowledged and is not durable: {receipt}")
        (topic_id, partition), offset = place
        if receipt.partition is None and receipt.offset is not None:
            raise Violation(f"record {ask.number} was acknowledged with an offset in no partition: {receipt}")
        if receipt.offset is not None and receipt.partition is not None:
            log = life.logs.get((topic_id, receipt.partition), ())
            if ask.producer.dedup:
                right = receipt.offset == offset and receipt.partition == partition
            else:
                right = receipt.offset < len(log) and log[receipt.offset] == ask.number
            if not right:
                raise Violation(f"record {ask.number} lies at {place} and was acknowledged as {receipt}")
        elif not receipt.duplicate:
            raise Violation(f"record {ask.number} was acknowledged as new without its offset: {receipt}")
        if ask.producer.dedup and receipt.seq != ask.seq:
            raise Violation(f"record {ask.number} has seq {ask.seq}, its receipt {receipt.seq}")

    def _not_stored(self, life: Life, ask: Ask, error: IdemqError) -> None:
        if ask.number in life.place:
            raise Violation(f"record {ask.number} is stored, and its sender was told {error!r}")

    def announced(self, request: wire.Heartbeat, assignment: wire.Assignment) -> None:
        """A member is told: what it holds is durable. What it did not report it had given back."""
        life = self.life
        reported = {OffsetKey(request.group, held.topic_id, held.partition) for held in request.held}
        for key, place in life.places.items():
            held = key.group == request.group and life.holders.get((key, place.lease)) == request.member
            if held and key not in reported:
                life.places[key] = place._replace(turns=place.turns + place.turns % 2)
        for lease in assignment.leases:
            key = OffsetKey(request.group, lease.topic_id, lease.partition)
            row = life.offsets.get(key)
            if lease.lease > life.counter or (row is not None and row.lease < lease.lease):
                raise Violation(f"{key}: {lease} was announced, {row} is durable")

    def given_out(self, life: Life, what: Any, number: int, session: str) -> None:
        """An epoch was given to a session: to no other one, ever; and it is durable."""
        holder = life.holders.setdefault((what, number), session)
        if holder != session:
            raise Violation(f"{what}: {number} was given to {holder} and to {session}")
        if number > life.counter:
            raise Violation(f"{what}: {number} was given out before it was durable")

    def remembered(self, life: Life, request: wire.Commit) -> None:
        """A duplicate was answered without its positions: it must be too old for them."""
        row = life.rows.get(request.producer_id)
        if row is not None and row.last_seq - request.last_seq < self.remember:
            raise Violation(f"commit {request.last_seq} of {row.name} is remembered, its result was not told")

    def read(self, life: Life, key: LogKey, asked: int, batches: list[tuple[int, bytes]]) -> int:
        """A reader got these batches; returns where it goes on."""
        at = asked
        for offset, batch in batches:
            stored, end = life.batches.get((key, offset), (b"", 0))
            if not offset <= at < end:
                raise Violation(f"a reader of {key} at {at} got a batch at {offset}, where one ends at {end}")
            if batch != stored:
                raise Violation(f"a reader of {key} got at {offset} what is not stored there")
            at = end
        return at

    def truncated(self, life: Life, key: LogKey, earliest: int) -> None:
        """A reader was told that everything below this is gone."""
        if earliest > life.floors.get(key, 0):
            raise Violation(f"a reader of {key} was told that below {earliest} all is gone, it is not")

    # ------------------------------------------------------------------------------------------ another store

    def restore(self, copy: Life, incarnation: bytes) -> None:
        """An older copy of the store was put in place, under a new incarnation."""
        copy.incarnation = incarnation
        self.life = self.lives[incarnation] = copy

    # ------------------------------------------------------------------------------------------ at the end

    def compare(self, store: Any) -> None:
        """The store holds what became durable, and nothing else."""
        life = self.life
        for key, log in life.logs.items():
            if key[0] not in {topic.topic_id for topic in store.topics()}:
                continue
            at = None
            for offset, _, batch in store.read(*key, 0, 1 << 40, len(log)):
                if at is not None and offset != at:
                    raise Violation(f"{key}: nothing is stored between {at} and {offset}")
                at = self.read(life, key, offset, [(offset, batch)])
            if at is not None and at != len(log):
                raise Violation(f"{key}: the store ends at {at}, the log at {len(log)}")
            if at is None and len(log) != life.floors.get(key, 0):
                raise Violation(f"{key}: the store is empty, the log ends at {len(log)}")
        for producer_id, row in life.rows.items():
            if store.producer(producer_id) != row:
                raise Violation(f"the store has not the row of producer {producer_id}")
        for position, moved in life.offsets.items():
            if position.topic_id in life.names and store.offset(position) not in (moved, None):
                raise Violation(f"the store has not the position {position}")
