"""`process`, `run` and `reject` on a real broker: what is stored when handlers succeed, fail, hang, or die."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import idemq
import idemq.sync
from idemq import Message, Record, RetryPolicy, Subscription, Transaction
from idemq.client import dead_letters, handling, wire
from idemq.client.dead_letters import DEAD_LETTER, DeadLetters, Place, facts
from idemq.client.source import Source
from idemq.client.transaction import Buffer
from idemq.testing import Link

from .support import Broker, broker, eventually, read, run

IDLE_S = 0.1
QUICK = RetryPolicy(max_attempts=3, backoff=0.001, max_backoff=0.002, dead_letter="dlq")


@asynccontextmanager
async def world(messages: int = 0, partitions: int = 1, **settings: Any) -> AsyncIterator[tuple[Broker, idemq.Client]]:
    """A broker with `in`, whose messages are numbered and lie in turn on its partitions; `out`, `dlq` and `parking`."""
    async with broker(**settings) as b, idemq.connect(b.url) as mq:
        await mq.create_topic("in", partitions=partitions)
        for name in ("out", "dlq", "parking"):
            await mq.create_topic(name)
        await publish(mq, messages, partitions)
        yield b, mq


async def publish(mq: idemq.Client, count: int, partitions: int = 1, keys: int = 5) -> None:
    async with mq.producer() as p:
        await p.send_many(
            "in",
            [Record(b"%d" % n, b"key-%d" % (n % keys) if keys else None, None, n % partitions) for n in range(count)],
        )


async def values(mq: idemq.Client, topic: str = "out") -> list[int]:
    return [int(message.value) for message in await read(mq, topic)]


async def positions(mq: idemq.Client, group: str = "g") -> dict[tuple[str, int], int]:
    return {one[:2]: one.next for one in (await mq.describe_group(group)).offsets}


async def reached(mq: idemq.Client, offset: int) -> None:
    while await positions(mq) != {("in", 0): offset}:  # noqa: ASYNC110 - the broker tells nobody
        await asyncio.sleep(0.01)


async def attempts(mq: idemq.Client, group: str = "g") -> int:
    return (await mq.describe_group(group)).offsets[0].attempts


async def die(mq: idemq.Client) -> None:
    """As a process that is killed: its member leaves no group."""
    await mq._engine.close()


def number(message: Message) -> int:
    return int(message.value)


async def copy(message: Message, tx: Transaction) -> None:
    tx.send("out", message.value)


def copy_in_thread(message: Message, tx: Transaction) -> None:
    assert threading.current_thread().name == "idemq-handler"
    tx.send("out", message.value)


class CopyObject:
    async def __call__(self, message: Message, tx: Transaction) -> None:
        await copy(message, tx)


class Poison(Exception):
    pass


def failing(*numbers: int, how: Callable[[Message], None] | None = None) -> Callable[[Message, Transaction], Any]:
    """Copies, and fails behind the copy for these."""

    async def handler(message: Message, tx: Transaction) -> None:
        tx.send("out", message.value)
        if number(message) in numbers:
            if how is not None:
                how(message)
            raise Poison(f"number {number(message)}")

    return handler


# ---------------------------------------------------------------------------------------------------------- process


@pytest.mark.parametrize("handler", [copy, copy_in_thread, CopyObject()])
@run
async def test_process_stores_each_message_and_its_output_once(handler: Any) -> None:
    async with world(1000, partitions=3) as (_, mq):
        for _ in range(2):  # the second finds nothing
            async with mq.subscribe("in", group="g") as sub:
                await sub.process(handler, max_messages=70, until_idle=IDLE_S)
        assert sorted(await values(mq)) == list(range(1000))
        assert sum((await positions(mq)).values()) == 1000
        assert [one.name for one in await mq.producers() if not one.name.startswith("~")] == []


@pytest.mark.parametrize("in_thread", [False, True])
@run
async def test_without_a_policy_the_error_is_raised_and_what_was_handled_before_is_stored(in_thread: bool) -> None:
    async with world(10) as (_, mq):
        inner = failing(6)

        def plain(message: Message, tx: Transaction) -> None:
            tx.send("out", message.value)
            if number(message) == 6:
                raise Poison("number 6")

        async with mq.subscribe("in", group="g") as sub:
            with pytest.raises(Poison, match="number 6") as caught:
                await sub.process(plain if in_thread else inner)
            assert "message 6 of partition 0 of 'in'" in caught.value.__notes__[0]
            assert await values(mq) == list(range(6)), "the failed one's output is dropped"
            assert await positions(mq) == {("in", 0): 6}
            assert await attempts(mq) == 1
            again: list[tuple[int, int]] = []

            async def note(message: Message, tx: Transaction) -> None:
                again.append((number(message), message.attempt))

            await sub.process(note, until_idle=IDLE_S)
        assert again == [(6, 2), (7, 1), (8, 1), (9, 1)]


@run
async def test_a_failed_message_is_tried_again_in_its_place_while_other_partitions_go_on() -> None:
    order: list[tuple[int, int]] = []

    async def handler(message: Message, tx: Transaction) -> None:
        order.append((number(message), message.attempt))
        if number(message) == 2 and message.attempt < 3:
            raise Poison
        tx.send("out", message.value)

    async with world(20, partitions=2) as (_, mq):
        policy = RetryPolicy(backoff=0.2, max_backoff=0.2)
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await sub.process(handler, until_idle=0.05)
        even = [one for one in order if not one[0] % 2]
        assert even == [(0, 1), (2, 1), (2, 2), (2, 3), *[(n, 1) for n in range(4, 20, 2)]]
        odd = [one for one in order if one[0] % 2]
        assert odd == [(n, 1) for n in range(1, 20, 2)]
        assert order.index((19, 1)) < order.index((2, 2)), "the other partition did not wait"
        assert sorted(await values(mq)) == list(range(20))


@pytest.mark.parametrize("kind", ["process", "run", "run 8", "in a thread"])
@run
async def test_what_fails_too_often_becomes_a_dead_letter_and_the_others_go_on(kind: str) -> None:
    calls: Counter[int] = Counter()

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        calls[number(message)] += 1
        if tx is not None:
            tx.send("out", message.value)
        if number(message) % 10 == 3:
            raise Poison("bad number")

    def plain(message: Message) -> None:
        calls[number(message)] += 1
        if number(message) % 10 == 3:
            raise Poison("bad number")

    async with world(60, partitions=2) as (_, mq):
        async with mq.subscribe("in", group="g", retry=QUICK) as sub:
            if kind == "process":
                await sub.process(handler, until_idle=IDLE_S)
            elif kind == "in a thread":
                await sub.run(plain, concurrency=3, until_idle=IDLE_S)
            else:
                await sub.run(handler, concurrency=8 if "8" in kind else 1, until_idle=IDLE_S)
        assert await positions(mq) == {("in", 0): 30, ("in", 1): 30}
        letters = await read(mq, "dlq")
        poison = [3, 13, 23, 33, 43, 53]
        assert sorted(map(number, letters)) == poison
        assert calls == {n: 3 if n in poison else 1 for n in range(60)}
        if kind == "process":
            assert sorted(await values(mq)) == [n for n in range(60) if n not in poison]
        said = facts(DEAD_LETTER, letters[0].headers)
        assert said["reason"] == "bad number"
        assert said["error"].endswith("Poison")
        assert (said["attempts"], said["group"], said["topic"]) == ("3", "g", "in")
        assert letters[0].key == b"key-%d" % (number(letters[0]) % 5)


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_an_error_of_no_retry_makes_a_dead_letter_at_once(kind: str) -> None:
    calls: list[int] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        calls.append(number(message))
        if number(message) == 1:
            raise ValueError("not a customer")

    policy = RetryPolicy(dead_letter="dlq", no_retry=(ValueError,))
    async with world(3) as (_, mq):
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)
        assert calls == [0, 1, 2]
        assert await values(mq, "dlq") == [1]


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_attempts_survive_the_worker_and_what_has_used_them_up_is_not_tried_again(kind: str) -> None:
    seen: list[int] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        seen.append(message.attempt)
        raise Poison

    async def work(policy: RetryPolicy) -> None:
        async with idemq.connect(b.url) as mine, mine.subscribe("in", group="g", retry=policy) as sub:
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)

    async with world(1) as (b, mq):
        slow = RetryPolicy(max_attempts=5, backoff=20, max_backoff=20, dead_letter="dlq")
        for worker in range(1, 4):
            task = asyncio.create_task(work(slow))
            await eventually(lambda expected=worker: len(seen) == expected)  # type: ignore[misc]
            while await attempts(mq) != worker:  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert seen == [1, 2, 3]
        await work(QUICK)
        assert seen == [1, 2, 3], "three is all that this policy allows"
        (letter,) = await read(mq, "dlq")
        assert facts(DEAD_LETTER, letter.headers)["attempts"] == "3"
        assert "not tried again" in facts(DEAD_LETTER, letter.headers)["reason"]
        assert await positions(mq) == {("in", 0): 1}


@run
async def test_without_a_dead_letter_topic_a_restarted_worker_tries_again() -> None:
    seen: list[int] = []

    async def handler(message: Message, tx: Transaction) -> None:
        seen.append(message.attempt)
        raise Poison

    async with world(1) as (_, mq):
        for _ in range(2):
            async with mq.subscribe("in", group="g", retry=RetryPolicy(max_attempts=2, backoff=0)) as sub:
                with pytest.raises(Poison):
                    await sub.process(handler)
        assert seen == [1, 2, 3]


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_who_kills_its_worker_is_found_and_its_neighbours_are_innocent(kind: str) -> None:
    """Nothing is stored when a worker dies, but before a suspect is handled, alone, that it is tried."""
    handled: Counter[int] = Counter()
    doomed: list[idemq.Client] = []
    died = asyncio.Event()

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) == 4:
            await die(doomed[-1])
            died.set()
            await asyncio.sleep(60)
        handled[number(message)] += 1

    policy = RetryPolicy(max_attempts=2, backoff=0.001, max_backoff=0.001, dead_letter="dlq")
    async with world(8, partitions=2, member_timeout_ms=500) as (b, mq):
        for _ in range(10):
            mine = await idemq.connect(b.url, timeout=2)
            doomed.append(mine)
            sub = mine.subscribe("in", group="g", retry=policy)
            options: dict[str, Any] = {} if kind == "process" else {"concurrency": 4}
            task = asyncio.create_task(
                (sub.process if kind == "process" else sub.run)(handler, until_idle=1.5, **options)
            )
            dying = asyncio.create_task(died.wait())
            await asyncio.wait([task, dying], return_when=asyncio.FIRST_COMPLETED)
            alive = not died.is_set()
            died.clear()
            for one in (task, dying):
                one.cancel()
            await asyncio.gather(task, dying, return_exceptions=True)
            await asyncio.gather(mine.close(), return_exceptions=True)
            if alive:
                task.result()
                break
        assert alive, "somebody survived"
        assert await values(mq, "dlq") == [4]
        assert set(handled) == {0, 1, 2, 3, 5, 6, 7}
        assert await positions(mq) == {("in", 0): 4, ("in", 1): 4}
        (letter,) = await read(mq, "dlq")
        assert facts(DEAD_LETTER, letter.headers)["attempts"] == "2"


def working(sub: idemq.Subscription, kind: str, handler: Callable[..., Any], **options: Any) -> asyncio.Task[None]:
    return asyncio.create_task((sub.process if kind == "process" else sub.run)(handler, **options))


async def dies_with_all_in_hand(b: Broker, kind: str) -> None:
    """A worker is killed while it handles the first message: all that it may have had in hand are suspects now."""
    begun = asyncio.Event()

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        begun.set()
        await asyncio.sleep(60)

    async with idemq.connect(b.url, timeout=2) as doomed:
        work = working(doomed.subscribe("in", group="g", retry=QUICK), kind, handler)
        await begun.wait()
        await die(doomed)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def missed(mq: idemq.Client) -> None:
    while (await mq.describe_group("g")).members:  # noqa: ASYNC110 - the broker tells nobody
        await asyncio.sleep(0.01)


async def told(sub: idemq.Subscription) -> None:
    """The broker knows how each attempt ended."""
    group = sub._source.grouped("this test")
    await eventually(
        lambda: not group.endings and not any(leased.turns % 2 for leased in group.positions.held.values())
    )


@pytest.mark.parametrize("how", ["stopped", "cancelled"])
@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_suspect_that_is_cut_short_again_and_again_is_innocent(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "HANDLERS_STOP_S", 0.01)
    begun = asyncio.Event()

    async def hang(message: Message, tx: Transaction | None = None) -> None:
        begun.set()
        await asyncio.sleep(60)

    async def fine(message: Message, tx: Transaction | None = None) -> None:
        pass

    async with world(2, member_timeout_ms=300) as (b, mq):
        await dies_with_all_in_hand(b, kind)
        for _ in range(QUICK.max_attempts + 1):
            begun.clear()
            async with mq.subscribe("in", group="g", retry=QUICK) as sub:
                work = working(sub, kind, hang)
                await begun.wait()
                sub.stop() if how == "stopped" else work.cancel()
                await asyncio.wait([work])
        assert await attempts(mq) == 0
        async with mq.subscribe("in", group="g", retry=QUICK) as sub:
            await working(sub, kind, fine, until_idle=IDLE_S)
            await told(sub)
        assert (await positions(mq), await values(mq, "dlq")) == ({("in", 0): 2}, [])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_worker_that_dies_after_an_attempt_was_cut_short_blames_it_if_it_has_begun_again(
    kind: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "HANDLERS_STOP_S", 0.01)
    begun = asyncio.Event()

    async def hang(message: Message, tx: Transaction | None = None) -> None:
        begun.set()
        await asyncio.sleep(60)

    async with world(2, member_timeout_ms=300) as (b, mq):
        await dies_with_all_in_hand(b, kind)
        async with idemq.connect(b.url, timeout=2) as doomed:
            sub = doomed.subscribe("in", group="g", retry=QUICK)
            for _ in range(2):  # the subscription goes on
                begun.clear()
                work = working(sub, kind, hang)
                await begun.wait()
                sub.stop()
                await work
            await told(sub)
            if again:
                begun.clear()
                work = working(sub, kind, hang)
                await begun.wait()
            await die(doomed)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await missed(mq)
        assert await attempts(mq) == int(again)


@run
async def test_nothing_else_is_handed_out_before_the_broker_knows_that_an_attempt_was_cut_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handling, "HANDLERS_STOP_S", 0.01)
    begun = asyncio.Event()

    async def hang(message: Message, tx: Transaction) -> None:
        begun.set()
        await asyncio.sleep(60)

    async with world(2, partitions=2, member_timeout_ms=300) as (b, _):
        await dies_with_all_in_hand(b, "process")
        async with (
            Link("127.0.0.1", b.port) as link,
            idemq.connect(link.url) as mine,
            mine.subscribe("in", group="g", retry=QUICK) as sub,
        ):
            work = working(sub, "process", hang)
            await begun.wait()
            await eventually(lambda: len(sub._source.reader.ready) == 1)  # the other suspect, which waits for its turn
            link.stall()
            sub.stop()
            await work
            waiting = asyncio.create_task(anext(sub.batches(max_wait=0)))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
            await link.heal()
            assert len(await waiting) >= 1


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_worker_that_dies_while_it_waits_for_an_outage_to_end_blames_nothing(kind: str) -> None:
    tried = 0

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        nonlocal tried
        tried += 1
        raise ConnectionError("the database is away")

    async with world(2, member_timeout_ms=300) as (b, mq):
        await dies_with_all_in_hand(b, kind)
        policy = RetryPolicy(max_attempts=2, backoff=20, max_backoff=20, dead_letter="dlq", circuit_after=1)
        async with idemq.connect(b.url, timeout=2) as doomed:
            sub = doomed.subscribe("in", group="g", retry=policy)
            work = working(sub, kind, handler)
            await eventually(lambda: tried == 1)
            await told(sub)
            await die(doomed)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await missed(mq)
        assert await attempts(mq) == 0


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_suspect_that_fails_and_then_kills_is_counted_for_both(kind: str) -> None:
    seen: list[int] = []

    async with world(2, member_timeout_ms=300) as (b, mq):
        await dies_with_all_in_hand(b, kind)
        async with idemq.connect(b.url, timeout=2) as doomed:
            dead = asyncio.Event()

            async def handler(message: Message, tx: Transaction | None = None) -> None:
                seen.append(message.attempt)
                if len(seen) == 1:
                    raise Poison
                await die(doomed)
                dead.set()
                await asyncio.sleep(60)

            work = working(doomed.subscribe("in", group="g", retry=RetryPolicy(backoff=0)), kind, handler)
            await dead.wait()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        await missed(mq)
        assert await attempts(mq) == 2
        async with mq.subscribe("in", group="g") as sub:
            async for message in sub:
                seen.append(message.attempt)
                break
        assert seen == [2, 3, 4], "and before them it was in a dead worker's hands"


@run
async def test_a_position_that_is_set_meanwhile_stores_nothing_and_goes_on_from_there() -> None:
    sought = False

    async def handler(message: Message, tx: Transaction) -> None:
        nonlocal sought
        tx.send("out", message.value)
        if number(message) == 5 and not sought:
            sought = True
            await mq.seek_group("g", "in", 2)

    async with world(8) as (_, mq):
        async with mq.subscribe("in", group="g") as sub:
            await sub.process(handler, until_idle=IDLE_S)
        assert await values(mq) == list(range(2, 8))
        assert await positions(mq) == {("in", 0): 8}


@run
async def test_what_is_left_of_a_batch_whose_transaction_is_refused_is_handed_out_again_in_every_partition() -> None:
    seen: list[int] = []

    async def handler(message: Message, tx: Transaction) -> None:
        seen.append(number(message))
        if len(seen) == 3:  # nothing of the other partition was begun
            await mq.seek_group("g", "in", 0, partition=message.partition)
            raise Poison
        tx.send("out", message.value)

    async with world(20, partitions=2) as (_, mq):
        policy = RetryPolicy(backoff=0.001, max_backoff=0.001)
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await sub.process(handler, until_idle=IDLE_S)
        assert sorted(await values(mq)) == list(range(20))
        assert await positions(mq) == {("in", 0): 10, ("in", 1): 10}


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_answers_that_are_lost_are_waited_for_and_nothing_is_run_again(kind: str) -> None:
    calls: Counter[int] = Counter()

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        calls[number(message)] += 1
        if tx is not None:
            tx.send("out", message.value)
        if number(message) % 20 == 7:
            link.cut()
        if number(message) == 50:
            link.stall()
            asyncio.get_running_loop().call_later(1.0, link.resume)  # longer than the client's timeout

    async with world(100) as (b, mq), Link("127.0.0.1", b.port) as link, idemq.connect(link.url, timeout=0.5) as mine:
        async with mine.subscribe("in", group="g") as sub:
            if kind == "process":
                await sub.process(handler, max_messages=10, until_idle=2.0)
                assert await values(mq) == list(range(100))
            else:
                await sub.run(handler, until_idle=2.0)
        assert calls == dict.fromkeys(range(100), 1)
        assert await positions(mq) == {("in", 0): 100}


@run
async def test_an_anonymous_name_that_the_broker_forgot_is_replaced() -> None:
    async with world(4) as (_, mq), mq.subscribe("in", group="g") as sub:
        await sub.process(copy, max_messages=2, until_idle=IDLE_S)
        name = sub._source.producer.name
        await mq.delete_producer(name)
        await publish(mq, 3)
        await sub.process(copy, until_idle=IDLE_S)
        assert await values(mq) == [0, 1, 2, 3, 0, 1, 2]
        assert sub._source.producer.name != name


@run
async def test_too_much_for_one_transaction_is_stored_in_several_and_the_largest_message_may_die() -> None:
    async def handler(message: Message, tx: Transaction) -> None:
        if message.value == largest:
            raise Poison
        for _ in range(3):
            tx.send("out", b"%7d" % number(message) * (700 << 10))

    largest = b"x" * wire.MESSAGE_BYTES_MAX
    async with world(3) as (_, mq):
        await mq.send("in", largest)
        async with mq.subscribe("in", group="g", retry=RetryPolicy(max_attempts=1, dead_letter="dlq")) as sub:
            await sub.process(handler, until_idle=1.0)
        async with mq.subscribe("out") as sub:
            found = [int(one.value[:7]) async for one in take(sub, 9)]
        assert found == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        async with mq.subscribe("dlq") as sub:
            assert [one.value async for one in take(sub, 1)] == [largest]


@pytest.mark.parametrize("in_thread", [False, True])
@run
async def test_what_cannot_be_stored_is_its_handlers_failure_and_the_others_are_stored(in_thread: bool) -> None:
    calls: Counter[int] = Counter()

    def plain(message: Message, tx: Transaction) -> None:
        calls[number(message)] += 1
        tx.send("out", message.value)
        if number(message) == 33:
            tx.send("nowhere", message.value)
        if number(message) == 67:
            tx.send("out", message.value, partition=1)

    async def inner(message: Message, tx: Transaction) -> None:
        plain(message, tx)

    async with world(100) as (_, mq):
        async with mq.subscribe("in", group="g", retry=QUICK) as sub:
            await sub.process(plain if in_thread else inner, until_idle=IDLE_S)
        assert await values(mq) == [n for n in range(100) if n not in (33, 67)]
        letters = [(number(one), facts(DEAD_LETTER, one.headers)) for one in await read(mq, "dlq")]
        assert [(n, said["error"].rpartition(".")[2], said["attempts"]) for n, said in letters] == [
            (33, "UnknownTopic", "3"),
            (67, "InvalidRequest", "3"),
        ]
        assert await positions(mq) == {("in", 0): 100}
        assert calls[32] == 1
        assert calls[99] <= 3, "whoever comes behind one of them is handled again once, not with each of its attempts"


@run
async def test_without_a_policy_what_cannot_be_stored_is_raised_and_says_whose_it_was() -> None:
    async def handler(message: Message, tx: Transaction) -> None:
        tx.send("nowhere" if number(message) == 6 else "out", message.value)

    async with world(10) as (_, mq), mq.subscribe("in", group="g") as sub:
        with pytest.raises(idemq.UnknownTopic, match="'nowhere'") as caught:
            await sub.process(handler)
        assert caught.value.__notes__ == ["while handling message 6 of partition 0 of 'in'"]
        assert await values(mq) == list(range(6))
        assert await positions(mq) == {("in", 0): 6}
        assert await attempts(mq) == 1
        await mq.create_topic("nowhere")
        await sub.process(handler, until_idle=IDLE_S)
        assert (await values(mq), await values(mq, "nowhere")) == ([0, 1, 2, 3, 4, 5, 7, 8, 9], [6])


@run
async def test_whatever_of_one_message_is_refused_costs_no_other() -> None:
    async def handler(message: Message, tx: Transaction) -> None:
        match number(message):
            case 1:
                tx.send("no name", b"")
            case 2:
                tx.send("gone", b"")  # this client still knows it
            case 3:
                for n in range(1025):
                    tx.send(f"wide{n % 2}", b"", partition=n // 2)
            case _:
                tx.send("out", message.value)

    policy = RetryPolicy(max_attempts=1, dead_letter="dlq")
    async with world(5) as (b, mq):
        for name in ("wide0", "wide1"):
            await mq.create_topic(name, partitions=513)
        await mq.create_topic("gone")
        await mq.send("gone", b"")
        async with idemq.connect(b.url) as other:
            await other.delete_topic("gone")
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await sub.process(handler, until_idle=IDLE_S)
        assert await values(mq) == [0, 4]
        assert await values(mq, "dlq") == [1, 2, 3]


@run
async def test_a_batch_for_more_partitions_than_a_transaction_touches_is_stored_in_several() -> None:
    calls: Counter[int] = Counter()

    async def handler(message: Message, tx: Transaction) -> None:
        calls[number(message)] += 1
        tx.send(f"wide{number(message) % 2}", message.value, partition=number(message) // 2)

    async with world(1100) as (_, mq):
        for name in ("wide0", "wide1"):
            await mq.create_topic(name, partitions=550)
        async with mq.subscribe("in", group="g") as sub:
            await sub.process(handler, max_messages=1100, until_idle=IDLE_S)
        assert calls == dict.fromkeys(range(1100), 1)
        assert sorted(await values(mq, "wide0") + await values(mq, "wide1")) == list(range(1100))


@run
async def test_a_topic_that_is_gone_is_an_outage_and_makes_no_flood_of_dead_letters() -> None:
    policy = RetryPolicy(
        max_attempts=1, backoff=0.001, max_backoff=0.01, dead_letter="dlq", circuit_after=3, circuit_s_max=0.1
    )
    async with world(20) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        await mq.delete_topic("out")
        with pytest.raises(idemq.CircuitOpen, match="no topic 'out'"):
            await sub.process(copy)
        assert await values(mq, "dlq") == [0, 1]
        await mq.create_topic("out")
        await sub.process(copy, until_idle=IDLE_S)
        assert await values(mq) == list(range(2, 20))


@run
async def test_a_dead_letter_that_cannot_be_stored_ends_the_call() -> None:
    async def handler(message: Message, tx: Transaction) -> None:
        if number(message) == 2:
            await mq.delete_topic("dlq")
            raise Poison

    policy = RetryPolicy(max_attempts=1, dead_letter="dlq")
    async with world(4) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        with pytest.raises(idemq.UnknownTopic, match="'dlq'"):
            await sub.process(handler)
        assert await positions(mq) == {("in", 0): 2}


@run
async def test_with_a_thread_that_cannot_be_stopped_nothing_more_is_begun_whatever_was_refused() -> None:
    release, begun = threading.Event(), []

    def handler(message: Message, tx: Transaction) -> None:
        begun.append(number(message))
        tx.send("nowhere" if number(message) == 1 else "out", message.value)
        if number(message) == 3:
            release.wait(30)

    async with world(5) as (_, mq), mq.subscribe("in", group="g", retry=QUICK) as sub:
        with pytest.raises(idemq.UnknownTopic):
            await sub.process(handler, handler_timeout=0.2)
        release.set()
        assert begun == [0, 1, 2, 3]
        assert (await mq.describe_group("g")).members == []
        assert await values(mq) == [0]


async def take(sub: idemq.Subscription, count: int) -> AsyncIterator[Message]:
    async for message in sub:
        yield message
        count -= 1
        if not count:
            return


@run
async def test_a_handlers_transaction_takes_nothing_once_it_has_returned() -> None:
    kept: list[Transaction] = []

    async def handler(message: Message, tx: Transaction) -> None:
        for earlier in kept:
            with pytest.raises(idemq.ClientClosed):
                earlier.send("out", b"99")
        kept.append(tx)
        tx.send("out", message.value)

    async with world(3) as (_, mq), mq.subscribe("in", group="g") as sub:
        await sub.process(handler, until_idle=IDLE_S)
        assert await values(mq) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("kind", ["process", "run", "run in a thread"])
@run
async def test_stop_finishes_what_was_begun_and_begins_nothing_more(kind: str) -> None:
    begun: list[int] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        begun.append(number(message))
        if number(message) == 3:
            sub.stop()
            await asyncio.sleep(0.05)

    def plain(message: Message) -> None:
        begun.append(number(message))
        if number(message) == 3:
            sub.stop()
            time.sleep(0.05)

    async with world(10) as (_, mq), mq.subscribe("in", group="g") as sub:
        if kind == "process":
            await sub.process(handler)
        else:
            await sub.run(plain if "thread" in kind else handler)
        assert begun == [0, 1, 2, 3]
        assert await positions(mq) == {("in", 0): 4}
        assert [number(one) async for one in take(sub, 1)] == [4], "the subscription is as good as before"


@pytest.mark.parametrize("number_", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["process", "run"])
def test_a_signal_stops_in_the_main_thread(kind: str, number_: signal.Signals) -> None:
    handled: list[int] = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        handled.append(number(message))
        if number(message) == 3:
            os.kill(os.getpid(), number_)
            await asyncio.sleep(0.05)

    async def main() -> None:
        held = signal.getsignal(signal.SIGTERM)
        async with world(10) as (_, mq), mq.subscribe("in", group="g") as sub:
            await (sub.process if kind == "process" else sub.run)(handler)
            assert await positions(mq) == {("in", 0): 4}
        assert signal.getsignal(signal.SIGTERM) is held

    asyncio.run(main())
    assert handled == [0, 1, 2, 3]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_without_a_signal_they_are_whose_they_were() -> None:
    async def main() -> None:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        during: list[Any] = []

        async def handler(message: Message, tx: Transaction) -> None:
            during.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))

        async with world(1) as (_, mq), mq.subscribe("in", group="g") as sub:
            await sub.process(handler, until_idle=IDLE_S)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        assert during[0][0] is during[0][1]
        assert during[0][0] not in before

    asyncio.run(main())


@run
async def test_a_signal_that_somebody_holds_is_his() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))

    async def handler(message: Message, tx: Transaction) -> None:
        if number(message) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        async with world(10) as (_, mq), mq.subscribe("in", group="g") as sub:
            await sub.process(handler, until_idle=IDLE_S)
            assert await positions(mq) == {("in", 0): 10}
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM]


def test_a_signal_stops_blocking_code() -> None:
    """The main thread waits in `idemq.sync`, whose loop runs in another."""
    handled: list[int] = []
    ready, url = threading.Event(), ""
    ending: list[Callable[[], object]] = []

    def serve() -> None:
        async def main() -> None:
            nonlocal url
            async with world(10) as (b, mq):
                url = b.url
                end = asyncio.Event()
                ending.append(partial_threadsafe(asyncio.get_running_loop(), end.set))
                ready.set()
                await end.wait()
                assert await positions(mq) == {("in", 0): 4}

        asyncio.run(main())

    def handler(message: Message) -> None:
        handled.append(number(message))
        if number(message) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    with idemq.sync.connect(url) as mq, mq.subscribe("in", group="g") as sub:
        sub.run(handler)
    ending[0]()
    thread.join(30)
    assert handled == [0, 1, 2, 3]


def partial_threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> Callable[[], object]:
    return lambda: loop.call_soon_threadsafe(function)


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_handler_that_does_not_end_after_stop_is_cancelled_and_not_blamed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "HANDLERS_STOP_S", 0.05)
    cancelled: list[int] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) == 3:
            sub.stop()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(number(message))
                raise

    async with world(10) as (_, mq), mq.subscribe("in", group="g", retry=QUICK) as sub:
        await (sub.process if kind == "process" else sub.run)(handler)
        assert cancelled == [3]
        assert await positions(mq) == {("in", 0): 3}
        assert await attempts(mq) == 0


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_commit_that_is_not_answered_after_stop_is_unknown(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handling, "STOP_S", 0.2)

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if tx is not None:
            tx.send("out", message.value)
        if number(message) == 3:
            link.stall()
            sub.stop()

    async with (
        world(10) as (b, _),
        Link("127.0.0.1", b.port) as link,
        idemq.connect(link.url) as mine,
        mine.subscribe("in", group="g") as sub,
    ):
        with pytest.raises(idemq.OutcomeUnknown):
            await (sub.process if kind == "process" else sub.run)(handler)
        await link.heal()


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_handler_that_takes_too_long_has_failed(kind: str) -> None:
    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) == 1:
            await asyncio.sleep(60)

    async with world(3) as (_, mq):
        async with mq.subscribe("in", group="g", retry=QUICK) as sub:
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S, handler_timeout=0.05)
        (letter,) = await read(mq, "dlq")
        said = facts(DEAD_LETTER, letter.headers)
        assert (number(letter), said["error"]) == (1, "idemq.client.errors.HandlerTimeout")
        assert await positions(mq) == {("in", 0): 3}


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_thread_that_cannot_be_stopped_makes_its_member_leave(kind: str) -> None:
    release = threading.Event()
    late: list[str] = []

    def handler(message: Message, tx: Transaction | None = None) -> None:
        if tx is not None:
            tx.send("out", message.value)
        if number(message) == 2:
            release.wait(30)
            try:
                if tx is not None:
                    tx.send("out", b"99")
            except idemq.ClientClosed:
                late.append("refused")

    async with world(4) as (_, mq):
        sub = mq.subscribe("in", group="g", retry=QUICK)
        with pytest.raises(idemq.HandlerTimeout, match="message 2 of partition 0"):
            await (sub.process if kind == "process" else sub.run)(handler, handler_timeout=0.1)
        assert await positions(mq) == {("in", 0): 2}
        assert await attempts(mq) == 1
        assert (await mq.describe_group("g")).members == []
        with pytest.raises(idemq.ClientClosed):
            await sub.process(handler)
        release.set()
        if kind == "process":
            await eventually(lambda: late == ["refused"])
            assert await values(mq) == [0, 1]


@run
async def test_a_plain_function_that_returns_a_coroutine_is_refused() -> None:
    async with world(2) as (_, mq), mq.subscribe("in", group="g") as sub:
        with pytest.raises(idemq.InvalidRequest, match="async def"):
            await sub.process(lambda message, tx: copy(message, tx))
        with pytest.raises(idemq.InvalidRequest, match="async def"):
            await sub.run(lambda message: asyncio.sleep(0))
        assert await positions(mq) == {("in", 0): 0}


@run
async def test_a_handler_that_is_cancelled_from_within_has_failed() -> None:
    async def handler(message: Message, tx: Transaction | None = None) -> None:
        raise asyncio.CancelledError

    async with world(1) as (_, mq), mq.subscribe("in", group="g") as sub:
        for kind in (sub.process, sub.run):
            with pytest.raises(RuntimeError, match="cancelled from within"):
                await kind(handler)


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_handlers_that_never_wait_leave_the_loop_to_others(kind: str) -> None:
    turns: list[int] = [0]

    async def other() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        time.sleep(0.003)  # noqa: ASYNC251 - work
        turns.append(turns[0])

    async with world(40) as (_, mq), mq.subscribe("in", group="g") as sub:
        task = asyncio.create_task(other())
        await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)
        task.cancel()
    assert len(set(turns[1:])) > 30, "between two handlers others have their turn"


@run
async def test_a_loop_that_is_held_up_is_worth_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handling, "BLOCKED_S", 0.05)

    async def handler(message: Message, tx: Transaction) -> None:
        time.sleep(0.15)  # noqa: ASYNC251 - what must not be done

    async with world(1) as (_, mq), mq.subscribe("in", group="g") as sub:
        with caplog.at_level(logging.WARNING, logger="idemq"):
            await sub.process(handler, until_idle=IDLE_S)
    assert "stood still" in caplog.text
    assert "handler" in caplog.text


@run
async def test_what_cannot_be_asked_for() -> None:
    async with world(1) as (_, mq):
        with pytest.raises(idemq.InvalidRequest, match="group"):
            mq.subscribe("in", retry=QUICK)
        with pytest.raises(idemq.InvalidRequest, match="RetryPolicy"):
            mq.subscribe("in", group="g", retry=5)  # type: ignore[arg-type]
        async with mq.subscribe("in") as sub:
            for kind in (sub.process, sub.run):
                with pytest.raises(idemq.InvalidRequest, match="group"):
                    await kind(copy)
        async with mq.subscribe("in", group="g") as sub:
            wrong: list[tuple[Any, dict[str, Any]]] = [
                (sub.process, {"max_messages": 0}),
                (sub.process, {"until_idle": 0}),
                (sub.process, {"handler_timeout": 0}),
                (sub.run, {"concurrency": 0}),
                (sub.run, {"concurrency": 501}),
                (sub.run, {"until_idle": -1}),
            ]
            for kind, arguments in wrong:
                with pytest.raises(idemq.InvalidRequest):
                    await kind(copy, **arguments)
            with pytest.raises(idemq.InvalidRequest, match="function"):
                await sub.run("handler")  # type: ignore[arg-type]

            async def nested(message: Message, tx: Transaction) -> None:
                with pytest.raises(idemq.InvalidRequest, match="under way"):
                    await sub.run(print)
                with pytest.raises(idemq.InvalidRequest, match="dead-letter topic"):
                    await sub.reject(message)

            await sub.process(nested, until_idle=IDLE_S)
        for policy in (RetryPolicy(dead_letter="gone"), RetryPolicy(parking="gone")):
            async with mq.subscribe("in", group="g", retry=policy) as sub:
                with pytest.raises(idemq.UnknownTopic, match="'gone'"):
                    await sub.process(copy)
        async with mq.subscribe("in", "dlq", group="g", retry=QUICK) as sub:
            with pytest.raises(idemq.InvalidRequest, match="come back"):
                await sub.process(copy)


# -------------------------------------------------------------------------------------------------------------- run


@run
async def test_run_keeps_the_order_of_each_key_and_commits_what_is_finished() -> None:
    order: dict[bytes | None, list[int]] = {}
    at_once: Counter[bytes | None] = Counter()
    most = 0

    async def handler(message: Message) -> None:
        nonlocal most
        at_once[message.key] += 1
        assert at_once[message.key] == 1, "two of one key at once"
        most = max(most, at_once.total())
        await asyncio.sleep(0.001)
        order.setdefault(message.key, []).append(number(message))
        at_once[message.key] -= 1

    async with world(300) as (_, mq):
        async with mq.subscribe("in", group="g") as sub:
            await sub.run(handler, concurrency=4, until_idle=IDLE_S)
        assert most == 4
        assert sorted(n for numbers in order.values() for n in numbers) == list(range(300))
        assert all(numbers == sorted(numbers) for numbers in order.values())
        assert await positions(mq) == {("in", 0): 300}


@run
async def test_a_position_waits_for_the_slowest_and_no_more_than_500_are_in_hand() -> None:
    release, handled = asyncio.Event(), 0

    async def handler(message: Message) -> None:
        nonlocal handled
        if number(message) == 20:
            await release.wait()
        handled += 1

    async with world() as (_, mq), mq.subscribe("in", group="g") as sub:
        await publish(mq, 2000, keys=0)
        working = asyncio.create_task(sub.run(handler, concurrency=500, until_idle=IDLE_S))
        await eventually(lambda: handled == 519)
        await reached(mq, 20)
        await asyncio.sleep(0.05)
        assert handled == 519
        release.set()
        await working
        await reached(mq, 2000)
        assert handled == 2000


@run
async def test_an_error_of_run_is_raised_when_the_others_are_finished_and_committed() -> None:
    finished: list[int] = []

    async def handler(message: Message) -> None:
        if number(message) == 4:
            raise Poison
        await asyncio.sleep(0.02)
        finished.append(number(message))

    async with world(100) as (_, mq), mq.subscribe("in", group="g") as sub:
        with pytest.raises(Poison):
            await sub.run(handler, concurrency=5)
        assert sorted(finished) == [0, 1, 2, 3]
        assert await positions(mq) == {("in", 0): 4}
        assert await attempts(mq) == 1


@run
async def test_what_is_retried_keeps_its_key_waiting_and_no_other() -> None:
    order: list[int] = []

    async def handler(message: Message) -> None:
        if number(message) == 0 and not order.count(-1) > 1:
            order.append(-1)
            raise Poison
        order.append(number(message))

    async with world(20) as (_, mq):
        policy = RetryPolicy(backoff=0.1, max_backoff=0.1)
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await sub.run(handler, concurrency=5, until_idle=0.05)
        mine = [n for n in order if n % 5 == 0]
        assert mine == [0, 5, 10, 15]
        assert order.index(19) < order.index(0)
        assert await positions(mq) == {("in", 0): 20}


@run
async def test_the_second_failed_attempt_of_a_message_behind_others_is_known_when_it_is_the_first() -> None:
    """Attempts of what is not the head are counted here; they are stored as soon as it is."""
    release = asyncio.Event()
    failures = 0

    async def handler(message: Message) -> None:
        nonlocal failures
        if number(message) == 0:
            await release.wait()
        if number(message) == 1:
            failures += 1
            raise Poison

    policy = RetryPolicy(max_attempts=3, backoff=0.001, max_backoff=0.002)
    async with world(2) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        working = asyncio.create_task(sub.run(handler, concurrency=2))
        await eventually(lambda: failures == 3)
        assert await attempts(mq) == 0
        release.set()
        with pytest.raises(Poison):
            await working
        assert await positions(mq) == {("in", 0): 1}
        assert await attempts(mq) == 3


@run
async def test_attempts_of_what_is_behind_a_dead_letter_that_is_not_stored_yet_do_not_pass_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are counted at the position, or they would move it."""
    under_way, failures = asyncio.Event(), 0

    async def handler(message: Message) -> None:
        nonlocal failures
        if number(message):
            await under_way.wait()
            failures += 1
            raise ValueError if number(message) == 1 else Poison

    policy = RetryPolicy(max_attempts=2, backoff=60, max_backoff=60, dead_letter="dlq", no_retry=(ValueError,))
    async with world(3) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        commit_offsets = mq._engine.commit_offsets

        async def slow(*arguments: Any) -> None:
            under_way.set()
            await eventually(lambda: failures == 2)
            await commit_offsets(*arguments)

        monkeypatch.setattr(mq._engine, "commit_offsets", slow)
        working = asyncio.create_task(sub.run(handler, concurrency=3))
        await reached(mq, 2)
        while not await attempts(mq):  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(0.01)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert await values(mq, "dlq") == [1]
        assert await positions(mq) == {("in", 0): 2}


