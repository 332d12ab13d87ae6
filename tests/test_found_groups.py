"""Bugs of groups that were found by attack, each kept as a test."""

from __future__ import annotations

import asyncio
import threading
import time
import zlib
from typing import Any

import msgpack
import pytest

import idemq
import idemq.sync
from idemq import Message, RetryPolicy, Transaction
from idemq.client import handling, running
from idemq.client.dead_letters import Gone, Place
from idemq.client.transaction import HandlerTransaction
from idemq.client.wire import Offset

from .support import broker, eventually, run
from .test_handling import IDLE_S, QUICK, die, number, positions, values, world

# ----------------------------------------------------------------------------------------------------------- outages

OUTAGE = RetryPolicy(max_attempts=3, backoff=0.01, max_backoff=0.02, dead_letter="dlq", circuit_after=2)


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_who_lost_all_messages_of_an_outage_goes_on_with_others(kind: str) -> None:
    failed, handled = 0, []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        nonlocal failed
        if number(message) < 600:
            failed += 1
            raise ConnectionError("the database is away")
        handled.append(number(message))

    async with world(600) as (_, mq), mq.subscribe("in", group="g", retry=OUTAGE) as sub:
        work = asyncio.create_task((sub.process if kind == "process" else sub.run)(handler))
        await eventually(lambda: failed >= 4)
        await mq.seek_group("g", "in", "latest")
        await mq.send("in", b"600")
        async with asyncio.timeout(5):
            await eventually(lambda: handled == [600])
        sub.stop()
        await work


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_an_outage_whose_messages_are_gone_does_not_keep_until_idle_waiting(kind: str) -> None:
    failed = 0

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        nonlocal failed
        failed += 1
        raise ConnectionError("the database is away")

    async with world(600) as (_, mq), mq.subscribe("in", group="g", retry=OUTAGE) as sub:
        work = asyncio.create_task((sub.process if kind == "process" else sub.run)(handler, until_idle=0.3))
        await eventually(lambda: failed >= 4)
        await mq.seek_group("g", "in", "latest")
        async with asyncio.timeout(5):
            await work


@run
async def test_an_outage_with_nothing_to_try_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = failed = 0
    wake_at = running._Run._wake_at

    def counted(self: Any) -> float | None:
        nonlocal turns
        turns += 1
        return wake_at(self)

    monkeypatch.setattr(running._Run, "_wake_at", counted)

    async def handler(message: Message) -> None:
        nonlocal failed
        failed += 1
        raise ConnectionError("the database is away")

    async with world(4) as (_, mq), mq.subscribe("in", group="g", retry=OUTAGE) as sub:
        work = asyncio.create_task(sub.run(handler))
        await eventually(lambda: failed >= 4)
        await mq.seek_group("g", "in", "latest")
        await asyncio.sleep(0.1)
        turns = 0
        await asyncio.sleep(0.3)
        assert turns < 100
        sub.stop()
        await work


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_an_outage_does_not_use_up_the_attempts_of_a_suspect(kind: str) -> None:
    begun, tried = asyncio.Event(), 0

    async def hang(message: Message, tx: Transaction | None = None) -> None:
        begun.set()
        await asyncio.sleep(60)

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        nonlocal tried
        tried += 1
        if tried < 6:
            raise ConnectionError("the database is away")

    policy = RetryPolicy(max_attempts=2, backoff=0.001, max_backoff=0.002, dead_letter="dlq", circuit_after=1)
    async with world(1, member_timeout_ms=300) as (b, mq):
        async with idemq.connect(b.url, timeout=2) as doomed:
            sub = doomed.subscribe("in", group="g", retry=policy)
            work = asyncio.create_task((sub.process if kind == "process" else sub.run)(hang))
            await begun.wait()
            await die(doomed)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        async with mq.subscribe("in", group="g", retry=policy) as sub:
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=1)
        assert (tried, await values(mq, "dlq")) == (6, [])
        assert await positions(mq) == {("in", 0): 1}


# ---------------------------------------------------------------------------------------------------------- handlers


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_function_that_raises_cancelled_error_has_failed(kind: str) -> None:
    def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) == 1:
            raise asyncio.CancelledError  # as `asyncio.run` in it does

    async with world(3) as (_, mq), mq.subscribe("in", group="g", retry=QUICK) as sub:
        async with asyncio.timeout(5):
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)
        assert await values(mq, "dlq") == [1]
        assert await positions(mq) == {("in", 0): 3}


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_handler_that_makes_an_error_of_its_cancellation_is_not_blamed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handling, "HANDLERS_STOP_S", 0.05)
    policy = RetryPolicy(dead_letter="dlq", no_retry=(ValueError,))

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        sub.stop()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("interrupted") from None

    async with world(1) as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        await (sub.process if kind == "process" else sub.run)(handler)
        assert await values(mq, "dlq") == []
        assert await positions(mq) == {("in", 0): 0}


