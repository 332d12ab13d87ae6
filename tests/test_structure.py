"""The rules of the house that a machine can judge: who may import whom, what is named and documented, where files lie.

Each check takes a tree of sources, `{path: text}`, and returns its complaints; a second test plants breaches of
each rule and sees them caught.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
Tree = dict[str, str]

TOP_LEVEL = {
    "pyproject.toml",
    "broker",
    "client",
    "tests",
    "bench",
    "Dockerfile",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
}
PACKAGES = ("client", "broker", "bench")

# Decided by their arguments alone, so that the simulator owns their clock, their dice and their network.
PURE = {
    *(f"client/{name}.py" for name in ("wire", "records", "errors", "pipeline", "session", "membership")),
    *(f"client/{name}.py" for name in ("positions", "retry", "scheduling")),
    *(f"broker/{name}.py" for name in ("core", "producers", "topics", "groups", "fetches", "schema")),
}
PURE_MODULES = {"idemq." + path.removesuffix(".py").replace("/", ".") for path in PURE}
IMPURE = {"asyncio", "lmdb", "os", "secrets", "socket", "subprocess", "threading", "time", "uuid", "uvloop"}
LOOP_OWNERS = {"broker/server.py", "broker/http.py", "broker/__main__.py"}
# What of the client the broker shares: the wire and what it is made of.
SHARED_WITH_BROKER = {"idemq.client.wire", "idemq.client.records", "idemq.client.errors"}


def checkout() -> Tree:
    """Every text that git tracks, or would once it is added, as it stands in the work tree."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    paths = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = (path for path in paths.split("\0") if path)
    return {
        path: (ROOT / path).read_text() for path in listed if (ROOT / path).suffix != ".xz" and (ROOT / path).exists()
    }


def modules(tree: Tree) -> Iterator[tuple[str, ast.Module]]:
    for path, text in tree.items():
        if path.endswith(".py"):
            yield path, ast.parse(text, path)


class Import(NamedTuple):
    name: str
    """Dotted, relative ones resolved: `idemq.client.wire`, or `idemq.client.wire.Code` for a name taken from it."""
    line: int
    lazy: bool
    """Inside a function."""
    level: int


def package(path: str) -> str:
    """The package that a file's relative imports start from: `broker/core.py` -> `idemq.broker`."""
    folder = str(PurePosixPath(path).parent)
    return "idemq" if folder == "client/idemq" else "idemq." + folder.replace("/", ".")


def imports(path: str, module: ast.Module) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, 0)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package(path).split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy, node.level)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(module, False)


def within(name: str, *parents: str) -> bool:
    """Is `name` one of these modules, or something in one?"""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def check_imports(tree: Tree) -> Iterator[str]:
    """The import direction: `wire` <- everything; LMDB and the event loop have owners; the client stands alone."""
    for path, module in modules(tree):
        folder = path.split("/")[0]
        may_be_lazy = path.startswith("client/cli/") or path == "client/testing.py"
        for name, line, lazy, level in imports(path, module):
            place = f"{path}:{line}: {name}"
            if within(name, *PACKAGES):
                yield f"{place}: a second copy of every class; import it as idemq.…"
            if folder not in PACKAGES:
                continue
            own = f"idemq.{folder}"
            if level and not within(name, own, "idemq" if folder == "client" else own):
                yield f"{place}: a relative import that leaves its folder"
            if not level and within(name, own) and not path.startswith("client/idemq/"):
                yield f"{place}: relative inside a folder"
            if folder == "broker":
                if within(name, "lmdb") and path != "broker/store.py":
                    yield f"{place}: only broker/store.py knows LMDB"
                if within(name, "asyncio", "uvloop") and path not in LOOP_OWNERS:
                    yield f"{place}: only {', '.join(sorted(LOOP_OWNERS))} know the event loop"
                if within(name, "idemq") and not within(name, own, *SHARED_WITH_BROKER, "idemq.__version__"):
                    yield f"{place}: of the client the broker knows {', '.join(sorted(SHARED_WITH_BROKER))}"
            if folder == "client":
                if within(name, "lmdb"):
                    yield f"{place}: the client has no store"
                if within(name, "uvloop", "idemq.broker", "idemq.bench") and not (may_be_lazy and lazy):
                    yield f"{place}: only client/cli and client/testing.py, inside a function"
            if path == "client/wire.py" and within(name, "idemq"):
                yield f"{place}: everything stands on the wire, the wire on nothing"
            if path in PURE:
                if within(name, *IMPURE):
                    yield f"{place}: a pure file; time and bytes come in as arguments"
                if within(name, "idemq") and name not in PURE_MODULES and not within(name, *PURE_MODULES):
                    yield f"{place}: a pure file stands on pure files only"


