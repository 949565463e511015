"""The durable home of what was acknowledged: one SQLite database (WAL, full sync) with one writer that commits in groups.

`write` answers when its statements are on disk; requests that arrive while a commit runs share the next one, so that fifty
tasks that start together pay for a few fsyncs and not for fifty.  Statements of one request are applied together or not at
all, and requests in the order in which they were made.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

Statement = tuple[str, Sequence[Any]]
Migration = str | Callable[[sqlite3.Connection], str]

GROUP_MAX = 256  # requests in one commit, so that the first of them does not wait for ever


class SchemaTooNew(Exception):
    """The database was written by a newer version of the program, which alone may read it."""


class Store:
    """The database at `path`.  `migrations[n]` takes schema version n to n + 1: an SQL script, or a function of the database that
    makes one, for when it depends on what is there.

    `make_room` is called when the disk is full, in the writer's thread, and says whether it is worth trying again.

    Raises SchemaTooNew, and sqlite3.Error when it is no database or cannot be opened.
    """

    def __init__(self, path: str, migrations: Sequence[Migration], make_room: Callable[[], bool] = lambda: False) -> None:
        self._make_room = make_room
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._migrate(path, migrations)
        self._reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._reading = threading.Lock()
        self._requests: queue.SimpleQueue[tuple[Sequence[Statement], Future[None]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_groups, name="store writer", daemon=True)
        self._writer.start()

    def write(self, *statements: Statement) -> Future[None]:
        """Apply the statements together; the future is done when they are durable, or has what SQLite raised."""
        done: Future[None] = Future()
        self._requests.put((statements, done))
        return done

    def read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query, as of the last commit."""
        with self._reading:
            return self._reader.execute(sql, values).fetchall()

    def close(self) -> None:
        """Wait until everything asked for is durable, then close."""
        self._requests.put(None)
        self._writer.join()
        self._reader.close()
        self._database.close()

    def _migrate(self, path: str, migrations: Sequence[Migration]) -> None:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > len(migrations):
            raise SchemaTooNew(
                f"{path} has schema version {version}; this version of the program knows {len(migrations)}: "
                "start the newer version, or name another state directory"
            )
        for number in range(version, len(migrations)):
            migration = migrations[number]
            script = migration if isinstance(migration, str) else migration(self._database)
            self._database.executescript(f"BEGIN; {script}; PRAGMA user_version={number + 1}; COMMIT;")

    def _write_groups(self) -> None:
        closing = False
        while not closing:
            group = [self._requests.get()]
            while len(group) < GROUP_MAX and not self._requests.empty():
                group.append(self._requests.get())
            closing = None in group
            self._commit([request for request in group if request])

    def _commit(self, group: list[tuple[Sequence[Statement], Future[None]]]) -> None:
        failed: dict[int, sqlite3.Error] = {}
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for number, (statements, _) in enumerate(group):
                self._database.execute("SAVEPOINT request")
                try:
                    for sql, values in statements:
                        self._database.execute(sql, values)
                except sqlite3.Error as error:
                    if not self._database.in_transaction or _is_full(error):
                        raise  # SQLite gave the whole group up, or nothing of it could be written
                    failed[number] = error
                    self._database.execute("ROLLBACK TO request")
                self._database.execute("RELEASE request")
            self._database.execute("COMMIT")
        except sqlite3.Error as error:  # the disk is full or broken: nothing of the group is durable
            failed = dict.fromkeys(range(len(group)), error)
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if _is_full(error) and self._make_room():
                self._commit(group)
                return
        for number, (_, done) in enumerate(group):
            if number in failed:
                done.set_exception(failed[number])
            else:
                done.set_result(None)


def _is_full(error: sqlite3.Error) -> bool:
    """Whether there may be no space: for its log SQLite says so, for the log's index, or when it cannot roll back, only that I/O failed."""
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
