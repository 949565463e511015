"""Fetching spans of an image's layers into the spool, by threads, each with a registry client of its own.

A fetch holds one piece and one block, however long it is.  All of it that belongs to objects goes to the spool, checked or not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from actors.image.errors import ContentCorrupt, ImageError
from actors.image.layers.checkpoints import Span, Spans, decompressed
from actors.image.layers.content import stored_bytes
from actors.image.lazy.held import Held
from actors.image.lazy.spool import Spool
from actors.image.registry.repository import Registry
from actors.lazytree.server import SourceError

BLOCK_BYTES = 64 << 10  # decompressed at once, and then to be had


class Fetcher:
    """`layers`: their digests.  `connect` makes a client for the image's repository.  `timeout_s` is for one range.  Thread-safe."""

    def __init__(
        self,
        spans: Spans,
        reference: str,
        layers: Sequence[str],
        spool: Spool,
        held: Held,
        connect: Callable[[], Registry],
        timeout_s: float,
    ) -> None:
        self.fetched_bytes = 0  # compressed
        self.mirrors_distrusted = False
        self._spans = spans
        self._reference = reference
        self._layers = layers
        self._spool = spool
        self._held = held
        self._connect = connect
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._registries: list[Registry] = []
        self._idle: list[Registry] = []  # of them: those that nobody uses just now

    def transfer(self, layer: int, first: int, last: int, through: Callable[[int], None]) -> list[int]:
        """Fetch spans into the spool → the objects that are whole there now.  Raises SourceError, OSError.

        `through` is told, again and again, up to where in the layer all of them has come.
        """
        span = self._spans.run(layer, first, last)
        try:
            try:
                return self._fetch(layer, span, through)
            except ContentCorrupt:  # by a mirror, perhaps, or on its way here
                self.distrust_mirrors()
                return self._fetch(layer, span, through)
        except ContentCorrupt as error:
            raise SourceError(f"{self._reference}: the registry's copy of {self._layers[layer]} is damaged: {error}") from None
        except ImageError as error:
            raise SourceError(str(error)) from None

    def distrust_mirrors(self) -> None:
        """Something was not what its digest says: ask the registry only from now on."""
        with self._lock:
            self.mirrors_distrusted = True
            for registry in self._registries:
                registry.distrust_mirrors()

    def _fetch(self, layer: int, span: Span, through: Callable[[int], None]) -> list[int]:
        registry = self._borrow()
        pieces = registry.stream_range(self._layers[layer], span.first, span.stop - span.first, timeout_s=self._timeout_s)
        try:
            blocks = _followed(decompressed(span, pieces, BLOCK_BYTES), span.begin, through)
            whole = self._scatter(layer, span.begin, span.end, blocks)
            for _ in pieces:
                pass  # to its end, so that the connection can be used again
            return whole
        finally:
            pieces.close()
            self._give_back(registry)
            with self._lock:
                self.fetched_bytes += span.stop - span.first

    def _scatter(self, layer: int, begin: int, end: int, blocks: Iterator[bytes]) -> list[int]:
        """Write what of these blocks, which begin at `begin` of the layer, belongs to objects → those that are whole now."""
        whole: list[int] = []
        position, block = begin, memoryview(b"")  # of the block's first byte
        for index, row, content in self._spans.objects(layer, begin, end):
            stored, place = stored_bytes(row, content), self._spool.place(content)
            if self._held.has(row):
                continue
            at, stop = max(begin, content.offset), min(end, content.offset + stored)
            while at < stop:
                if at >= position + len(block):
                    position += len(block)
                    block = memoryview(next(blocks, b""))
                    if not block:
                        raise ContentCorrupt("it ends in the middle")
                    continue
                part = block[at - position : stop - position]
                self._spool.write(place + at - content.offset, part)
                at += len(part)
            is_inside = begin <= content.offset and content.offset + stored <= end
            if is_inside or self._held.is_whole(row, content):
                whole.append(index)
        return whole

    def _borrow(self) -> Registry:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            registry = self._connect()
            if self.mirrors_distrusted:
                registry.distrust_mirrors()
            self._registries.append(registry)
            return registry

    def _give_back(self, registry: Registry) -> None:
        with self._lock:
            self._idle.append(registry)


def _followed(blocks: Iterator[bytes], begin: int, through: Callable[[int], None]) -> Iterator[bytes]:
    """The same; each counts as come when the next one is asked for, and so is in the spool."""
    for block in blocks:
        yield block
        begin += len(block)
        through(begin)
