from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.actors.output.conmon import Conmon
from tests.actors.output.movers import RunningMover


@pytest.fixture
def conmon(tmp_path: Path) -> Iterator[Conmon]:
    if not (shutil.which("conmon") and shutil.which("crun")):
        pytest.skip("needs conmon and crun")
    conmon = Conmon(tmp_path / "container")
    yield conmon
    conmon.delete()


@pytest.fixture
def mover(tmp_path: Path) -> Iterator[RunningMover]:
    running = RunningMover(tmp_path / "mover.lock")
    yield running
    running.end()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)
