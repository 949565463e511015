"""The OCI runtimes of this host: where they are, which version, how each is called, and what its error messages mean.

Tasks name them `crun`, `runc` and `gvisor` (whose program is runsc).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

PROGRAMS: Final = {"crun": "crun", "runc": "runc", "gvisor": "runsc"}
CURES: Final = {
    "crun": "apt-get install crun",
    "runc": "apt-get install runc",
    "gvisor": "apt-get install runsc, or put gVisor's current runsc on the PATH",
}
VERSION_TIMEOUT_S: Final = 60.0  # a program that has to come from a slow disk first may take many
# From this release on runsc has systrap, its faster platform; an older one is Debian's, where ptrace is what works everywhere.
GVISOR_SYSTRAP: Final = 20230501

_OPEN_TREE: Final = 428  # SYS_open_tree and SYS_mount_setattr have the same numbers on every architecture
_MOUNT_SETATTR: Final = 442
_AT_FDCWD: Final = -100
_OPEN_TREE_CLONE: Final = 1
_AT_EMPTY_PATH: Final = 0x1000
_MOUNT_ATTR: Final = struct.Struct("=QQQQ")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR_RDONLY: Final = 1

_libc: Final = ctypes.CDLL(None, use_errno=True)


Kind = Literal["not_found", "not_executable", "other"]

# What a message about the command, and about nothing else of the container, has in it: crun's, runc's and runsc's words.
_OF_COMMAND: Final = re.compile(
    r"executable file|open executable|exec container process|(?:^|: )exec:? [\"/.\w]|failed to load |finding executable"
)
_MEANINGS: Final[tuple[tuple[Kind, re.Pattern[str]], ...]] = (
    (
        "not_executable",
        re.compile(r"permission denied|operation not permitted|exec format error|is a directory", re.IGNORECASE),
    ),
    ("not_found", re.compile(r"no such file or directory|not found|not a directory", re.IGNORECASE)),
)
_RUNC_LOG: Final = re.compile(r'msg="((?:[^"\\]|\\.)*)"')
# What crun's or runc's first process prints to the task's stderr, before it ends with 1, when execve(2) fails after all.
_FAILED_EXEC: Final = re.compile(
    r"exec (?:container process )?(?:\(missing dynamic library\?\) )?`?(?P<path>\S.*?)`?: (?P<why>[^:]+)\n"
)


class RuntimeMissing(Exception):
    """The runtime is not on this host, or does not answer; the text says how to get it."""


class ContainerError(Exception):
    """A runtime, or conmon, could not do what it was asked; the text is fit to be shown."""


class CreateError(ContainerError):
    """The container could not be created, or its command not be started: the task never ran.

    `kind` says what is wrong: the command is not in the image, cannot be executed, or anything else.
    """

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind: Final = kind


@dataclass(frozen=True)
class Runtime:
    """`state`: the directory in which it keeps what it knows of its containers; it must be on a file system that a reboot empties.

    `sealed`: a descriptor of the program on a read-only mount of its own (see `seal`), or None.
    """

    name: str
    path: str
    version: str
    state: Path
    flags: tuple[str, ...] = ()
    sealed: int | None = None

    @property
    def program(self) -> str:
        """What to execute; in a process that has inherited `descriptors`."""
        return self.path if self.sealed is None else f"/proc/self/fd/{self.sealed}"

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a process must inherit to execute `program`."""
        return () if self.sealed is None else (self.sealed,)

    @property
    def global_flags(self) -> list[str]:
        return ["--root", str(self.state), *self.flags]


def find(name: str, state: Path) -> Runtime:
    """The runtime that tasks call `name`; `state` is made when it is not there.  Raises RuntimeMissing."""
    path = shutil.which(PROGRAMS[name])
    if path is None:
        raise RuntimeMissing(f"the runtime {name} is missing ({PROGRAMS[name]} is not on the PATH): {CURES[name]}")
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True)
        version = parse_version(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RuntimeMissing(f"the runtime {name} ({path}) does not tell its version ({error}): {CURES[name]}") from None
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Runtime(name, path, version, state, flags(name, version), None if name == "gvisor" else seal(path))


def parse_version(text: str) -> str:
    """The version in the first line of `--version`: `crun version 1.8.1`, `runsc version release-20250101.0`.

    Raises ValueError.
    """
    found = re.match(r"\w+ version (\S+)", text)
    if found is None:
        raise ValueError(f"no version in {text[:100]!r}")
    return found[1]


def flags(name: str, version: str) -> tuple[str, ...]:
    """The flags that each call gets before its verb."""
    if name == "crun":
        return ("--cgroup-manager=cgroupfs",)
    if name == "runc":
        return ()
    released = re.search(r"\d{8}", version)
    systrap = released is not None and int(released[0]) >= GVISOR_SYSTRAP
    # Without its own network stack nothing but loopback is there, as under the others.
    return ("--platform=systrap" if systrap else "--platform=ptrace", "--network=none")


def seal(path: str) -> int | None:
    """A descriptor, close-on-exec, of the program at `path` on a detached read-only mount; None where the kernel gives none.

    crun and runc guard their program against the container by executing themselves again from such a mount (CVE-2019-5736);
    one that is there already saves them that: 1.3 ms of each call (measured).  The mount is nowhere in the tree and ends with
    the last descriptor.  It stays the program that was found: one that is upgraded takes effect when the daemon starts again.
    """
    descriptor: int = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if descriptor < 0:
        return None
    attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    if _libc.syscall(_MOUNT_SETATTR, descriptor, b"", _AT_EMPTY_PATH, attributes, len(attributes)):
        os.close(descriptor)
        return None
    return descriptor


def create_error(said: str, command: str) -> CreateError:
    """What a runtime's error output says of a container that was to run `command`."""
    text = _message(said)
    if _OF_COMMAND.search(text):
        for kind, pattern in _MEANINGS:
            found = pattern.search(text)
            if found and kind == "not_found":
                return CreateError(
                    kind, f"{command}: not in the image, or its interpreter or loader is not ({found[0].lower()})"
                )
            if found:
                return CreateError(kind, f"{command}: cannot be executed in the image by uid 1000 ({found[0].lower()})")
    return CreateError("other", f"the container could not be created: {text or 'the runtime does not say why'}")


def exec_error(stderr: str, command: str) -> CreateError | None:
    """Whether a task that printed `stderr` and nothing else, and ended with exit code 1, never ran.

    crun and runc look whether the command is there when they create the container.  That it cannot be executed all the same (a
    format that the kernel does not know, a missing interpreter, a file that uid 1000 may not execute) they find out after
    `start`, in the task's place, and nothing but this one line tells.
    """
    found = _FAILED_EXEC.fullmatch(stderr)
    if found is None or os.path.basename(found["path"]) != os.path.basename(command):
        return None
    error = create_error(stderr, command)
    return None if error.kind == "other" else error


def _message(said: str) -> str:
    """The last thing said, without runc's log format."""
    lines = said.strip().splitlines()
    if not lines:
        return ""
    quoted = _RUNC_LOG.search(lines[-1])
    return lines[-1] if quoted is None else re.sub(r"\\(.)", r"\1", quoted[1])
