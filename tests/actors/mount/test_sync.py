"""Syncs of real overlays: what a task did comes to the store, and nothing that others did is lost."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from actors.mount.listing import RESERVED, Bounds
from actors.mount.sync import sync
from tests.actors.mount.conftest import OLD_NS, TASK_ID, Workspace, contents, write


def test_nothing_staged(workspace: Workspace, store: Path) -> None:
    write(store / "a", "a")
    workspace.begin()
    before = contents(store)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files, contents(store)) == ("synced", 0, before)


def test_what_a_task_did_is_in_the_store(workspace: Workspace, store: Path) -> None:
    write(store / "kept", "kept")
    write(store / "changed", "old")
    write(store / "removed", "x")
    write(store / "d/removed with it", "x")
    write(store / "d/sub/too", "x")
    write(store / "became a directory", "x")
    write(store / "was a directory/x", "x")
    os.symlink("kept", store / "link")
    workspace.begin()

    def task() -> None:
        Path("changed").write_text("new")
        os.utime("changed", ns=(5, 7))
        Path("new").write_text("new")
        os.chmod("new", 0o750)
        os.remove("removed")
        os.remove("d/removed with it")
        os.remove("d/sub/too")
        os.rmdir("d/sub")
        os.rmdir("d")
        os.remove("became a directory")
        os.makedirs("became a directory/below")
        Path("became a directory/below/file").write_text("deep")
        os.remove("was a directory/x")
        os.rmdir("was a directory")
        Path("was a directory").write_text("file")
        os.remove("link")
        os.symlink("/nowhere", "link")
        os.mkdir("empty", 0o700)

    workspace.run(task)
    inode = (store / "kept").stat().st_ino
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.conflicts, outcome.skipped, outcome.error) == ("synced", [], [], "")
    assert workspace.tree() == {
        "kept": (b"kept", 0o644),
        "changed": (b"new", 0o644),
        "new": (b"new", 0o750),
        "became a directory": 0o755,
        "became a directory/below": 0o755,
        "became a directory/below/file": (b"deep", 0o644),
        "was a directory": (b"file", 0o644),
        "link": "/nowhere",
        "empty": 0o700,
    }
    assert (store / "changed").stat().st_mtime_ns == 7
    assert (store / "kept").stat().st_ino == inode, "what was not touched is the same file still"
    assert {path.lstat().st_uid for path in store.rglob("*") if path.name != "kept"} == {TASK_ID}


def test_again_finds_nothing_to_do(workspace: Workspace, store: Path) -> None:
    write(store / "a", "a")
    workspace.begin()

    def task() -> None:
        Path("a").write_text("b")
        Path("new").write_text("n")
        os.mkdir("d")
        os.symlink("x", "l")

    workspace.run(task)
    assert workspace.sync().files == 2
    before = {path: path.lstat().st_ino for path in store.rglob("*")}
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files) == ("synced", 0)
    assert {path: path.lstat().st_ino for path in store.rglob("*")} == before
    (workspace.directory / "synced").unlink()
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.conflicts) == ("synced", []), "the same content on both sides is no conflict"


def test_conflicts_lose_nothing(workspace: Workspace, store: Path) -> None:
    for name in ("changed", "removed", "described", "same", "deleted", "linked"):
        write(store / name, "old")
    write(store / "d/changed", "old")
    write(store / "d/not changed", "old")
    write(store / "e/f", "old")
    workspace.begin()

    def task() -> None:
        Path("changed").write_text("ours")
        os.remove("removed")
        os.chmod("described", 0o600)
        Path("same").write_text("agreed")
        Path("deleted").write_text("ours")
        Path("new").write_text("ours")
        os.rename("linked", "renamed")
        os.remove("d/changed")
        os.remove("d/not changed")
        os.rmdir("d")
        Path("e/new").write_text("ours")

    workspace.run(task)
    for name in ("changed", "removed", "described", "new", "linked", "d/changed"):
        write(store / name, "theirs", old=False)
    write(store / "same", "agreed", old=False)
    write(store / "d/theirs", "theirs", old=False)
    (store / "deleted").unlink()
    (store / "e/f").unlink()
    (store / "e").rmdir()
    write(store / "e", "theirs", old=False)
    for _ in range(2):
        outcome = workspace.sync()
        assert outcome.outcome == "conflict"
        assert {conflict.path: conflict.beside for conflict in outcome.conflicts} == {
            b"changed": b"changed.aerie-conflict-t1",
            b"new": b"new.aerie-conflict-t1",
            b"deleted": b"deleted.aerie-conflict-t1",
            b"e": b"e.aerie-conflict-t1",
            b"removed": b"",
            b"described": b"",
            b"linked": b"",
            b"renamed": b"",
            b"d/changed": b"",
        }
        assert {name: what[0] if isinstance(what, tuple) else what for name, what in workspace.tree().items()} == {
            "changed": b"theirs",
            "changed.aerie-conflict-t1": b"ours",
            "new": b"theirs",
            "new.aerie-conflict-t1": b"ours",
            "deleted.aerie-conflict-t1": b"ours",
            "removed": b"theirs",
            "described": b"theirs",
            "same": b"agreed",
            "linked": b"theirs",
            "d": 0o755,
            "d/changed": b"theirs",
            "d/theirs": b"theirs",
            "e": b"theirs",
            "e.aerie-conflict-t1": 0o755,
            "e.aerie-conflict-t1/new": b"ours",
        }


def test_renames_copy_nothing(workspace: Workspace, store: Path) -> None:
    write(store / "big", b"b" * 100_000)
    write(store / "a", b"a" * 100_000)
    write(store / "dir/sub/file", b"f" * 100_000)
    write(store / "dir/other", b"o" * 100_000)
    write(store / "swap/one", "1" * 100)
    write(store / "swap/two", "2" * 100)
    inodes = {path.name: path.stat().st_ino for path in store.rglob("*")}
    workspace.begin()

    def task() -> None:
        os.rename("big", "moved")
        os.chmod("moved", 0o600)
        os.utime("moved", ns=(3, 3))
        os.mkdir("new")
        os.rename("dir", "new/dir")
        os.rename("new/dir/other", "new/dir/renamed")
        Path("new/dir/added").write_text("added")
        os.link("a", "a2")
        os.rename("swap/one", "swap/three")
        os.rename("swap/two", "swap/one")
        os.rename("swap/three", "swap/two")

    workspace.run(task)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files) == ("synced", 1), "only the one that was written was uploaded"
    assert sorted(workspace.tree()) == sorted(
        [
            "a",
            "a2",
            "moved",
            "new",
            "new/dir",
            "new/dir/added",
            "new/dir/renamed",
            "new/dir/sub",
            "new/dir/sub/file",
            "swap",
            "swap/one",
            "swap/two",
        ]
    )
    assert {
        "big": (store / "moved").stat().st_ino,
        "dir": (store / "new/dir").stat().st_ino,
        "sub": (store / "new/dir/sub").stat().st_ino,
        "file": (store / "new/dir/sub/file").stat().st_ino,
        "other": (store / "new/dir/renamed").stat().st_ino,
        "a": (store / "a").stat().st_ino,
        "one": (store / "swap/two").stat().st_ino,
        "two": (store / "swap/one").stat().st_ino,
        "swap": (store / "swap").stat().st_ino,
    } == inodes
    assert (store / "a2").samefile(store / "a")
    assert ((store / "moved").stat().st_mode & 0o777, (store / "moved").stat().st_mtime_ns) == (0o600, 3)


def test_a_directory_renamed_by_the_task_and_changed_by_others_is_moved_file_by_file(workspace: Workspace, store: Path) -> None:
    for name in ("one", "two", "three"):
        write(store / "d" / name, name)
    workspace.begin()
    workspace.run(lambda: os.rename("d", "e"))
    write(store / "d/two", "theirs", old=False)
    write(store / "d/new", "theirs", old=False)
    outcome = workspace.sync()
    assert {conflict.path for conflict in outcome.conflicts} == {b"d/two", b"e/two"}
    assert workspace.tree() == {
        "d": 0o755,
        "d/two": (b"theirs", 0o644),
        "d/new": (b"theirs", 0o644),
        "e": 0o755,
        "e/one": (b"one", 0o644),
        "e/three": (b"three", 0o644),
    }


def test_directories_swapped_and_nested(workspace: Workspace, store: Path) -> None:
    write(store / "a/1", "1")
    write(store / "b/2", "2")
    write(store / "p/q/r/3", "3")
    workspace.begin()

    def task() -> None:
        os.rename("a", "t")
        os.rename("b", "a")
        os.rename("t", "b")
        os.rename("p/q", "q")
        os.rename("q/r", "r")
        os.rename("p", "r/p")
        os.rmdir("q")

    workspace.run(task)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.conflicts) == ("synced", [])
    assert {name: what[0] for name, what in workspace.tree().items() if isinstance(what, tuple)} == {
        "b/1": b"1",
        "a/2": b"2",
        "r/3": b"3",
    }
    assert sorted(path.name for path in store.rglob("*") if path.is_dir()) == ["a", "b", "p", "r"]


def test_opaque_directories(workspace: Workspace, store: Path) -> None:
    write(store / "d/old", "old")
    write(store / "d/sub/old", "old")
    workspace.begin()

    def task() -> None:
        os.remove("d/old")
        os.remove("d/sub/old")
        os.rmdir("d/sub")
        os.rmdir("d")
        os.makedirs("d/sub")
        Path("d/sub/new").write_text("new")

    workspace.run(task)
    write(store / "d/sub/theirs", "theirs", old=False)
    assert workspace.sync().outcome == "synced"
    assert [name for name, what in workspace.tree().items() if isinstance(what, tuple)] == ["d/sub/new", "d/sub/theirs"]


def test_mapped_writes(workspace: Workspace, store: Path) -> None:
    """A page that was dirtied before one sync, and written again after it, moves no time unless the sync made it clean."""
    write(store / "map", bytes(8192))
    workspace.begin()
    # In this process, as root: what counts is the mapping, held over both syncs.
    with open(workspace.root / "map", "r+b") as file, mmap.mmap(file.fileno(), 8192) as mapped:
        mapped[0] = 1
        assert workspace.sync(running=True).files == 1
        assert (store / "map").read_bytes()[:1] == b"\1"
        mapped[0] = 2
        mapped[4096] = 3
        assert workspace.sync(running=True).files == 1
        content = (store / "map").read_bytes()
        assert (content[0], content[4096]) == (2, 3)
        assert workspace.sync(running=True).files == 0


def test_a_mapped_write_during_a_sync_is_seen_by_the_next(workspace: Workspace, store: Path) -> None:
    """Also one that came while the sync waited for the disk: it made its page writable, and later ones move no time."""
    write(store / "map", bytes(8192))
    workspace.begin()
    with open(workspace.root / "map", "r+b") as file, mmap.mmap(file.fileno(), 8192) as mapped:
        for running in (True, True, True, False):
            stop = threading.Event()

            def write_on(stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    mapped[0] = mapped[4096] = (mapped[0] + 1) % 256

            writer = threading.Thread(target=write_on)
            writer.start()
            try:
                assert workspace.sync(running=True).outcome == "synced"
            finally:
                stop.set()
                writer.join()
            assert workspace.sync(running).outcome == "synced"
            assert (store / "map").read_bytes() == mapped[:]


def transferred_bytes() -> int:
    """What this process has read and written: proc_pid_io(5)."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]) + int(counts["wchar"])


