"""Upgrading without stopping: the present daemon takes the place of one of an older version, from what that one has written.

The older versions come from this repository's own history.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from actors.records import MIGRATIONS
from tests.node.daemon import PATIENCE_S, Daemon

ROOT = Path(__file__).resolve().parents[2]
CONTENT = os.urandom(300 << 10)  # too large to be fetched before the mount: read through the old version's FUSE server
PRINT = "trap 'told=yes' USR1; i=0; while [ ! $told ]; do i=$((i+1)); echo out $i; echo err $i >&2; sleep 0.05; done; echo told"
READ = f'while sleep 0.2; do [ "$(md5sum < big)" = "{hashlib.md5(CONTENT).hexdigest()}  -" ] || echo WRONG; done &'

LANDMARKS = {
    "f3a8563": "the first with a command line",
    "6caecc5": "the last whose schema 1 knew no sinks",
    "135d6e0": "the last with schema 1, and with leases in the store",
    "9e69ef5": "schema 2, leases as files, archives of version 1",
    "1902629": "schema 2, archives of version 2",
}


class OldDaemon(Daemon):
    """A daemon of an older version; what is said to it is said with its own client."""

    def __init__(self, home: Path, image: str, program: Path) -> None:
        super().__init__(home, image, AERIE_GATEWAY_PARALLEL="2")
        self.program = program

    def run_command(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, self.program, *arguments],
            env=self.environment,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def start(self, *options: str) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, self.program, "daemon", *options],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        waited = self.run_command("wait", "--timeout", "60s")
        assert waited.returncode == 0, (waited, self.log.read_text()[-3000:])

    def submitted(self, task: str, script: str, *options: str) -> None:
        done = self.run_command("submit", "--id", task, *options, self.image, "--", "/bin/sh", "-c", script)
        assert done.returncode == 0, done


def exported(commit: str, home: Path) -> Path:
    """The repository as it was at `commit`; the test is skipped where there is no such history."""
    done = subprocess.run(["git", "-C", ROOT, "archive", "--format=tar", commit], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"this copy of the repository has no commit {commit}: {done.stderr.decode().strip()}")
    home.mkdir()
    subprocess.run(["tar", "-x", "-C", home], input=done.stdout, check=True)
    return home


@pytest.mark.parametrize("commit", LANDMARKS)
def test_the_present_version_takes_over_what_an_older_one_runs(tmp_path: Path, image: str, commit: str) -> None:
    old = OldDaemon(tmp_path, image, exported(commit, tmp_path / "old") / "run.py")
    new = Daemon(tmp_path, image, AERIE_GATEWAY_PARALLEL="2")
    store = new.state / "workspaces" / "work"
    try:
        old.start()
        store.mkdir(mode=0o755, parents=True)
        (store / "big").write_bytes(CONTENT)
        os.chown(store, 1000, 1000)
        old.submitted("ended", "echo done; exit 5")
        ended = old.run_command("result", "--wait", "50s", "--json", "ended")
        assert json.loads(ended.stdout)["exit_code"] == 5, (ended, old.log.read_text()[-3000:])
        lease = json.loads(old.run_command("image", "mount", "--json", image).stdout)
        old.submitted("plain", f"{PRINT}; exit 7", "--timeout", "600s")
        old.submitted("work", f"echo before > kept; {READ} {PRINT}; echo after >> kept; exit 8", "--workspace", "work")
        old.submitted("queued", "echo at last; exit 9")
        new.wait_printed("plain", b"out 3\n")
        new.wait_printed("work", b"out 3\n")
        new.start("--take-over")
        old.reap()
        assert {row["task"]: row["state"] for row in shown(new, "ps", "--json")} == {
            "ended": "stopped",
            "plain": "running",
            "work": "running",
            "queued": "pending",
        }
        for task in ("plain", "work"):
            new.wait_printed(task, b"out 20\n")
            os.kill(int((new.run_dir / "tasks" / task / "monitor" / "pid").read_text()), signal.SIGUSR1)
        check_results(new)
        assert (new.result("ended").exit_code, new.logs("ended")) == (5, (b"done\n", b""))
        assert new.result("queued").exit_code == 9 and new.logs("queued")[0] == b"at last\n"
        assert (Path(lease["path"]) / "etc/passwd").exists()
        assert new.command("image", "unmount", lease["lease"]).returncode == 0
        assert (store / "kept").read_text() == "before\nafter\n" and (store / "big").read_bytes() == CONTENT
        assert new.run("exit 3").exit_code == 3
        new.wait_nothing_left()
        assert new.stop() == 0
        assert new.leavings_after_stop() == [], new.log.read_text()[-3000:]
    finally:
        new.close_client()
        new.clear_away()
        old.reap()
        new.reap()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path, image: str) -> None:
    daemon = Daemon(tmp_path, image)
    daemon.state.mkdir()
    version = len(MIGRATIONS) + 1
    with closing(sqlite3.connect(daemon.state / "aerie.db")) as database:
        database.execute(f"PRAGMA user_version={version}")
    done = daemon.command("daemon")
    said = done.stderr.decode()
    assert done.returncode == 70
    assert f"aerie.db has schema version {version}" in said and "start the newer version" in said and "Traceback" not in said
    with closing(sqlite3.connect(daemon.state / "aerie.db")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (version,)
        assert database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    assert daemon.leavings_after_stop() == []


def check_results(daemon: Daemon) -> None:
    """Two tasks that ran through the change of version noticed nothing, and printed each line once."""
    plain, work = daemon.result("plain"), daemon.result("work")
    assert (plain.state, plain.reason, plain.exit_code, plain.gaps, plain.error) == ("stopped", "exited", 7, 0, None)
    assert (work.state, work.reason, work.exit_code, work.sync, work.error) == ("stopped", "exited", 8, "synced", None)
    for task in ("plain", "work"):
        stdout, stderr = (stream.decode().splitlines() for stream in daemon.logs(task))
        assert stdout == [*(f"out {number}" for number in range(1, len(stdout))), "told"]
        assert stderr == [f"err {number}" for number in range(1, len(stdout))]


def shown(daemon: Daemon, *arguments: str) -> Any:
    return json.loads(daemon.command(*arguments).stdout)
