"""Settings: which source wins, what is refused and how, and who needs a token."""

import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from idemq.broker import config
from idemq.broker.config import SETTINGS, Config, ConfigError, load, parser
from idemq.broker.core import Limits


def refused(argv: Sequence[str], **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv, environ)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_defaults_are_valid_and_documented_ports() -> None:
    loaded = load([], {})
    assert (loaded.host, loaded.port, loaded.http_port) == ("127.0.0.1", 7750, 7751)
    assert (loaded.data_dir, loaded.shutdown_ms_max) == ("./idemq-data", 8000)
    assert loaded.limits == Limits()


def test_every_limit_of_the_core_is_a_setting() -> None:
    missing = {one.name for one in fields(Limits)} - {one.name for one in SETTINGS}
    # K is announced to clients and fixed by the protocol (rule 12): no operator's choice.
    assert missing == {"remembered"}
    changed = load(["--topics-max", "7"], {})
    assert changed.limits.topics_max == 7


def test_flag_over_variable_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "idemq.toml"
    file.write_text("port = 1\nhttp_port = 2\ntopics_max = 3\n")
    loaded = load(["--config", str(file), "--port", "5"], {"IDEMQ_PORT": "4", "IDEMQ_HTTP_PORT": "6"})
    assert (loaded.port, loaded.http_port, loaded.topics_max, loaded.producers_max) == (5, 6, 3, 1_000_000)
    assert loaded.sources == {
        "port": "flag --port",
        "http_port": "IDEMQ_HTTP_PORT",
        "topics_max": f"{file}: topics_max",
    }
    assert load([], {"IDEMQ_CONFIG": str(file)}).port == 1


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("IDEMQ_PROT", "IDEMQ_PORT"),
        ("IDEMQ_TOKENFILE", "IDEMQ_TOKEN_FILE"),
        ("IDEMQ_STORE_MAX", "IDEMQ_STORE_BYTES_MAX"),
    ],
)
def test_an_unknown_variable_names_the_nearest(variable: str, nearest: str) -> None:
    text = refused([], **{variable: "1"})
    assert variable in text
    assert f"nearest is {nearest}" in text


def test_a_table_is_no_setting(tmp_path: Path) -> None:
    file = tmp_path / "idemq.toml"
    file.write_text("[server]\nport = 1\n")
    assert f"[server] in {file} is a table: settings stand in none" in refused(["--config", str(file)])


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "idemq.toml"
    file.write_text("conections_max = 3\n")
    assert "nearest is connections_max" in refused(["--config", str(file)])


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--prot", "1"], {})
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "idemq serve: '--prot' is not expected here: did you mean --port? (see idemq serve --help)\n"
    )


def test_variables_of_the_client_and_of_others_are_left_alone(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("abc\n")
    loaded = load([], {"IDEMQ_URL": "idemq://elsewhere:1", "IDEMQ_TOKEN_FILE": str(secret), "HOME": "/", "IDEMQX": "1"})
    assert loaded.token == "abc"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "70000"], "port must lie in 0 .. 65535, and is 70000 (flag --port)"),
        (["--port", "-1"], "port must lie in"),
        (["--port", "eighty"], "port must be a whole number"),
        (["--port", "1e3"], "port must be a whole number"),
        (["--http-port", "7750"], "port and http_port are both 7750"),
        (["--store-bytes-max", "99999999"], "store_bytes_headroom is"),
        (["--data-dir", ""], "data_dir is empty"),
        (["--token-file", "no such file"], "The secret in no such file cannot be read"),
        (["--config", "no such file"], "The configuration file no such file cannot be read"),
        (["--remembered", "3"], ""),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(argv: list[str], words: str) -> None:
    if not words:
        with pytest.raises(SystemExit):
            load(argv, {})
        return
    assert words in refused(argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = '1'", "port in {file} must be a number"),
        ("port = true", "port in {file} must be a number"),
        ("insecure = 1", "insecure in {file} must be true or false"),
        ("host = 3", "host in {file} must be text"),
        ("port = ", "is not TOML"),
        ("sources = 1", "sources in {file} is no setting"),
        ("token_file = '/no/such/file'", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "idemq.toml"
    file.write_text(text)
    assert words.format(file=file) in refused(["--config", str(file)])


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("No", False), ("", False)])
def test_switches(text: str, value: bool) -> None:
    assert load([], {"IDEMQ_INSECURE": text}).insecure is value


def test_a_switch_is_not_guessed() -> None:
    assert "insecure must be 1 or 0" in refused([], IDEMQ_INSECURE="maybe")
    assert load(["--no-insecure"], {"IDEMQ_INSECURE": "1"}).insecure is False


