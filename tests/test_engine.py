"""The seam for a second engine: the client, its producers, transactions and readers work on one that is a list in
memory, and that has nothing but what the protocols in `client/engine.py` name."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

import idemq
from idemq import Receipt, Record, SendSummary
from idemq.client import engine, records, sync, wire
from idemq.client.engine import (
    FetchedBatch,
    FetchedPart,
    PartitionInfo,
    ProducerInfo,
    ProducerOptions,
    TopicInfo,
    TopicSettings,
)
from idemq.client.pipeline import Tally

from .support import run

NOW_MS = 1_700_000_000_000


class ListEngine:
    """Topics are lists, everything is durable at once."""

    def __init__(self) -> None:
        self.incarnation = bytes(16)
        self._answers = True
        self._infos: dict[str, TopicInfo] = {}
        self._batches: dict[int, list[bytes]] = {}
        self._names: dict[str, ProducerInfo] = {}

    async def start(self, timeout: float) -> None: ...

    async def close(self) -> None:
        self._infos.clear()

    async def ping(self, timeout: float) -> int:
        return NOW_MS

    async def create_topic(
        self, name: str, partitions: int, settings: TopicSettings, exist_ok: bool, timeout: float
    ) -> TopicInfo:
        ends = [PartitionInfo(index, 0, 0, 0) for index in range(partitions)]
        self._infos[name] = TopicInfo(name, len(self._infos) + 1, ends, *settings)
        self._batches[self._infos[name].id] = []
        return self._infos[name]

    async def alter_topic(self, name: str, partitions: int, settings: TopicSettings, timeout: float) -> TopicInfo:
        return await self.create_topic(name, partitions, settings, True, timeout)

    async def delete_topic(self, name: str, timeout: float) -> None:
        del self._infos[name]

    async def purge_topic(self, name: str, timeout: float) -> None:
        raise idemq.Unsupported("a list keeps everything")

    async def topics(self, names: Sequence[str] | None, timeout: float) -> list[TopicInfo]:
        return [self._as_it_is(one) for name, one in self._infos.items() if names is None or name in names]

    def _as_it_is(self, info: TopicInfo) -> TopicInfo:
        batches = self._batches[info.id]
        return info._replace(partitions=[PartitionInfo(0, 0, len(batches), sum(map(len, batches)))])

    async def producers(self, names: Sequence[str] | None, timeout: float) -> list[ProducerInfo]:
        return [one for name, one in self._names.items() if names is None or name in names]

    async def delete_producer(self, name: str, timeout: float) -> None:
        del self._names[name]

    async def fetch(
        self, ranges: Sequence[tuple[int, int, int]], bytes_max: int, wait: float, reader: int
    ) -> list[FetchedPart]:
        await asyncio.sleep(0)
        parts = []
        for topic_id, partition, offset in ranges:
            batches = self._batches[topic_id]
            found = [FetchedBatch(at, NOW_MS, batches[at]) for at in range(offset, len(batches))]
            parts.append(FetchedPart(topic_id, partition, 0, len(batches), found, "", ""))
        return parts

    async def offset_at(self, topic_id: int, partition: int, timestamp: int, timeout: float) -> int:
        return 0 if timestamp <= NOW_MS else len(self._batches[topic_id])

    def producer(self, name: str | None, options: ProducerOptions) -> ListProducer:
        return ListProducer(self, name, options)


class ListProducer:
    """Stores at once, or, while the engine does not answer, nothing that its caller hears of."""

    def __init__(self, engine: ListEngine, name: str | None, options: ProducerOptions) -> None:
        self._engine = engine
        self.name = name or "~0"
        self.id = self.epoch = 0
        self.last_seq = self.highest_seq = -1
        self.token: bytes | None = None
        self.batch_bytes = options.batch_bytes
        self.opened = self.ended = False
        self._unanswered: list[Exception] = []

    @property
    def unsettled(self) -> bool:
        return bool(self._unanswered)

    async def open(self, timeout: float) -> None:
        known = self._engine._names.get(self.name)
        self.id = zlib.crc32(self.name.encode())
        self.epoch = 1 if known is None else known.epoch + 1
        if known is not None:
            self.last_seq = self.highest_seq = known.last_seq
            self.token = known.token
        self.opened = True
        self._remember()

    def _remember(self) -> None:
        info = ProducerInfo(self.name, self.id, self.epoch, self.last_seq, self.token, "a test", NOW_MS)
        self._engine._names[self.name] = info

    def _store(self, topic: str, record: Record) -> Receipt:
        if topic not in self._engine._infos:
            raise idemq.UnknownTopic(f"there is no topic {topic!r}")
        topic_id = self._engine._infos[topic].id
        seq = self.highest_seq + 1 if record.seq is None else record.seq
        duplicate = seq <= self.last_seq
        self.highest_seq = max(self.highest_seq, seq)
        log = self._engine._batches[topic_id]
        if not self._engine._answers:
            self._unanswered.append(idemq.OutcomeUnknown("not answered", seq=seq))
            raise self._unanswered[-1]
        if not duplicate:
            body = records.pack([record.value], None, None, None, wire.Codec.NONE)
            log.append(wire.make_batch(wire.Codec.NONE, 1, topic_id, 0, self.id, seq, seq, body))
            self.last_seq = seq
        self._remember()
        return Receipt(topic, 0, None if duplicate else len(log) - 1, seq, NOW_MS, duplicate)

    async def send(self, topic: str, record: Record, timeout: float) -> Receipt:
        return self._store(topic, record)

    async def enqueue(self, topic: str, chunk: Sequence[bytes | Record], tally: Tally, timeout: float) -> int:
        one = chunk[0]  # and no more: the caller comes again with the rest
        try:
            receipt = self._store(topic, Record(one) if isinstance(one, bytes) else one)
        except idemq.IdemqError as error:
            tally.error = error
        else:
            tally.stored += not receipt.duplicate
            tally.duplicates += receipt.duplicate
        return 1

    async def finish(self, tally: Tally, timeout: float) -> None: ...

    def abandon(self, tally: Tally) -> None:
        tally.abandoned = True

    async def transact(
        self, sends: Sequence[tuple[str, Record]], offsets: Sequence[wire.Offset], token: bytes | None, timeout: float
    ) -> list[Receipt]:
        self.token = token
        self._remember()
        return [self._store(topic, record) for topic, record in sends]

    async def flush(self, timeout: float) -> None:
        if self._unanswered:
            raise idemq.OutcomeUnknown("not answered")

    def end(self) -> list[Exception]:
        self.ended = True
        return self._unanswered


def test_the_list_offers_nothing_that_the_seam_does_not_name() -> None:
    def public(one: object) -> set[str]:
        return {name for name in dir(one) if not name.startswith("_")}

    lists = ListEngine()
    options = ProducerOptions(True, 0.0, 1, 1, None)
    assert public(lists) <= public(engine.Engine)
    assert public(lists.producer(None, options)) <= public(engine.EngineProducer)


@run
async def test_a_producer_on_another_engine() -> None:
    lists = ListEngine()
    mq = idemq.Client(lists, 5.0)
    await mq.create_topic("t")
    assert (await mq.send("t", b"0")).offset == 0
    with pytest.raises(idemq.InvalidRequest, match="open the name first"):
        await mq.producer("p").send("t", b"x")
    async with mq.producer("p") as p:
        assert (p.name, p.id, p.epoch, p.last_seq, p.token) == ("p", zlib.crc32(b"p"), 1, -1, None)
        assert await p.send("t", b"1", seq=10) == Receipt("t", 0, 1, 10, NOW_MS, False)
        assert await p.send_many("t", [Record(b"1", seq=10), b"2", b"3"]) == SendSummary(2, 1, 12)
        with pytest.raises(idemq.UnknownTopic):
            await p.send_many("none", [b"x"])
        async with p.transaction() as tx:
            tx.send("t", b"4")
            tx.set_token(b"here")
        assert [one.seq for one in tx.receipts] == [13]
        await p.flush()
    assert p.ended
    async with mq.producer("p") as p:
        assert (p.epoch, p.last_seq, p.token) == (2, 13, b"here")
    assert (await mq.describe_producer("p"))[:5] == ("p", p.id, 2, 13, b"here")
    async with mq.subscribe("t") as sub:
        got: list[bytes] = []
        async for message in sub:
            got.append(message.value)
            if not sub.lag()["t", 0]:
                sub.stop()
    assert got == [b"0", b"1", b"2", b"3", b"4"]
    await mq.close()


@run
async def test_what_an_engine_ended_is_replaced_and_what_it_did_not_settle_is_told() -> None:
    lists = ListEngine()
    mq = idemq.Client(lists, 5.0)
    await mq.create_topic("t")
    await mq.send("t", b"x")
    first = mq._default
    assert first is not None
    first._engine.end()  # fenced, say
    await mq.send("t", b"y")
    assert mq._default is not first
    p: Any = await mq.producer("p").__aenter__()
    lists._answers = False
    with pytest.raises(idemq.OutcomeUnknown):
        await p.send("t", b"z", seq=7)
    with pytest.raises(idemq.OutcomeUnknown, match="1 batches were not answered") as caught:
        await p.close()
    assert caught.value.seq == 7
    await mq.close()


def test_blocking_code_on_another_engine() -> None:
    thread = sync._Thread()
    with sync.Client(idemq.Client(ListEngine(), 5.0), thread) as mq:
        mq.create_topic("t")
        with mq.producer("p") as p:
            assert p.send_many("t", [b"1", b"2"]) == SendSummary(2, 0, 1)
            assert (p.name, p.epoch, p.last_seq, p.token) == ("p", 1, 1, None)
    assert thread.ended
