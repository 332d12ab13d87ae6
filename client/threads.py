"""What handlers need of the process around them: threads for plain functions, and signals that ask for an end."""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any

Outcome = tuple[Any, BaseException | None]
"""What a call returned, and what it raised."""


class Threads:
    """Threads for handlers that are plain functions, as many as are needed at once. One that never ends does not keep
    the process from ending, as those of an executor would."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Outcome]] | None] = SimpleQueue()
        self._threads = 0
        self._busy = 0

    def call(self, function: Callable[[], Any]) -> asyncio.Future[Outcome]:
        """Call it in a thread; the future's result is (what it returned, what it raised)."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._busy += 1
        if self._busy > self._threads:
            self._threads += 1
            threading.Thread(target=self._work, name="idemq-handler", daemon=True).start()
        self._jobs.put((partial(contextvars.copy_context().run, function), future))
        return future

    def end(self) -> None:
        """The threads end, each when it is done with what it does."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future = job
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # noqa: BLE001 - raised where it is waited for
                error = raised
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._done, future, (result, error))
            del job, function, future, result, error  # while it waits for the next, it holds nothing

    def _done(self, future: asyncio.Future[Outcome], outcome: Outcome) -> None:
        self._busy -= 1
        if not future.done():
            future.set_result(outcome)


@contextmanager
def stopped_by_signals(stop: Callable[[], object]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop`, if this is the main thread, for whichever of them nobody holds. What came before
    is put back in the end, and with the first signal: a second one does what it always did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken: dict[int, Any] = {}

    def put_back() -> None:
        while taken:
            number, before = taken.popitem()
            if signal.getsignal(number) is caught:
                signal.signal(number, before)

    def caught(number: int, frame: FrameType | None) -> None:
        put_back()
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        held = signal.getsignal(number)
        if held in (signal.SIG_DFL, signal.default_int_handler) or _is_runners(held):
            taken[number] = held
            signal.signal(number, caught)
    try:
        yield
    finally:
        put_back()


def _is_runners(held: Any) -> bool:
    """`asyncio.run` takes SIGINT, to cancel what it runs: that is nobody's wish in particular."""
    return isinstance(getattr(getattr(held, "func", None), "__self__", None), asyncio.Runner)
