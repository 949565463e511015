"""META: writes an EROFS image of metadata, which the kernel mounts from a file (Linux 6.12) in a fraction of a millisecond.

The format is the kernel's `fs/erofs/erofs_fs.h`.  What is used of it: 4 KiB blocks, compact and extended inodes, inline tails,
inline extended attributes, and for file content a chunk table of one hole.  Overlayfs takes the content from the object that the
file's `trusted.overlay.redirect` names.  Content that is no longer than what that costs here (REFERENCE_BYTES) may be a tail instead.
(Long attribute prefixes and shared attributes were weighed and left out: an inode takes whole slots of 32 bytes, and what they save
falls within one.)

    offset 1024    superblock
    offset 1152    inodes, each on a 32-byte slot: header | attributes | tail (directory entries, link target, content, chunk table)
    next block     directory entries, link targets and content that are too long for a tail behind their inode's attributes

The same tree gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK
from typing import BinaryIO

BLOCK_BYTES = 4096
SLOT_BYTES = 32
NAME_BYTES_MAX = 255
TARGET_BYTES_MAX = 4095  # PATH_MAX without its NUL
_ID_NONE = (1 << 32) - 1  # (uid_t) -1 is nobody at all

_SUPERBLOCK = struct.Struct("<IIIBBHQqIIII16s16sI44x")
_SUPERBLOCK_AT = 1024
_MAGIC = 0xE0F5E1E2
_COMPAT_MTIME = 0x2
_INCOMPAT_CHUNKED_FILE = 0x4

_COMPACT = struct.Struct("<HHHHIIIIHHI")
_EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
_PLAIN, _INLINE, _CHUNKED = 0, 2, 4  # data layouts
_CHUNK_BITS_MAX = 12 + 31
_HOLE = b"\xff\xff\xff\xff"

_ENTRY = struct.Struct("<QHBB")
_ENTRY_TYPES = {S_IFREG: 1, S_IFDIR: 2, S_IFCHR: 3, S_IFBLK: 4, S_IFIFO: 5, S_IFSOCK: 6, S_IFLNK: 7}

_XATTR = struct.Struct("<BBH")
_XATTR_HEADER = bytes(12)
_XATTR_AREA_BYTES_MAX = 4 * ((1 << 16) - 2)
_XATTR_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)
_OVERLAY = b"trusted.overlay."
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True, eq=False)
class Node:
    """A file, directory, link or device of the tree; the same Node under several names is a hard link.

    `mode` has the type bits; `mtime_ns` counts from 1970 and may be negative; `size` is in bytes and means regular files only;
    `target` is a symbolic link's; `rdev` is a device's as of os.makedev(); `children` is a directory's, by name; `key` (64 hex digits)
    is the object that has the content of a regular file that is not empty, unless it is in `data`, of at most REFERENCE_BYTES.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes | None = None
    rdev: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] | None = None
    key: str | None = None
    data: bytes | None = None


@dataclass(slots=True, eq=False)
class _Inode:
    """A node as it is laid out in the image."""

    node: Node
    number: int = 0
    nlink: int = 0
    size: int = 0
    compact: bool = False
    xattrs: bytes = b""
    layout: int = _PLAIN
    tail_bytes: int = 0
    blocks: int = 0  # of its own, behind the inodes
    nid: int = 0
    entries: list[list[tuple[bytes, _Inode]]] = field(default_factory=list)  # a directory's, cut into blocks


