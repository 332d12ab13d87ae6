"""README says nothing that is not so: its claims name tests that exist, its commands and its example work."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
from pathlib import Path

import pytest

import idemq
from idemq import testing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def claims(text: str) -> list[tuple[str, str]]:
    """(claim, test) of the table."""
    return re.findall(r"^\| ([^|]+) \| `(tests/[^`]+)` \|$", text, re.MULTILINE)


def dangling(text: str) -> list[str]:
    """Names of the table's tests that do not exist."""
    missing = []
    for _, name in claims(text):
        file, _, function = name.partition("::")
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if not function.startswith("test_") or function not in names:
            missing.append(name)
    return missing


def test_every_claim_names_a_test_that_exists() -> None:
    assert len(claims(README)) >= 15
    assert dangling(README) == []


def test_a_dangling_name_is_noticed() -> None:
    row = "| a claim | `tests/test_readme.py::test_that_is_not_here` |"
    assert dangling(row) == ["tests/test_readme.py::test_that_is_not_here"]


def test_the_first_two_blocks_are_the_two_commands() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert "serve" in blocks[0]
    assert "pytest" in blocks[1]
    assert all(len(block.splitlines()) <= 2 for block in blocks[:2])


def test_links_point_to_files_that_exist() -> None:
    paths = re.findall(r"`((?:broker|client|tests|bench)/[\w./-]+)`", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.process
def test_the_examples_run_as_they_stand(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 4

    async def ran(example: str, url: str) -> bytes:
        script = tmp_path / "example.py"
        script.write_text(example.replace("idemq://localhost:7750", url))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", str(script), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        return output

    async def run() -> None:
        async with testing.broker() as broker:
            for _ in range(2):  # the second time everything is there already
                outputs = [await ran(example, broker.url) for example in examples]
            assert b"stored=0" in outputs[0]
            async with idemq.connect(broker.url) as mq:
                ends = {
                    topic.name: sum(one.next - one.earliest for one in topic.partitions) for topic in await mq.topics()
                }
            assert ends["orders"] == ends["enriched"] == ends["lengths"] > 0
            assert ends["orders.dlq"] == ends["orders"] - ends["bills"] == 2
            assert ends["notes"] == 2

    asyncio.run(run())
