"""The command line as a shell sees it: exit codes, what stands on stdout and stderr, pipes and terminals, signals.

Real processes against a real broker, itself started by `idemq serve`. What needs no broker is called in process.
"""

import asyncio
import base64
import fcntl
import io
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

import idemq
from idemq.broker.check import Report
from idemq.client.cli import COMMANDS, errors, main, output, reach, sub
from idemq.client.connection import Address
from idemq.client.wire import ADMIN_TOKEN_FILE
from idemq.testing import Link

from .support import eventually, run

pytestmark = pytest.mark.process

SECONDS_MAX = 60.0
CLI = [sys.executable, "-m", "idemq.client.cli"]


def environment(**more: str) -> dict[str, str]:
    """This process's, with no setting of idemq and none of Python's buffers, but these."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("IDEMQ_", "PYTHONUNB"))} | more


class Broker:
    """A broker started by `idemq serve`, and commands that speak to it."""

    def __init__(self, process: subprocess.Popen[str], ready: str) -> None:
        wire, http = ready.removeprefix("idemq ready ").split(" http=")
        self.process = process
        self.url = f"idemq://{wire}"
        self.http_port = int(http.rpartition(":")[2])

    def idemq(self, *argv: str, input: str | bytes = b"", **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in a pipe."""
        return idemq_command(*argv, input=input, IDEMQ_URL=self.url, **more)

    def lines(self, *argv: str, input: str | bytes = b"") -> list[str]:
        """What a command that must succeed prints."""
        done = self.idemq(*argv, input=input)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def json(self, *argv: str, input: str | bytes = b"") -> Any:
        """The JSON document that a command prints."""
        (line,) = self.lines(*argv, "--json", input=input)
        return json.loads(line)

    @contextmanager
    def popen(self, *argv: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A command with all of its ends in pipes; killed if it is still there in the end."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | more
        with subprocess.Popen([*CLI, *argv], env=environment(IDEMQ_URL=self.url), **pipes) as process:
            try:
                yield process
            finally:
                process.kill()

    def resumed(self, *argv: str, input: str) -> Any:
        """What a numbered load prints that was begun before, which it says."""
        done = self.idemq("pub", *argv, "--json", input=input)
        assert (done.returncode, done.stderr.count("\n")) == (0, 1)
        assert "at the start of this input are skipped by number" in done.stderr
        return json.loads(done.stdout)

    def last_seq(self, producer: str) -> int:
        """Its last number; -1 while there is no such producer."""

        async def ask() -> int:
            async with idemq.connect(self.url) as mq:
                try:
                    return (await mq.describe_producer(producer)).last_seq
                except idemq.UnknownProducer:
                    return -1

        return asyncio.run(ask())


def idemq_command(*argv: str, input: str | bytes = b"", **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*CLI, *argv],
        input=input.encode() if isinstance(input, str) else input,
        capture_output=True,
        timeout=SECONDS_MAX,
        env=environment(**more),
    )
    return subprocess.CompletedProcess(argv, done.returncode, done.stdout.decode(), done.stderr.decode())


@contextmanager
def serving(directory: Path, *arguments: str, **more: str) -> Iterator[Broker]:
    command = [*CLI, "serve", "--port", "0", "--http-port", "0", "--data-dir", str(directory), *arguments]
    errors = directory.with_suffix(".stderr")
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(**more))
    with process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline().strip()
            assert ready.startswith("idemq ready "), errors.read_text()
            yield Broker(process, ready)
        finally:
            process.terminate()
            process.wait(SECONDS_MAX)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with serving(tmp_path_factory.mktemp("broker") / "data") as one:
        yield one


@pytest.fixture
def topic(broker: Broker, request: pytest.FixtureRequest) -> str:
    """A topic of the test's own."""
    name = "".join(one if one.isalnum() else "-" for one in request.node.name)[:100]
    broker.lines("topic", "create", name)
    return name


def wait_for(condition: Any) -> None:
    end = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --------------------------------------------------------------------------------------------------------- usage


def test_without_arguments_help_is_printed_and_nothing_was_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        assert f"\n  {name.ljust(width)}  {command.about}\n" in shown.err


