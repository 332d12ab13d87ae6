"""A subscription with a group, on a real broker: what is handed out, what moves the position, what comes again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import Any

import pytest

import idemq
from idemq import Record
from idemq.client import wire
from idemq.testing import Link

from .support import Broker, broker, eventually, read, run


@asynccontextmanager
async def world(partitions: int = 1, messages: int = 0, **settings: Any) -> AsyncIterator[tuple[Broker, idemq.Client]]:
    """A broker with topics `t` and `u`, and messages in turn on the partitions of `t`."""
    async with broker(**settings) as b, idemq.connect(b.url) as mq, mq.producer() as p:
        await mq.create_topic("t", partitions=partitions)
        await mq.create_topic("u")
        if messages:
            await p.send_many("t", [Record(b"%d" % n, partition=n % partitions) for n in range(messages)])
        yield b, mq


async def positions(mq: idemq.Client, group: str = "g") -> dict[tuple[str, int], int]:
    return {one[:2]: one.next for one in (await mq.describe_group(group)).offsets}


async def take(sub: idemq.Subscription, count: int) -> list[idemq.Message]:
    found: list[idemq.Message] = []
    async for batch in sub.batches(max_messages=count, max_wait=0.0):
        found += batch
        if len(found) >= count:
            return found
    raise AssertionError("it ended")


def values(messages: Any) -> list[int]:
    return [int(one.value) for one in messages]


# ------------------------------------------------------------------------------------------------------- positions


@run
async def test_what_is_committed_is_not_delivered_again_and_the_rest_is() -> None:
    async with world(messages=10) as (_, mq):
        async with mq.subscribe("t", group="g") as sub:
            messages = await take(sub, 5)
            assert [one.attempt for one in messages] == [1] * 5
            await sub.commit(messages[1])
            assert await positions(mq) == {("t", 0): 2}
            await sub.commit(messages[0])  # cumulative and forward only
            assert await positions(mq) == {("t", 0): 2}
        async with mq.subscribe("t", group="g") as sub:
            again = await take(sub, 8)
            assert values(again) == list(range(2, 10))
            assert again[0].lease > messages[0].lease > 0
            await sub.commit()
        assert await positions(mq) == {("t", 0): 10}


@run
async def test_a_commit_that_is_not_waited_for_is_stored_before_close_returns() -> None:
    async with world(messages=10) as (_, mq):
        async with mq.subscribe("t", group="g") as sub:
            for message in await take(sub, 10):
                await sub.commit(message, wait=False)
        assert await positions(mq) == {("t", 0): 10}


@run
async def test_an_error_of_a_commit_that_is_not_waited_for_is_told_when_the_loop_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(messages=10) as (_, mq):

        async def refuse(*_: Any) -> None:
            raise idemq.StoreFull("no room")

        async with mq.subscribe("t", group="g") as sub:
            messages = await take(sub, 5)
            monkeypatch.setattr(mq._engine, "commit_offsets", refuse)
            await sub.commit(messages, wait=False)
            await asyncio.sleep(0)
            with pytest.raises(idemq.StoreFull):
                await take(sub, 1)


@run
async def test_without_a_group_there_is_nothing_to_commit() -> None:
    async with world(messages=1) as (_, mq):
        async with mq.subscribe("t") as sub:
            [message] = await take(sub, 1)
            with pytest.raises(idemq.InvalidRequest, match="group=NAME"):
                await sub.commit()
            async with mq.producer("p") as p:
                with pytest.raises(idemq.InvalidRequest, match="group=NAME"):
                    p.transaction([message])
        for arguments in ({"on_assigned": print}, {"on_revoked": print}):
            with pytest.raises(idemq.InvalidRequest, match="need a group"):
                mq.subscribe("t", **arguments)  # type: ignore[arg-type]
        for wrong in ("", "x" * 300, "a\nb"):
            with pytest.raises(idemq.InvalidRequest):
                mq.subscribe("t", group=wrong)
        async with mq.subscribe("t", group="g") as sub:
            for what in (7, [7], "x"):
                with pytest.raises(idemq.InvalidRequest, match="can be committed"):
                    await sub.commit(what)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- transactions


@run
async def test_a_transaction_moves_the_position_with_its_output_or_hands_out_again() -> None:
    async with world(partitions=3, messages=30) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as sub:
            failed = 0
            done = 0
            async for batch in sub.batches(max_messages=7, max_wait=0.0):
                try:
                    async with p.transaction(batch) as tx:
                        for message in batch:
                            tx.send("u", message.value)
                        tx.set_token(b"%d" % done)
                        if failed < 5:
                            failed += 1
                            raise ZeroDivisionError
                except ZeroDivisionError:
                    continue
                assert len(tx.receipts) == len(batch)
                done += len(batch)
                if done == 30:
                    break
        assert sorted(values(await read(mq, "u"))) == list(range(30))
        assert await positions(mq) == {("t", index): 10 for index in range(3)}


@run
async def test_a_batch_that_was_committed_cannot_be_committed_by_a_second_run() -> None:
    async with world(messages=4) as (_, mq), mq.producer("p") as p, mq.producer("other") as other:
        async with mq.subscribe("t", group="g") as sub:
            messages = await take(sub, 2)
            for producer in (p, other):
                stored = producer is p
                with nullcontext() if stored else pytest.raises(idemq.OffsetConflict) as conflict:
                    async with producer.transaction(messages) as tx:
                        tx.send("u", b"0")
            assert conflict is not None
            assert conflict.value.expected == 2
            assert values(await take(sub, 2)) == [2, 3]
        assert len(await read(mq, "u")) == 1


@run
async def test_the_broker_itself_refuses_the_second_run_of_a_block() -> None:
    """Two members of one name space of leases: the second knows of nothing that the first has stored."""
    async with world(messages=4) as (_, mq), mq.producer("p") as p, mq.producer("other") as other:
        async with mq.subscribe("t", group="g") as sub:
            messages = await take(sub, 2)
            tx = p.transaction(messages)
            again = other.transaction(messages)
            leased: Any = messages[0][0].delivery
            async with tx:
                tx.send("u", b"first")
            leased.committed = leased.planned = 0  # as it is for somebody who never heard of the outcome
            with pytest.raises(idemq.OffsetConflict) as refused:
                async with again:
                    again.send("u", b"second")
            assert refused.value.expected == 2
            assert values(await take(sub, 2)) == [2, 3], "it goes on where the group is"
        assert [one.value for one in await read(mq, "u")] == [b"first"]


@run
async def test_two_transactions_at_once_follow_each_other() -> None:
    async with world(messages=40) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as sub:

            async def store(messages: list[idemq.Message]) -> None:
                async with p.transaction(messages) as tx:
                    for message in messages:
                        tx.send("u", message.value)

            for _ in range(2):
                one, two = await take(sub, 10), await take(sub, 10)
                await asyncio.gather(store(one), store(two))
        assert values(await read(mq, "u")) == list(range(40))
        assert await positions(mq) == {("t", 0): 40}


@run
async def test_behind_a_transaction_that_fails_the_next_is_not_stored_and_both_are_handed_out_again() -> None:
    async with world(messages=20) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as sub:

            async def store(messages: list[idemq.Message], topic: str) -> None:
                async with p.transaction(messages) as tx:
                    tx.send(topic, b"output")

            one, two = await take(sub, 10), await take(sub, 10)
            outcomes = await asyncio.gather(store(one, "gone"), store(two, "u"), return_exceptions=True)
            assert isinstance(outcomes[0], idemq.UnknownTopic)
            assert isinstance(outcomes[1], idemq.OffsetConflict | idemq.TransactionAborted)
            assert values(await take(sub, 20)) == list(range(20))
        assert await read(mq, "u") == []
        assert await positions(mq) == {("t", 0): 0}


@run
async def test_one_transaction_over_two_groups_and_metadata_for_the_next_holder() -> None:
    async with world(messages=6) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as one, mq.subscribe("t", group="h") as two:
            assert one.metadata() == {("t", 0): None}
            async with p.transaction() as tx:
                tx.commit_offsets(await take(one, 3), metadata=b"state of g")
                tx.commit_offsets((await take(two, 5))[-1])
                with pytest.raises(idemq.InvalidRequest, match="metadata"):
                    tx.commit_offsets([], metadata=b"x" * 5000)
        assert (await positions(mq), await positions(mq, "h")) == ({("t", 0): 3}, {("t", 0): 5})
        assert (await mq.describe_group("g")).offsets[0].metadata == b"state of g"
        async with mq.subscribe("t", group="g") as sub:
            assert sub.metadata() == {("t", 0): b"state of g"}


@run
async def test_a_batch_that_was_taken_back_is_not_stored_in_front_of_what_is_handed_out_again() -> None:
    async with world(messages=20) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as sub:
            one, two = await take(sub, 10), await take(sub, 10)
            with pytest.raises(ZeroDivisionError):
                async with p.transaction(one):
                    raise ZeroDivisionError
            again = await take(sub, 10)
            assert values(again) == list(range(10))
            with pytest.raises(idemq.OffsetConflict, match="handed out again"):
                async with p.transaction(two) as tx:
                    tx.send("u", b"the first ten would be skipped")
            async with p.transaction(again) as tx:  # and that took nothing back a second time
                tx.send("u", b"first")
            assert values(await take(sub, 10)) == list(range(10, 20))
        assert [one.value for one in await read(mq, "u")] == [b"first"]


@run
async def test_commits_that_pass_each_other_leave_the_highest_position() -> None:
    async with world(messages=10) as (_, mq), mq.producer("p") as p, mq.subscribe("t", group="g") as sub:
        messages = await take(sub, 10)
        await asyncio.gather(sub.commit(messages[7]), sub.commit(messages[3]))
        with pytest.raises(ZeroDivisionError):
            async with p.transaction(messages[8:]):
                raise ZeroDivisionError
        assert values(await take(sub, 2)) == [8, 9]


@run
async def test_a_commit_does_not_pass_what_a_failed_transaction_has_handed_out_again() -> None:
    async with world(partitions=2, messages=40) as (_, mq), mq.producer("p") as p, mq.subscribe("t", group="g") as sub:
        messages = await take(sub, 40)
        failing, behind, other = messages[:10], messages[10:20], messages[20:]
        assert {one.partition for one in failing + behind}.isdisjoint({one.partition for one in other})
        with pytest.raises(ZeroDivisionError):
            async with p.transaction(failing):
                raise ZeroDivisionError
        with pytest.raises(idemq.OffsetConflict, match=r"message 10 .* handed out again") as refused:
            await sub.commit(behind + other)
        assert refused.value.expected == 0
        mine, others = failing[0].partition, other[0].partition
        assert await positions(mq) == {("t", mine): 0, ("t", others): 20}
        await sub.commit(behind, wait=False)
        await asyncio.sleep(0)
        again = await take(sub, 20)
        assert [one.offset for one in again] == list(range(20))
        async with p.transaction(again):
            pass
        await sub.commit(other)  # forward only: there is nothing to be said
        assert await positions(mq) == {("t", 0): 20, ("t", 1): 20}


@run
async def test_a_second_run_while_the_first_is_under_way_takes_nothing_for_stored() -> None:
    """The first may fail, and then all of it is handed out again."""
    async with (
        world(messages=10) as (b, mq),
        Link("127.0.0.1", b.port) as link,
        idemq.connect(link.url) as mine,
        mine.producer("p") as p,
        mine.subscribe("t", group="g") as sub,
    ):
        messages = await take(sub, 10)
        await p.send("u", b"known")
        await mq.delete_topic("u")
        link.stall()

        async def store(some: list[idemq.Message]) -> None:
            async with p.transaction(some) as tx:
                tx.send("u", b"")

        first = asyncio.create_task(store(messages[:5]))
        await asyncio.sleep(0)
        with pytest.raises(idemq.OffsetConflict, match="was committed before") as refused:
            await store(messages[2:])
        assert refused.value.expected == 0
        link.resume()
        with pytest.raises(idemq.UnknownTopic):
            await first
        assert values(await take(sub, 10)) == list(range(10))


# ------------------------------------------------------------------------------------------------------ membership


@run
async def test_of_a_commit_over_a_lost_partition_the_others_are_moved() -> None:
    async with (
        world(partitions=2, messages=20, release_ms_max=200) as (_, mq),
        mq.subscribe("t", group="g") as first,
    ):
        messages = await take(first, 20)
        async with mq.subscribe("t", group="g") as second:
            await eventually(lambda: len(second.assigned) == 1)
            with pytest.raises(idemq.LeaseLost) as lost:
                await first.commit(messages)
            [kept] = first.assigned
            assert [("t", index) for _, index in lost.value.partitions] == second.assigned
            assert await positions(mq) == {kept: 10, second.assigned[0]: 0}


@run
async def test_a_partition_is_not_given_back_while_a_transaction_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(partitions=2, messages=40) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as first:
            messages = await take(first, 30)
            assert {one.partition for one in messages} == {0, 1}
            for index in range(2):
                await mq.send("t", b"more", partition=index)
            answered = asyncio.Event()
            transact = p._engine.transact

            async def slowly(*arguments: Any) -> Any:
                await answered.wait()
                return await transact(*arguments)

            monkeypatch.setattr(p._engine, "transact", slowly)

            async def store() -> None:
                async with p.transaction(messages) as tx:
                    tx.send("u", b"output")

            storing = asyncio.create_task(store())
            await asyncio.sleep(0)
            async with mq.subscribe("t", group="g") as second:
                await eventually(lambda: any(one.state == "releasing" for one in leased(first)))
                [kept] = [one.reading.name for one in leased(first) if one.state == "held"]
                more = await take(first, 1)  # the loop has come back
                assert {(one.topic, one.partition) for one in more} == {kept}, "nothing more of what is given back"
                for _ in range(10):
                    await mq.ping()
                assert second.assigned == []
                answered.set()
                await storing
                asking = asyncio.create_task(take(first, 1000))
                await eventually(lambda: len(second.assigned) == 1)
                asking.cancel()
        assert len(await read(mq, "u")) == 1


def leased(sub: idemq.Subscription) -> list[Any]:
    assert sub._source.group is not None
    return list(sub._source.group.positions.held.values())


@run
async def test_callbacks_come_one_at_a_time() -> None:
    async with world(partitions=3) as (_, mq):
        running = 0
        most = 0
        calls = 0

        async def callback(partitions: list[tuple[str, int]]) -> None:
            nonlocal running, most, calls
            running, calls = running + 1, calls + 1
            most = max(most, running)
            try:
                await asyncio.sleep(0.02)
            finally:
                running -= 1

        async with mq.subscribe("t", group="g", on_assigned=callback, on_revoked=callback):
            async with mq.subscribe("t", group="g"), mq.subscribe("t", group="g"):
                await eventually(lambda: calls >= 3)
            await eventually(lambda: calls >= 4)
        assert most == 1


@run
async def test_whoever_gives_up_joining_is_no_member() -> None:
    async with world(partitions=2) as (b, mq):
        for turns in range(12):
            sub = mq.subscribe("t", group="g")
            joining = asyncio.create_task(sub.open())
            for _ in range(turns):
                await asyncio.sleep(0)
            joining.cancel()
            await asyncio.wait([joining])
            await sub.close()
        await eventually(lambda: not b.server.core._groups)


@run
async def test_a_close_that_was_cancelled_can_be_repeated() -> None:
    async with world(partitions=2) as (b, mq):
        for turns in range(12):
            sub = mq.subscribe("t", group="g")
            await sub.open()
            closing = asyncio.create_task(sub.close())
            for _ in range(turns):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            await sub.close()
            await eventually(lambda: not b.server.core._groups)


@run
async def test_a_plain_commit_whose_answer_was_lost_with_the_lease_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """C6: the lease ended at or behind where the commit leads, so an earlier copy of it was stored."""
    async with world(messages=10) as (_, mq), mq.subscribe("t", group="g") as sub:
        messages = await take(sub, 5)
        [one] = leased(sub)
        engine: Any = mq._engine

        async def lost(request: Any, timeout: float) -> None:
            where = {"group": "g", "topic_id": one.reading.key[0], "partition": 0}
            raise idemq.LeaseLost("", details={**where, "next": ended_at})

        monkeypatch.setattr(engine._connection, "ask", lost)
        ended_at: int | None = 5
        await sub.commit(messages)
        one.committed = 0
        for ended_at in (4, None):  # noqa: B007 - `lost` reads it
            with pytest.raises(idemq.LeaseLost):
                await sub.commit(messages)
        monkeypatch.undo()


@run
async def test_members_share_the_partitions_and_a_leaving_one_gives_back_at_once() -> None:
    async with world(partitions=4, messages=40) as (_, mq):
        async with AsyncExitStack() as stack:
            told: list[tuple[str, list[tuple[str, int]]]] = []
            first = await stack.enter_async_context(
                mq.subscribe(
                    "t",
                    group="g",
                    on_assigned=lambda partitions: told.append(("assigned", partitions)),
                    on_revoked=lambda partitions: told.append(("revoked", partitions)),
                )
            )
            assert [("assigned", sorted(first.assigned))] == told
            assert len(first.assigned) == 4
            second = await stack.enter_async_context(mq.subscribe("t", group="g"))
            # Nothing is in the first one's hands, so it gives back without being asked for messages.
            await eventually(lambda: (len(first.assigned), len(second.assigned)) == (2, 2))
            assert sorted(first.assigned + second.assigned) == [("t", index) for index in range(4)]
            kept = set(first.assigned)
            # What is finished at once is told and given back together.
            assert [sorted(ones) for what, ones in told if what == "revoked"] == [sorted({*second.assigned} - kept)]
            info = await mq.describe_group("g")
            assert sorted(one for member in info.members for one in member.assigned) == [("t", n) for n in range(4)]
            await second.close()
            await eventually(lambda: len(first.assigned) == 4)
        assert told[-1] == ("revoked", told[-1][1])
        assert (await mq.describe_group("g")).members == []


@run
async def test_what_is_in_hand_is_finished_before_its_partition_is_given_back() -> None:
    async with world(partitions=2, messages=20) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as first:
            batches = first.batches(max_messages=20, max_wait=0.2)
            batch = await anext(batches)
            assert len(batch) == 20
            async with mq.subscribe("t", group="g") as second:
                for _ in range(10):
                    await mq.ping()
                assert second.assigned == [], "the first still works on both"
                async with p.transaction(batch) as tx:
                    for message in batch:
                        tx.send("u", message.value)
                asking = asyncio.create_task(anext(batches))  # the loop comes back for more
                await eventually(lambda: len(second.assigned) == 1)
                asking.cancel()
        assert sorted(values(await read(mq, "u"))) == list(range(20))


@run
async def test_a_member_that_does_not_finish_in_time_loses_the_partition_and_cannot_commit() -> None:
    async with world(partitions=2, messages=20, release_ms_max=200) as (_, mq), mq.producer("p") as p:
        async with mq.subscribe("t", group="g") as first:
            batch = await anext(first.batches(max_messages=20, max_wait=0.2))
            async with mq.subscribe("t", group="g") as second:
                await eventually(lambda: len(second.assigned) == 1)
                with pytest.raises(idemq.LeaseLost) as lost:
                    async with p.transaction(batch) as tx:
                        tx.send("u", b"too late")
                assert [("t", index) for _, index in lost.value.partitions] == second.assigned
                kept = first.assigned
                assert len(kept) == 1
                again = await take(first, 10)
                assert {(one.topic, one.partition) for one in again} == set(kept), "the rest is handed out again"
                async with p.transaction(again) as tx:
                    tx.send("u", b"in time")
        assert [one.value for one in await read(mq, "u")] == [b"in time"]


@run
async def test_callbacks_may_wait_seek_and_commit_and_what_they_raise_is_told() -> None:
    async with world(messages=10) as (_, mq):
        seen: list[str] = []

        async def on_assigned(partitions: list[tuple[str, int]]) -> None:
            await sub.seek("t", 0, 4)
            seen.append("assigned")

        async def on_revoked(partitions: list[tuple[str, int]]) -> None:
            await sub.commit()
            seen.append("revoked")

        sub = mq.subscribe("t", group="g", on_assigned=on_assigned, on_revoked=on_revoked)
        async with sub:
            assert values(await take(sub, 3)) == [4, 5, 6]
        assert seen == ["assigned", "revoked"]
        assert await positions(mq) == {("t", 0): 7}

        def failing(partitions: list[tuple[str, int]]) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with mq.subscribe("t", group="g", on_assigned=failing):
                pass
        assert (await mq.describe_group("g")).members == []


@run
async def test_a_callback_that_fails_later_ends_the_subscription() -> None:
    async with world(partitions=2, messages=10) as (_, mq):

        def failing(partitions: list[tuple[str, int]]) -> None:
            raise ZeroDivisionError

        first = mq.subscribe("t", group="g", on_revoked=failing)
        await first.open()
        async with mq.subscribe("t", group="g"):
            with pytest.raises(ZeroDivisionError):
                async for _ in first.batches():
                    pass
        with pytest.raises(ZeroDivisionError):
            await first.close()


# ------------------------------------------------------------------------------------------ seek, pause, administration


@run
async def test_a_seek_is_stored_and_what_was_in_hand_cannot_be_committed() -> None:
    told: list[Any] = []
    async with world(messages=10) as (_, mq), mq.subscribe("t", group="g", on_revoked=told.append) as sub:
        messages = await take(sub, 5)
        await sub.seek("t", 0, 2)
        assert await positions(mq) == {("t", 0): 2}
        with pytest.raises(idemq.LeaseLost):
            await sub.commit(messages)
        again = await take(sub, 3)
        assert values(again) == [2, 3, 4]
        assert again[0].lease > messages[0].lease
        await sub.commit(again)
        assert await positions(mq) == {("t", 0): 5}
        assert told == [], "it goes on holding the partition"
        member: Any = sub._source.group._member  # type: ignore[union-attr]
        assert [held.lease for held in member._membership.held.values()] == [again[0].lease]
        for topic, index in (("t", 1), ("none", 0)):
            with pytest.raises(idemq.InvalidRequest, match="not read here"):
                await sub.seek(topic, index, 0)


@run
async def test_an_administrator_seeks_and_members_go_on_from_there() -> None:
    async with world(partitions=2, messages=20) as (_, mq):
        async with mq.subscribe("t", group="g") as sub:
            await sub.commit(await take(sub, 20))
            assert await mq.seek_group("g", "t", 3, partition=1) == {1: 3}
            assert values(await take(sub, 7)) == list(range(7, 20, 2))
            assert await mq.seek_group("g", "t", "latest") == {0: 10, 1: 10}
            assert await positions(mq) == {("t", 0): 10, ("t", 1): 10}
            await mq.seek_group("g", "t", "earliest", partition=0)
            assert values(await take(sub, 10)) == list(range(0, 20, 2))
        with pytest.raises(idemq.InvalidRequest, match=r"partitions 0 \.\. 1"):
            await mq.seek_group("g", "t", 0, partition=2)
        with pytest.raises(idemq.UnknownTopic):
            await mq.seek_group("g", "none", 0)
        await mq.seek_group("new", "t", 4)
        assert await positions(mq, "new") == {("t", 0): 4, ("t", 1): 4}
        async with mq.subscribe("t", group="new", start="latest") as sub:
            assert sorted(values(await take(sub, 12))) == list(range(8, 20))


@run
async def test_a_paused_partition_hands_out_nothing_and_stays() -> None:
    async with world(partitions=2, messages=20) as (_, mq):
        async with mq.subscribe("t", group="g") as sub:
            await sub.pause("t", 0)
            assert values(await take(sub, 10)) == list(range(1, 20, 2))
            assert sorted(sub.assigned) == [("t", 0), ("t", 1)]
            await sub.resume("t", 0)
            assert values(await take(sub, 10)) == list(range(0, 20, 2))
        async with mq.subscribe("t") as sub:  # the same without a group
            await sub.pause("t", 1)
            assert values(await take(sub, 10)) == list(range(0, 20, 2))
            await sub.resume("t", 1)
            assert values(await take(sub, 10)) == list(range(1, 20, 2))
            with pytest.raises(idemq.InvalidRequest, match="not read here"):
                await sub.pause("t", 2)


@run
async def test_a_pause_holds_up_no_other_partition() -> None:
    # The fetch for the others goes on, and no second one is asked for.
    async with world(partitions=4, fetches_max=1) as (_, mq), mq.subscribe("t") as sub:
        messages = aiter(sub)
        for index in range(3):
            await mq.send("t", b"0", partition=index)
            assert (await anext(messages)).partition == index
            await mq.ping()  # the next fetch waits at the broker
            started = sub._source.reader._fetching
            await sub.pause("t", index)
            assert sub._source.reader._fetching is started
            await mq.send("t", b"not for now", partition=index)  # ends the fetch, for nothing
        await mq.send("t", b"1", partition=3)
        assert (await anext(messages)).partition == 3
        await sub.pause("t", 3)
        await mq.send("t", b"not for now", partition=3)
        assert started is not None
        await eventually(started.done)  # nothing is to be read
        for index in range(4):
            await sub.resume("t", index)
        assert {message.partition for message in await take(sub, 4)} == {0, 1, 2, 3}


@run
async def test_however_often_reading_begins_elsewhere_one_fetch_of_each_subscription_waits() -> None:
    async with (
        world(partitions=2, fetches_max=2) as (b, mq),
        mq.subscribe("t") as one,
        mq.subscribe("t") as two,
    ):
        for _ in range(10):
            for sub in (one, two):
                await sub.pause("t", 1)
                await sub.resume("t", 1)
                await mq.ping()  # the fetch is at the broker
        assert b.server.counts.refusals == {}
        await mq.send("t", b"1", partition=1)
        assert (values(await take(one, 1)), values(await take(two, 1))) == ([1], [1])


@run
async def test_a_partition_that_was_given_back_holds_up_no_other() -> None:
    async with (
        world(partitions=2) as (_, mq),
        mq.subscribe("t", group="g") as first,
        mq.subscribe("t", group="g") as second,
    ):
        await eventually(lambda: (len(first.assigned), len(second.assigned)) == (1, 1))
        await mq.send("t", b"1", partition=second.assigned[0][1])  # ends a fetch of the first one's, for nothing
        assert values(await take(second, 1)) == [1]
        await mq.send("t", b"2", partition=first.assigned[0][1])
        assert values(await take(first, 1)) == [2]


@run
async def test_groups_are_listed_described_and_deleted() -> None:
    async with world(partitions=2, messages=20) as (_, mq):
        assert await mq.groups() == []
        with pytest.raises(idemq.UnknownGroup):
            await mq.describe_group("g")
        async with mq.subscribe("t", group="g") as sub, mq.subscribe("t", group="h"):
            await sub.commit((await take(sub, 20))[:5])
            assert [one.name for one in await mq.groups()] == ["g", "h"]
            found = await mq.describe_group("g")
            assert sum(one.next for one in found.offsets) + sum(one.lag for one in found.offsets) == 20
            assert [(one.attempts, one.metadata) for one in found.offsets] == [(0, None)] * 2
            [member] = found.members
            assert (sorted(member.assigned), member.address[:10]) == ([("t", 0), ("t", 1)], "127.0.0.1:")
            with pytest.raises(idemq.InvalidRequest, match="1 members: stop them first"):
                await mq.delete_group("g")
        await mq.delete_group("g")
        assert [one.name for one in await mq.groups()] == ["h"]
        with pytest.raises(idemq.UnknownGroup):
            await mq.delete_group("g")


@run
async def test_truncation_is_told_and_a_seek_goes_on() -> None:
    async with world(messages=10) as (_, mq):
        async with mq.subscribe("t", group="g") as sub:
            await sub.commit(await take(sub, 2))
        await mq.purge_topic("t")
        await mq.send("t", b"10")
        async with mq.subscribe("t", group="g") as sub:
            with pytest.raises(idemq.OffsetTruncated) as truncated:
                await take(sub, 1)
            assert truncated.value.missed == 8
            await sub.seek("t", 0, "earliest")
            assert values(await take(sub, 1)) == [10]
        async with mq.subscribe("t", group="h", on_truncated="earliest") as sub:
            assert values(await take(sub, 1)) == [10]


@run
async def test_a_topic_that_is_deleted_ends_its_members() -> None:
    async with world(messages=1) as (_, mq), mq.subscribe("t", "u", group="g") as sub:
        await take(sub, 1)
        await mq.delete_topic("u")
        with pytest.raises(idemq.UnknownTopic):
            await take(sub, 1)


@run
async def test_a_broker_that_ends_does_not_mind_a_peer_that_is_gone_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may say so only when our half of the connection is ended, before it says that the peer's is."""

    def not_connected(_: Any) -> None:
        raise OSError(errno.ENOTCONN, "not connected")

    async with world() as (b, mq):
        [peer] = b.server._peers.values()
        monkeypatch.setattr(type(peer._transport), "write_eof", not_connected)
        await b.stop()
        await b.start()
        assert await mq.ping()


