"""What `run.py doctor` tries for real: the daemon's own mounts, a namespace, how an exit status is told.

In a mount namespace of its own, so that nothing is left however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from actors.lazytree import erofs, mounts
from supervisor.pidfd import open_pidfd, wait_status

EXIT_TIMEOUT_S: Final = 10.0

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Finding:
    """What was found of one part.  `required`: without it no daemon starts."""

    part: str
    found: str
    needed: str
    ok: bool
    cure: str = ""
    required: bool = True

    @property
    def missing(self) -> bool:
        return self.required and not self.ok


def try_everything(disk: Path) -> list[Finding]:
    """All of it; `disk`: a directory where the state directory is to be.

    This process is in a mount and a network namespace of its own afterwards.
    """
    try:
        _unshare(_CLONE_NEWNS)
        if _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None):
            raise _last_error("make the mounts private")
    except OSError as error:
        return [Finding("mount namespace", str(error), "a new one", False, "CAP_SYS_ADMIN: not inside an ordinary container")]
    return [_layers(disk), _fuse(), _exit_status(), _network()]


def _layers(disk: Path) -> Finding:
    """META :: OBJECTS as the daemon mounts them: EROFS from its file, metacopy onto a data-only layer, an upper on top."""
    needed = "an EROFS file mounted, and an overlay over it with metacopy onto a data-only layer and an upper directory"
    cure = "Linux 6.12 or newer with EROFS and overlayfs, and the state directory on ext4, xfs or btrfs"
    content, key = b"content of a lower file\n", "ab" + "0" * 62
    try:
        with tempfile.TemporaryDirectory(prefix=".aerie-doctor-", dir=disk) as name:
            home = Path(name)
            for part in ("objects/ab", "meta", "merged", "upper", "work"):
                (home / part).mkdir(parents=True)
            (home / "objects/ab" / key[2:]).write_bytes(content)
            root = erofs.Node(
                stat.S_IFDIR | 0o755, children={b"file": erofs.Node(stat.S_IFREG | 0o644, size=len(content), key=key)}
            )
            with (home / "meta.erofs").open("wb") as file:
                erofs.write(root, file)
            mounts.mount_erofs(str(home / "meta.erofs"), str(home / "meta"))
            try:
                layers = [str(home / "meta")], [str(home / "objects")], str(home / "upper"), str(home / "work")
                mounts.mount_overlay(str(home / "merged"), *layers)
                try:
                    read = (home / "merged/file").read_bytes()
                    (home / "merged/file").rename(home / "merged/moved")
                    copied = "trusted.overlay.metacopy" not in os.listxattr(home / "upper/moved")
                    (home / "merged/new").write_bytes(b"new")
                finally:
                    mounts.unmount(str(home / "merged"))
            finally:
                mounts.unmount(str(home / "meta"))
    except OSError as error:
        return Finding("layers", str(error), needed, False, cure)
    works = read == content and not copied
    found = "work" if works else "mounted, but a lower file's content is wrong, or was copied by its rename"
    return Finding("layers", found, needed, works, cure)


def _fuse() -> Finding:
    needed = "a FUSE mount, and pyfuse3"
    try:
        import pyfuse3

        with tempfile.TemporaryDirectory(prefix="aerie-doctor-") as home:
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            try:
                mounts.mount_fuse(home, device)
                mounts.unmount(home, lazily=True)
            finally:
                os.close(device)
    except (ImportError, OSError) as error:
        return Finding("fuse", str(error), needed, False, "modprobe fuse; `make setup` installs pyfuse3")
    return Finding("fuse", f"mounts; pyfuse3 {pyfuse3.__version__}", needed, True)


def _network() -> Finding:
    try:
        _unshare(_CLONE_NEWNET)
    except OSError as error:
        return Finding("network namespace", str(error), "a new one", False, "a kernel with CONFIG_NET_NS, and CAP_SYS_ADMIN")
    return Finding("network namespace", "made", "a new one", True)


def _exit_status() -> Finding:
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    pidfd = open_pidfd(pid)
    try:
        select.select([pidfd], [], [], EXIT_TIMEOUT_S)
        os.waitpid(pid, 0)
        told = wait_status(pidfd) == 7 << 8
    finally:
        os.close(pidfd)
    found = "told by the pidfd after reaping" if told else "told only to the parent, before reaping"
    cure = "nothing to do: the daemon reaps as subreaper instead"
    return Finding("exit status", found, "from a pidfd: Linux 6.15", told, cure, required=False)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags):
        raise _last_error("unshare")


def _last_error(what: str) -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, f"{what}: {os.strerror(number)}")
