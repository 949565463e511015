"""Image builders as processes, the directories of a node, and what a mounted tree is like."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.image.archives.process import serve
from actors.image.wire import BuildFailed, BuildImage, Built, Progress, Resolved, Shared
from actors.lazytree.mounts import mount_erofs, mount_overlay, unmount
from supervisor.channel import Channel, ChannelClosed
from supervisor.frames import Codec, Message

ANSWERS = Codec(Progress, Resolved, Built, Shared, BuildFailed)
TIMEOUT_S = 180.0  # for the next word of a builder, which is silent while the kernel writes all that is dirty on a slow disk


class Builder:
    """A builder process that was given one order."""

    def __init__(self, order: BuildImage) -> None:
        self.channel, theirs = Channel.pair(ANSWERS)
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                self.channel.close()
                serve(theirs, [], Codec(BuildImage).encode(order))
                code = 0
            except BaseException:  # noqa: BLE001 (nothing may return into the copy of pytest that this is)
                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()

    def messages(self, timeout_s: float = TIMEOUT_S) -> list[Message]:
        """Everything that it says until it ends, which it must do with code 0."""
        said = []
        with contextlib.suppress(ChannelClosed):
            while True:
                said.append(self.channel.receive(timeout_s)[0])
        assert self.wait() == 0
        return said

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        self.channel.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Node:
    """The directories of one node, and what is built there."""

    def __init__(self, home: Path, archives: Path | None = None) -> None:
        self.archives = archives or home / "archives"
        self.cache = home / "cache"

    def order(self, reference: str, **fields: Any) -> BuildImage:
        return BuildImage(reference, str(self.archives), str(self.cache), **fields)

    def build(self, reference: str, **fields: Any) -> Resolved | Built | BuildFailed:
        answer = Builder(self.order(reference, **fields)).messages()[-1]
        assert isinstance(answer, Resolved | Built | BuildFailed)
        return answer

    def built(self, reference: str, **fields: Any) -> Built:
        answer = self.build(reference, **fields)
        assert isinstance(answer, Built), answer
        return answer

    def failed(self, reference: str, **fields: Any) -> BuildFailed:
        """A build that fails, and leaves nothing but whole objects."""
        answer = self.build(reference, **fields)
        assert isinstance(answer, BuildFailed), answer
        assert list(self.archives.glob("*")) == []  # there is no directory yet if its time was over at once
        self.check_objects()
        return answer

    def objects(self) -> list[Path]:
        return [path for path in self.cache.glob("??/*") if path.is_file()]

    def check_objects(self) -> None:
        """Every object of a file that is not sparse has the content that its name promises."""
        for path in self.objects():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.parent.name + path.name


@contextlib.contextmanager
def mounted(built: Built, node: Node, at: Path) -> Iterator[Path]:
    """The image as a task sees it: META over OBJECTS, nothing else."""
    meta, root = at / "meta", at / "root"
    meta.mkdir(parents=True)
    root.mkdir()
    mount_erofs(built.archive, str(meta))
    try:
        mount_overlay(str(root), [str(meta)], [str(node.cache)])
        try:
            yield root
        finally:
            unmount(str(root))
    finally:
        unmount(str(meta))


Facts = tuple[str, int, int, int, Any, dict[str, bytes]]


def facts(path: Path) -> Facts:
    """Mode, owner, time (ns), what is in it, extended attributes."""
    status = path.lstat()
    content: Any = None
    if stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        content = status.st_rdev
    xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
    return stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, content, xattrs


def walk(root: Path) -> dict[str, Facts]:
    found = {".": facts(root)}
    for parent, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = Path(os.fsdecode(os.path.join(parent, name)))
            found[str(path.relative_to(root))] = facts(path)
    return found
