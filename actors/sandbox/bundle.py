"""A task as an OCI runtime bundle: config.json, and the two files of /etc that are bound over the image's.

Pure, but for `write`.  The configuration follows the OCI runtime specification 1.0.2 (config.md, config-linux.md).  Its defaults
are strict, and no image and no task can loosen them: uid and gid 1000 whatever the image's User, no capability in any set, no
new privileges, a system call filter, the sensitive parts of /proc and /sys masked or read-only, no device beyond the
specification's default ones, a namespace of each kind but the user's (a network namespace of its own: crun and runc bring its
loopback up, nothing else is in it), limits on memory (no swap), CPU and pids.

What costs time on each create and gives a task nothing is left out: the cgroup file system (11 mounts on a cgroup v1 host; it
would also show the task nothing that it may change) and /dev/mqueue (mq_open(3) needs no mount).  No limit is raised that the
daemon runs under: that takes CAP_SYS_RESOURCE, which not every daemon has.  Only core files are off, since they would land in
the workspace.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actors.image.messages import ImageConfig
from actors.image.prefetch.program import DEFAULT_PATH

UID: Final = 1000
GID: Final = 1000
WORKSPACE: Final = "/workspace"

CPU_PERIOD_US: Final = 100_000
CPU_QUOTA_US_MIN: Final = 1_000  # the kernel's least quota
TEXT_BYTES_MAX: Final = 128 << 10  # MAX_ARG_STRLEN: the longest argument or variable that execve(2) takes
FILES_SOFT: Final = 1024  # what select(2) can take, and what programs are made for that do not ask for more
FILES_MAX: Final = 1 << 20

CONFIG: Final = "config.json"
HOSTS: Final = "hosts"
RESOLV_CONF: Final = "resolv.conf"

# Nothing answers beyond loopback, and one quick refusal says so sooner than a time-out.
RESOLV_CONF_TEXT: Final = "# no network but loopback\nnameserver 127.0.0.1\noptions timeout:1 attempts:1\n"

MASKED_PATHS: Final = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
    "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
READ_ONLY_PATHS: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NAMESPACES: Final = ("pid", "mount", "ipc", "uts", "network", "cgroup")


class BundleError(ValueError):
    """The task cannot be put into a bundle; the text is for whoever submitted it."""


@dataclass(frozen=True)
class Limits:
    memory_bytes: int = 512 << 20
    cpu_cores: float = 1.0
    pids: int = 1024


@dataclass(frozen=True)
class Filter:
    """The system call filter: `section` as JSON, `program` compiled or None (seccomp.py)."""

    section: Mapping[str, Any]
    program: bytes | None = None


@dataclass(frozen=True)
class Task:
    """What a bundle is made of.  Paths are the host's; `cgroup` is a path below the root of every hierarchy.

    `files_max`: the descriptors that a process of it may have at once, if it raises its soft limit; no more than this process may
    have (setrlimit(2)), and None for as many as that.  `oom_score_adj`: this process's own (proc_pid_oom_score_adj(5)).
    """

    hostname: str
    image: ImageConfig
    command: tuple[str, ...]
    env: Mapping[str, str]
    limits: Limits
    bundle: Path
    root: Path
    workspace: Path
    cgroup: str
    uid: int = UID
    gid: int = GID
    files_max: int | None = None
    oom_score_adj: int = 0


def arguments(image: ImageConfig, command: Sequence[str]) -> list[str]:
    """The command line (`ImageConfig.line`).  Raises BundleError when nothing is left to run, or for an argument that execve(2)
    cannot take.
    """
    line = image.line(command)
    if not line or not line[0]:
        raise BundleError("no command: the image has no Entrypoint and no Cmd, so give one after --")
    for index, argument in enumerate(line):
        _check_text(f"argument {index} of the command", argument)
    return line


def environment(image: ImageConfig, env: Mapping[str, str]) -> list[str]:
    """`NAME=VALUE` of the image, of Aerie (HOME, and PATH when the image has none) and of the task, the last one winning.

    Raises BundleError for a name or value that no environment can hold.
    """
    merged = {"PATH": DEFAULT_PATH}
    for entry in image.env:
        name, _, value = entry.partition("=")
        merged[name] = value
    merged["HOME"] = WORKSPACE
    merged.update(env)
    for name, value in merged.items():
        if not name or "=" in name:
            raise BundleError(f"{name!r} is not a name of an environment variable: it is empty or has a '=' in it")
        _check_text(f"the environment variable {name!r}", f"{name}={value}")  # its value may be a secret
    return [f"{name}={value}" for name, value in merged.items()]


def hosts(hostname: str) -> str:
    """The text of /etc/hosts."""
    return f"127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback {hostname}\n"


def configuration(task: Task, filtered: Filter) -> dict[str, Any]:
    """The OCI runtime configuration.  Raises BundleError."""
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": task.uid, "gid": task.gid, "umask": 0o022},
            "args": arguments(task.image, task.command),
            "env": environment(task.image, task.env),
            "cwd": WORKSPACE,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "rlimits": _rlimits(task.files_max),
            # Never the daemon's own, if that is protected: the OOM killer would take everything else before the task.
            "oomScoreAdj": max(0, task.oom_score_adj),
            "noNewPrivileges": True,
        },
        "root": {"path": str(task.root), "readonly": False},
        "hostname": task.hostname,
        "mounts": _mounts(task),
        "linux": {
            "cgroupsPath": task.cgroup,
            "namespaces": [{"type": kind} for kind in NAMESPACES],
            "resources": _resources(task.limits),
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READ_ONLY_PATHS),
            # Beside the compiled program too: a runtime that does not know the annotation must not run without a filter.
            "seccomp": dict(filtered.section),
        },
    }
    if filtered.program is not None:
        config["annotations"] = {"run.oci.seccomp_bpf_data": base64.b64encode(filtered.program).decode("ascii")}
    return config


def write(task: Task, filtered: Filter) -> None:
    """Write the bundle into its directory, which exists; config.json, which may hold secrets, is the owner's alone.

    Raises BundleError before anything is written, OSError.
    """
    text = json.dumps(configuration(task, filtered), separators=(",", ":"))
    for name, content, mode in (
        (CONFIG, text, 0o600),
        (HOSTS, hosts(task.hostname), 0o644),
        (RESOLV_CONF, RESOLV_CONF_TEXT, 0o644),
    ):
        descriptor = os.open(task.bundle / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)  # whatever the umask, or an earlier attempt, left
            file.write(content)


def command_in(bundle: Path) -> str:
    """What the container of a written bundle executes."""
    command: str = json.loads((bundle / CONFIG).read_text())["process"]["args"][0]
    return command


def _rlimits(files_max: int | None) -> list[dict[str, Any]]:
    limits = [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}]
    if files_max is not None:
        # The daemon's own soft limit is its hard one, with which a program that closes all it might have takes for ever.
        limits.append({"type": "RLIMIT_NOFILE", "hard": files_max, "soft": min(files_max, FILES_SOFT)})
    return limits


def _mounts(task: Task) -> list[dict[str, Any]]:
    # Both lie in memory and count as the task's: their bounds let a full /tmp be ENOSPC and not the OOM killer.
    tmp_bytes, shm_bytes = task.limits.memory_bytes // 2, task.limits.memory_bytes // 4
    # runc gives a tmpfs the mode of the image's directory below it, whatever is asked for; its owner may always write.
    owned = ("mode=1777", f"uid={task.uid}", f"gid={task.gid}")
    bound = ["bind", "ro", "nosuid", "nodev", "noexec"]
    return [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", "size=64k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", *owned, f"size={shm_bytes}"),
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _mount("/tmp", "tmpfs", "nosuid", "nodev", *owned, f"size={tmp_bytes}"),
        {"destination": WORKSPACE, "type": "bind", "source": str(task.workspace), "options": ["bind", "rw", "nosuid", "nodev"]},
        {"destination": "/etc/hosts", "type": "bind", "source": str(task.bundle / HOSTS), "options": bound},
        {"destination": "/etc/resolv.conf", "type": "bind", "source": str(task.bundle / RESOLV_CONF), "options": bound},
    ]


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _resources(limits: Limits) -> dict[str, Any]:
    return {
        "devices": [{"allow": False, "access": "rwm"}],
        # `swap` is memory and swap together: the same number means none.
        "memory": {"limit": limits.memory_bytes, "swap": limits.memory_bytes},
        "cpu": {
            "quota": max(CPU_QUOTA_US_MIN, round(limits.cpu_cores * CPU_PERIOD_US)),
            "period": CPU_PERIOD_US,
            "shares": max(2, round(limits.cpu_cores * 1024)),
        },
        "pids": {"limit": limits.pids},
    }


def _check_text(what: str, text: str) -> None:
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise BundleError(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise BundleError(f"{what} has a NUL byte in it")
    if size_bytes >= TEXT_BYTES_MAX:
        raise BundleError(f"{what} has {size_bytes} bytes; fewer than {TEXT_BYTES_MAX} are possible")
