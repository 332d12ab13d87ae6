"""Members of consumer groups: what a client's shell does with a `Membership`, and the handlers on top of it.

A member keeps one heartbeat under way, holds partitions of several topics, fetches, handles for a while and moves the
positions: a `Worker` with its outputs in one transaction, a `Mover` by plain commits. Some inputs kill the process
that handles them; a worker counts its attempts as a retry policy would, and moves past the killer with a dead letter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from idemq.broker.groups import OffsetKey
from idemq.client import wire
from idemq.client.errors import IdemqError
from idemq.client.membership import Membership
from idemq.client.wire import TopicPartition

from .apps import App, Called, Follower, Loader, Sender, Sending, source_of
from .oracle import Ask, Input, Transaction

if TYPE_CHECKING:
    from idemq.client.session import _Call

    from .world import Process, World

INPUTS = ("t0", "t3")
FETCH_BYTES = 300


class Place:
    """A partition that a member holds."""

    __slots__ = ("attempts", "granted_at", "is_revoked", "key", "lease", "next", "suspects_end", "turns")

    def __init__(self, lease: wire.Lease, now: float) -> None:
        self.granted_at = now
        self.key = TopicPartition(lease.topic_id, lease.partition)
        self.lease = lease.lease
        self.next = lease.next
        self.attempts = lease.attempts
        self.suspects_end = lease.suspects_end
        self.is_revoked = False
        self.turns = 0
        """How often an attempt was said to begin or to have ended: odd, while one is under way."""


class Block:
    """What is handled together."""

    __slots__ = ("is_cut_short", "is_dead_letter", "messages", "moves")

    def __init__(self) -> None:
        self.moves: list[tuple[Place, int, int]] = []
        """(place, start, end)"""
        self.messages: list[Input] = []
        self.is_dead_letter = False
        self.is_cut_short = False


class Member(App):
    """One subscription."""

    supervised = True
    pause_s = 0.2
    group = ""
    promises = False
    """Are its attempts counted?"""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__(world, process)
        self.member = ""
        self.membership: Membership | None = None
        self.topic_ids: list[int] = []
        self.places: dict[TopicPartition, Place] = {}
        self.block: Block | None = None
        """In hand."""
        self.busy = False
        self.stopping = False
        self.renewing = False
        self.member_timeout_ms = 1000
        self._heartbeat: _Call | None = None
        # Who is on the first client takes all; the others may want one topic.
        both = process.number in (0, 3)
        self.inputs = INPUTS if both else self.rng.choice((INPUTS, INPUTS, INPUTS[:1], INPUTS[1:]))

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.member} on client {self.process.number}"

    def twin(self, process: Process) -> App:
        return type(self)(self.world, process)

    @property
    def done(self) -> bool:
        return self.outstanding == 0 and self.asking == 0 and not self.busy and self.is_caught_up()

    def is_caught_up(self) -> bool:
        """Is all input taken?"""
        life = self.world.oracle.life
        for topic in self.world.store.topics():
            if topic.name in INPUTS and not topic.deleted:
                for index in range(len(topic.floors)):
                    row = life.offsets.get(OffsetKey(self.group, topic.topic_id, index))
                    if row is None or row.next < len(life.logs.get((topic.topic_id, index), ())):
                        return False
        return True

    def act(self, healed: bool) -> None:
        if not self.ready():
            if self.over:
                self.leave()
            return
        known = [topic.topic_id for name in self.inputs if (topic := self._topic(name)) is not None]
        if self.membership is None:
            if known:
                self._join(known)
        elif self.busy:
            return
        elif self.stopping:
            self.leave()
            self._replace(1.0)
        elif self.renewing or known != self.topic_ids:
            self.leave()
        else:
            self._next()

    def _topic(self, name: str) -> Any:
        topic = self.session.topic(self.world.now, name)
        if topic is None:
            self.session.look_up(self.world.now, name, None, inf)
        return topic

    # ---------------------------------------------------------------------------------------------- membership

    def _join(self, topic_ids: list[int]) -> None:
        world = self.world
        world.session_number += 1
        self.member = f"m{world.session_number}"
        self.topic_ids = topic_ids
        start_ms, start_offset = self.rng.choice(((0, None), (0, None), (int(world.wall_s * 1000), None), (0, 1)))
        if world.healed:
            start_ms, start_offset = 0, None
        world.oracle.starts.setdefault(self.group, []).append((start_ms, start_offset))
        self.membership = Membership(self.group, self.member, topic_ids, start_ms, start_offset)
        self.renewing = False
        self.beat()

    def beat(self) -> None:
        """Say how things are; a report that still waits is not waited for any more."""
        if self.membership is None:
            return
        self.session.forget(self._heartbeat)
        self.membership.in_hand_max = self.world.in_hand_max if self.promises else 0
        report = self.membership.report(self.rng.choice((0, 1, 1, 1)) * self.member_timeout_ms // 3)
        told = partial(self._told, self.membership, report.wait_ms)
        self._heartbeat = self.session.call(self.world.now, report, Called(told), inf)

    def _beat_later(self, seconds: float) -> None:
        membership = self.membership

        def beat() -> None:
            if self.membership is membership and self._heartbeat is None:
                self.beat()

        self.world.after(seconds, self.world.turn, self.process, beat)

    def _told(self, membership: Membership, waited_ms: int, answer: Any) -> None:
        if self.membership is not membership:
            return
        self._heartbeat = None
        if isinstance(answer, IdemqError):
            if answer.code in ("UNKNOWN_TOPIC", "BAD_REQUEST"):  # or a start beyond the end
                self._look_up()
            self._beat_later(0.2)
            return
        self.member_timeout_ms = answer.member_timeout_ms
        changes = membership.take(answer)
        for key in changes.lost:
            self.places.pop(key, None)
        for lease in changes.granted:
            place = Place(lease, self.world.now)
            self.places[place.key] = place
        for key in changes.revoked:
            if key in self.places:
                self.places[key].is_revoked = True
            else:
                membership.give_back(key)
        if self._give_back() or any(changes) or waited_ms:
            self.beat()
        else:
            self._beat_later(self.rng.random() * self.member_timeout_ms / 3000)
        if changes.granted:
            self._go_on()

    def _give_back(self) -> bool:
        """Whatever is revoked and not in hand."""
        assert self.membership is not None
        in_hand = [place for place, _, _ in self.block.moves] if self.block is not None else []
        revoked = [place for place in self.places.values() if place.is_revoked and place not in in_hand]
        for place in revoked:
            self.membership.give_back(place.key)
            del self.places[place.key]
        return bool(revoked)

    def leave(self) -> None:
        """Leave in good order. What is still under way gets its answer."""
        membership, self.membership = self.membership, None
        self.places.clear()
        if membership is not None:
            self.session.forget(self._heartbeat)
            self._heartbeat = None
            membership.leave()
            self.session.call(self.world.now, membership.report(0), Called(_heard), self.world.now + 2.0)

    def _look_up(self) -> None:
        """A topic is not what it was."""
        self.renewing = True
        for name in self.inputs:
            self.session.look_up(self.world.now, name, None, inf)

    def _seek(self, place: Place) -> None:
        self.busy = True
        to = self.rng.randint(0, place.next)
        assert self.membership is not None
        request = wire.Seek(self.group, *place.key, self.world.nonce(), place.lease, to, self.member)
        self.ask(request, partial(self._sought, self.membership, place))
        if self.rng.random() < 0.5:
            # It is done, and this member learns of it when another holds the partition, perhaps.
            self.world.cut_off(self.process)

    def _sought(self, membership: Membership, place: Place, answer: Any) -> None:
        self.busy = False
        if type(answer) is wire.Sought and membership is self.membership:
            now = self.places.get(place.key)
            if now is not None and now.lease < answer.lease:
                membership.sought(place.key, answer.lease)
                lease = wire.Lease(*place.key, answer.lease, answer.next, 0, 0, None)
                self.places[place.key] = Place(lease, self.world.now)

    # ------------------------------------------------------------------------------------------------ handling

    def _fetch(self) -> None:
        places = [place for place in self.places.values() if not place.is_revoked]
        if self.world.healed:  # to look where nothing is takes only time
            logs = self.world.oracle.life.logs
            places = [place for place in places if place.next < len(logs.get(place.key, ()))]
        suspects = [place for place in places if self.is_suspect(place)]
        if suspects and self.rng.random() < 0.9:
            places = [self.rng.choice(suspects)]
        else:
            places = [place for place in places if place not in suspects and self.rng.random() < 0.8]
        if places:
            self.busy = True
            bytes_max = 1 << 20 if self.world.healed else FETCH_BYTES
            fetch = wire.Fetch([wire.Range(*place.key, place.next) for place in places], bytes_max, 0)
            self.ask(fetch, partial(self._fetched, places), 5.0)

    def is_suspect(self, place: Place) -> bool:
        """Is its next message to be handled with nothing else in hand?"""
        return False

    def _fetched(self, places: list[Place], answer: Any) -> None:
        block = Block()
        if not isinstance(answer, IdemqError):
            reply, payload = answer
            start = 0
            for part in reply.parts:
                end = 0
                for offset, _, length in part.batches:
                    end = offset + wire.BATCH_HEADER.unpack_from(payload, start)[3]
                    start += length
                place = self.places.get(TopicPartition(part.topic_id, part.partition))
                if part.code == "UNKNOWN_TOPIC":
                    self._look_up()
                elif place in places and not place.is_revoked:
                    self._take(block, place, part.earliest if part.code else end, skipping=bool(part.code))
        if block.moves:
            self.block = block
            self.handle(block)
        else:
            self.busy = False

    def _take(self, block: Block, place: Place, end: int, skipping: bool) -> None:
        """Hand out what was fetched of a partition up to this end."""
        start = place.next
        if end <= start:
            return
        if not skipping:
            in_hand_max = self.world.in_hand_max
            count = in_hand_max if self.world.healed else self.rng.randint(1, in_hand_max)
            end = start + 1 if self.is_suspect(place) else min(end, start + count)
            key = OffsetKey(self.group, *place.key)
            block.messages += [Input(key, offset) for offset in range(start, end)]
        block.moves.append((place, start, end))

    def handle(self, block: Block) -> None:
        """Work on these."""
        raise AssertionError("each has its own")

    def ended(self, block: Block, answer: Any) -> None:
        """What became of a block: its answer, or None when it did not come so far."""
        if self.block is block:
            self.block = None
            self.busy = False
        if self.membership is None:
            return
        lost = False
        for place, _, end in block.moves:
            if answer is not None and place.granted_at < self.process.asleep_until < self.world.now:
                what = answer.code if isinstance(answer, IdemqError) else "it is done"
                self.world.count(f"member: commits after it slept, {what}")
            if self.places.get(place.key) is not place:
                continue
            if isinstance(answer, IdemqError):
                named = (answer.details.get("topic_id"), answer.details.get("partition")) == place.key
                if answer.code == "OFFSET_CONFLICT" and named:
                    # Whatever moved it, no attempt at what is next there is stored.
                    place.next, place.attempts = int(answer.details["next"] or 0), 0
                elif answer.code == "LEASE_LOST" and named:
                    del self.places[place.key]
                    lost = True
            elif answer is not None and end > place.next:
                place.next, place.attempts = end, 0
        if self._give_back() or lost:
            self.beat()
        self.world.after(0.01, self.world.turn, self.process, self._go_on)

    def _go_on(self) -> None:
        """What a loop does after a block, and when it was granted something."""
        if self.membership is not None and not (self.busy or self.over or self.stopping or self.renewing):
            self._next()

    def _next(self) -> None:
        """The next block; or the position is set."""
        if self.places and not self.world.healed and self.rng.random() < 0.1:
            self._seek(self.rng.choice(list(self.places.values())))
        else:
            self._fetch()


class Worker(Sending, Member):
    """Consumes, processes and produces in one transaction."""

    group = "worker"
    promises = True

    def __init__(self, world: World, process: Process) -> None:
        world.session_number += 1
        super().__init__(world, process, f"~{world.session_number}", anonymous=True)

    def topic(self) -> tuple[str, int | None]:
        return self.rng.choice(("t1", "t2")), 0

    def twin(self, process: Process) -> App:
        return Worker(self.world, process)

    def is_suspect(self, place: Place) -> bool:
        return place.next < place.suspects_end or place.attempts > 0

    def handle(self, block: Block) -> None:
        world, place = self.world, block.moves[0][0]
        if not block.messages or not self.is_suspect(place):
            self._begin(block)
        elif place.attempts >= world.oracle.attempts_max:
            block.is_dead_letter = True
            world.count("member: moves past what kills it")
            self._finish(block)
        elif place.next < place.suspects_end:
            # Stored before it begins: whoever kills its worker now is counted, and nobody else is.
            self._tell(place, partial(self._attempted, block, place), begins=True)
        else:
            self._begin(block)

    def _tell(self, place: Place, then: Callable[[Any], None], begins: bool = False) -> None:
        """Store how often the next message was tried in vain, and that an attempt begins, or that none is under way."""
        place.turns += place.turns % 2 + begins
        entry = wire.Offset(
            self.group, *place.key, place.lease, place.next, place.next, None, place.attempts, place.turns
        )

        def told(answer: Any) -> None:
            self.world.oracle.moved_plainly(self.session, [entry], answer)
            then(answer)

        self.ask(wire.Commit(0, 0, -1, -1, [], [entry]), told, 5.0)

    def _attempted(self, block: Block, place: Place, answer: Any) -> None:
        if block.is_cut_short:
            return
        if type(answer) is wire.Committed and self.places.get(place.key) is place:
            self._begin(block)
        else:
            self.ended(block, answer if isinstance(answer, IdemqError) else None)

    def act(self, healed: bool) -> None:
        block = self.block
        place = None if block is None else block.moves[0][0]
        if block is not None and place is not None and place.turns % 2 and not healed and self.rng.random() < 0.5:
            self._cut_short(block, place)
        super().act(healed)

    def _fetch(self) -> None:
        if not self.is_weary:
            super()._fetch()

    def _cut_short(self, block: Block, place: Place) -> None:
        """An attempt comes to no end: its worker stops in the middle, gives back what it is at, or goes on."""
        if self.places.get(place.key) is not place or self.outstanding:
            return
        block.is_cut_short = True
        if not self.stopping and not place.is_revoked and self.rng.random() < 0.4:
            self.world.count("member: goes on after an attempt that was cut short")
            self.ended(block, None)
            return
        self.block, self.busy = None, False
        if self.stopping:
            self.world.count("member: leaves in the middle of an attempt")
        else:
            self.world.count("member: gives back in the middle of an attempt")
            place.is_revoked = True  # or it does so unasked, and is told again
            self.ended(block, None)

    def ended(self, block: Block, answer: Any) -> None:
        place = block.moves[0][0]
        if isinstance(answer, IdemqError | None):
            if place.turns % 2 and self.block is block and self.places.get(place.key) is place:
                # Nothing else begins before it is known that this is over.
                self._tell(place, lambda _: self.ended(block, answer))
                return
        else:
            place.turns += place.turns % 2
        super().ended(block, answer)

    def _fail(self, block: Block) -> None:
        place = block.moves[0][0]
        if block.is_cut_short:
            return
        if self.places.get(place.key) is not place or self.block is not block:
            self.ended(block, None)
            return
        self.world.count("member: fails to handle a message")
        place.attempts += 1
        self._tell(place, lambda _: self.ended(block, None))

    def _die(self, block: Block) -> None:
        if not block.is_cut_short:
            self.world.note(f"{self} dies of what it handles")
            self.world.count("member: dies of what it handles")
            self.world.die(self.process)

    def _begin(self, block: Block) -> None:
        world = self.world
        alone = len(block.messages) == len(block.moves) == 1
        under_way = block.moves[0][0].turns % 2
        seconds = self.rng.random() * (0.02 if world.healed else self.rng.choice((0.0, 0.0, 0.0, 0.1, 0.3, 1.0)))
        if under_way and self.is_weary:
            block.is_cut_short = True
            self.ended(block, None)
            return
        if under_way and not world.healed:
            seconds = max(seconds, self.rng.choice((0.0, 0.3, 0.6, 1.2)))  # so that something comes between
        life = world.oracle.lives[self.session.incarnation]
        numbers = [life.logs[key.topic_id, key.partition][offset] for key, offset in block.messages]
        if any(world.is_poison(number) for number in numbers):
            world.after(seconds, world.turn, self.process, partial(self._die, block))
        elif alone and not world.healed and self.rng.random() < (0.25 if under_way else 0.1):
            world.after(seconds, world.turn, self.process, partial(self._fail, block))
        else:
            world.after(seconds, world.turn, self.process, partial(self._finish, block))

    def _finish(self, block: Block) -> None:
        if block.is_cut_short:
            return
        if self.over or self.producer.error is not None:
            self.ended(block, None)
            return
        offsets = [wire.Offset(self.group, *place.key, place.lease, start, end) for place, start, end in block.moves]
        outputs = [(message, block.is_dead_letter) for message in block.messages]
        self.transact(len(outputs), False, offsets, outputs, block)

    def undecided(self, what: Ask | Transaction) -> None:
        # A second run of a block whose outcome comes late: it must be refused, or it is the first.
        block = what.block if isinstance(what, Transaction) else None
        if block is not None and self.block is block and self.rng.random() < 0.5:
            self.world.count("member: a second run while the outcome of the first is unknown")
            self.block = None
            self.busy = False

    def decided(self, what: Ask | Transaction, value: Any) -> None:
        self.failed = False
        assert isinstance(what, Transaction)
        block: Block = what.block
        self.ended(block, value)
        # And one whose outcome was believed lost.
        if isinstance(value, list) and not self.world.healed and self.rng.random() < 0.1:
            for place, start, _ in block.moves:
                place.next = start


class Mover(Member):
    """Commits positions without a producer, several at a time."""

    group = "mover"

    def handle(self, block: Block) -> None:
        moves = [
            wire.Offset(self.group, *place.key, place.lease, start, end, b"%d" % end)
            for place, start, end in block.moves
        ]
        commits = [moves]
        if not self.world.healed and self.rng.random() < 0.5:
            # One by one, and the last of them may be an old one: a position never goes back.
            commits = [[move._replace(end=end)] for move in moves for end in range(move.start + 1, move.end + 1)]
            commits += [[move._replace(start=at, end=at)] for move in moves if (at := self.rng.randint(0, move.start))]
        left = len(commits)
        error: IdemqError | None = None

        def moved(entries: list[wire.Offset], answer: Any) -> None:
            nonlocal left, error
            self.world.oracle.moved_plainly(self.session, entries, answer)
            left -= 1
            if isinstance(answer, IdemqError):
                error = answer
            if not left:
                self.ended(block, error if error is not None else answer)

        for entries in commits:
            self.ask(wire.Commit(0, 0, -1, -1, [], entries), partial(moved, entries), 5.0)


def _heard(answer: Any) -> None:
    """Nobody minds what became of it."""


# --------------------------------------------------------------------------------------------- who runs where


def apps_of(world: World, process: Process) -> list[App]:
    """What runs on a client."""
    number = process.number
    if number == 0:
        return [
            Loader(world, process, source_of(world, "load0")),
            Sender(world, process, "counted"),
            Worker(world, process),
        ]
    if number == 1:
        return [
            Loader(world, process, source_of(world, "load1")),
            Sender(world, process, "anonymous"),
            Worker(world, process),
        ]
    if number == 2:
        return [Sender(world, process, "plain"), Follower(world, process), Sender(world, process, "anonymous")]
    if number == 3:
        return [Mover(world, process), Sender(world, process, "counted"), Follower(world, process)]
    return [
        Mover(world, process),
        Sender(world, process, "anonymous"),
        Loader(world, process, source_of(world, "load0")),
    ]
