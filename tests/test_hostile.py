"""Hostile input and exhausted resources: refused by a stable code, nothing stored, neighbours unharmed, memory bounded.

Each test of the socket kind keeps a good client working on the same broker: it is the measure of harm.
"""

import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import lmdb
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idemq.broker import server as server_module
from idemq.broker.core import Connection, Core, Limits, Now
from idemq.broker.store import MemoryStore, Store
from idemq.client import wire
from idemq.client.wire import (
    Append,
    Code,
    Commit,
    Committed,
    CreateTopic,
    Failed,
    Fetch,
    Hello,
    Metadata,
    Open,
    Ping,
    Pong,
    Range,
    Settings,
    WireError,
)

from .raw import TIMEOUT_S, Closed, Raw, Running
from .rows import producer_rows
from .test_server import Held, start, stored_bodies, wait_for

HELLO = wire.encode(1, Hello(wire.VERSION, "test"))


def frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", 4 + len(header) + len(payload), len(header)) + header + payload


def packed(*parts: Any) -> bytes:
    packed_parts: bytes = msgpack.packb(list(parts))
    return frame(packed_parts)


@contextmanager
def unharmed(**settings: Any) -> Iterator[tuple[Running, Raw]]:
    """A broker with a good client. Afterwards the client still works, and only its own records are stored."""
    with Running(MemoryStore(), **settings) as running, running.connect() as good:
        good.create("good")
        good.open("good")
        assert isinstance(good.call(*good.commit(0, b"before")), Committed)
        before = (running.store.counter(), list(running.store.topics()), running.store.producer_count())
        yield running, good
        assert (running.store.counter(), list(running.store.topics()), running.store.producer_count()) == before
        assert isinstance(good.call(*good.commit(1, b"after")), Committed)
        assert stored_bodies(good) == [b"before", b"after"]
        assert not running.failed


def refusal(client: Raw) -> Failed:
    failed = client.expect()[1]
    assert isinstance(failed, Failed)
    assert failed.text
    Code(failed.code)
    return failed


# ------------------------------------------------------------------------------------------------- before the handshake

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303"),
    "redis": b"*1\r\n$4\r\nPING\r\n",
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "text": b"hello world, are you a broker?\n",
    "a frame of 4 GiB": struct.pack(">II", 0xFFFFFFFF, 10),
    "a frame of 3 bytes": struct.pack(">II", 3, 0),
    "a header longer than its frame": struct.pack(">II", 10, 100) + bytes(10),
    "larger than a Hello may be": frame(msgpack.packb([1, 1, [1, "x" * 5000, ""]])),
    "no msgpack": frame(b"\xc1\xc1\xc1"),
    "an empty header": frame(b""),
    "trailing bytes": frame(msgpack.packb([1, 1, [1, "x", ""]]) + b"\x00"),
    "bad UTF-8": frame(b"\x93\x01\x01\x93\x01\xa2\xff\xff\xa0"),
    "deep nesting": frame(b"\x91" * 3000),
    "a lying array": frame(b"\xdd\xff\xff\xff\xff"),
    "a lying string": frame(b"\x93\x01\x01\xdb\xff\xff\xff\xff"),
    "an ext type": packed(1, 1, [1, msgpack.ExtType(5, b"x"), ""]),
    "a map": packed(1, 1, {"version": 1}),
    "a duplicate key": frame(b"\x93\x01\x01\x82\xa1a\x01\xa1a\x02"),
    "a code that is no integer": packed("Hello", 1, [1, "x", ""]),
    "a correlation below zero": packed(1, -1, [1, "x", ""]),
    "a correlation of 2^63": packed(1, 2**63, [1, "x", ""]),
    "a correlation that is a bool": packed(1, True, [1, "x", ""]),
    "version as a bool": packed(1, 1, [True, "x", ""]),
    "version as a float": packed(1, 1, [1.0, "x", ""]),
    "no version": packed(1, 1, []),
    "an unknown request": packed(63, 1, []),
    "a token of the wrong type": packed(1, 1, [1, "x", 5]),
    "a reply": wire.encode(1, wire.Done()),
}


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("tail", [b"", b"\x00" * 300_000], ids=["", "more"])
def test_garbage_instead_of_hello_is_told_and_closed(name: str, tail: bytes) -> None:
    with unharmed() as (running, _), running.connect(bare=True) as client:
        client.socket.sendall(GARBAGE[name] + tail)
        assert refusal(client).code in (
            Code.BAD_REQUEST,
            Code.TOO_LARGE,
            Code.PROTOCOL_MISMATCH,
            Code.UNSUPPORTED,
        )
        client.expect_closed()


def test_what_speaks_http_is_told_where_it_is() -> None:
    with unharmed() as (running, _), running.connect(bare=True) as client:
        client.socket.sendall(GARBAGE["http"])
        assert "not the Hello of an idemq client" in refusal(client).text
        client.expect_closed()


