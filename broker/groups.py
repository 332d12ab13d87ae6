"""Groups: the row of one partition's position in a group, who is a member, and the rules that need nothing but these.

Pure: no clock, no store, no connection. A position and its lease are stored; members are not, they say themselves what
they hold with every heartbeat, so a broker that starts again learns from them. Who is assigned what is a convenience:
it is the lease, compared and swapped with the position, that keeps a zombie out. The numbers are those of PROTOCOL.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from idemq.client.wire import Code, Failed, Offset, Seek, TopicPartition


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
    session: str
    """The member that holds it; empty: given back, or its member is gone."""
    metadata: bytes | None
    ended_lease: int
    """The lease before this one, and where it ended: what its holder is told with LEASE_LOST."""
    ended_at: int
    attempts: int = 0
    """Failed attempts at the message at `next`."""
    suspects_end: int = 0
    """Messages below it may have been in hand when a member ended uncleanly."""
    sought_by: str = ""
    """The nonce of the last Seek: its repetition is told from another's."""


# ------------------------------------------------------------------------------------------------- rules of one row


def granted(row: OffsetRow, member: str, number: int) -> OffsetRow:
    """Rule 14: the row once `member` holds it. `number` is the next of the counter; a holder keeps the lease it has."""
    if row.session == member and row.lease:
        return row
    return row._replace(lease=number, session=member, ended_lease=row.lease, ended_at=row.next)


def released(row: OffsetRow) -> OffsetRow:
    """The row after its holder gave it back, or was told to. The lease still commits until somebody else has one."""
    return row._replace(session="")


def ended_uncleanly(row: OffsetRow, end: int, in_hand_max: int, alone: bool) -> OffsetRow:
    """The row after its holder vanished. `end` is the partition's, `in_hand_max` what the member promised, `alone`:
    nothing but this one head can have been in its hands, in all it held.

    Such a head is to blame. Else all that may have been in hand are suspected and nobody is blamed: a member handles
    a suspect with nothing else in its hands, and stores the attempt (`Offset.attempts`) BEFORE it begins. So whoever
    kills its worker then is counted, and nobody else is.
    """
    row = released(row)
    if row.next >= end or row.next < row.suspects_end:
        return row  # nothing was there, or a suspect, whose attempts are stored already
    if alone and in_hand_max:
        return row._replace(attempts=row.attempts + 1)
    return row._replace(suspects_end=min(end, row.next + max(in_hand_max, 1)))


def sought(row: OffsetRow | None, request: Seek, number: int) -> OffsetRow | Failed:
    """Rule 15: the row after this Seek, or OPEN_RACE. `number` is the next of the counter."""
    if row is not None and row.sought_by == request.nonce:
        return row
    lease, at = (row.lease, row.next) if row is not None else (0, 0)
    if request.expected_lease != lease:
        return Failed(Code.OPEN_RACE, f"group {request.group!r} is at another lease", {"epoch": lease})
    return OffsetRow(request.to, number, request.member, None, lease, at, sought_by=request.nonce)


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
    """The row after the entry is applied. A position below the stored one does nothing (rule 15)."""
    if entry.end < row.next:
        return row
    if entry.end == row.next:
        if entry.attempts is None or entry.attempts <= row.attempts:
            return row
        return row._replace(attempts=entry.attempts)
    metadata = row.metadata if entry.metadata is None else entry.metadata
    return row._replace(next=entry.end, metadata=metadata, attempts=entry.attempts or 0)


# --------------------------------------------------------------------------------------------------------- members


class Member:
    """One member of a group, as long as it is heard of."""

    __slots__ = ("address", "client", "held", "in_hand_max", "name", "releasing", "seen_ms", "topics", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = ""
        self.address = ""
        self.topics: frozenset[int] = frozenset()
        self.in_hand_max = 0
        self.held: dict[TopicPartition, int] = {}
        """Partition -> lease."""
        self.releasing: dict[TopicPartition, int] = {}
        """What it must give back, and until when (mono_ms); then it is taken."""
        self.seen_ms = 0
        self.waiting: Any = None
        """Its heartbeat that waits for something to change; the core's."""


class ConsumerGroup:
    """The members of one group, who holds what, and who should."""

    __slots__ = ("holders", "members", "targets")

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.holders: dict[TopicPartition, Member] = {}
        self.targets: dict[TopicPartition, str] = {}

    def hold(self, member: Member, key: TopicPartition, lease: int) -> None:
        """The member holds this partition."""
        self.holders[key] = member
        member.held[key] = lease

    def drop(self, key: TopicPartition) -> None:
        """Nobody holds this partition any more."""
        member = self.holders.pop(key)
        del member.held[key]
        member.releasing.pop(key, None)

    def rebalance(self, partitions: Mapping[int, int], release_until_ms: int) -> None:
        """Decide anew who should hold what; whoever holds another's is to release it. `partitions`: of each topic."""
        self.targets = assigned(
            {member.name: member.topics for member in self.members.values()},
            partitions,
            {key: member.name for key, member in self.holders.items()},
        )
        for key, member in self.holders.items():
            if self.targets.get(key) == member.name:
                member.releasing.pop(key, None)
            else:
                member.releasing.setdefault(key, release_until_ms)


def assigned(
    subscribed: Mapping[str, frozenset[int]], partitions: Mapping[int, int], held: Mapping[TopicPartition, str]
) -> dict[TopicPartition, str]:
    """Who should hold which partition: each has one member that wants its topic, loads differ by one where that can
    be, and as few as possible move (sticky). The same input always gives the same answer.
    """
    takers: dict[int, list[str]] = {
        topic_id: sorted(member for member, topics in subscribed.items() if topic_id in topics)
        for topic_id in sorted(partitions)
    }
    targets: dict[TopicPartition, str] = {}
    own: dict[str, list[TopicPartition]] = {member: [] for member in subscribed}
    free: list[TopicPartition] = []
    for topic_id, members in takers.items():
        for index in range(partitions[topic_id] if members else 0):
            key = TopicPartition(topic_id, index)
            holder = held.get(key)
            if holder is not None and topic_id in subscribed.get(holder, ()):
                own[holder].append(key)
            else:
                free.append(key)
    for key in free:
        own[_least(takers[key.topic_id], own)].append(key)
    while (move := _move(takers, own)) is not None:
        key, giver, taker = move
        own[giver].remove(key)
        own[taker].append(key)
    for member, keys in own.items():
        targets.update(dict.fromkeys(keys, member))
    return targets


def _move(
    takers: Mapping[int, list[str]], own: Mapping[str, list[TopicPartition]]
) -> tuple[TopicPartition, str, str] | None:
    """A partition whose move makes loads more even, from the member that holds most: (it, giver, taker)."""
    for giver in sorted(own, key=lambda name: (-len(own[name]), name)):
        for topic_id, key in {key.topic_id: key for key in own[giver]}.items():  # of each topic what came last
            taker = _least(takers[topic_id], own)
            if len(own[giver]) - len(own[taker]) >= 2:
                return key, giver, taker
    return None


def _least(members: Iterable[str], own: Mapping[str, list[TopicPartition]]) -> str:
    return min(members, key=lambda name: (len(own[name]), name))
