from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from actors.lazytree.table import CorruptTable, ObjectTable, Row, write_table

rows = some.lists(
    some.builds(
        Row,
        some.binary(min_size=32, max_size=32).map(bytes.hex),
        some.integers(0, (1 << 64) - 1),
        some.binary(max_size=50),
    ),
    unique_by=lambda row: row.key,
    max_size=40,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=rows, other=some.binary(min_size=32, max_size=32))
def test_rows_come_back_by_index_and_by_key(tmp_path: Path, rows: list[Row], other: bytes) -> None:
    path = tmp_path / "table"
    with open(path, "wb") as file:
        assert write_table(file, rows) == file.tell()
    table = ObjectTable(str(path))
    assert len(table) == len(rows)
    assert [table.row(index) for index in range(len(rows))] == sorted(rows)
    for row in rows:
        index = table.find(row.key)
        assert index is not None and table.row(index) == row
    assert (table.find(other.hex()) is None) == (other.hex() not in {row.key for row in rows})
    table.close()


def test_there_is_one_spelling_of_a_key(tmp_path: Path) -> None:
    key = "ab" * 32
    with open(tmp_path / "table", "wb") as file:
        write_table(file, [Row(key, 1, b"")])
    table = ObjectTable(str(tmp_path / "table"))
    assert table.find(key) == 0
    for other in (key.upper(), " " + key, key[:-2], key + "ab", "", "é" * 64, "../" + key[3:], "ab " * 32):
        assert table.find(other) is None
    for index in (-1, 1):
        with pytest.raises(IndexError):
            table.row(index)


def test_a_key_twice_or_no_key_is_refused(tmp_path: Path) -> None:
    for keys in (["ab" * 32] * 2, ["ab"], ["xy" * 32]):
        with pytest.raises(ValueError), open(tmp_path / "table", "wb") as file:
            write_table(file, [Row(key, 1, b"") for key in keys])


def test_damage_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with open(path, "wb") as file:
        write_table(file, [Row("ab" * 32, 1, b"source"), Row("cd" * 32, 1, b"source")])
    good = path.read_bytes()
    damaged = {
        "nothing": b"",
        "a piece": good[:20],
        "cut": good[:-1],
        "longer": good + b"x",
        "magic": b"x" + good[1:],
        "version": good[:8] + b"\2" + good[9:],
        "count": good[:12] + struct.pack("<I", 1 << 31) + good[16:],
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(CorruptTable, match="table"):
            ObjectTable(str(path))
    path.write_bytes(good[: 24 + 40] + struct.pack("<Q", 1 << 60) + good[24 + 48 :])
    with pytest.raises(CorruptTable):
        ObjectTable(str(path)).row(0)


def test_a_big_table_costs_little_private_memory(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with open(path, "wb") as file:
        write_table(file, (Row(os.urandom(32).hex(), number, b"x" * 60) for number in range(100_000)))
    table = ObjectTable(str(path))

    def private_kib() -> int:
        rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))

    before_kib = private_kib()
    for index in range(0, len(table), 7):
        assert table.find(table.row(index).key) == index
    mapped_kib = path.stat().st_size // 1024  # page cache; "private" here only as long as nobody else maps it
    assert private_kib() - before_kib < mapped_kib + 1024
