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
    while True:
        inotify = INotify(nonblocking=True)
        try:
            watched = _watch_nearest(inotify, directory)
        except BaseException:
            inotify.close()
            raise
        # What lies below may have been made between the look for it and the watch above it, and would then say nothing.
        if watched == directory or not _below(watched, directory).is_dir():
            return inotify
        inotify.close()


def _watch_nearest(inotify: INotify, directory: Path) -> Path:
    while True:
        try:
            inotify.add_watch(os.fspath(directory), _SIGNS)
            return directory
        except (FileNotFoundError, NotADirectoryError):
            directory = directory.parent


def _below(above: Path, directory: Path) -> Path:
    """The next one on the way from `above` to `directory`."""
    return above / directory.relative_to(above).parts[0]
