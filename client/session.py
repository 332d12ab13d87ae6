"""What a client says to its broker, decided, pure: numbers, what is in flight, what an answer means, when to try again.

The rules C1 to C10 of broker/PROTOCOL.md live here, over the state in `pipeline.py`, and nowhere else; but for what C6
says of positions that move without a producer, which is `positions.py`'s, and what C4 means for whoever waits to be put
in line, who waits in the shell (`native.py`). A session is one client's dealings with a broker: at most one connection
at a time, any number of producers on it. It may not know a socket, a clock, a task or a future: time (`now`, monotonic
seconds) and randomness come in; whoever waits is an opaque `waiter`. The shell calls in,

    connected, received, disconnected, tick          what the connection and the clock do
    call, open, enqueue, enqueue_many, transact …    what the user wants

and then does what `take()` says: dial, cut, frames to write, waiters to answer. `wake_at` is when to call `tick` again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, cast

from . import records, wire
from .errors import (
    ClientClosed,
    ConnectionLost,
    IdemqError,
    InvalidRequest,
    OutcomeUnknown,
    ProducerFenced,
    ProtocolMismatch,
    RetriableError,
    StoreReplaced,
    TransactionAborted,
    TransactionTooLarge,
    UnknownTopic,
    Unsupported,
    checked,
    from_refusal,
)
from .pipeline import (
    Barrier,
    Joined,
    Pending,
    Prefixed,
    Producer,
    QueuedCommit,
    Tally,
    Topic,
    Unresolved,
    Waiter,
    is_waited,
    without,
)
from .records import Receipt, Record
from .wire import Code, Failed, crc32

TRANSACTION_BYTES_MAX = wire.COMMIT_BYTES_MAX - wire.APPENDS_MAX * 64
"""What a transaction may hold: a commit's payload but for the fixed headers of its batches."""
METADATA_BYTES_MAX = wire.HEADER_BYTES_MAX // 2
"""What all metadata of a transaction may come to: it goes into a frame's header, beside positions and appends."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """The session's settings; seconds unless named otherwise."""

    session: str
    """Random, one for each client: the broker tells its repeated requests from another's (rules 10 and 14)."""
    client: str
    """Who is calling, for people."""
    token: str = ""
    answer_s_max: float = 15.0
    """A request that is not answered for so long cuts the connection (C3: it is never sent twice on one)."""
    idle_s: float = 20.0
    """After so long without a frame a ping asks whether the broker is still there."""
    retry_s_min: float = 0.05
    retry_s_max: float = 2.0
    """Pauses before a dial or a refused request is tried again grow from one to the other, with jitter."""
    topic_age_s_max: float = 30.0
    """What is known of a topic is asked for again after this time, behind the sends."""


class Frame(NamedTuple):
    """A request to write on the current connection."""

    correlation: int
    request: Any
    payload: Sequence[bytes]


class Actions(NamedTuple):
    """What the shell must do now, in this order."""

    cut: bool
    dial: bool
    frames: list[Frame]
    completions: list[tuple[Waiter, Any]]
    """(waiter, value or IdemqError)"""


class _Call:
    """A request other than a commit. All of them may be repeated; they are, until an answer or the deadline."""

    __slots__ = ("deadline", "ever_sent", "failures", "on_answer", "request", "retry_at", "ticket", "waiter")

    def __init__(self, request: Any, waiter: Waiter, deadline: float, on_answer: Callable[[Any], None] | None) -> None:
        self.request = request
        self.waiter = waiter
        self.deadline = deadline
        self.on_answer = on_answer
        self.ticket = 0
        self.ever_sent = False
        self.failures = 0
        self.retry_at = 0.0


