"""The link does to a connection exactly what it says. Its peer is a small server that counts; no broker is involved."""

import asyncio
import gc
import random
import socket
import struct
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop

from idemq.testing import BrokerFailed, BrokerProcess, Cut, Event, Faults, Link, broker

SECONDS_MAX = 60.0
REPLY_BYTES = 20


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def reply_to(body: bytes) -> bytes:
    return frame(body[: REPLY_BYTES - 4].ljust(REPLY_BYTES - 4, b"."))


class Server:
    """Answers each frame with one of REPLY_BYTES, and remembers who asked what, in order, and how each ended."""

    def __init__(self) -> None:
        self.handled: list[tuple[int, bytes]] = []
        self.received: dict[int, bytearray] = {}
        self.ended: dict[int, str] = {}
        self.answering = asyncio.Event()
        self.answering.set()
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def bodies(self) -> list[bytes]:
        return [body for _, body in self.handled]

    async def accept(self, listener: socket.socket) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.tasks.add(asyncio.create_task(self.serve(len(self.received) + 1, peer)))
            self.received[len(self.received) + 1] = bytearray()

    async def serve(self, number: int, peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        rest = b""
        with peer:
            try:
                while data := await loop.sock_recv(peer, 1 << 16):
                    self.received[number] += data
                    rest += data
                    while len(rest) >= 4 and len(rest) >= 4 + (length := struct.unpack(">I", rest[:4])[0]):
                        body, rest = rest[4 : 4 + length], rest[4 + length :]
                        self.handled.append((number, body))
                        await self.answering.wait()
                        await loop.sock_sendall(peer, reply_to(body))
            except (ConnectionResetError, BrokenPipeError):
                self.ended[number] = "reset"
            else:
                self.ended[number] = "closed"


@asynccontextmanager
async def server(port: int = 0) -> AsyncIterator[tuple[Server, int]]:
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setblocking(False)
        it = Server()
        it.tasks.add(asyncio.create_task(it.accept(listener)))
        try:
            yield it, listener.getsockname()[1]
        finally:
            for task in it.tasks:
                task.cancel()
            ended = await asyncio.gather(*it.tasks, return_exceptions=True)
            assert not [error for error in ended if isinstance(error, Exception)]


class Client:
    """A bare socket: unlike a stream it gives every byte that arrived before a reset."""

    def __init__(self, socket_: socket.socket) -> None:
        self.socket = socket_

    async def send(self, *bodies: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, b"".join(map(frame, bodies)))

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await asyncio.get_running_loop().sock_recv(self.socket, size - len(data))
            assert more, f"closed after {data!r}"
            data += more
        return data

    async def read_to_end(self) -> tuple[bytes, str]:
        data = b""
        try:
            while more := await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16):
                data += more
        except ConnectionResetError:
            return data, "reset"
        return data, "closed"

    async def ask(self, *bodies: bytes) -> None:
        await self.send(*bodies)
        for body in bodies:
            assert await self.read(REPLY_BYTES) == reply_to(body)


@asynccontextmanager
async def client(link: Link, buffer_bytes: int = 0) -> AsyncIterator[Client]:
    with socket.socket() as it:
        if buffer_bytes:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        it.setblocking(False)
        await asyncio.get_running_loop().sock_connect(it, ("127.0.0.1", link.port))
        yield Client(it)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def run(work: Coroutine[None, None, None], *, on_uvloop: bool = False) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS_MAX):
            await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if on_uvloop else None) as runner:
        runner.run(bounded())


@pytest.mark.parametrize("on_uvloop", [False, True])
def test_without_faults_nothing_changes(on_uvloop: bool) -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link, client(link) as one, client(link) as two:
            assert link.url == f"idemq://127.0.0.1:{link.port}"
            for number in range(50):
                await one.ask(b"one %d" % number, b"again")
                await two.ask(b"two %d" % number)
            assert len(peer.handled) == 150
            assert link.counts.bytes_replies == 150 * REPLY_BYTES
            assert link.counts.bytes_requests == sum(len(frame(body)) for body in peer.bodies)
            assert (link.counts.connections, link.connections_open) == (2, 2)
            assert (link.counts.cuts, link.counts.replies_lost, list(link.log)) == (0, 0, [])

    run(work(), on_uvloop=on_uvloop)


