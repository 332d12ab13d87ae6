"""Every call of the client against a broker in the same loop: results field by field, errors, deadlines, faults."""
# ruff: noqa: PT012 - a block that fails when it is left is what these tests are about

from __future__ import annotations

import asyncio
import gc
import inspect
import weakref
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import idemq
from idemq import Message, OutcomeUnknown, Receipt, Record, SendSummary
from idemq.broker.store import MemoryStore
from idemq.client import errors, records, wire
from idemq.client.wire import Code, Failed
from idemq.testing import Link

from .support import Disk, broker, eventually, log, nothing_left, read, run

# ------------------------------------------------------------------------------------------------------------ connect


@run
async def test_both_ways_to_connect() -> None:
    async with broker() as b, nothing_left():
        async with idemq.connect(b.url) as mq:
            assert type(mq) is idemq.Client
            assert await mq.ping() > 1_600_000_000_000
        mq = await idemq.connect(b.url, timeout=5.0, name="a name")
        socket = mq._engine._connection._protocol.transport.get_extra_info("socket")  # type: ignore[attr-defined]
        await mq.close()
        assert socket.fileno() == -1
        await mq.close()
        with pytest.raises(idemq.ClientClosed):
            await mq.ping()
        await eventually(lambda: b.server.core.connections == 0)
        session = weakref.ref(mq._engine._session)  # type: ignore[attr-defined]
        del mq
        gc.collect()
        assert session() is None, "no timer, task or transport holds it"


@run
async def test_where_the_url_and_the_token_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with broker(token="se:cr@et") as b:
        place = b.url.removeprefix("idemq://")
        (tmp_path / "token").write_text("se:cr@et\n")

        async def passes(*arguments: Any, **named: Any) -> None:
            async with idemq.connect(*arguments, **named) as mq:
                await mq.ping()

        for url, token in ((b.url, "wrong"), (b.url, None), (f"idemq://wrong@{place}", None)):
            with pytest.raises(idemq.AuthError):
                await passes(url, token=token)
        await passes(b.url, token="se:cr@et")
        await passes(f"idemq://wrong@{place}", token="se:cr@et")
        await passes(f"idemq://se%3Acr%40et@{place}")
        await passes(f"{b.url}?token=se%3Acr%40et")
        await passes(f"{place}?token=se:cr@et")
        monkeypatch.setenv("IDEMQ_URL", b.url)
        monkeypatch.setenv("IDEMQ_TOKEN_FILE", str(tmp_path / "token"))
        await passes()
        monkeypatch.setenv("IDEMQ_TOKEN", "wrong")
        with pytest.raises(idemq.AuthError):
            await passes()
        monkeypatch.setenv("IDEMQ_TOKEN", "se:cr@et")
        await passes()
        monkeypatch.delenv("IDEMQ_TOKEN")
        monkeypatch.setenv("IDEMQ_TOKEN_FILE", str(tmp_path / "none"))
        with pytest.raises(idemq.InvalidRequest, match="IDEMQ_TOKEN_FILE"):
            await passes()


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost", "idemq://", "idemq://localhost:x", "idemq://localhost:70000", "idemq://localhost/path",
        "idemq://localhost?ca=x", "idemq://localhost?x", "idemq://[::1", "",
    ],
)  # fmt: skip
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(idemq.InvalidRequest):
        idemq.connect(url)


@pytest.mark.parametrize("url", ["kafka://localhost", "idemqs://localhost"])
def test_what_comes_later_is_unsupported(url: str) -> None:
    with pytest.raises(idemq.Unsupported):
        idemq.connect(url)


