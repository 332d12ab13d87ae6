"""What tests share: a broker in the test's own loop, its core by hand, a check that a client left nothing behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import idemq
from idemq.broker.config import Config
from idemq.broker.core import Connection, Core, Group, Limits, Now, Reply
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.broker.server import Server
from idemq.broker.store import MemoryStore, StoreFull
from idemq.client import records, wire

SECONDS_MAX = 60.0
"""Whatever takes longer hangs."""


class Disk(MemoryStore):
    """The store in memory, with a switch for the errors of a disk."""

    full = False

    def commit(self, group: Group) -> None:
        """Store it, unless the disk is full."""
        if self.full:
            raise StoreFull("the test's disk is full")
        super().commit(group)


class Broker:
    """A broker on this loop. `stop` and `start` again: the same port; another `store` is another data directory."""

    def __init__(self, store: MemoryStore | None = None, token: str = "", **settings: Any) -> None:
        self.store = store if store is not None else Disk()
        self.token = token
        self.settings = settings
        self.port = 0
        self.failures: list[str] = []
        self.server: Server

    async def start(self) -> None:
        """Listen; the second time on the same port."""
        config = Config(host="127.0.0.1", port=self.port, **self.settings)
        self.server = Server(config, self.store, self.token, lambda: self.failures.append("the broker failed"))
        await self.server.start()
        self.port = self.server.address[1]
        # The server takes all exceptions of its loop for its own; here they may be the client's.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.failures.append(str(context)))

    async def stop(self) -> None:
        """As SIGTERM does."""
        self.server.stop()
        await self.server.wait_closed()

    async def restart(self, store: MemoryStore | None = None) -> None:
        """Stop, and start on the same store or another."""
        await self.stop()
        self.store = store if store is not None else self.store
        await self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"idemq://127.0.0.1:{self.port}"


WALL_MS = 1_700_000_000_000


class CoreBroker:
    """The core alone, on a store in memory: the test says what time it is and when a group is durable."""

    def __init__(self, store: MemoryStore | None = None, **limits: int) -> None:
        self.store = store if store is not None else MemoryStore()
        self.core = Core(self.store, Limits(**limits))
        self.mono_ms = 1
        self.wall_ms = WALL_MS
        """What the wall clock shows when the other one shows 0."""
        self.number = 0

    def connect(self, session: str = "") -> Connection:
        """A connection that is welcome."""
        connection = self.core.connect("test")
        assert isinstance(connection, Connection)
        welcome = self.core.step(self.now(), connection, 1, wire.Hello(wire.VERSION, "test", "", session), b"")
        assert isinstance(welcome, Reply)
        return connection

    def now(self) -> Now:
        """Both clocks."""
        return Now(self.mono_ms, self.wall_ms + self.mono_ms)

    def step(self, connection: Connection, request: Any, payload: bytes = b"") -> Any:
        """Have a request decided: the output, or None while it waits."""
        self.number += 1
        return self.core.step(self.now(), connection, self.number, request, payload)

    def begin(self) -> Group:
        """What is to be made durable now."""
        group = self.core.begin()
        assert group is not None
        return group

    def make_durable(self, group: Group) -> list[Any]:
        """The answers that waited for it."""
        if group.writes:
            self.store.commit(group)
        outputs = self.core.committed()
        return [output.message if isinstance(output, Reply) else output for output in outputs]

    def ask(self, connection: Connection, request: Any, payload: bytes = b"") -> Any:
        """A request and its answer, with everything made durable."""
        answer = self.step(connection, request, payload)
        if answer is not None:
            return answer.message if isinstance(answer, Reply) else answer
        return self.make_durable(self.begin())[-1]

    def tick(self, milliseconds: int) -> None:
        """Let time pass; what is due then is made durable."""
        self.mono_ms += milliseconds
        self.core.tick(self.now())
        group = self.core.begin()
        if group is not None:
            self.make_durable(group)

    def topic(self, connection: Connection, name: str = "t", partitions: int = 1, **settings: Any) -> int:
        """A topic's id."""
        made = self.ask(connection, wire.CreateTopic(name, partitions, wire.Settings(**settings), True))
        topic_id: int = made.topic.topic_id
        return topic_id

    def open(self, connection: Connection, name: str = "p", *, expected_epoch: int = 0, anonymous: bool = False) -> Any:
        """Open a name as a session of its own."""
        return self.ask(connection, wire.Open(name, f"session {self.number}", expected_epoch, anonymous))

    def append(self, connection: Connection, topic_id: int, value: bytes = b"x") -> Any:
        """One record without a producer."""
        return self.ask(connection, *commit(None, -1, 0, (topic_id, 0, 0), value=value))

    def hold(self, topic_id: int, group: str = "g", *, next: int = 0) -> OffsetKey:
        """A position that a group holds in partition 0 of a topic, under the lease 9, as an earlier broker left it."""
        key = OffsetKey(group, topic_id, 0)
        self.store.commit(Group(offsets={key: OffsetRow(next, 9, "member", None, 0, 0)}))
        return key


