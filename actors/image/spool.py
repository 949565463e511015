"""The spool of an image mount: where its server keeps what it has fetched until its parent has published it.

A sparse file without a name, on the file system of OBJECTS.  The server writes to it (it has dropped its privileges and cannot write to
OBJECTS), its successor goes on with it, the parent copies whole objects out of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from actors.lazytree.objects import Objects


def create(objects_directory: str) -> int:
    """The descriptor of a new spool for content of the objects in that directory.  Raises OSError."""
    return os.open(objects_directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def publish(archive: str, spool: int, objects: Objects, rows: Sequence[int]) -> list[int]:
    """Publish objects that a server has `Completed`: copied out, checked against their key, named; not yet durable.

    Blocks, for as long as it takes to copy and hash them: call it in a worker thread or a process.  Returns the rows for the
    `Taken` to answer with: all of them, also those whose content is not theirs, which are not published.  Raises OSError (no space),
    ArchiveInvalid.
    """
    raise NotImplementedError
