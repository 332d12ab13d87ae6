"""What runs on a client of the simulated world: applications as users would write them, and requests nobody should.

An application acts when its turn comes and is told outcomes as they arrive. It believes the library: it goes on behind
`last_seq`, sends again what is "not stored" and never what is unknown.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from idemq.broker.groups import OffsetKey
from idemq.broker.producers import last_seq_of
from idemq.client import records, wire
from idemq.client.errors import IdemqError, OutcomeUnknown, ProducerFenced
from idemq.client.pipeline import Producer, Tally
from idemq.client.records import Record

from ..rows import producer_rows
from .oracle import Ask, Input, Source, Transaction, Violation

if TYPE_CHECKING:
    from .world import Process, World

OUTSTANDING_MAX = 40
TOPICS = ("t0", "t1", "t2", "t3")


Output = tuple[Input, bool]
"""What a record is the output of, and whether it is a dead letter."""


class Called:
    """A waiter that is a function."""

    __slots__ = ("settled",)

    def __init__(self, settled: Callable[[Any], None]) -> None:
        self.settled = settled


class App:
    """One application."""

    named = False
    pause_s = 0.3
    """About so long between two turns."""
    supervised = False
    """Is another started whenever it ends?"""

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.process = process
        self.session = process.session
        self.name = ""
        self.outstanding = 0
        """Waiters of the producer's."""
        self.asking = 0
        """Other requests that are not answered."""
        self.over = False
        self.is_weary = False
        """A worker cuts its next attempt short, and begins nothing more."""
        self.rng = world.rng

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.name} on client {self.process.number}"

    @property
    def done(self) -> bool:
        """Has it nothing to wait for?"""
        return self.outstanding == 0 and self.asking == 0

    def act(self, healed: bool) -> None:
        """Its turn."""
        raise AssertionError("each has its own")

    def twin(self, process: Process) -> App:
        """Another instance of it."""
        raise AssertionError("only named ones have twins")

    @staticmethod
    def reading(world: World, process: Process, source: Source) -> App:
        """A loader of this source."""
        return Loader(world, process, source)

    def ask(self, request: Any, then: Callable[[Any], None], seconds: float = inf) -> None:
        """Call the broker."""
        self.asking += 1

        def settled(answer: Any) -> None:
            self.asking -= 1
            then(answer)

        self.world.operations += 1
        self.session.call(self.world.now, request, Called(settled), self.world.now + seconds)

    def ready(self) -> bool:
        """May it go on? When its session has ended, a new process is started."""
        if self.session.error is None:
            return True
        self.over = True
        self.world.after(0.2, self._replace_process, None, None)
        return False

    def _replace_process(self, _one: None, _two: None) -> None:
        if self.world.alive(self.process):
            self.world.restart(self.process)

    def _replace(self, seconds_max: float = 0.3) -> None:
        self.over = True
        twin = self.twin(self.process)
        self.process.apps.append(twin)
        self.world.after(self.rng.random() * seconds_max, self.world.act, self.process, twin)


