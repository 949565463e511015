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


class SmallDisk:
    """A file system of 1 MiB at `path`.  To be asked for before a mover, which is to have ended when it is unmounted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave no room."""
        with open(self.path / "fill", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Give back what `fill` took."""
        (self.path / "fill").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], check=True)
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", path], check=True)  # whoever looks at all that is mounted may be on it just now
