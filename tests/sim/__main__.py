"""Many seeds: `python -m tests.sim [--seeds A:B] [--jobs N]`. One again: `python -m tests.sim --seed N --trace`."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .coverage import EACH_AT_LEAST, REQUIRED
from .runs import play_many, trace

SEEDS_IN_CI = 2_000


def _replay(seed: int, show: bool) -> int:
    lines, right = trace(seed)
    print("\n".join(lines if show or not right else lines[-1:]))
    print(f"seed {seed} is {'right' if right else 'wrong'}")
    return 0 if right else 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", default=f"0:{SEEDS_IN_CI}", help="FIRST:BEHIND_THE_LAST, or how many from 0 on")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--trace", action="store_true", help="print everything that happens (with --seed)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return _replay(arguments.seed, arguments.trace)
    first, _, behind = f"0:{arguments.seeds}".rpartition(":")
    seeds = range(int(first.rpartition(":")[2]), int(behind))
    counts: Counter[str] = Counter()
    wrong: list[int] = []
    cpu_s = 0.0
    began = time.monotonic()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for counted, failed, seconds in pool.map(
            play_many, [seeds[job :: arguments.jobs] for job in range(arguments.jobs)]
        ):
            counts.update(counted)
            wrong += failed
            cpu_s += seconds
    for name in sorted(counts):
        print(f"{counts[name]:10,}  {name}{'' if name in REQUIRED else '  (not asserted)'}")
    faults = sum(counts[name] for name in counts if name.startswith("fault: "))
    print(
        f"{len(seeds)} seeds, {counts['operations'] / max(1, counts['seeds']):.0f} operations and "
        f"{faults / max(1, counts['seeds']):.0f} faults each, "
        f"in {time.monotonic() - began:.1f} s: {len(seeds) / cpu_s:.0f} seeds a second of one core"
    )
    for seed in sorted(wrong)[1:]:
        print(f"wrong too: python -m tests.sim --seed {seed} --trace")
    if wrong:
        _replay(min(wrong), show=True)
        print(f"wrong: python -m tests.sim --seed {min(wrong)} --trace")
    rare = [name for name in REQUIRED if counts[name] < EACH_AT_LEAST] if len(seeds) >= SEEDS_IN_CI else []
    for name in rare:
        print(f"too rare, {counts[name]} of at least {EACH_AT_LEAST}: {name}")
    return 1 if wrong or rare else 0


if __name__ == "__main__":
    sys.exit(main())