def held_back(sub: Subscription) -> list[Any]:
    """The partitions of which nothing is handed out for a while."""
    return [one.name for one in sub._source.reader.readings.values() if one.paused]


@run
async def test_a_partition_that_waited_and_is_being_given_back_hands_out_nothing_when_process_has_ended() -> None:
    revoked: list[int] = []
    release = asyncio.Event()

    async def handler(message: Message, tx: Transaction) -> None:
        raise Poison

    async def on_revoked(partitions: list[tuple[str, int]]) -> None:
        revoked.extend(index for _, index in partitions)
        await release.wait()

    policy = RetryPolicy(backoff=60, max_backoff=60)
    async with (
        world(2, partitions=2, release_ms_max=30_000) as (b, mq),
        idemq.connect(b.url) as one,
        one.subscribe("in", group="g", retry=policy, on_revoked=on_revoked) as sub,
    ):
        working = asyncio.create_task(sub.process(handler))
        await eventually(lambda: len(held_back(sub)) == 2)
        async with mq.subscribe("in", group="g"):
            await eventually(lambda: len(revoked) == 1)
            sub.stop()
            await working
            kept = 1 - revoked[0]
            await mq.send("in", b"2", partition=kept)
            handed_out = [number(message) async for message in take(sub, 2)]
            release.set()
            assert handed_out == [kept, 2]


