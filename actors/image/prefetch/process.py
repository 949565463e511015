"""The process "image prefetcher": makes the pack of a workload's trace, or streams a pack to where its content is looked for.

It may be killed at any instruction: a pack appears whole, objects appear whole, and what is in the spool is believed by nobody before its
digest is found right.  Whoever waits for what it announced (`coming`) does not wait long.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from io import RawIOBase

import msgspec

from actors.image.archives import trace
from actors.image.archives.archive import Archive, save_beside
from actors.image.archives.pack import CHUNKS_MAX, Chunk, Pack, PackInvalid, chunks_of, pack_path, write_pack
from actors.image.archives.trace import BLOCK_BYTES, Block
from actors.image.errors import ArchiveInvalid
from actors.image.layers.content import LayerContent, Part, chunk_at, chunk_count, chunk_of, decode_content, stored_bytes
from actors.image.lazy.coming import Announced
from actors.image.lazy.spool import Spool
from actors.image.wire import Completed, MakePack, PackAbsent, PackComing, PackMade, PackThrough, Streaming, StreamPack
from actors.lazytree.ledger import NoRoom
from actors.lazytree.objects import Objects
from actors.lazytree.table import Row
from supervisor.channel import Channel, ChannelClosed, ChannelTimeout
from supervisor.frames import Codec, Message

PIECE_BYTES = 64 << 10
ANSWER_TIMEOUT_S = 30.0
WORTH_SHARE = 0.1  # of a pack's chunks must be missing for it to be fetched
MADE_SHARE = 0.5  # of a trace's chunks must be here for a pack to be made
COMPLETED_MAX = 256  # rows in one message
TIME_MAX_S = 900  # then the kernel ends it (SIGALRM)
PULSE_S = 0.5
NICE = 15  # and not SCHED_IDLE: on a node that never rests a pack is made, too


def make(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `MakePack` in `arguments`, behind what else there is to do; say `PackMade`."""
    channel = Channel(end, Codec(MakePack))
    order: MakePack = channel.codec.decode(arguments)
    signal.alarm(TIME_MAX_S)
    os.nice(NICE)
    try:
        with contextlib.closing(Content(order.archive, order.objects, descriptors)) as content:
            answer = _make(order, content)
    except (OSError, ArchiveInvalid) as error:
        answer = PackMade(0, 0, str(error))
    with contextlib.suppress(ChannelClosed):
        channel.send(answer, timeout_s=ANSWER_TIMEOUT_S)


def stream(end: socket.socket, descriptors: list[int], arguments: bytes) -> None:
    """Do the `StreamPack` in `arguments`; say what that says."""
    channel = Channel(end, Codec(StreamPack))
    order: StreamPack = channel.codec.decode(arguments)
    _beat(channel)
    try:
        with contextlib.closing(Content(order.archive, order.objects, descriptors)) as content:
            for message in _stream(order, content):
                channel.send(message, timeout_s=ANSWER_TIMEOUT_S)
    except (OSError, ArchiveInvalid) as error:
        with contextlib.suppress(ChannelClosed):
            channel.send(PackThrough(0, 0, str(error)), timeout_s=ANSWER_TIMEOUT_S)
    except ChannelClosed:
        pass


def _beat(channel: Channel) -> None:
    """Say `Streaming` from now on, at most for TIME_MAX_S.  By a timer's signal, for it may be the pack that does not come."""
    deadline = time.monotonic() + TIME_MAX_S

    def pulse(number: int, frame: object) -> None:
        if time.monotonic() > deadline:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the next one ends this process
        with contextlib.suppress(
            ChannelClosed, ChannelTimeout
        ):  # who listens is behind; or is no more, as the next message finds
            channel.send(Streaming(), timeout_s=0)

    signal.signal(signal.SIGALRM, pulse)
    signal.setitimer(signal.ITIMER_REAL, PULSE_S, PULSE_S)


