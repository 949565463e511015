"""The registry and the image are the node tests'."""

from tests.node.conftest import image, registry

__all__ = ["image", "registry"]