@run
async def test_who_resumes_a_partition_that_waits_gets_its_message_early_or_later_and_loses_none() -> None:
    """A retry is the early one; a parked message still has its time, and is held back again."""
    seen: list[tuple[int, int]] = []
    tasks: list[asyncio.Task[None]] = []

    async def resume(topic: str) -> None:
        await eventually(lambda: bool(held_back(sub)))
        await sub.resume(topic, 0)

    async def handler(message: Message, tx: Transaction) -> None:
        seen.append((number(message), message.attempt))
        tx.send("out", message.value)
        if number(message) == 2 and message.attempt == 1:
            tasks.append(asyncio.create_task(resume("parking" if policy.parking else "in")))
            raise Poison

    for policy in (
        RetryPolicy(backoff=60, max_backoff=60),
        RetryPolicy(backoff=0.5, max_backoff=0.5, parking="parking"),
    ):
        seen.clear()
        async with world(6) as (_, mq), mq.subscribe("in", "parking", group="g", retry=policy) as sub:
            await sub.process(handler, until_idle=0.2)
            await asyncio.gather(*tasks)
            assert Counter(seen) == dict.fromkeys([*[(n, 1) for n in range(6)], (2, 2)], 1)
            assert sorted(await values(mq)) == list(range(6))


@run
async def test_a_partition_that_its_handler_paused_stays_paused() -> None:
    seen: list[tuple[int, int]] = []

    async def handler(message: Message, tx: Transaction) -> None:
        seen.append((number(message), message.attempt))
        if number(message) == 2 and message.attempt == 1:
            await sub.pause("in", 0)
            raise Poison

    policy = RetryPolicy(backoff=0.001, max_backoff=0.001)
    async with world(4) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        await sub.process(handler, until_idle=0.2)
        assert seen == [(0, 1), (1, 1), (2, 1)]
        await sub.resume("in", 0)
        await sub.process(handler, until_idle=IDLE_S)
        assert seen[3:] == [(2, 2), (3, 1)]


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_partition_that_is_revoked_is_finished_committed_and_given_back(kind: str) -> None:
    handled: Counter[int] = Counter()

    async def slow(message: Message, tx: Transaction | None = None) -> None:
        handled[number(message)] += 1
        if tx is not None:
            tx.send("out", message.value)
        await asyncio.sleep(0.05)  # longer than a partition takes to change hands

    async with world(40, partitions=4) as (b, mq):

        async def work(until_idle: float) -> None:
            async with idemq.connect(b.url) as mine, mine.subscribe("in", group="g") as sub:
                subs.append(sub)
                options: dict[str, Any] = {} if kind == "process" else {"concurrency": 3}
                await (sub.process if kind == "process" else sub.run)(slow, until_idle=until_idle, **options)

        subs: list[idemq.Subscription] = []
        first = asyncio.create_task(work(1.0))
        await eventually(lambda: handled.total() >= 4)
        second = asyncio.create_task(work(1.0))
        await eventually(lambda: len(subs) == 2 and len(subs[0].assigned) == len(subs[1].assigned) == 2)
        await asyncio.gather(first, second)
        assert handled == dict.fromkeys(range(40), 1), "nothing was handled twice for the sake of a join"
        assert sum((await positions(mq)).values()) == 40
        if kind == "process":
            assert sorted(await values(mq)) == list(range(40))


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_partition_is_not_given_back_while_a_handler_has_a_message_of_it(kind: str) -> None:
    handled: list[tuple[str, int]] = []

    def worker(name: str) -> Callable[..., Any]:
        async def handler(message: Message, tx: Transaction | None = None) -> None:
            handled.append((name, number(message)))
            await asyncio.sleep(0.3)

        return handler

    async with world(partitions=2) as (b, mq), idemq.connect(b.url) as one, one.subscribe("in", group="g") as sub:
        async with mq.producer() as p:  # the partition that goes to the second member
            await p.send_many("in", [Record(b"%d" % n, partition=1) for n in range(3)])
        first = asyncio.create_task((sub.process if kind == "process" else sub.run)(worker("first"), until_idle=1.0))
        await eventually(lambda: len(handled) == 1)
        async with mq.subscribe("in", group="g") as other:
            await (other.process if kind == "process" else other.run)(worker("second"), until_idle=1.0)
        await first
        assert handled == [("first", 0), ("second", 1), ("second", 2)]


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_partition_in_a_long_pause_is_given_back_at_once(kind: str) -> None:
    tried: list[tuple[int, int]] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        tried.append((number(message), message.attempt))
        if message.attempt < 2:
            raise Poison

    policy = RetryPolicy(backoff=30, max_backoff=30)
    async with (
        world(2, partitions=2, release_ms_max=30_000) as (b, mq),
        idemq.connect(b.url) as one,
        one.subscribe("in", group="g", retry=policy) as sub,
    ):
        working = asyncio.create_task((sub.process if kind == "process" else sub.run)(handler))
        await eventually(lambda: len(tried) == 2)
        async with mq.subscribe("in", group="g", retry=policy) as other:
            await (other.process if kind == "process" else other.run)(handler, until_idle=0.5)
            assert len(tried) == 3
            assert tried[2][1] == 2
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working


