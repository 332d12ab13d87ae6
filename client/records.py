"""Records and the bytes of a batch, both ways; and the values that users get back: `Receipt`, `Message`.

The body of a batch is msgpack in columns, which is five times cheaper than rows, and an unused column costs nothing:

    [values, keys | nil, headers | nil, sequence deltas | nil]

`deltas` are distances from the batch's first sequence; nil when the numbers are dense. Pure: no clock, no connection.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from struct import Struct
from typing import Any, NamedTuple

import msgpack

from . import wire
from .errors import ChecksumMismatch, InvalidRequest, MessageTooLarge

Headers = Mapping[str, bytes]

BODY_BYTES_MAX = 64 << 20
"""What a compressed body may grow to: four times what a commit holds."""
RECORD_BYTES = 16
"""What a record adds to a batch beside its value, key and headers, about."""
OUR_HEADERS = "idemq-"
"""How the names of headers begin that are ours, not the user's."""
OUR_HEADERS_BYTES_MAX = 1 << 20
"""What they may come to beside a message of the largest size."""
_UID_PRODUCER = Struct(">QQ")
_UID_LOG = Struct(">QIQ")


class Record(NamedTuple):
    """A message to send with `send_many`."""

    value: bytes
    key: bytes | None = None
    headers: Headers | None = None
    partition: int | None = None
    seq: int | None = None
    message_id: str | None = None


class Receipt(NamedTuple):
    """A message is stored. `offset` and `timestamp` (the broker's, in ms since 1970) are None when it was stored before
    and its result is not remembered; `partition` is then the one that it was given or that its key leads to, and None
    when that could be any, or the topic is not known here yet."""

    topic: str
    partition: int | None
    offset: int | None
    seq: int | None
    timestamp: int | None
    duplicate: bool


class SendSummary(NamedTuple):
    """What became of a `send_many`: stored now, stored before, and the producer's last number."""

    stored: int
    duplicates: int
    last_seq: int


def _no_bytes(what: str, value: object) -> InvalidRequest:
    hint = ": use .encode()" if isinstance(value, str) else ""
    return InvalidRequest(f"{what} must be bytes, not {type(value).__name__}{hint}")


def check_record(value: Any, key: Any, headers: Any) -> int:
    """The size of a record in bytes. Raises InvalidRequest for wrong types, MessageTooLarge beyond the limit.

    Headers of our own do not count for the limit, up to theirs: a message of the largest size, too, can become a dead
    letter. They count for the size.
    """
    if type(value) is not bytes:
        raise _no_bytes("a value", value)
    size, ours = len(value), 0
    if key is not None:
        if type(key) is not bytes:
            raise _no_bytes("a key", key)
        size += len(key)
    if headers is not None:
        if not isinstance(headers, Mapping):
            raise InvalidRequest(f"headers must be a mapping, not {type(headers).__name__}")
        for name, item in headers.items():
            if type(name) is not str or type(item) is not bytes:
                raise InvalidRequest("headers map text to bytes")
            try:
                header = len(name.encode()) + len(item) + 10
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"a header's name is no text: {error}") from None
            size += header
            ours += header if name.startswith(OUR_HEADERS) else 0
    if size - min(ours, OUR_HEADERS_BYTES_MAX) > wire.MESSAGE_BYTES_MAX:
        raise MessageTooLarge(f"a message of {size} bytes; at most {wire.MESSAGE_BYTES_MAX} are allowed")
    return size


def pack(
    values: Sequence[bytes],
    keys: Sequence[bytes | None] | None,
    headers: Sequence[Headers | None] | None,
    deltas: Sequence[int] | None,
    codec: int,
) -> bytes:
    """The body of a batch."""
    body: bytes = msgpack.packb((values, keys, headers, deltas))
    return zlib.compress(body, 1) if codec == wire.Codec.ZLIB else body


def unpack(batch: bytes, offset: int, timestamp_ms: int, topic: str, incarnation: bytes) -> StoredBatch:
    """A stored batch, verified and decoded. Raises ChecksumMismatch; inflates to BODY_BYTES_MAX at most."""
    try:
        header = wire.verified_header(batch)
        body: bytes | memoryview = memoryview(batch)[wire.BATCH_HEADER.size :]
        if header.codec == wire.Codec.ZLIB:
            inflater = zlib.decompressobj()
            body = inflater.decompress(body, BODY_BYTES_MAX)
            if not inflater.eof:
                raise ValueError(f"the body is larger than {BODY_BYTES_MAX} bytes")
        elif header.codec != wire.Codec.NONE:
            raise ValueError(f"codec {header.codec} is not known here")
        values, keys, headers, deltas = msgpack.unpackb(body, max_ext_len=0)
        count = header.records
        if len(values) != count or any(
            len(column) != count for column in (keys, headers, deltas) if column is not None
        ):
            raise ValueError("the columns are not as long as the header says")
    except (wire.WireError, ValueError, TypeError, zlib.error, msgpack.exceptions.UnpackException) as error:
        raise ChecksumMismatch(f"batch at {offset} of topic {topic!r}: {error}") from error
    return StoredBatch(topic, offset, timestamp_ms, incarnation, header, values, keys, headers, deltas)


