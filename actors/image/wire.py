"""What the ImageActor and its processes, an image builder and the image mounts, say to each other."""

from __future__ import annotations

from actors.image.registry.login import Access, Login
from supervisor.frames import Message


class Bucket(Message, frozen=True):
    """Where a fleet shares archives: a bucket of S3 or of what speaks its protocol; "" is as boto3's own chain has it."""

    name: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""


class BuildImage(Message, frozen=True):
    """The arguments of a builder: see to it that the image's archive and all of its content are on this node.

    `reference`: as the submitter wrote it.  `platform`: OS/ARCHITECTURE[/VARIANT], "" for this machine's.
    `archive_dir`, `cache_dir`: where archives and objects lie.  `known_digest`: the manifest whose archive and content are
    known to be here, complete and durable; None when there is none.  `access`: as whom, and through which mirrors.  `lazy`: content
    may be missing, for the image is mounted with a LAZY layer (`ServeImage`) that fetches it.  `small_inside`: files that are no larger
    than a reference to an object (`erofs.REFERENCE_BYTES`) have their content in META, where the archives are.

    `bucket`: where the fleet shares archives.  A lazy image's archive is pulled from there, or built here while others wait; any
    archive that is built or found here is pushed there behind the answer, and then `Shared` is the last word.

    The bounds are absolute: `unpacked_bytes_max` of all layers decompressed (holes of sparse files are not in there),
    `entries_max` of all layers (the builder takes about 2 KB of memory for each), `time_max_s` for everything.

    There are four ends.  `Resolved`: the reference (still) names `known_digest`.  `Built` without reading a layer: the
    archive is there, from another daemon perhaps, and OBJECTS have all that it names, which nobody insists on if `lazy`; if
    the reference is its digest, the registry is not even asked.  `Built` after reading all layers.  `BuildFailed`.
    """

    reference: str
    archive_dir: str
    cache_dir: str
    platform: str = ""
    known_digest: str | None = None
    unpacked_bytes_max: int = 64 << 30
    entries_max: int = 1_000_000
    time_max_s: float = 3600.0
    lazy: bool = False
    small_inside: bool = False
    access: Access = Access()
    bucket: Bucket | None = None


RESOLVING = "resolving"  # a builder's first phase


class Progress(Message, frozen=True):
    """How far the build is, four times a second, also while it waits: `bytes_done` of `bytes_total` of compressed layers read.

    `phase` is "resolving", "waiting for another node", "reading layers", "writing archive" or "sharing archive"; `layer` counts
    from 1 to `layers`.
    """

    phase: str
    layer: int = 0
    layers: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    entries: int = 0


class Resolved(Message, frozen=True):
    """Nothing was to be done: the reference names this manifest, the known one."""

    digest: str


class Built(Message, frozen=True):
    """The archive is here, and so is the image's content, durable, unless not `complete`.

    `layer_bytes`: compressed bytes read from the registry, 0 when the archive was here.  `unpacked_bytes`: of all objects, holes
    not counted.
    """

    digest: str
    archive: str
    objects: int
    unpacked_bytes: int
    layer_bytes: int
    complete: bool = True


class Shared(Message, frozen=True):
    """After `Built`, if the order has a bucket: the archive is there, or `problem` says why not, which is no error of the image's.

    `pushed`: it was put there now.
    """

    pushed: bool
    problem: str = ""


class BuildFailed(Message, frozen=True):
    """It cannot be had.  `kind` is that of an `errors.ImageError`; `error` is for the submitter."""

    kind: str
    error: str


class ServeImage(Message, frozen=True):
    """The arguments of an image mount, with two descriptors: a FUSE connection, and the image's spool (`spool.create`).

    `archive`: path of the image's archive.  `reference`: by which this node knows the image, and so whom to fetch from (the one in
    the archive is that of whoever built it, with another registry perhaps).  `objects`: OBJECTS, which the server reads and does
    not write.  `traces`: it may be told to `BeginTrace`.  `fill_…`: if not 0, it fetches all that is missing, so many ranges at once, no
    faster (0: as fast as they come), and not before so long.
    `spool_bytes_max`: what it may take of the spool's file system before it gives up what is oldest there.  The rest is as in
    `lazytree.wire.ServeTree`.
    The registry's credentials are those of `access`, or Docker's (config.json), read before the server drops its privileges; when
    they are refused, it asks for newer ones (`LoginWanted`).
    """

    archive: str
    reference: str
    objects: str
    init_request: bytes
    replacement: bool = False
    read_timeout_s: float = 30.0
    uid: int = 1000
    gid: int = 1000
    spool_bytes_max: int = 1 << 30
    access: Access = Access()
    traces: bool = False
    fill_parallel: int = 0
    fill_bytes_per_s: int = 0
    fill_delay_s: float = 0.0


