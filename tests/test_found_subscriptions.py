"""Bugs of subscriptions, transactions and dead letters that were found by attack, each kept as a test."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

import idemq
from idemq.client import wire
from idemq.client.cli.dlq import _facts
from idemq.client.cli.output import moment
from idemq.client.dead_letters import PARKED, DeadLetters, Place
from idemq.client.transaction import HandlerTransaction

from .support import broker, eventually, log, messages, nothing_left, run
from .test_subscription import positions, take, values, world


@run
async def test_a_handler_that_notes_metadata_loses_nothing_when_its_transaction_is_tried_by_halves() -> None:
    async with world(messages=8) as (b, mq):
        policy = idemq.RetryPolicy(max_attempts=1, dead_letter="dead")
        await mq.create_topic("dead")

        async def handle(message: idemq.Message, tx: idemq.Transaction) -> None:
            tx.send("no such topic" if message.value == b"6" else "u", message.value)
            tx.commit_offsets(message, metadata=message.value)

        async with mq.subscribe("t", group="g", retry=policy) as sub:
            await sub.process(handle, until_idle=2.0)
        assert await positions(mq) == {("t", 0): 8}
        assert await log(b.url, "u") == [b"0", b"1", b"2", b"3", b"4", b"5", b"7"]
        assert await log(b.url, "dead") == [b"6"]


@run
async def test_what_failed_while_it_was_to_be_given_back_is_not_passed_by_a_commit_of_everything() -> None:
    """on_revoked commits what was handed out, as it may: of that the failed transaction's messages are no part."""
    async with world(partitions=2, messages=20) as (_b, mq):
        sub: idemq.Subscription

        async def on_revoked(_: Any) -> None:
            await sub.commit()

        sub = mq.subscribe("t", group="g", on_revoked=on_revoked)
        async with sub, mq.producer() as producer:
            batches = sub.batches(max_messages=20, max_wait=0.3)
            batch = await anext(batches)
            assert len(batch) == 20
            source = sub._source
            assert source.group is not None
            other = mq.subscribe("t", group="g")
            joining = asyncio.create_task(other.open())
            group = source.group
            await eventually(lambda: any(one.state == "releasing" for one in group.positions.held.values()))
            (going,) = [one.reading.name for one in group.positions.held.values() if one.state == "releasing"]
            with pytest.raises(ValueError):
                async with producer.transaction(batch):
                    raise ValueError
            waiting = asyncio.create_task(anext(batches))
            await eventually(lambda: len(group.positions.held) == 1)
            waiting.cancel()
            await joining
            assert (await positions(mq))[going] == 0
            await other.close()


@run
async def test_what_failed_while_it_was_to_be_given_back_is_not_passed_by_the_next_transaction() -> None:
    async with world(partitions=2, messages=20) as (_b, mq):
        sub = mq.subscribe("t", group="g")
        async with sub, mq.producer() as producer:
            batches = sub.batches(max_messages=20, max_wait=0.3)
            batch = await anext(batches)
            assert len(batch) == 20
            group = sub._source.group
            assert group is not None
            other = mq.subscribe("t", group="g")
            joining = asyncio.create_task(other.open())
            await eventually(lambda: any(one.state == "releasing" for one in group.positions.held.values()))
            (going,) = [one.reading.key.partition for one in group.positions.held.values() if one.state == "releasing"]
            mine = [one for one in batch if one.partition == going]
            with pytest.raises(ValueError):
                async with producer.transaction(mine[:5]):
                    raise ValueError
            with pytest.raises(idemq.TransactionAborted):
                async with producer.transaction(mine[5:]):
                    pass
            assert await positions(mq) == {("t", 0): 0, ("t", 1): 0}
            waiting = asyncio.create_task(anext(batches))
            await joining
            waiting.cancel()
            await other.close()


