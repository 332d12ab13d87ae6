"""What `Subscription.process` (`processing.py`) and `run` (`running.py`) share: calling a handler, judging a failure,
holding a partition back, and coming to an end.

What becomes of a message whose handler failed is decided by `retry.py`. Not known here: the wire, heartbeats, fetching.

Nothing is ever handled in the place of what is not decided: a commit is waited for until the broker has answered, and
what is not stored is handed out again, by the position that is.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any, NamedTuple

from . import dead_letters
from .errors import (
    CircuitOpen,
    HandlerTimeout,
    InvalidRequest,
    OutcomeUnknown,
    UnknownTopic,
)
from .group import GroupConsumer
from .positions import Leased, rewind
from .records import Message
from .retry import CircuitBreaker, RetryPolicy, Verdict
from .scheduling import Send
from .source import Batch, Source
from .threads import Outcome, Threads, stopped_by_signals
from .transaction import Buffer, Transaction
from .wire import TopicPartition

Handler = Callable[..., Any]
"""A function (called in a thread) or a coroutine function (called on the loop)."""

HANDLER_TIMEOUT_S = 300.0
"""A slow handler is not punished, up to here."""
FOREVER_S = 1e9
"""Commits have no deadline: without an answer there is nothing that could be done instead."""
HANDLERS_STOP_S = 6.0
"""So long may handlers go on after `stop()`; then they are cancelled."""
STOP_S = 8.0
"""So long may it take to end after `stop()`, the last commit included."""
BREATH_S = 0.002
"""Handlers that never wait leave the loop to others after this time."""
BLOCKED_S = 1.0
"""A loop that was held up for as long is worth a warning: heartbeats, too, are sent from there."""

_log = logging.getLogger("idemq")


async def reject(source: Source, message: Message, reason: str) -> None:
    """See `Subscription.reject`."""
    policy, group = source.retry, source.grouped("reject()")
    if policy is None or policy.dead_letter is None:
        raise InvalidRequest("reject() needs a dead-letter topic: subscribe(…, retry=RetryPolicy(dead_letter=TOPIC))")
    if source.stop_handling is not None:
        raise InvalidRequest("inside process() and run() a handler raises an error of RetryPolicy(no_retry=…) instead")
    leased = leased_of(message)
    if message.offset != leased.planned:
        raise InvalidRequest(
            f"message {message.offset} of partition {message.partition} of {message.topic!r} is not the first that is "
            f"not committed ({leased.planned}): commit what is before it"
        )
    why = dead_letters.Failure(group.positions.group, message.attempt, reason, None, _wall_ms())
    buffer = Buffer()
    buffer.move(message)
    buffer.add(policy.dead_letter, dead_letters.dead_letter(message, why))
    try:
        await source.store(buffer, source.timeout)
    except BaseException as failed:
        rewind(buffer.moved, failed)
        raise


class Unfinished(Exception):
    """A handler was cancelled because the call is to end: neither a success nor a failure."""


class Judged(NamedTuple):
    """What becomes of a message that failed."""

    verdict: Verdict | None
    """None: an outage, for which no message is blamed."""
    error: Exception
    send: Send | None
    attempts: int
    """Failed ones, this one included if it counts."""


def leased_of(message: Message) -> Leased:
    """Where its partition stands. Raises InvalidRequest for a message without a group."""
    leased = message[0].delivery
    if not isinstance(leased, Leased):
        raise InvalidRequest("this message was not delivered to a group")
    return leased


def tried(message: Message) -> int:
    """Attempts at a message that the broker knows of."""
    leased = leased_of(message)
    return leased.attempts if leased.head == message.offset else 0


def not_async(result: Any) -> InvalidRequest:
    """A plain function returned something to be awaited, which nobody will."""
    if inspect.iscoroutine(result):
        result.close()
    return InvalidRequest("the handler returned something to be awaited: write it as `async def`")


def cancelled_within() -> RuntimeError:
    """A handler raised CancelledError, and nobody had cancelled it: it has failed as any other."""
    return RuntimeError("the handler was cancelled from within")


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Handling:
    """One call of `process` or `run` under way."""

    def __init__(
        self,
        source: Source,
        handler: Handler,
        until_idle: float | None,
        handler_timeout: float,
        in_hand_max: int,
        given: tuple[str, ...],
    ) -> None:
        if not callable(handler):
            raise InvalidRequest(f"a handler is a function or a coroutine function, not {handler!r}")
        if until_idle is not None and not 0 < until_idle <= FOREVER_S:
            raise InvalidRequest(f"until_idle is a number of seconds above 0, not {until_idle!r}")
        if not 0 < handler_timeout <= FOREVER_S:
            raise InvalidRequest(f"handler_timeout is a number of seconds above 0, not {handler_timeout!r}")
        self._source = source
        self._group: GroupConsumer = source.grouped("process() and run()")
        self._positions = self._group.positions
        try:
            inspect.signature(handler).bind(*given)
        except ValueError:  # a builtin may tell no signature
            pass
        except TypeError as error:
            expected = ", ".join(given)
            raise InvalidRequest(f"the handler is called with ({expected}): {error}") from None
        self._policy: RetryPolicy | None = source.retry
        self._breaker = CircuitBreaker(self._policy or RetryPolicy())
        self._handler = handler
        self._async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004 - an object may have a coroutine function for it
        )
        self._until_idle = until_idle
        self._handler_timeout = handler_timeout
        self._in_hand_max = in_hand_max
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._rng = random.Random(secrets.randbits(64))
        self._threads = Threads(self._loop)
        self._stopping = False
        self._changed = asyncio.Event()
        """Something happened that the loop looks at."""
        self._hurry: asyncio.Future[None] = self._loop.create_future()
        """Handlers are to end at once."""
        self._limits: set[asyncio.Timeout] = set()
        self._ending: asyncio.Timeout | None = None
        self._storing = False
        self._error: BaseException | None = None
        """To be raised in the end."""
        self._stuck: HandlerTimeout | None = None
        """A thread that could not be stopped."""
        self._held_back: dict[TopicPartition, asyncio.TimerHandle] = {}
        """Partitions that wait for their next message's time."""
        self._occupied_at = 0.0
        """When something was left to be done, as far as was looked."""
        self._breath_at = 0.0
        self._hurrying: asyncio.TimerHandle | None = None
        self._watching: asyncio.TimerHandle | None = None

    # --------------------------------------------------------------------------------------------- the whole call

    async def drive(self) -> None:
        """Handle messages until it is time to end."""
        source, group = self._source, self._group
        if source.stop_handling is not None:
            raise InvalidRequest("process() or run() is under way on this subscription")
        source.stop_handling = self.stop
        if source.reader.stopping:  # before this call had begun
            self.stop()
        try:
            await self._check_topics()
            if self._policy is not None:
                group.promise(self._in_hand_max)
            self._positions.busy = self._busy
            await source.open()
            self._hand_out_again()  # what was handed out before this call and not committed would be passed
            if self._async:
                self._watch()
            with stopped_by_signals(partial(self._loop.call_soon_threadsafe, self.stop)):
                await self._until_the_end()
        finally:
            self._tidy()
            source.stop_handling = None
            if self._stuck is not None:
                await source.close()  # a thread still has a message: this member is to get it no second time
        error = self._error or self._stuck
        if error is not None:
            raise error

    async def _until_the_end(self) -> None:
        self._ending = ending = asyncio.timeout(None)
        try:
            async with ending:
                await self._handle_all()
        except TimeoutError:
            if not ending.expired():
                raise
            if self._storing and self._error is None:
                text = f"the broker did not answer the last commit within {STOP_S:g} s of stop()"
                raise OutcomeUnknown(text) from None
        finally:
            self._ending = None

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """The broker is asked to store something; cancelled here, nobody knows whether it has."""
        self._storing = True
        try:
            yield
        except Exception:
            self._storing = False
            raise
        self._storing = False

    async def _handle_all(self) -> None:
        raise AssertionError("each kind has its own")

    def _busy(self, leased: Leased) -> bool:
        raise AssertionError("each kind has its own")

    def stop(self) -> None:
        """End soon: nothing more is begun, what runs may end, what is finished is committed. Any thread may call."""
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self.stop)
            return
        if self._stopping:
            return
        self._stopping = True
        self._changed.set()
        self._source.reader.stop()
        self._hurrying = self._loop.call_later(HANDLERS_STOP_S, self._end_handlers)
        if self._ending is not None:
            self._ending.reschedule(self._loop.time() + STOP_S)

    def _end_handlers(self) -> None:
        if not self._hurry.done():
            self._hurry.set_result(None)
        for limit in self._limits:
            limit.reschedule(self._loop.time())

    async def _check_topics(self) -> None:
        """Before it is needed: a topic for dead letters that is not there would be noticed too late."""
        policy, source = self._policy, self._source
        names = [name for name in (policy.dead_letter, policy.parking) if name is not None] if policy else []
        if policy is not None and policy.dead_letter in source.names:
            raise InvalidRequest(f"{policy.dead_letter!r} is read here: its own dead letters would come back to it")
        found = {topic.name for topic in await source.engine.topics(names, source.timeout)} if names else set()
        for name in names:
            if name not in found:
                raise UnknownTopic(f"there is no topic {name!r}, which the retry policy names")

    def _tidy(self) -> None:
        """Whatever is not committed is handed out again, to whoever reads here next."""
        group = self._group
        self._positions.busy = None
        if self._policy is not None and not self._source.closed:
            group.promise(0)
        if self._stopping:
            self._source.reader.stopping = False
        for timer in (self._hurrying, self._watching):
            if timer is not None:
                timer.cancel()
        for key in list(self._held_back):
            self._hold_no_more(key)
        self._threads.end()
        if not self._source.closed:
            self._hand_out_again()
        self._positions.returned()

    def _hand_out_again(self) -> None:
        rewind([move for move in self._positions.delivered() if move.first < move.end])

    def _watch(self, expected: float = inf) -> None:
        late = self._loop.time() - expected
        if late > BLOCKED_S:
            _log.warning(
                "the event loop stood still for %.1f s: the handler %s is `async def` and must not block; "
                "as a plain function it would get a thread",
                late,
                getattr(self._handler, "__qualname__", self._handler),
            )
        at = self._loop.time() + BLOCKED_S
        self._watching = self._loop.call_at(at, self._watch, at)

    async def _breathe(self) -> None:
        if self._loop.time() >= self._breath_at:
            await asyncio.sleep(0)
            self._breath_at = self._loop.time() + BREATH_S

    # ------------------------------------------------------------------------------------------------ one message

    async def _call(self, message: Message, *more: Transaction) -> None:
        """Call the handler. Raises its error, HandlerTimeout, or Unfinished."""
        if not self._async:
            called = time.monotonic()
            result = await self._watched(
                self._threads.call(partial(self._handler, message, *more)), lambda: called, lambda: message
            )
            if inspect.isawaitable(result):
                raise not_async(result)
            return
        limit = asyncio.timeout(self._handler_timeout)
        self._limits.add(limit)
        try:
            async with limit:
                await self._handler(message, *more)
        except TimeoutError:
            if not limit.expired():
                raise
            if self._hurry.done():
                raise Unfinished from None
            raise self._late(message) from None
        except Exception:
            if limit.expired() and self._hurry.done():
                raise Unfinished from None  # whatever it made of being cancelled
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise cancelled_within() from None
        finally:
            self._limits.discard(limit)

    async def _watched(
        self, call: asyncio.Future[Outcome], begun: Callable[[], float], message: Callable[[], Message]
    ) -> Any:
        """What a thread returns. `begun`: when it began what it does now; `message`: that."""
        while not call.done():
            left = begun() + self._handler_timeout - time.monotonic()
            if left <= 0 or self._hurry.done():
                self._stuck = self._late(message())
                raise Unfinished if self._hurry.done() else self._stuck
            waited: list[asyncio.Future[Any]] = [call, self._hurry]
            await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        result, error = call.result()
        if isinstance(error, asyncio.CancelledError):
            raise cancelled_within()
        if error is not None:
            raise error
        return result

    def _late(self, message: Message) -> HandlerTimeout:
        where = f"message {message.offset} of partition {message.partition} of {message.topic!r}"
        if self._async:
            return HandlerTimeout(f"{where} was not handled within {self._handler_timeout:g} s")
        return HandlerTimeout(f"{where} is still being handled by a thread, which cannot be stopped")

    def _spent(self, message: Message) -> bool:
        """Was it tried so often, by workers that died of it, that it is not tried again?"""
        if self._policy is None or self._policy.dead_letter is None:
            return False
        attempts = tried(message)
        return attempts > 0 and attempts + self._parked_attempts(message) >= self._policy.max_attempts

    def _is_suspect(self, message: Message) -> bool:
        return self._policy is not None and message.offset < leased_of(message).suspects_end

    async def _store_attempts(self, message: Message, attempts: int, begins: bool = False) -> None:
        """So many attempts have failed, and none is under way; or one more begins: it counts if the worker does not
        survive it. Raises LeaseLost."""
        with self._storage():
            await self._group.store_attempts(leased_of(message), message.offset, attempts, begins)

    def _judge(self, message: Message, error: Exception, attempts: int) -> Judged:
        """What becomes of a message that failed for the `attempts`-th time, those before it was parked not counted."""
        policy = self._policy
        if policy is None or self._stuck is not None:
            return Judged(Verdict.RAISE, error, None, attempts)
        shown = self._shown(message) or message
        try:
            place = (shown.topic, shown.partition, shown.offset)
            if self._breaker.failed(self._loop.time(), place, error, self._rng):
                return Judged(None, error, None, attempts - 1)
        except CircuitOpen as opened:
            return Judged(Verdict.RAISE, opened, None, attempts - 1)
        total = attempts + self._parked_attempts(message)
        verdict = policy.verdict(error, total)
        why = dead_letters.Failure(self._positions.group, total, "", error, _wall_ms())
        send: Send | None = None
        if verdict is Verdict.DEAD_LETTER:
            assert policy.dead_letter is not None
            send = policy.dead_letter, dead_letters.dead_letter(shown, why)
        elif verdict is Verdict.PARK:
            assert policy.parking is not None
            send = policy.parking, dead_letters.parked(shown, why, policy.delay(total, self._rng))
        return Judged(verdict, error, send, attempts)

    def _judge_spent(self, message: Message) -> Send:
        """The dead letter of a message that is not tried again."""
        policy, attempts = self._policy, tried(message) + self._parked_attempts(message)
        assert policy is not None
        assert policy.dead_letter is not None
        reason = f"not tried again: {attempts} attempts failed, or their workers did not survive them"
        why = dead_letters.Failure(self._positions.group, attempts, reason, None, _wall_ms())
        return policy.dead_letter, dead_letters.dead_letter(self._shown(message) or message, why)

    def _noted(self, message: Message, error: Exception) -> Exception:
        error.add_note(f"while handling message {message.offset} of partition {message.partition} of {message.topic!r}")
        return error

    # ---------------------------------------------------------------------------------------------- transactions

    def _sent(self, send: Send) -> Buffer:
        buffer = Buffer()
        buffer.add(*send)
        return buffer

    async def _store_buffer(self, buffer: Buffer) -> None:
        with self._storage():
            await self._source.store(buffer, FOREVER_S)

    # ---------------------------------------------------------------------------------------------- parked messages

    def _parked(self, message: Message) -> dead_letters.Parked | None:
        if self._policy is None or message.topic != self._policy.parking:
            return None
        return dead_letters.unpark(message, message.lease, tried(message))

    def _parked_attempts(self, message: Message) -> int:
        found = self._parked(message)
        return 0 if found is None else found.attempts - tried(message)

    def _shown(self, message: Message) -> Message | None:
        """The message as the handler sees it; None: it was parked by another group, and is passed over."""
        if self._policy is None or self._policy.parking is None or message.topic != self._policy.parking:
            return message
        found = self._parked(message)
        if found is None:
            return message
        return found.message if found.group == self._positions.group else None

    def _admit(self, batch: Sequence[Message]) -> list[Message]:
        """What may be handled now. A parking topic's partition waits for the time of its first message."""
        if self._held_back:  # somebody may have resumed a partition that was to wait
            for key in {leased_of(message).reading.key for message in batch} & self._held_back.keys():
                self._hold_no_more(key)
        if self._policy is None or self._policy.parking is None:
            return list(batch)
        admitted: list[Message] = []
        waiting: set[Leased] = set()
        for message in batch:
            if leased_of(message) in waiting:
                continue
            found = self._parked(message)
            if found is not None and found.group == self._positions.group:
                # By two clocks: so one that is wrong lets it wait no longer than it was to wait.
                wait = min(found.delay_s, message.timestamp / 1000 + found.delay_s - _wall_ms() / 1000)
                if wait > 0:
                    self._hold_back(message, wait)
                    waiting.add(leased_of(message))
                    continue
            admitted.append(message)
        return admitted

    def _hold_back(self, message: Message, seconds: float) -> None:
        """Hand out this message and those behind it again, in a while."""
        reading, reader = leased_of(message).reading, self._source.reader
        by_user = reading.paused
        reader.pause(reading, True)
        reader.seek(reading, message.offset)
        if by_user:
            return  # until he resumes it
        self._held_back[reading.key] = self._loop.call_later(seconds, self._hold_no_more, reading.key)

    def _hold_no_more(self, key: TopicPartition) -> None:
        self._held_back.pop(key).cancel()
        self._occupied_at = self._loop.time()
        leased = self._positions.held.get(key)
        if leased is not None and leased.state == "held":
            self._source.reader.pause(leased.reading, False)

    async def _next(self, wanted: int) -> Batch | None:
        """The next messages. None: stopped, or nothing came for `until_idle` (see `_idle`)."""
        batch = await self._source.next(wanted, 0.0, self._until_idle)
        if batch is None and not self._stopping and not self._positions.held and await self._is_behind():
            self._occupied_at = self._loop.time()  # what others hold may become ours yet: one of them may be dead
        return batch

    async def _is_behind(self) -> bool:
        """Is there anything that the group has not come to?"""
        source = self._source
        ends = {
            TopicPartition(topic.id, one.index): one.next
            for topic in await source.engine.topics(source.names, source.timeout)
            for one in topic.partitions
        }
        return any(
            one.next < ends.get(TopicPartition(one.topic_id, one.partition), 0)
            for one in await source.engine.offsets(self._positions.group, source.timeout)
        )

    def _idle(self) -> bool:
        """Nothing came for a while: is that the end?"""
        held = [self._positions.held.get(key) for key in self._held_back]
        if any(leased is not None and leased.state == "held" for leased in held):
            self._occupied_at = self._loop.time()
        return self._until_idle is not None and self._loop.time() >= self._occupied_at + self._until_idle
