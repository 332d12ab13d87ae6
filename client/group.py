"""A subscription's side of a group: keeps its reader in step with what the member holds, and moves the positions.

Three things happen beside the user's loop, each a task of its own, so that none holds up another: heartbeats; taking up
what is granted (`on_assigned`, then reading); giving up what is revoked (finishing, `on_revoked`, giving back). What a
heartbeat says is `membership.py`; the broker's lease on each position is what keeps a late commit out.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from math import inf
from typing import Any, Literal

from . import wire
from .engine import Engine, EngineMember, TopicInfo
from .errors import IdemqError, InvalidRequest, LeaseLost, OffsetConflict, ProducerFenced, TransactionAborted
from .membership import Changes
from .reader import Piece, Reader, Reading
from .records import Delivery, Message
from .wire import TopicPartition

LEAVE_S = 1.0
"""Leaving is a courtesy: a broker that does not answer within this time notices by itself."""

Callback = Callable[[list[tuple[str, int]]], Any]
"""A function or coroutine function of [(topic, partition)]."""


class Leased(Delivery):
    """One partition under one lease, and what of it was handed out since its messages were last taken back."""

    __slots__ = (
        "committed",
        "group",
        "handed_round",
        "metadata",
        "pending",
        "planned",
        "reading",
        "state",
        "told",
        "turns",
    )

    def __init__(self, group: GroupConsumer, lease: wire.Lease, topic: TopicInfo) -> None:
        super().__init__(lease.lease, lease.next, lease.attempts, lease.suspects_end)
        self.group = group
        self.reading = Reading(topic, lease.partition, lease.next, lease.next, self)
        self.metadata = lease.metadata
        """What the position's last mover stored with it."""
        self.committed = lease.next
        """The stored position, as far as is known."""
        self.planned = lease.next
        """Where it will be once the transactions under way are stored."""
        self.pending = 0
        """Transactions and commits under way."""
        self.handed_round = -1
        """When messages were handed out last (see `GroupConsumer.returned`)."""
        self.state: Literal["held", "releasing", "gone", "stale"] = "held"
        """held -> releasing -> gone, or at once; stale: its messages are handed out again by another in its place."""
        self.told = False
        """The user was told that it is assigned, and not yet that it no longer is."""
        self.turns = 0
        """How often the broker was told that an attempt begins or has ended (`wire.Offset`): odd, while one is under
        way, which is at `head`."""

    def moved(self, end: int) -> None:
        """The position is stored at `end`."""
        if end > self.committed:
            self.committed = self.head = end
            self.attempts = 0
            self.turns += self.turns % 2
        self.planned = max(self.planned, self.committed)

    def again(self, lease: wire.Lease | None = None) -> Leased:
        """The same partition from the stored position on, or under another lease."""
        same = wire.Lease(
            *self.reading.key, self.lease, self.committed, self.attempts, self.suspects_end, self.metadata
        )
        leased = Leased(self.group, lease or same, self.reading.topic)
        leased.reading.end, leased.reading.paused = self.reading.end, self.reading.paused
        leased.told = self.told
        leased.turns = 0 if lease else self.turns
        return leased


class Move:
    """One position that a commit or transaction moves."""

    __slots__ = ("end", "first", "leased")

    def __init__(self, leased: Leased, first: int, end: int) -> None:
        self.leased = leased
        self.first = first
        """The first message it is about."""
        self.end = end


def moves(what: object) -> list[Move]:
    """Where positions go when these are done with: a message, a batch, or messages. Raises InvalidRequest."""
    found: dict[Leased, Move] = {}
    for stored, start, stop in _pieces(what):
        leased = stored.delivery
        if not isinstance(leased, Leased):
            raise InvalidRequest("a position belongs to a group: subscribe(…, group=NAME)")
        move = found.setdefault(leased, Move(leased, stored.offset + start, 0))
        move.first = min(move.first, stored.offset + start)
        move.end = max(move.end, stored.offset + stop)
    return list(found.values())


def _pieces(what: object) -> Iterable[Piece]:
    if isinstance(what, Message):
        return [(what[0], what[1], what[1] + 1)]
    pieces = getattr(what, "pieces", None)
    if isinstance(pieces, list):
        return pieces
    if isinstance(what, Sequence) and all(isinstance(one, Message) for one in what):
        return [(one[0], one[1], one[1] + 1) for one in what]
    raise InvalidRequest(f"a message, a batch or a list of messages can be committed, not {type(what).__name__}")


