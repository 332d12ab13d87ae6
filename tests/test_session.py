"""The client's rules (PROTOCOL section 2, C1 to C10), one by one, against a broker that answers by hand. No event loop.

Where the scenarios of others stand (the numbers of VERIFICATION section 2, A to D; `client` = tests/test_client.py,
`core` = tests/test_core.py, `sim` = tests/sim):

 1 client: every reply cut at every byte          2 client: a receipt is what is read
 3 test_unanswered_requests_cut_the_connection    4, 5 test_possibly_stored_then_refused_and_gaps
 6 test_a_duplicate_is_a_success                  7 not ours: every commit has its own answer, none is inferred
 8 test_refused_for_ever_keeps_its_place          9 test_cut_right_after_every_write
10 test_retriable_refusals_resend_all_unchanged  11 test_definite_refusal_of_counted_sends_relinks
12 client: requests cut at every byte            13 test_closing_tells_unknown_from_not_stored
14 test_flush_overrides_linger                   15 test_a_timeout_before_the_topic_or_a_connection_is_known
16 test_resends_everything_oldest_first          17 client: a handler's bug fails the test (support.broker)
18 test_resends_everything_oldest_first          19 test_pauses_grow_with_jitter
20 client: reconnect                             21 test_a_broker_that_accepts_and_never_answers
22, 24, 34 to 37 core and sim                    23 not ours: numbers are 64 bit and do not wrap (core: refused)
25, 26 not ours: no aborted transaction is stored, no transaction is open at the broker
27 to 33 core; 29 client: a forgotten anonymous producer
38, 39, 41, 42, 46, 47, 52 client: transactions  40, 55 groups, a later issue
43, 44, 45 test_a_transaction_of_unknown_outcome_is_resent_until_decided
48, 49 not ours: a transaction is one commit, nothing of it expires by itself
50 test_definite_refusal_of_a_transaction_fails_the_tail
51, 53, 54, 57, 60 not ours: the broker never holds an open transaction
56, 59 client: fencing    58, 61, 63 not ours: no expiry of names, one 64-bit counter of epochs
62 test_fenced_ends_the_producer_for_good; test_an_open_that_is_refused_as_fenced_is_not_tried_again

PITFALLS section 1, the client's rows: 4, 6, 7, 8 below (C1, C7, C3, C8); 5, 33 C9; 25 client; 15, 24 core.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from random import Random
from typing import Any
from zlib import crc32

import pytest

from idemq import (
    ClientClosed,
    ConnectionLost,
    IdemqError,
    InvalidRequest,
    OutcomeUnknown,
    ProducerFenced,
    ProtocolMismatch,
    QuotaExceeded,
    Receipt,
    Record,
    RetriableError,
    SequenceConflict,
    SequenceGap,
    StoreReplaced,
    TransactionAborted,
    TransactionTooLarge,
    UnknownProducer,
    UnknownTopic,
)
from idemq.client import session as core
from idemq.client import wire
from idemq.client.pipeline import Producer, Tally, Topic
from idemq.client.wire import Code, Committed, Failed, Position

TOPIC = Topic("t", 7, 1)


class Script:
    """A session, a clock, and the broker's part by hand. Whoever waits is told once, or the test fails."""

    def __init__(self, topics: dict[str, int] | None = None, **config: Any) -> None:
        self.session = core.Session(core.SessionConfig(session="mine", client="test", **config), Random(7))
        self.now = 100.0
        self.topics = {"t": 1, "u": 1} if topics is None else topics
        """What Metadata is answered; a topic's id is 7 + its place."""
        self.asked: list[core.Frame] = []
        """On this connection, not answered yet."""
        self.told: dict[Any, Any] = {}
        self.dials = self.cuts = 0

    def pump(self) -> None:
        while True:
            actions = self.session.take(self.now)
            if not any(actions):
                return
            for waiter, value in actions.completions:
                assert waiter not in self.told, f"{waiter} is told {self.told[waiter]} and {value}"
                self.told[waiter] = value
            self.asked += actions.frames
            self.dials += actions.dial
            if actions.cut:
                self.cuts += 1
                self.lose("cut")
            for index, frame in enumerate(self.asked):
                if type(frame.request) is wire.Metadata:
                    names = frame.request.names or ()
                    self.answer(wire.Topics([self.entry(one) for one in names if one in self.topics], False), index)
                    break

    def entry(self, name: str) -> wire.TopicEntry:
        partitions = [wire.PartitionEntry(0, 0, 0)] * self.topics[name]
        return wire.TopicEntry(name, 7 + list(self.topics).index(name), wire.Settings(), partitions)

    def connect(self, **welcome: Any) -> None:
        """Dial, greet, and welcome."""
        self.session.connect(self.now)
        self.pump()
        if self.session.state == "idle":
            self.sleep(self.session.config.retry_s_max)
        assert self.session.state == "dialling"
        self.session.connected(self.now)
        self.pump()
        assert [type(frame.request) for frame in self.asked] == [wire.Hello]
        self.answer(wire.Welcome(wire.VERSION, "b", b"i", 5, wire.REMEMBERED)._replace(**welcome))

    def lose(self, reason: str = "lost") -> None:
        """The connection is gone."""
        self.asked.clear()
        self.session.disconnected(self.now, reason)
        self.pump()

    def reconnect(self) -> None:
        self.lose()
        self.connect()

    def answer(self, message: Any, index: int = 0) -> None:
        """Answer a request, the oldest by default."""
        frame = self.asked.pop(index)
        self.session.received(self.now, frame.correlation, message)
        self.pump()

    def sleep(self, seconds: float) -> None:
        """Let time pass, waking the session when it asked for it."""
        end = self.now + seconds
        while self.session.wake_at <= end:
            self.now = max(self.now, self.session.wake_at)
            self.session.tick(self.now)
            self.pump()
        self.now = end

    @property
    def commits(self) -> list[wire.Commit]:
        return [frame.request for frame in self.asked if type(frame.request) is wire.Commit]

    @property
    def links(self) -> list[tuple[int, int]]:
        """(prev_seq, last_seq) of the commits that are not answered."""
        return [(commit.prev_seq, commit.last_seq) for commit in self.commits]

    def producer(self, last_seq: int = -1, *, opened: bool = True, **options: Any) -> Producer:
        """One whose batches hold a single record, so that every send is a commit of its own."""
        settings: dict[str, Any] = {"dedup": True, "linger_s": 0.0, "batch_bytes": 1, "in_flight": 16, "codec": 0}
        settings |= {"anonymous": False, "buffer_bytes": 1 << 20}
        producer = Producer("name", **(settings | options))
        self.session.add(producer)
        if opened and producer.dedup:
            self.session.open(self.now, producer, "open", inf)
            self.pump()
            self.answer(wire.Opened(3, 9, last_seq, None), -1)
            assert self.told.pop("open") is producer
        return producer

    def send(self, producer: Producer, waiter: str, *, topic: str = "t", timeout: float = inf, **record: Any) -> int:
        """Enqueue one record and pump."""
        value = Record(waiter.encode(), **record)
        seq = self.session.enqueue(self.now, producer, topic, value, waiter, self.now + timeout)
        self.pump()
        return seq

    def transact(
        self,
        producer: Producer,
        waiter: str,
        *values: bytes,
        token: bytes | None = None,
        timeout: float = inf,
        seqs: Sequence[int] = (),
        offsets: Sequence[wire.Offset] = (),
    ) -> int:
        records = [Record(value, seq=seqs[index] if seqs else None) for index, value in enumerate(values)]
        sends = [(TOPIC, record) for record in records]
        seq = self.session.transact(self.now, producer, sends, offsets, token, waiter, self.now + timeout)
        self.pump()
        return seq

    def flush(self, producer: Producer, waiter: str, timeout: float = inf) -> None:
        self.session.flush(self.now, producer, waiter, timeout)
        self.pump()

    def many(self, producer: Producer, *values: bytes | Record, topic: str = "t") -> Tally:
        tally = Tally()
        assert self.session.enqueue_many(self.now, producer, topic, list(values), tally) == len(values)
        self.pump()
        return tally


