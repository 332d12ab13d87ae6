"""Every public coroutine of the client, cancelled at every place where it waits.

Each is cancelled after 0, 1, 2, … turns of the loop until it completes, and again in the turn in which the answer that
it waits for has come. Each time: CancelledError comes out, nothing hangs, the client works on, every record is in
the log once or not at all, and no task, exception or socket is left over. A public coroutine without an entry fails.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

import idemq
from idemq.client.client import Connecting
from idemq.testing import Link

from .support import Broker, broker, eventually, nothing_left, read, run

CLASSES = (idemq.Client, idemq.Producer, idemq.Transaction, idemq.Subscription, Connecting, idemq.OutcomeUnknown)
SPECIAL = ("__aenter__", "__aexit__", "__aiter__", "__await__")
NOTHING = (None, None, None)


class World:
    """A client with what a call may need. Values are numbered, so that the log tells what became of each."""

    def __init__(self, b: Broker, link: Link, mq: idemq.Client, p: idemq.Producer) -> None:
        self.broker, self.link, self.mq, self.p = b, link, mq, p
        self.number = 0
        self.round: list[int] = []
        """Numbers that were made for the call under test."""
        self.topics = 0
        self.after: list[Callable[[], Awaitable[Any]]] = []
        """What is to be done when the call has ended, also when it never began."""

    def value(self) -> bytes:
        """The next one."""
        self.number += 1
        self.round.append(self.number)
        return b"%d" % self.number

    async def topic(self) -> str:
        """A new topic, with a message."""
        self.topics += 1
        name = f"topic-{self.topics}"
        await self.mq.create_topic(name)
        await self.mq.send(name, b"message")
        return name

    async def sending(self, mq: idemq.Client) -> idemq.Producer:
        """A producer with a message on its way."""
        p = mq.producer()
        await p.send("t", self.value())
        task = asyncio.create_task(p.send("t", self.value()))
        await asyncio.sleep(0)

        async def after() -> None:
            await p.close()
            with suppress(idemq.OutcomeUnknown, idemq.ClientClosed):
                await task

        self.after.append(after)
        return p

    async def check(self) -> None:
        """The client works on."""
        for send in (self.mq.send, self.p.send):
            self.number += 1
            await send("t", b"%d" % self.number)
        await self.p.flush()
        assert await self.mq.ping()


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with (
        broker() as b,
        Link("127.0.0.1", b.port) as link,
        nothing_left(),
        idemq.connect(b.url) as mq,
        mq.producer("p") as p,
    ):
        await mq.create_topic("t")
        one = World(b, link, mq, p)
        await one.check()
        yield one


Entry = Callable[[World], Awaitable[Coroutine[Any, Any, Any]]]
"""Prepares what the call needs, and returns the call."""
ENTRIES: dict[str, Entry] = {}


def entry(prepare: Entry, name: str) -> None:
    assert name not in ENTRIES
    ENTRIES[name] = prepare


def simple(name: str, call: Callable[[World], Coroutine[Any, Any, Any]]) -> None:
    """One that needs no preparation."""

    async def prepare(w: World) -> Coroutine[Any, Any, Any]:
        return call(w)

    entry(prepare, name)


def on_topic(name: str, call: Callable[[World, str], Coroutine[Any, Any, Any]]) -> None:
    """One that needs a topic of its own, with a message in it."""

    async def prepare(w: World) -> Coroutine[Any, Any, Any]:
        return call(w, await w.topic())

    entry(prepare, name)


def with_client(name: str, call: Callable[[idemq.Client], Coroutine[Any, Any, Any]]) -> None:
    """One that ends a client: each time another, that reads, and has a message on its way."""

    async def prepare(w: World) -> Coroutine[Any, Any, Any]:
        mq = await idemq.connect(w.broker.url)
        sub = mq.subscribe("t", prefetch_bytes=1)
        await sub.open()
        await eventually(lambda: sub._source.reader._buffered_bytes > 0)  # it waits to be read, not for the broker
        await w.sending(mq)
        w.after.append(mq.close)
        return call(mq)

    entry(prepare, name)


def with_producer(name: str, call: Callable[[idemq.Producer], Coroutine[Any, Any, Any]]) -> None:
    """One that ends a producer: each time another, with a message on its way."""

    async def prepare(w: World) -> Coroutine[Any, Any, Any]:
        return call(await w.sending(w.mq))

    entry(prepare, name)


def with_subscription(
    name: str, call: Callable[[idemq.Subscription, str], Coroutine[Any, Any, Any]], *, opened: bool = False
) -> None:
    """One of a subscription to a topic with a message in it."""

    async def prepare(w: World) -> Coroutine[Any, Any, Any]:
        topic = await w.topic()
        sub = w.mq.subscribe(topic)
        w.after.append(sub.close)
        if opened:
            await sub.open()
        return call(sub, topic)

    entry(prepare, name)


def with_group(
    name: str,
    call: Callable[[World, idemq.Subscription, str], Coroutine[Any, Any, Any]],
    *,
    opened: bool = True,
) -> None:
    """One of a group's member, on a topic with a message in it that was handed out."""

    async def prepare(w: World) -> Coroutine[Any, Any, Any]:
        topic = await w.topic()
        sub = w.mq.subscribe(topic, group="g")
        w.after.append(sub.close)
        if opened:
            await first(aiter(sub))
        return call(w, sub, topic)

    entry(prepare, name)