class Content:
    """The content of an image as far as it is on this node: OBJECTS and, if its descriptor is given, the spool."""

    def __init__(self, archive: str, objects: str, descriptors: list[int]) -> None:
        self.archive = Archive.open(archive, checked=True)  # by who mounted it
        self.table = self.archive.objects()
        self.spans = self.archive.spans(self.table)
        self.objects = Objects(objects)
        self.spool = Spool(descriptors[0], self.spans) if descriptors else None

    def find(self, row: int) -> tuple[Row, LayerContent] | None:
        """The object in that row; None when there is none, or it is one with holes."""
        if row >= len(self.table):
            return None
        found = self.table.row(row)
        content = decode_content(found)
        return None if content.extents is not None else (found, content)

    def size_of(self, chunk: Chunk) -> int:
        """Raises PackInvalid when there is no such chunk, or none that a pack may have."""
        try:
            if (found := self.find(chunk.row)) is not None:
                return chunk_of(*found, chunk.number).size
        except IndexError:
            pass
        raise PackInvalid(f"chunk {chunk.number} of object {chunk.row}, which the image does not have")

    def read(self, chunk: Chunk) -> bytes | None:
        """The chunk, checked; None when it is not here.  Raises OSError."""
        found = self.find(chunk.row)
        if found is None:
            return None
        row, content = found
        try:
            part = chunk_of(row, content, chunk.number)
        except IndexError:
            return None
        for read in (self._from_objects, self._from_spool, self._from_objects):  # it is published out of the spool meanwhile
            data = read(row, content, part)
            if data is not None and hashlib.sha256(data).digest() == part.digest:
                return data
        return None

    def _from_objects(self, row: Row, content: LayerContent, part: Part) -> bytes | None:
        try:
            with open(os.open(Objects.path(row.key), os.O_RDONLY, dir_fd=self.objects.descriptor), "rb", 0) as file:
                return os.pread(file.fileno(), part.size, part.begin)
        except FileNotFoundError:
            return None

    def _from_spool(self, row: Row, content: LayerContent, part: Part) -> bytes | None:
        return None if self.spool is None else self.spool.read(self.spool.place(content) + part.begin, part.size)

    def is_here(self, chunk: Chunk) -> bool:
        """Whether the chunk seems to be here, right or not.  Raises PackInvalid as `size_of`, OSError."""
        self.size_of(chunk)
        row, content = self.find(chunk.row) or (None, None)
        assert row is not None and content is not None and self.spool is not None
        part = chunk_of(row, content, chunk.number)
        return self.objects.has(row.key) or self.spool.has(self.spool.place(content) + part.begin, part.size)

    def keep(self, chunk: Chunk, data: bytes) -> bool:
        """Put a chunk where it is looked for → False for a part of an object, which is in the spool now.

        Raises PackInvalid when it is not the object's, OSError.
        """
        row, content = self.find(chunk.row) or (None, None)
        assert row is not None and content is not None and self.spool is not None
        part = chunk_of(row, content, chunk.number)
        if hashlib.sha256(data).digest() != part.digest:
            raise PackInvalid(f"chunk {chunk.number} of content {row.key[:12]} is not what its digest says")
        if len(data) == row.size_bytes:
            # What overlayfs finds here when it opens the file never asks a server.
            with contextlib.suppress(NoRoom), self.objects.create(len(data)) as file:
                file.write(data)
                self.objects.publish(file, row.key)
                return True
        self.spool.write(self.spool.place(content) + part.begin, memoryview(data))
        return False

    def count(self, row: int) -> int:
        """The chunks of the object in that row."""
        found = self.find(row)
        return 0 if found is None else chunk_count(*found)

    def numbers(self, block: Block) -> range:
        """The chunks in which something of a trace's block is: none when there is no such block."""
        found = self.find(block.row)
        begin = block.block * BLOCK_BYTES
        if found is None or begin >= stored_bytes(*found):
            return range(0)
        end = min(begin + BLOCK_BYTES, stored_bytes(*found))
        return range(chunk_at(found[1], begin), chunk_at(found[1], end - 1) + 1)

    def close(self) -> None:
        self.spans.close()
        self.table.close()
        self.objects.close()


# --- making one ---


