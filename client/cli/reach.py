"""From a command's options to a connected client: which broker, which token, how long to wait."""

from __future__ import annotations

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

from ..client import DEFAULT_URL, Client, connect
from ..connection import Address, find_token
from ..errors import AuthError, ConnectionLost, IdemqError, InvalidRequest, RetriableError
from ..wire import ADMIN_TOKEN_FILE, DATA_DIR
from .errors import AUTH, CONFIGURATION, UNREACHABLE, CommandError
from .output import say

URL_VARIABLE = "IDEMQ_URL"
TIMEOUT_S = 10.0
PATIENCE_S = 1.0
"""After this time without a broker a person is told what is waited for."""
WATCH_S = 2.0
"""How often the broker is asked whether it is there, and how long it may take to say so."""

T = TypeVar("T")


def run(args: Namespace, work: Callable[[Client], Awaitable[T]]) -> T:
    """Do something with a connected client. Raises IdemqError, or CommandError naming the broker it did not reach."""
    url = args.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    address = Address(url)
    shown = f"{f'[{address.host}]' if ':' in address.host else address.host}:{address.port}"
    token, unreadable = _token(args, address)
    timeout = args.timeout or TIMEOUT_S

    async def connected() -> T:
        patience = asyncio.get_running_loop().call_later(PATIENCE_S, _tell, shown, timeout)
        try:
            client = await connect(url, token=token, timeout=timeout)
        except ConnectionLost as error:
            reason = error.text.partition(": ")[2] or error.text
            raise CommandError(
                f"No broker answers at {shown} ({reason}): start one with `idemq serve`, or name it with --url.",
                UNREACHABLE,
            ) from error
        except AuthError as error:
            raise CommandError(f"{error.text}. {unreadable or error.remedy} ({error.code})", AUTH) from error
        finally:
            patience.cancel()
        async with client:
            return await work(client)

    return asyncio.run(connected())


@asynccontextmanager
async def watched(mq: Client, tell: Callable[[str], None] = say) -> AsyncIterator[None]:
    """Say when the broker is away and when it is back."""
    task = asyncio.create_task(_watch(mq, tell))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _watch(mq: Client, tell: Callable[[str], None]) -> None:
    away = False
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            await mq.ping(timeout=WATCH_S)
        except RetriableError:
            if not away:
                tell("The broker does not answer: waiting for it.")
            away = True
        except IdemqError:
            return  # what the command does fails of the same, and says so
        else:
            if away:
                tell("The broker is back.")
            away = False


def _tell(shown: str, timeout: float) -> None:
    if sys.stderr.isatty():
        say(f"Waiting for a broker at {shown}, {timeout:g} s at most.")


def _token(args: Namespace, address: Address) -> tuple[str | None, str]:
    """(the token, why the one of this machine could not be read). None: the client finds it, or there is none.

    The admin token of a data directory on this machine goes to a broker on this machine only.
    """
    if args.token:
        return args.token, ""
    if address.token:
        return None, ""
    if os.environ.get("IDEMQ_TOKEN") or os.environ.get("IDEMQ_TOKEN_FILE"):
        try:
            return find_token(), ""
        except InvalidRequest as error:
            raise CommandError(f"{error.text}.", CONFIGURATION) from error
    if address.host != "localhost":
        try:
            if not ip_address(address.host).is_loopback:
                return None, ""
        except ValueError:  # a name, which may be anybody's
            return None, ""
    path = Path(os.environ.get("IDEMQ_DATA_DIR") or DATA_DIR) / ADMIN_TOKEN_FILE
    try:
        return path.read_text(encoding="utf-8").strip() or None, ""
    except FileNotFoundError:
        return None, ""
    except (OSError, UnicodeDecodeError) as error:
        return None, f"The token in {path} cannot be read ({error}): run this as the broker's user, or pass a token."