def stored(offset: int = 0, duplicate: bool = False) -> Committed:
    return Committed(duplicate, [Position(offset, 1000)])


def refused(code: Code, **details: Any) -> Failed:
    return Failed(code, f"the script says {code}", details)


def ready(last_seq: int = -1, **options: Any) -> tuple[Script, Producer]:
    script = Script()
    script.connect()
    return script, script.producer(last_seq, **options)


def sent(count: int, given: bool = False, **options: Any) -> tuple[Script, Producer]:
    """A producer with `count` commits in flight, for waiters "0", "1", …"""
    script, producer = ready(**options)
    for n in range(count):
        script.send(producer, "0123456789"[n], seq=n if given else None)
    assert len(script.commits) == min(count, producer.in_flight_max)
    return script, producer


# ------------------------------------------------------------------------------------------------------------- C1, C2


def test_c1_what_was_sent_is_never_cut_again() -> None:
    script, producer = ready(batch_bytes=1000, in_flight=1)
    script.send(producer, "a")
    script.send(producer, "b")
    [first] = [frame for frame in script.asked if type(frame.request) is wire.Commit]
    script.send(producer, "c")
    script.reconnect()
    [again] = script.asked
    assert (again.request, again.payload) == (first.request, first.payload)
    assert script.links == [(-1, 0)]
    script.answer(stored())
    assert script.links == [(0, 2)], "what came later went into a commit of its own"


def test_c1_numbers_are_fixed_at_enqueue_and_never_used_again() -> None:
    script, producer = ready()
    assert [script.send(producer, waiter) for waiter in "abc"] == [0, 1, 2]
    script.answer(refused(Code.TOO_LARGE))
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert isinstance(script.told["a"], IdemqError)
    assert script.send(producer, "d") == 3
    for _ in range(3):
        script.answer(stored())
    script.transact(producer, "tx", b"1", b"2")
    script.answer(refused(Code.TOO_LARGE))
    assert script.send(producer, "e") == 6, "an abort leaves a gap"


def test_c2_a_commit_follows_the_highest_ever_in_flight() -> None:
    script, producer = sent(3)
    assert script.links == [(-1, 0), (0, 1), (1, 2)]
    script.answer(stored())
    script.send(producer, "3")
    assert script.links[-1] == (2, 3)


def test_c2_also_when_a_later_commit_is_answered_first() -> None:
    script, producer = sent(2)
    script.answer(stored(1, duplicate=True), 1)
    assert producer.last_seq == 1
    script.send(producer, "2")
    assert script.links == [(-1, 0), (1, 2)]
    script.answer(stored(0, duplicate=True))
    assert producer.last_seq == 1


def test_an_empty_queue_goes_on_from_what_is_stored() -> None:
    script, producer = ready(last_seq=41)
    assert producer.last_seq == 41
    assert script.send(producer, "a") == 42
    assert script.links == [(41, 42)]


# ----------------------------------------------------------------------------------------------------------------- C3


def test_resends_everything_oldest_first() -> None:
    script, _ = sent(3)
    before = [(frame.request, frame.payload) for frame in script.asked]
    script.reconnect()
    assert [(frame.request, frame.payload) for frame in script.asked] == before
    for offset in range(3):
        script.answer(stored(offset))
    assert [script.told[str(n)].offset for n in range(3)] == [0, 1, 2]


def test_answers_of_an_older_connection_count_for_nothing() -> None:
    script, _ = sent(1)
    [old] = script.asked
    script.reconnect()
    script.session.received(script.now, old.correlation, refused(Code.UNKNOWN_TOPIC))
    script.pump()
    assert script.told == {}
    assert script.links == [(-1, 0)]
    script.answer(stored())
    assert script.told["0"].offset == 0


def test_unanswered_requests_cut_the_connection() -> None:
    """Never sent twice on one connection: a timeout cuts it."""
    script, _ = sent(2)
    script.answer(stored())
    for cuts in range(1, 4):
        due = script.session.config.answer_s_max
        script.sleep(due * 0.99)
        assert (script.cuts, len(script.commits)) == (cuts - 1, 1)
        script.sleep(due * 0.02)
        assert script.cuts == cuts
        script.connect()
        assert script.links == [(0, 1)]
    script.answer(stored(1))
    assert script.told["1"].offset == 1


def test_cut_right_after_every_write() -> None:
    script, _ = sent(3)
    for _ in range(10):
        script.reconnect()
        assert script.links == [(-1, 0), (0, 1), (1, 2)]
    for n in range(3):
        script.answer(stored(n, duplicate=True))
    assert [script.told[str(n)].duplicate for n in range(3)] == [True] * 3


def test_a_duplicate_is_a_success() -> None:
    script, producer = sent(2)
    script.answer(Committed(True, None))
    script.answer(stored(9, duplicate=True))
    assert script.told["0"] == Receipt("t", 0, None, 0, None, True), "stored, and no longer remembered where"
    assert script.told["1"] == Receipt("t", 0, 9, 1, 1000, True)
    assert producer.last_seq == 1


@pytest.mark.parametrize("code", [Code.STALE_CONNECTION, Code.CHECKSUM_MISMATCH])
def test_what_is_no_answer_to_the_commit_cuts_the_connection(code: Code) -> None:
    script, _ = sent(2)
    script.answer(refused(code))
    assert (script.cuts, script.told) == (1, {})
    script.connect()
    assert script.links == [(-1, 0), (0, 1)]


def test_a_damaged_question_is_asked_again_on_another_connection() -> None:
    script = Script()
    script.connect()
    script.session.call(script.now, wire.Ping(), "ping", inf)
    script.pump()
    script.answer(refused(Code.CHECKSUM_MISMATCH))
    assert script.cuts == 1
    script.connect()
    script.answer(wire.Pong(5))
    assert script.told == {"ping": wire.Pong(5)}