@run
async def test_other_wrong_arguments_of_connect() -> None:
    for timeout in (0, -1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(idemq.InvalidRequest, match="timeout"):
            idemq.connect(timeout=timeout)  # type: ignore[arg-type]
    for name in ("x" * 5000, "\ud800"):
        with pytest.raises(idemq.InvalidRequest):
            await idemq.connect(name=name)


@run
async def test_nobody_listens() -> None:
    for url in ("idemq://127.0.0.1:1", f"idemq://{'x' * 70}.invalid"):
        with pytest.raises(idemq.ConnectionLost) as caught:
            await idemq.connect(url, timeout=0.2)
        assert caught.value.text.startswith("the broker cannot be reached: "), "and it says why"
        assert len(caught.value.text) > len("the broker cannot be reached: ")


@run
async def test_the_transport_of_a_dial_that_took_too_long_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    original, late = loop.create_connection, []

    async def create_connection(*arguments: Any) -> Any:
        transport, protocol = await original(*arguments)
        if not late:
            late.append(transport)
            raise TimeoutError
        return transport, protocol

    monkeypatch.setattr(loop, "create_connection", create_connection)
    async with broker() as b, idemq.connect(b.url) as mq:
        late[0].close()
        await asyncio.sleep(0.01)
        assert await mq.ping()
        assert mq._engine._session.reconnects == 0  # type: ignore[attr-defined]


@run
async def test_the_other_side_is_no_broker() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with nothing_left():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            with pytest.raises(idemq.ProtocolMismatch):
                await idemq.connect(f"idemq://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await server.wait_closed()


# ------------------------------------------------------------------------------------------------------------- topics


@run
async def test_topics() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        made = await mq.create_topic("b.topic", partitions=2, retention="7d", retention_bytes=1 << 30)
        assert made == idemq.TopicInfo(
            "b.topic", made.id, [idemq.PartitionInfo(0, 0, 0, 0), idemq.PartitionInfo(1, 0, 0, 0)],
            7 * 86400.0, 1 << 30, None, "delete",
        )  # fmt: skip
        other = await mq.create_topic("a", retention=timedelta(hours=1))
        assert (other.retention, other.retention_bytes, len(other.partitions)) == (3600.0, None, 1)
        assert [topic.name for topic in await mq.topics()] == ["a", "b.topic"]
        await mq.send("a", b"value")
        described = await mq.describe_topic("a")
        [partition] = described.partitions
        assert (partition.index, partition.earliest, partition.next) == (0, 0, 1)
        assert partition.bytes > 5
        assert described.id == other.id
        assert len((await mq.alter_topic("a", 3, retention_bytes=5)).partitions) == 3
        assert (await mq.describe_topic("a")).retention is None
        await mq.delete_topic("a")
        assert [topic.name for topic in await mq.topics()] == ["b.topic"]
        for gone in (mq.describe_topic("a"), mq.delete_topic("a"), mq.purge_topic("a"), mq.alter_topic("a")):
            with pytest.raises(idemq.UnknownTopic):
                await gone


@run
async def test_exist_ok_and_what_differs() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        made = await mq.create_topic("t", partitions=2, retention="1h")
        assert await mq.create_topic("t", partitions=2, retention=3600, exist_ok=True) == made
        with pytest.raises(idemq.TopicExists):
            await mq.create_topic("t", partitions=2, retention="1h")
        with pytest.raises(idemq.TopicExists, match="partitions is 2 and not 3, retention_ms is 3600000 and not None"):
            await mq.create_topic("t", partitions=3, exist_ok=True)


@run
async def test_wrong_arguments_for_topics() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        wrong: list[dict[str, Any]] = [
            {"name": ""}, {"name": "a b"}, {"name": "x" * 201}, {"name": 5}, {"name": "\ud800"},
            {"name": "t", "partitions": 0}, {"name": "t", "partitions": 1025}, {"name": "t", "partitions": True},
            {"name": "t", "retention": "7 days"}, {"name": "t", "retention": 0}, {"name": "t", "retention": True},
            {"name": "t", "retention": float("nan")}, {"name": "t", "retention_bytes": 0}, {"name": "t", "timeout": 0},
            {"name": "t", "retention_bytes": 2**63}, {"name": "t", "cleanup": 5},
        ]  # fmt: skip
        for arguments in wrong:
            with pytest.raises(idemq.InvalidRequest):
                await mq.create_topic(**arguments)
        for later in ({"dedup_window": "1h"}, {"cleanup": "compact"}):
            with pytest.raises(idemq.Unsupported):
                await mq.create_topic("t", **later)  # type: ignore[arg-type]
        for name in (5, "\ud800", "x" * 5000):
            with pytest.raises(idemq.InvalidRequest):
                await mq.describe_topic(name)  # type: ignore[arg-type]
        assert await mq.topics() == []
        assert await mq.ping(), "and the connection is whole"


@run
async def test_message_ids_come_later() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        async with p.transaction() as tx:
            later: list[Callable[[], Any]] = [
                lambda: mq.send("t", b"", message_id="1"), lambda: p.send("t", b"", message_id="1"),
                lambda: p.send_many("t", [Record(b"", message_id="1")]), lambda: tx.send("t", b"", message_id="1"),
                lambda: mq.producer(compression="zstd"),
            ]  # fmt: skip
            for call in later:
                with pytest.raises(idemq.Unsupported):
                    result = call()
                    assert inspect.isawaitable(result)
                    await result


# --------------------------------------------------------------------------------------------------- sends, as read


@run
async def test_a_receipt_is_what_is_read() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t", partitions=3)
        first = await p.send("t", b"one", key=b"k", headers={"a": b"1", "ü": b""})
        second = await p.send("t", b"", partition=2)
        assert first == Receipt("t", zlib.crc32(b"k") % 3, 0, 0, first.timestamp, False)
        assert (second.partition, second.seq) == (2, 1)
        found = {message.value: message for message in await read(mq, "t")}
        for receipt, message in ((first, found[b"one"]), (second, found[b""])):
            assert (message.topic, message.partition, message.offset) == receipt[:3]
            assert (message.seq, message.timestamp) == (receipt.seq, receipt.timestamp)
            assert (message.attempt, message.lease) == (1, 0)
        assert (found[b"one"].key, found[b"one"].headers) == (b"k", {"a": b"1", "ü": b""})
        assert (found[b""].key, found[b""].headers) == (None, {})
        assert first.timestamp is not None
        assert abs(first.timestamp - await mq.ping()) < 60_000


@run
async def test_partitions_by_key_and_by_batch() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t", partitions=5)
        for n in range(40):
            key = b"key %d" % n
            assert (await mq.send("t", b"", key=key)).partition == zlib.crc32(key) % 5
        assert {(await mq.send("t", b"")).partition for _ in range(5)} == set(range(5)), "sticky for a batch each"


@run
async def test_tasks_that_start_in_order_are_stored_in_order() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p", batch_bytes=100, in_flight=3) as p:
        await mq.create_topic("t")
        receipts = await asyncio.gather(*[p.send("t", b"%d" % n) for n in range(300)])
        assert [receipt.seq for receipt in receipts] == list(range(300))
        assert [receipt.offset for receipt in receipts] == list(range(300))
        assert await log(b.url, "t") == [b"%d" % n for n in range(300)]


@run
async def test_wrong_records_are_refused_and_nothing_else_happens() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        wrong: list[dict[str, Any]] = [
            {"value": "text"}, {"value": None}, {"value": bytearray(b"x")}, {"value": b"", "key": "k"},
            {"value": b"", "headers": [("a", b"")]}, {"value": b"", "headers": {1: b""}},
            {"value": b"", "headers": {"a": "b"}}, {"value": b"", "headers": {"\ud800": b""}},
            {"value": b"", "partition": -1}, {"value": b"", "partition": "0"}, {"value": b"", "timeout": 0},
        ]  # fmt: skip
        for arguments in wrong:
            with pytest.raises(idemq.InvalidRequest):
                await p.send("t", **arguments)
        for arguments in wrong[:-1]:
            with pytest.raises(idemq.InvalidRequest):
                await p.send_many("t", [Record(**arguments)])
            with pytest.raises(idemq.InvalidRequest):
                async with p.transaction() as tx:
                    tx.send("t", **arguments)
        with pytest.raises(idemq.InvalidRequest, match="partitions 0"):
            await p.send("t", b"", partition=1)
        for records in ([5], ["text"], [None]):
            with pytest.raises(idemq.InvalidRequest):
                await p.send_many("t", records)  # type: ignore[arg-type]
        for topic in (5, "\ud800"):
            with pytest.raises(idemq.InvalidRequest):
                await mq.send(topic, b"")  # type: ignore[arg-type]
            with pytest.raises(idemq.InvalidRequest):
                async with p.transaction() as tx:
                    tx.send(topic, b"")  # type: ignore[arg-type]
        assert await log(b.url, "t") == []
        await p.send("t", b"good")


@run
async def test_the_largest_message_and_one_byte_more() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        largest = b"x" * wire.MESSAGE_BYTES_MAX
        await p.send("t", largest)
        await p.send("t", largest[3:], key=b"key")
        assert await p.send_many("t", [largest, b"small"]) == SendSummary(2, 0, 3)
        for arguments in ({"value": largest + b"x"}, {"value": largest, "key": b"k"}):
            with pytest.raises(idemq.MessageTooLarge, match=str(wire.MESSAGE_BYTES_MAX)):
                await p.send("t", **arguments)  # type: ignore[arg-type]
        assert [len(message.value) for message in await read(mq, "t")] == [8 << 20, (8 << 20) - 3, 8 << 20, 5]


@run
async def test_compression_is_invisible_but_for_the_bytes() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        sizes = []
        for name, compression in (("plain", None), ("small", "zlib")):
            await mq.create_topic(name)
            async with mq.producer(compression=compression) as p:
                await p.send_many(name, [Record(b"word " * 50, key=b"k", headers={"h": b"v"})] * 100)
            sizes.append((await mq.describe_topic(name)).partitions[0].bytes)
            assert {(one.value, one.key, one.headers["h"]) for one in await read(mq, name)} == {
                (b"word " * 50, b"k", b"v")
            }
        assert sizes[1] * 10 < sizes[0]


@run
async def test_without_dedup_there_are_no_numbers() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer(dedup=False) as p:
        await mq.create_topic("t")
        assert await p.send("t", b"a") == Receipt("t", 0, 0, None, (await read(mq, "t"))[0].timestamp, False)
        assert await p.send_many("t", [b"b", b"c"]) == SendSummary(2, 0, -1)
        assert [message.seq for message in await read(mq, "t")] == [None] * 3
        assert len({message.uid for message in await read(mq, "t")}) == 3
        assert await mq.producers() == []
        with pytest.raises(idemq.InvalidRequest):
            mq.producer("named", dedup=False)


@run
async def test_uids_are_unique_and_stay() -> None:
    async with broker() as b:
        async with idemq.connect(b.url) as mq, mq.producer("p") as p, mq.producer("q") as q:
            await mq.create_topic("t", partitions=2)
            await asyncio.gather(*[one.send("t", b"%d" % n, seq=3 * n) for one in (p, q) for n in range(20)])
            await mq.send("t", b"anonymous")
            before = {(message.partition, message.offset): message.uid for message in await read(mq, "t")}
        assert len(set(before.values())) == 41
        await b.restart()
        async with idemq.connect(b.url) as mq:
            again = {(message.partition, message.offset): message.uid for message in await read(mq, "t")}
        assert again == before


@run
async def test_unknown_and_re_created_topics() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        for call in (p.send("t", b""), p.send_many("t", [b"", b""]), mq.send("t", b"")):
            with pytest.raises(idemq.UnknownTopic):
                await call
        with pytest.raises(idemq.UnknownTopic):
            async with p.transaction() as tx:
                tx.send("t", b"")
        with pytest.raises(idemq.UnknownTopic):
            await mq.subscribe("t").open()
        await mq.create_topic("t")
        assert (await p.send("t", b"old life")).offset == 0
        await mq.delete_topic("t")
        with pytest.raises(idemq.UnknownTopic):
            await p.send("t", b"between")
        await mq.create_topic("t", partitions=2)
        assert (await p.send("t", b"new life", partition=1)).offset == 0
        assert await log(b.url, "t") == [b"new life"]


# ------------------------------------------------------------------------------------------------------------ numbers


@run
async def test_numbers_outlive_everybody() -> None:
    async with broker() as b:
        async with idemq.connect(b.url) as mq, mq.producer("import") as p:
            await mq.create_topic("t")
            assert (p.name, p.last_seq, p.token) == ("import", -1, None)
            assert await p.send_many("t", [Record(b"%d" % n, seq=n) for n in range(5)]) == SendSummary(5, 0, 4)
            assert (await p.send("t", b"9", seq=9)).seq == 9
            epoch, number = p.epoch, p.id
        await b.restart()
        async with idemq.connect(b.url) as mq, mq.producer("import") as p:
            assert (p.last_seq, p.id) == (9, number)
            assert p.epoch > epoch
            summary = await p.send_many("t", (Record(b"%d" % n, seq=n) for n in range(12)))
            assert summary == SendSummary(2, 10, 11)
            assert await p.send("t", b"0", seq=0) == Receipt("t", 0, None, 0, None, True)
        assert await log(b.url, "t") == [b"0", b"1", b"2", b"3", b"4", b"9", b"10", b"11"]


@run
async def test_counted_and_given_numbers_do_not_mix() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("given") as given, mq.producer() as counted:
        await mq.create_topic("t")
        await given.send("t", b"", seq=0)
        for call in (given.send("t", b""), given.send_many("t", [b""]), given.send_many("t", [Record(b"")])):
            with pytest.raises(idemq.InvalidRequest, match="pass seq with every message"):
                await call
        await counted.send("t", b"")
        for call in (counted.send("t", b"", seq=1), counted.send_many("t", [Record(b"", seq=1)])):
            with pytest.raises(idemq.InvalidRequest, match="counts by itself"):
                await call
        assert len(await read(mq, "t")) == 2


@run
async def test_a_name_is_opened_before_it_is_used() -> None:
    """Its numbers go on from those that are stored, and only the broker knows these."""
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        p = mq.producer("name")
        for call in (p.send("t", b""), p.send_many("t", [b""])):
            with pytest.raises(idemq.InvalidRequest, match="async with"):
                await call
        with pytest.raises(idemq.InvalidRequest, match="async with"):
            p.transaction()
        anonymous = mq.producer()
        async with anonymous.transaction() as tx:
            tx.send("t", b"x")
        assert anonymous.name.startswith("~")
        assert await log(b.url, "t") == [b"x"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""}, {"name": "~x"}, {"name": "a\n"}, {"name": "x" * 201}, {"in_flight": 0}, {"in_flight": 17},
        {"batch_bytes": 0}, {"batch_bytes": (8 << 20) + 1}, {"linger": -1}, {"linger": 61},
    ],
)  # fmt: skip
@run
async def test_wrong_arguments_of_producer(arguments: dict[str, Any]) -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        with pytest.raises(idemq.InvalidRequest):
            mq.producer(**arguments)