async def _delete_group(w: World, sub: idemq.Subscription) -> None:
    await sub.close()
    await w.mq.delete_group("g")


simple("Client.send", lambda w: w.mq.send("t", w.value()))
simple("Client.create_topic", lambda w: w.mq.create_topic(f"made-{w.number}", exist_ok=True))
on_topic("Client.alter_topic", lambda w, topic: w.mq.alter_topic(topic, 2))
on_topic("Client.delete_topic", lambda w, topic: w.mq.delete_topic(topic))
on_topic("Client.purge_topic", lambda w, topic: w.mq.purge_topic(topic))
simple("Client.topics", lambda w: w.mq.topics())
simple("Client.describe_topic", lambda w: w.mq.describe_topic("t"))
simple("Client.producers", lambda w: w.mq.producers())
simple("Client.describe_producer", lambda w: w.mq.describe_producer("p"))
simple("Client.groups", lambda w: w.mq.groups())
with_group("Client.describe_group", lambda w, sub, topic: w.mq.describe_group("g"))
with_group("Client.seek_group", lambda w, sub, topic: w.mq.seek_group("g", topic, 1))
with_group("Client.delete_group", lambda w, sub, topic: _delete_group(w, sub))
simple("Client.ping", lambda w: w.mq.ping())
simple("Client.__aenter__", lambda w: w.mq.__aenter__())
with_client("Client.close", lambda mq: mq.close())
with_client("Client.__aexit__", lambda mq: mq.__aexit__(*NOTHING))
with_client("Client.__aexit__, by exception", lambda mq: mq.__aexit__(KeyError, KeyError(), None))

simple("Producer.send", lambda w: w.p.send("t", w.value()))
simple("Producer.send_many", lambda w: w.p.send_many("t", [w.value() for _ in range(300)]))
simple("Producer.flush", lambda w: w.p.flush())
with_producer("Producer.flush, with something to wait for", lambda p: p.flush())
with_producer("Producer.close", lambda p: p.close())
with_producer("Producer.__aexit__", lambda p: p.__aexit__(*NOTHING))

