"""The simulator in the ordinary test run: some hundred seeds, replay, and the seeds that once found a bug."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .runs import play, trace

ROOT = Path(__file__).resolve().parent.parent.parent
GROUPS = 8
SEEDS = 25
"""Of each group; CI runs 2,000 by `python -m tests.sim`."""


@pytest.mark.parametrize("group", range(GROUPS))
def test_seeds(group: int) -> None:
    wrong = [seed for seed in range(10_000 + group * SEEDS, 10_000 + (group + 1) * SEEDS) if play(seed)]
    assert not wrong, f"python -m tests.sim --seed {wrong[0]} --trace"


def fingerprint(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_a_seed_replays_identically_in_this_process_and_another() -> None:
    lines, right = trace(7)
    assert right
    assert len(lines) > 300
    assert fingerprint(trace(7)[0]) == fingerprint(lines)
    assert fingerprint(trace(8)[0]) != fingerprint(lines)
    # Another process has other addresses of objects, and here other hashes of strings too.
    other = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seed", "7", "--trace"],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.splitlines()[:-1] == lines