def test_a_half_close_passes_in_both_directions() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link, client(link) as one:
            peer.answering.clear()
            await one.send(b"a", b"b")
            one.socket.shutdown(socket.SHUT_WR)
            peer.answering.set()
            assert await one.read_to_end() == (reply_to(b"a") + reply_to(b"b"), "closed")
            await until(lambda: link.connections_open == 0)
            assert (peer.ended, link.counts.replies_lost) == ({1: "closed"}, 0)

    run(work())


@pytest.mark.parametrize("on_uvloop", [False, True])
@pytest.mark.parametrize("how", list(Cut))
def test_a_cut_at_every_byte_of_the_replies_lets_exactly_the_bytes_before_it_pass(how: Cut, on_uvloop: bool) -> None:
    async def work() -> None:
        bodies = [b"first", b"second"]
        replies = b"".join(map(reply_to, bodies))
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            for count in range(2 * REPLY_BYTES + 1):
                link.cut_reply_at(count, how=how)
                async with client(link) as one:
                    await one.send(*bodies)
                    assert await one.read_to_end() == (replies[:count], "reset" if how is Cut.RST else "closed")
                    assert link.log[-1] == (count + 1, f"cut replies ({how.value})", count)
                assert peer.bodies.count(b"first") == count + 1, "the request behind a cut reply was handled"
            await until(lambda: link.connections_open == 0)
            assert link.counts.cuts == 2 * REPLY_BYTES + 1
            async with client(link) as one:
                await one.ask(*bodies)  # disarmed again

    run(work(), on_uvloop=on_uvloop)


@pytest.mark.parametrize("how", list(Cut))
def test_a_cut_at_every_byte_of_the_requests_lets_exactly_the_bytes_before_it_pass(how: Cut) -> None:
    async def work() -> None:
        requests = frame(b"first") + frame(b"second")
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            for count in range(len(requests) + 1):
                link.cut_request_at(count, how=how)
                async with client(link) as one:
                    await one.send(b"first", b"second")
                    await one.read_to_end()
                await until(lambda: len(peer.ended) == link.counts.connections)
                assert peer.received[count + 1] == requests[:count]
                if how is Cut.HALF:  # the other direction went on
                    assert peer.ended[count + 1] == "closed"
            assert link.counts.cuts == len(requests) + 1

    run(work())


def test_a_cut_may_be_counted_in_frames_and_strike_the_current_connection() -> None:
    async def work() -> None:
        async with server() as (_, port), Link("127.0.0.1", port) as link, client(link) as one:
            await one.ask(b"hello", b"a")
            link.cut_reply_at(3, after_frames=2, current=True)
            await one.send(b"b", b"c", b"d", b"e")
            assert await one.read_to_end() == (reply_to(b"b") + reply_to(b"c") + reply_to(b"d")[:3], "reset")
            await until(lambda: link.connections_open == 0)
            with pytest.raises(ValueError, match="no connection is open"):
                link.cut_reply_at(0, current=True)

    run(work())


def test_a_cut_before_a_reply_waits_for_the_reply() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.cut_reply_at(0, after_frames=1)
            async with client(link) as one:
                await one.ask(b"hello")
                assert link.counts.cuts == 0
                await one.send(b"a")
                assert await one.read_to_end() == (b"", "reset")
            assert peer.bodies == [b"hello", b"a"]

    run(work())


def test_a_half_cut_leaves_the_other_direction_alone() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.cut_reply_at(3, how=Cut.HALF)
            async with client(link) as one:
                await one.send(b"a")
                assert await one.read_to_end() == (reply_to(b"a")[:3], "closed")
                await one.send(b"more")
                await until(lambda: peer.bodies == [b"a", b"more"])

    run(work())