with_subscription("Subscription.open", lambda sub, topic: sub.open())
with_subscription("Subscription.__aenter__", lambda sub, topic: sub.__aenter__())
with_subscription("Subscription.seek", lambda sub, topic: sub.seek(topic, 0, 1))
with_subscription("Subscription.batches", lambda sub, topic: first(sub.batches(max_wait=0.001)))
with_subscription("Subscription.__aiter__", lambda sub, topic: first(aiter(sub)))
with_group("Subscription.open, with a group", lambda w, sub, topic: sub.open(), opened=False)
with_group("Subscription.__aenter__, with a group", lambda w, sub, topic: sub.__aenter__(), opened=False)
with_group("Subscription.seek, with a group", lambda w, sub, topic: sub.seek(topic, 0, 1))
with_group("Subscription.batches, with a group", lambda w, sub, topic: first(sub.batches(max_wait=0.001)), opened=False)
with_group("Subscription.__aiter__, with a group", lambda w, sub, topic: first(aiter(sub)), opened=False)
with_group("Subscription.close, with a group", lambda w, sub, topic: sub.close())
with_group("Subscription.commit", lambda w, sub, topic: sub.commit())
with_subscription("Subscription.pause", lambda sub, topic: sub.pause(topic, 0))
with_subscription("Subscription.resume", lambda sub, topic: sub.resume(topic, 0))
with_subscription("Subscription.close", lambda sub, topic: sub.close(), opened=True)
with_subscription("Subscription.__aexit__", lambda sub, topic: sub.__aexit__(*NOTHING), opened=True)


async def first(items: AsyncIterator[Any]) -> Any:
    return await anext(items)


async def _delete_producer(w: World) -> Coroutine[Any, Any, Any]:
    name = f"deleted-{w.number}-{w.topics}"
    w.topics += 1
    async with w.mq.producer(name):
        pass
    return w.mq.delete_producer(name)


async def _producer_aenter(w: World) -> Coroutine[Any, Any, Any]:
    w.topics += 1
    p = w.mq.producer(f"opened-{w.topics}")
    w.after.append(p.close)
    return p.__aenter__()


async def _send_without_room(w: World) -> Coroutine[Any, Any, Any]:
    """The buffer is full, so the call waits for room before it has a number."""
    p = w.mq.producer(batch_bytes=1, in_flight=1)
    others = [asyncio.create_task(p.send("t", w.value())) for _ in range(3)]
    await asyncio.sleep(0)
    mine = w.value()

    async def then() -> None:
        others.append(asyncio.create_task(p.send("t", w.value())))  # it waits behind, and gets its room
        await p.send("t", mine)

    async def after() -> None:
        await asyncio.gather(*others)
        await p.close()

    w.after.append(after)
    return then()


async def _transaction_aenter(w: World) -> Coroutine[Any, Any, Any]:
    return w.p.transaction().__aenter__()


async def _transaction_aexit(w: World) -> Coroutine[Any, Any, Any]:
    tx = await w.p.transaction().__aenter__()
    name = await w.topic()  # the producer must ask for it
    tx.send(name, b"x")
    tx.send("t", w.value())
    tx.send("t", w.value())
    return tx.__aexit__(*NOTHING)


async def _outcome(w: World) -> Coroutine[Any, Any, Any]:
    mq = await idemq.connect(w.link.url)
    await mq.send("t", w.value())
    w.link.stall()
    with pytest.raises(idemq.OutcomeUnknown) as caught:
        await mq.send("t", w.value(), timeout=0.001)
    await w.link.heal()

    async def after() -> None:
        assert (await caught.value.outcome()).seq == 1
        await mq.close()

    w.after.append(after)
    return caught.value.outcome()


async def _connect(w: World, by_await: bool) -> Coroutine[Any, Any, Any]:
    connecting = idemq.connect(w.broker.url)
    connected: list[idemq.Client] = []

    async def then() -> None:
        connected.append(await connecting if by_await else await connecting.__aenter__())

    async def after() -> None:
        for mq in connected:
            await mq.close()

    w.after.append(after)
    return then()


async def _leave_connecting(w: World) -> Coroutine[Any, Any, Any]:
    connecting = idemq.connect(w.broker.url)
    mq = await connecting.__aenter__()
    await w.sending(mq)
    w.after.append(mq.close)
    return connecting.__aexit__(*NOTHING)


entry(_delete_producer, "Client.delete_producer")


