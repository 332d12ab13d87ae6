"""The second port: is the broker alive, is it ready, what has it done. HTTP/1.1, GET and HEAD, a request a connection.

It reads the server's figures and changes nothing, so it stays small: a request has a size and a deadline, connections
have a number, and whatever else HTTP offers is refused. Beyond loopback figures need the broker's token as a bearer
token; whether the broker lives is told to everybody.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from idemq import __version__

from .server import COMMIT_SECONDS, Server

REQUEST_BYTES_MAX = 8 << 10
REQUEST_S_MAX = 5.0
"""From accepting a connection to the end of its request's header; and again for the peer to read the answer."""
CONNECTIONS_MAX = 32


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Http:
    """Answers for one server. `start()` listens, `close()` stops."""

    def __init__(self, server: Server, access_token: str) -> None:
        self._server = server
        self._access_token = access_token
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener: asyncio.Server
        self.address: tuple[str, int]

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        self._listener = await asyncio.start_server(self._connected, host, port, limit=REQUEST_BYTES_MAX)
        self.address = self._listener.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        """Stop listening and end what is being answered."""
        self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                head, status, kind, body = await self._answer(reader)
            writer.write(_response(head, status, kind, body))
            async with asyncio.timeout(REQUEST_S_MAX):
                await writer.drain()
                writer.write_eof()
                while await reader.read(REQUEST_BYTES_MAX):
                    pass  # closing with unread bytes would take our answer away from the peer
        except (OSError, asyncio.IncompleteReadError):
            pass  # the peer is gone, or too slow to be told anything
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[bool, HTTPStatus, str, bytes]:
        """(header only?, status, content type, body) of the connection's one request."""
        method = ""
        try:
            if len(self._tasks) > CONNECTIONS_MAX:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"at most {CONNECTIONS_MAX} connections at once")
            try:
                header = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                raise Refusal(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a request has at most {REQUEST_BYTES_MAX} bytes"
                ) from None
            lines = header.decode("latin-1").split("\r\n")
            words = lines[0].split(" ")
            if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
                raise Refusal(HTTPStatus.BAD_REQUEST, "this is not an HTTP/1.1 request")
            method = words[0]
            path = words[1].partition("?")[0]
            page = _PAGES.get(path)
            if page is None:
                raise Refusal(HTTPStatus.NOT_FOUND, f"there is nothing here; there is {', '.join(_PAGES)}")
            if method not in ("GET", "HEAD"):
                raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered here")
            if page in _GUARDED and self._access_token:
                given = [
                    value.strip()
                    for name, _, value in (line.partition(":") for line in lines[1:])
                    if name.strip().lower() == "authorization"
                ]
                expected = f"Bearer {self._access_token}".encode()
                if not given or not hmac.compare_digest(given[0].encode("latin-1"), expected):
                    raise Refusal(HTTPStatus.UNAUTHORIZED, "send the broker's token: Authorization: Bearer TOKEN")
            kind, text = page(self._server)
            return method == "HEAD", HTTPStatus.OK, kind, text.encode()
        except Refusal as refusal:
            text = json.dumps({"error": str(refusal)}) + "\n"
            return method == "HEAD", refusal.status, "application/json", text.encode()


def _response(head: bool, status: HTTPStatus, kind: str, body: bytes) -> bytes:
    extra = {
        HTTPStatus.METHOD_NOT_ALLOWED: "Allow: GET, HEAD\r\n",
        HTTPStatus.UNAUTHORIZED: "WWW-Authenticate: Bearer\r\n",
    }.get(status, "")
    header = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\n{extra}Connection: close\r\n\r\n"
    )
    return header.encode() + (b"" if head else body)


def _healthz(server: Server) -> tuple[str, str]:
    return "text/plain; charset=utf-8", "ok\n"


def _readyz(server: Server) -> tuple[str, str]:
    if not server.ready:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the broker is stopping" if server.stopping else "starting")
    return "text/plain; charset=utf-8", "ready\n"


def status(server: Server) -> dict[str, Any]:
    """The broker's figures. Counters begin at its start; `…_s` are seconds."""
    counts, space = server.counts, server.core.space
    return {
        "version": __version__,
        "uptime_s": server.uptime_s,
        "ready": server.ready,
        "alarm": server.alarm,
        "connections": server.core.connections,
        "connections_total": counts.connections_total,
        "bytes_in": counts.bytes_in,
        "bytes_out": counts.bytes_out,
        "commits": counts.commits,
        "duplicates": counts.duplicates,
        "refusals": dict(sorted(counts.refusals.items())),
        "batches": counts.batches,
        "records": counts.records,
        "record_bytes": counts.record_bytes,
        "group_commits": counts.group_commits,
        "group_commit_failures": counts.group_commit_failures,
        "damage_met": counts.damage_met,
        "commit_s": counts.commit_seconds,
        "store_bytes": space.used_bytes,
        "store_bytes_max": server.config.store_bytes_max,
        "disk_bytes": space.disk_bytes,
        "txn_id": space.txn_id,
        "groups": {name: figures._asdict() for name, figures in server.core.groups.items()},
    }


