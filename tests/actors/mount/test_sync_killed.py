"""Syncs of random work, and syncs that are killed: the store comes out the same."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

from actors.mount.listing import RESERVED
from tests.actors.mount.conftest import Workspace, contents, write


def _change(seed: int) -> None:
    """Some of everything, the same for the same seed."""
    choose = random.Random(seed)
    for number in range(60):
        files = sorted(str(path) for path in Path(".").rglob("*") if path.is_file() and not path.is_symlink())
        directories = sorted(str(path) for path in Path(".").rglob("*") if path.is_dir() and not path.is_symlink())
        name = f"{choose.choice([*directories, '.'])}/n{seed}.{number}"
        match choose.randrange(8):
            case 0:
                Path(name).write_bytes(choose.randbytes(choose.choice((0, 10, 9000))))
            case 1:
                Path(choose.choice(files)).write_bytes(choose.randbytes(50))
            case 2:
                os.remove(choose.choice(files))
            case 3:
                os.rename(choose.choice(files), name)
            case 4:
                moved = choose.choice(directories)
                if not name.startswith(moved + "/"):
                    os.rename(moved, name)
            case 5:
                os.mkdir(name)
            case 6:
                os.chmod(choose.choice(files), choose.choice((0o600, 0o755)))
                os.utime(choose.choice(files), ns=(1, choose.randrange(10**18)))
            case 7:
                os.link(choose.choice(files), name)


def _populate(store: Path) -> None:
    for number in range(40):
        write(store / f"d{number % 5}/e{number % 3}/f{number}", f"content {number}" * 20)


@pytest.mark.parametrize("seed", range(10))
def test_any_changes_arrive(workspace: Workspace, store: Path, seed: int) -> None:
    _populate(store)
    workspace.begin()
    workspace.run(partial(_change, 100 + seed))
    wanted = contents(workspace.root)
    if seed % 2:
        workspace.sync(running=True)
        workspace.run(partial(_change, 200 + seed))
        wanted = contents(workspace.root)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.conflicts, outcome.error) == ("synced", [], "")
    assert workspace.tree() == wanted
    assert not (store / os.fsdecode(RESERVED)).exists()


def test_killed_at_any_instant(workspaces: Callable[[str], Workspace], store: Path) -> None:
    """SIGKILL after ever longer times, and again, until one comes through: the same store as without, and no conflict."""
    _populate(store)
    kills = 0
    for seed in range(50):
        if seed >= 6 and kills > 20:
            break
        workspace = workspaces(f"k{seed}").begin()
        workspace.run(partial(_change, seed))
        wanted = contents(workspace.root)
        delay_s = 0.0005
        while True:
            pid = os.fork()
            if pid == 0:
                try:
                    outcome = workspace.sync()
                    if outcome.outcome != "synced":
                        print(outcome, file=sys.stderr, flush=True)  # for pytest to show
                    os._exit(0 if outcome.outcome == "synced" else 1)
                finally:
                    os._exit(2)
            time.sleep(delay_s)
            delay_s += max(0.0015, delay_s / 20)  # on a disk that takes seconds it would be hours
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            kills += 1
        assert workspace.tree() == wanted
        outcome = workspace.sync()
        assert (outcome.outcome, outcome.conflicts, outcome.files) == ("synced", [], 0)
        workspace.unmount()
    assert kills > 20


def _sync_until(workspace: Workspace, calls: int) -> bool:
    """Sync in a process that kills itself before its `calls`-th call into system or syncer; False when it came to its end."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = calls

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        ours = event == "call" and frame.f_code.co_filename.endswith(("/store.py", "/publish.py", "/copying.py", "/journal.py"))
        left -= ours or (event == "c_call" and getattr(argument, "__module__", "") in ("posix", "fcntl"))
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    outcome = workspace.sync()
    sys.setprofile(None)
    os._exit(outcome.outcome not in ("synced", "conflict"))