@run
async def test_a_subscription_that_is_closed_while_it_opens_is_no_member_afterwards() -> None:
    async with world(partitions=2) as (_b, mq):
        for _ in range(8):
            sub = mq.subscribe("t", group="g")
            opening = asyncio.create_task(sub.open())
            for _ in range(3):
                await asyncio.sleep(0)
            await sub.close()
            await asyncio.wait([opening])
            opening.exception()
        await asyncio.sleep(0.2)
        assert [one for group in await mq.groups() for one in group.members] == []


@run
async def test_a_partition_that_is_sought_while_it_was_to_be_given_back_is_read_on() -> None:
    async with world(partitions=2, messages=20) as (_, mq), mq.subscribe("t", group="g") as sub:
        await anext(sub.batches(max_messages=20, max_wait=0.3))
        group = sub._source.group
        assert group is not None
        async with mq.subscribe("t", group="g"):  # and is gone again before anything is given back
            await eventually(lambda: any(one.state == "releasing" for one in group.positions.held.values()))
            (going,) = [one.reading.key.partition for one in group.positions.held.values() if one.state == "releasing"]
        await sub.seek("t", going, 0)
        async with asyncio.timeout(5):
            assert [(one.partition, one.offset) for one in await take(sub, 10)] == [(going, n) for n in range(10)]


@run
async def test_process_begins_with_what_is_not_committed() -> None:
    """Whatever was handed out before and not committed: the position goes past it with what is handled."""
    async with world(messages=5) as (_, mq):
        seen: list[bytes] = []

        async def handle(message: idemq.Message, tx: idemq.Transaction) -> None:
            seen.append(message.value)

        async with mq.subscribe("t", group="g") as sub:
            await take(sub, 2)
            await sub.process(handle, until_idle=2.0)
        assert seen == [b"0", b"1", b"2", b"3", b"4"]


@run
async def test_a_member_that_gave_the_truncated_partition_away_reads_the_others() -> None:
    async with world(partitions=2, messages=20) as (_, mq), mq.subscribe("t", group="g") as sub:
        await take(sub, 20)
        engine: Any = mq._engine
        topic = await mq.describe_topic("t")
        await engine._connection.ask(wire.PurgeTopic(topic.id, [0, 8]), 5)
        await sub.seek("t", 1, 6)
        with pytest.raises(idemq.OffsetTruncated):
            await take(sub, 1)
        async with mq.subscribe("t", group="g", on_truncated="earliest") as other:
            while len(sub.assigned) == 2:  # the loop comes back for more
                with pytest.raises(idemq.OffsetTruncated):
                    await take(sub, 1)
                await asyncio.sleep(0.01)
            assert sub.assigned == [("t", 0)]
            await eventually(lambda: other.assigned == [("t", 1)])
            async with mq.producer() as producer:
                await producer.send("t", b"20", partition=0)
            assert values(await take(sub, 1)) == [20]


@run
async def test_a_transaction_that_refused_a_message_takes_a_smaller_one() -> None:
    async with world() as (b, mq):
        async with mq.producer() as producer, producer.transaction() as tx:
            tx.send("u", bytes(6 << 20))
            tx.send("u", bytes(6 << 20))
            with pytest.raises(idemq.TransactionTooLarge):
                tx.send("u", bytes(6 << 20))
            tx.send("u", b"small")
        assert len(await log(b.url, "u")) == 3


@run
async def test_a_parked_message_with_absurd_attempts_is_a_message_like_any_other() -> None:
    """Anybody may write into a parking topic: no worker dies of it."""
    async with world() as (b, mq), mq.producer() as producer:
        await mq.create_topic("parking")
        await mq.create_topic("dead")
        said = {"group": "g", "topic": "t", "partition": "0", "offset": "0", "uid": "00" * 32, "timestamp": "0"}
        said |= {"delay-ms": "0", "attempts": "-" + "9" * 400}
        await producer.send("parking", b"x", headers={PARKED + name: one.encode() for name, one in said.items()})
        policy = idemq.RetryPolicy(
            max_attempts=2, dead_letter="dead", parking="parking", backoff=0.01, max_backoff=0.01
        )

        async def handle(message: idemq.Message, tx: idemq.Transaction) -> None:
            raise ValueError

        async with mq.subscribe("parking", group="g", retry=policy) as sub:
            await sub.process(handle, until_idle=2.0)
        assert await log(b.url, "dead") == [b"x"]


