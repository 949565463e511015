"""What the store has acknowledged is there after a SIGKILL; what it could not write, it did not acknowledge."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from supervisor.reserve import Reserve
from supervisor.store import SchemaTooNew, Store

SCHEMA = ["CREATE TABLE lines (number INTEGER PRIMARY KEY, text TEXT)"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


def test_what_was_written_is_read_and_is_there_when_opened_again(path: str) -> None:
    store = Store(path, SCHEMA)
    store.write(("INSERT INTO lines VALUES (?, ?)", (1, "one"))).result(60)
    assert store.read("SELECT text FROM lines WHERE number = ?", 1) == [("one",)]
    store.close()
    again = Store(path, SCHEMA)
    assert again.read("SELECT * FROM lines") == [(1, "one")]
    again.close()


def test_statements_of_one_request_are_applied_together_or_not_at_all(path: str) -> None:
    store = Store(path, SCHEMA)
    first = store.write(("INSERT INTO lines VALUES (1, 'a')", ()))
    broken = store.write(("INSERT INTO lines VALUES (2, 'b')", ()), ("INSERT INTO lines VALUES (1, 'again')", ()))
    last = store.write(("INSERT INTO lines VALUES (3, 'c')", ()))
    first.result(60)
    last.result(60)
    with pytest.raises(sqlite3.IntegrityError):
        broken.result(60)
    assert store.read("SELECT number FROM lines ORDER BY number") == [(1,), (3,)]
    store.close()


def test_requests_made_at_once_share_commits(path: str) -> None:
    store = Store(path, SCHEMA)
    for done in [store.write(("INSERT INTO lines VALUES (?, '')", (number,))) for number in range(1000)]:
        done.result(60)
    assert store.read("SELECT count(*) FROM lines") == [(1000,)]
    store.close()


def test_close_waits_for_what_was_asked(path: str) -> None:
    store = Store(path, SCHEMA)
    for number in range(500):
        store.write(("INSERT INTO lines VALUES (?, '')", (number,)))
    store.close()
    assert sqlite3.connect(path).execute("SELECT count(*) FROM lines").fetchone() == (500,)


def test_a_newer_schema_is_refused(path: str) -> None:
    Store(path, [*SCHEMA, "CREATE TABLE more (x)"]).close()
    with pytest.raises(SchemaTooNew, match="schema version 2.*knows 1"):
        Store(path, SCHEMA)


def test_an_older_schema_is_taken_on(path: str) -> None:
    Store(path, SCHEMA).close()
    store = Store(path, [*SCHEMA, "CREATE TABLE more (x)"])
    assert store.read("SELECT * FROM more") == []
    store.close()


def test_what_was_acknowledged_survives_sigkill(path: str) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = Store(path, SCHEMA)
        for number in range(100_000):
            store.write(("INSERT INTO lines VALUES (?, '')", (number,))).result()
            os.write(writer, number.to_bytes(4, "big"))
        os._exit(0)
    os.close(writer)
    acknowledged = [os.read(reader, 4) for _ in range(50)][-1]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(reader, 4):
        acknowledged = more
    os.close(reader)
    store = Store(path, SCHEMA)
    assert store.read("SELECT max(number) FROM lines")[0][0] >= int.from_bytes(acknowledged, "big")
    store.close()


def test_on_a_full_disk_what_is_held_back_is_used(tmp_path: Path) -> None:
    picture, disk = tmp_path / "picture", tmp_path / "disk"
    disk.mkdir()
    with open(picture, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", picture], check=True)
    subprocess.run(["mount", "-o", "loop", picture, disk], check=True)
    try:
        reserve = Reserve(disk / "reserve", 2 << 20)
        assert reserve.hold() and reserve.hold() and reserve.is_spare()
        store = Store(str(disk / "store.db"), SCHEMA, reserve.release)
        with open(disk / "ballast", "wb", buffering=0) as file:
            with pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
            assert reserve.hold() and not reserve.is_spare()
            number = 0
            while (disk / "reserve").exists():
                number += 1
                store.write(("INSERT INTO lines VALUES (?, ?)", (number, "x" * 10_000))).result(60)
            assert store.read("SELECT count(*) FROM lines") == [(number,)]
            assert not reserve.hold() and not (disk / "reserve").exists()
            file.truncate(0)
        assert reserve.hold() and reserve.release() and not reserve.release()
        store.close()
    finally:
        deadline = time.monotonic() + 60
        while subprocess.run(["umount", disk], check=False).returncode:  # somebody looks at all mounts, for instance
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_full_disk_is_an_error_of_the_request_and_the_store_goes_on(path: str) -> None:
    store = Store(path, SCHEMA)
    store._database.execute("PRAGMA max_page_count = 8")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.write(("INSERT INTO lines VALUES (1, ?)", ("x" * 100_000,))).result(60)
    store.write(("INSERT INTO lines VALUES (2, 'small')", ())).result(60)
    assert store.read("SELECT number FROM lines") == [(2,)]
    store.close()
