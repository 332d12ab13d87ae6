"""Attempts: inputs that kill the worker that handles them, and who is blamed for it.

Some inputs are poison: a worker that has one in hand dies of it, before or after it has finished others. Workers start
again, members are missed, are granted what the dead held, and go on where it was committed; until a poison has used up
its attempts and is put aside as a dead letter, together with the position, in one commit. Workers are also killed from
outside, count as gone although they live, have a partition taken from them, or lose their broker.

Leases, connections and the disk are `consumer.py`'s: here a commit is applied under the row's lease, or not at all, and
a broker that crashes has lost nothing but its members.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .broker import replaced
from .explorer import Step, Violation
from .guards import DEAD_LETTER_TWICE, INNOCENT_PUT_ASIDE, POISON_LIVES, Guards


class Faults(NamedTuple):
    """How often each fault may still happen."""

    kills: int = 0
    """A worker is killed from outside."""
    expiries: int = 0
    """A member counts as gone although it lives and works."""
    takings: int = 0
    """A partition is taken from a member that did not give it back in time."""
    broker_crashes: int = 0


@dataclass(frozen=True)
class Bounds:
    """How much of the world is explored."""

    poison: tuple[tuple[int, ...], ...]
    """Of each partition: the positions of its poisonous inputs."""
    inputs: int = 3
    """In each partition."""
    workers: int = 1
    in_hand_max: int = 2
    """Of each partition, and not committed."""
    attempts_max: int = 2
    faults: Faults = field(default_factory=Faults)


NOBODY = -1


class Row(NamedTuple):
    """What the broker stores about the group's position in a partition."""

    next: int
    attempts: int
    """Attempts at the input at `next` that began and were not finished, as far as they are counted."""
    suspects_end: int
    """Inputs below it may have been in hand when a member ended uncleanly."""
    owner: int
    """The worker whose lease is the row's."""
    excused: int
    """How often its worker was killed by others, or replaced, while it had the input at `next` in hand as a suspect.
    Known to the properties only."""
    deaths: int
    """How often the input at `next`, or one behind it, killed since then. Known to the properties only."""
    put_aside: bool
    """The dead letter of the input at `next` is stored, and the position did not move with it: breaks a rule."""


class Held(NamedTuple):
    """A partition as the worker that holds it knows it. It has in hand what lies from `next` to `end`."""

    next: int
    end: int
    attempts: int
    suspects_end: int
    put_aside: bool
    """It has stored the dead letter of the input at `next`, and is to move the position: breaks a rule."""


class Worker(NamedTuple):
    """One worker process."""

    alive: bool
    held: tuple[Held | None, ...]


class State(NamedTuple):
    """Everything."""

    rows: tuple[Row, ...]
    holders: tuple[int, ...]
    """Of each partition, as the broker knows it. In memory only."""
    workers: tuple[Worker, ...]
    faults: Faults


