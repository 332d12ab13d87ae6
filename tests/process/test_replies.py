"""A link that cuts inside replies, at every byte of small ones and through the megabytes of large ones."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

import idemq
from idemq import testing

BYTES_EVERY = int(os.environ.get("REPLY_BYTES_EVERY", "3"))
"""Replies to members are cut at every so many bytes."""


async def _every_byte_of_every_reply(directory: Path) -> None:
    """Run one script again and again, the reply stream cut one byte later each time, until it runs through uncut."""
    async with testing.BrokerProcess(directory) as broker, testing.Link(broker.host, broker.port) as link:
        async with idemq.connect(broker.url) as mq:
            await mq.create_topic("numbers", partitions=2)
        place = rounds = 0
        uncut = False
        while not uncut:
            cuts = link.counts.cuts
            link.cut_reply_at(place)
            async with idemq.connect(link.url, timeout=30) as mq, mq.producer("script") as producer:
                first = 4 * rounds
                assert producer.last_seq == first - 1
                receipt = await producer.send("numbers", b"%d" % first, partition=0)
                again = await producer.send("numbers", b"%d" % (first + 1), key=b"k")
                async with producer.transaction() as tx:
                    tx.send("numbers", b"%d" % (first + 2), partition=0)
                    tx.send("numbers", b"%d" % (first + 3), partition=1)
                    tx.set_token(b"%d" % rounds)
                assert [one.seq for one in (receipt, again, *tx.receipts)] == [first, first + 1, first + 2, first + 3]
                assert receipt.offset is not None
                known = await mq.describe_producer("script")
                assert (known.last_seq, known.token) == (first + 3, b"%d" % rounds)
            uncut = link.counts.cuts == cuts
            rounds += 1
            place += 1
        assert place > 300, "the script's replies are longer than that"
        await link.heal()
        async with idemq.connect(broker.url) as mq, mq.subscribe("numbers") as sub:
            values: list[int] = []
            async for message in sub:
                assert message.seq == int(message.value)
                values.append(int(message.value))
                if len(values) == 4 * rounds:
                    break
            assert sorted(values) == list(range(4 * rounds))
            assert sum(sub.lag().values()) == 0


@pytest.mark.process
def test_every_byte_of_every_reply(tmp_path: Path) -> None:
    asyncio.run(_every_byte_of_every_reply(tmp_path / "data"))


async def _through_megabytes(directory: Path, seed: int) -> None:
    """Replies of a fetch, from one byte to megabytes, cut at random places: a reader misses and repeats nothing."""
    rng = random.Random(seed)
    async with testing.BrokerProcess(directory) as broker, testing.Link(broker.host, broker.port, seed=seed) as link:
        values = [rng.randbytes(rng.choice((1, 10, 1000, 100_000, 3_000_000))) for _ in range(60)]
        async with idemq.connect(broker.url) as mq:
            await mq.create_topic("blobs")
            await mq.producer().send_many("blobs", values)
        link.faults = testing.Faults(cut_replies_per_kb=0.0004, delay_seconds_max=0.002)
        async with idemq.connect(link.url, timeout=60) as mq, mq.subscribe("blobs") as sub:
            read: list[bytes] = []
            async for message in sub:
                assert message.offset == len(read)
                read.append(message.value)
                if link.counts.cuts >= 15:
                    link.faults = testing.Faults()  # for connections to come
                if len(read) == len(values):
                    break
        assert read == values
        assert link.counts.cuts >= 3
        assert mq is not None


@pytest.mark.process
@pytest.mark.parametrize("seed", [1, 2])
def test_fetches_cut_through_their_megabytes(seed: int, tmp_path: Path) -> None:
    asyncio.run(_through_megabytes(tmp_path / "data", seed))


async def _late_bytes(directory: Path) -> None:
    """PROTOCOL H1 on real sockets: what an old connection still held arrives after the client went on without it."""
    async with testing.BrokerProcess(directory) as broker, testing.Link(broker.host, broker.port) as link:
        async with idemq.connect(broker.url) as mq:
            await mq.create_topic("t")
        for number in range(20):
            async with idemq.connect(link.url, timeout=30) as mq, mq.producer("late") as producer:
                assert producer.last_seq == 2 * number - 1
                link.hold_requests(0, current=True, late_replies=None)
                first = await producer.send("t", b"a")
                second = await producer.send("t", b"b")
                delivered = await link.deliver_held()
                assert (first.seq, second.seq) == (2 * number, 2 * number + 1)
                assert delivered >= 1, "the first request was held and delivered late"
        assert link.counts.late_deliveries >= 20
        async with idemq.connect(broker.url) as mq:
            topic = await mq.describe_topic("t")
            assert topic.partitions[0].next == 40


@pytest.mark.process
def test_an_old_connections_late_bytes_change_nothing(tmp_path: Path) -> None:
    asyncio.run(_late_bytes(tmp_path / "data"))


# ---------------------------------------------------------------------------------------------------------- groups


class GroupScript:
    """One script of a group's member, run again and again with the reply stream cut one byte later each time."""

    def __init__(self, url: str, link: testing.Link, mq: idemq.Client, name: str) -> None:
        self.url = url
        self.link = link
        self.mq = mq
        """A client of the test's own, whose connection nobody cuts."""
        self.source = f"in-{name}"
        self.output = f"out-{name}"
        self.group = f"group-{name}"
        self.sent = 0

    async def fill(self, count: int) -> None:
        """So many messages more in each of the two partitions."""
        records = [idemq.Record(b"%d" % (self.sent + n), partition=n % 2) for n in range(2 * count)]
        self.sent += 2 * count
        async with self.mq.producer() as producer:
            await producer.send_many(self.source, records)

    async def copy(self, sub: idemq.Subscription, producer: idemq.Producer) -> None:
        """A transaction for each batch, until all that is assigned is done."""
        wanted = [partition for _, partition in sub.assigned]
        async for batch in sub.batches(max_wait=0.0):
            with suppress(idemq.LeaseLost):  # somebody sought, and it hears of that only now
                async with producer.transaction(batch) as tx:
                    for message in batch:
                        tx.send(self.output, message.value)
            positions = await self.positions()
            if all(positions[partition] == self.sent // 2 for partition in wanted):
                break

    async def positions(self) -> list[int]:
        return [one.next for one in (await self.mq.describe_group(self.group)).offsets]

    async def cut_through(self, script: Callable[[], Awaitable[None]], first: int, step: int) -> int:
        """Cuts after byte `first`, `first + step`, … until the script runs through uncut; returns where that was."""
        await self.mq.create_topic(self.source, partitions=2)
        await self.mq.create_topic(self.output)
        place = first
        while True:
            cuts = self.link.counts.cuts
            self.link.cut_reply_at(place)
            await script()
            assert await self.positions() == [self.sent // 2] * 2
            assert (await self.mq.describe_group(self.group)).members == []
            if self.link.counts.cuts == cuts:
                break
            place += step
        await self.link.heal()
        async with self.mq.subscribe(self.output) as sub:
            copied: list[int] = []
            while sum(sub.lag().values()):
                async for batch in sub.batches():
                    copied += [int(message.value) for message in batch]
                    break
        assert sorted(copied) == list(range(self.sent))
        return place

    async def commits_and_seeks(self) -> None:
        """Join, fetch, transact, commit, seek, leave."""
        await self.fill(2)
        async with (
            idemq.connect(self.url, timeout=30) as mq,
            mq.subscribe(self.source, group=self.group) as sub,
            mq.producer() as producer,
        ):
            end = self.sent // 2
            assert sub.positions() == {(self.source, 0): end - 2, (self.source, 1): end - 2}
            await sub.seek(self.source, 0, end - 1)
            assert sorted(await self.positions()) == [end - 2, end - 1]
            await sub.seek(self.source, 0, end - 2)
            assert await self.positions() == [end - 2, end - 2]
            await self.copy(sub, producer)
            assert await self.positions() == [end, end]
            await sub.seek(self.source, 1, end - 2)
            async for message in sub:
                assert (message.partition, message.offset) == (1, end - 2)
                break
            await sub.commit()
            assert await self.positions() == [end, end - 1]
            async for message in sub:
                await sub.commit(message)
                break

    async def comings_and_goings(self) -> None:
        """Join, be revoked one of two, be granted it again, lose one to somebody who seeks, get it back, leave."""
        await self.fill(1)
        async with (
            idemq.connect(self.url, timeout=30) as mq,
            mq.subscribe(self.source, group=self.group) as sub,
            mq.producer() as producer,
        ):
            async with self.mq.subscribe(self.source, group=self.group) as other, self.mq.producer() as another:
                while (len(sub.assigned), len(other.assigned)) != (1, 1):  # noqa: ASYNC110 - nobody to wake
                    await asyncio.sleep(0.001)
                await self.copy(other, another)
            while len(sub.assigned) != 2:  # noqa: ASYNC110 - nobody to wake
                await asyncio.sleep(0.001)
            position = (await self.positions())[0]
            await self.mq.seek_group(self.group, self.source, position, partition=0)
            await self.copy(sub, producer)


async def _every_byte_of_every_group_reply(directory: Path, script: str) -> None:
    """Several at once, since each waits for its client to come back."""
    at_once, step = 32, 32 * BYTES_EVERY
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(testing.BrokerProcess(directory))
        mq = await stack.enter_async_context(idemq.connect(broker.url, timeout=30))
        running: list[Awaitable[int]] = []
        for first in range(0, step, BYTES_EVERY):
            link = await stack.enter_async_context(testing.Link(broker.host, broker.port))
            one = GroupScript(link.url, link, mq, str(first))
            running.append(one.cut_through(getattr(one, script), first, step))
        places = await asyncio.gather(*running)
        assert len(running) == at_once
        print(f"{script}: cut at every {BYTES_EVERY}. of {min(places)} bytes")
        assert min(places) > 300, "the script's replies are longer than that"


@pytest.mark.process
@pytest.mark.parametrize("script", ["commits_and_seeks", "comings_and_goings"])
def test_replies_to_a_member_cut_at_every_place(script: str, tmp_path: Path) -> None:
    """At every third byte, and at each one in CI."""
    asyncio.run(_every_byte_of_every_group_reply(tmp_path / "data", script))
