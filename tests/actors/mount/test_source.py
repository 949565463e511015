"""The store as a source: the listed version or nothing, whatever was done to the store."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from actors.lazytree.server import SourceError
from actors.lazytree.table import Row
from actors.mount.source import KEPT_OPEN_MAX, DirectorySource, StoredFile

CHANGED = "a/b/file: changed in the store since the task began"


def list_file(store: Path, name: str) -> Row:
    status = (store / name).stat()
    version = StoredFile(os.fsencode(name), status.st_ino, status.st_size, status.st_mtime_ns)
    return Row("00" * 32, status.st_size, msgspec.msgpack.encode(version))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store/a/b").mkdir(parents=True)
    (tmp_path / "store/a/b/file").write_bytes(b"0123456789")
    return tmp_path / "store"


def read(source: DirectorySource, row: Row, offset: int, size: int, index: int = 0) -> bytes:
    return trio.run(source.read, index, row, offset, size)


def test_ranges(store: Path) -> None:
    source, row = DirectorySource(str(store)), list_file(store, "a/b/file")
    assert read(source, row, 0, 10) == b"0123456789"
    assert read(source, row, 3, 4) == b"3456"


def replace_by_newer(store: Path) -> None:
    (store / "a/b/new").write_bytes(b"abcdefghij")
    (store / "a/b/new").rename(store / "a/b/file")


def replace_by_copy(store: Path) -> None:
    shutil.copy2(store / "a/b/file", store / "a/b/new")  # the same size and time
    (store / "a/b/new").rename(store / "a/b/file")


def replace_by_fifo(store: Path) -> None:
    (store / "a/b/file").unlink()
    os.mkfifo(store / "a/b/file")  # an open without O_NONBLOCK would wait for a writer


def replace_by_socket(store: Path) -> None:
    (store / "a/b/file").unlink()
    with socket.socket(socket.AF_UNIX) as end:
        descriptor = os.open(store, os.O_RDONLY)
        end.bind(f"/proc/self/fd/{descriptor}/a/b/file")
        os.close(descriptor)


def replace_by_link(store: Path) -> None:
    (store / "a/b/file").rename(store / "elsewhere")
    (store / "a/b/file").symlink_to("../../elsewhere")


def replace_directory_by_link(store: Path) -> None:
    (store / "a/b").rename(store / "a/c")
    (store / "a/b").symlink_to("c")


def replace_directory_by_file(store: Path) -> None:
    shutil.rmtree(store / "a/b")
    (store / "a/b").write_bytes(b"")


def replace_by_directory(store: Path) -> None:
    (store / "a/b/file").unlink()
    (store / "a/b/file").mkdir()


def remove(store: Path) -> None:
    (store / "a/b/file").unlink()


def rewrite(store: Path) -> None:
    (store / "a/b/file").write_bytes(b"abcdefghij")
    os.utime(store / "a/b/file", (1, 1))


def grow(store: Path) -> None:
    status = (store / "a/b/file").stat()
    with open(store / "a/b/file", "ab") as file:
        file.write(b"x")
    os.utime(store / "a/b/file", ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = [
    replace_by_newer,
    replace_by_copy,
    replace_by_fifo,
    replace_by_socket,
    replace_by_link,
    replace_directory_by_link,
    replace_directory_by_file,
    replace_by_directory,
    remove,
    rewrite,
    grow,
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_version_is_refused(store: Path, change: Callable[[Path], None]) -> None:
    source, row = DirectorySource(str(store)), list_file(store, "a/b/file")
    change(store)
    with pytest.raises(SourceError) as raised:
        read(source, row, 0, 10)
    assert raised.value.reason == CHANGED


def test_a_file_kept_open_is_checked_at_every_read(store: Path) -> None:
    source, row = DirectorySource(str(store)), list_file(store, "a/b/file")
    assert read(source, row, 0, 5) == b"01234"
    replace_by_newer(store)
    assert read(source, row, 5, 5) == b"56789"  # the listed version still, although its name has another by now
    source, row = DirectorySource(str(store)), list_file(store, "a/b/file")
    read(source, row, 0, 5)
    rewrite(store)
    with pytest.raises(SourceError, match=CHANGED):
        read(source, row, 0, 5)


def test_a_change_during_the_read_is_seen(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, row = DirectorySource(str(store)), list_file(store, "a/b/file")
    pread = os.pread

    def pread_and_change(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        rewrite(store)
        return data

    monkeypatch.setattr(os, "pread", pread_and_change)  # the one moment that no other process can hit for certain
    with pytest.raises(SourceError, match=CHANGED):
        read(source, row, 0, 10)


def test_the_store_may_be_moved_and_a_reason_is_always_text(store: Path) -> None:
    (store / os.fsdecode(b"\xff")).write_bytes(b"x")
    source, row = DirectorySource(str(store)), list_file(store, os.fsdecode(b"\xff"))
    store.rename(store.with_name("moved"))
    assert read(source, row, 0, 1) == b"x"
    with pytest.raises(SourceError) as raised:
        read(source, row._replace(source=row.source.replace(b"\xff", b"\xfe")), 0, 1, index=1)
    assert raised.value.reason == "\\xfe: changed in the store since the task began"


def test_what_cannot_be_opened_says_why(store: Path) -> None:
    long = StoredFile(b"x" * 300, 1, 1, 1)
    with pytest.raises(SourceError, match="cannot be read in the store: File name too long"):
        read(DirectorySource(str(store)), Row("00" * 32, 1, msgspec.msgpack.encode(long)), 0, 1)


def test_few_files_are_kept_open(store: Path) -> None:
    count = KEPT_OPEN_MAX + 40
    for number in range(count):
        (store / f"{number}").write_bytes(b"%03d" % number)
    rows = [list_file(store, f"{number}") for number in range(count)]

    async def read_all(source: DirectorySource) -> None:
        async def one(number: int) -> None:
            assert await source.read(number, rows[number], 0, 3) == b"%03d" % number

        async with trio.open_nursery() as nursery:
            for number in (*range(count), *range(count)):
                nursery.start_soon(one, number)

    def open_below() -> int:
        found = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found += os.readlink(f"/proc/self/fd/{name}").startswith(f"{store}/")
        return found

    def wait_until_open(count: int) -> None:
        """A thread that has read holds its file, and the source, for an instant after everybody has been answered."""
        deadline = time.monotonic() + 60
        while (found := open_below()) != count:
            assert time.monotonic() < deadline, found
            time.sleep(0.001)

    source = DirectorySource(str(store))
    trio.run(read_all, source)
    wait_until_open(KEPT_OPEN_MAX)
    del source
    wait_until_open(0)


def test_a_version_that_a_sync_put_aside_is_still_read(store: Path) -> None:
    row, aside = list_file(store, "a/b/file"), b".aerie-sync/t1"
    inode = (store / "a/b/file").stat().st_ino
    os.makedirs(bytes(store) + b"/" + aside)
    os.link(store / "a/b/file", bytes(store) + b"/" + aside + b"/was-%d" % inode)
    for change in (lambda: (store / "new").write_bytes(b"9876543210"), lambda: os.rename(store / "new", store / "a/b/file")):
        change()
        assert read(DirectorySource(str(store), aside), row, 2, 5) == b"23456"
    with pytest.raises(SourceError, match=CHANGED):
        read(DirectorySource(str(store)), row, 2, 5)
    shutil.rmtree(store / "a")
    assert read(DirectorySource(str(store), aside), row, 2, 5) == b"23456"
    with open(bytes(store) + b"/" + aside + b"/was-%d" % inode, "r+b") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match=CHANGED):
        read(DirectorySource(str(store), aside), row, 2, 5)
