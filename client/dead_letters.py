"""Messages that were set aside, both ways: dead letters, and messages parked for another attempt.

Such a copy has the value, key and headers of the original, and headers of ours that say whence it came and why; whoever
takes ours away has the original again (`original_headers`).

A dead-letter topic is a log like any other: nothing is removed from its middle. So what has left it (requeued, dropped)
is noted in the token of a producer with a fixed name, `idemq-dlq:TOPIC`, as a set of offsets. The token and the
messages that go back to their topics are ONE transaction of that producer. Opening the name returns the token as it is
decided and fences whoever held it, so of two operators the first can store nothing any more once the second has read
what is left: no message goes back twice, whoever asks, crashes or asks again. A token has room for 4 KiB: tens of
thousands of offsets behind the oldest that is left, and a refusal beyond.
"""

from __future__ import annotations

import asyncio
import traceback
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import msgpack

from .errors import ConnectionLost, FatalError, InvalidRequest, ProtocolMismatch, UnknownProducer
from .records import Delivery, Message, Record, StoredBatch
from .retry import DELAY_S_MAX
from .wire import COMMIT_BYTES_MAX, NAME_BYTES_MAX, NUMBER_MAX, PARTITIONS_MAX, TOKEN_BYTES_MAX

if TYPE_CHECKING:
    from .client import Client
    from .producer import Producer

DEAD_LETTER = "idemq-dlq-"
PARKED = "idemq-retry-"
"""How the names of our headers begin."""
_PRODUCER = "idemq-dlq:"
"""How the producer's name begins that notes what has left a topic; behind it the topic's, or a hash of a long one."""
_ESCAPE = "was-"
"""Behind our beginning: a header that the original had under such a name itself."""
REASON_BYTES_MAX = 1 << 10
TRACEBACK_BYTES_MAX = 8 << 10
"""Of a traceback the end is kept, where the error is."""


class Failure(NamedTuple):
    """Why a message is set aside."""

    group: str
    attempts: int
    reason: str
    error: BaseException | None
    time_ms: int
    """When, by the clock of whoever set it aside."""


class Place(NamedTuple):
    """A message's place in its topic."""

    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}"


# ------------------------------------------------------------------------------------------------------- the copies


def dead_letter(message: Message, failure: Failure) -> Record:
    """The record for the dead-letter topic."""
    ours = _origin(message) | _why(failure) | {"time": str(failure.time_ms)}
    if failure.error is not None:
        ours["traceback"] = _end("".join(traceback.format_exception(failure.error)), TRACEBACK_BYTES_MAX)
    return Record(message.value, message.key, _headers(DEAD_LETTER, message, ours))


def parked(message: Message, failure: Failure, delay_s: float) -> Record:
    """The record for the parking topic: not to be delivered within `delay_s` seconds of being stored there."""
    ours = (
        _origin(message) | _why(failure) | {"timestamp": str(message.timestamp), "delay-ms": str(round(delay_s * 1000))}
    )
    return Record(message.value, message.key, _headers(PARKED, message, ours))


def facts(prefix: str, headers: Mapping[str, bytes]) -> dict[str, str]:
    """Our headers of a copy, without their beginning; empty when it is none of ours."""
    return {
        name.removeprefix(prefix): value.decode(errors="replace")
        for name, value in headers.items()
        if name.startswith(prefix) and not name.startswith(prefix + _ESCAPE)
    }


def original_headers(prefix: str, headers: Mapping[str, bytes]) -> dict[str, bytes]:
    """The headers of the original."""
    escaped = prefix + _ESCAPE
    return {
        name.removeprefix(escaped) if name.startswith(escaped) else name: value
        for name, value in headers.items()
        if name.startswith(escaped) or not name.startswith(prefix)
    }


class Parked(NamedTuple):
    """What a parked copy says."""

    group: str
    attempts: int
    delay_s: float
    message: Message
    """The original: its topic, partition, offset, headers, timestamp and uid; under the lease of the copy."""


def unpark(copy: Message, lease: int, stored_attempts: int) -> Parked | None:
    """The message that a copy in a parking topic stands for; None when it is no such copy.

    `stored_attempts`: at the copy. The original is delivered as what the copy is: in vain before, or suspected.
    """
    said = facts(PARKED, copy.headers)
    try:
        attempts = int(said["attempts"]) + stored_attempts
        partition, offset = int(said["partition"]), int(said["offset"])
        uid, timestamp, delay_s = bytes.fromhex(said["uid"]), int(said["timestamp"]), int(said["delay-ms"]) / 1000
        topic, group = said["topic"], said["group"]
    except (KeyError, ValueError, OverflowError):
        return None
    places = 0 <= partition < PARTITIONS_MAX and 0 <= offset <= NUMBER_MAX
    if not places or not 0 <= delay_s <= DELAY_S_MAX or not 0 <= attempts <= NUMBER_MAX:  # anybody may write there
        return None
    incarnation, rest = uid[:16], uid[16:]
    producer_id, seq = (int.from_bytes(rest[:8]), int.from_bytes(rest[8:])) if len(rest) == 16 else (0, 0)
    topic_id = int.from_bytes(rest[:8]) if len(rest) != 16 else copy[0].header.topic_id
    header = copy[0].header._replace(
        records=1, topic_id=topic_id, partition=partition, producer_id=producer_id, first_seq=seq, last_seq=seq
    )
    stored = StoredBatch(
        topic,
        offset,
        timestamp,
        incarnation,
        header,
        [copy.value],
        [copy.key],
        [original_headers(PARKED, copy.headers)],
        None,
    )
    suspected = copy.offset < copy[0].delivery.suspects_end
    stored.delivery = Delivery(lease, offset, attempts, offset + suspected)
    (message,) = stored.messages(0, 1)
    return Parked(group, attempts, delay_s, message)


