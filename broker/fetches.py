"""What a fetch gets of the ranges that the core allows: its parts and payload, one legal reply, no range starved.

The core decides what may be read (`Read`), the server when and in which thread; how much of it is read at once, from
where on it needs no thread, and what the reply says of it, is here. It may not know a socket, a thread, a clock, a
store or who asks: batches come through a function. It judges nothing but what it was given: all of that is durable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from idemq.client import wire
from idemq.client.wire import Code

from .core import Damaged, Group, Read, ReadRange

ReadBatches = Callable[[int, int, int, int, int], list[tuple[int, int, bytes]]]
"""See `Storage.read`."""

HOT_BYTES_MAX = 32 << 20
"""The newest bytes of the log, which are in the page cache: reads of them need no thread."""
FETCH_BATCHES_MAX = 8 << 10
"""Batches in one reply, so that its header stays below HEADER_BYTES_MAX (at most 26 bytes a batch)."""
FETCH_BYTES_MIN = 64 << 10
"""What a fetch may still get while many other clients do not read their replies."""
UNSENT_BYTES_MAX = 256 << 20
"""Replies to fetches that clients have not read yet, all together; beyond, a fetch gets less."""


class HotTail:
    """Which offsets were appended lately, so that their bytes are in the page cache."""

    def __init__(self) -> None:
        self._appended: deque[tuple[tuple[int, int], int, int]] = deque()
        self._bytes = 0
        self._spans: dict[tuple[int, int], tuple[int, int]] = {}

    def add(self, group: Group) -> None:
        """These batches are the newest now."""
        for stored in group.appends:
            key = (stored.topic_id, stored.partition)
            self._appended.append((key, stored.offset, len(stored.batch)))
            self._bytes += len(stored.batch)
            first, _ = self._spans.get(key, (stored.offset, 0))
            self._spans[key] = (first, stored.offset)
        while self._bytes > HOT_BYTES_MAX:
            key, offset, size = self._appended.popleft()
            self._bytes -= size
            _, last = self._spans[key]
            if last == offset:
                del self._spans[key]
            else:
                self._spans[key] = (offset + 1, last)

    def holds(self, one: ReadRange) -> bool:
        """Is everything from this range's offset on hot?"""
        span = self._spans.get((one.topic_id, one.partition))
        return one.offset >= one.next or (span is not None and span[0] <= one.offset)


def bytes_allowed(read: Read, unread: int) -> int:
    """What this fetch may get, in bytes: less, the more other clients (`unread`) leave their replies unread."""
    return min(read.bytes_max, max(FETCH_BYTES_MIN, UNSENT_BYTES_MAX // (1 + unread)))


def collect(batches_of: ReadBatches, read: Read, bytes_max: int) -> tuple[list[wire.Part], list[bytes]]:
    """Read what a fetch asks for: its parts, and the payload behind them.

    The whole stays within `bytes_max`, but for a first batch that alone is larger: a reply is always a legal frame.
    Ranges share the bytes, so that the first cannot starve the others.
    """
    parts: list[wire.Part] = list(read.parts)
    payload: list[bytes] = []
    ranges = [one for one in read.ranges if one.offset < one.next]
    bytes_left = bytes_max
    for position, one in enumerate(ranges):
        if bytes_left <= 0 or len(payload) >= FETCH_BATCHES_MAX:
            break
        share = max(bytes_left // (len(ranges) - position), 1)
        try:
            batches = batches_of(one.topic_id, one.partition, one.offset, share, one.next)
        except Damaged as damage:
            parts.append(
                wire.Part(one.topic_id, one.partition, one.earliest, one.next, [], Code.STORE_DAMAGED, str(damage))
            )
            continue
        if not batches or batches[0][0] > one.offset:
            parts.append(found(one, batches))  # it says that they are gone, and has no batches
            continue
        count = 0
        for _, _, batch in batches[: FETCH_BATCHES_MAX - len(payload)]:
            if len(batch) > bytes_left and payload:
                break
            bytes_left -= len(batch)
            payload.append(batch)
            count += 1
        if count:
            parts.append(found(one, batches[:count]))
    return parts, payload


def found(one: ReadRange, batches: Sequence[tuple[int, int, bytes]]) -> wire.Part:
    """The part of a Fetched that answers one range of a Read; `batches` are (offset, timestamp_ms, bytes), in order.

    What was trimmed between the decision and the reading is reported as gone, never skipped in silence.
    """
    if one.offset < one.next and (not batches or batches[0][0] > one.offset):
        earliest = batches[0][0] if batches else one.next
        text = f"offset {one.offset} of partition {one.partition} is gone, the earliest is {earliest}"
        return wire.Part(one.topic_id, one.partition, earliest, one.next, [], Code.OFFSET_TRUNCATED, text)
    entries = [wire.BatchAt(offset, timestamp_ms, len(batch)) for offset, timestamp_ms, batch in batches]
    return wire.Part(one.topic_id, one.partition, one.earliest, one.next, entries)
