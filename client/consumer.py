"""A subscription: what users read with. Without a group every partition, from a place of one's own, nothing stored;
with a group what the broker assigns, and the group's positions. What is read, and how far, is `source.py`'s business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType

from . import handling, processing, running
from .errors import InvalidRequest
from .handling import HANDLER_TIMEOUT_S, Handler
from .positions import Leased, moves
from .records import Message
from .source import Batch, Source, Start, check_start, place

PREFETCH_BYTES = 8 << 20
"""What is read ahead."""


class Subscription:
    """Reads topics. Use it as `async with client.subscribe(TOPIC) as sub`, then `async for message in sub`.

    With a group nothing is committed by reading: `commit`, a transaction, `process` and `run` do that. A partition that
    goes to another member is given back when the loop comes back for more.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def assigned(self) -> list[tuple[str, int]]:
        """(topic, partition) of everything that is read."""
        return [one.name for one in self._source.reader.readings.values()]

    def lag(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): messages not handed out yet}, as of the last fetch."""
        return {one.name: one.end - one.delivered for one in self._source.reader.readings.values()}

    def positions(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): next offset to be handed out}."""
        return {one.name: one.delivered for one in self._source.reader.readings.values()}

    def metadata(self) -> dict[tuple[str, int], bytes | None]:
        """{(topic, partition): what was stored with the group's position when the partition was assigned}."""
        held = () if self._source.group is None else self._source.group.positions.held.values()
        return {one.reading.name: one.metadata for one in held}

    async def open(self) -> None:
        """Find the topics and where to start, or join the group. Raises UnknownTopic."""
        await self._source.open()

    async def seek(self, topic: str, partition: int, to: Start) -> None:
        """Go on from somewhere else in one partition: an offset, "earliest", "latest" or a time.

        With a group its position is set to that, durably, for whoever reads it next.
        """
        check_start(to)
        source = self._source
        await source.open()
        infos = await source.engine.topics([topic], source.timeout)
        one = source.reading(topic, partition)
        if not infos or infos[0].id != one.key.topic_id:
            raise InvalidRequest(f"partition {partition} of topic {topic!r} is not read here")
        position = await place(source.engine, infos[0], partition, to, source.timeout)
        one.end = infos[0].partitions[partition].next
        if source.group is None:
            source.reader.seek(one, position)
        else:
            assert isinstance(one.delivery, Leased)
            await source.group.seek(one.delivery, position)

    async def batches(self, max_messages: int = 500, max_wait: float = 0.05) -> AsyncGenerator[Batch, None]:
        """Messages by the batch: at most `max_messages`, never none. `max_wait` seconds count from the first one."""
        if max_messages < 1 or max_wait < 0:
            raise InvalidRequest("max_messages is at least 1, and max_wait not negative")
        while (batch := await self._source.next(max_messages, max_wait)) is not None:
            yield batch

    async def __aiter__(self) -> AsyncIterator[Message]:
        source = self._source
        if not source.opened:
            await source.open()
        reader, group = source.reader, source.group
        if group is not None:
            group.positions.returned()
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
                    group.positions.handed(stored.delivery)
                    yield message
                    group.positions.returned()

    def stop(self) -> None:
        """End the iterations that run, as soon as they come back for more; `run` and `process` when they are finished
        with what they have begun, within 8 s."""
        self._source.stop()

    async def close(self) -> None:
        """Stop reading, and leave the group. What is not committed is delivered again, to whoever reads next."""
        await self._source.close()

    async def commit(self, what: Message | Batch | Sequence[Message] | None = None, *, wait: bool = True) -> None:
        """Move the group's position behind a message, a batch, messages, or everything handed out (None).

        Cumulative for each partition, and forward only. Without `wait` the call returns at once, and what goes wrong
        is raised when the loop comes back. Raises LeaseLost for partitions that are another member's by now, and
        OffsetConflict for messages that are handed out again, because a transaction of them or of what is before them
        failed; the others are moved. InvalidRequest while `process` or `run` is under way, which commit by themselves.
        """
        group = self._source.grouped("commit()")
        if self._source.stop_handling is not None:  # it would pass what is handed out and not handled
            raise InvalidRequest("process() and run() commit what is handled by themselves")
        moved = group.positions.delivered() if what is None else moves(what)
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
        await running.run(self._source, handler, concurrency, until_idle, handler_timeout)

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
        await processing.process(self._source, handler, max_messages, until_idle, handler_timeout)

    async def reject(self, message: Message, *, reason: str = "") -> None:
        """Make a dead letter of a message, and move the group past it, in one transaction.

        It must be the first of its partition that is not committed; the RetryPolicy names the topic.
        """
        await handling.reject(self._source, message, reason)

    async def pause(self, topic: str, partition: int) -> None:
        """Hand out nothing more of a partition until `resume`; a group's member keeps it."""
        await self._source.open()
        self._source.reader.pause(self._source.reading(topic, partition), True)

    async def resume(self, topic: str, partition: int) -> None:
        """Go on with a partition that was paused."""
        await self._source.open()
        one = self._source.reading(topic, partition)
        if not (isinstance(one.delivery, Leased) and one.delivery.state != "held"):
            self._source.reader.pause(one, False)

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
