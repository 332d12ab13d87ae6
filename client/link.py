"""A network that fails on purpose: a TCP proxy that loses replies, cuts at an exact byte, and delivers what an old
connection sent when its successor is at work.

A promise about retries is worth what it was tried against. This file may know that a frame is `u32 big-endian length |
body`, to find the gaps between frames, and nothing else of what travels, nor what is at either end.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, NamedTuple, Self

CHUNK_BYTES = 64 << 10
"""What a link reads at once, and so all it holds of a direction that is not held on purpose."""
HELD_BYTES_MAX = 64 << 20
"""Late bytes of all connections of a link (two of the largest frames and more). Beyond it the oldest are dropped."""
HELD_CONNECTIONS_MAX = 64
"""Old connections whose late bytes wait. Beyond it the oldest is dropped."""
HELD_SECONDS_MAX = 60.0
"""How long late bytes wait for the client to come back, and then for the broker to take them."""
LINGER_SECONDS_MAX = 10.0
"""How long a cut waits for the bytes before it to arrive, and a FIN for the other side's FIN."""
CONNECT_SECONDS_MAX = 10.0
"""How long a link waits for the broker to accept."""
EVENTS_MAX = 10_000
"""Entries kept in a link's log."""


class Cut(Enum):
    """How a connection ends."""

    RST = "rst"
    """Reset, both ways at once: a crash, or a firewall."""
    FIN = "fin"
    """Closed in order, both ways."""
    HALF = "half"
    """Closed in the direction of the fault only; the other one goes on until its sender closes."""


class Event(NamedTuple):
    """One fault that a link committed. Connections count from 1; `at` is the byte position in the fault's direction."""

    connection: int
    what: str
    at: int

    def __str__(self) -> str:
        return f"connection {self.connection}: {self.what} at byte {self.at}"


