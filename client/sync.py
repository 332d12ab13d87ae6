"""The same client for blocking code: `with idemq.sync.connect(URL) as mq: mq.send("orders", b"x")`.

Every class here stands in front of its asynchronous namesake, with the same calls, arguments and errors; what is
written there is not written again. The real client lives on an event loop in a thread of its own, one for each
`connect`; any thread may call. No rule lives here.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from . import client, consumer, engine, errors, producer, transaction, wire
from .errors import ClientClosed, InvalidRequest
from .group import Callback
from .handling import HANDLER_TIMEOUT_S, Handler
from .records import Message, Receipt, Record, SendSummary
from .retry import RetryPolicy
from .source import Batch, Start
from .threads import stopped_by_signals

__all__ = ["Client", "OutcomeUnknown", "Producer", "Subscription", "Transaction", "connect"]

A = TypeVar("A")
P = ParamSpec("P")
R = TypeVar("R")


class OutcomeUnknown(errors.OutcomeUnknown):
    """As `idemq.OutcomeUnknown`, for blocking code: `error.outcome(timeout)` returns when the answer is here."""

    remedy = "Do not send it again; call `error.outcome()`, or open the producer again and look at last_seq."

    def __init__(self, unknown: errors.OutcomeUnknown, thread: _Thread) -> None:
        super().__init__(unknown.text, seq=unknown.seq, code=unknown.code)
        self._unknown = unknown
        self._thread = thread

    def outcome(self, timeout: float | None = None) -> Any:
        """Wait for the answer: what the call would have returned or raised, or OutcomeUnknown again."""
        return self._thread.run(self._unknown.outcome(timeout))


class _Thread:
    """An event loop in a thread of its own. It is a daemon: a client that nobody closes does not keep the process."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        # Reentrant: a signal handler may call, too (`sub.stop()`), also while its thread schedules something.
        self._lock = threading.RLock()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="idemq-client", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Is there nothing to run on: closed, or left behind by a fork?"""
        return self._ended or os.getpid() != self._pid

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run it on the loop and wait. An interrupt (Ctrl-C) cancels it there and is raised here."""
        future = None
        try:
            if os.getpid() != self._pid:
                raise ClientClosed(f"this client belongs to process {self._pid}: a forked child connects by itself")
            if threading.current_thread() is self._thread:
                raise InvalidRequest("a coroutine function runs on the client's own loop, which this call would block")
            with self._lock:
                # Under the lock, so that whatever is scheduled comes before the loop's end and is answered.
                if self._ended:
                    raise ClientClosed("the client was closed")
                future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            return future.result()
        except CancelledError:
            raise ClientClosed("the client was closed while this call waited") from None
        except errors.OutcomeUnknown as unknown:
            raise OutcomeUnknown(unknown, self) from None
        except BaseException:
            if future is None:
                coroutine.close()
            else:
                future.cancel()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call it on the loop, and do not wait."""
        self._loop.call_soon_threadsafe(function)

    def leave(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """As `run`, and nothing when the client has ended: that closed everything."""
        if self.ended:
            coroutine.close()
        else:
            self.run(coroutine)

    def end(self) -> None:
        """Cancel what still runs, and end the thread."""
        if self.ended:
            return
        with self._lock:
            self._ended = True
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _work(self) -> None:
        loop = self._loop
        loop.run_forever()
        loop.run_until_complete(_cancel_all())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()  # waits for no name lookup that is still under way, so the end is soon


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Facade(Generic[A]):
    """In front of an object that lives on the loop."""

    def __init__(self, inner: A, thread: _Thread) -> None:
        self._inner = inner
        self._thread = thread


def _blocking(method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[_Facade[A], P], R]:
    """The coroutine method, called from outside the loop."""

    @wraps(method)
    def call(facade: _Facade[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return facade._thread.run(method(facade._inner, *args, **kwargs))

    return call


def _quick(method: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[_Facade[A], P], R]:
    """The plain method, called in the loop's thread: what it touches belongs to that thread."""

    @wraps(method)
    def call(facade: _Facade[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        async def there() -> R:
            return method(facade._inner, *args, **kwargs)

        return facade._thread.run(there())

    return call


def _local(method: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[_Facade[A], P], R]:
    """The plain method, called right here: it touches nothing but its own object."""

    @wraps(method)
    def call(facade: _Facade[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(facade._inner, *args, **kwargs)

    return call


_END = object()


def _iterate(thread: _Thread, items: AsyncIterator[R]) -> Iterator[R]:
    async def following() -> R | object:
        return await anext(items, _END)

    while (item := thread.run(following())) is not _END:
        yield item  # type: ignore[misc]  # not _END, so an R


class Transaction(_Facade[transaction.Transaction]):
    """As `idemq.Transaction`: use it as `with producer.transaction() as tx`."""

    @property
    def receipts(self) -> list[Receipt]:
        """After the block: one Receipt for each `send`, in order."""
        return self._inner.receipts

    send = _local(transaction.Transaction.send)
    set_token = _local(transaction.Transaction.set_token)
    commit_offsets = _local(transaction.Transaction.commit_offsets)

    def __enter__(self) -> Self:
        self._thread.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave = self._thread.run if kind is None else self._thread.leave
        leave(self._inner.__aexit__(kind, error, trace))


class Producer(_Facade[producer.Producer]):
    """As `idemq.Producer`: use it as `with client.producer(NAME) as p`."""

    @property
    def name(self) -> str:
        """The producer's name; random when none was given."""
        return self._inner.name

    @property
    def id(self) -> int:
        """The broker's number for this name; 0 before it is known."""
        return self._inner.id

    @property
    def epoch(self) -> int:
        """Which opening of the name this is; 0 before it is known."""
        return self._inner.epoch

    @property
    def last_seq(self) -> int:
        """The highest number known to be stored; -1: none."""
        return self._inner.last_seq

    @property
    def token(self) -> bytes | None:
        """The token stored last."""
        return self._inner.token

    send = _blocking(producer.Producer.send)
    flush = _blocking(producer.Producer.flush)

    def send_many(self, topic: str, records: Iterable[bytes | Record], *, timeout: float | None = None) -> SendSummary:
        """As `idemq.Producer.send_many`. The iterable is read in the caller's thread, a chunk at a time."""
        run = self._thread.run
        many = run(self._many(topic, timeout))
        try:
            for chunk in many.chunks(records):
                run(many.enqueue(chunk))
            return run(many.finish())
        finally:
            self._thread.leave(self._end(many))

    async def _many(self, topic: str, timeout: float | None) -> producer.Many:
        return producer.Many(self._inner, topic, timeout)

    @staticmethod
    async def _end(many: producer.Many) -> None:
        many.end()

    def transaction(
        self, batch: Sequence[Message] | Message | None = None, *, timeout: float | None = None
    ) -> Transaction:
        """As `idemq.Producer.transaction`."""
        return Transaction(_transaction(self, batch, timeout=timeout), self._thread)

    def close(self, timeout: float | None = None) -> None:
        """As `idemq.Producer.close`."""
        self._thread.leave(self._inner.close(timeout))

    def __enter__(self) -> Self:
        self._thread.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.leave(self._inner.__aexit__(kind, error, trace))


class Subscription(_Facade[consumer.Subscription]):
    """As `idemq.Subscription`: `with client.subscribe(TOPIC) as sub`, then `for message in sub`."""

    lag = _quick(consumer.Subscription.lag)
    positions = _quick(consumer.Subscription.positions)
    metadata = _quick(consumer.Subscription.metadata)
    open = _blocking(consumer.Subscription.open)
    seek = _blocking(consumer.Subscription.seek)
    stop = _quick(consumer.Subscription.stop)
    commit = _blocking(consumer.Subscription.commit)
    reject = _blocking(consumer.Subscription.reject)
    pause = _blocking(consumer.Subscription.pause)
    resume = _blocking(consumer.Subscription.resume)

    @property
    def assigned(self) -> list[tuple[str, int]]:
        """(topic, partition) of everything that is read."""
        return list(self.positions())

    def run(
        self,
        handler: Handler,
        *,
        concurrency: int = 1,
        until_idle: float | None = None,
        handler_timeout: float = HANDLER_TIMEOUT_S,
    ) -> None:
        """As `idemq.Subscription.run`. A plain function is called in a thread of its own."""
        with stopped_by_signals(self._stop_soon):
            self._thread.run(
                self._inner.run(
                    handler, concurrency=concurrency, until_idle=until_idle, handler_timeout=handler_timeout
                )
            )

    def process(
        self,
        handler: Handler,
        *,
        max_messages: int = 500,
        until_idle: float | None = None,
        handler_timeout: float = HANDLER_TIMEOUT_S,
    ) -> None:
        """As `idemq.Subscription.process`. A plain function is called in a thread of its own."""
        with stopped_by_signals(self._stop_soon):
            self._thread.run(
                self._inner.process(
                    handler, max_messages=max_messages, until_idle=until_idle, handler_timeout=handler_timeout
                )
            )

    def _stop_soon(self) -> None:
        """From a signal handler, while this thread waits."""
        self._thread.call_soon(self._inner.stop)

    def batches(self, max_messages: int = 500, max_wait: float = 0.05) -> Iterator[Batch]:
        """As `idemq.Subscription.batches`."""
        return _iterate(self._thread, self._inner.batches(max_messages, max_wait))

    def __iter__(self) -> Iterator[Message]:
        return _iterate(self._thread, aiter(self._inner))

    def close(self) -> None:
        """As `idemq.Subscription.close`."""
        self._thread.leave(self._inner.close())

    def __enter__(self) -> Self:
        self._thread.run(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_thread(callback: Callback | None) -> Callback | None:
    """A callback in a thread of its own, because it may call what blocks."""

    async def call(partitions: list[tuple[str, int]]) -> None:
        assert callback is not None
        result = await asyncio.to_thread(callback, partitions)
        if inspect.isawaitable(result):
            await result

    return None if callback is None else call


_transaction = _quick(producer.Producer.transaction)
_producer = _quick(client.Client.producer)
_subscribe = _quick(client.Client.subscribe)


class Client(_Facade[client.Client]):
    """As `idemq.Client`. Use it as `with connect(URL) as mq`, or close it yourself; any thread may call."""

    def __init__(self, inner: client.Client, thread: _Thread) -> None:
        super().__init__(inner, thread)
        self._closing = threading.Lock()

    send = _blocking(client.Client.send)
    create_topic = _blocking(client.Client.create_topic)
    alter_topic = _blocking(client.Client.alter_topic)
    delete_topic = _blocking(client.Client.delete_topic)
    purge_topic = _blocking(client.Client.purge_topic)
    topics = _blocking(client.Client.topics)
    describe_topic = _blocking(client.Client.describe_topic)
    producers = _blocking(client.Client.producers)
    describe_producer = _blocking(client.Client.describe_producer)
    delete_producer = _blocking(client.Client.delete_producer)
    groups = _blocking(client.Client.groups)
    describe_group = _blocking(client.Client.describe_group)
    seek_group = _blocking(client.Client.seek_group)
    delete_group = _blocking(client.Client.delete_group)
    ping = _blocking(client.Client.ping)

    def producer(
        self,
        name: str | None = None,
        *,
        dedup: bool = True,
        linger: float = 0.0,
        batch_bytes: int = engine.BATCH_BYTES,
        in_flight: int = wire.IN_FLIGHT_MAX,
        compression: str | None = None,
    ) -> Producer:
        """As `idemq.Client.producer`."""
        inner = _producer(
            self,
            name,
            dedup=dedup,
            linger=linger,
            batch_bytes=batch_bytes,
            in_flight=in_flight,
            compression=compression,
        )
        return Producer(inner, self._thread)

    def subscribe(
        self,
        *topics: str,
        group: str | None = None,
        start: Start = "earliest",
        retry: RetryPolicy | None = None,
        on_truncated: str = "raise",
        prefetch_bytes: int = consumer.PREFETCH_BYTES,
        on_assigned: Callback | None = None,
        on_revoked: Callback | None = None,
    ) -> Subscription:
        """As `idemq.Client.subscribe`."""
        inner = _subscribe(
            self,
            *topics,
            group=group,
            start=start,
            retry=retry,
            on_truncated=on_truncated,
            prefetch_bytes=prefetch_bytes,
            on_assigned=_in_thread(on_assigned),
            on_revoked=_in_thread(on_revoked),
        )
        return Subscription(inner, self._thread)

    def close(self, timeout: float | None = None) -> None:
        """As `idemq.Client.close`; the thread ends."""
        self._finish(self._inner.close(timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(self._inner.__aexit__(kind, error, trace))

    def _finish(self, closing: Coroutine[Any, Any, None]) -> None:
        if self._thread.ended:
            closing.close()
            return
        with self._closing:  # a second thread that closes waits for the first, and does not end its flush
            try:
                self._thread.leave(closing)
            finally:
                self._thread.end()


def connect(
    url: str | None = None, *, token: str | None = None, timeout: float = 10.0, name: str | None = None
) -> Client:
    """As `idemq.connect`: `with connect(URL) as mq`, or `mq = connect(URL)` … `mq.close()`."""
    connecting = client.connect(url, token=token, timeout=timeout, name=name)
    thread = _Thread()
    try:
        return Client(thread.run(connecting.__aenter__()), thread)
    except BaseException:
        thread.end()
        raise
