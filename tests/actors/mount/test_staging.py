"""Staging directories: as real overlays leave them, made by hand for the forms that are rare, and changed under the walk."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
import pytest

from actors.mount.listing import Bounds, Entry, TreeTooLarge, read_listing
from actors.mount.staging import Staging, read
from actors.mount.sync import sync
from tests.actors.mount.conftest import OLD_NS, Workspace, contents, write

FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
RENAME_EXCHANGE = 2


def listed(number: int) -> Entry:
    return Entry(FILE, OLD_NS, (number, 1, OLD_NS))


LISTING = {
    b"d": Entry(DIRECTORY),
    b"d/e": Entry(DIRECTORY),
    b"d/e/x": listed(1),
    b"d/y": listed(2),
    b"f": listed(3),
}


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    (tmp_path / "upper").mkdir()
    return tmp_path / "upper"


def read_upper(upper: Path, listing: dict[bytes, Entry] | None = None, bounds: Bounds | None = None) -> Staging:
    opened = os.open(upper, os.O_RDONLY)
    try:
        return read(opened, LISTING if listing is None else listing, bounds or Bounds())
    finally:
        os.close(opened)


def mark(path: Path, **attributes: bytes) -> None:
    for name, value in attributes.items():
        os.setxattr(path, f"trusted.overlay.{name}", value)


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def test_nothing_staged_is_the_listing(upper: Path) -> None:
    staged = read_upper(upper)
    assert (staged.tree, staged.renamed, staged.skipped) == (LISTING, {}, [])


def test_whiteouts(upper: Path) -> None:
    """Overlayfs makes one inode and links it to many names; and it knows an empty file with an attribute."""
    whiteout(upper / "f")
    (upper / "d").mkdir()
    mark(upper / "d", opaque=b"x")
    os.link(upper / "f", upper / "d/e")
    (upper / "d/y").touch()
    mark(upper / "d/y", whiteout=b"")
    assert read_upper(upper).tree == {b"d": Entry(DIRECTORY)}
    (upper / "d/y").write_text("not empty: a file")
    assert sorted(read_upper(upper).tree) == [b"d", b"d/y"]


def test_a_whiteout_of_nothing_is_nothing(upper: Path) -> None:
    whiteout(upper / "never was")
    assert read_upper(upper).tree == LISTING


def test_opaque_directories_hide_what_is_below(upper: Path) -> None:
    (upper / "d/e").mkdir(parents=True)
    mark(upper / "d", opaque=b"y")
    assert read_upper(upper).tree == {b"d": Entry(DIRECTORY), b"d/e": Entry(DIRECTORY), b"f": LISTING[b"f"]}


@pytest.mark.parametrize(
    ("redirect", "shown"),
    [
        (b"/d/e", {b"n/x": 1}),
        (b"d", {b"n/e/x": 1, b"n/y": 2}),
        (b"/", {}),
        (b"/nowhere", {}),
        (b"/f", {}),
        (b"../d", {}),
        (b"d/e", {}),
        (b"/../..", {}),
    ],
)
def test_redirected_directories(upper: Path, redirect: bytes, shown: dict[bytes, int]) -> None:
    (upper / "n").mkdir()
    mark(upper / "n", redirect=redirect)
    staged = read_upper(upper)
    below = {path: entry for path, entry in staged.tree.items() if path.startswith(b"n") and entry.content}
    assert below == {path: listed(number) for path, number in shown.items()}
    assert staged.renamed == ({b"n": redirect.lstrip(b"/")} if shown else {})


@pytest.mark.parametrize(
    ("name", "attributes", "number"),
    [
        ("f", {}, 3),
        ("n", {"redirect": b"/d/e/x"}, 1),
        ("n", {"redirect": b"f"}, 3),
        ("d/y", {}, 2),
        ("d/n", {"redirect": b"y"}, 2),
        ("d/n", {"redirect": b"/f"}, 3),
        ("n", {"redirect": b"/nowhere"}, None),
        ("n", {"redirect": b"/d"}, None),
        ("n", {"redirect": b"d/y"}, None),
        ("n", {}, None),
    ],
)
def test_files_of_which_only_the_metadata_was_copied(
    upper: Path, name: str, attributes: dict[str, bytes], number: int | None
) -> None:
    (upper / name).parent.mkdir(exist_ok=True)
    write(upper / name, b"\0", 0o640)
    mark(upper / name, metacopy=b"", **attributes)
    staged = read_upper(upper)
    if number is None:
        assert [path for path, _ in staged.skipped] == [name.encode()]
    else:
        assert staged.tree[name.encode()] == Entry(stat.S_IFREG | 0o640, OLD_NS, (number, 1, OLD_NS))


def test_a_redirect_without_metacopy_means_nothing(upper: Path) -> None:
    write(upper / "n", "content")
    mark(upper / "n", redirect=b"/f", origin=b"x", impure=b"y", uuid=b"z", nlink=b"U+1")
    entry = read_upper(upper).tree[b"n"]
    assert entry.staged
    assert entry.content == ((upper / "n").stat().st_ino, 7, (upper / "n").stat().st_ctime_ns)


def test_bounds(upper: Path) -> None:
    (upper / "a/b/c").mkdir(parents=True)
    write(upper / "big", bytes(20_000))
    with open(upper / "sparse", "wb") as file:
        file.truncate(1 << 40)
    read_upper(upper, bounds=Bounds(entries_max=5, depth_max=4, staged_bytes_max=30_000))
    for bounds in (Bounds(entries_max=4), Bounds(depth_max=3), Bounds(staged_bytes_max=10_000)):
        with pytest.raises(TreeTooLarge):
            read_upper(upper, bounds=bounds)


def test_a_path_too_long_for_the_kernel_is_refused(upper: Path) -> None:
    deep = os.open(upper, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=deep)
        below = os.open("n" * 250, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    with pytest.raises(TreeTooLarge, match="path is longer"):
        read_upper(upper)


def test_the_tree_is_what_the_overlay_shows(workspace: Workspace, store: Path) -> None:
    """Random work as the task; the tree read from upper has the names, kinds, modes, sizes and times of the mount."""
    for number in range(20):
        write(store / f"d{number % 3}/e{number % 2}/f{number}", f"{number}" * 10)
    workspace.begin()

    def task() -> None:
        choose = random.Random(5)
        for number in range(200):
            files = sorted(path for path in Path(".").rglob("*") if path.is_file())
            directories = sorted(path for path in Path(".").rglob("*") if path.is_dir())
            name = choose.choice([*directories, Path(".")]) / f"n{number}"
            match choose.randrange(7):
                case 0:
                    name.write_bytes(bytes(choose.randrange(5000)))
                case 1:
                    name.mkdir()
                case 2:
                    choose.choice(files).rename(name)
                case 3:
                    moved = choose.choice(directories)
                    if moved not in name.parents:
                        moved.rename(name)
                case 4:
                    os.chmod(choose.choice([*files, *directories]), choose.choice((0o700, 0o755)))
                case 5:
                    choose.choice(files).unlink()
                case 6:
                    os.link(choose.choice(files), name)

    workspace.run(task)
    staged = read_upper(workspace.upper, read_listing(str(workspace.directory)))
    shown = {}
    for path in workspace.root.rglob("*"):
        status = path.lstat()
        times = (status.st_size, status.st_mtime_ns) if path.is_file() else None
        shown[bytes(path.relative_to(workspace.root))] = (status.st_mode, times)
    assert {
        path: (entry.mode, (entry.content[1], entry.mtime_ns) if entry.content else None) for path, entry in staged.tree.items()
    } == shown


@contextmanager
def all_the_time(work: Callable[[], object]) -> Iterator[None]:
    """Another process does this again and again."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def swapping(one: Path, other: Path) -> AbstractContextManager[None]:
    libc = ctypes.CDLL(None)
    return all_the_time(lambda: libc.renameat2(-100, bytes(one), -100, bytes(other), RENAME_EXCHANGE))


