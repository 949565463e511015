"""Every trap on the way back from a workspace, and the tests that stand at it.

`TRAPS` is the whole list, of DESIGN's paragraph on sync and of what was met since; each test is `module::name`, in this directory or in
tests/node.  Those of this module are with real overlays, and look first whether the trap is there: whether overlayfs left in the
upper directory what the test is about.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import stat
from pathlib import Path

import pytest

from actors.mount.listing import RESERVED
from tests.actors.mount.conftest import OLD_NS, Workspace, contents, write

BIG = b"b" * 200_000
RENAME_EXCHANGE = 2

TRAPS = {
    "a mapped write moves no time until fsync": [
        "test_sync::test_mapped_writes",
        "test_sync::test_a_mapped_write_during_a_sync_is_seen_by_the_next",
        "test_changes::test_a_mapped_write_after_a_sync_is_a_change",
        "test_copying::test_a_write_after_the_copy_moves_the_change_time",
    ],
    "a directory is renamed (redirect)": [
        "test_staging::test_redirected_directories",
        "test_sync::test_renames_copy_nothing",
        "test_sync::test_directories_swapped_and_nested",
        "test_sync::test_a_directory_renamed_by_the_task_and_changed_by_others_is_moved_file_by_file",
    ],
    "names are exchanged": ["test_traps::test_names_exchanged"],
    "a file is renamed or linked (redirect, absolute or relative)": [
        "test_staging::test_files_of_which_only_the_metadata_was_copied",
        "test_traps::test_redirects_of_files_absolute_and_relative",
    ],
    "a redirect whose file was written to since": [
        "test_staging::test_a_redirect_without_metacopy_means_nothing",
        "test_traps::test_a_renamed_file_that_is_written_to_has_its_own_content",
    ],
    "only metadata was copied (metacopy)": [
        "test_traps::test_chmod_and_utime_upload_nothing",
        "test_staging::test_an_attribute_that_goes_under_the_walk",
    ],
    "a whiteout against a changed store": [
        "test_sync::test_conflicts_lose_nothing",
        "test_traps::test_whiteouts_against_a_changed_store",
    ],
    "whiteouts are links of one inode": ["test_staging::test_whiteouts", "test_traps::test_whiteouts_against_a_changed_store"],
    "an opaque directory": [
        "test_staging::test_opaque_directories_hide_what_is_below",
        "test_sync::test_opaque_directories",
        "test_traps::test_an_opaque_directory_against_a_changed_store",
    ],
    "origin, impure, uuid and nlink mean nothing": ["test_staging::test_a_redirect_without_metacopy_means_nothing"],
    "forged names": [
        "test_sync::test_forged_names",
        "test_traps::test_the_private_directory_is_no_directory",
        "test_workspaces::test_forged_and_odd_names",
    ],
    "devices, pipes, sockets": [
        "test_sync::test_what_is_no_file_stays_behind_and_is_said",
        "test_workspaces::test_what_never_comes_back_is_said",
    ],
    "setuid and setgid": [
        "test_sync::test_what_is_no_file_stays_behind_and_is_said",
        "test_workspaces::test_what_never_comes_back_is_said",
    ],
    "hard links of the store split at copy-up": [
        "test_sync::test_hard_links_in_the_store_are_files_of_their_own_to_a_task",
        "test_traps::test_a_hard_link_of_the_store_is_split_by_a_write",
    ],
    "hard links that the task made": ["test_sync::test_hard_links_in_staging_are_one_file_in_the_store"],
    "sparse files": [
        "test_sync::test_sparse_files_stay_sparse",
        "test_workspaces::test_one_mib_of_ten_gb_costs_about_that",
    ],
    "a directory swapped for a symbolic link in mid-walk": [
        "test_staging::test_names_swapped_under_the_walk",
        "test_indexing::test_a_store_that_changes_under_the_walk",
        "test_sync::test_a_link_in_the_store_leads_nowhere",
        "test_listing::test_no_link_is_followed_out_of_a_directory",
    ],
    "times from before 1970 and from far ahead": ["test_traps::test_odd_times"],
    "directories that nobody may enter": ["test_traps::test_directories_that_nobody_may_enter"],
    "too many, too deep, too large, too long": [
        "test_staging::test_bounds",
        "test_staging::test_a_path_too_long_for_the_kernel_is_refused",
        "test_changes::test_bounds_and_links",
        "test_workspaces::test_a_workspace_over_a_bound_is_refused_with_the_bound",
    ],
    "a file that does not hold still": [
        "test_process::test_a_file_that_does_not_hold_still_is_tried_again",
        "test_workspaces::test_a_busy_writer_and_its_syncer_and_supervisor_killed",
    ],
    "a file that is open since before its new version was synced": [
        "test_source::test_a_version_that_a_sync_put_aside_is_still_read",
        "test_workspaces::test_a_file_that_is_open_since_before_it_was_synced_is_read_as_it_was",
    ],
    "a conflict of the running task that resolves itself": [
        "test_traps::test_a_conflict_that_was_found_while_the_task_ran_and_is_none_in_the_end"
    ],
    "a sync that is killed, while the task and others go on": [
        "test_sync_killed::test_killed_at_any_instant_while_the_task_runs",
        "test_sync_killed::test_nobody_loses_anything",
        "test_workspaces::test_a_busy_writer_and_its_syncer_and_supervisor_killed",
    ],
    "a version that is no longer the listed one": [
        "test_workspaces::test_a_version_that_is_gone_is_an_error_in_the_task_with_the_reason"
    ],
    "staging that is being removed": ["test_journal::test_a_directory_that_is_removed_is_synced_no_more"],
    "a second listing under staged changes": ["test_process::test_a_workspace_with_staged_changes_is_not_indexed_again"],
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_tests(trap: str) -> None:
    for test in TRAPS[trap]:
        module, _, name = test.partition("::")
        package = "tests.node" if module == "test_workspaces" else "tests.actors.mount"
        assert callable(getattr(importlib.import_module(f"{package}.{module}"), name)), test


def attributes(path: Path) -> dict[str, bytes]:
    """The overlay's, of something in an upper directory."""
    found = {name.removeprefix("trusted.overlay."): os.getxattr(path, name) for name in os.listxattr(path)}
    return {name: found[name] for name in ("metacopy", "redirect", "opaque") if name in found}


