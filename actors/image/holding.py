"""What keeps a mounted image's content and archive from being evicted, from before anybody counts on them until it is unmounted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from loguru import logger

from actors.image.archives.archive import Archive, hold
from actors.lazytree import trees
from actors.lazytree.trees import Trees, TreeSource
from actors.services import Services


class Holding:
    """That of the image `digest`, by this daemon.  Blocks, and raises OSError everywhere."""

    def __init__(self, services: Services, digest: str) -> None:
        self._cache_dir = services.settings.image.cache_dir
        self._run_dir = services.settings.run.dir
        self._name = digest.replace(":", "-")
        self._archive: int | None = None

    def keep(self, path: str) -> None:
        """Keep the archive.  Raises FileNotFoundError when there is none."""
        if self._archive is None:
            self._archive = hold(path)

    def hold(self, archive: Archive, reference: str, private: bool) -> bool:
        """Hold the content → whether what is here from now on stays; else it must not be counted on."""
        layers = [layer.digest for layer in archive.info.layers]
        source = TreeSource(reference, layers, private=private)
        try:
            with contextlib.closing(archive.objects()) as table, self._objects() as directory:
                Trees(directory, self._run_dir).hold(self._name, self._name, source, table.keys())
                return trees.settled(directory)
        except OSError as error:  # a full disk, most likely
            logger.warning("the content of {} cannot be kept from being evicted: {}", reference, error)
            return False

    def is_whole(self) -> bool:
        with self._objects() as directory:
            return trees.is_whole(directory, self._name)

    def note_whole(self) -> None:
        """All content is here."""
        with self._objects() as directory:
            trees.note_whole(directory, self._name)

    def release(self) -> None:
        """Nothing is mounted any more."""
        with contextlib.suppress(FileNotFoundError), self._objects() as directory:
            Trees(directory, self._run_dir).release(self._name, self._name)
        self.let_go()

    def let_go(self) -> None:
        """Another incarnation goes on holding."""
        if self._archive is not None:
            os.close(self._archive)
            self._archive = None

    @contextlib.contextmanager
    def _objects(self) -> Iterator[int]:
        os.makedirs(self._cache_dir, mode=0o755, exist_ok=True)
        directory = os.open(self._cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield directory
        finally:
            os.close(directory)
