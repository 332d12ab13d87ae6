"""The measurements work and say what they measured. Which figures come out is nobody's condition."""

from __future__ import annotations

import json

import pytest

from idemq.bench import main
from idemq.bench.command import FIGURES


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_is_measured(figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([figure, "--quick", "--rounds", "1", "--size", "100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quick"] is True
    assert document["machine"]["python"]
    assert document["figures"]
    for row in document["figures"]:
        assert row["low"] <= row["median"] <= row["high"], row
        assert row["low"] > 0 or (row["unit"] == "messages" and row["low"] == 0), row  # a lag may be nothing


def test_a_wrong_figure_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as end:
        main(["nonsense"])
    assert end.value.code == 2
