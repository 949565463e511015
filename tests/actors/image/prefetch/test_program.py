"""What a program needs, as its file says; beside what binutils read there, and in files that no linker has written."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.image.prefetch.program import DIRECTORIES, NAME_BYTES_MAX, Program, Read, parse

LIBC = re.search(r"/\S+/libc\.so\.6", subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout)
assert LIBC
PROGRAMS = ["/bin/sh", "/usr/bin/python3", "/usr/bin/git", LIBC[0]]


def of(content: bytes) -> Read:
    return lambda offset, size: content[offset : offset + size]


def by_readelf(path: str) -> tuple[str, tuple[str, ...]]:
    said = subprocess.run(
        ["readelf", "--program-headers", "--dynamic", path], capture_output=True, text=True, check=True
    ).stdout
    interpreter = re.search(r"program interpreter: (\S+)\]", said)
    return interpreter[1] if interpreter else "", tuple(re.findall(r"\(NEEDED\).*\[(\S+)\]", said))


@pytest.mark.parametrize("path", PROGRAMS)
def test_interpreter_and_libraries_are_those_that_binutils_find(path: str) -> None:
    program = parse(of(Path(path).read_bytes()), path)
    assert (program.interpreter, program.needed) == by_readelf(path)
    found = [name for name in program.needed if any(os.path.exists(f"{place}/{name}") for place in program.directories)]
    assert found == list(program.needed)


def elf(
    wide: bool, order: str, runpath: str = "", needed: tuple[str, ...] = ("liba.so", "libb.so.1"), machine: int = 62
) -> bytes:
    """A small one, of any class and byte order: loaded at 0x1000 from the file's begin on."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*needed, runpath, "/lib/ld.so"))
    size = struct.Struct(order + ("qQ" if wide else "iI"))
    head, each = (64, 56) if wide else (52, 32)
    names_at = head + 3 * each
    dynamic_at = names_at + len(names)
    entries = [(1, names.index(name.encode())) for name in needed] + [(5, 0x1000 + names_at)]
    entries += [(29, names.index(runpath.encode()))] if runpath else []
    dynamic = b"".join(size.pack(*entry) for entry in [*entries, (0, 0), (1, 1)])  # what follows the end does not count
    total = dynamic_at + len(dynamic)
    segments = [(1, 0, total), (3, names_at + names.index(b"/lib/ld.so"), 11), (2, dynamic_at, len(dynamic))]
    if wide:
        rows = [struct.pack(order + "IIQQQQQQ", kind, 4, at, 0x1000 + at, 0, count, count, 8) for kind, at, count in segments]
    else:
        rows = [struct.pack(order + "IIIIIIII", kind, at, 0x1000 + at, 0, count, count, 4, 8) for kind, at, count in segments]
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    places = "QQQ" if wide else "III"
    start = ident + struct.pack(f"{order}HHI{places}IHHHHHH", 3, machine, 1, 0, head, 0, 0, head, each, 3, 0, 0, 0)
    return start + b"".join(rows) + names + dynamic


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_classes_and_both_byte_orders(wide: bool, order: str) -> None:
    program = parse(of(elf(wide, order)), "/bin/x")
    assert program.interpreter == "/lib/ld.so"
    assert program.needed == ("liba.so", "libb.so.1")
    assert program.directories == ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", *DIRECTORIES)


@pytest.mark.parametrize(
    ("runpath", "first"),
    [
        ("$ORIGIN/../lib", ("/opt/app/bin/../lib",)),
        ("${ORIGIN}:/opt/lib", ("/opt/app/bin", "/opt/lib")),
        ("/opt/a::/opt/b", ("/opt/a", "/opt/b")),
    ],
)
def test_where_the_program_says_is_looked_first(runpath: str, first: tuple[str, ...]) -> None:
    assert parse(of(elf(True, "<", runpath)), "/opt/app/bin/program").directories == (
        *first,
        "/lib/x86_64-linux-gnu",
        "/usr/lib/x86_64-linux-gnu",
        *DIRECTORIES,
    )


@pytest.mark.parametrize(
    ("head", "interpreter"),
    [
        (b"#!/bin/sh\necho", "/bin/sh"),
        (b"#! /usr/bin/env python3\n", "/usr/bin/env"),
        (b"#!\n/bin/sh", ""),
        (b"#!", ""),
        (b"#!/bin/a\0b\n", ""),
        (b"", ""),
        (b"\x7fELF", ""),
        (b"no program at all" * 100, ""),
    ],
)
def test_scripts_and_what_is_no_program(head: bytes, interpreter: str) -> None:
    assert parse(of(head), "/x") == Program(interpreter)


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=20), st.booleans(), st.integers(0, 700))
def test_no_file_does_harm(changes: list[tuple[int, int]], wide: bool, end: int) -> None:
    content = bytearray(elf(wide, "<", "$ORIGIN"))
    for at, value in changes:
        content[at % len(content)] = value
    asked: list[int] = []

    def read(offset: int, size: int) -> bytes:
        asked.append(size)
        return bytes(content[:end][offset : offset + size])

    program = parse(read, "/x")
    assert len(asked) < 600 and max(asked) <= 64 << 10
    assert all(len(name) <= NAME_BYTES_MAX and "\0" not in name for name in (program.interpreter, *program.needed))