def test_an_attribute_that_goes_under_the_walk(upper: Path) -> None:
    """As that of a file of which only the metadata was copied, when it is written to."""
    write(upper / "f", "content")
    own = Entry(FILE, OLD_NS, (0, 7, 0), staged=True)

    def come_and_go() -> None:
        mark(upper / "f", metacopy=b"")
        os.removexattr(upper / "f", "trusted.overlay.metacopy")

    with all_the_time(come_and_go):
        for _ in range(2000):
            found = read_upper(upper).tree[b"f"]
            assert found.content is not None
            assert found in (listed(3), msgspec.structs.replace(own, content=found.content))


@pytest.mark.parametrize("of", ["directory", "fifo", "file"])
def test_names_swapped_under_the_walk(workspace: Workspace, store: Path, tmp_path: Path, of: str) -> None:
    """A directory, or a file, that is now this and now a symbolic link to a secret: nothing comes from beyond it, and nothing
    hangs.
    """
    workspace.index()
    upper, outside = workspace.upper, tmp_path / "outside"
    (upper / "d").mkdir(parents=True)
    rounds = 40
    for number in range(rounds):
        write(outside / f"file{number}", "SECRET")
    if of == "fifo":
        os.mkfifo(upper / "other")
    else:
        os.symlink(outside if of == "directory" else outside / "file0", upper / "other")
    inside = os.open(upper / "d", os.O_RDONLY)
    write(upper / "d/file0", "harmless")

    def synced() -> list[bytes]:
        return [what[0] for what in contents(store).values() if isinstance(what, tuple)]

    with swapping(upper / "d/file0" if of == "file" else upper / "d", upper / "other"):
        for number in range(1, rounds):
            with open(os.open(f"file{number}", os.O_WRONLY | os.O_CREAT, dir_fd=inside), "w") as file:
                file.write("harmless")
            outcome = sync(str(store), str(workspace.directory), "t1", Bounds(), running=True)
            assert outcome.outcome in ("synced", "conflict"), outcome.error
            assert b"SECRET" not in synced()
    os.close(inside)
    outcome = workspace.sync()
    assert outcome.outcome in ("synced", "conflict"), outcome.error
    assert set(synced()) == {b"harmless"}


def test_files_that_come_and_go_under_the_walk(workspace: Workspace, store: Path) -> None:
    workspace.begin()
    pid = os.fork()
    if pid == 0:
        os.chdir(workspace.root)
        choose = random.Random(3)
        while True:
            name = f"{choose.randrange(20)}"
            try:
                match choose.randrange(4):
                    case 0:
                        os.mkdir(name)
                    case 1:
                        os.rmdir(name)
                    case 2:
                        os.unlink(name)
                    case 3:
                        Path(name).write_bytes(bytes(choose.randrange(10000)))
            except OSError:
                pass
    try:
        uploads = 0
        while uploads < 20:
            outcome = workspace.sync(running=True)
            assert outcome.outcome == "synced"
            uploads += outcome.files > 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (workspace.sync().outcome, contents(store)) == ("synced", contents(workspace.root))