def test_a_refused_sender_learns_why_though_it_goes_on_sending() -> None:
    with unharmed() as (running, _), running.connect(bare=True) as client:
        client.socket.sendall(b"\xff" * 100 + bytes(20 << 20))
        assert refusal(client).code == Code.TOO_LARGE
        client.expect_closed()


@pytest.mark.parametrize("version", [0, 2, 2**63 - 1])
def test_another_version_is_refused_by_its_code(version: int) -> None:
    with unharmed() as (running, _), running.connect(bare=True) as client:
        client.send(Hello(version, "test"))
        failed = refusal(client)
        assert failed.code == Code.PROTOCOL_MISMATCH
        assert str(wire.VERSION) in failed.text
        client.expect_closed()


@pytest.mark.parametrize("request_type", [request for request in wire.REQUESTS if request is not Hello])
def test_every_request_before_hello_is_refused(request_type: type[Any]) -> None:
    sample = SAMPLES[request_type]
    with unharmed() as (running, _), running.connect(bare=True) as client:
        client.send(sample)
        assert refusal(client).code == Code.BAD_REQUEST
        client.expect_closed()


def test_a_second_hello_is_refused_and_closed() -> None:
    with unharmed() as (running, _), running.connect() as client:
        client.send(Hello(wire.VERSION, "test"))
        assert refusal(client).code == Code.BAD_REQUEST
        client.expect_closed()


SAMPLES: dict[type[Any], Any] = {
    Ping: Ping(),
    Commit: Commit(0, 0, -1, 0),
    Open: Open("p", "s", 0),
    wire.Heartbeat: wire.Heartbeat("g", "m", [1], []),
    wire.Seek: wire.Seek("g", 1, 0, "n", 0, 0),
    wire.Offsets: wire.Offsets(None),
    wire.Members: wire.Members(None),
    wire.DeleteOffsets: wire.DeleteOffsets("g", 1),
    CreateTopic: CreateTopic("stolen", 1, Settings()),
    wire.AlterTopic: wire.AlterTopic(1, 1, Settings()),
    wire.DeleteTopic: wire.DeleteTopic(1),
    wire.PurgeTopic: wire.PurgeTopic(1, [0]),
    Metadata: Metadata(None),
    Fetch: Fetch([Range(1, 0, 0)], 100, 0),
    wire.OffsetAt: wire.OffsetAt(1, 0, 0),
    wire.Producers: wire.Producers(None),
    wire.DeleteProducer: wire.DeleteProducer(2, 2),
}


# -------------------------------------------------------------------------------------------------- after the handshake

