"""The protocol holds for small bounds; each rule removed breaks the property it protects; and the explorer can fail."""

from collections.abc import Iterator
from dataclasses import fields

import pytest

from . import __main__ as command
from .configurations import LARGE, REDUNDANT, REMOVALS, SMALL, UNNEEDED, Removal, model
from .explorer import STUCK, Step, Violation, explore
from .guards import Guards


@pytest.mark.parametrize("name", SMALL)
def test_the_protocol_holds(name: str) -> None:
    result = explore(model(SMALL[name], Guards()))
    assert result.verdict == "holds", "\n".join([result.verdict, *result.trace, str(result.state)])


def without(removal: Removal) -> Guards:
    return Guards(**dict.fromkeys(removal.rules, False))


@pytest.mark.parametrize("name", REMOVALS)
def test_each_rule_is_needed(name: str) -> None:
    result = explore(model(REMOVALS[name].bounds, without(REMOVALS[name])))
    assert result.violation == REMOVALS[name].breaks, "\n".join([result.verdict, *result.trace])


@pytest.mark.parametrize("name", REDUNDANT)
def test_either_of_two_rules_suffices(name: str) -> None:
    result = explore(model(REDUNDANT[name].bounds, without(REDUNDANT[name])))
    assert result.verdict == "holds", "\n".join([result.verdict, *result.trace])


@pytest.mark.parametrize("name", UNNEEDED)
def test_no_property_needs_it(name: str) -> None:
    result = explore(model(UNNEEDED[name].bounds, without(UNNEEDED[name])))
    assert result.verdict == "holds", "\n".join([result.verdict, *result.trace])


def test_every_rule_is_removed_once() -> None:
    removed = {rule for removal in (*REMOVALS.values(), *UNNEEDED.values()) for rule in removal.rules}
    assert removed == {rule.name for rule in fields(Guards)}


class Counter:
    """Counts to three; a fault leads to a state from which only another fault leads back."""

    def __init__(self, broken: int = -1, way_back: bool = True) -> None:
        self.broken = broken
        self.way_back = way_back

    def initial(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[Step]:
        if state == 9:
            yield Step(("back",), not self.way_back, lambda _: 0)
        elif state < 3:
            yield Step(("two", state), False, lambda state: min(state + 2, 3))
            yield Step(("one", state), False, lambda state: state + 1)
            yield Step(("FALL",), True, lambda _: 9)

    def check(self, state: int) -> None:
        if state == self.broken:
            raise Violation("broken")

    def finished(self, state: int) -> bool:
        return state == 3


def test_the_explorer_sees_every_state_once() -> None:
    result = explore(Counter())
    assert (result.verdict, result.states, result.edges) == ("holds", 5, 10)


def test_the_explorer_finds_a_shortest_trace() -> None:
    result = explore(Counter(broken=3))
    assert (result.violation, result.trace) == ("broken", ["two 0", "two 2"])


def test_progress_must_not_need_a_fault() -> None:
    result = explore(Counter(way_back=False))
    assert (result.violation, result.trace, result.state) == (STUCK, ["FALL"], 9)


def test_an_unfinished_exploration_proves_nothing() -> None:
    assert explore(Counter(), states_max=2).verdict == "INCOMPLETE"


def test_the_command_tells_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["restart of the worker"]) == 0
    assert "restart of the worker" in capsys.readouterr().out
    removal = REMOVALS["H13: grants_repeat, sessions_fenced [0]"]
    assert not command.report({"ghost join": removal.bounds}, without(removal))
    assert removal.breaks in capsys.readouterr().out


def test_small_and_large_have_names_of_their_own() -> None:
    assert not SMALL.keys() & LARGE.keys()
