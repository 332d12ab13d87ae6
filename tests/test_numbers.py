"""Given numbers under pressure: what waits (for room, a topic, an answer) is never overtaken, skipped or called stored.

Each was found by attack: a number that was only in line, or not even that, was answered as a duplicate and lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest

import idemq
from idemq import Producer, Receipt, Record

from .support import broker, log, run


async def all_of(*calls: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def transact(p: Producer, topic: str, value: bytes, seq: int) -> list[Receipt]:
    async with p.transaction() as tx:
        tx.send(topic, value, seq=seq)
    return tx.receipts


def narrow(mq: idemq.Client) -> Producer:
    """A producer whose buffer is full after one message."""
    return mq.producer("p", in_flight=1, batch_bytes=1)


@run
async def test_room_offered_to_a_send_that_is_refused_goes_to_the_next() -> None:
    async with broker() as b, idemq.connect(b.url, timeout=5) as mq, narrow(mq) as p:
        await mq.create_topic("t")
        await p.send("t", b"0", seq=0)
        sends = [p.send("t", b"1", seq=1), p.send("t", b"x", seq=2, partition=99), p.send("t", b"0", seq=0)]
        found = await all_of(*sends, p.send("t", b"2", seq=2))
        assert isinstance(found[1], idemq.InvalidRequest)
        assert found[2].duplicate
        assert not found[3].duplicate
        assert await log(b.url, "t") == [b"0", b"1", b"2"]


@run
async def test_a_transaction_does_not_overtake_a_send_that_waits_for_room() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, narrow(mq) as p:
        await mq.create_topic("t")
        await p.send("t", b"0", seq=0)
        found = await all_of(p.send("t", b"1", seq=1), p.send("t", b"2", seq=2), transact(p, "t", b"3", 3))
        assert [one.duplicate for one in (found[0], found[1], *found[2])] == [False, False, False]
        assert await log(b.url, "t") == [b"0", b"1", b"2", b"3"]


@run
async def test_a_send_does_not_overtake_a_transaction_that_looks_its_topic_up() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        [receipts, receipt] = await all_of(transact(p, "t", b"0", 0), p.send("t", b"1", seq=1))
        assert not receipts[0].duplicate
        assert not receipt.duplicate
        assert await log(b.url, "t") == [b"0", b"1"]


@run
async def test_a_transaction_run_again_waits_for_the_one_in_line() -> None:
    async with broker() as b, idemq.connect(b.url, timeout=1) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        await p.send("t", b"0", seq=0)
        await b.stop()
        for _ in range(2):
            with pytest.raises(idemq.OutcomeUnknown):
                await transact(p, "t", b"1", 1)
        await b.start()
        await p.flush(timeout=30)
        assert await log(b.url, "t") == [b"0", b"1"]


@run
async def test_send_many_puts_nothing_in_line_behind_a_failure() -> None:
    async def source() -> AsyncIterator[Record]:
        yield Record(b"0", seq=0, partition=99)
        await asyncio.sleep(0.1)
        yield Record(b"1", seq=1)

    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        async with mq.producer("p") as p:
            with pytest.raises(idemq.InvalidRequest):
                await p.send_many("t", source())
        async with mq.producer("p") as p:
            assert p.last_seq == -1
            await p.send_many("t", [Record(b"0", seq=0), Record(b"1", seq=1)])
        assert await log(b.url, "t") == [b"0", b"1"]


@run
async def test_a_send_that_waits_for_room_fails_with_the_tail() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, narrow(mq) as p:
        await mq.create_topic("t")
        await p.send("t", b"0", seq=0)
        found = await all_of(p.send("missing", b"1", seq=1), p.send("t", b"2", seq=2))
        assert isinstance(found[0], idemq.UnknownTopic)
        assert isinstance(found[1], idemq.RetriableError)
        await mq.create_topic("missing")
        assert not (await p.send("missing", b"1", seq=1)).duplicate
        assert not (await p.send("t", b"2", seq=2)).duplicate
        assert await log(b.url, "missing") == [b"1"]


@run
async def test_a_transaction_after_the_end_is_refused_and_does_not_hang() -> None:
    async with broker() as b:
        mq = await idemq.connect(b.url, timeout=5)
        await mq.create_topic("t")
        tx = mq.producer().transaction()
        await tx.__aenter__()
        tx.send("t", b"x")
        await mq.close()
        with pytest.raises(idemq.ClientClosed):
            await tx.__aexit__(None, None, None)


@run
async def test_a_subscription_that_failed_to_open_can_be_tried_again() -> None:
    async with broker() as b, idemq.connect(b.url, timeout=5) as mq:
        await mq.create_topic("t", partitions=2)
        for _ in range(6):
            await mq.send("t", b"x", partition=0)
        sub = mq.subscribe("t", start=5)  # partition 1 ends before
        for _ in range(2):
            with pytest.raises(idemq.InvalidRequest):
                await anext(aiter(sub))


@run
async def test_an_open_that_was_given_up_takes_no_name_later() -> None:
    async with broker() as b, idemq.connect(b.url, timeout=5) as mq, idemq.connect(b.url, timeout=5) as other:
        await mq.create_topic("t")
        await b.stop()
        late = mq.producer("p")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await late.__aenter__()
        await b.start()
        async with other.producer("p") as p:
            assert not (await p.send("t", b"0", seq=0)).duplicate
            await mq.ping()
            assert not (await p.send("t", b"1", seq=1)).duplicate