class Sending(App):
    """Whatever has a producer."""

    def __init__(
        self, world: World, process: Process, name: str, *, anonymous: bool = False, dedup: bool = True
    ) -> None:
        super().__init__(world, process)
        self.name = name
        self.failed = False
        self.opening = False
        self.source: Source | None = None
        self.producer = Producer(
            name,
            anonymous=anonymous,
            dedup=dedup,
            linger_s=world.linger_s,
            batch_bytes=world.batch_bytes,
            in_flight=world.in_flight,
            codec=wire.Codec.ZLIB if world.seed % 16 == 0 else wire.Codec.NONE,
            buffer_bytes=100_000,
        )
        self.session.add(self.producer)
        if anonymous:
            world.oracle.asked_at[self.producer.instance] = world.now

    def settled(self, what: Ask | Transaction, value: Any) -> None:
        """A waiter of ours got its outcome."""
        if type(what) is Transaction:
            self.world.oracle.answered_whole(what, value)
        else:
            assert isinstance(what, Ask)
            self.world.oracle.answered(what, value)
        if isinstance(value, OutcomeUnknown):
            pending = getattr(value, "pending", None)
            if pending is not None and not pending.done:
                pending.waiters.append(what)
                self.undecided(what)
                return
        self.outstanding -= 1
        if isinstance(value, IdemqError):
            self.failed = True
        self.decided(what, value)

    def decided(self, what: Ask | Transaction, value: Any) -> None:
        """An outcome that is final."""

    def undecided(self, what: Ask | Transaction) -> None:
        """The outcome comes later."""

    def ready(self) -> bool:
        """Open the name first; see whether the producer still lives."""
        producer, now = self.producer, self.world.now
        if producer.error is not None:
            if self.outstanding:
                raise Violation(f"{self} ended and {self.outstanding} of its waiters were not told")
            self.over = True
            if self.session.error is not None:
                self.world.after(0.2, self._replace_process, None, None)
            elif self.supervised or (
                not self.world.healed
                and self.rng.random() < (0.3 if isinstance(producer.error, ProducerFenced) else 0.9)
            ):
                self._replace()
            return False
        if not producer.opened and not producer.anonymous:
            if not self.opening:
                self.opening = True
                self.world.oracle.asked_at.setdefault(producer.instance, now)
                self.session.open(now, producer, Called(self._opened), now + 3.0)
            return False
        return True

    def _opened(self, answer: Any) -> None:
        self.opening = False
        if answer is self.producer:
            life = self.world.oracle.lives[self.session.incarnation]
            row = life.rows.get(self.producer.id)
            if row is None and life.rows.get(self.producer.id, 0) == 0:
                raise Violation(f"{self} was opened and is not durable")
            if row is not None and self.producer.last_seq > row.last_seq:
                raise Violation(f"{self} was told {self.producer.last_seq}, {row.last_seq} is durable")

    def topic(self) -> tuple[str, int | None]:
        """Where to send next."""
        rng = self.rng
        # Keys and sticky partitions are the client's own tests; here the partition is ours or the session's.
        return rng.choice(("t0", "t0", "t1", "t2", "t3")), (0 if rng.random() < 0.5 else None)

    def seq(self) -> int | None:
        """The next record's number, if it is ours to give."""
        return None

    def send(self, seq: int | None) -> None:
        """One record that is waited for."""
        world = self.world
        topic, partition = self.topic()
        ask = Ask(self, self.session, self.producer, self.source, topic, partition)
        value = world.oracle.give(ask)
        world.operations += 1
        self.outstanding += 1
        if seq is not None:
            ask.seq = seq
        ask.seq = self.session.enqueue(
            world.now, self.producer, topic, Record(value, None, None, partition, seq), ask, world.now + world.timeout_s
        )

    def send_many(self, count: int) -> None:
        """Records that are waited for together."""
        world = self.world
        topic, partition = self.topic()
        asks = [Ask(self, self.session, self.producer, self.source, topic, None) for _ in range(count)]
        chunk: list[bytes | Record] = []
        for ask in asks:
            value = world.oracle.give(ask)
            ask.seq = -1
            seq = self.seq()
            if seq is not None:
                ask.seq = seq
            chunk.append(value if seq is None and partition is None else Record(value, seq=seq))
        tally = Tally()
        first = self.producer.highest + 1
        taken = self.session.enqueue_many(world.now, self.producer, topic, chunk, tally)
        assert taken == count, "the buffer is large enough"
        for index, ask in enumerate(asks):
            if ask.seq < 0 and self.producer.dedup:
                ask.seq = first + index
        world.operations += count
        self.outstanding += 1
        self.session.finish(
            world.now, self.producer, tally, Called(lambda answer: self._tallied(asks, tally, answer)), world.timeout_s
        )

    def _tallied(self, asks: list[Ask], tally: Tally, answer: Any) -> None:
        self.outstanding -= 1
        life = self.world.oracle.lives.get(self.session.incarnation)
        if isinstance(answer, IdemqError):
            # Nobody waits for them any more and nobody will be told: flush tells whether all went well.
            self.failed = True
            if self.producer.queue:
                self.flush()
            return
        if tally.error is not None:
            self.failed = True
            return
        for ask in asks:
            if life is None or (
                ask.number not in life.place and (ask.source is None or (self.producer.id, ask.seq) not in life.numbers)
            ):
                raise Violation(f"record {ask.number} was counted as stored and is not durable")
        if tally.stored + tally.duplicates != len(asks):
            raise Violation(f"of {len(asks)} records {tally.stored} + {tally.duplicates} were counted")

    def flush(self) -> None:
        """Wait for everything so far."""
        self.outstanding += 1
        self.session.flush(self.world.now, self.producer, Called(self._flushed), self.world.timeout_s)

    def _flushed(self, answer: Any) -> None:
        self.outstanding -= 1
        if isinstance(answer, OutcomeUnknown) and self.producer.error is None:
            self.flush()
        elif isinstance(answer, IdemqError):
            self.failed = True

    def transact(
        self,
        count: int,
        token: bool,
        offsets: Sequence[wire.Offset] = (),
        outputs: Sequence[Output] = (),
        block: Any = None,
    ) -> None:
        """Records on several topics, stored whole or not at all; with `outputs` the first of them are those."""
        world, now = self.world, self.world.now
        tx = Transaction(self, self.session, self.producer, None)
        tx.offsets, tx.block = list(offsets), block
        targets = [self.topic() for _ in range(count)]
        topics = []
        for name, _ in targets:
            topic = self.session.topic(now, name)
            if topic is None:
                self.session.look_up(now, name, Called(_settled), now + 5.0)
                self.decided(tx, None)
                return
            topics.append(topic)
        sends = []
        for index, (topic, (_, partition)) in enumerate(zip(topics, targets, strict=True)):
            ask = Ask(self, self.session, self.producer, self.source, topic.name, partition)
            ask.tx = tx
            if index < len(outputs):
                ask.input, ask.is_dead_letter = outputs[index]
            tx.asks.append(ask)
            value = world.oracle.give(ask)
            seq = self.seq()
            if seq is not None:
                ask.seq = seq
            sends.append((topic, Record(value, None, None, partition, seq)))
        tx.number = world.operations
        if token:
            tx.token = b"token %d" % len(world.oracle.tokens)
            world.oracle.tokens[tx.token] = tx
        world.operations += max(1, count)
        self.outstanding += 1
        last = self.session.transact(now, self.producer, sends, offsets, tx.token, tx, now + world.timeout_s)
        for index, ask in enumerate(tx.asks):
            if ask.seq < 0 and self.producer.dedup:
                ask.seq = last - count + 1 + index

    def close(self) -> None:
        """Give the producer up while things are in flight, and open the name again in the same session."""
        self.session.remove(self.world.now, self.producer)
        self.over = True
        if self.producer.error is None:
            raise Violation("a removed producer lives on")
        self._replace()