def write(root: Node, file: BinaryIO) -> int:
    """Write the tree as an image at the file's position, which must be its start; returns the image's size in bytes.

    A character device 0:0 is left out: to overlayfs it is a whiteout, and would hide itself anyway.  `trusted.overlay.*` attributes of
    the tree are escaped (`trusted.overlay.overlay.*`), so that they reach the task as they are and mean nothing to the overlay.
    Raises ValueError for what cannot be expressed, saying what it is.
    """
    inodes = _collect(root)
    epoch_ns = _commonest_mtime_ns(inodes)
    for number, inode in enumerate(inodes, 1):
        inode.number = number
        _plan(inode, epoch_ns)
    end = _place(inodes)
    gap = -end % BLOCK_BYTES
    body = b"".join((*_encode_inodes(inodes, (end + gap) // BLOCK_BYTES), bytes(gap), *_encode_blocks(inodes)))
    size_bytes = _SUPERBLOCK_AT + _SUPERBLOCK.size + len(body)
    superblock = _SUPERBLOCK.pack(
        _MAGIC,
        0,  # no checksum
        _COMPAT_MTIME,
        BLOCK_BYTES.bit_length() - 1,
        0,
        inodes[0].nid,
        len(inodes),
        epoch_ns // 10**9,
        epoch_ns % 10**9,
        size_bytes // BLOCK_BYTES,
        0,
        0,
        hashlib.blake2b(body, digest_size=16).digest(),  # the uuid: overlayfs tells lower file systems apart by it
        b"",
        _INCOMPAT_CHUNKED_FILE,
    )
    file.write(bytes(_SUPERBLOCK_AT) + superblock)
    file.write(body)
    return size_bytes


def _collect(root: Node) -> list[_Inode]:
    """Every inode once: directories breadth first (the root's nid must fit into 16 bits), then the rest in the same order."""
    if root.children is None:
        raise ValueError("the root of a tree is a directory")
    _check(b"(root)", root)
    top = _Inode(root, nlink=2)
    known = {root: top}
    parents = {top: top}
    directories, others = [top], []
    for directory in directories:  # grows while it is walked
        entries = [(b".", directory), (b"..", parents[directory])]
        for name, node in sorted((directory.node.children or {}).items(), key=itemgetter(0)):
            if S_IFMT(node.mode) == S_IFCHR and node.rdev == 0:
                continue
            _check(name, node)
            inode = known.get(node)
            if inode is None:
                inode = known[node] = _Inode(node)
                if node.children is None:
                    others.append(inode)
                else:
                    inode.nlink = 1
                    parents[inode] = directory
                    directory.nlink += 1
                    directories.append(inode)
            elif node.children is not None:
                raise ValueError(f"{name!r}: a directory under two names")
            inode.nlink += 1
            entries.append((name, inode))
        entries.sort(key=itemgetter(0))  # by bytes over the whole directory: the kernel searches by bisection
        directory.entries = _cut(entries)
    return directories + others


def _check(name: bytes, node: Node) -> None:
    """Raise ValueError for a name or node that would make another tree, or none, of the image."""
    kind = S_IFMT(node.mode)
    if not 0 < len(name) <= NAME_BYTES_MAX or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise ValueError(f"{name!r}: not a name")
    if node.mode >> 16 or kind not in _ENTRY_TYPES or (kind == S_IFDIR) != (node.children is not None):
        raise ValueError(f"{name!r}: mode {node.mode:o} has no type, or not the node's")
    if not (0 <= node.uid < _ID_NONE and 0 <= node.gid < _ID_NONE):
        raise ValueError(f"{name!r}: owner {node.uid}:{node.gid}")
    if not -(1 << 63) <= node.mtime_ns // 10**9 < 1 << 63:
        raise ValueError(f"{name!r}: time {node.mtime_ns} ns")
    if kind == S_IFREG and not 0 <= node.size < 1 << 63:
        raise ValueError(f"{name!r}: {node.size} bytes")
    if node.data is not None:
        if kind != S_IFREG or node.key or not 0 < node.size == len(node.data) <= REFERENCE_BYTES:
            raise ValueError(f"{name!r}: {len(node.data)} bytes of content here where {node.size} should be, or elsewhere")
    elif kind == S_IFREG and node.size and not _KEY.fullmatch(node.key or ""):
        raise ValueError(f"{name!r}: content without an object (key {node.key!r})")
    if kind == S_IFLNK and not 0 < len(node.target or b"") <= TARGET_BYTES_MAX:
        raise ValueError(f"{name!r}: a link target of {len(node.target or b'')} bytes")


def _cut(entries: list[tuple[bytes, _Inode]]) -> list[list[tuple[bytes, _Inode]]]:
    """A directory's entries, in runs that fit into a block each."""
    runs, start, used = [], 0, 0
    for index, (name, _) in enumerate(entries):
        size = _ENTRY.size + len(name)
        if used + size > BLOCK_BYTES:
            runs.append(entries[start:index])
            start, used = index, 0
        used += size
    runs.append(entries[start:])
    return runs


def _commonest_mtime_ns(inodes: list[_Inode]) -> int:
    """The superblock has one time for all compact inodes; the earliest of the commonest makes most of them compact."""
    times = Counter(inode.node.mtime_ns for inode in inodes)
    return min(times, key=lambda mtime_ns: (-times[mtime_ns], mtime_ns))


def _plan(inode: _Inode, epoch_ns: int) -> None:
    """Decide how the inode is laid out: header, attributes, and whether its data is a tail or in blocks of its own."""
    node, kind = inode.node, S_IFMT(inode.node.mode)
    if kind == S_IFREG:
        inode.size = node.size
    inode.xattrs = _encode_xattrs(node)
    inode.compact = node.mtime_ns == epoch_ns and max(node.uid, node.gid, inode.nlink) < 1 << 16 and inode.size < 1 << 32
    if kind == S_IFREG and inode.size and node.data is None:
        inode.layout = _CHUNKED
        inode.tail_bytes = len(_HOLE) * -(-inode.size >> _chunk_bits(inode.size))
    elif kind in (S_IFDIR, S_IFLNK) or node.data is not None:
        if kind == S_IFDIR:
            whole, last = len(inode.entries) - 1, sum(_ENTRY.size + len(name) for name, _ in inode.entries[-1])
        else:
            whole, last = 0, len(node.target or node.data or b"")
        # Inode and tail share a block (`_place`); what is longer than half of one would waste too much, or not fit.
        if _head_bytes(inode) + last <= BLOCK_BYTES // 2:
            inode.layout, inode.blocks, inode.tail_bytes = _INLINE, whole, last
            inode.size = whole * BLOCK_BYTES + last
        else:
            inode.blocks = whole + 1
            inode.size = inode.blocks * BLOCK_BYTES if kind == S_IFDIR else last


def _head_bytes(inode: _Inode) -> int:
    return (_COMPACT.size if inode.compact else _EXTENDED.size) + len(inode.xattrs)


def _chunk_bits(size: int) -> int:
    """log2 of the chunk size with which one entry, or as few as possible, cover `size` bytes."""
    return min(max(12, (size - 1).bit_length()), _CHUNK_BITS_MAX)


def _place(inodes: list[_Inode]) -> int:
    """Give each inode its place; returns the offset at which they end."""
    offset = _SUPERBLOCK_AT + _SUPERBLOCK.size
    for inode in inodes:
        offset += -offset % SLOT_BYTES
        length = _head_bytes(inode) + inode.tail_bytes
        if inode.layout == _INLINE and offset // BLOCK_BYTES != (offset + length - 1) // BLOCK_BYTES:
            # To the kernel a tail that crosses a block is corrupt, and so (before 6.14) is a link's in another block than its inode.
            offset += -offset % BLOCK_BYTES
        inode.nid = offset // SLOT_BYTES
        offset += length
    return offset


def _encode_inodes(inodes: list[_Inode], next_block: int) -> Iterator[bytes]:
    """The inodes with the gaps between them, from the end of the superblock."""
    offset = _SUPERBLOCK_AT + _SUPERBLOCK.size
    for inode in inodes:
        node, kind = inode.node, S_IFMT(inode.node.mode)
        place = inode.nid * SLOT_BYTES
        yield bytes(place - offset)
        union, tail = 0, b""
        if inode.layout == _CHUNKED:
            union, tail = _chunk_bits(inode.size) - 12, _HOLE * (inode.tail_bytes // len(_HOLE))
        elif kind in (S_IFCHR, S_IFBLK):
            union = _encode_device(node.rdev)
        elif inode.layout == _INLINE:
            tail = _encode_entries(inode.entries[-1]) if kind == S_IFDIR else node.target or node.data or b""
        if inode.blocks:
            union, next_block = next_block, next_block + inode.blocks
        form = (0 if inode.compact else 1) | inode.layout << 1
        xattr_count = (len(inode.xattrs) - len(_XATTR_HEADER)) // 4 + 1 if inode.xattrs else 0
        if inode.compact:
            rest: tuple[int, ...] = (node.uid, node.gid, 0)
            header = _COMPACT.pack(form, xattr_count, node.mode, inode.nlink, inode.size, 0, union, inode.number, *rest)
        else:
            rest = (node.uid, node.gid, *divmod(node.mtime_ns, 10**9), inode.nlink)
            header = _EXTENDED.pack(form, xattr_count, node.mode, 0, inode.size, union, inode.number, *rest)
        record = header + inode.xattrs + tail
        yield record
        offset = place + len(record)


def _encode_blocks(inodes: list[_Inode]) -> Iterator[bytes]:
    """The blocks behind the inodes, in the order in which `_encode_inodes` numbered them."""
    for inode in inodes:
        if S_IFMT(inode.node.mode) == S_IFDIR:
            for run in inode.entries[: inode.blocks]:
                yield _encode_entries(run).ljust(BLOCK_BYTES, b"\0")
        elif inode.blocks:
            yield (inode.node.target or inode.node.data or b"").ljust(BLOCK_BYTES, b"\0")


def _encode_entries(entries: list[tuple[bytes, _Inode]]) -> bytes:
    """Directory entries: an array of {nid, offset of the name, type}, then the names."""
    offset, heads = _ENTRY.size * len(entries), []
    for name, inode in entries:
        heads.append(_ENTRY.pack(inode.nid, offset, _ENTRY_TYPES[S_IFMT(inode.node.mode)], 0))
        offset += len(name)
    return b"".join(heads) + b"".join(name for name, _ in entries)


def _encode_device(rdev: int) -> int:
    """The kernel's new_encode_dev(): 12 bits of major, 20 of minor.  Raises ValueError when it does not fit."""
    major, minor = os.major(rdev), os.minor(rdev)
    if major >= 1 << 12 or minor >= 1 << 20:
        raise ValueError(f"device {major}:{minor} does not fit")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _encode_xattrs(node: Node) -> bytes:
    """The attribute area of an inode; empty when there are none."""
    key = node.key if node.size and S_IFMT(node.mode) == S_IFREG else None
    if not node.xattrs:  # nearly all
        return _OBJECT % (key[:2].encode(), key[2:].encode()) if key else b""
    entries = [
        _encode_xattr(_OVERLAY + b"overlay." + name[len(_OVERLAY) :] if name.startswith(_OVERLAY) else name, value)
        for name, value in sorted(node.xattrs.items())
    ]
    if key:
        entries += _METACOPY, _encode_xattr(_OVERLAY + b"redirect", f"/{key[:2]}/{key[2:]}".encode())
    area = b"".join(entries)
    if len(area) > _XATTR_AREA_BYTES_MAX:
        raise ValueError(f"{len(area)} bytes of extended attributes on one file")
    return _XATTR_HEADER + area if area else b""


def _encode_xattr(name: bytes, value: bytes) -> bytes:
    for prefix, index in _XATTR_PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if (index in (2, 3)) != (not rest) or len(rest) > NAME_BYTES_MAX or len(value) >= 1 << 16:
                break
            entry = _XATTR.pack(len(rest), index, len(value)) + rest + value
            return entry + bytes(-len(entry) % 4)
    raise ValueError(f"extended attribute {name!r} of {len(value)} bytes cannot be expressed")


_METACOPY = _encode_xattr(_OVERLAY + b"metacopy", b"")
_REDIRECT = _encode_xattr(_OVERLAY + b"redirect", b"/??/".ljust(66, b"?"))
REFERENCE_BYTES = len(_METACOPY) + len(_REDIRECT) + len(_HOLE)  # what it costs in META that a file's content is an object
# The area of a file that has no other attributes.  (There is no % in the heads.)
_OBJECT = _XATTR_HEADER + _METACOPY + _REDIRECT.replace(b"??/" + b"?" * 62, b"%b/%b")
