"""Real containers on a busybox root, and a check that each test leaves nothing of them."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.image.messages import ImageConfig
from actors.sandbox import bundle, conmon, runtimes, seccomp
from actors.sandbox.cgroup import Cgroup
from actors.sandbox.runtimes import Runtime
from supervisor.pidfd import open_pidfd, wait_status

TIMEOUT_S = 60.0
FILTER = seccomp.load(Path(__file__).parents[3] / "conf" / "seccomp.json")
SEGFAULT = {"x86_64": bytes.fromhex("31c08800"), "aarch64": bytes.fromhex("000080d200000039")}  # store a byte at address 0
MACHINES = {"x86_64": 62, "aarch64": 183}


def program(code: bytes) -> bytes:
    """An ELF program that is nothing but machine code: what the first process of a container does, no library in between."""
    base, start = 0x400000, 120
    size = start + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    for value, width in (
        (2, 2), (MACHINES[os.uname().machine], 2), (1, 4), (base + start, 8), (64, 8), (0, 8), (0, 4),
        (64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2),
    ):  # fmt: skip
        header += value.to_bytes(width, "little")
    for value, width in ((1, 4), (5, 4), (0, 8), (base, 8), (base, 8), (size, 8), (size, 8), (4096, 8)):
        header += value.to_bytes(width, "little")
    return header + code


def system_call(number: int, *arguments: int) -> bytes:
    """A program that makes one system call and exits with its errno, 0 when it has none."""
    values = (*arguments, 0, 0, 0)[:3]
    if os.uname().machine == "x86_64":  # into eax, edi, esi, edx; the call; -eax is the exit code
        loads = [
            bytes([register]) + value.to_bytes(4, "little")
            for register, value in zip((0xB8, 0xBF, 0xBE, 0xBA), (number, *values), strict=True)
        ]
        return program(b"".join(loads) + bytes.fromhex("0f05 31ff 85c0 7904 f7d8 89c7 b83c000000 0f05"))
    words = []
    for register, value in zip((8, 0, 1, 2), (number, *values), strict=True):  # movz, movk
        words += [0x52800000 | (value & 0xFFFF) << 5 | register, 0x72A00000 | (value >> 16) << 5 | register]
    # svc; cmp x0, 0; neg x0, x0; csel x0, xzr, x0, ge; mov w8, 93; svc
    words += [0xD4000001, 0xF100001F, 0xCB0003E0, 0x9A80A3E0, 0x52800BA8, 0xD4000001]
    return program(b"".join(word.to_bytes(4, "little") for word in words))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system: busybox with all its applets, and commands that cannot be executed."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.fail("busybox is missing: apt-get install busybox-static")
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o755)
    for name in ("bin", "etc", "dev", "proc", "sys", "tmp", "workspace"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copy(busybox, root / "bin" / "busybox")
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for name, content, mode in (
        ("segfault", program(SEGFAULT[os.uname().machine]), 0o755),
        ("not-executable", b"#!/bin/sh\n", 0o644),
        ("root-only", b"#!/bin/sh\n", 0o700),
        ("bad-format", b"\x7fELF and no more", 0o755),
        ("no-interpreter", b"#!/no/such/interpreter\n", 0o755),
    ):
        (root / "bin" / name).write_bytes(content)
        (root / "bin" / name).chmod(mode)
    return root


@pytest.fixture(scope="session")
def filtered() -> bundle.Filter:
    return bundle.Filter(FILTER, seccomp.compile_filter(FILTER))


@dataclass
class Sandbox:
    """A created container: `started` it runs, and `finish` waits for its end."""

    container: conmon.Container
    created: conmon.Created
    cgroup: Cgroup
    attempt: Path
    workspace: Path
    pidfd: int
    conmon_pidfd: int
    ends: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        conmon.start(self.container, TIMEOUT_S, lambda descriptor: None)

    def finish(self) -> int:
        """The wait status, when the container has ended and conmon has written its output."""
        wait_for(self.pidfd)
        wait_for(self.conmon_pidfd)
        status = wait_status(self.pidfd)
        assert status is not None
        return status

    @property
    def stdout(self) -> str:
        return self._stream("stdout")

    @property
    def stderr(self) -> str:
        return self._stream("stderr")

    def _stream(self, wanted: str) -> str:
        text = ""
        for line in self.container.journal.read_text().splitlines():
            _, stream, whole, content = line.split(" ", 3)
            if stream == wanted:
                text += content + ("\n" if whole == "F" else "")
        return text

    def lines_so_far(self, count: int) -> None:
        """Wait until that many lines are in the journal."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.container.journal.exists() or self.container.journal.read_text().count("\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def wait_for(pidfd: int) -> None:
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    assert waiting.poll(TIMEOUT_S * 1000), "a process did not end in time"