def test_redirects_of_files_absolute_and_relative(workspace: Workspace, store: Path) -> None:
    """Renamed, and linked, without a copy of the content anywhere."""
    for name in ("d/beside", "d/away", "d/linked"):
        write(store / name, BIG)
    (store / "other").mkdir()
    inodes = {name: (store / "d" / name).stat().st_ino for name in ("beside", "away", "linked")}
    workspace.begin()
    workspace.run(lambda: (os.rename("d/beside", "d/new"), os.rename("d/away", "other/away"), os.link("d/linked", "link")))
    assert attributes(workspace.upper / "d/new")["redirect"] == b"beside"
    assert attributes(workspace.upper / "other/away")["redirect"].startswith(b"/d/")
    assert "metacopy" in attributes(workspace.upper / "link")
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files, outcome.written_bytes) == ("synced", 0, 0)
    assert {name: (store / name).stat().st_ino for name in ("d/new", "other/away", "link", "d/linked")} == {
        "d/new": inodes["beside"],
        "other/away": inodes["away"],
        "link": inodes["linked"],
        "d/linked": inodes["linked"],
    }
    assert sorted(path.name for path in (store / "d").iterdir()) == ["linked", "new"]


def test_a_renamed_file_that_is_written_to_has_its_own_content(workspace: Workspace, store: Path) -> None:
    write(store / "old", BIG)
    write(store / "other", BIG)
    workspace.begin()

    def task() -> None:
        os.rename("old", "new")
        with open("new", "r+b") as file:
            file.write(b"written")
        os.rename("other", "old")

    workspace.run(task)
    found = attributes(workspace.upper / "new")
    assert "redirect" in found and "metacopy" not in found
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files) == ("synced", 1)
    assert contents(store) == {"new": (b"written" + BIG[7:], 0o644), "old": (BIG, 0o644)}


