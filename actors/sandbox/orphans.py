"""What belongs to no attempt that is to be gone on with: found on this host by the daemon's marks, ended and removed.

An attempt leaves traces under its container's id, TASK.N: a conmon that has the daemon's state directory in its environment, a
control group below the daemon's own, a state file of a runtime's; and descriptors that are held under the task's name.  Where the
store knows of no such attempt (its record is gone, or a creation went on behind everybody's back) it is undone, as one that
failed is.  A call of a runtime's whose caller is dead is ended: what it was to do is done again.  Network, PID and mount
namespaces are pinned nowhere: they end with their last process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from loguru import logger

from actors.layout import Layout
from actors.sandbox import attempt as making
from actors.sandbox.host import SandboxHost
from actors.sandbox.runtimes import PROGRAMS, ContainerError, RuntimeMissing
from actors.services import Services

GVISOR_STATE = "_sandbox:"  # its state files are ID_sandbox:ID.state, and the like


def clean_orphans(services: Services, host: SandboxHost, living: set[str]) -> Counter[str]:
    """Undo the attempts that are not among the `living` (container ids) → how many of which kind there were.  Blocks.

    Only before anything is started: what is being made is nobody's orphan.
    """
    called = [pid for pid in runtime_calls(services.layout) if end(pid)]
    monitored, grouped, stated = dict(conmons(services.layout)), host.groups(), dict(states(services.layout))
    counts = Counter({"process": len(called), "control group": len(grouped - living), "container": len(stated.keys() - living)})
    tasks = {task_of(container) for container in living}
    for container in sorted((monitored.keys() | grouped | stated.keys()) - living):
        task, _, number = container.rpartition(".")
        logger.warning("{} belongs to no task that is known; it is ended and removed", container)
        try:
            attempt = host.attempt(task, int(number), stated.get(container, services.settings.sandbox.runtime))
            counts["process"] += len(attempt.cgroup.processes()) + (container in monitored)
            # A later attempt of the same task lives in the same directories.
            if task in tasks:
                making.end(attempt)
            else:
                making.undo(attempt, services.removal)
        except (OSError, ValueError, ContainerError, RuntimeMissing) as error:
            logger.error("{} could not be removed: {}", container, error)
    held = [name for name in services.descriptors.names() if is_of_a_task(name) and name.partition("/")[2] not in tasks]
    services.descriptors.drop(*held)
    counts["descriptor"] = len(held)
    return counts


def conmons(layout: Layout) -> Iterator[tuple[str, int]]:
    """This daemon's conmon processes: the container's id, and the pid."""
    for process in ours(layout):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if (process / "comm").read_text() == "conmon\n" and b"--cid" in arguments:
                yield os.fsdecode(arguments[arguments.index(b"--cid") + 1]), int(process.name)


def runtime_calls(layout: Layout) -> Iterator[int]:
    """The pids of this daemon's runtimes at work but for those that a conmon has called, which sees to them."""
    for process in ours(layout):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            # Called by us, as `conmon.Container` has it; what a runtime makes of itself inside of a container has other arguments.
            roots = [after for before, after in pairwise(arguments) if before == b"--root"]
            if not any(os.path.dirname(root) == os.fsencode(layout.runtimes) for root in roots):
                continue
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            parent = Path(f"/proc/{status['PPid'].strip()}/comm").read_text()
            if len(status["NSpid"].split()) == 1 and parent != "conmon\n":
                yield int(process.name)


def ours(layout: Layout) -> Iterator[Path]:
    """The processes of this host that have the daemon's state directory in their environment: their directories in /proc."""
    mark = f"AERIE_STATE_DIR={layout.state}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    yield Path("/proc", entry)


def end(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def states(layout: Layout) -> Iterator[tuple[str, str]]:
    """The containers that a runtime has a state of: the id, and the runtime's name as tasks have it."""
    for runtime in PROGRAMS:
        directory = layout.runtimes / runtime
        for entry in os.listdir(directory) if directory.is_dir() else ():
            yield entry.partition(GVISOR_STATE)[0], runtime


def task_of(container: str) -> str:
    return container.rpartition(".")[0]


def is_of_a_task(name: str) -> bool:
    """Whether a held descriptor is an attempt's, or its workspace mount's."""
    kind, _, whose = name.partition("/")
    return kind in (*making.HELD, "gate", "fuse", "channel", "server") and "/" not in whose
