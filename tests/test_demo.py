"""`idemq demo`, each way, and that it says so when nothing was shown."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from idemq.client.cli import demo, demo_groups, main
from idemq.testing import Faults

pytestmark = pytest.mark.process

SEED = 20261123
SECONDS_MAX = 60.0
GOOD = demo.Result(1, True, 10, 10, retries_absorbed=1, broker_kills=1, loader_kills=1, cuts=1, replies_lost=1)
GOOD_GROUPS = demo.GroupResult(10, 10, worker_kills=1, broker_kills=1, zombies=1, zombies_refused=1, cuts=1)
GOOD_EFFECTS = demo.EffectsResult(1, 10, 11, plain_doubled=1, keyed_rows=10, worker_kills=1, broker_kills=1, cuts=1)


@pytest.fixture
def act_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the first act."""
    monkeypatch.setattr(demo, "_work", lambda args, seed: GOOD_GROUPS)


@pytest.fixture
def act_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the second act."""
    monkeypatch.setattr(demo, "_load", lambda args, seed: GOOD)


@pytest.mark.usefixtures("act_one")
def test_each_message_is_found_once_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", str(SEED), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["in"], result["out"]) == (demo.MESSAGES, demo.MESSAGES)
    assert (result["lost"], result["duplicated"], result["unexpected"]) == (0, 0, 0)
    assert (result["seed"], result["ok"], result["dedup"]) == (SEED, True, True)
    # One more of the broker: what is counted was read after a last kill.
    assert (result["broker_kills"], result["loader_kills"]) == (demo.KILLS + 1, demo.KILLS)
    assert min(result[name] for name in ("retries_absorbed", "cuts", "replies_lost", "late_deliveries")) > 0
    assert f"Seed {SEED}" in shown.err
    assert shown.err.count("the loader was killed") == demo.KILLS
    assert "\r" not in shown.err
    assert (result["groups"]["inputs"], result["groups"]["lost"]) == (GOOD_GROUPS.inputs, 0)


@pytest.mark.usefixtures("act_two")
def test_act_two_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", str(SEED + 1)]) == 0
    shown = capsys.readouterr()
    fields = dict(line.split("\t") for line in shown.out.splitlines())
    told = {name.removeprefix("groups_"): value for name, value in fields.items() if name.startswith("groups_")}
    groups = {name: int(value) for name, value in told.items() if value.isdigit()}
    assert (groups["inputs"], groups["outputs"]) == (demo_groups.MESSAGES, demo_groups.MESSAGES)
    assert (groups["lost"], groups["duplicated"], groups["unexpected"]) == (0, 0, 0)
    planned = Counter(demo_groups.VICTIMS)
    done = (groups["worker_kills"], groups["zombies"], groups["broker_kills"])
    assert done == (planned["worker"], planned["zombie"], planned["broker"] + 1)
    assert 0 < groups["zombies_refused"] <= groups["zombies"]
    assert groups["zombies_refused"] <= groups["lease_refusals"]
    assert groups["cuts"] > 0
    assert shown.err.count("a worker wakes up (SIGCONT)") == groups["zombies"]
    assert f"Shown: {demo_groups.MESSAGES:,} messages, and exactly one output of each" in shown.err


def test_effects_are_doubled_without_a_key_and_not_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--effects", "--seed", str(SEED)]) == 0
    shown = capsys.readouterr()
    fields = dict(line.split("\t") for line in shown.out.splitlines())
    assert int(fields["plain_doubled"]) > 0
    assert int(fields["plain_rows"]) == demo_groups.EFFECTS + int(fields["plain_doubled"])
    assert (fields["keyed_rows"], fields["keyed_doubled"]) == (str(demo_groups.EFFECTS), "0")
    assert (fields["plain_lost"], fields["keyed_lost"]) == ("0", "0")
    planned = Counter(demo_groups.EFFECTS_VICTIMS)
    assert (fields["worker_kills"], fields["broker_kills"]) == (str(planned["worker"]), str(planned["broker"] + 1))
    assert f"Shown: {int(fields['plain_doubled']):,} plain rows too many" in shown.err


def test_the_same_faults_without_dedup_make_duplicates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--seed", str(SEED), "--without-dedup"]) == 0
    shown = capsys.readouterr()
    fields = dict(line.split("\t") for line in shown.out.splitlines())
    assert int(fields["duplicated"]) > 0
    assert int(fields["out"]) == int(fields["in"]) + int(fields["duplicated"])
    assert (fields["lost"], fields["dedup"], fields["loader_kills"]) == ("0", "false", str(demo.KILLS))
    assert f"without dedup retries stored {int(fields['duplicated']):,} messages again" in shown.err


@pytest.mark.usefixtures("act_one")
def test_a_network_without_faults_shows_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FAULTS", Faults())
    assert main(["demo", "--seed", str(SEED)]) == 1
    assert "FAILED: too little went wrong" in capsys.readouterr().err


@pytest.mark.usefixtures("act_two")
@pytest.mark.parametrize(
    ("argv", "says"), [([], "FAILED: too little went wrong"), (["--effects"], "FAILED: nothing was doubled")]
)
def test_workers_that_nothing_is_done_to_show_nothing(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"VICTIMS": [], "EFFECTS_VICTIMS": [], "MESSAGES": 1000, "EFFECTS": 1000}.items():
        monkeypatch.setattr(demo_groups, name, value)
    assert main(["demo", *argv]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("act_one")
def test_a_loader_that_fails_is_no_success(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TOPIC", "another")
    assert main(["demo", "--seed", str(SEED)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "The loader ended with code 1" in shown.err
    assert "UNKNOWN_TOPIC" in shown.err


@pytest.mark.usefixtures("act_two")
def test_a_worker_that_fails_is_no_success(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_groups, "INPUTS", "another")
    assert main(["demo", "--seed", str(SEED)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "A worker ended with code 1" in shown.err
    assert "UNKNOWN_TOPIC" in shown.err


@pytest.mark.parametrize(("module", "argument"), [("worker", "worker"), ("loader", "9")])
def test_what_the_demo_kills_does_not_outlive_it(module: str, argument: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # what says nothing is waited for
        code = f"from idemq.client.cli.{module} import main; main()"
        url = f"idemq://127.0.0.1:{silent.getsockname()[1]}"
        with subprocess.Popen([sys.executable, "-c", code, url, argument], stdin=subprocess.PIPE) as process:
            try:
                peer, _ = silent.accept()
                with peer:
                    assert process.poll() is None
                    assert process.stdin is not None
                    process.stdin.close()
                    assert process.wait(SECONDS_MAX) == 1
            finally:
                process.kill()


def at_work_in(directory: Path) -> list[int]:
    """Processes that were given something in this directory."""
    commands = ((int(path.parent.name), path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    found = []
    for pid, path in commands:
        with suppress(OSError):  # it ended meanwhile
            if os.fsencode(directory) in path.read_bytes():
                found.append(pid)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("argv", "lines"), [(["demo"], 2), (["bench", "send", "--quick"], 3)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_whatever_ends_it_leaves_no_process(
    argv: list[str], lines: int, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "idemq.client.cli", *argv]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    # As a shell script's background job, which ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGINT, before)
    with process:
        try:
            assert process.stdout is not None
            for _ in range(lines):  # then it is in the middle of it
                assert process.stdout.readline()
            wait_for(lambda: bool(at_work_in(tmp_path)))
            process.send_signal(number)
            assert process.wait(SECONDS_MAX) == code
        finally:
            process.kill()
    wait_for(lambda: not at_work_in(tmp_path))
    assert number is signal.SIGKILL or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("good", "spoiled"),
    [
        *((GOOD, name) for name in ("retries_absorbed", "broker_kills", "loader_kills", "cuts", "replies_lost")),
        *((GOOD, name) for name in ("lost", "duplicated", "unexpected")),
        *((GOOD_GROUPS, name) for name in ("worker_kills", "broker_kills", "zombies_refused", "cuts")),
        *((GOOD_GROUPS, name) for name in ("lost", "duplicated", "unexpected")),
        *((GOOD_EFFECTS, name) for name in ("plain_doubled", "worker_kills", "broker_kills", "cuts")),
        *((GOOD_EFFECTS, name) for name in ("plain_lost", "keyed_lost", "keyed_doubled")),
    ],
)
def test_what_spoils_the_demonstration(good: Any, spoiled: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert good.shown
    bad = replace(good, **{spoiled: 1 - getattr(good, spoiled)})
    assert not bad.shown
    conclude(bad)
    assert "FAILED" in capsys.readouterr().err


def conclude(result: Any) -> None:
    if isinstance(result, demo.GroupResult):
        demo._conclude_groups(result, SEED)
    else:
        (demo._conclude if isinstance(result, demo.Result) else demo._conclude_effects)(result)


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, lost=1, cuts=0),
        replace(GOOD_GROUPS, duplicated=1, cuts=0),
        replace(GOOD_EFFECTS, keyed_doubled=1, cuts=0),
    ],
)
def test_a_broken_promise_is_told_first(bad: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conclude(bad)
    assert "the promise does not hold" in capsys.readouterr().err


def test_one_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    for result, said in (
        (replace(GOOD, dedup=False, duplicated=1), "retries stored 1 message again"),
        (GOOD_GROUPS, "although 1 zombie came"),
        (GOOD_EFFECTS, "Shown: 1 plain row too many"),
    ):
        conclude(result)
        assert said in " ".join(capsys.readouterr().err.split())


def test_what_is_compared() -> None:
    wanted = {b"a", b"b", b"c"}
    assert demo_groups.compare(wanted, Counter(wanted)) == (0, 0, 0)
    assert demo_groups.compare(wanted, Counter([b"a", b"a", b"a", b"b", b"x"])) == (1, 1, 2)


def test_without_dedup_duplicates_are_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    result = replace(GOOD, dedup=False, retries_absorbed=0, messages_out=11, duplicated=1)
    assert result.shown
    for spoiled in (replace(result, duplicated=0), replace(result, lost=1), replace(result, unexpected=1)):
        assert not spoiled.shown
        demo._conclude(spoiled)
        assert "FAILED" in capsys.readouterr().err