async def _handling(w: World, kind: str) -> Coroutine[Any, Any, Any]:
    """Handles the one message there is, which stops it. Afterwards whoever comes next handles what is left, so that in
    the end there is one output, or one dead letter, whenever it was cancelled."""
    topic, output = await w.topic(), w.value() if kind == "process" else b""
    policy = idemq.RetryPolicy(max_attempts=1, dead_letter="dlq")
    await w.mq.create_topic("dlq", exist_ok=True)
    before = len(await read(w.mq, "dlq"))

    def subscribed() -> idemq.Subscription:
        sub = w.mq.subscribe(topic, group="g", retry=policy)
        w.after.append(sub.close)
        return sub

    def call(sub: idemq.Subscription) -> Coroutine[Any, Any, Any]:
        async def handler(message: idemq.Message, tx: idemq.Transaction | None = None) -> None:
            if tx is not None:
                tx.send("t", output)
            await asyncio.sleep(0)
            sub.stop()
            if tx is None:
                raise ValueError

        return sub.process(handler) if kind == "process" else sub.run(handler)

    async def lag() -> int:
        return sum(one.lag for one in (await w.mq.describe_group("g")).offsets if one.topic == topic)

    async def after() -> None:
        sub = subscribed()
        await sub.open()
        if await lag():
            await call(sub)
        await sub.close()
        assert await lag() == 0
        assert len(await read(w.mq, "dlq")) == before + (kind == "run")

    sub = subscribed()
    w.after.append(after)
    return call(sub)


async def _reject(w: World) -> Coroutine[Any, Any, Any]:
    topic = await w.topic()
    await w.mq.create_topic("dlq", exist_ok=True)
    before = len(await read(w.mq, "dlq"))
    sub = w.mq.subscribe(topic, group="g", retry=idemq.RetryPolicy(dead_letter="dlq"))
    message = await first(aiter(sub))

    async def after() -> None:
        await sub.close()
        moved = [one.lag == 0 for one in (await w.mq.describe_group("g")).offsets if one.topic == topic]
        assert len(await read(w.mq, "dlq")) == before + moved[0]

    w.after.append(after)
    return sub.reject(message)


entry(lambda w: _handling(w, "run"), "Subscription.run")
entry(lambda w: _handling(w, "process"), "Subscription.process")
entry(_reject, "Subscription.reject")
entry(_producer_aenter, "Producer.__aenter__")
entry(_send_without_room, "Producer.send, without room")
entry(_transaction_aenter, "Transaction.__aenter__")
entry(_transaction_aexit, "Transaction.__aexit__")
entry(_outcome, "OutcomeUnknown.outcome")
entry(lambda w: _connect(w, False), "Connecting.__aenter__")
entry(lambda w: _connect(w, True), "Connecting.__await__")
entry(_leave_connecting, "Connecting.__aexit__")

KEEPS = ("Client.send", "Producer.send")
"""Once such a call has begun, its record is in line, and so in the log at the end."""


def coroutines() -> set[str]:
    """The public coroutines and asynchronous generators there are."""
    found = set()
    for owner in CLASSES:
        for name, member in inspect.getmembers(owner, inspect.isfunction):
            public = not name.startswith("_") or name in SPECIAL
            waits = inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member) or name == "__await__"
            if public and waits:
                found.add(f"{owner.__name__}.{name}")
    return found


def test_every_public_coroutine_has_its_entry() -> None:
    assert {name.split(",")[0] for name in ENTRIES} == coroutines()


class Tripwire:
    """Cancels a task in the turn in which the `count`-th future it waits for is done, before it is told."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.task: asyncio.Task[Any]

    @types.coroutine
    def around(self, call: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Drive the call; what it yields are the futures it waits for."""
        error: BaseException | None = None
        while True:
            try:
                future = call.send(None) if error is None else call.throw(error)
            except StopIteration as stop:
                return stop.value
            if future is not None:
                self.seen += 1
                if self.seen == self.count:
                    future.add_done_callback(lambda _: self.task.cancel())
            try:
                yield future
                error = None
            except BaseException as thrown:  # noqa: BLE001 - the call gets it
                error = thrown