# ------------------------------------------------------------------------------------ positions in a transaction


def plan(moved: Sequence[tuple[Move, bytes | None]]) -> list[wire.Offset]:
    """The entries with which a transaction moves these positions, with metadata. Raises OffsetConflict.

    A batch that was taken back is not to be stored, though the lease would allow it: what is handed out again is in
    front of it.
    """
    entries: list[wire.Offset] = []
    for move, metadata in moved:
        leased, key = move.leased, move.leased.reading.key
        if leased.state == "stale":
            raise _conflict(move, "is handed out again")
        if move.first < leased.planned:
            raise _conflict(move, "was committed before")
        entries.append(wire.Offset(leased.group.group, *key, leased.lease, leased.planned, move.end, metadata))
    for move, _ in moved:
        move.leased.planned = move.end
        move.leased.pending += 1
    return entries


def stored(moved: Iterable[Move]) -> None:
    """A transaction that was planned is stored."""
    for move in moved:
        move.leased.pending -= 1
        move.leased.moved(move.end)
        move.leased.group.progressed()


def aborted(moved: Iterable[Move]) -> None:
    """A transaction that was planned is not stored, or nobody knows: `rewind` follows, or `kept`."""
    for move in moved:
        move.leased.pending -= 1
        move.leased.group.progressed()


def kept(moved: Iterable[Move]) -> None:
    """What was aborted stays in hand, to be stored in another way; nothing else of these partitions is under way."""
    for move in moved:
        move.leased.planned = move.leased.committed


def rewind(moved: Iterable[Move], error: BaseException | None = None) -> None:
    """Take back what is not committed of these partitions, and hand it out again.

    Safe also when the outcome is not known: a second run finds the position moved, if the first was stored.
    """
    for leased in [move.leased for move in moved]:
        if isinstance(error, OffsetConflict) and error.expected is not None and _names(error, leased):
            leased.moved(error.expected)  # an earlier run was stored after all
        if leased.state in ("held", "releasing"):
            leased.group.take_back(leased)


