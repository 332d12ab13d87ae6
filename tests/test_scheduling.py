"""What `run` has in hand, without a broker: what may begin, and how far a position may move."""

from __future__ import annotations

from random import Random

import pytest

from idemq import Record
from idemq.client.records import Delivery
from idemq.client.scheduling import COMMIT_S, IN_HAND_MAX, Schedule, Work
from tests.support import messages


def values(works: list[Work]) -> list[bytes]:
    return [work.message.value for work in works]


def begin(schedule: Schedule, now: float = 0.0) -> list[Work]:
    taken = []
    while (work := schedule.take(now)) is not None:
        taken.append(work)
    return taken


def commit(schedule: Schedule) -> list[bytes]:
    """All that is finished; the values."""
    done = list(schedule.finished())
    for works in done:
        schedule.committed(works)
    return [value for works in done for value in values(works)]


LEASE = Delivery(3, 0, 0, 0)


def test_messages_of_one_key_follow_each_other() -> None:
    schedule = Schedule(10)
    schedule.add(messages([b"a0", b"b0", b"a1", b"c0", b"b1"], [b"a", b"b", b"a", b"c", b"b"], delivery=LEASE))
    first = begin(schedule)
    assert values(first) == [b"a0", b"b0", b"c0"]
    schedule.finish(first[1], 0)
    second = begin(schedule)
    assert values(second) == [b"b1"]
    assert commit(schedule) == [], "a0 is not finished"
    schedule.finish(first[0], 0)
    third = begin(schedule)
    assert values(third) == [b"a1"]
    assert commit(schedule) == [b"a0", b"b0"]
    for work in (*second, first[2]):
        schedule.finish(work, 0)
    assert commit(schedule) == []
    schedule.finish(third[0], 0)
    assert commit(schedule) == [b"a1", b"c0", b"b1"]
    assert (schedule.in_hand, schedule.running, schedule.deliveries) == (0, 0, [])


def test_no_more_run_than_the_concurrency_allows_and_without_a_key_no_order() -> None:
    schedule = Schedule(2)
    schedule.add(messages([b"%d" % n for n in range(5)], delivery=LEASE))
    running = begin(schedule)
    assert (len(running), schedule.running) == (2, 2)
    schedule.finish(running[1], 0)
    assert values(begin(schedule)) == [b"2"]
    assert begin(schedule) == []


def test_a_concurrency_of_one_keeps_the_order_of_a_partition_and_lets_others_by() -> None:
    schedule, other = Schedule(1), Delivery(4, 0, 0, 0)
    schedule.add(messages([b"0", b"1"], delivery=LEASE))
    schedule.add(messages([b"x"], partition=1, delivery=other))
    (head,) = begin(schedule)
    schedule.retry(head, 5.0)
    (x,) = begin(schedule)
    assert x.message.value == b"x"
    schedule.finish(x, 0)
    assert begin(schedule, 4.9) == []
    assert schedule.next_at == 5.0
    again = begin(schedule, 5.0)
    assert values(again) == [b"0"]
    schedule.finish(again[0], 5)
    assert values(begin(schedule, 5.0)) == [b"1"]


def test_a_key_in_two_partitions_is_two_keys() -> None:
    schedule = Schedule(9)
    schedule.add(messages([b"0"], [b"k"], delivery=LEASE))
    schedule.add(messages([b"1"], [b"k"], partition=1, delivery=Delivery(4, 0, 0, 0)))
    assert len(begin(schedule)) == 2


def test_when_to_commit() -> None:
    schedule = Schedule(IN_HAND_MAX)
    schedule.add(messages([b"%d" % n for n in range(IN_HAND_MAX)], delivery=LEASE))
    running = begin(schedule)
    assert schedule.commit_at == float("inf")
    schedule.finish(running[1], 1)
    assert schedule.commit_at == float("inf"), "nothing could be committed"
    schedule.finish(running[0], 2)
    assert schedule.commit_at == 2 + COMMIT_S
    schedule.finish(running[2], 2.05)
    assert schedule.commit_at == 2 + COMMIT_S, "since the first"
    for work in running[3:]:
        schedule.finish(work, 2.06)
    assert schedule.commit_at == 2.06, "at once when so many are finished"
    assert len(commit(schedule)) == IN_HAND_MAX
    assert schedule.commit_at == float("inf")


