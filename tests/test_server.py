"""The server around the core: what goes over a socket, group commit, back-pressure, failure, the end, the HTTP port."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from idemq.broker import fetches
from idemq.broker import server as server_module
from idemq.broker.core import Damaged, Group, Read, ReadRange, Stored
from idemq.broker.fetches import FETCH_BATCHES_MAX, HotTail, collect
from idemq.broker.producers import ProducerRow
from idemq.broker.store import READ_BATCHES_MAX, MemoryStore, Storage, Store, StoreBroken, StoreFull
from idemq.broker.topics import TopicRow
from idemq.client import wire
from idemq.client.wire import (
    Code,
    Committed,
    Done,
    Failed,
    Fetch,
    Fetched,
    Metadata,
    Opened,
    Ping,
    Pong,
    PurgeTopic,
    Range,
    Topics,
)

from .raw import TIMEOUT_S, TOKEN, Closed, Raw, Running


class Held(MemoryStore):
    """Commits only while `go` is set, and says when it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self.waiting = threading.Event()
        self.groups: list[Group] = []
        self.error: Exception | None = None
        self.read_error: Exception | None = None

    def commit(self, group: Group) -> None:
        self.waiting.set()
        assert self.go.wait(TIMEOUT_S)
        self.groups.append(group)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        super().commit(group)

    def read(self, *args: int) -> list[tuple[int, int, bytes]]:
        if self.read_error is not None:
            raise self.read_error
        return super().read(*args)

    def hold(self) -> None:
        self.waiting.clear()
        self.go.clear()


