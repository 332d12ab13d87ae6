"""A subscription's side of a group: keeps its reader in step with what the member holds, and moves the positions.

Three things happen beside the user's loop, each a task of its own, so that none holds up another: heartbeats; taking up
what is granted (`on_assigned`, then reading); giving up what is revoked (finishing, `on_revoked`, giving back). What a
heartbeat says is `membership.py`, which position may move, and what is handed out again, `positions.py`; the broker's
lease on each position is what keeps a late commit out.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from math import inf
from typing import Any

from . import wire
from .engine import Engine, EngineMember, TopicInfo
from .errors import IdemqError, ProducerFenced, TransactionAborted
from .positions import Leased, Move, PlainCommit, Positions, lease_lost
from .reader import Reader
from .wire import TopicPartition

LEAVE_S = 1.0
"""Leaving is a courtesy: a broker that does not answer within this time notices by itself."""

Callback = Callable[[list[tuple[str, int]]], Any]
"""A function or coroutine function of [(topic, partition)]."""


class GroupConsumer:
    """A member of a group, and the tasks that keep its positions."""

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        group: str,
        on_assigned: Callback | None,
        on_revoked: Callback | None,
        timeout: float,
    ) -> None:
        self._progress = asyncio.Event()
        self.positions = Positions(group, self._progress.set, self._taken_back)
        self.in_hand_max = 0
        self._engine = engine
        self._reader = reader
        self._topics: dict[int, str] = {}
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._timeout = timeout
        self._member: EngineMember | None = None
        self._callbacks = asyncio.Lock()
        self.calling: asyncio.Task[Any] | None = None
        """The task that waits for a callback."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits: set[asyncio.Task[None]] = set()
        self.endings: set[asyncio.Task[None]] = set()
        """The broker is being told that an attempt was cut short: until it knows, nothing else is handed out."""

    # ----------------------------------------------------------------------------------------------- membership

    async def join(self, topics: Sequence[TopicInfo], start_ms: int, start_offset: int | None) -> None:
        """Become a member, and take up what is granted at once."""
        self._topics = {topic.id: topic.name for topic in topics}
        self._member, changes = await self._engine.member(
            self.positions.group, list(self._topics), start_ms, start_offset, self._timeout
        )
        if self.in_hand_max:
            self._member.promise(self.in_hand_max)
        self._spawn(self._follow)
        try:
            await self._take_up(self.positions.take(changes, self._topics)[0])
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
        try:
            await self._call(self._on_revoked, list(self.positions.held.values()), False)  # it may commit
        finally:
            self.positions.end()
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
            granted, revoked, lost = self.positions.take(changes, self._topics)
            if lost:
                self._reader.remove([leased.reading.key for leased in lost])
                self._spawn(self._call, self._on_revoked, lost, False)
            for leased in revoked:
                self._reader.pause(leased.reading, True)
            if revoked:
                self._spawn(self._give_up, [leased.reading.key for leased in revoked])
            if granted:
                self._spawn(self._take_up, granted)

    async def _take_up(self, granted: list[Leased]) -> None:
        """What is granted is read once the user knows of it."""
        await self._call(self._on_assigned, granted, True)
        self._reader.add([leased.reading for leased in granted if leased.state == "held"])

    async def _give_up(self, keys: list[TopicPartition]) -> None:
        """What is revoked is finished, then given back, as many at once as are; or it is taken, if that takes long."""
        assert self._member is not None
        while revoked := self.positions.releasing(keys):
            finished = [leased for leased in revoked if not self.positions.in_hand(leased)]
            if not finished:
                self._progress.clear()
                await self._progress.wait()
                continue
            await self._call(self._on_revoked, finished, False)
            given_back = self.positions.give_back(finished)
            for key in given_back:
                self._member.give_back(key)
            self._reader.remove(given_back)

    async def _call(self, callback: Callback | None, partitions: list[Leased], assigned: bool) -> None:
        """One callback at a time."""
        async with self._callbacks:
            news = self.positions.news(partitions, assigned)
            if callback is not None and news:
                result = callback([leased.reading.name for leased in news])
                if inspect.isawaitable(result):
                    self.calling = asyncio.current_task()
                    try:
                        await result
                    finally:
                        self.calling = None

    # ------------------------------------------------------------------------------------------------ positions

    def _taken_back(self, again: Leased, ended: wire.Offset | None) -> None:
        if ended is not None:
            task = self._spawn(self._end_attempt, ended)
            self.endings.add(task)
            task.add_done_callback(self.endings.discard)
        self._reader.replace(again.reading)

    async def _end_attempt(self, entry: wire.Offset) -> None:
        with suppress(IdemqError):  # whoever loses the lease, or leaves, ends it as well
            await self._engine.commit_offsets([entry], inf)

    async def commit(self, moved: Sequence[Move], timeout: float | None = None) -> None:
        """Move positions forward without a transaction. Raises LeaseLost for those lost, and OffsetConflict for those
        that were taken back: they would pass what is handed out again. The others are moved."""
        commit = PlainCommit(moved)
        while entries := commit.entries():
            try:
                await self._engine.commit_offsets(entries, self._timeout if timeout is None else timeout)
            except BaseException as error:
                if not commit.refused(error):
                    raise
            else:
                commit.stored()

    def commit_soon(self, moved: Sequence[Move]) -> None:
        """The same, not waited for: what goes wrong is told when the loop comes back; a lost lease by `on_revoked`, and
        what is handed out again by coming again."""

        async def committing() -> None:
            with suppress(TransactionAborted):
                await self.commit(moved)

        task = asyncio.get_running_loop().create_task(self._run(committing))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    async def store_attempts(self, leased: Leased, offset: int, attempts: int, begins: bool) -> None:
        """Store `Leased.attempt_entry`. Raises LeaseLost."""
        await self._engine.commit_offsets([leased.attempt_entry(offset, attempts, begins)], inf)

    async def seek(self, leased: Leased, to: int) -> None:
        """Set the position of a partition that is held; transactions under way there are not stored."""
        key = leased.reading.key
        assert self._member is not None
        try:
            answer = await self._engine.seek(
                self.positions.group, key, leased.lease, to, self._timeout, self._member.name
            )
        except ProducerFenced:
            raise lease_lost(leased) from None
        again = self.positions.sought(leased, answer)
        if again is not None:
            self._member.sought(key, again.lease)
            self._reader.replace(again.reading)
            self._spawn(self._call, self._on_assigned, [again], True)  # he may have heard that it goes
