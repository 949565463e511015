"""Building an image: from the registry's layers to an archive and its objects, in one pass over each layer.

A layer for whose table of contents the manifest vouches is not even read, if the image's content may be missing: what the table says is
what reading it would say (`tabled`), and its objects are fetched when they are read.

The order makes it safe to be killed at any instruction: objects appear whole; they are made durable, all at once,
before the archive that counts on them is renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from actors.image.archives.archive import Archive, ImageInfo, LayerInfo, archive_path, write_archive
from actors.image.errors import ArchiveInvalid, ContentCorrupt, DiskFull, LayerUnsafe, OverBounds, Unsupported
from actors.image.layers.checkpoints import Checkpoints
from actors.image.layers.content import Contents
from actors.image.layers.download import Download
from actors.image.layers.overlaying import LayeredTree, is_whiteout
from actors.image.layers.stream import Budget, LayerStream, Verified, decompress
from actors.image.layers.tabled import TabledLayer, has_table, read_table
from actors.image.layers.tar import entries
from actors.image.layers.toc import TocUnusable
from actors.image.registry.manifests import ConfigDocument, Manifest, Platform, ProcessConfig
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.image.wire import RESOLVING, BuildImage, Built, Progress, Resolved, Shared
from actors.lazytree.erofs import REFERENCE_BYTES, Node
from actors.lazytree.objects import Objects
from actors.lazytree.table import CorruptTable

if TYPE_CHECKING:
    from actors.image.archives.fleet import SharedArchive  # with boto3, which only a builder for a fleet loads


class Build:
    """One build.  `progress` may be looked at while it runs, from a signal handler for instance."""

    def __init__(self, order: BuildImage) -> None:
        self._order = order
        self._budget = self._new_budget()
        self._phase = RESOLVING
        self._manifest: Manifest | None = None
        self._layer = 0
        self._read_bytes = 0
        self._shared: SharedArchive | None = None  # with the lease on the image's archive

    def _new_budget(self) -> Budget:
        return Budget(self._order.unpacked_bytes_max, self._order.entries_max)

    def progress(self) -> Progress:
        layers = self._manifest.layers if self._manifest else []
        total = sum(layer.size for layer in layers)
        return Progress(self._phase, self._layer, len(layers), self._read_bytes, total, self._budget.entries)

    def run(self) -> Resolved | Built:
        """Do it.  Raises ImageError; OSError for a node whose directories are not what they should be."""
        order = self._order
        reference = Reference.parse(order.reference)
        platform = Platform.parse(order.platform) if order.platform else Platform.own()
        os.makedirs(order.archive_dir, exist_ok=True)
        objects = Objects(order.cache_dir)
        try:
            with contextlib.suppress(OSError):  # a full disk, on which it will leave nothing
                _ = objects.ledger  # from now on what this build leaves is no orphan, though it is in no tree yet
            if reference.digest and (found := self._find(reference.digest, objects)):
                return found
            with Registry(reference, order.access.login, mirrors=order.access.mirrors) as registry:
                digest = registry.resolve(platform)
                if digest == order.known_digest:
                    return Resolved(digest)
                return (
                    self._find(digest, objects)
                    or self._pull(registry, digest, objects)
                    or self._build_trusting(registry, digest, platform, objects)
                )
        except OSError as error:
            self._give_up()
            raise _storage_error(error) from error
        except BaseException:
            self._give_up()
            raise
        finally:
            objects.close()

    def share(self, built: Built) -> Shared:
        """After the answer: see to it that the archive is in the fleet's bucket, if the order names one."""
        from actors.image.archives.fleet import BucketAway, SharedArchive

        assert self._order.bucket is not None
        self._phase = "sharing archive"
        try:
            self._shared = self._shared or SharedArchive(self._order.bucket, built.digest)
            return Shared(self._shared.push(built.archive))
        except (BucketAway, OSError) as error:
            return Shared(False, f"{self._order.reference}: its archive is not shared: {error}")
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Let another node build it."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _pull(self, registry: Registry, digest: str, objects: Objects) -> Resolved | Built | None:
        """The image as another node of the fleet has built it; None when it is for this node to build."""
        # An image whose content is to be complete needs its layers read, which makes the archive, too.
        if self._order.bucket is None or not self._order.lazy:
            return None
        from actors.image.archives.fleet import BucketAway, SharedArchive

        def waiting() -> None:
            self._phase = "waiting for another node"

        try:
            self._shared = SharedArchive(self._order.bucket, digest)
            layers = [layer.digest for layer in registry.manifest(digest).layers]
            if self._shared.obtain(self._order.archive_dir, layers, waiting) is not None:
                return self._find(digest, objects)
        except BucketAway:
            self._give_up()  # `share` says what is wrong with it
        return None

    def _build_trusting(self, registry: Registry, digest: str, platform: Platform, objects: Objects) -> Built:
        """Build it: without tables of contents if they lead to nothing, from the registry alone if what came from a mirror was damaged."""
        manifest = self._manifest = registry.manifest(digest)
        tables = self._read_tables(registry, manifest) if self._order.lazy else {}
        if tables:
            try:
                return self._build(registry, digest, platform, objects, tables)
            except (ContentCorrupt, LayerUnsafe, Unsupported) as error:
                self._say(f"tables of contents are not used: {error}")
                self._begin_anew()
        try:
            return self._build(registry, digest, platform, objects, {})
        except ContentCorrupt:
            if not registry.distrust_mirrors():
                raise
            self._begin_anew()
            return self._build(registry, digest, platform, objects, {})

    def _begin_anew(self) -> None:
        self._budget, self._read_bytes = self._new_budget(), 0

    def _read_tables(self, registry: Registry, manifest: Manifest) -> dict[int, TabledLayer]:
        """The layers that need not be read, by number.  Before any is read: it is the registry's only user then."""
        self._phase = "reading layers"
        tables = {}
        for number, layer in enumerate(manifest.layers):
            if has_table(layer):
                self._layer = number + 1
                try:
                    tables[number] = read_table(registry, layer, self._budget)
                    self._read_bytes += tables[number].fetched_bytes
                except TocUnusable as error:
                    self._say(f"layer {self._layer} of {len(manifest.layers)} is read as a whole: {error}")
        return tables

    def _say(self, text: str) -> None:
        print(f"{self._order.reference}: {text}", file=sys.stderr, flush=True)

    def _find(self, digest: str, objects: Objects) -> Resolved | Built | None:
        """The image if it is here already, archive and (unless it is mounted lazily) every object; None when something is to be done."""
        if digest == self._order.known_digest:
            return Resolved(digest)
        try:
            archive = Archive.open(archive_path(self._order.archive_dir, digest))
            table = archive.objects()
            try:
                complete = all(objects.has(table.row(index).key) for index in range(len(table)))
            finally:
                table.close()
        except (FileNotFoundError, ArchiveInvalid, CorruptTable):
            return None  # an archive that is damaged is replaced
        if not complete and not self._order.lazy:
            return None
        if complete:
            objects.sync()  # another builder may have published them this very moment
        return Built(digest, archive.path, archive.info.objects, archive.info.unpacked_bytes, 0, complete)

    def _build(
        self, registry: Registry, digest: str, platform: Platform, objects: Objects, tables: dict[int, TabledLayer]
    ) -> Built:
        manifest = registry.manifest(digest)
        config = registry.config(manifest, platform)
        edition = "".join(f"toc {number};" for number in tables) + "small inside;" * self._order.small_inside
        self._phase = "reading layers"
        with (
            contextlib.closing(Checkpoints(self._order.archive_dir)) as checkpoints,
            Download(registry, [layer for number, layer in enumerate(manifest.layers) if number not in tables]) as download,
        ):
            tree, contents = LayeredTree(self._budget), Contents(objects)
            for number, (layer, diff_id) in enumerate(zip(manifest.layers, config.rootfs.diff_ids, strict=True)):
                self._layer = number + 1
                try:
                    if number in tables:
                        _take_table(tables.pop(number), layer.size, number, tree, contents, checkpoints)
                        continue
                    blob = Verified(download.next_layer(), layer)
                    self._read_layer(blob, number, diff_id, tree, contents, checkpoints)
                except (ContentCorrupt, LayerUnsafe, Unsupported) as error:
                    raise type(error)(f"{registry.reference}, layer {self._layer} of {len(manifest.layers)}: {error}") from None
            if not contents.complete and not self._order.lazy:
                raise DiskFull(f"no space is left on this node for the content of {registry.reference}")
            self._phase = "writing archive"
            objects.sync()
            keys = _keys(tree.root)
            rows = [row for key, row in contents.rows.items() if key in keys]
            unpacked_bytes = sum(row.size_bytes - contents.hole_bytes.get(row.key, 0) for row in rows)
            info = _describe(registry.reference, digest, manifest, config, len(rows), unpacked_bytes, edition)
            try:
                path = write_archive(self._order.archive_dir, tree.root, rows, checkpoints, info)
            except ValueError as error:
                raise ContentCorrupt(f"{registry.reference}: a file that no file system here could hold: {error}") from None
        return Built(digest, path, info.objects, info.unpacked_bytes, self._read_bytes, contents.complete)

    def _read_layer(
        self, blob: Verified, number: int, diff_id: str, tree: LayeredTree, contents: Contents, checkpoints: Checkpoints
    ) -> None:
        stream = LayerStream(decompress(self._counted(blob), checkpoints.add), diff_id, self._budget)
        tree.begin_layer()
        try:
            small_bytes_max = REFERENCE_BYTES if self._order.small_inside else 0
            for entry in entries(stream, self._budget):
                key = data = None
                if entry.is_file and not is_whiteout(entry):
                    if 0 < entry.size <= small_bytes_max and entry.extents is None:
                        data = stream.read_exactly(entry.size)
                    else:
                        key = contents.take(stream, entry, number)
                tree.add(entry, key, data)
            tree.end_layer()
            stream.finish()
            checkpoints.end_layer(blob.size, stream.offset)
        except (ContentCorrupt, LayerUnsafe):
            # Whose fault?  If the registry's copy is damaged, which its end tells, then what was found in it says nothing
            # about the image.
            for _ in blob:
                pass
            raise

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._read_bytes += len(piece)
            yield piece


