"""The broker's rules 1 to 6, 9 and 10, and what both models share: the row of a producer, the disk, the connections.

The order of the checks in `decide` is the order of the protocol page, section 1. `content` stands for the checksum: two
commits have equal content exactly if they carry the same records or entries.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from .explorer import Violation
from .guards import FENCED_APPENDS, OLD_LIFE_APPENDS, TWO_HOLDERS, Guards

# ------------------------------------------------------------------------------------------------- answers

OK = "OK"
DUPLICATE = "DUPLICATE"
BAD_REQUEST = "BAD_REQUEST"
UNKNOWN_PRODUCER = "UNKNOWN_PRODUCER"
FENCED = "FENCED"
STORE_REPLACED = "STORE_REPLACED"
STALE_CONNECTION = "STALE_CONNECTION"
SEQUENCE_CONFLICT = "SEQUENCE_CONFLICT"
SEQUENCE_GAP = "SEQUENCE_GAP"
LEASE_LOST = "LEASE_LOST"
OFFSET_MOVED = "OFFSET_MOVED"
UNKNOWN_TOPIC = "UNKNOWN_TOPIC"
TOO_LARGE = "TOO_LARGE"
STORE_FULL = "STORE_FULL"

STORED = (OK, DUPLICATE)


class Decision(NamedTuple):
    """What the broker says to a commit."""

    code: str
    detail: int | None = None
    """OK and DUPLICATE: the result (an offset), None if no longer known. FENCED: `ended_at`, None if no longer known.
    LEASE_LOST, OFFSET_MOVED: the position `next`."""
    partition: int = 0
    """LEASE_LOST, OFFSET_MOVED: of which partition."""


# --------------------------------------------------------------------------------------- the producer's row

Content = tuple[object, ...]


class Remembered(NamedTuple):
    """The result of a commit, kept for its repetition."""

    last: int
    content: Content
    result: int


class Takeover(NamedTuple):
    """Where a replaced epoch ended."""

    epoch: int
    ended_at: int


class Row(NamedTuple):
    """What the broker stores about a producer name."""

    producer_id: int
    epoch: int
    holder: int
    """The session that opened this epoch."""
    last_seq: int
    remembered: tuple[Remembered, ...]
    takeovers: tuple[Takeover, ...]


def opened(
    guards: Guards, row: Row | None, asker: int, expected: int, counter: int, takeovers_remembered: int
) -> Row | None:
    """Rule 10: the row after `Open(expected_epoch)`, None for OPEN_RACE.

    A new epoch is `counter` + 1. 0 expects no row.
    """
    if row is None:
        if expected:
            return None
        epoch = counter + 1 if guards.numbers_never_reset else 1
        return Row(counter + 1, epoch, asker, -1, (), ())
    if guards.opens_compare:
        if row.holder == asker:
            return row
        if row.epoch != expected:
            return None
    epoch = counter + 1 if guards.numbers_never_reset else row.epoch + 1
    takeovers = (*row.takeovers, Takeover(row.epoch, row.last_seq))[-takeovers_remembered:]
    return row._replace(epoch=epoch, holder=asker, takeovers=takeovers)


class Numbers(NamedTuple):
    """What a commit says about its place in the producer's sequence."""

    producer_id: int
    epoch: int
    previous: int
    last: int


def decide(
    guards: Guards,
    row: Row | None,
    numbers: Numbers,
    content: Content,
    serial: int,
    serial_newest: int,
    later: Decision | None,
) -> tuple[Decision | None, bool]:
    """Rules 1 to 6. Returns (answer, or None to apply the commit; is the connection's serial recorded?).

    `later` is what rule 7 says about the commit. `row` None means that there is no row for this producer.
    """
    # 1
    if guards.every_commit_takes_a_number and numbers.last <= numbers.previous:
        return Decision(BAD_REQUEST), False
    # 2
    if row is None or (guards.rows_are_found_by_id and row.producer_id != numbers.producer_id):
        return Decision(UNKNOWN_PRODUCER), False
    # 3
    original = next((one for one in row.remembered if one.last == numbers.last and one.content == content), None)
    if guards.epoch_checked and numbers.epoch < row.epoch:
        if original is not None:
            return Decision(DUPLICATE, original.result), False
        return Decision(FENCED, next((t.ended_at for t in row.takeovers if t.epoch == numbers.epoch), None)), False
    if numbers.epoch > row.epoch:
        return Decision(STORE_REPLACED), False
    # 4
    if guards.connection_fence and serial < serial_newest:
        return Decision(STALE_CONNECTION), False
    recorded = guards.connection_fence and guards.fence_rises_on_refusal
    # 5
    duplicate: Decision | None = None
    taken = guards.every_commit_takes_a_number or numbers.previous != row.last_seq
    if guards.duplicates_recognised and numbers.last <= row.last_seq and taken:
        if original is not None:
            duplicate = Decision(DUPLICATE, original.result)
        elif row.remembered and numbers.last >= row.remembered[0].last:
            duplicate = Decision(SEQUENCE_CONFLICT)
        else:
            duplicate = Decision(DUPLICATE)
    if duplicate is not None and (guards.duplicates_before_refusals or later is None):
        return duplicate, recorded
    # 6
    if guards.sequence_compared and numbers.previous != row.last_seq and duplicate is None:
        return (Decision(SEQUENCE_GAP, row.last_seq) if guards.gaps_refused else Decision(OK, 0)), recorded
    # 7
    return later, recorded or (later is None and guards.connection_fence)


