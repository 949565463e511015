"""A short storm over the FUSE processes; `make soak` has the longer ones."""

from __future__ import annotations

import pytest

from tests.actors.image.images import RunningRegistry
from tests.faults.fuse_storm import fuse_storm

SECONDS = 5.0


@pytest.mark.alone
@pytest.mark.parametrize("seed", [1])
def test_tasks_do_not_notice_that_their_fuse_processes_die(
    tmp_path_factory: pytest.TempPathFactory, registry: RunningRegistry, seed: int
) -> None:
    tally = fuse_storm(tmp_path_factory.mktemp("fuse") / "storm", registry, SECONDS, seed)
    assert {blow for blow, count in tally.blows.items() if count >= 3} >= {"image mount killed", "workspace mount killed"}, (
        tally
    )
    assert tally.rounds >= 2
