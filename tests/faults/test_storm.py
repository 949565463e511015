"""A short storm in every run of the tests; `make soak` is a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.actors.image.images import RunningRegistry
from tests.faults.storm import Goal, storm


@pytest.mark.alone
def test_a_short_storm_costs_no_task_anything(tmp_path: Path, registry: RunningRegistry) -> None:
    tally = storm(tmp_path, registry, Goal(seconds=8, kills=1, pairs=2), seed=1)
    assert tally.tasks >= 4
    assert sum(tally.faults.values()) >= 10
