"""Walks a data directory and reports every broken invariant; changes nothing.

It knows what `core` promises of the rows, and takes nothing from the code that keeps the promises. A damaged file kills
the process that maps it, so `verify` walks in a child process: `python -m idemq.broker.check DIRECTORY`, which writes
one JSON object a line.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from idemq.client import records, wire

from . import schema
from .core import Damaged
from .pages import Broken, Pages
from .producers import ProducerRow, last_seq_of, positions_of
from .schema import State, Table
from .store import Reason, Snapshot, StoreError
from .topics import TopicRow

PROGRESS_BYTES = 64 << 20
"""How much of the log is read between two reports of progress."""


class Finding(NamedTuple):
    """One broken invariant."""

    where: str
    """The table, and the row as far as it is known."""
    text: str


@dataclass
class Report:
    """What a walk found."""

    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    """How many rows were looked at in each table; a table that was not reached is missing."""
    died: str = ""
    """How the walking process died ("by signal ..."), when it did not come to its end. That too is damage."""

    @property
    def clean(self) -> bool:
        """Nothing is broken."""
        return not self.findings and not self.died


Progress = Callable[[int, int], object]
"""Called with (bytes of the log read, bytes of the file)."""


class _Stretch(NamedTuple):
    """One batch of a producer: its numbers, and where it lies."""

    first_seq: int
    last_seq: int
    topic_id: int
    partition: int
    offset: int
    timestamp_ms: int


class _Log(NamedTuple):
    """What is kept of one partition after its log was read."""

    first: int
    end: int


def walk(directory: str | Path, progress: Progress | None = None) -> Report:
    """Walk in this process. Raises StoreError. A damaged file may kill the process: see `verify`."""
    report = Report()
    for event in _events(Path(directory), report):
        if progress is not None:
            progress(*event)
    return report


def verify(directory: str | Path, progress: Progress | None = None) -> Report:
    """Walk in a child process, which damage may kill. Raises StoreError."""
    command = [sys.executable, "-m", __name__, str(directory)]
    report = Report()
    reached = "nothing"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        ended = False
        for line in child.stdout:
            event = json.loads(line)
            if "error" in event:
                child.communicate()
                raise StoreError(Reason(event["error"]), event["text"])
            if "finding" in event:
                report.findings.append(Finding(*event["finding"]))
            elif "progress" in event:
                reached = f"{event['progress'][0]} bytes of the log"
                if progress is not None:
                    progress(*event["progress"])
            else:
                report.rows, ended = event["rows"], True
        complaint = child.stderr.read().strip().splitlines()
    if not ended or child.returncode:
        code = child.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        report.died = f"by {how} after {reached}{': ' + complaint[-1] if complaint else ''}"
    return report


def _events(directory: Path, report: Report) -> Iterator[tuple[int, int]]:
    """Fill the report; yields progress. Every finding is in the report before the next step may kill the process."""
    with Snapshot(directory) as snapshot:
        yield 0, snapshot.data_file.stat().st_size
        try:
            with Pages(str(snapshot.data_file)) as pages:
                pages.walk()
        except Broken as broken:
            report.findings.append(Finding("file", str(broken)))
            yield 0, snapshot.data_file.stat().st_size
        try:
            with snapshot.tables() as (txn, tables):
                yield from _Walk(txn, tables, report, snapshot.data_file.stat().st_size).run()
        except StoreError as error:
            if error.code == Reason.STORE_DAMAGED:
                report.findings.append(Finding("file", str(error.__cause__)))  # without the advice to come here
            elif error.code != Reason.STORE_UNREADABLE or not report.findings:  # else: what was found keeps it closed
                raise


class _Walk:
    """One walk over all tables, in the order in which they explain each other."""

    def __init__(self, txn: Any, tables: dict[Table, Any], report: Report, file_bytes: int) -> None:
        self._txn = txn
        self._tables = tables
        self._report = report
        self._file_bytes = file_bytes
        self._state = State(0, 0, 0)
        self._topics: dict[int, TopicRow] = {}
        self._lazy: dict[int, ProducerRow | None] = {}
        self._logs: dict[tuple[int, int], _Log] = {}
        self._stretches: dict[int, array[int]] = {}

    def run(self) -> Iterator[tuple[int, int]]:
        """Look at everything; yields progress."""
        self._read_meta()
        self._read_topics()
        yield from self._read_log()
        self._read_producers()
        self._read_names()
        self._read_offsets()

    def _found(self, where: str, text: str) -> None:
        self._report.findings.append(Finding(where, text))

    def _expect(self, holds: bool, where: str, text: str) -> None:
        if not holds:
            self._found(where, text)

    def _items(self, table: Table) -> Iterator[tuple[bytes, bytes]]:
        """All entries; LMDB's own order, count and look-up are checked on the way."""
        handle = self._tables[table]
        before = b""
        count = 0
        with self._txn.cursor(handle) as cursor:
            for key, value in cursor:
                self._expect(key > before or not count, f"{table} {key.hex()}", "the keys are out of order")
                self._expect(self._txn.get(key, db=handle) == value, f"{table} {key.hex()}", "a look-up misses it")
                before = key
                count += 1
                yield key, value
        entries = self._txn.stat(handle)["entries"]
        self._expect(count == entries, table.value, f"entries: {count} are there, and {entries} should be")
        self._report.rows[table.value] = count

    def _decoded(self, table: Table, decode: Callable[[bytes, bytes], Any]) -> Iterator[tuple[bytes, Any]]:
        """The entries that can be decoded; the others are findings."""
        for key, value in self._items(table):
            try:
                row = decode(key, value)
            except Damaged as damage:
                self._found(f"{table} {key.hex()}", str(damage))
                continue
            yield key, row

    def _read_meta(self) -> None:
        """Also the deltas, which have the state."""
        rows = dict(self._items(Table.META))
        try:
            incarnation = schema.incarnation(rows.get(schema.INCARNATION_KEY, b""))
            self._expect(len(incarnation) == schema.INCARNATION_BYTES, "meta", "the incarnation has a wrong length")
        except Damaged as damage:
            self._found("meta", str(damage))
        if schema.STATE_KEY_1 in rows:
            self._read_deltas_1(rows[schema.STATE_KEY_1])
        else:
            self._read_deltas()

    def _read_deltas(self) -> None:
        told: dict[int, list[schema.Change]] = {}
        for key, delta in self._decoded(Table.DELTAS, schema.delta):
            number = schema.ID_KEY.unpack(key)[0]
            where, before, self._state = f"delta {number}", self._state, delta.state
            self._expect(number <= delta.state.commits, where, "there was no such commit yet")
            rises = all(old <= new for old, new in zip(before, delta.state, strict=True))
            self._expect(rises, where, "its state goes back")
            for producer_id, change in delta.producers.items():
                if producer_id not in told:
                    key = schema.ID_KEY.pack(producer_id)
                    told[producer_id] = [self._txn.get(key, db=self._tables[Table.PRODUCERS])]
                told[producer_id].append(change)
        self._expect(self._report.rows[Table.DELTAS.value] > 0, "deltas", "there is none, and so no state")
        self._believe(told)

    def _believe(self, told: dict[int, list[schema.Change]]) -> None:
        for producer_id, changes in told.items():
            try:
                self._lazy[producer_id] = schema.changed(producer_id, changes)
            except Damaged as damage:
                self._found(f"deltas, producer {producer_id}", str(damage))

    def _read_deltas_1(self, state: bytes) -> None:
        """Those of format 1."""
        try:
            self._state = schema.state_1(state)
        except Damaged as damage:
            self._found("meta", str(damage))
        for key, rows in self._decoded(Table.DELTAS, schema.delta_1):
            number = schema.ID_KEY.unpack(key)[0]
            self._expect(number <= self._state.commits, f"delta {number}", "there was no such commit yet")
            self._believe({producer_id: [value] for producer_id, value in rows})

    def _read_topics(self) -> None:
        names: set[str] = set()
        for _, row in self._decoded(Table.TOPICS, schema.topic_row):
            self._topics[row.topic_id] = row
            where = f"topic {row.name!r} ({row.topic_id})"
            self._expect(row.topic_id <= self._state.counter, where, "its id lies above the counter")
            self._expect(row.deleted or row.name not in names, where, "another topic has the same name")
            if not row.deleted:
                names.add(row.name)

    # ------------------------------------------------------------------------------------------------------ log

    def _read_log(self) -> Iterator[tuple[int, int]]:
        read = reported = 0
        before: schema.LogRow | None = None
        partition_before: tuple[int, int] | None = None
        first = 0
        numbers: dict[int, int] = {}
        for key, value in self._items(Table.LOG):
            topic_id, partition, offset = schema.LOG_KEY.unpack(key)
            where = f"log {topic_id}/{partition} at {offset}"
            read += len(value)
            if (topic_id, partition) != partition_before:
                self._close_log(partition_before, first, before)
                partition_before, before, first, numbers = (topic_id, partition), None, offset, {}
                topic = self._topics.get(topic_id)
                known = topic is not None and partition < len(topic.floors)
                self._expect(known, where, "there is no such topic or partition")
            try:
                row = schema.log_row(key, value)
                header = wire.verified_header(value[schema.LOG_PREFIX_BYTES :])
            except (Damaged, wire.WireError) as error:
                self._found(where, str(error))
                before = None
                continue
            if before is not None:
                self._expect(offset == before.end, where, f"the batch before ends at {before.end}")
                self._expect(row.position == before.position + before.length, where, "the positions do not add up")
                self._expect(row.timestamp_ms >= before.timestamp_ms, where, "the time goes back")
            before = row
            belongs = (header.topic_id, header.partition) == (topic_id, partition)
            self._expect(belongs, where, f"the batch was made for {header.topic_id}/{header.partition}")
            if header.producer_id:
                self._expect(header.producer_id <= self._state.counter, where, "its producer's id is above the counter")
                rising = header.first_seq > numbers.get(header.producer_id, -1)
                self._expect(rising, where, f"producer {header.producer_id} repeats number {header.first_seq}")
                numbers[header.producer_id] = header.last_seq
                stretch = _Stretch(header.first_seq, header.last_seq, topic_id, partition, offset, row.timestamp_ms)
                self._stretches.setdefault(header.producer_id, array("q")).extend(stretch)
            if read - reported >= PROGRESS_BYTES:
                reported = read
                yield read, self._file_bytes
        self._close_log(partition_before, first, before)
        yield read, self._file_bytes

    def _close_log(self, where: tuple[int, int] | None, first: int, last: schema.LogRow | None) -> None:
        if where is not None and last is not None:
            self._logs[where] = _Log(first, last.end)
            topic = self._topics.get(where[0])
            if topic is not None and where[1] < len(topic.floors):
                holds = topic.floors[where[1]] <= last.end
                self._expect(holds, f"topic {topic.name!r} partition {where[1]}", "its floor lies beyond its end")

    def _earliest(self, topic: TopicRow, partition: int) -> int:
        """The first offset that counts."""
        log = self._logs.get((topic.topic_id, partition))
        return topic.floors[partition] if log is None else max(topic.floors[partition], log.first)

    # ------------------------------------------------------------------------------------------------ producers

    def _producer(self, producer_id: int) -> ProducerRow | None:
        """As the store answers: deltas first. Raises Damaged."""
        if producer_id in self._lazy:
            return self._lazy[producer_id]
        key = schema.ID_KEY.pack(producer_id)
        value = self._txn.get(key, db=self._tables[Table.PRODUCERS])
        return None if value is None else schema.producer_row(key, value)

    def _read_producers(self) -> None:
        for key, row in self._decoded(Table.PRODUCERS, schema.producer_row):
            if schema.ID_KEY.unpack(key)[0] not in self._lazy:
                self._look_at_producer(row)
        for _, row in sorted(self._lazy.items()):
            if row is not None:
                self._look_at_producer(row)
        for producer_id, numbers in self._stretches.items():
            self._look_for_repeats(producer_id, _stretches(numbers))

    def _look_at_producer(self, row: ProducerRow) -> None:
        where = f"producer {row.name!r} ({row.producer_id})"
        self._expect(row.producer_id <= row.epoch <= self._state.counter, where, "id <= epoch <= counter does not hold")
        epochs = [*(takeover.epoch for takeover in row.takeovers), row.epoch]
        ends = [*(takeover.ended_at for takeover in row.takeovers), row.last_seq]
        rising = all(a < b for a, b in pairwise(epochs)) and all(a <= b for a, b in pairwise(ends))
        self._expect(rising, where, "its takeovers do not rise")
        numbers = list(map(last_seq_of, row.results))
        self._expect(all(a < b for a, b in pairwise(numbers)), where, "its results do not rise")
        self._expect(not numbers or numbers[-1] == row.last_seq, where, "its last result is not its last number")
        named = self._txn.get(row.name.encode(), db=self._tables[Table.PRODUCER_NAMES])
        self._expect(named is not None, where, "the index of names does not know it")
        stretches = list(_stretches(self._stretches.get(row.producer_id, array("q"))))
        for one in stretches:
            at = f"log {one.topic_id}/{one.partition} at {one.offset}"
            self._expect(one.last_seq <= row.last_seq, at, f"{where} has reached only {row.last_seq}")
        if row.results:
            self._compare_results(row, stretches)

    def _compare_results(self, row: ProducerRow, stretches: list[_Stretch]) -> None:
        """Each batch of a remembered commit stands in its result, and each position of a result holds its batch."""
        where = f"producer {row.name!r} ({row.producer_id})"
        numbers = list(map(last_seq_of, row.results))
        positions = list(map(positions_of, row.results))
        wanted = {(index, *one) for index, found in enumerate(positions) for one in found}
        for one in stretches:
            index = bisect_left(numbers, one.last_seq)
            if index == len(numbers) or (index == 0 and one.last_seq < numbers[0]):
                # Of the oldest result only the end is known: what lies below may belong to it, or to a forgotten one.
                wanted.discard((0, one.offset, one.timestamp_ms))
                continue
            at = f"log {one.topic_id}/{one.partition} at {one.offset}"
            apart = index == 0 or one.first_seq > numbers[index - 1]
            self._expect(apart, at, f"{where} has a result that ends inside the batch")
            told = (one.offset, one.timestamp_ms) in positions[index]
            self._expect(told, at, f"{where} was told another position for {one.last_seq}")
            wanted.discard((index, one.offset, one.timestamp_ms))
        for index, offset, _ in sorted(wanted):
            if not self._removed(offset):
                self._found(where, f"the batch of {_range(numbers, index)} is not at offset {offset} of any partition")

    def _removed(self, offset: int) -> bool:
        """May a batch at this offset have been trimmed, or have gone with its topic?"""
        return self._state.topics_removed > 0 or any(
            self._earliest(topic, partition) > offset
            for topic in self._topics.values()
            for partition in range(len(topic.floors))
        )

    def _look_for_repeats(self, producer_id: int, stretches: Iterator[_Stretch]) -> None:
        """No number twice over the whole log. Ranges that overlap are read to see which numbers they hold."""
        together: list[_Stretch] = []
        reach = -1
        for one in sorted(stretches):
            if one.first_seq > reach:
                self._compare_numbers(producer_id, together)
                together = []
            together.append(one)
            reach = max(reach, one.last_seq)
        self._compare_numbers(producer_id, together)

    def _compare_numbers(self, producer_id: int, together: list[_Stretch]) -> None:
        seen: set[int] = set()
        for one in together if len(together) > 1 else ():
            where = f"log {one.topic_id}/{one.partition} at {one.offset}"
            value = self._txn.get(schema.log_key(one.topic_id, one.partition, one.offset), b"", self._tables[Table.LOG])
            try:
                batch = records.unpack(value[schema.LOG_PREFIX_BYTES :], one.offset, one.timestamp_ms, "", b"")
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it is a finding
                self._found(where, f"the batch cannot be read: {error}")
                continue
            for index in range(batch.header.records):
                number = batch.seq(index)
                self._expect(number not in seen, where, f"number {number} of producer {producer_id} is stored twice")
                seen.add(number)

    def _read_names(self) -> None:
        for key, producer_id in self._decoded(Table.PRODUCER_NAMES, schema.name_id):
            where = f"producer name {key!r}"
            try:
                row = self._producer(producer_id)
            except Damaged:
                continue  # found with the rows
            if row is None:
                self._found(where, f"there is no producer {producer_id}")
            else:
                self._expect(row.name.encode() == key, where, f"producer {producer_id} is called {row.name!r}")

    # -------------------------------------------------------------------------------------------------- offsets

    def _read_offsets(self) -> None:
        for key, row in self._decoded(Table.OFFSETS, schema.offset_row):
            group, topic_id, partition = schema.offset_key_of(key)
            where = f"group {group!r} in {topic_id}/{partition}"
            topic = self._topics.get(topic_id)
            if topic is None or partition >= len(topic.floors):
                self._found(where, "there is no such topic or partition")
                continue
            log = self._logs.get((topic_id, partition))
            end = max(topic.floors[partition], log.end if log is not None else 0)
            self._expect(row.next <= end, where, f"its position {row.next} lies beyond the end at {end}")
            self._expect(row.suspects_end <= end, where, f"its suspects end beyond the end at {end}")
            leases = row.ended_lease < row.lease <= self._state.counter or not (row.ended_lease or row.lease)
            self._expect(leases, where, "its leases do not rise, or lie above the counter")
            self._expect(bool(row.lease or not row.holder), where, f"{row.holder!r} holds it without a lease")


def _stretches(numbers: array[int]) -> Iterator[_Stretch]:
    width = len(_Stretch._fields)
    return (_Stretch(*numbers[start : start + width]) for start in range(0, len(numbers), width))


def _range(numbers: list[int], index: int) -> str:
    low = f"{numbers[index - 1] + 1}" if index else ""
    return f"numbers {low}..{numbers[index]}"


def main(directory: str) -> int:
    """Walk, and write what is found to standard output, one JSON object a line. For `verify`."""
    report = Report()
    told = 0
    try:
        for event in _events(Path(directory), report):
            for finding in report.findings[told:]:
                print(json.dumps({"finding": finding}), flush=True)
            told = len(report.findings)
            print(json.dumps({"progress": event}), flush=True)
    except StoreError as error:
        print(json.dumps({"error": error.code, "text": error.text}), flush=True)
        return 1
    for finding in report.findings[told:]:
        print(json.dumps({"finding": finding}), flush=True)
    print(json.dumps({"rows": asdict(report)["rows"]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
