"""Descriptors by name, with a little data beside each: the same in the keeper and in the root supervisor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from supervisor.channel import DESCRIPTORS_MAX

DATA_BYTES_MAX = 16 << 10  # what may be kept beside one descriptor: a FUSE INIT request, for instance
PACKET_BYTES_MAX = 64 << 10  # of data in one packet, the last one's not counted

Packet = tuple[list[str], dict[str, bytes], list[int]]
"""Names, the data of those that have some, and the descriptors in the order of the names."""


class Held:
    """What is held.  Its descriptors are its own, and closed when they are replaced or dropped."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._data: dict[str, bytes] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._descriptors

    def names(self) -> list[str]:
        return sorted(self._descriptors.copy())

    def get(self, name: str) -> int | None:
        return self._descriptors.get(name)

    def data(self, name: str) -> bytes:
        return self._data.get(name, b"")

    def put(self, names: Sequence[str], descriptors: Sequence[int], data: Mapping[str, bytes]) -> None:
        """Hold each under its name.  Raises ValueError, and holds none, when they are not as many or some data is too long."""
        if len(names) != len(descriptors):
            raise ValueError(f"{len(names)} names came with {len(descriptors)} descriptors")
        for name, kept in data.items():
            if len(kept) > DATA_BYTES_MAX:
                raise ValueError(f"{name}: {len(kept)} bytes of data; at most {DATA_BYTES_MAX} are allowed")
        for name, descriptor in zip(names, descriptors, strict=True):
            if (before := self._descriptors.get(name, descriptor)) != descriptor:
                os.close(before)
                self._data.pop(name, None)
            self._descriptors[name] = descriptor
            if name in data:
                self._data[name] = data[name]

    def drop(self, names: Iterable[str]) -> list[str]:
        """Close them, and hold them no longer → those that were held."""
        dropped = [name for name in names if name in self._descriptors]
        for name in dropped:
            os.close(self._descriptors.pop(name))
            self._data.pop(name, None)
        return dropped

    def packets(self, names: Iterable[str]) -> Iterator[Packet]:
        """What is held under these names, in pieces that are small enough to be one message each."""
        batch: list[str] = []
        size_bytes = 0
        for name in names:
            batch.append(name)
            size_bytes += len(self.data(name))
            if len(batch) == DESCRIPTORS_MAX // 2 or size_bytes > PACKET_BYTES_MAX:
                yield self._packet(batch)
                batch, size_bytes = [], 0
        if batch:
            yield self._packet(batch)

    def _packet(self, names: list[str]) -> Packet:
        return (
            names,
            {name: self._data[name] for name in names if name in self._data},
            [self._descriptors[name] for name in names],
        )