@run
async def test_a_thread_that_just_finished_its_last_message_is_no_index_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(HandlerTransaction):
        def __init__(self) -> None:
            if threading.current_thread().name == "idemq-handler":
                time.sleep(0.3)
            super().__init__()

    def handler(message: Message, tx: Transaction) -> None:
        pass

    async with world(1) as (_, mq), mq.subscribe("in", group="g") as sub:
        monkeypatch.setattr("idemq.client.processing.HandlerTransaction", Slow)
        with pytest.raises(idemq.HandlerTimeout):
            await sub.process(handler, until_idle=IDLE_S, handler_timeout=0.1)


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("nothing to say")


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_an_error_without_words_makes_a_dead_letter_too(kind: str) -> None:
    async def handler(message: Message, tx: Transaction | None = None) -> None:
        if number(message) == 1:
            raise Mute

    async with world(3) as (_, mq), mq.subscribe("in", group="g", retry=QUICK) as sub:
        await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)
        assert await values(mq, "dlq") == [1]


@run
async def test_headers_that_look_like_ours_have_a_limit_too() -> None:
    async with world() as (_, mq):
        with pytest.raises(idemq.MessageTooLarge):
            await mq.send("in", b"", headers={"idemq-x": bytes(20 << 20)}, timeout=2)


@run
async def test_many_dead_letters_with_long_tracebacks_fit_their_transactions() -> None:
    begun, all_begun = 0, asyncio.Event()

    async def handler(message: Message) -> None:
        nonlocal begun
        begun += 1
        if begun == 480:
            all_begun.set()
        await all_begun.wait()
        raise ValueError("x" * 10_000)

    policy = RetryPolicy(dead_letter="dlq", no_retry=(ValueError,))
    async with world() as (_, mq), mq.subscribe("in", group="g", retry=policy) as sub:
        async with mq.producer() as p:
            await p.send_many("in", [bytes(33_000)] * 480)
        await sub.run(handler, concurrency=500, until_idle=IDLE_S)
        assert await positions(mq) == {("in", 0): 480}


# ---------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_stop_before_the_first_step_counts(kind: str) -> None:
    async def handler(message: Message, tx: Transaction | None = None) -> None:
        pass

    async with world() as (_, mq), mq.subscribe("in", group="g") as sub:
        work = asyncio.create_task((sub.process if kind == "process" else sub.run)(handler))
        sub.stop()
        async with asyncio.timeout(5):
            await work


@run
async def test_after_stop_nothing_is_begun_while_a_commit_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    committing, answered = asyncio.Event(), asyncio.Event()

    async with world(500) as (_, mq), mq.subscribe("in", group="g") as sub:
        group = sub._source.group
        assert group is not None
        commit = group.commit

        async def slow(*arguments: Any) -> None:
            committing.set()
            await answered.wait()
            await commit(*arguments)

        monkeypatch.setattr(group, "commit", slow)

        async def handler(message: Message) -> None:
            begun.append(number(message))
            await asyncio.sleep(0.002)

        work = asyncio.create_task(sub.run(handler))
        await committing.wait()
        sub.stop()
        before = len(begun)
        await asyncio.sleep(0.1)
        assert len(begun) <= before + 1, "one was taken already"
        answered.set()
        await work


# ---------------------------------------------------------------------------------------------------------- commits