# ------------------------------------------------------------------------------------------------------------- C4, C5


@pytest.mark.parametrize("code", [Code.STORE_FULL, Code.BUSY])
def test_retriable_refusals_resend_all_unchanged(code: Code) -> None:
    script, producer = sent(3)
    before = [(frame.request, frame.payload) for frame in script.asked]
    script.answer(refused(code))
    script.send(producer, "3")
    assert len(script.commits) == 2, "nothing new while the answers of this connection are awaited"
    script.answer(refused(Code.SEQUENCE_GAP))
    assert len(script.commits) == 1, "not all are here"
    script.answer(refused(Code.SEQUENCE_GAP))
    assert script.commits == [], "a pause first"
    script.sleep(script.session.config.retry_s_max)
    assert [(frame.request, frame.payload) for frame in script.asked[:3]] == before
    assert script.links[3:] == [(2, 3)]
    assert script.told == {}
    for _ in range(4):
        script.answer(stored())
    assert all(type(receipt) is Receipt for receipt in script.told.values())


@pytest.mark.parametrize("count", range(1, 6))
def test_possibly_stored_then_refused_and_gaps(count: int) -> None:
    script, _ = sent(count)
    script.reconnect()
    script.answer(refused(Code.BUSY))
    for _ in range(count - 1):
        script.answer(refused(Code.SEQUENCE_GAP))
    script.sleep(script.session.config.retry_s_max)
    for offset in range(count):
        script.answer(stored(offset))
    assert [script.told[str(n)].offset for n in range(count)] == list(range(count))


def test_refused_for_ever_keeps_its_place() -> None:
    script, producer = ready()
    script.send(producer, "0", timeout=10)
    script.send(producer, "1", timeout=10)
    for _ in range(20):
        script.answer(refused(Code.STORE_FULL))
        script.answer(refused(Code.SEQUENCE_GAP))
        script.sleep(script.session.config.retry_s_max)
        assert script.links == [(-1, 0), (0, 1)], "nothing jumps the queue"
    assert [(type(error), error.seq) for error in script.told.values()] == [(OutcomeUnknown, 0), (OutcomeUnknown, 1)]
    assert "the script says STORE_FULL" in str(script.told["0"]), "and it says why"


def test_a_retriable_refusal_before_a_cut_is_forgotten() -> None:
    script, _ = sent(2)
    script.answer(refused(Code.BUSY))
    script.reconnect()
    assert script.links == [(-1, 0), (0, 1)]
    script.answer(stored())
    script.answer(stored())
    assert len(script.told) == 2


def test_only_what_was_sent_on_this_connection_is_awaited() -> None:
    script, _ = sent(3)
    script.lose()
    script.connect(remembered=1)
    script.answer(refused(Code.BUSY))
    script.sleep(script.session.config.retry_s_max)
    assert script.links == [(-1, 0)]


def test_definite_refusal_of_counted_sends_relinks() -> None:
    script, producer = sent(3)
    script.answer(refused(Code.TOO_LARGE))
    assert script.told == {}, "drain first"
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert script.told.pop("0").code == "TOO_LARGE"
    assert script.links == [(-1, 1), (1, 2)]
    script.answer(stored(0))
    script.answer(stored(1))
    assert [script.told[n].seq for n in "12"] == [1, 2]
    assert producer.error is None


def test_definite_refusal_in_the_middle() -> None:
    script, _ = sent(3)
    script.answer(stored())
    script.answer(refused(Code.TOO_LARGE))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert script.links == [(0, 2)]


def test_definite_refusal_of_given_numbers_fails_the_tail() -> None:
    """Relinking would move last_seq past a position that is not stored, and a restart would skip it for ever."""
    script, producer = sent(3, given=True, in_flight=2)
    script.answer(stored())
    script.answer(refused(Code.UNKNOWN_TOPIC))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert type(script.told["1"]) is UnknownTopic
    assert type(script.told["2"]) is RetriableError
    assert (script.told["2"].code, producer.last_seq) == ("NOT_STORED", 0)
    assert script.send(producer, "again", seq=1) == 1, "the same numbers may come again"
    assert script.links == [(0, 1)]


def test_definite_refusal_of_a_transaction_fails_the_tail() -> None:
    script, producer = ready()
    script.transact(producer, "tx", b"1")
    script.send(producer, "plain")
    script.transact(producer, "next", b"2")
    script.answer(refused(Code.TOO_LARGE))
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert script.told["tx"].code == "TOO_LARGE"
    assert type(script.told["plain"]) is RetriableError
    assert type(script.told["next"]) is TransactionAborted
    script.transact(producer, "later", b"3")
    assert script.links == [(-1, 3)], "the next one works, and follows what is stored"


def test_c5_no_word_about_the_tail_before_it_is_answered_on_this_connection() -> None:
    script, _ = sent(2, given=True)
    script.reconnect()
    script.answer(refused(Code.UNKNOWN_TOPIC))
    assert script.told == {}
    script.reconnect()
    assert script.links == [(-1, 0), (0, 1)], "all are sent again: a refusal of the old connection is not the end"
    script.answer(stored(3, duplicate=True))
    script.answer(stored(4, duplicate=True))
    assert [script.told[n].offset for n in "01"] == [3, 4]


def test_a_gap_without_a_refusal_before_it_ends_the_producer() -> None:
    script, producer = sent(2)
    script.answer(refused(Code.SEQUENCE_GAP, expected=17))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert [type(script.told[n]) for n in "01"] == [SequenceGap, SequenceGap]
    assert script.told["0"].details == {"expected": 17}
    with pytest.raises(SequenceGap):
        script.send(producer, "2")


def test_a_refusal_that_is_no_gap_is_the_reason() -> None:
    script, producer = sent(2)
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(refused(Code.PRODUCER_FENCED, ended_at=-1))
    assert type(producer.error) is ProducerFenced


def test_a_conflict_ends_the_producer_and_leaves_the_rest_unknown() -> None:
    script, producer = sent(2)
    script.answer(refused(Code.SEQUENCE_CONFLICT))
    script.answer(refused(Code.SEQUENCE_GAP))
    assert type(script.told["0"]) is SequenceConflict
    assert isinstance(script.told["1"], OutcomeUnknown)
    assert producer.error is script.told["0"]


def test_an_unknown_topic_is_looked_up_again() -> None:
    script, producer = sent(1)
    script.topics = {"x": 1, "t": 1}
    script.answer(refused(Code.UNKNOWN_TOPIC))
    assert type(script.told["0"]) is UnknownTopic
    script.send(producer, "1")
    assert script.commits[0].appends[0].topic_id == 8, "the topic that has this name now"


# ------------------------------------------------------------------------------------------------------------ C6, C10


