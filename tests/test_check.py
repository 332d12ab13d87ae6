"""`check` finds what is broken and nothing else: real histories are clean, and every planted breach is named."""

from __future__ import annotations

import lzma
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import pytest

from idemq.broker import check, schema, store
from idemq.broker.core import Group, Stored
from idemq.broker.groups import OffsetKey, OffsetRow
from idemq.broker.pages import _TREE, Broken, Pages, Tree
from idemq.broker.producers import ProducerRow, Takeover, result_of
from idemq.broker.schema import State, Table
from idemq.broker.store import Reason, Store, StoreError
from idemq.broker.topics import TopicRow
from idemq.client import wire
from idemq.client.wire import Position, Settings
from tests.crash import workload

DATA = Path(__file__).parent / "data"
COUNTER = 100
TIME_MS = 1000


@pytest.fixture(autouse=True)
def _deltas_move_on_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAZY_BYTES_MAX", "LAZY_DELTAS_MAX", "LAZY_STEP_ROWS", "LAZY_FEW_BYTES_MAX"):
        monkeypatch.setattr(store, name, getattr(store, name))
    workload.hurry()


def batch(
    topic_id: int, partition: int, producer_id: int, first: int, count: int, deltas: list[int] | None = None
) -> bytes:
    body = msgpack.packb([[b"value"] * count, None, None, deltas])
    last = first + (deltas[-1] if deltas else count - 1)
    return wire.make_batch(0, count, topic_id, partition, producer_id, first, last, body)


class Rows:
    """A small store that is right: two topics, two producers, one position. Change it, write it, look at it."""

    def __init__(self) -> None:
        self.topics = {
            1: TopicRow(1, "one", Settings(), (0, 0), "", False),
            2: TopicRow(2, "two", Settings(), (3,), "", False),
        }
        self.log: dict[tuple[int, int, int], Stored] = {}
        self.put(1, 0, 0, batch(1, 0, 10, 0, 4))
        self.put(1, 0, 4, batch(1, 0, 10, 6, 2))
        self.put(1, 1, 0, batch(1, 1, 10, 4, 2))
        self.put(1, 1, 2, batch(1, 1, 11, 0, 2, [0, 2]))
        self.put(1, 1, 4, batch(1, 1, 0, 0, 3))
        self.put(2, 0, 3, batch(2, 0, 11, 1, 2, [0, 2]))
        self.producers = {10: self.producer(10, "ten", 7), 11: self.producer(11, "eleven", 3)}
        # The first of these was trimmed with what lay below offset 3 of topic 2.
        self.result(10, 3, Position(0, TIME_MS))
        self.result(10, 5, Position(0, TIME_MS))
        self.result(10, 7, Position(4, TIME_MS))
        self.result(11, -1, Position(0, TIME_MS))
        self.result(11, 3, Position(2, TIME_MS), Position(3, TIME_MS))
        self.names = {"ten": 10, "eleven": 11}
        self.offsets = {OffsetKey("group", 1, 0): OffsetRow(6, 50, "s", None, 49, 3)}
        self.counter = COUNTER

    def put(self, topic_id: int, partition: int, offset: int, data: bytes, **other: Any) -> None:
        """Store a batch; its position follows from those before it unless it is given."""
        below = [one for key, one in self.log.items() if key[:2] == (topic_id, partition) and key[2] < offset]
        stored = Stored(topic_id, partition, offset, TIME_MS, sum(len(one.batch) for one in below), data)
        self.log[topic_id, partition, offset] = stored._replace(**other)

    def producer(self, producer_id: int, name: str, last_seq: int) -> ProducerRow:
        return ProducerRow(producer_id, name, 20, "s", last_seq, None, "", "", 0, 0, False, (Takeover(15, 2),), ())

    def result(self, producer_id: int, last_seq: int, *positions: Position) -> None:
        row = self.producers[producer_id]
        self.producers[producer_id] = row._replace(results=(*row.results, result_of(last_seq, 0, positions)))

    def change(self, producer_id: int, **fields: Any) -> None:
        self.producers[producer_id] = self.producers[producer_id]._replace(**fields)

    def write(self, directory: Path) -> None:
        opened = Store(directory)
        group = Group(
            appends=list(self.log.values()),
            producers=dict(self.producers),
            names=dict(self.names),
            offsets=dict(self.offsets),
            topics=dict(self.topics),
            counter=self.counter,
        )
        opened.commit(group)
        opened.close()


