"""The syncer process: jobs in, answers out, several at once, and killed at any instant."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.mount import wire
from actors.mount.indexing import META, TABLE
from actors.mount.listing import Bounds, read_listing
from actors.mount.process import serve
from supervisor.channel import Channel, ChannelClosed
from tests.actors.lazytree.harness import fork_server
from tests.actors.mount.conftest import Workspace, write


@contextmanager
def isolated_syncer(home: Path) -> Iterator[tuple[Channel, int]]:
    """The process, as a fork server's child."""
    with fork_server(home / "forks", "actors.mount.process") as isolation:
        process = isolation.start(
            "syncer", "actors.mount.process:serve", wire.SyncerArguments(str(home / "forks/lock-of-syncer")), wire.ANSWERS
        )
        yield process.channel, process.pid
        process.close()


@contextmanager
def syncer() -> Iterator[tuple[Channel, int]]:
    """The process, as a fork of this one: our end of its channel, and its pid."""
    channel, end = Channel.pair(wire.ANSWERS)
    with tempfile.TemporaryDirectory() as home:
        pid = os.fork()
        if pid == 0:
            channel.close()
            code = 1
            try:
                serve(end, [], msgspec.msgpack.encode(wire.SyncerArguments(f"{home}/lock")))
                code = 0
            finally:
                os._exit(code)
        end.close()
        try:
            yield channel, pid
        finally:
            channel.close()
            os.kill(pid, signal.SIGCONT)  # after a test that failed
            # It ends when its channel is closed; were it not so, the test would hang here.
            os.waitpid(pid, 0)


def stop(pid: int) -> None:
    """Stop a child, and return when none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)


def answer(channel: Channel) -> Any:
    while True:
        message, _ = channel.receive(60)
        if not isinstance(message, wire.Progress):
            return message


def index_job(workspace: Workspace, job: str = "i") -> wire.IndexWorkspace:
    """With all the time for its small files that a busy machine may need."""
    return wire.IndexWorkspace(job, str(workspace.store), str(workspace.directory), str(workspace.objects), small_s=3600.0)


def sync_job(workspace: Workspace, job: str = "s") -> wire.SyncWorkspace:
    return wire.SyncWorkspace(job, workspace.task, str(workspace.store), str(workspace.directory))


def test_a_workspace_there_and_back(workspace: Workspace, store: Path) -> None:
    write(store / "a", "old")
    os.mkfifo(store / "fifo")
    with syncer() as (channel, _):
        channel.send(index_job(workspace))
        assert answer(channel) == wire.Indexed("i", 1, 1, 3, 0, ["fifo: not a file, directory or symbolic link"], 1)
        workspace.mount()

        def task() -> None:
            Path("a").write_text("ours")
            Path("new").write_text("new")
            os.mkfifo(os.fsdecode(b"pipe\xff"))

        workspace.run(task)
        write(store / "a", "theirs", old=False)
        channel.send(sync_job(workspace))
        assert answer(channel) == wire.Synced(
            "s",
            "conflict",
            ["a (now a.aerie-conflict-t1): changed by the task and in the store"],
            1,
            ["pipe\\xff: not a file, directory or symbolic link"],
            1,
            "",
            2,
            7,
        )


def test_jobs_that_cannot_be_done_say_why(workspace: Workspace, store: Path, tmp_path: Path) -> None:
    with syncer() as (channel, _):
        write(tmp_path / "no directory", "")
        channel.send(wire.IndexWorkspace("1", str(tmp_path / "no directory"), str(workspace.directory), str(workspace.objects)))
        failed = answer(channel)
        assert (failed.job, "Not a directory" in failed.error) == ("1", True)
        channel.send(wire.SyncWorkspace("2", "t1", str(store), str(tmp_path / "nowhere")))
        failed = answer(channel)
        assert (failed.job, failed.outcome, "No such file" in failed.error) == ("2", "sync_failed", True)
        write(store / "d/a", "")
        channel.send(
            wire.IndexWorkspace("3", str(store), str(workspace.directory), str(workspace.objects), Bounds(entries_max=1))
        )
        assert answer(channel) == wire.JobFailed("3", "the store has more than 1 entries")


def test_an_answer_has_a_bound(workspace: Workspace, store: Path) -> None:
    for number in range(500):
        os.mkfifo(store / f"{number:03}{'n' * 200}")
    with syncer() as (channel, _):
        channel.send(index_job(workspace))
        listed = answer(channel)
    assert listed.skipped_count == 500
    assert 10 < len(listed.skipped) < 500


@pytest.mark.parametrize("held_up", [False, True])
def test_no_task_gets_a_listing_that_is_older_than_its_request(
    workspaces: Callable[[str], Workspace], store: Path, tmp_path: Path, held_up: bool
) -> None:
    """Those that wait share one; here all of them do, or as many as it comes."""
    tasks = [workspaces(f"t{number}") for number in range(30)]
    with syncer() as (channel, pid):
        if held_up:
            stop(pid)
        for number, task in enumerate(tasks):
            write(store / f"f{number}", str(number))
            channel.send(index_job(task, str(number)))
        gone = tasks[7].directory / "upper"  # what a task has changed belongs to the listing that it has
        if held_up:
            write(gone / "changed", "")
            os.kill(pid, signal.SIGCONT)
        answers = {int(given.job): given for given in (answer(channel) for _ in tasks)}
    for number, task in enumerate(tasks):
        if held_up and number == 7:
            assert isinstance(answers[7], wire.JobFailed) and "changed this workspace" in answers[7].error
            continue
        assert answers[number].entries >= number + 1
        assert {b"f%d" % earlier for earlier in range(number + 1)} <= read_listing(str(task.directory)).keys()
        assert all((task.directory / part).stat().st_size for part in (META, TABLE))


def test_a_task_that_is_gone_takes_no_other_with_it(workspaces: Callable[[str], Workspace], store: Path) -> None:
    """They wait together, and the first one's directory goes meanwhile."""
    write(store / "a", "a")
    gone, other = workspaces("t1"), workspaces("t2")
    with syncer() as (channel, pid):
        stop(pid)
        for number, task in enumerate((gone, other)):
            channel.send(index_job(task, str(number)))
        shutil.rmtree(gone.directory)
        os.kill(pid, signal.SIGCONT)
        answers = {given.job: given for given in (answer(channel), answer(channel))}
    assert isinstance(answers["0"], wire.JobFailed) and "No such file" in answers["0"].error
    assert isinstance(answers["1"], wire.Indexed) and answers["1"].entries == 1