@run
async def test_after_an_end_everything_that_is_not_committed_is_handed_out_again() -> None:
    async def handler(message: Message) -> None:
        if number(message) >= 3:
            await asyncio.sleep(60)

    async with world(10) as (_, mq), mq.subscribe("in", group="g") as sub:
        working = asyncio.create_task(sub.run(handler, concurrency=4))
        await reached(mq, 3)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert [number(one) async for one in take(sub, 7)] == list(range(3, 10))


# ------------------------------------------------------------------------------------------------ outages, parking


@pytest.mark.parametrize("kind", ["process", "run", "run 8"])
@run
async def test_an_outage_is_waited_out_and_makes_no_flood_of_dead_letters(kind: str) -> None:
    down, calls = True, 0

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        nonlocal calls, down
        calls += 1
        if calls == 40:
            down = False
        if down:
            raise ConnectionError("the database is away")
        if tx is not None:
            tx.send("out", message.value)

    policy = RetryPolicy(max_attempts=2, backoff=0.001, max_backoff=0.01, dead_letter="dlq", circuit_after=3)
    async with world(60) as (_, mq):
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            if kind == "process":
                await sub.process(handler, until_idle=IDLE_S)
            else:
                await sub.run(handler, concurrency=8 if "8" in kind else 1, until_idle=IDLE_S)
        letters = await values(mq, "dlq")
        assert letters == ([] if "8" in kind else [0, 1]), "fewer than the outage takes to be seen as one"
        assert await positions(mq) == {("in", 0): 60}
        if kind == "process":
            assert await values(mq) == list(range(2, 60))
        assert not down


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_an_outage_that_does_not_end_is_raised_with_nothing_lost(kind: str) -> None:
    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) >= 5:
            raise ConnectionError("the database is away")

    policy = RetryPolicy(
        max_attempts=2, backoff=0.001, max_backoff=0.01, dead_letter="dlq", circuit_after=3, circuit_s_max=0.1
    )
    async with world(20) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        with pytest.raises(idemq.CircuitOpen, match="the database is away"):
            await (sub.process if kind == "process" else sub.run)(handler)
        assert await values(mq, "dlq") == [5, 6]
        assert await positions(mq) == {("in", 0): 7}
        assert await attempts(mq) <= 1


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_failures_with_successes_between_them_are_no_outage(kind: str) -> None:
    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) % 2:
            raise Poison

    policy = RetryPolicy(max_attempts=1, dead_letter="dlq", circuit_after=3)
    async with world(20) as (_, mq):
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)
        assert await values(mq, "dlq") == list(range(1, 20, 2))


