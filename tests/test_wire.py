"""The wire: every declaration survives the trip, junk is refused at the edge, and client/WIRE.md is true."""

from __future__ import annotations

import contextlib
import random
import re
from pathlib import Path
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idemq.client import records, wire
from idemq.client.errors import ChecksumMismatch
from idemq.client.wire import Code, WireError

PAGE = Path(__file__).parent.parent / "client" / "WIRE.md"

MESSAGES: list[Any] = [
    wire.Hello(wire.VERSION, "me", "secret"),
    wire.Welcome(1, "0.1", b"i" * 16, 7, 32),
    wire.Ping(),
    wire.Pong(1_700_000_000_000),
    wire.Commit(
        5,
        6,
        -1,
        3,
        [wire.Append(1, 0, 90), wire.Append(2, 1, 10)],
        [wire.Offset("g", 1, 0, 9, 0, 4, b"m"), wire.Offset("g", 1, 1, 9, 0, 0, None, 1, 3)],
        b"token",
    ),
    wire.Committed(False, [wire.Position(0, 1), wire.Position(2**63 - 1, 2)]),
    wire.Committed(True, None),
    wire.Open("p", "s", 0, True),
    wire.Opened(1, 2, -1, None),
    wire.Heartbeat("g", "m", [1], [wire.Held(1, 0, 5, True)], 0, 7, 1, 5000),
    wire.Assignment([wire.Lease(1, 0, 5, 3, 1, 9, b"m")], [wire.TopicPartition(1, 1)], [], 10_000),
    wire.Seek("g", 1, 0, "n", 4, 0, "m"),
    wire.Sought(5, 0),
    wire.Offsets("g", wire.OffsetAfter(1, 0, "g")),
    wire.OffsetsAre([wire.OffsetEntry("g", 1, 0, 3, 5, "m", 0, None)], None),
    wire.Members("g", "g", "m"),
    wire.MembersAre([wire.MemberEntry("g", "m", "client", "address", [wire.TopicPartition(1, 0)])], False),
    wire.DeleteOffsets("g", 1),
    wire.CreateTopic("t", 4, wire.Settings(1000, None), True, "n"),
    wire.TopicIs(wire.TopicEntry("t", 1, wire.Settings(), [wire.PartitionEntry(0, 1, 2)])),
    wire.AlterTopic(1, 4, wire.Settings()),
    wire.DeleteTopic(1),
    wire.PurgeTopic(1, [1, 2]),
    wire.Done(),
    wire.Metadata(None, "a"),
    wire.Topics([], False),
    wire.Fetch([wire.Range(1, 0, 5)], 1024, 100),
    wire.Fetched([wire.Part(1, 0, 0, 9, [wire.BatchAt(5, 1, 80)])]),
    wire.OffsetAt(1, 0, 5),
    wire.OffsetIs(5),
    wire.Producers(["a"]),
    wire.ProducersAre([wire.ProducerEntry("a", 1, 2, 3, b"t", "h", 4)], True),
    wire.DeleteProducer(1, 2),
    wire.Failed(Code.SEQUENCE_GAP, "text", {"expected": 3, "holder": "x", "ended_at": None}),
]


def declared() -> set[type[Any]]:
    return {wire.Failed, *wire.REQUESTS, *(facts.reply for facts in wire.REQUESTS.values())}


def test_every_declaration_has_an_example_here() -> None:
    assert {type(message) for message in MESSAGES} == declared()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_trip(message: Any) -> None:
    frame = wire.encode(77, message, 3) + b"abc"
    [(header, payload)] = list(wire.Splitter(wire.FRAME_BYTES_MAX).feed(frame))
    assert wire.decode(header) == (77, message)
    assert payload == b"abc"


def test_any_split_of_the_stream_gives_the_same_frames() -> None:
    rng = random.Random(5)
    payloads = [rng.randbytes(rng.choice((0, 1, 7, 3000))) for _ in MESSAGES]
    stream = b"".join(
        wire.encode(index + 1, message, len(payload)) + payload
        for index, (message, payload) in enumerate(zip(MESSAGES, payloads, strict=True))
    )
    whole = list(wire.Splitter(wire.FRAME_BYTES_MAX).feed(stream))
    assert len(whole) == len(MESSAGES)
    for size in (1, 2, 3, 7, 8, 9, 64, 1000):
        splitter = wire.Splitter(wire.FRAME_BYTES_MAX)
        parts = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [frame for part in parts for frame in splitter.feed(part)] == whole
        assert splitter.buffered_bytes == 0


def test_a_length_is_checked_before_the_body_is_waited_for() -> None:
    splitter = wire.Splitter(wire.HELLO_BYTES_MAX)
    with pytest.raises(WireError) as error:
        list(splitter.feed((wire.HELLO_BYTES_MAX + 1).to_bytes(4, "big") + b"\0\0\0\1"))
    assert (error.value.code, error.value.fatal) == (Code.TOO_LARGE, True)
    with pytest.raises(WireError) as error:
        list(wire.Splitter(1000).feed(b"\0\0\0\1" + b"\0\0\0\1"))
    assert error.value.code == Code.BAD_REQUEST
    with pytest.raises(WireError) as error:
        list(wire.Splitter(1000).feed(b"\0\0\0\x20" + b"\0\0\0\x1d"))  # a header longer than its frame
    assert error.value.fatal


