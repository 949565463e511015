"""Single steps in a store, where a whole sync would not come to them."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from actors.mount.listing import Entry
from actors.mount.publish import Publisher
from actors.mount.staging import staged_entry
from actors.mount.steps import Action, Step
from actors.mount.store import Store
from tests.actors.mount.conftest import write


def test_a_renamed_file_whose_old_name_stays_is_not_described_in_place(store: Path, tmp_path: Path) -> None:
    """Its old name was to go, and did not: its inode is not this step's alone."""
    write(store / "old", "x")
    upper = os.open(tmp_path, os.O_RDONLY)
    opened = Store(str(store), "t1", upper)
    publisher = Publisher(opened, upper)
    entry = opened.look(b"old")
    assert entry is not None
    wanted = Entry(stat.S_IFREG | 0o600, 5, entry.content)
    step = Step(Action.LINK, b"new", b"new", wanted, None, wanted.mode, b"old", entry.content)
    prepared = publisher.prepare(step, going=True)
    assert prepared is not None
    with opened.lock():
        assert not publisher.carry_out(prepared)
    assert opened.look(b"old") == entry
    assert opened.recover() == {entry.content: b".aerie-sync/t1/" + prepared.temporary}
    (store / "old").unlink()
    with opened.lock():
        assert publisher.carry_out(prepared)
    assert opened.look(b"new") == prepared.reached
    opened.clean()
    publisher.close()
    opened.close()
    os.close(upper)
    assert list(store.iterdir()) == [store / "new"]


def test_a_staged_file_that_is_another_by_now_is_not_uploaded(store: Path, tmp_path: Path) -> None:
    """It was replaced, or a file with nothing but metadata took its place: its bytes would be zeros."""
    (tmp_path / "upper").mkdir()
    write(tmp_path / "upper/file", "x")
    upper = os.open(tmp_path / "upper", os.O_RDONLY)
    opened = Store(str(store), "t1", upper)
    publisher = Publisher(opened, upper)
    step = Step(Action.PUT, b"file", b"file", staged_entry((tmp_path / "upper/file").stat()), None, stat.S_IFREG | 0o644)
    prepared = publisher.prepare(step)
    assert prepared is not None
    assert (store / os.fsdecode(opened.private + b"/" + prepared.temporary)).read_text() == "x"
    os.setxattr(tmp_path / "upper/file", "trusted.overlay.metacopy", b"")
    assert publisher.prepare(step) is None
    os.rename(tmp_path / "upper/file", tmp_path / "upper/kept")
    write(tmp_path / "upper/file", "y")
    assert publisher.prepare(step) is None
    publisher.close()
    opened.close()
    os.close(upper)


def test_a_sync_that_ends_takes_nothing_from_one_that_begins(store: Path, tmp_path: Path) -> None:
    """What both have their private directories in goes with the last of them, and comes again with the next."""
    upper = os.open(tmp_path, os.O_RDONLY)
    errors: list[OSError] = []

    def begin_and_end(task: str) -> None:
        opened = Store(str(store), task, upper)
        try:
            for _ in range(300):
                with opened.private_name("dir") as (directory, name):
                    os.mkdir(name, dir_fd=directory)
                opened.clean()
        except OSError as error:
            errors.append(error)
        finally:
            opened.close()

    tasks = [threading.Thread(target=begin_and_end, args=[f"t{number}"]) for number in range(3)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    os.close(upper)
    assert errors == []
    assert list(store.iterdir()) == []
