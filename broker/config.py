"""The broker's settings: one frozen dataclass, its units, its limits, and where each value came from.

A value is taken from the flag, else the `IDEMQ_*` variable, else the `--config` TOML file, else the default. A name
that is not known stops start-up and is answered with the nearest one that is: a misspelt limit must not be a limit that
silently does not hold. This file knows no socket, no store and no loop; it reads the environment and two kinds of
file, the TOML and the secret.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import json
import os
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from idemq.client import wire

from .core import Limits

CLIENT_VARIABLES = ("IDEMQ_URL", "IDEMQ_TOKEN", "IDEMQ_TOKEN_FILE")
"""Variables of the client, which shares the broker's environment in a container."""
TOKEN_TEXT_BYTES_MAX = 1024
"""A token travels in Hello, whose frame is small."""

_DEFAULTS = Limits()


class ConfigError(Exception):
    """Start-up stops: a setting is wrong or unknown. The text says what to do. Exit code 78."""


def _number(default: int, low: int, high: int, about: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "about": about})


def _switch(about: str) -> Any:
    return field(default=False, metadata={"about": about})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, valid together once `validate()` has passed."""

    host: str = field(default="127.0.0.1", metadata={"about": "address to listen on; beyond loopback needs a token"})
    port: int = _number(7750, 0, 65535, "port of the wire; 0 picks a free one")
    http_port: int = _number(7751, 0, 65535, "port of health and metrics; 0 picks a free one")
    data_dir: str = field(default=wire.DATA_DIR, metadata={"about": "the store's directory, made if it does not exist"})
    token: str = field(
        default="", repr=False, metadata={"about": "the token that clients must present", "secret": True}
    )
    insecure: bool = _switch("listen beyond loopback without authentication")
    force_filesystem: bool = _switch("accept a network or overlay file system, on which fsync may promise nothing")

    store_bytes_max: int = _number(
        _DEFAULTS.store_bytes_max, 1 << 20, 1 << 46, "size of the store at which appends are refused with STORE_FULL"
    )
    store_bytes_headroom: int = _number(
        _DEFAULTS.store_bytes_headroom, 64 << 10, 1 << 40, "kept free for offsets, trims and deletions"
    )
    group_bytes_max: int = _number(
        _DEFAULTS.group_bytes_max, wire.COMMIT_BYTES_MAX, 1 << 32, "payload that may wait for one group commit"
    )
    topics_max: int = _number(_DEFAULTS.topics_max, 1, 1_000_000, "topics")
    offsets_max: int = _number(_DEFAULTS.offsets_max, 1, 1_000_000_000, "positions of groups, one for each partition")
    group_members_max: int = _number(_DEFAULTS.group_members_max, 1, 100_000, "members of one group")
    member_timeout_ms: int = _number(
        _DEFAULTS.member_timeout_ms, 500, 3_600_000, "a member not heard of for so long is gone"
    )
    release_ms_max: int = _number(
        _DEFAULTS.release_ms_max, 100, 3_600_000, "a member has so long to finish what it must give back"
    )
    producers_max: int = _number(_DEFAULTS.producers_max, 1, 1_000_000_000, "producer names, anonymous ones included")
    connections_max: int = _number(_DEFAULTS.connections_max, 1, 1_000_000, "open client connections")
    fetches_max: int = _number(_DEFAULTS.fetches_max, 1, 128, "fetches that one connection may have waiting")
    anonymous_idle_ms: int = _number(
        _DEFAULTS.anonymous_idle_ms, 60_000, 1 << 40, "after this time without a commit an anonymous producer goes"
    )
    clock_jump_ms: int = _number(
        _DEFAULTS.clock_jump_ms, 1000, 1 << 40, "a wall clock that jumps this far pauses retention and expiry"
    )
    clock_pause_ms: int = _number(_DEFAULTS.clock_pause_ms, 1000, 1 << 40, "how long it pauses them")
    rows_cached_max: int = _number(
        _DEFAULTS.rows_cached_max, 1000, 100_000_000, "producer and offset rows kept in memory"
    )

    handshake_ms_max: int = _number(5000, 10, 3_600_000, "from accepting a connection to its valid Hello")
    frame_ms_max: int = _number(30_000, 10, 3_600_000, "from the first byte of a frame to its last")
    send_stall_ms_max: int = _number(30_000, 10, 3_600_000, "a client that reads nothing for so long is disconnected")
    send_buffer_bytes: int = _number(
        1 << 20, 4 << 10, 1 << 30, "unsent replies of one connection at which the broker stops reading from it"
    )
    receive_bytes_max: int = _number(
        256 << 20, 32 << 20, 1 << 40, "half-received frames of all connections together; more are refused with BUSY"
    )
    requests_max: int = _number(256, 1, 1_000_000, "requests of one connection that may wait for their replies")
    catch_up_bytes_per_s: int = _number(
        64 << 20, 1 << 20, 1 << 40, "reads far behind the tail are slowed to this while others write"
    )
    shutdown_ms_max: int = _number(8000, 100, 3_600_000, "from SIGTERM to the end")

    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Setting -> where its value came from. No setting itself."""

    def validate(self) -> None:
        """Raise ConfigError unless every value, alone and together, makes sense."""
        for one in SETTINGS:
            value = getattr(self, one.name)
            low, high = one.metadata.get("low"), one.metadata.get("high")
            if low is not None and not low <= value <= high:
                raise ConfigError(f"{one.name} must lie in {low} .. {high}, and is {value} ({self._source(one.name)}).")
        if not self.data_dir:
            raise ConfigError(f"data_dir is empty ({self._source('data_dir')}): name a directory.")
        if len(self.token.encode()) > TOKEN_TEXT_BYTES_MAX:
            raise ConfigError(f"token is longer than {TOKEN_TEXT_BYTES_MAX} bytes ({self._source('token')}).")
        if not self.token.isprintable():
            raise ConfigError(f"token has a character that cannot be printed ({self._source('token')}).")
        if self.store_bytes_headroom * 2 > self.store_bytes_max:
            raise ConfigError(
                f"store_bytes_headroom is {self.store_bytes_headroom} and leaves too little of store_bytes_max "
                f"{self.store_bytes_max}: it may be at most half of it."
            )
        if self.port and self.port == self.http_port:
            raise ConfigError(f"port and http_port are both {self.port}: give each its own.")

    def _source(self, name: str) -> str:
        return self.sources.get(name, "default")

    @property
    def limits(self) -> Limits:
        """Those settings that are the core's."""
        return Limits(**{one.name: getattr(self, one.name) for one in fields(Limits) if hasattr(self, one.name)})

    @property
    def path(self) -> Path:
        """The data directory."""
        return Path(self.data_dir)

    def to_toml(self) -> str:
        """All effective values as a `--config` file, each with where it came from; secrets hidden."""
        lines = []
        for one in SETTINGS:
            value = getattr(self, one.name)
            text = json.dumps(value, ensure_ascii=False)  # TOML's strings, integers and booleans are those of JSON
            line = f"{one.name} = {text}"
            if one.metadata.get("secret"):
                line = f"# {one.name} is {'set and hidden' if value else 'not set'}"
            lines.append(f"{line}  # {self._source(one.name)}")
        return "\n".join(lines) + "\n"

    def access_token(self) -> tuple[str, str]:
        """(the token that clients must present, what an operator must be told once); either may be empty.

        Makes the admin token in the data directory, which must exist, when the broker listens beyond loopback and
        there is none. Raises ConfigError when that file cannot be read or written.
        """
        if self.insecure:
            if is_loopback(self.host) and not self.token:
                return "", ""
            return "", (
                f"WARNING: authentication is off (insecure) and the broker listens on {self.host}: whoever reaches it "
                "may read, write and delete everything."
            )
        if self.token or is_loopback(self.host):
            return self.token, ""
        path = self.path / wire.ADMIN_TOKEN_FILE
        try:
            if path.exists():
                token = path.read_text(encoding="utf-8").strip()
                if not token:
                    raise ConfigError(f"{path} is empty: remove it, and the next start makes a new token.")
                return token, ""
            token = secrets.token_urlsafe(32)
            temporary = path.with_suffix(".new")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The admin token {path} cannot be used: {error}. Correct it, or set a token.") from None
        return token, f"Made an admin token in {path}: clients elsewhere need it as IDEMQ_TOKEN."