LETTER = {"idemq-dlq-topic": b"u", "idemq-dlq-partition": b"0"}


@run
async def test_a_place_behind_the_end_of_the_dead_letters_is_empty() -> None:
    async with broker() as b, idemq.connect(b.url, timeout=3.0) as mq, mq.producer() as producer:
        await mq.create_topic("dead")
        await producer.send("dead", b"x", headers=LETTER)
        async with asyncio.timeout(2):
            assert [one async for one in DeadLetters(mq, "dead").left([Place(0, 1)])] == []


@run
async def test_dead_letters_with_large_headers_go_back() -> None:
    async with world() as (_b, mq), mq.producer() as producer:
        await mq.create_topic("dead")
        for _ in range(2):
            await producer.send("dead", b"x", headers=LETTER | {"h": bytes((8 << 20) - 2000)})
        assert await DeadLetters(mq, "dead").requeue() == 2


@run
async def test_dead_letters_of_a_topic_with_a_long_name_can_be_dropped() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer() as producer:
        await mq.create_topic("d" * 200)
        await producer.send("d" * 200, b"x", headers=LETTER)
        assert await DeadLetters(mq, "d" * 200).drop() == 1


@pytest.mark.parametrize("value", [b"9" * 30, b"9" * 5000])
def test_a_dead_letter_says_what_it_says_and_its_place_is_its_own(value: bytes) -> None:
    """Anybody may write into a dead-letter topic."""
    (message,) = messages([b"x"], headers=LETTER | {"idemq-dlq-place": b"0:999", "idemq-dlq-time": value}, offset=7)
    said = _facts(message)
    assert said["place"] == "0:7"
    if isinstance(said["time"], int):
        moment(said["time"])


@run
async def test_what_a_handler_moves_of_another_subscription_is_taken_back_with_its_own() -> None:
    async with world(messages=3) as (b, mq), mq.producer() as producer:
        await mq.create_topic("v")
        await producer.send_many("v", [b"a", b"b", b"c"])
        calls = 0
        async with mq.subscribe("t", group="g") as sub, mq.subscribe("v", group="h") as other:

            async def handle(message: idemq.Message, tx: idemq.Transaction) -> None:
                nonlocal calls
                calls += 1
                assert calls < 20
                (also,) = await take(other, 1)
                tx.send("u", message.value + also.value)
                tx.commit_offsets(also)
                if calls == 1:
                    await mq.seek_group("g", "t", 0)  # the first transaction is not stored

            async with asyncio.timeout(8):
                await sub.process(handle, max_messages=1, until_idle=2.0)
        assert await log(b.url, "u") == [b"0a", b"1b", b"2c"]


@run
async def test_a_transaction_of_messages_that_were_sent_before_is_stored_whole_or_refused() -> None:
    """Handled again after a Seek, under the same numbers: the output is there, the position and the token are not."""
    async with world(messages=3) as (b, mq), mq.producer("p") as producer, mq.subscribe("t", group="g") as sub:
        (message,) = await take(sub, 1)
        async with producer.transaction(message) as tx:
            tx.send("u", message.value, seq=message.offset)
        await sub.seek("t", 0, 0)
        (message,) = await take(sub, 1)
        try:
            async with producer.transaction(message) as tx:
                tx.send("u", message.value, seq=message.offset)
                tx.set_token(b"again")
        except idemq.IdemqError:
            assert await positions(mq) == {("t", 0): 0}
        else:
            assert await positions(mq) == {("t", 0): 1}
            assert (await mq.describe_producer("p")).token == b"again"
        assert await log(b.url, "u") == [b"0"]


