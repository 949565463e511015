"""The journal of a task's syncs: cut at every byte, compacted, and locked against whoever removes it."""

from __future__ import annotations

import os
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from actors.mount import journal as journals
from actors.mount.journal import JOURNAL, Batch, Journal, no_more_syncs, summary
from actors.mount.listing import LISTING, read_listing
from actors.mount.steps import Known
from tests.actors.mount.conftest import Workspace, write


def test_a_torn_journal_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append(Batch(True, conflicts=[(b"a", b"b", "why")]))
    journal.append(Batch(False))
    journal.close()
    whole = (tmp_path / "synced").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "synced").write_bytes(whole[:length])
        journal = Journal(str(tmp_path))
        assert len(journal.batches) <= 1
        journal.append(Batch(True))
        journal.close()
        journal = Journal(str(tmp_path))
        assert journal.batches[-1] == Batch(True)
        journal.close()


def known_of(workspace: Workspace) -> Known:
    known = Known.listed(read_listing(str(workspace.directory)))
    journal = Journal(str(workspace.directory))
    for batch in journal.batches:
        if batch.settled:
            journals.settle(known, batch)
    journal.close()
    return known


def test_a_summary_says_what_all_the_batches_did(workspace: Workspace, store: Path) -> None:
    for name in ("a", "b", "c", "d/e/f", "d/g", "conflict"):
        write(store / name, name)
    workspace.begin()

    def first() -> None:
        Path("a").write_text("1")
        os.remove("b")
        os.rename("d", "moved")
        Path("moved/new").write_text("new")
        os.chmod("c", 0o600)
        Path("conflict").write_text("ours")

    workspace.run(first)
    write(store / "conflict", "theirs", old=False)
    workspace.sync()
    workspace.run(lambda: (os.rename("moved/e", "e"), Path("a").write_text("2")))
    workspace.sync()
    known = known_of(workspace)
    again = Known.listed(read_listing(str(workspace.directory)))
    journals.settle(again, summary(read_listing(str(workspace.directory)), known))
    assert len(known.moves) == 2
    assert (again.ours, again.theirs, again.conflicts, again.moves) == (
        known.ours,
        known.theirs,
        known.conflicts,
        known.moves,
    )


def test_a_long_journal_is_replaced_and_nothing_is_forgotten(
    workspace: Workspace, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "COMPACT_BYTES", 4000)
    write(store / "old", "old")
    workspace.begin()
    journal, sizes = workspace.directory / JOURNAL, []
    for number in range(60):
        workspace.run(lambda: [Path(f"f{name}").write_text(f"{number}") for name in range(5)])  # noqa: B023 (it runs at once)
        assert workspace.sync(running=True).files == 5
        sizes.append(journal.stat().st_size)
    assert max(sizes) < 4000 + 2000, "what one sync adds is on top"
    assert any(later < earlier for earlier, later in pairwise(sizes))
    inode = (store / "f0").stat().st_ino
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.files, outcome.conflicts) == ("synced", 0, [])
    assert (store / "f0").stat().st_ino == inode
    assert {name: what[0] for name, what in workspace.tree().items()} == {"old": b"old"} | {
        f"f{name}": b"59" for name in range(5)
    }


def test_a_journal_of_much_is_left_as_it_is(workspace: Workspace, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compacting it would gain nothing, and would be done again each time."""
    monkeypatch.setattr(journals, "COMPACT_BYTES", 100)
    workspace.begin()
    workspace.run(lambda: [Path(f"f{name}").write_text("x") for name in range(20)])
    workspace.sync()
    inode = (workspace.directory / JOURNAL).stat().st_ino
    workspace.sync()
    assert (workspace.directory / JOURNAL).stat().st_ino == inode


def test_who_waits_for_the_lock_gets_the_journal_that_is_there_then(
    workspace: Workspace, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "COMPACT_BYTES", 1)
    monkeypatch.setattr(journals, "COMPACT_RATIO", 0)
    workspace.begin()
    workspace.run(lambda: Path("a").write_text("a"))
    workspace.sync(running=True)
    first = Journal(str(workspace.directory))
    second: list[Journal] = []
    waiter = threading.Thread(target=lambda: second.append(Journal(str(workspace.directory))))
    waiter.start()
    time.sleep(0.05)
    listing = read_listing(str(workspace.directory))
    known = Known.listed(listing)
    for batch in first.batches:
        journals.settle(known, batch)
    first.compact(listing, known)
    time.sleep(0.05)
    assert second == [], "the new one is locked as well"
    first.close()
    waiter.join(60)
    assert second[0].batches == [summary(listing, known)]
    second[0].close()


def test_a_directory_that_is_removed_is_synced_no_more(workspace: Workspace, store: Path) -> None:
    """Half removed it looks like a task that took its work back."""
    os.symlink("theirs", store / "link")
    write(store / "d/x", "x")
    workspace.begin()

    def task() -> None:
        os.remove("link")
        os.symlink("ours", "link")
        os.remove("d/x")
        os.rmdir("d")
        Path("a").write_text("a")

    workspace.run(task)
    assert workspace.sync().outcome == "synced"
    wanted = workspace.tree()
    with workspace.locked_journal():
        removed: list[str] = []

        def remove() -> None:
            with no_more_syncs(str(workspace.directory)):
                for path in workspace.upper.iterdir():
                    path.unlink()
                removed.append("all")

        remover = threading.Thread(target=remove)
        remover.start()
        time.sleep(0.05)
        assert removed == [], "a sync is under way"
    remover.join(60)
    assert removed == ["all"]
    for running in (True, False):
        outcome = workspace.sync(running)
        assert (outcome.outcome, LISTING in outcome.error) == ("sync_failed", True)
    assert workspace.tree() == wanted


def test_no_more_syncs_of_what_is_not_there(tmp_path: Path) -> None:
    with no_more_syncs(str(tmp_path / "nowhere")):
        assert not (tmp_path / "nowhere").exists()
