"""The system call filter: conf/seccomp.json, and the same compiled once to the program that the kernel runs.

runc takes the filter as JSON and compiles it on every create.  crun takes the compiled program as well (crun(1),
run.oci.seccomp_bpf_data), which saves libseccomp's work, a fifth of a `crun create` (measured: 9.7 ms with, 7.7 without).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path
from typing import Any, Final

# seccomp.h of libseccomp 2.5 and linux/seccomp.h
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_NO_SUCH_CALL: Final = -1  # __NR_SCMP_ERROR
_ARCHITECTURES: Final = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_COMPARISONS: Final = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}


class SeccompError(Exception):
    """The filter could not be read or compiled; the text says what to do."""


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp"""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def load(path: Path) -> dict[str, Any]:
    """The filter in the file, as an OCI configuration's linux.seccomp for this machine.  Raises SeccompError."""
    try:
        section: dict[str, Any] = json.loads(path.read_text())["seccomp"]
        # libseccomp would compile the filter once for every architecture that is named.
        section["architectures"] = [name for name in section["architectures"] if name == _ARCHITECTURES[os.uname().machine]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SeccompError(f"the system call filter {path} cannot be used ({error!r}): restore it from the release") from None
    return section


def compile_filter(section: dict[str, Any]) -> bytes:
    """The filter as a program of the kernel's (an array of struct sock_filter) for this machine.

    As crun and runc do, it leaves out calls that this libseccomp has no number for.  Raises SeccompError.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        raise SeccompError("libseccomp is missing: apt-get install libseccomp2") from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Comparison),
    ]  # fmt: skip
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    context = library.seccomp_init(_action(section["defaultAction"], section["defaultErrnoRet"]))
    if not context:
        raise SeccompError("libseccomp could not begin a filter")
    try:
        for rule in section["syscalls"]:
            comparisons = [_comparison(argument) for argument in rule.get("args", ())]
            for name in rule["names"]:
                number = library.seccomp_syscall_resolve_name(name.encode())
                if number == _NO_SUCH_CALL:
                    continue
                array = (_Comparison * len(comparisons))(*comparisons)
                action = _action(rule["action"], rule.get("errnoRet", 0))
                _check(library.seccomp_rule_add_array(context, action, number, len(comparisons), array), name)
        # A file and not a pipe: the program may be longer than a pipe holds.
        with open(os.memfd_create("seccomp"), "rb") as file:
            _check(library.seccomp_export_bpf(context, file.fileno()), "the whole")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _action(name: str, errno_returned: int) -> int:
    return {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO | errno_returned}[name]


def _comparison(argument: dict[str, Any]) -> _Comparison:
    return _Comparison(argument["index"], _COMPARISONS[argument["op"]], argument["value"], argument.get("valueTwo", 0))


def _check(answer: int, what: str) -> None:
    if answer:
        raise SeccompError(f"libseccomp refused the filter at {what}: {errno.errorcode.get(-answer, str(answer))}")