class Laboratory:
    """Makes containers, and removes them all."""

    def __init__(self, home: Path, root: Path, filtered: bundle.Filter) -> None:
        self.home, self.root, self.filtered = home, root, filtered
        self.parent = f"/aerie-test-{os.getpid()}"
        self.environment = {"PATH": os.environ["PATH"], "AERIE_STATE_DIR": str(home)}
        self._count = 0
        self._runtimes: dict[str, Runtime] = {}
        self._sandboxes: list[Sandbox] = []
        self._cgroups: list[tuple[conmon.Container, Cgroup]] = []

    def runtime(self, name: str) -> Runtime:
        if name not in self._runtimes:
            self._runtimes[name] = runtimes.find(name, self.home / "runtimes" / name)
        return self._runtimes[name]

    def prepare(
        self, runtime: Runtime, command: tuple[str, ...], env: Mapping[str, str], limits: bundle.Limits, program: bool = True
    ) -> tuple[conmon.Container, Cgroup, Path]:
        """Everything for a container but itself."""
        self._count += 1
        home = self.home / f"task{self._count}"
        for name in ("bundle", "monitor", "workspace"):
            (home / name).mkdir(parents=True)
        os.chown(home / "workspace", bundle.UID, bundle.GID)
        container = conmon.Container(
            f"aerie-test-{os.getpid()}-{self._count}", runtime, home / "bundle", home / "monitor", home / "journal"
        )
        group = Cgroup(f"{self.parent}/{container.id}")
        image = ImageConfig(env=["PATH=/bin", "OF=image", "BY=image"], entrypoint=[], command=[])
        task = bundle.Task(
            hostname="task-host", image=image, command=command, env=env, limits=limits, bundle=home / "bundle", root=self.root,
            workspace=home / "workspace", cgroup=group.path,
        )  # fmt: skip
        compiled = self.filtered.program if program and runtime.name == "crun" else None
        bundle.write(task, bundle.Filter(self.filtered.section, compiled))
        self._cgroups.append((container, group))
        return container, group, home

    def create(
        self,
        runtime: Runtime,
        *command: str,
        env: Mapping[str, str] | None = None,
        limits: bundle.Limits | None = None,
        program: bool = True,
        files: Mapping[str, bytes] | None = None,
    ) -> Sandbox:
        """Create a container; `files`: programs in its workspace.  Without `program` the filter is given as JSON alone."""
        container, group, home = self.prepare(runtime, command, env or {}, limits or bundle.Limits(), program)
        for name, content in (files or {}).items():
            (home / "workspace" / name).write_bytes(content)
            (home / "workspace" / name).chmod(0o755)
        attempt = os.open(home / "attempt", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            created = conmon.create(container, command[0], attempt, self.environment, TIMEOUT_S)
        finally:
            os.close(attempt)
        sandbox = Sandbox(
            container, created, group, home / "attempt", home / "workspace", open_pidfd(created.container_pid),
            open_pidfd(created.conmon_pid),
        )  # fmt: skip
        self._sandboxes.append(sandbox)
        return sandbox

    def run(
        self, runtime: Runtime, *command: str, env: Mapping[str, str] | None = None, limits: bundle.Limits | None = None
    ) -> tuple[int, Sandbox]:
        """Run a command to its end → its exit code (a signal negative), and what is left of it."""
        sandbox = self.create(runtime, *command, env=env, limits=limits)
        sandbox.start()
        return os.waitstatus_to_exitcode(sandbox.finish()), sandbox

    def clear(self) -> None:
        for container, group in self._cgroups:
            group.kill(TIMEOUT_S)
            conmon.delete(container, TIMEOUT_S, force=True)
            group.remove()
        Cgroup(self.parent).remove()
        for sandbox in self._sandboxes:
            wait_for(sandbox.pidfd)
            wait_for(sandbox.conmon_pidfd)
            for descriptor in (sandbox.pidfd, sandbox.conmon_pidfd, *sandbox.ends.values()):
                os.close(descriptor)
        for runtime in self._runtimes.values():
            for descriptor in runtime.descriptors:
                os.close(descriptor)


def left(home: Path, parent: str) -> list[str]:
    """Processes that were given this state directory, mounts below it, control groups of its containers."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line]
    found += [str(directory) for directory in Cgroup(parent).directories if directory.exists()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment, arguments = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone; or the first of a machine like this
                continue
            if f"AERIE_STATE_DIR={home}".encode() in environment.split(b"\0"):
                found.append(f"process {entry.name}: {arguments!r}")
    return found


@pytest.fixture
def laboratory(tmp_path: Path, root: Path, filtered: bundle.Filter) -> Iterator[Laboratory]:
    laboratory = Laboratory(tmp_path, root, filtered)
    try:
        yield laboratory
    finally:
        laboratory.clear()
    deadline = time.monotonic() + TIMEOUT_S
    while found := left(tmp_path, laboratory.parent):  # a runtime that is killed with its conmon dies a moment later
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


@pytest.fixture(params=["crun", "runc"])
def runtime(request: pytest.FixtureRequest, laboratory: Laboratory) -> Runtime:
    return laboratory.runtime(request.param)
