"""Manifests, indexes and image configs as registries serve them, and the choice of one manifest by platform.  No I/O.

Formats: the OCI image specification 1.1 (manifest.md, image-index.md, config.md) and Docker's image manifest version 2,
schema 2, whose JSON has the same fields.  What a document is, is decided by its fields: Content-Type and mediaType are
known to lie.
"""

from __future__ import annotations

import platform as host
import re

import msgspec

from actors.image.errors import ImageError, PlatformMissing, RegistryBroken, Unsupported

DOCUMENT_SIZE_MAX = 8 << 20  # of a manifest or a config; registries themselves stop at 4 MiB
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# The kernel's name of a machine (uname -m) to Go's, which registries use, and the variants that it runs, best first.
_MACHINES = {
    "x86_64": ("amd64", ("", "v1")),
    "aarch64": ("arm64", ("v8", "")),
    "armv7l": ("arm", ("v7", "v6", "v5", "")),
    "riscv64": ("riscv64", ("",)),
    "ppc64le": ("ppc64le", ("",)),
    "s390x": ("s390x", ("",)),
}


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on.  `str()` is "linux/arm64/v8"."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Raises Unsupported for what is not OS/ARCHITECTURE[/VARIANT]."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise Unsupported(f"{text!r} is not a platform; expected OS/ARCHITECTURE[/VARIANT], such as linux/arm64/v8")
        return cls(*parts)

    @classmethod
    def own(cls) -> Platform:
        """This machine's.  Raises Unsupported where no name for it is known."""
        machine = host.machine()
        if machine not in _MACHINES:
            raise Unsupported(f"this machine ({machine}) has no platform name in registries")
        architecture, variants = _MACHINES[machine]
        return cls("linux", architecture, variants[0])

    def variants(self) -> tuple[str, ...]:
        """The variants that it runs, best first."""
        for architecture, variants in _MACHINES.values():
            if architecture == self.architecture:
                # What an older variant asks for, a newer one has; not the other way round.
                return variants[variants.index(self.variant) :] if self.variant in variants else (self.variant,)
        return (self.variant, "")

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """One document or blob that another document names."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def is_attestation(self) -> bool:
        """Whether it only says something about an image (provenance, SBOM), as BuildKit adds them to an index."""
        unknown = self.platform is not None and self.platform.os == "unknown"
        return unknown or "vnd.docker.reference.type" in (self.annotations or {})


class Manifest(msgspec.Struct, frozen=True):
    """One image for one platform."""

    config: Descriptor
    layers: list[Descriptor]


class Index(msgspec.Struct, frozen=True):
    """Several manifests, one per platform."""

    manifests: list[Descriptor]


class ProcessConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """The part of an image's config that says how to start it.  Absent and null mean empty."""

    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None


class RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class ConfigDocument(msgspec.Struct, frozen=True):
    """The config document of an image."""

    rootfs: RootFs
    os: str = ""
    architecture: str = ""
    config: ProcessConfig | None = None


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    """Whatever stands at a manifest's URL."""

    schema_version: int = 2
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    manifests: list[Descriptor] | None = None


def parse_manifest(body: bytes, name: str) -> Manifest | Index:
    """The document `body`; `name` says in errors whose it is.

    Raises RegistryBroken for what is no manifest, Unsupported for one of a sort that no container can be made from.
    """
    try:
        document = msgspec.json.decode(body, type=_Document)
    except msgspec.MsgspecError as error:
        raise RegistryBroken(f"{name}: what the registry has there is not an image manifest ({error})") from None
    if document.schema_version != 2:
        raise Unsupported(
            f"{name}: a manifest of schema version {document.schema_version}; push the image again with a current tool"
        )
    if document.manifests is not None and (document.layers is not None or document.config is not None):
        # Read as one by some tools and as the other by others (CVE-2021-41190): nobody can say which image is meant.
        raise RegistryBroken(f"{name}: a document that is manifest and index at once")
    if document.manifests is not None:
        _check_digests(document.manifests, name)
        return Index(document.manifests)
    if document.config is None or document.layers is None:
        raise RegistryBroken(f"{name}: a document that is neither a manifest nor an index")
    _check_digests([document.config, *document.layers], name)
    for layer in document.layers:
        if ".tar" not in layer.media_type or "encrypted" in layer.media_type:
            raise Unsupported(f"{name}: a layer of type {layer.media_type!r}, which is not a container image's")
    return Manifest(document.config, document.layers)


def parse_config(body: bytes, manifest: Manifest, platform: Platform, name: str) -> ConfigDocument:
    """The config document `body` of `manifest`.  Raises RegistryBroken, PlatformMissing."""
    try:
        config = msgspec.json.decode(body, type=ConfigDocument)
    except msgspec.MsgspecError as error:
        raise RegistryBroken(f"{name}: its config is not a container image's ({error})") from None
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise RegistryBroken(
            f"{name}: {len(manifest.layers)} layers in the manifest, {len(config.rootfs.diff_ids)} in the config"
        )
    if not all(_DIGEST.fullmatch(diff_id) for diff_id in config.rootfs.diff_ids):
        raise Unsupported(f"{name}: a diff_id that is not a sha256 digest")
    there = Platform(config.os or platform.os, config.architecture or platform.architecture)
    if (there.os, there.architecture) != (platform.os, platform.architecture):
        raise PlatformMissing(f"{name}: this image is for {there}, this node runs {platform}")
    return config


def choose(index: Index, platform: Platform, name: str) -> Descriptor:
    """The manifest for `platform`, its best variant first.  Raises PlatformMissing, listing what is there."""
    images = [descriptor for descriptor in index.manifests if not descriptor.is_attestation]
    ours = [
        d for d in images if d.platform and (d.platform.os, d.platform.architecture) == (platform.os, platform.architecture)
    ]
    for variant in platform.variants():
        for descriptor in ours:
            if descriptor.platform and descriptor.platform.variant == variant:
                return descriptor
    if len(images) == 1 and images[0].platform is None:
        return images[0]  # an index need not say; the image's own config does, and is checked
    there = ", ".join(sorted({str(d.platform) if d.platform else "unnamed" for d in images})) or "none at all"
    raise PlatformMissing(f"{name}: no image for {platform}; the registry has: {there}")


def _check_digests(descriptors: list[Descriptor], name: str) -> None:
    for descriptor in descriptors:
        _check_digest(descriptor, name)


def _check_digest(descriptor: Descriptor, name: str) -> None:
    # They become part of URLs and file names.
    problem: type[ImageError] = Unsupported if descriptor.digest.startswith("sha512:") else RegistryBroken
    if not _DIGEST.fullmatch(descriptor.digest):
        raise problem(f"{name}: {descriptor.digest[:100]!r} is not a sha256 digest")
    if descriptor.size < 0:
        raise RegistryBroken(f"{name}: {descriptor.digest} of {descriptor.size} bytes")
