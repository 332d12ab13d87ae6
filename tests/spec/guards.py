"""Every rule that the protocol can be asked to do without, as one flag; and the properties that the rules protect.

All flags True is the protocol. The tests remove one at a time and expect the property that then breaks. Numbers are
those of the protocol page: 1 to 18 are the broker's rules, C1 to C10 the client's, H1 to H20 the known failures.
"""

from __future__ import annotations

from dataclasses import dataclass

# What must never be seen. The words before the colon are those of the table of guards in section 4.
FENCED_APPENDS = "fenced appends: a commit of a replaced epoch was applied"
TWO_HOLDERS = "two holders: a commit of another instance was applied under the holder's own epoch"
OLD_LIFE_APPENDS = "old life appends: a commit made for a deleted producer was applied to its namesake"
ORDER_BROKEN = "hole in order: a message was stored behind one that follows it"
HOLE = "hole in order: a position of the source was skipped"
STORED_TWICE = "stored twice"
LOST = "acked but lost: what was answered as stored is not durable"
NOT_STORED_BUT_STORED = "'not stored' but stored"
LIVE_FENCED = "live one fenced: an instance that was replaced or died took the name from its live successor"
FALSE_FENCED = "false FENCED: nobody else holds the name"
FALSE_GAP = "false GAP: SEQUENCE_GAP reached the application"
FALSE_CONFLICT = "false CONFLICT: SEQUENCE_CONFLICT reached the application"
FALSE_STALE = "false STALE_CONNECTION: on the connection in use, with no way on"
FALSE_REPLACED = "false STORE_REPLACED: an epoch from the future"
FALSE_OFFSET_MOVED = "false OFFSET_MOVED: nobody else may have moved the position"
FALSE_LEASE_LOST = "false LEASE_LOST: nobody else had the lease in between"
RESULT_LOST = "duplicate without its result"
RESULT_WRONG = "duplicate answered with another result than the original's"
STALE_LEASE = "stale lease moves offset"
OUTPUT_TWICE = "output twice: an input was processed twice between two seeks"
OUTPUT_MISSING = "input skipped: a position moved without its output"
WENT_BACK = "position went back without a Seek"
SEEK_TWICE = "one Seek applied twice"
INNOCENT_PUT_ASIDE = "innocent input put aside: its member did not vanish so often while it was under way"
POISON_LIVES = "poison lives: it killed more workers than its attempts allow"
DEAD_LETTER_TWICE = "dead letter twice"
SEEK_LOST = "Seek reported as applied and is not"


