"""The client's shell between the end of a connection and the word that it has ended."""

import asyncio

import pytest

import idemq
from idemq.testing import broker

pytestmark = pytest.mark.process


def test_what_is_sent_on_a_closing_connection_is_sent_again_on_the_next() -> None:
    async def scenario() -> None:
        async with broker() as one, idemq.connect(one.url) as mq:
            connection = mq._engine._connection  # type: ignore[attr-defined]
            transport = connection._protocol.transport
            transport.close()  # what asyncio does when the peer's FIN comes, a turn before it calls connection_lost
            writes: list[object] = []
            transport.write = transport.writelines = writes.append
            assert await mq.ping() > 0
            assert writes == []
            assert connection._protocol.transport is not transport

    asyncio.run(scenario())
