"""The layers of an image on their way from the registry, ahead of whoever unpacks them: neither waits while the other works.

One thread fetches one layer after another, PIECES_MAX pieces ahead at most.  It is the registry's only user until it has ended.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import types
from collections.abc import Iterator, Sequence

from actors.image.errors import ContentCorrupt
from actors.image.registry.manifests import Descriptor
from actors.image.registry.repository import Registry

PIECES_MAX = 64  # of up to 256 KiB
_END = b""


class Download:
    """A context.  `layers` are read in their order, each to its end.

    At its end the thread has ended, so that the registry can be asked again; unless the build has failed for good: what hangs then, hangs
    no longer than the process lives.
    """

    def __init__(self, registry: Registry, layers: Sequence[Descriptor]) -> None:
        self._registry = registry
        self._layers = layers
        self._came: queue.Queue[bytes | BaseException] = queue.Queue(PIECES_MAX)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)

    def __enter__(self) -> Download:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._stopped = True
        while (kind is None or issubclass(kind, ContentCorrupt)) and self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._came.get_nowait()  # it may wait for a place
            self._thread.join(0.05)

    def next_layer(self) -> Iterator[bytes]:
        """The pieces of the next layer, NOT verified.  Raises what `Registry.blob` raises."""
        while (piece := self._came.get()) != _END:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def _run(self) -> None:
        try:
            for layer in self._layers:
                for piece in self._registry.blob(layer):
                    if self._stopped:
                        return
                    if piece:
                        self._came.put(piece)
                self._came.put(_END)
        except BaseException as error:  # noqa: BLE001 (it is raised where the layer is read)
            self._came.put(error)
