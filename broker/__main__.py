"""`python -m idemq.broker` and `idemq serve`: settings, store, server and HTTP put together, signals, exit codes.

0: ended by a signal, all that was in flight is answered. 1: a failure, the next start recovers. 2: usage. 78: settings,
data directory or address. What an operator can correct is one sentence on stderr, never a traceback.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import uvloop

from .config import Config, ConfigError, parser, resolve
from .core import Damaged
from .http import Http
from .server import Server
from .store import Store, StoreError, tune_allocator

EXIT_FAILURE = 1
GC_THRESHOLD = 50_000
"""Objects made between two looks of the collector at the youngest ones."""
EXIT_CONFIG = 78


def main(argv: Sequence[str] | None = None) -> int:
    """Run the broker until a signal ends it. Returns the exit code; SystemExit(2) on a flag that is not known."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    flags = parser().parse(sys.argv[1:] if argv is None else argv)
    try:
        config = resolve(flags, os.environ)
        if flags.print_config:
            sys.stdout.write(config.to_toml())
            return 0
        return _run(config)
    except (ConfigError, StoreError, Damaged) as error:
        sys.stderr.write(f"idemq: {error}\n")
        return EXIT_CONFIG


def _run(config: Config) -> int:
    _check_address(config)
    tune_allocator()
    # Requests and rows hold no cycles, and looking for them as often as Python does costs 7 % of a small commit.
    gc.set_threshold(GC_THRESHOLD)
    store = Store(config.path, config.force_filesystem)
    try:
        token, notice = config.access_token()
        if notice:
            sys.stderr.write(f"idemq: {notice}\n")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, store, token))
    finally:
        store.close()
    return 0


async def _serve(config: Config, store: Store, access_token: str) -> None:
    server = Server(config, store, access_token, _fail)
    http = Http(server, access_token)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.stopping:
            _fail()
        server.stop()

    try:
        await server.start()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, stop)
        await http.start(config.host, config.http_port)
    except OSError as error:
        server.end_threads()
        raise _deaf(config, f"ports {config.port} and {config.http_port}", error) from None
    print(f"idemq ready {_shown(server.address)} http={_shown(http.address)}", flush=True)
    await server.wait_closed()
    await http.close()


def _check_address(config: Config) -> None:
    """Can both ports be had? Asked before there is a store, so that a start that must fail leaves nothing behind."""
    for name, port in (("port", config.port), ("http_port", config.http_port)):
        try:
            found = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in found:
                with socket.socket(family, kind, protocol) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the listeners do
                    if family == socket.AF_INET6:
                        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    one.bind(address)
        except (OSError, UnicodeError) as error:  # a host's name may be no name
            raise _deaf(config, f"{name} {port}", error) from None


def _deaf(config: Config, ports: str, error: Exception) -> ConfigError:
    hint = ""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        hint = " Does another broker run there? --port 0 and --http-port 0 pick free ones."
    return ConfigError(f"Cannot listen on {config.host}, {ports}: {error}.{hint}")


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _fail() -> NoReturn:
    """End the process at once: what is in memory may be wrong, what is on the disk is right."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(main())
