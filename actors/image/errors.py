"""What can go wrong with an image, one class per party at fault.

Every text is for the person who named the image: what went wrong, with the name of the thing, and what to do.  `kind` crosses
process boundaries (`wire.BuildFailed`) in place of the class.
"""

from __future__ import annotations

from typing import ClassVar


class ImageError(Exception):
    """No image, for a reason that the text tells.  Only the subclasses are raised."""

    kind: ClassVar[str]


class ReferenceInvalid(ImageError):
    """The caller's text is not the name of an image."""

    kind = "reference"


class ImageUnknown(ImageError):
    """The registry answered, and has no such image (or does not show it to these credentials)."""

    kind = "unknown"


class PlatformMissing(ImageError):
    """The image exists, but not for this machine."""

    kind = "platform"


class Unauthorised(ImageError):
    """The registry wants credentials, or others than it was given."""

    kind = "unauthorised"


class RegistryUnreachable(ImageError):
    """No answer from the registry: wrong name, nobody there, TLS failure, time-out.  It may come back."""

    kind = "unreachable"


class RegistryBroken(ImageError):
    """The registry answers, but with errors of its own or with what no registry should say."""

    kind = "registry"


class ContentCorrupt(ImageError):
    """Bytes are not what their digest promises, or the layer is damaged: the registry's copy, or the image as it was pushed."""

    kind = "corrupt"


class LayerUnsafe(ImageError):
    """A layer that reaches out of the image's root.  Whoever made the image meant harm, or their tool is broken."""

    kind = "unsafe"


class Unsupported(ImageError):
    """A valid image of a sort that is not handled (the text says which)."""

    kind = "unsupported"


class OverBounds(ImageError):
    """The image exceeds the configured bounds on unpacked bytes, entries or time."""

    kind = "bounds"


class DiskFull(ImageError):
    """No space for objects or the archive on this node."""

    kind = "disk_full"


class ArchiveInvalid(ImageError):
    """A file in the archive directory that is no whole archive; building the image again replaces it."""

    kind = "archive"
