"""What tests of the client share: a broker in the test's own loop, and a check that a client left nothing behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import idemq
from idemq.broker.config import Config
from idemq.broker.core import Group, Space
from idemq.broker.server import Server
from idemq.broker.store import MemoryStore, StoreFull

SECONDS_MAX = 60.0
"""Whatever takes longer hangs."""


class Disk(MemoryStore):
    """The store in memory, with a switch for the errors of a disk."""

    full = False

    def commit(self, group: Group) -> Space:
        """Store it, unless the disk is full."""
        if self.full:
            raise StoreFull("the test's disk is full")
        return super().commit(group)


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
