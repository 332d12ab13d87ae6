"""What travels between a client and the broker: requests, replies, error codes, limits, frames, the batch header.

Everything both sides must agree on is declared here once, so that adding a request is: its declaration, one handler in
the broker's core, one client method, its test. This file is pure and knows nobody: no socket, no clock, no store, and
not how a batch's records are laid out behind its header (`records.py`).

A frame is

    u32 length | u32 header length | header | payload          (big-endian; `length` counts everything after itself)

and its header is msgpack `[code, correlation, [field, ...]]`. The payload is raw bytes (batches), sliced and never
re-encoded. New fields go at the end of a declaration with a default; a code is never used again. The version
changes when a peer of the old version would misread the new one; both sides compare it in Hello before anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from struct import Struct
from struct import error as StructError
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgpack

try:  # the same CRC-32, several times faster, where the user installed it
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32


VERSION = 1
"""The protocol's version. A peer that speaks another one is refused with PROTOCOL_MISMATCH and disconnected."""
DATA_DIR = "./idemq-data"
"""Where a broker keeps its store by default, and commands on the same machine look for it."""
ADMIN_TOKEN_FILE = "admin.token"
"""In it: the token that a broker's first start beyond loopback makes, and commands on the same machine read."""

# ------------------------------------------------------------------------------------------------------------ limits

COMMIT_BYTES_MAX = 16 << 20
"""Payload of one commit, and so of one transaction."""
MESSAGE_BYTES_MAX = 8 << 20
"""Key, value and headers of one record together (half a commit, so that a record always fits)."""
HEADER_BYTES_MAX = 1 << 20
"""msgpack header of one frame."""
FRAME_BYTES_MAX = COMMIT_BYTES_MAX + HEADER_BYTES_MAX + 8
"""One whole frame. Checked before the body is read."""
HELLO_BYTES_MAX = 4 << 10
"""One frame before the handshake: a stranger may not make us buffer more."""
NAME_BYTES_MAX = 200
"""Names of topics, producers, groups, clients (LMDB keys end at 511 bytes)."""
TOKEN_BYTES_MAX = 4 << 10
"""An application's token, and an offset's metadata."""
APPENDS_MAX = 1024
"""Batches (and offset entries) in one commit, partitions in one fetch."""
PARTITIONS_MAX = 1024
"""Partitions of one topic."""
LEASES_MAX = 4096
"""Partitions that one member of a group holds."""
SUBSCRIBED_MAX = 256
"""Topics of one subscription."""
NAMES_MAX = 1000
"""Names in one metadata request, rows in one page of a listing."""
ITEMS_MAX = 1 << 17
"""Items of any list in a header."""
DETAILS_MAX = 16
"""Entries in the details of a refusal."""
FETCH_BYTES_MAX = 8 << 20
"""What one fetch may ask for; a single larger batch is still delivered."""
WAIT_MS_MAX = 60_000
"""How long a fetch may wait for data, or a heartbeat for something to change."""
REMEMBERED = 32
"""K: original results kept for each producer. PROTOCOL rule 12: at least the commits in flight."""
IN_FLIGHT_MAX = 16
"""W: commits a client keeps in flight for one producer."""
NUMBER_MAX = 2**63 - 1
"""The largest id, epoch, offset or sequence number."""


# ----------------------------------------------------------------------------------------------------- field types


class _Range(NamedTuple):
    low: int
    high: int


class _Text(NamedTuple):
    pattern: str
    bytes_max: int


class _Bytes(NamedTuple):
    length_max: int


class _Items(NamedTuple):
    count_max: int


Id = Annotated[int, _Range(1, NUMBER_MAX)]
"""Identifies a topic or producer for ever: ids come from one store-wide counter that never goes back."""
Count = Annotated[int, _Range(0, NUMBER_MAX)]
SequenceNumber = Annotated[int, _Range(-1, NUMBER_MAX)]
"""A sequence number; -1 stands before the first."""
Millis = Annotated[int, _Range(0, NUMBER_MAX)]
Name = Annotated[str, _Text(r"[^\x00-\x1f\x7f]+", NAME_BYTES_MAX)]
"""A producer, group, client or session: printable, any language."""
TopicName = Annotated[str, _Text(r"[A-Za-z0-9._-]+", NAME_BYTES_MAX)]
"""A topic: letters, digits, dot, underscore, dash."""
Text = Annotated[str, _Text(r".*", HELLO_BYTES_MAX)]
Token = Annotated[bytes, _Bytes(TOKEN_BYTES_MAX)]
PartitionIndex = Annotated[int, _Range(0, PARTITIONS_MAX - 1)]
PartitionCount = Annotated[int, _Range(1, PARTITIONS_MAX)]


