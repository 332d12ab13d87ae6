"""Which outcomes, refusals and recovery branches of core and session a run went through, counted from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from idemq.broker.core import Connection, Core, Group, Now, Output, Read, Reply
from idemq.broker.groups import ConsumerGroup, Member, OffsetKey, OffsetRow
from idemq.client import wire
from idemq.client.errors import OutcomeUnknown, StoreReplaced
from idemq.client.pipeline import Pending
from idemq.client.session import Session
from idemq.client.wire import Code, Failed

from .world import FAULT_KINDS, World

COUNTS: Counter[str] = Counter()
EACH_AT_LEAST = 20
"""Over the seeds of CI."""


class WatchedCore(Core):
    """A core that is looked at."""

    _free: list[bool]
    _known: list[bool]
    _at_ms = 0

    def step(self, now: Now, connection: Connection, correlation: int, request: Any, payload: bytes) -> Output | None:
        kind = type(request)
        before = _BEFORE[kind](self, request) if kind in _BEFORE else None
        output = super().step(now, connection, correlation, request, payload)
        if kind is wire.Heartbeat and before:
            COUNTS["core: a waiting Heartbeat is answered by a newer one"] += 1
        if output is None:
            group = self._building
            where = "the group being built"
            if not group.replies or group.replies[-1].connection is not connection:
                group, where = self._in_flight or group, "the group in flight"
            elif not group.writes:
                where = "nothing"
            if kind is wire.Fetch:
                COUNTS["core: Fetch waits"] += 1
                return output
            if not group.replies or group.replies[-1][:2] != (connection, correlation):
                COUNTS["core: Heartbeat waits"] += 1
                return output
            COUNTS[f"core: a reply waits for {where}"] += 1
            message = group.replies[-1].message
        elif type(output) is Read:
            COUNTS["core: Fetch reads"] += 1
            for part in output.parts:
                COUNTS[f"core: Fetch {part.code}"] += 1
            return output
        else:
            assert isinstance(output, Reply)
            message = output.message
        self._count(kind.__name__, request, before, message)
        return output

    def _commits(self, request: wire.Commit) -> Any:
        """Its producer; and how the positions stand that it moves."""
        if request.offsets:
            rows = [self._offset(OffsetKey(one.group, *one[1:3])) for one in request.offsets]
            self._free = [row is not None and not row.holder for row in rows]
            self._known = [
                row is not None and one.end == row.next and 0 < one.turns <= row.turns
                for row, one in zip(rows, request.offsets, strict=True)
            ]
        return self._producer(request.producer_id) if request.producer_id else None

    def _is_waiting(self, request: wire.Heartbeat) -> bool:
        """Does an earlier report of this member wait?"""
        known = self._groups.get(request.group)
        member = None if known is None else known.members.get(request.member)
        return member is not None and member.waiting is not None

    def _count(self, name: str, request: Any, before: Any, message: Any) -> None:
        if type(message) is Failed:
            COUNTS[f"core: {name} {message.code}"] += 1
            for key in ("ended_at", "next"):
                if key in message.details:
                    known = "unknown" if message.details[key] is None else "known"
                    COUNTS[f"core: {name} {message.code}, {key} {known}"] += 1
        elif type(message) is wire.Committed:
            if message.duplicate:
                what = "duplicate, forgotten" if message.positions is None else "duplicate"
                if before is not None and request.epoch < before.epoch:
                    what = "duplicate of a fenced epoch"
            else:
                what = "stored" if request.producer_id else "stored without a producer"
                COUNTS["core: Commit on several partitions"] += len(request.appends) > 1
                COUNTS["core: Commit with a token"] += request.token is not None
                if request.offsets:
                    how = "of appends and offsets" if request.appends else "of offsets only"
                    COUNTS[f"core: Commit {how}"] += 1
                    turns = [one.turns for one in request.offsets if one.turns]
                    COUNTS["core: Commit of an attempt that begins"] += any(turn % 2 for turn in turns)
                    COUNTS["core: Commit of an attempt that has ended"] += any(not turn % 2 for turn in turns)
                    COUNTS["core: Commit of an attempt that is known"] += any(self._known)
                    COUNTS["core: Commit moves several positions"] += len(request.offsets) > 1
                    COUNTS["core: Commit under a lease that was given back or expired"] += any(self._free)
            COUNTS[f"core: Commit {what}"] += 1
        elif type(message) is wire.Opened:
            what = "creates" if before is None else "is repeated" if before.epoch == message.epoch else "takes over"
            COUNTS[f"core: Open {what}"] += 1
        elif type(message) is wire.Sought:
            what = "creates" if before is None else "is repeated" if before.lease == message.lease else "applied"
            COUNTS[f"core: Seek {what}"] += 1
        elif type(message) is wire.Assignment:
            self._count_assignment(message)
            COUNTS["core: Heartbeat leaves"] += not request.topics
        elif name == "CreateTopic":
            COUNTS[f"core: CreateTopic {'creates' if before is None else 'finds'}"] += 1
        elif name in ("DeleteTopic", "DeleteProducer"):
            COUNTS[f"core: {name} {'repeated' if before is None else 'deletes'}"] += 1
        else:
            COUNTS[f"core: {name} answered"] += 1

    def _count_assignment(self, answer: wire.Assignment) -> None:
        for what in ("leases", "revoked", "lost"):
            COUNTS[f"core: Heartbeat is told of {what}"] += bool(getattr(answer, what))
        COUNTS["core: Heartbeat is told nothing"] += answer[:3] == ([], [], [])

    def _answer_heartbeat(self, member: Member, answer: Any) -> None:
        if type(answer) is wire.Assignment:
            self._count_assignment(answer)
            COUNTS["core: a waiting Heartbeat is told something"] += answer[:3] != ([], [], [])
        else:
            COUNTS[f"core: a waiting Heartbeat is told {answer.code}"] += 1
        super()._answer_heartbeat(member, answer)

    def _returning(self, *arguments: Any) -> Any:
        rows = super()._returning(*arguments)
        COUNTS["core: a member comes back and holds what it held"] += bool(rows)
        return rows

    def _give_back(self, name: str, group: ConsumerGroup, key: wire.TopicPartition) -> None:
        member, row = group.holders[key], self._held_row(name, key)
        COUNTS["core: what is given back was to be held"] += key in member.targets and bool(member.topics)
        if row.turns % 2:
            how = "taken" if key in member.releasing and member.releasing[key] <= self._at_ms else "given back"
            COUNTS[f"core: an attempt is under way, its partition is {how}"] += 1
        super()._give_back(name, group, key)

    def _put_offset(self, key: OffsetKey, row: OffsetRow) -> None:
        old = self._offset(key)
        if old is not None and not old.holder and old.lease != row.lease:
            COUNTS["core: an attempt was told after its lease had ended"] += old.turns % 2
        super()._put_offset(key, row)

    def _watch_members(self, now: Now) -> None:
        self._at_ms = now.mono_ms
        for group in self._groups.values():
            for member in group.members.values():
                late = any(until_ms <= now.mono_ms for until_ms in member.releasing.values())
                COUNTS["core: a partition is taken that was not given back"] += late
                if member.waiting is not None:
                    COUNTS["core: a waiting Heartbeat is over"] += member.waiting.deadline_ms <= now.mono_ms
        super()._watch_members(now)

    def _end_uncleanly(self, name: str, group: ConsumerGroup, member: Member) -> None:
        held = [OffsetKey(name, *key) for key in member.held]
        before = [self._offset(key) for key in held]
        super()._end_uncleanly(name, group, member)
        COUNTS["core: a member is gone"] += 1
        unheard = " that never came back to this broker" if member.in_hand_max is None else ""
        COUNTS["core: a member is gone that never came back to this broker"] += bool(unheard)
        COUNTS[f"core: an attempt is under way of a member that is gone{unheard}"] += any(
            row is not None and row.turns % 2 for row in before
        )
        COUNTS["core: messages are suspected"] += any(
            row is not None and old is not None and row.suspects_end > old.suspects_end
            for row, old in zip([self._offset(key) for key in held], before, strict=True)
        )

    def begin(self) -> Group | None:
        group = super().begin()
        if group is not None and not group.writes:
            COUNTS["core: a group without writes"] += 1
        return group

    def committed(self) -> list[Output]:
        if self._building.writes:
            COUNTS["core: decided while a group is in flight"] += 1
        outputs = super().committed()
        COUNTS["core: a waiting Fetch is woken"] += sum([type(output) is Read for output in outputs])
        return outputs

    def tick(self, now: Now) -> tuple[int, list[Output]]:
        trims, rows, alarm = len(self._building.trims), self._producer_count, self.alarm
        due, outputs = super().tick(now)
        COUNTS["core: batches trimmed"] += len(self._building.trims) > trims
        COUNTS["core: an idle producer expires"] += rows - self._producer_count
        COUNTS["core: the clock jumped"] += bool(self.alarm) and not alarm
        COUNTS["core: a waiting Fetch is over"] += len(outputs)
        return due, outputs


_BEFORE: dict[type[Any], Callable[[WatchedCore, Any], Any]] = {
    wire.Commit: WatchedCore._commits,
    wire.Open: lambda core, request: core._producer_named(request.name),
    wire.Seek: lambda core, request: core._offset(OffsetKey(request.group, request.topic_id, request.partition)),
    wire.Heartbeat: WatchedCore._is_waiting,
    wire.CreateTopic: lambda core, request: core._topic_ids.get(request.name),
    wire.DeleteTopic: lambda core, request: core._topic(request.topic_id),
    wire.DeleteProducer: lambda core, request: core._producer(request.producer_id),
}
"""How to see what a request is about before it is decided, where the answer alone does not tell what happened."""


class WatchedSession(Session):
    """A session that is looked at."""

    def disconnected(self, now: float, reason: str) -> None:
        COUNTS["session: sent again on a new connection (C3)"] += sum(producer.sent > 0 for producer in self.producers)
        COUNTS["session: a drain ends with its connection"] += sum(producer.refused for producer in self.producers)
        COUNTS["session: the dial failed"] += self.state == "dialling"
        super().disconnected(now, reason)

    def received(self, now: float, correlation: int, message: Any, payload: bytes = b"") -> None:
        if correlation not in self._outstanding:
            COUNTS["session: an answer nobody waits for"] += 1
        super().received(now, correlation, message, payload)

    def tick(self, now: float) -> None:
        cut, frames = self._cut, len(self._frames)
        super().tick(now)
        if self._cut and not cut:
            COUNTS["session: an answer is overdue"] += 1
        COUNTS["session: a ping on an idle connection"] += sum(
            [type(frame.request) is wire.Ping for frame in self._frames[frames:]]
        )

    def _welcomed(self, now: float, message: Any) -> None:
        super()._welcomed(now, message)
        COUNTS["session: the store was replaced"] += isinstance(self.error, StoreReplaced)

    def _answered(self, now: float, call: Any, answer: Any, payload: bytes) -> None:
        failures = call.failures
        super()._answered(now, call, answer, payload)
        if call.failures > failures:
            COUNTS["session: a call is tried again"] += 1

    def _timed_out(self, call: Any) -> Any:
        error = super()._timed_out(call)
        COUNTS[f"session: a call ends as {error.code}"] += 1
        return error

    def _open(self, now: float, producer: Any, waiter: Any, deadline: float, expected_epoch: int) -> None:
        COUNTS["session: open again after a race"] += expected_epoch > 0
        super()._open(now, producer, waiter, deadline, expected_epoch)

    def _committed(self, now: float, producer: Any, commit: Any, answer: Any) -> None:
        if type(answer) is Failed and answer.code == Code.STALE_CONNECTION:
            COUNTS["session: told that its connection is stale"] += 1
        if producer.error is not None:
            COUNTS["session: answered after its end"] += 1
        super()._committed(now, producer, commit, answer)
        if producer.refused:
            COUNTS["session: waits for the answers behind a refusal"] += 1

    def _act_on_refusal(self, now: float, producer: Any) -> None:
        sent = [commit for commit in producer.queue if commit.sent]
        codes = [commit.refusal.code for commit in sent]
        code = next((code for code in codes if code != Code.SEQUENCE_GAP), codes[0])
        COUNTS[f"session: refused by {code}"] += 1
        COUNTS["session: a drain of several"] += len(sent) > 1
        COUNTS["session: a retriable refusal with a tail"] += code in (Code.STORE_FULL, Code.BUSY) and len(sent) > 1
        super()._act_on_refusal(now, producer)

    def _fail_definitely(self, producer: Any, head: Any, error: Any) -> None:
        behind = list(producer.queue)[producer.queue.index(head) + 1 :]
        if head.transaction:
            what = "a transaction"
        else:
            what = "given numbers" if producer.given else "counted numbers"
        tail = "" if not behind else ", the tail was sent" if behind[0].frozen else ", the tail was not sent"
        COUNTS[f"session: a definite refusal of {what}{tail}"] += 1
        COUNTS["session: in doubt without dedup"] += head.sent_before and not producer.dedup
        super()._fail_definitely(producer, head, error)

    def _fenced(self, producer: Any, refusal: Failed) -> None:
        ended_at = refusal.details.get("ended_at")
        for commit in producer.queue:
            if not commit.ever_sent:
                what = "never sent"
            elif not isinstance(ended_at, int):
                what = "unknown"
            else:
                what = "stored" if commit.last_seq <= ended_at else "not stored"
            COUNTS[f"session: fenced, {what}"] += 1
        super()._fenced(producer, refusal)

    def _end_producer(self, producer: Any, error: Any, *, unknown: bool = True) -> None:
        if producer.error is None:
            for commit in producer.queue:
                what = "unknown" if commit.ever_sent and unknown else "not stored"
                COUNTS[f"session: {what} when its producer ends ({error.code})"] += 1
        super()._end_producer(producer, error, unknown=unknown)

    def _join(self, now: float, producer: Any, topic: str, record: Any, waiter: Any, *rest: Any) -> None:
        told = len(self._completions)
        super()._join(now, producer, topic, record, waiter, *rest)
        if waiter is not None:
            what = "answered at once (C8)" if len(self._completions) > told else "joined"
            COUNTS[f"session: a number given before is {what}"] += 1

    def _detach(self, waiter: Any, seq: int) -> Any:
        COUNTS["session: a wait ends before the answer (C7)"] += waiter is not None and type(waiter) is not Pending
        return super()._detach(waiter, seq)

    def _complete(self, waiter: Any, value: Any) -> None:
        if type(waiter) is Pending and not isinstance(value, OutcomeUnknown):
            COUNTS[
                f"session: the outcome is known later: {'failed' if isinstance(value, Exception) else 'stored'}"
            ] += 1
        super()._complete(waiter, value)


class WatchedWorld(World):
    """A world of those two."""

    session_class = WatchedSession
    core_class = WatchedCore

    def run(self) -> None:
        super().run()
        COUNTS["seeds"] += 1
        COUNTS["operations"] += self.operations
        for kind, count in self.kinds.items():
            COUNTS[f"fault: {kind}"] += count

    def count(self, what: str) -> None:
        COUNTS[what] += 1

    def _group_failed(self) -> None:
        COUNTS["world: a group fails"] += 1
        COUNTS["world: a group fails, the next is being built"] += bool(self.core._building.writes)
        super()._group_failed()


REQUIRED = [
    "core: AlterTopic BAD_REQUEST",
    "core: AlterTopic UNKNOWN_TOPIC",
    "core: AlterTopic UNSUPPORTED",
    "core: AlterTopic answered",
    "core: Commit BAD_REQUEST",
    "core: Commit BUSY",
    "core: Commit CHECKSUM_MISMATCH",
    "core: Commit LEASE_LOST",
    "core: Commit LEASE_LOST, next known",
    "core: Commit LEASE_LOST, next unknown",
    "core: Commit OFFSET_CONFLICT",
    "core: Commit OFFSET_CONFLICT, next known",
    "core: Commit PRODUCER_FENCED",
    "core: Commit PRODUCER_FENCED, ended_at known",
    "core: Commit PRODUCER_FENCED, ended_at unknown",
    "core: Commit SEQUENCE_CONFLICT",
    "core: Commit SEQUENCE_GAP",
    "core: Commit STALE_CONNECTION",
    "core: Commit STORE_FULL",
    "core: Commit STORE_REPLACED",
    "core: Commit UNKNOWN_PRODUCER",
    "core: Commit UNKNOWN_TOPIC",
    "core: Commit duplicate",
    "core: Commit duplicate of a fenced epoch",
    "core: Commit duplicate, forgotten",
    "core: Commit moves several positions",
    "core: Commit of an attempt that begins",
    "core: Commit of an attempt that has ended",
    "core: Commit of an attempt that is known",
    "core: Commit of appends and offsets",
    "core: Commit of offsets only",
    "core: Commit on several partitions",
    "core: Commit stored",
    "core: Commit stored without a producer",
    "core: Commit under a lease that was given back or expired",
    "core: Commit with a token",
    "core: CreateTopic QUOTA_EXCEEDED",
    "core: CreateTopic TOPIC_EXISTS",
    "core: CreateTopic UNSUPPORTED",
    "core: CreateTopic creates",
    "core: CreateTopic finds",
    "core: DeleteOffsets BAD_REQUEST",
    "core: DeleteOffsets answered",
    "core: DeleteProducer PRODUCER_FENCED",
    "core: DeleteProducer PRODUCER_FENCED, ended_at known",
    "core: DeleteProducer PRODUCER_FENCED, ended_at unknown",
    "core: DeleteProducer UNKNOWN_PRODUCER",
    "core: DeleteProducer deletes",
    "core: DeleteProducer repeated",
    "core: DeleteTopic UNKNOWN_TOPIC",
    "core: DeleteTopic deletes",
    "core: DeleteTopic repeated",
    "core: Fetch BUSY",
    "core: Fetch OFFSET_TRUNCATED",
    "core: Fetch UNKNOWN_TOPIC",
    "core: Fetch reads",
    "core: Fetch waits",
    "core: Heartbeat BAD_REQUEST",
    "core: Heartbeat QUOTA_EXCEEDED",
    "core: Heartbeat STALE_CONNECTION",
    "core: Heartbeat UNKNOWN_TOPIC",
    "core: Heartbeat is told nothing",
    "core: Heartbeat is told of leases",
    "core: Heartbeat is told of lost",
    "core: Heartbeat is told of revoked",
    "core: Heartbeat leaves",
    "core: Heartbeat waits",
    "core: Hello BAD_REQUEST",
    "core: Hello answered",
    "core: Members answered",
    "core: Metadata answered",
    "core: OffsetAt UNKNOWN_TOPIC",
    "core: OffsetAt answered",
    "core: Offsets answered",
    "core: Open OPEN_RACE",
    "core: Open QUOTA_EXCEEDED",
    "core: Open creates",
    "core: Open is repeated",
    "core: Open takes over",
    "core: Ping answered",
    "core: Pong BAD_REQUEST",
    "core: Producers answered",
    "core: PurgeTopic BAD_REQUEST",
    "core: PurgeTopic UNKNOWN_TOPIC",
    "core: PurgeTopic answered",
    "core: Seek OPEN_RACE",
    "core: Seek UNKNOWN_TOPIC",
    "core: Seek applied",
    "core: Seek is repeated",
    "core: a group without writes",
    "core: a member comes back and holds what it held",
    "core: a member is gone",
    "core: a member is gone that never came back to this broker",
    "core: a partition is taken that was not given back",
    "core: a reply waits for nothing",
    "core: a reply waits for the group being built",
    "core: a reply waits for the group in flight",
    "core: a waiting Fetch is over",
    "core: a waiting Fetch is woken",
    "core: a waiting Heartbeat is answered by a newer one",
    "core: a waiting Heartbeat is over",
    "core: a waiting Heartbeat is told UNKNOWN_TOPIC",
    "core: a waiting Heartbeat is told something",
    "core: an attempt is under way of a member that is gone",
    "core: an attempt is under way of a member that is gone that never came back to this broker",
    "core: an attempt is under way, its partition is given back",
    "core: an attempt is under way, its partition is taken",
    "core: an attempt was told after its lease had ended",
    "core: an idle producer expires",
    "core: batches trimmed",
    "core: decided while a group is in flight",
    "core: messages are suspected",
    "core: the clock jumped",
    "core: what is given back was to be held",
    "member: a second run while the outcome of the first is unknown",
    "member: commits after it slept, LEASE_LOST",
    "member: commits after it slept, it is done",
    "member: dies of what it handles",
    "member: fails to handle a message",
    "member: gives back in the middle of an attempt",
    "member: goes on after an attempt that was cut short",
    "member: leaves in the middle of an attempt",
    "member: moves past what kills it",
    "session: a call ends as CONNECTION_LOST",
    "session: a call ends as OUTCOME_UNKNOWN",
    "session: a call is tried again",
    "session: a definite refusal of a transaction",
    "session: a definite refusal of a transaction, the tail was not sent",
    "session: a definite refusal of a transaction, the tail was sent",
    "session: a definite refusal of counted numbers",
    "session: a definite refusal of counted numbers, the tail was not sent",
    "session: a definite refusal of counted numbers, the tail was sent",
    "session: a definite refusal of given numbers",
    "session: a definite refusal of given numbers, the tail was not sent",
    "session: a definite refusal of given numbers, the tail was sent",
    "session: a drain ends with its connection",
    "session: a drain of several",
    "session: a number given before is answered at once (C8)",
    "session: a number given before is joined",
    "session: a ping on an idle connection",
    "session: a retriable refusal with a tail",
    "session: a wait ends before the answer (C7)",
    "session: an answer is overdue",
    "session: an answer nobody waits for",
    "session: answered after its end",
    "session: fenced, never sent",
    "session: fenced, not stored",
    "session: fenced, stored",
    "session: fenced, unknown",
    "session: in doubt without dedup",
    "session: not stored when its producer ends (CLIENT_CLOSED)",
    "session: not stored when its producer ends (QUOTA_EXCEEDED)",
    "session: not stored when its producer ends (STORE_REPLACED)",
    "session: not stored when its producer ends (UNKNOWN_PRODUCER)",
    "session: open again after a race",
    "session: refused by BUSY",
    "session: refused by LEASE_LOST",
    "session: refused by OFFSET_CONFLICT",
    "session: refused by PRODUCER_FENCED",
    "session: refused by STORE_FULL",
    "session: refused by UNKNOWN_PRODUCER",
    "session: refused by UNKNOWN_TOPIC",
    "session: sent again on a new connection (C3)",
    "session: the dial failed",
    "session: the outcome is known later: failed",
    "session: the outcome is known later: stored",
    "session: the store was replaced",
    "session: told that its connection is stale",
    "session: unknown when its producer ends (CLIENT_CLOSED)",
    "session: unknown when its producer ends (PRODUCER_FENCED)",
    "session: unknown when its producer ends (STORE_REPLACED)",
    "session: unknown when its producer ends (UNKNOWN_PRODUCER)",
    "session: waits for the answers behind a refusal",
    "world: a group fails",
    "world: a group fails, the next is being built",
    *[f"fault: {kind}" for kind in dict.fromkeys(FAULT_KINDS)],
]
"""What must have happened often enough: every outcome, refusal and recovery branch that a run can come to."""
