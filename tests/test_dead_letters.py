"""Dead letters and parked messages, without a broker: what copies say, and the note of what has left."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from idemq import InvalidRequest, Message, Record
from idemq.client import dead_letters, wire
from idemq.client.dead_letters import DEAD_LETTER, PARKED, Failure, Gone, NoDeadLetter, Place
from idemq.client.records import Delivery
from tests.support import messages


def copied(record: Record, topic: str = "copies", delivery: Delivery | None = None) -> Message:
    """The record, as it is read from another topic."""
    (message,) = messages(
        [record.value],
        [record.key],
        topic=topic,
        offset=77,
        headers=dict(record.headers or {}),
        delivery=delivery,
        producer=6,
    )
    return message


def why(**changed: Any) -> Failure:
    try:
        raise KeyError("missing")
    except KeyError as error:
        return Failure("g", 3, "", error, 1234)._replace(**changed)


def test_a_dead_letter_is_the_message_and_says_why() -> None:
    (original,) = messages([b"value"], [b"key"], partition=2, offset=41, headers={"h": b"1"})
    letter = copied(dead_letters.dead_letter(original, why()))
    assert (letter.value, letter.key) == (b"value", b"key")
    assert dead_letters.original_headers(DEAD_LETTER, letter.headers) == {"h": b"1"}
    said = dead_letters.facts(DEAD_LETTER, letter.headers)
    assert "Traceback" in said["traceback"]
    assert "test_dead_letters.py" in said.pop("traceback")
    assert said == {
        "topic": "t",
        "partition": "2",
        "offset": "41",
        "uid": original.uid.hex(),
        "group": "g",
        "attempts": "3",
        "reason": "'missing'",
        "error": "KeyError",
        "time": "1234",
    }
    assert dead_letters.origin(letter) == ("t", 2)
    with pytest.raises(NoDeadLetter):
        dead_letters.origin(original)


def test_a_dead_letter_of_a_dead_letter_gives_the_first_one_back() -> None:
    (original,) = messages([b"v"], [None], headers={"h": b"1", "idemq-dlq-was-x": b"mine"})
    once = copied(dead_letters.dead_letter(original, why()), "dlq")
    twice = copied(dead_letters.dead_letter(once, why(group="other")), "dlq-of-dlq")
    assert dead_letters.facts(DEAD_LETTER, twice.headers)["topic"] == "dlq"
    back = dead_letters.original_headers(DEAD_LETTER, twice.headers)
    assert back == once.headers
    assert dead_letters.original_headers(DEAD_LETTER, back) == original.headers


def test_what_is_said_is_bounded_and_always_text() -> None:
    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ValueError("x" * 5000 + "\udcff" + "é" * 9000)

    (original,) = messages([b"v"])
    try:
        deep(50)
    except ValueError as error:
        letter = dead_letters.dead_letter(original, why(error=error))
    assert letter.headers is not None
    assert len(letter.headers["idemq-dlq-reason"]) <= dead_letters.REASON_BYTES_MAX
    end = letter.headers["idemq-dlq-traceback"]
    assert len(end) <= dead_letters.TRACEBACK_BYTES_MAX
    assert end.decode().endswith("é\n"), "the end, where the error is"
    given = dead_letters.dead_letter(original, why(error=None, reason="no such customer"))
    assert given.headers is not None
    assert given.headers["idemq-dlq-reason"] == b"no such customer"
    assert {"idemq-dlq-error", "idemq-dlq-traceback"}.isdisjoint(given.headers)


@pytest.mark.parametrize("producer", [5, 0])
def test_a_parked_message_is_delivered_as_what_it_was(producer: int) -> None:
    (original,) = messages(
        [b"value"], [b"key"], partition=2, offset=41, headers={"h": b"1", "idemq-retry-x": b"2"}, producer=producer
    )
    copy = copied(dead_letters.parked(original, why(), 1.5), delivery=Delivery(12, 77, 1, 0))
    found = dead_letters.unpark(copy, copy.lease, 1)
    assert found is not None
    assert (found.group, found.attempts, found.delay_s) == ("g", 4, 1.5)
    again = found.message
    for name in ("topic", "partition", "offset", "value", "key", "headers", "timestamp", "uid"):
        assert getattr(again, name) == getattr(original, name), name
    assert (again.lease, again.attempt) == (12, 5)
    copy[0].delivery = Delivery(12, 77, 1, copy.offset + 1)
    suspect = dead_letters.unpark(copy, copy.lease, 1)
    assert suspect is not None
    assert suspect.message.attempt == 6, "the copy was in a dead worker's hands, perhaps"
    assert dead_letters.unpark(original, 0, 0) is None
    broken = copied(dead_letters.parked(original, why(), 1.5)._replace(headers={PARKED + "topic": b"t"}))
    assert dead_letters.unpark(broken, 0, 0) is None


# ------------------------------------------------------------------------------------------------ what has left


def test_what_is_gone_survives_in_a_token() -> None:
    gone = Gone(9)
    gone.add([Place(0, 0), Place(0, 1), Place(0, 5), Place(3, 7)], [0, 0, 0, 0])
    assert gone.below(0) == 2
    for known in (gone, Gone(9, gone.token())):
        assert [offset for offset in range(8) if Place(0, offset) in known] == [0, 1, 5]
        assert [offset for offset in range(9) if Place(3, offset) in known] == [7]
        assert Place(1, 0) not in known
    gone.add([Place(0, 2), Place(0, 3), Place(0, 4)], [0, 0, 0, 0])
    assert gone.below(0) == 6
    gone.add([Place(3, 9)], [0, 0, 0, 8])
    assert gone.below(3) == 8, "what retention removed is gone, too"
    assert Place(0, 0) not in Gone(10, gone.token()), "another topic under the same name"


def test_a_token_has_room_for_many_holes_and_refuses_more() -> None:
    gone, rng = Gone(1), Random(1)
    gone.add([Place(0, offset) for offset in range(1, 20_000) if rng.random() < 0.5], [0])
    again = Gone(1, gone.token())
    assert all((Place(0, offset) in gone) == (Place(0, offset) in again) for offset in range(20_100))
    assert len(gone.token()) <= wire.TOKEN_BYTES_MAX
    gone.add([Place(0, offset) for offset in range(20_000, 60_000) if rng.random() < 0.5], [0])
    with pytest.raises(InvalidRequest, match="oldest"):
        gone.token()
