"""A power cut with a real kernel: a store on a loop-mounted ext4 that is shut down without writing its journal.

`python -m tests.crash.powercut [--rounds N] [--planted sync=False]`, as root, where loop devices can be mounted.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lmdb

from idemq.broker import check, store
from idemq.broker.store import Store

from . import workload

ROOT = Path(__file__).resolve().parent.parent.parent
_SHUTDOWN = 0x8004587D
_WITHOUT_JOURNAL = 2
_SEED = 1
_COMMITS = 1000


def _shell(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def _mounted(image: Path, point: Path) -> Iterator[None]:
    _shell("mount", "-o", "loop", image, point)
    try:
        yield
    finally:
        _shell("umount", point)


def possible() -> bool:
    """Can this process mount a file system from a file?"""
    if not shutil.which("mkfs.ext4") or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        image, point = Path(folder, "image"), Path(folder, "point")
        point.mkdir()
        try:
            _make(image)
            with _mounted(image, point):
                return True
        except subprocess.CalledProcessError:
            return False


def _make(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(128 << 20)
    _shell("mkfs.ext4", "-q", "-F", image)


def run(folder: Path, rounds: int, planted: str) -> dict[str, Any]:
    """Cut the power `rounds` times while a child commits; every acknowledged commit must be there afterwards."""
    image, point = folder / "image", folder / "point"
    point.mkdir()
    _make(image)
    _, contents = workload.history(_SEED, _COMMITS)
    dice = random.Random(_SEED)
    wrong: list[str] = []
    acknowledged = total = 0
    for number in range(rounds):
        with _mounted(image, point):
            command = [
                sys.executable,
                "-m",
                "tests.crash.powercut",
                "--child",
                str(point / "data"),
                "--planted",
                planted,
            ]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
                assert child.stdout is not None
                told = child.stdout.readline()
                time.sleep(dice.uniform(0, 0.2))
                file = os.open(point, os.O_RDONLY)
                fcntl.ioctl(file, _SHUTDOWN, _WITHOUT_JOURNAL.to_bytes(4, sys.byteorder))
                os.close(file)
                child.kill()
                told += child.stdout.read()
            acknowledged = max([acknowledged, *map(int, told.split(b"\n")[:-1])])
        with _mounted(image, point):
            at, complaint = _look(point / "data", contents, acknowledged)
        total += max(0, at)
        if complaint:
            wrong.append(f"round {number}: {complaint}")
        if complaint or at > _COMMITS // 2:
            with _mounted(image, point):
                shutil.rmtree(point / "data")
            acknowledged = 0
    return {"rounds": rounds, "commits": total, "wrong": wrong}


def _look(directory: Path, contents: list[workload.Content], acknowledged: int) -> tuple[int, str]:
    """(commits that are there, what is wrong)."""
    try:
        report = check.verify(directory)
        if not report.clean:
            return 0, f"{report.died} {report.findings[:1]}"
        opened = Store(directory)
    except store.StoreError as refused:
        return 0, refused.text
    found = workload.content(opened)
    opened.close()
    if found != contents[found[0]]:
        return 0, "torn"
    return found[0], f"lost: {found[0]} of {acknowledged}" if found[0] < acknowledged else ""


def _child(directory: str, planted: str) -> None:
    if planted == "sync=False":
        real = lmdb.open
        mock.patch.object(lmdb, "open", lambda path, **options: real(path, **{**options, "sync": False})).start()
    groups, _ = workload.history(_SEED, _COMMITS)
    opened = Store(directory)
    for index in range(opened.space().txn_id, len(groups)):
        opened.commit(groups[index])
        os.write(1, b"%d\n" % (index + 1))


def main() -> None:
    """Run it, print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.powercut")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--planted", default="", choices=("", "sync=False"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    workload.hurry()
    if options.child:
        _child(options.child, options.planted)
        return
    with tempfile.TemporaryDirectory() as folder:
        json.dump(run(Path(folder), options.rounds, options.planted), sys.stdout)


if __name__ == "__main__":
    main()