@pytest.mark.parametrize("reconnected", [False, True])
@run
async def test_a_seek_that_was_sent_twice_and_found_another_lease_is_unknown_and_not_sent_anew(
    monkeypatch: pytest.MonkeyPatch, reconnected: bool
) -> None:
    """Its first copy may have been applied, and the group gone on from there: another would take it back again."""
    async with world(messages=10) as (_, mq), mq.subscribe("t", group="g") as sub:
        await sub.commit(await take(sub, 10))
        engine: Any = mq._engine
        ask, asked = engine._connection.ask, 0

        async def reconnecting(request: Any, timeout: float) -> Any:
            nonlocal asked
            if isinstance(request, wire.Seek):
                asked += 1
                if asked == 1:  # another's Seek comes in between
                    await ask(request._replace(nonce="another's", to=7), timeout)
                    engine._session.reconnects += reconnected
            return await ask(request, timeout)

        monkeypatch.setattr(engine._connection, "ask", reconnecting)
        if reconnected:
            with pytest.raises(idemq.OutcomeUnknown):
                await mq.seek_group("g", "t", 3)
            assert (asked, await positions(mq)) == (1, {("t", 0): 7})
        else:
            await mq.seek_group("g", "t", 3)
            assert (asked, await positions(mq)) == (2, {("t", 0): 3})
        monkeypatch.undo()


@run
async def test_a_holder_whose_lease_has_passed_on_cannot_seek() -> None:
    async with world(messages=10) as (_, mq), mq.subscribe("t", group="g") as sub:
        [one] = leased(sub)
        one.lease -= 1  # as it is for somebody who has not heard of it yet
        with pytest.raises(idemq.LeaseLost) as lost:
            await sub.seek("t", 0, 5)
        assert lost.value.partitions == [one.reading.key]
        one.lease += 1


@run
async def test_a_callback_that_closes_its_subscription_is_refused_and_does_not_wait_for_itself() -> None:
    async with world(partitions=2) as (_, mq):

        async def on_revoked(partitions: list[tuple[str, int]]) -> None:
            await sub.close()

        sub = mq.subscribe("t", group="g", on_revoked=on_revoked)
        await sub.open()
        async with mq.subscribe("t", group="g"):
            with pytest.raises(idemq.InvalidRequest, match="cannot close"):
                await take(sub, 1)
        with pytest.raises(idemq.InvalidRequest, match="cannot close"):
            await sub.close()
        await sub.close()
