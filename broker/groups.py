"""Groups: the row of one partition's position in a group, who is a member, and the rules that need nothing but these.

Pure: no clock, no store, no connection. A position and its lease are stored; members are not, they say themselves what
they hold with every heartbeat, so a broker that starts again learns from them. Who is assigned what is a convenience:
it is the lease, compared and swapped with the position, that keeps a zombie out. The numbers are those of PROTOCOL.md.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from idemq.client.wire import NUMBER_MAX, Code, Failed, Held, Offset, Seek, TopicPartition


class OffsetKey(NamedTuple):
    """Names one position."""

    group: str
    topic_id: int
    partition: int


class OffsetRow(NamedTuple):
    """A group's position in one partition and the lease it may be moved under."""

    next: int
    lease: int
    """0: never held."""
    holder: str
    """The member that holds it; empty: given back, or its member is gone."""
    metadata: bytes | None
    ended_lease: int
    """The lease before this one, and where it ended: what its holder is told with LEASE_LOST."""
    ended_at: int
    attempts: int = 0
    """Attempts at the message at `next` that failed, or that their member did not survive."""
    suspects_end: int = 0
    """Messages below it may have been in hand when a member ended uncleanly."""
    sought_by: str = ""
    """The nonce of the last Seek: its repetition is told from another's."""
    turns: int = 0
    """How often an attempt began or ended under this lease: odd, while one at the message at `next` is under way."""


# ------------------------------------------------------------------------------------------------- rules of one row


def beginning(start: int) -> OffsetRow:
    """The row of a position that nobody has held yet."""
    return OffsetRow(start, 0, "", None, 0, 0)


def granted(row: OffsetRow, member: str, number: int) -> OffsetRow:
    """Rule 14: the row once `member` holds it. `number` is the next of the counter.

    What is under way here was told too late, by somebody who is gone: how its lease ended was judged before.
    """
    return row._replace(lease=number, holder=member, ended_lease=row.lease, ended_at=row.next, turns=0)


def released(row: OffsetRow) -> OffsetRow:
    """The row after its holder gave it back, or was told to. The lease still commits until somebody else has one.

    An attempt under way is cut short and does not count, unless it is yet told to have failed.
    """
    return row._replace(holder="", turns=row.turns + row.turns % 2)


def ended_uncleanly(row: OffsetRow, end: int, in_hand_max: int) -> OffsetRow:
    """The row after its holder vanished. `end` is the partition's, `in_hand_max` what the member promised.

    All that may have been in hand are suspected and nobody is blamed, not even a single one: it may have come after
    its holder died. A member handles a suspect with nothing else in its hands, and stores that the attempt is under way
    BEFORE it begins. So whoever kills its worker then is counted, and nobody else is.
    """
    row = released(row._replace(attempts=min(row.attempts + row.turns % 2, NUMBER_MAX)))
    if row.next >= end or row.next < row.suspects_end:
        return row  # nothing was there, or a suspect, which counts for itself
    return row._replace(suspects_end=min(end, row.next + max(in_hand_max, 1)))


def sought(row: OffsetRow | None, request: Seek, number: int) -> OffsetRow | Failed:
    """Rule 15: the row after this Seek, or OPEN_RACE. `number` is the next of the counter."""
    lease, at, holder = (row.lease, row.next, row.holder) if row is not None else (0, 0, "")
    if row is not None and row.sought_by == request.nonce and request.member in ("", holder):
        return row  # a member that no longer holds it must not be told whose lease came after its own
    if request.expected_lease != lease:
        return Failed(Code.OPEN_RACE, f"group {request.group!r} is at another lease", {"epoch": lease})
    kept = holder if holder == request.member else ""
    return OffsetRow(request.to, number, kept, None, lease, at, sought_by=request.nonce)


