"""Tests. A package, so that helpers are imported as `tests.…` and `python -m tests.…` runs a checker by hand."""