def test_chmod_and_utime_upload_nothing(workspace: Workspace, store: Path) -> None:
    write(store / "mode", BIG)
    write(store / "time", BIG)
    inodes = [(store / name).stat().st_ino for name in ("mode", "time")]
    workspace.begin()
    workspace.run(lambda: (os.chmod("mode", 0o700), os.utime("time", ns=(7, 7))))
    assert all("metacopy" in attributes(workspace.upper / name) for name in ("mode", "time"))
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files) == ("synced", 0)
    assert [(store / name).stat().st_ino for name in ("mode", "time")] == inodes
    assert ((store / "mode").stat().st_mode & 0o777, (store / "mode").stat().st_mtime_ns) == (0o700, OLD_NS)
    assert ((store / "time").stat().st_mode & 0o777, (store / "time").stat().st_mtime_ns) == (0o644, 7)


def test_whiteouts_against_a_changed_store(workspace: Workspace, store: Path) -> None:
    """Overlayfs links them all to one inode.  Each removes what was listed there, and nothing else."""
    for name in ("gone", "changed", "replaced", "d/gone", "d/changed"):
        write(store / name, "old")
    workspace.begin()

    def task() -> None:
        for name in ("gone", "changed", "replaced", "d/gone", "d/changed"):
            os.remove(name)
        os.rmdir("d")

    workspace.run(task)
    whiteouts = [path.lstat() for path in workspace.upper.iterdir()]
    assert all(stat.S_ISCHR(status.st_mode) and status.st_rdev == 0 for status in whiteouts)
    assert max(status.st_nlink for status in whiteouts) > 1
    write(store / "changed", "theirs", old=False)
    (store / "replaced").unlink()
    (store / "replaced").mkdir()
    write(store / "replaced/theirs", "theirs", old=False)
    write(store / "d/changed", "theirs", old=False)
    write(store / "d/new", "theirs", old=False)
    outcome = workspace.sync()
    assert {conflict.path for conflict in outcome.conflicts} == {b"changed", b"replaced", b"d/changed"}
    assert {name for name, what in contents(store).items() if isinstance(what, tuple)} == {
        "changed",
        "replaced/theirs",
        "d/changed",
        "d/new",
    }


def test_an_opaque_directory_against_a_changed_store(workspace: Workspace, store: Path) -> None:
    for name in ("d/gone", "d/changed", "d/again"):
        write(store / name, "old")
    workspace.begin()

    def task() -> None:
        for name in ("d/gone", "d/changed", "d/again"):
            os.remove(name)
        os.rmdir("d")
        os.mkdir("d")
        Path("d/again").write_text("ours")

    workspace.run(task)
    assert attributes(workspace.upper / "d")["opaque"] == b"y"
    for name in ("d/changed", "d/again", "d/theirs"):
        write(store / name, "theirs", old=False)
    outcome = workspace.sync()
    assert {conflict.path: conflict.beside for conflict in outcome.conflicts} == {
        b"d/changed": b"",
        b"d/again": b"d/again.aerie-conflict-t1",
    }
    assert {name: what[0] for name, what in contents(store).items() if isinstance(what, tuple)} == {
        "d/changed": b"theirs",
        "d/again": b"theirs",
        "d/again.aerie-conflict-t1": b"ours",
        "d/theirs": b"theirs",
    }


def test_a_hard_link_of_the_store_is_split_by_a_write(workspace: Workspace, store: Path) -> None:
    """Copy-up makes a file of its own of the one name; the others keep the content that they share."""
    write(store / "one", BIG)
    os.link(store / "one", store / "two")
    os.link(store / "one", store / "three")
    workspace.begin()

    def task() -> None:
        with open("one", "ab") as file:
            file.write(b"more")
        os.remove("three")

    workspace.run(task)
    assert workspace.sync().outcome == "synced"
    assert contents(store) == {"one": (BIG + b"more", 0o644), "two": (BIG, 0o644)}
    assert not (store / "one").samefile(store / "two")