def applied(row: Row, numbers: Numbers, asker: int, content: Content, result: int, remembered: int) -> Row:
    """Rule 8: the row after the commit; and who may never come here."""
    if row.producer_id != numbers.producer_id:
        raise Violation(OLD_LIFE_APPENDS)
    if row.epoch != numbers.epoch:
        raise Violation(FENCED_APPENDS)
    if row.holder != asker:
        raise Violation(TWO_HOLDERS)
    results = (*row.remembered, Remembered(numbers.last, content, result))[-remembered:]
    return row._replace(last_seq=numbers.last, remembered=results)


# ------------------------------------------------------------------------------------------------ the disk

Store = TypeVar("Store")
Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Disk(NamedTuple, Generic[Store, Reply]):
    """Group commit: one group is being written while the next is decided. Replies keep a connection serial."""

    durable: Store
    writing: Store | None
    writing_replies: tuple[tuple[int, Reply], ...]
    decided: Store
    decided_replies: tuple[tuple[int, Reply], ...]

    def decide(self, store: Store, serial: int, reply: Reply | None, waits: bool) -> tuple[Disk[Store, Reply], bool]:
        """`store` is decided, and `reply` says so. Returns (the disk, does the reply leave now?).

        Rule 9: a reply rests on everything decided so far. What is being decided belongs to the group being built, else
        to the one being written; if there is neither, the reply saw nothing undurable. `waits` False breaks that rule.
        """
        leaves = reply is not None and not waits
        kept = () if reply is None or leaves else ((serial, reply),)
        building = store != (self.durable if self.writing is None else self.writing)
        if building:
            return self._replace(decided=store, decided_replies=self.decided_replies + kept), leaves
        if self.writing is not None:
            return self._replace(decided=store, writing_replies=self.writing_replies + kept), leaves
        return self._replace(decided=store), reply is not None

    def can_begin(self) -> bool:
        """Is there a group to write, and nothing being written?"""
        return self.writing is None and (self.decided_replies != () or self.decided != self.durable)

    def begin(self) -> Disk[Store, Reply]:
        """The group that was decided goes to the disk; the next one starts empty."""
        return Disk(self.durable, self.decided, self.decided_replies, self.decided, ())

    def complete(self) -> Disk[Store, Reply]:
        """The group is durable. Its replies are the caller's to send."""
        assert self.writing is not None
        return Disk(self.writing, None, (), self.decided, self.decided_replies)

    def forget(self, serials: set[int]) -> Disk[Store, Reply]:
        """Those connections are gone: nobody is there to take their replies."""
        if not any(serial in serials for serial, _ in (*self.writing_replies, *self.decided_replies)):
            return self
        return self._replace(
            writing_replies=tuple([one for one in self.writing_replies if one[0] not in serials]),
            decided_replies=tuple([one for one in self.decided_replies if one[0] not in serials]),
        )

    def lose(self) -> Disk[Store, Reply]:
        """A crash, or rule 13: only what is durable is left."""
        return Disk(self.durable, None, (), self.durable, ())


# -------------------------------------------------------------------------------------------- the connections


class Connection(NamedTuple, Generic[Request, Reply]):
    """A connection as both ends see it. One that is closed may still have requests that the broker reads late."""

    owner: int
    serial: int
    """Rule 4: given when it is made, rising."""
    open: bool
    requests: tuple[Request, ...]
    replies: tuple[Reply, ...]


Connections = tuple[Connection[Request, Reply], ...]


def connected(
    connections: Connections[Request, Reply], owner: int, disk: Disk[Store, Reply], serial_newest: int
) -> Connections[Request, Reply]:
    """A new connection, with a serial above all that anybody still remembers."""
    serials = [serial for serial, _ in (*disk.writing_replies, *disk.decided_replies)]
    serial = max([serial_newest, *serials, *[one.serial for one in connections]]) + 1
    return (*connections, Connection(owner, serial, True, (), ()))


def asked(connections: Connections[Request, Reply], owner: int, request: Request) -> Connections[Request, Reply]:
    """`owner` sends a request on its open connection."""
    return tuple(
        [
            one._replace(requests=(*one.requests, request)) if one.open and one.owner == owner else one
            for one in connections
        ]
    )


def replied(
    connections: Connections[Request, Reply], replies: tuple[tuple[int, Reply], ...], old_too: bool
) -> Connections[Request, Reply]:
    """Replies arrive at the client. Those for a closed connection are lost, or (`old_too`) arrive all the same."""
    for serial, reply in replies:
        connections = tuple(
            [
                one._replace(replies=(*one.replies, reply)) if one.serial == serial and (one.open or old_too) else one
                for one in connections
            ]
        )
    return connections


def cut(connections: Connections[Request, Reply], owner: int, old_too: bool) -> Connections[Request, Reply]:
    """The open connection of `owner` is gone. Its replies are lost; its requests may still be read."""
    return tuple(
        [
            one._replace(open=False, replies=one.replies if old_too else ()) if one.open and one.owner == owner else one
            for one in connections
            if not one.open or one.owner != owner or one.requests or (old_too and one.replies)
        ]
    )


def serials_of(connections: Connections[Request, Reply], owner: int) -> set[int]:
    """The open connection of `owner`, if there is one, by its serial."""
    return {one.serial for one in connections if one.open and one.owner == owner}


def serial_needed(connections: Connections[Request, Reply], serial_newest: int) -> int:
    """A serial is worth remembering only while there is an older connection that it could refuse; otherwise 0."""
    return serial_newest if any(one.serial < serial_newest for one in connections) else 0


Item = TypeVar("Item")


def replaced(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    """The tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])
