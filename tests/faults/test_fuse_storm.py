"""A short storm over the FUSE processes; `make soak` has the longer ones."""

from __future__ import annotations

import pytest

from tests.actors.image.images import RunningRegistry
from tests.faults.fuse_storm import KILLS_MIN, KINDS, fuse_storm

SECONDS = 5.0


@pytest.mark.alone
@pytest.mark.parametrize("seed", [1])
def test_tasks_do_not_notice_that_their_fuse_processes_die(
    tmp_path_factory: pytest.TempPathFactory, registry: RunningRegistry, seed: int
) -> None:
    tally = fuse_storm(tmp_path_factory.mktemp("fuse") / "storm", registry, SECONDS, seed)
    assert all(tally.blows[f"{kind} killed"] >= KILLS_MIN for kind in KINDS), tally
    assert tally.rounds >= 2
