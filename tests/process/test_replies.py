"""A link that cuts inside replies, at every byte of small ones and through the megabytes of large ones."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import idemq
from idemq import testing


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
