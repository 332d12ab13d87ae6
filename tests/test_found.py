"""Bugs that were found by attack, each kept as a test."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

import idemq
from idemq import ChecksumMismatch, IdemqError, InvalidRequest, OutcomeUnknown, Receipt, Record, UnknownTopic
from idemq.broker.core import Read, Reply
from idemq.broker.store import MemoryStore, Store
from idemq.broker.topics import Mark
from idemq.client import wire
from idemq.client.wire import Code

from .raw import Running
from .support import CoreBroker, Disk, broker, log, run
from .test_session import Script, ready, refused, stored

# ------------------------------------------------------------------------------------------------ names of producers


def test_a_question_for_the_empty_name_does_not_end_the_broker(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    with Running(store) as running, running.connect() as raw:
        assert raw.call(wire.Producers([""])) == wire.ProducersAre([], False)
    store.close()


# --------------------------------------------------------------------------- the line in front of a full producer


@run
async def test_a_refused_record_passes_its_room_on() -> None:
    async with broker() as one, idemq.connect(one.url, timeout=3) as mq:
        await mq.create_topic("t")
        p = mq.producer(in_flight=1, batch_bytes=1)
        await p.send("t", b"0")
        sends = [p.send("t", b"1"), p.send("t", b"2", partition=99), p.send("t", b"3")]
        answers = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Receipt, InvalidRequest, Receipt]
        await p.close()


@run
async def test_a_duplicate_passes_its_room_on() -> None:
    async with broker() as one, idemq.connect(one.url, timeout=3) as mq:
        await mq.create_topic("t")
        async with mq.producer("p", in_flight=1, batch_bytes=1) as p:
            await p.send("t", b"0", seq=0)
            sends = [p.send("t", b"1", seq=1), p.send("t", b"0", seq=0), p.send("t", b"2", seq=2)]
            answers = await asyncio.gather(*sends)
            assert [answer.duplicate for answer in answers] == [False, True, False]


@run
async def test_a_refused_record_does_not_stop_the_line_for_ever() -> None:
    async with broker() as one, idemq.connect(one.url, timeout=3) as mq:
        await mq.create_topic("t")
        p = mq.producer(in_flight=1, batch_bytes=1)
        await p.send("t", b"0")
        first = asyncio.create_task(p.send("t", b"1"))
        await asyncio.sleep(0)
        refused = asyncio.create_task(p.send("t", b"2", partition=99))
        sends = []
        for _ in range(8):
            sends.append(asyncio.create_task(p.send("t", b"3")))
            await mq.ping()  # time enough for an answer: they overlap, each alone
        await asyncio.gather(first, *sends)
        assert isinstance((await asyncio.gather(refused, return_exceptions=True))[0], InvalidRequest)
        await p.close()


@run
async def test_a_transaction_does_not_overtake_given_numbers_that_wait_for_room() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=10) as mq:
            await mq.create_topic("t")
            async with mq.producer("p", in_flight=1, batch_bytes=1) as p:
                await p.send("t", b"0", seq=0)

                async def transact() -> Receipt:
                    async with p.transaction() as tx:
                        tx.send("t", b"3", seq=3)
                    return tx.receipts[0]

                sends = [p.send("t", b"1", seq=1), p.send("t", b"2", seq=2), transact()]
                assert not any(answer.duplicate for answer in await asyncio.gather(*sends))
        assert await log(one.url, "t") == [b"0", b"1", b"2", b"3"]


@run
async def test_sends_do_not_overtake_given_numbers_that_wait_for_room() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=10) as mq:
            await mq.create_topic("t")
            async with mq.producer("p", in_flight=1, batch_bytes=1) as p:
                seqs = iter(range(1, 121))
                await p.send("t", b"0", seq=0)

                async def chain() -> None:
                    for _ in range(30):
                        seq = next(seqs)
                        assert not (await p.send("t", b"%d" % seq, seq=seq)).duplicate

                await asyncio.gather(*(chain() for _ in range(4)))
        assert await log(one.url, "t") == [b"%d" % seq for seq in range(121)]


@run
async def test_counted_sends_that_wait_for_room_are_stored_in_the_order_they_began() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=10) as mq:
            await mq.create_topic("t")
            async with mq.producer("p", in_flight=1, batch_bytes=1) as p:
                values = iter(range(120))

                async def chain() -> None:
                    for _ in range(30):
                        await p.send("t", b"%d" % next(values))

                await asyncio.gather(*(chain() for _ in range(4)))
        assert await log(one.url, "t") == [b"%d" % value for value in range(120)]


@run
async def test_a_send_does_not_overtake_a_transaction_that_looks_its_topic_up() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=10) as mq:
            await mq.create_topic("t")
            async with mq.producer("p") as p:

                async def transact() -> Receipt:
                    async with p.transaction() as tx:
                        tx.send("t", b"0", seq=0)
                    return tx.receipts[0]

                answers = await asyncio.gather(transact(), p.send("t", b"1", seq=1))
                assert not any(answer.duplicate for answer in answers)
        assert await log(one.url, "t") == [b"0", b"1"]


def test_a_transaction_that_is_sent_again_is_not_told_stored_before_it_is() -> None:
    script, producer = ready()
    script.transact(producer, "first", b"1", seqs=[0], timeout=1)
    script.sleep(2)
    assert isinstance(script.told["first"], OutcomeUnknown)
    script.transact(producer, "again", b"1", seqs=[0], timeout=1)
    assert "again" not in script.told
    script.sleep(2)
    assert isinstance(script.told["again"], OutcomeUnknown)
    script.transact(producer, "at last", b"1", seqs=[0])
    assert script.links == [(-1, 0)], "it is one commit"
    script.answer(stored(0))
    [receipt] = script.told["at last"]
    assert receipt.seq == 0


@run
async def test_send_many_puts_nothing_in_line_behind_a_failed_record() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=10) as mq:
            await mq.create_topic("t")
            async with mq.producer("p") as p:

                async def source() -> AsyncIterator[Record]:
                    yield Record(b"0", seq=0, partition=99)
                    await p.flush()  # it failed meanwhile
                    yield Record(b"1", seq=1)
                    yield Record(b"2", seq=2)

                with pytest.raises(InvalidRequest):
                    await p.send_many("t", source())
            assert await log(one.url, "t") == [], "number 1 is not stored before number 0 is"
            async with mq.producer("p") as p:
                summary = await p.send_many("t", [Record(b"%d" % seq, seq=seq) for seq in range(3)])
                assert (summary.stored, summary.duplicates) == (3, 0)
        assert await log(one.url, "t") == [b"0", b"1", b"2"]


@run
async def test_what_waits_for_room_is_not_stored_when_a_number_before_it_fails() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=10) as mq:
            await mq.create_topic("t")
            async with mq.producer("p", in_flight=1, batch_bytes=1) as p:
                await p.send("t", b"0", seq=0)
                sends = [p.send("missing", b"1", seq=1), p.send("t", b"2", seq=2)]
                refused, behind = await asyncio.gather(*sends, return_exceptions=True)
                assert isinstance(refused, UnknownTopic)
                assert isinstance(behind, IdemqError)
                await mq.create_topic("missing")
                assert not (await p.send("missing", b"1", seq=1)).duplicate
        assert await log(one.url, "missing") == [b"1"]


@run
async def test_a_transaction_is_not_stored_when_a_number_before_it_fails() -> None:
    async with broker() as one:
        async with idemq.connect(one.url, timeout=5) as mq:
            await mq.create_topic("t")
            async with mq.producer("p") as p:

                async def transact() -> None:
                    async with p.transaction() as tx:
                        tx.send("t", b"1", seq=1)

                sends = [p.send("missing", b"0", seq=0), transact()]
                refused, behind = await asyncio.gather(*sends, return_exceptions=True)
                assert isinstance(refused, UnknownTopic)
                assert isinstance(behind, IdemqError)
                await mq.create_topic("missing")
                assert not (await p.send("missing", b"0", seq=0)).duplicate
        assert await log(one.url, "missing") == [b"0"]
        assert await log(one.url, "t") == []


# ------------------------------------------------------------------------------------------- the end of a client


@run
async def test_a_transaction_that_ends_after_its_client_raises() -> None:
    async with broker() as one:
        mq = await idemq.connect(one.url, timeout=2)
        await mq.create_topic("t")
        tx = await mq.producer().transaction().__aenter__()
        tx.send("t", b"x")
        await mq.close()
        with pytest.raises(IdemqError):
            async with asyncio.timeout(8):
                await tx.__aexit__(None, None, None)


async def ping_for_ever(mq: idemq.Client) -> None:
    while True:
        await mq.ping()


@run
async def test_a_transaction_on_a_store_that_was_replaced_raises() -> None:
    async with broker() as one:
        mq = await idemq.connect(one.url, timeout=2)
        await mq.create_topic("t")
        p = mq.producer()
        await one.restart(Disk(b"\x01" * 16))
        with pytest.raises(idemq.StoreReplaced):
            await ping_for_ever(mq)
        with pytest.raises(IdemqError):
            async with asyncio.timeout(8), p.transaction() as tx:
                tx.send("t", b"x")
        await mq.close()


@run
async def test_a_subscription_that_could_not_open_says_so_each_time() -> None:
    async with broker() as one, idemq.connect(one.url, timeout=2) as mq:
        await mq.create_topic("t", partitions=2)
        for _ in range(6):
            await mq.send("t", b"x", partition=0)
        sub = mq.subscribe("t", start=5)  # partition 1 is empty
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                async with asyncio.timeout(5):
                    await anext(aiter(sub))


@run
async def test_a_name_whose_opening_was_given_up_is_not_taken_later() -> None:
    async with broker() as one, idemq.connect(one.url, timeout=20) as mq:
        await mq.ping()
        await one.stop()
        opening = asyncio.create_task(mq.producer("p").__aenter__())
        await asyncio.sleep(0.01)  # it waits for a connection
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await one.start()
        await mq.create_topic("t")  # durable, so whatever was asked before it is, too
        assert await mq.producers() == []


@run
async def test_names_that_could_not_be_opened_leave_nothing_behind() -> None:
    async with broker(producers_max=1) as one, idemq.connect(one.url, timeout=5) as mq:
        async with mq.producer("taken"):
            pass
        for n in range(20):
            with pytest.raises(IdemqError):
                async with mq.producer(f"p{n}"):
                    pass
        assert len(mq._engine._session.producers) <= 1  # type: ignore[attr-defined]


def test_many_sends_to_a_topic_fail_though_the_first_takes_others_with_it() -> None:
    script = Script()
    script.connect()
    producer = script.producer()
    session, now = script.session, script.now
    for seq, topic in enumerate(["t", "u", "t"]):
        record = Record(b"x", partition=9 if topic == "t" else None, seq=seq)
        session.enqueue(now, producer, topic, record, f"{seq}", now + 60)
    script.pump()
    assert isinstance(script.told["0"], InvalidRequest)
    assert all(isinstance(script.told[waiter], IdemqError) for waiter in "12")


@pytest.mark.parametrize("kind", ["counted", "given", "transaction"])
@pytest.mark.parametrize("sent_before", [False, True])
def test_a_broker_that_cannot_look_says_nothing_of_an_earlier_copy(kind: str, sent_before: bool) -> None:
    script, producer = ready(in_flight=3)
    for n in range(4):
        if kind == "transaction":
            script.transact(producer, f"{n}", b"x")
        else:
            script.send(producer, f"{n}", seq=n if kind == "given" else None)
    if sent_before:
        script.reconnect()  # the first three may be stored, their replies lost
    for _ in range(3):
        assert "0" not in script.told, "the answers behind a refusal are awaited"
        script.answer(refused(Code.STORE_DAMAGED))
    if sent_before:
        assert [type(script.told[f"{n}"]) for n in range(4)] == [OutcomeUnknown] * 3 + [ChecksumMismatch]
        assert isinstance(producer.error, ChecksumMismatch), "nothing more is sent under these numbers"
    else:
        assert isinstance(script.told["0"], ChecksumMismatch)
        assert producer.error is None


@pytest.mark.parametrize(
    ("code", "dedup", "told"),
    [
        (Code.UNKNOWN_TOPIC, True, UnknownTopic),  # rule 4: nor will an earlier copy be stored
        (Code.STORE_DAMAGED, False, OutcomeUnknown),  # no numbers: nothing tells, and nothing follows from it
    ],
)
def test_a_refusal_of_what_was_sent_before_fails_that_alone(code: Code, dedup: bool, told: type[IdemqError]) -> None:
    script, producer = ready(in_flight=1, dedup=dedup)
    script.send(producer, "0")
    script.send(producer, "1")
    script.reconnect()
    script.answer(refused(code))
    assert type(script.told["0"]) is told
    script.answer(stored(0))
    assert isinstance(script.told["1"], Receipt)


# ------------------------------------------------------------------------------------------------------ the core


def test_no_reader_is_told_of_a_deletion_that_is_not_durable() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    broker.append(connection, topic_id)
    fetch, offset_at = wire.Fetch([wire.Range(topic_id, 0, 0)], 1000, 0), wire.OffsetAt(topic_id, 0, 0)
    assert broker.step(connection, wire.DeleteTopic(topic_id)) is None
    read, found = broker.step(connection, fetch), broker.step(connection, offset_at)
    assert isinstance(read, Read)
    assert read.parts == []
    assert isinstance(found, Reply)
    assert isinstance(found.message, wire.OffsetIs)
    broker.make_durable(broker.begin())
    assert [part.code for part in broker.step(connection, fetch).parts] == [Code.UNKNOWN_TOPIC]
    assert broker.step(connection, offset_at).message.code == Code.UNKNOWN_TOPIC


class Ranges(list[wire.Range]):
    """A list that can be watched going."""


def test_a_closed_connection_keeps_none_of_its_fetches() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    watched = []
    for _ in range(3):
        ranges = Ranges([wire.Range(topic_id, 0, 0)])
        watched.append(weakref.ref(ranges))
        assert broker.step(connection, wire.Fetch(ranges, 1000, 60_000)) is None
    del ranges
    assert None not in [one() for one in watched], "they wait"
    broker.core.disconnect(connection)
    gc.collect()
    assert [one() for one in watched] == [None] * 3


class Counting(MemoryStore):
    """The store in memory, which counts the rows that retention looks at."""

    rows_read = 0

    def oldest(self, topic_id: int, partition: int, limit: int) -> Sequence[Mark]:
        """See `Rows.oldest`."""
        marks = super().oldest(topic_id, partition, limit)
        self.rows_read += len(marks)
        return marks


def test_retention_that_has_nothing_to_remove_reads_one_row_of_a_partition() -> None:
    broker = CoreBroker(store := Counting())
    connection = broker.connect()
    made = broker.ask(connection, wire.CreateTopic("t", 1, wire.Settings(retention_ms=10**9), True))
    for _ in range(50):
        broker.append(connection, made.topic.topic_id)
    store.rows_read = 0
    broker.mono_ms += 3600_000
    broker.core.tick(broker.now())
    assert store.rows_read == 1


# ---------------------------------------------------------------------------------------------------- the server


@run
async def test_a_broker_that_has_stopped_reports_no_failed_end_later() -> None:
    async with broker(shutdown_ms_max=300) as one:  # fails when the broker says that it failed
        await one.stop()
        await asyncio.sleep(0.4)  # beyond what a stop may take
