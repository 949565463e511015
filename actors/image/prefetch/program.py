"""What a program reads at its start for sure: its interpreter and the libraries that it names.  No I/O of its own.

`#!` as in execve(2); ELF, of 32 and 64 bits and either byte order, as in elf(5) and the System V ABI, chapters 4 and 5: PT_INTERP, and of
PT_DYNAMIC the tags DT_NEEDED, DT_RPATH and DT_RUNPATH.  All of it comes from an image and is believed by nobody: what cannot be understood
is nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

HEAD_BYTES = 256  # in which a `#!` line ends (BINPRM_BUF_SIZE)
SEGMENTS_MAX = 128
TABLE_BYTES_MAX = 64 << 10  # of PT_DYNAMIC: 4096 entries
NAME_BYTES_MAX = 4096
NEEDED_MAX = 256

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of an image that says none

# Where ld.so looks when neither the program nor /etc/ld.so.cache says where; Debian's and Red Hat's, musl's first two of them.
DIRECTORIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")

_LOAD, _DYNAMIC, _INTERP = 1, 2, 3
_NEEDED, _STRTAB, _RPATH, _RUNPATH = 1, 5, 15, 29
_TRIPLETS = {62: "x86_64-linux-gnu", 183: "aarch64-linux-gnu", 3: "i386-linux-gnu", 40: "arm-linux-gnueabihf"}  # by e_machine

Read = Callable[[int, int], bytes]  # offset, size → the bytes, fewer at the end of the file


class Program(NamedTuple):
    """`interpreter`: a path, "" for none.  `needed`: names of libraries, or paths.  `directories`: where to look, the first one first."""

    interpreter: str = ""
    needed: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size_bytes: int


def parse(read: Read, path: str) -> Program:
    """The program that lies at `path` of its root."""
    head = read(0, HEAD_BYTES)
    try:
        if head[:2] == b"#!":
            words = head[2:].partition(b"\n")[0].split()
            return Program(_text(words[0]) if words else "")
        if head[:4] == b"\x7fELF" and len(head) >= 64 and head[4] in (1, 2) and head[5] in (1, 2):
            return _parse_elf(read, head, path.rpartition("/")[0] or "/")
    except (struct.error, ValueError):
        pass
    return Program()


def _parse_elf(read: Read, head: bytes, directory: str) -> Program:
    is_wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    machine = struct.unpack_from(order + "H", head, 18)[0]
    if is_wide:
        begin, each, count = *struct.unpack_from(order + "Q", head, 32), *struct.unpack_from(order + "HH", head, 54)
    else:
        begin, each, count = *struct.unpack_from(order + "I", head, 28), *struct.unpack_from(order + "HH", head, 42)
    if count > SEGMENTS_MAX or each > 256:
        raise ValueError("more than any linker writes")
    table = read(begin, each * count)
    segments = [_segment(table, number * each, is_wide, order) for number in range(count)]
    interpreter, search = "", ""
    needed: tuple[str, ...] = ()
    for segment in segments:
        if segment.kind == _INTERP and segment.size_bytes <= NAME_BYTES_MAX:
            interpreter = _text(read(segment.offset, segment.size_bytes).rstrip(b"\0"))
        elif segment.kind == _DYNAMIC:
            needed, search = _dynamic(read, segment, segments, is_wide, order)
    where = [place.replace("$ORIGIN", directory).replace("${ORIGIN}", directory) for place in search.split(":") if place]
    usual = [f"{place}/{_TRIPLETS[machine]}" for place in ("/lib", "/usr/lib")] if machine in _TRIPLETS else []
    return Program(interpreter, needed, (*where, *usual, *DIRECTORIES))


def _segment(table: bytes, at: int, is_wide: bool, order: str) -> _Segment:
    if is_wide:
        kind, _, offset, address, _, size_bytes = struct.unpack_from(order + "IIQQQQ", table, at)
    else:
        kind, offset, address, _, size_bytes = struct.unpack_from(order + "IIIII", table, at)
    return _Segment(kind, offset, address, size_bytes)


def _dynamic(read: Read, segment: _Segment, segments: list[_Segment], is_wide: bool, order: str) -> tuple[tuple[str, ...], str]:
    """DT_NEEDED, and DT_RUNPATH or DT_RPATH."""
    table = read(segment.offset, min(segment.size_bytes, TABLE_BYTES_MAX))
    entry = struct.Struct(order + ("qQ" if is_wide else "iI"))
    entries = [entry.unpack_from(table, at) for at in range(0, len(table) - entry.size + 1, entry.size)]
    if 0 in (tags := [tag for tag, _ in entries]):
        del entries[tags.index(0) :]
    [*_, names] = [0, *(value for tag, value in entries if tag == _STRTAB)]
    [*_, names_at] = [0, *_placed(names, segments)]

    def name(offset: int) -> str:
        return _text(read(names_at + offset, NAME_BYTES_MAX).partition(b"\0")[0])

    needed = tuple(name(value) for tag, value in entries if tag == _NEEDED)[:NEEDED_MAX]
    [*_, search] = ["", *(name(value) for wanted in (_RPATH, _RUNPATH) for tag, value in entries if tag == wanted)]
    return needed, search


def _placed(address: int, segments: list[_Segment]) -> Iterator[int]:
    """Where in the file that is which is loaded at this address."""
    for segment in segments:
        if segment.kind == _LOAD and segment.address <= address < segment.address + segment.size_bytes:
            yield address - segment.address + segment.offset


def _text(name: bytes) -> str:
    if b"\0" in name:
        raise ValueError("a name with a NUL in it")
    return name.decode(errors="surrogateescape")
