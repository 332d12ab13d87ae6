"""`connect` and the client: where everything else comes from."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import Generator
from datetime import timedelta
from math import inf
from types import TracebackType
from typing import Any, NamedTuple

from . import wire
from .connection import Address, find_token
from .consumer import PREFETCH_BYTES, Subscription
from .engine import BATCH_BYTES, Engine, ProducerInfo, ProducerOptions, TopicInfo, TopicSettings
from .errors import (
    BrokerBusy,
    ClientClosed,
    InvalidRequest,
    ProducerFenced,
    UnknownGroup,
    UnknownProducer,
    UnknownTopic,
    Unsupported,
    checked,
)
from .group import Callback
from .native import NativeEngine
from .producer import Producer, check_timeout, leave
from .records import Headers, Receipt
from .retry import RetryPolicy
from .source import Source, Start, check_start, place
from .wire import TopicPartition

DEFAULT_URL = "idemq://localhost:7750"

Duration = str | float | timedelta
"""Seconds, a timedelta, or text such as "250ms", "90s", "15m", "24h", "7d"."""

SEEKS_MAX = 10
"""Times that a position whose lease changes meanwhile is tried again."""

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def seconds(duration: Duration, what: str) -> float:
    """A duration in seconds, at least one millisecond. Raises InvalidRequest, naming `what`."""
    value = inf
    if isinstance(duration, timedelta):
        value = duration.total_seconds()
    elif isinstance(duration, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)\s*", duration)
        if match:
            value = float(match[1]) * _UNITS_S[match[2]]
    elif isinstance(duration, (int, float)) and not isinstance(duration, bool):
        value = float(duration)
    if not 0.001 <= value <= 1e11:
        raise InvalidRequest(f'{what} is a time such as "7d", "24h" or a number of seconds, not {duration!r}')
    return value


class MemberInfo(NamedTuple):
    """A member of a group; `assigned`: [(topic, partition)]."""

    id: str
    client: str
    address: str
    assigned: list[tuple[str, int]]


class GroupOffset(NamedTuple):
    """A group's position in one partition: the next message, and how many are behind it."""

    topic: str
    partition: int
    next: int
    lag: int
    attempts: int
    metadata: bytes | None


class GroupInfo(NamedTuple):
    """A group: who is in it, and where it stands."""

    name: str
    members: list[MemberInfo]
    offsets: list[GroupOffset]


