"""Members of a group in a process of their own: `python -m idemq.bench.members URL TOPIC GROUP`.

Told what to do by lines of JSON on stdin, [verb, argument], and answers each with [verb, value] on stdout once it is
done; beside that it tells what its members are assigned and lose. Times are those of the monotonic clock, which
processes of one machine share. The end of stdin ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from typing import Any

import idemq
from idemq import Client, ClientClosed, Subscription

CONNECTION_MEMBERS_MAX = 10
COMMIT_S = 0.5
"""How often a member moves its positions; when a partition is taken from it it does so, too."""


class Member:
    """One member: what it holds, since when, and when it consumed what."""

    def __init__(self, mq: Client, topic: str, group: str, name: str) -> None:
        self.name = name
        self.held: dict[int, float] = {}
        """Partition -> since when."""
        self.consumed: list[tuple[float, set[int]]] = []
        """When messages were handed out, of which partitions."""
        self._sub: Subscription = mq.subscribe(
            topic, group=group, start="latest", on_assigned=self._assigned, on_revoked=self._revoked
        )
        self._consuming: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Become a member and begin to consume."""
        await self._sub.open()
        self._consuming = asyncio.create_task(self._consume())

    async def leave(self) -> None:
        """Leave the group."""
        await self._sub.close()
        if self._consuming is not None:
            with suppress(ClientClosed):
                await self._consuming

    def gap(self, start: float, end: float) -> float | None:
        """The longest time in this span without a message of the partitions that are its own since before it."""
        kept = {partition for partition, since in self.held.items() if since <= start}
        times = [at for at, partitions in self.consumed if not kept.isdisjoint(partitions)]
        spans = pairwise([*times, time.monotonic()])
        return max((after - before for before, after in spans if before < end and after > start), default=None)

    def _assigned(self, partitions: list[tuple[str, int]]) -> None:
        now = time.monotonic()
        self.held.update({partition: now for _, partition in partitions})
        tell("assigned", [now, self.name, [partition for _, partition in partitions]])

    async def _revoked(self, partitions: list[tuple[str, int]]) -> None:
        with suppress(idemq.IdemqError):  # what is another's by now is told by the assignment of that one
            await self._sub.commit()
        for _, partition in partitions:
            self.held.pop(partition, None)
        tell("revoked", [self.name, [partition for _, partition in partitions]])

    async def _consume(self) -> None:
        committed_at = time.monotonic()
        async for batch in self._sub.batches(max_messages=10_000, max_wait=0):
            now = time.monotonic()
            self.consumed.append((now, {message.partition for message in batch}))
            if now - committed_at >= COMMIT_S:
                committed_at = now
                await self._sub.commit(wait=False)


async def serve(url: str, topic: str, group: str) -> None:
    """Do what stdin says."""
    members: list[Member] = []
    async with AsyncExitStack() as stack:
        mq = await stack.enter_async_context(idemq.connect(url, timeout=60))
        while line := await asyncio.to_thread(sys.stdin.readline):
            verb, argument = json.loads(line)
            started = time.monotonic()
            if verb == "join":
                for number in range(argument):
                    if number and number % CONNECTION_MEMBERS_MAX == 0:
                        mq = await stack.enter_async_context(idemq.connect(url, timeout=60))
                    members.append(Member(mq, topic, group, str(number)))
                await asyncio.gather(*[member.join() for member in members])
            elif verb == "leave":
                await asyncio.gather(*[member.leave() for member in members])
                members.clear()
            elif verb == "forget":
                for member in members:
                    member.consumed.clear()
            elif verb == "gaps":
                gaps = [member.gap(*argument) for member in members]
                tell(verb, [gap for gap in gaps if gap is not None])
                continue
            tell(verb, started)


def tell(verb: str, value: Any) -> None:
    """One line to whoever started this process."""
    print(json.dumps([verb, value]), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