@dataclass(frozen=True)
class Guards:
    """The rules. Removing one is `Guards(rule=False)`."""

    # ---- the broker: sequences
    every_commit_takes_a_number: bool = True
    """1: last_seq > prev_seq, also for a transaction that stores no message. Without: H18."""
    rows_are_found_by_id: bool = True
    """2: by producer id, not by name alone."""
    commits_create_no_row: bool = True
    """2: a commit for a row that is gone is UNKNOWN_PRODUCER. Without: H16."""
    epoch_checked: bool = True
    """3: a commit of an older epoch is FENCED."""
    fenced_tells_end: bool = True
    """3, C6: FENCED carries `ended_at`; without, the client takes FENCED for "not stored" (H4)."""
    connection_fence: bool = True
    """4: a commit on an older connection than the newest seen is dropped. Without: H1."""
    fence_rises_on_refusal: bool = True
    """4: the serial is recorded even if the commit is refused below. Without: H1."""
    takeovers_forget_serial: bool = True
    """4, 10: a takeover clears the serial: the new holder may have connected before the old one last did. (This or
    `stale_reconnects` is needed.)"""
    duplicates_recognised: bool = True
    """5: last_seq <= row.last_seq is a duplicate."""
    duplicates_before_refusals: bool = True
    """5 before 6 and 7: a stored commit is answered as stored whatever would refuse it now. Without: H10."""
    sequence_compared: bool = True
    """6: prev_seq must be the row's last_seq. Without, the highest number wins."""
    gaps_refused: bool = True
    """6: what does not fit is refused, not silently dropped with an OK."""
    # ---- the broker: positions and leases
    lease_checked: bool = True
    """7: the lease of each entry must be the one stored."""
    every_lease_checked: bool = True
    """7 says each entry; without, only the first entry of a transaction."""
    start_checked: bool = True
    """7: `from` must be the stored next position. Without: H6."""
    every_start_checked: bool = True
    """7 says each entry; without, only the first entry of a transaction."""
    all_or_nothing: bool = True
    """8: a refusal leaves no trace; without, the entries before the refused one are applied."""
    lease_lost_tells_end: bool = True
    """7, C5: LEASE_LOST carries the position at hand-over; without, a transaction that has no producer to ask
    takes LEASE_LOST for "not stored"."""
    grants_bump: bool = True
    """14: a new holder gets a new lease."""
    grants_repeat: bool = True
    """14: a holder that does not report its lease has not heard of it: it is told the same again. Without: H13."""
    grants_wait: bool = True
    """9, 14: a grant leaves when it is durable. Without: H11."""
    grants_read_decided: bool = True
    """14: a grant carries the decided position, not the durable one. Without: H12."""
    sessions_fenced: bool = True
    """4: a heartbeat or a seek on an older connection than its session's newest is refused."""
    adoption_compares_lease: bool = True
    """14: a returning member is taken for the holder only if the lease it reports is the row's."""
    given_back_before_granted: bool = True
    """14: a revoked partition is granted when its holder has given it back, or was forced to."""
    seeks_compare: bool = True
    """15: a Seek is a compare-and-swap on the lease."""
    seeks_bump: bool = True
    """15: and gives a new lease."""
    seeks_repeat: bool = True
    """15: whoever asks again for the last Seek that was applied is told so."""
    seeks_are_named: bool = True
    """15: a repeated Seek is known by its nonce; without, by any later lease of the same session."""
    unclean_ends_suspect: bool = True
    """18: a member that vanishes makes a suspect of everything it may have had in hand; without, the head is blamed."""
    unclean_ends_count: bool = True
    """18: the attempt that is under way when its member vanishes counts."""
    clean_ends_excuse: bool = True
    """18: the attempt that is under way when its partition is given back or taken does not count."""
    unheard_ends_excuse: bool = True
    """18: nor does that of a member that this broker, just started, never heard of."""
    grants_begin_anew: bool = True
    """18: to a new lease no attempt is under way, whatever came late under the one before."""
    begun_leases_not_told_again: bool = True
    """18, 14: whoever began an attempt had heard of its lease; what it does not report it has given back, and is
    granted anew."""
    turns_only_rise: bool = True
    """18: that an attempt begins changes nothing when it is read once more."""
    offsets_move_forward: bool = True
    """15: a plain offset commit never moves a position back. Without: H7."""
    # ---- the broker: replies, opens, the disk
    acknowledgements_wait: bool = True
    """9: "stored" leaves when it is durable."""
    duplicates_wait: bool = True
    """9: so does "was already stored"."""
    refusals_wait: bool = True
    """9: and so do refusals; it matters for FENCED with its `ended_at` (H5)."""
    opens_wait: bool = True
    """9: the answer to Open leaves when it is durable. Without: H11."""
    opens_read_decided: bool = True
    """10: and carries the decided last_seq. Without: H12."""
    opens_compare: bool = True
    """10: Open is a compare-and-swap on the epoch. Without: H2."""
    numbers_never_reset: bool = True
    """10: epochs come from one store-wide counter; without, a new row starts at epoch 1."""
    failure_discards_following: bool = True
    """13: what was decided after a failed group goes with it. Without: H8."""
    failure_discards_replies: bool = True
    """13: and so do all replies that wait, also those of duplicates. Without: H8."""
    failure_closes_connections: bool = True
    """13, 4: unread requests die with the group, because the serials that would stop them are forgotten."""
    incarnation_compared: bool = True
    """17: a client tells a restored store from the one it knew. Without: H17."""
    # ---- the client
    cut_is_frozen: bool = True
    """C1: a commit that was sent keeps its records and numbers. Without: H15."""
    everything_resent: bool = True
    """C3: after a reconnect all that is unanswered is sent again, oldest first. Without: H15."""
    resent_on_new_connection_only: bool = True
    """C3: on one connection a commit is sent once; without, a time-out sends it again (H1)."""
    old_answers_ignored: bool = True
    """C3: what still arrives from an older connection means nothing."""
    refusals_drained: bool = True
    """C4: act on a refusal only when everything sent on the connection is answered. Without: H14."""
    tail_fails_with_head: bool = True
    """C4: numbers that mean positions, or transactions: what follows a refused commit fails too; without, it is
    linked to what came before (H14)."""
    tail_relinked: bool = True
    """C4: independent sends: what follows a refused commit is linked to what came before. Without: H14."""
    refusals_ask_the_unsent: bool = True
    """C5: a commit not yet sent on this connection is asked for again before it is called aborted. Without: H20."""
    fenced_tail_judged: bool = True
    """C6: `ended_at` decides about every commit in flight; without, the unanswered ones count as not stored."""
    cancel_detaches: bool = True
    """C7: a cancelled send stays in the queue. Without: H15."""
    stored_records_dropped: bool = True
    """C8: after Open, records up to its last_seq are not sent. Without: H15."""
    reconnect_without_open: bool = True
    """11: a reconnect does not open; without, it opens as a new session would (H3)."""
    answers_match_report: bool = True
    """14: the answer to a heartbeat counts only if what was reported is still so."""
    suspects_alone: bool = True
    """18: a suspect is handled when nothing else is in hand, and nothing else before that is done with."""
    suspects_alone_in_member: bool = True
    """18: nothing else in the whole member; without, in its partition."""
    nothing_beside_a_suspect: bool = True
    """18: what is no suspect waits, too; without, only other suspects do."""
    attempts_stored_ahead: bool = True
    """18: that an attempt at a suspect is under way is stored before it begins; without, the broker blames a suspected
    head when its member is missed."""
    cut_short_is_told: bool = True
    """18: that an attempt was cut short is stored before its worker goes on."""
    dead_letter_with_position: bool = True
    """8, 18: a dead letter and the position behind its input are one commit."""
    repeated_race_is_unknown: bool = True
    """15: a Seek that was sent twice and refused may have been applied; without, it is asked for anew."""
    stale_reconnects: bool = True
    """4: STALE_CONNECTION on the connection in use is no answer: connect again. (This or `takeovers_forget_serial`.)"""
