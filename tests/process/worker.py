"""A worker to be killed, stopped and cut off: `python -m tests.process.worker URL NAME STAGE`.

The flights job in two stages, each a group, so each with as many workers as one likes:

    delays    flights -> delays: one output per input, "ROW,MINUTES" keyed by carrier
    totals    delays -> totals: "COUNT,MINUTES" per carrier so far, one output per carrier and batch

The running totals are kept as the metadata of the group's position, because that is one row: what was counted and how
far it was counted are stored by the same commit, found together by whoever is assigned the partition next, and moved
only by who began where they stand. So nothing is rebuilt and nothing compared. (Metadata is small: 4 KiB. What grows
beyond that belongs into a topic or a database.)

Prints a JSON line for each batch: when it is in hand, and then what became of it. SIGTERM ends it in order.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import defaultdict

import idemq
from idemq import Batch, Client, IdemqError, Message, OutcomeUnknown, RetriableError, Transaction, TransactionAborted

BATCH_MESSAGES = 100
REST_S = 0.03
"""How long a batch is in hand, so that a kill finds it there."""
TRANSACTION_S = 0.5
"""A wait that ends before a link that stalls goes on."""
OUTCOME_S = 60.0
PREFETCH_BYTES = 32 << 10
"""A fetch passes a link that breaks after a hundred thousand bytes or so."""
SOURCES = {"delays": "flights", "totals": "delays"}

Totals = dict[str, tuple[int, int]]
"""Carrier -> (flights, minutes)."""


def delay(row: bytes) -> tuple[str, int]:
    """(carrier, minutes late at arrival) of a line of the file; a flight that did not arrive was not late."""
    fields = row.decode().split(",")
    return fields[9], 0 if fields[8] == "NA" else int(fields[8])


def to_delays(batch: Batch, tx: Transaction) -> None:
    """One output per input."""
    for message in batch:
        carrier, minutes = delay(message.value)
        tx.send("delays", b"%d,%d" % (message.seq or 0, minutes), key=carrier.encode())


class ToTotals:
    """The second stage, and what it has counted in the partitions it holds."""

    def __init__(self, mq: Client) -> None:
        self._mq = mq
        self._totals: dict[tuple[int, int], Totals] = {}
        """(partition, lease) -> as of the group's position."""

    async def handle(self, batch: Batch, tx: Transaction) -> dict[tuple[int, int], Totals]:
        """Counts a batch; returns what will be so when the transaction is stored."""
        counted: dict[tuple[int, int], Totals] = {}
        changed: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
        for message in batch:
            changed[message.partition, message.lease].append(message)
        for held, messages in changed.items():
            if held not in self._totals:
                self._totals[held] = await self._stored(held[0])
            totals = counted[held] = dict(self._totals[held])
            for message in messages:
                carrier = (message.key or b"").decode()
                flights, minutes = totals.get(carrier, (0, 0))
                totals[carrier] = flights + 1, minutes + int(message.value.split(b",")[1])
            for key in {message.key for message in messages if message.key is not None}:
                tx.send("totals", b"%d,%d" % totals[key.decode()], key=key)
            tx.commit_offsets(messages, json.dumps(totals).encode())
        return counted

    async def _stored(self, partition: int) -> Totals:
        """With the group's position. It may be of a later one than we hold: then our transaction is refused."""
        offsets = (await self._mq.describe_group("totals")).offsets
        metadata = next(one.metadata for one in offsets if one.partition == partition)
        return {carrier: tuple(total) for carrier, total in json.loads(metadata or b"{}").items()}

    def stored(self, counted: dict[tuple[int, int], Totals]) -> None:
        """The transaction is stored."""
        self._totals.update(counted)

    def refused(self) -> None:
        """It is not, or nobody knows: look again."""
        self._totals.clear()


def say(**what: int | str) -> None:
    """Tell the test."""
    print(json.dumps(what), flush=True)


async def work(url: str, name: str, stage: str) -> None:
    """Handle batches until SIGTERM."""
    async with (
        idemq.connect(url, timeout=60, name=name) as mq,
        mq.subscribe(SOURCES[stage], group=stage, prefetch_bytes=PREFETCH_BYTES) as sub,
        mq.producer() as producer,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sub.stop)
        say(began=name)
        to_totals = ToTotals(mq)
        async for batch in sub.batches(max_messages=BATCH_MESSAGES):
            say(in_hand=len(batch))
            counted: dict[tuple[int, int], Totals] = {}
            try:
                async with producer.transaction(batch, timeout=TRANSACTION_S) as tx:
                    await asyncio.sleep(REST_S)
                    if stage == "delays":
                        to_delays(batch, tx)
                    else:
                        counted = await to_totals.handle(batch, tx)
            except OutcomeUnknown as unknown:
                to_totals.refused()
                say(refused=unknown.code)
                # The batch comes again in any case; if it was stored, that is refused.
                try:
                    await unknown.outcome(OUTCOME_S)
                except TransactionAborted as error:
                    say(refused=error.code)
                else:
                    say(stored=len(batch))
            except (TransactionAborted, RetriableError) as error:
                to_totals.refused()
                say(refused=error.code)
            else:
                to_totals.stored(counted)
                say(stored=len(batch))


if __name__ == "__main__":
    try:
        asyncio.run(work(*sys.argv[1:4]))
    except IdemqError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