def _take_table(
    table: TabledLayer, layer_bytes: int, number: int, tree: LayeredTree, contents: Contents, checkpoints: Checkpoints
) -> None:
    """A layer, as its table of contents says."""
    tree.begin_layer()
    for entry, key, chunks in ((listed.entry, listed.key, listed.chunks) for listed in table.listed):
        if is_whiteout(entry):
            key = None
        elif key is not None:
            contents.note(key, entry.size, number, entry.offset, ((chunk.size, chunk.digest) for chunk in chunks))
        tree.add(entry, key)
    tree.end_layer()
    for frames in table.layout.spans:
        checkpoints.add_frames(frames)
    checkpoints.end_layer(layer_bytes, table.layout.size_bytes)


def _keys(root: Node) -> set[str]:
    """The objects that the finished tree names; files that a later layer has replaced are not among them."""
    keys = set()
    directories = [root]
    for directory in directories:  # grows while it is walked
        for node in (directory.children or {}).values():
            if node.children is not None:
                directories.append(node)
            elif node.key:
                keys.add(node.key)
    return keys


def _describe(
    reference: Reference,
    digest: str,
    manifest: Manifest,
    config: ConfigDocument,
    objects: int,
    unpacked_bytes: int,
    edition: str,
) -> ImageInfo:
    process = config.config or ProcessConfig()
    layers = zip(manifest.layers, config.rootfs.diff_ids, strict=True)
    return ImageInfo(
        reference=str(reference.pinned(digest)),
        digest=digest,
        layers=[LayerInfo(layer.digest, layer.media_type, layer.size, diff_id) for layer, diff_id in layers],
        env=process.env or [],
        entrypoint=process.entrypoint or [],
        command=process.cmd or [],
        working_dir=process.working_dir or "",
        user=process.user or "",
        objects=objects,
        unpacked_bytes=unpacked_bytes,
        edition=edition,
    )


def _storage_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no space is left on this node for the image ({error.filename or 'its cache or archive directory'})")
    if error.errno == errno.EFBIG:
        return OverBounds("the image has a file that is larger than the file system of the cache takes")
    return error