def test_c6_fenced_tells_what_is_stored() -> None:
    script, producer = sent(4, in_flight=3)
    script.answer(refused(Code.PRODUCER_FENCED, ended_at=1))
    script.answer(refused(Code.PRODUCER_FENCED, ended_at=1))
    script.answer(refused(Code.PRODUCER_FENCED, ended_at=1))
    assert [script.told[n] for n in "01"] == [Receipt("t", 0, None, n, None, True) for n in (0, 1)]
    assert [type(script.told[n]) for n in "23"] == [ProducerFenced] * 2
    assert producer.last_seq == 1


def test_c6_fenced_without_an_end_leaves_it_unknown() -> None:
    script, producer = ready(in_flight=1)
    script.send(producer, "sent")
    script.send(producer, "not sent")
    script.answer(refused(Code.PRODUCER_FENCED, ended_at=None))
    assert isinstance(script.told["sent"], OutcomeUnknown)
    assert type(script.told["not sent"]) is ProducerFenced


def test_fenced_ends_the_producer_for_good() -> None:
    script, producer = sent(1)
    script.answer(refused(Code.PRODUCER_FENCED, ended_at=-1, holder="other", address="there:1"))
    with pytest.raises(ProducerFenced):
        script.send(producer, "1")
    script.session.open(script.now, producer, "open", inf)
    script.reconnect()
    script.sleep(60)
    assert type(script.told["open"]) is ProducerFenced
    assert not [frame for frame in script.asked if type(frame.request) is wire.Open]


@pytest.mark.parametrize(
    ("code", "error"), [(Code.UNKNOWN_PRODUCER, UnknownProducer), (Code.STORE_REPLACED, StoreReplaced)]
)
def test_c6_a_producer_that_is_gone_leaves_all_unknown_and_is_not_opened_again(
    code: Code, error: type[IdemqError]
) -> None:
    script, producer = sent(3, in_flight=2)
    script.answer(refused(code))
    script.answer(refused(code))
    assert [isinstance(script.told[n], OutcomeUnknown) for n in "012"] == [True, True, False]
    assert type(script.told["2"]) is error, "never sent, so not stored"
    assert type(producer.error) is error
    assert [frame for frame in script.asked if type(frame.request) is wire.Open] == []


def test_a_token_is_known_when_it_is_stored() -> None:
    script, producer = ready()
    script.transact(producer, "tx", b"1", token=b"position")
    assert producer.token is None
    script.answer(stored())
    assert producer.token == b"position"


# ------------------------------------------------------------------------------------------------------------- C7, C9


def test_c7_a_timeout_ends_the_wait_and_nothing_else() -> None:
    script, producer = ready()
    script.send(producer, "0", timeout=5)
    script.send(producer, "1")
    script.sleep(6)
    error = script.told["0"]
    assert (isinstance(error, OutcomeUnknown), isinstance(error, TimeoutError), error.seq) == (True, True, 0)
    assert script.links == [(-1, 0), (0, 1)]
    script.reconnect()
    assert script.links == [(-1, 0), (0, 1)], "it keeps its number and its place"
    error.pending.waiters.append("outcome")
    script.answer(stored(7))
    assert script.told["outcome"] == Receipt("t", 0, 7, 0, 1000, False)
    assert (error.pending.done, error.pending.value) == (True, script.told["outcome"])


def test_c7_cancelling_detaches_the_one_who_waits() -> None:
    script, producer = sent(3)
    script.session.detach(producer, 1, "1")
    script.reconnect()
    for offset in range(3):
        script.answer(stored(offset))
    assert set(script.told) == {"0", "2"}
    assert producer.last_seq == 2


@pytest.mark.parametrize("leave", ["cancel", "timeout"])
def test_a_failure_that_nobody_waits_for_is_told_by_flush(leave: str) -> None:
    script, producer = ready()
    script.send(producer, "0", timeout=5)
    if leave == "cancel":
        script.session.detach(producer, 0, "0")
    else:
        script.sleep(5)
    script.flush(producer, "flush")
    script.answer(refused(Code.TOO_LARGE))
    assert script.told["flush"].code == "TOO_LARGE"
    script.flush(producer, "again")
    assert script.told["again"] is None, "once"


def test_a_failure_told_to_the_one_who_waits_is_not_told_again() -> None:
    script, producer = ready()
    script.send(producer, "0")
    script.transact(producer, "token only", token=b"x")
    script.flush(producer, "flush")
    script.answer(refused(Code.TOO_LARGE))
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(refused(Code.TOO_LARGE))
    assert script.told["0"].code == script.told["token only"].code == "TOO_LARGE"
    assert script.told["flush"] is None


def test_a_cancelled_flush_leaves_the_failure_for_the_next() -> None:
    script, producer = ready()
    script.send(producer, "0")
    script.session.detach(producer, 0, "0")
    script.flush(producer, "cancelled")
    script.session.leave_flush(producer, "cancelled")
    script.answer(refused(Code.TOO_LARGE))
    script.flush(producer, "flush")
    assert script.told["flush"].code == "TOO_LARGE"
    assert "cancelled" not in script.told


def test_a_send_many_that_nobody_waits_for_leaves_its_failures_for_flush() -> None:
    script, producer = ready()
    one, two = script.many(producer, b"a"), script.many(producer, b"b")
    script.session.abandon(producer, one)
    script.session.finish(script.now, producer, two, "two", 5)
    script.sleep(6)
    assert isinstance(script.told["two"], OutcomeUnknown)
    script.session.abandon(producer, two)
    script.answer(refused(Code.TOO_LARGE))
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(refused(Code.TOO_LARGE))
    assert [error.code for error in producer.unreported] == ["TOO_LARGE", "TOO_LARGE"]


def test_a_failure_that_send_many_had_not_raised_when_it_ended_is_told_by_flush() -> None:
    script, producer = ready()
    tally = script.many(producer, b"a")
    script.answer(refused(Code.TOO_LARGE))
    script.session.abandon(producer, tally)
    script.flush(producer, "flush")
    assert script.told["flush"].code == "TOO_LARGE"


def test_a_send_many_is_told_its_first_failure_and_flush_nothing() -> None:
    script, producer = ready()
    tally = script.many(producer, b"a", b"b")
    script.session.finish(script.now, producer, tally, "many", 5)
    script.answer(refused(Code.TOO_LARGE))
    script.answer(refused(Code.SEQUENCE_GAP))
    script.answer(stored())
    assert script.told["many"] is tally
    assert (tally.error is not None and tally.error.code, tally.stored) == ("TOO_LARGE", 1)
    script.flush(producer, "flush")
    assert script.told["flush"] is None


def test_closing_tells_unknown_from_not_stored() -> None:
    """Giving up is ending the session; opening the name again decides."""
    script, producer = ready(in_flight=1)
    script.send(producer, "sent")
    script.send(producer, "waiting")
    script.session.remove(script.now, producer)
    script.pump()
    assert isinstance(script.told["sent"], OutcomeUnknown)
    assert script.told["sent"].seq == 0
    assert type(script.told["waiting"]) is ClientClosed