class GroupConsumer:
    """A member of a group, and the positions of what it holds."""

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        group: str,
        on_assigned: Callback | None,
        on_revoked: Callback | None,
        timeout: float,
    ) -> None:
        self.group = group
        self.held: dict[TopicPartition, Leased] = {}
        self.busy: Callable[[Leased], bool] | None = None
        """Is anything of this partition in hand? None: until the loop comes back for more."""
        self.in_hand_max = 0
        self._engine = engine
        self._reader = reader
        self._topics: dict[int, TopicInfo] = {}
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._timeout = timeout
        self._member: EngineMember | None = None
        self._round = 0
        self._callbacks = asyncio.Lock()
        self.calling: asyncio.Task[Any] | None = None
        """The task that waits for a callback."""
        self._progress = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits: set[asyncio.Task[None]] = set()
        self.endings: set[asyncio.Task[None]] = set()
        """The broker is being told that an attempt was cut short: until it knows, nothing else is handed out."""

    # ----------------------------------------------------------------------------------------------- membership

    async def join(self, topics: Sequence[TopicInfo], start_ms: int, start_offset: int | None) -> None:
        """Become a member, and take up what is granted at once."""
        self._topics = {topic.id: topic for topic in topics}
        self._member, changes = await self._engine.member(
            self.group, list(self._topics), start_ms, start_offset, self._timeout
        )
        if self.in_hand_max:
            self._member.promise(self.in_hand_max)
        self._spawn(self._follow)
        try:
            await self._take_up(self._granted(changes))
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Give everything back. Commits under way are waited for; the broker is told, if it can be."""
        with suppress(TimeoutError):  # what the user does when he is told is not cut short, unless it takes too long
            async with asyncio.timeout(self._timeout), self._callbacks:
                pass
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._commits:
            await asyncio.wait(self._commits, timeout=self._timeout)
        held = list(self.held.values())
        try:
            await self._call(self._on_revoked, held, False)  # it may commit
        finally:
            self.held = {}
            for leased in held:
                leased.state = "gone"
        if self._member is not None:
            with suppress(IdemqError):  # of a broker that is gone the user hears from what he asks for
                await self._member.leave(min(LEAVE_S, self._timeout))

    def promise(self, in_hand_max: int) -> None:
        """So many messages of a partition are in hand at once, at most; 0: as many as the user likes."""
        self.in_hand_max = in_hand_max
        if self._member is not None:
            self._member.promise(in_hand_max)

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._run(work, *arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        """A task beside the user's loop: what goes wrong in it is told there."""
        try:
            await work(*arguments)
        except Exception as error:  # noqa: BLE001 - a callback may raise anything
            self._reader.fail(error)

    async def _follow(self) -> None:
        """Heartbeats: whatever a user's code does, they go on."""
        assert self._member is not None
        while True:
            changes = await self._member.changes()
            lost = [self.held.pop(key) for key in changes.lost if key in self.held]
            revoked = [self.held[key] for key in changes.revoked if key in self.held]
            granted = self._granted(changes)
            for leased in lost:
                leased.state = "gone"
            if lost:
                self._reader.remove([leased.reading.key for leased in lost])
                self._progress.set()
                self._spawn(self._call, self._on_revoked, lost, False)
            for leased in revoked:
                leased.state = "releasing"
                self._reader.pause(leased.reading, True)
            if revoked:
                self._spawn(self._give_up, [leased.reading.key for leased in revoked])
            if granted:
                self._spawn(self._take_up, granted)

    def _granted(self, changes: Changes) -> list[Leased]:
        leases = [Leased(self, lease, self._topics[lease.topic_id]) for lease in changes.granted]
        self.held.update({leased.reading.key: leased for leased in leases})
        return leases

    async def _take_up(self, granted: list[Leased]) -> None:
        """What is granted is read once the user knows of it."""
        await self._call(self._on_assigned, granted, True)
        self._reader.add([leased.reading for leased in granted if leased.state == "held"])

    async def _give_up(self, keys: list[TopicPartition]) -> None:
        """What is revoked is finished, then given back, as many at once as are; or it is taken, if that takes long."""
        while revoked := [self.held[key] for key in keys if key in self.held and self.held[key].state == "releasing"]:
            finished = [leased for leased in revoked if not self._in_hand(leased)]
            if not finished:
                self._progress.clear()
                await self._progress.wait()
                continue
            await self._call(self._on_revoked, finished, False)
            finished = [leased for leased in finished if leased.state == "releasing"]  # not taken meanwhile
            assert self._member is not None
            for leased in finished:
                leased.state = "gone"
                del self.held[leased.reading.key]
                self._member.give_back(leased.reading.key)
            self._reader.remove([leased.reading.key for leased in finished])

    async def _call(self, callback: Callback | None, partitions: list[Leased], told: bool) -> None:
        """One callback at a time; of each partition first that it is assigned, then, once, that it no longer is."""
        async with self._callbacks:
            news = [leased for leased in partitions if leased.told != told]
            for leased in news:
                leased.told = told
            if callback is not None and news:
                result = callback([leased.reading.name for leased in news])
                if inspect.isawaitable(result):
                    self.calling = asyncio.current_task()
                    try:
                        await result
                    finally:
                        self.calling = None

    # ------------------------------------------------------------------------------------------ what is in hand

    def handed(self, leased: Leased) -> None:
        """Messages of it are handed out."""
        leased.handed_round = self._round

    def returned(self) -> None:
        """The user's loop comes back for more: it is done with what it was handed before."""
        self._round += 1
        self._progress.set()

    def progressed(self) -> None:
        """Something in hand was finished: whoever waits to give it back looks again."""
        self._progress.set()

    def _in_hand(self, leased: Leased) -> bool:
        if leased.pending:
            return True
        return self.busy(leased) if self.busy is not None else leased.handed_round == self._round

    # ------------------------------------------------------------------------------------------------ positions

    async def commit(self, moved: Sequence[Move], timeout: float | None = None) -> None:
        """Move positions forward without a transaction. Raises LeaseLost for those lost, and OffsetConflict for those
        that were taken back: they would pass what is handed out again. The others are moved."""
        wanted: dict[Leased, int] = {}
        refused: TransactionAborted | None = None
        for move in moved:
            if move.end > move.leased.committed:
                if move.leased.state == "stale":
                    refused = _conflict(move, "is handed out again")
                else:
                    wanted[move.leased] = move.end
        while wanted:
            entries = [
                wire.Offset(self.group, *leased.reading.key, leased.lease, min(leased.committed, end), end)
                for leased, end in wanted.items()
            ]
            for leased in wanted:
                leased.pending += 1
            try:
                await self._engine.commit_offsets(entries, self._timeout if timeout is None else timeout)
            except LeaseLost as error:
                refused = refused or error
                still = {one: end for one, end in wanted.items() if not _names(error, one)}
                if len(still) == len(wanted):
                    raise
            else:
                for leased, end in wanted.items():
                    leased.moved(end)
                still = {}
            finally:
                for leased in wanted:
                    leased.pending -= 1
                self.progressed()
            wanted = still
        if refused is not None:
            raise refused

    def take_back(self, leased: Leased) -> None:
        """What of a partition was handed out and not committed is handed out again. An attempt under way is over."""
        if leased.turns % 2:
            task = self._spawn(self._end_attempt, self._attempt(leased, leased.head, leased.attempts, begins=False))
            self.endings.add(task)
            task.add_done_callback(self.endings.discard)
        again = leased.again()
        again.state, leased.state = leased.state, "stale"
        self._replace(again)

    def _replace(self, leased: Leased) -> None:
        self.held[leased.reading.key] = leased
        self._reader.replace(leased.reading)

    def commit_soon(self, moved: Sequence[Move]) -> None:
        """The same, not waited for: what goes wrong is told when the loop comes back; a lost lease by `on_revoked`, and
        what is handed out again by coming again."""

        async def committing() -> None:
            with suppress(TransactionAborted):
                await self.commit(moved)

        task = asyncio.get_running_loop().create_task(self._run(committing))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    def delivered(self) -> list[Move]:
        """Everything handed out."""
        return [Move(leased, leased.committed, leased.reading.delivered) for leased in self.held.values()]

    async def store_attempts(
        self, leased: Leased, offset: int, attempts: int, timeout: float, begins: bool = False
    ) -> None:
        """Store how often the head of a partition was tried in vain, and that one more attempt begins, or that none is
        under way. Raises LeaseLost."""
        await self._engine.commit_offsets([self._attempt(leased, offset, attempts, begins)], timeout)

    def _attempt(self, leased: Leased, offset: int, attempts: int, begins: bool) -> wire.Offset:
        leased.head, leased.attempts = offset, attempts
        leased.turns += leased.turns % 2 + begins
        key = leased.reading.key
        return wire.Offset(self.group, *key, leased.lease, offset, offset, None, attempts, leased.turns)

    async def _end_attempt(self, entry: wire.Offset) -> None:
        with suppress(IdemqError):  # whoever loses the lease, or leaves, ends it as well
            await self._engine.commit_offsets([entry], inf)

    async def seek(self, leased: Leased, to: int) -> None:
        """Set the position of a partition that is held; transactions under way there are not stored."""
        key = leased.reading.key
        assert self._member is not None
        try:
            sought = await self._engine.seek(self.group, key, leased.lease, to, self._timeout, self._member.name)
        except ProducerFenced:
            raise _lost(leased) from None
        held = self.held.get(key)
        if held is not None and held.lease == sought.lease:
            return  # the answer to a heartbeat came first: it is held from there already
        if held is None or held.lease != leased.lease:
            raise _lost(leased)
        self._member.sought(key, sought.lease)
        again = held.again(wire.Lease(*key, sought.lease, sought.next, 0, 0, None))
        again.reading.paused &= held.state != "releasing"  # it is held anew, until it is to be given back again
        held.state = "gone"  # messages and transactions of the old lease move nothing any more
        self._replace(again)


def _lost(leased: Leased) -> LeaseLost:
    key = leased.reading.key
    where: dict[str, int | str | None] = {
        "group": leased.group.group,
        "topic_id": key.topic_id,
        "partition": key.partition,
    }
    return LeaseLost(f"partition {key.partition} of {leased.reading.topic.name!r} was lost", details=where)


def _conflict(move: Move, why: str) -> OffsetConflict:
    leased, key = move.leased, move.leased.reading.key
    where: dict[str, int | str | None] = {
        "group": leased.group.group,
        "topic_id": key.topic_id,
        "partition": key.partition,
    }
    text = f"message {move.first} of partition {key.partition} of {leased.reading.topic.name!r} {why}"
    # Not where it is once what is under way is stored: that may fail.
    return OffsetConflict(text, details={**where, "next": leased.committed})


def _names(error: IdemqError, leased: Leased) -> bool:
    """Is this error about this group's position in this partition?"""
    details = error.details
    return (details.get("group"), details.get("topic_id"), details.get("partition")) == (
        leased.group.group,
        *leased.reading.key,
    )