class Loader(Sending):
    """Reads a source with positions and gives them as numbers. After any failure it goes on behind `last_seq`."""

    named = True

    def __init__(self, world: World, process: Process, source: Source) -> None:
        super().__init__(world, process, source.name)
        self.source = source
        self.at = -1
        self.failed = True

    def twin(self, process: Process) -> App:
        assert self.source is not None
        return Loader(self.world, process, self.source)

    def seq(self) -> int:
        assert self.source is not None
        source = self.source
        if self.at >= len(source.positions):
            assert not self.world.healed
            seq = (
                source.positions[-1] + self.rng.choice((1, 1, 1, 2, 7)) if source.positions else self.rng.choice((0, 3))
            )
            source.index[seq] = len(source.positions)
            source.positions.append(seq)
        self.at += 1
        return source.positions[self.at - 1]

    def left(self) -> int:
        """How many records there are to send."""
        assert self.source is not None
        return len(self.source.positions) - self.at if self.world.healed else 1000

    @property
    def done(self) -> bool:
        return self.outstanding == 0 and self.left() == 0 and not self.failed

    def act(self, healed: bool) -> None:
        if not self.ready():
            return
        assert self.source is not None
        producer, rng = self.producer, self.rng
        if self.failed:
            if self.outstanding:
                return
            self.failed = False
            if producer.queue:
                self.flush()
                self.failed = True
                return
            life = self.world.oracle.lives[self.session.incarnation]
            row = life.rows.get(producer.id)
            if row is not None and producer.last_seq > row.last_seq:
                raise Violation(f"{self} believes in {producer.last_seq}, {row.last_seq} is durable")
            self.at = bisect_right(self.source.positions, producer.last_seq)
            if self.left():
                self.send(self.seq())
            return
        if self.outstanding > OUTSTANDING_MAX:
            return
        if healed:
            if self.left():
                self.send_many(self.left())
            return
        chance = rng.random()
        if chance < 0.15:
            self.transact(rng.randint(1, 4), rng.random() < 0.5)
        elif chance < 0.22 and self.at:
            self.send(self.source.positions[max(0, self.at - rng.randint(1, 8))])
        elif chance < 0.35:
            self.send_many(rng.randint(1, 8))
        elif chance < 0.4:
            self.flush()
        elif chance < 0.42:
            self.close()
        else:
            for _ in range(rng.randint(1, 5)):
                self.send(self.seq())


