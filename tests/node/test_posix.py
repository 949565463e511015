"""A POSIX suite, pjdfstest, as root on a task's workspace: it fails nothing there that it passes on a plain overlay.

`make posix` builds the program (from crates.io, with cargo) and runs this; `make test` runs it when the program is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lazytree import mounts
from tests.node.daemon import running
from tests.node.test_workspaces import begun, make_store, stopped

PROGRAM = shutil.which("pjdfstest", path=str(Path(sys.executable).parent)) or shutil.which("pjdfstest")
# What Linux has of the features that file systems may have or not; users that every Debian has.
CONFIGURATION = """
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"""
CASE = re.compile(r"^(\S+::\S+|\S+)\s+(ok|FAILED|skipped)$", re.MULTILINE)
FILES = {"d/file": b"x" * 100_000}


def suite(home: Path, place: Path) -> dict[str, str]:
    """Run all of it in a directory → what became of each case."""
    configuration = home / "pjdfstest.toml"
    configuration.write_text(CONFIGURATION)
    assert PROGRAM is not None
    ran = subprocess.run(
        [PROGRAM, "-c", configuration, "-p", place], capture_output=True, text=True, timeout=300, check=False, cwd=home
    )
    found = dict(CASE.findall(ran.stdout))
    counts = Counter(found.values())
    print(f"{place}: {counts['ok']} passed, {counts['FAILED']} failed, {counts['skipped']} skipped")
    assert counts["ok"] > 300, (ran.stdout[-2000:], ran.stderr)
    return found


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory that every user may enter, and with a name so short that sockets below it have addresses."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    for mount in mounts.mounts_below(str(directory)):
        mounts.unmount(mount.target, lazily=True)
    shutil.rmtree(directory)


@pytest.mark.skipif(PROGRAM is None, reason="pjdfstest is not here: `make posix` builds it")
def test_a_workspace_fails_nothing_that_a_plain_overlay_passes(tmp_path: Path, image: str, short: Path) -> None:
    """In a directory of the store, which is synced meanwhile."""
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    workspace, plain = short / "a", short / "b"
    for directory in (upper, work, workspace, plain):
        directory.mkdir()
    with running(tmp_path, image, AERIE_MOUNT_SYNC_INTERVAL="200ms") as daemon:
        shutil.copytree(make_store(daemon, "posix", FILES), lower)
        task = begun(daemon, "sleep 1000", "posix")
        try:
            mounts.bind(str(daemon.run_dir / "tasks" / task / "workspace"), str(workspace))
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "-o", options, "none", plain], check=True)
            ours, theirs = suite(tmp_path, workspace / "d"), suite(tmp_path, plain / "d")
        finally:
            for directory in (workspace, plain):
                mounts.unmount(str(directory), lazily=True)
        assert stopped(daemon, task).sync == "synced"
    worse = {case for case, outcome in ours.items() if outcome != "ok" and theirs.get(case) == "ok"}
    assert not worse
    assert ours.keys() == theirs.keys()
