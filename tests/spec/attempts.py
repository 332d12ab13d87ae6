"""Attempts: inputs that kill the worker that handles them, and who is blamed for it.

Some inputs are poison: a worker that has one in hand dies of it, before or after it has finished others. Workers start
again, members are missed, are granted what the dead held, and go on where it was committed; until a poison has used up
its attempts and is put aside as a dead letter, together with the position, in one commit. Workers are also killed from
outside, count as gone although they live, are stopped in the middle, give a partition back or have it taken from them,
or lose their broker; a handler may fail once that would succeed another time.

Leases, connections and the disk are `consumer.py`'s: here a commit is applied under the row's lease, or not at all, and
a broker that crashes has lost nothing but its members. Only what is stored before an attempt may come late, or twice.
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
    failures: int = 0
    """A handler fails, and its worker lives."""
    copies: int = 0
    """What is stored before an attempt is sent twice, and read once more; or it is read when its worker is dead."""


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
    """Attempts at the input at `next` that failed, or that their worker did not survive."""
    under_way: bool
    """One more began under this lease, and that it ended was not told."""
    suspects_end: int
    """Inputs below it may have been in hand when a member ended uncleanly."""
    owner: int
    """The worker whose lease is the row's."""
    at_work: bool
    """Its worker has begun with the input at `next`, alone, or was killed as it began, and was not stopped; nor was it
    given back or taken. What the row says of that may be wrong. Known to the properties only, as the next three are."""
    ends: int
    """How often a member vanished that was at work at the input at `next`."""
    failures: int
    """How often its handler failed."""
    deaths: int
    """How often the input at `next`, or one behind it, killed since then."""
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


class Copy(NamedTuple):
    """What is stored before an attempt, on its way."""

    next: int
    attempts: int
    read: bool
    """It was read before."""


