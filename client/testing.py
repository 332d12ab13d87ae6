"""A broker that can be killed and started again: a process of its own, on a directory of its own or a given one.

With the network that fails on purpose (`link.py`) it is the test kit, `idemq.testing`; our tests and `idemq demo` use
them, and so can the tests of an application:

    async with idemq.testing.broker() as b, idemq.testing.Link(b.host, b.port, seed=7) as link:
        link.lose_replies(after_frames=1)               # the first answer after the handshake gets lost
        async with idemq.connect(link.url) as mq: ...

It imports no broker: it runs one as a command, and knows its ready line.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

OUTPUT_BYTES_MAX = 64 << 10
"""How much of a broker's stderr is kept (the end of it)."""
TERMINATE_SECONDS_MAX = 20.0
"""How long a broker may take after SIGTERM: the 8 s it promises, and room for a busy machine."""

_RUN = """
import os, signal, sys, threading

def end_with_parent():
    os.read(0, 1)  # nothing is ever written: the other end is gone
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from idemq.broker.__main__ import main
sys.exit(main())
"""
"""`python -m idemq.broker`, for as long as its stdin is open: a process that is killed leaves no broker behind."""


class BrokerFailed(Exception):
    """A broker did not start, or did not stop. The text ends with the last of what it wrote on stderr."""


class BrokerProcess:
    """A real broker in its own process, on free ports of 127.0.0.1, to be killed and started again.

        async with BrokerProcess(directory) as broker:
            await broker.kill()
            await broker.restart()          # same directory, same ports: clients find it again

    `arguments` go to `python -m idemq.broker` after the ones named here. Raises BrokerFailed if the broker ends, or is
    not ready within `ready_seconds_max`. Leaving `async with` terminates it, and so does the end of this process.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *arguments: str,
        port: int = 0,
        http_port: int = 0,
        ready_seconds_max: float = 30.0,
    ) -> None:
        self.data_dir = Path(data_dir)
        self.arguments = arguments
        self.host = "127.0.0.1"
        self.port = port
        """Where it listens; before the first start 0 asks for a free port."""
        self.http_port = http_port
        self.ready_seconds_max = ready_seconds_max
        self._process: asyncio.subprocess.Process | None = None
        self._errors = bytearray()
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.running:
            await self.terminate()
        await asyncio.gather(*self._readers)

    @property
    def url(self) -> str:
        """`idemq://HOST:PORT`."""
        return f"idemq://{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it was started and neither stopped nor killed nor ended by itself."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id. RuntimeError before the first start."""
        if self._process is None:
            raise RuntimeError("the broker was not started: use `async with` or `start`")
        return self._process.pid

    @property
    def stderr(self) -> str:
        """The end of what it wrote on stderr since it was last started (at most 64 KiB)."""
        return self._errors.decode(errors="replace")

    async def start(self) -> None:
        """Start it and wait for its ready line."""
        if self.running:
            raise RuntimeError("the broker is running")
        self._errors.clear()
        command = [sys.executable, "-c", _RUN, "--host", self.host]
        command += ["--port", str(self.port), "--http-port", str(self.http_port), "--data-dir", str(self.data_dir)]
        process = self._process = await asyncio.create_subprocess_exec(
            *command,
            *self.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [asyncio.create_task(self._keep(process.stderr, self._errors))]
        try:
            async with asyncio.timeout(self.ready_seconds_max):
                line = (await process.stdout.readline()).decode(errors="replace").rstrip()
            ready = re.fullmatch(r"idemq ready (\S+):(\d+) http=(\S+):(\d+)", line)
        except TimeoutError:
            await self.kill()
            raise self._failed(f"was not ready within {self.ready_seconds_max:g} s") from None
        except BaseException:  # cancelled: leave no process behind
            await self.kill()
            raise
        if ready is None:
            await self.kill()
            said = f"said {line!r}" if line else "said nothing"
            raise self._failed(f"{said} instead of being ready, and ended with code {process.returncode}")
        self.host, self.port, self.http_port = ready[1], int(ready[2]), int(ready[4])
        self._readers.append(asyncio.create_task(self._keep(process.stdout, bytearray())))

    async def kill(self) -> int:
        """SIGKILL, and wait. Returns the exit code (-9, or its own if it had ended already)."""
        return await self._stop(signal.SIGKILL)

    async def terminate(self) -> int:
        """SIGTERM, and wait for an orderly end. Returns the exit code; over 20 s: SIGKILL and BrokerFailed."""
        return await self._stop(signal.SIGTERM)

    async def restart(self) -> None:
        """Start it again on the same data directory and ports; terminates it first if it runs."""
        if self.running:
            await self.terminate()
        await self.start()

    async def _stop(self, number: signal.Signals) -> int:
        process = self._process
        if process is None:
            raise RuntimeError("the broker was not started: use `async with` or `start`")
        with suppress(ProcessLookupError):  # it ended by itself
            process.send_signal(number)
        try:
            async with asyncio.timeout(TERMINATE_SECONDS_MAX):
                code = await process.wait()
        except BaseException as error:  # in time or cancelled: leave no process behind
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise self._failed(f"did not end within {TERMINATE_SECONDS_MAX:g} s of {number.name}") from None
            raise
        finally:
            await asyncio.gather(*self._readers)
        return code

    def _failed(self, what: str) -> BrokerFailed:
        return BrokerFailed(f"the broker in {self.data_dir} {what}; stderr: {self.stderr or '(nothing)'}")

    @staticmethod
    async def _keep(source: asyncio.StreamReader, output: bytearray) -> None:
        while data := await source.read(OUTPUT_BYTES_MAX):
            output += data
            del output[:-OUTPUT_BYTES_MAX]


@asynccontextmanager
async def broker(*arguments: str) -> AsyncIterator[BrokerProcess]:
    """A `BrokerProcess` on a temporary data directory: `async with idemq.testing.broker() as b:`."""
    with tempfile.TemporaryDirectory(prefix="idemq-") as directory:
        async with BrokerProcess(directory, *arguments) as process:
            yield process