def _origin(message: Message) -> dict[str, str]:
    return {
        "topic": message.topic,
        "partition": str(message.partition),
        "offset": str(message.offset),
        "uid": message.uid.hex(),
    }


def _why(failure: Failure) -> dict[str, str]:
    error = failure.error
    reason = failure.reason or ("" if error is None else _said(error))
    why = {"group": failure.group, "attempts": str(failure.attempts), "reason": _start(reason, REASON_BYTES_MAX)}
    if error is not None:
        kind = type(error)
        why["error"] = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return why


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a user's own, which fails: its message is a dead letter nevertheless
        return ""


def _headers(prefix: str, message: Message, ours: Mapping[str, str]) -> dict[str, bytes]:
    theirs = {
        f"{prefix}{_ESCAPE}{name}" if name.startswith(prefix) else name: value
        for name, value in message.headers.items()
    }
    return theirs | {prefix + name: value.encode(errors="backslashreplace") for name, value in ours.items()}


def _start(text: str, size: int) -> str:
    return text.encode(errors="backslashreplace")[:size].decode(errors="ignore")


def _end(text: str, size: int) -> str:
    return text.encode(errors="backslashreplace")[-size:].decode(errors="ignore")


# ------------------------------------------------------------------------------------------------- what is left


_TOKEN_VERSION = 1