BAD_FIELDS: list[tuple[str, list[Any]]] = [
    ("bool as int", [3, 1, [True, 0, -1, 0]]),
    ("float as int", [3, 1, [1.0, 0, -1, 0]]),
    ("NaN", [3, 1, [float("nan"), 0, -1, 0]]),
    ("2**63", [3, 1, [2**63, 0, -1, 0]]),
    ("below -1", [3, 1, [1, 0, -2, 0]]),
    ("negative offset", [11, 1, [[[1, 0, -1]], 10, 0]]),
    ("too few fields", [3, 1, [1]]),
    ("fields are a map", [3, 1, {"a": 1}]),
    ("text as bytes", [4, 1, [*["p", "s", 0, False][:1], b"s", 0, False]]),
    ("empty name", [4, 1, ["", "s", 0, False]]),
    ("long name", [4, 1, ["p" * (wire.NAME_BYTES_MAX + 1), "s", 0, False]]),
    ("control character", [4, 1, ["p\n", "s", 0, False]]),
    ("topic with a slash", [6, 1, ["a/b", 1, [], False]]),
    ("no partitions", [6, 1, ["a", 0, [], False]]),
    ("too many partitions", [6, 1, ["a", wire.PARTITIONS_MAX + 1, [], False]]),
    ("too many ranges", [11, 1, [[[1, 0, 0]] * (wire.APPENDS_MAX + 1), 10, 0]]),
    ("wait too long", [11, 1, [[], 10, wire.WAIT_MS_MAX + 1]]),
    ("long token", [3, 1, [0, 0, -1, 0, [], [], b"t" * (wire.TOKEN_BYTES_MAX + 1)]]),
]


@pytest.mark.parametrize("parts", [parts for _, parts in BAD_FIELDS], ids=[name for name, _ in BAD_FIELDS])
def test_a_wrong_field_is_refused_by_its_code(parts: list[Any]) -> None:
    with pytest.raises(WireError) as error:
        wire.decode(msgpack.packb(parts))
    assert error.value.code in (Code.BAD_REQUEST, Code.TOO_LARGE)
    assert error.value.text


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgpack.packb([3, 1]),
        msgpack.packb([3, -1, []]),
        msgpack.packb([3, 2**64 - 1, []]),
        msgpack.packb(["3", 1, []]),
        msgpack.packb([3, 1, [msgpack.ExtType(1, b"x")]]),
        msgpack.packb([3, 1, []]) + b"\0",
        b"\x91" * 2000,
        b"\xdf\xff\xff\xff\xff",
        b"\x93\x03\x01\xdd\x00\xff\xff\xff",
    ],
)
def test_junk_is_a_wire_error(header: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(header)


def test_another_version_is_told_before_its_fields_are_read() -> None:
    with pytest.raises(WireError) as error:
        wire.decode(msgpack.packb([1, 9, [wire.VERSION + 1, {"new": "form"}]]))
    assert (error.value.code, error.value.fatal, error.value.correlation) == (Code.PROTOCOL_MISMATCH, True, 9)


def test_an_unknown_request_is_refused_and_the_connection_lives() -> None:
    with pytest.raises(WireError) as error:
        wire.decode(msgpack.packb([60, 5, []]))
    assert (error.value.code, error.value.fatal, error.value.correlation) == (Code.UNSUPPORTED, False, 5)


def test_fields_of_a_newer_peer_are_passed_over() -> None:
    assert wire.decode(msgpack.packb([2, 5, ["something new"]])) == (5, wire.Ping())


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_bytes_never_raise_anything_else(data: bytes) -> None:
    try:
        for header, _ in wire.Splitter(1000).feed(data):
            wire.decode(header)
    except WireError:
        pass
    with contextlib.suppress(WireError):
        wire.decode(data)


# ------------------------------------------------------------------------------------------------------------ batches


def batch(values: list[bytes], codec: int = wire.Codec.NONE) -> bytes:
    body = records.pack(values, None, None, None, codec)
    return wire.make_batch(codec, len(values), 3, 1, 9, 10, 10 + len(values) - 1, body)


@pytest.mark.parametrize("codec", [wire.Codec.NONE, wire.Codec.ZLIB])
def test_a_batch_survives_the_trip(codec: int) -> None:
    values, keys = [b"a", b"", b"c" * 5000], [None, b"k", b""]
    headers = [{"h": b"v"}, None, None]
    body = records.pack(values, keys, headers, [0, 2, 5], codec)
    data = wire.make_batch(codec, 3, 3, 1, 9, 10, 15, body)
    stored = records.unpack(data, 100, 5, "t", b"i")
    messages = list(stored.messages(0, 3))
    assert [message.value for message in messages] == values
    assert [message.key for message in messages] == keys
    assert [message.headers for message in messages] == [{"h": b"v"}, {}, {}]
    assert [message.offset for message in messages] == [100, 101, 102]
    assert [message.seq for message in messages] == [10, 12, 15]
    assert len({message.uid for message in messages}) == 3


def test_every_flipped_bit_of_a_batch_is_noticed() -> None:
    data = batch([b"hello", b"world"])
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            wire.verified_header(bytes(damaged))


def test_a_bomb_is_not_inflated() -> None:
    body = records.pack([b"\0" * (records.BODY_BYTES_MAX + 1)], None, None, None, wire.Codec.ZLIB)
    with pytest.raises(ChecksumMismatch, match="larger than"):
        records.unpack(wire.make_batch(wire.Codec.ZLIB, 1, 3, 1, 9, 0, 0, body), 0, 0, "t", b"")


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgpack.packb([[b"a"]]), msgpack.packb([[b"a"], [], None, None]), msgpack.packb([None] * 4)],
)
def test_a_body_that_is_no_batch_is_named(body: bytes) -> None:
    with pytest.raises(ChecksumMismatch):
        records.unpack(wire.make_batch(wire.Codec.NONE, 1, 3, 1, 9, 0, 0, body), 0, 0, "t", b"")