class State(NamedTuple):
    """Everything."""

    rows: tuple[Row, ...]
    holders: tuple[int, ...]
    """Of each partition, as the broker knows it."""
    heard: tuple[bool, ...]
    """Of each worker: has its member reported to this broker, or is it known from the rows alone? In memory only."""
    copies: tuple[Copy | None, ...]
    """Of each partition, under the row's lease: another lease refuses them."""
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
            rows=(Row(0, 0, False, 0, NOBODY, False, 0, 0, 0, False),) * count,
            holders=(NOBODY,) * count,
            heard=(True,) * self.bounds.workers,
            copies=(None,) * count,
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
                    if faults.copies and (partition := self.next_suspect(state, number)) is not None:
                        what = ("KILL worker", number, "before it handles the suspect in", partition)
                        yield Step(what, True, self.kill, (number, partition))
                if faults.expiries and number in state.holders:
                    yield Step(("MEMBER EXPIRES", number), True, self.expire, (number, True))
            elif number in state.holders:
                yield Step(("member expires", number), False, self.expire, (number, False))
            else:
                yield Step(("worker starts", number), False, self.start, (number,))
        for partition in self.partitions:
            if state.holders[partition] != NOBODY and faults.takings:
                yield Step(("TAKEN is", partition), True, self.take, (partition,))
            if state.copies[partition] is not None:
                yield Step(("IT COMES LATE for", partition), True, self.read_copy, (partition,))
        if faults.broker_crashes:
            yield Step(("BROKER CRASHES",), True, self.crash_broker)

    def steps_of_worker(self, state: State, number: int) -> Iterator[Step]:
        """What a living worker can do."""
        worker, heard = state.workers[number], state.heard[number]
        if any(held is not None and held.next < held.end for held in worker.held):
            yield Step(("worker", number, "IS STOPPED"), True, self.stop, (number,))
        if not heard:
            yield Step(("worker", number, "reports"), False, self.report, (number,))
            if number in state.holders:
                yield Step(("worker", number, "ENDS WELL"), True, self.died, (number, True))
        for partition in self.partitions:
            row, held, holder = state.rows[partition], worker.held[partition], state.holders[partition]
            if held is None:
                if heard and holder == NOBODY and row.next < self.bounds.inputs:
                    yield Step(("worker", number, "is granted", partition), False, self.grant, (number, partition))
                continue
            at = (number, partition)
            if row.owner != number:
                yield Step(("worker", number, "hears that it lost", partition), False, self.lose, at)
            elif heard and holder == NOBODY:
                yield Step(("worker", number, "is adopted for", partition), False, self.adopt, at)
            elif heard:
                yield Step(("worker", number, "GIVES BACK", partition), True, self.give_back, at)
                yield Step(("worker", number, "IS TOLD AGAIN of", partition), True, self.tell_again, at)
            for position in range(held.next, held.end):
                if position in self.bounds.poison[partition]:
                    yield Step(("worker", number, "dies of", position, "in", partition), False, self.poisoned, at)
            in_hand = range(held.next, held.end)
            if in_hand and held.next not in self.bounds.poison[partition] and row.owner == number:
                yield Step(("worker", number, "commits", held.next, "in", partition), False, self.commit, at)
            if len(in_hand) == 1 and row.owner == number and state.faults.failures:
                yield Step(("worker", number, "FAILS with", held.next, "in", partition), True, self.fail, at)
            if held.end == self.bounds.inputs or not self.may_take_in_hand(worker, partition, held):
                continue
            tried = not in_hand and held.attempts >= self.bounds.attempts_max
            if tried and row.owner == number:
                yield Step(("worker", number, "puts aside", held.next, "in", partition), False, self.put_aside, at)
            elif not tried and (held.end >= held.suspects_end or row.owner == number):
                what = ("worker", number, "handles", held.end, "in", partition)
                yield Step(what, False, self.take_in_hand, (*at, False))
                if held.end < held.suspects_end and state.faults.copies:
                    yield Step((*what, "AND SENDS TWICE"), True, self.take_in_hand, (*at, True))

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

    def next_suspect(self, state: State, number: int) -> int | None:
        """The partition whose next input the worker may handle, alone, and is to tell of before."""
        worker = state.workers[number]
        for partition, held in enumerate(worker.held):
            if held is None or held.end >= held.suspects_end or state.rows[partition].owner != number:
                continue
            if self.may_take_in_hand(worker, partition, held):
                return partition
        return None

    # ------------------------------------------------------------------------------------------- the broker

    def expire(self, state: State, number: int, fault: bool) -> State:
        """A member is missed: whatever it may have had in hand is suspected, and what it was at work at is blamed.
        Where it never reported to this broker, it may have ended well."""
        state = state._replace(faults=state.faults._replace(expiries=state.faults.expiries - fault))
        for partition in self.partitions:
            if state.holders[partition] == number:
                row = state.rows[partition]
                if row.owner == number:
                    unheard = not state.heard[number] and self.guards.unheard_ends_excuse
                    row = self.released(row) if unheard else self.ended_uncleanly(row)
                state = with_row(state, partition, row)
                state = state._replace(holders=replaced(state.holders, partition, NOBODY))
        return state

    def ended_uncleanly(self, row: Row) -> Row:
        """The row after its holder vanished."""
        guards, end = self.guards, min(self.bounds.inputs, row.next + self.bounds.in_hand_max)
        counted = row.under_way and guards.unclean_ends_count
        row = row._replace(ends=row.ends + row.at_work, at_work=False)
        row = row._replace(attempts=row.attempts + counted, under_way=False)
        if row.next == end:
            return row
        suspected = row.next < row.suspects_end
        if not guards.unclean_ends_suspect or (suspected and not guards.attempts_stored_ahead):
            return row._replace(attempts=row.attempts + 1)
        return row if suspected else row._replace(suspects_end=end)

    def released(self, row: Row) -> Row:
        """The row after its holder gave it back, or was told to."""
        counted = row.under_way and not self.guards.clean_ends_excuse
        return row._replace(attempts=row.attempts + counted, under_way=False, at_work=False)

    def grant(self, state: State, number: int, partition: int) -> State:
        """A partition that nobody holds goes to a worker, which is told all that is stored."""
        row = state.rows[partition]
        row = row._replace(owner=number, under_way=row.under_way and not self.guards.grants_begin_anew, at_work=False)
        state = with_row(state, partition, row)._replace(holders=replaced(state.holders, partition, number))
        return self.told(state._replace(copies=replaced(state.copies, partition, None)), number, partition)

    def told(self, state: State, number: int, partition: int) -> State:
        """A worker hears what it holds."""
        row = state.rows[partition]
        held = Held(row.next, row.next, row.attempts, row.suspects_end, False)
        return with_held(state, number, partition, held)

    def tell_again(self, state: State, number: int, partition: int) -> State:
        """A worker gives back what it was to give back, and is to hold it after all. If the broker knows of an attempt
        under this lease, it knows that the lease was heard of: it is given back and granted. Else it is told again."""
        row = state.rows[partition]
        if row.under_way and self.guards.begun_leases_not_told_again:
            return self.grant(with_row(state, partition, self.released(row)), number, partition)
        return self.told(with_row(state, partition, row._replace(at_work=False)), number, partition)

    def adopt(self, state: State, number: int, partition: int) -> State:
        """The worker reports a lease that still is the row's. It is told nothing."""
        held = state.workers[number].held[partition]
        assert held is not None
        at_work = held.next < min(held.end, held.suspects_end)
        state = with_row(state, partition, state.rows[partition]._replace(at_work=at_work))
        return state._replace(holders=replaced(state.holders, partition, number))

    def lose(self, state: State, number: int, partition: int) -> State:
        """The worker hears that somebody else holds the partition."""
        return with_held(state, number, partition, None)

    def give_back(self, state: State, number: int, partition: int) -> State:
        """The worker reports a partition no more, whatever it was doing there."""
        state = with_row(state, partition, self.released(state.rows[partition]))
        return with_held(state, number, partition, None)._replace(holders=replaced(state.holders, partition, NOBODY))

    def take(self, state: State, partition: int) -> State:
        """The time to give a partition back is over."""
        faults = state.faults._replace(takings=state.faults.takings - 1)
        state = with_row(state, partition, self.released(state.rows[partition]))
        return state._replace(holders=replaced(state.holders, partition, NOBODY), faults=faults)

    def crash_broker(self, state: State) -> State:
        """The rows stay, and name the holders. Nobody has reported."""
        faults = state.faults._replace(broker_crashes=state.faults.broker_crashes - 1)
        return state._replace(heard=(False,) * self.bounds.workers, faults=faults)

    def report(self, state: State, number: int) -> State:
        """A worker reports to a broker for the first time. What it does not report it gave back before."""
        state = state._replace(heard=replaced(state.heard, number, True))
        for partition in self.partitions:
            if state.holders[partition] == number and state.workers[number].held[partition] is None:
                state = self.give_back(state, number, partition)
        return state

    def read_copy(self, state: State, partition: int) -> State:
        """What is stored before an attempt comes late. Whether that attempt is known already, the numbers tell."""
        copy, row = state.copies[partition], state.rows[partition]
        assert copy is not None
        state = state._replace(copies=replaced(state.copies, partition, None))
        if copy.next < row.next or (copy.read and self.guards.turns_only_rise):
            return state
        if not copy.read:
            row = row._replace(at_work=state.holders[partition] != NOBODY)
        return with_row(state, partition, begun(row, copy.attempts))

    # ------------------------------------------------------------------------------------------- the worker

    def take_in_hand(self, state: State, number: int, partition: int, twice: bool) -> State:
        """The next input is handled. If it is a suspect, that this attempt begins is stored before."""
        worker = state.workers[number]
        held, row = worker.held[partition], state.rows[partition]
        assert held is not None
        alone = all(one is None or one.next == one.end for one in worker.held)
        if held.end < held.suspects_end:
            if self.guards.attempts_stored_ahead:
                row = begun(row, held.attempts)
            if twice:
                state = on_its_way(state, partition, Copy(row.next, held.attempts, True))
            state = with_row(state, partition, row._replace(at_work=alone))
        if not alone:
            for other, one in enumerate(state.rows):
                if one.owner == number:
                    state = with_row(state, other, one._replace(at_work=False))
        return with_held(state, number, partition, held._replace(end=held.end + 1))

    def commit(self, state: State, number: int, partition: int) -> State:
        """The first input in hand is finished, and the position is behind it."""
        held = state.workers[number].held[partition]
        assert held is not None
        held = held._replace(next=held.next + 1, attempts=0)
        return with_held(self.moved(state, partition), number, partition, held)

    def fail(self, state: State, number: int, partition: int) -> State:
        """The handler of the only input in hand fails. That is stored, and its worker lives on."""
        held, row = state.workers[number].held[partition], state.rows[partition]
        assert held is not None
        held = held._replace(end=held.next, attempts=held.attempts + 1)
        row = row._replace(attempts=max(row.attempts, held.attempts), under_way=False)
        row = row._replace(at_work=False, failures=row.failures + 1)
        state = state._replace(faults=state.faults._replace(failures=state.faults.failures - 1))
        return with_held(with_row(state, partition, row), number, partition, held)

    def stop(self, state: State, number: int) -> State:
        """Whatever a worker has in hand is cut short. It stays a member, and goes on when that is stored."""
        for partition, held in enumerate(state.workers[number].held):
            if held is not None:
                state = with_held(state, number, partition, held._replace(end=held.next))
                row = state.rows[partition]
                if row.owner == number:
                    under_way = row.under_way and not self.guards.cut_short_is_told
                    state = with_row(state, partition, row._replace(under_way=under_way, at_work=False))
        return state

    def put_aside(self, state: State, number: int, partition: int) -> State:
        """The next input has used up its attempts: its dead letter is stored, and the position is behind it."""
        held, row = state.workers[number].held[partition], state.rows[partition]
        assert held is not None
        innocent = held.next not in self.bounds.poison[partition]
        if innocent and row.ends + row.failures < self.bounds.attempts_max:
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
        row = row._replace(
            next=row.next + 1, attempts=0, under_way=False, at_work=False, ends=0, failures=0, deaths=0, put_aside=False
        )
        return with_row(state, partition, row)._replace(copies=replaced(state.copies, partition, None))

    # -------------------------------------------------------------------------------------- the ends of a worker

    def poisoned(self, state: State, number: int, partition: int) -> State:
        """An input in hand kills the worker."""
        row = state.rows[partition]
        row = row._replace(deaths=row.deaths + 1)
        faults = sum(self.bounds.faults) - sum(state.faults)
        if row.deaths > len(self.bounds.poison[partition]) * (1 + self.bounds.attempts_max) + faults:
            raise Violation(POISON_LIVES)
        return self.died(with_row(state, partition, row), number)

    def kill(self, state: State, number: int, beginning: int | None = None) -> State:
        """A worker is killed by others. `beginning`: when it has sent that it begins, there, and that is not read."""
        state = state._replace(faults=state.faults._replace(kills=state.faults.kills - 1))
        if beginning is not None:
            held = state.workers[number].held[beginning]
            assert held is not None
            state = on_its_way(state, beginning, Copy(held.next, held.attempts, False))
        return self.died(state, number)

    def died(self, state: State, number: int, well: bool = False) -> State:
        """A worker is gone; the broker does not know yet. `well`: it was stopped, and had left if it had been heard."""
        if well:
            for partition, row in enumerate(state.rows):
                if row.owner == number:
                    state = with_row(state, partition, row._replace(at_work=False))
        worker = Worker(False, (None,) * len(self.partitions))
        return state._replace(workers=replaced(state.workers, number, worker))

    def start(self, state: State, number: int) -> State:
        """The worker runs again, as a new member."""
        worker = state.workers[number]._replace(alive=True)
        heard = replaced(state.heard, number, True)
        return state._replace(workers=replaced(state.workers, number, worker), heard=heard)


def begun(row: Row, attempts: int) -> Row:
    """One more attempt is under way. Those before are what its worker knows, or more."""
    return row._replace(attempts=max(row.attempts, attempts), under_way=True)


def on_its_way(state: State, partition: int, copy: Copy) -> State:
    """The state with something that comes late."""
    faults = state.faults._replace(copies=state.faults.copies - 1)
    return state._replace(copies=replaced(state.copies, partition, copy), faults=faults)


def with_row(state: State, partition: int, row: Row) -> State:
    """The state with one row replaced."""
    return state._replace(rows=replaced(state.rows, partition, row))


def with_held(state: State, number: int, partition: int, held: Held | None) -> State:
    """The state with what a worker knows of a partition replaced."""
    worker = state.workers[number]
    worker = worker._replace(held=replaced(worker.held, partition, held))
    return state._replace(workers=replaced(state.workers, number, worker))