@pytest.mark.parametrize("how", list(Cut))
def test_a_cut_lets_every_byte_before_it_pass_to_a_slow_reader(how: Cut) -> None:
    async def work() -> None:
        big = random.Random(1).randbytes(600_000)

        async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(big)
            with suppress(ConnectionResetError):
                await reader.read()
            writer.transport.abort()

        source = await asyncio.start_server(pour, "127.0.0.1", 0)
        async with source, Link("127.0.0.1", source.sockets[0].getsockname()[1]) as link:
            link.cut_reply_at(500_001, how=how)
            async with client(link, buffer_bytes=4096) as one:
                data = b""
                while not link.counts.cuts:  # so slow that at the cut a good part is still in the link's kernel buffer
                    data += await one.read(1000)
                    await asyncio.sleep(0)
                for _ in range(50):  # a link that does not wait for this reader resets now
                    await asyncio.sleep(0)
                rest, end = await one.read_to_end()
                assert data + rest == big[:500_001]
                assert end == ("reset" if how is Cut.RST else "closed")

    run(work())


def test_a_fin_is_no_reset_even_with_requests_unread() -> None:
    async def work() -> None:
        async with server() as (_, port), Link("127.0.0.1", port) as link:
            link.cut_request_at(5, how=Cut.FIN)
            link.stall()
            async with client(link) as one:
                await one.send(bytes(300_000))
                link.resume()
                assert await one.read_to_end() == (b"", "closed")
                assert one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                await one.send(b"my side is still open")

    run(work())


