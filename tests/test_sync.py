"""`idemq.sync`: the same names, signatures and errors, from any thread, and nothing left when it is closed."""
# ruff: noqa: PT012 - a block that fails when it is left is what these tests are about

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import idemq
import idemq.sync as blocking
from idemq import Record, SendSummary
from idemq.testing import Link

from .support import broker, log, run

CLASSES = ("Client", "Producer", "Subscription", "Transaction")


def public(owner: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers_static(owner) if not name.startswith("_")}


def shape(function: Any) -> list[tuple[str, Any, Any, str]]:
    """Names, kinds, defaults and annotations of the parameters, as a caller sees them."""
    return [
        (one.name, one.kind, one.default, str(one.annotation).replace("client.", "").replace("consumer.", ""))
        for one in inspect.signature(function).parameters.values()
        if one.name != "self"
    ]


def test_every_name_is_there() -> None:
    assert set(blocking.__all__) == set(idemq.client.__all__)
    for name in blocking.__all__:
        ours = {*CLASSES, "OutcomeUnknown", "connect"}
        assert (getattr(blocking, name) is getattr(idemq, name)) == (name not in ours), name


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_is_there(name: str) -> None:
    theirs, mine = public(getattr(idemq, name)), public(getattr(blocking, name))
    not_for_users = {"end", "ended"}
    assert mine.keys() == theirs.keys() - not_for_users | ({"receipts"} if name == "Transaction" else set())


MEMBERS = [(name, member, value) for name in CLASSES for member, value in public(getattr(blocking, name)).items()]
SAME = [*[(name, member) for name, member, value in MEMBERS if callable(value)], ("connect", None)]


@pytest.mark.parametrize(("owner", "member"), SAME)
def test_signatures_are_the_same(owner: str, member: str | None) -> None:
    theirs, mine = getattr(idemq, owner), getattr(blocking, owner)
    if member is not None:
        theirs, mine = getattr(theirs, member), getattr(mine, member)
    expected, found = shape(theirs), shape(mine)
    if (owner, member) == ("Producer", "send_many"):
        both = "Iterable[bytes | Record] | AsyncIterable[bytes | Record]"
        assert expected[1][3] == both
        expected[1] = (*expected[1][:3], "Iterable[bytes | Record]")
    assert found == expected
    plain = str(inspect.signature(theirs).return_annotation).replace("AsyncGenerator[Batch, None]", "Iterator[Batch]")
    plain = plain.replace("Connecting", "Client")
    assert str(inspect.signature(mine).return_annotation) == plain
    assert inspect.getdoc(mine)


def in_a_thread(test: Callable[..., None]) -> Callable[..., None]:
    """A blocking test: in another thread than its broker, whose URL it gets."""

    @run
    async def wrapper() -> None:
        before = threading.active_count()
        async with broker() as b:
            await asyncio.to_thread(test, b.url)
        assert [one.name for one in threading.enumerate() if one.name == "idemq-client"] == [], before

    wrapper.__name__, wrapper.__doc__ = test.__name__, test.__doc__
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    return wrapper