def test_a_store_that_is_right_is_clean(tmp_path: Path) -> None:
    Rows().write(tmp_path / "data")
    report = check.verify(tmp_path / "data")
    assert report.findings == []
    assert report.clean
    assert report.rows == {
        "meta": 2, "topics": 2, "log": 6, "deltas": 1, "producers": 0, "producer_names": 2, "offsets": 1,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_real_histories_are_clean(tmp_path: Path, seed: int) -> None:
    groups, contents = workload.history(seed, 120)
    opened = Store(tmp_path / "data")
    for index, group in enumerate(groups):
        opened.commit(group)
        if index % 20 == 19:
            assert workload.content(opened) == contents[index + 1]
            opened.close()
            assert check.walk(tmp_path / "data").findings == []
            opened = Store(tmp_path / "data")
    opened.close()


def _double(rows: Rows) -> None:
    rows.put(2, 0, 5, batch(2, 0, 10, 2, 1))
    rows.change(10, results=rows.producers[10].results[1:])


def _interleave(rows: Rows) -> None:
    rows.put(2, 0, 3, batch(2, 0, 11, 1, 2, [0, 1]))
    rows.change(11, last_seq=2, results=(result_of(2, 0, [Position(2, TIME_MS), Position(3, TIME_MS)]),))


BREACHES: dict[str, tuple[Callable[[Rows], object], str]] = {
    "a hole in the log": (lambda rows: rows.put(1, 1, 8, batch(1, 1, 0, 0, 1)), "the batch before ends at 7"),
    "positions": (lambda rows: rows.put(1, 1, 4, batch(1, 1, 0, 0, 3), position=1), "positions do not add up"),
    "time": (lambda rows: rows.put(1, 1, 4, batch(1, 1, 0, 0, 3), timestamp_ms=999), "the time goes back"),
    "another topic's batch": (lambda rows: rows.put(1, 1, 4, batch(2, 1, 0, 0, 3)), "was made for 2/1"),
    "an unknown topic": (lambda rows: rows.put(9, 0, 0, batch(9, 0, 0, 0, 3)), "no such topic or partition"),
    "an unknown partition": (lambda rows: rows.put(2, 1, 0, batch(2, 1, 0, 0, 3)), "no such topic or partition"),
    "a producer that never was": (lambda rows: rows.put(1, 1, 7, batch(1, 1, 999, 0, 1)), "above the counter"),
    "a number again in its partition": (lambda rows: rows.put(1, 0, 6, batch(1, 0, 10, 7, 1)), "repeats number 7"),
    "a number again elsewhere": (_double, "number 2 of producer 10 is stored twice"),
    "a number again inside ranges": (_interleave, "number 2 of producer 11 is stored twice"),
    "a number beyond the producer's": (lambda rows: rows.put(1, 1, 7, batch(1, 1, 10, 8, 1)), "has reached only 7"),
    "a lost batch": (lambda rows: rows.log.pop((1, 0, 4)), "the batch of numbers 6..7"),
    "a lost result": (
        lambda rows: rows.change(10, results=rows.producers[10].results[:-2] + rows.producers[10].results[-1:]),
        "was told another position for 5",
    ),
    "another position": (
        lambda rows: rows.change(10, results=(result_of(7, 0, [Position(5, TIME_MS)]),)),
        "was told another position for 7",
    ),
    "another time": (
        lambda rows: rows.change(10, results=(result_of(7, 0, [Position(4, 1)]),)),
        "was told another position for 7",
    ),
    "a result inside a batch": (
        lambda rows: rows.change(10, results=(result_of(6, 0, []), result_of(7, 0, [Position(4, TIME_MS)]))),
        "a result that ends inside the batch",
    ),
    "results out of order": (
        lambda rows: rows.change(11, results=rows.producers[11].results[::-1]),
        "its results do not rise",
    ),
    "the last result": (lambda rows: rows.change(11, last_seq=4), "its last result is not its last number"),
    "takeovers": (lambda rows: rows.change(11, takeovers=(Takeover(20, 1),)), "its takeovers do not rise"),
    "a takeover's end": (lambda rows: rows.change(11, takeovers=(Takeover(15, 9),)), "its takeovers do not rise"),
    "an epoch": (lambda rows: rows.change(11, epoch=COUNTER + 1), "id <= epoch <= counter"),
    "a row without its name": (lambda rows: rows.names.pop("ten"), "the index of names does not know it"),
    "a name without its row": (lambda rows: rows.names.update(nobody=12), "there is no producer 12"),
    "a name of another row": (lambda rows: rows.names.update(other=11), "producer 11 is called 'eleven'"),
    "a position beyond the end": (
        lambda rows: rows.offsets.update({OffsetKey("g", 1, 0): OffsetRow(7, 50, "s", None, 49, 3)}),
        "its position 7 lies beyond the end at 6",
    ),
    "a position of no topic": (
        lambda rows: rows.offsets.update({OffsetKey("g", 3, 0): OffsetRow(0, 50, "s", None, 49, 3)}),
        "no such topic or partition",
    ),
    "a lease": (
        lambda rows: rows.offsets.update({OffsetKey("g", 1, 0): OffsetRow(6, COUNTER + 1, "s", None, 49, 3)}),
        "its leases do not rise",
    ),
    "a lease that never was, and a lease before it": (
        lambda rows: rows.offsets.update({OffsetKey("g", 1, 0): OffsetRow(6, 0, "", None, 49, 3)}),
        "its leases do not rise",
    ),
    "a holder without a lease": (
        lambda rows: rows.offsets.update({OffsetKey("g", 1, 0): OffsetRow(6, 0, "s", None, 0, 0)}),
        "'s' holds it without a lease",
    ),
    "suspects beyond the end": (
        lambda rows: rows.offsets.update({OffsetKey("g", 1, 0): OffsetRow(6, 50, "", None, 49, 3, 0, 7)}),
        "its suspects end beyond the end at 6",
    ),
    "a topic's id": (
        lambda rows: rows.topics.update({COUNTER + 1: rows.topics[2]._replace(topic_id=COUNTER + 1, name="x")}),
        "its id lies above the counter",
    ),
    "a topic's name": (
        lambda rows: rows.topics.update({5: rows.topics[2]._replace(topic_id=5)}),
        "another topic has the same name",
    ),
    "a floor": (
        lambda rows: rows.topics.update({2: rows.topics[2]._replace(floors=(6,))}),
        "its floor lies beyond its end",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_every_breach_is_named(tmp_path: Path, name: str) -> None:
    rows = Rows()
    plant, text = BREACHES[name]
    plant(rows)
    rows.write(tmp_path / "data")
    findings = check.walk(tmp_path / "data").findings
    assert any(text in found.text for found in findings), findings


def test_what_was_trimmed_is_not_missed(tmp_path: Path) -> None:
    """Batches that retention removed, or that went with their topic, are no finding."""
    rows = Rows()
    del rows.log[1, 0, 0]
    rows.topics[1] = rows.topics[1]._replace(floors=(4, 0))
    rows.write(tmp_path / "trimmed")
    assert check.walk(tmp_path / "trimmed").findings == []
    rows = Rows()
    rows.topics[2] = rows.topics[2]._replace(floors=(0,))
    rows.put(2, 0, 0, rows.log.pop((2, 0, 3)).batch)
    rows.change(11, results=(result_of(3, 0, [Position(offset, TIME_MS) for offset in (2, 0, 9)]),))
    rows.write(tmp_path / "gone")
    assert len(check.walk(tmp_path / "gone").findings) == 1
    opened = Store(tmp_path / "gone")
    opened.commit(Group(topics={3: None}))
    opened.close()
    assert check.walk(tmp_path / "gone").findings == []


@pytest.mark.parametrize(
    ("number", "state", "text"),
    [
        (2, State(COUNTER, 1, 0), "there was no such commit yet"),
        (1, State(COUNTER - 1, 2, 0), "its state goes back"),
        (1, State(COUNTER, 2, 0), ""),
        (None, State(0, 0, 0), "there is none, and so no state"),
    ],
)
def test_deltas_tell_one_history(tmp_path: Path, number: int | None, state: State, text: str) -> None:
    Rows().write(tmp_path / "data")
    environment = lmdb.open(str(tmp_path / "data" / store.STORE_FOLDER), map_size=1 << 30, max_dbs=len(Table))
    handle = environment.open_db(Table.DELTAS.encode())
    with environment.begin(write=True, db=handle) as txn:
        if number is None:
            txn.drop(handle, delete=False)
        else:
            key = schema.ID_KEY.pack(number)
            assert txn.put(key, schema.delta_value(key, state, {}))
    environment.close()
    texts = [found.text for found in check.walk(tmp_path / "data").findings]
    assert text in texts if text else not texts


@pytest.mark.parametrize("table", list(Table))
def test_a_flipped_bit_is_found_in_every_table(tmp_path: Path, table: Table) -> None:
    rows = Rows()
    numbers = range(30, 38)
    rows.producers |= {
        number: rows.producer(number, f"p{number}", -1)._replace(epoch=30 + 9, takeovers=()) for number in numbers
    }
    rows.names |= {f"p{number}": number for number in numbers}
    rows.write(tmp_path / "data")
    opened = Store(tmp_path / "data")
    for number in numbers:  # two generations of deltas, so that rows of the first reach their places
        opened.commit(Group(producers={number: rows.producers[number]}))
    opened.close()
    environment = lmdb.open(str(tmp_path / "data" / store.STORE_FOLDER), map_size=1 << 30, max_dbs=len(Table))
    handle = environment.open_db(table.encode())
    with environment.begin(write=True, db=handle) as txn:
        items = list(txn.cursor())
        assert items, f"the case has no row in {table}"
        key, value = items[-1]
        assert txn.put(key, value[:-1] + bytes([value[-1] ^ 1]))
    environment.close()
    findings = check.walk(tmp_path / "data").findings
    assert any("match" in found.text for found in findings), findings
    assert not [found for found in findings if "verify" in found.text], "this is what it would send one to"


def test_each_page_is_used_once_or_free_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Rows().write(tmp_path / "data")
    with Pages(str(tmp_path / "data" / store.STORE_FOLDER / "data.mdb")) as pages:
        free = pages.free_pages()
        used = pages.meta.main.root
        lost = min(free)
        assert pages.walk().free_pages == len(free) > 1
        monkeypatch.setattr(Pages, "free_pages", lambda self: free - {lost} | {used})
        with pytest.raises(Broken, match=f"page {used} is in use and free"):
            pages.walk()
        monkeypatch.setattr(Pages, "free_pages", lambda self: free - {lost})
        with pytest.raises(Broken, match="1 pages are neither in use nor free"):
            pages.walk()


@pytest.mark.parametrize("field", ["branch_pages", "leaf_pages", "overflow_pages", "entries"])
def test_what_lmdb_counted_must_be_there(tmp_path: Path, field: str) -> None:
    Rows().write(tmp_path / "data")
    with Pages(str(tmp_path / "data" / store.STORE_FOLDER / "data.mdb")) as pages:
        main = pages.meta.main
        pages.meta = pages.meta._replace(main=main._replace(**{field: getattr(main, field) + 1}))
        with pytest.raises(Broken, match="its root says otherwise"):
            pages.walk()


def test_a_signpost_that_points_astray_is_found(tmp_path: Path) -> None:
    """A damaged key in the inside of a B-tree: every row is there, and looking for it does not find it."""
    rows = Rows()
    numbers = range(30, 300)
    rows.counter = 300
    new = rows.producer(30, "", -1)._replace(epoch=300, takeovers=())
    rows.producers |= {number: new._replace(producer_id=number, name=f"p{number}") for number in numbers}
    rows.names |= {f"p{number}": number for number in numbers}
    rows.write(tmp_path / "data")
    opened = Store(tmp_path / "data")
    for _ in range(100):
        opened.commit(Group(counter=300))  # rows move from their delta into the B-tree
    opened.close()
    file = tmp_path / "data" / store.STORE_FOLDER / "data.mdb"
    with Pages(str(file)) as pages:
        tables = {key: Tree(*_TREE.unpack(value)) for key, value, _ in pages._leaves(pages.meta.main, set())}
        tree, page_bytes = tables[Table.PRODUCERS.encode()], pages.meta.page_bytes
    assert tree.depth == 2
    with file.open("r+b") as opened_file:
        opened_file.seek(tree.root * page_bytes)
        page = opened_file.read(page_bytes)
        second = int.from_bytes(page[18:20], sys.byteorder)  # where the second child's key lies, behind 8 bytes
        opened_file.seek(tree.root * page_bytes + second + 8)
        opened_file.write(b"\xff" * 8)
    findings = check.walk(tmp_path / "data").findings
    assert any("a look-up misses it" in found.text for found in findings), findings


# ----------------------------------------------------------------------------------------------- in its own process


def test_damage_kills_the_child_and_not_the_caller(tmp_path: Path) -> None:
    """A file cut off under the map: whoever reads there gets SIGBUS."""
    opened = Store(tmp_path / "data")
    opened.commit(Group(topics=dict(Rows().topics), counter=COUNTER))
    for index in range(50):
        data = batch(1, 0, 0, 0, 1) if index else wire.make_batch(0, 1, 1, 0, 0, 0, 0, os.urandom(60_000))
        opened.commit(Group(appends=[Stored(1, 0, index, TIME_MS, index, data)]))
    opened.close()
    file = tmp_path / "data" / store.STORE_FOLDER / "data.mdb"
    os.truncate(file, 12 * 4096)
    report = check.verify(tmp_path / "data")
    assert not report.clean
    assert report.findings, "what was found before the end is told"
    assert report.died == "" or "signal" in report.died


def test_the_end_of_a_killed_walk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Rows().write(tmp_path / "data")
    real = subprocess.Popen

    def killed(command: list[str], **options: Any) -> subprocess.Popen[str]:
        program = (
            "import json, os; print(json.dumps({'finding': ['a', 'b']}));"
            "print(json.dumps({'progress': [5, 9]}), flush=True); os.kill(os.getpid(), 7)"
        )
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", killed)
    seen: list[tuple[int, int]] = []
    report = check.verify(tmp_path / "data", lambda *event: seen.append(event))
    assert report.died == f"by signal {signal.Signals(7).name} after 5 bytes of the log"
    assert report.findings == [check.Finding("a", "b")]
    assert seen == [(5, 9)]
    assert not report.clean


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Rows().write(tmp_path / "data")
    monkeypatch.setattr(check, "PROGRESS_BYTES", 100)
    seen: list[tuple[int, int]] = []
    check.walk(tmp_path / "data", lambda *event: seen.append(event))
    assert len(seen) > 3
    assert seen == sorted(seen)


def test_a_running_broker_is_left_alone(tmp_path: Path) -> None:
    opened = Store(tmp_path / "data")
    for look in (check.walk, check.verify):
        with pytest.raises(StoreError) as caught:
            look(tmp_path / "data")
        assert caught.value.code == Reason.STORE_LOCKED
    opened.close()
    assert check.walk(tmp_path / "data").clean


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    for look in (check.walk, check.verify):
        with pytest.raises(StoreError) as caught:
            look(tmp_path)
        assert caught.value.code == Reason.STORE_NOT_OURS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_file_that_is_cut_off_near_its_start_is_a_finding(tmp_path: Path, size: int) -> None:
    """LMDB says of an empty one that its descriptor is bad."""
    Rows().write(tmp_path)
    os.truncate(tmp_path / store.STORE_FOLDER / "data.mdb", size)
    findings = check.walk(tmp_path).findings
    assert "bytes" in findings[0].text
    assert not [found for found in findings if "verify" in found.text]


def test_a_copy_without_its_lock_can_be_checked(tmp_path: Path) -> None:
    Rows().write(tmp_path / "data")
    (tmp_path / "data" / store.LOCK_FILE).unlink()
    assert check.verify(tmp_path / "data").clean


# ------------------------------------------------------------------------------------------------- stores of old times


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_data_directory_of_every_format_opens(tmp_path: Path, version: int) -> None:
    """tests/data/format-N holds the file of a store and `repr` of all that it answered when it was made."""
    golden = DATA / f"format-{version}"
    (tmp_path / store.STORE_FOLDER).mkdir()
    file = tmp_path / store.STORE_FOLDER / "data.mdb"
    file.write_bytes(lzma.decompress((golden / "data.mdb.xz").read_bytes()))
    for _ in ("as it was", "upgraded"):
        assert check.walk(tmp_path).findings == []
        opened = Store(tmp_path)
        found = workload.content(opened)
        opened.close()
        with store.Snapshot(tmp_path) as snapshot, snapshot.tables() as (txn, tables):
            value = txn.get(schema.FORMAT_KEY, db=tables[Table.META])
        assert schema.format_version(value) == schema.FORMAT_VERSION, "no broker of an earlier format may read it now"
    assert repr(found) == lzma.decompress((golden / "content.txt.xz").read_bytes()).decode().strip()
    assert len(found[3]) > 1, "it has topics"
    assert len(found[7]) > 5, "it has producers"
    assert any(row.holder and row.suspects_end for _, row in found[9]), "it has positions, held, with suspects"
    assert any(row.turns % 2 for _, row in found[9]) == (version > 1), "and since format 2 attempts under way"


def test_an_upgrade_is_done_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / store.STORE_FOLDER).mkdir()
    file = tmp_path / store.STORE_FOLDER / "data.mdb"
    file.write_bytes(lzma.decompress((DATA / "format-1" / "data.mdb.xz").read_bytes()))

    def fail() -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(schema, "format_value", fail)
        with pytest.raises(StoreError, match="No space left"):
            Store(tmp_path)
    assert check.walk(tmp_path).rows["meta"] == 3, "it is of format 1 still"
    opened = Store(tmp_path)
    found = workload.content(opened)
    opened.close()
    assert repr(found) == lzma.decompress((DATA / "format-1" / "content.txt.xz").read_bytes()).decode().strip()
    assert check.walk(tmp_path).rows["meta"] == 2


def test_every_format_has_its_directory() -> None:
    present = {entry.name for entry in DATA.iterdir() if entry.name.startswith("format-")}
    assert present == {f"format-{version}" for version in range(1, schema.FORMAT_VERSION + 1)}
