"""A group of workers that consume, process and produce: heartbeats and leases on partitions, transactions that move
positions in one or several of them together with their output, plain offset commits, seeks, and the workers' producers.

Each worker reports what it holds, is granted what nobody holds, and runs one transaction over the next input of all
partitions it holds. Members expire at any time, partitions are revoked, workers die, connections are cut and deliver
late, the broker crashes, a group commit fails, a holder or an operator seeks back to the first input, the output topic
goes and comes back, a user runs a transaction of unknown outcome again under a new name, and a second run of a worker
takes its producer's name over. What a worker reads is always durable.

There is no time: whoever is silent, or does not give back, may be replaced at any moment. Who is to hold what is not
modelled either: a partition that nobody holds goes to any member that reports next. Neither may matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

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
    replaced,
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
    SEEK_LOST,
    SEEK_TWICE,
    STALE_LEASE,
    WENT_BACK,
    Guards,
)


class Faults(NamedTuple):
    """How often each fault may still happen."""

    cuts: int = 0
    broker_crashes: int = 0
    expiries: int = 0
    """A member counts as gone although it lives and works."""
    revocations: int = 0
    """A partition is to be given back by its holder."""
    reports: int = 0
    """A worker reports beside its transactions, or though there is no news; not a fault, but it needs a bound."""
    seeks: int = 0
    """The holder of a partition goes back to its first input; not a fault, but it needs a bound."""
    operator_seeks: int = 0
    """And so does somebody who holds nothing."""
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


class SeekName(NamedTuple):
    """Tells one Seek from another: its nonce."""

    client: int
    number: int


class Lease(NamedTuple):
    """What the broker stores about the group's position in a partition."""

    next: int
    number: int
    session: int
    """The worker that holds the partition; NOBODY: given back, or its member is gone."""
    ended_number: int
    ended_at: int
    """The lease before, and the position at its hand-over."""
    sought_by: SeekName | None
    """The last Seek."""
    turn: int
    """How often a Seek went back to the first input. Known to the properties, not to the broker."""


class Output(NamedTuple):
    """The stored output of one input, and the transaction that stored it."""

    partition: int
    position: int
    turn: int
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
    sought: tuple[SeekName, ...]
    """The seeks that were applied. Known to the properties, not to the broker."""
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


class Heartbeat(NamedTuple):
    """Request: I am a member, and these are the leases I hold. 0: none on that partition."""

    held: tuple[int, ...]


class Seek(NamedTuple):
    """Request: go back to the first input, under a new lease."""

    name: SeekName
    partition: int
    expected: int


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
    """The partition is yours from this position on."""

    partition: int
    lease: int
    next: int


class Assignment(NamedTuple):
    """Reply to Heartbeat: what is to be changed."""

    reported: tuple[int, ...]
    """The report that this answers."""
    granted: tuple[Grant, ...]
    revoked: tuple[int, ...]
    lost: tuple[int, ...]


class Sought(NamedTuple):
    """Reply to Seek: done, under this lease."""

    seek: Seek
    lease: int
    next: int


class SeekRace(NamedTuple):
    """Reply to Seek: the lease is another one."""

    seek: Seek
    lease: int


class Answer(NamedTuple):
    """Reply to a commit."""

    commit: Commit
    decision: Decision


Request = Open | Heartbeat | Seek | Commit
Reply = Opened | OpenRace | Assignment | Sought | SeekRace | Answer

# Where a commit of the queue stands, on the current connection.
UNSENT, SENT, REFUSED = "unsent", "sent", "refused"


class Queued(NamedTuple):
    """A commit that is not decided yet."""

    kind: str
    previous: int
    last: int
    entries: tuple[Entry, ...]
    status: str


class Seeking(NamedTuple):
    """A seek that is not decided yet."""

    seek: Seek
    status: str
    repeated: bool
    """It was sent on an earlier connection, too."""


# What a worker's heartbeat that is not answered means to it: transactions wait for the answer, or they do not.
AWAITED, BESIDE = "awaited", "beside"

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
    releasing: tuple[bool, ...]
    """Of each partition: is it to be given back?"""
    reporting: str
    """AWAITED or BESIDE if a heartbeat is not answered."""
    seeking: Seeking | None
    queue: tuple[Queued, ...]
    refusal: Decision | None
    """The refusal whose draining is under way (C4)."""
    ended_before: tuple[int, ...]
    """Workers that had ended when this one started; no step of theirs may hurt it."""