def test_a_fault_may_be_armed_in_the_middle_of_what_was_read() -> None:
    """Frames that the link has read and not forwarded count as ahead."""

    async def work() -> None:
        replies = b"".join(reply_to(b"%d" % number) for number in range(100))

        async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(replies)
            await reader.read()
            writer.close()

        expected: list[int] = []

        def report(event: Event) -> None:
            if event.what == "stall replies" and not expected:
                link.cut_reply_at(3, after_frames=2, current=True)
                expected.append((event.at // REPLY_BYTES + 2) * REPLY_BYTES + 3)

        source = await asyncio.start_server(pour, "127.0.0.1", 0)
        faults = Faults(stall_per_kb=10.0, stall_seconds_max=0.001)
        port = source.sockets[0].getsockname()[1]
        async with source, Link("127.0.0.1", port, faults=faults, report=report) as link, client(link) as one:
            data, _ = await one.read_to_end()
            assert expected == [len(data)]
            assert replies.startswith(data)

    run(work())


def test_a_fault_may_meet_several_connections_and_several_faults_one() -> None:
    async def work() -> None:
        async with server() as (_, port), Link("127.0.0.1", port) as link:
            link.cut_reply_at(0, connections=2)
            link.cut_reply_at(7)
            seen: list[bytes] = []
            for _ in range(3):
                async with client(link) as one:
                    await one.send(b"a")
                    if len(seen) < 2:
                        seen.append((await one.read_to_end())[0])
                    else:
                        assert await one.read(REPLY_BYTES) == reply_to(b"a")
            assert seen == [b"", b""]

    run(work())


def test_lost_replies_belong_to_requests_that_were_handled() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.lose_replies(after_frames=1, cut_seconds=None)
            async with client(link) as one:
                await one.ask(b"hello")
                await one.send(b"a", b"b")
                await until(lambda: link.counts.replies_lost == 2)
                assert peer.bodies == [b"hello", b"a", b"b"]
                assert link.cut() == 1
                assert await one.read_to_end() == (b"", "reset")
            link.lose_replies(3)  # and cut by itself
            async with client(link) as one:
                await one.send(b"c")
                assert await one.read_to_end() == (reply_to(b"c")[:3], "reset")
            await until(lambda: link.connections_open == 0)
            assert (link.counts.replies_lost, link.counts.cuts) == (3, 2)

    run(work())


@pytest.mark.parametrize("on_uvloop", [False, True])
def test_held_requests_arrive_on_the_old_connection_after_the_new_one_is_at_work(on_uvloop: bool) -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.hold_requests(after_frames=1)
            async with client(link) as old:
                await old.ask(b"hello")
                await old.send(b"late 1", b"late 2")
                assert await old.read_to_end() == (b"", "reset")
            async with client(link) as new:
                await new.ask(b"hello again", b"retry")
                assert (link.held, link.connections_open) == (1, 1)
                assert peer.ended == {}, "the broker sees the old connection open"
                assert await link.deliver_held() == 1
                await new.ask(b"after")
            assert peer.handled == [
                (1, b"hello"), (2, b"hello again"), (2, b"retry"), (1, b"late 1"), (1, b"late 2"), (2, b"after")
            ]  # fmt: skip
            assert (link.held, link.counts.late_deliveries, link.counts.late_drops) == (0, 1, 0)
            assert link.counts.bytes_late == len(frame(b"late 1") + frame(b"late 2"))

    run(work(), on_uvloop=on_uvloop)


def test_held_requests_wait_for_the_given_number_of_newer_replies() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.hold_requests(late_replies=2)
            async with client(link) as old:
                await old.send(b"late")
                await old.read_to_end()
            async with client(link) as new:
                await new.ask(b"1")
                assert link.held == 1
                await new.ask(b"2")
                await until(lambda: link.held == 0)
            assert peer.handled == [(2, b"1"), (2, b"2"), (1, b"late")]

            link.hold_requests(late_replies=0)
            async with client(link) as old:
                await old.send(b"late again")
                await old.read_to_end()
            assert link.counts.late_deliveries == 1
            async with client(link):  # reconnected is enough
                await until(lambda: link.held == 0)
            assert link.counts.late_deliveries == 2
            assert peer.handled[-1] == (3, b"late again")

    run(work())


def test_a_frame_may_be_torn_between_now_and_later() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.hold_requests(6, cut_seconds=None)
            async with client(link) as old:
                await old.send(b"torn apart", b"whole")
                await until(lambda: len(peer.received.get(1, b"")) == 6)
            await until(lambda: link.held == 1)  # the client went by itself
            assert link.counts.cuts == 0
            assert await link.deliver_held() == 1
            assert peer.bodies == [b"torn apart", b"whole"]
            assert peer.received[1] == frame(b"torn apart") + frame(b"whole")

    run(work())


def test_a_client_that_is_back_before_its_old_end_is_seen_gets_its_late_bytes_delivered_too() -> None:
    async def work() -> None:
        async with server() as (peer, port):
            async with Link("127.0.0.1", port, report=lambda _: link.stall() if not link.held else None) as link:
                link.hold_requests(cut_seconds=None, late_replies=0)
                async with client(link) as old:
                    await old.send(b"late")
                    await until(lambda: link.counts.stalls)
                async with client(link):
                    await until(lambda: link.connections_open == 2)
                    link.resume()
                    await until(lambda: link.counts.late_deliveries == 1)
                    await until(lambda: link.held == 0)
            assert peer.handled == [(1, b"late")]

    run(work())


def test_a_cut_with_hold_keeps_what_a_slow_broker_did_not_take() -> None:
    async def work() -> None:
        sent = b"".join(frame(b"%d" % number * 5000) for number in range(1500))
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            async with client(link) as old:
                peer.answering.clear()
                sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(old.socket, sent))
                before = -1
                while link.counts.bytes_requests != before or before == 0:  # until it stands still
                    before = link.counts.bytes_requests
                    await asyncio.sleep(0.1)
                assert before < len(sent)
                link.cut(hold=True)
                with pytest.raises(ConnectionError):
                    await sending
            await until(lambda: link.held == 1)
            peer.answering.set()
            assert await link.deliver_held() == 1
            assert len(peer.received[1]) > before
            assert sent.startswith(bytes(peer.received[1])), "a piece is missing in the middle"

    run(work())


def test_a_cut_with_hold_keeps_what_was_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.client.link.LINGER_SECONDS_MAX", 1000.0)  # a stalled reader would not end

    async def work() -> None:
        bodies = [b"%d" % number * 1000 for number in range(300)]
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            async with client(link) as old:
                await old.ask(b"hello")
                link.stall()
                await old.send(*bodies)
                assert link.cut(hold=True) == 1
                assert await old.read_to_end() == (b"", "reset")
            link.resume()
            assert peer.bodies == [b"hello"]
            assert await link.deliver_held() == 1
            sent = frame(b"hello") + b"".join(map(frame, bodies))
            assert len(peer.received[1]) > len(frame(b"hello"))
            assert sent.startswith(bytes(peer.received[1])), "a piece is missing in the middle"

    run(work())


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.client.link.HELD_CONNECTIONS_MAX", 2)
    monkeypatch.setattr("idemq.client.link.HELD_BYTES_MAX", 10_000)

    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.hold_requests(connections=4)
            for body in (b"1", b"2", b"3"):
                async with client(link) as old:
                    await old.send(body)
                    await old.read_to_end()
            await until(lambda: link.counts.late_drops == 1)
            assert link.held == 2
            async with client(link) as old:  # needs all the room there is, and more
                await old.send(b"x" * 50_000)
                await old.read_to_end()
            await until(lambda: link.counts.late_drops == 3)
            assert link.held == 1
            monkeypatch.setattr("idemq.client.link.HELD_SECONDS_MAX", 0.01)
            link.hold_requests()
            async with client(link) as old:
                await old.send(b"nobody comes back")
                await old.read_to_end()
            await until(lambda: link.counts.late_drops == 5)  # the one before for room, this one for time
            assert link.held == 0
            assert peer.handled == []

    run(work())


def test_heal_ends_every_fault_and_delivers_or_drops_what_is_held() -> None:
    async def work(deliver: bool) -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link:
            link.hold_requests()
            async with client(link) as old:
                await old.send(b"late")
                await old.read_to_end()
            link.lose_replies(cut_seconds=None)
            async with client(link) as lossy:
                await lossy.send(b"lost")
                await until(lambda: link.counts.replies_lost == 1)
                link.cut_reply_at(0, connections=5)
                link.faults = Faults(refuse=1.0)
                link.stall()
                await link.heal(deliver=deliver)
                assert await lossy.read_to_end() == (b"", "reset"), "a stream that lost bytes goes no further"
            async with client(link) as clean:
                await clean.ask(b"a", b"b")
            assert peer.bodies == ([b"lost", b"late", b"a", b"b"] if deliver else [b"lost", b"a", b"b"])
            assert (link.held, link.counts.late_deliveries, link.counts.late_drops) == (0, deliver, not deliver)

    run(work(deliver=True))
    run(work(deliver=False))


def test_a_stall_stops_both_directions_until_it_is_resumed() -> None:
    async def work() -> None:
        async with server() as (peer, port), Link("127.0.0.1", port) as link, client(link) as one:
            await one.ask(b"a")
            link.stall()
            await one.send(b"b")
            async with client(link) as two:
                await two.send(b"c")
                await until(lambda: link.connections_open == 2)
                await asyncio.sleep(0.05)  # too short only makes this test weaker, never fail
                assert peer.bodies == [b"a"]
                link.resume()
                assert await one.read(REPLY_BYTES) == reply_to(b"b")
                assert await two.read(REPLY_BYTES) == reply_to(b"c")

    run(work())


def test_back_pressure_passes_through() -> None:
    """A client that does not read stops the server, and nobody in between fills up."""

    async def work() -> None:
        stopped = asyncio.Event()
        sent = 0

        async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.transport.set_write_buffer_limits(0)
            try:
                while True:
                    writer.write(bytes(1 << 16))
                    sent += 1 << 16
                    await writer.drain()
            except ConnectionError:
                stopped.set()
            finally:
                writer.close()

        source = await asyncio.start_server(pour, "127.0.0.1", 0)
        async with source, Link("127.0.0.1", source.sockets[0].getsockname()[1]) as link:
            async with client(link) as one:
                before = -1
                while sent != before:  # until it stands still; without back-pressure it never does
                    before = sent
                    await asyncio.sleep(0.2)
                assert link.counts.bytes_replies < sent
                assert await one.read(before) == bytes(before)
                await until(lambda: sent > before)
            at_close = sent
            await stopped.wait()
            assert sent - at_close < 64 << 20, "nobody was there any more, and the link went on taking"

    run(work())


def test_the_target_may_move_and_be_away() -> None:
    async def work() -> None:
        async with server() as (first, port), server() as (second, port_second):
            async with Link("127.0.0.1", port) as link:
                async with client(link) as one:
                    await one.ask(b"a")
                link.target = ("127.0.0.1", port_second)
                async with client(link) as one:
                    await one.ask(b"b")
                with socket.create_server(("127.0.0.1", 0)) as nobody:
                    link.target = nobody.getsockname()
                async with client(link) as one:
                    assert await one.read_to_end() == (b"", "reset")
                assert link.counts.refused == 1
            assert (first.bodies, second.bodies) == ([b"a"], [b"b"])

    run(work())


def test_one_byte_at_a_time_and_delays_change_nothing() -> None:
    async def work() -> None:
        faults = Faults(chunk_bytes=1, delay_seconds_max=0.001)
        async with server() as (_, port), Link("127.0.0.1", port, faults=faults) as link, client(link) as one:
            await one.ask(b"a", b"b", b"c")

    run(work())


FAULTS = Faults(
    refuse=0.1,
    cut_replies_per_kb=0.5,
    cut_requests_per_kb=0.5,
    lose_replies_per_kb=0.5,
    hold_requests_per_kb=0.5,
    stall_per_kb=2.0,
    stall_seconds_max=0.002,
    cut_seconds_max=0.002,
)


async def stubborn(link: Link, requests: int) -> None:
    """Ask one thing at a time, each until it is answered."""
    for number in range(requests):
        while True:
            async with client(link) as one:
                try:
                    for again in range(8):
                        await one.ask(b"%d.%d " % (number, again) + b"x" * 50)
                    break
                except (AssertionError, ConnectionError):
                    continue


def log_of(seed: int, faults: Faults) -> tuple[list[str], Link]:
    printed: list[str] = []
    links: list[Link] = []

    async def work() -> None:
        reported: list[object] = []
        async with (
            server() as (_, port),
            Link("127.0.0.1", port, seed=seed, faults=faults, report=reported.append) as link,
        ):
            await stubborn(link, 30)
            await link.heal()
            await until(lambda: link.connections_open == 0)
        assert reported == list(link.log)
        links.append(link)
        printed.extend(str(event) for event in link.log)

    run(work())
    return printed, links[0]


def test_the_same_seed_commits_the_same_faults() -> None:
    # Delivery waits for replies on later connections, and may fall before or after a fault there: compared apart.
    first, link = log_of(11, FAULTS)
    second, _ = log_of(11, FAULTS)
    other, _ = log_of(12, FAULTS)
    assert sorted(first) == sorted(second)
    assert [line for line in sorted(first) if "stall" not in line] != [
        line for line in sorted(other) if "stall" not in line
    ]
    counts = link.counts
    assert min(counts.cuts, counts.replies_lost, counts.refused, counts.stalls, counts.late_deliveries) > 0
    assert any("hold requests" in line for line in first)


def test_one_rate_leaves_the_other_chances_alone() -> None:
    def lost(faults: Faults) -> str:
        return next(line for line in log_of(5, faults)[0] if "lose replies" in line)

    assert lost(Faults(lose_replies_per_kb=1.0)) == lost(
        Faults(lose_replies_per_kb=1.0, stall_per_kb=0.5, cut_replies_per_kb=1e-9, cut_requests_per_kb=1e-9)
    )


def test_wrong_faults_are_refused() -> None:
    for wrong in ({"refuse": 1.5}, {"cut_replies_per_kb": -1.0}, {"stall_per_kb": float("nan")}, {"chunk_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Faults(**wrong)
    link = Link("127.0.0.1", 1)
    with pytest.raises(ValueError, match="negative"):
        link.cut_reply_at(-1)
    with pytest.raises(RuntimeError, match="async with"):
        _ = link.port


def test_closing_leaves_no_task_and_no_socket() -> None:
    async def work() -> None:
        rng = random.Random(3)
        before = asyncio.all_tasks()
        async with server() as (_, port):
            tasks = asyncio.all_tasks()
            for _ in range(20):
                async with Link("127.0.0.1", port) as link, client(link) as one, client(link), client(link):
                    link.hold_requests(late_replies=9, current=rng.random() < 0.5 and link.connections_open > 0)
                    await one.send(b"a", b"b")
                    for _ in range(rng.randrange(6)):
                        await asyncio.sleep(0)
                    if rng.random() < 0.5:
                        link.cut(rng.choice(list(Cut)), hold=True)
                left = {task for task in asyncio.all_tasks() - tasks if "serve" not in repr(task)}
                assert not left
        assert asyncio.all_tasks() == before

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(work())
        gc.collect()


def test_an_error_of_the_link_itself_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        def report(event: object) -> None:
            raise LookupError("in the report")

        async with server() as (_, port):
            link = await Link("127.0.0.1", port, report=report).__aenter__()
            link.cut_reply_at(0)
            async with client(link) as one:
                await one.send(b"a")
                assert (await one.read_to_end())[0] == b""
            with pytest.raises(ExceptionGroup) as caught:
                await link.__aexit__(None, None, None)
            assert caught.group_contains(LookupError)

    run(work())


BROKER = """#!{python}
import os, signal, socket, sys, time
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
sys.stderr.write("x" * 200_000 + "the end")
sys.stderr.flush()
if "--mute" in flags:
    time.sleep(600)
if "--junk" in flags:
    print("good morning", flush=True)
    time.sleep(600)
if "--deaf" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
listener = socket.create_server((flags["--host"], int(flags["--port"])))
http = socket.create_server((flags["--host"], int(flags["--http-port"])))
print("idemq ready %s:%d http=%s:%d" % (*listener.getsockname(), *http.getsockname()), flush=True)
while True:
    time.sleep(600)
"""


@pytest.fixture
def pretended_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The broker is a script that behaves as badly as its flags say. Returns a data directory."""
    script = tmp_path / "python"
    script.write_text(BROKER.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "data"


@pytest.mark.process
@pytest.mark.parametrize("on_uvloop", [False, True])
def test_a_broker_is_killed_and_found_again_on_the_same_ports(pretended_broker: Path, on_uvloop: bool) -> None:
    async def work() -> None:
        async with BrokerProcess(pretended_broker) as process:
            ports, pid = (process.port, process.http_port), process.pid
            assert min(ports) > 0
            assert process.url == f"idemq://127.0.0.1:{process.port}"
            assert await process.kill() == -9
            assert not process.running
            assert process.stderr.endswith("the end")
            assert len(process.stderr) == 64 << 10
            await process.restart()
            assert (process.port, process.http_port) == ports
            assert process.pid != pid
            await process.restart()
            assert (process.port, process.http_port) == ports
            assert await process.terminate() == 0
            await process.start()
            with pytest.raises(RuntimeError, match="running"):
                await process.start()
        assert not process.running

    run(work(), on_uvloop=on_uvloop)


@pytest.mark.process
def test_a_broker_that_never_gets_ready_or_never_stops_is_killed_and_said_so(
    pretended_broker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        for flag, seconds, words in (
            ("--mute", 1.0, "not ready within 1 s"),
            ("--junk", SECONDS_MAX, "said 'good morning'"),
        ):
            process = BrokerProcess(pretended_broker, flag, "yes", ready_seconds_max=seconds)
            with pytest.raises(BrokerFailed, match=words):
                await process.start()
            assert not process.running
        process = BrokerProcess(pretended_broker, "--deaf", "yes")
        await process.start()
        monkeypatch.setattr("idemq.client.testing.TERMINATE_SECONDS_MAX", 0.2)
        with pytest.raises(BrokerFailed, match=r"did not end within 0.2 s of SIGTERM; stderr: x+the end"):
            await process.terminate()
        assert not process.running

    run(work())


@pytest.mark.process
def test_a_broker_that_does_not_start_says_why(tmp_path: Path) -> None:
    async def work() -> None:
        process = BrokerProcess(tmp_path, "--no-such-flag")
        with pytest.raises(BrokerFailed, match=r"(?s)ended with code [^0].*stderr: .*no-such-flag"):
            await process.start()
        assert not process.running

    run(work())


@pytest.mark.process
def test_the_real_broker_starts_dies_and_returns_where_it_was() -> None:
    async def work() -> None:
        async with broker() as process:
            data_dir, port = process.data_dir, process.port
            async with Link(process.host, process.port) as link, client(link) as one:
                await until(lambda: link.connections_open == 1)
                assert await process.kill() == -9
                assert (await one.read_to_end())[0] == b""
            await process.restart()
            assert process.port == port
            assert await process.terminate() == 0, process.stderr
        assert not data_dir.exists()

    run(work())