async def cancelled(w: World, prepare: Entry, turns: int, tripwire: int) -> tuple[bool, bool]:
    """One call, cancelled after `turns`, or at the `tripwire`; returns (was it cancelled, is there more to try)."""
    w.round, w.after = [], []
    call = await prepare(w)
    wire = Tripwire(tripwire)
    task = wire.task = asyncio.ensure_future(wire.around(call) if tripwire else call)
    if not tripwire:
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
    try:
        await task
        was_cancelled = False
    except asyncio.CancelledError:
        was_cancelled = True
    for after in w.after:
        await after()
    return was_cancelled, was_cancelled if not tripwire else wire.seen >= tripwire


@pytest.mark.parametrize("name", ENTRIES)
@run
async def test_cancelled_everywhere(name: str) -> None:
    async with world() as w:
        kept: set[int] = set()
        rounds: list[list[int]] = []
        cancellations = 0
        plans = [(turns, 0) for turns in range(1000)]
        plans += [(0, count) for count in range(1, 50)]
        over = {False: False, True: False}
        for turns, tripwire in plans:
            if over[bool(tripwire)]:
                continue
            was_cancelled, more = await cancelled(w, ENTRIES[name], turns, tripwire)
            over[bool(tripwire)] = not more
            cancellations += was_cancelled
            mine = list(w.round)
            if not was_cancelled or (name in KEEPS and (turns or tripwire)):
                kept |= set(mine)
            rounds.append(mine)
            await w.check()
        assert all(over.values()), "it never completed"
        assert cancellations >= 1
        stored = [int(message.value) for message in await read(w.mq, "t")]
        assert len(stored) == len(set(stored)), "stored twice"
        assert kept - set(stored) == set(), "lost"
        if "without room" not in name:
            assert stored == sorted(stored), "out of order"
        for mine in rounds:
            found = [number for number in mine if number in set(stored)]
            if name == "Transaction.__aexit__":
                assert found in ([], mine), "torn"
            elif name == "Producer.send_many":
                assert found == mine[: len(found)], "a hole"
        await eventually(lambda: w.broker.server.core.connections == 1)


@pytest.mark.parametrize("call", ["send", "transaction", "flush"])
@run
async def test_a_failure_that_comes_in_the_turn_of_the_cancellation_is_told_by_flush(call: str) -> None:
    async with world() as w:
        topic = await w.topic()
        await w.p.send(topic, b"known")
        await w.mq.delete_topic(topic)
        wire = Tripwire(1)
        if call == "send":
            coroutine: Coroutine[Any, Any, Any] = w.p.send(topic, b"x")
        elif call == "transaction":
            tx = await w.p.transaction().__aenter__()
            tx.send(topic, b"x")
            coroutine = tx.__aexit__(*NOTHING)
        else:
            sending = asyncio.create_task(w.p.send(topic, b"x"))
            await asyncio.sleep(0)
            sending.cancel()
            coroutine = w.p.flush()
        task = wire.task = asyncio.ensure_future(wire.around(coroutine))
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(idemq.UnknownTopic):
            await w.p.flush()
        await w.p.flush()


@run
async def test_a_refusal_that_comes_in_the_turn_of_the_cancellation_is_not_reported_as_lost() -> None:
    async with world() as w:
        wire = Tripwire(1)
        wire.task = asyncio.ensure_future(wire.around(w.mq.create_topic("t")))
        with pytest.raises(asyncio.CancelledError):
            await wire.task


@run
async def test_a_failure_after_a_cancelled_flush_is_told_by_the_next() -> None:
    async with world() as w:
        sending = asyncio.create_task(w.p.send("gone", b"x"))
        await asyncio.sleep(0)
        sending.cancel()
        flushing = asyncio.create_task(w.p.flush())
        await asyncio.sleep(0)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        await eventually(lambda: not w.p._engine._state.queue)  # type: ignore[attr-defined]
        with pytest.raises(idemq.UnknownTopic):
            await w.p.flush()