class Completed(Message, frozen=True):
    """From an image mount: the content of these objects (indexes into the archive's table) is whole in the spool.

    The parent publishes them (`spool.publish`) and answers `Taken`.  Said again every few seconds until it does, also by a
    server's successor, and to a parent's successor.
    """

    rows: list[int]


class MakePack(Message, frozen=True):
    """The arguments of a prefetcher: make the pack of a workload from its trace, both beside the archive at `archive`.

    Contents are taken from OBJECTS, the directory `objects`, and from the image's spool, which comes with this, if it does; what is in
    neither is left out.  `bucket`: where the fleet shares it.  Says `PackMade`.
    """

    archive: str
    objects: str
    workload: str
    bucket: Bucket | None = None


class PackMade(Message, frozen=True):
    """The pack is beside the archive, and in the fleet's bucket if there is one, or `problem` says why not."""

    chunks: int
    size_bytes: int
    problem: str = ""


class ReadProgram(Message, frozen=True):
    """The arguments of a prefetcher: read what the program `name` reads at its start, in the tree of the layers `lower` and `data`.

    `path`: where it is looked for, as in PATH.  It says nothing.
    """

    lower: str
    data: list[str]
    name: str
    path: str
    uid: int
    gid: int


class StreamPack(Message, frozen=True):
    """The arguments of a prefetcher: bring what a workload's pack has to OBJECTS and the image's spool, whose descriptor comes with this.

    The pack lies beside the archive, or in `bucket`.  Says `PackComing` or `PackAbsent` first, then `Completed`, of objects that are whole
    in the spool, and `PackThrough` in the end; and `Streaming` meanwhile.
    """

    archive: str
    objects: str
    workload: str
    bucket: Bucket | None = None


class Streaming(Message, frozen=True):
    """Heartbeat of a prefetcher that streams a pack."""


class PackComing(Message, frozen=True):
    """What the pack brings, `chunks` of them, is announced in the spool (`coming`), at `announced_at`."""

    chunks: int
    announced_at: int


class PackAbsent(Message, frozen=True):
    """No pack comes: there is none, or it has nothing that is not here, or `problem` says what is wrong with it."""

    problem: str = ""


class PackThrough(Message, frozen=True):
    """The pack has been read, or as much of it as is good, and `problem` says what was wrong then."""

    chunks: int
    size_bytes: int
    problem: str = ""


class LoginWanted(Message, frozen=True):
    """From an image mount: `registry` (or mirror) refuses what it was shown, and the server may not look for what is newer itself.

    The parent answers with `LoginFound`.
    """

    registry: str


class LoginFound(Message, frozen=True):
    """To an image mount: what there is now for `registry`; None when there is nothing.  `problem`: a credential helper failed."""

    registry: str
    login: Login | None
    problem: str = ""


class BeginTrace(Message, frozen=True):
    """To an image mount: record what is read from now on, as the trace of that name, until `EndTrace` or the trace's own bounds."""

    name: str


class EndTrace(Message, frozen=True):
    """To an image mount: the trace is over; no error when there is none of that name."""

    name: str


class TracePart(Message, frozen=True):
    """From an image mount, once a trace is over: its next blocks (`trace.pack_blocks`, at most TRACE_PART_BYTES).

    The rest is of the `last` part: what the server has fetched meanwhile, compressed, and how long something was on its way.
    """

    name: str
    blocks: bytes
    last: bool
    fetched_bytes: int = 0
    fetching_s: float = 0.0


TRACE_PART_BYTES = 32 << 10


class Taken(Message, frozen=True):
    """To an image mount: these objects are in OBJECTS now, and their space is free; or what the spool has of them is not theirs."""

    rows: list[int]
