"""Trees that are put aside and deleted: real trees, real rm, real mounts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import removal as removal_module
from actors.removal import REMOVED, Removal

STATE, RUN = "state", "run"


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    homes = [tmp_path / STATE, tmp_path / RUN]
    for home in homes:
        (home / "tasks").mkdir(parents=True)
    return homes


def tree(home: Path, task: str, files: int = 3) -> Path:
    made = home / "tasks" / task / "root"
    (made / "upper").mkdir(parents=True)
    for number in range(files):
        (made / "upper" / f"file {number}\n").write_bytes(b"x")
    return made


def left(homes: list[Path]) -> list[str]:
    return [entry.name for home in homes for entry in (home / REMOVED).iterdir()]


def test_what_is_removed_is_gone_at_once_and_deleted_soon(homes: list[Path]) -> None:
    removal = Removal(homes)
    trees = [tree(home, f"t{number}") for home in homes for number in range(20)]
    for made in trees:
        removal.remove(made)
        assert not made.exists() and made.parent.exists()
    assert removal.finish(60.0)
    assert left(homes) == []


def test_what_is_not_there_is_removed_already(homes: list[Path]) -> None:
    removal = Removal(homes)
    removal.remove(homes[0] / "tasks/nobody/root")
    assert removal.finish(60.0)


def test_what_cannot_be_put_aside_is_not_taken_for_removed(homes: list[Path]) -> None:
    removal = Removal(homes)
    assert removal.finish(10.0)
    (homes[0] / REMOVED).rmdir()
    made = tree(homes[0], "t")
    with pytest.raises(FileNotFoundError):
        removal.remove(made)
    (homes[0] / REMOVED).mkdir()
    removal.remove(made)
    assert removal.finish(10.0) and left(homes) == [] and not made.exists()


def test_a_name_may_come_again_while_the_first_is_being_deleted(homes: list[Path]) -> None:
    removal = Removal(homes)
    for _ in range(50):
        removal.remove(tree(homes[0], "same"))
    assert removal.finish(60.0)
    assert left(homes) == []


def test_a_file_is_a_tree_too_and_a_link_is_not_followed(homes: list[Path], tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"kept")
    (homes[0] / "tasks/link").symlink_to(tmp_path / "outside")
    (homes[0] / "tasks/file").write_bytes(b"x")
    removal = Removal(homes)
    for name in ("link", "file"):
        removal.remove(homes[0] / "tasks" / name)
    assert removal.finish(60.0)
    assert left(homes) == [] and (tmp_path / "outside/file").read_bytes() == b"kept"


@pytest.fixture
def mounted(homes: list[Path]) -> Iterator[Path]:
    """A tree with a mount in it, which nobody should have left there."""
    made = tree(homes[0], "busy")
    (made / "mnt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", made / "mnt"], check=True)
    (made / "mnt/somebody's").write_bytes(b"kept")
    yield made / "mnt"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if (place := line.split()[1]).startswith(str(homes[0])):
            subprocess.run(["umount", "-l", place], check=True)


def test_what_is_mounted_in_a_tree_is_not_touched_and_holds_up_nothing_else(homes: list[Path], mounted: Path) -> None:
    removal = Removal(homes)
    removal.remove(homes[0] / "tasks/busy/root")
    removal.remove(tree(homes[0], "other"))
    assert removal.finish(60.0)
    assert [name.split(".")[0] for name in left(homes)] == ["busy"]
    assert [path.read_bytes() for path in homes[0].glob(f"{REMOVED}/busy.*/mnt/*")] == [b"kept"]


def test_without_a_process_to_be_had_it_is_tried_again(homes: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal_module, "RETRY_S", 0.1)
    monkeypatch.setenv("PATH", str(homes[0]))
    removal = Removal(homes)
    removal.remove(tree(homes[0], "t"))
    assert not removal.finish(0.5) and len(left(homes)) == 1
    (homes[0] / "rm").symlink_to("/bin/rm")
    assert removal.finish(60.0) and left(homes) == []


def test_killed_at_any_instant_the_next_one_goes_on(homes: list[Path], tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from actors.removal import Removal\n"
        "removal = Removal([pathlib.Path(home) for home in sys.argv[1:]])\n"
        "for made in sorted(pathlib.Path(sys.argv[1]).glob('tasks/*/root')): removal.remove(made)\n"
        "print('put aside', flush=True); removal.finish(60)\n"
    )
    for delay_s in (0.0, 0.002, 0.01, 0.03):
        for number in range(40):
            tree(homes[0], f"t{number}-{delay_s}", files=30)
        process = subprocess.Popen([sys.executable, "-c", program, *homes], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"put aside\n"
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not list(homes[0].glob("tasks/*/root"))
        assert Removal(homes).finish(60.0)
        assert left(homes) == []
