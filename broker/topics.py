"""Topics: the row of a topic, the ends of its partitions, and what retention removes.

Pure: no clock, no store, no connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from idemq.client.wire import PartitionEntry, Settings, TopicEntry


class TopicRow(NamedTuple):
    """A topic as it is stored. Its log is elsewhere, batch by batch."""

    topic_id: int
    name: str
    settings: Settings
    floors: tuple[int, ...]
    """For each partition the first offset that still counts. Rows below it go in the background."""
    nonce: str
    deleted: bool
    """No longer a topic: the row stays until its log is gone."""


class Ends(NamedTuple):
    """What is stored of one partition: of its first batch and of its last."""

    first_offset: int
    first_position: int
    """Bytes ever stored in the partition before its first batch."""
    next: int
    end_position: int
    timestamp_ms: int


class Mark(NamedTuple):
    """One stored batch without its bytes."""

    offset: int
    end: int
    """The offset behind its last record."""
    timestamp_ms: int
    end_position: int
    """Bytes ever stored in the partition up to and with this batch."""


class Partition:
    """The decided ends of one partition; `durable_next` bounds what readers may see."""

    __slots__ = ("durable_next", "earliest", "end_position", "first_position", "next", "timestamp_ms")

    def __init__(self, ends: Ends | None, floor: int) -> None:
        self.earliest = floor if ends is None else max(floor, ends.first_offset)
        self.next = self.durable_next = floor if ends is None else max(floor, ends.next)
        self.first_position = 0 if ends is None else ends.first_position
        self.end_position = 0 if ends is None else ends.end_position
        self.timestamp_ms = 0 if ends is None else ends.timestamp_ms

    def entry(self) -> PartitionEntry:
        """What a client is told of it."""
        return PartitionEntry(self.earliest, self.next, self.end_position - self.first_position)


def entry(row: TopicRow, partitions: Sequence[Partition]) -> TopicEntry:
    """What a client is told of a topic."""
    return TopicEntry(row.name, row.topic_id, row.settings, [partition.entry() for partition in partitions])


def removable(row: TopicRow, partition: Partition, floor: int, marks: Sequence[Mark], now_ms: int) -> int:
    """How many of `marks` (the oldest stored batches, in order) no longer count, by deletion, purge, age or size.

    Size keeps the newest batches that together reach the limit, so a partition holds at least `retention_bytes`.
    """
    settings = row.settings
    count = 0
    for mark in marks:
        gone = (
            row.deleted
            or mark.end <= floor
            or (settings.retention_ms is not None and mark.timestamp_ms < now_ms - settings.retention_ms)
            or (
                settings.retention_bytes is not None
                and partition.end_position - mark.end_position >= settings.retention_bytes
            )
        )
        if not gone:
            break
        count += 1
    return count
