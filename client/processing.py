"""The loop behind `Subscription.process`: a handler gets a message and a transaction, and whole batches of them are
stored with the positions, in one transaction each.

What each handler sends is kept apart until it has succeeded, so a message that fails takes nothing of the others with
it: what was handled before it is stored, and it is judged alone.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import HandlerTimeout, InvalidRequest, OutcomeUnknown, TransactionAborted
from .group import Leased, moves, rewind
from .handling import FOREVER_S, Handler, Handling, Judged, Unfinished, cancelled_within, leased_of, not_async, tried
from .records import Message
from .retry import Verdict
from .session import TRANSACTION_BYTES_MAX
from .transaction import Transaction

if TYPE_CHECKING:
    from .consumer import Subscription

TRANSACTION_S = 1.0
"""What was handled is stored after this time, though the batch is not through: a slow handler loses little."""


async def process(
    sub: Subscription, handler: Handler, max_messages: int, until_idle: float | None, handler_timeout: float
) -> None:
    """See `Subscription.process`."""
    if type(max_messages) is not int or not 1 <= max_messages <= 1_000_000:
        raise InvalidRequest(f"max_messages is a whole number in 1 .. 1000000, not {max_messages!r}")
    handling = _Process(sub, handler, until_idle, handler_timeout, max_messages)
    await handling.drive()


class _Process(Handling):
    """Handlers with a transaction, one after the other."""

    def __init__(
        self, sub: Subscription, handler: Handler, until_idle: float | None, handler_timeout: float, max_messages: int
    ) -> None:
        super().__init__(sub, handler, until_idle, handler_timeout, max_messages, ("message", "tx"))
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
                    self._group.progressed()
                    if messages:
                        messages = await self._some(messages)
            finally:
                self._in_hand = set()
                self._group.progressed()

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
            handled, judged = await self._handle(messages)
            await self._store(handled)
            left = messages[len(handled) :]
            if judged is None or judged.verdict in (Verdict.DEAD_LETTER, Verdict.PARK):
                return left
            message = left[0]
            if judged.attempts > tried(message):
                await self._store_attempts(message, judged.attempts)
        except (TransactionAborted, OutcomeUnknown) as error:
            # Nothing was stored: all of it again. Unknown is only what ended with its producer, which the broker had
            # forgotten; if it was stored after all, the position says so when it is tried again.
            rewind(moves(messages), error)
            return []
        if judged.verdict is Verdict.RAISE:
            raise self._noted(message, judged.error)
        if judged.verdict is None:
            rewind(moves(left))
            return []
        assert self._policy is not None
        self._hold_back(message, self._policy.delay(judged.attempts, self._rng))
        return [one for one in left if leased_of(one) is not leased_of(message)]

    async def _handle(self, messages: list[Message]) -> tuple[list[tuple[Message, Transaction]], Judged | None]:
        """Call the handler for message after message. Returns those that are done with, and what becomes of the next
        if it failed."""
        head = messages[0]
        if self._spent(head):
            return [(head, self._sent(self._judge_spent(head)))], None
        suspect = self._is_suspect(head)
        if suspect:
            await self._write_ahead(head)
        for place, one in enumerate(messages):
            if place and self._spent(one):
                messages = messages[:place]
                break
        transactions, error = await (self._on_the_loop(messages) if self._async else self._in_a_thread(messages))
        handled = list(zip(messages, transactions, strict=False))
        if handled:
            self._breaker.succeeded()
        if error is None:
            return handled, None
        failed = messages[len(handled)]
        judged = self._judge(failed, error, tried(failed) + (0 if suspect else 1))
        if judged.send is not None:
            handled.append((failed, self._sent(judged.send)))
        return handled, judged

    async def _on_the_loop(self, messages: Sequence[Message]) -> tuple[list[Transaction], Exception | None]:
        done: list[Transaction] = []
        until = self._loop.time() + TRANSACTION_S
        producer = self._sub._producer()
        for message in messages:
            if done and (self._stopping or self._loop.time() >= until or leased_of(message).state != "held"):
                break
            # A message's own transaction: what it sends is stored with the others', if its handler succeeds.
            shown, tx = self._shown(message), producer.transaction(timeout=FOREVER_S)._begun()
            try:
                if shown is not None:
                    await self._call(shown, tx)
            except Unfinished:
                break
            except Exception as error:  # noqa: BLE001 - a handler may raise anything; it is judged
                return done, error
            finally:
                tx._end()
            done.append(tx)
            await self._breathe()
        return done, None

    async def _in_a_thread(self, messages: Sequence[Message]) -> tuple[list[Transaction], Exception | None]:
        """All of them in one turn of the thread: two changes of threads for each would cost more than most handlers."""
        done: list[Transaction] = []
        begun = time.monotonic()
        until = begun + TRANSACTION_S
        producer = self._sub._producer()
        tx = producer.transaction(timeout=FOREVER_S)._begun()

        def work() -> Exception | None:
            nonlocal begun, tx
            for message in messages:
                begun = time.monotonic()
                if done and (self._stopping or begun >= until or leased_of(message).state != "held"):
                    break
                shown = self._shown(message)
                try:
                    if shown is not None and inspect.isawaitable(result := self._handler(shown, tx)):
                        return not_async(result)
                except Exception as error:  # noqa: BLE001 - as above
                    return error
                except asyncio.CancelledError:
                    return cancelled_within()
                tx._end()
                done.append(tx)
                tx = producer.transaction(timeout=FOREVER_S)._begun()
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
            tx._end()  # a thread that goes on can send nothing more

    async def _store(self, handled: list[tuple[Message, Transaction]]) -> None:
        """What was sent, and the positions: as a rule in one transaction, in several when it is too much for one."""
        start = 0
        while start < len(handled):
            end = start
            with self._storage():
                async with self._sub._producer().transaction(timeout=FOREVER_S) as whole:
                    while end < len(handled) and (
                        end == start or whole._bytes + handled[end][1]._bytes <= TRANSACTION_BYTES_MAX
                    ):
                        whole._absorb(handled[end][1])
                        end += 1
                    whole.commit_offsets([message for message, _ in handled[start:end]])
            start = end