class Sender(Sending):
    """Sends what has no position: by a named, an anonymous producer or one without dedup."""

    def __init__(self, world: World, process: Process, kind: str) -> None:
        self.kind = kind
        name = f"counted{process.number}"
        if kind != "counted":
            world.session_number += 1
            name = f"~{world.session_number}"
        super().__init__(world, process, name, anonymous=kind == "anonymous", dedup=kind != "plain")
        self.named = kind == "counted"

    def twin(self, process: Process) -> App:
        twin = Sender(self.world, process, self.kind)
        if self.named:
            twin.name = twin.producer.name = self.name
        return twin

    def act(self, healed: bool) -> None:
        if not self.ready():
            return
        if healed or self.outstanding > OUTSTANDING_MAX:
            self.over = self.outstanding == 0
            return
        rng = self.rng
        chance = rng.random()
        if chance < 0.15:
            token = self.named and rng.random() < 0.5
            self.transact(rng.randint(0 if token else 1, 4), token)
        elif chance < 0.3:
            self.send_many(rng.randint(1, 8))
        elif chance < 0.33:
            self.flush()
        elif chance < 0.35:
            self.close()
        elif chance < 0.45 and self.kind == "anonymous":
            pass
        else:
            for _ in range(rng.randint(1, 5)):
                self.send(None)


class Follower(App):
    """Reads every partition from its beginning."""

    pause_s = 0.15

    def __init__(self, world: World, process: Process) -> None:
        super().__init__(world, process)
        self.positions: dict[tuple[int, int], int] = {}
        self.ids: dict[str, int] = {}

    @property
    def done(self) -> bool:
        life = self.world.oracle.life
        return all(
            self.positions.get((topic.topic_id, index), 0) >= len(life.logs.get((topic.topic_id, index), ()))
            for topic in self.world.store.topics()
            if not topic.deleted and topic.name in TOPICS
            for index in range(len(topic.floors))
        )

    def act(self, healed: bool) -> None:
        if not self.ready():
            return
        rng, now = self.rng, self.world.now
        if healed and self.done:
            return
        for name in TOPICS:
            topic = self.session.topic(now, name)
            if topic is None:
                self.session.look_up(now, name, None, inf)
                continue
            if self.ids.get(name) != topic.topic_id:
                self.positions = {key: at for key, at in self.positions.items() if key[0] != self.ids.get(name)}
                self.ids[name] = topic.topic_id
            for index in range(topic.partitions):
                self.positions.setdefault((topic.topic_id, index), 0)
        if not self.positions or self.asking > 1:
            return
        ranges = [wire.Range(*key, at) for key, at in self.positions.items()]
        wait_ms = rng.choice((0, 0, 100, 1500))
        request = wire.Fetch(ranges, rng.choice((1 << 20,) if healed else (1, 300, 1 << 20)), wait_ms)
        self.ask(request, lambda answer: self._fetched(ranges, answer))

    def _fetched(self, ranges: list[wire.Range], answer: Any) -> None:
        if isinstance(answer, IdemqError):
            return
        world = self.world
        life = world.oracle.lives[self.session.incarnation]
        reply, payload = answer
        asked = {(topic_id, partition): offset for topic_id, partition, offset in ranges}
        start = 0
        for part in reply.parts:
            key = (part.topic_id, part.partition)
            batches = []
            for offset, _, length in part.batches:
                batches.append((offset, payload[start : start + length]))
                start += length
            if part.code == "OFFSET_TRUNCATED":
                world.oracle.truncated(life, key, part.earliest)
                if key in self.positions:
                    self.positions[key] = max(self.positions[key], part.earliest)
            elif part.code == "UNKNOWN_TOPIC":
                self.positions.pop(key, None)
                for name, topic_id in list(self.ids.items()):
                    if topic_id == part.topic_id:
                        del self.ids[name]
                        self.session.look_up(world.now, name, None, inf)
            elif part.code:
                raise Violation(f"a reader of {key} at {asked[key]} was told {part.code} {part.text}")
            else:
                if part.next > len(life.logs.get(key, ())):
                    raise Violation(f"a reader of {key} was told of {part.next}, which is not durable")
                at = world.oracle.read(life, key, asked[key], batches)
                if key in self.positions:
                    self.positions[key] = max(self.positions[key], at)


