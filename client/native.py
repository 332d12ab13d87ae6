"""The native engine: idemq's own broker behind a `Connection`. The protocols that it fulfils are in `engine.py`."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any

from . import session as core
from . import wire
from .connection import Address, Connection
from .engine import (
    Engine,
    EngineMember,
    EngineProducer,
    FetchedBatch,
    FetchedPart,
    PartitionInfo,
    ProducerInfo,
    ProducerOptions,
    TopicInfo,
    TopicSettings,
)
from .errors import (
    BrokerBusy,
    IdemqError,
    OutcomeUnknown,
    ProducerFenced,
    RetriableError,
    TransactionAborted,
    UnknownProducer,
    UnknownTopic,
    checked,
)
from .membership import Changes, Membership
from .pipeline import Producer, Tally, Topic
from .records import Receipt, Record
from .wire import TopicPartition

HEARTBEATS = 3
"""Heartbeats of a member within the time after which it would count as gone."""


class NativeEngine(Engine):
    """idemq's own broker."""

    def __init__(self, address: Address, token: str, client: str, timeout: float) -> None:
        checked(wire.Hello(wire.VERSION, client, token))
        rng = random.Random(secrets.randbits(64))
        config = core.SessionConfig(session=secrets.token_hex(16), client=client, token=token)
        self._session = core.Session(config, rng)
        self._connection = Connection(self._session, address, timeout)

    @property
    def incarnation(self) -> bytes:
        """The store's name; empty before the first connection."""
        return self._session.incarnation

    async def start(self, timeout: float) -> None:
        """Connect, and learn that a broker of our version answers."""
        await self._connection.ask(wire.Ping(), timeout)

    async def close(self) -> None:
        await self._connection.close()

    async def ping(self, timeout: float) -> int:
        pong: wire.Pong = await self._connection.ask(wire.Ping(), timeout)
        return pong.wall_ms

    async def create_topic(
        self, name: str, partitions: int, settings: TopicSettings, exist_ok: bool, timeout: float
    ) -> TopicInfo:
        wanted = checked(wire.CreateTopic(name, partitions, _settings(settings), exist_ok, secrets.token_hex(8)))
        reply: wire.TopicIs = await self._connection.ask(wanted, timeout)
        return _topic_info(reply.topic)

    async def alter_topic(self, name: str, partitions: int, settings: TopicSettings, timeout: float) -> TopicInfo:
        topic_id = (await self._topic(name, timeout)).id
        reply: wire.TopicIs = await self._connection.ask(
            checked(wire.AlterTopic(topic_id, partitions, _settings(settings))), timeout
        )
        return _topic_info(reply.topic)

    async def delete_topic(self, name: str, timeout: float) -> None:
        await self._connection.ask(wire.DeleteTopic((await self._topic(name, timeout)).id), timeout)

    async def purge_topic(self, name: str, timeout: float) -> None:
        topic = await self._topic(name, timeout)
        await self._connection.ask(wire.PurgeTopic(topic.id, [one.next for one in topic.partitions]), timeout)

    async def topics(self, names: Sequence[str] | None, timeout: float) -> list[TopicInfo]:
        found: list[TopicInfo] = []
        after = ""
        while True:
            request = checked(wire.Metadata(None if names is None else list(names), after))
            reply: wire.Topics = await self._connection.ask(request, timeout)
            found += [_topic_info(entry) for entry in reply.topics]
            if not reply.more:
                return found
            after = reply.topics[-1].name

    async def producers(self, names: Sequence[str] | None, timeout: float) -> list[ProducerInfo]:
        found: list[ProducerInfo] = []
        after = ""
        while True:
            request = checked(wire.Producers(None if names is None else list(names), after))
            reply: wire.ProducersAre = await self._connection.ask(request, timeout)
            found += [ProducerInfo(*entry) for entry in reply.producers]
            if not reply.more:
                return found
            after = reply.producers[-1].name

    async def delete_producer(self, name: str, timeout: float) -> None:
        known = await self.producers([name], timeout)
        if not known:
            raise UnknownProducer(f"there is no producer {name!r}")
        await self._connection.ask(wire.DeleteProducer(known[0].id, known[0].epoch), timeout)

    async def fetch(
        self, ranges: Sequence[tuple[int, int, int]], bytes_max: int, wait: float, reader: int
    ) -> list[FetchedPart]:
        request = wire.Fetch([wire.Range(*one) for one in ranges], bytes_max, round(wait * 1000), reader)
        reply, payload = await self._connection.ask(request, inf)
        parts: list[FetchedPart] = []
        start = 0
        for part in reply.parts:
            batches: list[FetchedBatch] = []
            for offset, timestamp_ms, length in part.batches:
                batches.append(FetchedBatch(offset, timestamp_ms, payload[start : start + length]))
                start += length
            parts.append(
                FetchedPart(part.topic_id, part.partition, part.earliest, part.next, batches, part.code, part.text)
            )
        return parts

    async def offset_at(self, topic_id: int, partition: int, timestamp: int, timeout: float) -> int:
        reply: wire.OffsetIs = await self._connection.ask(
            checked(wire.OffsetAt(topic_id, partition, timestamp)), timeout
        )
        return reply.offset

    def producer(self, name: str | None, options: ProducerOptions) -> NativeProducer:
        return NativeProducer(self._session, self._connection, name, options)

    async def member(
        self, group: str, topic_ids: Sequence[int], start_ms: int, start_offset: int | None, timeout: float
    ) -> tuple[NativeMember, Changes]:
        membership = Membership(group, secrets.token_hex(12), topic_ids, start_ms, start_offset)
        try:
            answer: wire.Assignment = await self._connection.ask(checked(membership.report(0)), timeout)
        except BaseException:  # given up, also by cancellation: it must not keep what it may have been granted
            membership.leave()
            now = self._connection.loop.time()
            self._session.call(now, membership.report(0), None, now + timeout)
            self._connection.pump()
            raise
        member = NativeMember(self._session, self._connection, membership, answer.member_timeout_ms)
        return member, membership.take(answer)

    async def commit_offsets(self, offsets: Sequence[wire.Offset], timeout: float) -> None:
        await self._connection.ask(checked(wire.Commit(0, 0, -1, -1, [], list(offsets))), timeout)

    async def seek(
        self, group: str, key: TopicPartition, lease: int, to: int, timeout: float, member: str = ""
    ) -> wire.Sought:
        request = checked(wire.Seek(group, *key, secrets.token_hex(12), lease, to, member))
        connections = self._session.reconnects
        try:
            reply: wire.Sought = await self._connection.ask(request, timeout)
        except ProducerFenced as race:  # OPEN_RACE
            if self._session.reconnects != connections:
                # An earlier copy may have been applied, and what came after it has hidden that.
                text = f"group {group!r} has moved on since, and whether it was set there before nobody knows"
                raise OutcomeUnknown(text) from race
            raise
        return reply

    async def offsets(self, group: str | None, timeout: float) -> list[wire.OffsetEntry]:
        found: list[wire.OffsetEntry] = []
        after: wire.OffsetAfter | None = None
        while True:
            reply: wire.OffsetsAre = await self._connection.ask(checked(wire.Offsets(group, after)), timeout)
            found += reply.offsets
            after = reply.after
            if after is None:
                return found

    async def members(self, group: str | None, timeout: float) -> list[wire.MemberEntry]:
        found: list[wire.MemberEntry] = []
        behind = ("", "")
        while True:
            reply: wire.MembersAre = await self._connection.ask(checked(wire.Members(group, *behind)), timeout)
            found += reply.members
            if not reply.more:
                return found
            behind = (found[-1].group, found[-1].member)

    async def delete_offsets(self, group: str, topic_id: int, timeout: float) -> None:
        await self._connection.ask(checked(wire.DeleteOffsets(group, topic_id)), timeout)

    async def _topic(self, name: str, timeout: float) -> TopicInfo:
        found = await self.topics([name], timeout)
        if not found:
            raise UnknownTopic(f"there is no topic {name!r}")
        return found[0]