def _status(server: Server) -> tuple[str, str]:
    return "application/json", json.dumps(status(server), ensure_ascii=False) + "\n"


_METRICS = (
    ("connections", "gauge", "Open client connections.", "connections"),
    ("connections_accepted_total", "counter", "Client connections accepted.", "connections_total"),
    ("received_bytes_total", "counter", "Bytes received from clients.", "bytes_in"),
    ("sent_bytes_total", "counter", "Bytes sent to clients.", "bytes_out"),
    ("commits_total", "counter", "Commits answered as stored, duplicates included.", "commits"),
    ("duplicates_total", "counter", "Commits that had been stored before and were not stored again.", "duplicates"),
    ("batches_total", "counter", "Batches stored.", "batches"),
    ("records_total", "counter", "Records stored.", "records"),
    ("record_bytes_total", "counter", "Bytes of the batches stored.", "record_bytes"),
    ("group_commit_failures_total", "counter", "Group commits of which nothing was stored.", "group_commit_failures"),
    ("damage_met_total", "counter", "Answers that told a client of damage in the store.", "damage_met"),
    ("store_bytes", "gauge", "Bytes in use in the store.", "store_bytes"),
    ("store_limit_bytes", "gauge", "Size at which appends are refused.", "store_bytes_max"),
    ("disk_free_bytes", "gauge", "What the store can still write.", "disk_bytes"),
    ("uptime_seconds", "gauge", "Since the start.", "uptime_s"),
)


def metrics(server: Server) -> str:
    """The same figures for Prometheus."""
    figures = status(server)
    lines = [
        "# HELP idemq_info The broker's version.",
        "# TYPE idemq_info gauge",
        f'idemq_info{{version="{__version__}"}} 1',
        "# HELP idemq_alarm 1 while an operator must look: see /api/status.",
        "# TYPE idemq_alarm gauge",
        f"idemq_alarm {int(bool(figures['alarm']))}",
        "# HELP idemq_refusals_total Requests refused, by code. OPEN_RACE is normal: the client asks again by itself.",
        "# TYPE idemq_refusals_total counter",
    ]
    lines += [f'idemq_refusals_total{{code="{code}"}} {count}' for code, count in figures["refusals"].items()]
    groups = {_quoted(name): group for name, group in figures["groups"].items()}
    lines += ["# HELP idemq_group_members Members of a consumer group.", "# TYPE idemq_group_members gauge"]
    lines += [f"idemq_group_members{{group={name}}} {group['members']}" for name, group in groups.items()]
    lines += [
        "# HELP idemq_group_behind Messages stored behind the positions of a consumer group that has members.",
        "# TYPE idemq_group_behind gauge",
    ]
    lines += [
        f"idemq_group_behind{{group={name},topic={_quoted(topic)}}} {behind}"
        for name, group in groups.items()
        for topic, behind in group["behind"].items()
    ]
    for name, kind, about, key in _METRICS:
        lines += [f"# HELP idemq_{name} {about}", f"# TYPE idemq_{name} {kind}", f"idemq_{name} {figures[key]}"]
    counts = server.counts
    lines += [
        "# HELP idemq_group_commit_seconds Time of group commits in the store.",
        "# TYPE idemq_group_commit_seconds histogram",
    ]
    below = 0
    for bound, count in zip([*map(str, COMMIT_SECONDS), "+Inf"], counts.commit_buckets, strict=True):
        below += count
        lines.append(f'idemq_group_commit_seconds_bucket{{le="{bound}"}} {below}')
    lines += [
        f"idemq_group_commit_seconds_sum {counts.commit_seconds}",
        f"idemq_group_commit_seconds_count {counts.group_commits}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(label: str) -> str:
    escaped = label.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def _metrics(server: Server) -> tuple[str, str]:
    return "text/plain; version=0.0.4; charset=utf-8", metrics(server)


_PAGES: dict[str, Callable[[Server], tuple[str, str]]] = {
    "/healthz": _healthz,
    "/readyz": _readyz,
    "/metrics": _metrics,
    "/api/status": _status,
}
_GUARDED = (_metrics, _status)
