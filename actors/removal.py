"""Removing what a task has left: put aside at once, and deleted by rm(1).

A task may leave a million files.  To delete them here would take the interpreter from every other task for as long, a little at a time
for each file; and somebody who kills the daemon halfway would leave half a tree where the next attempt is to be made.  So a tree is
renamed into a directory of its own file system, `removed`, and is gone; whatever is in there is rm's, also after a restart.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from loguru import logger

REMOVED = "removed"  # in each home
TREES_MAX = 100  # for one rm
# Tasks end together, and to start rm takes as long as to delete a few trees: so it waits until none has come for a moment.
QUIET_S, GATHER_S = 0.005, 0.03
RETRY_S = 1.0


class Removal:
    """`homes`: directories, each on one file system, that have all trees to be removed below them.  Thread-safe.

    Raises OSError (`homes` cannot be written to).
    """

    def __init__(self, homes: Sequence[Path]) -> None:
        self._homes = homes
        self._numbers = itertools.count(time.time_ns())  # an earlier daemon's may be there still
        self._change = threading.Condition()
        self._put_aside, self._dealt_with = 1, 0  # trees; the first stands for what an earlier daemon has left there
        self._failed: set[Path] = set()  # by rm, which has said why; tried again by the next daemon
        for home in homes:
            (home / REMOVED).mkdir(mode=0o700, exist_ok=True)
        threading.Thread(target=self._run, name="removal", daemon=True).start()

    def remove(self, tree: Path) -> None:
        """Put HOME/KIND/TASK, or what is below it, aside; nothing happens where there is none.  Raises OSError."""
        path = os.fspath(tree)  # text, for paths are slow, and each task leaves four trees
        home = next(home for home in self._homes if path.startswith(f"{home}/"))
        task, *rest = path[len(f"{home}/") :].split("/")[1:]
        try:
            os.rename(tree, home / REMOVED / ".".join([task, str(next(self._numbers)), *rest]))
        except FileNotFoundError:
            if os.path.lexists(tree):
                raise  # it is the place for it that is missing
            return
        with self._change:
            self._put_aside += 1
            self._change.notify_all()

    def finish(self, timeout_s: float) -> bool:
        """Wait until all that was put aside is deleted → False when it takes longer than that."""
        with self._change:
            return self._change.wait_for(lambda: self._dealt_with == self._put_aside, timeout_s)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._dealt_with < self._put_aside)
                until_s = time.monotonic() + GATHER_S
                while self._change.wait(QUIET_S) and time.monotonic() < until_s:
                    pass
                known = self._put_aside
            try:
                self._delete()
            except OSError as error:  # no process to be had just now, for instance
                logger.error("what tasks have left cannot be deleted, it is tried again: {}", error)
                time.sleep(RETRY_S)
                continue
            with self._change:
                self._dealt_with = known
                self._change.notify_all()

    def _delete(self) -> None:
        while trees := self._trees()[:TREES_MAX]:
            # In a session of its own: a signal to the daemon's group must not end it halfway.
            command: list[str | Path] = ["rm", "-rf", "--one-file-system", "--", *trees]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=False, start_new_session=True)
            for tree in trees:
                if os.path.lexists(tree):
                    logger.error("{} could not be deleted", tree)
                    self._failed.add(tree)

    def _trees(self) -> list[Path]:
        return [tree for home in self._homes for tree in (home / REMOVED).iterdir() if tree not in self._failed]