WRONG_FIELDS: dict[str, tuple[int, list[Any]]] = {
    "an offset below zero": (11, [[[1, 0, -1]], 100, 0]),
    "an offset of 2^63": (11, [[[1, 0, 2**63]], 100, 0]),
    "an offset of 2^64-1": (11, [[[1, 0, 2**64 - 1]], 100, 0]),
    "an offset that is NaN": (11, [[[1, 0, float("nan")]], 100, 0]),
    "an offset that is a float": (11, [[[1, 0, 1.0]], 100, 0]),
    "an offset that is a bool": (11, [[[1, 0, True]], 100, 0]),
    "an offset that is null": (11, [[[1, 0, None]], 100, 0]),
    "a partition below zero": (11, [[[1, -1, 0]], 100, 0]),
    "a partition of 1024": (11, [[[1, 1024, 0]], 100, 0]),
    "topic 0": (11, [[[0, 0, 0]], 100, 0]),
    "no bytes": (11, [[[1, 0, 0]], 0, 0]),
    "more bytes than a fetch may have": (11, [[[1, 0, 0]], wire.FETCH_BYTES_MAX + 1, 0]),
    "a wait too long": (11, [[[1, 0, 0]], 100, wire.WAIT_MS_MAX + 1]),
    "too many ranges": (11, [[[1, 0, 0]] * (wire.APPENDS_MAX + 1), 100, 0]),
    "a range that is a number": (11, [[7], 100, 0]),
    "ranges that are a map": (11, [{"a": 1}, 100, 0]),
    "too few fields": (11, [[]]),
    "fields that are a map": (11, {"ranges": 1}),  # type: ignore[dict-item]
    "a number of -2": (3, [0, 0, -2, 0]),
    "a last number of 2^63": (3, [0, 0, -1, 2**63]),
    "an empty name": (4, ["", "s", 0]),
    "a name with a line end": (4, ["a\nb", "s", 0]),
    "a name too long": (4, ["x" * 201, "s", 0]),
    "a name that is bytes": (4, [b"x", "s", 0]),
    "a flag that is 1": (4, ["n", "s", 0, 1]),
    "a topic with a slash": (6, ["a/b", 1, []]),
    "a topic with no partition": (6, ["t", 0, []]),
    "a topic with 1025 partitions": (6, ["t", 1025, []]),
    "a retention of 0": (6, ["t", 1, [0]]),
    "a retention that is text": (6, ["t", 1, ["7d"]]),
    "too many names": (10, [["x"] * (wire.NAMES_MAX + 1)]),
    "a surrogate": (4, ["\ud800", "s", 0]),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_wrong_field_is_refused_and_the_connection_lives(name: str) -> None:
    code, fields = WRONG_FIELDS[name]
    header: bytes = msgpack.packb([code, 77, fields], unicode_errors="surrogatepass")
    with unharmed() as (running, _), running.connect() as client:
        client.socket.sendall(frame(header))
        if name == "a surrogate":  # no UTF-8 at all: the header cannot be read, so nothing behind it can be trusted
            assert refusal(client).code == Code.BAD_REQUEST
            client.expect_closed()
            return
        correlation, failed, _ = client.expect()
        assert (correlation, type(failed), failed.code) == (77, Failed, Code.BAD_REQUEST)
        assert isinstance(client.call(Ping()), Pong)


def test_an_unknown_request_is_refused_and_the_connection_lives() -> None:
    with unharmed() as (running, _), running.connect() as client:
        for code in (0, 60, 200, 2**40, -5):
            client.socket.sendall(packed(code, 5, []))
            assert refusal(client).code == Code.UNSUPPORTED
        assert isinstance(client.call(Ping()), Pong)


def test_fields_of_a_newer_peer_count_for_nothing() -> None:
    with unharmed() as (running, _), running.connect() as client:
        client.socket.sendall(packed(2, 5, ["new", 1, None]))
        assert isinstance(client.expect()[1], Pong)


def test_a_reply_is_not_a_request() -> None:
    with unharmed() as (running, _), running.connect() as client:
        client.send(wire.Done())
        assert refusal(client).code == Code.BAD_REQUEST
        client.expect_closed()


def batch_of(client: Raw, **changes: int) -> bytes:
    assert client.producer is not None
    fields = {
        "codec": 0,
        "count": 1,
        "topic_id": client.topic_id,
        "partition": 0,
        "producer_id": client.producer.producer_id,
        "first_seq": 1,
        "last_seq": 1,
    }
    return wire.make_batch(**{**fields, **changes}, body=b"body")


BAD_BATCHES: dict[str, dict[str, int]] = {
    "no records": {"count": 0},
    "more records than numbers": {"count": 2},
    "2^32-1 records": {"count": 2**32 - 1},
    "numbers the commit does not take": {"first_seq": 5, "last_seq": 5},
    "numbers that go back": {"first_seq": 1, "last_seq": 0},
    "another topic": {"topic_id": 99},
    "another partition": {"partition": 1},
    "another producer": {"producer_id": 99},
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_batch_that_contradicts_its_commit_is_refused(name: str) -> None:
    with unharmed() as (_, good):
        batch = batch_of(good, **BAD_BATCHES[name])
        assert good.producer is not None
        commit = Commit(good.producer.producer_id, good.producer.epoch, 0, 1, [Append(good.topic_id, 0, len(batch))])
        assert good.call(commit, batch).code == Code.BAD_REQUEST


def test_damaged_bytes_are_refused_and_close_the_connection() -> None:
    with unharmed() as (running, good), running.connect() as client:
        client.topic_id, client.producer = good.topic_id, good.producer
        batch = batch_of(good)
        for position in (0, 4, 10, len(batch) - 1):
            damaged = bytearray(batch)
            damaged[position] ^= 1
            with running.connect() as one:
                one.topic_id, one.producer = good.topic_id, good.producer
                commit, _ = one.commit(1)
                one.send(commit, bytes(damaged))
                assert refusal(one).code in (Code.CHECKSUM_MISMATCH, Code.BAD_REQUEST)
                if position != 4:  # the format's byte is looked at first: what it is decides what the checksum covers
                    one.expect_closed()
        # The fence remembers the newer connections, so the good client goes on from a newer one (rule 4).
        good.socket.close()
        good.__init__(running.address)  # type: ignore[misc]
        good.create("good")
        good.producer = client.producer


@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_lengths_that_do_not_add_up(change: int) -> None:
    with unharmed() as (_, good):
        batch = batch_of(good)
        assert good.producer is not None
        append = Append(good.topic_id, 0, len(batch) + change)
        commit = Commit(good.producer.producer_id, good.producer.epoch, 0, 1, [append])
        assert good.call(commit, batch).code == Code.BAD_REQUEST


def test_a_commit_too_large_is_refused() -> None:
    with unharmed() as (_, good):
        assert good.producer is not None
        half = wire.COMMIT_BYTES_MAX // 2 + 1
        batches = [
            wire.make_batch(0, 1, good.topic_id, 0, good.producer.producer_id, number, number, bytes(half))
            for number in (1, 2)
        ]
        appends = [Append(good.topic_id, 0, len(batch)) for batch in batches]
        commit = Commit(good.producer.producer_id, good.producer.epoch, 0, 2, appends)
        assert good.call(commit, b"".join(batches)).code == Code.TOO_LARGE


def test_a_frame_too_large_is_refused_before_its_body_arrives() -> None:
    with unharmed() as (running, _), running.connect() as client:
        client.socket.sendall(struct.pack(">II", wire.FRAME_BYTES_MAX + 1, 10))
        assert refusal(client).code == Code.TOO_LARGE
        client.expect_closed()


def test_topics_that_never_were_or_are_gone() -> None:
    with unharmed() as (_, good):
        assert good.producer is not None
        for topic_id in (12345, wire.NUMBER_MAX):
            batch = batch_of(good, topic_id=topic_id)
            append = Append(topic_id, 0, len(batch))
            commit = Commit(good.producer.producer_id, good.producer.epoch, 0, 1, [append])
            assert good.call(commit, batch).code == Code.UNKNOWN_TOPIC
            part = good.call(Fetch([Range(topic_id, 0, 0)], 100, 0)).parts[0]
            assert part.code == Code.UNKNOWN_TOPIC
        part = good.call(Fetch([Range(good.topic_id, 0, wire.NUMBER_MAX)], 100, 0)).parts[0]
        assert part.code == Code.BAD_REQUEST
        part = good.call(Fetch([Range(good.topic_id, 7, 0)], 100, 0)).parts[0]
        assert part.code == Code.UNKNOWN_TOPIC


def test_bytes_for_a_topic_do_not_land_in_its_namesake() -> None:
    with Running(MemoryStore()) as running, running.connect() as client:
        old = client.create("t")
        client.open()
        commit, batch = client.commit(0)
        client.call(wire.DeleteTopic(old))
        new = client.create("t")
        assert new != old
        assert client.call(commit, batch).code == Code.UNKNOWN_TOPIC
        assert stored_bodies(client) == []


def test_one_byte_in_each_segment() -> None:
    with unharmed() as (running, good), running.connect(bare=True) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = HELLO + wire.encode(2, Ping()) + wire.encode(3, Fetch([Range(good.topic_id, 0, 0)], 1000, 0))
        for position in range(len(data)):
            client.socket.sendall(data[position : position + 1])
        replies = [client.expect()[:2] for _ in range(3)]
        assert [(correlation, type(reply)) for correlation, reply in replies] == [
            (1, wire.Welcome),
            (2, Pong),
            (3, wire.Fetched),
        ]


def test_truncated_at_every_byte() -> None:
    with unharmed() as (running, good):
        commit, batch = good.commit(1, b"torn")
        data = HELLO + wire.encode(2, commit, len(batch)) + batch
        for length in range(1, len(data), 3):
            with running.connect(bare=True) as client:
                client.socket.sendall(data[:length])
                client.socket.shutdown(socket.SHUT_WR)
                while True:
                    try:
                        client.expect()
                    except Closed:
                        break
        # None of them was whole. (A newer connection of the producer never had a commit decided, so ours still counts.)


def test_a_reset_in_the_middle_of_everything() -> None:
    with unharmed() as (running, good):
        for _ in range(30):
            client = running.connect()
            client.send(Fetch([Range(good.topic_id, 0, 1)], 1000, 30_000))
            client.socket.sendall(wire.encode(9, Metadata(None)) * 20 + b"\x00\x00\x01")
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()


# ------------------------------------------------------------------------------------------------ the slow and the many


def wait_until_closed(client: Raw) -> Failed:
    failed = refusal(client)
    client.expect_closed()
    return failed


def test_no_hello_in_time() -> None:
    with unharmed(handshake_ms_max=200) as (running, _):
        silent = running.connect(bare=True)
        dripping = running.connect(bare=True)
        stop = threading.Event()

        def drip() -> None:
            for byte in HELLO:
                if stop.wait(0.1):
                    return
                try:
                    dripping.socket.sendall(bytes([byte]))
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        for client in (silent, dripping):
            failed = wait_until_closed(client)
            assert failed.code == Code.BAD_REQUEST
            assert "handshake_ms_max" in failed.text
            client.socket.close()
        stop.set()
        thread.join()


def test_a_frame_that_never_ends() -> None:
    """The deadline is absolute for each frame: a byte now and then does not put it off."""
    with unharmed(frame_ms_max=500) as (running, good), running.connect() as client:
        commit, batch = good.commit(1, b"x" * 10_000)
        data = wire.encode(2, commit, len(batch)) + batch
        stop = threading.Event()

        def drip() -> None:
            for byte in data:
                if stop.wait(0.05):
                    return
                try:
                    client.socket.sendall(bytes([byte]))
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert "frame_ms_max" in wait_until_closed(client).text
        stop.set()
        thread.join()


def test_slow_frames_one_after_the_other_are_no_slow_frame() -> None:
    """Always in the middle of a frame for longer than the deadline, but each ends in time."""
    with unharmed(frame_ms_max=1500) as (running, _), running.connect() as client:
        ping = wire.encode(2, Ping())
        half = len(ping) // 2
        client.socket.sendall(ping[:half])
        began = time.monotonic()
        while time.monotonic() - began < 3:
            time.sleep(0.2)
            client.socket.sendall(ping[half:] + ping[:half])
            assert isinstance(client.expect()[1], Pong)


def test_a_client_that_never_reads_is_disconnected() -> None:
    with (
        Running(MemoryStore(), send_stall_ms_max=500, send_buffer_bytes=64 << 10) as running,
        running.connect() as good,
        running.connect() as client,
    ):
        good.create()
        good.open()
        for number in range(8):
            good.call(*good.commit(number, b"x" * (1 << 20)))
        peer = next(p for p in running.server._peers.values() if p.connection.serial == 2)
        fetch = wire.encode(5, Fetch([Range(good.topic_id, 0, 0)], wire.FETCH_BYTES_MAX, 0))
        client.socket.sendall(fetch * 60)
        deadline = time.monotonic() + TIMEOUT_S
        unsent = 0
        while not peer.closing and time.monotonic() < deadline:
            unsent = max(unsent, peer._transport.get_write_buffer_size())
            assert isinstance(good.call(Ping()), Pong)
        assert peer.closing
        # One reply beyond the buffer's limit and not sixty.
        assert 1 << 20 < unsent < 12 << 20
        replies = 0
        with suppress(Closed):
            for replies in range(60):  # noqa: B007
                client.expect()
        assert replies < 10


def test_a_client_that_reads_slowly_is_not_disconnected() -> None:
    with (
        Running(MemoryStore(), send_stall_ms_max=1000, send_buffer_bytes=64 << 10) as running,
        running.connect() as good,
        running.connect() as client,
    ):
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        good.create()
        good.open()
        for number in range(8):
            good.call(*good.commit(number, b"x" * (1 << 20)))
        client.send(Fetch([Range(good.topic_id, 0, 0)], wire.FETCH_BYTES_MAX, 0))
        peer = next(p for p in running.server._peers.values() if p.connection.serial == 2)
        wait_for(lambda: peer in running.server.stalls)
        for _ in range(40):
            assert client.socket.recv(64 << 10)
            time.sleep(0.1)
        # What the kernel holds comes even after the end, so the peer is asked.
        assert not peer.closing


def test_half_received_frames_are_bounded_all_together() -> None:
    with unharmed(receive_bytes_max=32 << 20) as (running, _):
        half = struct.pack(">II", 10 << 20, 100) + bytes(9 << 20)
        clients = [running.connect() for _ in range(5)]
        refused = 0
        for client in clients:
            try:
                client.socket.sendall(half)
            except OSError:
                refused += 1
            time.sleep(0.05)
        wait_for(lambda: running.server.counts.refusals["BUSY"] >= 1)
        assert running.server.buffered_bytes <= 33 << 20
        for client in clients:
            client.socket.close()
        wait_for(lambda: running.server.buffered_bytes == 0)


def test_one_connection_too_many_is_told() -> None:
    with unharmed(connections_max=5) as (running, _):
        clients = [running.connect() for _ in range(4)]
        with running.connect(bare=True) as extra:
            failed = wait_until_closed(extra)
            assert failed.code == Code.BUSY
            assert "connections_max" in failed.text
        clients.pop().socket.close()
        wait_for(lambda: running.server.core.connections == 4)
        with running.connect() as client:
            assert isinstance(client.call(Ping()), Pong)
        for client in clients:
            client.socket.close()


def test_refused_connections_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LINGERING_MAX", 4)
    with unharmed() as (running, _):
        clients = [running.connect(bare=True) for _ in range(20)]
        wait_for(lambda: running.server.core.connections == 21)
        lingering: list[int] = []

        def refuse_all() -> None:
            """In one turn of the loop, as it happens when they all send at once."""
            for peer in list(running.server.handshakes):
                peer.refuse("go away")
            lingering.append(len(running.server.lingering))

        running.loop.call_soon_threadsafe(refuse_all)
        wait_for(lambda: lingering)
        assert lingering == [4]
        assert running.server.core.connections == 1
        for client in clients:
            client.socket.close()


def test_hundreds_of_idle_strangers_go_and_leave_nothing() -> None:
    with unharmed(handshake_ms_max=300) as (running, good):
        strangers = [running.connect(bare=True) for _ in range(300)]
        for stranger in strangers:
            stranger.socket.sendall(b"\x00\x00\x01")
        deadline = time.monotonic() + TIMEOUT_S
        while (running.server.core.connections > 1 or running.server.lingering) and time.monotonic() < deadline:
            assert isinstance(good.call(Ping()), Pong)
            time.sleep(0.02)
        server = running.server
        assert (server.core.connections, len(server._peers), server.buffered_bytes) == (1, 1, 0)
        assert [len(each) for each in (server.handshakes, server.frames, server.stalls, server.lingering)] == [0] * 4
        for stranger in strangers:
            stranger.socket.close()


def test_the_loop_answers_while_the_disk_hangs() -> None:
    store = Held()
    with Running(store) as running, running.connect() as writer, running.connect() as other:
        writer.create()
        writer.open()
        store.hold()
        writer.send(*writer.commit(0))
        assert store.waiting.wait(TIMEOUT_S)
        for _ in range(100):
            assert isinstance(other.call(Ping()), Pong)
        assert running.get("/healthz")[0] == 200
        with running.connect() as new:
            assert isinstance(new.call(Ping()), Pong)
        store.go.set()
        assert isinstance(writer.expect()[1], Committed)


def anonymous_kb(pid: int) -> int:
    """VmRSS counts the LMDB map; what a peer can make us take is anonymous."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.process
def test_memory_stays_bounded_under_abuse(tmp_path: Path) -> None:
    process, address, _ = start(tmp_path / "data")
    with Raw(address) as good:
        good.create("t", 1000)
        good.open()
        before = anonymous_kb(process.pid)
        assert before < 80 << 10
        empty_arrays = b"\x93\x0b\x01\xdd" + struct.pack(">I", 1_000_000) + b"\x90" * 1_000_000
        maps = b"\x93\x0b\x01\xdd" + struct.pack(">I", 100_000) + b"\x81\xa1a\x80" * 100_000
        for attack in (
            frame(empty_arrays),
            frame(maps),
            frame(b"\x91" * 900_000),
            wire.encode(1, Metadata(None)) * 20_000,
            wire.encode(1, Fetch([Range(good.topic_id, n, 0) for n in range(1000)], 100, 60_000)) * 300,
            struct.pack(">II", wire.FRAME_BYTES_MAX, 100) + bytes(15 << 20),
            packed(63, 1, []) * 100_000,
        ):
            for _ in range(2):
                with Raw(address) as client:
                    client.socket.settimeout(1)
                    try:
                        client.socket.sendall(attack)
                    except (TimeoutError, OSError):
                        continue  # it stopped reading us, or closed: both are an answer
            assert isinstance(good.call(Ping()), Pong)
        assert isinstance(good.call(*good.commit(0)), Committed)
        assert anonymous_kb(process.pid) - before < 150 << 10
    process.terminate()
    assert process.communicate(timeout=TIMEOUT_S) == ("", "")


@pytest.mark.process
def test_without_descriptors_the_broker_lives(tmp_path: Path) -> None:
    """It takes as many connections as it has descriptors for, tells the others, and serves on."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160));"
        "from idemq.broker.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "0", "--http-port", "0", "--data-dir", str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = ("127.0.0.1", int(process.stdout.readline().split()[2].split(":")[1]))
    with Raw(address) as good:
        good.create()
        good.open()
        crowd = [Raw(address, bare=True) for _ in range(300)]
        assert isinstance(good.call(*good.commit(0)), Committed)
        for one in crowd:
            one.socket.close()
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                with Raw(address) as client:
                    assert isinstance(client.call(Ping()), Pong)
                break
            except (Closed, AssertionError, OSError):
                time.sleep(0.05)
        else:
            raise AssertionError("no new connection is served")
    process.terminate()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "only 32 connections are taken" in errors


# ----------------------------------------------------------------------------------------------------------------- fuzz

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, -1, -2, 7, 255, 1023, 1024, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
)
JUNK = st.recursive(
    NUMBERS
    | st.booleans()
    | st.none()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.sampled_from(["t", "p", "s", "good", "delete"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
VALID = [
    Hello(wire.VERSION, "c"),
    *SAMPLES.values(),
    Commit(2, 2, -1, 1, [Append(1, 0, 54)], [wire.Offset("g", 1, 0, 3, 0, 1)], b"t"),
    wire.DeleteProducer(1, 1),
    wire.AlterTopic(1, 3, Settings(retention_ms=5)),
]


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A valid header with one or a few of its values replaced; sometimes anything at all."""
    parts = plain(msgpack.unpackb(wire.encode(1, draw(st.sampled_from(VALID)))[8:], strict_map_key=False))
    for _ in range(draw(st.integers(0, 3))):
        place = parts
        while True:
            index = draw(st.integers(0, len(place) - 1))
            if isinstance(place[index], list) and place[index] and draw(st.booleans()):
                place = place[index]
                continue
            place[index] = draw(JUNK)
            break
    data: bytes = msgpack.packb(parts)
    return data


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Frames glued together, with lengths, bytes and ends changed."""
    data = b""
    for _ in range(draw(st.integers(1, 4))):
        header = draw(headers())
        payload = draw(st.binary(max_size=60))
        one = bytearray(frame(header, payload))
        match draw(st.integers(0, 7)):
            case 0:
                position = draw(st.integers(0, len(one) - 1))
                one[position] ^= 1 << draw(st.integers(0, 7))
            case 1:
                struct.pack_into(">I", one, 0, draw(st.sampled_from([0, 3, 4, len(one) - 5, len(one) - 3, 2**32 - 1])))
            case 2:
                struct.pack_into(
                    ">I", one, 4, draw(st.sampled_from([0, 1, len(header) - 1, len(header) + 1, 2**32 - 1]))
                )
            case 3:
                del one[draw(st.integers(0, len(one))) :]
        data += one
    return data


def rows(store: MemoryStore) -> Any:
    """All that is stored."""
    return (
        store.counter(),
        store.space().used_bytes,
        list(store.topics()),
        producer_rows(store, 0, 1000),
        store._offsets,
    )


class Direct:
    """Splitter, decode and core without a socket, with every group committed at once."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.core = Core(self.store, Limits(), "", "test")
        self.now = Now(1_000_000, 2_000_000)
        self.good, self.splitter = self._connection()
        self.feed(self.good, self.splitter, HELLO + wire.encode(2, CreateTopic("t", 2, Settings())))
        self.feed(self.good, self.splitter, wire.encode(3, Open("p", "s", 0)))

    def _connection(self) -> tuple[Connection, wire.Splitter]:
        connection = self.core.connect("here")
        assert isinstance(connection, Connection)
        return connection, wire.Splitter(wire.FRAME_BYTES_MAX)

    def feed(self, connection: Connection, splitter: wire.Splitter, data: bytes) -> list[Any]:
        """What is answered, WireErrors included. Any other exception is the bug that is looked for."""
        answers: list[Any] = []
        try:
            for header, payload in splitter.feed(data):
                try:
                    correlation, request = wire.decode(header)
                except WireError as error:
                    answers.append(error)
                    if error.fatal:
                        return answers
                    continue
                before = None if type(request) in wire.REQUESTS else rows(self.store)
                output = self.core.step(self.now, connection, correlation, request, payload)
                if output is not None:
                    answers.append(output)
                    if before is not None:
                        assert rows(self.store) == before
                answers += self.settle()
        except WireError as error:
            answers.append(error)
        return answers

    def settle(self) -> list[Any]:
        outputs: list[Any] = []
        while (group := self.core.begin()) is not None:
            if group.writes:
                self.store.commit(group)
            outputs += self.core.committed()
        _, due = self.core.tick(self.now)
        return outputs + due


@settings(max_examples=300)
@given(data=streams(), greeted=st.booleans(), cut=st.integers(0, 400))
def test_no_stream_makes_another_exception(data: bytes, greeted: bool, cut: int) -> None:
    direct = Direct()
    connection, splitter = direct._connection()
    if greeted:
        direct.feed(connection, splitter, HELLO)
    before = rows(direct.store)
    answers = direct.feed(connection, splitter, data[:cut])
    if not any(isinstance(answer, WireError) and answer.fatal for answer in answers):
        answers += direct.feed(connection, splitter, data[cut:])
    if not greeted and not any(type(getattr(answer, "message", None)) is wire.Welcome for answer in answers):
        assert rows(direct.store) == before, "a stranger changed something"
    for answer in answers:
        if not isinstance(answer, WireError) and not hasattr(answer, "ranges"):
            wire.decode(wire.encode(answer.correlation, answer.message)[8:])
    # And the neighbour is served.
    [pong] = direct.feed(direct.good, direct.splitter, wire.encode(5, Ping()))
    assert type(pong.message) is Pong


def test_many_damaged_frames() -> None:
    """The same without Hypothesis, and so many more: bytes of valid frames changed, cut, doubled."""
    random = Random(20130101)
    valid = [wire.encode(9, message, 8) + bytes(8) for message in VALID]
    outcomes = {"frame": 0, "refused": 0, "fatal": 0, "waits": 0}
    for _ in range(30_000):
        data = bytearray(random.choice(valid))
        for _ in range(random.randint(1, 3)):
            position = random.randrange(len(data))
            match random.randrange(4):
                case 0:
                    data[position] ^= 1 << random.randrange(8)
                case 1:
                    data[position] = random.choice((0, 1, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xCB, 0xD4, 0xDD, 0xDF, 0xFF))
                case 2:
                    del data[position : position + random.randint(1, 4)]
                case 3:
                    data[position:position] = data[position : position + random.randint(1, 9)]
            if not data:
                break
        splitter = wire.Splitter(wire.FRAME_BYTES_MAX)
        outcome = "waits"
        try:
            for header, _payload in splitter.feed(bytes(data)):
                wire.decode(header)
                outcome = "frame"
        except WireError as error:
            outcome = "fatal" if error.fatal else "refused"
        outcomes[outcome] += 1
    assert min(outcomes.values()) > 500, outcomes


@settings(max_examples=300)
@given(header=headers())
def test_a_refused_request_changes_nothing(header: bytes) -> None:
    direct = Direct()
    connection, splitter = direct._connection()
    direct.feed(connection, splitter, HELLO)
    before = rows(direct.store)
    answers = direct.feed(connection, splitter, frame(header))
    if answers and all(isinstance(a, WireError) or type(getattr(a, "message", None)) is Failed for a in answers):
        assert rows(direct.store) == before


@settings(max_examples=200)
@given(data=st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    direct = Direct()
    connection, splitter = direct._connection()
    before = rows(direct.store)
    direct.feed(connection, splitter, data)
    assert rows(direct.store) == before


@settings(max_examples=100)
@given(
    messages=st.lists(st.sampled_from(VALID), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    payload=st.binary(max_size=300),
)
def test_any_split_gives_the_same_frames(messages: list[Any], cuts: list[int], payload: bytes) -> None:
    data = b"".join(wire.encode(7, message, len(payload)) + payload for message in messages)
    splitter = wire.Splitter(wire.FRAME_BYTES_MAX)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = []
    for start_, end in pairwise(edges):
        found += list(splitter.feed(data[start_:end]))
    assert [(wire.decode(header), body) for header, body in found] == [((7, message), payload) for message in messages]
    assert splitter.buffered_bytes == 0


# -------------------------------------------------------------------------------------------------------- the directory


def refused_start(data: Path, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "idemq.broker", "--port", "0", "--http-port", "0", "--data-dir", str(data), *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (78, ""), result
    assert result.stderr.startswith("idemq: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert str(data) in result.stderr
    return result.stderr


@pytest.mark.process
def test_a_directory_that_another_broker_holds(tmp_path: Path) -> None:
    process, address, _ = start(tmp_path / "data")
    text = refused_start(tmp_path / "data")
    assert f"in use by process {process.pid}" in text
    with Raw(address) as client:
        assert isinstance(client.call(Ping()), Pong)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    process, _, _ = start(tmp_path / "data")  # the lock dies with its holder
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)


@pytest.mark.process
def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in refused_start(data)
    assert (data / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "a file"
    file.write_text("x")
    refused_start(file)
    assert file.read_text() == "x"


@pytest.mark.process
def test_a_directory_with_somebody_elses_lmdb(tmp_path: Path) -> None:
    data = tmp_path / "data" / "store"
    data.mkdir(parents=True)
    with lmdb.open(str(data), max_dbs=4) as environment, environment.begin(write=True) as txn:
        txn.put(b"theirs", b"1")
    assert "somebody else" in refused_start(tmp_path / "data")


@pytest.mark.process
def test_a_directory_of_a_later_version(tmp_path: Path) -> None:
    from idemq.broker import schema

    Store(tmp_path / "data").close()
    with lmdb.open(str(tmp_path / "data" / "store"), max_dbs=16) as environment:
        meta = environment.open_db(schema.Table.META.encode())
        original, schema.FORMAT_VERSION = schema.FORMAT_VERSION, schema.FORMAT_VERSION + 1
        try:
            with environment.begin(write=True, db=meta) as txn:
                txn.put(schema.FORMAT_KEY, schema.format_value())
        finally:
            schema.FORMAT_VERSION = original
    assert "later idemq" in refused_start(tmp_path / "data")


@pytest.mark.process
@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty"])
def test_a_damaged_directory(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path / "data")
    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        for number in range(50):
            client.call(*client.commit(number, b"x" * 5000))
    store.close()
    file = tmp_path / "data" / "store" / "data.mdb"
    content = file.read_bytes()
    changed = {"cut": content[: len(content) // 2], "zeroed": bytes(len(content)), "empty": b""}[damage]
    file.write_bytes(changed)
    text = refused_start(tmp_path / "data")
    assert "damaged" in text
    assert file.read_bytes() == changed, "what may be evidence stays"


@pytest.mark.process
def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    """Not by permissions, which mean nothing to root: by a file where a folder must be."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "store").write_text("x")
    assert "cannot be used" in refused_start(tmp_path / "data")


@pytest.mark.process
def test_a_directory_that_cannot_be_made() -> None:
    refused_start(Path("/proc/no such place"))
