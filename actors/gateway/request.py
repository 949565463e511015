"""What a task may ask for: checked by the client before it sends, and by the daemon, which trusts no client.  Pure."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from actors.gateway.messages import TaskSpec
from actors.quantities import PARSERS, QuantityError
from actors.settings import SandboxSection, accepted

# An id names directories, cgroups and containers.
TASK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)
TIMEOUT_MAX_S: Final = 3650 * 86400
NAME_BYTES_MAX: Final = 255  # of one path component


def faults(task: str, spec: TaskSpec) -> list[str]:
    """Everything that is wrong with a request, each with what would be right; empty when nothing is."""
    found = []
    if not TASK_NAME.fullmatch(task):
        found.append(
            f"id {task[:120]!r}: it must be up to 100 letters, digits, '_', '.' and '-', and start with a letter or digit"
        )
    if not spec.image:
        found.append("image: it is empty: name one, like docker.io/library/debian:12")
    if not spec.command or not spec.command[0]:
        found.append("command: it is empty: name a program, after --")
    if spec.workspace is not None and not _is_name(spec.workspace):
        found.append(f"workspace {spec.workspace[:300]!r}: it must be one path component of at most {NAME_BYTES_MAX} bytes")
    for name in spec.env:
        if not name or "=" in name:
            found.append(f"env {name[:100]!r}: a variable's name must not be empty nor have '=' in it")
    texts = {
        "image": [spec.image],
        "command": spec.command,
        "env": [*spec.env, *spec.env.values()],
        "workspace": [spec.workspace or ""],
    }
    found += [
        f"{what}: a NUL or a byte that is not UTF-8 cannot be passed on" for what, values in texts.items() if not _clean(values)
    ]
    if not _within(spec.memory_bytes, "memory_bytes"):
        found.append(f"memory {spec.memory_bytes}: it must be {accepted('sandbox', 'memory_bytes')}")
    if not _within(spec.cpu_cores, "cpu_cores"):
        found.append(f"cpu {spec.cpu_cores:g}: it must be {accepted('sandbox', 'cpu_cores')}")
    if spec.timeout_s is not None and not 0 < spec.timeout_s <= TIMEOUT_MAX_S:
        found.append(f"timeout {spec.timeout_s:g}: it must be more than 0 and at most ten years")
    return found


def amount(unit: str, value: Any) -> float:
    """A limit as a task gives it, in `bytes`, `cores` or seconds (`s`): a text such as `512Mi`, or a number.

    Raises QuantityError.
    """
    if isinstance(value, str):
        return PARSERS[unit](value)
    if isinstance(value, int | float) and not isinstance(value, bool) and (unit != "bytes" or value % 1 == 0):
        return value
    raise QuantityError(f"{value!r} is not a limit: write a text such as {EXAMPLES[unit]}, or a number")


EXAMPLES: Final = {"bytes": '"512Mi"', "cores": '"500m"', "s": '"30s"'}


def _within(value: float, field: str) -> bool:
    """Whether a limit is within the bounds of the setting that is its default."""
    try:
        msgspec.convert({field: value}, SandboxSection)
    except msgspec.ValidationError:
        return False
    return True


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and len(name.encode(errors="surrogatepass")) <= NAME_BYTES_MAX


def _clean(texts: list[str]) -> bool:
    """No NUL, which execve(2) ends at, and no lone surrogate, which is how Python holds a byte that is not UTF-8."""
    return not any("\0" in text or re.search("[\ud800-\udfff]", text) for text in texts)
