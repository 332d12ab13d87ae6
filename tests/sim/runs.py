"""Many seeds, or one with its trace."""

from __future__ import annotations

import gc
import time
import traceback
from collections import Counter

from .coverage import COUNTS, WatchedWorld


def play(seed: int) -> str:
    """One seed; returns what is wrong, or nothing."""
    try:
        WatchedWorld(seed).run()
    except Exception:  # noqa: BLE001 - whatever it is, it is what this seed found
        return traceback.format_exc()
    return ""


def trace(seed: int) -> tuple[list[str], bool]:
    """Everything that happens in a seed, and whether it is right."""
    lines: list[str] = []
    world = WatchedWorld(seed, lines)
    try:
        world.run()
    except Exception:  # noqa: BLE001 - as above
        return [*lines, traceback.format_exc()], False
    return [*lines, f"{world.operations} operations, {world.faults} faults"], True


def play_many(seeds: range) -> tuple[Counter[str], list[int], float]:
    """Some seeds in this process: what was counted, which are wrong, the seconds of CPU it took."""
    began = time.process_time()
    COUNTS.clear()
    # A world is a heap of cycles. They are looked for when it has ended, among nothing but its own.
    gc.disable()
    gc.freeze()
    wrong = []
    for seed in seeds:
        if play(seed):
            wrong.append(seed)
        gc.collect()
    gc.unfreeze()
    gc.enable()
    return Counter(COUNTS), wrong, time.process_time() - began
