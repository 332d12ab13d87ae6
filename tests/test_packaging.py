"""The wheel holds the tree's code, all of it and nothing else.

Built from a copy: a `build/` left in a checkout would ship modules that were deleted long ago. That the installed wheel
runs away from the checkout is tried by `.ci/run`, stage `wheel`, since it needs an environment of its own.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .test_structure import ROOT, package

FOLDERS = ("client", "broker", "bench")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the wheel is built from, without what earlier builds left behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    return tmp_path / "tree"


def code(tree: Path) -> set[str]:
    """Where each file of the tree must lie in the wheel; pages for a reader of the tree stay there."""
    files = (path.relative_to(tree) for folder in FOLDERS for path in (tree / folder).rglob("*") if path.is_file())
    return {f"{package(str(path)).replace('.', '/')}/{path.name}" for path in files if path.suffix != ".md"}


def build(tree: Path) -> set[str]:
    """The names in the wheel that `tree` makes, beside its metadata."""
    command = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / "dist" / done.stdout.splitlines()[-1]) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_is_the_tree(copy: Path) -> None:
    expected = code(copy)
    assert {"idemq/__init__.py", "idemq/client/wire.py", "idemq/broker/core.py", "idemq/broker/py.typed"} <= expected
    assert build(copy) == expected


def forget_a_package(tree: Path) -> None:
    (tree / "client/extra").mkdir()
    (tree / "client/extra/__init__.py").touch()


def leave_a_stale_build(tree: Path) -> None:
    (tree / "build/lib/idemq/client").mkdir(parents=True)
    (tree / "build/lib/idemq/client/deleted.py").touch()


@pytest.mark.parametrize(
    ("spoil", "missing", "extra"),
    [
        (forget_a_package, {"idemq/client/extra/__init__.py"}, set()),
        (leave_a_stale_build, set(), {"idemq/client/deleted.py"}),
    ],
)
def test_a_wheel_that_is_not_the_tree_is_seen(
    copy: Path, spoil: Callable[[Path], None], missing: set[str], extra: set[str]
) -> None:
    spoil(copy)
    expected, built = code(copy), build(copy)
    assert (expected - built, built - expected) == (missing, extra)
