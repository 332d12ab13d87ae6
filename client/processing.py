"""The loop behind `Subscription.process`: a handler gets a message and a transaction, and whole batches of them are
stored with the positions, in one transaction each.

What each handler sends is kept apart until it has succeeded, so a message that fails takes nothing of the others with
it: what was handled before it is stored, and it is judged alone. So is one whose handler succeeded and sent what cannot
be stored, which shows only then.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from contextlib import suppress

from .errors import (
    HandlerTimeout,
    InvalidRequest,
    OutcomeUnknown,
    TransactionAborted,
    TransactionTooLarge,
    UnknownTopic,
)
from .handling import Handler, Handling, Judged, Unfinished, cancelled_within, leased_of, not_async, tried
from .positions import Leased, moves, rewind
from .records import Message
from .retry import Verdict
from .session import TRANSACTION_BYTES_MAX
from .source import Source
from .transaction import Buffer, HandlerTransaction

TRANSACTION_S = 1.0
"""What was handled is stored after this time, though the batch is not through: a slow handler loses little."""
REFUSED = (UnknownTopic, InvalidRequest, TransactionTooLarge)
"""A transaction is refused with these for what it holds."""


async def process(
    source: Source, handler: Handler, max_messages: int, until_idle: float | None, handler_timeout: float
) -> None:
    """See `Subscription.process`."""
    if type(max_messages) is not int or not 1 <= max_messages <= 1_000_000:
        raise InvalidRequest(f"max_messages is a whole number in 1 .. 1000000, not {max_messages!r}")
    handling = _Process(source, handler, until_idle, handler_timeout, max_messages)
    await handling.drive()


class _Process(Handling):
    """Handlers with a transaction, one after the other."""

    def __init__(
        self, source: Source, handler: Handler, until_idle: float | None, handler_timeout: float, max_messages: int
    ) -> None:
        super().__init__(source, handler, until_idle, handler_timeout, max_messages, ("message", "tx"))
        self._in_hand: set[Leased] = set()

    def _busy(self, leased: Leased) -> bool:
        return leased in self._in_hand

    async def _handle_all(self) -> None:
        while not self._stopping:
            await self._wait_for_probe()
            batch = await self._next(1 if self._breaker.is_open else self._in_hand_max)
            if batch is None:
                if self._stopping or self._idle():
                    return
                continue
            messages = self._admit(batch)
            try:
                while messages and not self._stopping:
                    messages = [one for one in messages if leased_of(one).state == "held"]
                    self._in_hand = {leased_of(one) for one in messages}
                    self._positions.progressed()
                    if messages:
                        messages = await self._some(messages)
            finally:
                self._in_hand = set()
                self._positions.progressed()

    async def _wait_for_probe(self) -> None:
        while self._breaker.probe_at is not None and not self._stopping:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._breaker.probe_at):
                    await self._changed.wait()
                    continue
            return

    async def _some(self, messages: list[Message]) -> list[Message]:
        """Handle the first of these and store what came of it; returns those that are left."""
        try:
            if self._spent(messages[0]):
                await self._transact([(messages[0], self._sent(self._judge_spent(messages[0])))])
                return messages[1:]
            handled, error = await self._handle(messages)
            left, judged = await self._store(messages, handled)
            if judged is None and error is not None:
                judged = await self._failed(left[0], error)
                left = left if judged is not None else left[1:]
            if judged is None:
                return left
            message = left[0]
            if judged.attempts > tried(message):
                await self._store_attempts(message, judged.attempts)
        except (TransactionAborted, OutcomeUnknown) as aborted:
            # Nothing was stored: all of it again. Unknown is only what ended with its producer, which the broker had
            # forgotten; if it was stored after all, the position says so when it is tried again.
            rewind(moves(messages), aborted)
            return []
        if judged.verdict is Verdict.RAISE:
            raise self._noted(message, judged.error)
        if judged.verdict is None:
            rewind(moves(left))
            return []
        assert self._policy is not None
        self._hold_back(message, self._policy.delay(judged.attempts, self._rng))
        return [one for one in left if leased_of(one) is not leased_of(message)]

    async def _handle(self, messages: list[Message]) -> tuple[list[Buffer], Exception | None]:
        """Call the handler for message after message. Returns what each of the first sent, and the next's error."""
        head = messages[0]
        if self._is_suspect(head):
            await self._store_attempts(head, tried(head), begins=True)
        # One that has failed is handled and stored alone: if that is refused again, nothing behind it was in vain.
        failed = next((place for place, one in enumerate(messages) if tried(one)), len(messages))
        some = messages[: max(1, failed)]
        return await (self._on_the_loop(some) if self._async else self._in_a_thread(some))

    def _enough(self, sent_bytes: int, following: Message) -> bool:
        """Is what was handled to be stored before the following message is? Any thread may ask."""
        return self._stopping or sent_bytes >= TRANSACTION_BYTES_MAX or leased_of(following).state != "held"

    async def _on_the_loop(self, messages: Sequence[Message]) -> tuple[list[Buffer], Exception | None]:
        done: list[Buffer] = []
        until = self._loop.time() + TRANSACTION_S
        sent_bytes = 0
        for message in messages:
            if done and (self._enough(sent_bytes, message) or self._loop.time() >= until):
                break
            # A message's own transaction: what it sends is stored with the others', if its handler succeeds.
            shown, tx = self._shown(message), HandlerTransaction()
            try:
                if shown is not None:
                    await self._call(shown, tx)
            except Unfinished:
                break
            except Exception as error:  # noqa: BLE001 - a handler may raise anything; it is judged
                return done, error
            finally:
                sent = tx.end()
            done.append(sent)
            sent_bytes += sent.bytes
            await self._breathe()
        return done, None

    async def _in_a_thread(self, messages: Sequence[Message]) -> tuple[list[Buffer], Exception | None]:
        """All of them in one turn of the thread: two changes of threads for each would cost more than most handlers."""
        done: list[Buffer] = []
        begun = time.monotonic()
        until = begun + TRANSACTION_S
        tx = HandlerTransaction()

        def work() -> Exception | None:
            nonlocal begun, tx
            sent_bytes = 0
            for message in messages:
                begun = time.monotonic()
                if done and (self._enough(sent_bytes, message) or begun >= until):
                    break
                shown = self._shown(message)
                try:
                    if shown is not None and inspect.isawaitable(result := self._handler(shown, tx)):
                        return not_async(result)
                except Exception as error:  # noqa: BLE001 - as above
                    return error
                except asyncio.CancelledError:
                    return cancelled_within()
                done.append(tx.end())
                sent_bytes += done[-1].bytes
                tx = HandlerTransaction()
            return None

        call = self._threads.call(work)
        try:
            # With the last one done the thread may not have said so yet.
            return done, await self._watched(call, lambda: begun, lambda: messages[min(len(done), len(messages) - 1)])
        except Unfinished:
            return done.copy(), None
        except HandlerTimeout as late:
            return done[: len(messages) - 1], late
        finally:
            tx.end()  # a thread that goes on can send nothing more

    async def _store(self, messages: list[Message], transactions: list[Buffer]) -> tuple[list[Message], Judged | None]:
        """Store what was sent for the first of these messages, and the positions: as a rule in one transaction.

        One that is refused for what it holds is tried again by halves: it was too much for one, or a message is to
        blame, which then is found alone. Returns those that are left, and what becomes of the first if it is to blame.
        """
        handled = list(zip(messages, transactions, strict=False))
        done, size = 0, len(handled)
        while done < len(handled):
            some = handled[done : done + size]
            try:
                await self._transact(some)
            except REFUSED as refused:
                if len(some) > 1:
                    size = len(some) // 2
                    continue
                judged = await self._failed(messages[done], refused)
                if judged is not None:
                    return messages[done:], judged
            else:
                self._breaker.succeeded()
                size *= 2
            done += len(some)
        return messages[done:], None

    async def _failed(self, message: Message, error: Exception) -> Judged | None:
        """What becomes of a message that failed, everything before it being stored; None: it was set aside."""
        judged = self._judge(message, error, tried(message) + 1)
        if judged.send is None:
            return judged
        await self._transact([(message, self._sent(judged.send))])
        return None

    async def _transact(self, handled: list[tuple[Message, Buffer]]) -> None:
        """Store what was sent, and the positions, in one transaction. What it is refused for leaves them in hand."""
        whole = Buffer()
        for _, sent in handled:
            whole.absorb(sent)
        whole.move([message for message, _ in handled])
        try:
            await self._store_buffer(whole)
        except REFUSED:
            raise
        except BaseException as failed:
            rewind(whole.moved, failed)  # a handler may have moved positions of other subscriptions, too
            raise
