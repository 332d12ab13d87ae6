"""Reading partitions ahead: one fetch is under way while what it brought before is consumed.

`prefetch_bytes` bounds both. Which partitions are read, from where, and who gets the messages is the subscription's
business (`source.py`); groups and leases are not known here.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from . import records
from .engine import Engine, FetchedPart
from .errors import ChecksumMismatch, ClientClosed, IdemqError, OffsetTruncated, StoreReplaced, UnknownTopic
from .positions import Piece, Reading
from .records import StoredBatch
from .wire import APPENDS_MAX, Code, TopicPartition

FETCH_BYTES = 1 << 20
"""What one fetch asks for."""
BATCH_BYTES = 512
"""What a batch that is read ahead takes in memory beside its body: many hold a single message."""
FETCH_WAIT_S = 5.0
"""How long the broker keeps a fetch that finds nothing."""
FETCH_TURN_WAIT_S = 0.1
"""The same where one fetch cannot ask for all partitions, so that they take turns."""

_NUMBERS = itertools.count(1)


class Reader:
    """Fetches what is read; `available` waits for something to hand out, `take` hands it out."""

    def __init__(self, engine: Engine, on_truncated: str, prefetch_bytes: int) -> None:
        self.readings: dict[TopicPartition, Reading] = {}
        self.ready: deque[Reading] = deque()
        """Those with something to hand out, in turn."""
        self._engine = engine
        self._number = next(_NUMBERS)
        self._on_truncated = on_truncated
        self._prefetch_bytes = prefetch_bytes
        self._buffered_bytes = 0
        self._served = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._fetching: asyncio.Task[None] | None = None
        self._failed: Exception | None = None
        """Why nothing will ever be read again."""
        self._error: IdemqError | None = None
        """Why nothing is read until somebody seeks."""
        self.stopping = False
        """Iterations are to end."""
        self._closed = False

    # -------------------------------------------------------------------------------------------- what is read

    def add(self, readings: Iterable[Reading]) -> None:
        """Read these, too."""
        for one in readings:
            self.readings[one.key] = one
        self._fetch_again()

    def remove(self, keys: Iterable[TopicPartition]) -> None:
        """Read these no more."""
        for key in keys:
            one = self.readings.pop(key, None)
            if one is not None:
                self._drop(one)
        if self._error is not None:  # it may have been theirs; if not, it comes again
            self._error = None
            self._fetch_again()

    def replace(self, one: Reading) -> None:
        """Read a partition by this, and no more by what read it before."""
        before = self.readings.get(one.key)
        if before is not None:
            self._drop(before)
        self.readings[one.key] = one
        self._error = None
        self._fetch_again()

    def seek(self, one: Reading, position: int) -> None:
        """Go on from here in a partition."""
        self._drop(one)
        one.fetched = one.delivered = position
        self._error = None
        self._fetch_again()

    def pause(self, one: Reading, paused: bool) -> None:
        """Fetch and hand out nothing of a partition, or go on. What was read ahead takes no room meanwhile."""
        if one.paused == paused:
            return
        one.paused = paused
        if paused:
            self._drop(one)
            one.fetched = one.delivered
        else:
            self._fetch_again()

    # ---------------------------------------------------------------------------------------------- handing out

    async def available(self, deadline: float | None = None) -> bool:
        """Wait for something to hand out; False when it is time to end (`stop`), or at the deadline (loop's time)."""
        while not self.ready or self.stopping:
            if self._closed:
                raise ClientClosed("the subscription was closed")
            if self.stopping:
                self.stopping = False
                return False
            if self._failed or self._error:
                break
            if not await self.change(deadline):
                return False
        if self._failed is not None:
            raise self._failed
        if not self.ready and self._error is not None:
            raise self._error
        return True

    async def change(self, deadline: float | None) -> bool:
        """Wait until something arrives or ends; False at the deadline (loop's time)."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
                return True
        return False

    async def gather(self, wanted: int, deadline: float) -> None:
        """Wait for as many messages, or for what there is at the deadline (loop's time)."""
        while (
            not self.stopping
            and not (self._failed or self._error)
            and not self._holds(wanted)
            and await self.change(deadline)
        ):
            pass

    def _holds(self, wanted: int) -> bool:
        """Is there so much to hand out? Looks at no more pieces than that takes: many small ones may be there."""
        for one in self.ready:
            for _, start, stop in one.pieces:
                wanted -= stop - start
                if wanted <= 0:
                    return True
        return False

    def take(self, wanted: int) -> Piece:
        """Hand out messages of the partition whose turn it is: of its first piece, and no more than `wanted`."""
        one = self.ready[0]
        stored, start, stop = one.pieces[0]
        end = min(stop, start + wanted)
        one.delivered = stored.offset + end
        if end == stop:
            self.finish(one)
        else:
            one.pieces[0] = (stored, end, stop)
        return stored, start, end

    def finish(self, one: Reading) -> None:
        """All of the first piece of the partition whose turn it is was handed out."""
        stored, _, _ = one.pieces.popleft()
        self._free(one, stored)
        self.ready.remove(one)
        if one.pieces:
            self.ready.append(one)  # the others' turn

    def first(self, one: Reading) -> None:
        """It is this partition's turn."""
        self.ready.remove(one)
        self.ready.appendleft(one)

    def fail(self, error: Exception) -> None:
        """The end: whoever waits for messages is told."""
        self._failed = error
        self._changed.set()

    def stop(self) -> None:
        """End the iterations that run, as soon as they come back for more."""
        self.stopping = True
        self._changed.set()

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

    # ------------------------------------------------------------------------------------------------- fetching

    def _free(self, one: Reading, stored: StoredBatch) -> None:
        one.bytes -= stored.header.body_length + BATCH_BYTES
        self._buffered_bytes -= stored.header.body_length + BATCH_BYTES
        self._room.set()

    def _drop(self, one: Reading) -> None:
        while one.pieces:
            self._free(one, one.pieces.popleft()[0])
        if one in self.ready:
            self.ready.remove(one)

    def _fetch_again(self) -> None:
        """Start fetching from the positions as they are now; a fetch that waits for older ones is dropped.

        Not where only less is to be read: what the others wait for is under way.
        """
        if self._fetching is not None:
            self._fetching.cancel()
            self._fetching = None
        if not self._closed and any(not one.paused for one in self.readings.values()):
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())

    async def _fetch(self) -> None:
        try:
            while True:
                while self._buffered_bytes >= self._prefetch_bytes:
                    self._room.clear()
                    await self._room.wait()
                # Those with the least in the buffer first, and in turn: neither a full one nor the limits of a fetch
                # (its partitions, its bytes) starve the others.
                wanted = [one for one in self.readings.values() if not one.paused]
                if not wanted:
                    return
                ranked = sorted(wanted, key=lambda one: (one.bytes, one.served_last))[:APPENDS_MAX]
                ranges = [(*one.key, one.fetched) for one in ranked]
                bytes_max = min(FETCH_BYTES, self._prefetch_bytes - self._buffered_bytes)
                wait = FETCH_WAIT_S if len(ranked) == len(wanted) else FETCH_TURN_WAIT_S
                parts = await self._engine.fetch(ranges, bytes_max, wait, self._number)
                found = [(self.readings.get(TopicPartition(part.topic_id, part.partition)), part) for part in parts]
                arrived = [(one, part) for one, part in found if one is not None and not one.paused]
                for one, part in arrived:
                    self._arrive(one, part)
                # Whoever got something goes behind the others; with nothing for anybody all that were asked for go.
                for one in [one for one, _ in arrived] or ranked:
                    self._served += 1
                    one.served_last = self._served
        except IdemqError as error:
            self._error = error
            self._changed.set()

    def _arrive(self, one: Reading, part: FetchedPart) -> None:
        if part.code:
            if not (part.code == Code.OFFSET_TRUNCATED and self._on_truncated == "earliest"):
                raise _refusal(one, part)
            one.fetched = part.earliest
            if not one.pieces:
                one.delivered = part.earliest
            return
        one.end = max(one.end, part.next)
        for offset, timestamp, data in part.batches:
            stored = records.unpack(data, offset, timestamp, one.topic, self._engine.incarnation)
            if (stored.header.topic_id, stored.header.partition) != one.key:
                raise ChecksumMismatch(f"a batch of another partition lies at {offset} of {one.topic!r}")
            count = stored.header.records
            start = one.fetched - offset
            if not 0 <= start < count:
                raise ChecksumMismatch(f"asked for {one.fetched} of {one.topic!r}, got {offset}")
            stored.delivery = one.delivery
            if not one.pieces:
                self.ready.append(one)
            one.pieces.append((stored, start, count))
            one.bytes += stored.header.body_length + BATCH_BYTES
            self._buffered_bytes += stored.header.body_length + BATCH_BYTES
            one.fetched = offset + count
        if part.batches:
            self._changed.set()


def _refusal(one: Reading, part: FetchedPart) -> IdemqError:
    name = one.topic
    if part.code == Code.OFFSET_TRUNCATED:
        missed = part.earliest - one.fetched
        details = {"missed": missed, "earliest": part.earliest, "partition": part.partition}
        return OffsetTruncated(f"{missed} messages of partition {part.partition} of {name!r} are gone", details=details)
    if part.code == Code.UNKNOWN_TOPIC:
        return UnknownTopic(f"topic {name!r} was deleted")
    if part.code == Code.STORE_DAMAGED:
        return ChecksumMismatch(part.text)
    # We asked for what we had been told exists.
    return StoreReplaced(f"topic {name!r}: {part.text}")
