"""The world: clients, network, broker, disk and faults, on one clock and one seeded generator.

The production `Session` and `Core` run here unchanged; messages travel as objects, batches as their real bytes.
Everything that happens is an entry of one heap, so that a seed is a whole run. Two phases: with faults, in
which nothing wrong may happen, then healed, in which everything must end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from idemq.broker.core import Connection, Core, Group, Limits, Now, Read, Reply
from idemq.broker.fetches import collect
from idemq.broker.store import MemoryStore, StoreBroken
from idemq.client import wire
from idemq.client.session import Session, SessionConfig
from idemq.client.wire import Failed

from .apps import TOPICS, App, Loader, Sending, admin, probe
from .members import Member, apps_of
from .oracle import Life, Oracle, Source, Violation

if TYPE_CHECKING:
    from _typeshed import SupportsLenAndGetItem

Option = TypeVar("Option")

OPERATIONS = 300
FAULTS = 12
HEALED_S_MAX = 60.0
"""Once healed, everything must have ended after so long."""
IN_HAND_MAX = 8
"""Messages that a member works on at once, of each partition."""


class Rng(random.Random):
    """Draws from a few options, which is nearly all that happens here, at a third of the cost."""

    def choice(self, options: SupportsLenAndGetItem[Option]) -> Option:
        return options[int(self.random() * len(options))]

    def randint(self, first: int, last: int) -> int:
        return first + int(self.random() * (last + 1 - first))


class Link:
    """One connection: two directions, each in order, each with what a fault does to it."""

    __slots__ = (
        "asked",
        "core",
        "down_at",
        "down_count",
        "down_from",
        "down_kept",
        "peer",
        "process",
        "up_at",
        "up_count",
        "up_done",
        "up_from",
        "up_kept",
    )

    def __init__(self, process: Any, core: Core, peer: Connection) -> None:
        self.process = process
        self.core = core
        self.peer = peer
        self.asked: dict[int, Any] = {}
        self.up_at = self.down_at = 0.0
        """When the last message arrives."""
        self.up_from = self.down_from = 0.0
        """Nothing arrives before."""
        self.up_count = self.down_count = self.up_done = 0
        self.up_kept = self.down_kept = 1 << 60
        """Messages from this one on are lost."""


class Process:
    """A client process: one session and the applications on it."""

    __slots__ = ("apps", "asleep_until", "cut_off_until", "link", "number", "session", "timer_at", "world")

    def __init__(self, world: World, number: int, session: Session) -> None:
        self.world = world
        self.number = number
        self.session = session
        self.link: Link | None = None
        self.timer_at = inf
        self.asleep_until = self.cut_off_until = 0.0
        """Until then it does nothing; no dial of its own succeeds."""
        self.apps: list[App] = []


class World:
    """See the file's head. `run()` plays one seed and raises Violation."""

    session_class: type[Session] = Session
    core_class: type[Core] = Core

    def __init__(self, seed: int, trace: list[str] | None = None) -> None:
        self.seed = seed
        self.trace = trace
        self.rng = rng = Rng(seed)
        self.random = rng.random
        self.now = 0.0
        self.wall_s = 1_700_000_000.0
        self.events: list[tuple[float, int, Callable[[Any, Any], None], Any, Any]] = []
        self.event_number = 0
        self.healed = False
        self.operations = 0
        self.faults = 0
        self.commits = 0
        self.kinds: dict[str, int] = {}
        """Faults by kind."""
        # What this seed is like.
        self.latency_s = rng.choice((0.001, 0.005, 0.03))
        self.disk_s = rng.choice((0.002, 0.02, 0.1))
        self.fault_every_s = rng.choice((0.08, 0.12, 0.2))
        self.anonymous_idle_ms = rng.choice((5_000, 3600_000))
        self.group_bytes_max = rng.choice((1 << 20, 1 << 20, 25_000))
        self.fetches_max = rng.choice((1, 8))
        self.quota = rng.random() < 0.2
        self.may_restore = rng.random() < 0.25
        self.batch_bytes = rng.choice((30, 100, 400))
        self.in_flight = rng.choice((1, 3, 8, 16))
        self.linger_s = rng.choice((0.0, 0.0, 0.02))
        self.timeout_s = rng.choice((1.0, 5.0, 30.0))
        self.member_timeout_ms = rng.choice((300, 500, 1_000))
        self.release_ms_max = rng.choice((50, 50, 1_000))
        self.in_hand_max = rng.choice((1, 3, IN_HAND_MAX))
        self.poison_every = rng.choice((0, 0, 15, 40))

        self.incarnations = 1
        self.store = MemoryStore(b"store-%d" % self.incarnations)
        self.remember = rng.choice((2, 3, 8, wire.REMEMBERED))
        self.oracle = Oracle(self.store.incarnation(), self.remember)
        self.oracle.attempts_max = rng.choice((1, 2, 3))
        self.copy: tuple[MemoryStore, Life] | None = None
        self.full = False
        self.core = self._new_core()
        self.up = True
        self.group: Group | None = None
        self.group_fails = False
        self.beginning = False
        self.links: dict[Connection, Link] = {}
        self.asked: dict[Connection, dict[int, Any]] = {}
        """Of every connection to this core the requests whose answers are judged, also of those closed since."""
        self.ambush = ""
        """What a fault waits for."""
        self.awaits_attempt = True
        """Another waits for an attempt that begins."""
        self.calm_until = 0.0
        """Until then no other fault happens and nothing heals: the member that one has ended is to be missed before the
        broker is."""
        self.sources: dict[str, Source] = {}
        self.processes: list[Process] = []
        self.session_number = 0
        self.prober: Link | None = None
        self._ticks(None, None)
        # The topics are there before anybody comes.
        peer = self.core.connect("setup")
        assert isinstance(peer, Connection)
        self.core.step(self.clock(), peer, 1, wire.Hello(wire.VERSION, "setup"), b"")
        for name in TOPICS:
            self.core.step(self.clock(), peer, 1, wire.CreateTopic(name, rng.choice((1, 2)), wire.Settings()), b"")
        group = self.core.begin()
        assert group is not None
        self._durable(group)
        self.core.disconnect(peer)
        for number in range(rng.choice((3, 4, 5))):
            self._start(number)
        self.after(rng.random() * self.fault_every_s, self._fault, None, None)
        self.after(0.3, self._administer, None, None)

    # --------------------------------------------------------------------------------------------------- time

    def after(self, seconds: float, what: Callable[[Any, Any], None], one: Any, two: Any) -> None:
        """Do this then."""
        self.event_number += 1
        heappush(self.events, (self.now + seconds, self.event_number, what, one, two))

    def at(self, when: float, what: Callable[[Any, Any], None], one: Any, two: Any) -> None:
        """Do this at that time."""
        self.event_number += 1
        heappush(self.events, (when, self.event_number, what, one, two))

    def clock(self) -> Now:
        """The broker's clocks."""
        return Now(int(self.now * 1000) + 1, int((self.wall_s + self.now) * 1000))

    def nonce(self) -> str:
        """A name that nothing else has."""
        self.session_number += 1
        return f"n{self.session_number}"

    def count(self, what: str) -> None:
        """For coverage: this happened."""

    def note(self, text: str) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {text}")

    def run(self) -> None:
        """Play the seed."""
        events = self.events
        while self.operations < OPERATIONS or self.faults < FAULTS or self.now < self.calm_until:
            self.now, _, what, one, two = heappop(events)
            what(one, two)
        self._heal()
        deadline = self.now + HEALED_S_MAX
        self.at(self.now + 0.5, self._look_whether_done, None, None)
        while self.now < deadline and not self.finished:
            self.now, _, what, one, two = heappop(events)
            what(one, two)
        if not self.finished:
            raise Violation("not everything ended: " + "; ".join(self._unfinished()))
        self.oracle.compare(self.store)
        self._look_at_core()

    # ------------------------------------------------------------------------------------------------ clients

    def _start(self, number: int) -> None:
        """A client process starts, in the place of an earlier one of this number if there was one."""
        self.session_number += 1
        config = SessionConfig(
            session=f"s{self.session_number}",
            client=f"client {number}",
            answer_s_max=2.0,
            idle_s=1.5,
            retry_s_min=0.02,
            retry_s_max=0.5,
            topic_age_s_max=4.0,
        )
        session = self.session_class(config, random.Random(self.rng.getrandbits(32)))
        process = Process(self, number, session)
        if number < len(self.processes):
            self.processes[number] = process
        else:
            self.processes.append(process)
        self.note(f"client {number} starts as {config.session}")
        for app in apps_of(self, process):
            process.apps.append(app)
            self.after(self.random() * 0.1, self.act, process, app)

    def is_poison(self, number: int) -> bool:
        """Does this record kill the process that handles it as the input of a worker?"""
        return self.poison_every > 0 and number % self.poison_every == 3

    def restart(self, process: Process) -> None:
        """A process is gone, and another started in its place."""
        self._start(process.number)

    def die(self, process: Process) -> None:
        """A process ends without a word."""
        if self.alive(process):
            link, process.link = process.link, None
            if link is not None:
                self._abandon(link)
            self.oracle.died_at[process.session.config.session] = self.now
            self.restart(process)

    def turn(self, process: Process, what: Callable[[], None]) -> None:
        """Something that a process does, unless it died or sleeps."""
        if not self.alive(process):
            return
        if process.asleep_until > self.now:
            self.at(process.asleep_until, self.turn, process, what)
            return
        what()
        self.pump(process)

    def alive(self, process: Process) -> bool:
        """Is it the one that runs under its number?"""
        return self.processes[process.number] is process

    def act(self, process: Process, app: App) -> None:
        """An application's turn."""
        if not self.alive(process) or app.over:
            return
        if process.asleep_until > self.now:
            self.at(process.asleep_until, self.act, process, app)
            return
        app.act(self.healed)
        self.pump(process)
        self.after(app.pause_s * (0.2 + self.random()), self.act, process, app)

    def pump(self, process: Process) -> None:
        """Do what the session says: the shell of a client."""
        session, now = process.session, self.now
        while True:
            cut, dial, frames, completions = session.take(now)
            if frames and process.link is not None and not cut:
                self._send_up(process.link, frames)
            if cut:
                link, process.link = process.link, None
                if link is not None:
                    self.note(f"client {process.number} cuts")
                    self._abandon(link)
                session.disconnected(now, "given up")
            if dial:
                self.after(self.latency_s * (1 + self.random()), self._dialled, process, None)
            for waiter, value in completions:
                waiter.settled(value)
            if not (completions or cut):
                break
        if session.wake_at < process.timer_at:
            process.timer_at = session.wake_at
            self.at(max(session.wake_at, now), self._timer, process, session.wake_at)

    def _timer(self, process: Process, at: float) -> None:
        if process.timer_at == at and self.alive(process):
            if process.asleep_until > self.now:
                self.at(process.asleep_until, self._timer, process, at)
                return
            process.timer_at = inf
            process.session.tick(self.now)
            self.pump(process)

    def _dialled(self, process: Process, _: None) -> None:
        session = process.session
        if not self.alive(process) or session.state != "dialling":
            return
        if process.asleep_until > self.now:
            self.at(process.asleep_until, self._dialled, process, None)
            return
        reached = self.up and process.cut_off_until <= self.now
        peer = self.core.connect(f"address {process.number}") if reached else None
        if not isinstance(peer, Connection):
            session.disconnected(self.now, "nobody answers")
        else:
            process.link = Link(process, self.core, peer)
            self.links[peer] = process.link
            self.asked[peer] = process.link.asked
            session.connected(self.now)
        self.pump(process)

    def _abandon(self, link: Link) -> None:
        """A client closed its end. What it wrote may still arrive, some of it, late."""
        chance = self.random()
        if chance < 0.3:
            link.up_kept = min(link.up_kept, self.rng.randint(link.up_done, link.up_count))
        if chance > 0.5 and not self.healed:
            link.up_from = max(link.up_from, self.now + self.random() ** 2 * 1.5)
        self.at(max(link.up_from, link.up_at) + self.random() * 0.1, self._peer_lost, link, None)

    # ------------------------------------------------------------------------------------------------ network

    def _send_up(self, link: Link, frames: list[Any]) -> None:
        at = self.now + self.latency_s * (0.5 + self.random())
        if at < link.up_at:
            at = link.up_at
        link.up_at = at
        self.event_number += 1
        heappush(self.events, (at, self.event_number, self._arrived_up, link, (link.up_count, frames)))
        link.up_count += len(frames)
        if self.ambush:
            self._spring(link, frames)
        if self.awaits_attempt:
            self._spring_on_attempt(link, frames)

    def _arrived_up(self, link: Link, item: tuple[int, list[Any]]) -> None:
        number, frames = item
        core, peer = self.core, link.peer
        if number >= link.up_kept or link.core is not core or peer.closed:
            return
        if link.up_from > self.now:
            self.at(link.up_from, self._arrived_up, link, item)
            return
        clock = self.clock()
        outputs: list[Any] = []
        waits = False
        for correlation, request, payload in frames[: link.up_kept - number]:
            kind = type(request)
            if kind in JUDGED:
                link.asked[correlation] = request
            if self.trace is not None:
                self.note(f"{peer.client or peer.address} -> {correlation} {request}")
            output = core.step(clock, peer, correlation, request, b"".join(payload))
            if output is not None:
                outputs.append(output)
                if type(output) is Reply and output.close:
                    break
            elif kind is wire.Fetch:
                self.after(request.wait_ms / 1000 + 0.002, self._tick_soon, None, None)
            else:
                waits = True
                if kind is wire.Heartbeat and not self._is_refused(peer, correlation):
                    self.oracle.heard(request.member, self.now)
        link.up_done = number + len(frames)
        if outputs:
            self._send_down(peer, outputs)
        if waits and not self.beginning and self.group is None:
            if core._building.writes:
                self.beginning = True
                self.after(self.random() * 0.002, self._begin, None, None)
            else:
                self._begin(None, None)

    def _output(self, outputs: list[Any]) -> None:
        """These leave the broker: those of one connection together."""
        sent: dict[Connection, list[Any]] = {}
        for output in outputs:
            sent.setdefault(output.connection, []).append(output)
        for connection, of_one in sent.items():
            self._send_down(connection, of_one)

    def _send_down(self, connection: Connection, outputs: list[Any]) -> None:
        link = self.links.get(connection)
        if link is None or connection.closed:
            return
        messages: list[Any] = []
        close = False
        for output in outputs:
            if type(output) is Reply:
                _, correlation, message, close = output
                messages.append((correlation, message, b""))
                if correlation in link.asked and link.process is not None:
                    self._judge(link.asked.pop(correlation), message)
                if close:
                    break
            else:
                messages.append((output.correlation, *self._read(output)))
        if link.process is not None:
            at = self.now + self.latency_s * (0.5 + self.random())
            if at < link.down_at:
                at = link.down_at
            link.down_at = at
            self.at(at, self._arrived_down, link, (link.down_count, messages))
            link.down_count += len(messages)
        if close:
            self._close(link)

    def _is_refused(self, peer: Connection, correlation: int) -> bool:
        """Is that the answer which waits for the disk?"""
        groups = [self.core._building] if self.core._in_flight is None else [self.core._building, self.core._in_flight]
        replies = [group.replies[-1] for group in groups if group.replies]
        return any(reply[:2] == (peer, correlation) and type(reply.message) is Failed for reply in replies)

    def _judge(self, request: Any, message: Any) -> None:
        kind = type(message)
        if kind is wire.Opened:
            self.oracle.given_out(self.oracle.life, message.producer_id, message.epoch, request.session)
        elif kind is wire.Assignment:
            self.oracle.announced(request, message)
        elif kind is wire.Committed and message.positions is None:
            self.oracle.remembered(self.oracle.life, request)

    def _read(self, read: Read) -> tuple[wire.Fetched, bytes]:
        """What the server does with a Read."""
        parts, payload = collect(self.store.read, read, read.bytes_max)
        return wire.Fetched(parts), b"".join(payload)

    def _arrived_down(self, link: Link, item: tuple[int, list[Any]]) -> None:
        number, messages = item
        process = link.process
        if number >= link.down_kept or process.link is not link or not self.alive(process):
            return
        if link.down_from > self.now or process.asleep_until > self.now:
            self.at(max(link.down_from, process.asleep_until), self._arrived_down, link, item)
            return
        session = process.session
        for correlation, message, payload in messages[: link.down_kept - number]:
            if self.trace is not None:
                self.note(f"client {process.number} <- {correlation} {message}")
            session.received(self.now, correlation, message, payload)
        self.pump(process)

    def _lost(self, link: Link, _: None) -> None:
        """A client learns that its connection is gone."""
        process = link.process
        if process is not None and process.link is link and self.alive(process):
            if process.asleep_until > self.now:
                self.at(process.asleep_until, self._lost, link, None)
                return
            process.link = None
            self.note(f"client {process.number} lost its connection")
            process.session.disconnected(self.now, "connection lost")
            self.pump(process)

    def _peer_lost(self, link: Link, _: None) -> None:
        """The broker learns that a connection is gone."""
        if link.up_from > self.now:
            self.at(link.up_from + 0.001, self._peer_lost, link, None)
        elif link.peer in self.links:
            self._close(link)

    def _close(self, link: Link) -> None:
        """The broker's end closes; the client hears of it behind what was sent."""
        del self.links[link.peer]
        self.core.disconnect(link.peer)
        if link.process is not None:
            self.at(max(link.down_at, link.down_from, self.now) + 0.001, self._lost, link, None)
        else:
            self.prober = None

    def _close_all(self) -> None:
        for link in self.links.values():
            link.peer.closed = True
            if link.process is not None:
                if self.random() < 0.5:
                    link.down_kept = self.rng.randint(0, link.down_count)
                self.at(max(link.down_at, link.down_from, self.now) + self.random() * 0.1, self._lost, link, None)
        self.links.clear()
        self.prober = None

    # ------------------------------------------------------------------------------------------------- broker

    def _limits(self) -> Limits:
        healed = self.healed
        return Limits(
            store_bytes_headroom=1 << 20,
            anonymous_idle_ms=3600_000 if healed else self.anonymous_idle_ms,
            group_bytes_max=1 << 20 if healed else self.group_bytes_max,
            fetches_max=self.fetches_max,
            topics_max=5 if self.quota and not healed else 100,
            producers_max=8 if self.quota and not healed else 10_000,
            offsets_max=12 if self.quota and not healed else 10_000,
            group_members_max=2 if self.quota and not healed else 1_000,
            rows_cached_max=3,
            clock_pause_ms=2_000,
            remembered=self.remember,
            member_timeout_ms=400 if healed else self.member_timeout_ms,
            release_ms_max=2_000 if healed else self.release_ms_max,
        )

    def _new_core(self) -> Core:
        self.store.disk_bytes = 0 if self.full else 1 << 40
        self.asked = {}
        limits = self._limits()
        self.oracle.starts_anew(limits.member_timeout_ms / 1000)
        return self.core_class(self.store, limits)

    def _tick_soon(self, _one: None, _two: None) -> None:
        if self.up:
            outputs = self.core.tick(self.clock())[1]
            if outputs:
                self._output(outputs)

    def _ticks(self, _one: None, _two: None) -> None:
        due = self.now + 0.5
        if self.up:
            due_ms, outputs = self.core.tick(self.clock())
            due = max(min(due, due_ms / 1000), self.now + (0.001 if self.group is None else 0.02))
            if outputs:
                self._output(outputs)
            if (
                not self.beginning
                and self.group is None
                and (self.core._building.writes or self.core._building.replies)
            ):
                self.beginning = True
                self.after(0.0, self._begin, None, None)
        self.at(due, self._ticks, None, None)

    def _begin(self, _one: None, _two: None) -> None:
        self.beginning = False
        if not self.up or self.group is not None:
            return
        core = self.core
        while True:
            group = core.begin()
            if group is None:
                return
            if group.writes:
                break
            self._output(core.committed())
        self.group = group
        self.after(self.disk_s * (0.5 + self.random()), self._written, core, group)

    def _written(self, core: Core, group: Group) -> None:
        if core is not self.core or self.group is not group:
            return
        if self.group_fails:
            self.group_fails = False
            self.note("the group failed: nothing of it is stored")
            self._group_failed()
            return
        self._store(group)
        self.group = None
        self._output(core.committed())
        if not self.beginning:
            self.beginning = True
            self.after(self.random() * 0.001, self._begin, None, None)

    def _group_failed(self) -> None:
        """Rule 13."""
        self.group = None
        self._close_all()
        self.core = self._new_core()

    def _durable(self, group: Group) -> None:
        self._store(group)
        self.core.committed()

    def _store(self, group: Group) -> None:
        try:
            self.store.commit(group)
        except StoreBroken as error:
            raise Violation(f"the store is broken: {error}") from error
        if self.trace is not None:
            self.note(
                f"durable: {[(s.topic_id, s.partition, s.offset) for s in group.appends]} {list(group.producers)}"
            )
        self.commits += 1
        self.oracle.durable(group, self._asked, self.now)

    def _asked(self, connection: Connection, correlation: int) -> Any:
        """What was asked on this connection under this number."""
        return self.asked.get(connection, NOTHING).get(correlation)

    def _look_at_core(self) -> None:
        core = self.core
        if not self.up:
            return
        for key, partition in core._partitions.items():
            if not partition.earliest <= partition.durable_next <= partition.next:
                raise Violation(
                    f"{key}: {partition.earliest} <= {partition.durable_next} <= {partition.next} is not so"
                )
            if self.group is None and not core._building.writes and partition.durable_next != partition.next:
                raise Violation(f"{key}: nothing waits for the disk, and {partition.durable_next} < {partition.next}")

    # ------------------------------------------------------------------------------------------------- faults

    def _fault(self, _one: None, _two: None) -> None:
        if self.healed:
            return
        self._look_at_core()
        kind = self.rng.choice(FAULT_KINDS)
        if self.now >= self.calm_until and getattr(self, "_fault_" + kind)():
            self.faults += 1
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            self.note(f"fault: {kind}")
        self.after(self.fault_every_s * (0.5 + self.random()), self._fault, None, None)

    def _some_link(self) -> Link | None:
        links = [link for link in self.links.values() if link.process is not None]
        return self.rng.choice(links) if links else None

    def _fault_cut(self) -> bool:
        """A connection is cut: some of what is on its way is lost, what is not may come late."""
        link = self._some_link()
        if link is None:
            return False
        rng = self.rng
        link.down_kept = min(link.down_kept, link.down_count - rng.choice((0, 1, 2, 3)))
        link.up_kept = min(link.up_kept, rng.randint(link.up_done, link.up_count))
        if rng.random() < 0.6:
            link.up_from = max(link.up_from, self.now + rng.random() ** 2 * 1.5)
        self.after(rng.random() ** 3, self._lost, link, None)
        self.at(max(link.up_at, link.up_from, self.now) + rng.random(), self._peer_lost, link, None)
        return True

    def _fault_replies(self) -> bool:
        """What the broker answers from here on is lost, until the client cuts."""
        link = self._some_link()
        if link is not None:
            link.down_kept = min(link.down_kept, link.down_count)
        return link is not None

    def _fault_stall(self) -> bool:
        """A connection delivers nothing for a while: the client gives it up, its bytes arrive later."""
        link = self._some_link()
        if link is not None:
            link.up_from = max(link.up_from, self.now + self.random() ** 2 * 5)
            if self.random() < 0.5:
                link.down_from = max(link.down_from, link.up_from)
        return link is not None

    def _fault_crash(self) -> bool:
        """The broker dies, before or after the disk write, and comes back."""
        if not self.up:
            return False
        if self.group is not None and self.random() < 0.5:
            self._store(self.group)
        self._down()
        self.after(self.random() ** 2, self._restart, None, None)
        return True

    def _down(self) -> None:
        self.up = False
        self.group = None
        self.group_fails = False
        self._close_all()

    def _restart(self, _one: None, _two: None) -> None:
        if not self.up:
            self.up = True
            self.core = self._new_core()
            self.note("the broker is back")

    def _fault_group(self) -> bool:
        """The group commit in flight, or the next one, fails."""
        self.group_fails = self.up
        return self.up

    def _fault_full(self) -> bool:
        """The disk fills up, and somebody makes room later."""
        if self.full:
            return False
        self._fill(True)
        self.after(self.random() * 2, self._make_room, None, None)
        return True

    def _make_room(self, _one: None, _two: None) -> None:
        self._fill(False)

    def _fill(self, full: bool) -> None:
        self.full = full
        self.store.disk_bytes = 0 if full else 1 << 40
        self.note("the disk is full" if full else "the disk has room")

    def _fault_kill(self) -> bool:
        """A client dies and is started again."""
        self.die(self.rng.choice((*self.processes, *self.processes[:2])))  # those have workers
        return True

    def _fault_hang(self) -> bool:
        """Processes do nothing for longer than a member may be silent; their connections stay."""
        for process in self.rng.sample(self.processes, self.rng.choice((1, 1, len(self.processes)))):
            process.asleep_until = self.now + self.member_timeout_ms / 1000 * (0.6 + self.random())
        if self.random() < 0.3:
            # Others hold what it held, and give it back just before it wakes.
            process = self.rng.choice(self.processes)
            process.asleep_until = self.now + self.member_timeout_ms / 1000 * 1.1 + 0.4
            self.at(process.asleep_until - 0.25, self._leave_it, process, None)
        return True

    def _leave_it(self, process: Process, _: None) -> None:
        """Everybody stops who is in a group with a member of this process."""
        groups = [app.group for app in process.apps if isinstance(app, Member)]
        for other in self.processes:
            for app in other.apps:
                if other is not process and isinstance(app, Member) and app.group in groups:
                    app.stopping = True

    def _fault_cutoff(self) -> bool:
        """A process reaches nobody for a while, and goes on as if nothing were."""
        process = self.rng.choice(self.processes)
        link = process.link
        if link is not None:
            link.up_kept = min(link.up_kept, self.rng.randint(link.up_done, link.up_count))
        self.cut_off(process)
        return True

    def cut_off(self, process: Process) -> None:
        """It hears nothing from now on, and then loses its connection and gets no other for a while."""
        process.cut_off_until = self.now + self.member_timeout_ms / 1000 * (0.8 + self.random())
        link = process.link
        if link is not None:
            link.down_kept = min(link.down_kept, link.down_count)
            self.after(self.random() * 0.5, self._lost, link, None)
            self.at(max(link.up_at, link.up_from, self.now) + self.random(), self._peer_lost, link, None)

    def _fault_leave(self) -> bool:
        """Members of a group stop in good order, one or all, and others are started later."""
        members = [
            app for process in self.processes for app in process.apps if isinstance(app, Member) and not app.over
        ]
        if not members:
            return False
        first = self.rng.choice(members)
        everybody = self.random() < 0.5
        for member in members:
            if member is first or (everybody and member.group == first.group):
                member.stopping = True
        return True

    def _fault_ambush(self) -> bool:
        """Wait for a certain request, then have it arrive late, when its sender is gone or went on elsewhere."""
        self.ambush = self.rng.choice(("Open", "Heartbeat", "Seek", *("Commit",) * 5))
        return True

    def _spring(self, link: Link, frames: list[Any]) -> None:
        process = link.process
        requests = [request for _, request, _ in frames if type(request).__name__ == self.ambush]
        if self.ambush == "Commit":
            # A line of given numbers: when its head is refused for ever, those behind it are not stored either.
            given = [app.producer.id for app in process.apps if type(app) is Loader and not app.over]
            requests = [request for request in requests if request.producer_id in given and request.appends]
        if len(requests) < (2 if self.ambush == "Commit" else 1) or self.healed:
            return
        self.note(f"ambush on {self.ambush}")
        link.up_from = max(link.up_from, self.now + 0.05 + self.random() * 0.6)
        self.at(max(link.up_from, link.up_at) + 0.01, self._peer_lost, link, None)
        if self.ambush == "Commit":
            self.after(0.001, self._lost, link, None)
            self.after(0.0, self._probe_later, wire.DeleteTopic(requests[0].appends[0].topic_id), None)
        else:
            self.after(0.0, self._kill, process, None)
        self.ambush = ""

    def _spring_on_attempt(self, link: Link, frames: list[Any]) -> None:
        """That an attempt begins is told late: once more, when it has ended perhaps, or by one who died meanwhile. Or
        it is told in time, and broker and worker die together, or the worker leaves in good order."""
        requests = [request for _, request, _ in frames if type(request) is wire.Commit]
        if self.healed or not any(entry.turns % 2 for request in requests for entry in request.offsets):
            return
        self.note("ambush on an attempt that begins")
        self.awaits_attempt = False
        chance, timeout_s = self.random(), self.member_timeout_ms / 1000
        if chance < 0.1:
            for app in link.process.apps:
                if isinstance(app, Member):
                    app.stopping = True
            return
        self.calm_until = self.now + 1.0 + 1.5 * timeout_s
        if chance < 0.3:
            self.after(self.disk_s * 3, self._crash_with, link.process, None)
            return
        if chance < 0.6:
            link.up_from = max(link.up_from, self.now + 0.3 + 1.2 * timeout_s)
            self.after(0.0, self._kill, link.process, None)
            self.after(0.001, self._all_sleep, link.up_from + 0.05, None)
        else:
            link.up_from = max(link.up_from, self.now + 0.3 + self.random() * 0.6)
            self.after(0.001, self._lost, link, None)
            for app in link.process.apps:
                app.is_weary = True
            self.at(link.up_from + 0.1, self._kill, link.process, None)
        self.at(max(link.up_from, link.up_at) + 0.01, self._peer_lost, link, None)

    def _all_sleep(self, until: float, _: None) -> None:
        """Nobody does anything, and so nobody is granted anything."""
        for process in self.processes:
            process.asleep_until = until

    def _crash_with(self, process: Process, _: None) -> None:
        self._kill(process, None)
        if self.up:
            self._fault_crash()

    def _fault_attempt(self) -> bool:
        """Wait for an attempt that begins, and disturb it."""
        self.awaits_attempt = True
        return True

    def _probe_later(self, request: Any, _: None) -> None:
        if self.up:
            self.probe(request)

    def _kill(self, process: Process, _: None) -> None:
        if self.alive(process):
            process.link = None
            self.oracle.died_at[process.session.config.session] = self.now
            self.restart(process)

    def _fault_pause(self) -> bool:
        """Somebody else starts under a name while its holder only looks dead: two instances."""
        apps = [app for process in self.processes for app in process.apps if app.named and not app.over]
        if not apps:
            return False
        app = self.rng.choice(apps)
        process = self.rng.choice(self.processes)
        twin = app.twin(process)
        process.apps.append(twin)
        self.after(0.0, self.act, process, twin)
        return True

    def _fault_takeovers(self) -> bool:
        """A holder hears nothing while its name is taken again and again."""
        apps = [
            app
            for process in self.processes
            for app in process.apps
            if isinstance(app, Sending)
            and app.named
            and not app.over
            and app.producer.opened
            and process.link is not None
            and process.asleep_until <= self.now
        ]
        if not apps:
            return False
        app = self.rng.choice(apps)
        link = app.process.link
        assert link is not None
        link.down_kept = min(link.down_kept, link.down_count)
        app.act(self.healed)
        self.pump(app.process)
        if self.random() < 0.5:
            link.up_from = max(link.up_from, self.now + 0.6)
        count = self.rng.choice((1, 2, 6))
        for turn in range(count):
            self.after(0.03 + turn * 0.1, self._take_over, app, None)
        # Long enough, often, for the next holder to store more than is remembered.
        self.after(0.2 + count * 0.1 + self.random() ** 2 * 1.5, self._lost, link, None)
        return True

    def _take_over(self, app: App, _: None) -> None:
        others = [process for process in self.processes if process is not app.process]
        process = self.rng.choice(others)
        twin = app.twin(process)
        process.apps.append(twin)
        self.act(process, twin)

    def _fault_sleep(self) -> bool:
        """Everybody sleeps for longer than an anonymous producer lives."""
        self.wall_s += 6.0
        return True

    def _fault_clock(self) -> bool:
        """The wall clock jumps, forward or back."""
        self.wall_s += self.rng.choice((-1, 1)) * 100_000
        return True

    def _fault_restore(self) -> bool:
        """The store is copied, and later the copy put in its place."""
        if not self.may_restore or not self.up:
            return False
        if self.copy is None:
            self.copy = (self.store.copy(), self.oracle.life.copy())
            return False
        store, life = self.copy
        self.copy = None
        self.may_restore = False
        self._down()
        self.incarnations += 1
        self.store = store
        store._incarnation = b"store-%d" % self.incarnations
        self.oracle.restore(life, store._incarnation)
        self._restart(None, None)
        return True

    # ------------------------------------------------------------------------------------------ administration

    def _administer(self, _one: None, _two: None) -> None:
        """Topics come, change and go; producers are deleted; wrong requests are made."""
        if self.healed:
            return
        process = self.rng.choice(self.processes)
        admin(self, process)
        self.pump(process)
        if self.up:
            probe(self)
        self.after(self.random() * 0.4, self._administer, None, None)

    def probe_link(self) -> Link | None:
        """A connection without a client, for requests that no session makes."""
        if self.prober is None and self.up:
            peer = self.core.connect("prober")
            if not isinstance(peer, Connection):
                return None
            self.prober = Link(None, self.core, peer)
            self.links[peer] = self.prober
            self.asked[peer] = self.prober.asked
            self.core.step(self.clock(), peer, 1, wire.Hello(wire.VERSION, "prober"), b"")
        return self.prober

    def probe(self, request: Any, payload: bytes = b"") -> None:
        """Ask that now."""
        link = self.probe_link()
        if link is not None:
            link.up_count += 1
            self._arrived_up(link, (link.up_done, [(link.up_count + 1, request, (payload,))]))

    # ---------------------------------------------------------------------------------------------- the end

    finished = False

    def _heal(self) -> None:
        """No more faults; whoever is gone comes back."""
        self.note("healed")
        self.healed = True
        # Nothing is left to race with: what remains takes less time.
        self.latency_s, self.disk_s = 0.001, 0.002
        self.in_hand_max = IN_HAND_MAX
        self.poison_every *= 4
        self._fill(False)
        if self.up:
            self._down()
        self._restart(None, None)
        for process in list(self.processes):
            if process.session.error is not None:
                self.restart(process)
        for process in self.processes:
            process.asleep_until = process.cut_off_until = 0.0
            process.apps = [app for app in process.apps if not app.over]
        admin(self, self.processes[0])
        self.pump(self.processes[0])
        self.after(0.2, self._grow, None, None)

    def _grow(self, _one: None, _two: None) -> None:
        """A topic that members hold gets one more partition: somebody must get it, with no fault to help."""
        for topic in self.store.topics():
            if topic.name == "t0" and not topic.deleted:
                self.probe(wire.AlterTopic(topic.topic_id, len(topic.floors) + 1, wire.Settings()))

    def _unfinished(self) -> list[str]:
        unfinished = [
            f"{app} waits for {app.outstanding}"
            for process in self.processes
            for app in process.apps
            if not app.over and not app.done
        ]
        life = self.oracle.life
        reached: dict[str, int] = {}
        for producer_id, name in life.owners.items():
            reached[name] = max(reached.get(name, 0), life.progress.get(producer_id, 0))
        for source in self.sources.values():
            stored = reached.get(source.name, 0)
            if stored < len(source.positions):
                unfinished.append(f"{source.name} is stored up to {stored} of {len(source.positions)}")
        return unfinished

    def _look_whether_done(self, _one: None, _two: None) -> None:
        # A name whose last instance was fenced or ended gets a new one, as a supervisor would start it.
        held = [app.name for process in self.processes for app in process.apps if not app.over]
        for name, source in self.sources.items():
            if name not in held:
                process = self.processes[0]
                app = App.reading(self, process, source)
                process.apps.append(app)
                self.act(process, app)
        admin(self, self.processes[0])
        self.pump(self.processes[0])
        for process in list(self.processes):
            if process.session.error is not None:
                self.restart(process)
        self.finished = not self._unfinished()
        self.after(0.3, self._look_whether_done, None, None)


FAULT_KINDS = (
    *("cut",) * 6,
    *("replies",) * 3,
    *("stall",) * 3,
    *("crash",) * 3,
    *("group",) * 2,
    "full",
    *("kill",) * 3,
    *("ambush",) * 8,
    *("attempt",) * 7,
    *("takeovers",) * 4,
    *("pause",) * 2,
    "sleep",
    "clock",
    *("restore",) * 4,
    *("hang",) * 4,
    *("cutoff",) * 2,
    *("leave",) * 4,
)
JUDGED = frozenset({wire.Commit, wire.Open, wire.Heartbeat, wire.Seek, wire.DeleteOffsets})
"""Requests whose answers the oracle sees."""
NOTHING: dict[int, Any] = {}