def commit(
    producer: wire.Opened | None,
    prev_seq: int,
    last_seq: int,
    *appends: tuple[int, int, int],
    offsets: Sequence[wire.Offset] = (),
    value: bytes = b"x",
) -> tuple[wire.Commit, bytes]:
    """A commit and its payload; `appends`: (topic id, partition, the number of the one record)."""
    producer_id, epoch = (producer.producer_id, producer.epoch) if producer is not None else (0, 0)
    body = records.pack([value], None, None, None, wire.Codec.NONE)
    batches = [
        wire.make_batch(wire.Codec.NONE, 1, topic_id, partition, producer_id, seq, seq, body)
        for topic_id, partition, seq in appends
    ]
    parts = [wire.Append(one[0], one[1], len(batch)) for one, batch in zip(appends, batches, strict=True)]
    return wire.Commit(producer_id, epoch, prev_seq, last_seq, parts, list(offsets)), b"".join(batches)


@asynccontextmanager
async def broker(store: MemoryStore | None = None, token: str = "", **settings: Any) -> AsyncIterator[Broker]:
    """A broker that must not have failed, nor seen an exception that nobody caught."""
    one = Broker(store, token, **settings)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()
    gc.collect()  # an exception that nobody retrieved is reported when its future goes
    assert one.failures == []


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """No task that was not there before (a link's may take a moment to end)."""
    before = asyncio.all_tasks()
    yield
    await eventually(lambda: not asyncio.all_tasks() - before)


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something is so; the test's own time limit ends a wait in vain."""
    while not condition():  # noqa: ASYNC110 - whose condition it is knows nobody to wake
        await asyncio.sleep(0.005)


async def log(url: str, *topics: str) -> list[bytes]:
    """The values of everything stored, in order for each partition, read through a client of its own."""
    async with idemq.connect(url) as mq:
        return [message.value for message in await read(mq, *topics)]


async def read(mq: idemq.Client, *topics: str) -> list[idemq.Message]:
    """Everything stored."""
    found: list[idemq.Message] = []
    async with mq.subscribe(*topics) as sub:
        while sum(sub.lag().values()):
            async for batch in sub.batches(max_wait=0):
                found += batch
                break
    return found


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a test of a coroutine function: it runs in a loop of its own, and does not hang."""

    async def bounded(arguments: dict[str, Any]) -> None:
        async with asyncio.timeout(SECONDS_MAX):
            await test(**arguments)

    def wrapper(**arguments: Any) -> None:
        asyncio.run(bounded(arguments), debug=False)

    wrapper.__name__, wrapper.__doc__, wrapper.__module__ = test.__name__, test.__doc__, test.__module__
    wrapper.__dict__.update(test.__dict__)
    wrapper.__wrapped__ = test  # type: ignore[attr-defined]  # pytest reads the arguments there
    return wrapper


def messages(
    values: list[bytes],
    keys: list[bytes | None] | None = None,
    *,
    topic: str = "t",
    partition: int = 0,
    offset: int = 0,
    headers: dict[str, bytes] | None = None,
    delivery: records.Delivery | None = None,
    producer: int = 5,
) -> list[records.Message]:
    """As a subscription would hand them out, one batch."""
    count = len(values)
    header = wire.BatchHeader(0, 1, 0, count, 9, partition, producer, 100, 100 + count - 1, 0)
    columns: list[dict[str, bytes] | None] | None = None if headers is None else [headers] * count
    stored = records.StoredBatch(topic, offset, 1_700_000_000_000, b"i" * 16, header, values, keys, columns, None)
    if delivery is not None:
        stored.delivery = delivery
    return list(stored.messages(0, count))
