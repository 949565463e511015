"""Archives over their cap: which go, and which are somebody's."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from actors.cache.archives import evict, look
from actors.image.archives import archive as archive_module
from actors.image.archives.archive import hold


def archive(directory: Path, number: int, used_s: float, size: int = 1000) -> Path:
    path = directory / f"sha256-{number:064x}.aerie"
    path.write_bytes(bytes(size))
    path.with_suffix(".work.trace").write_bytes(bytes(100))
    for each in (path, path.with_suffix(".work.trace")):
        os.utime(each, (used_s, used_s))
    return path


def test_the_longest_unused_goes_with_what_lies_beside_it_unless_somebody_holds_it(tmp_path: Path) -> None:
    now = time.time()
    paths = [archive(tmp_path, number, now - 10_000 + number) for number in range(5)]
    (tmp_path / ".sha256-x.tmp").write_bytes(bytes(5000))
    assert sorted(found.size_bytes for found in look(str(tmp_path))) == [1100] * 5
    assert evict(str(tmp_path), 5500, lambda _: True).archives == 0
    held = hold(str(paths[0]))
    os.utime(paths[0], (0, 0))  # by another node's clock, say
    # Down to nine tenths of the cap; what is damaged, as these are, is asked nobody for.
    assert evict(str(tmp_path), 5000, lambda _: True)[:2] == (1, 1100)
    assert sorted(tmp_path.glob("sha256-*")) == sorted(
        each for path in (paths[0], *paths[2:]) for each in (path, path.with_suffix(".work.trace"))
    )
    os.close(held)
    assert evict(str(tmp_path), 1100, lambda _: True).archives == 4
    assert not list(tmp_path.glob("sha256-*"))


def test_what_was_just_used_or_cannot_be_made_again_stays(tmp_path: Path) -> None:
    new, old = archive(tmp_path, 1, time.time()), archive(tmp_path, 2, 1.0)
    gone = evict(str(tmp_path), 100, lambda source: False)
    assert (gone.archives, gone.short) == (0, True) and new.exists() and old.exists()
    assert evict(str(tmp_path), 100, lambda source: True).archives == 1
    assert new.exists() and not old.exists()


def test_one_that_is_just_being_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "HOLD_TRIES", 60_000)  # a minute of them
    path = archive(tmp_path, 1, 1.0)
    locked = os.open(path, os.O_RDWR)  # somebody else's lock, for a moment
    fcntl.flock(locked, fcntl.LOCK_EX)
    unlocking = threading.Timer(0.05, os.close, [locked])
    unlocking.start()
    descriptor = hold(str(path))
    unlocking.join()
    os.close(descriptor)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        hold(str(path))