@run
async def test_a_conflict_is_named_and_ends_the_producer() -> None:
    """The same number with other content, by two clients that disagree: never stored twice."""
    async with broker() as b, idemq.connect(b.url) as mq, idemq.connect(b.url) as other:
        await mq.create_topic("t")
        p, q = mq.producer("p"), other.producer("p")
        await p.__aenter__()
        await p.send("t", b"one", seq=0)
        state = q._engine._state  # type: ignore[attr-defined]
        state.id, state.epoch, state.opened = p.id, p.epoch, True
        with pytest.raises(idemq.SequenceConflict):
            await q.send("t", b"two", seq=0)
        with pytest.raises(idemq.SequenceConflict):
            await q.send("t", b"three", seq=1)
        assert await log(b.url, "t") == [b"one"]


@run
async def test_producers_can_be_looked_at_and_forgotten() -> None:
    async with broker() as b, idemq.connect(b.url, name="me@here") as mq:
        await mq.create_topic("t")
        async with mq.producer("p") as p:
            async with p.transaction() as tx:
                tx.send("t", b"x")
                tx.set_token(b"token")
            info = await mq.describe_producer("p")
            assert info[:5] == ("p", p.id, p.epoch, 0, b"token")
            assert "me@here" in info.holder
            assert abs(info.last_seen - await mq.ping()) < 60_000
            async with mq.producer():
                assert [one.name[0] for one in await mq.producers()] == ["p", "~"]
            await mq.delete_producer("p")
            with pytest.raises(OutcomeUnknown) as caught:
                await p.send("t", b"y")
            assert "UNKNOWN_PRODUCER" in str(caught.value)
            with pytest.raises(OutcomeUnknown):
                await caught.value.outcome()  # nobody will find out
            with pytest.raises(idemq.UnknownProducer):
                await p.send("t", b"z")
        for gone in (mq.describe_producer("p"), mq.delete_producer("p")):
            with pytest.raises(idemq.UnknownProducer):
                await gone
        async with mq.producer("p") as p:
            assert (p.last_seq, p.token) == (-1, None)


@run
async def test_the_client_outlives_its_forgotten_anonymous_producer() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        await mq.send("t", b"1")
        [info] = await mq.producers()
        await mq.delete_producer(info.name)
        with pytest.raises(OutcomeUnknown):
            await mq.send("t", b"2")
        assert (await mq.send("t", b"3")).seq == 0
        assert await log(b.url, "t") == [b"1", b"3"]


# ------------------------------------------------------------------------------------------------------------ fencing


@run
async def test_a_second_holder_fences_the_first_and_says_who() -> None:
    async with (
        broker() as b,
        idemq.connect(b.url, name="first") as mq,
        idemq.connect(b.url, name="the second") as other,
    ):
        await mq.create_topic("t")
        async with mq.producer("p") as old:
            await old.send("t", b"0")
            async with other.producer("p") as new:
                assert new.last_seq == 0
                await new.send("t", b"1")
                with pytest.raises(idemq.ProducerFenced, match="the second") as caught:
                    await old.send("t", b"lost")
                assert "127.0.0.1" in str(caught.value)
                for call in (old.send("t", b""), old.send_many("t", [b""])):
                    with pytest.raises(idemq.ProducerFenced):
                        await call
                with pytest.raises(idemq.ProducerFenced):
                    async with old.transaction() as tx:
                        tx.send("t", b"lost")
                assert (await new.send("t", b"2")).seq == 2, "and it does not fence back"
                async with mq.producer("another") as third, other.producer("one more") as fourth:
                    await third.send("t", b"3")
                    await fourth.send("t", b"4")
        assert await log(b.url, "t") == [b"0", b"1", b"2", b"3", b"4"]


