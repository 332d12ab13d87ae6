"""A subscription without a group: every partition from a place of one's own, nothing stored.

One fetch is under way while what it brought before is consumed; `prefetch_bytes` bounds both. Groups come later, and
raise Unsupported when they are asked for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, NoReturn, overload

from . import records
from .engine import Engine, FetchedPart, TopicInfo
from .errors import (
    ChecksumMismatch,
    ClientClosed,
    IdemqError,
    InvalidRequest,
    OffsetTruncated,
    StoreReplaced,
    UnknownTopic,
    Unsupported,
)
from .records import Message, StoredBatch
from .wire import APPENDS_MAX, FETCH_BYTES_MAX, Code

PREFETCH_BYTES = 8 << 20
"""What is read ahead."""
FETCH_BYTES = 1 << 20
"""What one fetch asks for."""
FETCH_WAIT_S = 5.0
"""How long the broker keeps a fetch that finds nothing."""
FETCH_TURN_WAIT_S = 0.1
"""The same where one fetch cannot ask for every partition: so long do the others wait for their turn."""
TOPIC_AGE_S_MAX = 30.0
"""A topic's partitions are asked for again after this time: added ones are read from their earliest."""

Start = str | int | datetime
"""`"earliest"`, `"latest"`, an offset, or a time (aware datetime)."""


class Batch(Sequence[Message]):
    """Some messages, in order for each partition. Made by `Subscription.batches`; never empty."""

    __slots__ = ("_count", "_pieces")

    def __init__(self, pieces: list[tuple[StoredBatch, int, int]]) -> None:
        self._pieces = pieces
        self._count = sum(stop - start for _, start, stop in pieces)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Message]:
        for stored, start, stop in self._pieces:
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
        for stored, start, stop in self._pieces:
            if place < stop - start:
                return next(stored.messages(start + place, start + place + 1))
            place -= stop - start
        raise AssertionError("the pieces hold as many messages as were counted")

    def __repr__(self) -> str:
        return f"<Batch of {self._count}>"


class _Partition:
    """Where reading one partition stands."""

    __slots__ = ("bytes", "delivered", "end", "index", "pieces", "position", "topic", "turn")

    def __init__(self, topic: TopicInfo, index: int, position: int, end: int) -> None:
        self.topic = topic
        self.index = index
        self.position = position
        """The next offset to fetch."""
        self.delivered = position
        """The next offset to hand out."""
        self.end = end
        self.pieces: deque[tuple[StoredBatch, int, int]] = deque()
        """What is fetched and not handed out: batch, first index, behind the last index."""
        self.bytes = 0
        self.turn = 0
        """The lowest is asked for first (`Subscription._fetch`)."""


