"""A client for idemq, a message broker for effectively-once processing: what is sent again is stored once.

    import asyncio, idemq

    async def main() -> None:
        async with idemq.connect("idemq://localhost:7750") as mq:
            await mq.create_topic("orders", exist_ok=True)
            print(await mq.send("orders", b"a message", key=b"customer-7"))

    asyncio.run(main())

Blocking code uses `idemq.sync`, tests `idemq.testing`.
"""

from . import client, sync
from .client import *  # noqa: F403 - the one place that re-exports, and `client/__init__.py` says what

__version__ = "0.1.0"
__all__ = ["__version__", "sync"]
__all__ += client.__all__
