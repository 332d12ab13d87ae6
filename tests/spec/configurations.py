"""Which bounds are explored, small and large, and what breaks when a rule is removed.

The small ones together take seconds and run in every test run; the large ones are for `python -m tests.spec --large`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from . import attempts, consumer, guards, producer
from .explorer import STUCK, Model
from .guards import Guards

Bounds = producer.Bounds | consumer.Bounds | attempts.Bounds


def model(bounds: Bounds, rules: Guards) -> Model[Any]:
    """The model for these bounds, under these rules."""
    if isinstance(bounds, producer.Bounds):
        return producer.Producers(bounds, rules)
    if isinstance(bounds, attempts.Bounds):
        return attempts.Attempts(bounds, rules)
    return consumer.Group(bounds, rules)


def one_name(
    *faults: str,
    records: tuple[int, ...] = (2, 5),
    batches: tuple[int, ...] = (1, 2),
    too_large: tuple[int, ...] = (),
    application_numbers: bool = True,
    instances: int = 1,
    in_flight: int = 2,
    remembered: int = 2,
) -> producer.Bounds:
    """One producer name. A fault is named as often as it may happen."""
    counted = producer.Faults(**{name: faults.count(name) for name in faults})
    return producer.Bounds(
        records=records,
        batches=batches,
        too_large=too_large,
        application_numbers=application_numbers,
        instances=instances,
        in_flight=in_flight,
        remembered=remembered,
        faults=counted,
    )


def group(
    *faults: str,
    partitions: int = 1,
    inputs: int = 2,
    workers: int = 2,
    in_flight: int = 1,
    remembered: int = 2,
    producers: bool = True,
    shared_name: bool = False,
) -> consumer.Bounds:
    """A group. A fault is named as often as it may happen."""
    counted = consumer.Faults(**{name: faults.count(name) for name in faults})
    return consumer.Bounds(
        partitions=partitions,
        inputs=inputs,
        workers=workers,
        in_flight=in_flight,
        remembered=remembered,
        producers=producers,
        shared_name=shared_name,
        faults=counted,
    )


def poisoned(*faults: str, poison: tuple[tuple[int, ...], ...], inputs: int = 3, workers: int = 1) -> attempts.Bounds:
    """A group with inputs that kill. A fault is named as often as it may happen."""
    counted = attempts.Faults(**{name: faults.count(name) for name in faults})
    return attempts.Bounds(poison=poison, inputs=inputs, workers=workers, faults=counted)


SINGLE = (1,)
"""Batches of one record."""

SMALL: dict[str, Bounds] = {
    # ---- one producer name
    "cuts and a broker crash": one_name("cuts", "cuts", "broker_crashes"),
    "a restart, cut and crash": one_name("application_crashes", "cuts", "broker_crashes", records=(2,), instances=2),
    "a restart that cuts its batches anew": one_name("application_crashes", instances=2, records=(2, 5, 7)),
    "a zombie, cut": one_name("zombies", "cuts", batches=SINGLE, instances=2),
    "a zombie, cut, successor forgets results": one_name(
        "zombies", "cuts", batches=SINGLE, instances=2, in_flight=1, remembered=1
    ),
    "three instances, two zombies": one_name("zombies", "zombies", records=(2,), instances=3),
    "three instances, a zombie and a crash": one_name("zombies", "application_crashes", records=(2,), instances=3),
    "store full": one_name("cuts", "store_full", "broker_crashes"),
    "topic gone, numbers of the application": one_name("cuts", "topic_losses", "broker_crashes"),
    "topic gone, independent sends": one_name(
        "cuts", "topic_losses", records=(2, 5, 7), batches=SINGLE, application_numbers=False
    ),
    "too large, numbers of the application": one_name("cuts", too_large=(5,), records=(2, 5, 7), batches=SINGLE),
    "too large, independent sends": one_name(
        "cuts", too_large=(5,), records=(2, 5, 7), batches=SINGLE, application_numbers=False
    ),
    "a group fails": one_name("cuts", "group_failures", "topic_losses"),
    "a group fails, independent sends": one_name(
        "cuts", "group_failures", "topic_losses", batches=SINGLE, application_numbers=False
    ),
    "a send is cancelled": one_name("cuts", "cancels", records=(2, 5, 7)),
    "the name is deleted": one_name(
        "deletions", "cuts", "zombies", records=(2,), instances=2, application_numbers=False
    ),
    "the store is restored": one_name("restores", "zombies", records=(2,), instances=2, application_numbers=False),
    # ---- a group with leases and transactions
    "leases expire": group("cuts", "expiries"),
    "leases expire, broker crash": group("expiries", "broker_crashes", inputs=1),
    "workers die, two in flight": group("deaths", "broker_crashes", in_flight=2, inputs=1),
    "output topic gone, two in flight": group("cuts", "topic_losses", in_flight=2, workers=1),
    "output topic gone, leases expire": group("topic_losses", "expiries", inputs=1),
    "run again under a new name": group("cuts", "reruns", "broker_crashes", workers=1),
    "transactions without a producer": group("cuts", "expiries", inputs=1, producers=False),
    "plain offset commits": group("cuts", "expiries", "plain_commits", inputs=1, in_flight=2),
    # ---- members: heartbeats, giving back, expiring, coming back
    "a partition is revoked": group("revocations", "cuts", inputs=1),
    "revoked beside a transaction": group("revocations", "reports", inputs=1),
    "old heartbeats, revoked": group("reports", "cuts", "revocations", inputs=1, workers=1),
    "old heartbeats, expired": group("reports", "cuts", "expiries", inputs=1, workers=1),
    "two partitions, one is revoked": group("revocations", partitions=2, inputs=1),
    # ---- seeks
    "a holder seeks": group("seeks", "cuts", "reports", inputs=1, workers=1),
    "a holder seeks, broker crash": group("seeks", "cuts", "broker_crashes", inputs=1, workers=1),
    "a holder seeks, leases expire": group("seeks", "expiries", "reports", inputs=1),
    "a holder seeks, revoked": group("seeks", "revocations", inputs=1),
    "an operator seeks": group("operator_seeks", "expiries", inputs=1),
    "an operator seeks, cut": group("operator_seeks", "cuts", workers=1),
    "an operator seeks, broker crash": group("operator_seeks", "broker_crashes", inputs=1, workers=1),
    "an operator seeks, without a producer": group("operator_seeks", "cuts", inputs=1, workers=1, producers=False),
    "an operator seeks, plain offset commits": group("operator_seeks", "cuts", "plain_commits", inputs=1, workers=1),
    "an operator seeks, a group fails": group("operator_seeks", "group_failures", inputs=1, workers=1),
    "holder and operator seek": group("seeks", "operator_seeks", inputs=1, workers=1),
    # ---- inputs that kill
    "poison": poisoned(poison=((0, 2),)),
    "poison, workers are killed": poisoned("kills", "kills", poison=((1,),), workers=2),
    "poison, members expire": poisoned("expiries", "expiries", poison=((1,),), workers=2),
    "poison, attempts told late": poisoned(
        "kills", "expiries", "broker_crashes", "failures", "copies", poison=((1,),), inputs=2
    ),
    "poison beside innocents": poisoned("kills", poison=((), (1,)), inputs=2),
    "poison beside innocents, attempts told late": poisoned("kills", "failures", "copies", poison=((), (0,)), inputs=1),
    "two workers, poison beside innocents": poisoned(poison=((), (1,)), inputs=2, workers=2),
    # ---- further than the first models went: several partitions, group failure, open
    "two partitions, leases expire": group("expiries", "reports", partitions=2, inputs=1),
    "two partitions, cut and crash": group("cuts", "broker_crashes", partitions=2, inputs=1, workers=1),
    "two partitions, run again": group("cuts", "reruns", partitions=2, inputs=1, workers=1),
    "two partitions, a group fails": group("group_failures", "cuts", partitions=2, inputs=1, workers=1),
    "a group fails, leases expire": group("group_failures", "expiries"),
    "a group fails, two in flight": group("group_failures", "cuts", in_flight=2, workers=1),
    "takeover of the worker's name": group("zombies", "cuts", shared_name=True, inputs=1),
    "restart of the worker": group("deaths", "cuts", shared_name=True, inputs=1),
    "takeover, a group fails": group("zombies", "group_failures", shared_name=True, inputs=1),
}

LARGE: dict[str, Bounds] = {
    "cuts and a broker crash, 3 records": one_name("cuts", "cuts", "broker_crashes", records=(2, 5, 7)),
    "a restart, cut and crash, 2 records": one_name("application_crashes", "cuts", "broker_crashes", instances=2),
    "a restart, cut, 3 records": one_name("application_crashes", "cuts", instances=2, records=(2, 5, 7)),
    "a zombie, cut and crash, 2 records": one_name("zombies", "cuts", "broker_crashes", batches=SINGLE, instances=2),
    "a zombie, cut, 3 records": one_name("zombies", "cuts", records=(2, 5, 7), instances=2),
    "three instances, two zombies and a cut": one_name("zombies", "zombies", "cuts", records=(2,), instances=3),
    "window of three": one_name(
        "cuts", "broker_crashes", records=(2, 5, 7, 8), batches=SINGLE, in_flight=3, remembered=3
    ),
    "store full, 3 records": one_name("cuts", "store_full", "broker_crashes", records=(2, 5, 7)),
    "topic gone, 3 records": one_name("cuts", "cuts", "topic_losses", "broker_crashes", records=(2, 5, 7)),
    "topic gone, independent sends, crash": one_name(
        "cuts", "cuts", "topic_losses", "broker_crashes", records=(2, 5, 7), batches=SINGLE, application_numbers=False
    ),
    "a group fails, 3 records": one_name("cuts", "group_failures", "topic_losses", records=(2, 5, 7)),
    "a restart while the topic is gone": one_name("application_crashes", "cuts", "topic_losses", instances=2),
    "leases expire, broker crash, two inputs": group("expiries", "broker_crashes"),
    "output topic gone, leases expire, cut": group("cuts", "topic_losses", "expiries", inputs=1),
    "leases expire, cut and crash": group("cuts", "expiries", "broker_crashes"),
    "leases expire, two in flight": group("cuts", "expiries", in_flight=2),
    "leases expire twice, three workers": group("expiries", "expiries", workers=3, inputs=1),
    "workers die, two in flight, crash": group("deaths", "broker_crashes", in_flight=2),
    "output topic gone, two workers": group("cuts", "topic_losses", "expiries"),
    "transactions without a producer, crash": group("cuts", "expiries", "broker_crashes", producers=False),
    "plain offset commits, two in flight": group("cuts", "expiries", "plain_commits", in_flight=2),
    "two partitions, cut": group("cuts", "expiries", partitions=2, inputs=1),
    "two partitions, two inputs": group("expiries", partitions=2),
    "two partitions, a group fails, expiry": group("group_failures", "expiries", partitions=2, inputs=1),
    "two partitions, two are revoked": group("revocations", "revocations", partitions=2, inputs=1),
    "two partitions, revoked, leases expire": group("revocations", "expiries", partitions=2, inputs=1),
    "revoked twice": group("revocations", "revocations", "cuts", inputs=1),
    "revoked, two inputs": group("revocations", "cuts"),
    "old heartbeats, two workers": group("reports", "cuts", "expiries", inputs=1),
    "a holder seeks, expiry and death": group("seeks", "expiries", "deaths"),
    "a holder seeks, expiry and cut, beside": group("seeks", "cuts", "expiries", "reports", inputs=1),
    "an operator seeks, expiry and cut": group("operator_seeks", "cuts", "expiries", inputs=1),
    "an operator seeks, a group fails, cut": group("operator_seeks", "group_failures", "cuts", inputs=1, workers=1),
    "two operators' seeks": group("operator_seeks", "operator_seeks", "cuts", inputs=1, workers=1),
    "holder and operator seek, cut": group("seeks", "operator_seeks", "cuts", inputs=1, workers=1),
    "poison, everything": poisoned(
        "kills", "expiries", "takings", "broker_crashes", poison=((1,),), inputs=2, workers=2
    ),
    "poison, everything, 3 inputs": poisoned(
        "kills", "expiries", "takings", "broker_crashes", poison=((1,),), workers=2
    ),
    "poison, attempts told late, two workers": poisoned(
        "kills", "expiries", "broker_crashes", "failures", "copies", poison=((1,),), inputs=2, workers=2
    ),
    "poison beside innocents, attempts told late, expiries": poisoned(
        "kills", "expiries", "failures", "copies", "copies", poison=((), (0,)), inputs=1
    ),
    "poison in two partitions": poisoned("kills", "broker_crashes", poison=((1,), (0,)), inputs=2),
    "poison beside innocents, kills and expiries": poisoned(
        "kills", "expiries", poison=((), (0,)), inputs=2, workers=2
    ),
    "a group fails, cut": group("group_failures", "cuts", "expiries", inputs=1),
    "takeover, two inputs, expiry": group("zombies", "cuts", "expiries", shared_name=True, remembered=1),
    "takeover, crash": group("zombies", "cuts", "broker_crashes", shared_name=True, inputs=1),
    "takeover, two partitions": group("zombies", "cuts", shared_name=True, partitions=2, inputs=1),
    "takeover, group failure and cut": group("zombies", "cuts", "group_failures", shared_name=True, inputs=1),
}


class Removal(NamedTuple):
    """Without these rules, that property breaks."""

    rules: tuple[str, ...]
    """Fields of Guards; none where a bound breaks the rule."""
    breaks: str
    bounds: Bounds


ZOMBIE = one_name("zombies", "cuts", batches=SINGLE, instances=2)
DELETED = one_name("deletions", "cuts", "zombies", records=(2,), instances=2, application_numbers=False)
RACE = one_name("zombies", batches=SINGLE, instances=2)
TAKEOVER = group("zombies", "expiries", shared_name=True)
EXPIRY = group("expiries", inputs=1)
OPERATOR = group("operator_seeks", "seeks", "cuts", inputs=1, workers=1)
SEEKS = group("seeks", "reports", inputs=1, workers=1)
GHOST = group("cuts", "reports", inputs=1, workers=1)

TABLE: dict[str, list[Removal]] = {
    # The rows of the protocol page, section 4, by the names they have there.
    "epoch check": [Removal(("epoch_checked",), guards.FENCED_APPENDS, ZOMBIE)],
    "CAS (max-seq dedup)": [
        Removal(("sequence_compared",), guards.HOLE, one_name("cuts", "store_full", batches=SINGLE)),
    ],
    "GAP (silent ok)": [Removal(("gaps_refused",), guards.LOST, one_name("cuts", "store_full", batches=SINGLE))],
    "connection fence": [
        Removal((rule,), guards.NOT_STORED_BUT_STORED, bounds)
        for rule in ("connection_fence", "fence_rises_on_refusal")
        for bounds in (
            one_name("cuts", "topic_losses", batches=SINGLE),
            one_name("cuts", "topic_losses", batches=SINGLE, application_numbers=False),
            group("cuts", "topic_losses", workers=1, inputs=1),
        )
    ],
    "CAS open": [
        Removal(("opens_compare",), guards.LIVE_FENCED, one_name("application_crashes", records=(2,), instances=2)),
        Removal(("opens_compare",), guards.LIVE_FENCED, group("deaths", shared_name=True, inputs=1)),
    ],
    "no-open reconnect": [
        Removal(("reconnect_without_open",), guards.LIVE_FENCED, ZOMBIE),
        Removal(("reconnect_without_open",), guards.LIVE_FENCED, group("zombies", "cuts", shared_name=True, inputs=1)),
    ],
    "frozen cut": [Removal(("cut_is_frozen",), guards.FALSE_GAP, one_name("cuts", records=(2, 5, 7)))],
    "resend all": [Removal(("everything_resent",), guards.FALSE_GAP, one_name("cuts", records=(2, 5, 7)))],
    "C8": [Removal(("stored_records_dropped",), guards.STORED_TWICE, one_name("application_crashes", instances=2))],
    "lease check": [Removal(("lease_checked",), guards.STALE_LEASE, EXPIRY)],
    "from": [
        Removal(("start_checked",), guards.OUTPUT_TWICE, group("cuts", "reruns", workers=1, inputs=1)),
        Removal(("start_checked",), guards.OUTPUT_TWICE, group("cuts", producers=False, workers=1, inputs=1)),
    ],
    "pid AND global epoch": [
        Removal(("rows_are_found_by_id", "numbers_never_reset"), guards.OLD_LIFE_APPENDS, DELETED),
    ],
    "ok waits for durable": [
        Removal(("acknowledgements_wait",), guards.LOST, one_name("broker_crashes")),
        Removal(("acknowledgements_wait",), guards.LOST, group("broker_crashes", workers=1, inputs=1)),
    ],
    "dup waits for durable": [
        Removal(("duplicates_wait",), guards.LOST, one_name("cuts", "broker_crashes")),
        Removal(("duplicates_wait",), guards.LOST, group("cuts", "broker_crashes", workers=1, inputs=1)),
    ],
    "duplicate rule": [Removal(("duplicates_recognised",), guards.FALSE_GAP, one_name("cuts"))],
    "K>=W": [Removal((), guards.RESULT_LOST, one_name("cuts", batches=SINGLE, in_flight=2, remembered=1))],
    "dup before refusals": [
        Removal(("duplicates_before_refusals",), guards.NOT_STORED_BUT_STORED, one_name("cuts", "topic_losses")),
    ],
    "open durable": [
        Removal(("opens_wait",), guards.TWO_HOLDERS, one_name("broker_crashes", "zombies", records=(2,), instances=2)),
        Removal(("opens_wait",), guards.TWO_HOLDERS, group("broker_crashes", "zombies", shared_name=True, inputs=1)),
    ],
    "open decided": [
        Removal(("opens_read_decided",), guards.FALSE_GAP, one_name("application_crashes", instances=2)),
    ],
    "drain": [Removal(("refusals_drained",), guards.FALSE_GAP, one_name("store_full", batches=SINGLE))],
    "ignore old answers": [
        Removal(("old_answers_ignored",), guards.FALSE_GAP, one_name("cuts", "store_full", batches=SINGLE)),
        Removal(
            ("old_answers_ignored",), guards.NOT_STORED_BUT_STORED, one_name("cuts", "topic_losses", batches=SINGLE)
        ),
    ],
    "C3": [
        Removal(
            ("resent_on_new_connection_only",),
            guards.NOT_STORED_BUT_STORED,
            one_name("timeouts", "topic_losses", batches=SINGLE),
        ),
    ],
    "poison": [
        Removal((rule,), guards.INNOCENT_PUT_ASIDE, bounds)
        for rule, bounds in (
            ("unclean_ends_suspect", poisoned(poison=((1,),))),
            ("suspects_alone", poisoned(poison=((1,),))),
            ("suspects_alone_in_member", poisoned(poison=((), (0,)), inputs=1)),
            ("nothing_beside_a_suspect", poisoned(poison=((0, 2),))),
            ("attempts_stored_ahead", poisoned(poison=((), (0,)), inputs=2)),
            ("attempts_stored_ahead", poisoned("expiries", "expiries", poison=((1,),))),
            ("clean_ends_excuse", poisoned(poison=((1,),))),
            ("unheard_ends_excuse", poisoned("broker_crashes", "broker_crashes", poison=((1,),))),
            ("grants_begin_anew", poisoned("kills", "copies", "failures", poison=((), (0,)), inputs=1)),
            ("begun_leases_not_told_again", poisoned(poison=((), (0,)), inputs=1)),
            ("turns_only_rise", poisoned("copies", "failures", poison=((), (0,)), inputs=1)),
            ("cut_short_is_told", poisoned(poison=((), (0,)), inputs=1)),
        )
    ],
    "poison that is never put aside": [
        Removal(("unclean_ends_count",), guards.POISON_LIVES, poisoned(poison=((1,),))),
    ],
    "dead letter": [
        Removal(("dead_letter_with_position",), guards.DEAD_LETTER_TWICE, poisoned("kills", poison=((1,),))),
    ],
    "lease bump": [
        Removal(("grants_bump",), guards.FALSE_OFFSET_MOVED, group("expiries")),
        Removal(("grants_bump", "start_checked"), guards.OUTPUT_TWICE, group("expiries")),
    ],
    "grant durable": [
        Removal(("grants_wait",), guards.FALSE_OFFSET_MOVED, group("expiries", "broker_crashes", inputs=1)),
        Removal(("grants_wait", "start_checked"), guards.OUTPUT_TWICE, group("expiries", "broker_crashes", inputs=1)),
    ],
    "grant decided": [
        Removal(("grants_read_decided",), guards.FALSE_OFFSET_MOVED, group("expiries")),
        Removal(("grants_read_decided", "start_checked"), guards.OUTPUT_TWICE, group("expiries")),
    ],
    "forward-only": [
        Removal(("offsets_move_forward",), guards.WENT_BACK, group("cuts", "plain_commits", workers=1)),
    ],
    "adoption compares the lease": [
        Removal(("adoption_compares_lease",), guards.FALSE_LEASE_LOST, group("expiries", "broker_crashes", inputs=1)),
    ],
    "session fence": [
        Removal(("sessions_fenced",), guards.FALSE_LEASE_LOST, group("reports", "cuts", fault, inputs=1, workers=1))
        for fault in ("expiries", "revocations")
    ],
    "seek CAS": [
        Removal(("seeks_compare",), guards.SEEK_TWICE, OPERATOR),
        Removal(("seeks_bump",), guards.SEEK_TWICE, OPERATOR),
        Removal(("repeated_race_is_unknown",), guards.SEEK_TWICE, OPERATOR),
        Removal(("seeks_are_named", "repeated_race_is_unknown"), guards.SEEK_TWICE, OPERATOR),
        Removal(
            ("repeated_race_is_unknown",), guards.NOT_STORED_BUT_STORED, group("seeks", "cuts", "expiries", inputs=1)
        ),
        Removal(("seeks_are_named",), guards.SEEK_LOST, group("seeks", "expiries", "deaths")),
    ],
    "answers match the report": [
        Removal(("answers_match_report",), guards.FALSE_OFFSET_MOVED, SEEKS),
        Removal(("answers_match_report", "start_checked"), guards.OUTPUT_TWICE, SEEKS),
    ],
    "incarnation": [
        Removal(
            ("incarnation_compared",),
            guards.TWO_HOLDERS,
            one_name("restores", "zombies", records=(2,), instances=2, application_numbers=False),
        ),
    ],
}

FURTHER: dict[str, list[Removal]] = {
    # Rules that the table does not name, by the failure that they prevent.
    "H1, a group failure forgets the fence": [
        Removal(
            ("failure_closes_connections",),
            guards.NOT_STORED_BUT_STORED,
            one_name("group_failures", "cuts", "topic_losses", batches=SINGLE, application_numbers=False),
        ),
    ],
    "H4": [
        Removal(
            ("fenced_tells_end",),
            guards.NOT_STORED_BUT_STORED,
            one_name("zombies", "cuts", batches=SINGLE, instances=2, in_flight=1, remembered=1),
        ),
        Removal(
            ("fenced_tail_judged",),
            guards.NOT_STORED_BUT_STORED,
            one_name("zombies", "cuts", records=(2, 5, 7), batches=SINGLE, instances=2),
        ),
        Removal(
            ("fenced_tells_end",),
            guards.NOT_STORED_BUT_STORED,
            group("zombies", "cuts", shared_name=True, in_flight=2, remembered=1),
        ),
    ],
    "H5": [
        Removal(("refusals_wait",), guards.LOST, one_name("zombies", "broker_crashes", batches=SINGLE, instances=2)),
        Removal(("refusals_wait",), guards.LOST, group("zombies", "broker_crashes", shared_name=True, in_flight=2)),
    ],
    "H8": [
        Removal(("failure_discards_following",), guards.HOLE, one_name("group_failures", batches=SINGLE)),
        Removal(("failure_discards_replies",), guards.LOST, one_name("group_failures", records=(2,))),
        Removal(("failure_discards_following",), guards.OUTPUT_MISSING, group("group_failures", "expiries")),
        Removal(("failure_discards_replies",), guards.LOST, group("group_failures", "expiries", inputs=1)),
    ],
    "H13": [Removal(("grants_repeat", "sessions_fenced"), guards.FALSE_LEASE_LOST, GHOST)],
    "H14": [
        Removal(("tail_fails_with_head",), guards.HOLE, one_name(too_large=(2,), batches=SINGLE)),
        Removal(
            ("tail_relinked",), guards.FALSE_GAP, one_name(too_large=(2,), batches=SINGLE, application_numbers=False)
        ),
    ],
    "H15": [Removal(("cancel_detaches",), guards.HOLE, one_name("cancels", "cuts", batches=SINGLE))],
    "H16": [
        Removal(
            ("rows_are_found_by_id", "commits_create_no_row"),
            guards.STORED_TWICE,
            one_name("deletions", "cuts", records=(2,), application_numbers=False),
        ),
    ],
    "H18": [
        Removal(("every_commit_takes_a_number",), guards.FALSE_OFFSET_MOVED, group("cuts", workers=1, inputs=1)),
        Removal(
            ("every_commit_takes_a_number", "start_checked"),
            guards.OUTPUT_TWICE,
            group("cuts", workers=1, inputs=1),
        ),
    ],
    "H20": [
        Removal(
            ("refusals_ask_the_unsent",),
            guards.NOT_STORED_BUT_STORED,
            group("cuts", "operator_seeks", "plain_commits", in_flight=2, workers=1),
        ),
    ],
    "LEASE_LOST tells where the lease ended": [
        Removal(
            ("lease_lost_tells_end",),
            guards.NOT_STORED_BUT_STORED,
            group("cuts", "expiries", producers=False, inputs=1),
        ),
    ],
    "a takeover on an older connection than the newest": [
        Removal(("takeovers_forget_serial", "stale_reconnects"), guards.FALSE_STALE, RACE),
        Removal(("takeovers_forget_serial", "stale_reconnects"), guards.FALSE_STALE, TAKEOVER),
    ],
    "each entry of a transaction is checked": [
        Removal(("every_lease_checked",), guards.STALE_LEASE, group("revocations", partitions=2, inputs=1)),
        Removal(
            ("every_start_checked",),
            guards.OUTPUT_TWICE,
            group("cuts", "reruns", "revocations", partitions=2, inputs=1, workers=1),
        ),
    ],
    "everything or nothing": [
        Removal(("all_or_nothing",), guards.NOT_STORED_BUT_STORED, group("revocations", partitions=2, inputs=1)),
    ],
    "open in a group": [
        Removal(("epoch_checked",), guards.FENCED_APPENDS, group("zombies", shared_name=True, inputs=1)),
        Removal(("opens_read_decided",), guards.FALSE_CONFLICT, group("zombies", shared_name=True)),
    ],
}

REDUNDANT: dict[str, Removal] = {
    # Of two rules either is enough: the properties hold with one of them removed.
    "global epoch without the id": Removal(("rows_are_found_by_id",), "", DELETED),
    "the id without a global epoch": Removal(("numbers_never_reset",), "", DELETED),
    "a takeover keeps the serial, the client connects again": Removal(("takeovers_forget_serial",), "", RACE),
    "a takeover clears the serial, no client is ever stale": Removal(("stale_reconnects",), "", RACE),
    "a takeover keeps the serial, in a group": Removal(("takeovers_forget_serial",), "", TAKEOVER),
    "an old heartbeat is read, a lease is told again": Removal(("sessions_fenced",), "", GHOST),
    "an old heartbeat is refused, each grant is new": Removal(("grants_repeat",), "", GHOST),
}

UNNEEDED: dict[str, Removal] = {
    # Good manners: no property needs them, whatever happens.
    "granted before it is given back": Removal(
        ("given_back_before_granted",), "", group("revocations", "revocations", inputs=1)
    ),
    "granted before it is given back, cut": Removal(
        ("given_back_before_granted",), "", group("revocations", "cuts", inputs=1)
    ),
    "granted before it is given back, two partitions": Removal(
        ("given_back_before_granted",), "", group("revocations", partitions=2, inputs=1)
    ),
    "a holder's seek is not recognised": Removal(("seeks_repeat",), "", group("seeks", "cuts", inputs=1)),
    "an operator's seek is not recognised": Removal(("seeks_repeat",), "", OPERATOR),
    "an old seek is read": Removal(("sessions_fenced",), "", OPERATOR),
}

REMOVALS = {
    f"{row}: {', '.join(removal.rules) or 'bounds'} [{number}]": removal
    for row, removals in (TABLE | FURTHER).items()
    for number, removal in enumerate(removals)
}

assert all(removal.breaks != STUCK for removal in REMOVALS.values()), "a removal must break safety, not only progress"