def test_a_secret_has_one_source_and_some_content(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(" \n")
    assert "is empty" in refused([], IDEMQ_TOKEN_FILE=str(secret))
    secret.write_text("abc")
    assert "both set" in refused([], IDEMQ_TOKEN_FILE=str(secret), IDEMQ_TOKEN="abc")
    assert "longer than" in refused([], IDEMQ_TOKEN="x" * 1025)
    assert load([], {"IDEMQ_TOKEN": "x" * 1024}).token == "x" * 1024
    assert "cannot be printed" in refused([], IDEMQ_TOKEN="a\x07b")
    with pytest.raises(SystemExit):
        load(["--token", "abc"], {})  # it would stand in the process list


def test_help_says_what_a_secrets_file_holds() -> None:
    assert "--token-file FILE file that holds the token that clients must present" in " ".join(
        parser().format_help().split()
    )


def test_to_toml_can_be_read_back_and_hides_secrets(tmp_path: Path) -> None:
    loaded = load(["--host", 'a "quoted" höst', "--insecure"], {"IDEMQ_TOKEN": "hush", "IDEMQ_TOPICS_MAX": "5"})
    text = loaded.to_toml()
    assert "hush" not in text
    assert "hush" not in repr(loaded)
    assert "token is set and hidden  # IDEMQ_TOKEN" in text
    assert "topics_max = 5  # IDEMQ_TOPICS_MAX" in text
    assert "port = 7750  # default" in text
    file = tmp_path / "idemq.toml"
    file.write_text(text)
    assert load(["--config", str(file)], {"IDEMQ_TOKEN": "hush"}) == loaded
    assert set(tomllib.loads(text)) == {one.name for one in SETTINGS} - {"token"}


def run(argv: Sequence[str], **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IDEMQ_")}
    return subprocess.run(
        [sys.executable, "-m", "idemq.broker", *argv],
        env=inherited | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_prints_its_settings_and_its_errors() -> None:
    printed = run(["--print-config", "--port", "0"])
    assert (printed.returncode, printed.stderr) == (0, "")
    assert "port = 0  # flag --port" in printed.stdout
    wrong = run([], IDEMQ_PROT="1")
    assert (wrong.returncode, wrong.stdout) == (78, "")
    assert wrong.stderr == (
        "idemq: The variable IDEMQ_PROT is no setting; the nearest is IDEMQ_PORT. Correct or unset it.\n"
    )
    usage = run(["--no-such-flag"])
    assert (usage.returncode, usage.stdout) == (2, "")


# ------------------------------------------------------------------------------------------------ who needs a token


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_what_counts_as_loopback(host: str, loopback: bool) -> None:
    assert config.is_loopback(host) is loopback


def test_loopback_needs_no_token_unless_one_is_set(tmp_path: Path) -> None:
    assert Config(data_dir=str(tmp_path)).access_token() == ("", "")
    assert Config(data_dir=str(tmp_path), token="abc").access_token() == ("abc", "")
    assert list(tmp_path.iterdir()) == []


def test_the_first_start_beyond_loopback_makes_an_admin_token_once(tmp_path: Path) -> None:
    beyond = Config(host="0.0.0.0", data_dir=str(tmp_path))
    token, notice = beyond.access_token()
    file = tmp_path / "admin.token"
    assert len(token) >= 32
    assert file.read_text().strip() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(file) in notice
    assert token not in notice
    assert beyond.access_token() == (token, "")
    assert [path.name for path in tmp_path.iterdir()] == ["admin.token"]


def test_an_interrupted_first_start_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / "admin.new").write_text("half")
    token, notice = Config(host="0.0.0.0", data_dir=str(tmp_path)).access_token()
    assert notice
    assert (tmp_path / "admin.token").read_text().strip() == token


def test_an_admin_token_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "admin.token"
    file.write_text("")
    beyond = Config(host="0.0.0.0", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="is empty"):
        beyond.access_token()
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="cannot be used"):
        beyond.access_token()


def test_a_set_token_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("file")
    assert Config(host="0.0.0.0", data_dir=str(tmp_path), token="set").access_token() == ("set", "")


def test_insecure_is_loud(tmp_path: Path) -> None:
    token, notice = Config(host="0.0.0.0", data_dir=str(tmp_path), insecure=True).access_token()
    assert token == ""
    assert "WARNING" in notice
    assert "0.0.0.0" in notice
    assert list(tmp_path.iterdir()) == []