class Attempts:
    """The model."""

    def __init__(self, bounds: Bounds, guards: Guards) -> None:
        self.bounds = bounds
        self.guards = guards
        self.partitions = range(len(bounds.poison))

    def initial(self) -> State:
        """Nobody holds anything."""
        count = len(self.partitions)
        return State(
            rows=(Row(0, 0, 0, NOBODY, 0, 0, False),) * count,
            holders=(NOBODY,) * count,
            workers=(Worker(True, (None,) * count),) * self.bounds.workers,
            faults=self.bounds.faults,
        )

    def check(self, state: State) -> None:
        """What must hold in every state is checked where it happens: see `put_aside` and `poisoned`."""

    def finished(self, state: State) -> bool:
        """Every input is handled, or put aside."""
        return all(row.next == self.bounds.inputs for row in state.rows)

    # ------------------------------------------------------------------------------------ what may happen

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""
        faults = state.faults
        for number, worker in enumerate(state.workers):
            if worker.alive:
                yield from self.steps_of_worker(state, number)
                if faults.kills:
                    yield Step(("KILL worker", number), True, self.kill, (number,))
                if faults.expiries and number in state.holders:
                    yield Step(("MEMBER EXPIRES", number), True, self.expire, (number, True))
            elif number in state.holders:
                yield Step(("member expires", number), False, self.expire, (number, False))
            else:
                yield Step(("worker starts", number), False, self.start, (number,))
        for partition, holder in enumerate(state.holders):
            if holder != NOBODY and faults.takings:
                yield Step(("TAKEN is", partition), True, self.take, (partition,))
        if faults.broker_crashes:
            yield Step(("BROKER CRASHES",), True, self.crash_broker)

    def steps_of_worker(self, state: State, number: int) -> Iterator[Step]:
        """What a living worker can do."""
        worker = state.workers[number]
        for partition in self.partitions:
            row, held, holder = state.rows[partition], worker.held[partition], state.holders[partition]
            if held is None:
                if holder == NOBODY and row.next < self.bounds.inputs:
                    yield Step(("worker", number, "is granted", partition), False, self.grant, (number, partition))
                continue
            if row.owner != number:
                yield Step(("worker", number, "hears that it lost", partition), False, self.lose, (number, partition))
            elif holder == NOBODY:
                yield Step(("worker", number, "is adopted for", partition), False, self.adopt, (number, partition))
            at = (number, partition)
            for position in range(held.next, held.end):
                if position in self.bounds.poison[partition]:
                    yield Step(("worker", number, "dies of", position, "in", partition), False, self.poisoned, at)
            in_hand = range(held.next, held.end)
            if in_hand and held.next not in self.bounds.poison[partition] and row.owner == number:
                yield Step(("worker", number, "commits", held.next, "in", partition), False, self.commit, at)
            if held.end == self.bounds.inputs or not self.may_take_in_hand(worker, partition, held):
                continue
            tried = not in_hand and held.attempts >= self.bounds.attempts_max
            if tried and row.owner == number:
                yield Step(("worker", number, "puts aside", held.next, "in", partition), False, self.put_aside, at)
            elif not tried and (held.end >= held.suspects_end or row.owner == number):
                yield Step(("worker", number, "handles", held.end, "in", partition), False, self.take_in_hand, at)

    def may_take_in_hand(self, worker: Worker, partition: int, held: Held) -> bool:
        """May the worker handle the next input now? A suspect is alone in hand, in all that the worker holds."""
        guards = self.guards
        if held.end - held.next >= self.bounds.in_hand_max:
            return False
        if not guards.suspects_alone:
            return True
        others = [held] if not guards.suspects_alone_in_member else [one for one in worker.held if one is not None]
        if held.end < held.suspects_end:
            return all(one.next == one.end for one in others)
        return not guards.nothing_beside_a_suspect or not any(
            one.next < min(one.end, one.suspects_end) for one in others
        )

    # ------------------------------------------------------------------------------------------- the broker

    def expire(self, state: State, number: int, fault: bool) -> State:
        """A member is missed: whatever it may have had in hand is suspected. Nobody is blamed."""
        state = state._replace(faults=state.faults._replace(expiries=state.faults.expiries - fault))
        for partition in self.partitions:
            if state.holders[partition] == number:
                row = state.rows[partition]
                if row.owner == number:
                    state = with_row(state, partition, self.ended_uncleanly(row))
                state = state._replace(holders=replaced(state.holders, partition, NOBODY))
        return state

    def ended_uncleanly(self, row: Row) -> Row:
        """The row after its holder vanished."""
        guards, end = self.guards, min(self.bounds.inputs, row.next + self.bounds.in_hand_max)
        if row.next == end:
            return row
        suspected = row.next < row.suspects_end
        if not guards.unclean_ends_suspect or (suspected and not guards.attempts_counted_ahead):
            return row._replace(attempts=row.attempts + 1)
        return row if suspected else row._replace(suspects_end=end)

    def grant(self, state: State, number: int, partition: int) -> State:
        """A partition that nobody holds goes to a worker, which is told all that is stored."""
        if state.rows[partition].owner != NOBODY:
            state = self.excused(state, state.rows[partition].owner, partition)
        row = state.rows[partition]._replace(owner=number)
        state = with_row(state, partition, row)._replace(holders=replaced(state.holders, partition, number))
        return with_held(state, number, partition, Held(row.next, row.next, row.attempts, row.suspects_end, False))

    def adopt(self, state: State, number: int, partition: int) -> State:
        """The worker reports a lease that still is the row's. It is told nothing."""
        return state._replace(holders=replaced(state.holders, partition, number))

    def lose(self, state: State, number: int, partition: int) -> State:
        """The worker hears that somebody else holds the partition."""
        return with_held(state, number, partition, None)

    def take(self, state: State, partition: int) -> State:
        """The time to give a partition back is over."""
        faults = state.faults._replace(takings=state.faults.takings - 1)
        return state._replace(holders=replaced(state.holders, partition, NOBODY), faults=faults)

    def crash_broker(self, state: State) -> State:
        """The members are forgotten; the rows stay."""
        faults = state.faults._replace(broker_crashes=state.faults.broker_crashes - 1)
        return state._replace(holders=(NOBODY,) * len(self.partitions), faults=faults)

    # ------------------------------------------------------------------------------------------- the worker

    def take_in_hand(self, state: State, number: int, partition: int) -> State:
        """The next input is handled. If it is a suspect, that attempt is counted before it begins."""
        held, row = state.workers[number].held[partition], state.rows[partition]
        assert held is not None
        if held.end < held.suspects_end and self.guards.attempts_counted_ahead:
            held = held._replace(attempts=held.attempts + 1)
            state = with_row(state, partition, row._replace(attempts=max(row.attempts, held.attempts)))
        return with_held(state, number, partition, held._replace(end=held.end + 1))

    def commit(self, state: State, number: int, partition: int) -> State:
        """The first input in hand is finished, and the position is behind it."""
        held = state.workers[number].held[partition]
        assert held is not None
        held = held._replace(next=held.next + 1, attempts=0)
        return with_held(self.moved(state, partition), number, partition, held)

    def put_aside(self, state: State, number: int, partition: int) -> State:
        """The next input has used up its attempts: its dead letter is stored, and the position is behind it."""
        held, row = state.workers[number].held[partition], state.rows[partition]
        assert held is not None
        innocent = held.next not in self.bounds.poison[partition]
        if innocent and row.excused < self.bounds.attempts_max:
            raise Violation(INNOCENT_PUT_ASIDE)
        if not self.guards.dead_letter_with_position and not held.put_aside:
            if row.put_aside:
                raise Violation(DEAD_LETTER_TWICE)
            state = with_row(state, partition, row._replace(put_aside=True))
            return with_held(state, number, partition, held._replace(put_aside=True))
        held = held._replace(next=held.next + 1, end=held.end + 1, attempts=0, put_aside=False)
        return with_held(self.moved(state, partition), number, partition, held)

    def moved(self, state: State, partition: int) -> State:
        """The position is behind one more input."""
        row = state.rows[partition]
        row = row._replace(next=row.next + 1, attempts=0, excused=0, deaths=0, put_aside=False)
        return with_row(state, partition, row)

    # -------------------------------------------------------------------------------------- the ends of a worker

    def poisoned(self, state: State, number: int, partition: int) -> State:
        """An input in hand kills the worker."""
        row = state.rows[partition]
        row = row._replace(deaths=row.deaths + 1)
        faults = sum(self.bounds.faults) - sum(state.faults)
        if row.deaths > len(self.bounds.poison[partition]) * (1 + self.bounds.attempts_max) + faults:
            raise Violation(POISON_LIVES)
        return self.died(with_row(state, partition, row), number)

    def kill(self, state: State, number: int) -> State:
        """A worker is killed by others."""
        state = state._replace(faults=state.faults._replace(kills=state.faults.kills - 1))
        for partition in self.partitions:
            state = self.excused(state, number, partition)
        return self.died(state, number)

    def died(self, state: State, number: int) -> State:
        """A worker is gone; the broker does not know yet."""
        worker = Worker(False, (None,) * len(self.partitions))
        return state._replace(workers=replaced(state.workers, number, worker))

    def start(self, state: State, number: int) -> State:
        """The worker runs again, as a new member."""
        worker = state.workers[number]._replace(alive=True)
        return state._replace(workers=replaced(state.workers, number, worker))

    def excused(self, state: State, number: int, partition: int) -> State:
        """A worker is killed or replaced: the suspect that it has in hand may be blamed for that, once."""
        row, held = state.rows[partition], state.workers[number].held[partition]
        if row.owner != number or held is None or not held.next < min(held.end, held.suspects_end):
            return state
        return with_row(state, partition, row._replace(excused=row.excused + 1))


def with_row(state: State, partition: int, row: Row) -> State:
    """The state with one row replaced."""
    return state._replace(rows=replaced(state.rows, partition, row))


def with_held(state: State, number: int, partition: int, held: Held | None) -> State:
    """The state with what a worker knows of a partition replaced."""
    worker = state.workers[number]
    worker = worker._replace(held=replaced(worker.held, partition, held))
    return state._replace(workers=replaced(state.workers, number, worker))