def test_sparse_files_stay_sparse(workspace: Workspace, store: Path) -> None:
    workspace.begin()

    def task() -> None:
        with open("sparse", "wb") as file:
            file.truncate(1 << 30)
            file.seek(512 << 20)
            file.write(b"data")
        with open("hole", "wb") as file:
            file.truncate(1 << 30)

    workspace.run(task)
    before_bytes = transferred_bytes()
    assert workspace.sync().outcome == "synced"
    assert transferred_bytes() - before_bytes < 1 << 20
    for name in ("sparse", "hole"):
        status = (store / name).stat()
        assert (status.st_size, status.st_blocks < 1000) == (1 << 30, True)
    with open(store / "sparse", "rb") as file:
        file.seek(512 << 20)
        assert file.read(5) == b"data\0"


def test_what_is_no_file_stays_behind_and_is_said(workspace: Workspace, store: Path) -> None:
    write(store / "was a file", "x")
    write(store / "setuid", "x", 0o755)
    workspace.begin()

    def task() -> None:
        os.mkfifo("fifo")
        os.mknod("socket", stat.S_IFSOCK | 0o600)
        os.remove("was a file")
        os.mkfifo("was a file")
        Path("tool").write_text("#!")
        os.chmod("tool", 0o6755)
        os.chmod("setuid", 0o4755)
        os.mkdir("shared", 0o755)
        os.chmod("shared", 0o3775)

    workspace.run(task)
    os.mknod(workspace.root / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    outcome = workspace.sync()
    assert outcome.outcome == "synced"
    assert sorted(path for path, _ in outcome.skipped) == [b"device", b"fifo", b"socket", b"was a file"]
    assert workspace.tree() == {"setuid": (b"x", 0o755), "tool": (b"#!", 0o755), "shared": 0o1775}


def test_hard_links_in_staging_are_one_file_in_the_store(workspace: Workspace, store: Path) -> None:
    write(store / "d/x", "x")
    workspace.begin()

    def task() -> None:
        Path("one").write_text("content")
        os.link("one", "two")
        os.mkdir("e")
        os.link("one", "e/three")

    workspace.run(task)
    outcome = workspace.sync()
    assert (outcome.outcome, sorted(workspace.tree())) == ("synced", ["d", "d/x", "e", "e/three", "one", "two"])
    assert (store / "one").stat().st_nlink == 3
    assert (store / "e/three").read_text() == "content"


def test_forged_names(workspace: Workspace, store: Path) -> None:
    write(store / "a", "old")
    workspace.begin()

    def task() -> None:
        Path("a").write_text("ours")
        Path("a.aerie-conflict-t1").write_text("forged")
        Path(".wh.a").write_text("aufs")
        Path("a.aerie-conflict-t1.2").write_text("forged too")
        os.mkdir(RESERVED)
        Path(".aerie-sync/link-0").write_text("forged")
        os.mkdir("d")
        Path("d/.aerie-sync").write_text("just a name here")
        Path(os.fsdecode(b"\xff\n")).write_text("not UTF-8")
        Path("n" * 255).write_text("long")

    workspace.run(task)
    write(store / "a", "theirs", old=False)
    write(store / ("n" * 255), "theirs", old=False)
    outcome = workspace.sync()
    assert outcome.skipped == [(RESERVED, "the name is reserved")]
    long = b"n" * (255 - len(".aerie-conflict-t1")) + b".aerie-conflict-t1"
    assert {conflict.path: conflict.beside for conflict in outcome.conflicts} == {
        b"a": b"a.aerie-conflict-t1.3",
        b"n" * 255: long,
    }
    assert {name: what[0] for name, what in workspace.tree().items() if isinstance(what, tuple)} == {
        "a": b"theirs",
        "a.aerie-conflict-t1": b"forged",
        "a.aerie-conflict-t1.2": b"forged too",
        "a.aerie-conflict-t1.3": b"ours",
        ".wh.a": b"aufs",
        "d/.aerie-sync": b"just a name here",
        "\udcff\n": b"not UTF-8",
        "n" * 255: b"theirs",
        long.decode(): b"long",
    }


def test_a_link_in_the_store_leads_nowhere(workspace: Workspace, store: Path, tmp_path: Path) -> None:
    """Somebody put a symbolic link where the workspace has a directory: nothing is written through it."""
    write(store / "d/x", "x")
    workspace.begin()
    workspace.run(lambda: (Path("d/new").write_text("ours"), Path("d/x").write_text("ours")))
    (tmp_path / "outside").mkdir()
    write(tmp_path / "outside/x", "x")
    os.rename(store / "d", store / "d.real")
    os.symlink(tmp_path / "outside", store / "d")
    outcome = workspace.sync()
    assert outcome.outcome == "conflict"
    assert contents(tmp_path / "outside") == {"x": (b"x", 0o644)}
    assert (store / "d.aerie-conflict-t1/new").read_text() == "ours"
    assert (store / "d.real/x").read_text() == "x"


def test_a_fifo_in_the_store_is_no_place_for_a_file(workspace: Workspace, store: Path) -> None:
    workspace.begin()
    workspace.run(lambda: Path("a").write_text("ours"))
    os.mkfifo(store / "a")
    assert workspace.sync().outcome == "conflict"
    assert workspace.tree() == {"a": "special", "a.aerie-conflict-t1": (b"ours", 0o644)}


def test_two_tasks_of_one_store(workspaces: Callable[[str], Workspace], store: Path) -> None:
    write(store / "shared", "old")
    first, second = workspaces("t1").begin(), workspaces("t2").begin()
    first.run(lambda: (Path("shared").write_text("first"), Path("first").write_text("1")))
    second.run(lambda: (Path("shared").write_text("second"), Path("second").write_text("2")))
    assert first.sync().outcome == "synced"
    assert second.sync().outcome == "conflict"
    assert {name: what[0] for name, what in first.tree().items()} == {
        "first": b"1",
        "second": b"2",
        "shared": b"first",
        "shared.aerie-conflict-t2": b"second",
    }


def test_two_tasks_that_sync_at_once(workspaces: Callable[[str], Workspace], store: Path) -> None:
    """Each of the files that both wrote is there twice: whoever came second found the other's."""
    names = [f"f{number}" for number in range(150)]
    for name in names:
        write(store / name, "old")
    tasks = [workspaces(f"t{number}").begin() for number in range(3)]
    for workspace in tasks:
        workspace.run(lambda: [Path(name).write_text(workspace.task) for name in names])  # noqa: B023 (it runs at once)
    pids = []
    for workspace in tasks:
        pids.append(os.fork())
        if not pids[-1]:
            os._exit({"synced": 0, "conflict": 1}.get(workspace.sync().outcome, 2))
    assert {os.WEXITSTATUS(os.waitpid(pid, 0)[1]) for pid in pids} <= {0, 1}
    for name in names:
        found = sorted(path.read_text() for path in store.iterdir() if path.name.split(".")[0] == name)
        assert found == [workspace.task for workspace in tasks]
    assert not (store / os.fsdecode(RESERVED)).exists()


def test_what_is_carried_out_waits_for_other_syncs_of_the_store(workspace: Workspace, store: Path) -> None:
    workspace.begin()
    workspace.run(lambda: Path("a").write_text("a"))
    locked = os.open(store, os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    pid = os.fork()
    if not pid:
        os.close(locked)
        os._exit(workspace.sync().outcome != "synced")
    journal = workspace.directory / "synced"
    while not journal.exists() or not journal.stat().st_size:
        time.sleep(0.001)
    time.sleep(0.05)  # it has all that it needs, but the lock
    assert not (store / "a").exists()
    os.close(locked)
    assert os.waitpid(pid, 0)[1] == 0
    assert (store / "a").read_text() == "a"


def test_a_conflict_stays_one(workspace: Workspace, store: Path) -> None:
    """What others put where the task removed or wrote is not taken for known: a later write of the task is a conflict again."""
    write(store / "removed", "old")
    write(store / "written", "old")
    workspace.begin()

    def task() -> None:
        os.remove("removed")
        Path("written").write_text("1")

    workspace.run(task)
    for name in ("removed", "written"):
        write(store / name, "theirs", old=False)
    assert workspace.sync().outcome == "conflict"
    workspace.run(lambda: (Path("removed").write_text("2"), Path("written").write_text("2")))
    outcome = workspace.sync()
    assert {conflict.path: conflict.beside for conflict in outcome.conflicts} == {
        b"removed": b"removed.aerie-conflict-t1",
        b"written": b"written.aerie-conflict-t1",
    }
    assert {name: what[0] for name, what in workspace.tree().items()} == {
        "removed": b"theirs",
        "removed.aerie-conflict-t1": b"2",
        "written": b"theirs",
        "written.aerie-conflict-t1": b"2",
    }


def test_hard_links_in_the_store_are_files_of_their_own_to_a_task(workspace: Workspace, store: Path) -> None:
    write(store / "one", "x")
    os.link(store / "one", store / "two")
    os.link(store / "one", store / "three")
    workspace.begin()

    def task() -> None:
        os.utime("one", ns=(5, 5))
        os.chmod("one", 0o600)
        os.rename("two", "moved")
        os.chmod("moved", 0o755)

    workspace.run(task)
    assert workspace.sync().outcome == "synced"
    assert {name: (what[1], (store / name).stat().st_mtime_ns) for name, what in workspace.tree().items()} == {
        "one": (0o600, 5),
        "moved": (0o755, OLD_NS),
        "three": (0o644, OLD_NS),
    }


def test_while_the_task_runs(workspace: Workspace, store: Path) -> None:
    """What is written comes to the store; what the task may still read from there stays, if need be under another name; and a
    sync knows its own work again.
    """
    for name in ("a", "b", "removed", "renamed"):
        write(store / name, name)
    write(store / "d/x", "x")
    aside = f".aerie-sync/t1/was-{(store / 'a').stat().st_ino}"
    workspace.begin()

    def first() -> None:
        Path("a").write_text("1")
        Path("new").write_text("1")
        os.remove("removed")
        os.rename("renamed", "name")
        Path("renamed").write_text("something else")
        os.rename("d", "e")
        os.chmod("b", 0o600)

    workspace.run(first)
    for _ in range(2):
        outcome = workspace.sync(running=True)
        assert (outcome.outcome, outcome.error) == ("synced", "")
        assert {name: what[0] for name, what in workspace.tree().items() if isinstance(what, tuple)} == {
            "a": b"1",
            "b": b"b",
            "new": b"1",
            "removed": b"removed",
            "renamed": b"renamed",
            "d/x": b"x",
            aside: b"a",
        }

    def second() -> None:
        Path("a").write_text("2")
        os.remove("new")
        Path("e/y").write_text("y")

    workspace.run(second)
    assert workspace.sync(running=True).outcome == "synced"
    assert (store / "a").read_text() == "2"
    write(store / "a", "theirs", old=False)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.conflicts) == ("synced", []), (
        "the task's version was there, and was then changed by others"
    )
    assert {name: what[0] for name, what in workspace.tree().items() if isinstance(what, tuple)} == {
        "a": b"theirs",
        "b": b"b",
        "name": b"renamed",
        "renamed": b"something else",
        "e/x": b"x",
        "e/y": b"y",
    }


def test_a_store_that_is_gone_is_made_again(workspace: Workspace, store: Path) -> None:
    write(store / "a", "a")
    workspace.begin()
    workspace.run(lambda: (Path("a").write_text("ours"), Path("new").write_text("ours")))
    (store / "a").unlink()
    store.rmdir()
    assert workspace.sync().outcome == "conflict"
    assert sorted(workspace.tree()) == ["a.aerie-conflict-t1", "new"]


def test_failures_say_why_and_keep_everything(workspace: Workspace, store: Path) -> None:
    write(store / "a", "a")
    workspace.begin()
    workspace.run(lambda: [Path(f"f{number}").write_text("x" * 5000) for number in range(5)])
    for bounds, text in (
        (Bounds(entries_max=3), "more than 3 entries are staged"),
        (Bounds(staged_bytes_max=10_000), "more than 10000 bytes are staged"),
    ):
        outcome = sync(str(store), str(workspace.directory), "t1", bounds)
        assert (outcome.outcome, outcome.error) == ("sync_failed", text)
    listing = workspace.directory / "listing"
    whole = listing.read_bytes()
    listing.write_bytes(whole[:-1])
    assert workspace.sync().outcome == "sync_failed"
    listing.write_bytes(whole)
    assert sorted(workspace.tree()) == ["a"]
    assert workspace.sync().outcome == "synced"
    assert len(workspace.tree()) == 6


def test_a_full_disk(workspace: Workspace, store: Path, tmp_path: Path) -> None:
    """The sync fails with the reason, leaves nothing half written in sight, and succeeds when there is room."""
    small = tmp_path / "small"
    small.mkdir()
    assert os.system(f"mount -t tmpfs -o size=200k none {small}") == 0
    try:
        workspace.store = small / "store"
        workspace.begin()
        workspace.run(lambda: [Path(f"f{number}").write_bytes(b"x" * 100_000) for number in range(3)])
        outcome = workspace.sync()
        assert outcome.outcome == "sync_failed"
        assert "No space left" in outcome.error
        assert os.system(f"mount -o remount,size=1m {small}") == 0
        assert workspace.sync().outcome == "synced"
        assert sorted(workspace.tree()) == ["f0", "f1", "f2"]
    finally:
        os.system(f"umount {small}")