def check_randomness(tree: Tree) -> Iterator[str]:
    """A pure file names the type `random.Random` in annotations; the generator itself is handed in, seeded."""
    for path, module in modules(tree):
        if path not in PURE:
            continue
        yield from (
            f"{path}:{i.line}: {i.name}: import random"
            for i in imports(path, module)
            if within(i.name, "random") and "." in i.name
        )
        called = {id(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)}
        for node in ast.walk(module):
            if not (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "random"):
                continue
            if node.attr != "Random" or id(node) in called:
                yield f"{path}:{node.lineno}: random.{node.attr}: a pure file is handed its generator"


def check_docstrings(tree: Tree) -> Iterator[str]:
    """Every module and every public name says what it is, or overrides one that does."""
    classes: dict[str, ast.ClassDef] = {}
    for path, module in modules(tree):
        if path.split("/")[0] in PACKAGES:
            classes |= {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}

    def inherited(owner: ast.ClassDef, name: str) -> bool:
        for base in owner.bases:
            parent = classes.get(ast.unparse(base).split("[")[0].split(".")[-1])
            if parent is None or parent is owner:
                continue
            if any(
                isinstance(n, FUNCTION) and n.name == name and ast.get_docstring(n) for n in parent.body
            ) or inherited(parent, name):
                return True
        return False

    def bare(path: str, body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[str]:
        for node in body:
            if not isinstance(node, FUNCTION | ast.ClassDef) or node.name.startswith("_"):
                continue
            decorators = {ast.unparse(each) for each in node.decorator_list}
            if "overload" in decorators or f"{node.name}.setter" in decorators:
                continue
            if not ast.get_docstring(node) and not (owner and inherited(owner, node.name)):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from bare(path, node.body, node)

    for path, module in modules(tree):
        if path.split("/")[0] in PACKAGES:
            if not ast.get_docstring(module):
                yield f"{path}: no docstring"
            yield from bare(path, module.body)


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def check_top_level(tree: Tree) -> Iterator[str]:
    """A reader sees nine names."""
    for name in sorted({path.split("/")[0] for path in tree}):
        if name not in TOP_LEVEL and not name.startswith("."):
            yield f"{name}: not at the top level"


def check_packages(tree: Tree) -> Iterator[str]:
    """Every folder with code is named in pyproject.toml, under the name that its place gives it."""
    setuptools = tomllib.loads(tree["pyproject.toml"])["tool"]["setuptools"]
    folders = {str(PurePosixPath(path).parent) for path in tree if path.startswith(PACKAGES) and path.endswith(".py")}
    expected = {package(f"{folder}/x.py"): folder for folder in folders}
    for name, folder in sorted(expected.items()):
        if setuptools["package-dir"].get(name) != folder:
            yield f"pyproject.toml: package-dir lacks {name} = {folder}"
        if name not in setuptools["packages"]:
            yield f"pyproject.toml: packages lacks {name}"
    for name in sorted({*setuptools["packages"], *setuptools["package-dir"]} - set(expected)):
        yield f"pyproject.toml: {name} has no code"


# Written so that this file does not match itself.
UNWANTED = {
    r"(?<![\w.])/(work|root|home)/": "a path of one machine",
    r"\.\./shared\b": "a path of one machine",
    r"\b(pypi|pythonhosted|npmjs|crates)\.(org|io)\b": "the host of a registry",
    r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b": "unfinished",
    r"NotImplemente[d]Error": "unfinished",
}


def check_words(tree: Tree) -> Iterator[str]:
    """Nothing that is true on one machine only, and nothing left for later."""
    for path, text in tree.items():
        for pattern, what in UNWANTED.items():
            for match in re.finditer(pattern, text):
                yield f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}: {what}"


