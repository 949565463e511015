"""What a task does on its trees, against a plain overlay of the same tree on the same disk.

A Debian root file system is the image, and a copy of it the workspace.  Ours is a running task: a process enters the mount namespace of
its container and works there, so what it meets are the task's own mounts, and neither the task's limits nor its system call filter.
The plain side is an overlay, writable as the task's is, of the unpacked directory, in which a process of the same kind works.  Both
take turns.

The first task begins with nothing but the image's archive, and everything is fetched when it is read; the figures that have a goal are
those of a second one, mounted when all content was cached.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actors.image.archives.archive import Archive
from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.lazytree.table import ObjectTable
from tests.bench.site import TASK, Site
from tests.bench.table import Row, as_fast, median
from tests.node.daemon import Daemon

ROUNDS, SHORT_ROUNDS, COLD_ROUNDS = 20, 60, 6
READ = 1000  # files
_CLONE_NEWNS = 0x20000
_libc = ctypes.CDLL(None, use_errno=True)

WORKS = ("find / -xdev", "tar cf - /usr | wc -c", f"open+read of {READ} files")
GOALS = {WORKS[0]: 1.0, WORKS[1]: 0.95, WORKS[2]: 0.95}
COLD_GOAL = 2.0


class Inside:
    """A process that has entered a tree, and works there when it is told to."""

    def __init__(self, enter: Callable[[], None]) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._orders)
                os.close(self._answers)
                null = os.open("/dev/null", os.O_RDWR)
                enter()
                os.chdir("/")
                serve(os.fdopen(orders, "rb"), os.fdopen(answers, "wb"), null)
            finally:
                os._exit(1)
        os.close(orders)
        os.close(answers)
        self._reader = os.fdopen(self._answers, "rb")
        self._writer = os.fdopen(self._orders, "wb")

    def time(self, *work: Any) -> float:
        """Do it → milliseconds."""
        pickle.dump(work, self._writer)
        self._writer.flush()
        took: float = pickle.load(self._reader)
        return took

    def close(self) -> None:
        self._writer.close()
        os.waitpid(self._pid, 0)
        self._reader.close()


def serve(orders: Any, answers: Any, null: int) -> None:
    while True:
        try:
            kind, what = pickle.load(orders)
        except EOFError:
            os._exit(0)
        began = time.perf_counter()
        if kind == "run":
            subprocess.run(what, stdin=null, stdout=null, stderr=null, check=True)
        else:
            read(what)
        pickle.dump((time.perf_counter() - began) * 1e3, answers)
        answers.flush()


def read(files: list[str]) -> None:
    for path in files:
        opened = os.open(path, os.O_RDONLY)
        while os.read(opened, 1 << 17):
            pass
        os.close(opened)


def enter_task(pid: int) -> None:
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    if _libc.setns(namespace, _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "setns")


def works(root: str, files: list[str]) -> dict[str, tuple[str, Any]]:
    """What is measured, below `root`, which is "" or "/workspace"."""
    return {
        WORKS[0]: ("run", ["/usr/bin/find", root or "/", "-xdev"]),
        WORKS[1]: ("run", ["/bin/sh", "-c", f"tar cf - {root}/usr | wc -c"]),
        WORKS[2]: ("read", [f"{root}/{file}" for file in files]),
    }


def rows(site: Site) -> Iterator[Row]:
    with ExitStack() as stack:
        plain = plain_tree(site, stack)
        daemon = site.new_daemon(site.debian_image, AERIE_IMAGE_ARCHIVE_DIR=site.archived(site.debian_image))
        site.say("copying a workspace")
        store = daemon.state / "workspaces/tree"
        store.parent.mkdir(exist_ok=True)
        copy_tree(site.debian, store)
        files = some_files(site.debian)
        trees = {"image": works("", files), "workspace": works("/workspace", files)}
        site.say("the first task")
        with ExitStack() as first:
            task, inside = start(daemon, first)
            took = {(tree, work): inside.time(*order) for tree, orders in trees.items() for work, order in orders.items()}
            for root in ("/", "/workspace"):  # everything, for the second task
                inside.time("run", ["/bin/sh", "-c", f"tar cf - --one-file-system {root} | wc -c"])
            wait_cached(site, daemon, task)
        end(daemon, task)
        with ExitStack() as second:
            task, inside = start(daemon, second)
            for tree, orders in trees.items():
                for work, order in orders.items():
                    site.say(f"{tree}: {work}")
                    ours, base = in_turns(inside, plain, order, ROUNDS if "tar" in work else SHORT_ROUNDS, lambda: None)
                    yield as_fast(f"{tree}: {work}", ours, base, GOALS[work])
                    yield as_fast(f"{tree}: {work}, first task", took[tree, work], base, None)
                site.say(f"{tree}: {WORKS[0]}, page cache dropped")
                ours, base = in_turns(inside, plain, orders[WORKS[0]], COLD_ROUNDS, drop_caches)
                yield as_fast(f"{tree}: {WORKS[0]}, page cache dropped", ours, base, COLD_GOAL)
        end(daemon, task)


def wait_cached(site: Site, daemon: Daemon, task: str) -> None:
    """Wait until every object of both trees is in OBJECTS; a few may not be, when a server was killed: to our disadvantage."""
    objects = Objects(str(daemon.state / "images/cache"))
    [archive] = Path(daemon.environment["AERIE_IMAGE_ARCHIVE_DIR"]).iterdir()
    tables = [Archive.open(str(archive)).objects(), ObjectTable(str(daemon.state / "tasks" / task / "workspace/table"))]
    keys = [table.row(index).key for table in tables for index in range(len(table))]
    deadline = time.monotonic() + 30
    while missing := sum(not objects.has(key) for key in keys):
        if time.monotonic() > deadline:
            site.say(f"{missing} of {len(keys)} objects are not cached")
            break
        time.sleep(0.2)
    for table in tables:
        table.close()
    objects.close()


def in_turns(
    ours: Inside, plain: Inside, order: tuple[str, Any], rounds: int, before: Callable[[], None]
) -> tuple[float, float]:
    """Medians, in milliseconds."""
    sides: list[tuple[Inside, list[float]]] = [(ours, []), (plain, [])]
    for number in range(rounds + 1):
        for inside, figures in sides if number % 2 else reversed(sides):
            before()
            took = inside.time(*order)
            if number:  # the first one warms up
                figures.append(took)
    return median(sides[0][1]), median(sides[1][1])


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def plain_tree(site: Site, stack: ExitStack) -> Inside:
    """An overlay of the unpacked root, and on its /workspace an overlay of a copy."""
    home = site.home / "plain"
    copy = home / "workspace"
    site.say("copying a plain tree")
    home.mkdir()
    copy_tree(site.debian, copy)
    root = home / "root"
    for lower, target in ((site.debian, root), (copy, root / "workspace")):
        target.mkdir()
        upper, work = home / f"upper-{target.name}", home / f"work-{target.name}"
        upper.mkdir()
        work.mkdir()
        subprocess.run(
            ["mount", "-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", "overlay", target], check=True
        )
        stack.callback(mounts.unmount, str(target), lazily=True)
    inside = Inside(lambda: os.chroot(root))
    stack.callback(inside.close)
    return inside


def copy_tree(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--archive", "--reflink=never", source, target], check=True)
    shutil.rmtree(target / "dev")  # no workspace has devices, nor what its owner, the task, may not read
    subprocess.run(["chown", "--recursive", "--no-dereference", f"{TASK}:{TASK}", target], check=True)


def some_files(root: Path) -> list[str]:
    """Files of every size and directory below usr, as they come when sorted by name."""
    files = sorted(
        str(path.relative_to(root)) for path in (root / "usr").rglob("*") if path.is_file() and not path.is_symlink()
    )
    step = max(1, len(files) // READ)
    return files[::step][:READ]


def start(daemon: Daemon, stack: ExitStack) -> tuple[str, Inside]:
    """A task that stays, and a process in it."""
    task = daemon.submit(["/usr/bin/sleep", "1000"], workspace="tree")
    while b'"running"' not in daemon.command("result", "--json", task).stdout:
        time.sleep(0.05)
    pid = int((daemon.run_dir / "tasks" / task / "monitor/pid").read_text())
    inside = Inside(lambda: enter_task(pid))
    stack.callback(inside.close)
    return task, inside


def end(daemon: Daemon, task: str) -> None:
    daemon.command("stop", "--force", task)
    daemon.wait_released()
