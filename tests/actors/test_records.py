"""The state store's schema: whatever version wrote it, it becomes the present one, and what is in it stays."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from actors.records import MIGRATIONS
from supervisor.store import Store

FIRST = MIGRATIONS[0]
assert isinstance(FIRST, str)
WITHOUT_SINKS = FIRST.replace("        sinks BLOB,\n", "")  # as the first version had it for its first days
assert WITHOUT_SINKS != FIRST


def written(path: Path, first: str, version: int) -> None:
    """A database as a daemon with that schema version left it, with one task that has ended."""
    with closing(sqlite3.connect(path)) as database:
        for migration in [first, *MIGRATIONS[1:version]]:
            database.executescript(migration if isinstance(migration, str) else migration(database))
        database.execute(f"PRAGMA user_version={version}")
        database.execute(
            "INSERT INTO tasks (task, number, spec, boot_id, accepted_at, result) VALUES ('kept', 1, X'80', 'boot', 1.5, X'81')"
        )
        database.execute(
            "INSERT INTO contents (digest, reference, unpacked_bytes, complete_at) VALUES ('sha256:1', 'image', 7, 2.5)"
        )
        database.commit()


def schema(path: Path) -> dict[str, set[tuple[str, str, int]]]:
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            table: {(name, kind, required) for _, name, kind, required, *_ in database.execute(f"PRAGMA table_info({table})")}
            for table in tables
        }


@pytest.mark.parametrize(
    ("first", "version"),
    [(WITHOUT_SINKS, 1), (WITHOUT_SINKS, 2), *((FIRST, number) for number in range(1, len(MIGRATIONS) + 1))],
)
def test_each_schema_becomes_the_present_one(tmp_path: Path, first: str, version: int) -> None:
    Store(str(tmp_path / "new.db"), MIGRATIONS).close()
    written(tmp_path / "old.db", first, version)
    store = Store(str(tmp_path / "old.db"), MIGRATIONS)
    assert store.read("SELECT task, number, spec, accepted_at, sinks, result FROM tasks") == [
        ("kept", 1, b"\x80", 1.5, None, b"\x81")
    ]
    assert store.read("SELECT digest, unpacked_bytes, complete FROM contents") == [("sha256:1", 7, 1)]
    assert store.read("PRAGMA user_version") == [(len(MIGRATIONS),)]
    store.close()
    assert schema(tmp_path / "old.db") == schema(tmp_path / "new.db")