def test_names_exchanged(workspace: Workspace, store: Path) -> None:
    """renameat2(RENAME_EXCHANGE): nothing was ever removed, and everything is somewhere else."""
    write(store / "a", BIG)
    write(store / "b", BIG + b"b")
    write(store / "d/x", "x")
    write(store / "e/y", "y")
    write(store / "file", "file")
    write(store / "directory/z", "z")
    workspace.begin()

    def task() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for one, other in (("a", "b"), ("d", "e"), ("file", "directory")):
            assert not libc.renameat2(-100, one.encode(), -100, other.encode(), RENAME_EXCHANGE), ctypes.get_errno()

    workspace.run(task)
    wanted = contents(workspace.root)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files, outcome.conflicts) == ("synced", 0, [])
    assert contents(store) == wanted
    assert wanted["directory"] == (b"file", 0o644) and wanted["file/z"] == (b"z", 0o644)


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_the_private_directory_is_no_directory(workspace: Workspace, store: Path, tmp_path: Path, kind: str) -> None:
    """Somebody who may write to the store has put something else there: no sync goes through it, and each says so."""
    outside = tmp_path / "outside"
    (outside / "t1").mkdir(parents=True)
    private = store / os.fsdecode(RESERVED)
    workspace.begin()
    workspace.run(lambda: Path("a").write_text("a"))
    {"link": lambda: os.symlink(outside, private), "file": private.touch, "fifo": lambda: os.mkfifo(private)}[kind]()
    for running in (True, False):
        outcome = workspace.sync(running)
        assert outcome.outcome == "sync_failed"
        assert ".aerie-sync" in outcome.error
    assert contents(outside) == {"t1": 0o755}
    private.unlink()
    assert workspace.sync().outcome == "synced"
    assert contents(store) == {"a": (b"a", 0o644)}


def test_odd_times(workspace: Workspace, store: Path) -> None:
    """Before 1970, and as far ahead as the file system goes; from the store, and from the task."""
    far_ns = 15_000_000_000 * 10**9
    for name, time_ns in (("before", -5), ("ahead", far_ns), ("touched", OLD_NS)):
        write(store / name, name)
        os.utime(store / name, ns=(time_ns, time_ns))
    workspace.begin()
    assert (workspace.root / "before").stat().st_mtime_ns == -5

    def task() -> None:
        os.utime("touched", ns=(-7, -7))
        Path("new").write_text("new")
        os.utime("new", ns=(far_ns, far_ns))
        os.chmod("ahead", 0o600)

    workspace.run(task)
    assert workspace.sync().outcome == "synced"
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == {
        "before": -5,
        "ahead": far_ns,
        "touched": -7,
        "new": far_ns,
    }


def test_directories_that_nobody_may_enter(workspace: Workspace, store: Path) -> None:
    write(store / "d/x", "x")
    workspace.begin()

    def task() -> None:
        os.makedirs("closed/deep")
        Path("closed/deep/file").write_text("x")
        os.chmod("closed/deep", 0)
        os.chmod("closed", 0o111)
        Path("d/new").write_text("x")
        os.chmod("d", 0)

    workspace.run(task)
    assert workspace.sync().outcome == "synced"
    assert contents(store) == {
        "closed": 0o111,
        "closed/deep": 0,
        "closed/deep/file": (b"x", 0o644),
        "d": 0,
        "d/new": (b"x", 0o644),
        "d/x": (b"x", 0o644),
    }


def test_a_conflict_that_was_found_while_the_task_ran_and_is_none_in_the_end(workspace: Workspace, store: Path) -> None:
    """What was put beside goes with it, unless somebody has changed that."""
    for name in ("agreed", "removed", "touched"):
        write(store / name, "old")
    workspace.begin()
    names = ("agreed", "removed", "touched", "new", "kept")
    workspace.run(lambda: [Path(name).write_text("ours") for name in names])
    for name in names:
        write(store / name, "theirs", old=False)
    outcome = workspace.sync(running=True)
    assert {conflict.path for conflict in outcome.conflicts} == {name.encode() for name in names}
    assert all((store / f"{name}.aerie-conflict-t1").read_text() == "ours" for name in names)

    def task() -> None:
        Path("agreed").write_text("theirs")
        for name in ("removed", "touched", "new"):
            os.remove(name)

    workspace.run(task)
    write(store / "touched.aerie-conflict-t1", "somebody's", old=False)
    for _ in range(2):
        outcome = workspace.sync()
        assert {conflict.path: conflict.beside for conflict in outcome.conflicts} == {
            b"kept": b"kept.aerie-conflict-t1",
            b"removed": b"",  # it was in the listing: the task removed what others changed
            b"touched": b"",
        }
        assert {name: what[0] for name, what in workspace.tree().items()} == {
            "agreed": b"theirs",
            "removed": b"theirs",
            "touched": b"theirs",
            "touched.aerie-conflict-t1": b"somebody's",
            "new": b"theirs",
            "kept": b"theirs",
            "kept.aerie-conflict-t1": b"ours",
        }
