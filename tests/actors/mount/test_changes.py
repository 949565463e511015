"""What a look at a staging directory sees of what a sync would act upon."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.mount.changes import Changes
from actors.mount.listing import Bounds, TreeTooLarge
from tests.actors.mount.conftest import Workspace, write

CHANGES: dict[str, Callable[[], object]] = {
    "a new file": lambda: Path("new").touch(),
    "written, size and time as before": lambda: (Path("d/file").write_text("FILE"), os.utime("d/file", ns=(5, 5))),
    "mode": lambda: os.chmod("d/file", 0o600),
    "time": lambda: os.utime("d/file", ns=(6, 6)),
    "mode of a directory": lambda: os.chmod("d", 0o700),
    "renamed": lambda: os.rename("d/file", "d/other"),
    "linked": lambda: os.link("d/file", "link"),
    "removed": lambda: os.remove("d/file"),
    "removed from the store": lambda: os.remove("lower"),
    "one more removed from the store": lambda: (os.remove("lower"), os.remove("lower 2")),
    "described": lambda: os.chmod("lower", 0o600),
    "moved": lambda: os.rename("lower 2", "lower"),
    "a symbolic link": lambda: os.symlink("x", "d/link"),
    "a directory of the store renamed": lambda: os.rename("e", "f"),
    "made opaque": lambda: (os.remove("e/x"), os.rmdir("e"), os.mkdir("e")),
    "deep": lambda: os.makedirs("d/e/f/g"),
}


@pytest.fixture
def begun(workspace: Workspace, store: Path) -> Workspace:
    for name in ("lower", "lower 2", "e/x"):
        write(store / name, name)
    workspace.begin()
    workspace.run(lambda: (os.mkdir("d"), Path("d/file").write_text("file"), os.utime("d/file", ns=(5, 5))))
    return workspace


def changed(changes: Changes, workspace: Workspace) -> bool:
    """Whether it has changed since this was asked last."""
    found = changes.look(str(workspace.upper), Bounds())
    if found is not None:
        changes.synced(str(workspace.upper), found)
    return found is not None


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_once(begun: Workspace, change: str) -> None:
    changes = Changes()
    assert changed(changes, begun), "the first look"
    assert not changed(changes, begun)
    begun.run(CHANGES[change])
    assert changed(changes, begun)
    assert not changed(changes, begun)


def test_reading_is_no_change(begun: Workspace) -> None:
    changes = Changes()
    changed(changes, begun)
    begun.run(lambda: [path.read_bytes() for path in Path(".").rglob("*") if path.is_file()])
    assert not changed(changes, begun)


def test_a_mapped_write_after_a_sync_is_a_change(begun: Workspace) -> None:
    changes = Changes()
    with open(begun.root / "d/file", "r+b") as file, mmap.mmap(file.fileno(), 4) as mapped:
        mapped[0] = 1
        changed(changes, begun)
        begun.sync(running=True)
        mapped[0] = 2
        assert changed(changes, begun)


def test_what_was_forgotten_has_changed(begun: Workspace) -> None:
    changes = Changes()
    changed(changes, begun)
    changes.forget(str(begun.upper))
    assert changed(changes, begun)


def test_bounds_and_links(tmp_path: Path) -> None:
    upper, outside = tmp_path / "upper", tmp_path / "outside"
    (upper / "a/b/c").mkdir(parents=True)
    outside.mkdir()
    os.symlink(outside, upper / "link")
    os.mknod(upper / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    changes = Changes()
    found = changes.look(str(upper), Bounds(entries_max=5, depth_max=4))
    assert found is not None
    changes.synced(str(upper), found)
    (outside / "x").touch()
    assert changes.look(str(upper), Bounds(entries_max=5, depth_max=4)) is None, "what a link leads to is nobody's business"
    for bounds in (Bounds(entries_max=4), Bounds(depth_max=3)):
        with pytest.raises(TreeTooLarge):
            changes.look(str(upper), bounds)