def _settled(answer: Any) -> None:
    """Nobody minds what became of it."""


def source_of(world: World, name: str) -> Source:
    """A name's source."""
    if name not in world.sources:
        world.sources[name] = Source(name, [])
    return world.sources[name]


# ------------------------------------------------------------------------------------------------ what nobody owns


def admin(world: World, process: Process) -> None:
    """One thing that an administrator does."""
    rng, now, session = world.rng, world.now, process.session

    def ask(request: Any) -> None:
        world.operations += 1
        session.call(now, request, Called(_settled), now + rng.choice((0.1, 4.0)))

    topics = [topic for topic in world.store.topics() if not topic.deleted]
    if world.healed:
        for name in TOPICS:
            if name not in [topic.name for topic in topics]:
                ask(wire.CreateTopic(name, 1, wire.Settings(), exist_ok=True, nonce="n"))
        return
    chance = rng.random()
    name = rng.choice((*TOPICS, "extra", f"x{rng.randrange(9)}"))
    if chance < 0.25:
        settings = wire.Settings(retention_bytes=rng.choice((None, None, 100)))
        nonce = f"n{world.operations}"
        ask(wire.CreateTopic(name, rng.choice((1, 2)), settings, exist_ok=rng.random() < 0.5, nonce=nonce))
    elif chance < 0.38 and topics:
        topic = rng.choice(topics)
        ask(wire.DeleteTopic(topic.topic_id))
        if rng.random() < 0.7:
            ask(wire.CreateTopic(topic.name, rng.choice((1, 2)), wire.Settings(), nonce=f"n{world.operations}"))
    elif chance < 0.54 and topics:
        topic = rng.choice(topics)
        ends = [world.store.partition(topic.topic_id, index) for index in range(len(topic.floors))]
        ask(wire.PurgeTopic(topic.topic_id, [rng.randint(0, end.next) if end else 0 for end in ends]))
    elif chance < 0.6 and topics:
        topic = rng.choice(topics)
        retention = wire.Settings(retention_ms=rng.choice((None, 3000)), retention_bytes=rng.choice((None, 400)))
        ask(wire.AlterTopic(topic.topic_id, rng.choice((1, 2, 3)), retention))
    elif chance < 0.66:
        rows = producer_rows(world.store, 0, 50)
        if rows:
            row = rng.choice(rows)
            ask(wire.DeleteProducer(row.producer_id, row.epoch - rng.choice((0, 0, 0, 1)) or 1))
    elif chance < 0.7:
        ask(wire.Metadata(None))
        ask(wire.Producers(None))
    elif chance < 0.78:
        group = rng.choice(("worker", "mover"))
        if rng.random() < 0.3:
            ask(wire.Members(None))

        def listed(answer: Any) -> None:
            if type(answer) is wire.OffsetsAre and answer.offsets and not world.healed:
                entry = rng.choice(answer.offsets[-4:])  # by topic: of those before some are deleted
                to = rng.randint(0, entry.next)
                for _ in range(rng.choice((1, 1, 2))):  # the second of two races with the first
                    seek = wire.Seek(entry.group, entry.topic_id, entry.partition, world.nonce(), entry.lease, to)
                    session.call(world.now, seek, Called(_settled), world.now + 4.0)

        world.operations += 1
        session.call(now, wire.Offsets(group), Called(listed), now + 4.0)
    elif chance < 0.8 and topics:
        ask(wire.DeleteOffsets(rng.choice(("worker", "mover", "spare")), rng.choice(topics).topic_id))
    elif chance < 0.86 and topics:
        ask(wire.OffsetAt(topics[0].topic_id, 0, int((world.wall_s + now) * 1000) - rng.randint(0, 3000)))
    else:
        ask(wire.Ping())


