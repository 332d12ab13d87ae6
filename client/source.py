"""What a subscription reads, and for whom: every partition from a place of one's own, or what a group was assigned.

Its user's side is `consumer.py`; handlers (`handling.py`) take their messages from here, too. Fetching is `reader.py`'s
business, membership is `group.py`'s, and positions are `positions.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import overload

from .engine import Engine, EngineProducer, ProducerOptions, TopicInfo
from .errors import ClientClosed, IdemqError, InvalidRequest, RetriableError, UnknownTopic
from .group import Callback, GroupConsumer
from .positions import Leased, Piece, Reading
from .producer import GIVE_UP_S
from .reader import Reader
from .records import Message
from .retry import RetryPolicy
from .transaction import Buffer
from .wire import NUMBER_MAX, TopicPartition

TOPIC_AGE_S_MAX = 30.0
"""A topic's partitions are asked for again after this time: added ones are read from their earliest."""

Start = str | int | datetime
"""`"earliest"`, `"latest"`, an offset, or a time (aware datetime)."""


class Batch(Sequence[Message]):
    """Some messages, in order for each partition. Made by `Subscription.batches`; never empty."""

    __slots__ = ("_count", "pieces")

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self._count = sum(stop - start for _, start, stop in pieces)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Message]:
        for stored, start, stop in self.pieces:
            yield from stored.messages(start, stop)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return list(self)[index]
        place = index + self._count if index < 0 else index
        if not 0 <= place < self._count:
            raise IndexError(index)
        for stored, start, stop in self.pieces:
            if place < stop - start:
                return next(stored.messages(start + place, start + place + 1))
            place -= stop - start
        raise AssertionError("the pieces hold as many messages as were counted")

    def __repr__(self) -> str:
        return f"<Batch of {self._count}>"


