"""`idemq demo`, both ways, and that it says so when nothing was shown."""

import json
from dataclasses import replace

import pytest

from idemq.client.cli import demo, main
from idemq.testing import Faults

pytestmark = pytest.mark.process

SEED = 20261123


def test_each_message_is_found_once_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", str(SEED), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["in"], result["out"], result["lost"], result["duplicated"], result["unexpected"]) == (
        demo.MESSAGES,
        demo.MESSAGES,
        0,
        0,
        0,
    )
    assert (result["seed"], result["ok"], result["dedup"]) == (SEED, True, True)
    # One more of the broker: what is counted was read after a last kill.
    assert (result["broker_kills"], result["loader_kills"]) == (demo.KILLS + 1, demo.KILLS)
    assert min(result[name] for name in ("retries_absorbed", "cuts", "replies_lost", "late_deliveries")) > 0
    assert f"Seed {SEED}" in shown.err
    assert shown.err.count("the loader was killed") == demo.KILLS
    assert "\r" not in shown.err


def test_the_same_faults_without_dedup_make_duplicates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", str(SEED), "--without-dedup"]) == 0
    shown = capsys.readouterr()
    fields = dict(line.split("\t") for line in shown.out.splitlines())
    assert int(fields["duplicated"]) > 0
    assert int(fields["out"]) == int(fields["in"]) + int(fields["duplicated"])
    assert (fields["lost"], fields["dedup"], fields["loader_kills"]) == ("0", "false", str(demo.KILLS))
    assert f"without dedup retries stored {int(fields['duplicated']):,} messages again" in shown.err


def test_a_network_without_faults_shows_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FAULTS", Faults())
    assert main(["demo", "--seed", str(SEED)]) == 1
    assert "FAILED: too little went wrong" in capsys.readouterr().err


def test_a_loader_that_fails_is_no_success(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TOPIC", "another")
    assert main(["demo", "--seed", str(SEED)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "The loader ended with code 1" in shown.err
    assert "UNKNOWN_TOPIC" in shown.err


GOOD = demo.Result(1, True, 10, 10, retries_absorbed=1, broker_kills=1, loader_kills=1, cuts=1, replies_lost=1)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"lost": 1},
        {"duplicated": 1},
        {"unexpected": 1},
        {"retries_absorbed": 0},
        {"broker_kills": 0},
        {"loader_kills": 0},
        {"cuts": 0},
        {"replies_lost": 0},
    ],
)
def test_what_spoils_the_demonstration(spoiled: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    assert GOOD.shown
    assert not replace(GOOD, **spoiled).shown
    demo._conclude(replace(GOOD, **spoiled))
    assert "FAILED" in capsys.readouterr().err


def test_a_broken_promise_is_told_first(capsys: pytest.CaptureFixture[str]) -> None:
    demo._conclude(replace(GOOD, lost=1, cuts=0))
    assert "the promise does not hold" in capsys.readouterr().err


def test_without_dedup_duplicates_are_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    result = replace(GOOD, dedup=False, retries_absorbed=0, messages_out=11, duplicated=1)
    assert result.shown
    for spoiled in (replace(result, duplicated=0), replace(result, lost=1), replace(result, unexpected=1)):
        assert not spoiled.shown
        demo._conclude(spoiled)
        assert "FAILED" in capsys.readouterr().err