def probe(world: World) -> None:
    """One request that no session makes; whatever it carries must never be stored."""
    rng = world.rng
    topics = [topic for topic in world.store.topics() if not topic.deleted]
    rows = producer_rows(world.store, 0, 50)
    if not topics or not rows:
        return
    topic, row = rng.choice(topics), rng.choice(rows)
    topic_id = topic.topic_id

    def commit(producer_id: int, epoch: int, prev: int, last: int, **wrong: Any) -> None:
        body = records.pack([world.oracle.stray()], None, None, None, wire.Codec.NONE)
        batch = wire.make_batch(0, 1, topic_id, 0, wrong.get("producer", producer_id), last, last, body)
        if "damage" in wrong:
            batch = batch[:-1] + bytes([batch[-1] ^ 1])
        append = wire.Append(wrong.get("topic", topic_id), wrong.get("partition", 0), len(batch))
        world.probe(wire.Commit(producer_id, epoch, prev, last, [append], wrong.get("offsets", []), None), batch)

    kind = rng.randrange(17)
    here, epoch, far = row.producer_id, row.epoch, 10**6
    if kind == 0:
        commit(here, epoch, far, far + 1)
    elif kind == 1:
        commit(here, epoch + far, row.last_seq, far)
    elif kind == 2:
        commit(far, 1, -1, 5)
    elif kind == 3:
        commit(here, epoch, far, far)
    elif kind == 4 and row.last_seq >= 0:
        last = row.last_seq if rng.random() < 0.5 or not row.results else last_seq_of(row.results[0]) - 1
        if last >= 0:
            commit(here, epoch, last - 1, last)
    elif kind == 5:
        commit(0, 0, -1, -1, topic=far)
    elif kind == 6:
        commit(0, 0, -1, -1, producer=here)
    elif kind == 7:
        commit(0, 0, -1, -1, damage=True)
    elif kind == 8:
        commit(0, 0, -1, -1, offsets=[wire.Offset("mover", topic_id, 0, far, 0, 1)])
    elif kind == 9:
        key = OffsetKey("mover", topic_id, 0)
        position = world.store.offset(key)
        if position is not None:
            offset = wire.Offset("mover", topic_id, 0, position.lease, position.next, far)
            world.probe(wire.Commit(0, 0, -1, -1, [], [offset]))
    elif kind == 10:
        key = OffsetKey("mover", topic_id, 0)
        offset = wire.Offset("mover", topic_id, 0, 1, 0, 1)
        world.probe(wire.Commit(0, 0, -1, -1, [], [offset, offset]))
    elif kind == 11:
        world.probe(
            rng.choice((wire.AlterTopic(far, 1, wire.Settings()), wire.PurgeTopic(far, [0]), wire.DeleteTopic(far)))
        )
    elif kind == 12:
        unsupported = rng.choice((wire.Settings(dedup_window_ms=5), wire.Settings(cleanup="compact")))
        world.probe(rng.choice((wire.CreateTopic("u", 1, unsupported), wire.AlterTopic(topic_id, 1, unsupported))))
    elif kind == 13:
        world.probe(
            rng.choice((wire.PurgeTopic(topic_id, [0] * 9), wire.PurgeTopic(topic_id, [far] * len(topic.floors))))
        )
    elif kind == 14:
        world.probe(
            rng.choice((wire.DeleteProducer(far, 1), wire.Seek("g", far, 0, "nonce", 0, 0), wire.OffsetAt(far, 0, 0)))
        )
    elif kind == 15:
        world.oracle.starts.setdefault("spare", []).append((0, 0))
        world.probe(wire.Heartbeat("spare", "a", rng.choice(([topic_id], [topic_id], [])), [], 0, 0))
    else:
        requests = (wire.Hello(wire.VERSION, "again"), wire.Open(f"nobody{rng.randrange(99)}", "p", far), wire.Pong(1))
        world.probe(rng.choice(requests))
