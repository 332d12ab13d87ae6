"""What `run` has in hand: which message may be begun next, and how far each partition is finished.

Messages of one partition with one key are handled one after the other, those without a key in any order; with a
concurrency of 1 a whole partition is. A position never passes a message that is not finished. Pure: no clock, no task,
and nothing of handlers, policies or the broker.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from math import inf
from typing import Literal

from .records import Delivery, Message, Record

IN_HAND_MAX = 500
"""Messages handed out and not committed, at most: what a worker that dies leaves to be handled again."""
COMMIT_S = 0.1
"""What is finished waits no longer to be committed."""

Send = tuple[str, Record]
"""A message to be sent when a position moves: its topic, and the record."""


class Work:
    """One message in hand."""

    __slots__ = ("attempts", "line", "message", "send", "sequence", "state")

    def __init__(self, message: Message, line: _Line, sequence: Hashable | None) -> None:
        self.message = message
        self.line: _Line | None = line
        """None: nobody wants to know any more how it ends."""
        self.sequence = sequence
        self.state: Literal["waiting", "running", "finished"] = "waiting"
        """waiting -> running -> finished; running -> waiting, to be tried again."""
        self.attempts = 0
        """Attempts that have failed; whoever handles it counts."""
        self.send: Send | None = None
        """Goes with the commit that passes it."""


class _Line:
    """The messages of one partition under one lease, in order."""

    __slots__ = ("delivery", "finished", "works")

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.works: deque[Work] = deque()
        self.finished = 0
        """So many at the front are finished."""


class Schedule:
    """At most `concurrency` works are running at once."""

    def __init__(self, concurrency: int) -> None:
        self.running = 0
        self.in_hand = 0
        """Works that are not committed."""
        self.commit_at = inf
        """When what is finished at the front of a line is to be committed."""
        self._concurrency = concurrency
        self._lines: dict[Delivery, _Line] = {}
        self._sequences: dict[Hashable, deque[Work]] = {}
        """The first of each is the one that may run."""
        self._ready: deque[Work] = deque()
        self._later: list[tuple[float, int, Work]] = []
        self._retries = 0
        self._finished = 0

    # ------------------------------------------------------------------------------------------- what may be begun

    def add(self, messages: Iterable[Message]) -> None:
        """These are in hand now, in order for each partition."""
        for message in messages:
            stored = message[0]
            line = self._lines.get(stored.delivery)
            if line is None:
                line = self._lines[stored.delivery] = _Line(stored.delivery)
            partition, key = (stored.header.topic_id, stored.header.partition), message.key
            sequence: Hashable | None = None
            if self._concurrency == 1:
                sequence = partition
            elif key is not None:
                sequence = (*partition, key)
            work = Work(message, line, sequence)
            line.works.append(work)
            self.in_hand += 1
            if sequence is None:
                self._ready.append(work)
                continue
            behind = self._sequences.setdefault(sequence, deque())
            behind.append(work)
            if len(behind) == 1:
                self._ready.append(work)

    def take(self, now: float) -> Work | None:
        """The next to be begun; None: nothing, or enough are running."""
        while self._later and self._later[0][0] <= now:
            self._ready.append(heapq.heappop(self._later)[2])
        while self._ready and self.running < self._concurrency:
            work = self._ready.popleft()
            if work.line is not None:
                work.state = "running"
                self.running += 1
                return work
        return None

    @property
    def next_at(self) -> float:
        """When the next that waits for its time may be begun."""
        while self._later and self._later[0][2].line is None:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else inf

    # ------------------------------------------------------------------------------------------------ how it ended

    def finish(self, work: Work, now: float, send: Send | None = None) -> None:
        """A running work is done with; `send` goes with the commit that passes it."""
        self.running -= 1
        work.state, work.send = "finished", send
        self._release(work)
        line = work.line
        if line is None:
            return
        before = line.finished
        while line.finished < len(line.works) and line.works[line.finished].state == "finished":
            line.finished += 1
        self._finished += line.finished - before
        if line.finished > before:
            self.commit_at = now if self._finished >= IN_HAND_MAX else min(self.commit_at, now + COMMIT_S)

    def retry(self, work: Work, at: float) -> None:
        """A running work is to be begun again, not before then. What is behind it in its sequence waits."""
        self.running -= 1
        if work.line is None:
            self._release(work)
            return
        work.state = "waiting"
        self._retries += 1
        heapq.heappush(self._later, (at, self._retries, work))

    def _release(self, work: Work) -> None:
        """Whatever is behind it in its sequence may be begun."""
        if work.sequence is None:
            return
        behind = self._sequences[work.sequence]
        if behind[0] is not work:
            return
        behind.popleft()
        while behind and behind[0].line is None:
            behind.popleft()
        if behind:
            self._ready.append(behind[0])
        else:
            del self._sequences[work.sequence]

    # --------------------------------------------------------------------------------------------- what is committed

    def finished(self) -> Iterator[list[Work]]:
        """For each line the works at its front that are finished, if any."""
        for line in self._lines.values():
            if line.finished:
                yield [line.works[index] for index in range(line.finished)]

    def flush(self, now: float) -> None:
        """What is finished at the front of a line is to be committed now."""
        if self._finished:
            self.commit_at = now

    def heads(self) -> list[Work]:
        """The first of each line that is not finished."""
        return [line.works[line.finished] for line in self._lines.values() if line.finished < len(line.works)]

    def committed(self, works: list[Work]) -> None:
        """These, at the front of their line, are stored."""
        line = works[0].line
        assert line is not None
        for work in works:
            first = line.works.popleft()
            assert first is work
            line.finished -= 1
        self._finished -= len(works)
        self.in_hand -= len(works)
        self._tidy(line)

    def drop(self, delivery: Delivery) -> None:
        """The lease is lost: forget all of its line. What runs is not stopped, but nobody asks how it ends."""
        line = self._lines.get(delivery)
        if line is not None:
            self._cut(line, 0)

    def withdraw(self, delivery: Delivery) -> None:
        """Begin nothing more of this line. What runs or is finished may still be committed, as far as no gap lies
        before it."""
        line = self._lines.get(delivery)
        if line is None:
            return
        for place, work in enumerate(line.works):
            if work.state == "waiting":
                self._cut(line, place)
                return

    def _cut(self, line: _Line, place: int) -> None:
        """Keep so many works of a line."""
        while len(line.works) > place:
            work = line.works.pop()
            work.line = None
            self.in_hand -= 1
            if work.state == "waiting":
                self._release(work)
        if line.finished > place:
            self._finished -= line.finished - place
            line.finished = place
        self._tidy(line)

    def _tidy(self, line: _Line) -> None:
        if not line.works:
            del self._lines[line.delivery]
        if not self._finished:
            self.commit_at = inf

    @property
    def deliveries(self) -> list[Delivery]:
        """The leases under which something is in hand."""
        return list(self._lines)
