"""One member of a group, pure: what it holds, what it reports, and what an answer to a report changes.

A report says how things are, so it may be repeated, and a newer one takes the place of an older: only the answer to the
newest is to be taken. It may not know a socket, a clock, a task, nor what is done with the partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import wire
from .wire import Held, TopicPartition


class Changes(NamedTuple):
    """What an answer changes for the member."""

    granted: list[wire.Lease]
    revoked: list[TopicPartition]
    """To be finished, committed and given back (`give_back`)."""
    lost: list[TopicPartition]
    """Held no longer: nothing can be committed there."""


class Membership:
    """What a member of a group holds."""

    def __init__(
        self, group: str, name: str, topics: Sequence[int], start_ms: int = 0, start_offset: int | None = None
    ) -> None:
        self.name = name
        self.in_hand_max = 0
        """The member's promise (see `wire.Heartbeat`)."""
        self.held: dict[TopicPartition, Held] = {}
        self._group = group
        self._topics = list(topics)
        self._start_ms = start_ms
        self._start_offset = start_offset

    def report(self, wait_ms: int) -> wire.Heartbeat:
        """The request that says how things are now."""
        return wire.Heartbeat(
            self._group,
            self.name,
            self._topics,
            list(self.held.values()),
            self._start_ms,
            self._start_offset,
            self.in_hand_max,
            wait_ms,
        )

    def take(self, answer: wire.Assignment) -> Changes:
        """The answer to the newest report. What is lost is no longer held when it is granted again."""
        lost = [key for key in answer.lost if self.held.pop(key, None) is not None]
        revoked = [key for key in answer.revoked if key in self.held and not self.held[key].releasing]
        for key in revoked:
            self.held[key] = self.held[key]._replace(releasing=True)
        granted: list[wire.Lease] = []
        for lease in answer.leases:
            key = TopicPartition(lease.topic_id, lease.partition)
            if key not in self.held:
                self.held[key] = Held(*key, lease.lease)
                granted.append(lease)
        return Changes(granted, revoked, lost)

    def give_back(self, key: TopicPartition) -> None:
        """A partition is finished with; the next report says so."""
        self.held.pop(key, None)

    def sought(self, key: TopicPartition, lease: int) -> None:
        """The member itself set the position, and holds the partition under a new lease."""
        self.held[key] = Held(*key, lease)

    def leave(self) -> None:
        """Finished with everything: the next report is the last."""
        self.held.clear()
        self._topics = []