@in_a_thread
def test_a_little_of_everything(url: str) -> None:
    with blocking.connect(url) as mq:
        assert mq.create_topic("t", partitions=2).name == "t"
        assert mq.send("t", b"0", key=b"k").seq == 0
        with mq.producer("p") as p:
            assert (p.name, p.last_seq, p.token) == ("p", -1, None)
            assert p.send_many("t", (Record(b"%d" % n, seq=n) for n in range(5000))) == SendSummary(5000, 0, 4999)
            with p.transaction() as tx:
                tx.send("t", b"tx", seq=5000)
                tx.set_token(b"token")
            assert [one.seq for one in tx.receipts] == [5000]
            with pytest.raises(ZeroDivisionError), p.transaction() as tx:
                tx.send("t", b"lost", seq=5001)
                raise ZeroDivisionError
            p.flush()
            assert (p.token, p.id, p.epoch) == (b"token", *mq.describe_producer("p")[1:3])
        with mq.subscribe("t") as sub:
            assert sub.assigned == [("t", 0), ("t", 1)]
            found = 0
            for batch in sub.batches(max_messages=1000):
                found += len(batch)
                if not sum(sub.lag().values()):
                    break
            assert found == 5002
            sub.seek("t", 0, 1)
            assert next(iter(sub)).offset == 1
            for n, message in enumerate(sub):
                assert message.topic == "t"
                if n == 3:
                    sub.stop()
            assert n == 3
            assert sub.positions()[("t", 0)] >= 2
        assert [topic.name for topic in mq.topics()] == ["t"]
        assert mq.ping() > 0
        with pytest.raises(idemq.InvalidRequest, match="needs a group"):
            sub.commit()
        assert mq.groups() == []
    for late in (mq.ping, lambda: mq.producer(), lambda: p.send("t", b""), lambda: next(iter(sub)), sub.lag):
        with pytest.raises(idemq.ClientClosed):
            late()
    mq.close()
    p.close()
    sub.close()


@in_a_thread
def test_the_iterable_is_read_in_the_callers_thread(url: str) -> None:
    """So it may be a cursor of sqlite3, or messages of the same client."""
    with sqlite3.connect(":memory:") as db, blocking.connect(url) as mq, mq.producer("p") as p:
        mq.create_topic("t")
        mq.create_topic("u")
        rows = db.execute(
            "with recursive n(i) as (select 0 union all select i + 1 from n where i < 999) select i from n"
        )
        assert p.send_many("t", (b"%d" % row for row in rows)).stored == 1000
        with mq.subscribe("t") as sub:

            def copied() -> Iterator[bytes]:
                for message in sub:
                    yield message.value
                    if message.offset == 999:
                        return

            assert p.send_many("u", copied()).stored == 1000

        def failing() -> Iterator[bytes]:
            yield from (b"x" for _ in range(64))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            p.send_many("t", failing())
        with pytest.raises(idemq.UnknownTopic):
            p.send_many("none", [b"x"] * 5000)
        p.flush()
    db.close()


@in_a_thread
def test_many_threads_share_a_client(url: str) -> None:
    with blocking.connect(url) as mq:
        mq.create_topic("t")
        done: list[int] = []

        def work(number: int) -> None:
            with mq.producer(f"p{number}") as p:
                for n in range(50):
                    p.send("t", b"%d.%d" % (number, n))
                    mq.send("t", b"shared")
            done.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(done) == list(range(8))
        assert mq.describe_topic("t").partitions[0].next == 800


@run
async def test_an_unknown_outcome_is_asked_for_without_await() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link:
        loop = asyncio.get_running_loop()

        def test() -> None:
            with blocking.connect(link.url) as mq:
                mq.create_topic("t")
                mq.send("t", b"0")
                loop.call_soon_threadsafe(link.stall)
                with pytest.raises(idemq.OutcomeUnknown) as caught:
                    while True:  # until the link stalls
                        mq.send("t", b"1", timeout=0.2)
                error = caught.value
                assert type(error) is blocking.OutcomeUnknown
                assert "await" not in error.remedy
                with pytest.raises(blocking.OutcomeUnknown):
                    error.outcome(0.01)
                asyncio.run_coroutine_threadsafe(link.heal(), loop).result()
                receipt = error.outcome()
                assert receipt.seq == error.seq

        await asyncio.to_thread(test)