class Client:
    """A connection to a broker. It reconnects by itself; every call ends within its `timeout` seconds."""

    def __init__(self, engine: Engine, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._producers: list[Producer] = []
        self._sources: list[Source] = []
        self._default: Producer | None = None
        self._closed = False

    # ------------------------------------------------------------------------------------------------ messages

    async def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Headers | None = None,
        partition: int | None = None,
        message_id: str | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Send one message through this client's anonymous producer; returns once durable. See `Producer.send`."""
        if self._default is None or self._default.ended:  # the broker forgot it: what comes next goes through another
            self._default = self.producer()
        return await self._default.send(
            topic,
            value,
            key=key,
            headers=headers,
            partition=partition,
            message_id=message_id,
            timeout=self._limit(timeout),
        )

    def producer(
        self,
        name: str | None = None,
        *,
        dedup: bool = True,
        linger: float = 0.0,
        batch_bytes: int = BATCH_BYTES,
        in_flight: int = wire.IN_FLIGHT_MAX,
        compression: str | None = None,
    ) -> Producer:
        """A producer. With a name, dedup state outlives this process; `dedup=False` is at least once.

        `linger`: seconds a batch that is not full waits for more; `in_flight`: batches sent and not answered;
        `compression`: None or "zlib".
        """
        self._check_open()
        if name is not None:
            if not dedup:
                raise InvalidRequest("a producer with dedup=False has no name: nothing is remembered for it")
            if not name or name.startswith("~"):
                raise InvalidRequest("a producer's name is not empty and does not begin with '~'")
            checked(wire.Open(name, "-", 0))
        if not 1 <= in_flight <= wire.IN_FLIGHT_MAX:
            raise InvalidRequest(f"in_flight lies in 1 .. {wire.IN_FLIGHT_MAX}")
        if not 1 <= batch_bytes <= wire.MESSAGE_BYTES_MAX:
            raise InvalidRequest(f"batch_bytes lies in 1 .. {wire.MESSAGE_BYTES_MAX}")
        if not 0 <= linger <= 60:
            raise InvalidRequest("linger lies in 0 .. 60 seconds")
        if compression not in (None, "zlib"):
            raise Unsupported(f'compression is None or "zlib", not {compression!r}')
        options = ProducerOptions(dedup, linger, batch_bytes, in_flight, compression)
        producer = Producer(self._engine.producer(name, options), name is not None, self._timeout)
        self._producers = [one for one in self._producers if not one._closed]
        self._producers.append(producer)
        return producer

    def subscribe(
        self,
        *topics: str,
        group: str | None = None,
        start: Start = "earliest",
        retry: RetryPolicy | None = None,
        on_truncated: str = "raise",
        prefetch_bytes: int = PREFETCH_BYTES,
        on_assigned: Callback | None = None,
        on_revoked: Callback | None = None,
    ) -> Subscription:
        """Read topics. Without a `group` all partitions from `start`, nothing stored; with one what the broker assigns.

        `start` counts where the group has no position yet. `on_truncated`: "raise" OffsetTruncated when retention has
        passed the position, or go on at the "earliest". `on_assigned` and `on_revoked` (functions or coroutine
        functions of [(topic, partition)]) run before a partition is read, and before it is given back. `retry`: what
        `run` and `process` do with messages whose handler fails.
        """
        self._check_open()
        if group is not None:
            check_group(group)
        source = Source(
            self._engine,
            topics,
            start,
            on_truncated,
            prefetch_bytes,
            self._timeout,
            group,
            on_assigned,
            on_revoked,
            retry,
        )
        self._sources = [one for one in self._sources if not one.closed]
        self._sources.append(source)
        return Subscription(source)

    # -------------------------------------------------------------------------------------------------- topics

    async def create_topic(
        self,
        name: str,
        partitions: int = 1,
        *,
        retention: Duration | None = None,
        retention_bytes: int | None = None,
        dedup_window: Duration | None = None,
        cleanup: str = "delete",
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> TopicInfo:
        """Create a topic. `exist_ok` accepts one that is there with the same settings, and names what differs."""
        settings = _settings(retention, retention_bytes, dedup_window, cleanup)
        return await self._open_engine().create_topic(name, partitions, settings, exist_ok, self._limit(timeout))

    async def alter_topic(
        self,
        name: str,
        partitions: int | None = None,
        *,
        retention: Duration | None = None,
        retention_bytes: int | None = None,
        timeout: float | None = None,
    ) -> TopicInfo:
        """Set a topic's retention (None: no limit) and, if given, raise its number of partitions."""
        limit = self._limit(timeout)
        if partitions is None:
            partitions = len((await self.describe_topic(name, timeout=limit)).partitions)
        settings = _settings(retention, retention_bytes, None, "delete")
        return await self._open_engine().alter_topic(name, partitions, settings, limit)

    async def delete_topic(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a topic with everything in it."""
        await self._open_engine().delete_topic(name, self._limit(timeout))

    async def purge_topic(self, name: str, *, timeout: float | None = None) -> None:
        """Remove all that is stored in a topic now; offsets go on."""
        await self._open_engine().purge_topic(name, self._limit(timeout))

    async def topics(self, *, timeout: float | None = None) -> list[TopicInfo]:
        """All topics, by name."""
        return await self._open_engine().topics(None, self._limit(timeout))

    async def describe_topic(self, name: str, *, timeout: float | None = None) -> TopicInfo:
        """One topic. Raises UnknownTopic."""
        found = await self._open_engine().topics([name], self._limit(timeout))
        if not found:
            raise UnknownTopic(f"there is no topic {name!r}")
        return found[0]

    # ----------------------------------------------------------------------------------------------- producers

    async def producers(self, *, timeout: float | None = None) -> list[ProducerInfo]:
        """All producer names the broker keeps, anonymous ones (they begin with '~') included."""
        return await self._open_engine().producers(None, self._limit(timeout))

    async def describe_producer(self, name: str, *, timeout: float | None = None) -> ProducerInfo:
        """One producer. Raises UnknownProducer."""
        found = await self._open_engine().producers([name], self._limit(timeout))
        if not found:
            raise UnknownProducer(f"there is no producer {name!r}")
        return found[0]

    async def delete_producer(self, name: str, *, timeout: float | None = None) -> None:
        """Forget a producer: its numbers start again, and what was sent before can be stored a second time."""
        await self._open_engine().delete_producer(name, self._limit(timeout))

    # -------------------------------------------------------------------------------------------------- groups

    async def groups(self, *, timeout: float | None = None) -> list[GroupInfo]:
        """All groups: those with a position or a member, by name."""
        return await self._groups(None, self._limit(timeout))

    async def describe_group(self, name: str, *, timeout: float | None = None) -> GroupInfo:
        """One group. Raises UnknownGroup."""
        check_group(name)
        found = await self._groups(name, self._limit(timeout))
        if not found:
            raise UnknownGroup(f"there is no group {name!r}")
        return found[0]

    async def seek_group(
        self, name: str, topic: str, to: Start, *, partition: int | None = None, timeout: float | None = None
    ) -> dict[int, int]:
        """Set a group's position in a topic (or in one partition of it): an offset, "earliest", "latest" or a time.
        Returns {partition: the position that was set}.

        Members go on from there; what they had in hand cannot be committed any more. A group that is not there yet has
        its place then, before anybody joins it.
        """
        check_group(name)
        check_start(to)
        limit = self._limit(timeout)
        info = await self.describe_topic(topic, timeout=limit)
        if partition is not None and not 0 <= partition < len(info.partitions):
            raise InvalidRequest(f"topic {topic!r} has partitions 0 .. {len(info.partitions) - 1}, not {partition!r}")
        engine = self._open_engine()
        wanted = [ends.index for ends in info.partitions if partition in (None, ends.index)]
        positions = [await place(engine, info, index, to, limit) for index in wanted]  # refused before any is set
        leases = {TopicPartition(one.topic_id, one.partition): one.lease for one in await engine.offsets(name, limit)}
        found = {}
        for index, position in zip(wanted, positions, strict=True):
            key = TopicPartition(info.id, index)
            found[index] = await seek(engine, name, key, leases.get(key, 0), position, limit)
        return found

    async def delete_group(self, name: str, *, timeout: float | None = None) -> None:
        """Forget a group's positions. Raises UnknownGroup, and InvalidRequest while it has members."""
        limit = self._limit(timeout)
        found = await self.describe_group(name, timeout=limit)
        if found.members:
            raise InvalidRequest(f"group {name!r} has {len(found.members)} members: stop them first")
        engine = self._open_engine()
        for topic_id in dict.fromkeys([one.topic_id for one in await engine.offsets(name, limit)]):
            await engine.delete_offsets(name, topic_id, limit)

    async def _groups(self, name: str | None, timeout: float) -> list[GroupInfo]:
        engine = self._open_engine()
        offsets, members = await engine.offsets(name, timeout), await engine.members(name, timeout)
        topics = {one.id: one for one in await engine.topics(None, timeout)} if offsets else {}
        found: dict[str, GroupInfo] = {}
        for group in sorted({one.group for one in offsets} | {member.group for member in members}):
            found[group] = GroupInfo(group, [], [])
        for member in members:
            assigned = [(topics[key.topic_id].name, key.partition) for key in member.held if key.topic_id in topics]
            found[member.group].members.append(MemberInfo(member.member, member.client, member.address, assigned))
        for one in offsets:
            topic = topics.get(one.topic_id)
            if topic is not None:
                lag = topic.partitions[one.partition].next - one.next
                found[one.group].offsets.append(
                    GroupOffset(topic.name, one.partition, one.next, lag, one.attempts, one.metadata)
                )
        return list(found.values())

    # ------------------------------------------------------------------------------------------------- the rest

    async def ping(self, *, timeout: float | None = None) -> int:
        """Ask the broker whether it is there; returns its wall clock, ms since 1970."""
        return await self._open_engine().ping(self._limit(timeout))

    async def close(self, timeout: float | None = None) -> None:
        """Flush all producers within `timeout` seconds, then end. Raises what is not stored, or unknown."""
        if self._closed:
            return
        limit = self._limit(timeout)
        self._closed = True
        for source in self._sources:
            source.end()
        try:
            # All at once: the time is for all of them together.
            closing = [one.close() for one in self._sources] + [one.close(limit) for one in self._producers]
            results = await asyncio.gather(*closing, return_exceptions=True)
        finally:
            await self._engine.close()
        errors: list[BaseException] = [one for one in results if one is not None]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"and: {other}")
            raise errors[0]

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await leave(self.close, error)

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client was closed")

    def _open_engine(self) -> Engine:
        self._check_open()
        return self._engine

    def _limit(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else check_timeout(timeout)


async def seek(engine: Engine, group: str, key: TopicPartition, lease: int, to: int, timeout: float) -> int:
    """Compare and swap; with the lease that it has become, if it changed since we looked. Returns the position.

    Raises BrokerBusy.
    """
    for _ in range(SEEKS_MAX):
        try:
            return (await engine.seek(group, key, lease, to, timeout)).next
        except ProducerFenced as race:  # OPEN_RACE
            current = race.details.get("epoch")
            assert isinstance(current, int)
            lease = current
    raise BrokerBusy(f"group {group!r} changes hands all the time")


def check_group(name: str) -> None:
    """Raises InvalidRequest for what is no group's name."""
    checked(wire.DeleteOffsets(name, 1))


def _settings(
    retention: Duration | None, retention_bytes: int | None, dedup_window: Duration | None, cleanup: str
) -> TopicSettings:
    return TopicSettings(
        None if retention is None else seconds(retention, "retention"),
        retention_bytes,
        None if dedup_window is None else seconds(dedup_window, "dedup_window"),
        cleanup,
    )


class Connecting:
    """What `connect` returns: `async with` it, or await it and close the client yourself."""

    def __init__(self, address: Address, token: str, timeout: float, name: str) -> None:
        self._address = address
        self._token = token
        self._timeout = timeout
        self._name = name
        self._client: Client | None = None

    def __await__(self) -> Generator[Any, None, Client]:
        return self._connect().__await__()

    async def _connect(self) -> Client:
        engine = NativeEngine(self._address, self._token, self._name, self._timeout)
        try:
            await engine.start(self._timeout)
        except BaseException:
            await engine.close()
            raise
        return Client(engine, self._timeout)

    async def __aenter__(self) -> Client:
        self._client = await self._connect()
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._client is not None
        await self._client.__aexit__(kind, error, trace)


def connect(
    url: str | None = None, *, token: str | None = None, timeout: float = 10.0, name: str | None = None
) -> Connecting:
    """Connect to a broker: `async with connect(URL) as mq`, or `mq = await connect(URL)` … `await mq.close()`.

    `url`: idemq://HOST:PORT, else $IDEMQ_URL, else idemq://localhost:7750. `token`: else from the URL, else
    $IDEMQ_TOKEN or the file $IDEMQ_TOKEN_FILE. `timeout`: seconds, for every call that names no other. `name`: who is
    calling, for people who look at the broker. Raises ConnectionLost, AuthError, ProtocolMismatch, InvalidRequest.
    """
    address = Address(url if url is not None else os.environ.get("IDEMQ_URL") or DEFAULT_URL)
    found = token if token is not None else address.token or find_token()
    name = (
        name
        if name is not None
        else f"{os.path.basename(sys.argv[0] or 'python')}@{socket.gethostname()}:{os.getpid()}"
    )
    return Connecting(address, found, check_timeout(timeout), name)
