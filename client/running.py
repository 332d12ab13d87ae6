"""The loop behind `Subscription.run`: many handlers at once, and how far each partition is finished is committed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from math import inf

from .errors import IdemqError, InvalidRequest, OutcomeUnknown, TransactionAborted
from .handling import Handler, Handling, Judged, Unfinished, leased_of, tried
from .positions import Leased, moves, rewind
from .records import Message
from .retry import Verdict
from .scheduling import IN_HAND_MAX, Schedule, Work
from .session import TRANSACTION_BYTES_MAX
from .source import Batch, Source
from .transaction import Buffer

CANCELLED_S = 1.0
"""So long may a handler take to end when it is cancelled."""
REVOKED_S = 0.2
"""How soon it is noticed that a partition is to be given back while handlers run."""


async def run(
    source: Source, handler: Handler, concurrency: int, until_idle: float | None, handler_timeout: float
) -> None:
    """See `Subscription.run`."""
    if type(concurrency) is not int or not 1 <= concurrency <= IN_HAND_MAX:
        raise InvalidRequest(f"concurrency is a whole number in 1 .. {IN_HAND_MAX}, not {concurrency!r}")
    handling = _Run(source, handler, until_idle, handler_timeout, concurrency)
    await handling.drive()


class _Run(Handling):
    """Handlers side by side."""

    def __init__(
        self, source: Source, handler: Handler, until_idle: float | None, handler_timeout: float, concurrency: int
    ) -> None:
        super().__init__(source, handler, until_idle, handler_timeout, IN_HAND_MAX, ("message",))
        self._schedule = Schedule(concurrency)
        self._attempts_due = False
        """A message failed: what the broker knows of attempts at the heads is to be brought up to date."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching: asyncio.Task[Batch | None] | None = None
        self._suspect: Message | None = None
        self._suspect_begun = False
        self._ended = False
        """Nothing more is begun."""

    def _busy(self, leased: Leased) -> bool:
        return leased in self._schedule.deliveries

    async def _handle_all(self) -> None:
        schedule = self._schedule
        try:
            while True:
                self._changed.clear()
                self._take_batch()
                if schedule.commit_at <= self._loop.time() or self._attempts_due:
                    await self._commit()
                self._withdraw()
                self._alone()
                self._start()
                self._fetch()
                if self._ended and not schedule.running:
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._wake_at()):
                        await self._changed.wait()
            await self._commit()
            while schedule.commit_at < inf:
                await self._commit()
        finally:
            await self._cancel()

    def _wake_at(self) -> float | None:
        times = [self._schedule.commit_at]
        if not self._ended:
            times.append(self._schedule.next_at)
            probe_at = self._breaker.probe_at
            # Later than that there was nothing to try, and time alone changes nothing.
            if probe_at is not None and probe_at > self._loop.time() and not self._schedule.running:
                times.append(probe_at)
        if self._schedule.in_hand:
            times.append(self._loop.time() + REVOKED_S)
        return min(times) if min(times) < inf else None

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])
            if not self._fetching.cancelled():
                self._fetching.exception()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CANCELLED_S)

    # ------------------------------------------------------------------------------------------------ what comes in

    def _fetch(self) -> None:
        room = IN_HAND_MAX - self._schedule.in_hand
        # In an outage one of those in hand is tried; with none of them left, whatever comes next.
        outage = self._breaker.is_open and self._schedule.in_hand > 0
        waits = self._ended or self._suspect is not None or outage
        if self._fetching is None and room > 0 and not waits:
            self._fetching = self._loop.create_task(self._next(room))
            self._fetching.add_done_callback(lambda _: self._changed.set())

    def _take_batch(self) -> None:
        if self._stopping:
            self._ended = True
        if self._fetching is not None and self._fetching.done():
            fetched, self._fetching = self._fetching, None
            if fetched.exception() is not None:
                self._fail(fetched.exception())
            elif (batch := fetched.result()) is not None:
                # What was taken back since comes again, with what is before it.
                self._add(self._admit([one for one in batch if leased_of(one).state == "held"]))
            elif self._idle():
                self._ended = True

    def _idle(self) -> bool:
        if self._schedule.in_hand or self._suspect is not None:
            self._occupied_at = self._loop.time()
        return super()._idle()

    def _add(self, messages: list[Message]) -> None:
        if messages and self._is_suspect(messages[0]):
            (self._suspect,) = messages
            self._suspect_begun = False
        else:
            self._schedule.add(messages)

    def _alone(self) -> None:
        """A suspect is handled when nothing else is in hand, and until it is not, either, nothing else is taken."""
        suspect = self._suspect
        if suspect is None or self._schedule.in_hand:
            return
        if self._suspect_begun or leased_of(suspect).state != "held":
            self._suspect = None
        else:
            self._suspect_begun = True
            self._schedule.add([suspect])

    def _withdraw(self) -> None:
        for delivery in self._schedule.deliveries:
            assert isinstance(delivery, Leased)
            if delivery.state in ("gone", "stale"):
                self._drop(delivery)
            elif delivery.state == "releasing":
                self._schedule.withdraw(delivery)
                self._schedule.flush(self._loop.time())
                self._positions.progressed()

    def _drop(self, leased: Leased) -> None:
        self._schedule.drop(leased)
        self._positions.progressed()

    def _fail(self, error: BaseException | None) -> None:
        """To be raised when the other handlers have come to an end."""
        if self._error is None:
            self._error = error
        self.stop()

    # ------------------------------------------------------------------------------------------------- the handlers

    def _next_work(self) -> Work | None:
        if self._ended or self._stopping:
            return None
        probe_at = self._breaker.probe_at
        if probe_at is not None and (self._schedule.running or self._loop.time() < probe_at):
            return None
        return self._schedule.take(self._loop.time())

    def _start(self) -> None:
        while (work := self._next_work()) is not None:
            task = self._loop.create_task(self._work(work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, work: Work | None) -> None:
        """Handle one message after the other, as long as there is one to be begun."""
        while work is not None:
            try:
                await self._one(work)
            except BaseException as error:
                self._schedule.retry(work, inf)
                if isinstance(error, asyncio.CancelledError):
                    raise
                self._fail(error)  # the main loop raises it
            self._changed.set()
            work = self._next_work()
            if work is not None:
                self._start()
                await self._breathe()

    async def _one(self, work: Work) -> None:
        message, schedule = work.message, self._schedule
        work.attempts = max(work.attempts, tried(message))
        if self._spent(message):
            schedule.finish(work, self._loop.time(), self._judge_spent(message))
            return
        suspect = self._is_suspect(message)
        if suspect and not await self._tell(work, work.attempts, begins=True):
            schedule.retry(work, inf)
            return
        shown = self._shown(message)
        try:
            if shown is not None:
                await self._call(shown)
        except Unfinished:
            schedule.retry(work, inf)
        except Exception as error:  # noqa: BLE001 - a handler may raise anything; it is judged
            judged = self._judge(message, error, work.attempts + 1)
            if suspect and judged.send is None:
                await self._tell(work, judged.attempts)
            self._settle(work, judged)
        else:
            self._breaker.succeeded()
            schedule.finish(work, self._loop.time())
            if suspect:
                schedule.flush(self._loop.time())  # the others wait for it

    def _settle(self, work: Work, judged: Judged) -> None:
        schedule, now = self._schedule, self._loop.time()
        if judged.send is not None:
            schedule.finish(work, now, judged.send)
            return
        self._attempts_due = self._attempts_due or judged.attempts > work.attempts
        work.attempts = judged.attempts
        if judged.verdict is Verdict.RETRY:
            assert self._policy is not None
            schedule.retry(work, now + self._policy.delay(judged.attempts, self._rng))
        elif judged.verdict is None:
            schedule.retry(work, self._breaker.probe_at or now)
        else:
            schedule.retry(work, inf)
            self._fail(self._noted(work.message, judged.error))

    # -------------------------------------------------------------------------------------------------- the commits

    async def _commit(self) -> None:
        """Store how far each line is finished, with the dead letters on the way, and the attempts at its head."""
        schedule = self._schedule
        whole = Buffer()
        moving: list[list[Work]] = []
        for works in schedule.finished():
            fitting: list[Work] = []
            for work in works:
                if work.send is not None:
                    one = self._sent(work.send)
                    if whole.sends and whole.bytes + one.bytes > TRANSACTION_BYTES_MAX:
                        break  # the next commit's
                    whole.absorb(one)
                fitting.append(work)
            if fitting:
                moving.append(fitting)
        ends = [works[-1].message for works in moving]
        error: IdemqError | None = None
        try:
            if whole.sends:
                whole.move(ends)
                await self._store_buffer(whole)
            elif ends:
                with self._storage():
                    await self._group.commit(moves(ends), inf)
        except (TransactionAborted, OutcomeUnknown) as aborted:  # unknown: see `processing.py`
            error = aborted
        for works in moving:
            leased, end = leased_of(works[-1].message), works[-1].message.offset + 1
            if leased.committed >= end:
                schedule.committed(works)
            else:
                self._give_up(leased, works[-1].message, error)
        self._positions.progressed()
        self._attempts_due = False
        for work in schedule.heads():
            message = work.message
            if work.attempts > tried(message) and leased_of(message).committed == message.offset:
                await self._tell(work, work.attempts)
        if moving:
            self._occupied_at = self._loop.time()

    async def _tell(self, work: Work, attempts: int, begins: bool = False) -> bool:
        """See `_store_attempts`. Returns False when the lease is lost."""
        try:
            await self._store_attempts(work.message, attempts, begins)
        except TransactionAborted as lost:
            self._give_up(leased_of(work.message), work.message, lost)
            return False
        return True

    def _give_up(self, leased: Leased, message: Message, error: BaseException | None) -> None:
        """Nothing that is in hand of this partition can be committed: it is handed out again, to whoever has it."""
        self._drop(leased)
        rewind(moves(message), error)