SETTINGS: tuple[Field[Any], ...] = tuple(one for one in fields(Config) if one.name != "sources")


def is_loopback(host: str) -> bool:
    """Is this address reached from the same machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Flags(argparse.ArgumentParser):
    """argparse's, but what is wrong is one line and names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """End with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags of a command line. SystemExit(2) on one that is not known."""
        known, extra = self.parse_known_args(argv)
        if extra:
            near = difflib.get_close_matches(extra[0].partition("=")[0], list(self._option_string_actions), n=1)
            self.error(f"{extra[0]!r} is not expected here{f': did you mean {near[0]}?' if near else ''}")
        return known


def parser() -> Flags:
    """The flags of `idemq serve`, one for each setting."""
    flags = Flags(
        prog="idemq serve",
        description="Run the broker. Each setting is also a variable (IDEMQ_PORT) and a key of the file (port).",
        allow_abbrev=False,
    )
    flags.add_argument("--config", metavar="FILE", help="a TOML file of settings")
    flags.add_argument("--print-config", action="store_true", help="print the effective settings and end")
    for one in SETTINGS:
        flag = "--" + one.name.replace("_", "-")
        about = one.metadata["about"]
        if one.metadata.get("secret"):
            # A secret in a command line is read by every process of the machine: a file's name is not.
            flags.add_argument(f"{flag}-file", metavar="FILE", help=f"file that holds {about}")
        elif type(one.default) is bool:
            flags.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=about)
        else:
            metavar = "N" if type(one.default) is int else "TEXT"
            flags.add_argument(flag, metavar=metavar, help=f"{about} (default {one.default})")
    return flags


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The valid configuration of a command line. Raises ConfigError; SystemExit(2) on a flag that is not known."""
    return resolve(parser().parse(argv), os.environ if environ is None else environ)


def resolve(flags: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Flags over variables over the file over defaults, validated. Raises ConfigError."""
    given: dict[str, tuple[Any, str]] = {}
    _take_file(flags.config or environ.get("IDEMQ_CONFIG", ""), given)
    _take_variables(environ, given)
    for one in SETTINGS:
        if one.metadata.get("secret"):
            path = getattr(flags, f"{one.name}_file")
            if path is not None:
                given[one.name] = (_secret(path), f"flag --{one.name}-file")
            continue
        value = getattr(flags, one.name)
        if value is not None:
            source = f"flag --{one.name.replace('_', '-')}"
            given[one.name] = (_typed(one, value, source), source)
    config = replace(
        Config(),
        **{name: value for name, (value, _) in given.items()},
        sources={name: source for name, (_, source) in given.items()},
    )
    config.validate()
    return config


