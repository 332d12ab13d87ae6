"""Groups: the row of one partition's position in a group, and the rules that need nothing but that row.

Pure: no clock, no store, no connection. Who is asked to consume what is not decided here: this is the lease, and
the compare-and-swap that keeps a zombie out. The numbers are those of PROTOCOL.md.
"""

from __future__ import annotations

from typing import NamedTuple

from idemq.client.wire import Code, Failed, Grant, Offset


class OffsetKey(NamedTuple):
    """Names one position."""

    group: str
    topic_id: int
    partition: int


class OffsetRow(NamedTuple):
    """A group's position in one partition and the lease it may be moved under."""

    next: int
    lease: int
    session: str
    """The holder's session: its repeated Grant returns the lease it has."""
    metadata: bytes | None
    ended_lease: int
    """The lease before this one, and where it ended: what its holder is told with LEASE_LOST."""
    ended_at: int


def granting(row: OffsetRow | None, request: Grant, number: int, start: int) -> OffsetRow | Failed:
    """Rule 14: the row after this Grant, or OPEN_RACE. `number` is the next of the counter, `start` for a new row."""
    if row is None:
        if request.expected_lease:
            return Failed(Code.OPEN_RACE, f"group {request.group!r} has no such lease", {"epoch": 0})
        return OffsetRow(start, number, request.session, None, 0, 0)
    if row.session == request.session:
        return row
    if request.expected_lease != row.lease:
        return Failed(Code.OPEN_RACE, f"group {request.group!r} is at another lease", {"epoch": row.lease})
    return row._replace(lease=number, session=request.session, ended_lease=row.lease, ended_at=row.next)


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
    if entry.end <= row.next:
        return row
    return row._replace(next=entry.end, metadata=row.metadata if entry.metadata is None else entry.metadata)
