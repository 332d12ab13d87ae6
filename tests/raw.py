"""Raw sockets that speak the wire, and a server in a thread of the test's own process.

Blocking on purpose: a script of send and expect reads as what happened, and nothing of asyncio stands on
both sides.
"""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any, Self

import uvloop

from idemq.broker.config import Config
from idemq.broker.http import Http
from idemq.broker.server import Server
from idemq.broker.store import Storage
from idemq.client import wire
from idemq.client.wire import Append, Commit, CreateTopic, Hello, Open, Opened, Settings, TopicIs

TIMEOUT_S = 30.0
TOKEN = "a token of these tests"


class Closed(Exception):
    """The broker ended the connection."""


class Raw:
    """One connection. `bare`: without the handshake."""

    def __init__(self, address: tuple[str, int], *, bare: bool = False, token: str = "") -> None:
        self.socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self._splitter = wire.Splitter(wire.FRAME_BYTES_MAX)
        self._frames: list[tuple[int, Any, bytes]] = []
        self._correlation = 0
        self.topic_id = 0
        self.producer: Opened | None = None
        if not bare:
            self.welcome = self.call(Hello(wire.VERSION, "test", token))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: Any, payload: bytes = b"", correlation: int | None = None) -> int:
        if correlation is None:
            self._correlation += 1
            correlation = self._correlation
        self.socket.sendall(wire.encode(correlation, message, len(payload)) + payload)
        return correlation

    def expect(self) -> tuple[int, Any, bytes]:
        """The next frame. Raises Closed at the end of the stream."""
        while not self._frames:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                raise Closed from None
            if not data:
                raise Closed
            self._frames += [(*wire.decode(header), payload) for header, payload in self._splitter.feed(data)]
        return self._frames.pop(0)

    def call(self, message: Any, payload: bytes = b"") -> Any:
        correlation = self.send(message, payload)
        answered, reply, self.payload = self.expect()
        assert answered == correlation
        return reply

    def expect_closed(self) -> None:
        try:
            frame = self.expect()
        except Closed:
            return
        raise AssertionError(f"not closed, but {frame}")

    def create(self, name: str = "t", partitions: int = 1) -> int:
        reply = self.call(CreateTopic(name, partitions, Settings(), True))
        assert isinstance(reply, TopicIs), reply
        self.topic_id = reply.topic.topic_id
        return self.topic_id

    def open(self, name: str = "p") -> Opened:
        """Take a producer name, whoever has it."""
        epoch = 0
        while True:
            reply = self.call(Open(name, f"{name}-{id(self)}", epoch))
            if isinstance(reply, Opened):
                self.producer = reply
                return reply
            epoch = reply.details["epoch"]

    def commit(self, seq: int, body: bytes = b"body", partition: int = 0) -> tuple[Commit, bytes]:
        """A commit of one record with this number, behind the one before it."""
        assert self.producer is not None
        producer_id, epoch = self.producer.producer_id, self.producer.epoch
        batch = wire.make_batch(0, 1, self.topic_id, partition, producer_id, seq, seq, body)
        return Commit(producer_id, epoch, seq - 1, seq, [Append(self.topic_id, partition, len(batch))]), batch


class Running:
    """A server and its HTTP in a thread. The store stays the test's."""

    def __init__(self, store: Storage, *, access_token: str = "", **settings: Any) -> None:
        self.config = Config(port=0, http_port=0, **settings)
        self.store = store
        self.failed = False
        self._access_token = access_token
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive() and not self.failed:
            self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again by __exit__
            self._error = error
            self._started.set()

    def _fail(self) -> None:
        if not self.failed:
            self.failed = True
            self._failed.set_result(None)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._failed = self.loop.create_future()
        self.server = Server(self.config, self.store, self._access_token, self._fail)
        http = Http(self.server, self._access_token)
        await self.server.start()
        await http.start("127.0.0.1", 0)
        self.address, self.http_address = self.server.address, http.address
        self._started.set()
        closed = asyncio.ensure_future(self.server.wait_closed())
        await asyncio.wait([closed, self._failed], return_when=asyncio.FIRST_COMPLETED)
        if self.failed:
            closed.cancel()
            self.server._listener.close()
            self.server.cut_all()
            self.server.end_threads()
        await http.close()

    def connect(self, *, bare: bool = False, token: str = "") -> Raw:
        return Raw(self.address, bare=bare, token=token)

    def get(self, path: str, *, raw: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """One HTTP request -> (status, header, body)."""
        with socket.create_connection(self.http_address, timeout=TIMEOUT_S) as connection:
            connection.sendall(raw or f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        header, _, body = data.partition(b"\r\n\r\n")
        first, *lines = header.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        return int(first.split(" ")[1]), fields, body


def frames(data: bytes) -> Iterator[tuple[int, Any]]:
    """Frames of a whole stream, decoded."""
    for header, _ in wire.Splitter(wire.FRAME_BYTES_MAX).feed(data):
        yield wire.decode(header)
