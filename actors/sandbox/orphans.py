"""What belongs to no attempt that is to be gone on with: found by the daemon's marks on this host, ended and removed.

An attempt leaves traces under its container's id, TASK.N: a conmon that has the daemon's state directory in its environment, a
control group below the daemon's own, a state file of a runtime's; and descriptors that are held under the task's name.  Where the
store knows of no such attempt (its record was lost, or an earlier attempt's creation went on behind everybody's back) it is
undone, as an attempt that failed is.  Network, PID and mount namespaces are pinned nowhere: they end with their last process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from actors.layout import Layout
from actors.sandbox import attempt as making
from actors.sandbox.host import SandboxHost
from actors.sandbox.runtimes import PROGRAMS, ContainerError, RuntimeMissing
from actors.services import Services
from supervisor.pidfd import open_pidfd, signal_process

GVISOR_STATE = "_sandbox:"  # ID_sandbox:ID.state, and the like


def clean_orphans(services: Services, host: SandboxHost, living: set[str]) -> Counter[str]:
    """Undo the attempts that are not `living` (container ids) → how many of what was found.  Blocks."""
    counts: Counter[str] = Counter()
    found: set[str] = set()
    for pid, container in conmons(services.layout):
        if container not in living:
            found.add(container)
            counts["process"] += end_conmon(services.layout, pid, container)
    for group in host.groups():
        if group not in living:
            found.add(group)
            counts["control group"] += 1
    runtimes = dict(states(services.layout))
    for container in runtimes.keys() - living:
        found.add(container)
        counts["container"] += 1
    for container in sorted(found):
        task, _, number = container.rpartition(".")
        if not task or not number.isdigit():
            continue
        logger.warning("{} belongs to no task that is known; it is ended and removed", container)
        try:
            counts["process"] += undo(services, host, task, int(number), runtimes.get(container), living)
        except (OSError, ContainerError, RuntimeMissing) as error:
            logger.error("{} could not be removed: {}", container, error)
    tasks = {container.rpartition(".")[0] for container in living}
    held = [name for name in services.descriptors.names() if is_of_a_task(name) and name.partition("/")[2] not in tasks]
    services.descriptors.drop(*held)
    counts["descriptor"] += len(held)
    return counts


def undo(services: Services, host: SandboxHost, task: str, number: int, runtime: str | None, living: set[str]) -> int:
    """Undo one attempt → how many processes were in its control group.  Raises OSError, ContainerError, RuntimeMissing."""
    attempt = host.attempt(task, number, runtime or services.settings.sandbox.runtime)
    processes = len(attempt.cgroup.processes())
    if any(container.rpartition(".")[0] == task for container in living):
        # A later attempt of the task lives in the same directories.
        making.end(attempt)
    else:
        making.undo(attempt)
    return processes


def conmons(layout: Layout) -> Iterator[tuple[int, str]]:
    """This daemon's conmon processes: pid, and the container's id."""
    mark = f"AERIE_STATE_DIR={layout.state}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                process = Path("/proc") / entry
                if (process / "comm").read_text() == "conmon\n" and mark in (process / "environ").read_bytes().split(b"\0"):
                    if container := container_of((process / "cmdline").read_bytes()):
                        yield int(entry), container


def container_of(cmdline: bytes) -> str:
    """The container's id in conmon's arguments (/proc/PID/cmdline); nothing when there is none."""
    arguments = cmdline.split(b"\0")
    return os.fsdecode(arguments[arguments.index(b"--cid") + 1]) if b"--cid" in arguments[:-1] else ""


def end_conmon(layout: Layout, pid: int, container: str) -> int:
    """SIGKILL to a conmon, if the pid is still that container's → 1, or 0."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = open_pidfd(pid)
        try:
            if (pid, container) in conmons(layout):
                return int(signal_process(pidfd, signal.SIGKILL))
        finally:
            os.close(pidfd)
    return 0


def states(layout: Layout) -> Iterator[tuple[str, str]]:
    """The containers that runtimes have a state of: id, and the runtime's name as tasks have it."""
    for runtime in PROGRAMS:
        directory = layout.runtimes / runtime
        for entry in os.listdir(directory) if directory.is_dir() else ():
            yield entry.partition(GVISOR_STATE)[0], runtime


def is_of_a_task(name: str) -> bool:
    """Whether a held descriptor is an attempt's, or its workspace mount's."""
    kind, _, whose = name.partition("/")
    return kind in (*making.HELD, "fuse", "channel", "server") and "/" not in whose
