"""Every guard of the protocol is needed: with one removed, the simulator finds it within 100 seeds."""

import pytest

from .mutants import MUTANTS, Mutant, planted
from .world import World

SEEDS = 100


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    with planted(mutant):
        for seed in [*range(mutant.first, SEEDS), *range(mutant.first)]:
            try:
                World(seed).run()
            except Exception:  # noqa: BLE001 - the oracle's Violation, or what broke on the way
                return
    pytest.fail(f"nothing noticed in {SEEDS} seeds: {mutant.name}")
