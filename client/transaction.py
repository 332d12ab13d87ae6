"""A transaction: buffered here, sent whole when the block ends well, and stored whole or not at all.

The broker never holds an open transaction, so nothing here can hang, expire or block a reader.
"""

from __future__ import annotations

from types import TracebackType

from .engine import EngineProducer
from .errors import ClientClosed, InvalidRequest, TransactionTooLarge, Unsupported
from .records import Headers, Receipt, Record, check_record
from .wire import COMMIT_BYTES_MAX, TOKEN_BYTES_MAX


class Transaction:
    """Use it as `async with producer.transaction() as tx`. Any exception in the block: nothing is stored.

    After the block `receipts` holds one Receipt for each `send`, in order.
    """

    def __init__(self, producer: EngineProducer, timeout: float) -> None:
        self.receipts: list[Receipt] = []
        self._producer = producer
        self._timeout = timeout
        self._sends: list[tuple[str, Record]] = []
        self._bytes = 0
        self._token: bytes | None = None
        self._state = "new"

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
        self._bytes += check_record(value, key, headers) + 16
        if self._bytes > COMMIT_BYTES_MAX:
            raise TransactionTooLarge(f"a transaction holds at most {COMMIT_BYTES_MAX} bytes")
        # A copy: the caller may fill the same mapping again for the next message.
        self._sends.append((topic, Record(value, key, None if headers is None else dict(headers), partition, seq)))

    def set_token(self, token: bytes) -> None:
        """Store a position of yours with the transaction; it comes back as `producer.token` when the name is opened."""
        self._check_open()
        if type(token) is not bytes or len(token) > TOKEN_BYTES_MAX:
            raise InvalidRequest(f"a token is bytes, at most {TOKEN_BYTES_MAX}")
        self._token = token

    def commit_offsets(self, batch: object, metadata: bytes | None = None) -> None:
        """Move a group's positions with the transaction: not offered yet."""
        raise Unsupported("a transaction over a group's batch is not offered yet")

    def _check_open(self) -> None:
        if self._state != "open":
            raise ClientClosed("a transaction takes messages only inside its `async with` block")

    async def __aenter__(self) -> Transaction:
        if self._state != "new":
            raise InvalidRequest("a transaction is used once: make a new one")
        self._state = "open"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "ended"
        if kind is not None or not (self._sends or self._token is not None):
            return
        self.receipts = await self._producer.transact(self._sends, [], self._token, self._timeout)
