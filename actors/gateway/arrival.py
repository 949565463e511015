"""Waiting for a path to appear, also when directories above it are missing: by inotify, without looking again and again."""

from __future__ import annotations

import os
from pathlib import Path

from inotify_simple import INotify, flags

_SIGNS = flags.CREATE | flags.MOVED_TO | flags.ATTRIB | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR


def watch_nearest(directory: Path) -> INotify:
    """An inotify descriptor that becomes readable when something happens in `directory`.

    Where it is missing, the nearest directory above it is watched: after an event one has to look, and to watch again.
    Close it after use.
    """
    inotify = INotify(nonblocking=True)
    try:
        while True:
            try:
                inotify.add_watch(os.fspath(directory), _SIGNS)
                return inotify
            except (FileNotFoundError, NotADirectoryError):
                directory = directory.parent
    except BaseException:
        inotify.close()
        raise
