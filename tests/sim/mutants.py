"""Planted bugs: one guard of the protocol removed each, by replacing its text in the production function.

A mutant names a function, the text of a guard and what stands there instead. The text must occur exactly once, so a
mutant cannot go stale unnoticed. `planted` runs with one of them in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from idemq.broker import core, groups, producers, store
from idemq.client import session

from .world import World


class Mutant(NamedTuple):
    """`owner.function` with `old` replaced by `new`; several places make one mutant."""

    name: str
    places: tuple[tuple[Any, str, str, str], ...]
    first: int = 0
    """The search begins with this seed: the one that found it last, where that is a late one."""


def _one(name: str, owner: Any, function: str, old: str, new: str, first: int = 0) -> Mutant:
    return Mutant(name, ((owner, function, old, new),), first)


CORE, SESSION = core.Core, session.Session

MUTANTS = [
    # ------------------------------------------------------------------------------------------------- the broker
    _one(
        "no dedup check",
        CORE,
        "_commit",
        "known = last_seq <= producer.last_seq",
        "known, prev_seq = False, max(prev_seq, producer.last_seq)",
    ),
    _one(
        "producer row not stored",
        store.MemoryStore,
        "commit",
        "_set(self._producers, self._producer_ids, producer_id, row)",
        "(row is None or producer_id not in self._producers) and _set(\n"
        "                self._producers, self._producer_ids, producer_id, row)",
    ),
    _one("reply before commit", CORE, "step", "if not facts.decided:", "if True:"),
    _one("log end not advanced", CORE, "_append", "partition.next = offset + header.records", "pass"),
    Mutant(
        "`put` returning False ignored",
        (
            (CORE, "_append", "partition.next = offset + header.records", "pass"),
            (
                store.MemoryStore,
                "commit",
                'raise StoreBroken(f"table log did not take offset {stored.offset}: there is one already")',
                "group.appends = [one for one in group.appends if one is not stored]",
            ),
        ),
    ),
    _one(
        "duplicate answered before the original is durable",
        CORE,
        "step",
        "if not facts.decided:",
        "if not facts.decided or (type(answer) is wire.Committed and answer.duplicate):",
    ),
    _one(
        "connection fence off",
        CORE,
        "_commit",
        "if connection.serial < self._serials.get(producer_id, 0):",
        "if False:",
    ),
    _one("open not a compare-and-swap", producers, "opening", "if request.expected_epoch != row.epoch:", "if False:"),
    _one(
        "open does not bump the epoch",
        producers,
        "opening",
        "epoch=number,\n        session=request.session,\n        holder",
        "epoch=row.epoch,\n        session=request.session,\n        holder",
    ),
    _one("epoch not checked", CORE, "_commit", "if epoch != producer.epoch:", "if epoch > producer.epoch:"),
    _one("sequence gap accepted", CORE, "_commit", "if prev_seq != producer.last_seq:", "if False:"),
    _one(
        "refusals before duplicates",
        CORE,
        "_commit",
        "# 5\n",
        "refused = self._appends_refused(request, batches, headers)\n            if refused is not None:\n"
        "                return refused\n",
    ),
    _one(
        "fingerprint not remembered",
        producers.Producer,
        "results",
        "(*self._told, *self.untold)[-self._results_max :]",
        "()",
    ),
    _one("takeover not recorded", producers, "fenced", '"ended_at": ended_at', '"ended_at": -1', first=12),
    _one(
        "takeover's end is one too high",
        producers,
        "opening",
        "Takeover(row.epoch, row.last_seq)",
        "Takeover(row.epoch, row.last_seq + 1)",
    ),
    _one("token not stored", CORE, "_commit", "producer.token = token", "pass"),
    _one(
        "purge told before it is durable",
        CORE,
        "_purge_topic",
        "self._write_topic(row._replace(floors=floors))",
        "self._write_topic(row._replace(floors=floors))\n"
        "            for partition, floor in zip(partitions, floors, strict=True):\n"
        "                partition.earliest = floor",
    ),
    _one(
        "readers see what is not durable",
        CORE,
        "_look",
        "earliest, end = partition.earliest, partition.durable_next",
        "earliest, end = partition.earliest, partition.next",
    ),
    # Groups.
    _one("lease not checked", groups, "refusal", "if row is None or entry.lease != row.lease:", "if row is None:"),
    _one(
        "`from` not checked",
        groups,
        "refusal",
        "if not forward_only and entry.start != row.next:",
        "if False:",
        first=17,
    ),
    _one("a position may go back", groups, "moved", "if entry.end < row.next:", "if False:"),
    _one(
        "offsets not in the transaction",
        CORE,
        "_commit",
        "if moved is not position:",
        "if moved is not position and not request.appends:",
    ),
    _one(
        "offsets in a transaction of their own",
        CORE,
        "begin",
        "self._building, self._in_flight = Group(), group",
        "later = Group(offsets=group.offsets if group.appends else {})\n"
        "        group.offsets = {} if group.appends else group.offsets\n"
        "        self._building, self._in_flight = later, group",
    ),
    _one("the number of a lease is not stored", CORE, "_assignment", "self._number())", "self._counter + 1)"),
    Mutant(
        "the next member gets the lease of one that has not given back",
        (
            (
                CORE,
                "_assignment",
                "holder = group.holders.get(key)\n",
                "holder = member if group.holders.get(key) is member else None\n",
            ),
            (groups, "granted", "lease=number, holder", "lease=row.lease or number, holder"),
        ),
    ),
    _one(
        "the next member gets the same lease",
        groups,
        "granted",
        "lease=number, holder",
        "lease=row.lease or number, holder",
    ),
    _one(
        "a heartbeat is answered before its leases are durable",
        CORE,
        "step",
        "if not facts.decided:",
        "if not facts.decided or type(request) is wire.Heartbeat:",
    ),
    _one(
        "a member comes back whatever its lease is",
        CORE,
        "_returning",
        "row.lease == held.lease and not row.holder",
        "not row.holder",
        first=29,
    ),
    _one("seek not a compare-and-swap", groups, "sought", "if request.expected_lease != lease:", "if False:"),
    _one(
        "a former holder's seek is told the lease of the next",
        groups,
        "sought",
        'and request.member in ("", holder)',
        "",
    ),
    _one(
        "who dies is to blame at once",
        groups,
        "ended_uncleanly",
        "return row._replace(suspects_end=min(end, row.next + max(in_hand_max, 1)))",
        "return row._replace(attempts=row.attempts + 1)",
    ),
    _one("nobody is suspected", groups, "ended_uncleanly", "if row.next >= end or", "if True or"),
    _one(
        "an attempt is not stored", groups, "moved", "if attempts <= row.attempts and turns <= row.turns:", "if True:"
    ),
    _one("the attempt of a member that vanished does not count", groups, "ended_uncleanly", "+ row.turns % 2", ""),
    _one(
        "the attempt of a member that gives back counts",
        groups,
        "released",
        'holder="", ',
        'holder="", attempts=row.attempts + row.turns % 2, ',
    ),
    _one(
        "the attempt of a holder that was never heard of counts",
        CORE,
        "_end_uncleanly",
        "ended = groups.released(row)",
        "ended = groups.released(row._replace(attempts=row.attempts + row.turns % 2))",
    ),
    _one("the attempt of one that is gone goes on under the next lease", groups, "granted", ", turns=0", ""),
    _one(
        "who gave back is told the same lease, and that its attempt goes on",
        CORE,
        "_heartbeat",
        " and not self._held_row(request.group, key).turns:",
        ":",
        first=30,
    ),
    _one(
        "an attempt that has ended begins again with a late copy",
        groups,
        "moved",
        "turns <= row.turns:\n"
        "            return row\n"
        "        return row._replace(attempts=max(attempts, row.attempts), turns=max(turns, row.turns))",
        "not turns:\n"
        "            return row\n"
        "        return row._replace(attempts=max(attempts, row.attempts), turns=turns or row.turns)",
        first=13,
    ),
    _one(
        "a member that is gone keeps all",
        groups.ConsumerGroup,
        "gone",
        "<= now_ms",
        "< 0",
    ),
    _one("nobody gets a partition that is added", CORE, "_alter_topic", "if grown:", "if False:"),
    _one("the counter is not stored", CORE, "_number", "self._building.counter = self._counter", "pass"),
    _one(
        "a group commit forgets its last append",
        store.MemoryStore,
        "commit",
        "for stored in group.appends:\n            insort",
        "for stored in group.appends[:-1] or group.appends:\n            insort",
    ),
    # ------------------------------------------------------------------------------------------------- the session
    _one(
        "only the newest is sent again",
        SESSION,
        "disconnected",
        "producer.sent = 0",
        "producer.sent = max(0, producer.sent - 1)",
    ),
    _one(
        "cut anew on reconnect",
        SESSION,
        "disconnected",
        "commit.sent = False\n",
        "commit.sent = False\n"
        "                if commit.parts and not commit.transaction:\n"
        "                    commit.open, commit.prev_seq, commit.appends, commit.payload = True, None, [], []\n",
        first=15,
    ),
    Mutant(
        "old answers believed",
        (
            (SESSION, "disconnected", "self._outstanding.clear()", "pass"),
            (SESSION, "_cut_now", "self._outstanding.clear()", "pass"),
            (World, "_arrived_down", "process.link is not link or ", ""),
        ),
    ),
    _one(
        "given numbers relinked", SESSION, "_fail_definitely", "producer.given or head.transaction", "head.transaction"
    ),
    _one("counted numbers not relinked", SESSION, "_fail_definitely", "behind[0].prev_seq = head.prev_seq", "pass"),
    _one(
        "no drain", SESSION, "_committed", "all(one.refusal is not None for one in producer.queue if one.sent)", "True"
    ),
    _one(
        "a gap is believed before its cause",
        SESSION,
        "_act_on_refusal",
        "one.refusal is not None and one.refusal.code != Code.SEQUENCE_GAP",
        "one.refusal is not None and one.refusal.code == Code.SEQUENCE_GAP",
    ),
    _one(
        "a retriable refusal is final",
        SESSION,
        "_act_on_refusal",
        "if code is not None and wire.REMEDIES[code].retriable:",
        "if False:",
    ),
    _one(
        "a retried head loses its tail",
        SESSION,
        "_act_on_refusal",
        "commit.sent, commit.refusal = False, None\n",
        "commit.sent, commit.refusal = commit is not head, None\n",
    ),
    _one(
        "last_seq goes back",
        SESSION,
        "_stored",
        "producer.last_seq = commit.last_seq",
        "producer.last_seq = commit.last_seq - 1",
    ),
    _one(
        "open ignores last_seq", SESSION, "_open", "producer.highest = max(producer.highest, answer.last_seq)", "pass"
    ),
    _one(
        "a number below the highest is sent",
        SESSION,
        "_next_seq",
        "return None if seq <= producer.highest else seq",
        "return seq",
    ),
    _one(
        "highest stays after a failure",
        SESSION,
        "_fail_definitely",
        "producer.highest = max([producer.last_seq, *[commit.last_seq for commit in producer.queue]])",
        "pass",
    ),
    _one("fenced means not stored", SESSION, "_fenced", "commit.last_seq <= ended_at", "False", first=12),
    _one("fenced means stored", SESSION, "_fenced", "commit.last_seq <= ended_at", "True"),
    _one("an ended producer knows", SESSION, "_end_producer", "if commit.ever_sent and unknown:", "if False:"),
    _one(
        "a time-out takes the commit out",
        SESSION,
        "_time_out",
        "commit.deadline = left",
        "commit.deadline = left\n"
        "        for producer in self.producers:\n"
        "            if commit in producer.queue and not commit.sent:\n"
        "                self._pop(producer, commit)",
    ),
    _one(
        "a time-out is a failure",
        SESSION,
        "_detach",
        'error = self._unknown("the answer did not come in time", seq)',
        'error = ConnectionLost("late", code="NOT_STORED")',
    ),
    _one("another store is not noticed", SESSION, "_welcomed", "if self.incarnation and (", "if False and ("),
    _one(
        "a stale connection's answer is final",
        SESSION,
        "_committed",
        "answer.code in _NO_ANSWERS",
        "answer.code == Code.CHECKSUM_MISMATCH",
    ),
    _one("a producer opens by its session's name", SESSION, "_open", "producer.instance", "self.config.session"),
    _one("without dedup a refusal is believed", SESSION, "_fail_definitely", "head.sent_before and", "False and"),
    _one(
        "an open race is fought by guessing",
        SESSION,
        "_open",
        "producer, waiter, deadline, epoch)",
        "producer, waiter, deadline, 0)",
    ),
]

GROUP_FAILURE = Mutant("group failure that keeps the next group", ())
"""A mutant of the world, which plays the server here: see `planted`."""
MUTANTS.append(GROUP_FAILURE)


def _replaced(owner: Any, function: str, old: str, new: str) -> Any:
    """The function with its text replaced, compiled where it came from."""
    original = getattr(owner, function)
    source = inspect.getsource(original)
    found = source.count(old)
    assert found == 1, f"{function}: the text of the guard occurs {found} times: {old!r}"
    head = "if True:\n" if source.startswith(" ") else ""
    scope: dict[str, Any] = dict(vars(inspect.getmodule(original)))
    code = "from __future__ import annotations\n" + head + source.replace(old, new)
    exec(compile(code, f"<mutant of {function}>", "exec"), scope)
    return scope[function]


def _keep_the_next_group(self: World) -> None:
    """What the server would do if it only dropped the group that failed."""
    self.group = None
    self.core._in_flight = None
    if not self.beginning:
        self.beginning = True
        self.after(0.001, self._begin, None, None)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Run with this bug in place."""
    handlers = core._HANDLERS.copy()
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, function, old, new in mutant.places:
            original, wrong = getattr(owner, function), _replaced(owner, function, old, new)
            before.append((owner, function, original))
            setattr(owner, function, wrong)
            for request, handler in handlers.items():
                if handler is original:
                    core._HANDLERS[request] = wrong
        if mutant is GROUP_FAILURE:
            before.append((World, "_group_failed", World._group_failed))
            World._group_failed = _keep_the_next_group  # type: ignore[method-assign]
        yield
    finally:
        for owner, function, original in reversed(before):
            setattr(owner, function, original)
        core._HANDLERS.update(handlers)