def test_the_fingerprint_covers_content_and_not_what_a_retry_changes() -> None:
    one, two = batch([b"a"]), batch([b"b"])
    header, other = wire.batch_header(one), wire.batch_header(two)
    commit = wire.Commit(9, 4, 9, 10, [wire.Append(3, 1, len(one))], [], b"t")
    same = wire.fingerprint(commit, [header])
    assert wire.fingerprint(commit._replace(epoch=5, prev_seq=3), [header]) == same
    changed = [
        wire.fingerprint(commit, [other]),
        wire.fingerprint(commit._replace(token=b"u"), [header]),
        wire.fingerprint(commit._replace(last_seq=11), [header]),
        wire.fingerprint(commit._replace(offsets=[wire.Offset("g", 3, 1, 1, 0, 1)]), [header]),
        wire.fingerprint(commit._replace(appends=[wire.Append(4, 1, len(one))]), [header]),
    ]
    assert same not in changed


# --------------------------------------------------------------------------------------------------------- the page


def tables() -> list[str]:
    """The page's table rows, made from the declarations."""

    def fields(kind: type[Any]) -> str:
        hints = get_type_hints(kind)
        return ", ".join(f"{name} {shown(hints[name])}" for name in kind._fields) or "(none)"

    def shown(hint: Any) -> str:
        text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
        return re.sub(r"[\w.]+\.", "", text).replace(" | ", " or ").replace("NoneType", "nil").replace("None", "nil")

    rows = [
        f"| {facts.code} | `{request.__name__}` | {fields(request)} | {facts.reply_code} `{facts.reply.__name__}` |"
        for request, facts in wire.REQUESTS.items()
    ]
    replies = {facts.reply: facts.reply_code for facts in wire.REQUESTS.values()}
    rows += [
        f"| {code} | `{reply.__name__}` | {fields(reply)} |" for reply, code in {wire.Failed: 64, **replies}.items()
    ]
    nested = [kind for kind in vars(wire).values() if isinstance(kind, type) and hasattr(kind, "_fields")]
    known = {*declared(), wire.Facts, wire.Meaning, wire.BatchHeader}
    rows += [
        f"| `{kind.__name__}` | {fields(kind)} |"
        for kind in nested
        if kind not in known and not kind.__name__.startswith("_") and kind.__module__ == wire.__name__
    ]
    rows += [
        f"| `{code}` | {'yes' if meaning.retriable else 'no'} | {meaning.remedy} |"
        for code, meaning in wire.REMEDIES.items()
    ]
    limits = [name for name in vars(wire) if name.endswith("_MAX") or name == "REMEMBERED"]
    return rows + [f"| `{name}` | {vars(wire)[name]} |" for name in limits]


def test_the_page_has_every_declaration() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [row for row in tables() if row not in page]
    assert not missing, "client/WIRE.md lacks:\n" + "\n".join(missing)


def test_the_pages_examples_are_what_the_code_encodes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    examples = re.findall(r"```frame\n(\d+) (.*?)\n((?:[0-9a-f ]+\n)+)```", page, re.DOTALL)
    assert len(examples) >= 6
    names = {name: getattr(wire, name) for name in dir(wire) if not name.startswith("_")}
    for correlation, message, text in examples:
        value = eval(message, {"__builtins__": {}}, names)
        assert wire.encode(int(correlation), value) == bytes.fromhex(text), message


def test_the_pages_batch_is_what_the_code_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    [text] = re.findall(r"```batch\n((?:[0-9a-f ]+\n)+)```", page)
    body = records.pack([b"a", b"b"], [b"k", None], None, None, wire.Codec.NONE)
    assert bytes.fromhex(text) == wire.make_batch(wire.Codec.NONE, 2, 1, 0, 2, 0, 1, body)