@dataclass(slots=True)
class Counts:
    """What passed a link, and what did not."""

    connections: int = 0
    refused: int = 0
    """Connections reset at once, by chance or because the broker was not there."""
    cuts: int = 0
    replies_lost: int = 0
    """Replies that the broker sent and the client did not get, or not in full."""
    stalls: int = 0
    late_deliveries: int = 0
    """Old connections whose held bytes reached the broker later."""
    late_drops: int = 0
    """Old connections whose held bytes never did: a limit, `heal(deliver=False)`, no broker, the link closed."""
    bytes_requests: int = 0
    bytes_replies: int = 0
    bytes_late: int = 0
    """Held request bytes delivered later; not in `bytes_requests`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What a `Link` does by chance. `refuse` is a probability per connection, `…_per_kb` a mean number per 1,024 bytes
    of that direction. Nothing is on by default.

    The chances of a connection are drawn from the link's seed and the connection's number, as byte positions. So
    the same seed and the same bytes meet the same faults, however the operating system cuts them into pieces.
    """

    refuse: float = 0.0
    cut_replies_per_kb: float = 0.0
    cut_requests_per_kb: float = 0.0
    lose_replies_per_kb: float = 0.0
    hold_requests_per_kb: float = 0.0
    stall_per_kb: float = 0.0
    """Each direction stops for a random time up to `stall_seconds_max`."""
    stall_seconds_max: float = 0.1
    cut_seconds_max: float = 0.05
    """From the first lost reply or held request to the cut."""
    late_replies_max: int = 4
    """Held requests are delivered after a random number of replies, at most this, on later connections."""
    delay_seconds_max: float = 0.0
    """Every piece waits for a random time up to this before it goes on."""
    chunk_bytes: int = CHUNK_BYTES
    """The largest piece read and forwarded at once; 1 sends byte by byte."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 0:  # also refuses NaN
                raise ValueError(f"{name} must not be negative")
        if self.refuse > 1:
            raise ValueError("refuse is a probability: at most 1")
        if not 1 <= self.chunk_bytes <= CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be 1 to {CHUNK_BYTES}")


class _Kind(Enum):
    CUT = "cut"
    LOSE = "lose"
    HOLD = "hold"
    STALL = "stall"


@dataclass(slots=True)
class _Fault:
    """A fault in one direction, `count` bytes after the frame that ends as number `frame` (None: after byte `at`)."""

    kind: _Kind
    count: int
    frame: int | None = None
    at: int | None = None
    how: Cut = Cut.RST
    seconds: float | None = 0.0
    late_replies: int | None = None

    def due(self, received: int) -> bool:
        """Whether it strikes within the first `received` bytes. With `count` 0 it waits for the byte it takes away."""
        return self.at is not None and (self.at < received if self.count == 0 else self.at <= received)


@dataclass(slots=True)
class _Script:
    """A fault armed for the next connections."""

    replies: bool
    fault: _Fault
    after_frames: int
    connections_left: int


class _Stream:
    """One direction of a connection: what came, what went on, where the frames end, which faults are ahead."""

    def __init__(self, name: str, source: socket.socket, sink: socket.socket) -> None:
        self.name = name
        self.source = source
        self.sink = sink
        self.pending = memoryview(b"")
        """Read and not yet forwarded."""
        self.received = 0
        self.forwarded = 0
        self.swallowing = False
        self.source_ended = False
        self.sink_broken = False
        self.faults: list[_Fault] = []
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.stall_over = asyncio.Event()
        self.stall_next: Callable[[], _Fault | None] = lambda: None
        """Draws the distance to the next stall by chance."""
        self.frames_ended = 0
        self.frames_forwarded = 0
        self._ends: deque[int] = deque()
        """Where the frames end that have been received and not forwarded."""
        self._head = b""
        self._body_left = 0

    @property
    def frames_unforwarded(self) -> int:
        """Frames begun and not forwarded in full."""
        return self.frames_ended + bool(self._head or self._body_left) - self.frames_forwarded

    def add(self, fault: _Fault, after_frames: int) -> None:
        """Place a fault `after_frames` whole frames from here."""
        if after_frames > len(self._ends):
            fault.frame = self.frames_forwarded + after_frames
        else:
            fault.at = (self._ends[after_frames - 1] if after_frames else self.forwarded) + fault.count
        self.faults.append(fault)

    def receive(self, data: bytes) -> None:
        """Follow the frames in `data`, and fix the position of the faults that wait for their ends."""
        index = 0
        while index < len(data):
            if self._body_left == 0:
                head = data[index : index + 4 - len(self._head)]
                index += len(head)
                self._head += head
                if len(self._head) < 4:
                    break
                (self._body_left,) = struct.unpack(">I", self._head)
            step = min(self._body_left, len(data) - index)
            index += step
            self._body_left -= step
            if self._body_left == 0:
                self._head = b""
                self.frames_ended += 1
                end = self.received + index
                if not self.swallowing:
                    self._ends.append(end)
                for fault in self.faults:
                    if fault.frame == self.frames_ended:
                        fault.at = end + fault.count
        self.received += len(data)

    def next_fault(self) -> _Fault | None:
        """The first fault that strikes within what was received."""
        due = [fault for fault in self.faults if fault.due(self.received)]
        return min(due, key=lambda fault: fault.at or 0, default=None)

    def advance(self, size: int) -> int:
        """`size` bytes went on; returns how many frames became whole for the receiver."""
        self.pending = self.pending[size:]
        self.forwarded += size
        before = self.frames_forwarded
        while self._ends and self._ends[0] <= self.forwarded:
            self._ends.popleft()
            self.frames_forwarded += 1
        return self.frames_forwarded - before

    def swallow(self) -> None:
        """From here on nothing goes on."""
        self.swallowing = True
        self.pending = memoryview(b"")
        self._ends.clear()
        self.faults.clear()


class _Connection:
    """One client's connection and its twin to the broker."""

    def __init__(self, link: Link, number: int, client: socket.socket, upstream: socket.socket) -> None:
        self.number = number
        self.requests = _Stream("requests", client, upstream)
        self.replies = _Stream("replies", upstream, client)
        self.held = bytearray()
        self.holding = False
        self.finished = asyncio.Event()
        self.late_replies: int | None = None
        """Replies that later connections must get before the held bytes go on; None: only when asked."""
        self.released: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """True: deliver what is held. False: drop it."""
        self._link = link
        self._client = client
        self._upstream = upstream
        self._cut: asyncio.Future[Cut] = asyncio.get_running_loop().create_future()
        self._timers: list[asyncio.TimerHandle] = []
        self._replies_lost = 0
        self._random = Random(f"{link.seed}/{number}/delay")

    @property
    def ending(self) -> bool:
        return self._cut.done()

    def cut(self, how: Cut, stream: _Stream | None = None) -> None:
        """End the connection, or with HALF the direction of `stream` (the replies)."""
        if self._cut.done():
            return
        self._link.counts.cuts += 1
        if how is not Cut.HALF:
            self._cut.set_result(how)
            return
        stream = stream or self.replies
        stream.swallow()
        with suppress(OSError):  # the receiver has gone already: closed is closed
            stream.sink.shutdown(socket.SHUT_WR)

    def release(self, deliver: bool) -> None:
        if not self.released.done():
            self.released.set_result(deliver)

    def heal(self) -> None:
        """No fault any more; a stream that has lost bytes cannot be healed and is cut."""
        for stream in (self.requests, self.replies):
            stream.faults.clear()
            stream.stall_next = lambda: None
            stream.flowing.set()
            stream.stall_over.set()
        if self.holding or self.requests.swallowing or self.replies.swallowing:
            self.cut(Cut.RST)

    async def run(self) -> None:
        pumps = [asyncio.create_task(self._pump(stream)) for stream in (self.requests, self.replies)]
        requests, replies = pumps
        try:
            while not self._cut.done() and not (requests.done() and replies.done()):
                ahead: list[asyncio.Future[Any]] = [self._cut, *(pump for pump in pumps if not pump.done())]
                await asyncio.wait(ahead, return_when=asyncio.FIRST_COMPLETED)
                for pump in pumps:
                    if pump.done():
                        pump.result()  # a pump fails by our own fault only
            how = self._cut.result() if self._cut.done() else Cut.FIN
            if self.holding:
                await _cancel(requests)
                self._hold_the_rest()
                self.replies.swallow()
                self.replies.flowing.set()  # a stall must not keep the broker's side from being read
                self._count_lost()
                self._link._park(self)
                await _close(self.requests, how)
                await self._deliver_late(replies)
            else:
                await _cancel(requests, replies)
                self._count_lost()
                self.replies.swallow()
                await asyncio.gather(_close(self.requests, how), _close(self.replies, how))
        finally:
            for timer in self._timers:
                timer.cancel()
            await _cancel(requests, replies)
            self._count_lost()
            self._client.close()
            self._upstream.close()

    async def _pump(self, stream: _Stream) -> None:
        """Forward one direction until its source ends, its sink breaks, or the connection is cut."""
        while True:
            await stream.flowing.wait()
            try:
                data = await _receive(stream.source, self._link.faults.chunk_bytes)
            except OSError:  # reset by its sender: so is the other side
                if not self._cut.done():
                    self._cut.set_result(Cut.RST)
                return
            if not data:
                self._source_closed(stream)
                return
            if self.holding and stream is self.requests:
                self._hold(data)
                continue
            stream.receive(data)
            if stream.swallowing:
                self._count_lost()
                continue
            stream.pending = memoryview(data)
            if self._link.faults.delay_seconds_max:
                await asyncio.sleep(self._random.uniform(0.0, self._link.faults.delay_seconds_max))
            if not await self._forward(stream):
                return

    async def _forward(self, stream: _Stream) -> bool:
        """Send on what is pending, up to each fault in turn. False: nothing can follow in this direction."""
        while not self._cut.done():
            await stream.flowing.wait()
            fault = stream.next_fault()
            if fault is not None and (fault.at or 0) <= stream.forwarded:
                stream.faults.remove(fault)
                await self._strike(stream, fault)
            elif stream.pending:
                size = (fault.at or 0) - stream.forwarded if fault else len(stream.pending)
                try:
                    sent = await _send(stream.sink, stream.pending[:size])
                except OSError:
                    # The receiver has gone. Requests of a client that went are still read to their end; but the last
                    # words of a broker that went are on their way, and no more requests are taken.
                    stream.swallow()
                    stream.sink_broken = True
                    self._end_without_client()
                    return stream is self.replies
                self._advance(stream, sent)
            else:
                return True
        return False

    def _advance(self, stream: _Stream, size: int) -> None:
        frames = stream.advance(size)
        if stream is self.requests:
            self._link.counts.bytes_requests += size
        else:
            self._link.counts.bytes_replies += size
            self._link._replied(self, frames)

    async def _strike(self, stream: _Stream, fault: _Fault) -> None:
        link = self._link
        what = f"{fault.kind.value} {stream.name}"
        link._note(self.number, f"{what} ({fault.how.value})" if fault.kind is _Kind.CUT else what, stream.forwarded)
        match fault.kind:
            case _Kind.CUT:
                self.cut(fault.how, stream)
            case _Kind.LOSE:
                stream.swallow()
                self._count_lost()
                self._cut_later(fault)
            case _Kind.HOLD:
                self.holding = True
                self.late_replies = fault.late_replies
                pending = bytes(stream.pending)
                stream.swallow()
                self._hold(pending)
                self._cut_later(fault)
            case _Kind.STALL:
                link.counts.stalls += 1
                with suppress(TimeoutError):
                    async with asyncio.timeout(fault.seconds):
                        await stream.stall_over.wait()
                following = stream.stall_next()
                if following is not None:
                    stream.add(following, 0)

    def _cut_later(self, fault: _Fault) -> None:
        if fault.seconds is not None:
            self._timers.append(asyncio.get_running_loop().call_later(fault.seconds, self.cut, fault.how))

    def _source_closed(self, stream: _Stream) -> None:
        if self.holding and stream is self.requests:
            if not self._cut.done():
                self._cut.set_result(Cut.FIN)  # the client went by itself: no cut of ours
            return
        stream.source_ended = True
        with suppress(OSError):  # the other side has gone as well
            stream.sink.shutdown(socket.SHUT_WR)
        self._end_without_client()

    def _end_without_client(self) -> None:
        """A client that neither sends nor takes anything has gone, even if the broker would talk for ever."""
        if self.requests.source_ended and self.replies.sink_broken and not self._cut.done():
            self._cut.set_result(Cut.RST)

    # ------------------------------------------------------------------------------------------------- late bytes

    def _hold(self, data: bytes) -> None:
        self.held += data
        if not self._link._make_room():
            self.cut(Cut.RST)  # nothing older to drop: this connection ends here, with what it has

    def _hold_the_rest(self) -> None:
        """Take what the client had sent when it was cut: those bytes were under way."""
        self.held += self.requests.pending
        self.requests.pending = memoryview(b"")
        with suppress(OSError):  # nothing more, or reset by the client
            while data := self._client.recv(CHUNK_BYTES):
                self._hold(data)

    async def _deliver_late(self, replies: asyncio.Task[None]) -> None:
        """Keep the old connection open until its bytes are released; then send them, and FIN. Its replies are lost."""
        counts = self._link.counts
        delivered = False
        try:
            async with asyncio.timeout(HELD_SECONDS_MAX):
                deliver = await self.released
            if deliver:
                rest = memoryview(bytes(self.held))
                async with asyncio.timeout(HELD_SECONDS_MAX):
                    while rest:
                        sent = await _send(self._upstream, rest)
                        rest = rest[sent:]
                        counts.bytes_late += sent
                self._upstream.shutdown(socket.SHUT_WR)
                delivered = True
                counts.late_deliveries += 1
                self._link._note(self.number, "late requests delivered", self.requests.forwarded)
                await asyncio.wait([replies], timeout=LINGER_SECONDS_MAX)
        except OSError:
            pass  # nobody came back, or the broker has gone or does not read (TimeoutError is one): counted as dropped
        finally:
            counts.late_drops += not delivered
            self.held.clear()
            self._link._unpark(self)

    def _count_lost(self) -> None:
        lost = self.replies.frames_unforwarded
        if self.replies.swallowing or self._cut.done():
            self._link.counts.replies_lost += lost - self._replies_lost
            self._replies_lost = lost