# ------------------------------------------------------------------------------------------------------ error codes


class Code(StrEnum):
    """Stable error codes. What each asks of the caller stands in REMEDIES."""

    BAD_REQUEST = "BAD_REQUEST"
    PROTOCOL_MISMATCH = "PROTOCOL_MISMATCH"
    AUTH_FAILED = "AUTH_FAILED"
    UNKNOWN_PRODUCER = "UNKNOWN_PRODUCER"
    PRODUCER_FENCED = "PRODUCER_FENCED"
    STORE_REPLACED = "STORE_REPLACED"
    STALE_CONNECTION = "STALE_CONNECTION"
    SEQUENCE_CONFLICT = "SEQUENCE_CONFLICT"
    SEQUENCE_GAP = "SEQUENCE_GAP"
    LEASE_LOST = "LEASE_LOST"
    OFFSET_CONFLICT = "OFFSET_CONFLICT"
    UNKNOWN_TOPIC = "UNKNOWN_TOPIC"
    TOPIC_EXISTS = "TOPIC_EXISTS"
    TOO_LARGE = "TOO_LARGE"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    STORE_DAMAGED = "STORE_DAMAGED"
    OFFSET_TRUNCATED = "OFFSET_TRUNCATED"
    STORE_FULL = "STORE_FULL"
    BUSY = "BUSY"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    OPEN_RACE = "OPEN_RACE"
    UNSUPPORTED = "UNSUPPORTED"


class Meaning(NamedTuple):
    """What an error code asks of whoever receives it."""

    retriable: bool
    """The same request may succeed later, unchanged: the client's session repeats it by itself."""
    remedy: str
    """One sentence for a person: what to do next."""


REMEDIES: dict[Code, Meaning] = {
    Code.BAD_REQUEST: Meaning(False, "Correct the request; nothing was stored."),
    Code.PROTOCOL_MISMATCH: Meaning(
        False, "Use a client and a broker of the same protocol version, and check the port."
    ),
    Code.AUTH_FAILED: Meaning(
        False,
        f"Pass the broker's token (if none was set: {ADMIN_TOKEN_FILE} in its data directory): "
        "IDEMQ_TOKEN, IDEMQ_TOKEN_FILE, token= or the URL.",
    ),
    Code.UNKNOWN_PRODUCER: Meaning(
        False,
        "The producer was deleted or expired, so what was in flight is unknown: look at the log, then open it again.",
    ),
    Code.PRODUCER_FENCED: Meaning(
        False, "Another holder opened this producer name: stop, or give each process its own name."
    ),
    Code.STORE_REPLACED: Meaning(
        False, "The broker runs on another store than before (restored or new): reconcile by hand, then connect afresh."
    ),
    Code.STALE_CONNECTION: Meaning(
        False, "A newer connection of this producer exists: nothing was stored by the older one."
    ),
    Code.SEQUENCE_CONFLICT: Meaning(
        False, "Other bytes were stored under this number: give every message its own number."
    ),
    Code.SEQUENCE_GAP: Meaning(
        False, "The previous number is not the stored one: open the producer again and go on from last_seq."
    ),
    Code.LEASE_LOST: Meaning(
        False, "Nothing was stored and another member holds the partition: go on with the next batch."
    ),
    Code.OFFSET_CONFLICT: Meaning(False, "Nothing was stored, the group had already moved: go on with the next batch."),
    Code.UNKNOWN_TOPIC: Meaning(
        False, "Check the topic's name (idemq topic ls), or create it: idemq topic create NAME."
    ),
    Code.TOPIC_EXISTS: Meaning(False, "Use exist_ok with the same settings, alter the topic, or choose another name."),
    Code.TOO_LARGE: Meaning(
        False, "Send, or ask for, less at once: the text names the limit, which no setting changes."
    ),
    Code.CHECKSUM_MISMATCH: Meaning(
        False, "The bytes were damaged on their way: the client reconnects and sends again."
    ),
    Code.STORE_DAMAGED: Meaning(
        False, "Nothing was changed: stop the broker, run idemq verify on its data directory, restore it from a copy."
    ),
    Code.OFFSET_TRUNCATED: Meaning(
        False,
        "These messages were removed, by retention or a purge: seek to the earliest and account for what is missed.",
    ),
    Code.STORE_FULL: Meaning(True, "Free space: purge or delete topics, shorten retention, or raise store_bytes_max."),
    Code.BUSY: Meaning(True, "The broker is overloaded: send more slowly, or again later."),
    Code.QUOTA_EXCEEDED: Meaning(False, "Delete what is no longer used, or raise the quota named in the message."),
    Code.OPEN_RACE: Meaning(False, "Another holder opened this name at the same time: open it again."),
    Code.UNSUPPORTED: Meaning(False, "This broker does not offer that yet."),
}
assert REMEDIES.keys() == set(Code), "every code has its remedy"


