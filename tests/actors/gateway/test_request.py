from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.gateway.request import amount, faults
from actors.quantities import QuantityError
from tests.actors.gateway.scripted import SPEC


def wrong(task: str = "t1", **changes: Any) -> list[str]:
    return faults(task, msgspec.structs.replace(SPEC, **changes))


@pytest.mark.parametrize("task", ["t", "T1", "a.b-c_d", "0", "x" * 100])
def test_an_id_names_a_directory(task: str) -> None:
    assert wrong(task) == []


@pytest.mark.parametrize("task", ["", ".", "..", "-x", "_x", "a/b", "a b", "a\n", "ä", "x" * 101, "a:b"])
def test_what_could_be_more_than_a_name_is_no_id(task: str) -> None:
    assert "id " in wrong(task)[0]


@pytest.mark.parametrize("name", [None, "w", "with space", "-x", ".hidden", "ä" * 127, "..."])
def test_a_workspace_is_one_path_component(name: str | None) -> None:
    assert wrong(workspace=name) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "x" * 256, "ä" * 128, "a\0b"])
def test_a_workspace_is_nothing_else(name: str) -> None:
    assert "workspace" in wrong(workspace=name)[0]


@given(st.text())
def test_a_workspace_that_is_let_through_lies_in_its_directory(name: str) -> None:
    if not wrong(workspace=name):
        inside = os.path.normpath(os.fsencode(f"/workspaces/{name}"))
        assert os.path.split(inside) == (b"/workspaces", os.fsencode(name))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"image": ""}, "image"),
        ({"command": []}, "command"),
        ({"command": [""]}, "command"),
        ({"command": ["sh", "a\0b"]}, "command"),
        ({"command": ["sh", "\udc80"]}, "command"),
        ({"env": {"": "x"}}, "env"),
        ({"env": {"A=B": "x"}}, "env"),
        ({"env": {"A": "\0"}}, "env"),
        ({"env": {"A": "\udcff"}}, "env"),
        ({"memory_bytes": 0}, "memory"),
        ({"memory_bytes": -1}, "memory"),
        ({"memory_bytes": 1 << 62}, "memory"),
        ({"cpu_cores": 0.0}, "cpu"),
        ({"cpu_cores": float("nan")}, "cpu"),
        ({"cpu_cores": float("inf")}, "cpu"),
        ({"timeout_s": 0.0}, "timeout"),
        ({"timeout_s": -1.0}, "timeout"),
        ({"timeout_s": float("nan")}, "timeout"),
        ({"timeout_s": 1e12}, "timeout"),
    ],
)
def test_each_fault_is_named(changes: dict[str, Any], word: str) -> None:
    (fault,) = wrong(**changes)
    assert fault.startswith(word)


def test_all_faults_are_listed_at_once() -> None:
    assert len(wrong("../x", image="", command=[], workspace="..", memory_bytes=1, cpu_cores=0.0, timeout_s=0.0)) == 7


def test_empty_arguments_and_values_are_fine() -> None:
    assert wrong(command=["echo", "", " "], env={"A": "", "B": "x=y"}) == []


@pytest.mark.parametrize(
    ("unit", "given", "expected"),
    [
        ("bytes", "512Mi", 512 << 20),
        ("bytes", 4096, 4096),
        ("bytes", 4096.0, 4096),
        ("cores", "500m", 0.5),
        ("cores", 2, 2),
        ("s", "1m", 60),
        ("s", 0.5, 0.5),
    ],
)
def test_a_limit_is_a_text_or_a_number(unit: str, given: object, expected: float) -> None:
    assert amount(unit, given) == expected


@pytest.mark.parametrize(
    ("unit", "given"),
    [
        ("bytes", 0.5),
        ("bytes", float("inf")),
        ("bytes", float("nan")),
        ("bytes", True),
        ("bytes", None),
        ("s", [1]),
        ("cores", "x"),
        ("s", "1x"),
    ],
)
def test_a_limit_is_nothing_else(unit: str, given: object) -> None:
    with pytest.raises(QuantityError):
        amount(unit, given)
