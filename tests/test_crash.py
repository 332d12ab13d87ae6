"""The store under crashes: killed, cut off from power, with a full disk, a bad one, and with flipped bits.

The experiments are commands with larger bounds too: `python -m tests.crash` (see tests/crash/__main__.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def experiment(*options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.crash", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    summary: dict[str, Any] = json.loads(ran.stdout)
    print(summary)
    return summary


@pytest.mark.parametrize("seed", [1, 2])
def test_no_power_cut_loses_or_tears_an_acknowledged_commit(seed: int) -> None:
    summary = experiment("states", "--seed", str(seed), "--commits", "6", "--each", "3")
    assert summary["states"] > 150
    assert summary["wrong"] == {}


@pytest.mark.parametrize("planted", ["sync=False", "early reply", "unsynced creation"])
def test_the_enumeration_catches_what_is_unsafe(planted: str) -> None:
    summary = experiment("states", "--commits", "2", "--each", "2", "--planted", planted)
    assert summary["wrong"]["lost"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_kill_at_any_point_loses_nothing(seed: int) -> None:
    summary = experiment("sweep", "--seed", str(seed), "--commits", "4")
    assert summary["points"] > 45
    assert summary["wrong"] == {}


def test_a_full_disk_refuses_and_a_bad_one_stops_the_store() -> None:
    summary = experiment("errors", "--commits", "4")
    assert summary["wrong"] == {}
    outcomes = summary["outcomes"]
    for full in ("ENOSPC", "EDQUOT"):
        assert outcomes[f"{full}: full, nothing stored, went on"] > 10
        assert outcomes[f"{full}: broken, and stays so"] > 3  # the very last write, behind which LMDB gives up
        assert outcomes[f"{full}: refused to start, STORE_UNREADABLE"] > 10
    assert outcomes["EIO: broken, and stays so"] > 10
    assert outcomes["EIO: refused to start, STORE_UNREADABLE"] > 10
    assert len(outcomes) == 8


def test_no_flipped_bit_goes_unseen() -> None:
    summary = experiment("flips", "--flips", "200")
    assert summary["wrong"] == []
    assert summary["outcomes"]["refused, found by check"] > 100


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount; `python -m tests.crash.powercut` is its command")
def test_a_real_power_cut_loses_nothing(tmp_path: Path) -> None:
    from tests.crash import powercut

    if not powercut.possible():
        pytest.skip("no loop devices here; `python -m tests.crash.powercut` is its command")
    summary = powercut.run(tmp_path, rounds=4, planted="")
    assert summary["commits"] > 50
    assert summary["wrong"] == []