PARKING = RetryPolicy(max_attempts=3, backoff=0.05, max_backoff=0.1, dead_letter="dlq", parking="parking")


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_parked_message_gives_up_its_place_and_comes_back_as_what_it_was(kind: str) -> None:
    seen: dict[int, list[Any]] = {}
    order: list[int] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        order.append(number(message))
        facts_ = (message.topic, message.offset, message.uid, message.key, message.headers, message.timestamp)
        seen.setdefault(number(message), []).append((message.attempt, facts_))
        if number(message) == 2 and message.attempt < 3:
            raise Poison
        if number(message) == 4:
            raise Poison
        if tx is not None:
            tx.send("out", message.value)

    async with world(8) as (_, mq):
        async with mq.subscribe("in", "parking", group="g", retry=PARKING) as sub:
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=0.05)
        assert order[:8] == list(range(8)), "the others did not wait"
        for poison in (2, 4):
            assert [one for one, _ in seen[poison]] == [1, 2, 3]
            assert len({repr(what) for _, what in seen[poison]}) == 1, "the same message each time"
        assert await values(mq, "dlq") == [4]
        (letter,) = await read(mq, "dlq")
        said = facts(DEAD_LETTER, letter.headers)
        assert (said["topic"], said["offset"], said["attempts"]) == ("in", "4", "3")
        assert dead_letters.original_headers(DEAD_LETTER, letter.headers) == {}
        assert await positions(mq) == {("in", 0): 8, ("parking", 0): 4}
        if kind == "process":
            assert await values(mq) == [0, 1, 3, 5, 6, 7, 2]


