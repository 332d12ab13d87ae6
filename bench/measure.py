"""How something is measured: a broker of one's own, CPU of both sides, rounds, and what the machine is.

Knows the operating system's accounting and nothing of what is measured.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import NamedTuple

from idemq.testing import BrokerProcess

FSYNCS = 50


class Spread(NamedTuple):
    """The median of several values, and two around it: the extremes (`spread`), or what `confidence` says."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """The median and what lies around it."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


def confidence(values: Iterable[float]) -> Spread:
    """The median, and the two values between which that of all rounds there could be lies with 95 % confidence.

    By rank, so that it asks nothing of how the values are distributed.
    """
    found = sorted(values)
    # How many values lie below the median of all has n / 2 for its mean and half of √n for its standard deviation.
    rank = max(0, int((len(found) - 1) / 2 - 1.96 / 2 * math.sqrt(len(found))))
    return Spread(statistics.median(found), found[rank], found[-1 - rank])


class Sample(NamedTuple):
    """One round: messages a second, and CPU µs a message of either side."""

    rate: float
    client_us: float
    broker_us: float


class Stopwatch:
    """Wall time, this process's CPU and the broker's, from `start` to `stop`."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._broker = broker
        self._before = (0.0, 0.0, 0.0)

    def _now(self) -> tuple[float, float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), usage.ru_utime + usage.ru_stime, process_cpu_seconds(self._broker.pid)

    def start(self) -> None:
        """Begin a round."""
        self._before = self._now()

    def stop(self, messages: int) -> Sample:
        """End it."""
        wall, client, broker = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return Sample(messages / wall, client / messages * 1e6, broker / messages * 1e6)


def process_cpu_seconds(pid: int) -> float:
    """CPU of all of a process's threads; the scheduler counts nanoseconds where the kernel tells, else ticks."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except (FileNotFoundError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def anonymous_mb(pid: int) -> float:
    """A process's own memory in MB. VmRSS would count the pages of the store's map, which the kernel takes back."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None, "Linux tells RssAnon"
    return int(match[1]) / 1000


def directory_mb(directory: Path) -> float:
    """What the files of a directory hold, in MB."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6


async def metric(broker: BrokerProcess, name: str) -> float:
    """One of the broker's own counters."""
    reader, writer = await asyncio.open_connection(broker.host, broker.http_port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read(-1)).decode()
    writer.close()
    await writer.wait_closed()
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert match is not None, f"the broker has no metric {name}"
    return float(match[1])


@asynccontextmanager
async def broker(*arguments: str) -> AsyncIterator[BrokerProcess]:
    """A broker on a temporary directory (where TMPDIR says: put it on the disk that is to be measured)."""
    with TemporaryDirectory(prefix="idemq-bench-") as directory:
        async with BrokerProcess(directory, *arguments) as process:
            yield process


def fsync_ms(directory: str) -> float:
    """What making 4 KiB durable takes here, the median of several: no acknowledgement comes sooner."""
    with NamedTemporaryFile(dir=directory, prefix="idemq-bench-", buffering=0) as file:
        took = []
        for _ in range(FSYNCS):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000


def machine(directory: str) -> dict[str, str]:
    """What the figures were taken on."""
    versions = {name: importlib.metadata.version(name) for name in ("idemq", "lmdb", "msgpack", "uvloop")}
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if (directory + "/").startswith(mount[1].rstrip("/") + "/")]
    return {
        "cpus": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        **versions,
        "isal": "yes" if importlib.util.find_spec("isal") else "no",
        "filesystem": max(inside, key=lambda mount: len(mount[1]))[2] if inside else "unknown",
    }