CHECKS: list[Callable[[Tree], Iterator[str]]] = [
    check_imports,
    check_randomness,
    check_docstrings,
    check_top_level,
    check_packages,
    check_words,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_tree_keeps_the_rule(check: Callable[[Tree], Iterator[str]]) -> None:
    assert not (complaints := list(check(checkout()))), "\n".join(complaints)


PYPROJECT = (ROOT / "pyproject.toml").read_text()

BREACHES = [
    (check_imports, "broker/core.py", "import lmdb", "only broker/store.py"),
    (check_imports, "broker/check.py", "def f():\n    import lmdb", "only broker/store.py"),
    (check_imports, "broker/store.py", "import asyncio.events", "know the event loop"),
    (check_imports, "broker/config.py", "from uvloop import run", "know the event loop"),
    (check_imports, "broker/server.py", "from idemq.client.session import Session", "of the client the broker knows"),
    (check_imports, "broker/server.py", "from idemq import connect", "of the client the broker knows"),
    (check_imports, "client/client.py", "def f():\n    import lmdb", "the client has no store"),
    (check_imports, "client/client.py", "def f():\n    import uvloop", "inside a function"),
    (check_imports, "client/cli/serve.py", "from idemq.broker import server", "inside a function"),
    (check_imports, "client/testing.py", "import idemq.broker.core", "inside a function"),
    (check_imports, "client/wire.py", "from .errors import IdemqError", "the wire on nothing"),
    (check_imports, "client/wire.py", "from . import errors", "the wire on nothing"),
    (check_imports, "client/session.py", "from time import monotonic", "a pure file"),
    (check_imports, "client/session.py", "def f():\n    import os.path", "a pure file"),
    (check_imports, "client/session.py", "from .connection import Connection", "pure files only"),
    (check_imports, "broker/core.py", "from . import server", "pure files only"),
    (check_imports, "broker/core.py", "from idemq.broker import topics", "relative inside"),
    (check_imports, "broker/core.py", "from ..client import wire", "leaves its folder"),
    (check_imports, "tests/test_core.py", "from broker.core import Core", "second copy"),
    (check_imports, "client/cli/serve.py", "import client.wire", "second copy"),
    (check_randomness, "client/session.py", "import random\nx = random.random()", "handed its generator"),
    (check_randomness, "client/session.py", "import random\nx = random.Random()", "handed its generator"),
    (check_randomness, "client/session.py", "from random import choice", "import random"),
    (check_docstrings, "client/client.py", "def f(): ...", "client.py: no docstring"),
    (check_docstrings, "client/client.py", "async def f(): ...", "f has no docstring"),
    (check_docstrings, "client/client.py", "class C:\n    '''A C.'''\n    def f(self): ...", "f has no docstring"),
    (check_docstrings, "client/client.py", "class B: ...\nclass C(B):\n    def f(self): ...", "f has no docstring"),
    (check_top_level, "docs/wire.md", "", "docs: not at the top level"),
    (check_packages, "client/cli/extra/__init__.py", "", "packages lacks idemq.client.cli.extra"),
    (
        check_packages,
        "pyproject.toml",
        PYPROJECT.replace('"idemq.bench"]', '"idemq.ghost"]'),
        "idemq.ghost has no code",
    ),
    (check_packages, "pyproject.toml", PYPROJECT.replace('"idemq.bench" = "bench"', ""), "package-dir lacks"),
    (check_words, "README.md", "cd " + "/".join(["", "work", "main"]), "a path of one machine"),
    (check_words, ".ci/run", "cp " + "/".join(["..", "shared", "tool"]), "a path of one machine"),
    (check_words, "README.md", "https://" + ".".join(["pypi", "org"]), "the host of a registry"),
    (check_words, "broker/core.py", "# " + "TO" + "DO later", "unfinished"),
]


@pytest.mark.parametrize(("check", "path", "text", "complaint"), BREACHES)
def test_a_breach_is_caught(check: Callable[[Tree], Iterator[str]], path: str, text: str, complaint: str) -> None:
    tree = checkout() if check is check_packages else {}  # the others say of one file what they say of all
    before = set(check(tree))
    assert [found for found in check(tree | {path: text}) if found not in before and complaint in found]


ALLOWED = {
    "broker/core.py": """'''.'''
from idemq.client import wire
from idemq.client.wire import Code
from . import groups
""",
    "broker/store.py": """'''.'''
import lmdb
from .schema import key
""",
    "client/cli/serve.py": """'''.'''
from ..wire import Code
def _serve():
    import uvloop
    from idemq.broker import server
""",
    "client/session.py": """'''.'''
import random
from . import wire
def _jitter(rng: random.Random): ...
""",
    "client/engine.py": """'''.'''
class Engine:
    '''An engine.'''
    def send(self):
        '''Send.'''
class Native(Engine):
    '''Ours.'''
    def send(self): ...
""",
}


def test_what_the_rules_allow_passes() -> None:
    assert [*check_imports(ALLOWED), *check_randomness(ALLOWED), *check_docstrings(ALLOWED)] == []
