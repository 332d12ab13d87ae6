"""`python -m tests.spec [--large] [NAME …]`: explore configurations and print what was found.

Prints one line for each: name, states, edges, seconds, verdict; and the trace of a violation. Exits 1 if there is one.
NAME selects the configurations that contain it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from .configurations import LARGE, SMALL, Bounds, model
from .explorer import explore
from .guards import Guards


def report(configurations: Mapping[str, Bounds], rules: Guards) -> bool:
    """Explore each and print it. Returns whether all hold."""
    width = max([len(name) for name in configurations], default=0)
    holds, states, seconds = True, 0, 0.0
    for name, bounds in configurations.items():
        result = explore(model(bounds, rules))
        states += result.states
        seconds += result.seconds
        print(
            f"{name:{width}} {result.states:10,} states {result.edges:11,} edges {result.seconds:7.1f} s"
            f"  {result.verdict}",
            flush=True,
        )
        if result.violation is not None or not result.complete:
            holds = False
            for number, label in enumerate(result.trace, 1):
                print(f"    {number:3}  {label}")
            print(f"    in   {result.state}", flush=True)
    print(f"{len(configurations)} configurations, {states:,} states, {seconds:.1f} s")
    return holds


def main(arguments: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.spec", description="Explore the commit protocol's model.")
    parser.add_argument("--large", action="store_true", help="the larger bounds: some minutes instead of seconds")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only configurations whose name contains this")
    options = parser.parse_args(arguments)
    configurations = LARGE if options.large else SMALL
    chosen = {
        name: bounds
        for name, bounds in configurations.items()
        if not options.names or any(word in name for word in options.names)
    }
    if not chosen:
        parser.error(f"no configuration has such a name; there are: {', '.join(configurations)}")
    return 0 if report(chosen, Guards()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
