"""Mounting the layers of a tree, and finding and removing what is mounted.

File systems are configured with fsopen(2), fsconfig(2), fsmount(2) and move_mount(2): options are values and need no escaping, a
layer list has no length limit, and the kernel says in words what it did not like.  mount(8) would put a loop device under an
EROFS file.

Nothing here looks at the root of a mount (a stat of a FUSE mount whose server is dead waits for the next server): paths are given as the
kernel knows them, absolute and without symbolic links.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

VALUE_BYTES_MAX = 255  # of one fsconfig() string
FUSE_READ_BYTES_MAX = 1 << 20

_FIRST_READ_BYTES = 8192  # FUSE_MIN_READ_BUFFER: until INIT is answered the kernel wants no more

_FUSECTL = "/sys/fs/fuse/connections"

_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX = struct.Struct("=140xI112x")  # struct statx: stx_dev_minor
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
# Of META and LAZY themselves; what the task may do is the overlay mount's business.
_LAYER_ATTRIBUTES = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MS_BIND = 4096
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo: `minor` is that of its file system's st_dev, and the number of a FUSE connection."""

    target: str
    kind: str
    source: str
    minor: int


class FuseMount(NamedTuple):
    """A new FUSE mount: its connection's number, and the kernel's INIT request, which every server of it is fed."""

    minor: int
    init_request: bytes


def mount_erofs(file: str, target: str) -> None:
    """Mount an EROFS image straight from its file.  Raises OSError (ENOTBLK: the file lies on an overlay, or Linux < 6.12)."""
    _mount("erofs", target, [("source", file)], ["ro"], _LAYER_ATTRIBUTES)


def mount_overlay(
    target: str,
    lower: Sequence[str],
    data: Sequence[str] = (),
    upper: str | None = None,
    work: str | None = None,
    volatile: bool = False,
) -> None:
    """Mount `lower` directories (the first on top) over `data`, the data-only ones; read-only when there is no `upper`.

    The root of the mount has mode, owner and times of `upper` itself: make that with `make_upper`.  Raises OSError; ValueError for
    an upper without a work directory and the like.
    """
    if (upper is None) != (work is None) or (volatile and upper is None):
        raise ValueError("an upper directory needs a work directory, and volatile means an upper directory")
    options, flags = _overlay_options(lower, data, upper, work, volatile)
    _mount("overlay", target, options, flags, _MOUNT_ATTR_RDONLY if upper is None else 0)


def _overlay_options(
    lower: Sequence[str], data: Sequence[str], upper: str | None = None, work: str | None = None, volatile: bool = False
) -> tuple[list[tuple[str, str]], list[str]]:
    options = [("source", "aerie")]
    options += [("lowerdir+", path) for path in lower]
    options += [("datadir+", path) for path in data]
    if upper is not None and work is not None:
        options += [("upperdir", _escape(upper)), ("workdir", _escape(work))]
    # Always said, whatever the kernel's configuration has for defaults.
    options += [("redirect_dir", "on"), ("metacopy", "on"), ("index", "off"), ("xino", "off")]
    return options, (["volatile"] if volatile else []) + (["ro"] if upper is None else [])


def open_overlay(lower: Sequence[str], data: Sequence[str]) -> int:
    """The same read-only overlay, mounted nowhere → a descriptor of its root; it ends with its last user.  Raises OSError."""
    return _create("overlay", "nowhere", *_overlay_options(lower, data), _LAYER_ATTRIBUTES)


def make_upper(upper: str, work: str, meta: str) -> None:
    """Make the upper and work directories of a mount over `meta`, a mounted META; its root's owner, mode, times and attributes too.

    For a new mount only: later the upper's own root says what the task did to it.  `upper` appears last, and whole: where it is, a
    process that was killed at any instant has left nothing to do.
    """
    os.makedirs(work, exist_ok=True)
    unnamed = f"{upper}.new"
    os.makedirs(unnamed, exist_ok=True)
    status = os.stat(meta)
    os.chown(unnamed, status.st_uid, status.st_gid)
    shutil.copystat(meta, unnamed)  # with the attributes; after the chown, which drops setgid
    os.rename(unnamed, upper)


def mount_fuse(target: str, fuse_descriptor: int) -> FuseMount:
    """Mount a FUSE connection (a descriptor of /dev/fuse opened for it, blocking), read-only, for everybody.

    The kernel waits for nobody: what touches the mount waits until a server has been fed the INIT request that this returns.
    """
    options = [("source", "aerie"), ("fd", str(fuse_descriptor)), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")]
    options.append(("max_read", str(FUSE_READ_BYTES_MAX)))
    minor = _mount("fuse", target, options, ["ro", "allow_other", "default_permissions"], _LAYER_ATTRIBUTES)
    return FuseMount(minor, os.read(fuse_descriptor, _FIRST_READ_BYTES))


def bind(source: str, target: str) -> None:
    """Make `source`, without what is mounted below it, appear at `target` too.  Raises OSError."""
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(_MS_BIND), None):
        raise _error(f"bind {source}", target)


def unmount(target: str, lazily: bool = False) -> None:
    """Remove the topmost mount at `target`; no error when nothing is mounted there, or the path is missing.

    `lazily`: it disappears now and ends when its last user does.  Raises OSError (EBUSY while it is in use).
    """
    failed = _libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0))
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise _error("umount", target)