def test_memory_is_given_back(workspace: Workspace, store: Path, tmp_path: Path) -> None:
    for number in range(3000):
        write(store / f"d{number % 30}/f{number}", "")
    with isolated_syncer(tmp_path) as (channel, pid):
        used_kib = []
        for number in range(12):
            write(store / "changing", str(number))
            channel.send(index_job(workspace))
            answer(channel)
            if number in (1, 11):
                while channel.receive(60)[0] != wire.Progress(0, 0):
                    pass  # what it does after its answer, tidying up at last, counts as running
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                used_kib.append(int(rollup.split("Private_Dirty:")[1].split()[0]))
    assert used_kib[1] - used_kib[0] < 3000, "twelve listings hold no more than two"


def test_jobs_run_at_once_and_the_heart_beats(workspaces: Callable[[str], Workspace], store: Path) -> None:
    """A sync waits for another process's lock on its journal; listings, and other syncs, go on meanwhile."""
    write(store / "a", "a")
    first, second = workspaces("t1"), workspaces("t2")
    with syncer() as (channel, _):
        for workspace in (first, second):
            channel.send(index_job(workspace))
            answer(channel)
            workspace.upper.mkdir()
            write(workspace.upper / workspace.task, "x")
        with first.locked_journal():
            channel.send(sync_job(first, "first"))
            channel.send(sync_job(second, "second"))
            assert answer(channel).job == "second"
            channel.send(index_job(workspaces("t3"), "third"))
            assert answer(channel).job == "third"
            deadline_s = time.monotonic() + 60
            while True:
                beat, _ = channel.receive(deadline_s - time.monotonic())
                if beat == wire.Progress(1, 0):
                    break
        assert answer(channel).job == "first"


def test_killed_in_mid_job_the_job_is_done_by_a_successor(workspace: Workspace, store: Path) -> None:
    write(store / "a", "a")
    workspace.begin()
    workspace.run(lambda: [Path(f"f{number}").write_bytes(bytes([number]) * 20_000) for number in range(200)])
    for delay_s in (0.0, 0.005, 0.01, 0.02, 0.03, 0.05):
        with syncer() as (channel, pid):
            channel.send(sync_job(workspace))
            time.sleep(delay_s)  # not for anything: this is how long it lives
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ChannelClosed):
                while True:
                    channel.receive(60)
    with syncer() as (channel, _):
        channel.send(sync_job(workspace))
        synced = answer(channel)
    assert (synced.outcome, synced.conflicts_count) == ("synced", 0)
    assert {name: what[0] for name, what in workspace.tree().items()} == {
        "a": b"a",
        **{f"f{number}": bytes([number]) * 20_000 for number in range(200)},
    }


def test_it_ends_with_its_channel_also_in_mid_job(workspace: Workspace, store: Path) -> None:
    workspace.index()
    workspace.upper.mkdir()
    write(workspace.upper / "x", "x")
    with workspace.locked_journal(), syncer() as (channel, _):
        channel.send(sync_job(workspace))
        message, _ = channel.receive(60)
        assert isinstance(message, wire.Progress)


def test_a_parent_that_does_not_read_costs_it_nothing_but_beats(workspace: Workspace, store: Path) -> None:
    with syncer() as (channel, _):
        channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(20):
            channel.send(index_job(workspace, str(number)))
        assert {answer(channel).job for _ in range(20)} == {str(number) for number in range(20)}


