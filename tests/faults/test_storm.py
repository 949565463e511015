"""A short storm in every run of the tests; `make soak` is a long one."""

from __future__ import annotations

from pathlib import Path

from tests.actors.image.images import RunningRegistry
from tests.faults.storm import Goal, storm


def test_a_short_storm_costs_no_task_anything(tmp_path: Path, registry: RunningRegistry) -> None:
    tally = storm(tmp_path, registry, Goal(seconds=20), seed=1)
    assert tally.tasks >= 4
    assert sum(tally.faults.values()) >= 10