def test_help_keeps_to_the_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    for argv in ([], ["dlq"], *(name.split() for name in COMMANDS)):
        assert main([*argv, "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 70, argv


def test_help_names_every_command_and_none_that_a_later_version_brings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    words = set(capsys.readouterr().out.split())
    wanted = "serve ping healthcheck topic pub sub group producer dlq verify demo bench"
    assert set(wanted.split()) <= words
    for later in LATER:
        assert later not in {name.split()[0] for name in COMMANDS}


LATER = [
    "token",
    "explain",
    "top",
    "torture",
    "backup",
    "restore",
    "mirror",
    "check",
    "export",
    "import",
]


@pytest.mark.parametrize("name", LATER)
def test_what_a_later_version_brings_is_no_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert f"there is no command {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: idemq {name}" in shown
    assert "--help" in shown


def test_a_family_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topic"]) == 2
    assert "topic create" in capsys.readouterr().err
    assert main(["topic", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "topic create" in shown
    assert "producer" not in shown


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["tpic"], "there is no command 'tpic': did you mean topic?"),
        (["topic", "descrbe", "x"], "there is no command 'topic descrbe': did you mean topic describe?"),
        (["qqq"], "there is no command 'qqq' (see idemq --help)"),
        (["ping", "--jsn"], "'--jsn' is not expected here: did you mean --json?"),
        (["--jsn", "ping"], "'--jsn' is not expected here: did you mean --json?"),
        (["ping", "extra"], "'extra' is not expected here"),
        (["verify", "x", "--", "--json"], "'--json' is not expected here (see"),
        (["pub"], "the following arguments are required: TOPIC"),
        (["sub", "t", "-n", "0"], "'0' is no whole number above 0"),
        (["sub", "t", "--from", "-1"], "'-1' is none of earliest, latest, an offset, a time"),
        (["sub", "t", "--from", "yesterday"], "'yesterday' is none of earliest, latest, an offset, a time"),
        (["sub", "t", "-g"], "argument -g/--group: expected one argument"),
        (["group", "seek", "g", "t"], "the following arguments are required: --to"),
        (["group", "seek", "g", "t", "--to", "1", "--partition", "-1"], "'-1' is no whole number from 0 on"),
        (["group", "lst"], "there is no command 'group lst': did you mean group ls?"),
        (["pub", "t", "--id", "1", "v"], "--id is not offered yet"),
        (["ping", "--timeout", "nan"], "'nan' is no number of seconds above 0"),
        (["ping", "--timeout", "0"], "'0' is no number of seconds above 0"),
        (["ping", "--url", "http://x"], "is no broker's URL"),
        (["ping", "--url", "idemqs://x"], "is not offered yet"),
        (["ping", "--url", "\udcff"], "is not UTF-8"),
        (["topic", "create", "t", "--retention-bytes", "10GB"], "'10GB' is no size such as 10GiB"),
        (["topic", "create", "t", "--partitions", "x"], "'x' is no whole number above 0"),
        (["topic", "alter", "t"], "Say what to change"),
        (["--json", "serve"], "--json is no option of serve"),
        (["--url", "x", "demo"], "--url is no option of demo"),
        (["verify", "--token", "x"], "'--token' is not expected here"),
        (["serve", "--prot", "1"], "idemq serve: '--prot' is not expected here: did you mean --port?"),
        (["serve", "--zzz"], "idemq serve: '--zzz' is not expected here (see idemq serve --help)"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["pub", "t", "--producer", "p", "v"], "--producer numbers the lines of an input: give them on stdin"),
        (["demo", "--seed", "x"], "argument --seed: 'x' is no whole number from 0 on"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line_and_code_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == errors.USAGE
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert shown.err.count("\n") == 1


def test_options_stand_before_between_and_behind(broker: Broker, topic: str) -> None:
    assert broker.json("pub", topic, "-k", "k", "one")["duplicate"] is False
    assert broker.json("pub", "-k", "k", topic, "two")["duplicate"] is False
    for argv in (["--json", "--timeout", "9", "ping"], ["ping", "--json", "--url", broker.url]):
        assert json.loads("".join(broker.lines(*argv)))["answered_ms"] > 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"idemq {idemq.__version__}\n"


def test_a_command_that_needs_no_broker_loads_none(broker: Broker) -> None:
    code = (
        "import sys; from idemq.client.cli import main; assert main(['ping']) == 0; "
        "print(*sorted(name for name in sys.modules if name.split('.')[0] in ('lmdb', 'uvloop')"
        " or name.startswith(('idemq.broker', 'idemq.bench'))), sep=',')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(IDEMQ_URL=broker.url),
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "")


# ----------------------------------------------------------------------------------------------------- exit codes


def test_1_what_the_broker_refuses(broker: Broker) -> None:
    for what in ("topic describe nix", "sub nix", "pub nix x", "producer describe nix", "group describe nix"):
        done = broker.idemq(*what.split())
        assert done.returncode == errors.FAILURE
        assert done.stderr.startswith("idemq: there is no ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_2_what_the_client_refuses(broker: Broker) -> None:
    done = broker.idemq("topic", "create", "no spaces")
    assert done.returncode == errors.USAGE
    assert "BAD_REQUEST" in done.stderr
    assert broker.idemq("topic", "create", "x", "--retention", "soon").returncode == errors.USAGE


def test_3_fenced(broker: Broker, topic: str) -> None:
    with broker.popen("pub", topic, "--producer", "fenced") as first:
        assert first.stdin is not None
        assert first.stderr is not None
        first.stdin.write(b"one\n")
        first.stdin.flush()
        wait_for(lambda: broker.last_seq("fenced") == 0)
        assert broker.resumed(topic, "--producer", "fenced", input="one\n") == {
            "stored": 0,
            "duplicates": 1,
            "last_seq": 0,
        }
        first.stdin.write(b"two\n")
        first.stdin.close()
        assert first.wait(SECONDS_MAX) == errors.FENCED
        said = first.stderr.read().decode()
    assert "PRODUCER_FENCED" in said
    assert "Sent before: 1 line, 1 stored now, 0 stored before." in said
    assert "Traceback" not in said


def test_69_unreachable(free_port: int) -> None:
    done = idemq_command("ping", "--timeout", "0.3", IDEMQ_URL=f"idemq://127.0.0.1:{free_port}")
    assert done.returncode == errors.UNREACHABLE
    assert f"No broker answers at 127.0.0.1:{free_port}" in done.stderr
    assert "idemq serve" in done.stderr
    assert done.stderr.count("\n") == 1


def test_69_a_person_is_told_what_is_waited_for(broker: Broker, free_port: int) -> None:
    code, shown = in_terminal(broker, "ping", "--timeout", "3", "--url", f"idemq://127.0.0.1:{free_port}")
    assert code == errors.UNREACHABLE
    assert shown.startswith(f"Waiting for a broker at 127.0.0.1:{free_port}, 3 s at most.")
    assert "Waiting" not in idemq_command("ping", "--timeout", "2", IDEMQ_URL=f"idemq://127.0.0.1:{free_port}").stderr


def test_75_retry_later(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--topics-max", "1") as broker:
        broker.lines("topic", "create", "one")
        done = broker.idemq("topic", "create", "two")
        assert done.returncode == errors.RETRY_LATER
        assert "QUOTA_EXCEEDED" in done.stderr


def test_75_a_numbered_load_whose_broker_went_can_be_run_again(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as broker:
        broker.lines("topic", "create", "t")
        with broker.popen("pub", "t", "--producer", "p", "--timeout", "1") as load:
            assert load.stdin is not None
            assert load.stderr is not None
            load.stdin.write(b"one\n")
            load.stdin.flush()
            wait_for(lambda: broker.last_seq("p") == 0)
            broker.process.kill()
            broker.process.wait(SECONDS_MAX)
            load.stdin.write(b"two\n")
            load.stdin.close()
            assert load.wait(SECONDS_MAX) == errors.RETRY_LATER
            assert "Run the same command again" in load.stderr.read().decode()
    with serving(tmp_path / "data") as broker:
        assert broker.resumed("t", "--producer", "p", input="one\ntwo\n")["last_seq"] == 1
        assert broker.lines("sub", "t", "--exit-at-end") == ["one", "two"]


def test_1_what_may_be_stored_and_has_no_number_is_to_be_looked_for(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as broker:
        broker.lines("topic", "create", "t")
        with silenced(broker, replies=4) as url:  # to Hello, Ping, Metadata and Open
            done = idemq_command("pub", "t", "one", "--timeout", "1", "--url", url)
        assert broker.lines("sub", "t", "--exit-at-end") == ["one"]
        with broker.popen("pub", "t", "--timeout", "1") as load:
            assert load.stdin is not None
            assert load.stderr is not None
            load.stdin.write(b"two\n")
            load.stdin.flush()
            wait_for(lambda: len(broker.lines("sub", "t", "--exit-at-end")) == 2)
            broker.process.kill()
            broker.process.wait(SECONDS_MAX)
            load.stdin.write(b"three\n")
            load.stdin.close()
            code, said = load.wait(SECONDS_MAX), load.stderr.read().decode()
    assert "Sent before: 1 line, 1 stored now, 0 stored before.\n" in said
    assert (done.returncode, done.stderr.count("\n")) == (errors.FAILURE, 1)
    assert code == errors.FAILURE
    for text in (done.stderr, said):
        assert "may be stored, or not. Look before it is sent again (idemq sub t)" in text
        assert "--producer" in text
        assert "await" not in text


def test_75_what_does_no_harm_when_repeated_is_to_be_repeated(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as broker, silenced(broker, replies=2) as url:  # to Hello and Ping
        done = idemq_command("topic", "create", "t", "--timeout", "1", "--url", url)
    assert done.returncode == errors.RETRY_LATER
    assert "Run the same command again. (OUTCOME_UNKNOWN)" in done.stderr
    assert "await" not in done.stderr


@contextmanager
def silenced(broker: Broker, replies: int) -> Iterator[str]:
    """A URL behind which the broker hears everything, and only the first of its replies to each connection arrive."""

    async def forward() -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        host, _, port = broker.url.removeprefix("idemq://").partition(":")
        async with Link(host, int(port)) as link:
            link.lose_replies(after_frames=replies, cut_seconds=None, connections=100)
            place.set_result((link.url, lambda: loop.call_soon_threadsafe(stopped.set)))
            await stopped.wait()

    place: Future[tuple[str, Callable[[], object]]] = Future()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, forward())
        url, stop = place.result(SECONDS_MAX)
        try:
            yield url
        finally:
            stop()


def test_77_auth(tmp_path: Path) -> None:
    with serving(tmp_path / "data", IDEMQ_TOKEN="secret") as broker:
        for more, seen in (({}, "none was sent"), ({"IDEMQ_TOKEN": "wrong"}, "the one that was sent is wrong")):
            done = broker.idemq("ping", **more)
            assert seen in done.stderr
            assert ADMIN_TOKEN_FILE in done.stderr
            assert done.returncode == errors.AUTH
            assert "AUTH_FAILED" in done.stderr
            assert "IDEMQ_TOKEN" in done.stderr
        assert broker.idemq("ping", "--token", "secret").returncode == 0
        assert broker.idemq("ping", IDEMQ_TOKEN="secret").returncode == 0
        # What the broker left in its data directory is found by commands on the same machine.
        place = tmp_path / "idemq-data"
        place.mkdir()
        (place / ADMIN_TOKEN_FILE).write_text("secret\n")
        assert broker.idemq("ping", IDEMQ_DATA_DIR=str(place)).returncode == 0
        done = subprocess.run(
            [*CLI, "ping"], env=environment(IDEMQ_URL=broker.url), cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        assert done.returncode == 0
        # An explicit one counts before it.
        assert broker.idemq("ping", IDEMQ_DATA_DIR=str(place), IDEMQ_TOKEN="wrong").returncode == errors.AUTH


def test_78_a_token_file_that_cannot_be_read(broker: Broker, tmp_path: Path) -> None:
    done = broker.idemq("ping", IDEMQ_TOKEN_FILE=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (errors.CONFIGURATION, 1)
    assert f"IDEMQ_TOKEN_FILE '{tmp_path}' cannot be read" in done.stderr


def test_a_token_that_cannot_be_read_is_named_when_it_is_missed(tmp_path: Path) -> None:
    place = tmp_path / "idemq-data"
    (place / ADMIN_TOKEN_FILE).mkdir(parents=True)  # reading a directory fails, also for root
    with serving(tmp_path / "data", IDEMQ_TOKEN="secret") as broker:
        done = broker.idemq("ping", IDEMQ_DATA_DIR=str(place))
        assert done.returncode == errors.AUTH
        assert f"The token in {place / ADMIN_TOKEN_FILE} cannot be read" in done.stderr
    with serving(tmp_path / "other") as broker:
        assert broker.idemq("ping", IDEMQ_DATA_DIR=str(place)).returncode == 0


def test_the_token_of_this_machine_is_not_sent_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDEMQ_TOKEN", "IDEMQ_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IDEMQ_DATA_DIR", str(tmp_path))
    (tmp_path / ADMIN_TOKEN_FILE).write_text("secret")
    args: Any = SimpleNamespace(token=None)
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert reach._token(args, Address(f"idemq://{host}")) == ("secret", "")
    for host in ("192.0.2.1", "example.org", "[2001:db8::1]", "localhost.example.org"):
        assert reach._token(args, Address(f"idemq://{host}")) == (None, "")


def test_78_configuration(tmp_path: Path) -> None:
    done = idemq_command("serve", "--data-dir", str(tmp_path / "data"), IDEMQ_PROT="1")
    assert done.returncode == errors.CONFIGURATION
    assert "IDEMQ_PORT" in done.stderr
    with serving(tmp_path / "data"):
        ports = ["--port", "0", "--http-port", "0"]
        done = idemq_command("serve", *ports, "--data-dir", str(tmp_path / "data"))
        assert done.returncode == errors.CONFIGURATION
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_130_ctrl_c_and_143_sigterm_are_quiet(broker: Broker, topic: str, number: signal.Signals, code: int) -> None:
    broker.lines("pub", topic, "x")
    for argv in (["sub", topic], ["pub", topic]):
        with broker.popen(*argv) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdin is not None
            if argv[0] == "sub":
                assert process.stdout.readline() == b"x\n"
            else:
                process.stdin.write(b"x\n")
                process.stdin.flush()
                wait_for(lambda: len(broker.lines("sub", topic, "--exit-at-end")) == 2)
            process.send_signal(number)
            assert process.wait(SECONDS_MAX) == code
            assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_a_load_says_that_the_broker_is_away_and_on_ctrl_c_how_far_it_came(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as broker:
        broker.lines("topic", "create", "t")
        with broker.popen("pub", "t", "--producer", "p") as load:
            assert load.stdin is not None
            assert load.stderr is not None
            load.stdin.write(b"one\ntwo\n")
            load.stdin.flush()
            wait_for(lambda: broker.last_seq("p") == 1)
            broker.process.kill()
            broker.process.wait(SECONDS_MAX)
            assert load.stderr.readline() == b"The broker does not answer: waiting for it.\n"
            load.send_signal(signal.SIGINT)
            assert load.wait(SECONDS_MAX) == 130
            said = load.stderr.read().decode()
    assert said == "Stored: at least 2 lines. The same command with the same input goes on behind what is stored.\n"


def test_a_reader_that_has_enough_ends_it_quietly(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="x" * 1000 + "\n" + "y\n" * 200_000)
    with broker.popen("sub", topic) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"x" * 1000 + b"\n"
        process.stdout.close()
        assert process.wait(SECONDS_MAX) == 0
        assert process.stderr.read() == b""
    reading, writing = os.pipe()
    os.close(reading)
    for argv in (["topic", "ls"], ["sub", topic, "-n", "1"], ["--help"]):
        with broker.popen(*argv, stdout=writing) as process:
            assert process.stderr is not None
            assert (process.stderr.read(), process.wait(SECONDS_MAX)) == (b"", 0)
    os.close(writing)


def test_every_exception_has_its_exit_code() -> None:
    kinds = [one for one in vars(idemq).values() if isinstance(one, type) and issubclass(one, idemq.IdemqError)]
    assert len(kinds) > 20
    expected = {
        idemq.ProducerFenced: 3,
        idemq.ConnectionLost: 69,
        idemq.RetriableError: 75,
        idemq.BrokerBusy: 75,
        idemq.StoreFull: 75,
        idemq.QuotaExceeded: 75,
        idemq.OutcomeUnknown: 75,
        idemq.AuthError: 77,
        idemq.PermissionDenied: 77,
        idemq.InvalidRequest: 2,
        idemq.Unsupported: 2,
    }
    for kind in kinds:
        explained = errors.explain(kind("Something."))
        assert explained is not None
        assert explained[1] == expected.get(kind, 1), kind
        assert explained[0].startswith("Something. ")
        assert ".." not in explained[0]
    assert errors.explain(ValueError("a bug")) is None
    assert errors.explain(FileNotFoundError(2, "No such file", "x")) == ("No such file: x.", 1)


# ------------------------------------------------------------------------------------------------------ printing


def in_terminal(broker: Broker, *argv: str, typed: bytes = b"", columns: int = 200) -> tuple[int, str]:
    """(exit code, what the terminal shows) of a command on a pseudo-terminal."""
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*CLI, *argv], environment(IDEMQ_URL=broker.url, COLUMNS=str(columns)))
    os.write(master, typed)
    shown = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:  # the terminal's last process has gone
            break
        if not data:
            break
        shown += data
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode().replace("\r\n", "\n")


def test_one_table_in_a_pipe_on_a_terminal_and_as_json(broker: Broker, topic: str) -> None:
    broker.lines("topic", "alter", topic, "--partitions", "3", "--retention", "7d")
    broker.lines("pub", topic, input="".join(f"{number}\n" for number in range(1500)))
    bytes_stored = sum(one["bytes"] for one in broker.json("topic", "describe", topic)["partitions"])
    assert f"{topic}\t3\t1500\t{bytes_stored}\t604800\t-" in broker.lines("topic", "ls")
    code, shown = in_terminal(broker, "topic", "ls")
    assert code == 0
    header, *rows = shown.splitlines()
    assert header.split() == ["name", "partitions", "messages", "bytes", "retention", "retention_bytes"]
    (row,) = [row for row in rows if row.startswith(f"{topic} ")]
    assert row.index("3 ") + 1 == header.index("partitions") + len("partitions")
    assert row.index("1,500") + 5 == header.index("messages") + len("messages")
    assert row.index("7d") == header.index("retention")
    (entry,) = [entry for entry in broker.json("topic", "ls") if entry["name"] == topic]
    assert (entry["partitions"], entry["messages"], entry["retention"]) == (3, 1500, 604800.0)


def test_every_command_speaks_json(broker: Broker, topic: str) -> None:
    assert broker.json("ping").keys() == {"answered_ms", "broker_time"}
    assert broker.json("topic", "create", f"{topic}-2", "--retention-bytes", "1GiB")["retention_bytes"] == 1 << 30
    assert broker.json("topic", "alter", topic, "--retention", "1h")["retention"] == 3600.0
    receipt = broker.json("pub", topic, "x", "-k", "k")
    assert (receipt["topic"], receipt["offset"], receipt["duplicate"]) == (topic, 0, False)
    assert broker.json("pub", topic, input="1\n2\n") == {"stored": 2, "duplicates": 0}
    assert broker.json("pub", topic, "--producer", topic, input="1\n2\n") == {
        "stored": 2,
        "duplicates": 0,
        "last_seq": 1,
    }
    assert broker.json("topic", "describe", topic)["partitions"][0]["next"] == 5
    assert topic in {one["name"] for one in broker.json("topic", "ls")}
    described = broker.json("producer", "describe", topic)
    assert described["last_seq"] == 1
    assert described["last_holder"]
    assert topic in {one["name"] for one in broker.json("producer", "ls")}
    assert broker.json("healthcheck", "--url", broker.url) == {"status": "healthy"}


def test_fields_in_a_pipe_are_names_and_values(broker: Broker, topic: str) -> None:
    assert broker.lines("pub", topic, "--producer", topic, input="1\n") == ["stored\t1", "duplicates\t0", "last_seq\t0"]
    assert broker.lines("topic", "describe", topic)[-1].split("\t")[:4] == ["partition", "0", "0", "1"]


def test_what_others_named_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    args: Any = SimpleNamespace(json=False)
    output.table(args, ("name", "holder"), [["a\tb", "evil\x1b[2J\nx"]])
    assert capsys.readouterr().out == "a\\tb\tevil\\x1b[2J\\nx\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_cut_to_the_width_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    progress = output.Progress("lines")
    for columns, count, expected in (
        (20, 1000, "1,000 lines, 1,000/"),
        (80, 1000, "1,000 lines, 500/s, much that is told of them"),
        (80, 1, "1 line, 0/s, much that is told of them"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        now += 1.0
        progress.update(count, extra="much that is told of them")
        shown = sys.stderr.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
        assert shown == f"{expected}\x1b[K"
        assert len(expected) < columns


def test_a_paragraph_has_lines_of_the_width_on_a_terminal_and_one_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    for stream, expected in (
        (Terminal(), "Seen --without-dedup and\nthen idemq\\x1b.\n"),
        (io.StringIO(), "Seen --without-dedup and then idemq\\x1b.\n"),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        output.tell("Seen --without-dedup and then idemq\x1b.")
        assert stream.getvalue() == expected


def test_progress_shows_rate_and_time_left_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    for stream, expected in ((Terminal(), "\r2,000 lines, 1,000/s, 25%, 0:06 left\x1b[K\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        now = 100.0
        with output.Progress("lines", 8000) as progress:
            now = 100.01
            progress.update(10)  # too soon to be read
            now = 102.0
            progress.update(2000)
        assert stream.getvalue() == expected


# ------------------------------------------------------------------------------------------------ destructive verbs


@pytest.mark.parametrize("verb", ["purge", "rm"])
def test_what_destroys_asks_first(broker: Broker, topic: str, verb: str) -> None:
    def messages() -> int | None:
        return {one["name"]: one["messages"] for one in broker.json("topic", "ls")}.get(topic)

    broker.lines("pub", topic, "x")
    done = broker.idemq("topic", verb, topic)
    assert done.returncode == errors.USAGE
    assert f"topic {topic}: 1 message, " in done.stderr
    assert "--yes" in done.stderr
    code, shown = in_terminal(broker, "topic", verb, topic, typed=b"n\n")
    assert (code, messages()) == (errors.FAILURE, 1)
    assert "Nothing was changed" in shown
    code, _ = in_terminal(broker, "topic", verb, topic, typed=b"\n")
    assert (code, messages()) == (errors.FAILURE, 1)
    code, _ = in_terminal(broker, "topic", verb, topic, typed=b"y\n")
    assert (code, messages()) == (0, 0 if verb == "purge" else None)
    if verb == "rm":
        assert broker.idemq("topic", "rm", topic, "--yes").returncode == errors.FAILURE


def test_what_is_done_to_what_is_gone_is_said_as_json(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, "--producer", topic, input="1\n")
    broker.lines("sub", topic, "-g", topic, "-n", "1")
    assert broker.json("group", "rm", topic, "--yes") == {"deleted": topic}
    assert broker.json("producer", "rm", topic, "--yes") == {"deleted": topic}
    assert broker.json("topic", "purge", topic, "--yes") == {"purged": topic}
    assert broker.json("topic", "rm", topic, "--yes") == {"deleted": topic}


def test_forgetting_a_producer_asks_and_says_what_it_costs(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, "--producer", "forget-me", input="1\n2\n")
    done = broker.idemq("producer", "rm", "forget-me")
    assert done.returncode == errors.USAGE
    assert "last number 1" in done.stderr
    assert broker.last_seq("forget-me") == 1
    broker.lines("producer", "rm", "forget-me", "--yes")
    assert broker.last_seq("forget-me") == -1


# ---------------------------------------------------------------------------------------------------- dead letters


@pytest.fixture
def dead(broker: Broker, topic: str) -> str:
    """A topic with the dead letters of `topic`: 0, 1, 2; their keys are k0, k1, k2."""
    name = f"{topic}.dlq"
    broker.lines("topic", "create", name)
    for number in range(3):
        broker.lines("pub", topic, "-k", f"k{number}", str(number))

    async def fail(message: idemq.Message, tx: idemq.Transaction) -> None:
        raise ValueError(f"no customer {message.value.decode()}\x1b[2J")

    async def work() -> None:
        policy = idemq.RetryPolicy(max_attempts=1, dead_letter=name)
        async with idemq.connect(broker.url) as mq, mq.subscribe(topic, group="mail", retry=policy) as sub:
            await sub.process(fail, until_idle=0.2)

    asyncio.run(work())
    return name


def test_dead_letters_are_listed_shown_requeued_and_dropped(broker: Broker, topic: str, dead: str) -> None:
    rows = broker.json("dlq", "ls", dead)
    assert [(one["place"], one["topic"], one["partition"], one["offset"]) for one in rows] == [
        (f"0:{number}", topic, 0, number) for number in range(3)
    ]
    assert rows[1].keys() >= {"time", "group", "attempts", "error", "reason"}
    assert (rows[1]["group"], rows[1]["attempts"], rows[1]["error"]) == ("mail", 1, "ValueError")
    line = broker.lines("dlq", "ls", dead)[1].split("\t")
    assert (line[0], line[2:8]) == ("0:1", [topic, "0", "1", "mail", "1", "ValueError"])
    assert line[8] == "no customer 1\\x1b[2J", "what comes from elsewhere steers no terminal"
    code, shown = in_terminal(broker, "dlq", "ls", dead)
    assert (code, "reason" in shown, "\x1b[2J" in shown) == (0, True, False)

    one = broker.json("dlq", "show", dead, "0:2")
    assert (one["key"], one["value"], one["headers"], one["place"]) == ("k2", "2", {}, "0:2")
    assert one["traceback"].splitlines()[0].startswith("Traceback")
    assert "traceback\tTraceback" in broker.lines("dlq", "show", dead, "0:2")[-1]
    code, shown = in_terminal(broker, "dlq", "show", dead, "0:2")
    assert (code, "\x1b[2J" in shown) == (0, False)
    assert "ValueError: no customer 2" in shown.splitlines()[-1]

    assert broker.json("dlq", "requeue", dead, "0:1") == {"requeued": 1}
    done = broker.idemq("dlq", "requeue", dead, "0:1")
    assert done.returncode == errors.FAILURE
    assert "no dead letter 0:1" in done.stderr
    assert broker.idemq("dlq", "show", dead, "0:1").returncode == errors.FAILURE
    back = broker.json("sub", topic, "--from", "3", "-n", "1")
    assert (back["value"], back["key"], back["headers"]) == ("1", "k1", {})

    done = broker.idemq("dlq", "drop", dead, "0:0")
    assert done.returncode == errors.USAGE
    assert "This drops 1 message of" in done.stderr
    assert f"This drops 2 messages of {dead}" in broker.idemq("dlq", "drop", dead, "--all").stderr
    for places in (["0:0", "0:1"], ["0:9"], ["1:0"]):  # what is not there (any more) is not asked about
        done = broker.idemq("dlq", "drop", dead, *places)
        assert (done.returncode, done.stderr.count("\n")) == (errors.FAILURE, 1)
        assert f"no dead letter {places[-1]} in {dead} (any more)" in done.stderr
    code, _ = in_terminal(broker, "dlq", "drop", dead, "0:0", typed=b"n\n")
    assert (code, len(broker.json("dlq", "ls", dead))) == (errors.FAILURE, 2)
    assert broker.json("dlq", "drop", dead, "0:0", "--yes") == {"dropped": 1}
    assert broker.lines("dlq", "requeue", dead, "--all") == ["requeued\t1"]
    assert broker.json("dlq", "drop", dead, "--all") == {"dropped": 0}, "about nothing nobody is asked"
    assert broker.lines("dlq", "ls", dead) == []
    assert len(broker.lines("sub", topic, "--exit-at-end")) == 5


def test_what_dlq_refuses(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, "no dead letter")
    for argv in (["requeue", topic], ["drop", topic, "--yes"], ["requeue", topic, "0:0", "--all"]):
        done = broker.idemq("dlq", *argv)
        assert done.returncode == errors.USAGE
        assert "--all" in done.stderr
    assert "'7' is no PARTITION:OFFSET" in broker.idemq("dlq", "show", topic, "7").stderr
    drops = ["drop", "0:0"], ["drop", "--all"]
    for argv in (["show", "0:0"], ["requeue", "0:0"], *drops, *([*argv, "--yes"] for argv in drops)):
        done = broker.idemq("dlq", argv[0], topic, *argv[1:])
        assert (done.returncode, done.stdout) == (errors.FAILURE, "")
        assert f"message 0:0 of '{topic}' is no dead letter: it does not say where it came from" in done.stderr
    done = broker.idemq("dlq", "ls", topic, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert f"Not listed: 1 message of {topic}" in done.stderr
    broker.lines("pub", topic, "nor this")
    assert f"Not listed: 2 messages of {topic}" in in_terminal(broker, "dlq", "ls", topic)[1]
    for argv in (["ls"], ["drop", "--all"], ["drop", "0:0"]):
        done = broker.idemq("dlq", argv[0], "nix", *argv[1:])
        assert (done.returncode, "there is no topic 'nix'" in done.stderr) == (errors.FAILURE, True)


def test_a_topic_that_exists_is_answered_with_options_of_the_command(broker: Broker, topic: str) -> None:
    done = broker.idemq("topic", "create", topic)
    assert done.returncode == errors.FAILURE
    assert "--exist-ok" in done.stderr
    done = broker.idemq("topic", "create", topic, "--exist-ok", "--partitions", "2")
    assert done.returncode == errors.FAILURE
    assert "idemq topic alter" in done.stderr
    assert "exist_ok" not in done.stderr
    assert broker.lines("topic", "create", topic, "--exist-ok")


def test_partitions_never_get_fewer(broker: Broker, topic: str) -> None:
    for count in (3, 3):
        assert broker.json("topic", "alter", topic, "--partitions", str(count))["partitions"] == 3
    done = broker.idemq("topic", "alter", topic, "--partitions", "2", "--retention", "7d")
    assert done.returncode == errors.USAGE
    assert "a topic's partitions never get fewer: 3 now" in done.stderr
    assert broker.json("topic", "describe", topic)["retention"] is None


def test_more_partitions_move_keys_which_is_said_where_there_are_messages(broker: Broker, topic: str) -> None:
    assert broker.lines("topic", "alter", topic, "--partitions", "2")
    broker.lines("pub", topic, "-k", "k", "1")
    assert broker.lines("topic", "alter", topic, "--partitions", "2", "--retention", "7d")
    done = broker.idemq("topic", "alter", topic, "--partitions", "3")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "Keys lead to other partitions from now on" in done.stderr


def test_anonymous_producers_are_listed_when_asked_for(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, "1")
    broker.lines("pub", topic, "--producer", topic, input="1\n")
    everyone = [one["name"] for one in broker.json("producer", "ls", "--all")]
    hidden = sum(name.startswith("~") for name in everyone)
    assert hidden
    assert [one["name"] for one in broker.json("producer", "ls")] == [one for one in everyone if one[0] != "~"]
    assert f"Not listed: {hidden:,} anonymous producer" in in_terminal(broker, "producer", "ls")[1]
    assert "Not listed" not in in_terminal(broker, "producer", "ls", "--all")[1]


def test_what_is_advised_fits_the_command(broker: Broker, topic: str) -> None:
    for argv, says in (
        (["topic", "rm", "nope", "--yes"], "Check the topic's name (idemq topic ls)"),
        (["topic", "create", "no spaces"], "idemq: name may not be 'no spaces'"),
    ):
        assert says in broker.idemq(*argv).stderr
    broker.lines("topic", "alter", topic, "--partitions", "2")
    broker.lines("pub", topic, "-k", "d", "1")
    empty = next(one["index"] for one in broker.json("topic", "describe", topic)["partitions"] if not one["next"])
    said = broker.idemq("sub", topic, "--from", "1").stderr
    assert f"partition {empty} of topic '{topic}' ends at 0, before 1: give an offset that each partition has" in said


def test_alter_changes_what_is_named_and_nothing_else(broker: Broker, topic: str) -> None:
    broker.lines("topic", "alter", topic, "--retention", "7d", "--retention-bytes", "1GiB")
    altered = broker.json("topic", "alter", topic, "--partitions", "2")
    assert (altered["partitions"], altered["retention"], altered["retention_bytes"]) == (2, 604800.0, 1 << 30)
    altered = broker.json("topic", "alter", topic, "--retention", "none")
    assert (altered["partitions"], altered["retention"], altered["retention_bytes"]) == (2, None, 1 << 30)


# ----------------------------------------------------------------------------------------------------- pub and sub


def test_lines_are_messages_byte_for_byte(broker: Broker, topic: str) -> None:
    lines = [b"", b"one", b" two ", b"\xff\x00", b"crlf\r", "ü".encode()]
    done = broker.idemq("pub", topic, "-", input=b"\n".join(lines))
    assert "The last line has no line end" in done.stderr
    with broker.popen("sub", topic, "--exit-at-end") as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"".join(line + b"\n" for line in lines)


def test_messages_as_json_lines(broker: Broker, topic: str) -> None:
    async def send() -> None:
        async with idemq.connect(broker.url) as mq:
            await mq.send(topic, b"\xff", key="ü".encode(), headers={"text": b"a", "bytes": b"\xfe"})

    asyncio.run(send())
    broker.lines("pub", topic, "-k", "k", "--producer", "json-lines", input="text\n")
    before = int(time.time() * 1000)
    first, second = map(json.loads, broker.lines("sub", topic, "--exit-at-end", "--json"))
    assert first.keys() >= {"topic", "partition", "offset", "key", "value", "headers", "timestamp", "seq", "uid"}
    assert (first["topic"], first["partition"], first["offset"], first["seq"]) == (topic, 0, 0, 0)
    assert (base64.b64decode(first["value"]), first["value_base64"], first["key"]) == (b"\xff", True, "ü")
    assert first["headers"] == {"text": "a", "bytes": "/g==", "bytes_base64": True}
    assert 0 <= before - first["timestamp"] < 3_600_000
    assert (second["value"], second["key"], second["headers"]) == ("text", "k", {})
    assert "value_base64" not in second
    assert len({first["uid"], second["uid"]}) == 2


def test_where_to_read_from_and_when_to_end(broker: Broker, topic: str) -> None:
    assert broker.lines("sub", topic, "--exit-at-end") == []
    broker.lines("pub", topic, input="0\n1\n2\n")
    assert broker.lines("sub", topic, "-n", "2") == ["0", "1"]
    assert broker.lines("sub", topic, "-n", "2", "--from", "1") == ["1", "2"]
    assert broker.lines("sub", topic, "-n", "9", "--exit-at-end") == ["0", "1", "2"]
    assert broker.lines("sub", topic, "--exit-at-end", "--from", "latest") == []
    assert broker.lines("sub", topic, "--exit-at-end", "--from", "2000-01-01") == ["0", "1", "2"]
    assert broker.lines("sub", topic, "--exit-at-end", "--from", "2000-01-01T00:00:00+00:00") == ["0", "1", "2"]
    assert broker.lines("sub", topic, "--exit-at-end", "--from", "2100-01-01") == []
    assert broker.idemq("sub", topic, "--from", "4").returncode == errors.USAGE
    with broker.popen("sub", topic, "-n", "1", "--from", "latest") as process:
        assert process.stdout is not None

        def arrived() -> bool:
            broker.lines("pub", topic, "late")
            return process.poll() is not None

        wait_for(arrived)
        assert process.stdout.read() == b"late\n"
        assert process.returncode == 0


def test_reading_to_the_end_does_not_hang_when_the_broker_goes(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as broker:
        broker.lines("topic", "create", "t")
        broker.lines("pub", "t", input="x" * 10_000 + "\n" + "y" * 999 + "\n")
        broker.lines("pub", "t", input=("z" * 999 + "\n") * 40_000)  # more than is read ahead
        with broker.popen("sub", "t", "--exit-at-end", "--timeout", "1") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert len(process.stdout.readline()) == 10_001
            broker.process.kill()
            broker.process.wait(SECONDS_MAX)
            process.stdout.read()
            assert process.wait(SECONDS_MAX) == errors.UNREACHABLE
            assert "did not come within 1 s" in process.stderr.read().decode()


def test_a_line_beyond_the_limit_is_refused_and_those_before_it_are_stored(broker: Broker, topic: str) -> None:
    done = broker.idemq("pub", topic, "--producer", topic, input=b"one\ntwo\n" + b"x" * (9 << 20))
    assert done.returncode == errors.FAILURE
    assert "line 3 is longer than" in done.stderr
    assert done.stderr.endswith(
        "8388608 bytes. Split it, or store it elsewhere and send where: no setting changes the limit. (TOO_LARGE)\n"
    )
    assert broker.lines("sub", topic, "--exit-at-end") == ["one", "two"]


def test_a_name_used_for_another_input_is_told(broker: Broker, topic: str) -> None:
    name = f"{topic}-p"
    assert broker.json("pub", topic, "-", "--producer", name, input="1\n2\n3\n")["stored"] == 3
    done = broker.idemq("pub", topic, "--producer", name, input="1\n2\n3\n4\n")
    assert done.returncode == 0
    assert f"{name} had already sent 3 lines (last_seq 2): as many at the start of this input" in done.stderr
    assert "One producer name belongs to one input" in done.stderr
    for shorter, lines in (("a\nb\n", "2 lines"), ("a\n", "1 line"), ("", "0 lines")):
        done = broker.idemq("pub", topic, "--producer", name, input=shorter)
        assert (done.returncode, done.stdout) == (errors.USAGE, "")
        assert f"This input has {lines}, and {name} had sent 4" in done.stderr
    assert broker.lines("sub", topic, "--exit-at-end") == ["1", "2", "3", "4"]


@pytest.mark.parametrize("lines", ["1\n", ""])
def test_a_load_that_fails_at_once_says_only_why(broker: Broker, lines: str) -> None:
    done = broker.idemq("pub", "nix", input=lines)
    assert (done.returncode, done.stderr.count("\n")) == (errors.FAILURE, 1)
    assert done.stderr.startswith("idemq: there is no topic 'nix'")


def test_a_numbered_load_killed_again_and_again_is_exact(
    broker: Broker, topic: str, flights: list[bytes], tmp_path: Path
) -> None:
    seed = 20130101
    random = Random(seed)
    source = tmp_path / "flights.csv"
    source.write_bytes(b"".join(line + b"\n" for line in flights))
    kills = 0
    for _ in range(6):
        before = broker.last_seq(topic)
        with source.open("rb") as stdin, broker.popen("pub", topic, "--producer", topic, stdin=stdin) as load:
            # Killed as soon as something new is stored, and a moment later: what else is in the air is anybody's guess.
            wait_for(lambda: broker.last_seq(topic) > before or load.poll() is not None)  # noqa: B023
            time.sleep(random.uniform(0, 0.02))
            kills += load.poll() is None
            load.kill()
    assert kills
    with source.open("rb") as stdin, broker.popen("pub", topic, "--producer", topic, "--json", stdin=stdin) as load:
        assert load.stdout is not None
        summary = json.load(load.stdout)
        assert load.wait(SECONDS_MAX) == 0
    assert summary["stored"] + summary["duplicates"] == len(flights)
    assert summary["duplicates"] > 0
    assert summary["last_seq"] == len(flights) - 1
    with broker.popen("sub", topic, "--exit-at-end") as process:
        assert process.stdout is not None
        assert process.stdout.read() == source.read_bytes()


def test_lines_typed_at_a_terminal_end_with_ctrl_d(broker: Broker, topic: str) -> None:
    code, shown = in_terminal(broker, "pub", topic, typed=b"one\ntwo\n\x04")
    assert code == 0
    assert "Ctrl-D ends" in shown
    assert "\nstored      2\n" in shown
    assert broker.lines("sub", topic, "--exit-at-end") == ["one", "two"]


def test_lines_are_sent_as_they_come(broker: Broker, topic: str) -> None:
    with broker.popen("pub", topic) as process:
        assert process.stdin is not None
        for number in range(3):
            process.stdin.write(b"%d\n" % number)
            process.stdin.flush()
            wait_for(lambda: len(broker.lines("sub", topic, "--exit-at-end")) == number + 1)  # noqa: B023
        process.stdin.close()
        assert process.wait(SECONDS_MAX) == 0


# ---------------------------------------------------------------------------------------------------------- groups


def committed(broker: Broker, group: str) -> dict[int, int]:
    """{partition: next} of a group that reads one topic."""
    return {one["partition"]: one["next"] for one in broker.json("group", "describe", group)["offsets"]}


@contextmanager
def unread(broker: Broker, *argv: str) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """(a command, its output) once nobody having read it has filled the pipe."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as output, broker.popen(*argv, stdout=writing) as process:
        wait_for(lambda: not select.select([], [writing], [], 0)[1])
        os.close(writing)
        yield process, output


def test_a_group_goes_on_behind_what_was_printed(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="".join(f"{number}\n" for number in range(5000)))
    assert broker.lines("sub", topic, "-g", topic, "-n", "3") == ["0", "1", "2"]
    assert committed(broker, topic) == {0: 3}
    (one,) = broker.lines("sub", topic, "-g", topic, "-n", "1", "--json")
    assert (json.loads(one)["value"], json.loads(one)["offset"]) == ("3", 3)
    rest = broker.lines("sub", topic, "-g", topic, "--exit-at-end")
    assert rest == [str(number) for number in range(4, 5000)]
    assert broker.lines("sub", topic, "-g", topic, "--exit-at-end", "--from", "earliest") == []
    assert broker.lines("sub", topic, "-g", f"{topic}-2", "--exit-at-end", "--from", "4999") == ["4999"]
    assert broker.json("group", "describe", topic)["lag"] == 0


def test_what_was_not_printed_is_not_committed(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="y\n" * 100_000)
    reading, writing = os.pipe()
    os.close(reading)
    with broker.popen("sub", topic, "-g", topic, stdout=writing) as process:
        os.close(writing)
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait(SECONDS_MAX)) == (b"", 0)
    assert committed(broker, topic) == {0: 0}
    # Ctrl-C while its reader takes its time.
    with unread(broker, "sub", topic, "-g", topic) as (process, output):
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS_MAX) == 130
        printed = output.read().count(b"\n")
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert 0 < committed(broker, topic)[0] <= printed < 100_000


def test_a_reader_that_ends_leaves_behind_no_more_than_the_pipe_held(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="y\n" * 100_000)
    with unread(broker, "sub", topic, "-g", topic) as (process, output):
        (printed,) = struct.unpack("i", fcntl.ioctl(output, termios.FIONREAD, bytes(4)))
        assert os.read(output.fileno(), 6) == b"y\n" * 3
        output.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait(SECONDS_MAX)) == (b"", 0)
    assert 0 < 2 * committed(broker, topic)[0] <= printed
    assert "what its reader leaves there" in " ".join(broker.idemq("sub", "--help").stdout.split())


@run
async def test_a_reader_that_takes_its_time_does_not_hold_up_heartbeats() -> None:
    reading, writing = os.pipe()
    data = os.urandom(1 << 20)
    printing = asyncio.create_task(sub._write(writing, data))
    await eventually(lambda: not select.select([], [writing], [], 0)[1])
    for _ in range(3):
        await asyncio.sleep(0.01)  # others have their turn
        assert not printing.done()
    with os.fdopen(reading, "rb") as output:
        assert await asyncio.to_thread(output.read, len(data)) == data
    await printing
    os.close(writing)


def test_printed_and_then_sought_elsewhere_is_told_and_printed_again(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="".join(f"{number}\n" for number in range(50_000)))
    with unread(broker, "sub", topic, "-g", topic) as (process, output):
        broker.lines("group", "seek", topic, topic, "--to", "49990", "--yes")
        printed = b""
        while not printed.endswith(b"\n49999\n"):
            data = output.read1()
            assert data, "it ended"
            printed += data
        wait_for(lambda: committed(broker, topic) == {0: 50_000})
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS_MAX) == 130
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert said.count("\n") == 1
    assert "what was printed of it here may be printed again" in said
    assert b"\n40000\n" not in printed


def test_the_end_of_a_group_is_where_all_its_members_are(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="1\n2\n")

    async def other() -> None:
        async with idemq.connect(broker.url) as mq, mq.subscribe(topic, group=topic) as sub:
            await anext(aiter(sub))
            with broker.popen("sub", topic, "-g", topic, "--exit-at-end") as process:
                await asyncio.to_thread(wait_for, lambda: len(broker.json("group", "describe", topic)["members"]) == 2)
                await sub.close()  # it leaves, and has committed nothing
                assert process.stdout is not None
                assert await asyncio.to_thread(process.stdout.read) == b"1\n2\n"
                assert process.wait(SECONDS_MAX) == 0

    asyncio.run(other())


def test_the_broker_goes_and_comes_back(tmp_path: Path, free_port: int) -> None:
    def line() -> str:
        assert process.stderr is not None
        return process.stderr.readline().decode()

    with serving(tmp_path / "data", "--port", str(free_port)) as broker:
        broker.lines("topic", "create", "t")
        broker.lines("pub", "t", input="y\n" * 50_000)
        reads = ["sub", "t", "-g", "g", "--timeout", "1"]
        with unread(broker, *reads, "-n", "50001") as (process, output), ThreadPoolExecutor(1) as thread:
            broker.process.kill()
            broker.process.wait(SECONDS_MAX)
            printed = thread.submit(output.read)  # there is something to be committed, and nobody to take it
            assert line() == "The broker does not answer: waiting for it.\n"
            with serving(tmp_path / "data", "--port", str(free_port)) as again:
                assert line() == "The broker is back.\n"
                again.lines("pub", "t", "late")
                assert process.wait(SECONDS_MAX) == 0
                assert printed.result() == b"y\n" * 50_000 + b"late\n"
                assert line() == ""
                assert committed(again, "g") == {0: 50_001}


def test_groups_are_listed_and_described(broker: Broker, topic: str) -> None:
    broker.lines("topic", "alter", topic, "--partitions", "2")
    broker.lines("pub", topic, "-k", "k", "-", input="1\n2\n3\n")

    async def member() -> None:
        async with (
            idemq.connect(broker.url, name="worker\x1b[2J") as mq,
            mq.subscribe(topic, group=topic) as sub,
            mq.producer() as p,
        ):
            message = await anext(aiter(sub))
            async with p.transaction() as tx:
                tx.commit_offsets(message, metadata=b"\xff")
            await asyncio.to_thread(while_it_works, message.partition)

    def while_it_works(partition: int) -> None:
        (entry,) = [one for one in broker.json("group", "ls") if one["name"] == topic]
        assert entry == {"name": topic, "topics": [topic], "partitions": 2, "lag": 2, "members": 1}
        described = broker.json("group", "describe", topic)
        (one,) = described["members"]
        assert (one["client"], one["address"].split(":")[0]) == ("worker\x1b[2J", "127.0.0.1")
        assert one["assigned"] == [{"topic": topic, "partition": index} for index in range(2)]
        assert described["offsets"][partition] == {
            "topic": topic,
            "partition": partition,
            "next": 1,
            "lag": 2,
            "attempts": 0,
            "member": one["id"],
            "metadata": "/w==",
            "metadata_base64": True,
        }
        lines = broker.lines("group", "describe", topic)
        assert lines[:3] == [f"name\t{topic}", "lag\t2", "members\t1"]
        assert f"partition\t{topic}\t{partition}\t1\t2\t0\tworker\\x1b[2J\t/w==" in lines
        assert lines[-1].split("\t")[:2] == ["member", "worker\\x1b[2J"]
        code, shown = in_terminal(broker, "group", "describe", topic)
        assert code == 0
        assert "\x1b" not in shown
        assert "held_by" in shown
        done = broker.idemq("group", "rm", topic, "--yes")
        assert done.returncode == errors.FAILURE
        assert "is at work (worker\\x1b[2J): stop its members first" in done.stderr

    asyncio.run(member())
    assert f"{topic}\t{topic}\t2\t2\t0" in broker.lines("group", "ls")
    assert broker.json("group", "describe", topic)["members"] == []


def test_where_a_group_goes_on_is_set(broker: Broker, topic: str) -> None:
    broker.lines("topic", "alter", topic, "--partitions", "2")
    broker.lines("pub", topic, "-k", "d", "-", input="1\n2\n3\n")
    assert len(broker.lines("sub", topic, "-g", topic, "--exit-at-end")) == 3
    seek = ["group", "seek", topic, topic, "--to"]
    for to, next in (("earliest", 0), ("latest", 3), ("2000-01-01", 0), ("2100-01-01", 3)):
        before = committed(broker, topic)
        shown = broker.json(*seek, to, "--yes")
        assert shown == [
            {"topic": topic, "partition": one, "before": before[one], "next": 0 if one else next} for one in range(2)
        ]
    assert broker.lines(*seek, "1", "--partition", "0", "--yes") == [f"{topic}\t0\t3\t1"]
    assert broker.lines("sub", topic, "-g", topic, "--exit-at-end") == ["2", "3"]
    # In no partition, if it lies beyond the end of one: partition 1 is empty.
    for refused, says in ((["2"], "ends at 0, before 2"), (["0", "--partition", "2"], "has partitions 0 .. 1")):
        done = broker.idemq(*seek, *refused, "--yes")
        assert done.returncode == errors.USAGE
        assert says in done.stderr
        assert committed(broker, topic)[0] == 3
    # Nor is asked about a partition that is not there.
    done = broker.idemq(*seek, "0", "--partition", "2")
    assert (done.returncode, "has partitions 0 .. 1, not 2" in done.stderr) == (errors.USAGE, True)


def test_a_seek_tells_what_it_set_and_not_what_a_member_made_of_it(
    broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broker.lines("pub", topic, input="1\n2\n3\n")
    broker.lines("sub", topic, "-g", topic, "--exit-at-end")
    seek = idemq.Client.seek_group

    async def and_then_it_goes_on(mq: idemq.Client, name: str, *args: Any, **more: Any) -> dict[int, int]:
        found = await seek(mq, name, *args, **more)
        await seek(mq, name, topic, "latest")
        return found

    monkeypatch.setattr(idemq.Client, "seek_group", and_then_it_goes_on)
    monkeypatch.setenv("IDEMQ_URL", broker.url)
    assert main(["group", "seek", topic, topic, "--to", "1", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"topic": topic, "partition": 0, "before": 3, "next": 1}]
    assert committed(broker, topic) == {0: 3}


def test_a_group_is_given_its_place_before_anybody_joins_it_if_that_is_what_was_meant(
    broker: Broker, topic: str
) -> None:
    broker.lines("pub", topic, input="1\n2\n3\n")
    broker.lines("topic", "create", f"{topic}-2")
    broker.lines("sub", topic, "-g", topic, "-n", "1")
    for group, where, says in (
        (topic[:-1], topic, f"There is no group {topic[:-1]}: did you mean {topic}? With --create a new one begins"),
        ("zzz", topic, "There is no group zzz. With --create"),
        (topic, f"{topic}-2", f"Group {topic} has no position in topic {topic}-2: with --create"),
        (topic, "nix", "there is no topic 'nix'"),
    ):
        done = broker.idemq("group", "seek", group, where, "--to", "latest", "--yes")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (errors.FAILURE, "", 1)
        assert says in done.stderr
    seek = ["group", "seek", f"{topic}-new", topic, "--to", "2", "--partition", "0", "--create"]
    assert f"group {topic}-new, which is new, to 2 in partition 0" in broker.idemq(*seek).stderr
    assert broker.lines(*seek, "--yes") == [f"{topic}\t0\t-\t2"]
    assert broker.lines("sub", topic, "-g", f"{topic}-new", "--exit-at-end") == ["3"]
    for where, before in ((f"{topic}-2", "-"), (topic, "1")):
        shown = broker.lines("group", "seek", topic, where, "--to", "0", "--create", "--yes")
        assert shown == [f"{where}\t0\t{before}\t0"]


def test_what_moves_or_forgets_a_group_asks_first(broker: Broker, topic: str) -> None:
    broker.lines("pub", topic, input="1\n2\n")
    broker.lines("sub", topic, "-g", topic, "-n", "1")
    for argv, says in (
        (
            ["seek", topic, topic, "--to", "latest"],
            f"sets group {topic} to latest in topic {topic}: messages are skipped",
        ),
        (["rm", topic], f"forgets where group {topic} stands in {topic}, 1 message before the end"),
    ):
        done = broker.idemq("group", *argv)
        assert (done.returncode, done.stdout) == (errors.USAGE, "")
        assert says in done.stderr
        assert "--yes" in done.stderr
        code, shown = in_terminal(broker, "group", *argv, typed=b"n\n")
        assert code == errors.FAILURE
        assert "Nothing was changed" in shown
        assert committed(broker, topic) == {0: 1}
        assert in_terminal(broker, "group", *argv, typed=b"y\n")[0] == 0
        if argv[0] == "seek":
            assert committed(broker, topic) == {0: 2}
            broker.lines("group", "seek", topic, topic, "--to", "1", "--yes")
    done = broker.idemq("group", "rm", topic, "--yes")
    assert (done.returncode, done.stderr.count("\n")) == (errors.FAILURE, 1)
    assert "UNKNOWN_GROUP" in done.stderr


# ----------------------------------------------------------------------------------------------------- healthcheck


def test_healthcheck_asks_the_broker_of_its_environment(broker: Broker, free_port: int) -> None:
    assert idemq_command("healthcheck", IDEMQ_HTTP_PORT=str(broker.http_port), IDEMQ_HOST="0.0.0.0").returncode == 0
    done = idemq_command("healthcheck", IDEMQ_HTTP_PORT=str(free_port))
    assert done.returncode == 1
    assert "Not healthy" in done.stderr
    assert idemq_command("healthcheck", IDEMQ_HTTP_PORT="0").returncode == 1
    assert idemq_command("healthcheck", IDEMQ_HTTP_PROT="0").returncode == 1
    assert idemq_command("healthcheck", "--url", broker.url).returncode == 0
    # A URL counts before them, given either way.
    assert idemq_command("healthcheck", IDEMQ_URL=broker.url, IDEMQ_HTTP_PORT=str(free_port)).returncode == 0
    elsewhere = {"IDEMQ_URL": f"idemq://127.0.0.1:{free_port}", "IDEMQ_HTTP_PORT": str(broker.http_port)}
    assert idemq_command("healthcheck", "--timeout", "0.3", **elsewhere).returncode == 1
    done = idemq_command("healthcheck", "--url", f"idemq://127.0.0.1:{free_port}", "--timeout", "0.3")
    assert done.returncode == 1


def test_healthcheck_tells_a_server_that_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [*CLI, "healthcheck"],
            env=environment(IDEMQ_HTTP_PORT=str(listener.getsockname()[1])),
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
                assert process.wait(SECONDS_MAX) == 1
            assert process.stderr is not None
            assert "/healthz answers 503" in process.stderr.read()


def test_serve_says_where_it_listens_and_ends_well(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as broker:
        assert broker.idemq("ping").returncode == 0
        broker.process.terminate()
        assert broker.process.wait(SECONDS_MAX) == 0


# ---------------------------------------------------------------------------------------------------------- verify


def test_verify_clean_in_use_and_damaged(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with serving(directory) as broker:
        broker.lines("topic", "create", "t")
        broker.lines("pub", "t", "--producer", "p", input="a value to be found again\n")
        done = idemq_command("verify", str(directory))
        assert done.returncode == errors.CONFIGURATION
        assert done.stdout == ""
    done = idemq_command("verify", IDEMQ_DATA_DIR=str(directory))
    assert (done.returncode, done.stderr) == (0, "")
    assert {"clean\ttrue", "rows of log\t1", "rows of topics\t1"} <= set(done.stdout.splitlines())
    assert "died" not in done.stdout
    (data,) = directory.rglob("data.mdb")
    data.write_bytes(data.read_bytes().replace(b"a value to be found again", b"A value to be found again"))
    done = idemq_command("verify", str(directory), "--json")
    assert done.returncode == errors.FAILURE
    document = json.loads(done.stdout)
    assert document["clean"] is False
    assert document["findings"][0]["where"].startswith("log ")
    assert "Damaged" in done.stderr
    done = idemq_command("verify", str(directory))
    assert (done.returncode, done.stdout.splitlines()[-1].split("\t")[0]) == (1, document["findings"][-1]["where"])


def test_verify_says_that_damage_killed_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(died="by signal SIGBUS after 0 bytes of the log")
    monkeypatch.setattr("idemq.broker.check.verify", lambda *_: report)
    assert main(["verify", "data"]) == errors.FAILURE
    assert capsys.readouterr().out.splitlines() == ["directory\tdata", "clean\tfalse", f"died\t{report.died}"]
    assert main(["verify", "data", "--json"]) == errors.FAILURE
    assert json.loads(capsys.readouterr().out)["died"] == report.died


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_verify_refuses_what_is_no_data_directory(tmp_path: Path, name: str) -> None:
    done = idemq_command("verify", str(tmp_path / name))
    assert done.returncode == errors.CONFIGURATION
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
