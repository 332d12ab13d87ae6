"""One producer name with up to three instances of its application: restarts, zombies, pipelined commits, old
connections whose bytes arrive late, group commit, refusals, group failure, deletion of the name, a restored store.

An instance sends the records of a source, which are numbered with gaps; a restarted one starts the source again and
drops what Open says is stored. Nothing here knows groups and leases; `consumer.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from . import broker
from .broker import (
    DUPLICATE,
    FENCED,
    SEQUENCE_CONFLICT,
    SEQUENCE_GAP,
    STALE_CONNECTION,
    STORE_FULL,
    STORE_REPLACED,
    STORED,
    TOO_LARGE,
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
    FALSE_REPLACED,
    FALSE_STALE,
    HOLE,
    LIVE_FENCED,
    LOST,
    NOT_STORED_BUT_STORED,
    ORDER_BROKEN,
    RESULT_LOST,
    RESULT_WRONG,
    STORED_TWICE,
    Guards,
)

DEFINITE = (UNKNOWN_TOPIC, TOO_LARGE)
"""Refusals that will not go away by waiting."""


class Faults(NamedTuple):
    """How often each fault may still happen."""

    cuts: int = 0
    broker_crashes: int = 0
    application_crashes: int = 0
    zombies: int = 0
    """A next instance starts while the one before it lives."""
    store_full: int = 0
    topic_losses: int = 0
    group_failures: int = 0
    deletions: int = 0
    restores: int = 0
    """A backup is taken, and later put in the store's place."""
    timeouts: int = 0
    """Only with `resent_on_new_connection_only` removed: the client sends everything again on the same connection."""
    cancels: int = 0


@dataclass(frozen=True)
class Bounds:
    """How much of the world is explored."""

    records: tuple[int, ...] = (2, 5)
    """The source: the sequence number of each record."""
    batches: tuple[int, ...] = (1, 2)
    """How many records a commit may hold."""
    too_large: tuple[int, ...] = ()
    application_numbers: bool = True
    """The numbers are positions of a source; otherwise the client counts independent sends."""
    instances: int = 1
    in_flight: int = 2
    remembered: int = 2
    """Rule 12's K; the protocol wants at least `in_flight`."""
    takeovers_remembered: int = 1
    faults: Faults = field(default_factory=Faults)


# ------------------------------------------------------------------------------------------------- the state


class Record(NamedTuple):
    """A stored message."""

    seq: int
    instance: int


class Store(NamedTuple):
    """What the broker writes to its disk. `counter` is the store-wide source of epochs and producer ids."""

    row: Row | None
    log: tuple[Record, ...]
    counter: int


class Open(NamedTuple):
    """Request: take the name. 0 expects no row."""

    expected: int


class Commit(NamedTuple):
    """Request: append these records."""

    producer_id: int
    epoch: int
    previous: int
    last: int
    records: tuple[int, ...]


class Opened(NamedTuple):
    """Reply: the name is yours."""

    producer_id: int
    epoch: int
    last_seq: int
    incarnation: int


class OpenRace(NamedTuple):
    """Reply: the name's epoch is another one."""

    epoch: int


class Answer(NamedTuple):
    """Reply to the commit that ends with `last`."""

    last: int
    decision: Decision


Request = Open | Commit
Reply = Opened | OpenRace | Answer

# Where a commit of the queue stands, on the current connection.
UNSENT, SENT, REFUSED, REFUSED_GAP = "unsent", "sent", "refused", "refused by a gap"


class Queued(NamedTuple):
    """A commit that is cut and not decided yet."""

    previous: int
    last: int
    records: tuple[int, ...]
    status: str


# Phases of an instance. The last six are its ends.
UNBORN, NEW, OPENING, READY, LOST_CONNECTION = "unborn", "new", "opening", "ready", "lost connection"
FENCED_OUT, FAILED, UNKNOWN, REPLACED, DEAD = "fenced", "failed", "unknown", "replaced", "dead"
ENDED = (FENCED_OUT, FAILED, UNKNOWN, REPLACED, DEAD)