def test_what_a_commit_covers_is_what_was_finished_when_it_began() -> None:
    schedule = Schedule(3)
    schedule.add(messages([b"0", b"1", b"2"], delivery=LEASE))
    running = begin(schedule)
    schedule.finish(running[0], 0, ("dlq", Record(b"d")))
    (done,) = schedule.finished()
    schedule.finish(running[1], 1)
    schedule.committed(done)
    assert [work.send for work in done] == [("dlq", Record(b"d"))]
    assert commit(schedule) == [b"1"]
    assert values(schedule.heads()) == [b"2"]


def test_a_lost_line_is_forgotten_but_its_key_waits_for_what_runs() -> None:
    schedule, again = Schedule(9), Delivery(8, 0, 0, 0)
    schedule.add(messages([b"0", b"1", b"2"], [b"k", b"k", b"l"], delivery=LEASE))
    running = begin(schedule)
    assert values(running) == [b"0", b"2"]
    schedule.drop(LEASE)
    assert (schedule.in_hand, schedule.deliveries) == (0, [])
    schedule.add(messages([b"0", b"1", b"2"], [b"k", b"k", b"l"], delivery=again))
    assert begin(schedule) == [], "another handler still has these keys"
    schedule.finish(running[0], 0)
    assert values(begin(schedule)) == [b"0"]
    schedule.retry(running[1], 7.0)
    assert values(begin(schedule)) == [b"2"]
    assert commit(schedule) == []


def test_a_line_that_is_lost_while_its_head_waits_wakes_nobody() -> None:
    schedule = Schedule(1)
    schedule.add(messages([b"0", b"1"], delivery=LEASE))
    schedule.retry(begin(schedule)[0], 5.0)
    schedule.drop(LEASE)
    assert schedule.next_at == float("inf")
    assert begin(schedule, 9) == []


def test_a_line_that_is_given_back_is_finished_up_to_its_first_gap() -> None:
    schedule = Schedule(3)
    schedule.add(messages([b"%d" % n for n in range(5)], [b"a", b"b", b"a", b"c", b"d"], delivery=LEASE))
    running = begin(schedule)  # 0, 1 and 3
    schedule.finish(running[2], 0)
    schedule.withdraw(LEASE)
    assert schedule.in_hand == 2, "0 and 1 run; behind them is a gap"
    assert begin(schedule) == []
    schedule.finish(running[0], 0)
    schedule.finish(running[1], 0)
    assert begin(schedule) == []
    schedule.flush(7.0)
    assert schedule.commit_at == 7.0
    assert commit(schedule) == [b"0", b"1"]
    assert schedule.deliveries == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_positions_pass_nothing_and_keys_keep_their_order(seed: int) -> None:
    """Random handlers, failures and commits: all of it is committed once, in order, and of each key one at a time."""
    rng = Random(seed)
    schedule = Schedule(rng.randint(1, 6))
    running: list[Work] = []
    handled: dict[tuple[int, bytes | None], list[int]] = {}
    committed: dict[int, list[int]] = {0: [], 1: []}
    leases = [Delivery(1, 0, 0, 0), Delivery(2, 0, 0, 0)]
    added, now = [0, 0], 0.0
    while min(len(done) for done in committed.values()) < 40:
        now += rng.random()
        partition = rng.randrange(2)
        if added[partition] < 40 and rng.random() < 0.3:
            count = rng.randint(1, 5)
            keys = [rng.choice([None, b"a", b"b"]) for _ in range(count)]
            schedule.add(
                messages([b""] * count, keys, partition=partition, offset=added[partition], delivery=leases[partition])
            )
            added[partition] += count
        running += begin(schedule, now)
        sequences = [work.sequence for work in running if work.sequence is not None]
        assert len(sequences) == len(set(sequences)), "two of one key at once"
        if running:
            work = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.3:
                schedule.retry(work, now + rng.random())
            else:
                handled.setdefault((work.message.partition, work.message.key), []).append(work.message.offset)
                schedule.finish(work, now)
        if rng.random() < 0.2:
            for works in list(schedule.finished()):
                committed[works[0].message.partition] += [work.message.offset for work in works]
                schedule.committed(works)
        assert schedule.in_hand == sum(added) - sum(map(len, committed.values()))
    for partition, offsets in committed.items():
        assert offsets == list(range(len(offsets))), partition
    for (_, key), offsets in handled.items():
        assert key is None or offsets == sorted(offsets)