class Link:
    """A TCP proxy on a free port of 127.0.0.1 in front of `host`:`port`, with faults on demand and by chance.

    On demand: `cut_reply_at`, `cut_request_at`, `lose_replies`, `hold_requests` arm the next connections (or with
    `current=True` the newest open one); several may be armed on one connection. A fault has a place: `count` bytes
    after the `after_frames`-th frame from here, in its direction (a connection's first reply answers its handshake).
    With `count` above 0 it strikes as soon as that byte has passed; with 0 when the next byte comes, which
    is not let through: so `cut_reply_at(0, after_frames=1)` loses a whole reply to a request that *was* handled.
    At once, on all open connections: `cut`, `stall`, `resume`, `heal`. By chance: `faults`, from `seed`.

    `log` holds the latest faults (at most 10,000) and `report`, if given, is called with each. `counts` adds up
    everything. `target` is where new connections go and may be set while the link runs. Each direction reads only what
    the other side takes. Leaving `async with` ends all connections; an error of the link itself is raised there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        seed: int = 0,
        faults: Faults | None = None,
        report: Callable[[Event], None] | None = None,
    ) -> None:
        self.target = (host, port)
        self.seed = seed
        self.faults = faults or Faults()
        """What happens by chance; set it to change it for connections to come."""
        self.counts = Counts()
        self.log: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._report = report
        self._scripts: list[_Script] = []
        self._open: dict[int, _Connection] = {}
        self._parked: dict[int, _Connection] = {}
        self._stalled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []
        self._listener: socket.socket | None = None

    # ---------------------------------------------------------------------------------------------- open and close

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self._start(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._tasks:  # the listener's task may start another until it has ended
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self._listener is not None:
            self._listener.close()
        if self._errors:
            raise ExceptionGroup("the link itself failed", self._errors)

    @property
    def port(self) -> int:
        """The port clients connect to."""
        if self._listener is None:
            raise RuntimeError("the link is not open: use `async with`")
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """`idemq://127.0.0.1:PORT` of the link."""
        return f"idemq://127.0.0.1:{self.port}"

    @property
    def held(self) -> int:
        """How many old connections have bytes that the broker has not got yet."""
        return len(self._parked)

    @property
    def connections_open(self) -> int:
        """How many clients are connected through the link."""
        return len(self._open)

    # --------------------------------------------------------------------------------------------------- on demand

    def cut_reply_at(
        self, count: int, *, after_frames: int = 0, how: Cut = Cut.RST, connections: int = 1, current: bool = False
    ) -> None:
        """Cut after exactly `count` bytes of replies, counted from the end of the `after_frames`-th reply."""
        self._arm(True, _Fault(_Kind.CUT, count, how=how), after_frames, connections, current)

    def cut_request_at(
        self, count: int, *, after_frames: int = 0, how: Cut = Cut.RST, connections: int = 1, current: bool = False
    ) -> None:
        """Cut after exactly `count` bytes of requests, counted from the end of the `after_frames`-th request."""
        self._arm(False, _Fault(_Kind.CUT, count, how=how), after_frames, connections, current)

    def lose_replies(
        self,
        count: int = 0,
        *,
        after_frames: int = 0,
        cut_seconds: float | None = 0.05,
        how: Cut = Cut.RST,
        connections: int = 1,
        current: bool = False,
    ) -> None:
        """Forward requests but no reply from that place on, and cut `cut_seconds` after the first lost byte.

        With `cut_seconds` None nobody cuts but the client.
        """
        fault = _Fault(_Kind.LOSE, count, how=how, seconds=cut_seconds)
        self._arm(True, fault, after_frames, connections, current)

    def hold_requests(
        self,
        count: int = 0,
        *,
        after_frames: int = 0,
        cut_seconds: float | None = 0.05,
        how: Cut = Cut.RST,
        late_replies: int | None = None,
        connections: int = 1,
        current: bool = False,
    ) -> None:
        """Hold requests from that place on, cut the client, and deliver them on the OLD connection later.

        `cut_seconds`: from the first held byte to the cut (None: wait until the client goes). `late_replies`: the held
        bytes go on once newer connections got that many replies (0: when the client has reconnected; None: only by
        `deliver_held` or `heal`). At most 64 connections and 64 MiB are held, for 60 s; the oldest are dropped first.
        """
        fault = _Fault(_Kind.HOLD, count, how=how, seconds=cut_seconds, late_replies=late_replies)
        self._arm(False, fault, after_frames, connections, current)

    def cut(self, how: Cut = Cut.RST, *, hold: bool = False) -> int:
        """Cut every open connection now; returns how many. With `hold`, requests under way wait for `deliver_held`."""
        alive = [connection for connection in self._open.values() if not connection.ending]
        for connection in alive:
            self._note(connection.number, f"cut ({how.value})", connection.replies.forwarded)
            connection.holding = connection.holding or hold
            connection.cut(how)
        return len(alive)

    def stall(self) -> None:
        """Stop forwarding, both ways, on open connections and on those to come, until `resume` or `heal`."""
        self._stalled = True
        self.counts.stalls += 1
        for connection in self._open.values():
            connection.requests.flowing.clear()
            connection.replies.flowing.clear()

    def resume(self) -> None:
        """End a `stall`."""
        self._stalled = False
        for connection in self._open.values():
            connection.requests.flowing.set()
            connection.replies.flowing.set()

    async def deliver_held(self) -> int:
        """Deliver all held bytes to the broker now; returns how many connections' arrived.

        It returns when the broker has read them and closed those connections, or 10 s after sending the last.
        """
        before = self.counts.late_deliveries
        await self._release(deliver=True)
        return self.counts.late_deliveries - before

    async def heal(self, *, deliver: bool = True) -> None:
        """End every fault, armed, by chance or under way, and forward cleanly from now on.

        Connections that have lost bytes are cut; what is held is delivered to the broker, or dropped.
        """
        self.faults = Faults()
        self._scripts.clear()
        self._stalled = False
        for connection in list(self._open.values()):
            connection.heal()
        await self._release(deliver)

    # ---------------------------------------------------------------------------------------------------- machinery

    def _arm(self, replies: bool, fault: _Fault, after_frames: int, connections: int, current: bool) -> None:
        if fault.count < 0 or after_frames < 0 or connections < 1:
            raise ValueError("count and after_frames must not be negative, connections at least 1")
        if current:
            alive = [connection for connection in self._open.values() if not connection.ending]
            if not alive:
                raise ValueError("no connection is open")
            (alive[-1].replies if replies else alive[-1].requests).add(fault, after_frames)
        else:
            self._scripts.append(_Script(replies, fault, after_frames, connections))

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._errors.append(error)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await _readable(listener)
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):  # the client gave up meanwhile
                continue
            self.counts.connections += 1
            task = self._start(self._serve(self.counts.connections, client))
            task.add_done_callback(partial(_close_when_done, client))  # also if it never gets to run

    async def _serve(self, number: int, client: socket.socket) -> None:
        upstream = socket.socket()
        try:
            for end in (client, upstream):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            chance = Random(f"{self.seed}/{number}")
            refuse = chance.random() < self.faults.refuse
            try:
                if refuse:
                    raise ConnectionRefusedError
                async with asyncio.timeout(CONNECT_SECONDS_MAX):
                    await asyncio.get_running_loop().sock_connect(upstream, self.target)
            except OSError:
                self.counts.refused += 1
                if refuse:
                    self._note(number, "refuse", 0)
                _reset(client)
                return
            connection = _Connection(self, number, client, upstream)
            self._draw(connection, chance)
            for script in self._scripts:
                stream = connection.replies if script.replies else connection.requests
                stream.add(replace(script.fault), script.after_frames)
                script.connections_left -= 1
            self._scripts = [script for script in self._scripts if script.connections_left]
            if self._stalled:
                connection.requests.flowing.clear()
                connection.replies.flowing.clear()
            self._open[number] = connection
            for parked in list(self._parked.values()):
                if parked.late_replies == 0 and parked.number < number:
                    parked.release(deliver=True)
            try:
                await connection.run()
            finally:
                self._open.pop(number, None)
                connection.finished.set()
        finally:
            upstream.close()

    def _draw(self, connection: _Connection, chance: Random) -> None:
        """Draw what happens to a connection by chance; all in one order, so that a rate leaves the others alone."""
        faults = self.faults

        def place(stream: _Stream, kind: _Kind, per_kb: float) -> None:
            distance, how = chance.expovariate(1.0), chance.choice(list(Cut))
            seconds = chance.uniform(0.0, faults.cut_seconds_max)
            late_replies = chance.randint(0, faults.late_replies_max)
            if per_kb:
                count = int(distance * 1024 / per_kb)
                stream.add(_Fault(kind, count, how=how, seconds=seconds, late_replies=late_replies), 0)

        place(connection.replies, _Kind.CUT, faults.cut_replies_per_kb)
        place(connection.requests, _Kind.CUT, faults.cut_requests_per_kb)
        place(connection.replies, _Kind.LOSE, faults.lose_replies_per_kb)
        place(connection.requests, _Kind.HOLD, faults.hold_requests_per_kb)
        if faults.stall_per_kb:
            for stream in (connection.requests, connection.replies):
                own = Random(f"{self.seed}/{connection.number}/stall {stream.name}")

                def stall_next(own: Random = own) -> _Fault | None:
                    count = 1 + int(own.expovariate(1.0) * 1024 / faults.stall_per_kb)
                    return _Fault(_Kind.STALL, count, seconds=own.uniform(0.0, faults.stall_seconds_max))

                stream.stall_next = stall_next
                first = stall_next()
                if first is not None:
                    stream.add(first, 0)

    def _note(self, connection: int, what: str, at: int) -> None:
        event = Event(connection, what, at)
        self.log.append(event)
        if self._report is not None:
            self._report(event)

    def _replied(self, connection: _Connection, frames: int) -> None:
        for parked in list(self._parked.values()):
            if parked.late_replies is not None and parked.number < connection.number:
                parked.late_replies -= frames
                if parked.late_replies <= 0:
                    parked.release(deliver=True)

    def _park(self, connection: _Connection) -> None:
        """The client is gone and the broker shall not know yet."""
        self._open.pop(connection.number, None)
        if len(self._parked) >= HELD_CONNECTIONS_MAX:
            self._drop_oldest()
        self._parked[connection.number] = connection
        if connection.late_replies == 0 and any(number > connection.number for number in self._open):
            connection.release(deliver=True)  # the client was back before its old connection was seen to end

    def _unpark(self, connection: _Connection) -> None:
        self._parked.pop(connection.number, None)

    def _drop_oldest(self) -> None:
        oldest = self._parked.pop(next(iter(self._parked)))
        oldest.held.clear()
        oldest.release(deliver=False)

    def _make_room(self) -> bool:
        """Whether what is held fits, after dropping the oldest."""
        while sum(len(each.held) for each in (*self._parked.values(), *self._open.values())) > HELD_BYTES_MAX:
            if not self._parked:
                return False
            self._drop_oldest()
        return True

    async def _release(self, deliver: bool) -> None:
        ending = [each for each in self._open.values() if each.holding and each.ending]
        waiting = [*self._parked.values(), *ending]
        for connection in waiting:
            connection.release(deliver)
        for connection in waiting:
            await connection.finished.wait()


# ------------------------------------------------------------------------------------------------------------- sockets
# Sockets by hand, not asyncio's streams: a stream reads ahead and cannot say how much of a write has gone out.


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _readable(source: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.add_reader(source.fileno(), _wake, future)
    try:
        await future
    finally:
        loop.remove_reader(source.fileno())


async def _receive(source: socket.socket, size: int) -> bytes:
    """The next bytes, b"" at the end. Being cancelled loses none (`loop.sock_recv` may)."""
    await asyncio.sleep(0)  # a source that never runs dry must not starve the other tasks
    while True:
        try:
            return source.recv(size)
        except BlockingIOError:
            await _readable(source)


async def _send(sink: socket.socket, data: memoryview) -> int:
    """Send some of `data`, once the receiver has room; returns how much."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return sink.send(data)
        except BlockingIOError:
            future = loop.create_future()
            loop.add_writer(sink.fileno(), _wake, future)
            try:
                await future
            finally:
                loop.remove_writer(sink.fileno())


async def _sent(sink: socket.socket) -> None:
    """Wait until the kernel has sent what it took: a reset throws the rest away. (Only Linux can tell.)"""
    if sys.platform != "linux":
        return
    siocoutqnsd = 0x894B
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS_MAX):
            # The kernel wakes nobody for this, so it is asked again.
            while struct.unpack("i", fcntl.ioctl(sink.fileno(), siocoutqnsd, bytes(4)))[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


def _close_when_done(end: socket.socket, task: asyncio.Task[None]) -> None:
    end.close()


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


async def _close(stream: _Stream, how: Cut) -> None:
    """Close the source of a stream that nobody reads any more."""
    end = stream.source
    if how is Cut.RST:
        await _sent(end)
        _reset(end)
        return
    # Closing with bytes unread would reset, so they are read (and lost) until the other side closes too.
    with suppress(OSError):  # reset by the other side, or not closed in time (TimeoutError)
        end.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER_SECONDS_MAX):
            while data := await _receive(end, CHUNK_BYTES):
                stream.receive(data)
    end.close()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel and wait; an error that a task had of its own is raised."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