class Subscription:
    """Reads topics. Use it as `async with client.subscribe(TOPIC) as sub`, then `async for message in sub`."""

    def __init__(
        self,
        engine: Engine,
        topics: Sequence[str],
        start: Start,
        on_truncated: str,
        prefetch_bytes: int,
        timeout: float,
    ) -> None:
        if not topics:
            raise InvalidRequest("subscribe to at least one topic")
        if on_truncated not in ("raise", "earliest"):
            raise InvalidRequest(f"on_truncated is 'raise' or 'earliest', not {on_truncated!r}")
        if not 1 <= prefetch_bytes <= 1 << 30:
            raise InvalidRequest("prefetch_bytes lies in 1 .. 1 GiB")
        _check_start(start)
        self._engine = engine
        self._names = list(dict.fromkeys(topics))
        self._start = start
        self._on_truncated = on_truncated
        self._prefetch_bytes = prefetch_bytes
        self._timeout = timeout
        self._partitions: dict[tuple[int, int], _Partition] = {}
        self._ready: deque[_Partition] = deque()
        """Partitions with something to hand out, in turn."""
        self._buffered_bytes = 0
        self._turn = 0
        self._arrived = asyncio.Event()
        self._wanted = asyncio.Event()
        self._fetching: asyncio.Task[None] | None = None
        self._error: IdemqError | None = None
        self._stopped = self._closed = False

    @property
    def assigned(self) -> list[tuple[str, int]]:
        """(topic, partition) of everything that is read."""
        return [(one.topic.name, one.index) for one in self._partitions.values()]

    def lag(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): messages not handed out yet}, as of the last fetch."""
        return {(one.topic.name, one.index): one.end - one.delivered for one in self._partitions.values()}

    def positions(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): next offset to be handed out}."""
        return {(one.topic.name, one.index): one.delivered for one in self._partitions.values()}

    async def open(self) -> None:
        """Find the topics and where to start. Raises UnknownTopic."""
        if self._closed:
            raise ClientClosed("the subscription was closed")
        if self._partitions:
            return
        found = {topic.name: topic for topic in await self._engine.topics(self._names, self._timeout)}
        for name in self._names:
            if name not in found:
                raise UnknownTopic(f"there is no topic {name!r}")
        opened: dict[tuple[int, int], _Partition] = {}  # all of them or none: a failed open can be tried again
        for topic in found.values():
            for index in range(len(topic.partitions)):
                position = await self._place(topic, index, self._start)
                opened[topic.id, index] = _Partition(topic, index, position, topic.partitions[index].next)
        if not self._partitions:  # two may open at once: the first wins
            self._partitions = opened
            self._fetch_again()

    async def seek(self, topic: str, partition: int, to: Start) -> None:
        """Go on from somewhere else in one partition: an offset, "earliest", "latest" or a time."""
        _check_start(to)
        await self.open()
        infos = await self._engine.topics([topic], self._timeout)
        one = next(
            (one for one in self._partitions.values() if (one.topic.name, one.index) == (topic, partition)), None
        )
        if one is None or not infos or infos[0].id != one.topic.id:
            raise InvalidRequest(f"partition {partition} of topic {topic!r} is not read here")
        position = await self._place(infos[0], partition, to)
        self._drop_buffered(one)
        one.position = one.delivered = position
        one.end = infos[0].partitions[partition].next
        self._error = None
        self._fetch_again()

    async def batches(self, max_messages: int = 500, max_wait: float = 0.05) -> AsyncIterator[Batch]:
        """Messages by the batch: at most `max_messages`, never none. `max_wait` seconds count from the first one."""
        if max_messages < 1 or max_wait < 0:
            raise InvalidRequest("max_messages is at least 1, and max_wait not negative")
        loop = asyncio.get_running_loop()
        while await self._available():
            if sum(stop - start for one in self._ready for _, start, stop in one.pieces) < max_messages and max_wait:
                deadline = loop.time() + max_wait
                while (
                    not self._stopped
                    and self._error is None
                    and sum(stop - start for one in self._ready for _, start, stop in one.pieces) < max_messages
                ):
                    left = deadline - loop.time()
                    if left <= 0:
                        break
                    self._arrived.clear()
                    try:
                        async with asyncio.timeout(left):
                            await self._arrived.wait()
                    except TimeoutError:
                        break
            pieces: list[tuple[StoredBatch, int, int]] = []
            wanted = max_messages
            while wanted and self._ready:
                piece = self._take(wanted)
                wanted -= piece[2] - piece[1]
                pieces.append(piece)
            if pieces:
                yield Batch(pieces)

    async def __aiter__(self) -> AsyncIterator[Message]:
        while await self._available():
            partition = self._ready[0]
            piece = partition.pieces[0]
            stored, start, stop = piece
            for message in stored.messages(start, stop):
                if self._stopped or not partition.pieces or partition.pieces[0] is not piece:
                    break  # somebody sought elsewhere, or reads here, too
                # Handed out before the yield: leaving the loop here and coming back goes on behind this message.
                start += 1
                piece = partition.pieces[0] = (stored, start, stop)
                partition.delivered = stored.offset + start
                if start == stop:
                    self._finish_piece(partition)
                yield message

    def stop(self) -> None:
        """End the iterations that run, as soon as they come back for more."""
        self._stopped = True
        self._arrived.set()

    def end(self) -> None:
        """Begin to close: nothing more is read."""
        self._closed = True
        self.stop()
        if self._fetching is not None:
            self._fetching.cancel()

    async def close(self) -> None:
        """Stop reading."""
        self.end()
        if self._fetching is not None:
            await asyncio.wait([self._fetching])
            self._fetching = None

    async def commit(self, what: object = None, *, wait: bool = True) -> NoReturn:
        """Move the group's position: needs a group."""
        raise Unsupported("a subscription without a group has nothing to commit, and groups are not offered yet")

    async def run(self, handler: Callable[..., Any], *, concurrency: int = 1) -> NoReturn:
        """Handle every message, at least once: needs a group."""
        raise Unsupported("run() needs a group, and groups are not offered yet: loop over the subscription")

    async def process(self, handler: Callable[..., Any], *, max_messages: int = 500) -> NoReturn:
        """Handle every message and store what comes of it, in one transaction: needs a group."""
        raise Unsupported("process() needs a group, and groups are not offered yet: loop over batches()")

    async def reject(self, message: Message, *, reason: str = "") -> NoReturn:
        """Set a message aside for the group: needs a group."""
        raise Unsupported("reject() needs a group, and groups are not offered yet")

    async def pause(self, topic: str, partition: int) -> NoReturn:
        """Stop reading a partition for a while: comes with groups."""
        raise Unsupported("pause() comes with groups, which are not offered yet")

    async def resume(self, topic: str, partition: int) -> NoReturn:
        """Go on reading a partition: comes with groups."""
        raise Unsupported("resume() comes with groups, which are not offered yet")

    async def __aenter__(self) -> Subscription:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------------- inside

    async def _place(self, topic: TopicInfo, index: int, start: Start) -> int:
        ends = topic.partitions[index]
        if start == "earliest":
            return ends.earliest
        if start == "latest":
            return ends.next
        if isinstance(start, datetime):
            return await self._engine.offset_at(topic.id, index, round(start.timestamp() * 1000), self._timeout)
        assert isinstance(start, int)
        if start > ends.next:
            raise InvalidRequest(f"partition {index} of topic {topic.name!r} ends at {ends.next}, before {start}")
        return start

    async def _available(self) -> bool:
        """Wait for something to hand out; False when it is time to end."""
        if not self._partitions:
            await self.open()
        while not self._ready or self._stopped:
            if self._closed:
                raise ClientClosed("the subscription was closed")
            if self._stopped:
                self._stopped = False
                return False
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        return True

    def _take(self, wanted: int) -> tuple[StoredBatch, int, int]:
        partition = self._ready[0]
        stored, start, stop = partition.pieces[0]
        end = min(stop, start + wanted)
        partition.delivered = stored.offset + end
        if end == stop:
            self._finish_piece(partition)
        else:
            partition.pieces[0] = (stored, end, stop)
        return stored, start, end

    def _finish_piece(self, partition: _Partition) -> None:
        stored, _, _ = partition.pieces.popleft()
        self._free(partition, stored)
        self._ready.popleft()
        if partition.pieces:
            self._ready.append(partition)  # the others' turn

    def _free(self, partition: _Partition, stored: StoredBatch) -> None:
        partition.bytes -= stored.header.body_length
        self._buffered_bytes -= stored.header.body_length
        self._wanted.set()

    def _drop_buffered(self, partition: _Partition) -> None:
        while partition.pieces:
            self._free(partition, partition.pieces.popleft()[0])
        if partition in self._ready:
            self._ready.remove(partition)

    def _fetch_again(self) -> None:
        """Start fetching from the positions as they are now; a fetch that waits for older ones is dropped."""
        if self._fetching is not None:
            self._fetching.cancel()
        self._fetching = asyncio.get_running_loop().create_task(self._fetch())

    async def _fetch(self) -> None:
        loop = asyncio.get_running_loop()
        refreshed_at = loop.time()
        try:
            while True:
                while self._buffered_bytes >= self._prefetch_bytes:
                    self._wanted.clear()
                    await self._wanted.wait()
                if loop.time() - refreshed_at > TOPIC_AGE_S_MAX:
                    await self._find_new_partitions()
                    refreshed_at = loop.time()
                # Those with the least in the buffer first, and in turn: neither a full one nor the limits of a fetch
                # (its partitions, its bytes) starve the others.
                ranked = sorted(self._partitions.values(), key=lambda one: (one.bytes, one.turn))[:APPENDS_MAX]
                ranges = [(one.topic.id, one.index, one.position) for one in ranked]
                bytes_max = min(FETCH_BYTES_MAX, FETCH_BYTES, max(1, self._prefetch_bytes - self._buffered_bytes))
                wait = FETCH_WAIT_S if len(ranked) == len(self._partitions) else FETCH_TURN_WAIT_S
                parts = await self._engine.fetch(ranges, bytes_max, wait)
                for part in parts:
                    self._arrive(part)
                # Whoever got something goes behind the others; with nothing for anybody all that were asked for go.
                for one in [self._partitions[part.topic_id, part.partition] for part in parts] or ranked:
                    self._turn += 1
                    one.turn = self._turn
        except IdemqError as error:
            self._error = error
            self._arrived.set()

    async def _find_new_partitions(self) -> None:
        for topic in await self._engine.topics(self._names, self._timeout):
            for ends in topic.partitions:
                if (topic.id, 0) in self._partitions and (topic.id, ends.index) not in self._partitions:
                    self._partitions[topic.id, ends.index] = _Partition(topic, ends.index, ends.earliest, ends.next)

    def _arrive(self, part: FetchedPart) -> None:
        partition = self._partitions[part.topic_id, part.partition]
        if part.code:
            if not (part.code == Code.OFFSET_TRUNCATED and self._on_truncated == "earliest"):
                raise self._refusal(partition, part)
            partition.position = part.earliest
            if not partition.pieces:
                partition.delivered = part.earliest
            return
        partition.end = max(partition.end, part.next)
        for offset, timestamp, data in part.batches:
            stored = records.unpack(data, offset, timestamp, partition.topic.name, self._engine.incarnation)
            if (stored.header.topic_id, stored.header.partition) != (part.topic_id, part.partition):
                raise ChecksumMismatch(f"a batch of another partition lies at {offset} of {partition.topic.name!r}")
            count = stored.header.records
            start = partition.position - offset
            if not 0 <= start < count:
                raise ChecksumMismatch(f"asked for {partition.position} of {partition.topic.name!r}, got {offset}")
            if not partition.pieces:
                self._ready.append(partition)
            partition.pieces.append((stored, start, count))
            partition.bytes += stored.header.body_length
            self._buffered_bytes += stored.header.body_length
            partition.position = offset + count
        if part.batches:
            self._arrived.set()

    def _refusal(self, partition: _Partition, part: FetchedPart) -> IdemqError:
        name = partition.topic.name
        if part.code == Code.OFFSET_TRUNCATED:
            missed = part.earliest - partition.position
            details = {"missed": missed, "earliest": part.earliest, "partition": part.partition}
            return OffsetTruncated(
                f"{missed} messages of partition {part.partition} of {name!r} are gone", details=details
            )
        if part.code == Code.UNKNOWN_TOPIC:
            return UnknownTopic(f"topic {name!r} was deleted")
        if part.code == Code.STORE_DAMAGED:
            return ChecksumMismatch(part.text)
        # We asked for what we had been told exists.
        return StoreReplaced(f"topic {name!r}: {part.text}")


def _check_start(start: Start) -> None:
    if isinstance(start, str) and start in ("earliest", "latest"):
        return
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise InvalidRequest("a time to start from needs a time zone: datetime.now(timezone.utc)")
        return
    if type(start) is not int or start < 0:
        raise InvalidRequest(f"start from 'earliest', 'latest', an offset or a time, not {start!r}")