class WireError(Exception):
    """A peer broke the rules of this file. `code` goes back to it; `fatal`: its frames can no longer be trusted."""

    def __init__(self, code: Code, text: str, *, fatal: bool = False, correlation: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.fatal = fatal
        self.correlation = correlation


# --------------------------------------------------------------------------------------------- requests and replies


class Hello(NamedTuple):
    """First frame of a connection. `version` stays the first field in every protocol version."""

    version: Count
    client: Text
    """Who is calling, for people: program, host, process."""
    token: Text = ""
    session: Text = ""
    """Random, one for each client session: only its newest connection decides anything. Empty: none is compared."""


class Welcome(NamedTuple):
    """Reply to Hello. The client compares `incarnation` and `txn_id` with what it knew BEFORE it sends anything."""

    version: Count
    broker: Text
    incarnation: Token
    """Names this store for ever; a restored copy has another."""
    txn_id: Count
    """Durable commits of the store so far; never goes back while the incarnation stays."""
    remembered: Count
    """K: how many original results are kept for each producer."""


class Ping(NamedTuple):
    """Are you there?"""


class Pong(NamedTuple):
    """Yes."""

    wall_ms: Millis


class Append(NamedTuple):
    """One batch of a commit: where it goes, and how many bytes of the payload are its own (in order)."""

    topic_id: Id
    partition: PartitionIndex
    length: Count


class Offset(NamedTuple):
    """One compare-and-swap of a group's position: only if the lease holds and `start` is what is stored."""

    group: Name
    topic_id: Id
    partition: PartitionIndex
    lease: Id
    start: Count
    end: Count
    metadata: Token | None = None
    attempts: Count | None = None
    """Failed attempts at the message at `end`; None leaves them, and a position that moves has none."""
    turns: Count = 0
    """How often an attempt has begun or ended under this lease: odd, while one at the message at `end` is under way. It
    counts as failed if the member vanishes then."""


class Commit(NamedTuple):
    """THE write. Everything in it is stored in one durable transaction, or nothing is.

    `producer_id` 0 stands for no producer: at least once, and `epoch`, `prev_seq`, `last_seq` then count for nothing.
    """

    producer_id: Count
    epoch: Count
    prev_seq: SequenceNumber
    last_seq: SequenceNumber
    appends: Annotated[list[Append], _Items(APPENDS_MAX)] = []  # noqa: RUF012 - never mutated, a NamedTuple's default
    offsets: Annotated[list[Offset], _Items(APPENDS_MAX)] = []  # noqa: RUF012
    token: Token | None = None


class Position(NamedTuple):
    """Where one batch of a commit came to lie: its first record's offset and the broker's time."""

    offset: Count
    timestamp_ms: Millis


class Committed(NamedTuple):
    """The commit is durable. `positions` follow its appends; None when a duplicate is no longer remembered."""

    duplicate: bool
    positions: Annotated[list[Position], _Items(APPENDS_MAX)] | None


class Open(NamedTuple):
    """Take a producer name: a compare-and-swap on its epoch, so that a late copy of this request takes nothing."""

    name: Name
    session: Name
    """Random, one for each client session: the same session asking again gets the epoch it has."""
    expected_epoch: Count
    """0: the name does not exist yet."""
    anonymous: bool = False
    """The name is random and its row goes when idle."""


class Opened(NamedTuple):
    """The name is yours. Numbers at or below `last_seq` are stored (-1: none)."""

    producer_id: Id
    epoch: Id
    last_seq: SequenceNumber
    token: Token | None


class TopicPartition(NamedTuple):
    """Names one partition."""

    topic_id: Id
    partition: PartitionIndex


class Held(NamedTuple):
    """A partition that a member of a group holds, by its own account."""

    topic_id: Id
    partition: PartitionIndex
    lease: Id
    releasing: bool = False
    """The member knows that it must give the partition back, and is finishing."""


class Heartbeat(NamedTuple):
    """I am a member of this group, and this is what I hold. It joins, stays, gives back, and without topics leaves.

    Answered as soon as something is to be changed in what the member holds, at the latest after `wait_ms`; a newer
    one of the same member answers it at once. It says how things are, so repeating it does no harm.
    """

    group: Name
    member: Name
    """Random, one for each subscription."""
    topics: Annotated[list[Id], _Items(SUBSCRIBED_MAX)]
    held: Annotated[list[Held], _Items(LEASES_MAX)]
    start_ms: Millis = 0
    """Where the group begins in a topic that is new to it: at the first message stored at or after this time."""
    start_offset: Count | None = None
    """Or at this offset."""
    in_hand_max: Count = 0
    """The member's promise: so many messages of a partition, at most, are in its hands behind the position; and one
    below a lease's `suspects_end` is in its hands alone, its attempt under way (`Offset.turns`). 0: no promise."""
    wait_ms: Annotated[int, _Range(0, WAIT_MS_MAX)] = 0


class Lease(NamedTuple):
    """A partition that a member holds from now on, and where it goes on."""

    topic_id: Id
    partition: PartitionIndex
    lease: Id
    next: Count
    attempts: Count
    """Attempts at the message at `next` that failed, or that their member did not survive."""
    suspects_end: Count
    """Below it messages may have been in hand when a member ended uncleanly: they are handled one at a time."""
    metadata: Token | None


class Assignment(NamedTuple):
    """Reply to Heartbeat: what is to be changed. All lists empty: nothing."""

    leases: Annotated[list[Lease], _Items(LEASES_MAX)]
    """Held from now on (or held already, and missing from the report)."""
    revoked: Annotated[list[TopicPartition], _Items(LEASES_MAX)]
    """Finish and commit what is in hand, then give back: report it no more."""
    lost: Annotated[list[TopicPartition], _Items(LEASES_MAX)]
    """Reported, and no longer held under that lease: nothing can be committed there."""
    member_timeout_ms: Millis
    """Without a heartbeat for so long a member counts as gone."""


class Seek(NamedTuple):
    """Set a group's position in one partition under a new lease: a compare-and-swap on the lease, as Open is."""

    group: Name
    topic_id: Id
    partition: PartitionIndex
    nonce: Name
    """Random: the repetition of this request is told from another's."""
    expected_lease: Count
    """0: never held, or no position there yet."""
    to: Count
    member: Text = ""
    """The member that holds the partition and goes on holding it, if it is the one who asks."""


class Sought(NamedTuple):
    """The position is set, under this lease."""

    lease: Id
    next: Count


class Settings(NamedTuple):
    """What can be set on a topic; None means without limit (or, for the window, without message ids)."""

    retention_ms: Annotated[int, _Range(1, NUMBER_MAX)] | None = None
    retention_bytes: Annotated[int, _Range(1, NUMBER_MAX)] | None = None
    dedup_window_ms: Annotated[int, _Range(1, NUMBER_MAX)] | None = None
    cleanup: Text = "delete"


class CreateTopic(NamedTuple):
    """Create a topic. Repeating it with the same settings and `exist_ok` answers the topic that is there."""

    name: TopicName
    partitions: PartitionCount
    settings: Settings
    exist_ok: bool = False
    nonce: Text = ""
    """Random: the creator's own repetition is told from somebody else's topic."""


class PartitionEntry(NamedTuple):
    """One partition: its first stored offset, the next to be given, and its stored bytes."""

    earliest: Count
    next: Count
    bytes: Count


class TopicEntry(NamedTuple):
    """One topic as it is stored."""

    name: TopicName
    topic_id: Id
    settings: Settings
    partitions: Annotated[list[PartitionEntry], _Items(PARTITIONS_MAX)]


class TopicIs(NamedTuple):
    """Reply to CreateTopic and AlterTopic."""

    topic: TopicEntry


class AlterTopic(NamedTuple):
    """Give a topic these settings and this many partitions. BAD_REQUEST if it has more. Idempotent."""

    topic_id: Id
    partitions: PartitionCount
    settings: Settings


class DeleteTopic(NamedTuple):
    """Delete a topic by id. An id that was given once and is gone is already deleted: Done."""

    topic_id: Id


class PurgeTopic(NamedTuple):
    """Remove what is stored below these offsets, one for each partition in order. Idempotent."""

    topic_id: Id
    before: Annotated[list[Count], _Items(PARTITIONS_MAX)]


class Done(NamedTuple):
    """It is so, durably."""


class Metadata(NamedTuple):
    """Topics by name; None: all. A page of them, in name order behind `after`; those not there are left out."""

    names: Annotated[list[Text], _Items(NAMES_MAX)] | None
    after: Text = ""


class Topics(NamedTuple):
    """Reply to Metadata; `more`: ask again with `after` the last name."""

    topics: Annotated[list[TopicEntry], _Items(NAMES_MAX)]
    more: bool


class Range(NamedTuple):
    """Where a fetch goes on in one partition."""

    topic_id: Id
    partition: PartitionIndex
    offset: Count


class Fetch(NamedTuple):
    """Read stored batches, at most about `bytes_max`, waiting up to `wait_ms` for the first."""

    ranges: Annotated[list[Range], _Items(APPENDS_MAX)]
    bytes_max: Annotated[int, _Range(1, FETCH_BYTES_MAX)]
    wait_ms: Annotated[int, _Range(0, WAIT_MS_MAX)]
    reader: Count = 0
    """Which reader of this connection asks: one of its fetches that still waits is answered at once, with nothing.
    0: none takes another's place."""


class BatchAt(NamedTuple):
    """One batch of a fetch: the offset of its first record, the broker's time, its bytes in the payload (in order)."""

    offset: Count
    timestamp_ms: Millis
    length: Count


class Part(NamedTuple):
    """What a fetch found in one partition. With a `code` the partition has no batches and `text` says why."""

    topic_id: Id
    partition: PartitionIndex
    earliest: Count
    next: Count
    batches: Annotated[list[BatchAt], _Items(ITEMS_MAX)]
    code: Text = ""
    text: Text = ""


class Fetched(NamedTuple):
    """Reply to Fetch: parts of those partitions that have something to say."""

    parts: Annotated[list[Part], _Items(APPENDS_MAX)]


class OffsetAt(NamedTuple):
    """Which is the first offset stored at or after this time?"""

    topic_id: Id
    partition: PartitionIndex
    timestamp_ms: Millis


class OffsetIs(NamedTuple):
    """Reply to OffsetAt; the partition's next offset when nothing is that young."""

    offset: Count


class ProducerEntry(NamedTuple):
    """One producer name as it is stored."""

    name: Name
    producer_id: Id
    epoch: Id
    last_seq: SequenceNumber
    token: Token | None
    holder: Text
    last_seen_ms: Millis


class Producers(NamedTuple):
    """Producers by name; None: all. A page of them, in name order behind `after`; those not there are left out."""

    names: Annotated[list[Text], _Items(NAMES_MAX)] | None
    after: Text = ""


class ProducersAre(NamedTuple):
    """Reply to Producers; `more`: ask again with `after` the last name."""

    producers: Annotated[list[ProducerEntry], _Items(NAMES_MAX)]
    more: bool


class DeleteProducer(NamedTuple):
    """Delete a producer by id, if its epoch is still this one. An id that is gone is Done."""

    producer_id: Id
    epoch: Id


class OffsetAfter(NamedTuple):
    """A place in the order of stored positions."""

    topic_id: Id
    partition: PartitionIndex
    group: Name


class OffsetEntry(NamedTuple):
    """A group's position in one partition as it is stored."""

    group: Name
    topic_id: Id
    partition: PartitionIndex
    next: Count
    lease: Count
    """0: never held."""
    holder: Text
    """The member that holds it; empty: nobody."""
    attempts: Count
    metadata: Token | None


class Offsets(NamedTuple):
    """Positions of one group; None: of all. A page of them, behind `after`."""

    group: Name | None
    after: OffsetAfter | None = None


class OffsetsAre(NamedTuple):
    """Reply to Offsets; `after`: ask again with it (this page may be empty). None: that was the last."""

    offsets: Annotated[list[OffsetEntry], _Items(NAMES_MAX)]
    after: OffsetAfter | None


class MemberEntry(NamedTuple):
    """A member of a group, alive as far as the broker knows."""

    group: Name
    member: Name
    client: Text
    """As it called itself."""
    address: Text
    held: Annotated[list[TopicPartition], _Items(LEASES_MAX)]


class Members(NamedTuple):
    """Members of one group; None: of all. A page of them, behind (group, member)."""

    group: Name | None
    after_group: Text = ""
    after_member: Text = ""


class MembersAre(NamedTuple):
    """Reply to Members; `more`: ask again behind the last."""

    members: Annotated[list[MemberEntry], _Items(NAMES_MAX)]
    more: bool


class DeleteOffsets(NamedTuple):
    """Forget a group's positions in a topic. BAD_REQUEST while the group has members. Idempotent."""

    group: Name
    topic_id: Id


class Failed(NamedTuple):
    """Any request's refusal. `details` are for programs: WIRE.md says which come with which code."""

    code: Text
    text: Text
    details: Annotated[dict[str, int | str | None], _Items(DETAILS_MAX)] = {}  # noqa: RUF012


class Facts(NamedTuple):
    """What both sides must know of a request besides its fields."""

    code: int
    reply: type[Any]
    reply_code: int
    decided: bool
    """The reply may rest on state that is decided and not yet durable: the core releases it with its group commit."""


REQUESTS: dict[type[Any], Facts] = {
    Hello: Facts(1, Welcome, 65, False),
    Ping: Facts(2, Pong, 66, False),
    Commit: Facts(3, Committed, 67, True),
    Open: Facts(4, Opened, 68, True),
    Seek: Facts(19, Sought, 79, True),
    CreateTopic: Facts(6, TopicIs, 70, True),
    AlterTopic: Facts(7, TopicIs, 70, True),
    DeleteTopic: Facts(8, Done, 71, True),
    PurgeTopic: Facts(9, Done, 71, True),
    Metadata: Facts(10, Topics, 72, True),
    Fetch: Facts(11, Fetched, 73, False),
    OffsetAt: Facts(12, OffsetIs, 74, False),
    Producers: Facts(13, ProducersAre, 75, True),
    DeleteProducer: Facts(14, Done, 71, True),
    Heartbeat: Facts(15, Assignment, 76, True),
    Offsets: Facts(16, OffsetsAre, 77, True),
    Members: Facts(17, MembersAre, 78, True),
    DeleteOffsets: Facts(18, Done, 71, True),
}
FAILED_CODE = 64

_CODES: dict[type[Any], int] = {
    Failed: FAILED_CODE,
    **{request: facts.code for request, facts in REQUESTS.items()},
    **{facts.reply: facts.reply_code for facts in REQUESTS.values()},
}
assert len(set(_CODES.values())) == len(_CODES), "a code names one declaration"


# ---------------------------------------------------------------------------------------------------- field checks
# Compiled once from the declarations, so that a decoded value has exactly the declared types and ranges and no handler
# can fail on a peer's junk. A checker returns the value it accepts and raises ValueError for all others.

_Checker = Callable[[Any], Any]


def _compile(hint: Any, where: str) -> _Checker:
    """The checker of one type hint; `where` names the field in its errors."""
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    if get_origin(hint) in (Union, UnionType):
        return _optional(hint, marks, where)
    if get_origin(hint) is list:
        return _list(_compile(get_args(hint)[0], where), marks[0].count_max, where)
    if get_origin(hint) is dict:
        return _details(marks[0].count_max, where)
    if hint is int:
        low, high = marks[0]
        return _integer(low, high, where)
    if hint is str:
        text: _Text = marks[0]
        return _string(text.pattern, text.bytes_max, where)
    if hint is bytes:
        return _binary(marks[0].length_max, where)
    if hint is bool:
        return _boolean(where)
    assert hasattr(hint, "_fields"), f"{where}: no checker for {hint}"
    return _tuple(hint)


def _optional(hint: Any, marks: tuple[Any, ...], where: str) -> _Checker:
    inner = [arm for arm in get_args(hint) if arm is not NoneType]
    assert len(inner) == 1, where
    check = _compile(Annotated[inner[0], *marks] if marks else inner[0], where)
    return lambda value: None if value is None else check(value)


def _integer(low: int, high: int, where: str) -> _Checker:
    def check(value: Any) -> int:
        if type(value) is not int:  # bool is an int to isinstance, and must not pass here
            raise ValueError(f"{where} must be an integer, not {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"{where} must lie in {low} .. {high}, not {value}")
        return value

    return check


def _string(pattern: str, bytes_max: int, where: str) -> _Checker:
    matches = re.compile(pattern, re.DOTALL).fullmatch

    def check(value: Any) -> str:
        if type(value) is not str:
            raise ValueError(f"{where} must be text, not {type(value).__name__}")
        if len(value.encode()) > bytes_max:
            raise ValueError(f"{where} is longer than {bytes_max} bytes")
        if not matches(value):
            raise ValueError(f"{where} may not be {value[:40]!r}: it must match {pattern}")
        return value

    return check


def _binary(length_max: int, where: str) -> _Checker:
    def check(value: Any) -> bytes:
        if type(value) is not bytes:
            raise ValueError(f"{where} must be bytes, not {type(value).__name__}")
        if len(value) > length_max:
            raise ValueError(f"{where} is longer than {length_max} bytes")
        return value

    return check


def _boolean(where: str) -> _Checker:
    def check(value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError(f"{where} must be true or false, not {type(value).__name__}")
        return value

    return check


def _list(item: _Checker, count_max: int, where: str) -> _Checker:
    def check(value: Any) -> list[Any]:
        if type(value) is not list and type(value) is not tuple:
            raise ValueError(f"{where} must be a list, not {type(value).__name__}")
        if len(value) > count_max:
            raise ValueError(f"{where} has more than {count_max} items")
        return [item(one) for one in value]

    return check


def _details(count_max: int, where: str) -> _Checker:
    def check(value: Any) -> dict[str, int | str | None]:
        if type(value) is not dict or len(value) > count_max:
            raise ValueError(f"{where} must be a map of at most {count_max} items")
        for key, item in value.items():
            if type(key) is not str or type(item) not in (int, str, NoneType):
                raise ValueError(f"{where} must map text to numbers or text")
        return value

    return check


def _tuple(declared: type[Any]) -> _Checker:
    hints = get_type_hints(declared, include_extras=True)
    checks = [_compile(hints[field], field) for field in declared._fields]
    required = len(checks) - len(declared._field_defaults)

    def check(value: Any) -> Any:
        if type(value) is not list and not isinstance(value, tuple):
            raise ValueError(f"{declared.__name__} must be a list of fields, not {type(value).__name__}")
        if len(value) < required:
            raise ValueError(f"{declared.__name__} has {len(value)} fields of at least {required}")
        # Fields behind those we know come from a newer peer of the same version, and count for nothing here.
        return declared(*[one(field) for one, field in zip(checks, value, strict=False)])

    return check


_CHECKERS: dict[int, _Checker] = {code: _tuple(declared) for declared, code in _CODES.items()}


def check(message: Any) -> None:
    """Raise ValueError, naming the field, unless the message is one that `decode` would accept."""
    _CHECKERS[_CODES[type(message)]](message)


# ---------------------------------------------------------------------------------------------------------- frames

_LENGTHS = Struct(">II")
_pack = msgpack.Packer(autoreset=True).pack


def encode(correlation: int, message: Any, payload_length: int = 0) -> bytes:
    """The bytes of one frame up to its payload, which the caller sends right behind (`payload_length` bytes of it)."""
    header: bytes = _pack((_CODES[type(message)], correlation, message))
    return _LENGTHS.pack(4 + len(header) + payload_length, len(header)) + header


def decode(header: bytes | memoryview) -> tuple[int, Any]:
    """One frame's header -> (correlation, request or reply). Raises WireError; memory is bounded by its size."""
    correlation = 0
    try:
        parts = msgpack.unpackb(
            header,
            max_array_len=ITEMS_MAX,
            max_map_len=DETAILS_MAX,
            max_str_len=HELLO_BYTES_MAX,
            max_bin_len=TOKEN_BYTES_MAX,
            max_ext_len=0,
            strict_map_key=True,
        )
        if type(parts) is not list or len(parts) < 3 or type(parts[0]) is not int or type(parts[1]) is not int:
            raise ValueError("a header is [code, correlation, [fields]]")
        if not 0 <= parts[1] <= NUMBER_MAX:
            raise ValueError("the correlation is out of range")
        correlation = parts[1]
        code = parts[0]
        if code == REQUESTS[Hello].code and type(parts[2]) is list and parts[2][:1] != [VERSION]:
            raise WireError(
                Code.PROTOCOL_MISMATCH,
                f"this broker speaks protocol version {VERSION}, the client asked for {str(parts[2][:1])[:40]}",
                fatal=True,
                correlation=correlation,
            )
        check = _CHECKERS.get(code)
        if check is None:
            raise WireError(Code.UNSUPPORTED, f"request code {code} is not known here", correlation=correlation)
        return correlation, check(parts[2])
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        # An ill-formed header breaks the protocol; a well-formed one with a field out of range is a refused request.
        fatal = correlation == 0
        text = str(error)[:200] or f"the header is no msgpack: {type(error).__name__}"
        raise WireError(Code.BAD_REQUEST, text, fatal=fatal, correlation=correlation) from None


class Splitter:
    """Bytes in, frames out. Knows lengths only; `bytes_max` is checked before a body is waited for.

    Call `feed()` with whatever the transport delivers and iterate over what it yields: (header, payload) of each whole
    frame, both as views that are valid until the next feed.
    """

    __slots__ = ("_buffer", "_need", "bytes_max")

    def __init__(self, bytes_max: int) -> None:
        self._buffer = bytearray()
        self._need = 8
        self.bytes_max = bytes_max

    @property
    def buffered_bytes(self) -> int:
        """Bytes of a frame that has not arrived whole."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (header, payload) of each frame completed by `data`. Raises a fatal WireError on a bad length."""
        buffer: bytes | bytearray
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._need:
                return
            buffer = self._buffer
        else:
            buffer = data  # the common case: whole frames, nothing is copied but the payload itself
        start, end = 0, len(buffer)
        while end - start >= 8:
            length, header_length = _LENGTHS.unpack_from(buffer, start)
            if not 4 <= length <= self.bytes_max:
                raise WireError(
                    Code.TOO_LARGE if length > self.bytes_max else Code.BAD_REQUEST,
                    f"a frame of {length} bytes; at most {self.bytes_max} are allowed here",
                    fatal=True,
                )
            if header_length > min(length - 4, HEADER_BYTES_MAX):
                text = f"a header of {header_length} bytes in a frame of {length}"
                raise WireError(Code.BAD_REQUEST, text, fatal=True)
            if end - start < 4 + length:
                self._need = 4 + length
                break
            body = start + 8
            frame_end = start + 4 + length
            yield bytes(buffer[body : body + header_length]), bytes(buffer[body + header_length : frame_end])
            start = frame_end
        else:
            self._need = 8
        if buffer is self._buffer:
            del self._buffer[:start]
        else:
            self._buffer += memoryview(data)[start:]


# ---------------------------------------------------------------------------------------------------- batch header
# The fixed part of a batch: made by the producing client, checked by the broker on append and by the consuming client
# on read. The checksum covers all that follows it, so also where the batch belongs: it cannot land on another topic
# unnoticed.
#
#   u32 checksum | u8 format | u8 codec | u32 records | u64 topic id | u32 partition | u64 producer id (0: none)
#   | i64 first sequence | i64 last sequence | u32 body length | body

BATCH_FORMAT = 1
BATCH_HEADER = Struct(">IBBIQIQqqI")


class Codec:
    """How a batch's body is compressed."""

    NONE = 0
    ZLIB = 1


class BatchHeader(NamedTuple):
    """The fixed part of a batch."""

    checksum: int
    format: int
    codec: int
    records: int
    topic_id: int
    partition: int
    producer_id: int
    first_seq: int
    last_seq: int
    body_length: int


def batch_header(batch: bytes | memoryview) -> BatchHeader:
    """A batch's header, not verified: nothing may be stored by it before `verify`. Raises WireError BAD_REQUEST."""
    try:
        return BatchHeader._make(BATCH_HEADER.unpack_from(batch))
    except StructError:
        raise WireError(Code.BAD_REQUEST, f"a batch of {len(batch)} bytes is shorter than its header") from None


def verified_header(batch: bytes | memoryview) -> BatchHeader:
    """The same, verified. Raises WireError CHECKSUM_MISMATCH or BAD_REQUEST."""
    header = batch_header(batch)
    verify(header, batch)
    return header


def verify(header: BatchHeader, batch: bytes | memoryview) -> None:
    """Refuse a batch that its header or checksum does not fit. Raises WireError CHECKSUM_MISMATCH or BAD_REQUEST."""
    if header.format != BATCH_FORMAT:
        raise WireError(Code.BAD_REQUEST, f"batch format {header.format} is not known here")
    if crc32(memoryview(batch)[4:]) != header.checksum:
        raise WireError(Code.CHECKSUM_MISMATCH, "the batch does not match its checksum")
    if header.body_length != len(batch) - BATCH_HEADER.size:
        raise WireError(Code.BAD_REQUEST, "the batch's length is not what its header says")
    if header.records < 1 or header.last_seq - header.first_seq < header.records - 1:
        text = f"a batch of {header.records} records numbered {header.first_seq} .. {header.last_seq}"
        raise WireError(Code.BAD_REQUEST, text)


def record_count(batch: bytes | memoryview) -> int:
    """How many records a verified batch holds."""
    count: int = BATCH_HEADER.unpack_from(batch)[3]
    return count


def make_batch(
    codec: int, count: int, topic_id: int, partition: int, producer_id: int, first_seq: int, last_seq: int, body: bytes
) -> bytes:
    """The bytes of a batch around `body` (see `records.py`)."""
    rest = BATCH_HEADER.pack(
        0, BATCH_FORMAT, codec, count, topic_id, partition, producer_id, first_seq, last_seq, len(body)
    )[4:]
    checksum: int = crc32(body, crc32(rest))
    return checksum.to_bytes(4, "big") + rest + body


def fingerprint(commit: Commit, headers: Sequence[BatchHeader]) -> int:
    """What tells a repeated commit from another one with the same `last_seq` (PROTOCOL rule 5).

    Covers everything else that would be stored, and neither epoch nor prev_seq, which change on a retry. For a single
    batch alone the core takes the batch's checksum, which covers as much. The value is stored: another formula is
    another format (`broker/schema.py`).
    """
    checksums = [header.checksum.to_bytes(4, "big") for header in headers]
    content: bytes = _pack((commit.last_seq, commit.appends, checksums, commit.offsets, commit.token))
    value: int = crc32(content)
    return value


def slices(lengths: Sequence[int], payload: bytes) -> list[bytes]:
    """Cut a payload into its parts. Raises WireError when they do not add up."""
    if sum(lengths) != len(payload):
        raise WireError(Code.BAD_REQUEST, f"parts of {sum(lengths)} bytes in a payload of {len(payload)}")
    if len(lengths) == 1:
        return [payload]
    parts, start = [], 0
    for length in lengths:
        parts.append(payload[start : start + length])
        start += length
    return parts