class NativeProducer(EngineProducer):
    """A producer of idemq's own broker: the session's producer, and the futures that wait for it."""

    def __init__(
        self, session: core.Session, connection: Connection, name: str | None, options: ProducerOptions
    ) -> None:
        self._session = session
        self._connection = connection
        self._state = Producer(
            name if name is not None else f"~{secrets.token_hex(12)}",
            anonymous=name is None,
            dedup=options.dedup,
            linger_s=options.linger,
            batch_bytes=options.batch_bytes,
            in_flight=options.in_flight,
            codec=wire.Codec.ZLIB if options.compression == "zlib" else wire.Codec.NONE,
            buffer_bytes=2 * options.in_flight * options.batch_bytes,
        )
        self._line: deque[asyncio.Event] = deque()
        session.add(self._state)

    @property
    def name(self) -> str:
        return self._state.name

    @property
    def id(self) -> int:
        return self._state.id

    @property
    def epoch(self) -> int:
        return self._state.epoch

    @property
    def last_seq(self) -> int:
        return self._state.last_seq

    @property
    def highest_seq(self) -> int:
        return self._state.highest

    @property
    def token(self) -> bytes | None:
        return self._state.token

    @property
    def batch_bytes(self) -> int:
        return self._state.batch_bytes

    @property
    def opened(self) -> bool:
        return self._state.opened

    @property
    def ended(self) -> bool:
        return self._state.error is not None

    @property
    def unsettled(self) -> bool:
        return bool(self._state.queue or self._state.unreported)

    async def open(self, timeout: float) -> None:
        waiter = self._connection.future()
        now = self._connection.loop.time()
        self._session.open(now, self._state, waiter, now + timeout)
        self._connection.pump()
        try:
            await waiter
        except BaseException:  # given up, also by cancellation: it must not take the name later
            self._session.remove(now, self._state)
            self._connection.pump()
            raise

    async def send(self, topic: str, record: Record, timeout: float) -> Receipt:
        connection = self._connection
        waiter = connection.future()
        deadline = connection.loop.time() + timeout
        if self._state.room and not self._line:  # the usual case, and the fast one
            seq = self._session.enqueue(connection.loop.time(), self._state, topic, record, waiter, deadline)
        else:
            async with self._turn(deadline, not self._state.room):
                seq = self._session.enqueue(connection.loop.time(), self._state, topic, record, waiter, deadline)
        connection.kick()
        receipt: Receipt = await self._answer(waiter, seq)
        return receipt

    @asynccontextmanager
    async def _turn(self, deadline: float, full: bool) -> AsyncIterator[None]:
        """The producer's line: who came first puts in line first, whatever he waits for. Raises BrokerBusy.

        With given numbers, whoever waited here while something before him was refused is not stored either (C4).
        """
        if not full and not self._line:
            yield
            return
        breaks = self._state.breaks
        mine = asyncio.Event()
        self._line.append(mine)
        try:
            if self._line[0] is not mine:
                try:
                    async with asyncio.timeout_at(deadline):
                        await mine.wait()
                except TimeoutError:
                    raise BrokerBusy("others wait before this one, and its turn did not come in time") from None
            if not self._state.room:
                await self._room(deadline)
            if self._state.breaks != breaks:
                raise RetriableError("not stored, because what was sent before it was refused")
            yield
        finally:
            self._line.remove(mine)
            if self._line:
                self._line[0].set()

    async def enqueue(self, topic: str, chunk: Sequence[bytes | Record], tally: Tally, timeout: float) -> int:
        async with self._turn(self._connection.loop.time() + timeout, not self._state.room):
            return self._enqueue(topic, chunk, tally)

    def _enqueue(self, topic: str, chunk: Sequence[bytes | Record], tally: Tally) -> int:
        taken = self._session.enqueue_many(self._connection.loop.time(), self._state, topic, chunk, tally)
        self._connection.pump()
        return taken

    async def _room(self, deadline: float) -> None:
        """Wait until the buffer takes more, or raise BrokerBusy: nothing was enqueued."""
        waiter = self._connection.future()
        self._session.want_room(self._state, waiter)
        self._connection.kick()
        taken = False
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
            taken = True
        except TimeoutError as late:
            if isinstance(late, OutcomeUnknown):
                raise
            text = f"{self._state.buffered_bytes} bytes wait to be answered, and none was in time"
            raise BrokerBusy(text) from None
        finally:
            if not taken:  # also when room was offered in the turn in which this one gave up
                self._session.leave_room(self._state, waiter)
                self._connection.kick()

    async def finish(self, tally: Tally, timeout: float) -> None:
        waiter = self._connection.future()
        self._session.finish(self._connection.loop.time(), self._state, tally, waiter, timeout)
        self._connection.pump()
        await waiter

    def abandon(self, tally: Tally) -> None:
        self._session.abandon(self._state, tally)

    async def transact(
        self, sends: Sequence[tuple[str, Record]], offsets: Sequence[wire.Offset], token: bytes | None, timeout: float
    ) -> list[Receipt]:
        connection, loop = self._connection, self._connection.loop
        deadline = loop.time() + timeout
        names = dict.fromkeys([name for name, _ in sends])
        unknown = any(self._session.topic(loop.time(), name) is None for name in names)
        waiter = connection.future()
        async with self._turn(deadline, unknown):
            topics = await self._find(names, deadline)
            resolved = [(topics[name], record) for name, record in sends]
            seq = self._session.transact(loop.time(), self._state, resolved, offsets, token, waiter, deadline)
        connection.pump()
        receipts: list[Receipt] = await self._answer(waiter, seq)
        return receipts

    async def _find(self, names: Iterable[str], deadline: float) -> dict[str, Topic]:
        """The topics of a transaction. Raises UnknownTopic, or TransactionAborted when the line broke meanwhile."""
        connection, loop = self._connection, self._connection.loop
        topics: dict[str, Topic] = {}
        breaks = self._state.breaks
        for name in names:
            known = self._session.topic(loop.time(), name)
            if known is None:
                core.check_topic(name)
                looked = connection.future()
                self._session.look_up(loop.time(), name, looked, deadline)
                connection.pump()
                known = await looked
            topics[name] = known
        if self._state.breaks != breaks:
            raise TransactionAborted("not stored, because what was sent before it was refused")
        return topics

    async def flush(self, timeout: float) -> None:
        waiter = self._connection.future()
        self._session.flush(self._connection.loop.time(), self._state, waiter, timeout)
        self._connection.pump()
        await self._answer(waiter, None)

    async def _answer(self, waiter: asyncio.Future[Any], seq: int | None) -> Any:
        """Wait. Cancelled: what was asked for goes on, and its failure waits for the next flush or close."""
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                if seq is None:
                    self._session.leave_flush(self._state, waiter)
                else:
                    self._session.detach(self._state, seq, waiter)
            elif isinstance(error := waiter.exception(), IdemqError):
                self._session.unheard(self._state, error)  # cancelled in the turn in which the answer came
            raise

    def end(self) -> list[Exception]:
        unreported = self._session.remove(self._connection.loop.time(), self._state)
        self._connection.pump()
        return list(unreported)


