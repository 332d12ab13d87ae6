"""All rows of a store, as several kinds of tests compare them."""

from __future__ import annotations

from idemq.broker.core import Rows
from idemq.broker.producers import ProducerRow


def producer_rows(rows: Rows, first: int, limit: int) -> list[ProducerRow]:
    """The producers from this id on, in order of id."""
    found = [rows.producer(producer_id) for producer_id in rows.producer_ids(first, limit)]
    assert None not in found, "an id that is listed has its row"
    return [row for row in found if row is not None]