class Session:
    """See the file's head."""

    def __init__(self, config: SessionConfig, rng: random.Random) -> None:
        self.config = config
        self.incarnation = b""
        self.state = "idle"
        """idle -> dialling -> greeting -> ready (-> cutting) -> idle …; closed at the end."""
        self.error: IdemqError | None = None
        """Why no connection will ever be made again (wrong token, other protocol, other store, closed)."""
        self.wake_at = inf
        self.producers: list[Producer] = []
        self._producers_added = 0
        self.reconnects = 0
        """Connections made after the first."""
        self._rng = rng
        self._correlation = 0
        self._txn_id = 0
        self._remembered = wire.REMEMBERED
        self._cut = self._dial = False
        self._frames: list[Frame] = []
        self._completions: list[tuple[Waiter, Any]] = []
        self._calls: dict[_Call, None] = {}  # an ordered set: resent in the order they were made
        self._outstanding: dict[int, tuple[float, Any, Any]] = {}  # ticket -> (answer due, call or commit, producer)
        self._heard_at = 0.0
        self._dial_at = inf
        self._dial_failures = 0
        self._last_failure = ""
        self._topics: dict[str, tuple[Topic | None, float]] = {}
        self._looked_up: dict[str, _Call] = {}
        self._dirty: dict[Producer, None] = {}  # producers to pump before the next take()

    # ------------------------------------------------------------------------------------------ the shell's side

    def take(self, now: float) -> Actions:
        """What to do now. Call it after every call into the session, or once after several."""
        while self._dirty:
            producer = next(iter(self._dirty))
            del self._dirty[producer]
            self._pump(now, producer)
        actions = Actions(self._cut, self._dial, self._frames, self._completions)
        self._cut = self._dial = False
        if self._frames:
            self._frames = []
        if self._completions:
            self._completions = []
        return actions

    def connect(self, now: float) -> None:
        """Want a connection from now on."""
        if self.state == "idle" and self.error is None and self._dial_at == inf:
            self._dial_at = now
            self._dial_now()

    def connected(self, now: float) -> None:
        """The dial succeeded: greet."""
        self.state = "greeting"
        self._heard_at = now
        self._send(
            now, wire.Hello(wire.VERSION, self.config.client, self.config.token, self.config.session), (), self, None
        )

    def disconnected(self, now: float, reason: str) -> None:
        """The dial failed, or the connection is gone: whatever was sent on it is sent again on the next (C3)."""
        if self.state == "closed":
            return
        self.state = "idle"
        self._last_failure = reason
        self._frames.clear()
        for call in self._calls:
            call.ticket = 0
        self._outstanding.clear()
        for producer in self.producers:
            producer.sent = 0
            producer.refused = False
            producer.retry_at = 0.0
            for commit in producer.queue:
                commit.sent_before |= commit.sent
                commit.sent = False
                commit.refusal = None
        if self.error is None:
            self._dial_at = now + self._pause(self._dial_failures)
            self._dial_failures += 1
            self._wake(self._dial_at)

    def received(self, now: float, correlation: int, message: Any, payload: bytes = b"") -> None:
        """An answer on the current connection. The shell drops those of older connections (C3)."""
        self._heard_at = now
        outstanding = self._outstanding.pop(correlation, None)
        if outstanding is None:
            if correlation == 0 and type(message) is Failed:  # the broker could not even read what we sent
                self._refused_greeting(message) if self.state == "greeting" else self._cut_now()
            return
        _, entry, producer = outstanding
        if not _is_answer(entry, message):
            self.protocol_broken(now, f"{type(message).__name__} is no answer to what was asked")
        elif type(entry) is QueuedCommit:
            self._committed(now, producer, entry, message)
        elif entry is self:
            self._welcomed(now, message)
        elif type(entry) is _Call:
            self._answered(now, entry, message, payload)

    def protocol_broken(self, now: float, reason: str) -> None:
        """The other side sent what this protocol does not allow: trust nothing more on this connection."""
        if self.state == "greeting" and not self.incarnation:
            self._end(ProtocolMismatch(f"the other side is no idemq broker of this version: {reason}"))
        else:
            self._cut_now()

    def tick(self, now: float) -> None:
        """The time has come: retries, deadlines, lingering, dials. Sets `wake_at`."""
        self.wake_at = inf
        if self.state == "idle" and self._dial_at <= now and self.error is None:
            self._dial_now()
        elif self.state == "idle":
            self._wake(self._dial_at)
        if self._outstanding:
            due = min(due for due, _, _ in self._outstanding.values())
            if due <= now:
                self._cut_now()
            else:
                self._wake(due)
        if self.state == "ready" and not self._outstanding:
            if self._heard_at + self.config.idle_s <= now:
                self._send(now, wire.Ping(), (), None, None)
            else:
                self._wake(self._heard_at + self.config.idle_s)
        for call in list(self._calls):
            self._tick_call(now, call)
        for producer in self.producers:
            self._tick_producer(now, producer)

    def close(self, now: float) -> None:
        """The end: every connection is given up, whoever still waits is told."""
        self._end(ClientClosed("the client was closed"))
        self.state = "closed"

    # ---------------------------------------------------------------------------------------------- plain calls

    def call(
        self,
        now: float,
        request: Any,
        waiter: Waiter,
        deadline: float,
        on_answer: Callable[[Any], None] | None = None,
    ) -> _Call | None:
        """Send a request other than a commit, and again, until an answer or the deadline.

        The waiter gets the reply (with its payload where that is Fetched), or an IdemqError; `on_answer` (if any)
        sees the reply or Failed instead and decides.
        """
        if self.error is not None:
            self._complete(waiter, self.error)
            return None
        call = _Call(request, waiter, deadline, on_answer)
        self._calls[call] = None
        self._wake(deadline)
        self.connect(now)
        if self.state == "ready":
            self._send_call(now, call)
        return call

    def forget(self, call: _Call | None) -> None:
        """Nobody waits for this call any more: it is not repeated, its answer is dropped."""
        if call is not None:
            self._calls.pop(call, None)

    def topic(self, now: float, name: str) -> Topic | None:
        """What is known of a topic, if it is known; old knowledge is refreshed behind the caller's back."""
        known = self._topics.get(name)
        if known is None:
            return None
        topic, learnt_at = known
        if now - learnt_at > self.config.topic_age_s_max:
            self.look_up(now, name, None, inf)
        return topic

    def look_up(self, now: float, name: str, waiter: Waiter, deadline: float) -> None:
        """Ask for a topic: the waiter gets a Topic, or UnknownTopic. One question at a time for each name."""
        if self.error is not None:
            self._complete(waiter, self.error)
        elif waiter is not None:
            self.call(
                now,
                wire.Metadata([name]),
                None,
                deadline,
                lambda answer: self._complete(waiter, self._learn(name, answer)),
            )
        elif name not in self._looked_up:
            call = self.call(
                now,
                wire.Metadata([name]),
                None,
                inf,
                lambda answer: self._looked(name, self._learn(name, answer)),
            )
            if call is not None:
                self._looked_up[name] = call

    def _learn(self, name: str, answer: Any) -> Topic | IdemqError:
        if type(answer) is Failed:
            return from_refusal(answer)
        if isinstance(answer, IdemqError):
            return answer
        for entry in answer.topics:
            if entry.name == name:
                topic = Topic(name, entry.topic_id, len(entry.partitions))
                self._topics[name] = (topic, self._heard_at)
                return topic
        self._topics.pop(name, None)
        return UnknownTopic(f"there is no topic {name!r}")

    def _looked(self, name: str, found: Topic | IdemqError) -> None:
        self._looked_up.pop(name, None)
        for producer in self.producers:
            for commit in [commit for commit in producer.queue if commit.unresolved and commit.topic == name]:
                if commit not in producer.queue:
                    continue  # it failed with one before it
                if isinstance(found, Topic):
                    self._resolve(producer, commit, found)
                else:
                    self._fail_definitely(producer, commit, found)
            self._dirty[producer] = None

    def _send_call(self, now: float, call: _Call) -> None:
        wait_s = call.request.wait_ms / 1000 if type(call.request) in _WAITING else 0.0
        call.ticket = self._send(now, call.request, (), call, None, wait_s)
        call.ever_sent = True

    def _answered(self, now: float, call: _Call, answer: Any, payload: bytes) -> None:
        call.ticket = 0
        if call not in self._calls:
            return
        if type(answer) is Failed and answer.code in _NO_ANSWERS:
            self._cut_now()
            return
        if type(answer) is Failed and _is_retriable(answer):
            call.failures += 1
            call.retry_at = now + self._pause(call.failures)
            self._wake(call.retry_at)
            return
        del self._calls[call]
        if call.on_answer is not None:
            call.on_answer(answer)
        elif type(answer) is Failed:
            self._complete(call.waiter, from_refusal(answer))
        else:
            self._complete(call.waiter, (answer, payload) if type(answer) is wire.Fetched else answer)

    def _tick_call(self, now: float, call: _Call) -> None:
        if call.deadline <= now:
            self._calls.pop(call, None)
            error = self._timed_out(call)
            if call.on_answer is not None:
                call.on_answer(error)
            else:
                self._complete(call.waiter, error)
            return
        self._wake(call.deadline)
        if self.state == "ready" and not call.ticket:
            if call.retry_at <= now:
                self._send_call(now, call)
            else:
                self._wake(call.retry_at)

    def _timed_out(self, call: _Call) -> IdemqError:
        what = type(call.request).__name__
        if call.ever_sent and type(call.request) not in _READS:
            return OutcomeUnknown(f"{what} was sent and not answered in time; repeating it does no harm")
        if self._last_failure and self.state != "ready":
            return ConnectionLost(f"the broker cannot be reached: {self._last_failure}")
        return ConnectionLost(f"{what} was not answered in time")

    # ---------------------------------------------------------------------------------------------- the connection

    def _dial_now(self) -> None:
        self.state = "dialling"
        self._dial_at = inf
        self._dial = True

    def _welcomed(self, now: float, message: Any) -> None:
        if type(message) is Failed:
            self._refused_greeting(message)
            return
        # Rule 17, before anything is sent: another store, or this one gone back in time, knows nothing of our numbers.
        if self.incarnation and (message.incarnation != self.incarnation or message.txn_id < self._txn_id):
            self._end(StoreReplaced("the broker runs on another store than this client spoke to before"))
            return
        if self.incarnation:
            self.reconnects += 1
        self.incarnation = message.incarnation
        self._txn_id = message.txn_id
        self._remembered = message.remembered
        self.state = "ready"
        self._dial_failures = 0
        self._wake(now + self.config.idle_s)
        for call in list(self._calls):
            self._send_call(now, call)
        for producer in self.producers:
            self._dirty[producer] = None

    def _refused_greeting(self, message: Failed) -> None:
        if _is_retriable(message):
            self._cut_now()
            self._last_failure = message.text
        else:
            self._end(from_refusal(message))

    def _cut_now(self) -> None:
        """Give the connection up; the shell reports `disconnected` when it is closed."""
        self.state = "cutting"
        self._cut = True
        self._outstanding.clear()

    def _end(self, error: IdemqError) -> None:
        """No connection will be made again: tell whoever waits."""
        if self.error is not None:
            return
        self.error = error
        self._cut_now()
        for call in list(self._calls):
            del self._calls[call]
            if call.on_answer is not None:
                call.on_answer(error)
            else:
                self._complete(call.waiter, error)
        for producer in list(self.producers):
            self._end_producer(producer, error)

    def _send(
        self, now: float, request: Any, payload: Sequence[bytes], entry: Any, producer: Any, wait_s: float = 0.0
    ) -> int:
        self._correlation += 1
        due = now + self.config.answer_s_max + wait_s
        self._outstanding[self._correlation] = (due, entry, producer)
        self._wake(due)
        self._frames.append(Frame(self._correlation, request, payload))
        return self._correlation

    def _pause(self, failures: int) -> float:
        longest = min(self.config.retry_s_max, self.config.retry_s_min * 2.0 ** min(failures, 20))
        return longest * (0.5 + self._rng.random() / 2)

    def _wake(self, at: float) -> None:
        if at < self.wake_at:
            self.wake_at = at

    def _complete(self, waiter: Waiter, value: Any) -> None:
        if waiter is None:
            return
        if type(waiter) is Pending:
            waiter.done, waiter.value = True, value
            self._completions += [(one, value) for one in waiter.waiters]
            return
        self._completions.append((waiter, value))

    # ------------------------------------------------------------------------------------------------- producers

    def add(self, producer: Producer) -> None:
        """Take a producer into this session. Without dedup it needs no opening."""
        self._producers_added += 1
        producer.instance = f"{self.config.session}.{self._producers_added}"
        self.producers.append(producer)
        if self.error is not None:
            producer.error = self.error

    def remove(self, now: float, producer: Producer) -> list[IdemqError]:
        """Give a producer up (C7). Returns what was never reported: failures, and what is now unknown."""
        if producer in self.producers:
            self._end_producer(producer, ClientClosed("the producer was closed"))
            self.producers.remove(producer)
        unreported, producer.unreported = producer.unreported, []
        return unreported

    def open(self, now: float, producer: Producer, waiter: Waiter, deadline: float) -> None:
        """Open a producer's name; the waiter gets the producer, or the error."""
        if producer.error is not None:
            self._complete(waiter, producer.error)
        elif producer.opened:
            self._complete(waiter, producer)
        else:
            self._open(now, producer, waiter, deadline, 0)

    def _open(self, now: float, producer: Producer, waiter: Waiter, deadline: float, expected_epoch: int) -> None:
        request = wire.Open(producer.name, producer.instance, expected_epoch, producer.anonymous)

        def answered(answer: Any) -> None:
            producer.opening = None
            if type(answer) is Failed and answer.code == Code.OPEN_RACE and answer.details.get("epoch") is not None:
                # A fresh session asks again with the epoch it was told (rule 10); the first to be stored wins.
                epoch = answer.details["epoch"]
                assert isinstance(epoch, int)
                self._open(self._heard_at, producer, waiter, deadline, epoch)
            elif type(answer) is wire.Opened:
                producer.id, producer.epoch, producer.opened = answer.producer_id, answer.epoch, True
                producer.last_seq = max(producer.last_seq, answer.last_seq)
                producer.highest = max(producer.highest, answer.last_seq)
                producer.token = answer.token
                self._dirty[producer] = None
                self._complete(waiter, producer)
            else:
                error = from_refusal(answer) if type(answer) is Failed else answer
                if not isinstance(error, (ConnectionLost, OutcomeUnknown)):
                    self._end_producer(producer, error)
                self._complete(waiter, error)

        producer.opening = self.call(now, request, None, deadline, answered)
        if producer.opening is None:
            self._complete(waiter, self.error)

    def flush(self, now: float, producer: Producer, waiter: Waiter, timeout: float) -> None:
        """The waiter is answered when everything enqueued so far is decided: None, or the first unreported failure.

        `timeout` is a progress deadline: it starts again with each commit that is answered.
        """
        self._dirty[producer] = None
        if not producer.queue:
            self._complete(waiter, producer.report())
            return
        barrier = Barrier(waiter, timeout, now, producer.queue[-1].place)
        producer.barriers.append(barrier)
        producer.close_tail()
        self._wake(barrier.deadline)

    def finish(self, now: float, producer: Producer, tally: Tally, waiter: Waiter, timeout: float) -> None:
        """The waiter gets the tally when all of its records are decided; `timeout` as in `flush`."""
        self._dirty[producer] = None
        if not tally.pending:
            self._complete(waiter, tally)
            return
        tally.waiter, tally.timeout, tally.deadline = waiter, timeout, now + timeout
        producer.tallies.append(tally)
        self._wake(tally.deadline)

    def abandon(self, producer: Producer, tally: Tally) -> None:
        """Nobody waits for this tally any more: what failed or fails of it is told by flush or close."""
        tally.abandoned, tally.waiter = True, None
        if tally in producer.tallies:
            producer.tallies.remove(tally)
        if tally.error is not None:
            producer.unreported.append(tally.error)

    def detach(self, producer: Producer, seq: int, gone: Waiter) -> None:
        """One that waited for this record was cancelled: the record stays, its failure is told by flush or close."""
        for commit in producer.queue:
            if seq <= commit.last_seq:
                commit.waiter = without(commit.waiter, gone)
                for part in commit.parts.values():
                    if part.waiters is not None and seq in part.numbers:
                        index = part.numbers.index(seq)
                        part.waiters[index] = without(part.waiters[index], gone)
                for index, one in enumerate(commit.unresolved):
                    if one.seq == seq:
                        commit.unresolved[index] = one._replace(waiter=without(one.waiter, gone))
                return

    def leave_flush(self, producer: Producer, gone: Waiter) -> None:
        """One that waited in `flush` was cancelled: the next one is told."""
        producer.barriers = [barrier for barrier in producer.barriers if barrier.waiter is not gone]

    def unheard(self, producer: Producer, error: IdemqError) -> None:
        """Whoever should have heard of this failure was cancelled in the same moment: flush or close tells it."""
        producer.unreported.append(error)

    def want_room(self, producer: Producer, waiter: Waiter) -> None:
        """The waiter is answered (None) when records may be enqueued again; first come, first served."""
        producer.room_waiters.append(waiter)

    def leave_room(self, producer: Producer, waiter: Waiter) -> None:
        """The waiter wants no room any more: whoever is behind it gets what it may have been offered."""
        if waiter in producer.room_waiters:
            producer.room_waiters.remove(waiter)
        else:
            self._offer_room(producer)

    def _offer_room(self, producer: Producer) -> None:
        """One at a time: each that enqueues offers on, so that the buffer fills once and not by all at once."""
        if producer.room_waiters and producer.room:
            self._complete(producer.room_waiters.popleft(), None)

    # ----------------------------------------------------------------------------------------------- enqueueing

    def enqueue(
        self,
        now: float,
        producer: Producer,
        topic: str,
        record: Record,
        waiter: Waiter,
        deadline: float,
        tally: Tally | None = None,
    ) -> int:
        """Number a record and put it in line; returns its number. The waiter gets a Receipt, or an IdemqError.

        Without a waiter it may belong to a `tally`. Raises (and enqueues nothing) when the record is wrong or the
        producer has ended.
        """
        size = records.check_record(record.value, record.key, record.headers) + records.RECORD_BYTES
        producer.check_alive()
        seq = self._next_seq(producer, record.seq)
        if seq is None:
            self._join(now, producer, topic, record, waiter, deadline, tally)
            assert record.seq is not None
            return record.seq
        known = self.topic(now, topic)
        if known is None:
            check_topic(topic)
        commit = self._tail(now, producer, topic, size)
        if deadline < commit.deadline:
            commit.deadline = deadline
            self._wake(deadline)
        if known is None or commit.unresolved:
            if record.headers is not None:
                record = record._replace(headers=dict(record.headers))
            commit.unresolved.append(Unresolved(record, seq, waiter, deadline, tally))
            self.look_up(now, topic, None, inf)
        else:
            try:
                index = self._partition(producer, known, record)
            except InvalidRequest:
                if not commit.records:
                    producer.queue.remove(commit)
                raise
            part = commit.part(known, index, seq)
            part.add(record.value, record.key, record.headers, seq, waiter, deadline)
        producer.highest = commit.last_seq = seq
        if tally is not None:
            commit.count(tally, 1)
        commit.records += 1
        commit.bytes += size
        producer.buffered_bytes += size
        self._offer_room(producer)
        self._dirty[producer] = None
        return seq

    def enqueue_many(
        self, now: float, producer: Producer, topic: str, chunk: Sequence[bytes | Record], tally: Tally
    ) -> int:
        """Number records and put them in line; returns how many: fewer than all when the buffer is full.

        Raises at the first record that is wrong; those before it are in line.
        """
        values = chunk if {type(one) for one in chunk} == {bytes} else ()
        if values and sum(map(len, values)) <= producer.batch_bytes:
            if not producer.room:
                return 0
            self._enqueue_values(now, producer, topic, cast("Sequence[bytes]", values), tally)
            return len(chunk)
        for index, one in enumerate(chunk):
            if producer.buffered_bytes >= producer.buffer_bytes_max:
                return index
            if not isinstance(one, Record):
                one = Record(one)
            if one.message_id is not None:
                raise Unsupported("message ids are not offered yet")
            self.enqueue(now, producer, topic, one, None, inf, tally)
        return len(chunk)

    def _enqueue_values(
        self, now: float, producer: Producer, topic: str, values: Sequence[bytes], tally: Tally
    ) -> None:
        """The fast way for plain values: one partition takes them all, and nobody waits for each."""
        producer.check_alive()
        self._next_seq(producer, None)
        size = sum(map(len, values)) + records.RECORD_BYTES * len(values)
        known = self.topic(now, topic)
        if known is None:
            check_topic(topic)
        commit = self._tail(now, producer, topic, size)
        first = producer.highest + 1
        last = producer.highest + len(values)
        if known is None or commit.unresolved:
            commit.unresolved += [
                Unresolved(Record(value), first + index, tally=tally) for index, value in enumerate(values)
            ]
            self.look_up(now, topic, None, inf)
        else:
            part = commit.part(known, self._partition(producer, known, _PLAIN), first)
            if part.keys is None and part.headers is None and part.waiters is None and part.last_seq + 1 == first:
                if part.seqs is not None:
                    part.seqs += range(first, last + 1)
                part.values += values
                part.last_seq = last
            else:
                for index, value in enumerate(values):
                    part.add(value, None, None, first + index)
        producer.highest = commit.last_seq = last
        commit.count(tally, len(values))
        commit.records += len(values)
        commit.bytes += size
        producer.buffered_bytes += size
        self._offer_room(producer)
        self._dirty[producer] = None

    def transact(
        self,
        now: float,
        producer: Producer,
        sends: Sequence[tuple[Topic, Record]],
        offsets: Sequence[wire.Offset],
        token: bytes | None,
        waiter: Waiter,
        deadline: float,
    ) -> int:
        """Put a whole transaction in line; returns its last number. The waiter gets its receipts, in order.

        Records at or below the producer's last number were sent before: they are left out and answered as duplicates.
        """
        producer.check_alive()
        size = len(token or b"")
        for topic, record in sends:
            size += records.check_record(record.value, record.key, record.headers) + records.RECORD_BYTES
            _check_partition(topic, record)
        if size > TRANSACTION_BYTES_MAX:
            raise TransactionTooLarge(f"a transaction of {size} bytes; at most {TRANSACTION_BYTES_MAX} are allowed")
        if len(offsets) > wire.APPENDS_MAX:
            raise TransactionTooLarge(f"a transaction moves at most {wire.APPENDS_MAX} positions, not {len(offsets)}")
        if sum([len(entry.metadata or b"") for entry in offsets]) > METADATA_BYTES_MAX:
            raise TransactionTooLarge(f"a transaction stores at most {METADATA_BYTES_MAX} bytes of metadata")
        if not sends and producer.given:
            raise InvalidRequest("a transaction of a producer with given numbers needs a record that carries one")
        producer.close_tail()
        producer.places += 1
        commit = QueuedCommit(producer.places, "", transaction=True)
        duplicates: list[Receipt] = []
        highest, given, sticky = producer.highest, producer.given, dict(producer.sticky)
        try:
            for topic, record in sends:
                seq = self._next_seq(producer, record.seq)
                if seq is None:
                    before = self._partition_before(producer, topic, record)
                    duplicates.append(Receipt(topic.name, before, None, record.seq, None, True))
                    continue
                index = self._partition(producer, topic, record)
                part = commit.part(topic, index, seq)
                commit.order.append((part, len(part.values)))
                part.add(record.value, record.key, record.headers, seq)
                producer.highest = commit.last_seq = seq
            if len(commit.parts) > wire.APPENDS_MAX:
                raise TransactionTooLarge(f"a transaction touches at most {wire.APPENDS_MAX} partitions")
        except IdemqError:
            producer.highest, producer.given, producer.sticky = highest, given, sticky
            raise
        if duplicates and not commit.order:
            if offsets or token is not None:
                raise InvalidRequest(
                    "all messages of this transaction were sent before, so it takes no number, and stores neither a "
                    "token nor positions: move the position alone, by commit() of the subscription"
                )
            last = max([one.seq for one in duplicates if one.seq is not None])
            for queued in producer.queue:
                if last <= queued.last_seq:  # in line, not stored yet (C8)
                    queued.waiter = Joined(queued.waiter, Prefixed(duplicates, waiter, alone=True))
                    queued.deadline = min(queued.deadline, deadline)
                    self._wake(deadline)
                    return last
            self._complete(waiter, duplicates)
            return producer.highest
        if not commit.order:
            producer.given = False if producer.given is None and producer.dedup else producer.given
            producer.highest += 1
            commit.last_seq = producer.highest
        commit.offsets = list(offsets)
        commit.token = token
        commit.records = len(commit.order)
        commit.bytes = size
        commit.waiter = waiter if not duplicates else Prefixed(duplicates, waiter)
        commit.deadline = deadline
        self._wake(deadline)
        producer.buffered_bytes += size
        producer.queue.append(commit)
        if not producer.opened and producer.opening is None:
            self._open(now, producer, None, inf, 0)
        self._dirty[producer] = None
        return commit.last_seq

    def _next_seq(self, producer: Producer, seq: int | None) -> int | None:
        """The record's number, or None when this number was enqueued or stored before (C8)."""
        if seq is None:
            if producer.given:
                raise InvalidRequest("this producer is given numbers: pass seq with every message, or with none")
            producer.given = False
            return producer.highest + 1
        if type(seq) is not int or not 0 <= seq <= wire.NUMBER_MAX:
            raise InvalidRequest(f"seq must be a number in 0 .. {wire.NUMBER_MAX}, not {seq!r}")
        if not producer.dedup:
            raise InvalidRequest("a producer with dedup=False has no numbers")
        if producer.given is False:
            raise InvalidRequest("this producer counts by itself: pass seq with every message, or with none")
        if not producer.opened:
            raise InvalidRequest("numbers need a named producer: async with mq.producer(NAME)")
        producer.given = True
        return None if seq <= producer.highest else seq

    def _join(
        self,
        now: float,
        producer: Producer,
        topic: str,
        record: Record,
        waiter: Waiter,
        deadline: float,
        tally: Tally | None,
    ) -> None:
        """A number that was given before: wait for that record, or answer that it is stored."""
        if tally is not None:
            tally.duplicates += 1
        seq = record.seq
        for commit in producer.queue:
            if seq is not None and seq <= commit.last_seq:
                if tally is not None:
                    commit.count(tally, 0)  # not of it, but it ends no earlier
                if waiter is None:
                    return
                for part in commit.parts.values():
                    if seq in part.numbers:
                        if part.waiters is None:
                            part.waiters = [None] * len(part.values)
                            part.deadlines = [inf] * len(part.values)
                        index = part.numbers.index(seq)
                        part.waiters[index] = Joined(part.waiters[index], waiter)
                        part.deadlines[index] = min(part.deadlines[index], deadline)
                        commit.deadline = min(commit.deadline, deadline)
                        self._wake(deadline)
                        return
                for position, one in enumerate(commit.unresolved):
                    if one.seq == seq:
                        both, deadline = Joined(one.waiter, waiter), min(one.deadline, deadline)
                        commit.unresolved[position] = one._replace(waiter=both, deadline=deadline)
                        commit.deadline = min(commit.deadline, deadline)
                        self._wake(deadline)
                        return
                break
        if waiter is not None:
            partition = self._partition_before(producer, self.topic(now, topic), record)
            self._complete(waiter, Receipt(topic, partition, None, seq, None, True))

    def _tail(self, now: float, producer: Producer, topic: str, size: int) -> QueuedCommit:
        """The open commit that takes the next record of this topic."""
        if producer.queue:
            tail = producer.queue[-1]
            if tail.open and tail.topic == topic and (tail.bytes + size <= producer.batch_bytes or not tail.records):
                return tail
            tail.open = False
        if not producer.opened and producer.opening is None:
            self._open(now, producer, None, inf, 0)
        producer.places += 1
        commit = QueuedCommit(producer.places, topic, transaction=False)
        if producer.linger_s:
            commit.linger_until = now + producer.linger_s
            self._wake(commit.linger_until)
        if topic in producer.sticky:
            producer.sticky[topic] += 1
        producer.queue.append(commit)
        return commit

    def _partition(self, producer: Producer, topic: Topic, record: Record) -> int:
        _check_partition(topic, record)
        if record.partition is not None:
            return record.partition
        if record.key is not None:
            return int(crc32(record.key) % topic.partitions)
        if topic.partitions == 1:
            return 0
        sticky = producer.sticky.get(topic.name)
        if sticky is None:
            sticky = producer.sticky[topic.name] = self._rng.randrange(topic.partitions)
        return sticky % topic.partitions

    def _partition_before(self, producer: Producer, topic: Topic | None, record: Record) -> int | None:
        """Where a record went that was stored before, if there is one partition only that it goes to."""
        if record.partition is not None:
            return record.partition
        if topic is None or (record.key is None and topic.partitions > 1):
            return None
        return self._partition(producer, topic, record)

    def _resolve(self, producer: Producer, commit: QueuedCommit, topic: Topic) -> None:
        """The topic is known now: give the commit's records their partitions."""
        if producer.given:
            try:
                for one in commit.unresolved:
                    _check_partition(topic, one.record)
            except InvalidRequest as error:  # its number means a position, which may not be skipped (C4)
                self._fail_definitely(producer, commit, error)
                return
        unresolved, commit.unresolved = commit.unresolved, []
        for record, seq, waiter, deadline, tally in unresolved:
            try:
                index = self._partition(producer, topic, record)
            except InvalidRequest as error:  # its number stays a gap, which is free (C1)
                commit.records -= 1
                if tally is not None and not tally.abandoned:
                    commit.tallies[tally] -= 1
                    tally.error = tally.error or error
                elif not is_waited(waiter):
                    producer.unreported.append(error)
                self._tell(waiter, error)
                continue
            part = commit.part(topic, index, seq)
            part.add(record.value, record.key, record.headers, seq, waiter, deadline)
        if not commit.records:
            self._pop(producer, commit)

    # -------------------------------------------------------------------------------------- sending and answers

    def _pump(self, now: float, producer: Producer) -> None:
        """Send what may be sent: in order, at most W unanswered, nothing while a refusal is being drained."""
        if self.state != "ready" or not producer.opened or producer.refused or producer.error is not None:
            return
        if producer.retry_at > now:
            self._wake(producer.retry_at)
            return
        window = min(producer.in_flight_max, self._remembered)
        while producer.sent < window and producer.sent < len(producer.queue):
            commit = producer.queue[producer.sent]
            if commit.unresolved:
                return
            if commit.open and commit.linger_until > now and commit.bytes < producer.batch_bytes:
                self._wake(commit.linger_until)
                return
            if not commit.frozen:
                producer.freeze(commit)
            assert commit.prev_seq is not None
            request = wire.Commit(
                producer.id,
                producer.epoch,
                commit.prev_seq,
                commit.last_seq,
                commit.appends,
                commit.offsets,
                commit.token,
            )
            self._send(now, request, commit.payload, commit, producer)
            commit.sent = commit.ever_sent = True
            producer.sent += 1

    def _committed(self, now: float, producer: Producer, commit: QueuedCommit, answer: Any) -> None:
        """An answer to a commit of this connection."""
        if producer.error is not None:
            return
        if type(answer) is wire.Committed:
            producer.failures = 0
            self._stored(producer, commit, answer.duplicate, answer.positions)
            for one in [*producer.barriers, *producer.tallies]:
                one.deadline = now + one.timeout
        elif answer.code in _NO_ANSWERS:
            # Neither is an answer to the commit: a newer connection of ours, or bytes damaged on the way.
            self._cut_now()
            return
        else:
            commit.refusal = answer
            producer.refused = True
        if producer.refused and all(one.refusal is not None for one in producer.queue if one.sent):
            self._act_on_refusal(now, producer)
        self._dirty[producer] = None

    def _stored(
        self, producer: Producer, commit: QueuedCommit, duplicate: bool, positions: Sequence[wire.Position] | None
    ) -> None:
        for tally, count in commit.tallies.items():
            if duplicate:
                tally.duplicates += count
            else:
                tally.stored += count
        if producer.dedup and producer.last_seq < commit.last_seq:
            producer.last_seq = commit.last_seq
        if commit.token is not None:
            producer.token = commit.token
        found: Iterable[wire.Position | None] = positions if positions is not None else [None] * len(commit.parts)
        where = dict(zip(commit.parts.values(), found, strict=True))
        receipts = [part.receipt(index, where[part], duplicate, producer.dedup) for part, index in commit.order]
        self._tell(commit.waiter, receipts)
        for part, position in where.items():
            for index, waiter in enumerate(part.waiters or ()):
                if waiter is not None:
                    self._tell(waiter, part.receipt(index, position, duplicate, producer.dedup))
        self._pop(producer, commit)

    def _tell(self, waiter: Waiter, value: Any) -> None:
        """Complete a waiter, or those it stands for."""
        if type(waiter) is Joined:
            self._tell(waiter.first, value)
            again = value._replace(duplicate=True) if isinstance(value, Receipt) else value
            self._tell(waiter.second, again)
        elif type(waiter) is Prefixed:
            if not isinstance(value, IdemqError):
                value = waiter.duplicates + ([] if waiter.alone else value)
            self._tell(waiter.waiter, value)
        else:
            self._complete(waiter, value)

    def _pop(self, producer: Producer, commit: QueuedCommit) -> None:
        """A commit is decided: it leaves the queue, and whoever waited for that may go on."""
        if producer.queue and producer.queue[0] is commit:
            producer.queue.popleft()
        else:
            producer.queue.remove(commit)
        if commit.sent:
            producer.sent -= 1
        producer.buffered_bytes -= commit.bytes
        self._offer_room(producer)
        for tally in commit.tallies:
            tally.pending -= 1
            if not tally.pending and tally in producer.tallies:
                producer.tallies.remove(tally)
                self._complete(tally.waiter, tally)
        while producer.barriers and (not producer.queue or producer.queue[0].place > producer.barriers[0].last):
            self._complete(producer.barriers.pop(0).waiter, producer.report())

    def _act_on_refusal(self, now: float, producer: Producer) -> None:
        """C4: every answer of this connection is here. The first refusal that is no gap is the reason of all."""
        producer.refused = False
        sent = [commit for commit in producer.queue if commit.sent]
        head = next((one for one in sent if one.refusal is not None and one.refusal.code != Code.SEQUENCE_GAP), sent[0])
        refusal = head.refusal
        assert refusal is not None
        for commit in sent:
            commit.sent, commit.refusal = False, None
        producer.sent = 0
        code = Code(refusal.code) if refusal.code in Code.__members__ else None
        if code is not None and wire.REMEDIES[code].retriable:
            self._last_failure = refusal.text
            producer.failures += 1
            producer.retry_at = now + self._pause(producer.failures)
            self._wake(producer.retry_at)
        elif code == Code.PRODUCER_FENCED:
            self._fenced(producer, refusal)
        elif code in (Code.UNKNOWN_PRODUCER, Code.STORE_REPLACED, Code.SEQUENCE_GAP, Code.SEQUENCE_CONFLICT) or (
            # What cannot be read may be the producer's row, and then nobody has looked for an earlier copy (C6).
            code == Code.STORE_DAMAGED and producer.dedup and head.sent_before
        ):
            error = from_refusal(refusal)
            if code in (Code.SEQUENCE_CONFLICT, Code.SEQUENCE_GAP):
                # Refused here, so not stored now or later (C5): the numbers no longer fit together.
                self._fail(producer, head, error)
            self._end_producer(producer, error, unknown=code != Code.SEQUENCE_GAP)
        else:
            if code == Code.UNKNOWN_TOPIC:
                for part in head.parts.values():
                    self._topics.pop(part.topic.name, None)
            self._fail_definitely(producer, head, from_refusal(refusal))

    def _fail_definitely(self, producer: Producer, head: QueuedCommit, error: IdemqError) -> None:
        """C4: the head is not stored, now or later. What follows it?"""
        queue = list(producer.queue)
        behind = queue[queue.index(head) + 1 :]
        if producer.dedup and (producer.given or head.transaction):
            # Numbers that mean positions must not be skipped, and transactions may build on each other.
            self._fail(producer, head, error)
            text = f"not stored, because what was sent before it was refused ({error.code})"
            for commit in behind:
                kind = TransactionAborted if commit.transaction else RetriableError
                self._fail(producer, commit, kind(text))
            if producer.given:
                producer.breaks += 1
                # The application may give these numbers again: they go on behind the last that is not refused.
                producer.highest = max([producer.last_seq, *[commit.last_seq for commit in producer.queue]])
        else:
            if behind and behind[0].frozen:
                behind[0].prev_seq = head.prev_seq
            if head.sent_before and not producer.dedup:
                error = OutcomeUnknown(f"sent again and refused ({error.code}); without dedup it may be stored before")
            self._fail(producer, head, error)

    def _fenced(self, producer: Producer, refusal: Failed) -> None:
        """C6: what is stored of the queue is known from where this epoch ended. C10: the producer ends."""
        error = from_refusal(refusal)
        assert isinstance(error, ProducerFenced)
        ended_at = refusal.details.get("ended_at")
        for commit in list(producer.queue):
            if isinstance(ended_at, int) and commit.ever_sent and commit.last_seq <= ended_at:
                self._stored(producer, commit, True, None)
            elif isinstance(ended_at, int) or not commit.ever_sent:
                self._fail(producer, commit, error)
        self._end_producer(producer, error, unknown=True)

    def _fail(self, producer: Producer, commit: QueuedCommit, error: IdemqError) -> None:
        """Tell whoever waits for a commit that it failed; what nobody waits for is kept for flush and close."""
        told = 0
        if commit.transaction:
            told += max(commit.records, 1) if is_waited(commit.waiter) else 0
        self._tell(commit.waiter, error)
        waiters = [waiter for part in commit.parts.values() for waiter in part.waiters or ()]
        for waiter in [*waiters, *[one.waiter for one in commit.unresolved]]:
            if waiter is not None:
                told += is_waited(waiter)
                self._tell(waiter, error)
        for tally, count in commit.tallies.items():
            if not tally.abandoned:
                tally.error = tally.error or error
                told += count
        if told < max(commit.records, commit.transaction):
            producer.unreported.append(error)
        self._pop(producer, commit)

    def _end_producer(self, producer: Producer, error: IdemqError, *, unknown: bool = True) -> None:
        """A producer ends. What was ever sent and is not decided is unknown; the rest is not stored."""
        if producer.error is not None:
            return
        producer.error = error
        self.forget(producer.opening)
        producer.opening = None
        for commit in list(producer.queue):
            if commit.ever_sent and unknown:
                lost = OutcomeUnknown(f"the producer ended before the answer came ({error.code})", seq=commit.last_seq)
                self._fail(producer, commit, lost)
            else:
                self._fail(producer, commit, error)
        while producer.room_waiters:
            self._complete(producer.room_waiters.popleft(), error)

    def _tick_producer(self, now: float, producer: Producer) -> None:
        if producer.retry_at > now:
            self._wake(producer.retry_at)
        self._dirty[producer] = None
        for commit in producer.queue:
            if commit.deadline <= now:
                self._time_out(now, commit)
            self._wake(commit.deadline)
        for one in [*producer.barriers, *producer.tallies]:
            if one.deadline > now:
                self._wake(one.deadline)
                continue
            producer.tallies = [tally for tally in producer.tallies if tally is not one]
            producer.barriers = [barrier for barrier in producer.barriers if barrier is not one]
            waiting = sum(commit.records for commit in producer.queue)
            self._complete(one.waiter, self._unknown(f"{waiting} messages are not answered yet", producer.highest))

    def _time_out(self, now: float, commit: QueuedCommit) -> None:
        """C7: the waits that are due end, the commit stays where it is."""
        left = inf
        if commit.waiter is not None:
            commit.waiter = self._detach(commit.waiter, commit.last_seq)
        for part in commit.parts.values():
            for index, waiter in enumerate(part.waiters or ()):
                if part.deadlines[index] > now:
                    left = min(left, part.deadlines[index])
                elif waiter is not None and part.waiters is not None:
                    part.waiters[index] = self._detach(waiter, part.seq(index))
                    part.deadlines[index] = inf
        for index, one in enumerate(commit.unresolved):
            if one.deadline > now:
                left = min(left, one.deadline)
            else:
                waiter = self._detach(one.waiter, one.seq)
                commit.unresolved[index] = one._replace(waiter=waiter, deadline=inf)
        commit.deadline = left

    def _detach(self, waiter: Waiter, seq: int) -> Waiter:
        if waiter is None or type(waiter) is Pending:
            return waiter
        if type(waiter) is Prefixed:
            return waiter._replace(waiter=self._detach(waiter.waiter, seq))
        if type(waiter) is Joined:
            return Joined(self._detach(waiter.first, seq), self._detach(waiter.second, seq))
        pending = Pending()
        error = self._unknown("the answer did not come in time", seq)
        error.pending = pending
        self._tell(waiter, error)
        return pending

    def _unknown(self, text: str, seq: int) -> OutcomeUnknown:
        reason = f" ({self._last_failure})" if self._last_failure else ""
        return OutcomeUnknown(text + reason, seq=seq)


