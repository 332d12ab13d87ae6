"""The package users import: the client's names, and the version."""

__version__ = "0.1.0"
