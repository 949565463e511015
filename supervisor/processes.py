"""Which processes each actor looks after: written by the actors, read by whoever draws the tree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessRow:
    name: str
    pid: int
    restarts: int


class ProcessTable:
    """Thread-safe: each operation is one dictionary operation, and rows are never changed, only replaced."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], ProcessRow] = {}

    def put(self, owner: str, row: ProcessRow, key: str = "") -> None:
        """`key`: tells it from others of that name, which need none."""
        self._rows[owner, key or row.name] = row

    def remove(self, owner: str, key: str) -> None:
        self._rows.pop((owner, key), None)

    def of(self, owner: str) -> list[ProcessRow]:
        return [row for (holder, _), row in sorted(self._rows.items()) if holder == owner]
