"""The core by hand: what only a chosen moment between a decision and the disk shows."""

from __future__ import annotations

from typing import Any

from idemq.broker.core import Connection, Core, Group, Limits, Now, Read, Reply, Space
from idemq.broker.store import MemoryStore
from idemq.client import records, wire
from idemq.client.wire import Code

WALL_MS = 1_700_000_000_000


class Broker:
    """A core on a store in memory; the test says when a group is durable."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.store = MemoryStore()
        self.core = Core(self.store, limits or Limits())
        self.mono_ms = 1
        self.number = 0

    def connect(self, session: str = "") -> Connection:
        connection = self.core.connect("test")
        assert isinstance(connection, Connection)
        welcome = self.core.step(self.now(), connection, 1, wire.Hello(wire.VERSION, "test", "", session), b"")
        assert isinstance(welcome, Reply)
        return connection

    def now(self) -> Now:
        return Now(self.mono_ms, WALL_MS + self.mono_ms)

    def step(self, connection: Connection, request: Any, payload: bytes = b"") -> Any:
        self.number += 1
        return self.core.step(self.now(), connection, self.number, request, payload)

    def begin(self) -> Group:
        group = self.core.begin()
        assert group is not None
        return group

    def make_durable(self, group: Group) -> list[Any]:
        outputs = self.core.committed(self.store.commit(group) if group.writes else None)
        return [output.message if isinstance(output, Reply) else output for output in outputs]

    def ask(self, connection: Connection, request: Any, payload: bytes = b"") -> Any:
        """A request and its answer, with everything made durable."""
        answer = self.step(connection, request, payload)
        if answer is not None:
            return answer.message if isinstance(answer, Reply) else answer
        return self.make_durable(self.begin())[-1]

    def topic(self, connection: Connection, name: str = "t") -> int:
        made = self.ask(connection, wire.CreateTopic(name, 1, wire.Settings(), True))
        topic_id: int = made.topic.topic_id
        return topic_id

    def append(self, connection: Connection, topic_id: int, value: bytes = b"x") -> Any:
        """One record without a producer."""
        body = records.pack([value], None, None, None, wire.Codec.NONE)
        batch = wire.make_batch(wire.Codec.NONE, 1, topic_id, 0, 0, 0, 0, body)
        return self.ask(connection, wire.Commit(0, 0, -1, 0, [wire.Append(topic_id, 0, len(batch))]), batch)


def test_a_reader_is_told_of_a_deletion_when_it_is_durable() -> None:
    broker = Broker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    broker.append(connection, topic_id)
    fetch = wire.Fetch([wire.Range(topic_id, 0, 0)], 1000, 0)
    assert broker.step(connection, wire.DeleteTopic(topic_id)) is None
    for moment in ("decided", "on its way to the disk"):
        read = broker.step(connection, fetch)
        assert isinstance(read, Read)
        assert [one.offset for one in read.ranges] == [0], moment
        assert read.parts == [], moment
        if moment == "decided":
            group = broker.begin()
    broker.make_durable(group)
    read = broker.step(connection, fetch)
    assert [part.code for part in read.parts] == [Code.UNKNOWN_TOPIC]


def test_space_that_was_freed_from_outside_is_noticed_without_a_write() -> None:
    broker = Broker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    full = Space(used_bytes=0, disk_bytes=0, txn_id=1)
    broker.step(connection, wire.CreateTopic("u", 1, wire.Settings(), True))
    broker.core.begin()
    broker.core.committed(full)
    assert broker.append(connection, topic_id).code == Code.STORE_FULL
    broker.mono_ms += 10_000
    broker.core.tick(broker.now())  # measures the store, which has room
    assert isinstance(broker.append(connection, topic_id), wire.Committed)


def test_a_late_copy_of_an_administrators_request_undoes_nothing() -> None:
    broker = Broker()
    old = broker.connect("one client")
    topic_id = broker.topic(old)
    late = wire.AlterTopic(topic_id, 1, wire.Settings(retention_ms=1000))
    new = broker.connect("one client")
    assert isinstance(broker.ask(new, late), wire.TopicIs)
    assert broker.ask(new, late._replace(settings=wire.Settings(retention_ms=9000))).topic.settings.retention_ms == 9000
    assert broker.ask(old, late).code == Code.STALE_CONNECTION
    assert broker.ask(old, wire.CreateTopic("gone", 1, wire.Settings(), True)).code == Code.STALE_CONNECTION
    [topic] = broker.ask(broker.connect("somebody else"), wire.Metadata(None)).topics
    assert topic.settings.retention_ms == 9000
    broker.core.disconnect(new)
    assert broker.ask(old, late).code == Code.STALE_CONNECTION, "the newest is closed, and the old one still older"
    broker.core.disconnect(old)
    assert isinstance(broker.ask(broker.connect("one client"), late), wire.TopicIs)
    assert len(broker.core._sessions) == 2


def test_partitions_never_get_fewer() -> None:
    broker = Broker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    for partitions in (3, 3):
        assert len(broker.ask(connection, wire.AlterTopic(topic_id, partitions, wire.Settings())).topic.partitions) == 3
    refused = broker.ask(connection, wire.AlterTopic(topic_id, 2, wire.Settings(retention_ms=1000)))
    assert (refused.code, refused.text) == (Code.BAD_REQUEST, "a topic's partitions never get fewer: 3 now")
    [topic] = broker.ask(connection, wire.Metadata(None)).topics
    assert topic.settings.retention_ms is None, "and nothing else of it was done"