def _is_retriable(failed: Failed) -> bool:
    """May the same request succeed later? A code that is not known here says nothing of the kind."""
    return failed.code in Code.__members__ and wire.REMEDIES[Code(failed.code)].retriable


def _is_answer(entry: Any, message: Any) -> bool:
    """Is this what the request asks for, or a refusal?"""
    if type(message) is Failed:
        return True
    if type(entry) is QueuedCommit:
        return type(message) is wire.Committed and (
            message.positions is None or len(message.positions) == len(entry.appends)
        )
    request = type(entry.request) if type(entry) is _Call else wire.Hello if isinstance(entry, Session) else wire.Ping
    return type(message) is wire.REQUESTS[request].reply


def check_topic(name: str) -> None:
    """Whatever is sent must be encodable; whether the topic exists is the broker's answer."""
    checked(wire.Metadata([name]), f"{name!r} is no topic's name: ")


def _check_partition(topic: Topic, record: Record) -> None:
    index = record.partition
    if index is not None and not (type(index) is int and 0 <= index < topic.partitions):
        raise InvalidRequest(f"topic {topic.name!r} has partitions 0 .. {topic.partitions - 1}, not {index!r}")


_PLAIN = Record(b"")
_NO_ANSWERS = frozenset({Code.STALE_CONNECTION, Code.CHECKSUM_MISMATCH})
"""Refusals that say nothing of the request: a newer connection of ours, bytes damaged on the way. Both want another."""
_WAITING = frozenset({wire.Fetch, wire.Heartbeat})
"""Requests that the broker may keep for a while."""
_READS = frozenset(
    {wire.Ping, wire.Metadata, wire.Fetch, wire.OffsetAt, wire.Producers, wire.Offsets, wire.Members, wire.Heartbeat}
)
"""Requests that change nothing anybody relies on: unanswered, they are simply not answered."""