class Gone:
    """Which messages have left a dead-letter topic; goes into a producer's token."""

    def __init__(self, topic_id: int, token: bytes | None = None) -> None:
        self._topic_id = topic_id
        self._offsets: dict[int, set[int]] = {}
        """Of each partition, those behind its oldest that is left."""
        self._below: dict[int, int] = {}
        """Below it all are gone."""
        if token is None:
            return
        version, known_id, partitions = msgpack.unpackb(zlib.decompress(token))
        if version != _TOKEN_VERSION:
            raise ProtocolMismatch("a newer client noted which dead letters are gone: use that")
        if known_id != topic_id:
            return  # of a topic of the same name, which was deleted
        for partition, below, bits in partitions:
            self._below[partition] = below
            self._offsets[partition] = {
                below + 8 * place + bit
                for place, byte in enumerate(bits)
                if byte
                for bit in range(8)
                if byte >> bit & 1
            }

    def below(self, partition: int) -> int:
        """All before this offset are gone."""
        return self._below.get(partition, 0)

    def __contains__(self, place: Place) -> bool:
        return place.offset < self.below(place.partition) or place.offset in self._offsets.get(place.partition, ())

    def add(self, places: Iterable[Place], earliest: Sequence[int]) -> None:
        """These leave now. `earliest`: of each partition, the first that is stored."""
        for place in places:
            self._offsets.setdefault(place.partition, set()).add(place.offset)
        for partition, offsets in self._offsets.items():
            below = max(self.below(partition), earliest[partition])
            while below in offsets:
                below += 1
            self._below[partition] = below
            self._offsets[partition] = {offset for offset in offsets if offset >= below}

    def token(self) -> bytes:
        """As bytes. Raises InvalidRequest when there are too many holes."""
        partitions = []
        for partition, below in self._below.items():
            offsets = self._offsets[partition]
            bits = sum(1 << (offset - below) for offset in offsets)
            partitions.append((partition, below, bits.to_bytes((bits.bit_length() + 7) // 8, "little")))
        token = zlib.compress(msgpack.packb((_TOKEN_VERSION, self._topic_id, partitions)))
        if len(token) > TOKEN_BYTES_MAX:
            raise InvalidRequest(
                "no more can be noted as gone behind so many that are left: requeue or drop the oldest"
            )
        return token


TAKE_OUT_MESSAGES_MAX = 500
TAKE_OUT_BYTES_MAX = COMMIT_BYTES_MAX // 2
"""What leaves in one transaction, beside one message."""


class DeadLetters:
    """A dead-letter topic: what is left in it, and taking messages out."""

    def __init__(self, client: Client, topic: str) -> None:
        self._client = client
        self._topic = topic
        self._producer = _PRODUCER + topic
        if len(self._producer) > NAME_BYTES_MAX:
            self._producer = _PRODUCER + sha256(topic.encode()).hexdigest()

    async def left(self, places: Sequence[Place] | None = None) -> AsyncIterator[Message]:
        """The messages (of these places, if given) that were neither requeued nor dropped, in order for each partition.

        `origin` tells which of them are dead letters. Raises UnknownTopic.
        """
        info = await self._client.describe_topic(self._topic)
        try:
            token = (await self._client.describe_producer(self._producer)).token
        except UnknownProducer:
            token = None
        async for message in self._read(Gone(info.id, token), places):
            yield message

    async def requeue(self, places: Sequence[Place] | None = None) -> int:
        """Send messages (None: all that are left) back to where they came from, and take them out of here.

        Returns how many. Raises NoDeadLetter when one is not there (any more), or is none;
        ProducerFenced when somebody else began the same meanwhile. What was done until then is done.
        """
        return await self._take_out(places, True)

    async def drop(self, places: Sequence[Place] | None = None) -> int:
        """Take messages (None: all that are left) out. As `requeue`, but they go nowhere."""
        return await self._take_out(places, False)

    async def _take_out(self, places: Sequence[Place] | None, send: bool) -> int:
        info = await self._client.describe_topic(self._topic)
        async with self._client.producer(self._producer) as producer:
            gone = Gone(info.id, producer.token)
            for place in places or ():
                ends = info.partitions[place.partition] if 0 <= place.partition < len(info.partitions) else None
                if ends is None or place in gone or not ends.earliest <= place.offset < ends.next:
                    text = f"there is no dead letter {place} in {self._topic!r} (any more)"
                    raise NoDeadLetter(text, remedy="See those that are left: idemq dlq ls.")
            earliest = [one.earliest for one in info.partitions]
            count = size = 0
            some: list[tuple[Message, Origin]] = []
            async for message in self._read(gone, places):
                back = origin(message)
                more = len(message.value) + len(message.key or b"") + sum(map(len, message.headers.values()))
                if some and (size + more > TAKE_OUT_BYTES_MAX or len(some) == TAKE_OUT_MESSAGES_MAX):
                    await _store(producer, gone, earliest, some, send)
                    count, size, some = count + len(some), 0, []
                some.append((message, back))
                size += more
            if some:
                await _store(producer, gone, earliest, some, send)
            return count + len(some)

    async def _read(self, gone: Gone, places: Sequence[Place] | None) -> AsyncIterator[Message]:
        """What is stored now and not gone; of `places` only, if they are given."""
        wanted = None if places is None else set(places)
        async with self._client.subscribe(self._topic, on_truncated="earliest") as sub:
            ends = {where: at + sub.lag()[where] for where, at in sub.positions().items()}
            for (topic, index), position in sub.positions().items():
                first, end = max(position, gone.below(index)), ends[topic, index]
                if wanted is not None:
                    mine = [place.offset for place in wanted if place.partition == index]
                    first, end = min(mine, default=end), min(max(mine, default=end - 1) + 1, end)
                ends[topic, index] = end
                if first < end:
                    await sub.seek(topic, index, first)
                else:
                    await sub.pause(topic, index)
                    del ends[topic, index]

            def is_through() -> bool:
                return all(sub.positions()[where] >= end for where, end in ends.items())

            batches = sub.batches(TAKE_OUT_MESSAGES_MAX, 0.0)
            while not is_through():
                try:
                    async with asyncio.timeout(self._client._timeout):
                        batch = await anext(batches)
                except TimeoutError:
                    if is_through():  # what was left is gone meanwhile
                        break
                    raise ConnectionLost(f"messages of {self._topic!r} that the broker has do not come") from None
                for message in batch:
                    place = Place(message.partition, message.offset)
                    left = place.offset < ends[message.topic, place.partition] and place not in gone
                    if left and (wanted is None or place in wanted):
                        yield message


async def _store(
    producer: Producer, gone: Gone, earliest: Sequence[int], letters: list[tuple[Message, Origin]], send: bool
) -> None:
    """One transaction: the messages go back, and are noted as gone."""
    gone.add([Place(one.partition, one.offset) for one, _ in letters], earliest)
    async with producer.transaction() as tx:
        for one, back in letters if send else ():
            headers = original_headers(DEAD_LETTER, one.headers)
            tx.send(back.topic, one.value, key=one.key, headers=headers, partition=back.partition)
        tx.set_token(gone.token())


class Origin(NamedTuple):
    """Where a dead letter came from."""

    topic: str
    partition: int


class NoDeadLetter(FatalError):
    """A message that nobody set aside: anybody may write into a dead-letter topic, or take another topic for one."""

    code = "NO_DEAD_LETTER"
    remedy = "Check the topic's name."


def origin(message: Message) -> Origin:
    """Raises NoDeadLetter."""
    said = facts(DEAD_LETTER, message.headers)
    try:
        return Origin(said["topic"], int(said["partition"]))
    except (KeyError, ValueError):
        place = Place(message.partition, message.offset)
        text = f"message {place} of {message.topic!r} is no dead letter: it does not say where it came from"
        raise NoDeadLetter(text) from None
