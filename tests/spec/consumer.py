"""A group of workers that consume, process and produce: leases on partitions, transactions that move positions in one
or several of them together with their output, plain offset commits, and the workers' own producers.

Each worker joins the group for every partition, takes what nobody holds, and runs one transaction over the next input
of all partitions it holds. Leases expire at any time, workers die, connections are cut and deliver late, the broker
crashes, a group commit fails, the output topic goes and comes back, a user runs a transaction of unknown outcome again
under a new name, and a second run of a worker takes its producer's name over. What a worker reads is always durable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from . import broker
from .broker import (
    DUPLICATE,
    FENCED,
    LEASE_LOST,
    OFFSET_MOVED,
    OK,
    SEQUENCE_CONFLICT,
    SEQUENCE_GAP,
    STALE_CONNECTION,
    STORE_REPLACED,
    STORED,
    UNKNOWN_PRODUCER,
    UNKNOWN_TOPIC,
    Connection,
    Decision,
    Disk,
    Numbers,
    Row,
)
from .explorer import Step, Violation
from .guards import (
    FALSE_CONFLICT,
    FALSE_FENCED,
    FALSE_GAP,
    FALSE_LEASE_LOST,
    FALSE_OFFSET_MOVED,
    FALSE_REPLACED,
    FALSE_STALE,
    LIVE_FENCED,
    LOST,
    NOT_STORED_BUT_STORED,
    OUTPUT_MISSING,
    OUTPUT_TWICE,
    STALE_LEASE,
    Guards,
)


class Faults(NamedTuple):
    """How often each fault may still happen."""

    cuts: int = 0
    broker_crashes: int = 0
    expiries: int = 0
    """A lease expires although its holder lives and works."""
    topic_losses: int = 0
    group_failures: int = 0
    deaths: int = 0
    zombies: int = 0
    """The next run of a worker starts, with its producer's name, while the one before lives."""
    reruns: int = 0
    """A user gives up waiting for a transaction and runs it again under a new name, with the lease still held."""
    plain_commits: int = 0
    """A worker moves a position without output; not a fault, but it needs a bound."""


@dataclass(frozen=True)
class Bounds:
    """How much of the world is explored."""

    partitions: int = 1
    inputs: int = 2
    """In each partition."""
    workers: int = 2
    in_flight: int = 1
    remembered: int = 2
    takeovers_remembered: int = 1
    attempts: int = 2
    """Transactions that a worker tries while the output topic is gone."""
    producers: bool = True
    """Transactions have a producer; otherwise only their positions and leases protect them."""
    shared_name: bool = False
    """All workers are runs of one application with one producer name, which each has to open; otherwise each has a
    name of its own, opened before."""
    faults: Faults = field(default_factory=Faults)


# ------------------------------------------------------------------------------------------------- the state


class Lease(NamedTuple):
    """What the broker stores about the group's position in a partition."""

    next: int
    number: int
    session: int
    """The worker that was granted this lease; -1: nobody ever."""
    ended_number: int
    ended_at: int
    """The lease before, and the position at its hand-over."""


class Output(NamedTuple):
    """The stored output of one input, and the transaction that stored it."""

    partition: int
    position: int
    transaction: Transaction


class Transaction(NamedTuple):
    """Names one run of a transaction."""

    worker: int
    name: int
    last: int


class Store(NamedTuple):
    """What the broker writes to its disk. Outputs are sorted: their order is no matter here."""

    leases: tuple[Lease, ...]
    rows: tuple[Row | None, ...]
    """Of each producer name."""
    outputs: tuple[Output, ...]
    counter: int


class Entry(NamedTuple):
    """One position that a commit moves."""

    partition: int
    lease: int
    start: int
    end: int


# Kinds of commits.
TRANSACTION, PRODUCERLESS, PLAIN = "transaction", "transaction without producer", "plain offsets"


class Open(NamedTuple):
    """Request: take the producer's name. 0 expects no row."""

    expected: int


class Join(NamedTuple):
    """Request: a lease on this partition."""

    partition: int
    join: bool = True


class Commit(NamedTuple):
    """Request: move these positions, and store the outputs unless it is plain."""

    kind: str
    name: int
    producer_id: int
    epoch: int
    previous: int
    last: int
    entries: tuple[Entry, ...]


class Opened(NamedTuple):
    """Reply: the name is yours."""

    producer_id: int
    epoch: int
    last_seq: int
    opened: bool = True


class OpenRace(NamedTuple):
    """Reply: the name's epoch is another one."""

    epoch: int