def _take_file(path: str, given: dict[str, tuple[Any, str]]) -> None:
    if not path:
        return
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The configuration file {path} is not TOML: {error}.") from None
    known = _names("")
    for key, value in table.items():
        if isinstance(value, dict):
            raise ConfigError(f"[{key}] in {path} is a table: settings stand in none, as port = 7750.")
        if key not in known:
            raise ConfigError(f"{key} in {path} is no setting; the nearest is {_nearest(key, known)}.")
        one, is_file = known[key]
        source = f"{path}: {key}"
        if is_file:
            given[one.name] = (_secret(str(value)), source)
        else:
            if type(value) is not type(one.default):
                kind = {int: "a number", bool: "true or false", str: "text"}[type(one.default)]
                raise ConfigError(f"{key} in {path} must be {kind}, and is {value!r}.")
            given[one.name] = (value, source)


def _take_variables(environ: Mapping[str, str], given: dict[str, tuple[Any, str]]) -> None:
    known = _names("IDEMQ_")
    taken: dict[str, str] = {}
    for variable in sorted(name for name in environ if name.startswith("IDEMQ_")):
        if variable not in known:
            if variable in CLIENT_VARIABLES or variable == "IDEMQ_CONFIG":
                continue
            everything = [*known, *CLIENT_VARIABLES, "IDEMQ_CONFIG"]
            raise ConfigError(
                f"The variable {variable} is no setting; the nearest is {_nearest(variable, everything)}. "
                "Correct or unset it."
            )
        one, is_file = known[variable]
        text = environ[variable]
        if one.name in taken:
            raise ConfigError(f"{taken[one.name]} and {variable} are both set: unset one of them.")
        taken[one.name] = variable
        given[one.name] = (_secret(text) if is_file else _typed(one, text, variable), variable)


def _names(prefix: str) -> dict[str, tuple[Field[Any], bool]]:
    """Every name a setting can be given by -> (setting, does the value name a file that holds it)."""
    names: dict[str, tuple[Field[Any], bool]] = {}
    for one in SETTINGS:
        name = prefix + (one.name.upper() if prefix else one.name)
        names[name] = (one, False)
        if one.metadata.get("secret"):
            names[name + ("_FILE" if prefix else "_file")] = (one, True)
    return names


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _typed(one: Field[Any], text: str | bool, source: str) -> Any:
    """What a flag's or a variable's text means for this setting."""
    assert one.default is not MISSING, "every setting has a default"
    if isinstance(text, bool) or type(one.default) is str:
        return text
    if type(one.default) is bool:
        try:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}[
                text.strip().lower()
            ]
        except KeyError:
            raise ConfigError(f"{one.name} must be 1 or 0, and is {text!r} ({source}).") from None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{one.name} must be a whole number, and is {text!r} ({source}).") from None


def _secret(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The secret in {path} cannot be read: {error}.") from None
    if not text:
        raise ConfigError(f"The secret in {path} is empty.")
    return text
