"""`run.py doctor`: whether this host has what the daemon needs, found out by trying it.

Each check gives one :class:`actors.trials.Finding`.  The quick ones, which only look, are also what the daemon does before it starts
(`missing_parts`); the others mount, in a mount namespace of their own, so that nothing is left however this ends.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from actors.sandbox import cgroup, runtimes
from actors.settings import Settings
from actors.trials import Finding, try_everything

KERNEL_MIN: Final = (6, 12)
CONMON_MIN: Final = (2, 1, 6)  # Debian 12's; no older one was tried
VERSION_TIMEOUT_S: Final = 60.0  # a program that has to come from a slow disk first may take many
FILE_SYSTEMS: Final = ("erofs", "fuse", "overlay")
# On the first three, EROFS does not mount a file (ENOTBLK); the others are not this host's alone.
NOT_FOR_STATE: Final = ("overlay", "tmpfs", "ramfs", "nfs", "nfs4", "9p")


Check = Callable[[Settings], Finding]


def missing_parts(settings: Settings) -> list[str]:
    """What is missing for the daemon to start, each with its cure; found by looking only, within a moment."""
    findings = [*(check(settings) for check in LOOKED_AT), _runtime(settings, settings.sandbox.runtime)]
    return [f"{each.part}: {each.found}; needed: {each.needed}; {each.cure}" for each in findings if each.missing]


def doctor(arguments: argparse.Namespace, settings: Settings) -> int:
    findings = examine(settings)
    if arguments.json:
        from actors.gateway.reading import show_json

        show_json(findings)
    else:
        for each in findings:
            mark = "ok" if each.ok else "MISSING" if each.required else "absent"
            print(f"{mark:8}{each.part}: {each.found}" + ("" if each.ok else f"; needed: {each.needed}; {each.cure}"))
    return 1 if any(each.missing for each in findings) else 0


def examine(settings: Settings) -> list[Finding]:
    """Every check.  This process is in a mount and a network namespace of its own afterwards."""
    findings = [check(settings) for check in LOOKED_AT]
    findings += [_runtime(settings, name) for name in runtimes.PROGRAMS]
    if os.geteuid() == 0:
        findings += try_everything(existing(Path(settings.state.dir)))
    return findings


# --- looked at ------------------------------------------------------------------------------------------------------------


def _root(settings: Settings) -> Finding:
    return Finding("user", f"uid {os.geteuid()}", "root", os.geteuid() == 0, "run it as root: it mounts and makes namespaces")


def _kernel(settings: Settings) -> Finding:
    release = os.uname().release
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    return Finding(
        "kernel", release, "Linux 6.12 or newer", numbers >= KERNEL_MIN, "boot a newer one (Debian 12: from bookworm-backports)"
    )


def _file_systems(settings: Settings) -> Finding:
    known = Path("/proc/filesystems").read_text().split()
    # A module that can be loaded is as good: mounting loads it.
    found = [name for name in FILE_SYSTEMS if name in known or _loadable(name)]
    cure = "a kernel, or its package of modules, with them"
    return Finding("file systems", ", ".join(found) or "none", ", ".join(FILE_SYSTEMS), len(found) == len(FILE_SYSTEMS), cure)


def _loadable(name: str) -> bool:
    """Whether modprobe knows a module of that name; it is not loaded."""
    modprobe = shutil.which("modprobe")
    return modprobe is not None and subprocess.run([modprobe, "-n", "-q", name], check=False).returncode == 0


def _fuse_device(settings: Settings) -> Finding:
    try:
        is_device = stat.S_ISCHR(os.stat("/dev/fuse").st_mode)
    except OSError:
        is_device = False
    return Finding(
        "/dev/fuse",
        "there" if is_device else "not there",
        "the FUSE device",
        is_device,
        "modprobe fuse; mknod /dev/fuse c 10 229",
    )


def _cgroups(settings: Settings) -> Finding:
    faults = cgroup.host_faults()
    hierarchies = cgroup.mounted()
    v2 = any(hierarchy.unified for hierarchy in hierarchies)
    v1 = sorted(name for hierarchy in hierarchies for name in hierarchy.controllers if "=" not in name)
    kind = f"v1 ({', '.join(v1)})" + (" and v2" if v2 else "") if v1 else "v2" if v2 else "none"
    return Finding(
        "control groups",
        "; ".join([kind, *faults]),
        "memory, cpu and pids, all of v1 or all of v2",
        not faults,
        "as said, or `make setup`",
    )


def _conmon(settings: Settings) -> Finding:
    cure = "apt-get install conmon"
    version = _version("conmon", r"conmon version (\d+)\.(\d+)\.(\d+)")
    ok = version is not None and version >= CONMON_MIN
    return Finding("conmon", _dotted(version) if version else "not there", f"{_dotted(CONMON_MIN)} or newer", ok, cure)


def _runtime(settings: Settings, name: str) -> Finding:
    program = runtimes.PROGRAMS[name]
    path = shutil.which(program)
    found = "not on the PATH"
    if path is not None:
        try:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True)
            found = runtimes.parse_version(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            path, found = None, f"does not tell its version: {error}"
    required = name == settings.sandbox.runtime
    needed = f"{program}, for tasks with --runtime {name}" + (" or none" if required else "")
    return Finding(f"runtime {name}", found, needed, path is not None, runtimes.CURES[name], required)


def _state_disk(settings: Settings) -> Finding:
    place = existing(Path(settings.state.dir))
    kind = file_system_of(str(place), Path("/proc/self/mountinfo").read_text())
    writable = os.access(place, os.W_OK)
    ok = writable and kind not in NOT_FOR_STATE
    cure = "set AERIE_STATE_DIR to a directory on a local disk (ext4, xfs, btrfs)"
    return Finding(
        "state directory",
        f"{settings.state.dir} on {kind}{'' if writable else ', not writable'}",
        "a local file system, not an overlay, writable",
        ok,
        cure,
    )


def _run_directory(settings: Settings) -> Finding:
    place = existing(Path(settings.run.dir))
    ok = os.access(place, os.W_OK)
    return Finding(
        "run directory",
        f"{settings.run.dir}{'' if ok else ', not writable'}",
        "writable",
        ok,
        "set AERIE_RUN_DIR to a writable directory",
    )


LOOKED_AT: Final[Sequence[Check]] = (
    _root,
    _kernel,
    _file_systems,
    _fuse_device,
    _cgroups,
    _conmon,
    _state_disk,
    _run_directory,
)


# --- what they ask with ---------------------------------------------------------------------------------------------------


def file_system_of(path: str, mountinfo: str) -> str:
    """The type of the file system that an absolute path, without symbolic links, lies on, by the text of /proc/self/mountinfo."""
    best, kind = "", "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split(" ")[4]).rstrip("/")
        # A later mount of equal depth lies over the earlier one.
        if (path + "/").startswith(target + "/") and len(target) >= len(best):
            best, kind = target, after.split(" ")[0]
    return kind


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    while not path.is_dir():
        path = path.parent
    return path


def _version(program: str, pattern: str) -> tuple[int, ...] | None:
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, answer.stdout)
    return tuple(map(int, found.groups())) if found else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
