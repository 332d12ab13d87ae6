"""The asyncio shell of a session: dials, reads, writes, keeps its timer, answers its waiters. No rule lives here.

`Connection` owns at most one transport at a time. What arrives on an older one is dropped (PROTOCOL rule C3): the
protocol object of a transport that was given up has lost its way back.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from math import inf
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import wire
from .errors import IdemqError, InvalidRequest, OutcomeUnknown, Unsupported
from .pipeline import Pending
from .session import Actions, Session

DIAL_S_MAX = 5.0
"""A dial that takes longer has failed."""
DEFAULT_PORT = 7750


class Address:
    """Where a broker is, read from a URL: `idemq://[TOKEN@]HOST[:PORT][?token=TOKEN]`."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"idemq://{url}")
            port = parts.port
            query = parse_qs(parts.query, strict_parsing=bool(parts.query))
        except ValueError as error:
            raise InvalidRequest(f"{url!r} is no URL: {error}") from None
        if parts.scheme in ("kafka", "idemqs"):
            raise Unsupported(f"{parts.scheme}:// is not offered yet")
        if parts.scheme != "idemq" or not parts.hostname or parts.path not in ("", "/"):
            raise InvalidRequest(f"{url!r} is no broker's URL; it looks like idemq://localhost:{DEFAULT_PORT}")
        self.host = parts.hostname
        self.port = port if port is not None else DEFAULT_PORT
        unknown = query.keys() - {"token"}
        if unknown:
            raise InvalidRequest(f"{url!r}: {sorted(unknown)[0]!r} is not known here, only token")
        self.token = query["token"][0] if "token" in query else unquote(parts.password or parts.username or "")


def find_token() -> str:
    """The token of the environment: IDEMQ_TOKEN, or the content of the file IDEMQ_TOKEN_FILE."""
    token = os.environ.get("IDEMQ_TOKEN", "")
    path = os.environ.get("IDEMQ_TOKEN_FILE", "")
    if not token and path:
        try:
            with open(path, encoding="utf-8") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"IDEMQ_TOKEN_FILE {path!r} cannot be read: {error}") from error
    return token


class _Protocol(asyncio.Protocol):
    """One transport's events, passed on until it is given up."""

    def __init__(self, owner: Connection) -> None:
        self._owner: Connection | None = owner
        self._splitter = wire.Splitter(wire.FRAME_BYTES_MAX)
        self.transport: asyncio.Transport | None = None

    def give_up(self) -> None:
        self._owner = None
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._owner is None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        owner = self._owner
        if owner is None:
            return
        session, now = owner.session, owner.loop.time()
        try:
            for header, payload in self._splitter.feed(data):
                correlation, message = wire.decode(header)
                session.received(now, correlation, message, payload)
        except wire.WireError as error:
            session.protocol_broken(now, error.text)
        owner.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        owner = self._owner
        if owner is not None:
            self._owner = None
            owner.lost(str(exc) if exc else "the broker closed the connection")


class Connection:
    """Drives one session on the running event loop. Call `pump()` (now) or `kick()` (soon) after every call into it."""

    def __init__(self, session: Session, address: Address, timeout: float) -> None:
        self.session = session
        self.address = address
        self._timeout = timeout
        self.loop = asyncio.get_running_loop()
        self._protocol: _Protocol | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._kicked = False

    def kick(self) -> None:
        """Pump at the end of this turn of the loop: what several tasks enqueue until then goes out together."""
        if not self._kicked:
            self._kicked = True
            self.loop.call_soon(self._pump_soon)

    def pump(self) -> None:
        """Do what the session says, now."""
        now = self.loop.time()
        while True:
            actions = self.session.take(now)
            if not (actions.cut or actions.dial or actions.frames or actions.completions):
                break
            self._perform(now, actions)
        self._set_timer()

    def lost(self, reason: str) -> None:
        """The transport is gone."""
        self._protocol = None
        self.session.disconnected(self.loop.time(), reason)
        self.pump()

    def future(self) -> asyncio.Future[Any]:
        """A waiter for the session."""
        return self.loop.create_future()

    async def ask(self, request: Any, timeout: float) -> Any:
        """Send any request but a commit and return its reply; raises IdemqError."""
        waiter = self.future()
        call = self.session.call(self.loop.time(), request, waiter, self.loop.time() + timeout)
        self.pump()
        try:
            return await waiter
        finally:
            self.session.forget(call)

    async def close(self) -> None:
        """Give everything up: the session ends, the transport and the timer go."""
        self.session.close(self.loop.time())
        self.pump()
        if self._timer is not None:
            self._timer.cancel()
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.wait([self._dialling])
        # One turn for the transport to be closed, so that no socket outlives the client.
        await asyncio.sleep(0)

    # ------------------------------------------------------------------------------------------------- inside

    def _pump_soon(self) -> None:
        self._kicked = False
        self.pump()

    def _perform(self, now: float, actions: Actions) -> None:
        transport = None if self._protocol is None else self._protocol.transport
        # Between the peer's FIN and our `connection_lost` a transport is closing. What is not written then is lost on
        # its way, as the session is told at once; writing it raises in some versions of asyncio (CPython 3.12, 3.13).
        if actions.frames and transport is not None and not transport.is_closing() and not actions.cut:
            buffers: list[bytes] = []
            for correlation, request, payload in actions.frames:
                buffers.append(wire.encode(correlation, request, sum(map(len, payload))))
                buffers += payload
            transport.writelines(buffers)
        if actions.cut and self._protocol is not None:
            protocol, self._protocol = self._protocol, None
            protocol.give_up()
            self.session.disconnected(now, "the connection was given up")
        if actions.dial:
            self._dialling = self.loop.create_task(self._dial())
        for waiter, value in actions.completions:
            if waiter.done():
                continue  # cancelled: nobody waits any more
            if isinstance(value, IdemqError):
                self._explain(value)
                waiter.set_exception(value)
            else:
                waiter.set_result(value)

    def _set_timer(self) -> None:
        at = self.session.wake_at
        if at == inf or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.session.tick(self.loop.time())
        self.pump()

    async def _dial(self) -> None:
        protocol = _Protocol(self)
        try:
            async with asyncio.timeout(DIAL_S_MAX):
                await self.loop.create_connection(lambda: protocol, self.address.host, self.address.port)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError; a host name may not even be one
            protocol.give_up()  # a dial that took too long may have got a transport, whose end is no news
            reason = str(error) or f"no connection within {DIAL_S_MAX:.0f} s"
            self.session.disconnected(self.loop.time(), reason)
        else:
            if protocol.transport is not None and not protocol.transport.is_closing():
                self._protocol = protocol
                self.session.connected(self.loop.time())
            else:
                protocol.give_up()
                self.session.disconnected(self.loop.time(), "the broker closed the connection")
        self.pump()

    def _explain(self, error: IdemqError) -> None:
        """Give an OutcomeUnknown the way to its outcome."""
        if isinstance(error, OutcomeUnknown) and error.pending is not None:
            error.await_outcome = partial(self._outcome, error.pending, error)

    async def _outcome(self, pending: Pending, error: OutcomeUnknown, timeout: float | None) -> Any:
        if not pending.done:
            waiter = self.future()
            pending.waiters.append(waiter)
            try:
                async with asyncio.timeout(self._timeout if timeout is None else timeout):
                    return await waiter
            except TimeoutError as late:
                if isinstance(late, IdemqError):
                    raise
                raise error from None
            finally:
                if waiter in pending.waiters:
                    pending.waiters.remove(waiter)
        if isinstance(pending.value, IdemqError):
            raise pending.value
        return pending.value
