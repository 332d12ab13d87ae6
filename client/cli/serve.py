"""`idemq serve` and `idemq bench`: commands that live in another package, loaded only when they are called."""

from __future__ import annotations

from .arguments import Delegated


def _serve(argv: list[str]) -> int:
    from idemq.broker.__main__ import main

    return main(argv)


def _bench(argv: list[str]) -> int:
    from idemq.bench import main

    return main(argv)


SERVE = Delegated("serve", "run the broker", _serve)
BENCH = Delegated("bench", "measure what a message costs on this machine", _bench)
