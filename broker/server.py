"""The broker's sockets, threads and clock around the pure core: bytes in, group commits, replies out.

    bytes -> Splitter -> core.step() -> core.begin() -> store.commit() -> core.committed() -> replies

It holds no rules of the protocol. What it decides is when to read, when to write and when to give up on a peer, so that
overload pauses senders and never grows a buffer without bound. One group commit is in flight at a time, in the writer
thread; whatever arrives meanwhile is the next. Large reads far behind the tail go through a reader thread. Everything
else runs on the loop, in short steps that no `await` divides.

The one error path (PROTOCOL rule 13): a group that the store definitely refused closes every connection and makes a new
core. Anything else that goes wrong in the decision path ends the process, and the next start recovers.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import resource
import socket
import sys
import termios
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, cast

from idemq import __version__
from idemq.client import wire
from idemq.client.wire import Code, Failed

from .config import Config
from .core import Connection, Core, Group, Now, Output, Read, Reply
from .fetches import HotTail, bytes_allowed, collect
from .store import Storage, StoreFull

log = logging.getLogger("idemq.broker")

FDS_RESERVED = 128
"""File descriptors kept from clients: the store's files, listeners, HTTP, connections that are being refused."""
LINGERING_MAX = 64
"""Refused connections kept open until their peer has read why (`LINGER_MS`); beyond, the oldest is cut."""
LINGER_MS = 1000
TURN_FRAMES = 256
"""Frames of one connection that are decided before others have their turn."""
SWEEP_MS = 250
"""How often deadlines of connections are looked at, and so how late they may strike."""
LIVE_MS = 1000
"""Somebody writes, if there was a group commit within this time: catch-up reads are then paced."""
LOG_MS = 1000
"""What may happen again and again is logged at most once in this time."""
ACCEPT_BACKLOG = 1024
KEEPALIVE_S = 15
"""Silence after which a peer is probed, and again after each probe; gone after KEEPALIVE_PROBES without an answer."""
KEEPALIVE_PROBES = 4
COMMIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the histogram of group commits."""


class Counts:
    """What the server saw, for the metrics. No rule reads it."""

    def __init__(self) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self.connections_total = 0
        self.commits = 0
        self.duplicates = 0
        self.records = 0
        self.batches = 0
        self.record_bytes = 0
        self.refusals: Counter[str] = Counter()
        self.group_commits = 0
        self.group_commit_failures = 0
        self.damage_met = 0
        self.commit_seconds = 0.0
        self.commit_buckets = [0] * (len(COMMIT_SECONDS) + 1)

    def stored(self, group: Group, seconds: float) -> None:
        """One group became durable."""
        self.group_commits += 1
        self.commit_seconds += seconds
        self.commit_buckets[next((i for i, bound in enumerate(COMMIT_SECONDS) if seconds <= bound), -1)] += 1
        self.batches += len(group.appends)
        for stored in group.appends:
            self.records += wire.record_count(stored.batch)
            self.record_bytes += len(stored.batch)


class _Deadlines:
    """Peers that must do something within one fixed time, in the order in which their time began."""

    def __init__(self, milliseconds: int) -> None:
        self._milliseconds = milliseconds
        self._began_ms: dict[_Peer, int] = {}

    def __len__(self) -> int:
        return len(self._began_ms)

    def start(self, peer: _Peer, now_ms: int) -> None:
        """From now on, unless it runs already."""
        self._began_ms.setdefault(peer, now_ms)

    def stop(self, peer: _Peer) -> None:
        """The peer did it, or is gone."""
        self._began_ms.pop(peer, None)

    def __contains__(self, peer: _Peer) -> bool:
        return peer in self._began_ms

    def __iter__(self) -> Iterator[_Peer]:
        """The peer whose time began first comes first."""
        return iter(self._began_ms)

    def due(self, now_ms: int) -> list[_Peer]:
        """Peers whose time is over."""
        due = []
        for peer, began_ms in self._began_ms.items():
            if now_ms - began_ms < self._milliseconds:
                break
            due.append(peer)
        return due


class _Peer(asyncio.Protocol):
    """One client connection: its frames in, its replies out, and when to stop reading from it."""

    __slots__ = (
        "_buffered_bytes",
        "_frames",
        "_held",
        "_listing",
        "_out",
        "_reading",
        "_reads",
        "_receives",
        "_server",
        "_splitter",
        "_stalled",
        "_stalled_bytes",
        "_taking",
        "_transport",
        "_unanswered",
        "closing",
        "connection",
    )

    _transport: asyncio.Transport
    connection: Connection

    def __init__(self, server: Server) -> None:
        self._server = server
        self._splitter = wire.Splitter(wire.HELLO_BYTES_MAX)
        self._frames: Iterator[tuple[bytes, bytes]] | None = None
        """Frames that have arrived and are not decided yet; None when there is nothing left of them."""
        self._held: tuple[bytes, bytes] | None = None
        """The first of them, taken out and left for a better moment."""
        self._buffered_bytes = 0
        self._out: list[bytes] = []
        self._reads: deque[Read] = deque()
        self._reading = False
        """The reader thread reads for this peer."""
        self._receives = True
        self._unanswered = 0
        self._listing: int | None = None
        """Correlation of a listing without its reply yet: replies that large are made one at a time."""
        self._stalled = False
        self._stalled_bytes = 0
        self._taking = False
        self.closing = False

    # ------------------------------------------------------------------------------------------------ callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        server = self._server
        self._transport.set_write_buffer_limits(high=server.config.send_buffer_bytes)
        _keep_alive(transport.get_extra_info("socket"))
        name = transport.get_extra_info("peername")
        accepted = server.connected(self, f"{name[0]}:{name[1]}" if name else "")
        if isinstance(accepted, Failed):
            self.connection = Connection("")
            self.reply(0, accepted, close=True)
            self.flush()
        else:
            self.connection = accepted
            server.handshakes.start(self, server.now().mono_ms)

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        self._frames = self._held = None
        self._server.lingering.stop(self)
        self._leave()
        if self._server.stopping:
            self._server.stop_further()

    def data_received(self, data: bytes) -> None:
        self._server.counts.bytes_in += len(data)
        if self.closing or self._server.stopping:
            return  # what a refused peer still sends counts for nothing
        assert self._frames is None, "nothing is read while frames wait"
        self._frames = self._splitter.feed(data)
        try:
            self.take()
        except Exception as error:  # noqa: BLE001 - it ends the process
            self._server.end("a bug in the decision path, or a store that cannot be read", error)

    def pause_writing(self) -> None:
        self._stalled = True
        self._stalled_bytes = self._unread_bytes()
        self._receive(False)
        self._server.stalls.start(self, self._server.now().mono_ms)
        self._server.frames.stop(self)

    def resume_writing(self) -> None:
        self._stalled = False
        self._server.stalls.stop(self)
        if self._buffered_bytes:
            self._server.frames.start(self, self._server.now().mono_ms)
        # Not at once: an error in here would be the transport's, and it must be ours.
        self._server.loop.call_soon(self.flush)

    def _receive(self, on: bool) -> None:
        """Read from the socket, or leave it to the peer's TCP to wait."""
        if on != self._receives and not self._transport.is_closing():
            self._receives = on
            if on:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    # --------------------------------------------------------------------------------------------------- frames

    def take(self) -> None:
        """Have what has arrived decided, until nothing is left or this peer must wait."""
        self._taking = False
        if self._frames is None or self.closing or self._server.stopping:
            return
        server, connection = self._server, self.connection
        step, now = server.core.step, server.now()
        whole, count, waits = False, 0, self._must_wait()
        try:
            while not waits and not self.closing:
                frame = self._held or next(self._frames, None)
                self._held = None
                if frame is None:
                    self._frames = None
                    break
                if frame[1] and server.core.building_bytes > server.pause_bytes:
                    self._held = frame
                    server.waiting_for_disk[self] = None
                    break
                whole = True
                self._unanswered += 1
                try:
                    correlation, request = wire.decode(frame[0])
                except wire.WireError as error:
                    fatal = error.fatal or not connection.serial
                    self.reply(error.correlation, Failed(error.code, error.text), fatal)
                    continue
                output = step(now, connection, correlation, request, frame[1])
                if output is None:
                    server.schedule()
                elif isinstance(output, Reply):
                    self.reply(correlation, output.message, output.close)
                else:
                    self._reads.append(output)
                if type(request) in _LISTINGS:
                    self._listing = correlation
                elif connection.serial and self._splitter.bytes_max == wire.HELLO_BYTES_MAX:
                    self._splitter.bytes_max = wire.FRAME_BYTES_MAX
                    server.handshakes.stop(self)
                count += 1
                waits = count >= TURN_FRAMES or self._must_wait()
        except wire.WireError as error:
            self._unanswered += 1
            text = error.text if connection.serial else f"this is not the Hello of an idemq client: {error.text}"
            self.reply(0, Failed(error.code, text), close=True)
        self._watch(whole, now)
        self.flush()

    def _must_wait(self) -> bool:
        return (
            self._unanswered >= self._server.config.requests_max
            or self._listing is not None
            or self in self._server.waiting_for_disk
        )

    def _watch(self, whole: bool, now: Now) -> None:
        """A frame that has begun must end in time, and all of them together are bounded."""
        server = self._server
        buffered = 0 if self._frames is not None or self.closing else self._splitter.buffered_bytes
        server.buffered_bytes += buffered - self._buffered_bytes
        self._buffered_bytes = buffered
        if whole or not buffered:
            server.frames.stop(self)
        if buffered:
            server.frames.start(self, now.mono_ms)
            if server.buffered_bytes > server.config.receive_bytes_max:
                limit = server.config.receive_bytes_max
                self._unanswered += 1
                text = f"{limit} bytes of half-received frames wait here (receive_bytes_max)"
                self.reply(0, Failed(Code.BUSY, text), close=True)

    # -------------------------------------------------------------------------------------------------- replies

    def reply(self, correlation: int, message: Any, close: bool = False) -> None:
        """Send this at the next `flush()`."""
        if self.closing:
            return
        self._unanswered -= 1
        if correlation == self._listing:
            self._listing = None
        self._out.append(wire.encode(correlation, message))
        counts = self._server.counts
        if type(message) is wire.Committed:
            counts.commits += 1
            counts.duplicates += message.duplicate
        elif type(message) is Failed:
            counts.refusals[message.code] += 1
            if message.code == Code.STORE_DAMAGED:
                self._server.met_damage(message.text)
        self.closing = close

    def answer(self, read: Read) -> None:
        """Read this and send it, at the next `flush()`."""
        self._reads.append(read)

    def fetched(self, read: Read, parts: list[wire.Part], payload: list[bytes]) -> None:
        """The reader thread has read."""
        self._reading = False
        if not self.closing:
            self._put_fetched(read.correlation, parts, payload)
            self.flush()

    def _put_fetched(self, correlation: int, parts: list[wire.Part], payload: list[bytes]) -> None:
        self._unanswered -= 1
        for part in parts:
            if part.code == Code.STORE_DAMAGED:
                self._server.met_damage(part.text)
        self._out.append(wire.encode(correlation, wire.Fetched(parts), sum(map(len, payload))))
        self._out += payload

    def flush(self) -> None:
        """Write what there is to write, read for the peer while it reads itself, and go on with its frames."""
        self._write()
        while self._reads and not (self._stalled or self._reading or self.closing):
            read = self._reads.popleft()
            if self._server.is_hot(read):
                self._put_fetched(
                    read.correlation, *collect(self._server.store.read, read, self._server.fetch_bytes(read))
                )
                self._write()
            else:
                self._reading = True
                self._server.read_in_thread(self, read)
        if self.closing:
            self._finish()
        elif self._stalled:
            pass  # resume_writing() comes here again
        else:
            self._receive(self._frames is None)
            if self._frames is not None and not self._must_wait():
                self.take_later()

    def take_later(self) -> None:
        """Go on with frames that wait, in the loop's next round."""
        if not self._taking:
            self._taking = True
            self._server.loop.call_soon(self.take)

    def _write(self) -> None:
        out = self._out
        if not out or self._transport.is_closing():
            return
        self._out = []
        self._server.counts.bytes_out += sum(map(len, out))
        if len(out) == 1:
            self._transport.write(out[0])
        else:
            self._transport.writelines(out)

    # -------------------------------------------------------------------------------------------------- the end

    def _finish(self) -> None:
        """Everything is written: end our half, and give the peer a moment to read it before the other half goes."""
        server = self._server
        self._frames = self._held = None
        if self._transport.is_closing() or self in server.lingering:
            return
        self._leave()
        try:
            self._transport.write_eof()
        except OSError:  # the peer is gone, which we are about to be told
            self._transport.abort()
            return
        self._receive(True)  # and drop what comes: closing with unread bytes would reset the peer
        server.linger(self)

    def finish(self) -> None:
        """Close, once what was answered is written."""
        self.closing = True
        self._write()
        self._finish()

    def refuse(self, text: str) -> None:
        """The peer was too slow: tell it and close."""
        self._unanswered += 1
        self.reply(0, Failed(Code.BAD_REQUEST, text), close=True)
        self.flush()

    def cut(self) -> None:
        """Close at once: nothing more is read or written."""
        self.closing = True
        self._frames = self._held = None
        self._leave()
        self._server.lingering.stop(self)
        self._transport.abort()

    def _leave(self) -> None:
        server = self._server
        server.waiting_for_disk.pop(self, None)
        server.buffered_bytes -= self._buffered_bytes
        self._buffered_bytes = 0
        for deadlines in (server.handshakes, server.frames, server.stalls):
            deadlines.stop(self)
        self._reads.clear()
        server.disconnected(self)

    def has_read(self, now: Now) -> bool:
        """Has a peer that stalled read anything since its time began? Then it begins anew."""
        unread = self._unread_bytes()
        progress, self._stalled_bytes = unread < self._stalled_bytes, unread
        if progress:
            self._server.stalls.stop(self)
            self._server.stalls.start(self, now.mono_ms)
        return progress

    def _unread_bytes(self) -> int:
        """What the peer has not acknowledged. Our buffer alone shrinks in the kernel's steps: seldom on a slow line."""
        queued = bytearray(4)
        fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self._transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)


