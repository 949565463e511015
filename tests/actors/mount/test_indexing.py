"""Indexed stores: META, object table and small objects of a real directory."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from actors.lazytree.ledger import Limits, set_limits
from actors.lazytree.objects import Objects
from actors.lazytree.table import ObjectTable, Row
from actors.mount import indexing
from actors.mount.indexing import KEPT_MAX, META, TABLE, Indexed, Indexer, cache
from actors.mount.listing import Bounds, TreeTooLarge, read_listing
from actors.mount.source import StoredFile
from tests.actors.mount.conftest import OLD_NS, TASK_ID, Workspace, write


def index(
    workspace: Workspace,
    bounds: Bounds | None = None,
    small_bytes_max: int = 1 << 20,
    small_s: float = 3600.0,
    indexer: Indexer | None = None,
) -> Indexed:
    store, directory = str(workspace.store), str(workspace.directory)
    objects = Objects(str(workspace.objects))
    try:
        return (
            (indexer or Indexer()).look(store, directory, objects, bounds or Bounds(), small_bytes_max, small_s).put(directory)
        )
    finally:
        objects.close()


def rows(workspace: Workspace) -> dict[bytes, Row]:
    """The object table by path."""
    table = ObjectTable(str(workspace.directory / TABLE))
    found = {msgspec.msgpack.decode(row.source, type=StoredFile).path: row for row in map(table.row, range(len(table)))}
    table.close()
    return found


def has(workspace: Workspace, row: Row) -> bool:
    return (workspace.objects / Objects.path(row.key)).exists()


def test_what_is_listed_is_what_the_task_sees(workspace: Workspace, store: Path) -> None:
    write(store / "file", "content", 0o6750)
    write(store / "empty", "")
    write(store / "d/e/deep", "deep", 0o444)
    os.symlink("../file", store / "d/link")
    os.chown(store / "file", 77, 78)
    (store / "d/e").chmod(0o3770)
    os.utime(store / "d/e", ns=(3, OLD_NS + 123456789))
    write(store / os.fsdecode(b"\xff\xfe"), "not UTF-8")
    os.mkfifo(store / "fifo")
    (store / ".aerie-sync/other").mkdir(parents=True)
    listed = index(workspace)
    assert (listed.entries, listed.objects, listed.missing) == (7, 3, 0)
    assert listed.content_bytes == len("contentdeepnot UTF-8")
    assert listed.skipped == [(b"fifo", "not a file, directory or symbolic link")]
    workspace.mount()
    seen = {bytes(path.relative_to(workspace.root)): path.lstat() for path in workspace.root.rglob("*")}
    assert set(seen) == set(read_listing(str(workspace.directory)))
    for path, status in seen.items():
        assert (status.st_uid, status.st_gid) == (TASK_ID, TASK_ID)
        original = os.lstat(bytes(store) + b"/" + path)
        assert status.st_mode == original.st_mode & ~0o6000
        if not stat.S_ISLNK(status.st_mode):
            assert status.st_mtime_ns == original.st_mtime_ns
        if stat.S_ISREG(status.st_mode):
            with open(bytes(workspace.root) + b"/" + path, "rb") as file, open(bytes(store) + b"/" + path, "rb") as at_home:
                assert file.read() == at_home.read()
    assert os.readlink(workspace.root / "d/link") == "../file"
    root = workspace.root.stat()
    assert (root.st_uid, root.st_gid, root.st_mode) == (TASK_ID, TASK_ID, store.stat().st_mode)


def test_a_store_is_made_at_first_use(workspace: Workspace, tmp_path: Path) -> None:
    workspace.store = tmp_path / "workspaces" / "new"
    assert index(workspace).entries == 0
    status = workspace.store.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (TASK_ID, TASK_ID, 0o755)


def test_an_object_is_named_by_store_path_and_version(workspaces: Callable[[str], Workspace], store: Path) -> None:
    write(store / "a", "same")
    write(store / "b", "same")
    first = workspaces("t1")
    index(first)
    before = rows(first)
    assert len({row.key for row in before.values()}) == 2
    index(first)
    assert rows(first) == before, "the same store gives the same objects"
    write(store / "a", "soon")  # the same inode, size and modification time
    index(first)
    after = rows(first)
    assert after[b"b"] == before[b"b"]
    assert after[b"a"].key != before[b"a"].key
    other = workspaces("t2")
    other.store = store.with_name("other store")
    os.rename(store, other.store)
    index(other)
    assert not {row.key for row in rows(other).values()} & {row.key for row in after.values()}


def test_small_files_are_filled_in_within_their_bounds(workspace: Workspace, store: Path) -> None:
    for number in range(5):
        write(store / f"small{number}", "x" * 1000)
    write(store / "big", "x" * ((64 << 10) + 1))
    assert index(workspace, small_s=0).missing == 6, "no time is left to fill any"
    indexer = Indexer()
    filled = []
    for _ in range(4):
        index(workspace, small_bytes_max=2500, indexer=indexer)
        filled.append(sum(has(workspace, row) for row in rows(workspace).values()))
    assert filled == [2, 4, 5, 5], "it goes on from where it stopped"
    assert index(workspace, indexer=indexer).missing == 1
    assert [path for path, row in rows(workspace).items() if not has(workspace, row)] == [b"big"]
    write(store / "limit", "l" * (64 << 10))
    assert index(workspace, indexer=indexer).missing == 1
    assert (workspace.objects / Objects.path(rows(workspace)[b"limit"].key)).read_bytes() == b"l" * (64 << 10)


@pytest.mark.parametrize("bounds", [Bounds(entries_max=3), Bounds(depth_max=2)])
def test_a_store_over_a_bound_is_refused(workspace: Workspace, store: Path, bounds: Bounds) -> None:
    write(store / "a/b/c", "x")
    write(store / "d", "x")
    with pytest.raises(TreeTooLarge):
        index(workspace, bounds)
    assert list(workspace.directory.iterdir()) == []
    assert index(workspace, Bounds(entries_max=4, depth_max=3)).entries == 4


def test_a_store_that_changes_under_the_walk(workspace: Workspace, store: Path, tmp_path: Path) -> None:
    """Whatever is listed was there; no name, and no byte, comes from outside or from another version."""
    write(tmp_path / "outside/secret", "SECRET")
    write(store / "d/secret", "harmless")
    os.symlink(tmp_path / "outside", store / "spare")
    ended = threading.Event()

    def change() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            os.rename(store / "d", store / "real")
            os.rename(store / "spare", store / "d")
            write(store / "real" / "secret", "harmless" * (number % 50), old=False)
            write(store / f"new{number % 7}", "n" * (number % 100), old=False)
            os.rename(store / "d", store / "spare")
            os.rename(store / "real", store / "d")
            (store / f"new{number % 7}").unlink()
            write(tmp_path / "version", f"{number:08}", old=False)
            os.utime(tmp_path / "version", ns=(number, number))
            os.rename(tmp_path / "version", store / "version")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(100):
            index(workspace)
            for path, row in rows(workspace).items():
                if has(workspace, row):
                    content = (workspace.objects / Objects.path(row.key)).read_bytes()
                    assert len(content) == row.size_bytes
                    assert b"SECRET" not in content
                    if path == b"version":
                        assert int(content) == msgspec.msgpack.decode(row.source, type=StoredFile).mtime_ns
    finally:
        ended.set()
        thread.join()


def test_a_store_that_did_not_change_gives_the_same_files(workspaces: Callable[[str], Workspace], store: Path) -> None:
    """From what was kept, and only when that is what would be made anew."""

    def made(workspace: Workspace, indexer: Indexer) -> tuple[bytes, ...]:
        index(workspace, indexer=indexer)
        return tuple((workspace.directory / name).read_bytes() for name in ("listing", TABLE, META))

    write(store / "a", "a")
    write(store / "d/b", "b")
    os.symlink("x", store / "l")
    first, second, anew = workspaces("t1"), workspaces("t2"), workspaces("t3")
    indexer = Indexer()
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: write(store / "a", "b"),
        lambda: os.utime(store / "d", ns=(1, 1)),
        lambda: (store / "d").chmod(0o700),
        lambda: store.chmod(0o700),
        lambda: os.utime(store, ns=(1, 1)),
        lambda: os.rename(store / "d", store / "e"),
    ]
    before = None
    for change in changes:
        change()
        now = made(first, indexer)
        assert made(second, indexer) == now == made(anew, Indexer())
        assert before is None or now != before
        before = now
    kept = len(os.listdir("/proc/self/fd"))
    for number in range(2 * KEPT_MAX):
        first.store = store.with_name(f"store{number}")
        made(first, indexer)
    assert len(os.listdir("/proc/self/fd")) <= kept + 2 * KEPT_MAX


@pytest.mark.alone
def test_the_listing_costs_what_was_promised(workspace: Workspace, store: Path) -> None:
    """A thousand files, small objects already there: every warm task waits for it.  (5 ms, 15 ms when something changed: five times
    what it takes to look at each of them, which takes as much longer on a slow machine.)
    """
    for number in range(1000):
        write(store / f"d{number % 20}/f{number}", "x" * 100)
    assert index(workspace).missing == 0
    assert _fastest_s(lambda: index(workspace)) < 30 * _fastest_s(lambda: _look_at_each(store))


@pytest.mark.alone
def test_a_large_store_costs_what_was_promised(workspace: Workspace, store: Path) -> None:
    """100,000 entries in at most 4 s, 1.5 s the second time: 13 and 5 times what it takes to look at each.  A twentieth of them here."""
    for number in range(50):
        (store / f"d{number // 10}/e{number}").mkdir(parents=True)
        for name in range(99):
            (store / f"d{number // 10}/e{number}/file{name}").write_bytes(b"x" * name)
    indexer = Indexer()
    first_s = _fastest_s(lambda: index(workspace, small_s=0.02))
    index(workspace, small_s=0.02, indexer=indexer)
    second_s = _fastest_s(lambda: index(workspace, small_s=0.02, indexer=indexer))
    look_s = _fastest_s(lambda: _look_at_each(store))
    assert (first_s < 13 * look_s, second_s < 5 * look_s) == (True, True), (first_s, second_s, look_s)


def _fastest_s(work: Callable[[], object]) -> float:
    """Of processor time, for the machine may be doing something else."""

    def timed_s() -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    return min(timed_s() for _ in range(5))


def _look_at_each(directory: Path | str) -> None:
    for entry in os.scandir(directory):
        entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            _look_at_each(entry.path)


# --- what tasks have read ---


def cached(workspace: Workspace, *names: str) -> int:
    table = ObjectTable(str(workspace.directory / TABLE))
    found = rows(workspace)
    indexes = [table.find(found[os.fsencode(name)].key) for name in names]
    table.close()
    objects = Objects(str(workspace.objects))
    try:
        return cache(str(workspace.store), str(workspace.directory), objects, [index for index in indexes if index is not None])
    finally:
        objects.close()


def test_what_was_read_is_cached_for_the_next_task(workspace: Workspace, store: Path) -> None:
    content = os.urandom((3 << 20) + 17)
    (store / "large").write_bytes(content)
    (store / "other").write_bytes(content)
    indexer = Indexer()
    assert index(workspace, indexer=indexer).missing == 2
    assert cached(workspace, "large") == 1
    found = rows(workspace)
    assert (workspace.objects / Objects.path(found[b"large"].key)).read_bytes() == content
    assert not has(workspace, found[b"other"])
    assert cached(workspace, "large") == 1
    # The next listing of the same store looks again for what was missing.
    assert index(workspace, indexer=indexer).missing == 1
    assert cached(workspace, "other") == 1
    assert index(workspace, indexer=indexer).missing == 0


@pytest.mark.parametrize("change", ["written", "longer", "touched", "replaced", "gone", "a link"])
def test_what_has_changed_since_the_listing_is_not_cached(workspace: Workspace, store: Path, change: str) -> None:
    file = store / "large"
    file.write_bytes(os.urandom(1 << 20))
    index(workspace)
    changes: dict[str, Callable[[], object]] = {
        "written": lambda: file.write_bytes(os.urandom(1 << 20)),
        "longer": lambda: os.truncate(file, (1 << 20) + 1),
        "touched": lambda: os.utime(file, (1, 1)),
        "replaced": lambda: (file.rename(store / "old"), file.write_bytes(bytes(1 << 20))),
        "gone": file.unlink,
        "a link": lambda: (file.rename(store / "old"), file.symlink_to("old")),
    }
    changes[change]()
    assert cached(workspace, "large") == 0
    assert not has(workspace, rows(workspace)[b"large"])


def test_what_is_too_large_is_not_cached(workspace: Workspace, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "large").write_bytes(bytes(1 << 20))
    index(workspace)
    monkeypatch.setattr(indexing, "CACHED_BYTES_MAX", (1 << 20) - 1)
    assert cached(workspace, "large") == 0
    monkeypatch.setattr(indexing, "CACHED_BYTES_MAX", 1 << 20)
    with closing(Objects(str(workspace.objects))) as objects:
        set_limits(objects.descriptor, Limits(1 << 60, free_bytes_min=1 << 60))
    assert cached(workspace, "large") == 0
