"""The core by hand: what only a chosen moment between a decision and the disk shows."""

from __future__ import annotations

from idemq.broker.core import Read, Space
from idemq.client import wire
from idemq.client.wire import Code

from .support import CoreBroker, commit


def test_a_reader_is_told_of_a_deletion_when_it_is_durable() -> None:
    broker = CoreBroker()
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


def test_a_readers_newer_fetch_takes_the_place_of_the_one_that_waits() -> None:
    broker = CoreBroker(fetches_max=2)
    mine, other = broker.connect(), broker.connect()
    topic_id = broker.topic(mine)
    fetch = wire.Fetch([wire.Range(topic_id, 0, 0)], 1000, 60_000, 7)
    first = broker.number + 1
    for connection, reader in ((mine, 7), (mine, 0), (other, 7), (mine, 7)):
        assert broker.step(connection, fetch._replace(reader=reader)) is None
    group = broker.begin()
    assert [(one.connection, one.correlation, one.message) for one in group.replies] == [
        (mine, first, wire.Fetched([])),
    ]
    broker.make_durable(group)
    for reader in (0, 8):
        assert broker.step(mine, fetch._replace(reader=reader)).message.code == Code.BUSY
    broker.step(mine, *commit(None, -1, 0, (topic_id, 0, 0)))
    woken = broker.core.committed(broker.store.commit(broker.begin()))
    assert [(one.connection, one.correlation) for one in woken if isinstance(one, Read)] == [
        (mine, first + 1),
        (other, first + 2),
        (mine, first + 3),
    ]


def test_space_that_was_freed_from_outside_is_noticed_without_a_write() -> None:
    broker = CoreBroker()
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
    broker = CoreBroker()
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
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    for partitions in (3, 3):
        assert len(broker.ask(connection, wire.AlterTopic(topic_id, partitions, wire.Settings())).topic.partitions) == 3
    refused = broker.ask(connection, wire.AlterTopic(topic_id, 2, wire.Settings(retention_ms=1000)))
    assert (refused.code, refused.text) == (Code.BAD_REQUEST, "a topic's partitions never get fewer: 3 now")
    [topic] = broker.ask(connection, wire.Metadata(None)).topics
    assert topic.settings.retention_ms is None, "and nothing else of it was done"