def mounts_below(path: str) -> list[Mount]:
    """The mounts at and below `path`, in the order in which they can be removed."""
    with open("/proc/self/mountinfo", "rb") as file:
        return select_below(file, path)


def select_below(mountinfo: Iterable[bytes], path: str) -> list[Mount]:
    """`mounts_below` on given lines of a mountinfo file."""
    at, below = _escaped(path), _escaped(path.rstrip("/")) + b"/"
    found = []
    for order, line in enumerate(mountinfo):
        if at not in line:
            continue  # a host with a thousand tasks has many thousands of these, and each task looks
        fields = line.split()
        if fields[4] == at or fields[4].startswith(below):
            target = _unescape(fields[4])
            kind, source = fields[fields.index(b"-", 6) + 1 :][:2]
            mount = Mount(target, kind.decode(), _unescape(source), int(fields[2].partition(b":")[2]))
            found.append((target.count("/"), order, mount))
    # What is mounted on another mount is deeper, or came later.
    return [mount for _, _, mount in sorted(found, reverse=True)]


def abort_fuse(target: str, minor: int) -> None:
    """End the FUSE connection of this number that is mounted at `target`: every request, waiting or to come, ends in an error.

    Nothing happens when it is not mounted there any more: its number may be that of another one by now.
    """
    if any((mount.target, mount.minor) == (target, minor) for mount in mounts_below(target)):
        with contextlib.suppress(FileNotFoundError):
            _control_fuse(minor, "abort", 1)


def tune_fuse(minor: int, max_background: int = 1024, congestion_threshold: int = 1024, read_ahead_kib: int = 1024) -> None:
    """Let slow reads not keep ready ones waiting, and reads be large.

    For when a server of the mount is Ready: its INIT reply would undo it.
    """
    _control_fuse(minor, "max_background", max_background)
    _control_fuse(minor, "congestion_threshold", congestion_threshold)
    _write(f"/sys/class/bdi/0:{minor}/read_ahead_kb", read_ahead_kib)


def _control_fuse(minor: int, name: str, value: int) -> None:
    path = f"{_FUSECTL}/{minor}/{name}"
    try:
        _write(path, value)
    except FileNotFoundError:
        # Looked for only now: a host with many mounts has a long mountinfo.
        if any(mount.kind == "fusectl" for mount in mounts_below(_FUSECTL)):
            raise
        _mount("fusectl", _FUSECTL, [("source", "none")])
        _write(path, value)


def _write(path: str, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))


def _mount(kind: str, target: str, options: Sequence[tuple[str, str]], flags: Sequence[str] = (), attributes: int = 0) -> int:
    """Mount it → the minor device number of the file system."""
    mounted = _create(kind, target, options, flags, attributes)
    try:
        if _libc.move_mount(mounted, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH):
            raise _error(f"mount {kind} {options[0][1]}", target)
        return _minor(mounted)
    finally:
        os.close(mounted)


def _create(kind: str, target: str, options: Sequence[tuple[str, str]], flags: Sequence[str], attributes: int) -> int:
    """A mount that is nowhere yet → its descriptor.  `target`: where it is to be, for errors."""
    what = f"mount {kind} {options[0][1]}"  # the source
    context = _libc.fsopen(kind.encode(), _FSOPEN_CLOEXEC)
    if context < 0:
        raise _error(what, target)
    try:
        for name, value in options:
            if len(os.fsencode(value)) > VALUE_BYTES_MAX:
                raise OSError(errno.ENAMETOOLONG, f"{what}: {name} is longer than {VALUE_BYTES_MAX} bytes", value)
            if _libc.fsconfig(context, _FSCONFIG_SET_STRING, name.encode(), os.fsencode(value), 0):
                raise _error(f"{what}: {name}={value}", target, context)
        for name in flags:
            if _libc.fsconfig(context, _FSCONFIG_SET_FLAG, name.encode(), None, 0):
                raise _error(f"{what}: {name}", target, context)
        if _libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0):
            raise _error(what, target, context)
        mounted: int = _libc.fsmount(context, _FSMOUNT_CLOEXEC, attributes)
        if mounted < 0:
            raise _error(what, target, context)
        return mounted
    finally:
        os.close(context)


def _minor(mounted: int) -> int:
    """The minor device number of what is mounted, without asking it: a stat(2) would be a request to a server that is not there yet."""
    status = bytearray(_STATX.size)
    if _libc.statx(mounted, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, (ctypes.c_char * len(status)).from_buffer(status)):
        raise OSError(ctypes.get_errno(), f"statx: {os.strerror(ctypes.get_errno())}")
    return int(_STATX.unpack(status)[0])


def _error(what: str, target: str, context: int | None = None) -> OSError:
    """The OSError of the call that has just failed, with what the kernel wrote into the context's log."""
    number = ctypes.get_errno()
    said = [os.strerror(number)]
    while context is not None:
        try:
            said.append(os.read(context, 8192).decode(errors="replace").strip())
        except OSError:  # ENODATA: that was all
            break
    return OSError(number, f"{what}: {'; '.join(said)}", target)


def _escape(path: str) -> str:
    r"""Overlayfs still takes `\` for an escape in upperdir and workdir, though not in lowerdir+ and datadir+."""
    return path.replace("\\", "\\\\")


def _escaped(path: str) -> bytes:
    """A path as mountinfo has it (show_mountinfo in fs/proc_namespace.c): space, tab, newline and backslash are octal there."""
    return re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))


def _unescape(field: bytes) -> str:
    """The other way round."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))