def refusal(row: OffsetRow | None, entry: Offset, forward_only: bool) -> Failed | None:
    """Rule 7 (and 15 with `forward_only`): may this entry move the position?"""
    where: dict[str, int | str | None] = {
        "group": entry.group,
        "topic_id": entry.topic_id,
        "partition": entry.partition,
    }
    if row is None or entry.lease != row.lease:
        ended_at = row.ended_at if row is not None and row.ended_lease == entry.lease else None
        text = f"group {entry.group!r} no longer leases partition {entry.partition} under {entry.lease}"
        return Failed(Code.LEASE_LOST, text, {**where, "next": ended_at})
    if not forward_only and entry.start != row.next:
        text = f"group {entry.group!r} is at {row.next} in partition {entry.partition}, not at {entry.start}"
        return Failed(Code.OFFSET_CONFLICT, text, {**where, "next": row.next})
    return None


def moved(row: OffsetRow, entry: Offset) -> OffsetRow:
    """The row after the entry is applied. Positions, and of one message attempts and turns, only rise (rule 15): an
    entry that comes late, or twice, does nothing."""
    if entry.end < row.next:
        return row
    attempts, turns = entry.attempts or 0, entry.turns
    if entry.end == row.next:
        if attempts <= row.attempts and turns <= row.turns:
            return row
        return row._replace(attempts=max(attempts, row.attempts), turns=max(turns, row.turns))
    metadata = row.metadata if entry.metadata is None else entry.metadata
    return row._replace(next=entry.end, metadata=metadata, attempts=attempts, turns=turns)


# --------------------------------------------------------------------------------------------------------- members


class Member:
    """One member of a group, as long as it is heard of."""

    __slots__ = (
        "address",
        "client",
        "held",
        "in_hand_max",
        "name",
        "releasing",
        "seen_ms",
        "targets",
        "topics",
        "waiting",
    )

    def __init__(self, name: str, seen_ms: int) -> None:
        self.name = name
        self.client = ""
        self.address = ""
        self.topics: frozenset[int] = frozenset()
        self.in_hand_max: int | None = None
        """Its promise; None while it is not heard of."""
        self.held: dict[TopicPartition, int] = {}
        """Partition -> lease. The rows of these name this member, and no others do."""
        self.targets: dict[TopicPartition, None] = {}
        """What it should hold, in order."""
        self.releasing: dict[TopicPartition, int] = {}
        """What it must give back, and until when (mono_ms); then it is taken."""
        self.seen_ms = seen_ms
        self.waiting: Any = None
        """Its heartbeat that waits for something to change; the core's."""

    @property
    def heard(self) -> bool:
        """Has it reported to this broker, or is it known from the rows alone?"""
        return self.in_hand_max is not None

    def lost(self, reported: Mapping[TopicPartition, Held]) -> list[TopicPartition]:
        """What it reports and does not hold, or holds under another lease."""
        return [key for key, held in reported.items() if self.held.get(key) != held.lease]

    def revoked(self, reported: Mapping[TopicPartition, Held]) -> list[TopicPartition]:
        """What it reports, must give back, and does not say that it knows."""
        return [key for key in self.releasing if key in reported and not reported[key].releasing]


class ConsumerGroup:
    """The members of one group, who holds what, and who should."""

    __slots__ = ("holders", "members", "topics")

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.holders: dict[TopicPartition, Member] = {}
        self.topics: set[int] = set()
        """Whose rows were looked at for holders of a broker before this one."""

    def hold(self, member: Member, key: TopicPartition, lease: int) -> None:
        """The member holds this partition."""
        self.holders[key] = member
        member.held[key] = lease

    def drop(self, key: TopicPartition) -> None:
        """Nobody holds this partition any more."""
        member = self.holders.pop(key)
        del member.held[key]
        member.releasing.pop(key, None)

    def gone(self, now_ms: int, silence_ms_max: int) -> list[Member]:
        """Members that were not heard of for so long."""
        return [member for member in self.members.values() if member.seen_ms + silence_ms_max <= now_ms]

    def late(self, now_ms: int) -> list[TopicPartition]:
        """What should have been given back by now."""
        return [key for member in self.members.values() for key, until in member.releasing.items() if until <= now_ms]

    def start_anew(self, now_ms: int, release_until_ms: int) -> None:
        """All time begins now: it was the broker that stood still, and what members said meanwhile is not read yet."""
        for member in self.members.values():
            member.seen_ms = now_ms
            member.releasing = dict.fromkeys(member.releasing, release_until_ms)

    def rebalance(self, partitions: Mapping[int, int], release_until_ms: int) -> None:
        """Decide anew who should hold what; whoever holds another's is to release it. `partitions`: of each topic."""
        targets = assigned(
            {member.name: member.topics for member in self.members.values()},
            partitions,
            {key: member.name for key, member in self.holders.items()},
        )
        for member in self.members.values():
            member.targets = dict.fromkeys(targets[member.name])
            member.releasing = {
                key: member.releasing.get(key, release_until_ms) for key in member.held if key not in member.targets
            }