class Delivery:
    """Under which lease a group's messages of one partition are delivered, and what is known of earlier deliveries."""

    __slots__ = ("attempts", "head", "lease", "suspects_end")

    def __init__(self, lease: int, head: int, attempts: int, suspects_end: int) -> None:
        self.lease = lease
        self.head = head
        """The message that `attempts` counts for."""
        self.attempts = attempts
        self.suspects_end = suspects_end
        """Messages below it may have been in hand when a member ended uncleanly."""

    def attempt(self, offset: int) -> int:
        """Which delivery this may be, counted from 1."""
        return 1 + (self.attempts if offset == self.head else 0) + int(offset < self.suspects_end)


UNLEASED = Delivery(0, 0, 0, 0)
"""To a reader without a group."""


class StoredBatch:
    """One batch as it was read; its messages are made when they are asked for."""

    __slots__ = (
        "delivery",
        "deltas",
        "header",
        "headers",
        "incarnation",
        "keys",
        "offset",
        "timestamp_ms",
        "topic",
        "values",
    )

    def __init__(
        self,
        topic: str,
        offset: int,
        timestamp_ms: int,
        incarnation: bytes,
        header: wire.BatchHeader,
        values: list[bytes],
        keys: list[bytes | None] | None,
        headers: list[dict[str, bytes] | None] | None,
        deltas: list[int] | None,
    ) -> None:
        self.topic = topic
        self.offset = offset
        self.timestamp_ms = timestamp_ms
        self.incarnation = incarnation
        self.header = header
        self.values = values
        self.keys = keys
        self.headers = headers
        self.deltas = deltas
        self.delivery = UNLEASED

    def messages(self, start: int, stop: int) -> Iterator[Message]:
        """The messages at indices `start` .. `stop`."""
        return map(_message, zip(repeat(self), range(start, stop)))

    def seq(self, index: int) -> int:
        """The producer's number of one message."""
        return self.header.first_seq + (index if self.deltas is None else self.deltas[index])


class Message(tuple[StoredBatch, int]):
    """A message as it was read: a small view on its batch, so that reading costs what is looked at."""

    __slots__ = ()

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self[0].topic

    @property
    def partition(self) -> int:
        """The partition's index."""
        return self[0].header.partition

    @property
    def offset(self) -> int:
        """The place in its partition."""
        return self[0].offset + self[1]

    @property
    def value(self) -> bytes:
        """The payload."""
        return self[0].values[self[1]]

    @property
    def key(self) -> bytes | None:
        """The key, if one was sent."""
        keys = self[0].keys
        return None if keys is None else keys[self[1]]

    @property
    def headers(self) -> dict[str, bytes]:
        """The headers; empty when none were sent."""
        headers = self[0].headers
        return {} if headers is None else headers[self[1]] or {}

    @property
    def timestamp(self) -> int:
        """The broker's time when it was stored, in ms since 1970."""
        return self[0].timestamp_ms

    @property
    def attempt(self) -> int:
        """Which delivery to the group this may be, at least; 1 for a reader without a group."""
        return self[0].delivery.attempt(self.offset)

    @property
    def lease(self) -> int:
        """The group's lease it was delivered under, a fencing token that only grows; 0 without a group."""
        return self[0].delivery.lease

    @property
    def seq(self) -> int | None:
        """The producer's number; None when it was sent without dedup."""
        return self[0].seq(self[1]) if self[0].header.producer_id else None

    @property
    def uid(self) -> bytes:
        """Names the message for ever: (store incarnation, producer id, sequence); without dedup, where it lies."""
        batch, header = self[0], self[0].header
        if header.producer_id:
            return batch.incarnation + _UID_PRODUCER.pack(header.producer_id, batch.seq(self[1]))
        return batch.incarnation + _UID_LOG.pack(header.topic_id, header.partition, self.offset)

    def __repr__(self) -> str:
        return f"Message({self.topic!r}, {self.partition}, {self.offset}, key={self.key!r}, value={self.value!r})"


def _message(pair: tuple[StoredBatch, int]) -> Message:
    return tuple.__new__(Message, pair)
