"""What failing leads to, without a broker: policies, the circuit, the schedule, dead letters and parked messages."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from idemq import CircuitOpen, InvalidRequest, Message, Record, RetryPolicy
from idemq.client import dead_letters, wire
from idemq.client.dead_letters import DEAD_LETTER, PARKED, Failure, Gone, Place
from idemq.client.records import Delivery, StoredBatch
from idemq.client.retry import CircuitBreaker, Verdict
from idemq.client.scheduling import COMMIT_S, IN_HAND_MAX, Schedule, Work

RNG = Random(7)


def messages(
    values: list[bytes],
    keys: list[bytes | None] | None = None,
    *,
    topic: str = "t",
    partition: int = 0,
    offset: int = 0,
    headers: dict[str, bytes] | None = None,
    delivery: Delivery | None = None,
    producer: int = 5,
) -> list[Message]:
    """As a subscription would hand them out, one batch."""
    count = len(values)
    header = wire.BatchHeader(0, 1, 0, count, 9, partition, producer, 100, 100 + count - 1, 0)
    columns: list[dict[str, bytes] | None] | None = None if headers is None else [headers] * count
    stored = StoredBatch(topic, offset, 1_700_000_000_000, b"i" * 16, header, values, keys, columns, None)
    if delivery is not None:
        stored.delivery = delivery
    return list(stored.messages(0, count))


# ------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 2.0},
        {"backoff": -1},
        {"backoff": float("nan")},
        {"max_backoff": float("inf")},
        {"backoff": 2, "max_backoff": 1},
        {"circuit_after": 0},
        {"circuit_s_max": "5m"},
        {"no_retry": ValueError},
        {"no_retry": (ValueError, "KeyError")},
        {"no_retry": (KeyboardInterrupt,)},
        {"dead_letter": ""},
        {"dead_letter": 7},
        {"parking": "p", "dead_letter": "p"},
        {"parking": "p", "max_attempts": 1},
    ],
)
def test_a_wrong_policy_is_refused_when_it_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        RetryPolicy(**wrong)


def test_a_policy_is_a_value() -> None:
    policy = RetryPolicy(max_attempts=3, dead_letter="t.dlq", no_retry=(ValueError,))
    assert policy == RetryPolicy(max_attempts=3, dead_letter="t.dlq", no_retry=(ValueError,))
    with pytest.raises(AttributeError):
        policy.max_attempts = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("policy", "error", "attempts", "verdict"),
    [
        (RetryPolicy(), KeyError(), 1, Verdict.RETRY),
        (RetryPolicy(), KeyError(), 4, Verdict.RETRY),
        (RetryPolicy(), KeyError(), 5, Verdict.RAISE),
        (RetryPolicy(dead_letter="d"), KeyError(), 4, Verdict.RETRY),
        (RetryPolicy(dead_letter="d"), KeyError(), 5, Verdict.DEAD_LETTER),
        (RetryPolicy(dead_letter="d"), KeyError(), 9, Verdict.DEAD_LETTER),
        (RetryPolicy(dead_letter="d", max_attempts=1), KeyError(), 1, Verdict.DEAD_LETTER),
        (RetryPolicy(dead_letter="d", no_retry=(LookupError,)), KeyError(), 1, Verdict.DEAD_LETTER),
        (RetryPolicy(no_retry=(LookupError,)), KeyError(), 1, Verdict.RAISE),
        (RetryPolicy(parking="p"), KeyError(), 1, Verdict.PARK),
        (RetryPolicy(parking="p"), KeyError(), 5, Verdict.RAISE),
        (RetryPolicy(parking="p", dead_letter="d"), KeyError(), 5, Verdict.DEAD_LETTER),
        (RetryPolicy(parking="p", dead_letter="d", no_retry=(KeyError,)), KeyError(), 1, Verdict.DEAD_LETTER),
    ],
)
def test_the_verdict(policy: RetryPolicy, error: Exception, attempts: int, verdict: Verdict) -> None:
    assert policy.verdict(error, attempts) is verdict


def test_delays_double_up_to_the_longest_with_half_left_to_chance() -> None:
    policy = RetryPolicy(backoff=0.5, max_backoff=30.0)
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30]
    for attempts, most in enumerate(longest, 1):
        found = [policy.delay(attempts, RNG) for _ in range(200)]
        assert most / 2 <= min(found) < 0.6 * most
        assert 0.9 * most < max(found) <= most
    assert policy.delay(1_000_000, RNG) <= 30.0
    assert RetryPolicy(backoff=0, max_backoff=0).delay(3, RNG) == 0


# ------------------------------------------------------------------------------------------------------ the circuit


class Outage(Exception):
    pass


def test_different_messages_that_fail_alike_open_the_circuit() -> None:
    breaker = CircuitBreaker(RetryPolicy(circuit_after=3, backoff=1, max_backoff=4, circuit_s_max=20))
    assert not breaker.failed(0, 1, Outage(), RNG)
    assert not breaker.failed(1, 1, Outage(), RNG), "the same message again: it may be poison"
    assert not breaker.failed(2, 2, Outage(), RNG)
    assert breaker.failed(3, 3, Outage(), RNG)
    probes = [breaker.probe_at]
    assert breaker.failed(4, 4, KeyError(), RNG), "whatever fails while it is open is not blamed"
    probes.append(breaker.probe_at)
    assert probes[0] is not None
    assert probes[1] is not None
    assert 3.5 <= probes[0] <= 4
    assert 5 <= probes[1] <= 6, "the pauses grow"
    breaker.succeeded()
    assert not breaker.is_open
    assert not breaker.failed(30, 5, Outage(), RNG), "the row begins anew"


def test_one_success_or_another_kind_of_error_ends_the_row() -> None:
    breaker = CircuitBreaker(RetryPolicy(circuit_after=2))
    for now in range(5):
        assert not breaker.failed(now, now, Outage(), RNG)
        breaker.succeeded()
    assert not breaker.failed(5, 5, Outage(), RNG)
    assert not breaker.failed(6, 6, KeyError(), RNG)
    assert not breaker.failed(7, 7, Outage(), RNG)
    assert breaker.failed(8, 8, Outage(), RNG)


def test_errors_that_are_the_messages_own_say_nothing_of_an_outage() -> None:
    breaker = CircuitBreaker(RetryPolicy(circuit_after=2, no_retry=(ValueError,), circuit_s_max=1))
    for now in range(9):
        assert not breaker.failed(now, now, ValueError(), RNG)
    assert not breaker.failed(9, 9, Outage(), RNG)
    assert not breaker.failed(9, 10, ValueError(), RNG)
    assert breaker.failed(9, 11, Outage(), RNG), "nor do they end a row"
    assert not breaker.failed(99, 12, ValueError(), RNG), "nor is one raised for them"


def test_an_outage_that_lasts_too_long_is_raised() -> None:
    breaker = CircuitBreaker(RetryPolicy(circuit_after=1, circuit_s_max=10))
    assert breaker.failed(0, 1, Outage(), RNG)
    assert breaker.failed(9.9, 2, Outage(), RNG)
    with pytest.raises(CircuitOpen, match="Outage") as caught:
        breaker.failed(10, 3, Outage(), RNG)
    assert isinstance(caught.value.__cause__, Outage)


# ----------------------------------------------------------------------------------------------------- the schedule


def values(works: list[Work]) -> list[bytes]:
    return [work.message.value for work in works]


def begin(schedule: Schedule, now: float = 0.0) -> list[Work]:
    taken = []
    while (work := schedule.take(now)) is not None:
        taken.append(work)
    return taken


def commit(schedule: Schedule) -> list[bytes]:
    """All that is finished; the values."""
    done = list(schedule.finished())
    for works in done:
        schedule.committed(works)
    return [value for works in done for value in values(works)]


LEASE = Delivery(3, 0, 0, 0)


def test_messages_of_one_key_follow_each_other() -> None:
    schedule = Schedule(10)
    schedule.add(messages([b"a0", b"b0", b"a1", b"c0", b"b1"], [b"a", b"b", b"a", b"c", b"b"], delivery=LEASE))
    first = begin(schedule)
    assert values(first) == [b"a0", b"b0", b"c0"]
    schedule.finish(first[1], 0)
    second = begin(schedule)
    assert values(second) == [b"b1"]
    assert commit(schedule) == [], "a0 is not finished"
    schedule.finish(first[0], 0)
    third = begin(schedule)
    assert values(third) == [b"a1"]
    assert commit(schedule) == [b"a0", b"b0"]
    for work in (*second, first[2]):
        schedule.finish(work, 0)
    assert commit(schedule) == []
    schedule.finish(third[0], 0)
    assert commit(schedule) == [b"a1", b"c0", b"b1"]
    assert (schedule.in_hand, schedule.running, schedule.deliveries) == (0, 0, [])


def test_no_more_run_than_the_concurrency_allows_and_without_a_key_no_order() -> None:
    schedule = Schedule(2)
    schedule.add(messages([b"%d" % n for n in range(5)], delivery=LEASE))
    running = begin(schedule)
    assert (len(running), schedule.running) == (2, 2)
    schedule.finish(running[1], 0)
    assert values(begin(schedule)) == [b"2"]
    assert begin(schedule) == []


def test_a_concurrency_of_one_keeps_the_order_of_a_partition_and_lets_others_by() -> None:
    schedule, other = Schedule(1), Delivery(4, 0, 0, 0)
    schedule.add(messages([b"0", b"1"], delivery=LEASE))
    schedule.add(messages([b"x"], partition=1, delivery=other))
    (head,) = begin(schedule)
    schedule.retry(head, 5.0)
    (x,) = begin(schedule)
    assert x.message.value == b"x"
    schedule.finish(x, 0)
    assert begin(schedule, 4.9) == []
    assert schedule.next_at == 5.0
    again = begin(schedule, 5.0)
    assert values(again) == [b"0"]
    schedule.finish(again[0], 5)
    assert values(begin(schedule, 5.0)) == [b"1"]


def test_a_key_in_two_partitions_is_two_keys() -> None:
    schedule = Schedule(9)
    schedule.add(messages([b"0"], [b"k"], delivery=LEASE))
    schedule.add(messages([b"1"], [b"k"], partition=1, delivery=Delivery(4, 0, 0, 0)))
    assert len(begin(schedule)) == 2


def test_when_to_commit() -> None:
    schedule = Schedule(IN_HAND_MAX)
    schedule.add(messages([b"%d" % n for n in range(IN_HAND_MAX)], delivery=LEASE))
    running = begin(schedule)
    assert schedule.commit_at == float("inf")
    schedule.finish(running[1], 1)
    assert schedule.commit_at == float("inf"), "nothing could be committed"
    schedule.finish(running[0], 2)
    assert schedule.commit_at == 2 + COMMIT_S
    schedule.finish(running[2], 2.05)
    assert schedule.commit_at == 2 + COMMIT_S, "since the first"
    for work in running[3:]:
        schedule.finish(work, 2.06)
    assert schedule.commit_at == 2.06, "at once when so many are finished"
    assert len(commit(schedule)) == IN_HAND_MAX
    assert schedule.commit_at == float("inf")


def test_what_a_commit_covers_is_what_was_finished_when_it_began() -> None:
    schedule = Schedule(3)
    schedule.add(messages([b"0", b"1", b"2"], delivery=LEASE))
    running = begin(schedule)
    schedule.finish(running[0], 0, ("dlq", Record(b"d")))
    (done,) = schedule.finished()
    schedule.finish(running[1], 1)
    schedule.committed(done)
    assert [work.send for work in done] == [("dlq", Record(b"d"))]
    assert commit(schedule) == [b"1"]
    assert values(schedule.heads()) == [b"2"]


def test_a_lost_line_is_forgotten_but_its_key_waits_for_what_runs() -> None:
    schedule, again = Schedule(9), Delivery(8, 0, 0, 0)
    schedule.add(messages([b"0", b"1", b"2"], [b"k", b"k", b"l"], delivery=LEASE))
    running = begin(schedule)
    assert values(running) == [b"0", b"2"]
    schedule.drop(LEASE)
    assert (schedule.in_hand, schedule.deliveries) == (0, [])
    schedule.add(messages([b"0", b"1", b"2"], [b"k", b"k", b"l"], delivery=again))
    assert begin(schedule) == [], "another handler still has these keys"
    schedule.finish(running[0], 0)
    assert values(begin(schedule)) == [b"0"]
    schedule.retry(running[1], 7.0)
    assert values(begin(schedule)) == [b"2"]
    assert commit(schedule) == []


def test_a_line_that_is_lost_while_its_head_waits_wakes_nobody() -> None:
    schedule = Schedule(1)
    schedule.add(messages([b"0", b"1"], delivery=LEASE))
    schedule.retry(begin(schedule)[0], 5.0)
    schedule.drop(LEASE)
    assert schedule.next_at == float("inf")
    assert begin(schedule, 9) == []


def test_a_line_that_is_given_back_is_finished_up_to_its_first_gap() -> None:
    schedule = Schedule(3)
    schedule.add(messages([b"%d" % n for n in range(5)], [b"a", b"b", b"a", b"c", b"d"], delivery=LEASE))
    running = begin(schedule)  # 0, 1 and 3
    schedule.finish(running[2], 0)
    schedule.withdraw(LEASE)
    assert schedule.in_hand == 2, "0 and 1 run; behind them is a gap"
    assert begin(schedule) == []
    schedule.finish(running[0], 0)
    schedule.finish(running[1], 0)
    assert begin(schedule) == []
    schedule.flush(7.0)
    assert schedule.commit_at == 7.0
    assert commit(schedule) == [b"0", b"1"]
    assert schedule.deliveries == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_positions_pass_nothing_and_keys_keep_their_order(seed: int) -> None:
    """Random handlers, failures and commits: all of it is committed once, in order, and of each key one at a time."""
    rng = Random(seed)
    schedule = Schedule(rng.randint(1, 6))
    running: list[Work] = []
    handled: dict[tuple[int, bytes | None], list[int]] = {}
    committed: dict[int, list[int]] = {0: [], 1: []}
    leases = [Delivery(1, 0, 0, 0), Delivery(2, 0, 0, 0)]
    added, now = [0, 0], 0.0
    while min(len(done) for done in committed.values()) < 40:
        now += rng.random()
        partition = rng.randrange(2)
        if added[partition] < 40 and rng.random() < 0.3:
            count = rng.randint(1, 5)
            keys = [rng.choice([None, b"a", b"b"]) for _ in range(count)]
            schedule.add(
                messages([b""] * count, keys, partition=partition, offset=added[partition], delivery=leases[partition])
            )
            added[partition] += count
        running += begin(schedule, now)
        sequences = [work.sequence for work in running if work.sequence is not None]
        assert len(sequences) == len(set(sequences)), "two of one key at once"
        if running:
            work = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.3:
                schedule.retry(work, now + rng.random())
            else:
                handled.setdefault((work.message.partition, work.message.key), []).append(work.message.offset)
                schedule.finish(work, now)
        if rng.random() < 0.2:
            for works in list(schedule.finished()):
                committed[works[0].message.partition] += [work.message.offset for work in works]
                schedule.committed(works)
        assert schedule.in_hand == sum(added) - sum(map(len, committed.values()))
    for partition, offsets in committed.items():
        assert offsets == list(range(len(offsets))), partition
    for (_, key), offsets in handled.items():
        assert key is None or offsets == sorted(offsets)


# ------------------------------------------------------------------------------------------------- dead letters


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
    assert "test_retry.py" in said.pop("traceback")
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
    with pytest.raises(InvalidRequest):
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
