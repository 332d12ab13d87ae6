"""The package users import: the client's names, and the version."""

from idemq.client import *  # noqa: F403 - the one place that re-exports, and `client/__init__.py` says what

from . import sync as sync

__version__ = "0.1.0"