class NativeMember(EngineMember):
    """A member of a group of idemq's own broker: the heartbeats that wait there for something to change."""

    def __init__(
        self, session: core.Session, connection: Connection, membership: Membership, member_timeout_ms: int
    ) -> None:
        self._session = session
        self._connection = connection
        self._membership = membership
        self._wait_ms = min(member_timeout_ms // HEARTBEATS, wire.WAIT_MS_MAX)
        self._waiter: asyncio.Future[Any] | None = None

    @property
    def name(self) -> str:
        return self._membership.name

    async def changes(self) -> Changes:
        connection = self._connection
        while True:
            self._waiter = connection.future()
            request = self._membership.report(self._wait_ms)
            call = self._session.call(connection.loop.time(), request, self._waiter, inf)
            connection.pump()
            try:
                answer: wire.Assignment | None = await self._waiter
            finally:
                self._session.forget(call)
            if answer is None:
                continue  # how things are has changed since: report it
            self._wait_ms = min(answer.member_timeout_ms // HEARTBEATS, wire.WAIT_MS_MAX)
            changes = self._membership.take(answer)
            if changes != Changes([], [], []):
                return changes

    def promise(self, in_hand_max: int) -> None:
        self._membership.in_hand_max = in_hand_max
        self._report()

    def give_back(self, key: TopicPartition) -> None:
        self._membership.give_back(key)
        self._report()

    def sought(self, key: TopicPartition, lease: int) -> None:
        self._membership.sought(key, lease)
        self._report()

    async def leave(self, timeout: float) -> None:
        self._membership.leave()
        await self._connection.ask(self._membership.report(0), timeout)

    def _report(self) -> None:
        """A report that waits says what is no longer so: take another in its place."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _settings(settings: TopicSettings) -> wire.Settings:
    return wire.Settings(
        _milliseconds(settings.retention),
        settings.retention_bytes,
        _milliseconds(settings.dedup_window),
        settings.cleanup,
    )


def _topic_info(entry: wire.TopicEntry) -> TopicInfo:
    settings = entry.settings
    return TopicInfo(
        entry.name,
        entry.topic_id,
        [PartitionInfo(index, *partition) for index, partition in enumerate(entry.partitions)],
        _seconds(settings.retention_ms),
        settings.retention_bytes,
        _seconds(settings.dedup_window_ms),
        settings.cleanup,
    )