@run
async def test_a_parked_message_waits_for_whoever_reads_and_belongs_to_its_group() -> None:
    slow = RetryPolicy(backoff=0.4, max_backoff=0.4, parking="parking")
    async with world(3) as (_, mq):
        for group in ("g", "h"):
            async with mq.subscribe("in", group=group, retry=slow) as sub:  # parks, and reads nothing parked
                await sub.process(failing(1), until_idle=IDLE_S)
        assert await values(mq) == [0, 2, 0, 2]
        parked = await read(mq, "parking")
        assert list(map(number, parked)) == [1, 1]
        times: list[float] = []

        async def handler(message: Message, tx: Transaction) -> None:
            times.append(time.time())
            await copy(message, tx)

        async with mq.subscribe("parking", group="h", retry=slow) as sub:
            await sub.process(handler, until_idle=0.05)
        assert await values(mq) == [0, 2, 0, 2, 1], "its own, not that of the other group"
        assert times[0] >= parked[1].timestamp / 1000 + 0.2, "not before its time"
        assert (await positions(mq, "h"))["parking", 0] == 2


# ------------------------------------------------------------------------------------------------- dead letters


@run
async def test_reject_makes_a_dead_letter_of_the_first_that_is_not_committed() -> None:
    async with world(4) as (_, mq), mq.subscribe("in", group="g", retry=QUICK) as sub:
        messages = [one async for one in take(sub, 3)]
        with pytest.raises(idemq.InvalidRequest, match="commit what is before it"):
            await sub.reject(messages[1], reason="no")
        await sub.commit(messages[0])
        await sub.reject(messages[1], reason="no such customer")
        (letter,) = await read(mq, "dlq")
        assert number(letter) == 1
        assert facts(DEAD_LETTER, letter.headers)["reason"] == "no such customer"
        assert await positions(mq) == {("in", 0): 2}
        with pytest.raises(idemq.InvalidRequest):
            await sub.reject(messages[1])
        await sub.commit(messages[2])
        assert [number(one) async for one in take(sub, 1)] == [3]

        async def handler(message: Message, tx: Transaction) -> None:
            with pytest.raises(idemq.InvalidRequest, match="no_retry"):
                await sub.reject(message)

        await mq.send("in", b"4")
        await sub.process(handler, until_idle=IDLE_S)
    async with world(1) as (_, mq), mq.subscribe("in", group="g") as sub:
        with pytest.raises(idemq.InvalidRequest, match="dead-letter topic"):
            await sub.reject(await anext(aiter(sub)))