@run
async def test_leaving_is_bounded_and_a_waiting_thread_is_told() -> None:
    async with broker() as b, Link("127.0.0.1", b.port) as link:
        loop = asyncio.get_running_loop()
        told: list[BaseException] = []

        def test() -> None:
            with pytest.raises(ZeroDivisionError), blocking.connect(link.url, timeout=1000) as mq:
                mq.create_topic("t")
                mq.send("t", b"")
                loop.call_soon_threadsafe(link.stall)

                def wait(call: Callable[[], Any]) -> None:
                    try:
                        while True:
                            call()
                    except idemq.IdemqError as error:
                        told.append(error)

                sub = mq.subscribe("t", start="latest")
                calls: list[Callable[[], Any]] = [lambda: mq.send("t", b""), mq.ping, lambda: next(iter(sub))]
                threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
                for thread in threads:
                    thread.start()
                raise ZeroDivisionError
            for thread in threads:
                thread.join()
            assert all(isinstance(one, (idemq.ClientClosed, idemq.OutcomeUnknown)) for one in told), told
            assert len(told) == 3

        await asyncio.to_thread(test)
        await link.heal()
    assert "idemq-client" not in {one.name for one in threading.enumerate()}


@run
async def test_a_failed_connect_leaves_no_thread() -> None:
    def test() -> None:
        with pytest.raises(idemq.ConnectionLost):
            blocking.connect("idemq://127.0.0.1:1", timeout=0.1)
        with pytest.raises(idemq.InvalidRequest):
            blocking.connect("http://")

    await asyncio.to_thread(test)
    assert "idemq-client" not in {one.name for one in threading.enumerate()}


def in_the_main_thread(test: Callable[[str], None]) -> None:
    """Signals go to the main thread, so here the broker has the other one."""
    place: dict[str, Any] = {}
    started = threading.Event()

    async def serve() -> None:
        async with broker() as b:
            place.update(url=b.url, end=asyncio.Event(), loop=asyncio.get_running_loop())
            started.set()
            await place["end"].wait()
            place["log"] = await log(b.url, "t")

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    try:
        test(place["url"])
    finally:
        place["loop"].call_soon_threadsafe(place["end"].set)
        thread.join()
    assert place["log"] == [b"%d" % n for n in range(len(place["log"]))]


def test_an_interrupt_ends_the_wait_and_the_client_stays_usable() -> None:
    def test(url: str) -> None:
        with blocking.connect(url) as mq:
            mq.create_topic("t")
            with mq.subscribe("t") as sub:
                for waits in (lambda: next(iter(sub)), lambda: next(sub.batches())):
                    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
                    timer.start()
                    with pytest.raises(KeyboardInterrupt):
                        waits()
                    timer.join()
                sent = 0
                try:
                    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
                    while True:
                        mq.send("t", b"%d" % sent)
                        sent += 1
                except KeyboardInterrupt:
                    # The one that was interrupted keeps its place, if it had one.
                    mq.close()
            with blocking.connect(url) as again:
                stored = again.describe_topic("t").partitions[0].next
                assert stored in (sent, sent + 1)

    in_the_main_thread(test)


def test_a_signal_handler_may_stop_a_loop() -> None:
    def test(url: str) -> None:
        with blocking.connect(url) as mq, mq.producer() as p:
            mq.create_topic("t")
            with mq.subscribe("t") as sub:
                old = signal.signal(signal.SIGUSR1, lambda number, frame: sub.stop())
                try:
                    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
                    timer.start()
                    assert list(sub) == []
                    timer.join()
                finally:
                    signal.signal(signal.SIGUSR1, old)
            assert p.send("t", b"0").seq == 0

    in_the_main_thread(test)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_and_the_parent_goes_on() -> None:
    def test(url: str) -> None:
        with blocking.connect(url) as mq, mq.producer("p") as p:
            mq.create_topic("t")
            child = os.fork()
            if not child:
                code = 1
                try:
                    for call in (mq.ping, lambda: p.send("t", b"child"), lambda: mq.subscribe("t")):
                        with pytest.raises(idemq.ClientClosed, match="forked"):
                            call()
                    mq.close()
                    p.close()
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert p.send("t", b"0").seq == 0

    in_the_main_thread(test)
