"""The state store's tables: what Aerie has acknowledged, and what a restarted daemon must know to go on.

A task's row is written when the task is accepted and goes through these marks, each durable before the step that it announces:

    accepted_at                  the task is ours; nothing of it exists yet
    intended_at                  from now on its command may have been started
    started_at, started_boot_s   it was started (RFC 3339 clock; CLOCK_BOOTTIME, on which its time-out counts)
    stop_cause                   somebody or its clock asked it to end: `cancelled` or `timeout`, whichever came first
    sinks                        where its lines go, when somebody chose (msgpack of a list of Sink)
    result                       it has ended, and how (msgpack of a TaskResult)
    released                     everything it had is given back

`boot_id` is the boot in which the attempt ran: a row without a result from another boot is a task that was lost.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from supervisor.store import Migration


def add_sinks(database: sqlite3.Connection) -> str:
    """The first version's schema was given `tasks.sinks` without a version of its own: some databases have it, and some have not."""
    columns = {name for _, name, *_ in database.execute("PRAGMA table_info(tasks)")}
    return "" if "sinks" in columns else "ALTER TABLE tasks ADD COLUMN sinks BLOB"


MIGRATIONS: Final[list[Migration]] = [
    """
    CREATE TABLE tasks (
        task TEXT PRIMARY KEY,
        number INTEGER NOT NULL UNIQUE,
        spec BLOB NOT NULL,
        boot_id TEXT NOT NULL,
        attempt INTEGER NOT NULL DEFAULT 1,
        accepted_at REAL NOT NULL,
        intended_at REAL,
        started_at REAL,
        started_boot_s REAL,
        stop_cause TEXT,
        sinks BLOB,
        result BLOB,
        finished_at REAL,
        released INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX unreleased ON tasks (released) WHERE released = 0;
    CREATE TABLE resolutions (reference TEXT PRIMARY KEY, digest TEXT NOT NULL, resolved_at REAL NOT NULL);
    CREATE TABLE contents (digest TEXT PRIMARY KEY, reference TEXT NOT NULL, unpacked_bytes INTEGER NOT NULL, complete_at REAL NOT NULL);
    CREATE TABLE leases (lease TEXT PRIMARY KEY, reference TEXT NOT NULL, digest TEXT NOT NULL, root INTEGER NOT NULL);
    CREATE TABLE positions (task TEXT NOT NULL, sink TEXT NOT NULL, position BLOB NOT NULL, PRIMARY KEY (task, sink));
    """,
    # From here on a row says that the archive is here, and `complete` that all of the content is, too.
    "ALTER TABLE contents ADD COLUMN complete INTEGER NOT NULL DEFAULT 1;",
    add_sinks,
]