async def dead_letters_of(mq: idemq.Client, count: int) -> DeadLetters:
    """So many messages of `in`, as dead letters."""
    await publish(mq, count)
    async with mq.subscribe(
        "in", group="g", retry=RetryPolicy(max_attempts=1, dead_letter="dlq", no_retry=(Poison,))
    ) as sub:
        await sub.process(failing(*range(count)), until_idle=IDLE_S)
    return DeadLetters(mq, "dlq")


async def left(letters: DeadLetters) -> list[int]:
    return [number(one) async for one in letters.left()]


@run
async def test_a_dead_letter_goes_back_once_and_the_others_stay() -> None:
    async with world() as (_, mq):
        letters = await dead_letters_of(mq, 6)
        assert await left(letters) == [0, 1, 2, 3, 4, 5]
        assert await letters.requeue([Place(0, 4), Place(0, 2)]) == 2
        assert await left(letters) == [0, 1, 3, 5]
        back = (await read(mq, "in"))[6:]
        assert list(map(number, back)) == [2, 4]
        assert [(one.key, one.headers) for one in back] == [(b"key-2", {}), (b"key-4", {})]
        for gone in (Place(0, 4), Place(0, 6), Place(1, 0), Place(-1, 0)):
            with pytest.raises(dead_letters.NoDeadLetter, match="there is no dead letter"):
                await letters.requeue([Place(0, 0), gone])
        assert await letters.drop([Place(0, 0)]) == 1
        assert await left(letters) == [1, 3, 5]
        assert await letters.requeue() == 3
        assert await left(letters) == []
        assert await letters.requeue() == 0
        assert [number(one) for one in await read(mq, "in")][6:] == [2, 4, 1, 3, 5]