@run
async def test_a_conflict_of_one_group_moves_no_other_groups_position() -> None:
    async with AsyncExitStack() as stack:
        _, mq = await stack.enter_async_context(world(messages=6))
        producer = await stack.enter_async_context(mq.producer())
        one, other = [await stack.enter_async_context(mq.subscribe("t", group=name)) for name in "gh"]
        first, second = await take(one, 2), await take(other, 2)
        group = one._source.group
        assert group is not None
        (leased,) = group.positions.held.values()
        engine: Any = mq._engine
        # As an earlier transaction of unknown outcome would have left it.
        await engine.commit_offsets([wire.Offset("g", *leased.reading.key, leased.lease, 0, 3)], 5)
        with pytest.raises(idemq.OffsetConflict):
            async with producer.transaction([*first, *second]):
                pass
        assert values(await take(one, 1)) == [3]
        assert values(await take(other, 1)) == [0]


@run
async def test_a_subscription_without_a_group_that_is_closed_while_it_opens_leaves_no_task() -> None:
    async with world() as (_, mq), asyncio.timeout(5), nothing_left():
        for turns in range(5):
            sub = mq.subscribe("t")
            opening = asyncio.create_task(sub.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            await sub.close()
            await asyncio.wait([opening])
            opening.exception()


@run
async def test_a_handler_that_ends_after_the_subscription_was_closed_leaves_no_producer() -> None:
    async with world(messages=2) as (_, mq):
        engine: Any = mq._engine
        before = len(engine._session.producers)
        started, go = asyncio.Event(), asyncio.Event()

        async def handle(message: idemq.Message, tx: idemq.Transaction) -> None:
            started.set()
            await go.wait()

        sub = mq.subscribe("t", group="g")
        processing = asyncio.create_task(sub.process(handle))
        await started.wait()
        await sub.close()
        go.set()
        with pytest.raises(idemq.ClientClosed):
            await processing
        assert len(engine._session.producers) == before


@run
async def test_whoever_reads_without_a_group_outlives_an_outage_as_a_member_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fetches wait for the broker as long as it takes; looking for new partitions ends the subscription for good."""
    monkeypatch.setattr("idemq.client.source.TOPIC_AGE_S_MAX", 0.01)
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        async with mq.subscribe("t") as sub, mq.subscribe("t", group="g") as member:
            sub._source.timeout = 0.05  # of looking
            await b.stop()
            await asyncio.sleep(0.5)
            await b.start()
            async with idemq.connect(b.url) as other, other.producer() as producer:
                await producer.send("t", b"1")
            assert values(await take(member, 1)) == [1]
            assert values(await take(sub, 1)) == [1]


# ------------------------------------------------------------------------------------------ the rules of positions


@run
async def test_what_a_commit_stores_after_it_was_taken_back_is_not_handed_out_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(messages=6) as (_, mq), mq.producer() as producer, mq.subscribe("t", group="g") as sub:
        batch = await take(sub, 4)
        engine: Any = mq._engine
        commit_offsets = engine.commit_offsets
        is_stored, is_heard = asyncio.Event(), asyncio.Event()

        async def slowly(*arguments: Any) -> None:
            await commit_offsets(*arguments)
            is_stored.set()
            await is_heard.wait()

        monkeypatch.setattr(engine, "commit_offsets", slowly)
        committing = asyncio.create_task(sub.commit(batch[1]))
        await is_stored.wait()
        with pytest.raises(ValueError):
            async with producer.transaction(batch[2:]):
                raise ValueError
        is_heard.set()
        await committing
        assert values(await take(sub, 2)) == [2, 3]


@run
async def test_a_commit_that_goes_on_without_a_lost_partition_does_not_pass_what_was_taken_back_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        world(partitions=2, messages=8) as (_, mq),
        mq.producer() as producer,
        mq.subscribe("t", group="g") as sub,
    ):
        batch = await take(sub, 8)
        lost, other = batch[0], [one for one in batch if one.partition != batch[0].partition]
        engine: Any = mq._engine
        commit_offsets = engine.commit_offsets

        async def loses(*_: Any) -> None:
            monkeypatch.setattr(engine, "commit_offsets", commit_offsets)
            with pytest.raises(ValueError):
                async with producer.transaction(other):
                    raise ValueError
            where = {"group": "g", "topic_id": lost[0].header.topic_id, "partition": lost.partition}
            raise idemq.LeaseLost("", details=where)

        monkeypatch.setattr(engine, "commit_offsets", loses)
        with pytest.raises(idemq.LeaseLost):
            await sub.commit(batch)
        assert (await positions(mq))["t", other[0].partition] == 0


@run
async def test_messages_of_two_leases_are_committed_as_far_as_the_later_one_goes() -> None:
    async with world(messages=6) as (_, mq), mq.producer() as producer, mq.subscribe("t", group="g") as sub:
        old = await take(sub, 2)
        await sub.seek("t", 0, 1)
        new = await take(sub, 2)
        with pytest.raises(idemq.LeaseLost):
            async with producer.transaction([*old, *new]):
                pass
        new = await take(sub, 2)
        assert values(new) == [1, 2], "nothing was stored"
        with pytest.raises(idemq.LeaseLost):
            await sub.commit([*old, *new])
        assert await positions(mq) == {("t", 0): 3}


@run
async def test_a_partition_that_is_sought_while_it_goes_is_told_to_stay() -> None:
    async with world(partitions=2, messages=4) as (_, mq):
        told: list[tuple[str, list[tuple[str, int]]]] = []
        sub: idemq.Subscription

        async def on_revoked(partitions: list[tuple[str, int]]) -> None:
            told.append(("revoked", partitions))
            if len(told) == 2:
                await sub.seek(*partitions[0], 0)

        sub = mq.subscribe(
            "t", group="g", on_assigned=lambda some: told.append(("assigned", some)), on_revoked=on_revoked
        )
        async with sub, mq.subscribe("t", group="g") as other:
            await eventually(lambda: len(other.assigned) == 1)
            assert told[1:] == [(what, other.assigned) for what in ("revoked", "assigned", "revoked")]


@run
async def test_where_an_earlier_lease_was_does_not_pass_what_was_sought_since() -> None:
    async with world(messages=6) as (_, mq), mq.producer() as producer, mq.subscribe("t", group="g") as sub:
        await sub.commit(await take(sub, 2))
        stale = await take(sub, 2)
        with pytest.raises(ValueError):
            async with producer.transaction(stale):
                raise ValueError
        await sub.seek("t", 0, 0)
        with pytest.raises(idemq.OffsetConflict):
            async with producer.transaction([*await take(sub, 2), *stale]):
                pass
        assert values(await take(sub, 2)) == [0, 1]


@run
async def test_of_two_open_transactions_the_later_batch_does_not_pass_the_other() -> None:
    async with world(messages=4) as (_, mq), mq.producer() as producer, mq.subscribe("t", group="g") as sub:
        first, second = await take(sub, 2), await take(sub, 2)
        slow = await producer.transaction().__aenter__()
        slow.commit_offsets(first)
        with pytest.raises(idemq.OffsetConflict, match="has not ended"):
            async with producer.transaction(second) as quick:
                quick.send("u", b"before its turn")
        with pytest.raises(idemq.OffsetConflict, match="handed out again"):
            await slow.__aexit__(None, None, None)
        assert values(await take(sub, 4)) == [0, 1, 2, 3]
        assert await positions(mq) == {("t", 0): 0}


@run
async def test_of_a_block_that_has_ended_nothing_is_kept() -> None:
    async with world(messages=4) as (_, mq), mq.producer() as producer, mq.subscribe("t", group="g") as sub:
        for batch in (await take(sub, 2), await take(sub, 2)):
            [lease] = {message[0].delivery for message in batch}
            async with producer.transaction(batch) as tx:
                tx.commit_offsets(batch)
                assert len(lease.open) == 1
            assert lease.open == set()
        HandlerTransaction().commit_offsets(batch)
        assert lease.open == set(), "whoever calls a handler knows what is in its hands"