class Source:
    """Topics that are read, alone or as a member of a group. Opened when something is first wanted of it."""

    def __init__(
        self,
        engine: Engine,
        topics: Sequence[str],
        start: Start,
        on_truncated: str,
        prefetch_bytes: int,
        timeout: float,
        group: str | None,
        on_assigned: Callback | None,
        on_revoked: Callback | None,
        retry: RetryPolicy | None,
    ) -> None:
        if not topics:
            raise InvalidRequest("subscribe to at least one topic")
        if on_truncated not in ("raise", "earliest"):
            raise InvalidRequest(f"on_truncated is 'raise' or 'earliest', not {on_truncated!r}")
        if not 1 <= prefetch_bytes <= 1 << 30:
            raise InvalidRequest("prefetch_bytes lies in 1 .. 1 GiB")
        if group is None and (on_assigned is not None or on_revoked is not None):
            raise InvalidRequest("on_assigned and on_revoked need a group: without one all partitions are read")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise InvalidRequest(f"retry is a RetryPolicy, not {retry!r}")
        if retry is not None and group is None:
            raise InvalidRequest("a RetryPolicy needs a group: subscribe(…, group=NAME)")
        check_start(start)
        self.engine = engine
        self.names = list(dict.fromkeys(topics))
        self.timeout = timeout
        self.retry = retry
        self.reader = Reader(engine, on_truncated, prefetch_bytes)
        self.group = (
            None if group is None else GroupConsumer(engine, self.reader, group, on_assigned, on_revoked, timeout)
        )
        self.opened = self.closed = False
        self.stop_handling: Callable[[], None] | None = None
        """Ends the call of `run` or `process` that is under way; None: there is none."""
        self._start = start
        self._opening = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._producer: EngineProducer | None = None

    def _check_open(self) -> None:
        if self.closed:
            raise ClientClosed("the subscription was closed")

    async def open(self) -> None:
        """Find the topics and where to start, or join the group. Raises UnknownTopic."""
        self._check_open()
        if self.opened:
            return
        async with self._opening:  # two may open at once: one does
            if self.opened:
                return  # type: ignore[unreachable]  # another task may have opened it meanwhile
            found = {topic.name: topic for topic in await self.engine.topics(self.names, self.timeout)}
            for name in self.names:
                if name not in found:
                    raise UnknownTopic(f"there is no topic {name!r}")
            if self.group is not None:
                start_ms, start_offset = 0, None
                if isinstance(self._start, datetime):
                    start_ms = round(self._start.timestamp() * 1000)
                elif isinstance(self._start, int):
                    start_offset = self._start
                elif self._start == "latest":
                    start_ms = NUMBER_MAX
                self.opened = True  # before `on_assigned`, which may seek
                try:
                    await self.group.join([found[name] for name in self.names], start_ms, start_offset)
                except BaseException:
                    self.opened = False
                    raise
                if self.closed:  # while it joined
                    await self.group.leave()
                self._check_open()
            else:
                opened: list[Reading] = []  # all of them or none: a failed open can be tried again
                for topic in found.values():
                    for index in range(len(topic.partitions)):
                        position = await place(self.engine, topic, index, self._start, self.timeout)
                        opened.append(
                            Reading(topic.name, TopicPartition(topic.id, index), position, topic.partitions[index].next)
                        )
                self._check_open()
                self.reader.add(opened)
                self._refreshing = asyncio.get_running_loop().create_task(self._find_new_partitions())
            self.opened = True

    def grouped(self, what: str) -> GroupConsumer:
        """The group. Raises InvalidRequest without one, naming `what` needs it."""
        if self.group is None:
            raise InvalidRequest(f"{what} needs a group: subscribe(…, group=NAME)")
        return self.group

    def reading(self, topic: str, partition: int) -> Reading:
        """Where reading a partition stands. Raises InvalidRequest for one that is not read here."""
        leased = () if self.group is None else [one.reading for one in self.group.positions.held.values()]
        for one in leased or self.reader.readings.values():
            if one.name == (topic, partition):
                return one
        raise InvalidRequest(f"partition {partition} of topic {topic!r} is not read here")

    def stop(self) -> None:
        """End the iterations that run, or the call of `run` or `process`."""
        if self.stop_handling is None:
            self.reader.stop()
        else:
            self.stop_handling()

    def end(self) -> None:
        """Begin to close: nothing more is read."""
        self.closed = True
        self.reader.end()
        if self._refreshing is not None:
            self._refreshing.cancel()

    async def close(self) -> None:
        """Stop reading, and leave the group."""
        if self.group is not None and self.group.calling is asyncio.current_task():
            raise InvalidRequest("on_assigned and on_revoked cannot close the subscription, which waits for them")
        self.end()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        await self.reader.close()
        if self._producer is not None:
            try:
                with suppress(IdemqError):  # whoever waited for a transaction was told when he gave up
                    await self._producer.flush(GIVE_UP_S)
            finally:
                self._producer.end()
        if self.group is not None:
            await self.group.leave()

    @property
    def producer(self) -> EngineProducer:
        """Its own, anonymous, for what is stored with its positions; another one when the broker has forgotten it."""
        self._check_open()
        if self._producer is None or self._producer.ended:
            if self._producer is not None:
                self._producer.end()
            self._producer = self.engine.producer(None, ProducerOptions())
        return self._producer

    async def store(self, buffer: Buffer, timeout: float) -> None:
        """Store this, all of it or nothing. What is not stored stays in hand, until `rewind` hands it out again."""
        await buffer.store(self.producer, timeout)

    async def next(self, max_messages: int, max_wait: float, idle_s: float | None = None) -> Batch | None:
        """The next messages; None when it is time to end, or when nothing came for `idle_s` seconds.

        Where several that were in hand are suspected of having ended a member, they come alone, one at a time.
        """
        reader, group = self.reader, self.group
        loop = asyncio.get_running_loop()
        if not self.opened:
            await self.open()
        if group is not None:
            group.positions.returned()
        idle_at = None if idle_s is None else loop.time() + idle_s
        while await reader.available(idle_at):
            if group is not None and group.endings:
                await asyncio.wait(group.endings)
                continue
            if max_wait:
                await reader.gather(max_messages, loop.time() + max_wait)
            suspect = None if group is None or not group.in_hand_max else _first_suspect(reader)
            wanted = max_messages
            if suspect is not None:
                reader.first(suspect)
                wanted = 1
            pieces: list[Piece] = []
            while wanted and reader.ready:
                piece = reader.take(wanted)
                wanted -= piece[2] - piece[1]
                pieces.append(piece)
                if group is not None:
                    assert isinstance(piece[0].delivery, Leased)
                    group.positions.handed(piece[0].delivery)
            if pieces:
                return Batch(pieces)
        return None

    async def _find_new_partitions(self) -> None:
        """Without a group: partitions that were added to a topic."""
        try:
            while True:
                await asyncio.sleep(TOPIC_AGE_S_MAX)
                try:
                    topics = await self.engine.topics(self.names, self.timeout)
                except RetriableError:
                    continue  # reading outlives an outage, and so does looking
                known = {key.topic_id for key in self.reader.readings}
                added = [
                    Reading(topic.name, TopicPartition(topic.id, ends.index), ends.earliest, ends.next)
                    for topic in topics
                    for ends in topic.partitions
                    if topic.id in known and TopicPartition(topic.id, ends.index) not in self.reader.readings
                ]
                if added:
                    self.reader.add(added)
        except IdemqError as error:
            self.reader.fail(error)


def _first_suspect(reader: Reader) -> Reading | None:
    return next((one for one in reader.ready if one.delivered < one.delivery.suspects_end), None)


async def place(engine: Engine, topic: TopicInfo, index: int, start: Start, timeout: float) -> int:
    """The offset in one partition. Raises InvalidRequest when it lies beyond the end."""
    ends = topic.partitions[index]
    if start == "earliest":
        return ends.earliest
    if start == "latest":
        return ends.next
    if isinstance(start, datetime):
        return await engine.offset_at(topic.id, index, round(start.timestamp() * 1000), timeout)
    assert isinstance(start, int)
    if start > ends.next:
        hint = ": give an offset that each partition has, or a time" if len(topic.partitions) > 1 else ""
        raise InvalidRequest(f"partition {index} of topic {topic.name!r} ends at {ends.next}, before {start}{hint}")
    return start


def check_start(start: Start) -> None:
    """Raises InvalidRequest for what is no place to start from."""
    if isinstance(start, str) and start in ("earliest", "latest"):
        return
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise InvalidRequest("a time to start from needs a time zone: datetime.now(timezone.utc)")
        return
    if type(start) is not int or start < 0:
        raise InvalidRequest(f"start from 'earliest', 'latest', an offset or a time, not {start!r}")
