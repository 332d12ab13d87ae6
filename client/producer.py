"""A producer: what users call to send. Numbers, retries and answers are the session's business."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType

from .engine import EngineProducer
from .errors import ClientClosed, IdemqError, InvalidRequest, OutcomeUnknown, Unsupported
from .pipeline import Tally
from .records import RECORD_BYTES, Headers, Message, Receipt, Record, SendSummary, check_record
from .transaction import Transaction

CHUNK_RECORDS_MIN = 64
"""Records of the first chunk, and those whose size foretells that of the others."""
CHUNK_RECORDS_MAX = 2048
"""Records taken from an iterable at a time."""
GIVE_UP_S = 1.0
"""Leaving `async with` by an exception waits no longer than this for what is in flight."""


class Producer:
    """Sends to any topic. With a name its numbers outlive it: the broker remembers them for as long as the name exists.

    Made by `client.producer()`. Use it as `async with client.producer(NAME) as p`: entering takes the name (an older
    holder is fenced), leaving waits until everything is stored or raises what is not.
    """

    def __init__(self, engine: EngineProducer, named: bool, timeout: float) -> None:
        self._engine = engine
        self._named = named
        self._timeout = timeout
        self._closed = False

    @property
    def name(self) -> str:
        """The producer's name; random when none was given."""
        return self._engine.name

    @property
    def id(self) -> int:
        """The broker's number for this name; 0 before it is known."""
        return self._engine.id

    @property
    def epoch(self) -> int:
        """Which opening of the name this is; 0 before it is known."""
        return self._engine.epoch

    @property
    def last_seq(self) -> int:
        """The highest number known to be stored; -1: none."""
        return self._engine.last_seq

    @property
    def token(self) -> bytes | None:
        """The token stored last."""
        return self._engine.token

    @property
    def ended(self) -> bool:
        """Was it closed, fenced or forgotten, so that it takes no more messages?"""
        return self._closed or self._engine.ended

    async def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Headers | None = None,
        partition: int | None = None,
        seq: int | None = None,
        message_id: str | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Send one message and return when it is durable.

        Its number is fixed before the first await, so tasks that start in order are stored in order. Partition: the
        one given, else `crc32(key) % partitions`, else one that changes with every batch. A wait that ends (`timeout`
        seconds, or cancellation) does not take the message back: OutcomeUnknown has its `outcome()`.
        """
        if message_id is not None:
            raise Unsupported("message ids are not offered yet")
        record = Record(value, key, headers, partition, seq)
        return await self._open_engine().send(topic, record, self._limit(timeout))

    async def send_many(
        self,
        topic: str,
        records: Iterable[bytes | Record] | AsyncIterable[bytes | Record],
        *,
        timeout: float | None = None,
    ) -> SendSummary:
        """Send many messages, batched and pipelined; returns when all are durable.

        Numbers at or below `last_seq` count as duplicates and are not sent. `timeout` is a progress deadline: it starts
        again with every batch that is answered. Raises the first failure; what was enqueued before it goes on.
        """
        many = Many(self, topic, timeout)
        try:
            if isinstance(records, AsyncIterable):
                async for record in records:
                    await many.enqueue([record])
            else:
                for chunk in many.chunks(records):
                    await many.enqueue(chunk)
                    await asyncio.sleep(0)  # answers are read, and others run, between two chunks
            return await many.finish()
        finally:
            many.end()

    def transaction(
        self, batch: Sequence[Message] | Message | None = None, *, timeout: float | None = None
    ) -> Transaction:
        """Store messages on any topics, a token, and that a batch is done with, whole or not at all.

        `async with p.transaction(batch) as tx`; `batch` is what a subscription with a group handed out.
        """
        return Transaction(self._open_engine(), batch, self._limit(timeout))

    async def flush(self, timeout: float | None = None) -> None:
        """Wait until everything enqueued so far is decided. Raises the first failure that nobody was told of."""
        await self._engine.flush(self._limit(timeout))

    async def close(self, timeout: float | None = None) -> None:
        """Flush, then give the name up here (it stays with the broker). Raises what is not stored, or unknown."""
        if self._closed:
            return
        limit = self._limit(timeout)
        self._closed = True
        error: IdemqError | None = None
        try:
            if self._engine.unsettled:
                await self._engine.flush(limit)
        except OutcomeUnknown as unknown:
            error = unknown
        finally:
            left = self._engine.end()
        if error is not None:
            waiting = f"{len(left)} batches were not answered in time; their outcome is unknown" if left else error.text
            raise OutcomeUnknown(waiting, seq=self._engine.highest_seq)

    async def __aenter__(self) -> Producer:
        await self._engine.open(self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await leave(self.close, error)

    def _open_engine(self) -> EngineProducer:
        """What takes messages now: a name is opened first, because its numbers go on from those that are stored."""
        if self._closed:
            raise ClientClosed("the producer was closed")
        if self._named and not self._engine.opened:
            raise InvalidRequest(f"open the name first: async with client.producer({self.name!r}) as p")
        return self._engine

    def _limit(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else check_timeout(timeout)


class Many:
    """One `send_many` under way, a chunk at a time; blocking code takes the same steps from its own thread."""

    def __init__(self, producer: Producer, topic: str, timeout: float | None) -> None:
        self._producer = producer
        self._topic = topic
        self._timeout = producer._limit(timeout)
        self._tally = Tally()
        self._told = False
        """The caller knows that not all went well."""

    def chunks(self, records: Iterable[bytes | Record]) -> Iterator[list[bytes | Record]]:
        """Cut the records so that a chunk about fills a batch, whatever the size of a record is."""
        iterator = iter(records)
        size = CHUNK_RECORDS_MIN
        while chunk := list(islice(iterator, size)):
            yield chunk
            sample = [one if isinstance(one, bytes) else one.value for one in chunk[:CHUNK_RECORDS_MIN]]
            mean = RECORD_BYTES + sum(map(len, sample)) / len(sample)
            size = int(max(1, min(CHUNK_RECORDS_MAX, self._producer._engine.batch_bytes // mean)))

    async def enqueue(self, chunk: list[bytes | Record]) -> None:
        """Put a chunk in line, when there is room. Raises the first failure of any chunk."""
        engine = self._producer._open_engine()
        for one in chunk:
            if type(one) is not bytes and not isinstance(one, Record):
                check_record(one, None, None)  # raises: it names what is wrong
        while chunk:
            self._raise()  # behind a failure nothing more is put in line: its numbers would be skipped
            taken = await engine.enqueue(self._topic, chunk, self._tally, self._timeout)
            chunk = chunk[taken:]
        self._raise()

    async def finish(self) -> SendSummary:
        """Wait until everything is decided."""
        await self._producer._engine.finish(self._tally, self._timeout)
        self._raise()
        return SendSummary(self._tally.stored, self._tally.duplicates, self._producer.last_seq)

    def end(self) -> None:
        """Nobody waits any more: what fails from now on is told by flush or close, unless a failure was told before."""
        if not self._told:
            self._producer._engine.abandon(self._tally)

    def _raise(self) -> None:
        if self._tally.error is not None:
            self._told = True
            raise self._tally.error


async def leave(close: Callable[[float | None], Awaitable[None]], error: BaseException | None) -> None:
    """Leave `async with`. By an `error`: `close` has GIVE_UP_S, and what it raises becomes the error's note."""
    if error is None:
        await close(None)
        return
    try:
        await close(GIVE_UP_S)
    except IdemqError as left:
        error.add_note(f"and on leaving: {left}")


def check_timeout(value: float) -> float:
    """A timeout in seconds. Raises InvalidRequest for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e9:
        raise InvalidRequest(f"timeout is a number of seconds above 0, not {value!r}")
    return float(value)