@run
async def test_what_was_stored_before_the_fence_counts_as_stored() -> None:
    async with (
        broker() as b,
        Link("127.0.0.1", b.port) as link,
        idemq.connect(b.url) as other,
        idemq.connect(link.url) as mq,
        mq.producer("p") as old,
    ):
        await mq.create_topic("t")
        await old.send("t", b"0")
        link.lose_replies(cut_seconds=None, current=True)
        sending = asyncio.create_task(old.send("t", b"1"))
        await eventually(lambda: b.server.counts.records == 2)
        async with other.producer("p") as new:
            assert new.last_seq == 1
            link.cut()
            receipt = await sending
            assert (receipt.seq, receipt.duplicate) == (1, True)


# ------------------------------------------------------------------------------------------------------- transactions


@run
async def test_a_transaction_over_topics_and_partitions() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t", partitions=2)
        await mq.create_topic("u")
        headers = {"n": b"1"}
        async with p.transaction() as tx:
            tx.send("t", b"a", partition=1, headers=headers)
            headers["n"] = b"2"
            tx.send("u", b"b", headers=headers)
            tx.send("t", b"c", partition=0, key=b"k")
            tx.send("t", b"d", partition=1)
            assert tx.receipts == []
            assert await log(b.url, "t", "u") == []
        assert [one[:4] for one in tx.receipts] == [("t", 1, 0, 0), ("u", 0, 0, 1), ("t", 0, 0, 2), ("t", 1, 1, 3)]
        assert len({one.timestamp for one in tx.receipts}) == 1
        found = {message.value: message for message in await read(mq, "t", "u")}
        assert (found[b"a"].headers, found[b"b"].headers, found[b"c"].key) == ({"n": b"1"}, {"n": b"2"}, b"k")


@run
async def test_an_exception_in_the_block_stores_nothing() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        with pytest.raises(ZeroDivisionError):
            async with p.transaction() as tx:
                tx.send("t", b"lost")
                tx.set_token(b"lost")
                raise ZeroDivisionError
        assert (tx.receipts, p.token, p.last_seq) == ([], None, -1)
        async with p.transaction() as tx:
            tx.send("t", b"kept")
        assert tx.receipts[0].seq == 0
        assert await log(b.url, "t") == [b"kept"]


@run
async def test_a_token_comes_back_with_the_name() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        async with mq.producer("p") as p:
            async with p.transaction() as tx:
                tx.set_token(b"only a token")
            assert (p.token, p.last_seq, tx.receipts) == (b"only a token", 0, [])
            async with p.transaction() as tx:
                tx.send("t", b"x")
                tx.set_token(b"1")
                tx.set_token(b"2")
            async with p.transaction() as tx:
                tx.send("t", b"y")
        async with mq.producer("p") as p:
            assert (p.token, p.last_seq) == (b"2", 2)
            async with p.transaction() as tx:
                for wrong in ("text", b"x" * 4097):
                    with pytest.raises(idemq.InvalidRequest):
                        tx.set_token(wrong)  # type: ignore[arg-type]
                tx.set_token(b"x" * 4096)
            async with p.transaction():
                pass
            assert p.last_seq == 3, "an empty one is nothing"


@run
async def test_a_transaction_that_is_too_large() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t", partitions=1024)
        await mq.create_topic("u")
        with pytest.raises(ZeroDivisionError):
            async with p.transaction() as tx:
                tx.send("t", b"x" * (8 << 20))
                tx.send("t", b"x" * (7 << 20))
                with pytest.raises(idemq.TransactionTooLarge):
                    tx.send("t", b"x" * (1 << 20))
                raise ZeroDivisionError
        with pytest.raises(idemq.TransactionTooLarge, match="1024 partitions"):
            async with p.transaction() as tx:
                for partition in range(1024):
                    tx.send("t", b"", partition=partition)
                tx.send("u", b"")
        assert await mq.describe_topic("u") == (await mq.topics())[1]
        assert p.last_seq == -1
        async with p.transaction() as tx:
            tx.send("t", b"x" * (8 << 20), partition=0)
            tx.send("t", b"x" * (7 << 20), partition=0)
        assert [one.offset for one in tx.receipts] == [0, 1]


@run
async def test_a_transaction_is_used_once_and_inside_its_block() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        tx = p.transaction()
        for misuse in (lambda: tx.send("t", b""), lambda: tx.set_token(b"")):
            with pytest.raises(idemq.ClientClosed):
                misuse()
        async with tx:
            tx.send("t", b"x")
            with pytest.raises(idemq.InvalidRequest):
                await tx.__aenter__()
        for misuse in (lambda: tx.send("t", b""), lambda: tx.set_token(b"")):
            with pytest.raises(idemq.ClientClosed):
                misuse()
        with pytest.raises(idemq.InvalidRequest):
            await tx.__aenter__()
        assert await log(b.url, "t") == [b"x"]


@run
async def test_two_transactions_at_once_on_one_producer() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")

        async def one(n: int) -> list[Receipt]:
            async with p.transaction() as tx:
                for _ in range(n + 1):
                    tx.send("t", b"%d" % n)
                    await asyncio.sleep(0)
            return tx.receipts

        receipts = await asyncio.gather(*[one(n) for n in range(10)])
        values = await log(b.url, "t")
        for n, mine in enumerate(receipts):
            offsets = [receipt.offset for receipt in mine]
            assert [values[offset] for offset in offsets if offset is not None] == [b"%d" % n] * (n + 1)
            assert offsets == list(range(offsets[0] or 0, (offsets[0] or 0) + n + 1)), "whole, and together"


@run
async def test_an_explicit_number_in_a_transaction() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        for expected in (["a", "b"], ["b"]):
            async with mq.producer("p") as p:
                fresh = p.last_seq == -1
                async with p.transaction() as tx:
                    tx.send("t", b"a", seq=1)
                    tx.send("t", b"b", seq=5)
                assert [one.duplicate for one in tx.receipts] == [not fresh] * 2
                assert expected
        assert await log(b.url, "t") == [b"a", b"b"]


# ------------------------------------------------------------------------------------------------------------ reading


async def take(items: AsyncIterator[Any], count: int) -> list[Any]:
    found: list[Any] = []
    async for one in items:
        found.append(one)
        if len(found) == count:
            break
    return found


@run
async def test_where_a_subscription_starts() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        receipts = []
        for n in range(4):
            receipts.append(await mq.send("t", b"%d" % n))
            await asyncio.sleep(0.002)
        stamp = receipts[2].timestamp
        assert stamp is not None
        when = datetime.fromtimestamp(stamp / 1000, UTC)
        for start, expected in (("earliest", b"0"), (0, b"0"), (3, b"3"), (when, b"2")):
            async with mq.subscribe("t", start=start) as sub:
                assert (await take(aiter(sub), 1))[0].value == expected
        async with mq.subscribe("t", start="latest") as sub, mq.subscribe("t", start=4) as too:
            await mq.send("t", b"4")
            assert [(await take(aiter(one), 1))[0].value for one in (sub, too)] == [b"4", b"4"]
        async with mq.subscribe("t", start=datetime.now(UTC) + timedelta(days=1)) as sub:
            assert sub.positions() == {("t", 0): 5}
        with pytest.raises(idemq.InvalidRequest, match="ends at 5"):
            await mq.subscribe("t", start=6).open()
        for wrong in ("middle", -1, 1.5, True, datetime.now(), None):
            with pytest.raises(idemq.InvalidRequest):
                mq.subscribe("t", start=wrong)  # type: ignore[arg-type]
        for arguments in ({"on_truncated": "skip"}, {"prefetch_bytes": 0}):
            with pytest.raises(idemq.InvalidRequest):
                mq.subscribe("t", **arguments)  # type: ignore[arg-type]
        with pytest.raises(idemq.InvalidRequest):
            mq.subscribe()