@run
async def test_what_is_no_dead_letter_is_neither_requeued_nor_dropped_and_takes_nothing_with_it() -> None:
    async with world() as (_, mq):
        letters = await dead_letters_of(mq, 2)
        await mq.send("dlq", b"7")
        for work in (letters.requeue, letters.drop):
            for places in (None, [Place(0, 0), Place(0, 2)]):
                with pytest.raises(dead_letters.NoDeadLetter, match="where it came from"):
                    await work(places)
        assert await left(letters) == [0, 1, 7]
        assert len(await read(mq, "in")) == 2
        assert await letters.requeue([Place(0, 0)]) == 1
        assert await letters.drop([Place(0, 1)]) == 1
        assert await left(letters) == [7]


@run
async def test_dead_letters_that_come_while_others_are_read_are_not_among_those_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or whoever sends all back sent those back, too, that fail again meanwhile, as long as there are others."""
    monkeypatch.setattr(dead_letters, "TAKE_OUT_MESSAGES_MAX", 1)
    async with world() as (_, mq):
        await mq.create_topic("letters", partitions=2)
        for n in range(6):
            await mq.send("letters", b"%d" % n, partition=min(n, 1))
        found: list[int] = []
        async for message in DeadLetters(mq, "letters").left():
            found.append(number(message))
            if message.partition == 0:
                await mq.send("letters", b"99", partition=0)
                await mq.ping()  # whoever waits for it has it
        assert sorted(found) == list(range(6))


@run
async def test_two_operators_at_once_send_nothing_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "TAKE_OUT_MESSAGES_MAX", 7)
    async with world() as (b, mq):
        letters = await dead_letters_of(mq, 100)
        for seed in range(10):
            async with idemq.connect(b.url) as one, idemq.connect(b.url) as other:

                async def after(turns: int, client: idemq.Client) -> None:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await DeadLetters(client, "dlq").requeue()

                await asyncio.gather(after(0, one), after(seed * 7, other), return_exceptions=True)
        await letters.requeue()
        assert await left(letters) == []
        assert Counter(map(number, await read(mq, "in"))) == dict.fromkeys(range(100), 2)


@run
async def test_a_topic_under_the_same_name_begins_with_nothing_gone() -> None:
    async with world() as (b, mq):
        letters = await dead_letters_of(mq, 3)
        assert await letters.drop() == 3
        await mq.delete_topic("dlq")
        await mq.create_topic("dlq")
        async with idemq.connect(b.url) as other:
            await other.send("dlq", b"8", headers={f"{DEAD_LETTER}topic": b"in", f"{DEAD_LETTER}partition": b"0"})
        assert await left(letters) == [8]
        assert await letters.drop() == 1
        assert await left(letters) == []


@run
async def test_dead_letters_that_retention_removed_are_gone() -> None:
    async with world() as (_, mq):
        letters = await dead_letters_of(mq, 3)
        assert await letters.drop([Place(0, 1)]) == 1
        await mq.purge_topic("dlq")
        assert await left(letters) == []
        await mq.send("dlq", b"9")
        assert await left(letters) == [9]
        with pytest.raises(dead_letters.NoDeadLetter, match="there is no dead letter"):
            await letters.drop([Place(0, 0)])


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_until_idle_waits_for_what_a_dead_member_still_holds(kind: str) -> None:
    """A worker that is started again right after it was killed is not through because nothing is its own yet."""
    async with world(messages=20, partitions=2, member_timeout_ms=700) as (b, mq):
        dead = await idemq.connect(b.url)
        await dead.subscribe("in", group="g").open()
        await die(dead)
        handled: list[int] = []

        async def note(message: Message) -> None:
            handled.append(number(message))

        async def note_and_copy(message: Message, tx: Transaction) -> None:
            await note(message)

        async with mq.subscribe("in", group="g") as sub:
            assert sub.assigned == []
            if kind == "process":
                await sub.process(note_and_copy, until_idle=0.2)
            else:
                await sub.run(note, until_idle=0.2)
        assert sorted(handled) == list(range(20))


@run
async def test_a_handler_that_cannot_take_what_it_is_given_is_refused_at_once() -> None:
    async with world(messages=1) as (_, mq), mq.subscribe("in", group="g", retry=QUICK) as sub:

        def one(message: Message) -> None: ...

        with pytest.raises(idemq.InvalidRequest, match=r"called with \(message, tx\)"):
            await sub.process(one)
        with pytest.raises(idemq.InvalidRequest, match=r"called with \(message\)"):
            await sub.run(copy)
        assert await read(mq, "dlq") == []


@pytest.mark.parametrize("kind", ["async def", "def"])
@run
async def test_what_handlers_send_is_stored_when_it_fills_a_transaction_and_not_kept(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idemq.client.processing.TRANSACTION_BYTES_MAX", 3000)
    moved: list[int] = []
    store = Source.store

    async def noting(self: Source, buffer: Buffer, timeout: float) -> None:
        moved.append(len(buffer.sends))
        await store(self, buffer, timeout)

    def send(message: Message, tx: Transaction) -> None:
        tx.send("out", bytes(1000))

    async def handler(message: Message, tx: Transaction) -> None:
        send(message, tx)

    async with world(9) as (_, mq), mq.subscribe("in", group="g") as sub:
        monkeypatch.setattr(Source, "store", noting)
        await sub.process(handler if kind == "async def" else send, until_idle=IDLE_S)
    assert moved == [3, 3, 3]