# What the application was told about a record.
OPEN, SAID_STORED, SAID_NOT_STORED, SAID_UNKNOWN = "-", "stored", "not stored", "outcome unknown"


class Instance(NamedTuple):
    """One run of the application, with its session."""

    phase: str
    producer_id: int
    epoch: int
    """0: never opened."""
    acknowledged: int
    """The highest number answered as stored (C2)."""
    queue: tuple[Queued, ...]
    position: int
    """The next record of the source to cut."""
    refusal: str
    """The refusal whose draining is under way; empty when there is none (C4)."""
    outcomes: tuple[str, ...]
    """What was said about each record."""
    incarnation: int
    """Of the store that was opened; -1 before."""
    ended_before: tuple[int, ...]
    """Instances that had ended when this one started; no step of theirs may hurt it."""


class State(NamedTuple):
    """Everything."""

    disk: Disk[Store, Reply]
    serial_newest: int
    """Rule 4: the newest connection that spoke for the row. In memory only."""
    connections: tuple[Connection[Request, Reply], ...]
    instances: tuple[Instance, ...]
    topic_gone: bool
    store_full: bool
    incarnation: int
    backup: Store | None
    faults: Faults


class Producers:
    """The model."""

    def __init__(self, bounds: Bounds, guards: Guards) -> None:
        self.bounds = bounds
        self.guards = guards
        self.records = len(bounds.records)

    def initial(self) -> State:
        """Nothing is stored, the first instance is about to open the name."""
        unborn = Instance(UNBORN, 0, 0, -1, (), 0, "", (OPEN,) * self.records, -1, ())
        instances = (unborn._replace(phase=NEW), *[unborn] * (self.bounds.instances - 1))
        store = Store(None, (), 0)
        return State(Disk(store, None, (), store, ()), 0, (), instances, False, False, 0, None, self.bounds.faults)

    # ------------------------------------------------------------------------------------------- properties

    def check(self, state: State) -> None:
        """What must hold in every state."""
        bounds, disk = self.bounds, state.disk
        deleted = self.deleted(state)
        for store in (disk.durable, disk.decided):
            log = store.log
            if len(set(log)) != len(log):
                raise Violation(STORED_TWICE)
            if not deleted:  # a new life of the name may rightly repeat what the old one stored
                stored = tuple([record.seq for record in log])
                if len(set(stored)) != len(stored):
                    raise Violation(STORED_TWICE)
                if stored != tuple(sorted(stored)):
                    raise Violation(ORDER_BROKEN)
                if bounds.application_numbers and stored != bounds.records[: len(stored)]:
                    raise Violation(HOLE)
        if state.incarnation:  # a restore loses what came after the backup; that is known and not promised
            return
        durable = {record.seq for record in disk.durable.log}
        for number, instance in enumerate(state.instances):
            for seq, outcome in zip(bounds.records, instance.outcomes, strict=True):
                if outcome is SAID_STORED and seq not in durable and not deleted:
                    raise Violation(LOST)
                if outcome is SAID_NOT_STORED and (seq, number) in disk.decided.log:
                    raise Violation(NOT_STORED_BUT_STORED)

    def finished(self, state: State) -> bool:
        """Everything is sent and answered, or ended with a definite or an honestly unknown outcome."""
        phases = [instance.phase for instance in state.instances if instance.phase is not UNBORN]
        living = [phase for phase in phases if phase is not DEAD]
        if not living:
            return len(phases) == self.bounds.instances
        if all(phase is FENCED_OUT for phase in phases) and not self.deleted(state):
            return False  # somebody must have the name
        return all(
            instance.phase in (UNBORN, *ENDED)
            or (instance.phase is READY and not instance.queue and instance.position == self.records)
            for instance in state.instances
        )

    def deleted(self, state: State) -> bool:
        """Was the name deleted at some time?"""
        return state.faults.deletions < self.bounds.faults.deletions

    # ------------------------------------------------------------------------------------ what may happen

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""
        for number in range(self.bounds.instances):
            yield from self.steps_of_instance(state, number)
        for index, connection in enumerate(state.connections):
            if connection.requests:
                label = ("broker reads", connection.requests[0], "of", connection.owner, "on", connection.serial)
                yield Step(label, False, self.process, (index,))
                if not connection.open:
                    yield Step(("unread requests are lost on", connection.serial), False, self.drop, (index,))
            if connection.replies and state.instances[connection.owner].phase in (READY, OPENING):
                received = ("instance", connection.owner, "receives", connection.replies[0])
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
        if state.store_full:
            yield Step(("store has room again",), False, self.free_store)
        elif faults.store_full:
            yield Step(("STORE FULL",), True, self.fill_store)
        if state.topic_gone:
            yield Step(("topic is back",), False, self.return_topic)
        elif faults.topic_losses:
            yield Step(("TOPIC GONE",), True, self.lose_topic)
        if faults.deletions and disk.decided.row is not None:
            yield Step(("NAME DELETED",), True, self.delete_name)
        if faults.restores and state.backup is None:
            yield Step(("BACKUP",), True, self.back_up)
        elif faults.restores and state.backup != disk.durable:
            yield Step(("RESTORE",), True, self.restore)

    def steps_of_instance(self, state: State, number: int) -> Iterator[Step]:
        """What instance `number` can do, or have done to it."""
        instance, faults = state.instances[number], state.faults
        phase = instance.phase
        if phase is UNBORN:
            before = state.instances[number - 1].phase
            if before is DEAD:
                yield Step(("start instance", number), False, self.start, (number, False))
            elif faults.zombies and before in (OPENING, READY, LOST_CONNECTION):
                yield Step(("START instance", number, "beside", number - 1), True, self.start, (number, True))
            return
        if phase in ENDED:
            return
        if phase is NEW or phase is LOST_CONNECTION:
            yield Step(("instance", number, "connects"), False, self.connect, (number,))
        elif faults.cuts:
            yield Step(("CUT connection of", number), True, self.cut, (number,))
        if faults.application_crashes:
            yield Step(("APPLICATION CRASHES", number), True, self.crash_application, (number,))
        queue = instance.queue
        if phase is READY and not instance.refusal:
            unsent = next((index for index, one in enumerate(queue) if one.status is not SENT), len(queue))
            if unsent < len(queue):
                if queue[unsent].status is UNSENT:
                    label = ("instance", number, "sends again", queue[unsent].records)
                    yield Step(label, False, self.send, (number, unsent))
            elif len(queue) < self.bounds.in_flight:
                for count in self.bounds.batches:
                    if instance.position + count <= self.records:
                        records = self.bounds.records[instance.position : instance.position + count]
                        yield Step(("instance", number, "sends", records), False, self.cut_and_send, (number, records))
        sent = phase is READY and queue != () and queue[0].status is SENT
        if sent and faults.timeouts and not self.guards.resent_on_new_connection_only:
            yield Step(("TIME-OUT, all sent again by", number), True, self.time_out, (number,))
        if phase in (READY, LOST_CONNECTION) and faults.cancels:
            for index, one in enumerate(queue):
                if one.status is UNSENT:
                    yield Step(("CANCEL", one.records, "of", number), True, self.cancel, (number, index))

    # ------------------------------------------------------------------------------------------- the broker

    def process(self, state: State, index: int) -> State:
        """The broker reads the next request of a connection and decides it."""
        guards, connection = self.guards, state.connections[index]
        request, rest = connection.requests[0], connection.requests[1:]
        connections = self.with_connection(state, index, connection._replace(requests=rest))
        serial_newest, reply = state.serial_newest, None
        if isinstance(request, Open):
            store, reply = self.open(state, connection.owner, request)
            waits = guards.opens_wait
            if store is not state.disk.decided and guards.takeovers_forget_serial:
                serial_newest = 0
        else:
            store, decision, recorded = self.commit(state, connection, request)
            reply = Answer(request.last, decision)
            if recorded:
                serial_newest = max(serial_newest, connection.serial)
            if decision.code in STORED:
                waits = guards.duplicates_wait if decision.code == DUPLICATE else guards.acknowledgements_wait
            else:
                waits = guards.refusals_wait
        if not connection.open and guards.old_answers_ignored:
            reply = None
        disk, leaves = state.disk.decide(store, connection.serial, reply, waits)
        if leaves and reply is not None:
            connections = broker.replied(connections, ((connection.serial, reply),), not guards.old_answers_ignored)
        return self.tidied(state._replace(disk=disk, connections=connections, serial_newest=serial_newest))

    def open(self, state: State, asker: int, request: Open) -> tuple[Store, Reply]:
        """Rule 10."""
        store, durable = state.disk.decided, state.disk.durable
        row = store.row
        after = broker.opened(
            self.guards, row, asker, request.expected, store.counter, self.bounds.takeovers_remembered
        )
        if after is None:
            return store, OpenRace(0 if row is None else row.epoch)
        last_seq = after.last_seq
        if not self.guards.opens_read_decided:
            last_seq = -1 if durable.row is None else durable.row.last_seq
        if after is not row:
            if row is not None and self.hurts_the_living(state, asker, row.holder):
                raise Violation(LIVE_FENCED)
            store = store._replace(row=after, counter=store.counter + 1)
        return store, Opened(after.producer_id, after.epoch, last_seq, state.incarnation)

    def hurts_the_living(self, state: State, asker: int, holder: int) -> bool:
        """Two living sessions may race for a name; one that was gone before, or that had its turn, may not."""
        if asker >= holder or state.instances[holder].phase in ENDED:
            return False
        return asker in state.instances[holder].ended_before or state.instances[asker].epoch > 0

    def commit(
        self, state: State, connection: Connection[Request, Reply], request: Commit
    ) -> tuple[Store, Decision, bool]:
        """Rules 1 to 8. Returns (the store, the answer, is the serial recorded?)."""
        guards, store = self.guards, state.disk.decided
        row, owner = store.row, connection.owner
        if row is None and not guards.commits_create_no_row:
            row = Row(store.counter + 1, request.epoch, owner, -1, (), ())
        later: Decision | None = None
        if any(seq in self.bounds.too_large for seq in request.records):
            later = Decision(TOO_LARGE)
        elif state.topic_gone:
            later = Decision(UNKNOWN_TOPIC)
        elif state.store_full:
            later = Decision(STORE_FULL)
        numbers = Numbers(request.producer_id, request.epoch, request.previous, request.last)
        decision, recorded = broker.decide(
            guards, row, numbers, request.records, connection.serial, state.serial_newest, later
        )
        if decision is not None:
            return store, decision, recorded
        assert row is not None
        if not guards.rows_are_found_by_id and guards.numbers_never_reset:
            numbers = numbers._replace(producer_id=row.producer_id)  # the epoch alone must tell the lives apart
        offset = len(store.log)
        row = broker.applied(row, numbers, owner, request.records, offset, self.bounds.remembered)
        log = store.log + tuple([Record(seq, owner) for seq in request.records])
        return Store(row, log, store.counter), Decision(broker.OK, offset), recorded

    # ------------------------------------------------------------------------------------------- the client

    def connect(self, state: State, number: int) -> State:
        """A new connection. A fresh session opens the name on it; one that has an epoch just goes on (rule 11)."""
        instance = state.instances[number]
        if instance.epoch and self.guards.incarnation_compared and instance.incarnation != state.incarnation:
            return self.end(state, number, REPLACED, SAID_UNKNOWN)
        connections = broker.connected(state.connections, number, state.disk, state.serial_newest)
        if instance.epoch and self.guards.reconnect_without_open:
            instance = instance._replace(phase=READY)
        else:
            connections = broker.asked(connections, number, Open(0))
            instance = instance._replace(phase=OPENING)
        if not self.guards.cut_is_frozen and instance.queue:
            first = instance.queue[0]
            position = self.bounds.records.index(first.records[0])
            instance = instance._replace(position=position, acknowledged=first.previous, queue=())
        return self.with_instance(state._replace(connections=connections), number, instance)

    def cut_and_send(self, state: State, number: int, records: tuple[int, ...]) -> State:
        """C1: the next records of the source become a commit. C2: what it follows."""
        instance = state.instances[number]
        previous = max([instance.acknowledged, *[one.last for one in instance.queue]])
        queued = Queued(previous, records[-1], records, UNSENT)
        instance = instance._replace(queue=(*instance.queue, queued), position=instance.position + len(records))
        return self.send(self.with_instance(state, number, instance), number, len(instance.queue) - 1)

    def send(self, state: State, number: int, index: int) -> State:
        """A commit of the queue goes out on the current connection."""
        instance = state.instances[number]
        one = instance.queue[index]
        request = Commit(instance.producer_id, instance.epoch, one.previous, one.last, one.records)
        connections = broker.asked(state.connections, number, request)
        instance = instance._replace(queue=with_status(instance.queue, index, SENT))
        return self.with_instance(state._replace(connections=connections), number, instance)

    def time_out(self, state: State, number: int) -> State:
        """Breaks C3."""
        for index in range(len(state.instances[number].queue)):
            state = self.send(state, number, index)
        return state._replace(faults=state.faults._replace(timeouts=state.faults.timeouts - 1))

    def cancel(self, state: State, number: int, index: int) -> State:
        """C7: somebody no longer waits."""
        state = state._replace(faults=state.faults._replace(cancels=state.faults.cancels - 1))
        if self.guards.cancel_detaches:
            return state
        instance = state.instances[number]
        queue = instance.queue[:index] + instance.queue[index + 1 :]
        return self.with_instance(state, number, instance._replace(queue=queue))

    def receive(self, state: State, index: int) -> State:
        """The client reads the next reply of a connection."""
        connection = state.connections[index]
        reply, rest = connection.replies[0], connection.replies[1:]
        state = state._replace(connections=self.with_connection(state, index, connection._replace(replies=rest)))
        number = connection.owner
        instance = state.instances[number]
        if isinstance(reply, OpenRace):  # only a fresh session opens, and it asks again with the epoch it was told
            return state._replace(connections=broker.asked(state.connections, number, Open(reply.epoch)))
        if isinstance(reply, Opened):
            if not instance.epoch:
                dropped = sum(1 for seq in self.bounds.records if seq <= reply.last_seq)
                position = dropped if self.guards.stored_records_dropped else 0
                instance = instance._replace(acknowledged=reply.last_seq, position=position)
            instance = instance._replace(
                phase=READY, producer_id=reply.producer_id, epoch=reply.epoch, incarnation=reply.incarnation
            )
            return self.with_instance(state, number, instance)
        found = next((place for place, one in enumerate(instance.queue) if one.last == reply.last), None)
        if found is None:
            return self.tidied(state)
        code = reply.decision.code
        if code in STORED:
            return self.tidied(self.receive_stored(state, number, found, reply.decision))
        if code == STALE_CONNECTION:
            if not self.guards.stale_reconnects:
                raise Violation(FALSE_STALE)
            return self.disconnected(state, number)
        if code == FENCED:
            return self.receive_fenced(state, number, found, reply.decision)
        if code == UNKNOWN_PRODUCER:
            return self.end(state, number, UNKNOWN, SAID_UNKNOWN)
        return self.tidied(self.receive_refusal(state, number, found, code, connection.open))

    def receive_stored(self, state: State, number: int, index: int, decision: Decision) -> State:
        """A commit is stored, now or before. Its result must be the original's."""
        instance = state.instances[number]
        one = instance.queue[index]
        if decision.detail is None:
            raise Violation(RESULT_LOST)
        if self.guards.gaps_refused and not self.deleted(state) and not state.incarnation:
            log = state.disk.durable.log
            if decision.detail >= len(log) or log[decision.detail].seq != one.records[0]:
                raise Violation(RESULT_WRONG if decision.code == DUPLICATE and decision.detail < len(log) else LOST)
        instance = instance._replace(
            outcomes=self.told(instance, SAID_STORED, one.records),
            queue=instance.queue[:index] + instance.queue[index + 1 :],
            acknowledged=max(instance.acknowledged, one.last),
        )
        if not instance.queue:
            instance = instance._replace(refusal="")
        elif instance.refusal and not any(other.status is SENT for other in instance.queue):
            instance = self.act_on_refusal(instance)
        return self.with_instance(state, number, instance)

    def receive_fenced(self, state: State, number: int, index: int, decision: Decision) -> State:
        """C6, C10."""
        instance, disk, guards = state.instances[number], state.disk, self.guards
        holders = [store.row.holder for store in (disk.durable, disk.decided) if store.row is not None]
        if not self.deleted(state) and holders == [number, number]:
            raise Violation(FALSE_FENCED)
        for place, one in enumerate(instance.queue):
            if not guards.fenced_tells_end:
                outcome = SAID_NOT_STORED
            elif decision.detail is None:
                outcome = SAID_UNKNOWN
            elif place != index and not guards.fenced_tail_judged:
                outcome = SAID_NOT_STORED
            else:
                outcome = SAID_STORED if one.last <= decision.detail else SAID_NOT_STORED
            instance = instance._replace(outcomes=self.told(instance, outcome, one.records))
        return self.end(self.with_instance(state, number, instance), number, FENCED_OUT, SAID_UNKNOWN)

    def receive_refusal(self, state: State, number: int, index: int, code: str, current: bool) -> State:
        """C4: note the refusal; act when everything sent on this connection is answered."""
        instance = state.instances[number]
        if code == SEQUENCE_CONFLICT:
            raise Violation(FALSE_CONFLICT)
        if code == STORE_REPLACED:
            raise Violation(FALSE_REPLACED)
        if code == SEQUENCE_GAP:
            if not instance.refusal:
                raise Violation(FALSE_GAP)
            instance = instance._replace(queue=with_status(instance.queue, index, REFUSED_GAP))
        else:
            instance = instance._replace(
                queue=with_status(instance.queue, index, REFUSED), refusal=instance.refusal or code
            )
            if not current and code in DEFINITE:  # breaks C3: an old connection's refusal is believed
                records = instance.queue[index].records
                instance = instance._replace(outcomes=self.told(instance, SAID_NOT_STORED, records))
                return self.end(self.with_instance(state, number, instance), number, FAILED, SAID_UNKNOWN)
        drained = not any(one.status is SENT for one in instance.queue)
        if drained or (code != SEQUENCE_GAP and not self.guards.refusals_drained):
            instance = self.act_on_refusal(instance)
        state = self.with_instance(state, number, instance)
        return self.end(state, number, FAILED, SAID_UNKNOWN) if instance.phase is FAILED else state

    def act_on_refusal(self, instance: Instance) -> Instance:
        """C4: what becomes of the refused commit and of those behind it."""
        queue, refusal = instance.queue, instance.refusal
        instance = instance._replace(refusal="")
        if refusal not in DEFINITE:
            return instance._replace(queue=tuple([one._replace(status=UNSENT) for one in queue]))
        if self.bounds.application_numbers and self.guards.tail_fails_with_head:
            records = tuple([seq for one in queue for seq in one.records])
            return instance._replace(phase=FAILED, queue=(), outcomes=self.told(instance, SAID_NOT_STORED, records))
        relinked = self.bounds.application_numbers or self.guards.tail_relinked
        kept: list[Queued] = []
        previous = queue[0].previous
        for one in queue:
            if one.status is REFUSED:
                instance = instance._replace(outcomes=self.told(instance, SAID_NOT_STORED, one.records))
                continue
            kept.append(one._replace(status=UNSENT, previous=previous if relinked else one.previous))
            previous = one.last
        if not kept:
            instance = instance._replace(acknowledged=previous)
        return instance._replace(queue=tuple(kept))

    # ---------------------------------------------------------------------------------- the disk and the world

    def begin(self, state: State) -> State:
        """A group goes to the disk."""
        return state._replace(disk=state.disk.begin())

    def complete(self, state: State) -> State:
        """A group is durable: its replies leave."""
        connections = broker.replied(state.connections, state.disk.writing_replies, not self.guards.old_answers_ignored)
        return self.tidied(state._replace(disk=state.disk.complete(), connections=connections))

    def fail_group(self, state: State) -> State:
        """Rule 13."""
        guards, disk = self.guards, state.disk
        state = state._replace(faults=state.faults._replace(group_failures=state.faults.group_failures - 1))
        if not guards.failure_discards_following:
            assert disk.writing is not None
            log = disk.durable.log + disk.decided.log[len(disk.writing.log) :]
            kept = disk.decided._replace(log=log)
            asked = [serial for serial, _ in disk.writing_replies]
            for owner in [one.owner for one in state.connections if one.serial in asked]:
                state = self.disconnected(state, owner)
            return state._replace(disk=Disk(disk.durable, None, (), kept, state.disk.decided_replies))
        if not guards.failure_discards_replies:
            replies = disk.writing_replies + disk.decided_replies
            return state._replace(disk=Disk(disk.durable, None, (), disk.durable, replies))
        unread = tuple(
            [one._replace(open=False, replies=()) for one in state.connections if one.requests]
            if not guards.failure_closes_connections
            else []
        )
        return self.restarted(state, disk.lose())._replace(connections=unread)

    def crash_broker(self, state: State) -> State:
        """What is durable is left, and no connection."""
        state = state._replace(faults=state.faults._replace(broker_crashes=state.faults.broker_crashes - 1))
        return self.restarted(state, state.disk.lose())

    def restarted(self, state: State, disk: Disk[Store, Reply]) -> State:
        """The broker forgot everything that is not durable, and every client lost its connection."""
        instances = tuple([lost(one) if one.phase in (OPENING, READY) else one for one in state.instances])
        return state._replace(disk=disk, serial_newest=0, connections=(), instances=instances)

    def cut(self, state: State, number: int) -> State:
        """A connection is gone; what the client wrote may still be read, late."""
        state = state._replace(faults=state.faults._replace(cuts=state.faults.cuts - 1))
        return self.disconnected(state, number)

    def disconnected(self, state: State, number: int) -> State:
        """The client has no connection any more; everything unanswered is to be sent again (C3)."""
        instance = lost(state.instances[number])
        if not self.guards.everything_resent:
            instance = instance._replace(queue=instance.queue[-1:])
        return self.closed(self.with_instance(state, number, instance), number)

    def drop(self, state: State, index: int) -> State:
        """What a closed connection still held never reaches the broker."""
        closed = state.connections[index]._replace(requests=())
        return self.tidied(state._replace(connections=self.with_connection(state, index, closed)))

    def start(self, state: State, number: int, zombie: bool) -> State:
        """The next instance of the application starts."""
        faults = state.faults._replace(zombies=state.faults.zombies - zombie)
        ended = tuple([other for other, one in enumerate(state.instances) if one.phase in ENDED])
        started = state.instances[number]._replace(phase=NEW, ended_before=ended)
        return self.with_instance(state._replace(faults=faults), number, started)

    def crash_application(self, state: State, number: int) -> State:
        """An instance is gone. What it was not told, it will never know."""
        faults = state.faults._replace(application_crashes=state.faults.application_crashes - 1)
        return self.end(state._replace(faults=faults), number, DEAD, OPEN)

    def fill_store(self, state: State) -> State:
        """Appends are refused from now on."""
        return state._replace(store_full=True, faults=state.faults._replace(store_full=state.faults.store_full - 1))

    def free_store(self, state: State) -> State:
        """Appends are taken again."""
        return state._replace(store_full=False)

    def lose_topic(self, state: State) -> State:
        """The topic is gone."""
        faults = state.faults._replace(topic_losses=state.faults.topic_losses - 1)
        return state._replace(topic_gone=True, faults=faults)

    def return_topic(self, state: State) -> State:
        """The topic is there again."""
        return state._replace(topic_gone=False)

    def delete_name(self, state: State) -> State:
        """An operator deletes the producer, or an anonymous one expires."""
        faults = state.faults._replace(deletions=state.faults.deletions - 1)
        disk, _ = state.disk.decide(state.disk.decided._replace(row=None), 0, None, True)
        return state._replace(disk=disk, faults=faults, serial_newest=0)

    def back_up(self, state: State) -> State:
        """A copy of what is durable."""
        return state._replace(backup=state.disk.durable)

    def restore(self, state: State) -> State:
        """The copy takes the store's place, under a new incarnation."""
        assert state.backup is not None
        faults = state.faults._replace(restores=state.faults.restores - 1)
        disk = Disk[Store, Reply](state.backup, None, (), state.backup, ())
        return self.restarted(state._replace(faults=faults, incarnation=state.incarnation + 1), disk)

    # ------------------------------------------------------------------------------------------- small parts

    def told(self, instance: Instance, outcome: str, records: tuple[int, ...]) -> tuple[str, ...]:
        """The outcomes after the application is told one; the first word about a record stands."""
        return tuple(
            [
                outcome if said is OPEN and seq in records else said
                for seq, said in zip(self.bounds.records, instance.outcomes, strict=True)
            ]
        )

    def end(self, state: State, number: int, phase: str, outcome: str) -> State:
        """An instance ends; the application is told `outcome` for all that is in flight."""
        instance = state.instances[number]
        records = tuple([seq for one in instance.queue for seq in one.records])
        ended = instance._replace(phase=phase, queue=(), refusal="", outcomes=self.told(instance, outcome, records))
        return self.closed(self.with_instance(state, number, ended), number)

    def closed(self, state: State, number: int) -> State:
        """The open connection of an instance is closed. Its unread requests stay; nobody takes its replies."""
        believed = not self.guards.old_answers_ignored
        disk = state.disk if believed else state.disk.forget(broker.serials_of(state.connections, number))
        connections = broker.cut(state.connections, number, believed)
        return self.tidied(state._replace(disk=disk, connections=connections))

    def with_instance(self, state: State, number: int, instance: Instance) -> State:
        """The state with one instance replaced."""
        instances = state.instances
        return state._replace(instances=(*instances[:number], instance, *instances[number + 1 :]))

    def with_connection(
        self, state: State, index: int, connection: Connection[Request, Reply]
    ) -> tuple[Connection[Request, Reply], ...]:
        """The connections with one replaced."""
        connections = state.connections
        return (*connections[:index], connection, *connections[index + 1 :])

    def tidied(self, state: State) -> State:
        """Without connections that nobody can use any more, and without a serial that can refuse nobody."""
        connections = tuple(
            [
                one
                for one in state.connections
                if one.open or one.requests or (one.replies and state.instances[one.owner].phase not in ENDED)
            ]
        )
        serial_newest = broker.serial_needed(connections, state.serial_newest)
        return state._replace(connections=connections, serial_newest=serial_newest)


def with_status(queue: tuple[Queued, ...], index: int, status: str) -> tuple[Queued, ...]:
    """The queue with one commit's status replaced."""
    return (*queue[:index], queue[index]._replace(status=status), *queue[index + 1 :])


def lost(instance: Instance) -> Instance:
    """The instance without its connection: nothing of its queue is sent, no refusal is being drained."""
    queue = tuple([one._replace(status=UNSENT) for one in instance.queue])
    return instance._replace(phase=LOST_CONNECTION if instance.epoch else NEW, queue=queue, refusal="")
