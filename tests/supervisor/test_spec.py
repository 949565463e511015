"""Specs and flags are checked wholly before anything starts."""

from __future__ import annotations

import math

import pytest

from supervisor.actor import Actor
from supervisor.spec import ChildSpec, Flags, Restart, SpecError, Type, check_children
from supervisor.system import System
from supervisor.tree import Supervisor


def make() -> Actor:
    raise AssertionError("nothing is started by a look at a spec")


def test_defaults_are_those_of_otp() -> None:
    spec = ChildSpec("a", make)
    assert ChildSpec("a", make, type=Type.SUPERVISOR).patience_s == math.inf
    assert (spec.restart, spec.patience_s) == (Restart.PERMANENT, 5.0)


@pytest.mark.parametrize("shutdown_s", [0, 0.5, math.inf])
def test_shutdown_times_that_are_good(shutdown_s: float | None) -> None:
    assert ChildSpec("a", make, shutdown_s=shutdown_s).patience_s == shutdown_s


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"id": ""}, "id is empty"),
        ({"start": None}, "child a: start is None"),
        ({"restart": "permanent"}, "child a: restart is 'permanent'"),
        ({"shutdown_s": -0.1}, "child a: shutdown_s is -0.1"),
    ],
)
def test_specs_that_are_wrong(fields: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ChildSpec(**{"id": "a", "start": make, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"intensity": -1}, "intensity is -1"),
        ({"period_s": 0}, "period_s is 0"),
        ({"period_s": -1.0}, "period_s is -1.0"),
        ({"backoff_s": ()}, r"backoff_s is \(\)"),
        ({"backoff_s": (0.1, -1.0)}, "backoff_s is"),
        ({"start_timeout_s": 0}, "start_timeout_s is 0"),
    ],
)
def test_flags_that_are_wrong(fields: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        Flags(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("intensity", [0, 1, None])
def test_intensities_that_are_good(intensity: int | None) -> None:
    assert Flags(intensity=intensity).intensity == intensity


def test_ids_are_unique() -> None:
    check_children([ChildSpec("a", make), ChildSpec("b", make)])
    with pytest.raises(SpecError, match="two children have the id a"):
        check_children([ChildSpec("a", make), ChildSpec("b", make), ChildSpec("a", make)])


def test_a_supervisor_with_wrong_children_is_not_made(system: System) -> None:
    with pytest.raises(SpecError, match="two children"):
        Supervisor(system, "top", [ChildSpec("a", make), ChildSpec("a", make)])