def _make(order: MakePack, content: Content) -> PackMade:
    directory, digest = os.path.dirname(order.archive), content.archive.info.digest
    path = pack_path(directory, digest, order.workload)
    made = PackMade(0, 0)
    if not os.path.exists(path):
        found = trace.load(directory, digest, order.workload)
        if found is None:
            return PackMade(0, 0, "its trace is gone")
        wanted = chunks_of(found, content.numbers)[:CHUNKS_MAX]
        here = [chunk for chunk in wanted if content.read(chunk) is not None]
        if len(here) < MADE_SHARE * len(wanted) or not here:
            return PackMade(0, 0, f"of {len(wanted)} chunks {len(here)} are here")
        try:
            size = save_beside(
                path, write_pack(content.archive.info.identity, here, (_read_again(content, chunk) for chunk in here))
            )
        except LookupError:
            return PackMade(0, 0, "what is to be in it has just been removed from this node")
        made = PackMade(len(here), size)
    if order.bucket is not None:
        try:
            _share(order, digest, path)
        except OSError as error:
            return msgspec.structs.replace(made, problem=f"it is not shared: {error}")
    return made


def _read_again(content: Content, chunk: Chunk) -> bytes:
    data = content.read(chunk)
    if data is None:
        raise LookupError(chunk)
    return data


def _share(order: MakePack, digest: str, path: str) -> None:
    """Put the pack into the bucket, unless there is one.  Raises OSError, also for a bucket that is away."""
    from actors.image.archives.bucket import BucketAway, BucketClient, pack_key

    assert order.bucket is not None
    try:
        with contextlib.closing(BucketClient(order.bucket)) as client, open(path, "rb") as file:
            client.put(pack_key(client.prefix, digest, order.workload), file)
    except BucketAway as error:
        raise OSError(str(error)) from None


# --- streaming one ---


def _stream(order: StreamPack, content: Content) -> Iterator[Message]:
    directory, digest = os.path.dirname(order.archive), content.archive.info.digest
    path = pack_path(directory, digest, order.workload)
    with contextlib.ExitStack() as stack:
        try:
            try:
                pieces = _pieces(stack.enter_context(open(path, "rb", 0)))
            except FileNotFoundError:
                if order.bucket is None:
                    yield PackAbsent()
                    return
            else:
                try:
                    yield from _bring(content, Pack(content.archive.info.identity, pieces))
                except PackInvalid as error:
                    os.unlink(path)  # it is made again
                    yield PackThrough(0, 0, f"{path}: {error}; it is removed")
                return
            yield from _stream_shared(order, content, digest)
        except Absent as absent:
            yield PackAbsent(str(absent))


class Absent(Exception):
    """There is no pack that is worth being fetched; the text says if something is wrong."""


def _stream_shared(order: StreamPack, content: Content, digest: str) -> Iterator[Message]:
    from actors.image.archives.bucket import BucketAway, BucketClient, pack_key

    assert order.bucket is not None
    try:
        with contextlib.closing(BucketClient(order.bucket)) as client:
            key = pack_key(client.prefix, digest, order.workload)
            found = client.open(key)
            if found is None:
                raise Absent
            etag, pieces = found
            try:
                yield from _bring(content, Pack(content.archive.info.identity, pieces))
            except PackInvalid as error:
                client.remove(key, etag)
                yield PackThrough(0, 0, f"bucket {client.name}, {key}: {error}; it is removed")
            finally:
                pieces.close()
    except BucketAway as error:
        yield PackThrough(0, 0, str(error))


def _pieces(file: RawIOBase) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _bring(content: Content, pack: Pack) -> Iterator[Message]:
    """Put what is in the pack, and is right, where it is looked for.  Raises PackInvalid, OSError."""
    assert content.spool is not None
    missing = {chunk for chunk in pack.chunks if not content.is_here(chunk)}
    if len(missing) <= WORTH_SHARE * len(pack.chunks):
        raise Absent
    announced = Announced(content.spool.descriptor, content.spool.end)
    announced.begin(pack.chunks)
    try:
        yield PackComing(len(pack.chunks), content.spool.end)
        brought, size_bytes = 0, 0
        come: Counter[int] = Counter()
        whole: list[int] = []
        for chunk, data in pack.contents(content.size_of):
            announced.give_way()
            if chunk in missing:
                is_object = content.keep(chunk, data)
                come[chunk.row] += not is_object
                if not is_object and come[chunk.row] == content.count(chunk.row):
                    whole.append(chunk.row)
                brought += 1
                size_bytes += len(data)
            announced.through()
            if len(whole) >= COMPLETED_MAX:
                yield Completed(whole)
                whole = []
        if whole:
            yield Completed(whole)
    finally:
        announced.end()
    yield PackThrough(brought, size_bytes)
