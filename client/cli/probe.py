"""`idemq ping` and `idemq healthcheck`: is the broker there? One for people, one for Docker."""

from __future__ import annotations

import http.client
import os
import time
from argparse import Namespace

from ..client import Client
from ..errors import IdemqError
from . import reach
from .arguments import Command
from .errors import FAILURE, OK, CommandError
from .output import moment, record
from .reach import URL_VARIABLE

PING_TIMEOUT_S = 3.0
"""Somebody is waiting for the answer, and Docker for 5 s at most."""


def _ping(args: Namespace) -> int:
    record(args, _ask(args), {"broker_time": moment, "answered_ms": "{:.1f}".format})
    return OK


def _ask(args: Namespace) -> dict[str, float]:
    args.timeout = args.timeout or PING_TIMEOUT_S

    async def ping(mq: Client) -> dict[str, float]:
        began = time.perf_counter()
        clock_ms = await mq.ping()
        return {"answered_ms": round((time.perf_counter() - began) * 1000, 3), "broker_time": clock_ms}

    return reach.run(args, ping)


def _healthcheck(args: Namespace) -> int:
    """0 healthy, 1 not: the codes that Docker knows."""
    try:
        if args.url or os.environ.get(URL_VARIABLE):
            _ask(args)
        else:
            _ask_http(args.timeout or PING_TIMEOUT_S)
    except (CommandError, IdemqError) as error:
        raise CommandError(f"Not healthy: {error}", FAILURE) from error
    record(args, {"status": "healthy"})
    return OK


def _ask_http(timeout: float) -> None:
    """Ask the broker that this environment's settings describe. Needs no token."""
    from idemq.broker.config import ConfigError, load

    try:
        config = load([])
    except ConfigError as error:
        raise CommandError(str(error)) from error
    if not config.http_port:
        raise CommandError("http_port is 0, so its port is not known here: name the broker with --url or IDEMQ_URL.")
    place = f"{config.host}:{config.http_port}"
    # A broker that listens everywhere (0.0.0.0) is reached here by that same address.
    connection = http.client.HTTPConnection(config.host, config.http_port, timeout=timeout)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"{place} does not answer ({error}).") from error
    finally:
        connection.close()
    if status != 200:
        raise CommandError(f"{place}/healthz answers {status}.")


COMMANDS = (
    Command("ping", "ask the broker whether it is there", lambda parser: None, _ping),
    Command(
        "healthcheck",
        "0 when the broker is healthy, else 1; without --url and IDEMQ_URL: at IDEMQ_HOST, IDEMQ_HTTP_PORT",
        lambda parser: None,
        _healthcheck,
    ),
)