def test_a_running_task_that_changed_nothing_costs_no_sync(workspace: Workspace, store: Path) -> None:
    """Not even its listing is read; what others did to the store meanwhile is for the next sync that has something to do."""
    write(store / "a", "a")
    job = msgspec.structs.replace(sync_job(workspace), running=True)

    def synced() -> tuple[Any, ...]:
        channel.send(job)
        told = answer(channel)
        return told.outcome, told.files, told.settled

    with syncer() as (channel, _):
        channel.send(index_job(workspace))
        answer(channel)
        workspace.mount()
        assert synced() == ("synced", 0, True)
        workspace.run(lambda: (Path("a").write_text("ours"), Path("new").write_text("new")))
        assert synced() == ("synced", 2, True)
        listing = workspace.directory / "listing"
        whole = listing.read_bytes()
        listing.write_bytes(b"not to be read")
        for _ in range(3):
            assert synced() == ("synced", 0, True)
        workspace.run(lambda: Path("new").write_text("newer"))
        assert synced()[0] == "sync_failed"
        listing.write_bytes(whole)
        assert synced() == ("synced", 1, True)
        listing.write_bytes(b"not to be read")
        channel.send(sync_job(workspace))
        assert answer(channel).outcome == "sync_failed", "the last sync looks, whatever it takes"


def test_a_file_that_does_not_hold_still_is_tried_again(workspace: Workspace, store: Path) -> None:
    """It comes as it was at some moment, or next time; and of what was half copied nothing stays."""
    workspace.begin()
    with open(workspace.root / "log", "wb", buffering=0) as log, syncer() as (channel, _):
        stop = threading.Event()

        def write_on() -> None:
            number = 0
            while not stop.is_set():
                log.write(b"%9d\n" % number)
                number += 1
                if number > 200_000:  # enough, should the disk make a sync take seconds
                    time.sleep(0.001)

        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            for _ in range(20):
                channel.send(msgspec.structs.replace(sync_job(workspace), running=True))
                told = answer(channel)
                assert told.outcome == "synced"
                if (store / "log").exists():
                    content = (store / "log").read_bytes()
                    assert content == b"".join(b"%9d\n" % number for number in range(len(content) // 10))
        finally:
            stop.set()
            writer.join()
        channel.send(sync_job(workspace))
        assert answer(channel).outcome == "synced"
        assert sorted(store.iterdir()) == [store / "log"]
        assert (store / "log").read_bytes() == (workspace.root / "log").read_bytes()


def test_a_task_that_has_ended_does_not_wait_for_those_that_run(
    workspaces: Callable[[str], Workspace], store: Path, tmp_path: Path
) -> None:
    busy = [workspaces(f"busy{number}") for number in range(5)]
    ended = workspaces("ended")
    for workspace in (*busy, ended):
        workspace.begin()
        workspace.run(lambda: Path("file").write_text(workspace.task))  # noqa: B023 (it runs at once)
    with ExitStack() as locks, syncer() as (channel, _):
        for workspace in busy:
            locks.enter_context(workspace.locked_journal())
            channel.send(msgspec.structs.replace(sync_job(workspace, workspace.task), running=True))
        channel.send(sync_job(ended))
        told = answer(channel)
        assert (told.job, told.outcome) == ("s", "synced")
        locks.close()
        assert {answer(channel).job for _ in busy} == {workspace.task for workspace in busy}


def test_a_workspace_with_staged_changes_is_not_indexed_again(workspace: Workspace, store: Path) -> None:
    """The listing that the changes belong to would be lost, and with it what was in the store then."""
    write(store / "a", "a")
    workspace.begin()
    listing = (workspace.directory / "listing").read_bytes()
    write(store / "b", "b")
    with syncer() as (channel, _):
        workspace.run(lambda: Path("a").write_text("ours"))
        channel.send(index_job(workspace))
        refused = answer(channel)
        assert isinstance(refused, wire.JobFailed)
        assert "not in the store yet" in refused.error
        assert (workspace.directory / "listing").read_bytes() == listing
        channel.send(sync_job(workspace))
        assert answer(channel).outcome == "synced"


def test_what_a_task_has_read_is_cached_and_a_task_that_is_over_is_no_error(workspace: Workspace) -> None:
    (workspace.store / "large").write_bytes(bytes(1 << 20))
    with syncer() as (channel, _):
        channel.send(index_job(workspace))
        assert answer(channel).missing == 1
        job = wire.CacheObjects("c", str(workspace.store), str(workspace.directory), str(workspace.objects), [0])
        channel.send(job)
        assert answer(channel) == wire.Cached("c", 1)
        channel.send(msgspec.structs.replace(job, directory=str(workspace.directory / "gone")))
        assert answer(channel) == wire.Cached("c", 0)
