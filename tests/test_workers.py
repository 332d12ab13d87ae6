"""Workers of a group behind links that fail: who holds what, what is refused, and that every message is done once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

import idemq
from idemq import Client, Message, Record, Subscription, testing

from .support import Broker, broker, eventually, log, run

MEMBER_TIMEOUT_MS = 500
"""The least that a broker allows."""

Partitions = list[tuple[str, int]]


class Worker:
    """A member behind a link of its own. Its callbacks are kept in `heard`."""

    def __init__(self, mq: Client, link: testing.Link, producer: idemq.Producer) -> None:
        self.mq = mq
        self.link = link
        self.producer = producer
        self.sub: Subscription
        self.heard: list[tuple[str, Partitions]] = []
        self.done: list[Message] = []

    def subscribe(self, *topics: str, **options: Any) -> Subscription:
        self.sub = self.mq.subscribe(
            *topics,
            group="g",
            on_assigned=lambda partitions: self.heard.append(("assigned", partitions)),
            on_revoked=lambda partitions: self.heard.append(("revoked", partitions)),
            **options,
        )
        return self.sub

    async def copy(self, batch: Sequence[Message]) -> None:
        """One output for each message, and the position, in one transaction."""
        async with self.producer.transaction(batch) as tx:
            for message in batch:
                tx.send("out", message.value)
        self.done += batch

    async def copy_large(self, batch: idemq.Batch) -> None:
        """A MiB for each message."""
        async with self.producer.transaction(batch) as tx:
            for _ in batch:
                tx.send("out", bytes(1 << 20))

    async def work(self) -> None:
        """Copy until somebody stops it."""
        async for batch in self.sub.batches(max_messages=10, max_wait=0):
            with contextlib.suppress(idemq.TransactionAborted):
                await self.copy(batch)


class World:
    """A broker, and workers on topic `t`, whose output goes to `out`."""

    def __init__(self, b: Broker, mq: Client, stack: AsyncExitStack) -> None:
        self.broker = b
        self.mq = mq
        self.sent = 0
        self._stack = stack

    async def worker(self, **options: Any) -> Worker:
        """One more, already a member."""
        link = await self._stack.enter_async_context(testing.Link("127.0.0.1", self.broker.port))
        mq = await self._stack.enter_async_context(idemq.connect(link.url, name=f"worker {link.port}"))
        one = Worker(mq, link, mq.producer())
        await self._stack.enter_async_context(one.subscribe("t", **options))
        return one

    async def fill(self, count: int, partitions: int = 1) -> None:
        """Messages numbered on, in turn on the partitions of `t`."""
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        async with idemq.connect(self.broker.url) as mq:  # which knows how many partitions there are now
            await mq.producer().send_many("t", [Record(b"%d" % n, partition=n % partitions) for n in numbers])

    async def positions(self) -> list[int]:
        return [one.next for one in (await self.mq.describe_group("g")).offsets]

    async def members(self) -> dict[str, list[int]]:
        """Client name -> partitions of `t`."""
        members = (await self.mq.describe_group("g")).members
        return {one.client: [partition for _, partition in one.assigned] for one in members}

    async def output(self) -> list[int]:
        return [int(value) for value in await log(self.broker.url, "out")]

    async def _is_done(self) -> bool:
        behind = sum([one.lag for one in (await self.mq.describe_group("g")).offsets])
        return not behind and len(await self.output()) >= self.sent

    async def all_done(self) -> None:
        """Wait until the group has done everything; each message has then exactly one output."""
        await until(self._is_done)
        assert sorted(await self.output()) == list(range(self.sent))


@asynccontextmanager
async def world(partitions: int = 1, messages: int = 0, **settings: Any) -> AsyncIterator[World]:
    """See `World`."""
    async with broker(**settings) as b, AsyncExitStack() as stack:
        mq = await stack.enter_async_context(idemq.connect(b.url))
        await mq.create_topic("t", partitions=partitions)
        await mq.create_topic("out")
        one = World(b, mq, stack)
        if messages:
            await one.fill(messages, partitions)
        yield one


async def next_batch(sub: Subscription, max_messages: int = 500) -> idemq.Batch:
    async for batch in sub.batches(max_messages=max_messages, max_wait=0):
        return batch
    raise AssertionError("it was stopped")


async def until(condition: Callable[[], Any]) -> None:
    """Wait until an awaited condition is so."""
    while not await condition():  # noqa: ASYNC110 - whose condition it is knows nobody to wake
        await asyncio.sleep(0.01)


def offsets(messages: Any) -> list[int]:
    return [one.offset for one in messages]


# ------------------------------------------------------------------------------------------------ cut off, and back


@run
async def test_who_is_cut_off_past_its_lease_loses_its_partitions_and_its_commit_is_refused() -> None:
    async with world(partitions=2, messages=20, member_timeout_ms=MEMBER_TIMEOUT_MS) as w:
        first = await w.worker()
        batch = await next_batch(first.sub, 5)
        first.link.stall()
        second = await w.worker()
        working = [asyncio.create_task(second.work())]
        await w.all_done()
        assert len(second.done) == 20
        late = asyncio.create_task(first.copy(batch))
        plain = asyncio.create_task(first.sub.commit(batch[0]))
        await asyncio.sleep(0)
        first.link.resume()
        for refused in (late, plain):
            with pytest.raises(idemq.LeaseLost) as caught:
                await refused
            assert [partition for _, partition in caught.value.partitions] == [batch[0].partition]
        # It is a member again, and gets its share; what it was told is in order.
        await eventually(lambda: (len(first.sub.assigned), len(second.sub.assigned)) == (1, 1))
        told = [(what, partition) for what, partitions in first.heard for _, partition in partitions]
        assert sorted(told[:2]) == [("assigned", 0), ("assigned", 1)]
        assert sorted(told[2:4]) == [("revoked", 0), ("revoked", 1)]
        assert [what for what, _ in told[4:]] == ["assigned"]
        working.append(asyncio.create_task(first.work()))
        await w.fill(10, 2)
        await w.all_done()
        for one in (first, second):
            one.sub.stop()
        await asyncio.gather(*working)
        assert len(first.done) == 5


@run
async def test_who_is_cut_off_for_less_than_its_lease_goes_on_where_it_was() -> None:
    async with world(partitions=2, messages=20) as w:
        one = await w.worker()
        batch = await next_batch(one.sub, 5)
        one.link.cut()
        await one.copy(batch)
        assert [what for what, _ in one.heard] == ["assigned"]
        assert sum(await w.positions()) == 5


# -------------------------------------------------------------------------------------------------------- rebalances


@run
async def test_every_message_is_done_once_while_members_join_leave_crash_and_are_cut() -> None:
    async with world(partitions=4, messages=100, member_timeout_ms=MEMBER_TIMEOUT_MS) as w:
        workers: list[Worker] = []
        working: list[asyncio.Task[None]] = []

        async def join() -> Worker:
            one = await w.worker()
            workers.append(one)
            working.append(asyncio.create_task(one.work()))
            return one

        async def settled(partitions: int, *there: Worker) -> None:
            """These hold everything, and do what comes then."""
            names = {f"worker {one.link.port}" for one in there}
            await until(lambda: _held(w, names, partitions))
            done = [len(one.done) for one in there]
            await w.fill(100, partitions)
            await until(lambda: _went_on(there, done))

        first, second = await join(), await join()
        await settled(4, first, second)
        third = await join()
        await settled(4, first, second, third)
        second.sub.stop()
        await working[1]
        await second.sub.close()
        await settled(4, first, third)
        third.link.stall()  # for ever: as if its machine were gone
        await settled(4, first)
        fourth = await join()
        first.link.cut()
        fourth.link.cut(hold=True)
        await settled(4, first, fourth)
        await w.mq.alter_topic("t", partitions=7)
        await settled(7, first, fourth)
        await first.link.deliver_held()
        await w.all_done()
        assert w.sent == 700
        await third.link.heal(deliver=False)
        for one in workers:
            one.sub.stop()
        await asyncio.gather(*working)
        assert sum([len(one.done) for one in workers]) == 700


async def _held(w: World, names: set[str], partitions: int) -> bool:
    members = await w.members()
    return members.keys() == names and all(members.values()) and sum(map(len, members.values())) == partitions


async def _went_on(workers: tuple[Worker, ...], done: list[int]) -> bool:
    return all(len(one.done) > before for one, before in zip(workers, done, strict=True))


@run
async def test_members_that_keep_their_partitions_are_not_disturbed_by_a_rebalance() -> None:
    async with world(partitions=3) as w:
        first, second = await w.worker(), await w.worker()
        await eventually(lambda: (len(first.sub.assigned), len(second.sub.assigned)) == (2, 1))
        for one in (first, second):
            one.heard.clear()
        await w.fill(30, 3)
        in_hand: list[Message] = []
        async for batch in first.sub.batches(max_messages=20, max_wait=10):
            in_hand += batch
            break
        assert len({one.partition for one in in_hand}) == 2
        kept = first.sub.assigned + second.sub.assigned
        third = await w.worker()  # which gets one of the first's, when that is finished with it
        leases: set[int] = set()
        for _ in range(5):
            batch = await next_batch(second.sub)
            leases |= {one.lease for one in batch}
            await second.copy(batch)
            await w.fill(3, 3)
        assert (first.heard, second.heard, third.heard) == ([], [], [])
        await first.copy(in_hand)
        working = [asyncio.create_task(one.work()) for one in (first, third)]
        await eventually(lambda: len(third.sub.assigned) == 1)
        given = third.sub.assigned
        assert first.heard == [("revoked", given)]
        assert sorted(first.sub.assigned + given + second.sub.assigned) == sorted(kept)
        await w.fill(30, 3)
        working.append(asyncio.create_task(second.work()))
        await w.all_done()
        assert second.heard == []
        assert {one.lease for one in second.done} == leases
        assert len(leases) == 1
        # What the first one kept, it kept under its lease.
        assert {one.lease for one in first.done} == {one.lease for one in in_hand}
        for one in (first, second, third):
            one.sub.stop()
        await asyncio.gather(*working)


@run
async def test_on_closing_what_is_being_said_is_finished_and_not_said_again() -> None:
    async with world(partitions=2) as w:
        heard: list[tuple[str, Partitions]] = []
        go_on = asyncio.Event()

        async def revoked(partitions: Partitions) -> None:
            heard.append(("began", partitions))
            await go_on.wait()
            heard.append(("finished", partitions))

        sub = w.mq.subscribe("t", group="g", on_revoked=revoked)
        await sub.open()
        async with w.mq.subscribe("t", group="g"):
            await eventually(lambda: len(heard) == 1)
            closing = asyncio.create_task(sub.close())
            await w.mq.ping()
            go_on.set()
            await closing
        given, rest = heard[0][1], heard[-1][1]
        assert heard == [(what, which) for which in (given, rest) for what in ("began", "finished")]
        assert sorted(given + rest) == [("t", 0), ("t", 1)]


@run
async def test_on_closing_nothing_is_said_to_be_lost_that_was_not_said_to_be_assigned() -> None:
    async with world(partitions=1) as w:
        assigned: Partitions = []
        revoked: Partitions = []
        go_on = asyncio.Event()

        async def on_assigned(partitions: Partitions) -> None:
            assigned.extend(partitions)
            if len(assigned) == 2:
                await go_on.wait()

        sub = w.mq.subscribe("t", group="g", on_assigned=on_assigned, on_revoked=revoked.extend)
        await sub.open()
        await w.mq.alter_topic("t", partitions=2)
        await eventually(lambda: len(assigned) == 2)
        await w.mq.alter_topic("t", partitions=3)
        await until(lambda: _holds(w, 3))
        await w.mq.ping()  # an answer behind that one
        closing = asyncio.create_task(sub.close())
        await w.mq.ping()
        go_on.set()
        await closing
        assert sorted(revoked) == sorted(assigned)


async def _holds(w: World, partitions: int) -> bool:
    return sum(map(len, (await w.members()).values())) == partitions


# --------------------------------------------------------------------------------------------- a broker that restarts


@run
async def test_a_broker_that_restarts_in_the_middle_of_the_work_changes_nothing() -> None:
    async with world(partitions=4, messages=200) as w:
        workers = [await w.worker(), await w.worker()]
        await eventually(lambda: all(len(one.sub.assigned) == 2 for one in workers))
        for one in workers:
            one.heard.clear()
        in_hand = [await next_batch(one.sub, 20) for one in workers]
        working = []
        for turn in range(3):
            await w.broker.restart()
            if not turn:  # what was in hand while the broker was away is stored under the leases of before
                for one, batch in zip(workers, in_hand, strict=True):
                    await one.copy(batch)
                working = [asyncio.create_task(one.work()) for one in workers]
            await w.fill(100, 4)
        await w.all_done()
        assert [one.heard for one in workers] == [[], []]
        for one in workers:
            one.sub.stop()
        await asyncio.gather(*working)
        assert len({one.lease for worker in workers for one in worker.done}) == 4


# ------------------------------------------------------------------------------------------- transactions and replies


@run
async def test_two_transactions_at_once_whose_replies_are_lost_are_stored_once_and_in_order() -> None:
    async with world(messages=40) as w:
        one = await w.worker()
        await one.copy(await next_batch(one.sub, 10))
        one.link.lose_replies(current=True, cut_seconds=None)
        batches: list[idemq.Batch] = []
        async for batch in one.sub.batches(max_messages=10, max_wait=0):
            batches.append(batch)
            if len(batches) == 2:
                break
        both = [asyncio.create_task(one.copy(batch)) for batch in batches]
        await until(lambda: _reached(w, 30))
        assert not any(task.done() for task in both)
        one.link.cut()
        await asyncio.gather(*both)
        assert await w.output() == list(range(30))
        assert offsets(one.done) == list(range(30))
        await one.copy(await next_batch(one.sub))
        assert await w.output() == list(range(40))


async def _reached(w: World, position: int) -> bool:
    return await w.positions() == [position]


@run
async def test_a_transaction_of_unknown_outcome_run_again_under_another_name_is_stored_once() -> None:
    for stored_before in (True, False):
        async with world(messages=25) as w:
            one = await w.worker()
            await one.copy(await next_batch(one.sub, 5))
            async with one.mq.producer("first") as first, one.mq.producer("second") as second:
                batch = await next_batch(one.sub, 5)
                if stored_before:
                    one.link.lose_replies(current=True, cut_seconds=None)
                else:
                    one.link.stall()
                with pytest.raises(idemq.OutcomeUnknown) as unknown:
                    async with first.transaction(batch, timeout=0.2) as tx:
                        tx.send("out", b"first")
                if stored_before:
                    await until(lambda: _reached(w, 10))
                else:
                    assert await w.positions() == [5]
                one.link.cut()
                one.link.resume()
                again = await next_batch(one.sub, 5)
                assert offsets(again) == offsets(batch) == [5, 6, 7, 8, 9]
                with pytest.raises(idemq.OffsetConflict) as conflict:
                    async with second.transaction(again) as tx:
                        tx.send("out", b"second")
                assert conflict.value.expected == 10
                assert [receipt.topic for receipt in await unknown.value.outcome()] == ["out"]
                following = await next_batch(one.sub, 5)
                assert offsets(following) == [10, 11, 12, 13, 14]
                async with second.transaction(following) as tx:
                    tx.send("out", b"third")
            assert (await log(w.broker.url, "out"))[5:] == [b"first", b"third"]
            assert await w.positions() == [15]


@run
async def test_what_an_outcome_told_is_not_told_again_on_closing() -> None:
    async with world(partitions=1, messages=5, member_timeout_ms=MEMBER_TIMEOUT_MS) as w:
        one = await w.worker()
        async with one.mq.producer("p") as p:
            batch = await next_batch(one.sub)
            one.link.stall()
            with pytest.raises(idemq.OutcomeUnknown) as unknown:
                async with p.transaction(batch, timeout=0.1):
                    pass
            asking = asyncio.create_task(unknown.value.outcome(30))
            await w.mq.seek_group("g", "t", 1)
            one.link.resume()
            with pytest.raises(idemq.LeaseLost):
                await asking


@run
async def test_a_transaction_beyond_16_mib_is_refused_by_name_and_its_batch_comes_again() -> None:
    async with world(messages=20) as w:
        one = await w.worker()
        batch = await next_batch(one.sub, 20)
        with pytest.raises(idemq.TransactionTooLarge, match=r"at most 167[0-9]* bytes"):
            await one.copy_large(batch)
        assert await w.positions() == [0]
        half = await next_batch(one.sub, 10)
        assert offsets(half) == list(range(10))
        await one.copy_large(half)
        assert await w.positions() == [10]


# ---------------------------------------------------------------------------------------------------- what is stored


@run
async def test_a_lease_only_grows_and_metadata_travels_to_whoever_holds_the_partition_next() -> None:
    async with world(messages=20, member_timeout_ms=MEMBER_TIMEOUT_MS) as w:
        leases: list[int] = []
        position = 0
        gone: Worker | None = None
        for turn in range(6):
            one = await w.worker()
            await eventually(lambda one=one: one.sub.assigned == [("t", 0)])  # type: ignore[misc]
            if gone is not None:
                await gone.link.heal(deliver=False)
                await gone.sub.close()
            gone = one
            assert one.sub.metadata() == {("t", 0): b"turn %d" % (turn - 1) if turn else None}
            batch = await next_batch(one.sub, 2)
            assert offsets(batch) == [position, position + 1]
            leases += [message.lease for message in batch]
            async with one.producer.transaction() as tx:
                tx.commit_offsets(batch, b"turn %d" % turn)
            position += 2
            assert (await w.mq.describe_group("g")).offsets[0].metadata == b"turn %d" % turn
            if turn % 3 == 0:
                await one.sub.close()
            elif turn % 3 == 1:
                one.link.stall()
            else:
                await w.broker.restart()
                await one.sub.commit(await next_batch(one.sub, 1))  # without metadata: what is stored stays
                position += 1
                one.link.stall()
        await one.link.heal(deliver=False)
        assert sorted(leases) == leases
        assert len(set(leases)) == 6


@run
async def test_where_a_group_begins_is_stored_when_it_first_holds_the_partition() -> None:
    for start, expected in (("latest", 10), (3, 3), (None, 5), ("earliest", 0)):
        async with world(messages=5) as w:
            if start is None:
                await asyncio.sleep(0.005)
                begin: Any = datetime.now(UTC)
                await asyncio.sleep(0.005)
            else:
                begin = start
            await w.fill(5)
            async with w.mq.subscribe("t", group="g", start=begin) as sub:
                assert sub.positions() == {("t", 0): expected}
                assert await w.positions() == [expected]
            await w.fill(2)
            for other in ("earliest", "latest", 7):
                async with w.mq.subscribe("t", group="g", start=other) as sub:
                    assert sub.positions() == {("t", 0): expected}
                    assert next(iter(await next_batch(sub))).offset == expected
            await w.mq.alter_topic("t", partitions=2)
            await w.fill(2, 2)
            async with w.mq.subscribe("t", group="g", start="latest") as sub:
                assert sub.positions() == {("t", 0): expected, ("t", 1): 0}
            assert await w.positions() == [expected, 0]


@run
async def test_a_group_goes_on_behind_what_was_purged_and_its_position_moves_exactly() -> None:
    async with world(messages=10) as w:
        one = await w.worker()
        await one.copy(await next_batch(one.sub, 4))
        await one.sub.close()
        await w.mq.purge_topic("t")
        await w.fill(6)
        strict = await w.worker()
        with pytest.raises(idemq.OffsetTruncated) as caught:
            await next_batch(strict.sub)
        assert caught.value.missed == 6
        assert await w.positions() == [4]
        await strict.sub.close()
        lenient = await w.worker(on_truncated="earliest")
        batch = await next_batch(lenient.sub, 2)
        assert offsets(batch) == [10, 11]
        assert await w.positions() == [4]
        await lenient.copy(batch)
        assert await w.positions() == [12]
        await lenient.copy(await next_batch(lenient.sub))
        assert await w.positions() == [16]
        assert await w.output() == [*range(4), *range(10, 16)]


# --------------------------------------------------------------------------------------------- old connections' bytes


@run
async def test_what_a_members_old_connection_still_held_changes_nothing() -> None:
    async with world(partitions=2, messages=40) as w:
        one = await w.worker()

        @asynccontextmanager
        async def late() -> AsyncIterator[None]:
            """What is asked within is asked again on a new connection; then the old one's copy arrives."""
            one.link.hold_requests(0, current=True, late_replies=None)
            yield
            assert await one.link.deliver_held() == 1

        async def first_of(partition: int) -> list[Message]:
            found: list[Message] = []
            async for batch in one.sub.batches(max_wait=0):
                found += [message for message in batch if message.partition == partition]
                if len(found) >= 10:
                    return found
            raise AssertionError("it was stopped")

        messages = await first_of(0)
        async with late():
            await one.sub.commit(messages[1])
            async with one.producer.transaction(messages[2:5]) as tx:
                tx.send("out", b"a")
        assert await w.positions() == [5, 0]

        async with late():
            async with one.producer.transaction(messages[5:8]) as tx:
                tx.send("out", b"b")
            await one.sub.commit(messages[8])
        assert await w.positions() == [9, 0]

        async with late():
            await one.sub.seek("t", 0, 3)
            async for message in one.sub:
                assert (message.partition, message.offset) != (0, 9)
                if message.partition == 0:
                    assert message.offset == 3
                    await one.sub.commit(message)
                    break
        assert await w.positions() == [4, 0]
        assert await log(w.broker.url, "out") == [b"a", b"b"]

        one.heard.clear()
        async with late():  # its word that it gives back
            async with w.mq.subscribe("t", group="g") as other:
                await next_batch(other)
                returned = asyncio.create_task(next_batch(one.sub))
                await eventually(lambda: len(one.sub.assigned) == 1)
            await eventually(lambda: len(one.sub.assigned) == 2)
        assert [what for what, _ in one.heard] == ["revoked", "assigned"]
        assert (await w.members()).popitem()[1] == [0, 1]
        await one.sub.commit(await returned)
        await one.sub.commit(await next_batch(one.sub))

        cuts = one.link.counts.cuts
        async with late(), w.mq.subscribe("t", group="g"):  # its word that it is there
            await eventually(lambda: one.link.counts.cuts > cuts)
            await one.mq.ping()
            await one.sub.close()
        assert await w.members() == {}
