"""What runs while a storm rages: tasks on images that are cached, lazy, prefetched or still to be built, each checked to the last byte.

A task reads its image and its workspace, of which most is not on the node when it starts; executes and so maps what it reads;
writes, renames and removes; prints to both streams; and ends with a code of its own.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

from actors.gateway.messages import TaskResult
from actors.lazytree import ledger
from actors.lazytree.objects import Objects
from tests.actors.image.images import Repository, hard_link, member, tar
from tests.node.conftest import busybox_layer
from tests.node.daemon import Daemon

LINES = 400
ROUND = 20  # lines between two looks at files
STORE_BYTES = 1 << 20
IMAGE_BYTES = 1 << 20
PROGRAMS = 4  # each another object
SMALL_BYTES = 200 << 10  # of an image whose pack is made soon
UNREAD_BYTES = 4 << 20  # in it: an image that is read whole is pulled whole, and not streamed
CONMON_BYTES = 8192  # what a killed conmon may have had in its hands
EXIT_CODE = 7
# Of all tasks the same, or no two of one image were of one workload (`actors.image.archives.trace`).
SCRIPT = f"""
i=0
while [ $i -lt {LINES} ]; do
  i=$((i+1)); echo out $i; echo err $i >&2
  if [ $((i % {ROUND})) = 0 ]; then
    r=$((i / {ROUND}))
    [ "$(md5sum < big)" = "$STORE  -" ] || echo WRONG content
    [ "$(md5sum < /data/cold-$r)" = "$(head -n $r /data/sums | tail -n 1)  -" ] || echo WRONG image $r
    [ "$(/data/busybox-$((r % {PROGRAMS})) echo executed)" = executed ] || echo WRONG program $r
    echo $i >> written || echo WRONG write
    mkdir made-$r && mv small-$r made-$r/moved && rm gone-$r || echo WRONG rename
    sleep 0.03
  fi
done
exit {EXIT_CODE}
"""
ROUNDS = range(1, LINES // ROUND + 1)


class Images:
    """Images of a registry's repository, each with content of its own."""

    def __init__(self, repository: Repository, chance: random.Random) -> None:
        self._repository = repository
        self._chance = chance
        self._count = 0
        self._base = busybox_layer()

    def push(self, small: bool = False) -> str:
        """Push another image → its reference.  Its programs are mapped when they are executed."""
        self._count += 1
        busybox = Path("/bin/busybox").read_bytes()
        size_bytes = SMALL_BYTES if small else IMAGE_BYTES
        cold = {number: self._chance.randbytes(size_bytes // len(ROUNDS)) for number in ROUNDS}
        sums = "".join(hashlib.md5(content).hexdigest() + "\n" for content in cold.values())
        members = [member(f"data/cold-{number}", content) for number, content in cold.items()]
        for number in range(PROGRAMS):
            # Behind its last section a program may hold what it likes: another object, the same program.
            other = member(f"data/busybox-{number}", busybox + self._chance.randbytes(16), mode=0o755)
            members.append(hard_link(f"data/busybox-{number}", "bin/busybox") if small else other)
        if small:
            members.append(member("data/unread", bytes(UNREAD_BYTES)))
        tag = str(self._count)
        self._repository.push(
            self._base, tar(member("data/sums", sums.encode()), *members), tag=tag, process={"Env": ["PATH=/bin"]}
        )
        return self._repository.reference(tag)


@dataclass
class Task:
    """A task that runs, and what to expect of it.  `conmon_struck`: its conmon was killed, so a little output may be missing."""

    name: str
    conmon_struck: bool = False


class Broken(Exception):
    """An invariant of the fault model that did not hold."""


def prepare(daemon: Daemon, name: str, chance: random.Random) -> dict[str, str]:
    """Make the store of a task's workspace, of the task's own name → the environment in which the task runs SCRIPT."""
    store = daemon.state / "workspaces" / name
    store.mkdir(mode=0o755)
    content = chance.randbytes(STORE_BYTES)
    (store / "big").write_bytes(content)
    for number in ROUNDS:
        (store / f"small-{number}").write_text(f"small {number}")
        (store / f"gone-{number}").write_text("not for long")
    for path in (store, *store.iterdir()):
        os.chown(path, 1000, 1000)
    return {"STORE": hashlib.md5(content).hexdigest()}


def check(daemon: Daemon, task: Task, result: TaskResult) -> None:
    """Hold an ended task against the invariants, and forget its workspace.  Raises Broken."""
    for fault in _faults(daemon, task, result):
        raise Broken(f"{task.name}: {fault}")
    shutil.rmtree(daemon.state / "workspaces" / task.name)


def taken_bytes(cache: Path) -> int:
    """What the objects take of the disk."""
    found = 0
    for path in cache.glob("??/*"):
        with suppress(FileNotFoundError):  # evicted, or repaired, just now
            found += ledger.taken_bytes(path.stat())
    return found


def accounts(cache: Path) -> int:
    """What the objects take by their accounts, those of dead holders too, which the next ones take up."""
    with ExitStack() as stack:
        objects = stack.enter_context(closing(Objects(os.fspath(cache))))
        for _ in (cache / "ledgers").iterdir():
            stack.enter_context(closing(ledger.Ledger(objects.descriptor)))
        return ledger.sum_of(objects.descriptor).used_bytes - ledger.unlinked_bytes(objects.descriptor)


def _faults(daemon: Daemon, task: Task, result: TaskResult) -> Iterator[str]:
    if result.state != "stopped":
        yield str(result)
    stdout, stderr = daemon.logs(task.name)
    text = stdout.decode(errors="replace")
    if "WRONG" in text:
        yield f"saw an error: {[line for line in text.splitlines() if 'WRONG' in line][:5]}, {result}"
    if (result.reason, result.exit_code, result.sync, result.error) != ("exited", EXIT_CODE, "synced", None):
        yield str(result)
    for word, stream in (("out", stdout), ("err", stderr)):
        yield from _missing(task, word, stream, result.gaps)
    store = daemon.state / "workspaces" / task.name
    written = (store / "written").read_text().split()
    if written != [str(number * ROUND) for number in ROUNDS]:
        yield f"written {written}"  # twice, if it has run twice
    moved = {str(path.relative_to(store)): path.read_text() for path in store.glob("made-*/moved")}
    if moved != {f"made-{number}/moved": f"small {number}" for number in ROUNDS}:
        yield f"moved {moved}"
    if left := sorted(path.name for path in store.iterdir() if path.name.startswith(("small", "gone", "."))):
        yield f"left in the store: {left}"


def _missing(task: Task, word: str, stream: bytes, gaps: int) -> Iterator[str]:
    expected = [f"{word} {number}".encode() for number in range(1, LINES + 1)]
    lines = stream.splitlines()
    if lines == expected:
        return
    missing_bytes = sum(map(len, expected)) - sum(map(len, lines))
    if not (task.conmon_struck and gaps and 0 <= missing_bytes <= CONMON_BYTES and _is_in_order(lines, expected)):
        yield f"{len(lines)} lines of {LINES} on {word}, gaps {gaps}, conmon struck: {task.conmon_struck}"


def _is_in_order(lines: list[bytes], expected: list[bytes]) -> bool:
    """Whether the whole ones of `lines` are some of `expected`, in order and none twice; a gap may leave halves at its edges."""
    known = {line: number for number, line in enumerate(expected)}
    numbers = [known[line] for line in lines if line in known]
    return numbers == sorted(set(numbers)) and len(lines) - len(numbers) <= 4