@run
async def test_a_commit_in_a_callback_of_run_passes_nothing_that_is_not_handled() -> None:
    """What was handed out to `run` is not done with."""
    handled: list[int] = []
    hold = asyncio.Event()

    async def handler(message: Message) -> None:
        await hold.wait()
        handled.append(number(message))

    async def revoked(partitions: list[tuple[str, int]]) -> None:
        await sub.commit()

    async with world(20, partitions=2) as (b, mq), idemq.connect(b.url) as other:
        sub = mq.subscribe("in", group="g", on_revoked=revoked)
        work = asyncio.create_task(sub.run(handler))
        await eventually(lambda: sum(sub.lag().values()) == 0 and bool(sub.lag()))
        async with other.subscribe("in", group="g"):
            hold.set()
            with pytest.raises(idemq.InvalidRequest, match="commit what is handled"):
                await asyncio.wait_for(work, 10)
            at = await positions(mq)
            await asyncio.gather(sub.close(), return_exceptions=True)
        stored = {n for n in range(20) if n // 2 < at["in", n % 2]}
        assert stored <= set(handled)


@run
async def test_of_a_commit_over_a_partition_whose_lease_ended_behind_it_the_others_are_moved() -> None:
    async with (
        world(10, partitions=2, release_ms_max=200) as (b, mq),
        idemq.connect(b.url) as other,
        mq.subscribe("in", group="g") as sub,
    ):
        batch = await anext(sub.batches(max_messages=10, max_wait=0.2))
        assert len(batch) == 10
        lease, topic_id = next(one.lease for one in batch if one.partition == 1), batch[0][0].header.topic_id
        await mq._engine.commit_offsets([Offset("g", topic_id, 1, lease, 0, 5)], 5)
        async with other.subscribe("in", group="g") as second:
            await eventually(lambda: second.assigned == [("in", 1)])
            await sub.commit(batch)
        assert await positions(mq) == {("in", 0): 5, ("in", 1): 5}


@run
async def test_of_a_commit_for_two_groups_a_lease_that_ended_in_one_says_nothing_of_the_other() -> None:
    async with (
        world(5) as (_, mq),
        mq.subscribe("in", group="one") as one,
        mq.subscribe("in", group="two") as two,
    ):
        ours, theirs = [await anext(sub.batches(max_messages=5, max_wait=0.2)) for sub in (one, two)]
        assert (len(ours), len(theirs)) == (5, 5)
        await mq._engine.commit_offsets([Offset("two", theirs[0][0].header.topic_id, 0, theirs[0].lease, 0, 5)], 5)
        await two.close()
        async with mq.subscribe("in", group="two") as third:
            await third.open()
            await one.commit([*ours, *theirs])
        assert await positions(mq, "one") == {("in", 0): 5}


# ---------------------------------------------------------------------------------------------------------- reading


@run
async def test_a_paused_partition_that_is_read_ahead_leaves_room_for_others() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t", partitions=2)
        async with mq.subscribe("t", prefetch_bytes=2000) as sub:
            for _ in range(10):
                await mq.send("t", bytes(1000), partition=0)
            await eventually(lambda: sub._source.reader._buffered_bytes >= 2000)
            await sub.pause("t", 0)
            await mq.send("t", b"1", partition=1)
            async with asyncio.timeout(5):
                assert (await anext(aiter(sub))).partition == 1


# ------------------------------------------------------------------------------------------------------ blocking code


@run
async def test_a_coroutine_function_that_calls_the_blocking_client_is_told() -> None:
    def work(url: str) -> None:
        with idemq.sync.connect(url) as mq, mq.subscribe("in", group="g") as sub:

            async def handler(message: Message) -> None:
                mq.ping()

            with pytest.raises(idemq.InvalidRequest, match="own loop"):
                sub.run(handler)

    async with world(1) as (b, _), asyncio.timeout(10):
        await asyncio.to_thread(work, b.url)


@run
async def test_a_coroutine_function_is_a_callback_in_blocking_code_too() -> None:
    called: list[tuple[str, int]] = []

    def work(url: str) -> None:
        async def assigned(partitions: list[tuple[str, int]]) -> None:
            called.extend(partitions)

        with idemq.sync.connect(url) as mq, mq.subscribe("in", group="g", on_assigned=assigned):
            pass

    async with world() as (b, _), asyncio.timeout(10):
        await asyncio.to_thread(work, b.url)
    assert called == [("in", 0)]


# ------------------------------------------------------------------------------------------------------ dead letters


@pytest.mark.parametrize(
    "forged", [{"delay-ms": b"9" * 400}, {"delay-ms": b"9" * 30}, {"partition": b"-1"}, {"offset": b"9" * 30}]
)
@pytest.mark.parametrize("kind", ["process", "run"])
@run
async def test_a_forged_parked_message_is_handled_as_what_it_is(kind: str, forged: dict[str, bytes]) -> None:
    seen: list[tuple[str, int, bytes]] = []

    async def handler(message: Message, tx: Transaction | None = None) -> None:
        seen.append((message.topic, message.offset, message.uid))

    ours = {"topic": b"in", "partition": b"0", "offset": b"0", "uid": b"00" * 32, "timestamp": b"5", "delay-ms": b"5"}
    headers = {
        f"idemq-retry-{name}": text for name, text in {**ours, "attempts": b"1", "group": b"g", **forged}.items()
    }
    policy = RetryPolicy(dead_letter="dlq", parking="parking")
    async with world() as (_, mq):
        await mq.send("parking", b"", headers=headers)
        async with mq.subscribe("parking", group="g", retry=policy) as sub, asyncio.timeout(10):
            await (sub.process if kind == "process" else sub.run)(handler, until_idle=IDLE_S)
        ((topic, offset, _),) = seen
        assert (topic, offset) == ("parking", 0)


@pytest.mark.timeout(20)
def test_one_dead_letter_that_is_gone_far_behind_those_that_are_left_is_found_at_once() -> None:
    gone = Gone(1)
    gone.add([Place(0, 5_000_000)], [0])
    again = Gone(1, gone.token())
    assert Place(0, 5_000_000) in again
    assert Place(0, 4_999_999) not in again


def test_a_note_of_dead_letters_by_a_newer_client_is_refused() -> None:
    with pytest.raises(idemq.ProtocolMismatch, match="newer client"):
        Gone(1, zlib.compress(msgpack.packb((2, 1, []))))