class Grant(NamedTuple):
    """Reply: the partition is yours from this position on."""

    partition: int
    lease: int
    next: int


class Held(NamedTuple):
    """Reply: somebody else has the partition."""

    partition: int
    held: bool = True


class Answer(NamedTuple):
    """Reply to a commit."""

    commit: Commit
    decision: Decision


Request = Open | Join | Commit
Reply = Opened | OpenRace | Grant | Held | Answer

# Where a commit of the queue stands, on the current connection.
UNSENT, SENT, REFUSED = "unsent", "sent", "refused"


class Queued(NamedTuple):
    """A commit that is not decided yet."""

    kind: str
    previous: int
    last: int
    entries: tuple[Entry, ...]
    status: str


# Phases of a worker. The last three are its ends.
UNBORN, NEW, READY = "unborn", "new", "ready"
FENCED_OUT, UNKNOWN, DEAD = "fenced", "unknown", "dead"
ENDED = (FENCED_OUT, UNKNOWN, DEAD)

NOBODY = -1


class Worker(NamedTuple):
    """One worker process with its session."""

    phase: str
    name: int
    """Its producer's."""
    producer_id: int
    epoch: int
    """0: not opened."""
    acknowledged: int
    """The highest number answered as stored (C2)."""
    number: int
    """The last number given to a transaction (C1: never reused)."""
    leases: tuple[int, ...]
    """On each partition; 0: none."""
    positions: tuple[int, ...]
    """In each partition: the next input to process."""
    joining: int
    """The partition it waits for, or NOBODY."""
    queue: tuple[Queued, ...]
    refusal: Decision | None
    """The refusal whose draining is under way (C4)."""
    ended_before: tuple[int, ...]
    """Workers that had ended when this one started; no step of theirs may hurt it."""


class State(NamedTuple):
    """Everything."""

    disk: Disk[Store, Reply]
    serials: tuple[int, ...]
    """Rule 4, for each producer name. In memory only."""
    holders: tuple[int, ...]
    """Of each partition: the worker whose lease has not expired. In memory only."""
    connections: tuple[Connection[Request, Reply], ...]
    workers: tuple[Worker, ...]
    topic_gone: bool
    aborted: tuple[Transaction, ...]
    """Reported as not stored, while copies of them are still on their way."""
    faults: Faults


