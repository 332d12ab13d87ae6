"""What failing leads to, without a broker: policies, and the circuit that tells an outage from poison."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from idemq import CircuitOpen, InvalidRequest, RetryPolicy
from idemq.client.retry import CircuitBreaker, Verdict

RNG = Random(7)


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
