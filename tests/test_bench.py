"""The measurements work and say what they measured. Which figures come out is nobody's condition."""

from __future__ import annotations

import json
from math import comb

import pytest

from idemq.bench import groups, main
from idemq.bench.command import FIGURES
from idemq.bench.measure import confidence


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_is_measured(
    figure: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "WINDOW_S", 0.2)
    monkeypatch.setattr(groups, "MEMBER_TIMEOUT_S", 1.0)
    assert main([figure, "--quick", "--rounds", "1", "--size", "100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quick"] is True
    assert document["machine"]["python"]
    assert document["figures"]
    for row in document["figures"]:
        assert row["low"] <= row["median"] <= row["high"], row
        assert row["low"] > 0 or (row["unit"] == "messages" and row["low"] == 0), row  # a lag may be nothing


@pytest.mark.parametrize("count", [6, 7, 20, 100, 500, 1000])
def test_the_median_lies_where_it_is_said_to_95_percent(count: int) -> None:
    """Exactly: it lies lower when `low` or fewer of so many throws of a coin fall below it, and higher alike."""
    _, low, high = confidence(range(count))
    assert low + high == count - 1
    assert 2 * sum(comb(count, below) for below in range(int(low) + 1)) / 2**count <= 0.05


def test_the_head_names_what_bounds_most_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["send", "--quick", "--rounds", "1", "--size", "100"]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert float(dict(field.split() for field in head.split("  "))["fsync_ms"]) > 0


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["sendd"], "there is no figure 'sendd': did you mean send? (see idemq bench --help)"),
        (["--rounds", "0"], "'0' is no whole number above 0"),
        (["--rouds=1"], "'--rouds=1' is not expected here: did you mean --rounds?"),
    ],
)
def test_a_usage_error_is_one_line(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