def test_closing_the_session_tells_everybody_and_stays_closed() -> None:
    script, producer = sent(1)
    script.session.call(script.now, wire.Ping(), "ping", inf)
    script.session.want_room(producer, "room")
    script.pump()
    script.session.close(script.now)
    script.pump()
    assert isinstance(script.told["0"], OutcomeUnknown)
    assert type(script.told["ping"]) is ClientClosed
    assert "room" in script.told, "it finds out by itself"
    script.session.call(script.now, wire.Ping(), "later", inf)
    script.sleep(100)
    assert type(script.told["later"]) is ClientClosed
    assert (script.session.state, script.dials) == ("closed", 1)


def test_a_transaction_of_unknown_outcome_is_resent_until_decided() -> None:
    script, producer = ready()
    script.transact(producer, "tx", b"1", b"2", timeout=5)
    [before] = script.asked
    script.sleep(6)
    error = script.told["tx"]
    assert (isinstance(error, OutcomeUnknown), error.seq) == (True, 1)
    script.reconnect()
    [again] = script.asked
    assert (again.request, again.payload) == (before.request, before.payload)
    error.pending.waiters.append("outcome")
    script.answer(stored(4, duplicate=True))
    assert [receipt.offset for receipt in script.told["outcome"]] == [4, 5]


def test_an_error_between_the_timeout_and_the_question_is_kept() -> None:
    script, producer = ready()
    script.transact(producer, "tx", b"1", timeout=5)
    script.sleep(6)
    script.answer(refused(Code.TOO_LARGE))
    pending = script.told["tx"].pending
    assert (pending.done, pending.value.code) == (True, "TOO_LARGE")


# ----------------------------------------------------------------------------------------------------------------- C8


def test_c8_given_numbers_that_are_stored_are_not_sent() -> None:
    script, producer = ready(last_seq=10)
    script.send(producer, "9", seq=9)
    script.send(producer, "10", seq=10)
    assert script.commits == []
    assert script.told["9"] == Receipt("t", None, None, 9, None, True), "nothing was asked about the topic yet"
    tally = script.many(producer, *[Record(b"x", seq=n) for n in range(8, 13)])
    assert script.links == [(10, 11), (11, 12)]
    script.answer(stored())
    script.answer(stored())
    assert (tally.stored, tally.duplicates, producer.last_seq) == (2, 3, 12)


def test_c8_what_was_stored_before_names_a_partition_only_if_there_is_one_that_it_goes_to() -> None:
    script = Script({"one": 1, "three": 3})
    script.connect()
    producer = script.producer(last_seq=10)
    keyed = crc32(b"k") % 3
    assert keyed
    given = [{"partition": 2}, {"key": b"k"}, {}]
    for learnt, topic, expected in (
        ("", "three", [2, None, None]),
        ("three", "three", [2, keyed, None]),
        ("one", "one", [2, 0, 0]),
    ):
        if learnt:
            script.send(producer, learnt, topic=learnt, seq=producer.highest + 1, partition=0)
            script.answer(stored())
        for number, record in enumerate(given):
            script.send(producer, str(number), topic=topic, seq=number, **record)
        assert [script.told.pop(str(number)).partition for number in range(3)] == expected
    three = Topic("three", 8, 3)
    sends = [(three, Record(b"", seq=number, **record)) for number, record in enumerate(given)]
    script.session.transact(script.now, producer, sends, (), None, "all", inf)
    script.pump()
    assert [one.partition for one in script.told["all"]] == [2, keyed, None]


def test_c8_a_number_in_line_is_waited_for() -> None:
    script, producer = ready()
    script.send(producer, "first", seq=5)
    script.send(producer, "second", seq=5)
    assert script.links == [(-1, 5)]
    script.answer(stored(3))
    assert script.told["first"] == Receipt("t", 0, 3, 5, 1000, False)
    assert script.told["second"] == Receipt("t", 0, 3, 5, 1000, True)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("leaver", ["first", "second"])
def test_two_who_wait_for_one_number_leave_one_by_one(known: bool, leaver: str) -> None:
    script, producer = ready()
    if known:
        script.send(producer, "warm", seq=1)
        script.answer(stored())
        del script.told["warm"]
    producer.opened = known  # what is not opened is not sent, so its topic stays unknown for now
    script.topics = {"t": 1} if known else {}
    name = "t" if known else "later"
    for waiter in ("first", "second"):
        script.session.enqueue(script.now, producer, name, Record(b"", seq=5), waiter, inf) if known else None
    if not known:
        producer.opened = True
        script.session.enqueue(script.now, producer, name, Record(b"", seq=5), "first", inf)
        script.session.enqueue(script.now, producer, name, Record(b"", seq=5), "second", inf)
        script.session.take(script.now)  # the question is asked, and not answered
    script.session.detach(producer, 5, leaver)
    if known:
        script.pump()
        script.answer(refused(Code.TOO_LARGE))
    else:
        script.session.close(script.now)
        script.pump()
    [(waiter, error)] = script.told.items()
    assert waiter == ({"first", "second"} - {leaver}).pop()
    assert isinstance(error, IdemqError)
    assert producer.unreported == []


def test_two_who_wait_for_one_number_time_out_one_after_the_other() -> None:
    script, producer = ready()
    script.send(producer, "first", seq=5, timeout=5)
    script.sleep(6)
    first = script.told["first"].pending
    script.send(producer, "second", seq=5, timeout=5)
    script.sleep(6)
    second = script.told["second"].pending
    assert not first.done
    script.answer(stored(3))
    assert (first.value.offset, second.value.offset) == (3, 3)


def test_given_numbers_may_have_gaps_and_nothing_else() -> None:
    script, producer = ready()
    script.send(producer, "a", seq=0)
    script.send(producer, "b", seq=10)
    script.send(producer, "c", seq=2**63 - 1)
    assert script.links == [(-1, 0), (0, 10), (10, 2**63 - 1)]
    for wrong in (-1, 2**63, True, 1.0, "1"):
        with pytest.raises(InvalidRequest, match="seq must be"):
            script.send(producer, "wrong", seq=wrong)
    with pytest.raises(InvalidRequest, match="pass seq with every message"):
        script.send(producer, "wrong")
    counting = script.producer()
    script.send(counting, "counted")
    with pytest.raises(InvalidRequest, match="counts by itself"):
        script.send(counting, "wrong", seq=1)
    with pytest.raises(InvalidRequest, match="no numbers"):
        script.send(script.producer(dedup=False), "wrong", seq=1)
    with pytest.raises(InvalidRequest, match="numbers need a named producer"):
        script.send(script.producer(opened=False), "wrong", seq=1)


def test_a_transaction_leaves_out_what_is_stored() -> None:
    script, producer = ready(last_seq=5)
    script.transact(producer, "tx", b"5", b"6", b"7", seqs=(5, 6, 7))
    assert script.links == [(5, 7)]
    script.answer(stored(30))
    assert [(one.seq, one.offset, one.duplicate) for one in script.told["tx"]] == [
        (5, None, True), (6, 30, False), (7, 31, False),
    ]  # fmt: skip
    script.transact(producer, "all", b"6", b"7", seqs=(6, 7))
    assert [one.duplicate for one in script.told["all"]] == [True, True]
    assert script.commits == []


