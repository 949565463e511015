"""The system call filter, as a file, compiled, and in the kernel."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from actors.sandbox import seccomp
from actors.sandbox.runtimes import Runtime
from actors.sandbox.seccomp import SeccompError
from tests.actors.sandbox.conftest import FILTER, Laboratory, system_call

SEIZE, INTERRUPT, DETACH, GET_FILTER = 0x4206, 0x4207, 17, 0x420C  # PTRACE_*
NEVER = {
    "add_key", "bpf", "io_uring_setup", "keyctl", "kexec_load", "mount", "move_mount", "open_tree", "perf_event_open", "pivot_root",
    "reboot", "setns", "umount2", "unshare", "userfaultfd", "init_module", "open_by_handle_at", "fsopen", "clone3",
}  # fmt: skip
NEEDED = {
    "execve",
    "futex",
    "mmap",
    "openat",
    "openat2",
    "statx",
    "rseq",
    "getrandom",
    "memfd_create",
    "inotify_add_watch",
    "flock",
    "ptrace",
}


def names(action: str) -> set[str]:
    return {name for rule in FILTER["syscalls"] if rule["action"] == action for name in rule["names"]}


def test_what_is_allowed_and_what_is_not() -> None:
    assert names("SCMP_ACT_ALLOW") >= NEEDED
    assert not names("SCMP_ACT_ALLOW") & NEVER
    assert not names("SCMP_ACT_ALLOW") & names("SCMP_ACT_ERRNO")
    assert FILTER["defaultAction"] == "SCMP_ACT_ERRNO"
    assert len(FILTER["architectures"]) == 1


def test_the_file_says_where_it_comes_from() -> None:
    about = " ".join(json.loads((Path(__file__).parents[3] / "conf" / "seccomp.json").read_text())["about"])
    assert "containers/common" in about and "Apache-2.0" in about


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seccomp": {}}'])
def test_a_file_that_is_broken(text: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(SeccompError, match="broken.json"):
        seccomp.load(tmp_path / "broken.json")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SeccompError, match="restore it"):
        seccomp.load(tmp_path / "none.json")


def test_the_program_is_one_for_the_kernel() -> None:
    program = seccomp.compile_filter(FILTER)
    assert len(program) % 8 == 0  # struct sock_filter
    assert 0 < len(program) // 8 <= 4096  # BPF_MAXINSNS


def test_a_rule_that_libseccomp_refuses() -> None:
    broken = {
        **FILTER,
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 9, "value": 0, "op": "SCMP_CMP_EQ"}]}],
    }
    with pytest.raises(SeccompError, match="read: EINVAL"):
        seccomp.compile_filter(broken)


def installed(pid: int) -> bytes:
    """The program of the filter that was put on a process last: ptrace(2), PTRACE_SECCOMP_GET_FILTER."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long

    def ptrace(request: int, address: int = 0, data: object = None) -> int:
        answer = libc.ptrace(request, pid, address, data)
        if answer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(answer)

    ptrace(SEIZE)
    try:
        ptrace(INTERRUPT)
        os.waitpid(pid, 0)
        program = ctypes.create_string_buffer(8 * ptrace(GET_FILTER))
        ptrace(GET_FILTER, 0, program)
    finally:
        ptrace(DETACH)
    return program.raw


def test_crun_installs_the_same_filter_from_either_form(laboratory: Laboratory) -> None:
    for program in (True, False):
        sandbox = laboratory.create(laboratory.runtime("crun"), "/bin/sh", "-c", "echo; sleep 60", program=program)
        sandbox.start()
        sandbox.lines_so_far(1)
        assert installed(sandbox.created.container_pid) == laboratory.filtered.program


ALLOWED = None
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("unshare", [CLONE_NEWUSER], errno.EPERM),
        ("mount", [], errno.EPERM),
        ("keyctl", [], errno.EPERM),
        ("io_uring_setup", [], errno.EPERM),
        ("bpf", [], errno.EPERM),
        ("userfaultfd", [], errno.EPERM),
        ("clone3", [], errno.ENOSYS),  # its flags cannot be looked at: libc falls back to clone
        ("clone", [CLONE_NEWUSER | signal.SIGCHLD], errno.ENOSYS),
        ("clone", [CLONE_NEWNET | signal.SIGCHLD], errno.ENOSYS),
        ("clone", [signal.SIGCHLD], ALLOWED),
        ("socket", [socket.AF_UNIX, socket.SOCK_STREAM], ALLOWED),
        ("socket", [socket.AF_INET6, socket.SOCK_STREAM], ALLOWED),
        ("socket", [socket.AF_NETLINK, socket.SOCK_RAW, 0], ALLOWED),
        ("socket", [socket.AF_NETLINK, socket.SOCK_RAW, 9], errno.ENOSYS),  # NETLINK_AUDIT
        ("socket", [socket.AF_ALG, socket.SOCK_SEQPACKET], errno.ENOSYS),
        ("socket", [socket.AF_VSOCK, socket.SOCK_STREAM], errno.ENOSYS),
        ("personality", [0xFFFFFFFF], ALLOWED),
        ("personality", [0x0040000], errno.ENOSYS),  # ADDR_NO_RANDOMIZE
        ("ptrace", [], ALLOWED),  # PTRACE_TRACEME
        ("memfd_create", [], errno.EFAULT),
    ],
)
def test_what_the_kernel_answers(
    laboratory: Laboratory, runtime: Runtime, name: str, arguments: list[int], answer: int | None
) -> None:
    number = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(name.encode())
    sandbox = laboratory.create(runtime, "/workspace/call", files={"call": system_call(number, *arguments)})
    sandbox.start()
    assert os.waitstatus_to_exitcode(sandbox.finish()) == (answer or 0)