@run
async def test_batches_and_lag() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t", partitions=2)
        await mq.create_topic("u")
        for n in range(10):
            await mq.send("t", b"%d" % n, partition=n % 2)
        await mq.send("u", b"u")
        async with mq.subscribe("t", "u") as sub:
            assert sub.assigned == [("t", 0), ("t", 1), ("u", 0)]
            assert sub.lag() == {("t", 0): 5, ("t", 1): 5, ("u", 0): 1}
            found: list[Message] = []
            async for batch in sub.batches(max_messages=4, max_wait=0):
                assert 1 <= len(batch) <= 4
                assert [batch[n].value for n in range(len(batch))] == [message.value for message in batch]
                assert (batch[-1].uid, batch[0:1][0].uid) == ([*batch][-1].uid, batch[0].uid)
                with pytest.raises(IndexError):
                    batch[len(batch)]
                found += batch
                if len(found) == 11:
                    break
            assert set(sub.lag().values()) == {0}
            assert sub.positions() == {("t", 0): 5, ("t", 1): 5, ("u", 0): 1}
        for partition in (0, 1):
            values = [one.value for one in found if (one.topic, one.partition) == ("t", partition)]
            assert values == [b"%d" % n for n in range(partition, 10, 2)]
        for wrong in ({"max_messages": 0}, {"max_wait": -1}):
            with pytest.raises(idemq.InvalidRequest):
                await anext(mq.subscribe("t").batches(**wrong))  # type: ignore[arg-type]


@run
async def test_a_batch_waits_for_more_from_its_first_message_on() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        async with mq.subscribe("t") as sub:
            batches = sub.batches(max_messages=3, max_wait=30)
            waiting = asyncio.create_task(take(batches, 1))
            for n in range(3):
                await mq.send("t", b"%d" % n)
            [batch] = await waiting
            assert [message.value for message in batch] == [b"0", b"1", b"2"]
            await batches.aclose()  # type: ignore[attr-defined]


@run
async def test_seek_and_leaving_a_loop() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        await mq.send("t", b"x")
        async with mq.producer() as p:
            await p.send_many("t", [b"%d" % n for n in range(1, 10)])
        async with mq.subscribe("t") as sub:
            assert [one.offset for one in await take(aiter(sub), 3)] == [0, 1, 2]
            assert [one.offset for one in await take(aiter(sub), 2)] == [3, 4], "it goes on behind the last"
            found = []
            async for message in sub:
                found.append(message.offset)
                if message.offset == 6 and found.count(6) == 1:
                    await sub.seek("t", 0, 1)
                if message.offset == 9:
                    break
            assert found == [5, 6, 1, 2, 3, 4, 5, 6, 7, 8, 9]
            await sub.seek("t", 0, "earliest")
            assert sub.lag() == {("t", 0): 10}
            await sub.seek("t", 0, "latest")
            await mq.send("t", b"10")
            assert [one.offset for one in await take(aiter(sub), 1)] == [10]
            for topic, partition, to in (("t", 1, 0), ("u", 0, 0), ("t", 0, 99), ("t", 0, -1)):
                with pytest.raises(idemq.InvalidRequest):
                    await sub.seek(topic, partition, to)


@run
async def test_two_loops_share_a_subscription() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer() as p:
        await mq.create_topic("t")
        await p.send_many("t", [b"%d" % n for n in range(100)])
        async with mq.subscribe("t") as sub:

            async def reader() -> list[bytes]:
                found = []
                async for message in sub:
                    found.append(message.value)
                    await asyncio.sleep(0)
                    if not sum(sub.lag().values()):
                        break
                return found

            readers = [asyncio.create_task(reader()) for _ in range(2)]
            await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
            sub.stop()
            found = [value for task in readers for value in await task]
        assert sorted(map(int, found)) == list(range(100)), "each message went to one of them"


@run
async def test_stop_ends_the_loop_that_runs_and_no_other() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer() as p:
        await mq.create_topic("t")
        await p.send_many("t", [b"%d" % n for n in range(5)])
        async with mq.subscribe("t") as sub:
            offsets = []
            async for message in sub:
                offsets.append(message.offset)
                sub.stop()
            assert offsets == [0]
            assert [one.offset for one in await take(aiter(sub), 2)] == [1, 2]
            waiting = asyncio.create_task(take(aiter(sub), 99))
            await asyncio.sleep(0.01)
            sub.stop()
            assert [one.offset for one in await waiting] == [3, 4]
            await p.send("t", b"5")
            async for batch in sub.batches():
                offsets += [one.offset for one in batch]
                sub.stop()
            assert offsets == [0, 5]
        with pytest.raises(idemq.ClientClosed):
            await take(aiter(sub), 1)
        with pytest.raises(idemq.ClientClosed):
            await sub.open()


@run
async def test_what_retention_took_before_it_was_read() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer() as p:
        await mq.create_topic("t")
        await p.send_many("t", [b"%d" % n for n in range(7)])
        await mq.purge_topic("t")
        [partition] = (await mq.describe_topic("t")).partitions
        assert (partition.earliest, partition.next) == (7, 7)
        async with mq.subscribe("t", start=3) as sub:
            with pytest.raises(idemq.OffsetTruncated) as caught:
                await take(aiter(sub), 1)
            assert (caught.value.missed, caught.value.code) == (4, "OFFSET_TRUNCATED")
            await sub.seek("t", 0, "earliest")
            await p.send("t", b"7")
            assert [one.offset for one in await take(aiter(sub), 1)] == [7]
        await mq.purge_topic("t")
        async with mq.subscribe("t", start=3, on_truncated="earliest") as sub:
            await eventually(lambda: sub.lag() == {("t", 0): 0})
            await p.send("t", b"8")
            assert [one.offset for one in await take(aiter(sub), 1)] == [8]


@run
async def test_a_topic_that_goes_while_it_is_read() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        async with mq.subscribe("t") as sub:
            await mq.send("t", b"last")
            waiting = asyncio.create_task(take(aiter(sub), 2))
            await eventually(lambda: sub.positions() == {("t", 0): 1})
            await mq.delete_topic("t")
            with pytest.raises(idemq.UnknownTopic):
                await waiting


@run
async def test_prefetch_is_bounded_and_nothing_is_lost() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer(batch_bytes=10_000) as p:
        await mq.create_topic("t", partitions=3)
        values = [b"%d" % n + b"x" * 1000 for n in range(300)]
        await p.send_many("t", values)
        async with mq.subscribe("t", prefetch_bytes=20_000) as sub:
            await eventually(lambda: sub._source.reader._buffered_bytes >= 20_000)
            for _ in range(20):
                await mq.ping()  # time for many more fetches
            assert sub._source.reader._buffered_bytes <= 20_000 + 3 * 11_000
            found = []
            async for message in sub:
                found.append(message.value)
                assert sub._source.reader._buffered_bytes <= 20_000 + 3 * 11_000
                if len(found) == 300:
                    break
        assert sorted(found) == sorted(values)


@run
async def test_what_is_read_ahead_counts_as_what_it_takes_in_memory() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer(batch_bytes=1) as p:
        await mq.create_topic("t")
        await p.send_many("t", [b"x"] * 1000)
        async with mq.subscribe("t", prefetch_bytes=20_000) as sub:
            await eventually(lambda: sub._source.reader._buffered_bytes >= 20_000)
            for _ in range(20):
                await mq.ping()  # time for many more fetches
            # One fetch, of 20,000 bytes as they are stored: more than what was wanted, and far from all.
            (one,) = sub._source.reader.readings.values()
            assert len(one.pieces) < 500


