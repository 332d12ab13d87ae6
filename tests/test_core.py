"""The core by hand: what only a chosen moment between a decision and the disk shows."""

from __future__ import annotations

import pytest

from idemq.broker.core import ROW_BYTES, Read
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
    broker.store.commit(broker.begin())
    woken = broker.core.committed()
    assert [(one.connection, one.correlation) for one in woken if isinstance(one, Read)] == [
        (mine, first + 1),
        (other, first + 2),
        (mine, first + 3),
    ]


def test_space_that_was_freed_from_outside_is_noticed_without_a_write() -> None:
    broker = CoreBroker()
    connection = broker.connect()
    topic_id = broker.topic(connection)
    for disk_bytes, stored in ((0, False), (1 << 40, True), (0, False)):
        broker.store.disk_bytes = disk_bytes
        broker.mono_ms += 1000
        broker.core.tick(broker.now())  # measures the store
        assert isinstance(broker.append(connection, topic_id), wire.Committed) == stored


@pytest.mark.parametrize("limit", ["the store", "the disk"])
def test_what_was_stored_since_the_space_was_measured_counts(limit: str) -> None:
    """The store is asked once a second, and more may come in it than there is room for."""
    room = 1 << 20
    broker = CoreBroker(store_bytes_max=room if limit == "the store" else 1 << 40, store_bytes_headroom=0)
    broker.store.disk_bytes = room if limit == "the disk" else 1 << 40
    broker.core.tick(broker.now())
    connection = broker.connect()
    topic_id = broker.topic(connection)
    for _ in range(1000):
        answer = broker.append(connection, topic_id)
        if not isinstance(answer, wire.Committed):
            break
        space = broker.core.space
        assert space.used_bytes >= broker.store.space().used_bytes
        assert space.txn_id == broker.store.space().txn_id
    assert answer.code == Code.STORE_FULL
    assert room - 2 * ROW_BYTES < broker.core.space.used_bytes <= room


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
