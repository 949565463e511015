"""Who is stopped and started again: the truth table."""

from __future__ import annotations

import pytest

from supervisor.strategy import Strategy, affected


@pytest.mark.parametrize(
    ("strategy", "ended", "group"),
    [
        (Strategy.ONE_FOR_ONE, "b", "b"),
        (Strategy.DYNAMIC, "b", "b"),
        (Strategy.ONE_FOR_ALL, "a", "abcd"),
        (Strategy.ONE_FOR_ALL, "d", "abcd"),
        (Strategy.REST_FOR_ONE, "a", "abcd"),
        (Strategy.REST_FOR_ONE, "b", "bcd"),
        (Strategy.REST_FOR_ONE, "d", "d"),
    ],
)
def test_who_is_concerned(strategy: Strategy, ended: str, group: str) -> None:
    assert list(affected(strategy, list("abcd"), ended)) == list(group)
    assert strategy.grouped == (strategy in (Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE))
