"""1,000 restarts leave memory within 1 MiB, descriptors and threads exactly where they were."""

from __future__ import annotations

from pathlib import Path

from tests.supervisor.restarting import measure


def test_a_thousand_restarts_of_actors_leave_nothing(tmp_path: Path) -> None:
    left = measure(1000, tmp_path)
    assert left["memory_mib"] <= 1.0
    assert (left["descriptors"], left["threads"]) == (0, 0)