def test_killed_before_any_call(tmp_path: Path, workspaces: Callable[[str], Workspace]) -> None:
    """Once, at a place that moves on from try to try; then a sync to the end: always the same store and the same outcome."""

    def task() -> None:
        os.rename("swap/one", "swap/three")
        os.rename("swap/two", "swap/one")
        os.rename("swap/three", "swap/two")
        os.rename("file", "renamed")
        os.utime("renamed", ns=(5, 5))
        os.link("renamed", "linked")
        os.chmod("mode", 0o700)
        os.mkdir("new")
        os.rename("d", "new/d")
        os.remove("new/d/1")
        Path("new/d/3").write_text("3")
        os.remove("kind")
        os.mkdir("kind")
        os.rename("late", "kind/file")
        Path("conflict").write_text("ours")
        os.link("conflict", "conflict 2")
        os.symlink("x", "symlink")

    def begin(name: str) -> Workspace:
        workspace = workspaces(name)
        workspace.store = tmp_path / f"{name}.store"
        for path in ("swap/one", "swap/two", "file", "mode", "d/1", "d/2", "kind", "late", "conflict"):
            write(workspace.store / path, path)
        workspace.begin()
        workspace.run(task)
        workspace.unmount()
        write(workspace.store / "conflict", "theirs", old=False)
        workspace.task = "T"
        return workspace

    def result(workspace: Workspace) -> tuple[object, ...]:
        outcome = workspace.sync()
        return (
            outcome.outcome,
            outcome.error,
            outcome.conflicts,
            workspace.tree(),
            (workspace.store / "renamed").stat().st_mtime_ns,
        )

    wanted = result(begin("w"))
    assert wanted[0] == "conflict"
    calls, killed = random.randrange(1, 8), True
    while killed:
        workspace = begin(f"k{calls}")
        killed = _sync_until(workspace, calls)
        assert result(workspace) == wanted, f"killed before call {calls}"
        calls += 7
    assert calls > 300


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_instant_while_the_task_runs(workspace: Workspace, store: Path, seed: int) -> None:
    """Work, a sync of the running task that is killed somewhere, or is not, more work: in the end the store is what the task has."""
    _populate(store)
    workspace.begin()
    choose = random.Random(seed)
    kills = 0
    for number in range(50):
        if number >= 8 and kills:
            break
        workspace.run(partial(_change, 1000 * seed + number))
        pid = os.fork()
        if pid == 0:
            try:
                outcome = workspace.sync(running=True)
                if outcome.outcome != "synced":
                    print(outcome, file=sys.stderr, flush=True)
                os._exit(0 if outcome.outcome == "synced" else 1)
            finally:
                os._exit(2)
        if number % 4:
            time.sleep(choose.random() * (0.06 if number < 8 else 0.005))  # this machine may be a fast one
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    wanted = contents(workspace.root)
    outcome = workspace.sync()
    assert (outcome.outcome, outcome.conflicts, outcome.error) == ("synced", [], "")
    assert workspace.tree() == wanted
    assert kills


def _others(store: Path, choose: random.Random, number: int, theirs: dict[Path, bytes | None]) -> None:
    """What somebody else does to the store, who sees what is in it; `theirs`: what they did last, by path (None: removed)."""
    for _ in range(6):
        private = store / os.fsdecode(RESERVED)
        files = sorted(path for path in store.rglob("*") if path.is_file() and private not in path.parents)
        directories = sorted({path.parent for path in files})
        path = choose.choice(files) if choose.randrange(3) else choose.choice(directories) / f"t{number}"
        if choose.randrange(4) or path not in files:
            content = b"theirs %d %d" % (number, choose.randrange(10**9))
            path.unlink(missing_ok=True)  # as most programs do it; a file may have other names
            path.write_bytes(content)
            theirs[path] = content
        else:
            path.unlink()
            theirs[path] = None


@pytest.mark.parametrize("seed", range(4))
def test_nobody_loses_anything(workspace: Workspace, store: Path, seed: int) -> None:
    """The task and others change the same names, between syncs of the running task, some of them killed."""
    _populate(store)
    workspace.begin()
    choose, theirs = random.Random(seed), dict[Path, bytes | None]()
    for number in range(6):
        workspace.run(partial(_change, 100_000 + 1000 * seed + number))
        for _ in range(choose.randrange(3)):
            if (pid := os.fork()) == 0:
                try:
                    workspace.sync(running=True)
                finally:
                    os._exit(0)
            if choose.randrange(2):
                time.sleep(choose.random() * 0.05)
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        _others(store, choose, number, theirs)
    written = {path: content for path, content in theirs.items() if content is not None}
    assert {path: path.read_bytes() for path in written} == written
    wanted = {path: what[0] for path, what in contents(workspace.root).items() if isinstance(what, tuple)}
    outcome = workspace.sync()
    assert outcome.outcome == "conflict", outcome.error
    assert {path: path.read_bytes() for path in written} == written, "what others wrote is where they wrote it"
    found = {what[0] for what in workspace.tree().values() if isinstance(what, tuple)}
    for name, content in wanted.items():
        # A file of the store's may be gone from there, which is a conflict that says so; and what was synced others may have changed.
        if not content.startswith(b"content ") and store / name not in theirs:
            assert content in found, name
    again = workspace.sync()
    assert (again.outcome, again.files) == ("conflict", 0)
    assert not (store / os.fsdecode(RESERVED)).exists()
