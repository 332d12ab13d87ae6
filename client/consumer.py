"""A subscription: what users read with. Without a group every partition, from a place of one's own, nothing stored;
with a group what the broker assigns, and the group's positions (`group.py`). Fetching is `reader.py`'s business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import overload

from . import handling, processing, running
from .engine import Engine, TopicInfo
from .errors import ClientClosed, IdemqError, InvalidRequest, OutcomeUnknown, UnknownTopic
from .group import Callback, GroupConsumer, Leased, moves
from .handling import HANDLER_TIMEOUT_S, Handler, Handling
from .producer import GIVE_UP_S, Producer
from .reader import Piece, Reader, Reading
from .records import Message
from .retry import RetryPolicy
from .wire import NUMBER_MAX, TopicPartition

PREFETCH_BYTES = 8 << 20
"""What is read ahead."""
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


class Subscription:
    """Reads topics. Use it as `async with client.subscribe(TOPIC) as sub`, then `async for message in sub`.

    With a group nothing is committed by reading: `commit`, a transaction, `process` and `run` do that. A partition that
    goes to another member is given back when the loop comes back for more.
    """

    def __init__(
        self,
        engine: Engine,
        topics: Sequence[str],
        start: Start,
        on_truncated: str,
        prefetch_bytes: int,
        timeout: float,
        group: str | None = None,
        on_assigned: Callback | None = None,
        on_revoked: Callback | None = None,
        retry: RetryPolicy | None = None,
        producer: Callable[[], Producer] | None = None,
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
        self._engine = engine
        self._names = list(dict.fromkeys(topics))
        self._start = start
        self._timeout = timeout
        self._reader = Reader(engine, on_truncated, prefetch_bytes)
        self._group = (
            None if group is None else GroupConsumer(engine, self._reader, group, on_assigned, on_revoked, timeout)
        )
        self._opening = asyncio.Lock()
        self._opened = self._closed = False
        self._refreshing: asyncio.Task[None] | None = None
        self._retry = retry
        self._new_producer = producer
        self._transactions: Producer | None = None
        self._handling: Handling | None = None
        """The call of `run` or `process` that is under way."""

    @property
    def assigned(self) -> list[tuple[str, int]]:
        """(topic, partition) of everything that is read."""
        return [one.name for one in self._reader.readings.values()]

    def lag(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): messages not handed out yet}, as of the last fetch."""
        return {one.name: one.end - one.delivered for one in self._reader.readings.values()}

    def positions(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): next offset to be handed out}."""
        return {one.name: one.delivered for one in self._reader.readings.values()}

    def metadata(self) -> dict[tuple[str, int], bytes | None]:
        """{(topic, partition): what was stored with the group's position when the partition was assigned}."""
        held = () if self._group is None else self._group.held.values()
        return {one.reading.name: one.metadata for one in held}

    async def open(self) -> None:
        """Find the topics and where to start, or join the group. Raises UnknownTopic."""
        if self._closed:
            raise ClientClosed("the subscription was closed")
        if self._opened:
            return
        async with self._opening:  # two may open at once: one does
            if self._opened:
                return  # type: ignore[unreachable]  # another task may have opened it meanwhile
            found = {topic.name: topic for topic in await self._engine.topics(self._names, self._timeout)}
            for name in self._names:
                if name not in found:
                    raise UnknownTopic(f"there is no topic {name!r}")
            if self._group is not None:
                start_ms, start_offset = 0, None
                if isinstance(self._start, datetime):
                    start_ms = round(self._start.timestamp() * 1000)
                elif isinstance(self._start, int):
                    start_offset = self._start
                elif self._start == "latest":
                    start_ms = NUMBER_MAX
                self._opened = True  # before `on_assigned`, which may seek
                try:
                    await self._group.join([found[name] for name in self._names], start_ms, start_offset)
                except BaseException:
                    self._opened = False
                    raise
            else:
                opened: list[Reading] = []  # all of them or none: a failed open can be tried again
                for topic in found.values():
                    for index in range(len(topic.partitions)):
                        position = await place(self._engine, topic, index, self._start, self._timeout)
                        opened.append(Reading(topic, index, position, topic.partitions[index].next))
                self._reader.add(opened)
                self._refreshing = asyncio.get_running_loop().create_task(self._find_new_partitions())
            self._opened = True

    async def seek(self, topic: str, partition: int, to: Start) -> None:
        """Go on from somewhere else in one partition: an offset, "earliest", "latest" or a time.

        With a group its position is set to that, durably, for whoever reads it next.
        """
        check_start(to)
        await self.open()
        infos = await self._engine.topics([topic], self._timeout)
        one = self._reading(topic, partition)
        if not infos or infos[0].id != one.topic.id:
            raise InvalidRequest(f"partition {partition} of topic {topic!r} is not read here")
        position = await place(self._engine, infos[0], partition, to, self._timeout)
        one.end = infos[0].partitions[partition].next
        if self._group is None:
            self._reader.seek(one, position)
        else:
            assert isinstance(one.delivery, Leased)
            await self._group.seek(one.delivery, position)

    async def batches(self, max_messages: int = 500, max_wait: float = 0.05) -> AsyncGenerator[Batch, None]:
        """Messages by the batch: at most `max_messages`, never none. `max_wait` seconds count from the first one."""
        if max_messages < 1 or max_wait < 0:
            raise InvalidRequest("max_messages is at least 1, and max_wait not negative")
        while (batch := await self._next(max_messages, max_wait)) is not None:
            yield batch

    async def _next(self, max_messages: int, max_wait: float, idle_s: float | None = None) -> Batch | None:
        """The next messages; None when it is time to end, or when nothing came for `idle_s` seconds.

        Where several that were in hand are suspected of having ended a member, they come alone, one at a time.
        """
        reader, group = self._reader, self._group
        loop = asyncio.get_running_loop()
        if not self._opened:
            await self.open()
        if group is not None:
            group.returned()
        idle_at = None if idle_s is None else loop.time() + idle_s
        while await reader.available(idle_at):
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
                    group.handed(piece[0].delivery)
            if pieces:
                return Batch(pieces)
        return None

    async def __aiter__(self) -> AsyncIterator[Message]:
        if not self._opened:
            await self.open()
        reader, group = self._reader, self._group
        if group is not None:
            group.returned()
        while await reader.available():
            one = reader.ready[0]
            piece = one.pieces[0]
            stored, start, stop = piece
            for message in stored.messages(start, stop):
                if reader.stopping or not one.pieces or one.pieces[0] is not piece or one.paused:
                    break  # somebody sought elsewhere, or reads here, too
                # Handed out before the yield: leaving the loop here and coming back goes on behind this message.
                start += 1
                piece = one.pieces[0] = (stored, start, stop)
                one.delivered = stored.offset + start
                if start == stop:
                    reader.finish(one)
                if group is None:
                    yield message
                else:
                    assert isinstance(stored.delivery, Leased)
                    group.handed(stored.delivery)
                    yield message
                    group.returned()

    def stop(self) -> None:
        """End the iterations that run, as soon as they come back for more; `run` and `process` when they are finished
        with what they have begun, within 8 s."""
        if self._handling is None:
            self._reader.stop()
        else:
            self._handling.stop()

    def end(self) -> None:
        """Begin to close: nothing more is read."""
        self._closed = True
        self._reader.end()
        if self._refreshing is not None:
            self._refreshing.cancel()

    async def close(self) -> None:
        """Stop reading, and leave the group. What is not committed is delivered again, to whoever reads next."""
        if self._group is not None and self._group.calling is asyncio.current_task():
            raise InvalidRequest("on_assigned and on_revoked cannot close the subscription, which waits for them")
        self.end()
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        await self._reader.close()
        if self._transactions is not None:
            with suppress(OutcomeUnknown):  # whoever waited for a transaction was told when he gave up
                await self._transactions.close(GIVE_UP_S)
        if self._group is not None:
            await self._group.leave()

    async def commit(self, what: Message | Batch | Sequence[Message] | None = None, *, wait: bool = True) -> None:
        """Move the group's position behind a message, a batch, messages, or everything handed out (None).

        Cumulative for each partition, and forward only. Without `wait` the call returns at once, and what goes wrong
        is raised when the loop comes back. Raises LeaseLost for partitions that are another member's by now, and
        OffsetConflict for messages that are handed out again, because a transaction of them or of what is before them
        failed; the others are moved. InvalidRequest while `process` or `run` is under way, which commit by themselves.
        """
        group = self._grouped("commit()")
        if self._handling is not None:  # it would pass what is handed out and not handled
            raise InvalidRequest("process() and run() commit what is handled by themselves")
        moved = group.delivered() if what is None else moves(what)
        if wait:
            await group.commit(moved)
        else:
            group.commit_soon(moved)

    async def run(
        self,
        handler: Handler,
        *,
        concurrency: int = 1,
        until_idle: float | None = None,
        handler_timeout: float = HANDLER_TIMEOUT_S,
    ) -> None:
        """Call `handler(message)` for every message, at least once each; `concurrency` of them at a time.

        A plain function is called in a thread, a coroutine function on the loop, where it must not block. Messages of
        one partition with one key are handled in order; all of a partition with a concurrency of 1. What is finished
        is committed within 100 ms, up to the first message that is not. At most 500 messages are in hand.

        A handler that raises, or takes longer than `handler_timeout` seconds, is treated as the subscription's
        RetryPolicy says; without one the call raises its error, when everything that is finished is committed. Raises
        HandlerTimeout, and leaves the group, when a thread cannot be stopped; CircuitOpen.

        Returns after `stop()`, SIGTERM or SIGINT (where nobody else holds the signal), or when nothing came for
        `until_idle` seconds and nothing is left to be done. A member that holds no partition waits for the group.
        """
        await running.run(self, handler, concurrency, until_idle, handler_timeout)

    async def process(
        self,
        handler: Handler,
        *,
        max_messages: int = 500,
        until_idle: float | None = None,
        handler_timeout: float = HANDLER_TIMEOUT_S,
    ) -> None:
        """Call `handler(message, tx)` for message after message; what it sends with `tx` and that the message is done
        with are stored together, effectively once. A transaction holds up to `max_messages` messages.

        When a handler fails, what was handled before it is stored; then it is treated alone, as the RetryPolicy says,
        and what it sent is dropped. It has failed, too, when what it sent cannot be stored: no such topic or partition,
        or too much for one transaction. Everything else as in `run`.
        """
        await processing.process(self, handler, max_messages, until_idle, handler_timeout)

    async def reject(self, message: Message, *, reason: str = "") -> None:
        """Make a dead letter of a message, and move the group past it, in one transaction.

        It must be the first of its partition that is not committed; the RetryPolicy names the topic.
        """
        await handling.reject(self, message, reason)

    async def pause(self, topic: str, partition: int) -> None:
        """Hand out nothing more of a partition until `resume`; a group's member keeps it."""
        await self.open()
        self._reader.pause(self._reading(topic, partition), True)

    async def resume(self, topic: str, partition: int) -> None:
        """Go on with a partition that was paused."""
        await self.open()
        one = self._reading(topic, partition)
        if not (isinstance(one.delivery, Leased) and one.delivery.state != "held"):
            self._reader.pause(one, False)

    async def __aenter__(self) -> Subscription:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------------- inside

    def _producer(self) -> Producer:
        """This subscription's own, anonymous; another one when the broker has forgotten it."""
        if self._transactions is None or self._transactions.ended:
            assert self._new_producer is not None
            self._transactions = self._new_producer()
        return self._transactions

    def _grouped(self, what: str) -> GroupConsumer:
        if self._group is None:
            raise InvalidRequest(f"{what} needs a group: subscribe(…, group=NAME)")
        return self._group

    def _reading(self, topic: str, partition: int) -> Reading:
        leased = () if self._group is None else [one.reading for one in self._group.held.values()]
        for one in leased or self._reader.readings.values():
            if one.name == (topic, partition):
                return one
        raise InvalidRequest(f"partition {partition} of topic {topic!r} is not read here")

    async def _find_new_partitions(self) -> None:
        """Without a group: partitions that were added to a topic."""
        try:
            while True:
                await asyncio.sleep(TOPIC_AGE_S_MAX)
                known = {key.topic_id for key in self._reader.readings}
                added = [
                    Reading(topic, ends.index, ends.earliest, ends.next)
                    for topic in await self._engine.topics(self._names, self._timeout)
                    for ends in topic.partitions
                    if topic.id in known and TopicPartition(topic.id, ends.index) not in self._reader.readings
                ]
                if added:
                    self._reader.add(added)
        except IdemqError as error:
            self._reader.fail(error)


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
        raise InvalidRequest(f"partition {index} of topic {topic.name!r} ends at {ends.next}, before {start}")
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