class Group:
    """The model."""

    def __init__(self, bounds: Bounds, guards: Guards) -> None:
        self.bounds = bounds
        self.guards = guards
        self.partitions = range(bounds.partitions)

    def initial(self) -> State:
        """No lease is given. Workers with names of their own are connected and have opened them; a shared name is not
        open, and only its first run has started."""
        bounds = self.bounds
        workers, rows = [], []
        for number in range(bounds.workers):
            shared = bounds.shared_name
            worker = Worker(
                phase=READY if not shared else NEW if number == 0 else UNBORN,
                name=0 if shared else number,
                producer_id=0 if shared else number + 1,
                epoch=0 if shared else 1,
                acknowledged=-1,
                number=-1,
                leases=(0,) * bounds.partitions,
                positions=(0,) * bounds.partitions,
                joining=NOBODY,
                queue=(),
                refusal=None,
                ended_before=(),
            )
            workers.append(worker)
        if bounds.shared_name:
            first: list[Row | None] = [None]
        else:
            # A second row for each worker is for the name it takes when its user runs a transaction again.
            rows = [Row(name + 1, 1, name % bounds.workers, -1, (), ()) for name in range(2 * bounds.workers)]
            first = list(rows if bounds.faults.reruns else rows[: bounds.workers])
        connections = [Connection[Request, Reply](number, number + 1, True, (), ()) for number in range(bounds.workers)]
        leases = (Lease(0, 0, NOBODY, 0, 0),) * bounds.partitions
        store = Store(leases, tuple(first), (), len(first) if rows else 0)
        return State(
            disk=Disk(store, None, (), store, ()),
            serials=(0,) * len(first),
            holders=(NOBODY,) * bounds.partitions,
            connections=() if bounds.shared_name else tuple(connections),
            workers=tuple(workers),
            topic_gone=False,
            aborted=(),
            faults=bounds.faults,
        )

    # ------------------------------------------------------------------------------------------- properties

    def check(self, state: State) -> None:
        """What must hold in every state. More is checked where things happen: see `applied`, `abort`, `receive_…`."""
        stores = (state.disk.durable, state.disk.decided)
        for store in stores if stores[0] is not stores[1] else stores[:1]:
            inputs = {output[:2] for output in store.outputs}
            if len(inputs) != len(store.outputs):
                raise Violation(OUTPUT_TWICE)
            if not self.bounds.faults.plain_commits and len(inputs) < sum([lease.next for lease in store.leases]):
                raise Violation(OUTPUT_MISSING)

    def finished(self, state: State) -> bool:
        """Every input is processed and answered; or every worker has ended, and one of them by dying."""
        bounds, durable = self.bounds, state.disk.durable
        phases = [worker.phase for worker in state.workers]
        if all(phase in ENDED for phase in phases):
            return DEAD in phases  # otherwise somebody must have the name
        wanted = bounds.inputs * bounds.partitions
        return (
            sum([lease.next for lease in durable.leases]) == wanted
            and (bounds.faults.plain_commits > 0 or len(durable.outputs) == wanted)
            and not any(worker.queue for worker in state.workers)
        )

    # ------------------------------------------------------------------------------------ what may happen

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""
        for number in range(self.bounds.workers):
            yield from self.steps_of_worker(state, number)
        for index, connection in enumerate(state.connections):
            if connection.requests:
                label = ("broker reads", connection.requests[0], "of", connection.owner, "on", connection.serial)
                yield Step(label, False, self.process, (index,))
                if not connection.open:
                    yield Step(("unread requests are lost on", connection.serial), False, self.drop, (index,))
            if connection.replies:
                received = ("worker", connection.owner, "receives", connection.replies[0])
                yield Step(received, False, self.receive, (index,))
        disk, faults = state.disk, state.faults
        if disk.can_begin():
            yield Step(("group begins",), False, self.begin)
        if disk.writing is not None:
            yield Step(("group is durable",), False, self.complete)
            if faults.group_failures:
                yield Step(("GROUP FAILS",), True, self.fail_group)
        if faults.broker_crashes:
            yield Step(("BROKER CRASHES",), True, self.crash_broker)
        for partition, holder in enumerate(state.holders):
            if holder == NOBODY:
                continue
            worker = state.workers[holder]
            if worker.phase in ENDED or not (worker.leases[partition] or worker.joining == partition):
                yield Step(("lease expires on", partition), False, self.expire, (partition, False))
            elif faults.expiries:
                yield Step(("LEASE EXPIRES on", partition), True, self.expire, (partition, True))
        if state.topic_gone:
            yield Step(("topic is back",), False, self.return_topic)
        elif faults.topic_losses:
            yield Step(("TOPIC GONE",), True, self.lose_topic)

    def steps_of_worker(self, state: State, number: int) -> Iterator[Step]:
        """What worker `number` can do, or have done to it."""
        bounds, worker, faults = self.bounds, state.workers[number], state.faults
        if worker.phase is UNBORN:
            before = state.workers[number - 1].phase
            if before in ENDED:
                yield Step(("start worker", number), False, self.start, (number, False))
            elif faults.zombies and before is not UNBORN:
                yield Step(("START worker", number, "beside", number - 1), True, self.start, (number, True))
            return
        if worker.phase in ENDED:
            return
        queue = worker.queue
        if faults.deaths:
            yield Step(("WORKER DIES", number), True, self.die, (number,))
        if not any(one.open and one.owner == number for one in state.connections):
            yield Step(("worker", number, "connects"), False, self.connect, (number,))
            if faults.reruns and queue and queue[0].kind is not PLAIN and worker.name < bounds.workers:
                yield Step(("USER RUNS AGAIN", queue[0].entries, "of", number), True, self.run_again, (number,))
            return
        if faults.cuts:
            yield Step(("CUT connection of", number), True, self.cut, (number,))
        if worker.phase is not READY:
            return
        unsent = next((index for index, one in enumerate(queue) if one.status is UNSENT), None)
        if unsent is not None:
            if worker.refusal is None or self.guards.refusals_ask_the_unsent:
                yield Step(("worker", number, "sends again", queue[unsent]), False, self.send, (number, unsent))
            return
        if worker.refusal is not None:
            return
        work = tuple([p for p in self.partitions if worker.leases[p] and worker.positions[p] < bounds.inputs])
        if work and worker.joining == NOBODY and len(queue) < bounds.in_flight:
            if not state.topic_gone or worker.number + 1 < bounds.attempts:
                kind = TRANSACTION if bounds.producers else PRODUCERLESS
                yield Step(("worker", number, "commits inputs of", work), False, self.transact, (number, kind, work))
            if faults.plain_commits:
                yield Step(("worker", number, "skips", work[:1]), False, self.transact, (number, PLAIN, work[:1]))
        if not queue and worker.joining == NOBODY:
            for partition in self.partitions:
                unread = state.disk.durable.leases[partition].next < bounds.inputs
                if unread and not worker.leases[partition] and state.holders[partition] in (NOBODY, number):
                    yield Step(("worker", number, "joins for", partition), False, self.join, (number, partition))

    # ------------------------------------------------------------------------------------------- the broker

    def process(self, state: State, index: int) -> State:
        """The broker reads the next request of a connection and decides it."""
        guards, connection = self.guards, state.connections[index]
        request, rest = connection.requests[0], connection.requests[1:]
        state = self.with_connection(state, index, connection._replace(requests=rest))
        reply: Reply
        if isinstance(request, Open):
            state, store, reply = self.open(state, connection.owner, request)
            waits = guards.opens_wait
        elif isinstance(request, Join):
            state, store, reply = self.grant(state, connection.owner, request.partition)
            waits = guards.grants_wait
        else:
            state, store, decision = self.commit(state, connection, request)
            reply = Answer(request, decision)
            if decision.code in STORED:
                waits = guards.duplicates_wait if decision.code == DUPLICATE else guards.acknowledgements_wait
            else:
                waits = guards.refusals_wait
        heard = reply if connection.open else None
        disk, leaves = state.disk.decide(store, connection.serial, heard, waits)
        if leaves:
            replied = broker.replied(state.connections, ((connection.serial, reply),), False)
            state = state._replace(connections=replied)
        return self.tidied(state._replace(disk=disk))

    def open(self, state: State, asker: int, request: Open) -> tuple[State, Store, Reply]:
        """Rule 10."""
        guards, store = self.guards, state.disk.decided
        name = state.workers[asker].name
        row = store.rows[name]
        after = broker.opened(guards, row, asker, request.expected, store.counter, self.bounds.takeovers_remembered)
        if after is None:
            return state, store, OpenRace(0 if row is None else row.epoch)
        last_seq = after.last_seq
        if not guards.opens_read_decided:
            durable = state.disk.durable.rows[name]
            last_seq = -1 if durable is None else durable.last_seq
        if after is not row:
            if row is not None and self.hurts_the_living(state, asker, row.holder):
                raise Violation(LIVE_FENCED)
            store = store._replace(rows=replaced(store.rows, name, after), counter=store.counter + 1)
            if guards.takeovers_forget_serial:
                state = state._replace(serials=replaced(state.serials, name, 0))
        return state, store, Opened(after.producer_id, after.epoch, last_seq)

    def hurts_the_living(self, state: State, asker: int, holder: int) -> bool:
        """Two living sessions may race for a name; one that was gone before, or that had its turn, may not."""
        if asker >= holder or state.workers[holder].phase in ENDED:
            return False
        return asker in state.workers[holder].ended_before or state.workers[asker].epoch > 0

    def grant(self, state: State, asker: int, partition: int) -> tuple[State, Store, Reply]:
        """Rule 14."""
        guards, store = self.guards, state.disk.decided
        lease = store.leases[partition]
        if not (guards.grants_repeat and lease.session == asker):
            if state.holders[partition] not in (NOBODY, asker):
                return state, store, Held(partition)
            number = lease.number + 1 if guards.grants_bump else 1
            lease = Lease(lease.next, number, asker, lease.number, lease.next)
            store = store._replace(leases=replaced(store.leases, partition, lease))
        following = lease.next if guards.grants_read_decided else state.disk.durable.leases[partition].next
        state = state._replace(holders=replaced(state.holders, partition, asker))
        return state, store, Grant(partition, lease.number, following)

    def commit(
        self, state: State, connection: Connection[Request, Reply], request: Commit
    ) -> tuple[State, Store, Decision]:
        """Rules 1 to 8; 15 for a plain one."""
        guards, store = self.guards, state.disk.decided
        later, entries_before = self.positions_refused(state, request)
        if request.kind is not TRANSACTION:
            if later is not None:
                return state, store, later
            return state, self.applied(state, store, connection.owner, request, request.entries), Decision(OK)
        name = request.name
        row = store.rows[name]
        numbers = Numbers(request.producer_id, request.epoch, request.previous, request.last)
        decision, recorded = broker.decide(
            guards, row, numbers, request.entries, connection.serial, state.serials[name], later
        )
        if recorded:
            serial = max(state.serials[name], connection.serial)
            state = state._replace(serials=replaced(state.serials, name, serial))
        if decision is not None:
            if decision is later and not guards.all_or_nothing:
                store = self.applied(state, store, connection.owner, request, entries_before)
            return state, store, decision
        assert row is not None
        row = broker.applied(row, numbers, connection.owner, request.entries, 0, self.bounds.remembered)
        store = self.applied(state, store, connection.owner, request, request.entries)
        return state, store._replace(rows=replaced(store.rows, name, row)), Decision(OK, 0)

    def positions_refused(self, state: State, request: Commit) -> tuple[Decision | None, tuple[Entry, ...]]:
        """Rule 7. Returns (the refusal, the entries before the refused one)."""
        guards = self.guards
        for index, entry in enumerate(request.entries):
            lease = state.disk.decided.leases[entry.partition]
            if guards.lease_checked and (index == 0 or guards.every_lease_checked) and entry.lease != lease.number:
                known = guards.lease_lost_tells_end and lease.ended_number == entry.lease
                ended_at = lease.ended_at if known else None
                return Decision(LEASE_LOST, ended_at, entry.partition), request.entries[:index]
            if request.kind is PLAIN:
                continue
            if guards.start_checked and (index == 0 or guards.every_start_checked) and entry.start != lease.next:
                return Decision(OFFSET_MOVED, lease.next, entry.partition), request.entries[:index]
        if state.topic_gone and request.kind is not PLAIN:
            return Decision(UNKNOWN_TOPIC), ()
        return None, ()

    def applied(self, state: State, store: Store, worker: int, request: Commit, entries: tuple[Entry, ...]) -> Store:
        """Rule 8: the store after the entries; and which may never come here."""
        transaction = Transaction(worker, request.name, request.last)
        if request.kind is not PLAIN and transaction in state.aborted and entries:
            raise Violation(NOT_STORED_BUT_STORED)
        leases, outputs = store.leases, store.outputs
        for entry in entries:
            lease = leases[entry.partition]
            if request.kind is PLAIN and self.guards.offsets_move_forward and entry.end <= lease.next:
                continue
            if entry.lease != lease.number:
                raise Violation(STALE_LEASE)
            leases = replaced(leases, entry.partition, lease._replace(next=entry.end))
            if request.kind is not PLAIN:
                outputs += tuple(
                    [Output(entry.partition, position, transaction) for position in range(entry.start, entry.end)]
                )
        return store._replace(leases=leases, outputs=tuple(sorted(outputs)))

    # ------------------------------------------------------------------------------------------- the client

    def connect(self, state: State, number: int) -> State:
        """A new connection. Only a session without an epoch opens its producer's name on it (rule 11)."""
        worker = state.workers[number]
        connections = broker.connected(state.connections, number, state.disk, max(state.serials))
        if worker.epoch and self.guards.reconnect_without_open:
            worker = worker._replace(phase=READY)
        else:
            connections = broker.asked(connections, number, Open(0))
        return self.with_worker(state._replace(connections=connections), number, worker)

    def join(self, state: State, number: int, partition: int) -> State:
        """A worker asks for a partition."""
        connections = broker.asked(state.connections, number, Join(partition))
        worker = state.workers[number]._replace(joining=partition)
        return self.with_worker(state._replace(connections=connections), number, worker)

    def transact(self, state: State, number: int, kind: str, partitions: tuple[int, ...]) -> State:
        """A worker has processed the next input of each of these partitions, and commits."""
        worker = state.workers[number]
        entries = []
        positions = worker.positions
        for partition in partitions:
            start = positions[partition]
            entries.append(Entry(partition, worker.leases[partition], start, start + 1))
            positions = replaced(positions, partition, start + 1)
        previous, last = -1, -1
        if kind is not PLAIN:
            sequence = [one.last for one in worker.queue if one.kind is TRANSACTION]
            previous = max([worker.acknowledged, *sequence]) if kind is TRANSACTION else -1
            last = worker.number + self.guards.every_commit_takes_a_number
            worker = worker._replace(number=last)
        else:
            faults = state.faults._replace(plain_commits=state.faults.plain_commits - 1)
            state = state._replace(faults=faults)
        queued = Queued(kind, previous, last, tuple(entries), UNSENT)
        worker = worker._replace(positions=positions, queue=(*worker.queue, queued))
        return self.send(self.with_worker(state, number, worker), number, len(worker.queue) - 1)

    def send(self, state: State, number: int, index: int) -> State:
        """A commit of the queue goes out on the current connection."""
        worker = state.workers[number]
        one = worker.queue[index]
        request = Commit(one.kind, worker.name, worker.producer_id, worker.epoch, one.previous, one.last, one.entries)
        worker = worker._replace(queue=replaced(worker.queue, index, one._replace(status=SENT)))
        connections = broker.asked(state.connections, number, request)
        return self.with_worker(state._replace(connections=connections), number, worker)

    def run_again(self, state: State, number: int) -> State:
        """The user does not know the outcome and runs the block again, under a new name and the lease it still has."""
        worker = self.rewound(state.workers[number])._replace(
            queue=(), name=number + self.bounds.workers, producer_id=number + self.bounds.workers + 1,
            acknowledged=-1, number=-1,
        )  # fmt: skip
        faults = state.faults._replace(reruns=state.faults.reruns - 1)
        return self.with_worker(state._replace(faults=faults), number, worker)

    def receive(self, state: State, index: int) -> State:
        """The client reads the next reply of its connection."""
        connection = state.connections[index]
        reply, rest = connection.replies[0], connection.replies[1:]
        state = self.with_connection(state, index, connection._replace(replies=rest))
        number = connection.owner
        worker = state.workers[number]
        if isinstance(reply, OpenRace):  # only a fresh session opens, and it asks again with the epoch it was told
            return state._replace(connections=broker.asked(state.connections, number, Open(reply.epoch)))
        if isinstance(reply, Opened):
            if not worker.epoch:
                worker = worker._replace(acknowledged=reply.last_seq, number=reply.last_seq)
            worker = worker._replace(phase=READY, producer_id=reply.producer_id, epoch=reply.epoch)
        elif isinstance(reply, Held):
            worker = worker._replace(joining=NOBODY)
        elif isinstance(reply, Grant):
            worker = worker._replace(
                joining=NOBODY,
                leases=replaced(worker.leases, reply.partition, reply.lease),
                positions=replaced(worker.positions, reply.partition, reply.next),
            )
        else:
            return self.tidied(self.receive_answer(state, number, reply.commit, reply.decision))
        return self.with_worker(state, number, worker)

    def receive_answer(self, state: State, number: int, commit: Commit, decision: Decision) -> State:
        """The answer to a commit, if it is still in the queue."""
        worker = state.workers[number]
        index = next(
            (
                place
                for place, one in enumerate(worker.queue)
                if (one.kind, one.last, one.entries) == (commit.kind, commit.last, commit.entries)
            ),
            None,
        )
        if index is None or commit.name != worker.name:
            return state
        code = decision.code
        if code in STORED:
            return self.receive_stored(state, number, index)
        if code == STALE_CONNECTION:
            if not self.guards.stale_reconnects:
                raise Violation(FALSE_STALE)
            return self.closed(self.with_worker(state, number, disconnected(worker)), number)
        if code == FENCED:
            return self.receive_fenced(state, number, decision)
        if code == UNKNOWN_PRODUCER:
            return self.end(state, number, UNKNOWN)
        if code == SEQUENCE_CONFLICT:
            raise Violation(FALSE_CONFLICT)
        if code == STORE_REPLACED:
            raise Violation(FALSE_REPLACED)
        if code == SEQUENCE_GAP and worker.refusal is None:
            raise Violation(FALSE_GAP)
        if code == LEASE_LOST:
            lease = state.disk.decided.leases[decision.partition]
            lost = next(entry.lease for entry in commit.entries if entry.partition == decision.partition)
            if lease.session == number and lease.ended_number == lost:
                raise Violation(FALSE_LEASE_LOST)
        if code in (LEASE_LOST, OFFSET_MOVED) and commit.kind is PRODUCERLESS and decision.detail is not None:
            # No sequence protects it, but its positions tell: where they were handed over, or where they are now.
            end = next(entry.end for entry in commit.entries if entry.partition == decision.partition)
            if end <= decision.detail:
                if code == LEASE_LOST:
                    worker = worker._replace(leases=replaced(worker.leases, decision.partition, 0))
                return self.receive_stored(self.with_worker(state, number, worker), number, index)
        if code == OFFSET_MOVED and worker.name < self.bounds.workers:
            raise Violation(FALSE_OFFSET_MOVED)
        refused = worker.queue[index]._replace(status=REFUSED)
        refusal = worker.refusal if worker.refusal is not None or code == SEQUENCE_GAP else decision
        worker = worker._replace(queue=replaced(worker.queue, index, refused), refusal=refusal)
        return self.act_if_drained(self.with_worker(state, number, worker), number)

    def receive_stored(self, state: State, number: int, index: int) -> State:
        """A commit is stored, now or before."""
        worker = state.workers[number]
        one = worker.queue[index]
        if one.kind is not PLAIN and not self.is_durable(state, number, one):
            raise Violation(LOST)
        worker = worker._replace(queue=worker.queue[:index] + worker.queue[index + 1 :])
        if one.kind is TRANSACTION:
            worker = worker._replace(acknowledged=max(worker.acknowledged, one.last))
        return self.act_if_drained(self.with_worker(state, number, worker), number)

    def receive_fenced(self, state: State, number: int, decision: Decision) -> State:
        """C6, C10."""
        worker, disk = state.workers[number], state.disk
        rows = [store.rows[worker.name] for store in (disk.durable, disk.decided)]
        if [row.holder for row in rows if row is not None] == [number, number]:
            raise Violation(FALSE_FENCED)
        for one in worker.queue:
            if one.kind is not TRANSACTION or (decision.detail is None and self.guards.fenced_tells_end):
                continue  # outcome unknown
            if self.guards.fenced_tells_end and one.last <= (decision.detail or 0):
                if not self.is_durable(state, number, one):
                    raise Violation(LOST)
            else:
                state = self.abort(state, number, one)
        return self.end(state, number, FENCED_OUT)

    def act_if_drained(self, state: State, number: int) -> State:
        """C4, C5: a refusal came, and every commit is answered on this connection: the rest of the queue is aborted."""
        worker = state.workers[number]
        refusal = worker.refusal
        waited_for = (SENT, UNSENT) if self.guards.refusals_ask_the_unsent else (SENT,)
        if refusal is None or any(one.status in waited_for for one in worker.queue):
            return state
        unknown = refusal.code == LEASE_LOST and refusal.detail is None and self.guards.lease_lost_tells_end
        for one in worker.queue:
            if one.kind is TRANSACTION or (one.kind is PRODUCERLESS and not unknown):
                state = self.abort(state, number, one)
        worker = self.rewound(worker)._replace(queue=(), refusal=None)
        if refusal.code == LEASE_LOST:  # the other partitions are still leased
            worker = worker._replace(leases=replaced(worker.leases, refusal.partition, 0))
        elif refusal.code == OFFSET_MOVED:  # an earlier run got there: ask where to go on
            worker = worker._replace(leases=(0,) * self.bounds.partitions)
        return self.with_worker(state, number, worker)

    def abort(self, state: State, number: int, one: Queued) -> State:
        """The user is told that a transaction is not stored, and never will be."""
        transaction = Transaction(number, state.workers[number].name, one.last)
        if any(output.transaction == transaction for output in state.disk.decided.outputs):
            raise Violation(NOT_STORED_BUT_STORED)
        return state._replace(aborted=tuple(sorted({*state.aborted, transaction})))

    def is_durable(self, state: State, number: int, one: Queued) -> bool:
        """Are all outputs of this worker's transaction durable?"""
        transaction = Transaction(number, state.workers[number].name, one.last)
        stored = {output[:2] for output in state.disk.durable.outputs if output.transaction == transaction}
        return all((entry.partition, entry.start) in stored for entry in one.entries)

    def rewound(self, worker: Worker) -> Worker:
        """The worker goes back to the first input of each partition that its queue holds."""
        positions = worker.positions
        for one in reversed(worker.queue):
            for entry in one.entries:
                positions = replaced(positions, entry.partition, entry.start)
        return worker._replace(positions=positions)

    # ---------------------------------------------------------------------------------- the disk and the world

    def begin(self, state: State) -> State:
        """A group goes to the disk."""
        return state._replace(disk=state.disk.begin())

    def complete(self, state: State) -> State:
        """A group is durable: its replies leave."""
        connections = broker.replied(state.connections, state.disk.writing_replies, False)
        return state._replace(disk=state.disk.complete(), connections=connections)

    def fail_group(self, state: State) -> State:
        """Rule 13."""
        guards, disk = self.guards, state.disk
        assert disk.writing is not None
        state = state._replace(faults=state.faults._replace(group_failures=state.faults.group_failures - 1))
        if not guards.failure_discards_following:
            kept = disk.durable
            if disk.decided != disk.writing:
                added = tuple([one for one in disk.decided.outputs if one not in disk.writing.outputs])
                kept = disk.decided._replace(outputs=tuple(sorted(disk.durable.outputs + added)))
            asked = [serial for serial, _ in disk.writing_replies]
            for owner in [one.owner for one in state.connections if one.serial in asked]:
                state = self.closed(self.with_worker(state, owner, disconnected(state.workers[owner])), owner)
            return state._replace(disk=Disk(disk.durable, None, (), kept, state.disk.decided_replies))
        if not guards.failure_discards_replies:
            replies = disk.writing_replies + disk.decided_replies
            return state._replace(disk=Disk(disk.durable, None, (), disk.durable, replies))
        return self.restarted(state)

    def crash_broker(self, state: State) -> State:
        """What is durable is left."""
        faults = state.faults._replace(broker_crashes=state.faults.broker_crashes - 1)
        return self.restarted(state._replace(faults=faults))

    def restarted(self, state: State) -> State:
        """The broker forgot everything that is not durable: also who is alive. No connection is left."""
        return self.tidied(
            state._replace(
                disk=state.disk.lose(),
                serials=(0,) * len(state.serials),
                holders=(NOBODY,) * self.bounds.partitions,
                connections=(),
                workers=tuple([disconnected(worker) for worker in state.workers]),
            )
        )

    def cut(self, state: State, number: int) -> State:
        """A connection is gone; what the client wrote may still be read, late."""
        state = state._replace(faults=state.faults._replace(cuts=state.faults.cuts - 1))
        state = self.with_worker(state, number, disconnected(state.workers[number]))
        return self.closed(state, number)

    def drop(self, state: State, index: int) -> State:
        """What a closed connection still held never reaches the broker."""
        return self.tidied(self.with_connection(state, index, state.connections[index]._replace(requests=())))

    def expire(self, state: State, partition: int, fault: bool) -> State:
        """The holder was not heard of for too long: somebody else may join."""
        faults = state.faults._replace(expiries=state.faults.expiries - fault)
        return state._replace(holders=replaced(state.holders, partition, NOBODY), faults=faults)

    def start(self, state: State, number: int, zombie: bool) -> State:
        """The next run of the worker starts."""
        faults = state.faults._replace(zombies=state.faults.zombies - zombie)
        ended = tuple([other for other, one in enumerate(state.workers) if one.phase in ENDED])
        worker = state.workers[number]._replace(phase=NEW, ended_before=ended)
        return self.with_worker(state._replace(faults=faults), number, worker)

    def die(self, state: State, number: int) -> State:
        """A worker is gone."""
        return self.end(state._replace(faults=state.faults._replace(deaths=state.faults.deaths - 1)), number, DEAD)

    def lose_topic(self, state: State) -> State:
        """The output topic is gone."""
        faults = state.faults._replace(topic_losses=state.faults.topic_losses - 1)
        return state._replace(topic_gone=True, faults=faults)

    def return_topic(self, state: State) -> State:
        """The output topic is there again."""
        return state._replace(topic_gone=False)

    # ------------------------------------------------------------------------------------------- small parts

    def end(self, state: State, number: int, phase: str) -> State:
        """A worker ends; what it was not told, it will never know."""
        none = (0,) * self.bounds.partitions
        worker = state.workers[number]._replace(
            phase=phase, leases=none, positions=none, joining=NOBODY, queue=(), refusal=None
        )
        return self.closed(self.with_worker(state, number, worker), number)

    def closed(self, state: State, number: int) -> State:
        """The open connection of a worker is closed. Its unread requests stay; nobody takes its replies."""
        disk = state.disk.forget(broker.serials_of(state.connections, number))
        return self.tidied(state._replace(disk=disk, connections=broker.cut(state.connections, number, False)))

    def with_worker(self, state: State, number: int, worker: Worker) -> State:
        """The state with one worker replaced."""
        return state._replace(workers=replaced(state.workers, number, worker))

    def with_connection(self, state: State, index: int, connection: Connection[Request, Reply]) -> State:
        """The state with one connection replaced."""
        return state._replace(connections=replaced(state.connections, index, connection))

    def tidied(self, state: State) -> State:
        """Without what can make no difference any more: connections, serials, reports of aborted transactions."""
        connections = tuple([one for one in state.connections if one.open or one.requests])
        serials = tuple([broker.serial_needed(connections, serial) for serial in state.serials])
        aborted = state.aborted
        if aborted:
            coming = {
                Transaction(one.owner, request.name, request.last)
                for one in connections
                for request in one.requests
                if isinstance(request, Commit)
            }
            aborted = tuple([one for one in aborted if one in coming])
        return state._replace(connections=connections, serials=serials, aborted=aborted)


Item = TypeVar("Item")


def replaced(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    """The tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])


def disconnected(worker: Worker) -> Worker:
    """The worker without its connection: nothing of its queue is sent, nothing is asked for, no refusal is drained."""
    queue = tuple([one._replace(status=UNSENT) for one in worker.queue])
    phase = NEW if worker.phase is READY and not worker.epoch else worker.phase
    return worker._replace(phase=phase, queue=queue, joining=NOBODY, refusal=None)
