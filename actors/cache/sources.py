"""Whether what a tree consists of can be had again, now."""

from __future__ import annotations

import time
from collections.abc import Callable

from actors.image.errors import ImageError, RegistryUnreachable, Unauthorised
from actors.image.registry.mirrors import mirrors_of
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.lazytree.trees import TreeSource

ANSWER_S = 3.0  # for one byte of a layer
ALL_S = 30.0  # for all questions of one evictor


class Sources:
    """Asks registries.  `mirrors`: the setting.  `asking` is called before each question."""

    def __init__(self, mirrors: str, asking: Callable[[], None] = lambda: None) -> None:
        self._mirrors = mirrors
        self._asking = asking
        self._away: set[str] = set()  # registries that did not answer
        self._until_s = time.monotonic() + ALL_S
        self.refusals: list[str] = []  # why what cannot be had again cannot

    def has(self, source: TreeSource) -> bool:
        """Whether the tree's objects could be fetched again.

        A workspace's always: from its store, or, when that has another version by now, nobody can want them any more.
        """
        if source.store:
            return True
        try:
            reference = Reference.parse(source.reference)
            if reference.registry in self._away or not source.layers:
                return False
            if time.monotonic() >= self._until_s:
                self.refusals.append("asking the registries takes too long")
                return False
            with Registry(reference, mirrors=mirrors_of(reference.registry, self._mirrors)) as registry:
                for layer in source.layers:
                    self._asking()
                    registry.read_range(layer, 0, 1, timeout_s=ANSWER_S)
        except Unauthorised as error:
            if source.private:
                return True  # whoever wants it brings a login: the registry is there
            self.refusals.append(str(error))
            return False
        except RegistryUnreachable as error:
            self._away.add(reference.registry)
            self.refusals.append(str(error))
            return False
        except ImageError as error:
            self.refusals.append(str(error))
            return False
        return True
