"""One attempt at running a task: what is made for its container on this host, and how it is undone.

Everything here blocks and is for worker threads.  Nothing here remembers anything: what there is lies at the paths of the task's
layout, so what a killed daemon had begun is found, gone on with or undone by the next one with the same calls.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.image.messages import RootfsReady
from actors.layout import TaskLayout
from actors.lazytree import mounts
from actors.output.follower import Follower
from actors.removal import Removal
from actors.sandbox import bundle, conmon, ending
from actors.sandbox.cgroup import Cgroup
from actors.sandbox.runtimes import CreateError, Runtime, exec_error
from supervisor.pidfd import open_pidfd, pid_of, signal_process

CREATE_TIMEOUT_S = 30.0
DELETE_TIMEOUT_S = 30.0
EXEC_ERROR_BYTES_MAX = 4096  # a journal that holds more holds more than the runtime's one line
STREAMS = ("stdout", "stderr")
HELD = ("container", "conmon", "attempt", *STREAMS)  # the kinds of descriptor that keeper and root supervisor hold of a task


def held(kind: str, task: str) -> str:
    """The name under which a descriptor of a task is held."""
    return f"{kind}/{task}"


@dataclass(frozen=True)
class Attempt:
    """A task's attempt: `number` is recorded before anything of it exists."""

    layout: TaskLayout
    number: int
    runtime: Runtime
    cgroup: Cgroup

    @property
    def container(self) -> conmon.Container:
        layout = self.layout
        return conmon.Container(f"{layout.task}.{self.number}", self.runtime, layout.bundle, layout.monitor, layout.journal)

    def exec_refused(self, status: int) -> CreateError | None:
        """Whether the runtime, in the task's place, has found that the command cannot be executed: then it never ran.

        `status`: the container's wait status.
        """
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 1:
            return None
        if self.layout.journal.stat().st_size > EXEC_ERROR_BYTES_MAX:
            return None
        follower = Follower(self.layout.output)
        try:
            printed = follower.finish()
        finally:
            follower.close()
        if any(chunk.stream != "stderr" for chunk in printed):
            return None
        text = b"".join(chunk.data for chunk in printed).decode(errors="replace")
        # From the bundle, for an actor that was started again has not asked for the image.
        return exec_error(text, bundle.command_in(self.layout.bundle))

    def terminate(self, pidfd: int) -> bool:
        """Ask all its processes to end → whether nobody is there who would hear it, so that waiting is in vain.

        `pidfd`: its first process's, which is closed.
        """
        try:
            pid = pid_of(pidfd)
        finally:
            os.close(pidfd)
        if pid is None:
            return False  # it has ended
        processes = self.cgroup.processes()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        if ending.ladder(False, status, bool(processes - {pid})) == (ending.Step.KILL,):
            return True
        for other in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGTERM)
        return False

    def kill(self, pidfd: int) -> None:
        """SIGKILL to its first process, with which the kernel kills the whole PID namespace, and to what else is in its group.

        `pidfd`: the first process's, which is closed.
        """
        try:
            signal_process(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        self.cgroup.kill(DELETE_TIMEOUT_S)


def make_directories(layout: TaskLayout) -> None:
    """The directories that a container needs; those that are there already stay as they are."""
    for directory in (layout.output, layout.root_upper, layout.root_work, layout.root, layout.bundle, layout.monitor):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout.root_upper.chmod(0o755)  # the root directory as the task sees it


def lock(layout: TaskLayout) -> int:
    """Take the attempt's lock → its descriptor; whoever has a copy of it holds the lock.  Raises BlockingIOError when somebody does."""
    descriptor = os.open(layout.attempt_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def create(
    attempt: Attempt, rootfs: RootfsReady, task: bundle.Task, filtered: bundle.Filter, environment: Mapping[str, str]
) -> dict[str, int]:
    """Mount the root, write the bundle, create the container → the descriptors to hold, by kind; its process waits for `start`.

    Raises CreateError, BundleError or OSError; `undo` then removes what there is.
    """
    layout = attempt.layout
    make_directories(layout)
    mounts.mount_overlay(
        str(layout.root), [rootfs.lower], rootfs.data, str(layout.root_upper), str(layout.root_work), volatile=True
    )
    bundle.write(task, filtered)
    line = bundle.arguments(task.image, task.command)
    held_lock = lock(layout)
    try:
        created = conmon.create(attempt.container, line[0], held_lock, environment, CREATE_TIMEOUT_S)
        return {"attempt": held_lock} | descriptors_of(created)
    except BaseException:
        os.close(held_lock)
        raise


def descriptors_of(created: conmon.Created) -> dict[str, int]:
    """A pidfd of the container's first process and of its conmon, and copies of conmon's ends of the pipes."""
    descriptors = {"container": open_pidfd(created.container_pid), "conmon": open_pidfd(created.conmon_pid)}
    try:
        return descriptors | conmon.pipe_ends(created)
    except BaseException:
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise


def undo(attempt: Attempt, removal: Removal) -> None:
    """End and delete the container, if there is one, and remove what was made for it.  Raises OSError, ContainerError, TimeoutError.

    The output stays; it belongs to the result.
    """
    layout = attempt.layout
    end(attempt)
    mounts.unmount(str(layout.root), lazily=True)
    # Only what is the container's own: the workspace may still be mounted beside it, and must not be walked into.
    for directory in (layout.root_upper.parent, layout.bundle, layout.monitor):
        removal.remove(directory)
    layout.attempt_lock.unlink(missing_ok=True)
    layout.remove_mount_points(layout.root)


def end(attempt: Attempt) -> None:
    """End and delete the container, if there is one, and its conmon.  Raises OSError, ContainerError, TimeoutError."""
    # First conmon, which may be in the middle of creating what is looked for below.
    conmon.end(attempt.container, DELETE_TIMEOUT_S)
    if not attempt.cgroup.remove_if_empty():
        attempt.cgroup.kill(DELETE_TIMEOUT_S)
    conmon.delete(attempt.container, DELETE_TIMEOUT_S, force=True)
    attempt.cgroup.remove()