@pytest.fixture(params=["memory", "lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    made = MemoryStore() if request.param == "memory" else Store(tmp_path / "data")
    yield made
    made.close()


def wait_for(condition: Callable[[], Any]) -> None:
    """Until it holds; fails when it does not in good time."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stored_bodies(client: Raw, partition: int = 0) -> list[bytes]:
    reply = client.call(Fetch([Range(client.topic_id, partition, 0)], 1 << 20, 0))
    return bodies(reply, client.payload)


def bodies(reply: Fetched, payload: bytes) -> list[bytes]:
    batches = wire.slices([batch.length for part in reply.parts for batch in part.batches], payload)
    assert all(wire.verified_header(batch) for batch in batches)
    return [batch[wire.BATCH_HEADER.size :] for batch in batches]


# ----------------------------------------------------------------------------------------------------- the whole way


def test_a_script_of_every_day(store: Storage) -> None:
    with Running(store) as running, running.connect() as client:
        assert client.welcome.version == wire.VERSION
        assert client.welcome.broker.startswith("idemq ")
        assert client.welcome.incarnation == store.incarnation()
        assert client.welcome.remembered >= wire.IN_FLIGHT_MAX
        assert isinstance(client.call(Ping()), Pong)
        client.create("orders", 2)
        opened = client.open()
        assert opened.last_seq == -1
        first = client.call(*client.commit(0, b"one"))
        assert first.positions[0].offset == 0
        assert client.call(*client.commit(1, b"two", partition=1)).positions[0].offset == 0
        # The same again: the original answer, and nothing is stored.
        assert client.call(*client.commit(0, b"one")) == first._replace(duplicate=True)
        reply = client.call(Fetch([Range(client.topic_id, 0, 0), Range(client.topic_id, 1, 0)], 1 << 20, 0))
        assert [(part.partition, part.earliest, part.next) for part in reply.parts] == [(0, 0, 1), (1, 0, 1)]
        assert bodies(reply, client.payload) == [b"one", b"two"]
        topics = client.call(Metadata(None))
        assert isinstance(topics, Topics)
        assert [(part.next, part.bytes > 0) for part in topics.topics[0].partitions] == [(1, True), (1, True)]
    with Running(store) as running, running.connect() as client:
        client.create("orders", 2)
        assert client.open().last_seq == 1
        assert stored_bodies(client) == [b"one"]


def test_what_arrives_during_a_commit_is_the_next_group() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client, running.connect() as other:
        client.create("t", 2)
        opened = client.open("p")
        other.topic_id = client.topic_id
        other.open("q")
        store.groups.clear()
        store.hold()
        client.send(*client.commit(0))
        assert store.waiting.wait(TIMEOUT_S)
        for number in range(1, 11):
            client.send(*client.commit(number))
        other.send(*other.commit(0, partition=1))
        # Both connections' requests are decided once their Pings are answered, which needs no disk.
        client.send(Ping())
        other.send(Ping())
        assert isinstance(client.expect()[1], Pong)
        assert isinstance(other.expect()[1], Pong)
        store.go.set()
        replies = [client.expect() for _ in range(11)]
        assert [reply.positions[0].offset for _, reply, _ in replies] == list(range(11))
        assert [correlation for correlation, _, _ in replies] == sorted(correlation for correlation, _, _ in replies)
        assert isinstance(other.expect()[1], Committed)
        assert [len(group.appends) for group in store.groups] == [1, 11]
        assert opened.producer_id in store.groups[1].producers


def test_frames_of_one_segment_are_one_group() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        store.groups.clear()
        frames = []
        for number in range(20):
            commit, batch = client.commit(number)
            frames.append(wire.encode(100 + number, commit, len(batch)) + batch)
        client.socket.sendall(b"".join(frames))
        assert [client.expect()[0] for _ in frames] == list(range(100, 120))
        assert [len(group.appends) for group in store.groups] == [20]


def test_nothing_is_acknowledged_before_it_is_durable() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client, running.connect() as reader:
        client.create()
        client.open()
        store.hold()
        client.send(*client.commit(0))
        assert store.waiting.wait(TIMEOUT_S)
        client.send(Ping())
        assert isinstance(client.expect()[1], Pong)  # and not the commit's answer, which was asked for before
        reply = reader.call(Fetch([Range(client.topic_id, 0, 0)], 1000, 0))
        assert reply.parts == []
        store.go.set()
        assert isinstance(client.expect()[1], Committed)
        assert len(stored_bodies(client)) == 1


# ---------------------------------------------------------------------------------------------------------- fetching


def test_a_fetch_waits_for_data_and_no_longer_than_asked(store: Storage) -> None:
    with Running(store) as running, running.connect() as client, running.connect() as writer:
        writer.create()
        writer.open()
        began = time.monotonic()
        reply = client.call(Fetch([Range(writer.topic_id, 0, 0)], 1000, 300))
        assert reply == Fetched([])
        assert time.monotonic() - began >= 0.3
        client.send(Fetch([Range(writer.topic_id, 0, 0)], 1000, wire.WAIT_MS_MAX))
        assert isinstance(writer.call(*writer.commit(0, b"now")), Committed)
        _, reply, payload = client.expect()
        assert bodies(reply, payload) == [b"now"]


def test_a_fetch_that_waits_is_answered_on_time_while_the_disk_is_busy() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client, running.connect() as writer:
        writer.create()
        writer.open()
        store.hold()
        writer.send(*writer.commit(0))
        assert store.waiting.wait(TIMEOUT_S)
        assert client.call(Fetch([Range(writer.topic_id, 0, 0)], 1000, 100)) == Fetched([])
        store.go.set()
        assert isinstance(writer.expect()[1], Committed)


@pytest.mark.parametrize("hot", [True, False])
def test_damage_is_told_for_its_partition_only_and_to_the_operator(hot: bool, caplog: pytest.LogCaptureFixture) -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        client.create("t", 2)
        client.open()
        for number in range(4):
            client.call(*client.commit(number, partition=number % 2))
        if not hot:
            running.server._hot = HotTail()
        healthy = store.read

        def read(topic_id: int, partition: int, *rest: int) -> list[tuple[int, int, bytes]]:
            if partition == 1:
                raise Damaged("row 7 does not match its checksum")
            return healthy(topic_id, partition, *rest)

        store.read = read  # type: ignore[method-assign, assignment]
        reply = client.call(Fetch([Range(client.topic_id, 1, 0), Range(client.topic_id, 0, 0)], 1000, 0))
        damaged, good = reply.parts
        assert (damaged.partition, damaged.code, damaged.batches) == (1, Code.STORE_DAMAGED, [])
        assert "row 7" in damaged.text
        assert (good.partition, good.code, len(good.batches)) == (0, "", 2)
        assert isinstance(client.call(*client.commit(4)), Committed)
        client.call(Fetch([Range(client.topic_id, 1, 0)], 1000, 0))
        told = f"damage was met: row 7 does not match its checksum. {wire.REMEDIES[Code.STORE_DAMAGED].remedy}"
        assert [one.message for one in caplog.records if one.levelname == "ERROR"] == [told], (
            "it is not said again soon"
        )
        assert json.loads(running.get("/api/status")[2])["alarm"] == told
        assert {b"idemq_alarm 1", b"idemq_damage_met_total 2"} <= set(running.get("/metrics")[2].splitlines())
        assert running.get("/readyz")[0] == 200, "what is not damaged is served"


def test_a_damaged_row_that_refuses_a_request_is_told_to_the_operator() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:

        def broken(*_: Any) -> Any:
            raise Damaged("row 8 does not match its checksum")

        store.producer_id = broken  # type: ignore[method-assign]
        assert client.call(wire.Open("p", "session", 0)).code == Code.STORE_DAMAGED
        alarm = json.loads(running.get("/api/status")[2])["alarm"]
        assert alarm.startswith("damage was met: row 8 does not match its checksum. ")
        assert "idemq verify" in alarm, "what to do is said, too"


@pytest.mark.parametrize("hot", [True, False])
def test_an_unreadable_store_ends_the_process(hot: bool) -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        client.call(*client.commit(0))
        if not hot:
            running.server._hot = HotTail()
        store.read_error = OSError(errno.EIO, "input/output error")
        client.send(Fetch([Range(client.topic_id, 0, 0)], 1000, 0))
        client.expect_closed()
    assert running.failed


class HeldReads(MemoryStore):
    """Reads only while `go` is set, and says when it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.waiting = threading.Event()

    def read(self, *args: int) -> list[tuple[int, int, bytes]]:
        self.waiting.set()
        assert self.go.wait(TIMEOUT_S)
        return super().read(*args)


def test_a_cold_read_for_a_connection_that_was_refused_meanwhile_does_no_harm() -> None:
    store = HeldReads()
    with Running(store) as running:
        with running.connect() as client, running.connect() as other:
            fetch = Fetch([Range(client.create(), 0, 0)], 1000, 0)
            client.open()
            assert isinstance(client.call(*client.commit(0)), Committed)
            running.server._hot = HotTail()
            client.send(fetch)
            assert store.waiting.wait(TIMEOUT_S)
            client.socket.sendall(b"\xff" * 8)
            assert isinstance(client.expect()[1], Failed)
            store.go.set()
            assert bodies(other.call(fetch), other.payload) == [b"body"]  # read behind the other one
        assert not running.failed


def test_the_log_before_the_start_is_read_by_the_reader_thread(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    healthy = store.read

    def read(*args: int) -> list[tuple[int, int, bytes]]:
        threads.append(threading.current_thread().name)
        return healthy(*args)

    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        for number in range(5):
            client.call(*client.commit(number, b"x" * 1000))
    monkeypatch.setattr(store, "read", read)
    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        assert len(stored_bodies(client)) == 5
        client.call(*client.commit(5))
        assert isinstance(client.call(Fetch([Range(client.topic_id, 0, 5)], 1000, 0)), Fetched)
    assert threads == ["idemq-reader", threads[1]]
    assert threads[1] != "idemq-reader"


@pytest.mark.parametrize("live", [True, False])
def test_catching_up_is_paced_while_others_write(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    waits: list[float] = []
    with Running(store, catch_up_bytes_per_s=1 << 20) as running, running.connect() as client:
        client.create()
        client.open()
        monkeypatch.setattr(running.server._ending, "wait", waits.append)
        client.call(*client.commit(0, bytes(1 << 20)))
        running.server._hot = HotTail()
        running.server._live_until_ms = running.server.now().mono_ms + (60_000 if live else -1)
        assert len(stored_bodies(client)) == 1
    assert [round(seconds, 2) for seconds in waits] == ([1.0] if live else [])


def test_fetches_get_less_the_more_clients_do_not_read() -> None:
    with Running(MemoryStore()) as running:
        server = running.server
        read = a_read([], 8 << 20)
        assert server.fetch_bytes(read) == 8 << 20
        for count, expected in ((255, 1 << 20), (10_000, fetches.FETCH_BYTES_MIN)):
            while len(server.stalls) < count:
                server.stalls.start(server_module._Peer(server), server.now().mono_ms)
            assert server.fetch_bytes(read) == expected


def test_a_peer_that_vanished_is_noticed() -> None:
    with Running(MemoryStore()) as running, running.connect():
        [peer] = running.server._peers.values()
        connection = peer._transport.get_extra_info("socket")
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == server_module.KEEPALIVE_PROBES


def stored(offset: int, size: int, partition: int = 0) -> Stored:
    return Stored(1, partition, offset, 0, 0, wire.make_batch(0, 1, 1, partition, 0, 0, 0, b"x" * size))


def test_what_counts_as_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetches, "HOT_BYTES_MAX", 1000)
    hot = HotTail()
    assert hot.holds(ReadRange(1, 0, 0, 0, 0))  # nothing to read
    assert not hot.holds(ReadRange(1, 0, 0, 0, 1))
    hot.add(Group(appends=[stored(offset, 100) for offset in range(10, 14)]))
    assert [hot.holds(ReadRange(1, 0, offset, 0, 14)) for offset in (9, 10, 13)] == [False, True, True]
    hot.add(Group(appends=[stored(offset, 100) for offset in range(14, 18)]))
    assert [hot.holds(ReadRange(1, 0, offset, 0, 18)) for offset in (11, 12, 17)] == [False, True, True]
    hot.add(Group(appends=[stored(offset, 400, partition=1) for offset in range(2)]))
    assert not hot.holds(ReadRange(1, 0, 17, 0, 18))
    assert hot.holds(ReadRange(1, 1, 0, 0, 2))
    hot.add(Group(appends=[stored(2, 2000, partition=1)]))
    assert hot._spans == {}, "what is cold takes no memory"


def a_read(ranges: list[ReadRange], bytes_max: int) -> Read:
    return Read(None, 1, ranges, [], bytes_max)  # type: ignore[arg-type]


def filled(sizes: dict[int, list[int]]) -> tuple[MemoryStore, list[ReadRange]]:
    store = MemoryStore()
    store.commit(
        Group(appends=[stored(n, size, p) for p, all_sizes in sizes.items() for n, size in enumerate(all_sizes)])
    )
    return store, [ReadRange(1, partition, 0, 0, len(all_sizes)) for partition, all_sizes in sizes.items()]


HEADER = wire.BATCH_HEADER.size


def test_ranges_share_the_bytes_of_a_fetch() -> None:
    store, ranges = filled({0: [100 - HEADER] * 50, 1: [100 - HEADER] * 50, 2: [100 - HEADER] * 3})
    parts, payload = collect(store.read, a_read(ranges, 3000), 3000)
    assert [(part.partition, len(part.batches)) for part in parts] == [(0, 10), (1, 10), (2, 3)]
    assert sum(map(len, payload)) <= 3000


def test_one_larger_batch_is_delivered_alone() -> None:
    store, ranges = filled({0: [5000, 10], 1: [5000], 2: [10]})
    parts, payload = collect(store.read, a_read(ranges, 1000), 1000)
    assert [(part.partition, len(part.batches)) for part in parts] == [(0, 1)]
    assert [len(batch) for batch in payload] == [5000 + HEADER]
    # Behind something else it waits for the next fetch: two of the largest together would be no legal frame.
    parts, payload = collect(store.read, a_read([ranges[2], ranges[1]], 1000), 1000)
    assert [(part.partition, part.code, len(part.batches)) for part in parts] == [(2, "", 1)]


def test_a_fetch_of_tiny_batches_is_a_legal_frame() -> None:
    count = FETCH_BATCHES_MAX
    store, ranges = filled({0: [1] * 10, 1: [1] * count, 2: [1] * count, 3: [1] * count})
    big = [one._replace(offset=0) for one in ranges]
    parts, payload = collect(store.read, a_read(big, wire.FETCH_BYTES_MAX), wire.FETCH_BYTES_MAX)
    assert len(payload) <= FETCH_BATCHES_MAX
    worst = [wire.BatchAt(wire.NUMBER_MAX, wire.NUMBER_MAX, wire.COMMIT_BYTES_MAX)] * FETCH_BATCHES_MAX
    text = "x" * 200
    refused = [wire.Part(wire.NUMBER_MAX, 1023, 2**62, 2**62, [], Code.OFFSET_TRUNCATED, text)] * wire.APPENDS_MAX
    frame = wire.encode(wire.NUMBER_MAX, Fetched([*refused[1:], refused[0]._replace(batches=worst)]))
    assert len(frame) < wire.HEADER_BYTES_MAX
    assert sum(len(part.batches) for part in parts) == len(payload)


def test_one_read_is_bounded_in_batches(store: Storage) -> None:
    store.commit(Group(appends=[stored(offset, 1) for offset in range(READ_BATCHES_MAX + 1)]))
    assert len(store.read(1, 0, 0, 1 << 30, READ_BATCHES_MAX + 1)) == READ_BATCHES_MAX


def test_what_was_trimmed_meanwhile_is_reported() -> None:
    store, ranges = filled({0: [10] * 4})
    store._logs[1, 0] = store._logs[1, 0][2:]
    parts, _ = collect(store.read, a_read(ranges, 1000), 1000)
    assert [(part.code, part.earliest) for part in parts] == [(Code.OFFSET_TRUNCATED, 2)]


# ------------------------------------------------------------------------------------------------------ back-pressure


def test_senders_are_paused_and_not_refused_while_the_disk_is_slow() -> None:
    store = Held()
    with Running(store, group_bytes_max=16 << 20) as running, running.connect() as client:
        client.create()
        client.open()
        store.hold()
        body = b"x" * (1 << 20)
        count = 40
        sender = threading.Thread(target=lambda: [client.send(*client.commit(n, body)) for n in range(count)])
        sender.start()
        with running.connect() as other:
            assert store.waiting.wait(TIMEOUT_S)
            wait_for(lambda: running.server.waiting_for_disk)
            # 8 MiB is the mark; one more commit may pass it. The rest waits in the sender's and our kernel buffers.
            assert running.server.core.building_bytes < 11 << 20
            assert isinstance(other.call(Ping()), Pong)
        store.go.set()
        replies: list[Any] = [client.expect()[1] for _ in range(count)]
        sender.join()
        assert [reply.positions[0].offset for reply in replies] == list(range(count))
        assert running.server.counts.refusals == {}


def test_a_connection_has_a_bounded_number_of_requests_waiting() -> None:
    store = Held()
    with Running(store, requests_max=5) as running, running.connect() as client:
        client.create()
        client.open()
        store.hold()
        frames = []
        for number in range(50):
            commit, batch = client.commit(number)
            frames.append(wire.encode(100 + number, commit, len(batch)) + batch)
        client.socket.sendall(b"".join(frames))
        assert store.waiting.wait(TIMEOUT_S)
        with running.connect() as other:
            assert isinstance(other.call(Ping()), Pong)
            assert len(running.server.core._building.replies) <= 5
        store.go.set()
        assert [client.expect()[0] for _ in frames] == list(range(100, 150))
        assert max(len(group.appends) for group in store.groups) <= 5


def test_one_busy_connection_leaves_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TURN_FRAMES", 10)
    with Running(MemoryStore()) as running, running.connect() as client:
        steps: list[int] = []
        take = server_module._Peer.take

        def counted(peer: Any) -> None:
            steps.append(0)
            take(peer)

        monkeypatch.setattr(server_module._Peer, "take", counted)
        client.socket.sendall(b"".join(wire.encode(n, Ping()) for n in range(100)))
        assert [client.expect()[0] for _ in range(100)] == list(range(100))
        assert len(steps) >= 10


def test_a_listing_comes_in_pages_that_fit_into_a_frame() -> None:
    store = MemoryStore()
    token, last = b"t" * wire.TOKEN_BYTES_MAX, wire.NUMBER_MAX
    rows = [ProducerRow(n, f"p{n:03}", n, "s", 0, token, "", "", 0, 0, False, (), ()) for n in range(1, 301)]
    floors = (last,) * wire.PARTITIONS_MAX
    topics = [TopicRow(n, f"t{n:03}", wire.Settings(), floors, "", deleted=False) for n in range(301, 361)]
    producers, names = {row.producer_id: row for row in rows}, {row.name: row.producer_id for row in rows}
    store.commit(Group(producers=producers, names=names, topics={row.topic_id: row for row in topics}, counter=400))
    with Running(store) as running, running.connect() as raw:
        for request, expected in ((wire.Metadata, topics), (wire.Producers, rows)):
            for asked in (None, [row.name for row in reversed(expected)] + ["unknown"]):
                found: list[str] = []
                more = True
                while more:
                    page, more = raw.call(request(asked, found[-1] if found else ""))
                    assert page or not more
                    found += [one.name for one in page]
                assert found == [row.name for row in expected]


def test_large_listings_are_made_one_at_a_time() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        for number in range(3):
            client.create(f"t{number}", 1000)
        client.open()
        store.hold()
        client.send(*client.commit(0))
        assert store.waiting.wait(TIMEOUT_S)
        received = running.server.counts.bytes_in
        client.socket.sendall(b"".join(wire.encode(100 + n, Metadata(None)) for n in range(200)))
        wait_for(lambda: running.server.counts.bytes_in > received)
        with running.connect() as other:
            assert isinstance(other.call(Ping()), Pong)
            group = running.server.core._in_flight
            assert group is not None
            assert len(group.replies) <= 2
        store.go.set()
        assert isinstance(client.expect()[1], Committed)
        for number in range(200):
            correlation, reply, _ = client.expect()
            assert (correlation, len(reply.topics)) == (100 + number, 3)


# ----------------------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize("held", [False, True])
def test_a_definite_failure_keeps_nothing_and_closes_everything(held: bool) -> None:
    """Rule 13. `held`: the next group is decided already when the one in flight fails; it must not survive."""
    store = Held()
    with Running(store) as running, running.connect() as client, running.connect() as other:
        client.create()
        client.open()
        assert isinstance(client.call(*client.commit(0, b"zero")), Committed)
        store.hold()
        store.error = StoreFull("no room")
        client.send(*client.commit(1, b"lost"))
        assert store.waiting.wait(TIMEOUT_S)
        if held:
            client.send(*client.commit(2, b"decided after it"))
            client.send(*client.commit(1, b"lost"))  # a duplicate of what fails may not be answered as stored
            client.send(Ping())
            assert isinstance(client.expect()[1], Pong)
        core = running.server.core
        store.go.set()
        client.expect_closed()
        other.expect_closed()
        with running.connect() as again:
            assert running.server.core is not core
            again.create()
            assert again.open().last_seq == 0
            assert stored_bodies(again) == [b"zero"]
            assert again.call(*again.commit(1, b"one")).positions[0].offset == 1
            assert stored_bodies(again) == [b"zero", b"one"]
        assert running.server.counts.group_commit_failures == 1
    assert not running.failed


@pytest.mark.parametrize("error", [StoreBroken("EIO"), AssertionError("a bug"), OSError(errno.EIO, "EIO")])
def test_any_other_failure_of_a_commit_ends_the_process(error: Exception) -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        client.create()
        store.error = error
        client.send(wire.Open("p", "s", 0))
        client.expect_closed()
    assert running.failed


@pytest.mark.parametrize("error", [KeyError("a bug"), OSError(errno.EIO, "EIO")])
def test_a_bug_in_the_decision_path_ends_the_process(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(MemoryStore()) as running, running.connect() as client:

        def step(*_: Any) -> None:
            raise error

        monkeypatch.setattr(running.server.core, "step", step)
        client.send(Ping())
        client.expect_closed()
    assert running.failed


@pytest.mark.parametrize("error", [KeyError("a bug"), OSError(errno.EIO, "EIO")])
def test_a_bug_in_a_tick_ends_the_process(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(MemoryStore()) as running, running.connect() as client:

        def tick(*_: Any) -> None:
            raise error

        monkeypatch.setattr(running.server.core, "tick", tick)
        client.expect_closed()
    assert running.failed


def test_an_accept_without_descriptors_is_survived() -> None:
    with Running(MemoryStore()) as running, running.connect() as client:
        context = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "EMFILE")}
        running.loop.call_soon_threadsafe(running.server._unhandled, running.loop, context)
        assert isinstance(client.call(Ping()), Pong)
    assert not running.failed


def test_purge_and_trim_run_without_traffic(store: Storage) -> None:
    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        for number in range(3):
            client.call(*client.commit(number))
        assert client.call(PurgeTopic(client.topic_id, [2])) == Done()
        wait_for(lambda: store.read(client.topic_id, 0, 0, 1 << 20, 3)[0][0] == 2)
        assert [offset for offset, _, _ in store.read(client.topic_id, 0, 0, 1 << 20, 3)] == [2]


# ----------------------------------------------------------------------------------------------------------- the end


def test_stopping_answers_what_is_in_flight() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client, running.connect() as idle:
        client.create()
        client.open()
        store.hold()
        for number in range(3):
            client.send(*client.commit(number))
        client.send(Ping())
        assert isinstance(client.expect()[1], Pong)
        running.loop.call_soon_threadsafe(running.server.stop)
        wait_for(lambda: running.server.stopping)
        for number in (3, 4):
            client.send(*client.commit(number))  # not decided any more, and so not answered
            time.sleep(0.05)
        store.go.set()
        replies = [client.expect()[1] for _ in range(3)]
        assert [reply.positions[0].offset for reply in replies] == [0, 1, 2]
        client.expect_closed()
        idle.expect_closed()
        with pytest.raises(OSError):
            Raw(running.address)
    assert not running.failed
    assert store.partition(client.topic_id, 0) is not None
    assert store.partition(client.topic_id, 0).next == 3  # type: ignore[union-attr]


def test_stopping_does_not_wait_for_a_client_that_does_not_leave() -> None:
    with Running(MemoryStore(), shutdown_ms_max=1000) as running:
        client = running.connect()
        bare = running.connect(bare=True)
        running.loop.call_soon_threadsafe(running.server.stop)
        running._thread.join(TIMEOUT_S)
        assert not running._thread.is_alive()
        client.socket.close()
        bare.socket.close()


def test_stopping_does_not_wait_for_a_disk_that_does_not_answer() -> None:
    store = Held()
    with Running(store, shutdown_ms_max=500) as running, running.connect() as client:
        client.create()
        store.hold()
        client.send(wire.Open("p", "s", 0))
        assert store.waiting.wait(TIMEOUT_S)
        running.loop.call_soon_threadsafe(running.server.stop)
        wait_for(lambda: running.failed)
        store.go.set()
        client.expect_closed()


# ----------------------------------------------------------------------------------------------------- authentication


def test_the_token_opens_the_door() -> None:
    with Running(MemoryStore(), access_token=TOKEN) as running:
        with running.connect(token=TOKEN) as client:
            assert isinstance(client.call(Ping()), Pong)
        for wrong in ("", "wrong", TOKEN + "x"):
            with running.connect(bare=True) as client:
                client.send(wire.Hello(wire.VERSION, "test", wrong))
                refused = client.expect()[1]
                assert (type(refused), refused.code) == (Failed, Code.AUTH_FAILED)
                client.expect_closed()
        assert running.get("/healthz")[0] == 200
        assert running.get("/metrics")[0] == 401
        request = "GET /metrics HTTP/1.1\r\nauthorization: Bearer {}\r\n\r\n"
        assert running.get("", raw=request.format(TOKEN).encode())[0] == 200
        assert running.get("", raw=request.format("wrong").encode())[0] == 401


# --------------------------------------------------------------------------------------------------------------- HTTP


def test_pages() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        client.create()
        client.open()
        client.call(*client.commit(0))
        client.call(*client.commit(0))
        assert client.call(PurgeTopic(77, [0])).code == Code.UNKNOWN_TOPIC
        name = 'the "g\\roup"'
        joined = client.call(wire.Heartbeat(name, "m", [client.topic_id], []))
        offset = wire.Offset(name, client.topic_id, 0, joined.leases[0].lease, 0, 1)
        client.call(wire.Commit(0, 0, -1, 0, [], [offset]))
        for seq in (1, 2):
            client.call(*client.commit(seq))
        assert running.get("/healthz")[::2] == (200, b"ok\n")
        assert running.get("/readyz")[::2] == (200, b"ready\n")
        code, fields, body = running.get("/api/status?x=1")
        assert (code, fields["Content-Type"]) == (200, "application/json")
        status = json.loads(body)
        expected = {
            "connections": 1,
            "commits": 5,
            "duplicates": 1,
            "records": 3,
            "batches": 3,
            "refusals": {"UNKNOWN_TOPIC": 1},
            "group_commits": 7,
            "txn_id": 7,
            "alarm": "",
            "ready": True,
            "groups": {name: {"members": 1, "behind": {"t": 2}}},
        }
        assert {key: status[key] for key in expected} == expected
        code, fields, body = running.get("/metrics")
        assert (code, fields["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        lines = body.decode().splitlines()
        for line in (
            "idemq_commits_total 5",
            "idemq_duplicates_total 1",
            "idemq_records_total 3",
            r'idemq_group_members{group="the \"g\\roup\""} 1',
            r'idemq_group_behind{group="the \"g\\roup\"",topic="t"} 2',
            'idemq_refusals_total{code="UNKNOWN_TOPIC"} 1',
            "idemq_group_commit_seconds_count 7",
            "idemq_group_commit_failures_total 0",
            'idemq_group_commit_seconds_bucket{le="+Inf"} 7',
            "idemq_alarm 0",
        ):
            assert line in lines
        named = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(named) == len(set(named))
        samples = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
        suffixes = ("_bucket", "_sum", "_count")
        assert {next((name.removesuffix(end) for end in suffixes if name.endswith(end)), name) for name in samples} <= {
            *named,
            "idemq_refusals_total",
        }


def test_the_free_space_that_is_told_follows_the_disk_without_a_write_of_ours() -> None:
    store = MemoryStore()
    with Running(store) as running:
        store.disk_bytes = 12_345
        while json.loads(running.get("/api/status")[2])["disk_bytes"] != 12_345:
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\n\r\n", 405),
        (b"DELETE /api/status HTTP/1.1\r\n\r\n", 405),
        (b"GET healthz HTTP/1.1\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\n\r\n", 400),
        (b"\xff\xfe\x00\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", 431),
        (b"x" * 100_000, 431),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n" + b"y" * 20_000_000, 200),
    ],
)
def test_a_wrong_request_is_answered_and_harms_nobody(request_bytes: bytes, status: int) -> None:
    with Running(MemoryStore()) as running:
        code, fields, body = running.get("", raw=request_bytes)
        assert code == status
        assert fields["Connection"] == "close"
        assert int(fields["Content-Length"]) == len(body)
        if status != 200:
            assert set(json.loads(body)) == {"error"}
        assert running.get("/healthz")[0] == 200


def test_head_has_no_body() -> None:
    with Running(MemoryStore()) as running:
        code, fields, body = running.get("", raw=b"HEAD /healthz HTTP/1.1\r\n\r\n")
        assert (code, fields["Content-Length"], body) == (200, "3", b"")


def test_a_slow_request_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.broker.http.REQUEST_S_MAX", 0.2)
    with Running(MemoryStore()) as running:
        with Raw(running.http_address, bare=True) as slow:
            slow.socket.sendall(b"GET /hea")
            assert slow.socket.recv(100) == b""
        assert running.get("/healthz")[0] == 200


def test_http_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.broker.http.CONNECTIONS_MAX", 2)
    with Running(MemoryStore()) as running:
        slow = [Raw(running.http_address, bare=True) for _ in range(2)]
        wait_for(lambda: running.get("/healthz")[0] == 503)
        for one in slow:
            one.socket.close()
        wait_for(lambda: running.get("/healthz")[0] == 200)


def test_not_ready_while_stopping() -> None:
    store = Held()
    with Running(store) as running, running.connect() as client:
        client.create()
        store.hold()
        client.send(wire.Open("p", "s", 0))
        assert store.waiting.wait(TIMEOUT_S)
        running.loop.call_soon_threadsafe(running.server.stop)
        wait_for(lambda: running.get("/readyz")[0] == 503)
        assert running.get("/healthz")[0] == 200
        store.go.set()
        assert isinstance(client.expect()[1], Opened)


# ---------------------------------------------------------------------------------------------------------- processes


def start(data: Path, *flags: str, **environ: str) -> tuple["subprocess.Popen[str]", tuple[str, int], str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IDEMQ_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "idemq.broker", "--port", "0", "--http-port", "0", "--data-dir", str(data), *flags],
        env=inherited | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    words = line.split()
    assert words[:2] == ["idemq", "ready"], (line, process.communicate())
    host, _, port = words[2].rpartition(":")
    assert words[3].startswith("http=")
    assert len(words) == 4
    return process, (host, int(port)), words[3].removeprefix("http=")


@pytest.mark.process
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_broker_with_0_and_its_data_stays(tmp_path: Path, signal_number: int) -> None:
    process, address, _ = start(tmp_path / "data")
    with Raw(address) as client:
        client.create()
        client.open()
        client.send(*client.commit(0))
        assert isinstance(client.expect()[1], Committed)
        process.send_signal(signal_number)
        client.expect_closed()
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output, errors) == (0, "", "")
    process, address, _ = start(tmp_path / "data")
    with Raw(address) as client:
        client.create()
        assert client.open().last_seq == 0
        assert stored_bodies(client) == [b"body"]
    process.terminate()
    assert process.communicate(timeout=TIMEOUT_S) == ("", "")


@pytest.mark.process
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process, address, _ = start(tmp_path / "data", "--shutdown-ms-max", "3600000")
    with Raw(address, bare=True) as stubborn, Raw(address) as client:
        # Many lingering connections would each be waited for; a stopped group commit cannot be had from outside.
        process.send_signal(signal.SIGTERM)
        client.expect_closed()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        stubborn.expect_closed()


@pytest.mark.process
def test_beyond_loopback_the_first_start_makes_a_token(tmp_path: Path) -> None:
    data = tmp_path / "data"
    process, address, _ = start(data, IDEMQ_HOST="0.0.0.0")
    token = (data / "admin.token").read_text().strip()
    local = ("127.0.0.1", address[1])
    with Raw(local, token=token) as client:
        assert isinstance(client.call(Ping()), Pong)
    with Raw(local, bare=True) as client:
        client.send(wire.Hello(wire.VERSION, "test", ""))
        assert client.expect()[1].code == Code.AUTH_FAILED
        with pytest.raises(Closed):
            client.expect()
    process.terminate()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert errors.count("admin.token") == 1
    assert token not in errors
    process, _, _ = start(data, IDEMQ_HOST="0.0.0.0")
    process.terminate()
    assert process.communicate(timeout=TIMEOUT_S)[1] == ""


@pytest.mark.process
def test_an_address_that_is_taken_is_told(tmp_path: Path) -> None:
    process, address, _ = start(tmp_path / "one")
    port = str(address[1])
    for taken, free in (("--port", "--http-port"), ("--http-port", "--port")):
        second = subprocess.run(
            [sys.executable, "-m", "idemq.broker", taken, port, free, "0", "--data-dir", str(tmp_path / "2")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (second.returncode, second.stdout) == (78, "")
        setting = taken[2:].replace("-", "_")
        assert second.stderr.startswith(f"idemq: Cannot listen on 127.0.0.1, {setting} {port}: ")
        assert "--port 0 and --http-port 0 pick free ones" in second.stderr
        assert second.stderr.count("\n") == 1
        assert not (tmp_path / "2").exists(), "a start that failed leaves nothing behind"
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)