class Holder(NamedTuple):
    """Who holds a partition, as the broker knows it. In memory only."""

    worker: int
    lease: int
    revoked: bool
    heard: bool
    """False: stored as the holder, and not heard of since the broker started."""


FREE = Holder(NOBODY, 0, False, False)


class State(NamedTuple):
    """Everything."""

    disk: Disk[Store, Reply]
    serials: tuple[int, ...]
    """Rule 4, for each producer name. In memory only."""
    newest: tuple[int, ...]
    """Rule 4, for each worker's session: the serial of its newest connection. In memory only."""
    members: tuple[bool, ...]
    """Of each worker: is it a member that did not expire? In memory only."""
    holders: tuple[Holder, ...]
    """Of each partition."""
    connections: tuple[Connection[Request, Reply], ...]
    workers: tuple[Worker, ...]
    topic_gone: bool
    aborted: tuple[Transaction, ...]
    """Reported as not stored, while copies of them are still on their way."""
    refused: tuple[SeekName, ...]
    """Seeks that were reported as not applied, likewise."""
    faults: Faults


class Group:
    """The model."""

    def __init__(self, bounds: Bounds, guards: Guards) -> None:
        self.bounds = bounds
        self.guards = guards
        self.partitions = range(bounds.partitions)
        self.operator = bounds.workers
        """Whoever seeks from outside: a client like a worker, which only seeks."""

    def initial(self) -> State:
        """No lease is given. Workers with names of their own are connected and have opened them; a shared name is not
        open, and only its first run has started."""
        bounds = self.bounds
        workers, rows = [], []
        clients = bounds.workers + (bounds.faults.operator_seeks > 0)
        for number in range(clients):
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
                releasing=(False,) * bounds.partitions,
                reporting="",
                seeking=None,
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
        connections = [Connection[Request, Reply](number, number + 1, True, (), ()) for number in range(clients)]
        leases = (Lease(0, 0, NOBODY, 0, 0, None, 0),) * bounds.partitions
        store = Store(leases, tuple(first), (), (), len(first) if rows else 0)
        return State(
            disk=Disk(store, None, (), store, ()),
            serials=(0,) * len(first),
            newest=(0,) * clients,
            members=(False,) * clients,
            holders=(FREE,) * bounds.partitions,
            connections=() if bounds.shared_name else tuple(connections),
            workers=tuple(workers),
            topic_gone=False,
            aborted=(),
            refused=(),
            faults=bounds.faults,
        )

    # ------------------------------------------------------------------------------------------- properties

    def check(self, state: State) -> None:
        """What must hold in every state. More is checked where things happen: see `applied`, `abort`, `receive_…`."""
        stores = (state.disk.durable, state.disk.decided)
        for store in stores if stores[0] is not stores[1] else stores[:1]:
            inputs = {output[:3] for output in store.outputs}
            if len(inputs) != len(store.outputs):
                raise Violation(OUTPUT_TWICE)
            if not self.bounds.faults.plain_commits and len(outputs_of_turn(store)) < positions(store):
                raise Violation(OUTPUT_MISSING)

    def finished(self, state: State) -> bool:
        """Every input is processed and answered; or every worker has ended, and one of them by dying."""
        bounds, durable = self.bounds, state.disk.durable
        phases = [worker.phase for worker in state.workers[: bounds.workers]]
        if all(phase in ENDED for phase in phases):
            return DEAD in phases  # otherwise somebody must have the name
        wanted = bounds.inputs * bounds.partitions
        return (
            positions(durable) == wanted
            and (bounds.faults.plain_commits > 0 or len(outputs_of_turn(durable)) == wanted)
            and not any(worker.queue or worker.seeking for worker in state.workers)
        )

    # ------------------------------------------------------------------------------------ what may happen

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""
        for number in range(len(state.workers)):
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
        for number in sorted({holder.worker for holder in state.holders} - {NOBODY}):
            if state.workers[number].phase in ENDED:
                yield Step(("member", number, "expires"), False, self.expire, (number, False))
            elif not all(holder.heard for holder in state.holders if holder.worker == number):
                yield Step(("MEMBER IS NOT HEARD OF", number), True, self.expire, (number, False))
            elif faults.expiries:
                yield Step(("MEMBER EXPIRES", number), True, self.expire, (number, True))
        for partition, holder in enumerate(state.holders):
            if holder.revoked:
                yield Step(("release is forced of", partition), False, self.force, (partition,))
            elif holder is not FREE and faults.revocations:
                yield Step(("REVOKED is", partition), True, self.revoke, (partition,))
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
        if worker.seeking is not None and worker.seeking.status is UNSENT:
            yield Step(("client", number, "sends again", worker.seeking.seek), False, self.send_seek, (number,))
        if number == self.operator:
            if faults.operator_seeks and worker.seeking is None:
                for partition in self.partitions:
                    expected = state.disk.durable.leases[partition].number
                    seek = Seek(SeekName(number, faults.operator_seeks), partition, expected)
                    yield Step(("operator seeks in", partition), False, self.seek, (number, seek))
            return
        unsent = next((index for index, one in enumerate(queue) if one.status is UNSENT), None)
        if unsent is not None:
            if worker.refusal is None or self.guards.refusals_ask_the_unsent:
                yield Step(("worker", number, "sends again", queue[unsent]), False, self.send, (number, unsent))
            return
        if worker.refusal is not None:
            return
        sought = None if worker.seeking is None else worker.seeking.seek.partition
        work = tuple(
            [
                p
                for p in self.partitions
                if worker.leases[p] and worker.positions[p] < bounds.inputs and not worker.releasing[p] and p != sought
            ]
        )
        if work and len(queue) < bounds.in_flight and worker.reporting is not AWAITED:
            if not state.topic_gone or worker.number + 1 < bounds.attempts:
                kind = TRANSACTION if bounds.producers else PRODUCERLESS
                yield Step(("worker", number, "commits inputs of", work), False, self.transact, (number, kind, work))
            if faults.plain_commits:
                yield Step(("worker", number, "skips", work[:1]), False, self.transact, (number, PLAIN, work[:1]))
        if faults.seeks and worker.seeking is None and not queue:
            for partition in self.partitions:
                if worker.leases[partition] and worker.positions[partition]:
                    seek = Seek(SeekName(number, faults.seeks), partition, worker.leases[partition])
                    yield Step(("worker", number, "seeks in", partition), False, self.seek, (number, seek))
        busy = {entry.partition for one in queue for entry in one.entries} | {sought}
        for partition in self.partitions:
            if worker.releasing[partition] and partition not in busy:
                yield Step(("worker", number, "gives back", partition), False, self.give_back, (number, partition))
        if not worker.reporting:
            awaited = not queue and self.has_news(state, number)
            if awaited or faults.reports:
                yield Step(("worker", number, "reports", worker.leases), False, self.report, (number, awaited))

    def has_news(self, state: State, number: int) -> bool:
        """Would a heartbeat of this worker change anything, or tell it anything?"""
        worker = state.workers[number]
        for partition, (held, holder) in enumerate(zip(worker.leases, state.holders, strict=True)):
            if holder.worker == number:
                if held != holder.lease or not holder.heard or (holder.revoked and not worker.releasing[partition]):
                    return True
            elif held or (holder is FREE and state.disk.durable.leases[partition].next < self.bounds.inputs):
                return True
        return False

    # ------------------------------------------------------------------------------------------- the broker

    def process(self, state: State, index: int) -> State:
        """The broker reads the next request of a connection and decides it."""
        guards, connection = self.guards, state.connections[index]
        request, rest = connection.requests[0], connection.requests[1:]
        state = self.with_connection(state, index, connection._replace(requests=rest))
        reply: Reply
        stale = connection.serial < state.newest[connection.owner]
        if isinstance(request, Open):
            state, store, reply = self.open(state, connection.owner, request)
            waits = guards.opens_wait
        elif not isinstance(request, Commit) and stale and guards.sessions_fenced:
            return self.tidied(state)  # refused, on a connection that nobody listens to any more
        elif isinstance(request, Heartbeat):
            state, store, reply = self.heartbeat(state, connection.owner, request)
            waits = guards.grants_wait
        elif isinstance(request, Seek):
            state, store, reply = self.decide_seek(state, connection.owner, request)
            waits = True
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

    def heartbeat(self, state: State, asker: int, request: Heartbeat) -> tuple[State, Store, Reply]:
        """Rule 14: what a member reports, against what is known; then what is to be changed for it."""
        guards, store, holders = self.guards, state.disk.decided, state.holders
        granted: list[Grant] = []
        revoked: list[int] = []
        lost: list[int] = []
        for partition, held in enumerate(request.held):
            lease, holder = store.leases[partition], holders[partition]
            for_others = holder is FREE and held == lease.number > 0 and state.members[asker]  # it was forced
            if holder.worker == asker and holder.revoked and not held:
                lease, holder, for_others = lease._replace(session=NOBODY), FREE, True
            elif holder is FREE and held and not state.members[asker] and self.is_adopted(lease, held):
                lease, holder = lease._replace(session=asker), Holder(asker, held, False, True)
            elif holder.worker == asker:
                holder = holder._replace(heard=True)
            if held and holder[:2] != (asker, held):
                lost.append(partition)
            if holder.worker == asker and holder.lease == held:
                if holder.revoked:
                    revoked.append(partition)
            else:
                free = holder is FREE or (holder.revoked and not guards.given_back_before_granted)
                if free and not for_others:
                    lease = self.granted(lease, asker)
                    holder = Holder(asker, lease.number, False, True)
                elif holder.worker == asker and not guards.grants_repeat:
                    lease = self.granted(lease, asker)
                    holder = holder._replace(lease=lease.number)
                if holder.worker == asker:
                    durable = state.disk.durable.leases[partition]
                    following = lease.next if guards.grants_read_decided else durable.next
                    granted.append(Grant(partition, lease.number, following))
            store = store._replace(leases=replaced(store.leases, partition, lease))
            holders = replaced(holders, partition, holder)
        answer = Assignment(request.held, tuple(granted), tuple(revoked), tuple(lost))
        members = replaced(state.members, asker, True)
        return state._replace(holders=holders, members=members), store, answer

    def is_adopted(self, lease: Lease, held: int) -> bool:
        """Rule 14: was a member that comes back, after it was given up, not replaced?"""
        return held == lease.number or not self.guards.adoption_compares_lease

    def granted(self, lease: Lease, asker: int) -> Lease:
        """Rule 14: a new holder has a new number."""
        number = lease.number + 1 if self.guards.grants_bump else 1
        return lease._replace(number=number, session=asker, ended_number=lease.number, ended_at=lease.next)

    def decide_seek(self, state: State, asker: int, request: Seek) -> tuple[State, Store, Reply]:
        """Rule 15: a compare-and-swap on the lease."""
        guards, store, partition = self.guards, state.disk.decided, request.partition
        lease = store.leases[partition]
        if guards.seeks_repeat and (asker == self.operator or lease.session == asker):
            if guards.seeks_are_named:
                repeated = lease.sought_by == request.name
            else:
                repeated = lease.session == asker and lease.number > request.expected
            if repeated:
                return state, store, Sought(request, lease.number, lease.next)
        if guards.seeks_compare and request.expected != lease.number:
            return state, store, SeekRace(request, lease.number)
        if request.name in store.sought:
            raise Violation(SEEK_TWICE)
        if request.name in state.refused:
            raise Violation(NOT_STORED_BUT_STORED)
        holders = state.holders
        if guards.seeks_bump:
            number, session = lease.number + 1, asker if lease.session == asker else NOBODY
            lease = Lease(0, number, session, lease.number, lease.next, request.name, lease.turn + 1)
            own = holders[partition].worker == asker
            holder = holders[partition]._replace(lease=number) if own else FREE
            holders = replaced(holders, partition, holder)
        else:
            lease = lease._replace(next=0, sought_by=request.name, turn=lease.turn + 1)
        sought = tuple(sorted((*store.sought, request.name)))
        store = store._replace(leases=replaced(store.leases, partition, lease), sought=sought)
        return state._replace(holders=holders), store, Sought(request, lease.number, lease.next)

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
            if entry.end < lease.next:
                raise Violation(WENT_BACK)
            leases = replaced(leases, entry.partition, lease._replace(next=entry.end))
            if request.kind is not PLAIN:
                inputs = range(entry.start, entry.end)
                outputs += tuple([Output(entry.partition, one, lease.turn, transaction) for one in inputs])
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
        newest = replaced(state.newest, number, connections[-1].serial)
        return self.with_worker(state._replace(connections=connections, newest=newest), number, worker)

    def report(self, state: State, number: int, awaited: bool) -> State:
        """A heartbeat goes out."""
        worker = state.workers[number]
        connections = broker.asked(state.connections, number, Heartbeat(worker.leases))
        faults = state.faults._replace(reports=state.faults.reports - (not awaited))
        state = state._replace(connections=connections, faults=faults)
        return self.with_worker(state, number, worker._replace(reporting=AWAITED if awaited else BESIDE))

    def give_back(self, state: State, number: int, partition: int) -> State:
        """A revoked partition is finished with: the next heartbeat does not report it."""
        return self.with_worker(state, number, without_lease(state.workers[number], partition))

    def seek(self, state: State, number: int, seek: Seek) -> State:
        """A holder, or an operator, wants to go back."""
        faults = state.faults
        if number == self.operator:
            faults = faults._replace(operator_seeks=faults.operator_seeks - 1)
        else:
            faults = faults._replace(seeks=faults.seeks - 1)
        worker = state.workers[number]._replace(seeking=Seeking(seek, UNSENT, False))
        return self.send_seek(self.with_worker(state._replace(faults=faults), number, worker), number)

    def send_seek(self, state: State, number: int) -> State:
        """A seek goes out on the current connection."""
        worker = state.workers[number]
        assert worker.seeking is not None
        connections = broker.asked(state.connections, number, worker.seeking.seek)
        worker = worker._replace(seeking=worker.seeking._replace(status=SENT))
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
        elif isinstance(reply, Assignment):
            worker = self.assigned(worker, reply)
        elif isinstance(reply, Sought):
            return self.receive_sought(state, number, reply)
        elif isinstance(reply, SeekRace):
            return self.receive_race(state, number, reply)
        else:
            return self.tidied(self.receive_answer(state, number, reply.commit, reply.decision))
        return self.with_worker(state, number, worker)

    def assigned(self, worker: Worker, answer: Assignment) -> Worker:
        """Rule 14: the answer to a heartbeat. It changes nothing if what was reported is no longer so."""
        worker = worker._replace(reporting="")
        if answer.reported != worker.leases and self.guards.answers_match_report:
            return worker
        for partition in answer.lost:
            worker = without_lease(worker, partition)
        for partition in answer.revoked:
            if worker.leases[partition]:
                worker = worker._replace(releasing=replaced(worker.releasing, partition, True))
        for grant in answer.granted:
            if not worker.leases[grant.partition]:
                worker = with_lease(worker, grant)
        return worker

    def receive_sought(self, state: State, number: int, reply: Sought) -> State:
        """A seek is done, now or before. A holder goes on under its new lease."""
        worker, seek = state.workers[number], reply.seek
        if seek.name not in state.disk.durable.sought:
            raise Violation(SEEK_LOST)
        worker = worker._replace(seeking=None)
        if number != self.operator:
            worker = with_lease(worker, Grant(seek.partition, reply.lease, reply.next))
        return self.with_worker(state, number, worker)

    def receive_race(self, state: State, number: int, reply: SeekRace) -> State:
        """Somebody else has a newer lease. Sent once, the seek is not done: an operator asks again with that lease.
        Sent before, too, it may have been done before the newer lease: its outcome is unknown.
        """
        worker, seek = state.workers[number], reply.seek
        assert worker.seeking is not None
        if worker.seeking.repeated and self.guards.repeated_race_is_unknown:
            return self.with_worker(state, number, worker._replace(seeking=None))
        if number == self.operator:
            again = Seeking(seek._replace(expected=reply.lease), UNSENT, False)
            return self.with_worker(state, number, worker._replace(seeking=again))
        if seek.name in state.disk.decided.sought:
            raise Violation(NOT_STORED_BUT_STORED)
        state = state._replace(refused=(*state.refused, seek.name))
        worker = without_lease(worker, seek.partition)._replace(seeking=None)
        return self.tidied(self.with_worker(state, number, worker))

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
            # Who sought may, after it expired, have reported the lease before that: then it is granted a third.
            sought = any(name.client == number for name in state.disk.decided.sought)
            if lease.session == number and lease.ended_number == lost and not sought:
                raise Violation(FALSE_LEASE_LOST)
        if code in (LEASE_LOST, OFFSET_MOVED) and commit.kind is PRODUCERLESS and decision.detail is not None:
            # No sequence protects it, but its positions tell: where they were handed over, or where they are now.
            end = next(entry.end for entry in commit.entries if entry.partition == decision.partition)
            if end <= decision.detail:
                if code == LEASE_LOST:
                    worker = self.without_lost(worker, commit, decision.partition)
                return self.receive_stored(self.with_worker(state, number, worker), number, index)
        if code == OFFSET_MOVED and worker.name < self.bounds.workers:
            raise Violation(FALSE_OFFSET_MOVED)
        if code == LEASE_LOST:  # the other partitions are still leased
            worker = self.without_lost(worker, commit, decision.partition)
        elif code == OFFSET_MOVED:  # an earlier run got there: ask where to go on
            for partition in self.partitions:
                worker = without_lease(worker, partition)
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
        return self.with_worker(state, number, worker)

    def without_lost(self, worker: Worker, commit: Commit, partition: int) -> Worker:
        """The worker without the lease under which it was refused; it may have a newer one already."""
        refused = next(entry.lease for entry in commit.entries if entry.partition == partition)
        return without_lease(worker, partition) if worker.leases[partition] == refused else worker

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
        """The worker goes back to the first input that its queue holds of each partition, under the lease it has."""
        positions = worker.positions
        for one in reversed(worker.queue):
            for entry in one.entries:
                if entry.lease == worker.leases[entry.partition]:
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
        """The broker forgot everything that is not durable: also who is alive. No connection is left.

        Stored holders are members, but they may not be heard of in time.
        """
        leases = state.disk.durable.leases
        stored = [lease.session for lease in leases]
        return self.tidied(
            state._replace(
                disk=state.disk.lose(),
                members=tuple([number in stored for number in range(len(state.members))]),
                serials=(0,) * len(state.serials),
                newest=(0,) * len(state.newest),
                holders=tuple(
                    [
                        FREE if lease.session == NOBODY else Holder(lease.session, lease.number, False, False)
                        for lease in leases
                    ]
                ),
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

    def expire(self, state: State, number: int, fault: bool) -> State:
        """A member was not heard of for too long. Its leases still commit until somebody else has them."""
        state = state._replace(faults=state.faults._replace(expiries=state.faults.expiries - fault))
        for partition in self.partitions:
            if state.holders[partition].worker == number:
                state = self.force(state, partition)
        return state._replace(members=replaced(state.members, number, False))

    def force(self, state: State, partition: int) -> State:
        """A partition is nobody's any more, whatever its holder thinks."""
        store = state.disk.decided
        lease = store.leases[partition]._replace(session=NOBODY)
        disk, _ = state.disk.decide(store._replace(leases=replaced(store.leases, partition, lease)), 0, None, True)
        return state._replace(disk=disk, holders=replaced(state.holders, partition, FREE))

    def revoke(self, state: State, partition: int) -> State:
        """A partition is to move to another member: its holder is to give it back."""
        faults = state.faults._replace(revocations=state.faults.revocations - 1)
        holder = state.holders[partition]._replace(revoked=True)
        return state._replace(holders=replaced(state.holders, partition, holder), faults=faults)

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
            phase=phase, leases=none, positions=none, releasing=(False,) * self.bounds.partitions, reporting="",
            seeking=None, queue=(), refusal=None,
        )  # fmt: skip
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
        newest = tuple(
            [
                serial if any(one.owner == owner and one.serial < serial for one in connections) else 0
                for owner, serial in enumerate(state.newest)
            ]
        )
        aborted, refused = state.aborted, state.refused
        if refused:
            asked = {request.name for one in connections for request in one.requests if isinstance(request, Seek)}
            refused = tuple([one for one in refused if one in asked])
        if aborted:
            coming = {
                Transaction(one.owner, request.name, request.last)
                for one in connections
                for request in one.requests
                if isinstance(request, Commit)
            }
            aborted = tuple([one for one in aborted if one in coming])
        return state._replace(connections=connections, serials=serials, newest=newest, aborted=aborted, refused=refused)


def outputs_of_turn(store: Store) -> list[Output]:
    """What was stored since the last Seek in each partition."""
    return [output for output in store.outputs if output.turn == store.leases[output.partition].turn]


def positions(store: Store) -> int:
    """How many inputs are behind the group, in all partitions."""
    return sum([lease.next for lease in store.leases])


def with_lease(worker: Worker, grant: Grant) -> Worker:
    """The worker holds a partition from this position on."""
    return worker._replace(
        leases=replaced(worker.leases, grant.partition, grant.lease),
        positions=replaced(worker.positions, grant.partition, grant.next),
    )


def without_lease(worker: Worker, partition: int) -> Worker:
    """The worker does not hold a partition any more."""
    return worker._replace(
        leases=replaced(worker.leases, partition, 0),
        positions=replaced(worker.positions, partition, 0),
        releasing=replaced(worker.releasing, partition, False),
    )


def disconnected(worker: Worker) -> Worker:
    """The worker without its connection: nothing of its queue is sent, nothing is asked for, no refusal is drained."""
    queue = tuple([one._replace(status=UNSENT) for one in worker.queue])
    phase = NEW if worker.phase is READY and not worker.epoch else worker.phase
    seeking = worker.seeking
    if seeking is not None and seeking.status is SENT:
        seeking = seeking._replace(status=UNSENT, repeated=True)
    return worker._replace(phase=phase, queue=queue, reporting="", seeking=seeking, refusal=None)
