"""Breadth-first exploration of every reachable state of a model.

Safety: each state is checked, and each step may raise `Violation`; breadth-first, so the trace is a shortest one.
Liveness: from every reachable state a finished state can be reached without any further fault.

This file knows nothing of the protocol. A model is any object with the methods of `Model`; its states are hashable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

State = TypeVar("State")

STUCK = "no finished state can be reached any more"


class Violation(Exception):
    """A property does not hold. Its text names the property."""


class Step(NamedTuple):
    """Something that can happen in a state: `action(state, *arguments)` is what comes of it."""

    label: tuple[object, ...]
    """For the trace; turned into text only when a trace is printed."""
    fault: bool
    """Faults may happen, so safety must survive them; liveness must not need them."""
    action: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Model(Protocol[State]):
    """What the explorer asks of a model."""

    def initial(self) -> State:
        """Where it starts."""

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""

    def check(self, state: State) -> None:
        """Raise Violation if the state breaks a property."""

    def finished(self, state: State) -> bool:
        """Is everybody done, honestly?"""


class Result(NamedTuple, Generic[State]):
    """What an exploration found."""

    states: int
    edges: int
    seconds: float
    complete: bool
    """False: a bound of the exploration itself (`states_max`) stopped it, nothing is proved."""
    violation: str | None
    trace: list[str]
    """The labels that lead to the violation, or to the first stuck state."""
    state: State | None
    """The stuck state, or the state before the violating step."""

    @property
    def verdict(self) -> str:
        """One phrase for people."""
        if self.violation is not None:
            return f"VIOLATION: {self.violation}"
        return "holds" if self.complete else "INCOMPLETE"


def explore(model: Model[State], states_max: int = 20_000_000) -> Result[State]:
    """Explore until a violation, until everything reachable is seen, or until `states_max` is passed."""
    started = time.perf_counter()
    initial = model.initial()
    states = [initial]
    numbers = {initial: 0}
    origins: list[tuple[int, tuple[object, ...]]] = [(0, ())]
    predecessors: list[list[int]] = [[]]
    """Of each state: those that lead to it without a fault."""
    finished = [0] if model.finished(initial) else []
    edges = 0

    def result(complete: bool, violation: str | None, at: int, *last: tuple[object, ...]) -> Result[State]:
        trace = list(last)
        number = at
        while number:
            number, label = origins[number]
            trace.insert(0, label)
        texts = [" ".join(str(word) for word in label) for label in trace]
        state = states[at] if violation is not None else None
        return Result(len(states), edges, time.perf_counter() - started, complete, violation, texts, state)

    number = 0
    while number < len(states):
        state = states[number]
        for step in model.steps(state):
            try:
                successor = step.action(state, *step.arguments)
                edges += 1
                found = numbers.get(successor)
                if found is None:
                    model.check(successor)
            except Violation as violation:
                return result(True, str(violation), number, step.label)
            if found is None:
                found = numbers[successor] = len(states)
                states.append(successor)
                origins.append((number, step.label))
                predecessors.append([])
                if model.finished(successor):
                    finished.append(found)
            if not step.fault and found != number:
                predecessors[found].append(number)
        number += 1
        if len(states) > states_max:
            return result(False, None, 0)

    hopeful = bytearray(len(states))
    for number in finished:
        hopeful[number] = 1
    while finished:
        for number in predecessors[finished.pop()]:
            if not hopeful[number]:
                hopeful[number] = 1
                finished.append(number)
    stuck = hopeful.find(0)
    return result(True, None, 0) if stuck < 0 else result(True, STUCK, stuck)