def test_a_second_wait_has_its_deadline_while_the_topic_is_unknown() -> None:
    script, producer = ready()
    script.lose()
    script.send(producer, "first", topic="u", seq=1)
    script.send(producer, "second", topic="u", seq=1, timeout=5)
    script.sleep(6)
    assert isinstance(script.told["second"], OutcomeUnknown)


def test_a_refused_transaction_leaves_no_trace() -> None:
    script, producer = ready()
    too_large = b"x" * (6 << 20)
    with pytest.raises(TransactionTooLarge):
        script.transact(producer, "large", too_large, too_large, too_large)
    with pytest.raises(InvalidRequest, match="seq must be"):
        script.transact(producer, "wrong", b"1", b"2", seqs=(0, -5))
    assert (producer.highest, producer.given, len(producer.queue)) == (-1, None, 0)
    assert script.send(producer, "a") == 0


def test_a_transaction_of_more_positions_than_a_commit_holds_is_refused_before_it_is_sent() -> None:
    """The broker could not even read it, and would be sent it again and again."""

    def moved(count: int, metadata: bytes | None) -> list[wire.Offset]:
        top = wire.NUMBER_MAX
        name = "g" * wire.NAME_BYTES_MAX
        return [wire.Offset(name, top - n // 1024, n % 1024, top, top, top, metadata) for n in range(count)]

    script, producer = ready()
    few = core.METADATA_BYTES_MAX // wire.TOKEN_BYTES_MAX
    for offsets in (moved(wire.APPENDS_MAX + 1, None), moved(few + 1, b"m" * wire.TOKEN_BYTES_MAX)):
        with pytest.raises(TransactionTooLarge):
            script.transact(producer, "too many", offsets=offsets)
    assert len(producer.queue) == 0
    most = core.METADATA_BYTES_MAX // wire.APPENDS_MAX
    script.transact(producer, "most", token=b"t" * wire.TOKEN_BYTES_MAX, offsets=moved(wire.APPENDS_MAX, b"m" * most))
    [commit] = script.commits
    top = wire.NUMBER_MAX
    appends = [wire.Append(top - n, wire.PARTITIONS_MAX - 1, wire.COMMIT_BYTES_MAX) for n in range(wire.APPENDS_MAX)]
    longest = commit._replace(producer_id=top, epoch=top, prev_seq=top, last_seq=top, appends=appends)
    wire.check(longest)
    assert len(wire.encode(wire.NUMBER_MAX, longest)) < wire.HEADER_BYTES_MAX


# ------------------------------------------------------------------------------------- topics that are not known yet


def test_sends_wait_for_their_topic_in_their_order() -> None:
    script, producer = ready(batch_bytes=1000)
    script.topics = {"t": 4}
    for n in range(6):
        script.session.enqueue(script.now, producer, "t", Record(b"%d" % n, partition=n % 2), str(n), inf)
    script.pump()
    [commit] = script.commits
    assert [(append.topic_id, append.partition) for append in commit.appends] == [(7, 0), (7, 1)]
    script.answer(Committed(False, [Position(10, 1), Position(20, 1)]))
    assert [script.told[str(n)].offset for n in range(6)] == [10, 20, 11, 21, 12, 22]


@pytest.mark.parametrize("batch_bytes", [1, 1000])
def test_a_topic_that_does_not_exist_fails_its_own_sends_only(batch_bytes: int) -> None:
    script, producer = ready(batch_bytes=batch_bytes)
    for waiter, topic in (("a", "t"), ("b", "none"), ("c", "t")):
        script.session.enqueue(script.now, producer, topic, Record(b""), waiter, inf)
    script.pump()
    assert type(script.told["b"]) is UnknownTopic
    assert script.links == [(-1, 0), (0, 2)]


def test_a_partition_that_does_not_exist() -> None:
    script, producer = ready(batch_bytes=1000)
    for n, partition in enumerate((0, 1, 0)):
        script.session.enqueue(script.now, producer, "t", Record(b"", partition=partition), n, inf)
    tally = script.many(producer, Record(b"", partition=5), b"good")
    assert type(script.told[1]) is InvalidRequest
    script.answer(stored())
    assert [script.told[n].offset for n in (0, 2)] == [0, 1]
    assert type(tally.error) is InvalidRequest
    assert tally.stored == 1
    assert producer.unreported == []
    for wrong in (1, -1, "0", True, 0.0):
        with pytest.raises(InvalidRequest, match="partitions 0"):
            script.send(producer, "wrong", partition=wrong)


def test_a_partition_that_does_not_exist_takes_no_given_number() -> None:
    script, producer = ready()
    script.session.enqueue(script.now, producer, "t", Record(b"", partition=5, seq=3), "wrong", inf)
    script.session.enqueue(script.now, producer, "t", Record(b"", seq=4), "behind", inf)
    script.pump()
    assert type(script.told["wrong"]) is InvalidRequest
    assert type(script.told["behind"]) is RetriableError
    script.send(producer, "right", seq=3)
    assert script.links == [(-1, 3)]


def test_a_topic_name_that_cannot_be_sent_is_refused_at_once() -> None:
    script, producer = ready()
    for wrong in (5, None, "\ud800", "x" * 5000):
        with pytest.raises(InvalidRequest, match="no topic's name"):
            script.send(producer, "wrong", topic=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="no topic's name"):
            script.many(producer, b"x", topic=wrong)  # type: ignore[arg-type]
    assert (len(producer.queue), producer.highest) == (0, -1)


def test_headers_are_copied_while_the_topic_is_unknown() -> None:
    script, producer = ready()
    headers = {"n": b"1"}
    script.session.enqueue(script.now, producer, "t", Record(b"", headers=headers), "a", inf)
    headers["n"] = b"2"
    script.pump()
    assert b"\xa1n\xc4\x011" in b"".join(script.asked[0].payload)


def test_topics_are_refreshed_behind_the_sends() -> None:
    script, producer = sent(1)
    script.answer(stored())
    script.topics = {"t": 8}
    script.sleep(script.session.config.topic_age_s_max + 1)
    script.send(producer, "old", key=b"k")
    assert script.commits[0].appends[0].partition == 0
    script.send(producer, "new", partition=7)
    assert script.commits[1].appends[0].partition == 7


def test_a_timeout_before_the_topic_or_a_connection_is_known() -> None:
    script = Script()
    producer = script.producer(opened=False)
    script.send(producer, "a", timeout=5)
    script.sleep(6)
    assert isinstance(script.told["a"], OutcomeUnknown)
    script.session.call(script.now, wire.Ping(), "ping", script.now + 5)
    script.lose("nobody listens")
    script.sleep(6)
    assert type(script.told["ping"]) is ConnectionLost
    assert "nobody listens" in str(script.told["ping"])


# ----------------------------------------------------------------------------------------------- opening, connections


def test_a_fresh_session_asks_again_with_the_epoch_it_is_told() -> None:
    script = Script()
    script.connect()
    producer = script.producer(opened=False)
    script.session.open(script.now, producer, "open", inf)
    script.pump()
    for epoch in (4, 6):
        script.answer(refused(Code.OPEN_RACE, epoch=epoch))
        assert script.asked[0].request.expected_epoch == epoch
    script.answer(wire.Opened(3, 7, 12, b"token"))
    assert script.told["open"] is producer
    assert (producer.id, producer.epoch, producer.last_seq, producer.token) == (3, 7, 12, b"token")


def test_reconnecting_does_not_open() -> None:
    script, _ = sent(1)
    script.reconnect()
    assert [type(frame.request) for frame in script.asked] == [wire.Commit]
    assert script.commits[0].epoch == 9


def test_an_open_that_is_refused_as_fenced_is_not_tried_again() -> None:
    script = Script()
    script.connect()
    producer = script.producer(opened=False)
    script.session.open(script.now, producer, "open", inf)
    script.pump()
    script.answer(refused(Code.PRODUCER_FENCED))
    assert type(script.told["open"]) is ProducerFenced
    script.reconnect()
    script.sleep(60)
    assert script.asked == [] or [type(frame.request) for frame in script.asked] == [wire.Ping]


def test_a_refused_open_fails_what_waits_for_it() -> None:
    script = Script()
    script.connect()
    producer = script.producer(opened=False, anonymous=True)
    script.send(producer, "a")
    script.answer(refused(Code.QUOTA_EXCEEDED))
    assert script.told["a"].code == "QUOTA_EXCEEDED"
    with pytest.raises(QuotaExceeded):
        script.send(producer, "b")


def test_an_open_that_is_not_answered_in_time_may_be_tried_again() -> None:
    script = Script()
    script.connect()
    producer = script.producer(opened=False)
    script.session.open(script.now, producer, "late", script.now + 5)
    script.sleep(6)
    assert isinstance(script.told["late"], OutcomeUnknown)
    script.session.open(script.now, producer, "open", inf)
    script.reconnect()
    script.answer(wire.Opened(3, 7, 12, None))
    assert script.told["open"] is producer


def test_a_producer_made_after_the_end_has_ended() -> None:
    script = Script()
    script.connect()
    script.session.close(script.now)
    producer = script.producer(opened=False)
    with pytest.raises(ClientClosed):
        script.send(producer, "a")


def test_an_anonymous_producer_is_opened_by_its_first_use() -> None:
    for use in ("send", "many", "transact"):
        script = Script()
        script.connect()
        producer = script.producer(opened=False, anonymous=True)
        if use == "send":
            script.send(producer, "a")
        elif use == "many":
            script.many(producer, b"a")
        else:
            script.transact(producer, "a", b"1")
        assert [type(frame.request) for frame in script.asked] == [wire.Open], use
        script.answer(wire.Opened(3, 9, -1, None))
        assert script.links == [(-1, 0)], use


def test_without_dedup_nothing_is_opened_or_numbered() -> None:
    script = Script()
    script.connect()
    producer = script.producer(dedup=False)
    script.send(producer, "a")
    script.send(producer, "b")
    assert [(commit.producer_id, commit.prev_seq) for commit in script.commits] == [(0, -1), (0, -1)]
    script.answer(stored(1), 1)
    script.answer(stored(0))
    assert script.told["a"] == Receipt("t", 0, 0, None, 1000, False)
    assert script.told["b"].offset == 1


@pytest.mark.parametrize(("remembered", "in_flight", "expected"), [(32, 16, 16), (32, 3, 3), (2, 16, 2)])
def test_in_flight_obeys_what_the_broker_remembers(remembered: int, in_flight: int, expected: int) -> None:
    script = Script()
    script.connect(remembered=remembered)
    producer = script.producer(in_flight=in_flight)
    for n in range(20):
        script.send(producer, str(n))
    assert len(script.commits) == expected
    script.answer(stored())
    assert len(script.commits) == expected


@pytest.mark.parametrize("welcome", [{"incarnation": b"other"}, {"txn_id": 4}])
def test_another_store_ends_the_client_before_anything_is_sent(welcome: dict[str, Any]) -> None:
    script, producer = sent(1)
    script.session.call(script.now, wire.Ping(), "ping", inf)
    script.lose()
    script.connect(**welcome)
    assert script.asked == []
    assert isinstance(script.told["0"], OutcomeUnknown)
    assert type(script.told["ping"]) is StoreReplaced
    assert type(script.session.error) is StoreReplaced
    with pytest.raises(StoreReplaced):
        script.send(producer, "1")
    dials = script.dials
    script.sleep(100)
    assert script.dials == dials


def test_the_same_store_further_on_is_the_same_store() -> None:
    script, _ = sent(1)
    script.lose()
    script.connect(txn_id=6)
    assert script.links == [(-1, 0)]
    assert script.session.reconnects == 1


def test_a_broker_that_accepts_and_never_answers() -> None:
    script = Script()
    script.session.call(script.now, wire.Ping(), "ping", script.now + 20)
    script.pump()
    script.session.connected(script.now)
    script.pump()
    script.sleep(script.session.config.answer_s_max + 0.1)
    assert script.cuts == 1
    script.sleep(20)
    assert type(script.told["ping"]) is ConnectionLost


@pytest.mark.parametrize("code", [Code.AUTH_FAILED, Code.PROTOCOL_MISMATCH])
def test_a_refused_greeting_ends_the_client(code: Code) -> None:
    script = Script()
    script.session.call(script.now, wire.Ping(), "ping", inf)
    script.pump()
    script.session.connected(script.now)
    script.pump()
    script.answer(refused(code))
    script.sleep(100)
    assert (script.told["ping"].code, script.dials) == (code, 1)


def test_a_busy_greeting_is_tried_again() -> None:
    script = Script()
    script.session.call(script.now, wire.Ping(), "ping", inf)
    script.pump()
    script.session.connected(script.now)
    script.pump()
    script.session.received(script.now, 0, refused(Code.BUSY))  # the broker refuses before it reads
    script.pump()
    assert script.told == {}
    script.connect()
    script.answer(wire.Pong(1))
    assert script.told == {"ping": wire.Pong(1)}


def test_nonsense_before_the_first_welcome_is_another_protocol_and_later_a_broken_connection() -> None:
    script = Script()
    script.session.call(script.now, wire.Ping(), "ping", inf)
    script.pump()
    script.session.connected(script.now)
    script.pump()
    script.session.protocol_broken(script.now, "HTTP/1.1")
    script.pump()
    assert type(script.told["ping"]) is ProtocolMismatch
    script, _ = sent(1)
    script.session.protocol_broken(script.now, "damaged")
    script.pump()
    script.connect()
    assert script.links == [(-1, 0)]


def test_pauses_grow_with_jitter() -> None:
    script = Script()
    pauses = [script.session._pause(failures) for failures in range(30)]
    longest = [min(2.0, 0.05 * 2**failures) for failures in range(30)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, longest, strict=True))
    assert len({round(pause / limit, 6) for pause, limit in zip(pauses, longest, strict=True)}) == 30


def test_a_dial_that_fails_is_tried_again_and_again() -> None:
    script = Script()
    script.session.call(script.now, wire.Ping(), "ping", script.now + 30)
    script.pump()
    pauses = []
    for dials in range(1, 8):
        assert script.dials == dials
        script.lose("refused")
        pauses.append(script.session.wake_at - script.now)
        script.sleep(2.0)
    assert pauses[0] <= 0.05
    assert pauses[6] >= 1.0
    script.session.connected(script.now)
    script.pump()
    script.answer(wire.Welcome(1, "b", b"i", 5, 32))
    script.answer(wire.Pong(1))
    assert script.told == {"ping": wire.Pong(1)}


def test_an_idle_connection_is_asked_whether_it_lives() -> None:
    script = Script()
    script.connect()
    script.sleep(script.session.config.idle_s + 1)
    assert [type(frame.request) for frame in script.asked] == [wire.Ping]
    script.answer(wire.Pong(1))
    script.sleep(script.session.config.idle_s + 1)
    script.sleep(script.session.config.answer_s_max)
    assert script.cuts == 1


def test_a_call_is_repeated_until_it_is_answered() -> None:
    script = Script()
    script.connect()
    request = wire.DeleteTopic(7)
    script.session.call(script.now, request, "call", script.now + 60)
    script.pump()
    script.answer(refused(Code.BUSY))
    assert script.asked == []
    script.reconnect()
    assert [frame.request for frame in script.asked] == [request], "and a reconnect ends the pause"
    script.answer(refused(Code.BUSY))
    script.sleep(script.session.config.retry_s_max)
    script.answer(wire.Done())
    assert script.told == {"call": wire.Done()}


@pytest.mark.parametrize(("request_", "error"), [(wire.Ping(), ConnectionLost), (wire.DeleteTopic(7), OutcomeUnknown)])
def test_a_call_that_is_not_answered_in_time(request_: Any, error: type[IdemqError]) -> None:
    script = Script()
    script.connect()
    script.session.call(script.now, request_, "call", script.now + 5)
    script.pump()
    script.sleep(6)
    assert isinstance(script.told["call"], error)
    script.reconnect()
    assert script.asked == []


def test_a_forgotten_call_is_not_repeated() -> None:
    script = Script()
    script.connect()
    call = script.session.call(script.now, wire.DeleteTopic(7), "call", inf)
    script.pump()
    script.session.forget(call)
    script.answer(wire.Done())
    script.reconnect()
    assert (script.asked, script.told) == ([], {})


# -------------------------------------------------------------------------------------------- batches, flush, and room


def test_plain_values_share_a_batch_and_a_full_one_is_closed() -> None:
    script, producer = ready(batch_bytes=100)
    tally = Tally()
    for _ in range(3):
        assert script.session.enqueue_many(script.now, producer, "t", [b"4444", b"4444"], tally) == 2
    script.pump()
    assert script.links == [(-1, 3), (3, 5)]
    script.answer(stored())
    script.answer(stored())
    assert (tally.stored, tally.pending) == (6, 0)


def test_one_large_record_is_a_batch_of_its_own() -> None:
    script, producer = ready(batch_bytes=100)
    tally = Tally()
    script.session.enqueue_many(script.now, producer, "t", [b"4", b"x" * 500, b"4"], tally)
    script.pump()
    assert script.links == [(-1, 0), (0, 1), (1, 2)]


@pytest.mark.parametrize("answer", [wire.Pong(1), Committed(False, []), Committed(False, [Position(1, 1)] * 2)])
def test_an_answer_to_another_question_breaks_the_connection(answer: Any) -> None:
    script, _ = sent(2)
    script.answer(answer)
    assert (script.cuts, script.told) == (1, {})
    script.connect()
    assert script.links == [(-1, 0), (0, 1)]


def test_flush_overrides_linger() -> None:
    script, producer = ready(linger_s=3.0, batch_bytes=1000)
    script.send(producer, "a")
    script.sleep(2)
    assert script.commits == []
    script.flush(producer, "flush")
    assert script.links == [(-1, 0)]
    script.send(producer, "b")
    script.sleep(2.9)
    assert len(script.commits) == 1
    script.sleep(0.2)
    assert script.links == [(-1, 0), (0, 1)]
    script.answer(stored())
    assert script.told["flush"] is None, "it waits for what came before it, not for what came after"


def test_a_transaction_overrides_linger() -> None:
    script, producer = ready(linger_s=3.0, batch_bytes=1000)
    script.send(producer, "a")
    script.transact(producer, "tx", b"b")
    assert script.links == [(-1, 0), (0, 1)]


def test_flush_and_finish_have_a_deadline_that_progress_renews() -> None:
    script, producer = sent(4)
    script.flush(producer, "flush", timeout=5)
    for _ in range(3):
        script.sleep(4)
        script.answer(stored())
    assert "flush" not in script.told
    script.sleep(6)
    assert isinstance(script.told["flush"], OutcomeUnknown)
    tally = script.many(producer, b"x")
    script.session.finish(script.now, producer, tally, "finish", 5)
    script.sleep(6)
    assert isinstance(script.told["finish"], OutcomeUnknown)
    script.connect()  # nothing was answered for so long that the connection was cut
    script.answer(stored())
    script.answer(stored())
    assert len(producer.queue) == 0


def test_room_is_offered_to_one_at_a_time_and_never_lost() -> None:
    script, producer = ready(buffer_bytes=40, batch_bytes=1)
    script.send(producer, "a" * 30)
    assert not producer.room
    for waiter in ("x", "y", "z"):
        script.session.want_room(producer, waiter)
    script.answer(stored())
    assert set(script.told) == {"a" * 30, "x"}
    script.session.leave_room(producer, "y")
    script.session.leave_room(producer, "x")  # it was offered, and its waiter gave up in the same turn
    script.pump()
    assert "z" in script.told
    assert "y" not in script.told


def test_enqueue_many_takes_what_there_is_room_for() -> None:
    script, producer = ready(buffer_bytes=100, batch_bytes=30)
    tally = Tally()
    chunk: list[bytes | Record] = [Record(b"x" * 10) for _ in range(10)]
    taken = script.session.enqueue_many(script.now, producer, "t", chunk, tally)
    assert taken == 4
    assert script.session.enqueue_many(script.now, producer, "t", [b"y"], tally) == 0


def test_a_refresh_of_sticky_partitions_with_every_batch() -> None:
    script = Script({"t": 3})
    script.connect()
    producer = script.producer()
    partitions = []
    for n in range(6):
        script.send(producer, str(n))
        partitions.append(script.commits[0].appends[0].partition)
        script.answer(stored())
    assert {partitions[0], partitions[1], partitions[2]} == {0, 1, 2}
    assert partitions[:3] == partitions[3:]
