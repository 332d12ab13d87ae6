"""What becomes of a message whose handler failed, decided: tried again, set aside for later, a dead letter, or raised.

An outage is not poison: when many different messages fail in a row with the same kind of error, it is not theirs, and
`CircuitBreaker` has handling wait and try one now and then, in the place of making dead letters of all of them.
Pure: no clock, no dice of its own, and nothing of topics, offsets or connections.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum

from . import wire
from .errors import CircuitOpen, InvalidRequest, checked

ATTEMPTS_MAX = 1_000_000
"""Bounds what is stored and doubled."""
DELAY_S_MAX = 30 * 86400.0


class Verdict(Enum):
    """What to do with a message that failed."""

    RETRY = "try it again in its place, after a while"
    PARK = "move it to the parking topic, whence it is delivered again later"
    DEAD_LETTER = "move it to the dead-letter topic"
    RAISE = "end the call with the handler's error"


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How failed messages are treated: `subscribe(…, group=…, retry=RetryPolicy(…))`. Times are seconds.

    A message is tried `max_attempts` times. Between two attempts its partition (in `run`: its key) waits, `backoff`
    at first, twice as long each time, at most `max_backoff`; so order is kept. Then it goes to the topic `dead_letter`
    and the group's position past it, in one transaction; without that topic the call raises the handler's error, and
    so it does at once for errors in `no_retry` (with the topic: they make a dead letter at once).

    `parking` names a topic where failed messages wait instead, and GIVES UP ORDER: what is behind them goes on. The
    message is appended there, and the position moved past it, in one transaction. It is delivered again, as the
    message that it was (topic, offset, uid), by whoever runs `process` or `run` with this policy on the parking topic:
    `subscribe("orders", "orders.retry", group=…, retry=…)`. A parking topic is read in order, so what waits longer
    there holds up what is behind it, by `max_backoff` at most. Nothing of this lives in a worker: all of it survives.

    `circuit_after` different messages failing in a row with one kind of error are an outage: nothing is blamed, and
    one message is tried now and then, until one succeeds. After `circuit_s_max` the call raises CircuitOpen. Errors in
    `no_retry` are always the message's own.
    """

    max_attempts: int = 5
    backoff: float = 0.5
    max_backoff: float = 30.0
    dead_letter: str | None = None
    no_retry: tuple[type[Exception], ...] = ()
    parking: str | None = None
    circuit_after: int = 10
    circuit_s_max: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_attempts", "circuit_after"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= ATTEMPTS_MAX:
                raise InvalidRequest(f"{name} is a whole number in 1 .. {ATTEMPTS_MAX}, not {value!r}")
        for name in ("backoff", "max_backoff", "circuit_s_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= DELAY_S_MAX:
                raise InvalidRequest(f"{name} is a number of seconds in 0 .. {DELAY_S_MAX:g}, not {value!r}")
        if self.backoff > self.max_backoff:
            raise InvalidRequest(f"backoff ({self.backoff:g} s) is at most max_backoff ({self.max_backoff:g} s)")
        if not isinstance(self.no_retry, tuple) or not all(
            isinstance(one, type) and issubclass(one, Exception) for one in self.no_retry
        ):
            raise InvalidRequest(
                f"no_retry is a tuple of exception classes, such as (ValueError,), not {self.no_retry!r}"
            )
        for topic in (self.dead_letter, self.parking):
            if topic is not None:
                checked(wire.CreateTopic(topic, 1, wire.Settings()), f"{topic!r} is no topic's name: ")
        if self.parking is not None and self.parking == self.dead_letter:
            raise InvalidRequest("dead letters and parked messages need a topic each")
        if self.parking is not None and self.max_attempts == 1:
            raise InvalidRequest("with max_attempts=1 nothing is tried again, so nothing is parked")

    def verdict(self, error: Exception, attempts: int) -> Verdict:
        """What to do with a message whose `attempts`-th attempt ended with `error`."""
        if isinstance(error, self.no_retry) or attempts >= self.max_attempts:
            return Verdict.RAISE if self.dead_letter is None else Verdict.DEAD_LETTER
        return Verdict.RETRY if self.parking is None else Verdict.PARK

    def delay(self, attempts: int, rng: random.Random) -> float:
        """Seconds to wait after so many failures: doubled for each, with half of it left to chance."""
        longest = min(self.max_backoff, self.backoff * 2.0 ** min(attempts - 1, 60))
        return longest * (0.5 + 0.5 * rng.random())


class CircuitBreaker:
    """Tells an outage from poison by who fails: one message, or one after the other."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failing: set[Hashable] = set()
        """Different messages that failed with `_kind` since the last success."""
        self._kind: type[Exception] | None = None
        self._opened_at = 0.0
        self._failures = 0
        """Since it opened."""
        self.probe_at: float | None = None
        """Not before this time may one message be tried; None: the circuit is closed, and all may be."""

    @property
    def is_open(self) -> bool:
        """Is there an outage?"""
        return self.probe_at is not None

    def succeeded(self) -> None:
        """A message was handled."""
        self._failing.clear()
        self.probe_at = None

    def failed(self, now: float, message: Hashable, error: Exception, rng: random.Random) -> bool:
        """A message failed; returns whether that is taken for an outage, and not to be counted as an attempt.

        Raises CircuitOpen when the outage has lasted too long.
        """
        if isinstance(error, self._policy.no_retry):
            return False
        if self.probe_at is None:
            if type(error) is not self._kind:
                self._kind = type(error)
                self._failing.clear()
            self._failing.add(message)
            if len(self._failing) < self._policy.circuit_after:
                return False
            self._opened_at, self._failures = now, 0
        elif now - self._opened_at >= self._policy.circuit_s_max:
            text = (
                f"messages failed for {now - self._opened_at:.0f} s, one after the other; the last error is {error!r}"
            )
            raise CircuitOpen(text) from error
        self._failures += 1
        self.probe_at = now + self._policy.delay(self._failures, rng)
        return True
