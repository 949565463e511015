from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lazytree.objects import Objects
from tests.actors.lazytree.harness import fork

KEY = hashlib.sha256(b"x").hexdigest()
OTHER = hashlib.sha256(b"y").hexdigest()


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Objects]:
    objects = Objects(str(tmp_path / "objects"))
    yield objects
    objects.close()


def put(objects: Objects, key: str, content: bytes) -> bool:
    with objects.create() as file:
        file.write(content)
        return objects.publish(file, key)


def files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "objects").glob("??/*"))


def test_an_object_is_there_when_it_is_published(objects: Objects, tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        with objects.create() as file:
            file.write(b"content")
            assert not objects.has(KEY) and files(tmp_path) == []
            assert objects.publish(file, KEY)
    finally:
        os.umask(umask)
    [path] = files(tmp_path)
    assert path == tmp_path / "objects" / KEY[:2] / KEY[2:]
    assert path.read_bytes() == b"content" and path.stat().st_mode & 0o7777 == 0o444 and path.stat().st_nlink == 1
    assert objects.has(KEY) and not objects.has(OTHER)


def test_the_first_to_publish_wins_and_the_second_succeeds(objects: Objects, tmp_path: Path) -> None:
    assert put(objects, KEY, b"first")
    assert not put(objects, KEY, b"second")
    assert [path.read_bytes() for path in files(tmp_path)] == [b"first"]


def test_a_writer_that_is_killed_leaves_nothing(objects: Objects, tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        file = objects.create()
        file.write(bytes(1 << 20))
        file.flush()
        os.write(writing, b".")
        signal.pause()

    pid = fork(write)
    os.read(reading, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    assert files(tmp_path) == []


def test_everything_goes_by_the_directory_opened_once(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "objects").rename(tmp_path / "moved")
    assert put(objects, KEY, b"content") and objects.has(KEY)
    assert (tmp_path / "moved" / KEY[:2] / KEY[2:]).read_bytes() == b"content"


def test_after_a_power_loss_only_what_was_synced_is_believed(objects: Objects, tmp_path: Path) -> None:
    put(objects, KEY, b"durable")
    objects.sync()
    os.sync()
    while put(objects, OTHER, b"perhaps torn") and not is_later(tmp_path, OTHER):
        os.unlink(tmp_path / "objects" / objects.path(OTHER))  # the file system's clock has not moved on yet
    again = Objects(str(tmp_path / "objects"))
    assert again.forget_unsynced() == 1
    assert again.has(KEY) and not again.has(OTHER)
    again.close()


def is_later(tmp_path: Path, key: str) -> bool:
    changed_ns = (tmp_path / "objects" / Objects.path(key)).stat().st_ctime_ns
    return changed_ns > (tmp_path / "objects" / "synced").stat().st_mtime_ns


def test_nothing_is_durable_before_the_first_sync(objects: Objects) -> None:
    put(objects, KEY, b"content")
    assert objects.forget_unsynced() == 1