def assigned(
    subscribed: Mapping[str, frozenset[int]], partitions: Mapping[int, int], held: Mapping[TopicPartition, str]
) -> dict[str, list[TopicPartition]]:
    """Who should hold what: each partition has one member that wants its topic, the loads of members that want the
    same differ by one at most, and few partitions move (sticky). The same input always gives the same answer.
    """
    balance = _Balance(subscribed)
    free: list[TopicPartition] = []
    takers: Counter[int] = Counter()
    for topics in subscribed.values():
        takers.update(topics)
    # Topics that few want come first: what many want evens out what these leave uneven.
    for topic_id in sorted(takers.keys() & partitions.keys(), key=lambda topic_id: (takers[topic_id], topic_id)):
        for index in range(partitions[topic_id]):
            key = TopicPartition(topic_id, index)
            holder = held.get(key)
            if holder is not None and topic_id in subscribed.get(holder, ()):
                balance.give(holder, key)
            else:
                free.append(key)
    for key in free:
        balance.give(balance.least(key.topic_id), key)
    balance.even_out()
    return {member: [key for keys in own.values() for key in keys] for member, own in balance.own.items()}


class _Balance:
    """Loads while partitions are handed out. Whoever is to get one is looked for among the members in order of their
    loads: where all want much the same, as members of a group do, one of the first does."""

    def __init__(self, subscribed: Mapping[str, frozenset[int]]) -> None:
        self.own: dict[str, dict[int, list[TopicPartition]]] = {member: {} for member in sorted(subscribed)}
        """Of each member, its partitions by topic; none is empty."""
        self._subscribed = subscribed
        self._load = dict.fromkeys(self.own, 0)
        self._order = [(0, member) for member in self.own]
        """(load, member), the least first."""

    def give(self, member: str, key: TopicPartition) -> None:
        """The member gets this partition."""
        self.own[member].setdefault(key.topic_id, []).append(key)
        self._changed(member, 1)

    def least(self, topic_id: int) -> str:
        """Who has least of those that want this topic."""
        return next(member for _, member in self._order if topic_id in self._subscribed[member])

    def even_out(self) -> None:
        """Move partitions from who has most to who has least, while that makes loads more even."""
        givers = [(-load, member) for load, member in self._order]
        heapify(givers)
        stuck: dict[str, None] = {}
        while givers:
            load, giver = heappop(givers)
            if -load != self._load[giver]:
                continue
            taker = self._move(giver)
            if taker is None:
                stuck[giver] = None
                continue
            # Who could give nothing may be able to now: the taker has more to give, and the giver takes again.
            for member in (giver, taker, *[one for one in stuck if self._may_take(giver, one)]):
                stuck.pop(member, None)
                heappush(givers, (-self._load[member], member))

    def _move(self, giver: str) -> str | None:
        own = self.own[giver]
        for _, taker in self._order:
            if self._load[giver] - self._load[taker] < 2:
                break  # whoever follows has no less
            if self._may_take(taker, giver):
                topic_id = next(one for one in own if one in self._subscribed[taker])
                key = own[topic_id].pop()
                if not own[topic_id]:
                    del own[topic_id]
                self._changed(giver, -1)
                self.give(taker, key)
                return taker
        return None

    def _may_take(self, taker: str, giver: str) -> bool:
        """Does it make loads more even if one of the giver's partitions goes to the taker?"""
        uneven = self._load[giver] - self._load[taker] >= 2
        return uneven and not self._subscribed[taker].isdisjoint(self.own[giver])

    def _changed(self, member: str, by: int) -> None:
        load = self._load[member]
        del self._order[bisect_left(self._order, (load, member))]
        self._load[member] = load + by
        insort(self._order, (load + by, member))
