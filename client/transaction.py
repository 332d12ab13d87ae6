"""A transaction: buffered here, sent whole when the block ends well, and stored whole or not at all.

The broker never holds an open transaction, so nothing here can hang, expire or block a reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from .engine import EngineProducer
from .errors import ClientClosed, InvalidRequest, TransactionTooLarge, Unsupported
from .positions import Move, aborted, closed, moves, opened, plan, rewind, stored
from .records import RECORD_BYTES, Headers, Message, Receipt, Record, check_record
from .session import TRANSACTION_BYTES_MAX
from .wire import TOKEN_BYTES_MAX


class Buffer:
    """What is to be stored together, whole or not at all: messages, a token, and positions that move."""

    __slots__ = ("_moves", "bytes", "sends", "token")

    def __init__(self) -> None:
        self.sends: list[tuple[str, Record]] = []
        self.bytes = 0
        self.token: bytes | None = None
        self._moves: list[tuple[Move, bytes | None]] = []

    @property
    def moved(self) -> list[Move]:
        """The positions."""
        return [move for move, _ in self._moves]

    def add(self, topic: str, record: Record) -> None:
        """One message more. Raises InvalidRequest, MessageTooLarge, TransactionTooLarge."""
        size = self.bytes + check_record(record.value, record.key, record.headers) + RECORD_BYTES
        if size > TRANSACTION_BYTES_MAX:
            raise TransactionTooLarge(f"a transaction holds at most {TRANSACTION_BYTES_MAX} bytes")
        self.bytes = size
        if record.headers is not None:  # a copy: the caller may fill the same mapping again for the next message
            record = record._replace(headers=dict(record.headers))
        self.sends.append((topic, record))

    def move(self, what: object, metadata: bytes | None = None) -> None:
        """Positions go behind these messages, and `metadata` with them."""
        for move in moves(what):
            self._merge(move, metadata)

    def absorb(self, other: Buffer) -> None:
        """And everything that is in another."""
        self.sends += other.sends
        self.bytes += other.bytes
        self.token = self.token if other.token is None else other.token
        for move, metadata in other._moves:
            self._merge(move, metadata)

    def _merge(self, move: Move, metadata: bytes | None) -> None:
        for index, (earlier, noted) in enumerate(self._moves):
            if earlier.leased is move.leased:
                earlier.first, earlier.end = min(earlier.first, move.first), max(earlier.end, move.end)
                self._moves[index] = (earlier, noted if metadata is None else metadata)
                return
        # A copy: what it is merged with grows, and what was absorbed may be stored in another way yet.
        self._moves.append((Move(move.leased, move.first, move.end), metadata))

    async def store(self, producer: EngineProducer, timeout: float) -> list[Receipt]:
        """Store it; returns the messages' receipts. What is not stored stays in hand, until `rewind`."""
        if not (self.sends or self.token is not None or self._moves):
            return []
        offsets = plan(self._moves)
        try:
            receipts = await producer.transact(self.sends, offsets, self.token, timeout)
        except BaseException:
            aborted(self.moved)
            raise
        stored(self.moved)
        return receipts


class Transaction:
    """Use it as `async with producer.transaction() as tx`. Any exception in the block: nothing is stored.

    With a batch, its messages are done with when, and only when, the transaction is stored; otherwise they are handed
    out again. LeaseLost and OffsetConflict mean that nothing was stored: go on with the next batch. Of several open at
    once those of a partition end in the order of their messages: one that would pass another is refused.

    After the block `receipts` holds one Receipt for each `send`, in order.
    """

    def __init__(self, producer: EngineProducer | None, batch: object, timeout: float) -> None:
        self.receipts: list[Receipt] = []
        self._buffer = Buffer()
        self._producer = producer
        self._timeout = timeout
        self._state: Literal["new", "open", "ended"] = "new"
        if batch is not None:
            self._buffer.move(batch)

    def send(
        self,
        topic: str,
        value: bytes,
        *,
        key: bytes | None = None,
        headers: Headers | None = None,
        partition: int | None = None,
        seq: int | None = None,
        message_id: str | None = None,
    ) -> None:
        """Add a message; nothing is sent before the block ends. Arguments as in `Producer.send`.

        Raises InvalidRequest, MessageTooLarge, or TransactionTooLarge as soon as the limit of 16 MiB is passed.
        """
        self._check_open()
        if message_id is not None:
            raise Unsupported("message ids are not offered yet")
        self._buffer.add(topic, Record(value, key, headers, partition, seq))

    def set_token(self, token: bytes) -> None:
        """Store a position of yours with the transaction; it comes back as `producer.token` when the name is opened."""
        self._check_open()
        if type(token) is not bytes or len(token) > TOKEN_BYTES_MAX:
            raise InvalidRequest(f"a token is bytes, at most {TOKEN_BYTES_MAX}")
        self._buffer.token = token

    def commit_offsets(self, batch: Sequence[Message] | Message, metadata: bytes | None = None) -> None:
        """Move a group's positions behind these messages, with the transaction; cumulative for each partition.

        `metadata`: bytes of yours, stored with each position and handed to whoever holds the partition next.
        """
        self._check_open()
        if metadata is not None and (type(metadata) is not bytes or len(metadata) > TOKEN_BYTES_MAX):
            raise InvalidRequest(f"metadata is bytes, at most {TOKEN_BYTES_MAX}")
        self._buffer.move(batch, metadata)
        if self._producer is not None:  # what is in a handler's hands is known to whoever calls it
            opened(self._buffer.moved)

    def _check_open(self) -> None:
        if self._state != "open":
            raise ClientClosed("a transaction takes messages only inside its `async with` block")

    async def __aenter__(self) -> Transaction:
        if self._state != "new":
            raise InvalidRequest("a transaction is used once: make a new one")
        self._state = "open"
        opened(self._buffer.moved)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "ended"
        closed(self._buffer.moved)
        if error is not None:
            rewind(self._buffer.moved, error)
            return
        assert self._producer is not None, "a handler's own has no block"
        try:
            self.receipts = await self._buffer.store(self._producer, self._timeout)
        except BaseException as failed:
            rewind(self._buffer.moved, failed)
            raise


class HandlerTransaction(Transaction):
    """A handler's own: open until `end`, without a block. Whoever called the handler stores what it holds."""

    def __init__(self) -> None:
        super().__init__(None, None, 0.0)
        self._state = "open"

    def end(self) -> Buffer:
        """Nothing more is taken. Returns what it holds."""
        self._state = "ended"
        return self._buffer