def _keep_alive(connection: socket.socket) -> None:
    """Notice a peer whose machine or line is gone: nothing else would, on a connection that has nothing to send."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    if hasattr(socket, "TCP_KEEPIDLE"):  # not on macOS
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)


_LISTINGS = (wire.Metadata, wire.Producers, wire.Offsets, wire.Members)
"""Small requests with large replies."""


class Server:
    """The broker of one store. `start()` listens; `stop()` ends it; `wait_closed()` returns when all is done.

    `fail` is called when the process must not go on; it does not return.
    """

    def __init__(self, config: Config, store: Storage, access_token: str, fail: Callable[[], Any]) -> None:
        self.config = config
        self.store = store
        self.fail = fail
        self.counts = Counts()
        self.loop: asyncio.AbstractEventLoop
        self.pause_bytes = config.group_bytes_max // 2
        """Payload waiting for the disk at which senders are paused: half of what the core refuses."""
        self.waiting_for_disk: dict[_Peer, None] = {}
        self.buffered_bytes = 0
        self.handshakes = _Deadlines(config.handshake_ms_max)
        self.frames = _Deadlines(config.frame_ms_max)
        self.stalls = _Deadlines(config.send_stall_ms_max)
        self.lingering = _Deadlines(LINGER_MS)
        self.address: tuple[str, int] = (config.host, config.port)
        self.stopping = False
        self._stop_timers: list[asyncio.TimerHandle] = []
        self._listening = False
        self._access_token = access_token
        self._peers: dict[Connection, _Peer] = {}
        self._started_ms = self.now().mono_ms
        self._listener: asyncio.Server
        self._closed: asyncio.Future[None]
        fds = _fd_limit(config.connections_max + FDS_RESERVED) - FDS_RESERVED
        self._limits = replace(config.limits, connections_max=max(1, min(config.connections_max, fds)))
        if self._limits.connections_max < config.connections_max:
            log.warning("only %d connections are taken: raise `ulimit -n`", self._limits.connections_max)
        self.core = self._new_core()
        self._group: Group | None = None
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._alarm = ""
        self._damage = ""
        """What was met first. It stays: nothing here mends it."""
        self._damage_logged_ms = -LOG_MS
        self._accept_logged_ms = -LOG_MS
        self._hot = HotTail()
        self._live_until_ms = 0
        self._groups: SimpleQueue[Group | None] = SimpleQueue()
        self._cold_reads: SimpleQueue[tuple[_Peer, Read, int] | None] = SimpleQueue()
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._write_groups, name="idemq-writer", daemon=True),
            threading.Thread(target=self._read_cold, name="idemq-reader", daemon=True),
        ]

    def now(self) -> Now:
        """The broker's only clocks."""
        return Now(int(time.monotonic() * 1000), int(time.time() * 1000))

    @property
    def ready(self) -> bool:
        """Are clients served?"""
        return self._listening and not self.stopping

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return (self.now().mono_ms - self._started_ms) / 1000

    @property
    def alarm(self) -> str:
        """Why an operator must look; empty: nothing is wrong."""
        return "; ".join(filter(None, (self.core.alarm, self._damage)))

    def met_damage(self, text: str) -> None:
        """A client was told that what it wants is damaged: tell the operator, too."""
        self.counts.damage_met += 1
        text = f"damage was met: {text}. {wire.REMEDIES[wire.Code.STORE_DAMAGED].remedy}"
        self._damage = self._damage or text
        now_ms = self.now().mono_ms
        if now_ms - self._damage_logged_ms >= LOG_MS:
            self._damage_logged_ms = now_ms
            log.error("%s", text)

    def _new_core(self) -> Core:
        return Core(self.store, self._limits, self._access_token, f"idemq {__version__}")

    # ----------------------------------------------------------------------------------------- start and stop

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._unhandled)
        self._closed = self.loop.create_future()
        self._listener = await self.loop.create_server(
            lambda: _Peer(self), self.config.host, self.config.port, backlog=ACCEPT_BACKLOG
        )
        self.address = self._listener.sockets[0].getsockname()[:2]
        for thread in self._threads:
            thread.start()
        self._listening = True
        self._pump()
        self._sweep()

    def stop(self) -> None:
        """Stop accepting, answer what is in flight, close. Safe to call twice."""
        if self.stopping:
            return
        self.stopping = True
        self._listener.close()
        last_s = self.config.shutdown_ms_max / 1000
        self._stop_timers = [
            self.loop.call_later(last_s / 2, self.cut_all),
            self.loop.call_later(last_s, self.end, "the disk did not answer in time (shutdown_ms_max)", None),
        ]
        self.schedule()

    async def wait_closed(self) -> None:
        """Return when every connection is closed and the threads have ended. The store stays open."""
        await self._closed
        self.end_threads()

    def end_threads(self) -> None:
        """Return when no thread uses the store any more."""
        self._ending.set()
        self._groups.put(None)
        self._cold_reads.put(None)
        if self._timer is not None:
            self._timer.cancel()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def stop_further(self) -> None:
        """While stopping: once nothing waits for the disk, say goodbye; once all are gone, end."""
        if self._group is None:
            for peer in list(self._peers.values()):
                peer.finish()
        if self._group is None and not self._peers and not self.lingering and not self._closed.done():
            for timer in self._stop_timers:
                timer.cancel()
            self._closed.set_result(None)

    def cut_all(self) -> None:
        """Close every connection at once."""
        for peer in [*self._peers.values(), *self.lingering]:
            peer.cut()

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception nobody caught. Of the sockets: survived (an accept without descriptors). Of ours: the end."""
        error = context.get("exception")
        if isinstance(error, OSError) and "handle" not in context:
            now_ms = self.now().mono_ms
            if now_ms - self._accept_logged_ms >= LOG_MS:
                self._accept_logged_ms = now_ms
                log.warning("%s: %s", context["message"], error)
            return
        self.end(context["message"], error)

    def end(self, text: str, error: BaseException | None) -> None:
        """End the process: what is in memory may be wrong, what is on the disk is right."""
        log.critical("%s", text, exc_info=error)
        self.fail()

    # -------------------------------------------------------------------------------------------- connections

    def connected(self, peer: _Peer, address: str) -> Connection | Failed:
        """A peer was accepted."""
        self.counts.connections_total += 1
        accepted: Connection | Failed
        if self.stopping:
            accepted = Failed(Code.BUSY, "this broker is stopping")
        else:
            accepted = self.core.connect(address)
        if isinstance(accepted, Connection):
            self._peers[accepted] = peer
        return accepted

    def disconnected(self, peer: _Peer) -> None:
        """A peer is gone, or as good as. Called more than once."""
        if self._peers.pop(peer.connection, None) is not None:
            self.core.disconnect(peer.connection)

    def linger(self, peer: _Peer) -> None:
        """Keep a connection that was told why it is closed, for a moment."""
        if len(self.lingering) >= LINGERING_MAX and not self.stopping:
            next(iter(self.lingering)).cut()
        self.lingering.start(peer, self.now().mono_ms)

    def _sweep(self) -> None:
        """Strike at connections whose time is over."""
        now = self.now()
        for peer in self.handshakes.due(now.mono_ms):
            peer.refuse(f"no Hello within {self.config.handshake_ms_max} ms (handshake_ms_max)")
        for peer in self.frames.due(now.mono_ms):
            peer.refuse(f"a frame that did not end within {self.config.frame_ms_max} ms (frame_ms_max)")
        for peer in self.stalls.due(now.mono_ms):
            if not peer.has_read(now):
                log.warning("%s reads nothing: disconnected (send_stall_ms_max)", peer.connection.address)
                peer.cut()
        for peer in self.lingering.due(now.mono_ms):
            peer.cut()
        if self.stopping:
            self.stop_further()
        if not self._closed.done():
            self.loop.call_later(SWEEP_MS / 1000, self._sweep)

    # ------------------------------------------------------------------------------------- the group commit loop

    def schedule(self) -> None:
        """Something was decided: make it durable as soon as what else has arrived is decided too."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Do what is due, and start the next group commit if none is in flight."""
        self._scheduled = False
        core, now = self.core, self.now()
        while True:
            due_ms, outputs = core.tick(now)
            group = core.begin()
            if group is None or group.writes:
                break
            self.send(outputs + core.committed())
        if group is not None:
            self._group = group
            self._groups.put(group)
        self.send(outputs)
        self._come_again(due_ms)
        if core.alarm != self._alarm:
            self._alarm = core.alarm
            log.warning("%s", core.alarm or "the alarm is over")
        if core.building_bytes <= self.pause_bytes:
            waiting, self.waiting_for_disk = self.waiting_for_disk, {}
            for peer in waiting:
                peer.take_later()
        if self.stopping:
            self.stop_further()

    def _come_again(self, due_ms: int) -> None:
        if self._timer is not None and not self._timer.cancelled():
            if self.now().mono_ms < self._timer_ms <= due_ms:
                return
            self._timer.cancel()
        self._timer_ms = due_ms
        # One more millisecond: the clock is cut to whole ones, and coming too early would be coming twice.
        self._timer = self.loop.call_later(max(due_ms + 1 - self.now().mono_ms, 1) / 1000, self.schedule)

    def _write_groups(self) -> None:
        """The writer thread: the only one that writes to the store."""
        while (group := self._groups.get()) is not None:
            began = time.monotonic()
            outcome: BaseException | None = None
            try:
                self.store.commit(group)
            except BaseException as error:  # noqa: BLE001 - the loop decides what it means
                outcome = error
            self.loop.call_soon_threadsafe(self._written, group, outcome, time.monotonic() - began)

    def _written(self, group: Group, outcome: BaseException | None, seconds: float) -> None:
        self._group = None
        if outcome is None:
            self.counts.stored(group, seconds)
            if group.appends:
                self._hot.add(group)
                self._live_until_ms = self.now().mono_ms + LIVE_MS
            self.send(self.core.committed())
        elif isinstance(outcome, StoreFull):
            self.counts.group_commit_failures += 1
            log.error("nothing of a group commit was stored, all connections are closed: %s", outcome)
            for peer in list(self._peers.values()):
                peer.cut()
            self.core = self._new_core()
        else:
            self.end("a group commit failed, the next start will find out what is stored", outcome)
            return
        self._pump()

    # ------------------------------------------------------------------------------------------------- replies

    def send(self, outputs: Iterable[Output]) -> None:
        """Write these, the replies of each connection at once."""
        touched: dict[_Peer, None] = {}
        peers = self._peers
        for output in outputs:
            peer = peers.get(output.connection)
            if peer is None:
                continue  # its connection is gone
            touched[peer] = None
            if isinstance(output, Reply):
                peer.reply(output.correlation, output.message, output.close)
            else:
                peer.answer(output)
        for peer in touched:
            peer.flush()

    def is_hot(self, read: Read) -> bool:
        """Can this be read without waiting for the disk?"""
        return all(self._hot.holds(one) for one in read.ranges)

    def fetch_bytes(self, read: Read) -> int:
        """What this fetch may get now."""
        return bytes_allowed(read, len(self.stalls))

    def read_in_thread(self, peer: _Peer, read: Read) -> None:
        """Have this read by the reader thread, which calls the peer's `fetched()` through the loop."""
        self._cold_reads.put((peer, read, self.fetch_bytes(read)))

    def _read_cold(self) -> None:
        """The reader thread. While others write it keeps to a rate: the disk is theirs first."""
        while (job := self._cold_reads.get()) is not None:
            peer, read, bytes_max = job
            if peer.closing:
                continue
            try:
                parts, payload = collect(self.store.read, read, bytes_max)
            except BaseException as error:  # noqa: BLE001 - the loop ends the process
                self.loop.call_soon_threadsafe(self.end, "the store cannot be read", error)
                return
            self.loop.call_soon_threadsafe(peer.fetched, read, parts, payload)
            if self.now().mono_ms < self._live_until_ms:
                self._ending.wait(sum(map(len, payload)) / self.config.catch_up_bytes_per_s)


def _fd_limit(wanted: int) -> int:
    """How many files this process may open, raised as far as it goes and is wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, wanted)
    if soft < wanted and soft < hard:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