@run
async def test_partitions_take_turns_and_closing_leaves_no_task() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t", partitions=3)
        for n in range(9):
            await mq.send("t", b"x", partition=n // 3)
        before = asyncio.all_tasks()
        sub = mq.subscribe("t")
        await sub.open()
        await eventually(lambda: sum(len(one.pieces) for one in sub._source.reader.readings.values()) == 9)
        assert {one.partition for one in await take(aiter(sub), 3)} == {0, 1, 2}
        await sub.close()
        assert asyncio.all_tasks() == before


@run
async def test_more_partitions_than_one_fetch_may_ask_for() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t", partitions=wire.PARTITIONS_MAX)
        await mq.create_topic("u", partitions=wire.APPENDS_MAX + 1 - wire.PARTITIONS_MAX)
        async with mq.subscribe("t", "u") as sub:
            assert len(sub.assigned) == wire.APPENDS_MAX + 1
            for topic, partition in (("u", 0), ("t", 0), ("t", wire.PARTITIONS_MAX - 1), ("u", 0)):
                await mq.send(topic, b"x", partition=partition)
                assert [(one.topic, one.partition) for one in await take(aiter(sub), 1)] == [(topic, partition)]


@pytest.mark.parametrize("partitions_max", [2, wire.APPENDS_MAX])
@run
async def test_no_partition_starves_whatever_a_fetch_may_ask_for(
    monkeypatch: pytest.MonkeyPatch, partitions_max: int
) -> None:
    monkeypatch.setattr("idemq.client.reader.APPENDS_MAX", partitions_max)
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t", partitions=3)
        for n in range(30):
            await mq.send("t", b"x", partition=n // 10)
        async with mq.subscribe("t", prefetch_bytes=1) as sub:  # a fetch brings one batch, and the next comes behind it
            assert {one.partition for one in await take(aiter(sub), 6)} == {0, 1, 2}


@run
async def test_partitions_that_are_added_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.client.source.TOPIC_AGE_S_MAX", 0.01)
    monkeypatch.setattr("idemq.client.reader.FETCH_WAIT_S", 0.01)
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        async with mq.subscribe("t", start="latest") as sub:
            await mq.alter_topic("t", 2)
            await mq.send("t", b"new", partition=1)
            assert [one.partition for one in await take(aiter(sub), 1)] == [1]


# ------------------------------------------------------------------------------------------- deadlines, cancelled waits


@run
async def test_a_timeout_and_then_the_outcome() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, idemq.connect(link.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        await p.send("t", b"0")
        link.stall()
        with pytest.raises(OutcomeUnknown) as single:
            await p.send("t", b"1", timeout=0.05)
        with pytest.raises(OutcomeUnknown) as whole:
            async with p.transaction(timeout=0.05) as tx:
                tx.send("t", b"2")
                tx.send("t", b"3")
        assert isinstance(single.value, TimeoutError)
        assert (single.value.seq, whole.value.seq, tx.receipts) == (1, 3, [])
        with pytest.raises(OutcomeUnknown):
            await single.value.outcome(timeout=0.01)
        with pytest.raises(OutcomeUnknown):
            await p.flush(timeout=0.01)
        with pytest.raises(OutcomeUnknown):
            await p.send_many("t", [b"4", b"5"], timeout=0.05)
        assert single.value.pending.waiters == []  # type: ignore[attr-defined]
        waiting = asyncio.create_task(single.value.outcome())
        await link.heal()
        receipt = await waiting
        assert (receipt.offset, receipt.seq) == (1, 1)
        assert [one.offset for one in await whole.value.outcome()] == [2, 3]
        assert await single.value.outcome(0.01) == receipt, "it can be asked again"
        await p.flush()
        assert await log(b.url, "t") == [b"%d" % n for n in range(6)]


@run
async def test_an_outcome_that_is_a_refusal() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, idemq.connect(link.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        await p.send("t", b"0")
        link.stall()
        with pytest.raises(OutcomeUnknown) as caught:
            await p.send("t", b"1", timeout=0.05)
        async with idemq.connect(b.url) as other:
            await other.delete_topic("t")
        await link.heal()
        with pytest.raises(idemq.UnknownTopic):
            await caught.value.outcome()
        await p.flush()  # somebody was told


@run
async def test_what_failed_after_send_many_gave_up_is_told_by_flush() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, idemq.connect(link.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        await p.send("t", b"0")
        link.stall()
        with pytest.raises(OutcomeUnknown):
            await p.send_many("t", [b"1", b"2"], timeout=0.05)
        async with idemq.connect(b.url) as other:
            await other.delete_topic("t")
        await link.heal()
        with pytest.raises(idemq.UnknownTopic):
            await p.flush()


@run
async def test_a_send_many_that_failed_is_not_told_again() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p", batch_bytes=100) as p:
        with pytest.raises(idemq.UnknownTopic):
            await p.send_many("none", [b"x" * 100] * 20)
        await p.flush()


@run
async def test_outcome_has_the_clients_deadline() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link:
        mq = await idemq.connect(link.url, timeout=0.1)
        await mq.create_topic("t", timeout=30)
        await mq.send("t", b"", timeout=30)
        link.stall()
        with pytest.raises(OutcomeUnknown) as caught:
            await mq.send("t", b"")
        with pytest.raises(OutcomeUnknown):
            await caught.value.outcome()
        with pytest.raises(OutcomeUnknown):
            await mq.close()
        with pytest.raises(OutcomeUnknown):
            await caught.value.outcome(30)


@run
async def test_a_full_buffer_makes_the_sender_wait() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, idemq.connect(link.url) as mq:
        await mq.create_topic("t")
        async with mq.producer(batch_bytes=1000, in_flight=1) as p:
            await p.send("t", b"warm")
            link.stall()
            sends = [asyncio.create_task(p.send("t", b"%d" % n + b"x" * 500)) for n in range(10)]
            await asyncio.sleep(0.01)
            with pytest.raises(idemq.BrokerBusy):
                await p.send("t", b"no room", timeout=0.05)
            with pytest.raises(idemq.BrokerBusy):
                await p.send_many("t", [b"no room"], timeout=0.05)
            sends[6].cancel()
            await link.heal()
            results = await asyncio.gather(*sends, return_exceptions=True)
            assert [type(one) is Receipt for one in results] == [n != 6 for n in range(10)]
        values = await log(b.url, "t")
        assert [value.rstrip(b"x") for value in values] == [b"warm", *[b"%d" % n for n in range(10) if n != 6]]


@run
async def test_whoever_waited_in_line_has_no_new_time_to_wait_for_room() -> None:
    ended: list[str] = []
    async with broker() as b, Link("127.0.0.1", b.port) as link, idemq.connect(link.url) as mq:
        await mq.create_topic("t")
        async with mq.producer(batch_bytes=1, in_flight=1) as p:
            await p.send("t", b"warm")
            link.stall()
            full = asyncio.create_task(p.send("t", b"x"))
            await asyncio.sleep(0)

            async def late(name: str, timeout: float) -> None:
                with pytest.raises(idemq.BrokerBusy):
                    await p.send("t", b"late", timeout=timeout)
                ended.append(name)

            async def between() -> None:
                await asyncio.sleep(0.25)
                ended.append("between")

            # With a time of its own for the room, which begins when the first gives up, the second would end at 0.3 s.
            await asyncio.gather(late("first", 0.1), late("second", 0.2), between())
            await link.heal()
            await full
    assert ended == ["first", "second", "between"]


@run
async def test_cancelled_questions_are_not_asked() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await b.stop()
        tasks = [asyncio.create_task(mq.create_topic(f"t{n}")) for n in range(5)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await b.start()
        await mq.ping()
        assert await mq.topics() == []


@run
async def test_whoever_waits_for_room_comes_before_a_newcomer() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer(batch_bytes=1, in_flight=1) as p:
        await mq.create_topic("t")
        await p.send("t", b"warm")

        async def first() -> None:
            await p.send("t", b"first")
            await p.send("t", b"newcomer")

        await asyncio.gather(first(), *[p.send("t", b"%d" % n) for n in range(3)])
        assert await log(b.url, "t") == [b"warm", b"first", b"0", b"1", b"2", b"newcomer"]


@run
async def test_a_store_that_is_full_for_a_while() -> None:
    disk = Disk()
    async with broker(disk) as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        await p.send("t", b"0")
        disk.full = True
        sends = [asyncio.create_task(p.send("t", b"%d" % n)) for n in range(1, 4)]
        await eventually(lambda: b.server.counts.group_commit_failures >= 2)
        with pytest.raises(OutcomeUnknown):
            await p.send("t", b"4", timeout=0.05)
        disk.full = False
        assert [(await one).offset for one in sends] == [1, 2, 3]
        await p.flush()
        assert await log(b.url, "t") == [b"%d" % n for n in range(5)]


@run
async def test_linger_fills_batches_and_flush_does_not_wait() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer(linger=60.0) as p:
        await mq.create_topic("t")
        sends = [asyncio.create_task(p.send("t", b"%d" % n)) for n in range(3)]
        await asyncio.sleep(0.05)
        assert not any(send.done() for send in sends)
        await p.flush()
        assert [(await one).offset for one in sends] == [0, 1, 2]
        assert b.server.counts.batches == 1


@run
async def test_a_failure_nobody_waited_for_is_told_when_leaving() -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        for leave in ("producer", "client"):
            inner = await idemq.connect(b.url)
            p = inner.producer("p")
            await p.__aenter__()
            await p.send("t", b"warm")
            sending = asyncio.create_task(p.send("gone", b"x"))
            await asyncio.sleep(0)
            sending.cancel()
            with pytest.raises(idemq.UnknownTopic):
                await (p.close() if leave == "producer" else inner.close())
            await inner.close()


# -------------------------------------------------------------------------------------------------------------- close


@run
async def test_leaving_normally_flushes() -> None:
    async with broker() as b, nothing_left():
        async with idemq.connect(b.url) as mq:
            await mq.create_topic("t")
            p = mq.producer(linger=60.0)
            sends = [asyncio.create_task(p.send("t", b"%d" % n)) for n in range(3)]
            await asyncio.sleep(0)
        assert [(await one).offset for one in sends] == [0, 1, 2]
        with pytest.raises(idemq.ClientClosed):
            await p.send("t", b"late")
        with pytest.raises(idemq.ClientClosed):
            await mq.send("t", b"late")
        with pytest.raises(idemq.ClientClosed):
            mq.producer()
        with pytest.raises(idemq.ClientClosed):
            mq.subscribe("t")
        await eventually(lambda: b.server.core.connections == 0)


@run
async def test_a_second_close_does_not_end_the_flush_of_the_first() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link:
        mq = await idemq.connect(link.url)
        await mq.create_topic("t")
        await mq.send("t", b"0")
        link.stall()
        sending = asyncio.create_task(mq.send("t", b"1"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(mq.close())
        await asyncio.sleep(0)
        await mq.close()
        await link.heal()
        await closing
        assert (await sending).seq == 1


@pytest.mark.parametrize("producers", [1, 100])
@run
async def test_leaving_with_a_dead_broker_is_bounded_and_says_what_is_unresolved(producers: int) -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, nothing_left():
        sends = []
        with pytest.raises(OutcomeUnknown, match="not answered"):
            async with idemq.connect(link.url, timeout=1.0) as mq:
                await mq.create_topic("t")
                all_of_them = [mq.producer() for _ in range(producers)]
                for p in all_of_them:
                    await p.send("t", b"warm")
                link.stall()
                sends = [asyncio.create_task(p.send("t", b"x", timeout=1000)) for p in all_of_them]
                await asyncio.sleep(0)
                # All producers have this second together: one after the other they would outlast the test.
        for send in sends:
            with pytest.raises(OutcomeUnknown):
                await send
        await link.heal()


@run
async def test_leaving_by_exception_gives_up_soon_and_keeps_the_exception() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, nothing_left():
        with pytest.raises(ZeroDivisionError) as caught:
            async with idemq.connect(link.url, timeout=1000.0) as mq, mq.producer("p") as p:
                await mq.create_topic("t")
                await p.send("t", b"warm")
                link.stall()
                asyncio.create_task(p.send("t", b"x")).add_done_callback(lambda task: task.exception())
                await asyncio.sleep(0)
                raise ZeroDivisionError
        assert any("not answered" in note for note in caught.value.__notes__)
        await link.heal()


@run
async def test_closing_while_connecting_and_while_reading() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link, nothing_left():
        link.stall()
        connecting = asyncio.create_task(idemq.connect(link.url)._connect())
        await asyncio.sleep(0.01)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await link.heal()
        mq = await idemq.connect(link.url)
        await mq.create_topic("t")
        sub = mq.subscribe("t")
        reading = asyncio.create_task(take(aiter(sub), 1))
        await eventually(lambda: bool(sub.assigned))
        await mq.close()
        with pytest.raises(idemq.ClientClosed):
            await reading


# ------------------------------------------------------------------------------------------------------- network faults


@run
async def test_a_broker_that_comes_back() -> None:
    async with broker() as b, idemq.connect(b.url) as mq, mq.producer("p") as p:
        await mq.create_topic("t")
        async with mq.subscribe("t") as sub:
            for n in range(3):
                sends = [asyncio.create_task(p.send("t", b"%d.%d" % (n, k))) for k in range(5)]
                await b.restart()
                assert [(await one).offset for one in sends] == list(range(5 * n, 5 * n + 5))
                assert [one.offset for one in await take(aiter(sub), 5)] == list(range(5 * n, 5 * n + 5))
                assert await mq.ping()
        assert p.epoch == (await mq.describe_producer("p")).epoch, "a reconnect is no opening"


@run
async def test_another_data_directory_is_refused() -> None:
    async with broker() as b:
        mq = await idemq.connect(b.url)
        await mq.create_topic("t")
        p = mq.producer("p")
        await p.__aenter__()
        await p.send("t", b"x")
        sub = mq.subscribe("t", start="latest")
        await sub.open()
        await b.restart(Disk(incarnation=b"\x01" * 16))
        for call in (mq.ping(), p.send("t", b"z"), mq.send("t", b"z"), take(aiter(sub), 1)):
            with pytest.raises(idemq.StoreReplaced):
                await call
        await mq.close()


@run
async def test_a_data_directory_that_went_back_in_time_is_refused() -> None:
    async with broker() as b:
        mq = await idemq.connect(b.url)
        await mq.create_topic("t")
        older = b.store.copy()
        await mq.send("t", b"x")
        await b.restart()
        await mq.ping()
        await b.restart(older)
        with pytest.raises(idemq.StoreReplaced):
            await mq.ping()
        await mq.close()


async def script(url: str, name: str) -> list[Any]:
    """A little of everything; returns all results, without times and without what a retry rightly changes."""
    records = [Record(b"%d" % n, seq=n, partition=1) for n in range(2, 8)]
    async with idemq.connect(url, timeout=50) as mq:
        made = await mq.create_topic(name, partitions=2)
        receipts = [await mq.send(name, b"anonymous", partition=0)]
        async with mq.producer(name) as p:
            receipts.append(await p.send(name, b"0", seq=0, partition=0, key=b"k"))
            async with p.transaction() as tx:
                tx.send(name, b"1", seq=1, partition=0)
                tx.set_token(b"token")
            summary = await p.send_many(name, records)
        async with mq.producer(name) as p:
            opened = (p.last_seq, p.token)
        read_back = [(message.partition, message.offset, message.value) for message in await read(mq, name)]
        await mq.purge_topic(name)
        ends = [(one.earliest, one.next) for one in (await mq.describe_topic(name)).partitions]
        await mq.delete_producer(name)
    places = [(one.partition, one.offset, one.seq) for one in [*receipts, *tx.receipts]]
    total = (summary.stored + summary.duplicates, summary.last_seq)
    return [len(made.partitions), places, total, opened, sorted(read_back), ends]


EXPECTED: list[Any] = [
    2,
    [(0, 0, 0), (0, 1, 0), (0, 2, 1)],
    (6, 7),
    (7, b"token"),
    [(0, 0, b"anonymous"), (0, 1, b"0"), (0, 2, b"1"), *[(1, n - 2, b"%d" % n) for n in range(2, 8)]],
    [(3, 3), (6, 6)],
]


@pytest.mark.parametrize("direction", ["replies", "requests"])
@run
async def test_cut_at_every_byte_results_equal_and_log_exact(direction: str) -> None:
    async with broker() as b:
        async with Link("127.0.0.1", b.port) as link:
            assert await script(link.url, "t-clean") == EXPECTED
            total = link.counts.bytes_replies if direction == "replies" else link.counts.bytes_requests
        assert total > 500
        at_once = asyncio.Semaphore(48)
        cuts = 0

        async def cut_at(count: int) -> None:
            nonlocal cuts
            async with at_once, Link("127.0.0.1", b.port) as link:
                arm = link.cut_reply_at if direction == "replies" else link.cut_request_at
                arm(count)
                assert await script(link.url, f"t-{count:05}") == EXPECTED, f"cut at byte {count} of {direction}"
                cuts += link.counts.cuts

        await asyncio.gather(*[cut_at(count) for count in range(0, total, 1 if direction == "replies" else 3)])
        assert cuts >= total * 0.9 / (1 if direction == "replies" else 3)


@run
async def test_bytes_of_old_connections_that_arrive_late() -> None:
    """What an old connection had sent reaches the broker behind its successor: refused, and nothing stored twice."""
    async with broker() as b, Link("127.0.0.1", b.port, seed=3) as link, idemq.connect(link.url) as mq:
        await mq.create_topic("t")
        async with mq.producer("p") as p:
            for n in range(8):
                link.hold_requests(count=n, late_replies=n % 3, current=True)
                assert (await p.send("t", b"%d" % n)).seq == n
            await link.heal()
        assert link.counts.late_deliveries > 0
        assert await log(b.url, "t") == [b"%d" % n for n in range(8)]


# ------------------------------------------------------------------------------------------------------------- errors


def tree(root: Any) -> set[Any]:
    return {root} | {one for child in root.__subclasses__() for one in tree(child)}


@pytest.mark.parametrize("code", list(Code))
def test_every_refusal_has_its_exception(code: Code) -> None:
    error = errors.from_refusal(Failed(code, "the text", {"k": 1}))
    assert (error.code, error.text, error.details) == (code, "the text", {"k": 1})
    assert error.remedy
    assert error.remedy == wire.REMEDIES[code].remedy
    assert str(error) == f"{code}: the text. {error.remedy}"
    retriable = isinstance(error, idemq.RetriableError)
    assert retriable or not wire.REMEDIES[code].retriable


def test_what_the_client_itself_finds_has_its_own_remedy() -> None:
    assert str(idemq.InvalidRequest("no.")) == "BAD_REQUEST: no. Correct the call."
    assert str(idemq.UnknownProducer("none")) == "UNKNOWN_PRODUCER: none. See the names: idemq producer ls."
    with pytest.raises(idemq.MessageTooLarge, match=r"at most 8388608 are allowed\. Split it, or store it elsewhere"):
        records.check_record(bytes(wire.MESSAGE_BYTES_MAX + 1), None, None)
    assert idemq.BrokerBusy("full").remedy == wire.REMEDIES[Code.BUSY].remedy
    assert str(idemq.IdemqError("just this")) == "ERROR: just this"
    for record in (("text", None), (b"", "text")):
        with pytest.raises(idemq.InvalidRequest, match=r"must be bytes, not str: use \.encode\(\)\. Correct"):
            records.check_record(*record, None)
    with pytest.raises(idemq.InvalidRequest, match=r"must be bytes, not int\. Correct"):
        records.check_record(1, None, None)


def test_an_unknown_refusal_is_fatal_and_named() -> None:
    error = errors.from_refusal(Failed("FROM_THE_FUTURE", "text"))
    assert (type(error), error.code) == (idemq.FatalError, "FROM_THE_FUTURE")


def test_the_tree_is_the_contracts() -> None:
    contract = {
        idemq.RetriableError: "ConnectionLost BrokerBusy StoreFull QuotaExceeded",
        idemq.TransactionAborted: "LeaseLost OffsetConflict",
        idemq.FatalError: "AuthError PermissionDenied InvalidRequest UnknownTopic UnknownGroup UnknownProducer "
        "TopicExists MessageTooLarge TransactionTooLarge SequenceGap SequenceConflict ChecksumMismatch OffsetTruncated "
        "ProtocolMismatch StoreReplaced CircuitOpen HandlerTimeout Unsupported ClientClosed",
        idemq.IdemqError: "RetriableError OutcomeUnknown TransactionAborted ProducerFenced FatalError",
    }
    for base, names in contract.items():
        for name in names.split():
            assert base in getattr(idemq, name).__mro__, name
    assert issubclass(OutcomeUnknown, TimeoutError)
    ours = {
        one for one in tree(idemq.IdemqError) if not one.__name__.startswith("_") and one.__module__ == errors.__name__
    }
    assert ours == {getattr(idemq, name) for names in contract.values() for name in names.split()} | {idemq.IdemqError}
    codes = {one: one("text").code for one in ours}
    assert len(set(codes.values())) == len(codes), "a code names one exception"
    assert [one for one in ours if not one("text").remedy] == [idemq.IdemqError], "which nobody raises"


def test_errors_carry_what_programs_need() -> None:
    assert errors.LeaseLost("x", details={"topic_id": 3, "partition": 1}).partitions == [(3, 1)]
    assert errors.OffsetConflict("x", details={"next": 7}).expected == 7
    assert errors.OffsetTruncated("x", details={"missed": 9}).missed == 9


@run
async def test_damage_on_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with broker() as b, idemq.connect(b.url) as mq:
        await mq.create_topic("t")
        await mq.send("t", b"value")
        original: Callable[..., Any] = MemoryStore.read

        def damaged(self: MemoryStore, *arguments: Any) -> Any:
            return [(offset, stamp, batch[:-1] + b"!") for offset, stamp, batch in original(self, *arguments)]

        monkeypatch.setattr(MemoryStore, "read", damaged)
        async with mq.subscribe("t") as sub:
            with pytest.raises(idemq.ChecksumMismatch):
                await take(aiter(sub), 1)
