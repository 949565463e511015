"""Layers with tables of contents (eStargz, zstd:chunked): indexed by them alone, and what is made of them is what reading them makes.

Two things are another way, because the tools that write these tables leave them out: eStargz has times in whole seconds, and neither
has attributes as libarchive writes them.  A third cannot be told from outside: a sparse file is in a table as one without holes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as some

from actors.image.archives.archive import VERSION, VERSION_WITHOUT_FRAMES, Archive
from actors.image.archives.builder import Build
from actors.image.errors import OverBounds
from actors.image.layers.content import CHUNK_BYTES_MAX
from actors.image.layers.stream import Budget
from actors.image.layers.tabled import read_table
from actors.image.layers.toc import TocUnusable, parse
from actors.image.lazy.source import RegistrySource
from actors.image.registry.manifests import Descriptor
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.image.wire import BuildImage, Built
from actors.lazytree.server import SourceError
from tests.actors.image.images import OCI, Member, Repository, digest, directory, hard_link, member, symlink, tar
from tests.actors.image.layers.tables import CHUNKED, STARGZ, Entry, Tabled, estargz, images, zstd_chunked
from tests.actors.image.lazy.image import Image, damaged, read, running
from tests.actors.image.proxy import Proxy, without_ranges

pytestmark = pytest.mark.usefixtures("unhurried")

MIB = 1 << 20
NOISE = random.Random(5).randbytes(9 * MIB)
XATTRS = {
    "SCHILY.xattr.user.a": "1",
    "SCHILY.xattr.security.capability": "\x01\0\0\x02\0\x04" + "\0" * 14,
    "SCHILY.xattr.user.empty": "",
}

HURT: list[Member] = [
    directory("d", mode=0o1777, uid=70_000, gid=4_000_000_000),
    member("d/setuid", NOISE[:5000], mode=0o6755, uid=1, gid=2, mtime=1_700_000_000),
    member("d/empty", mtime=-5),
    member("d/attributes", NOISE[5000:5100], pax_headers=dict(XATTRS)),
    directory("d/attributes too", pax_headers={"SCHILY.xattr.trusted.overlay.opaque": "y"}),
    member("d/twice", NOISE[:5000]),
    member("d/again", NOISE[100:7000]),
    member("d/again", NOISE[200:8000], mode=0o600),
    hard_link("d/early", "d/late"),
    hard_link("d/linked", "d/setuid"),
    member("d/late", b"l"),
    symlink("d/s", "../" * 40 + "x" * 3000),
    hard_link("d/linked link", "d/s"),
    member("d/fifo", kind=tarfile.FIFOTYPE),
    hard_link("d/linked fifo", "d/fifo"),
    member("d/char", kind=tarfile.CHRTYPE, devmajor=4095, devminor=1_000_000, mode=0o666),
    member("d/whiteout to overlayfs", kind=tarfile.CHRTYPE, devmajor=0, devminor=0),
    member("d/block", kind=tarfile.BLKTYPE, devmajor=8, devminor=1),
    member("d/" + "n" * 255, b"long name"),
    member("/".join(["deep" * 20] * 12) + "/f", b"in directories that are only implied"),
    member("./d/./dots//f", b"dots"),
    member("d/ünïcode \u20ac", b"euro"),
    member("d/big", NOISE[: 9 * MIB - 77]),
    member("d/holes", NOISE[:70_000] + bytes(700_000) + NOISE[:10]),
    member("d/chunk", NOISE[MIB : MIB + CHUNK_BYTES_MAX]),
    directory("lower"),
    member("lower/gone", b"gone"),
    member("lower/stays", b"stays"),
    directory("opaque"),
    member("opaque/gone", b"gone, too"),
    member("file, then directory", b"f"),
    directory("directory, then file"),
    member("directory, then file/f", b"f"),
]
UPPER: list[Member] = [
    member("lower/.wh.gone"),
    directory("opaque"),
    member("opaque/before", b"1"),
    member("opaque/.wh..wh..opq"),
    member("opaque/behind", NOISE[300:400]),
    directory("file, then directory"),
    member("directory, then file", NOISE[:5000]),
    member("d/.wh.linked"),
    hard_link("d/hard link to a lower layer's", "d/setuid"),
]
WRITERS: dict[str, Callable[..., Tabled]] = {
    "eStargz": estargz,
    "eStargz of small chunks": lambda *members, **more: estargz(*members, chunk_bytes=100_000, **more),
    "eStargz of shared members": lambda *members, **more: estargz(*members, chunk_bytes=MIB, frame_bytes=50_000, **more),
    "zstd:chunked": zstd_chunked,
}


@pytest.fixture
def proxy(repository: Repository) -> Iterator[Proxy]:
    with Proxy(repository.registry.address) as running_proxy:
        yield running_proxy


def made(built: Built) -> tuple[bytes, dict[str, int]]:
    """META, and the objects with their sizes."""
    archive = Archive.open(built.archive)
    with closing(archive.objects()) as table:
        rows = {table.row(index).key: table.row(index).size_bytes for index in range(len(table))}
        return Path(built.archive).read_bytes()[: archive._table[0]], rows


def version(built: Built) -> int:
    return int.from_bytes(Path(built.archive).read_bytes()[-32 - 64 :][: 64 - 56][:4], "little")


def build(home: Path, reference: str, **order: Any) -> Built:
    answer = Build(BuildImage(reference, str(home / "archives"), str(home / "cache"), **order)).run()
    assert isinstance(answer, Built)
    return answer


def through(proxy: Proxy, repository: Repository) -> str:
    return repository.reference().replace(repository.registry.address, proxy.address)


def check_all(image: Image) -> None:
    """Each object, fetched by ranges, is what its name says."""
    source = image.source()

    async def reads() -> None:
        for index in range(len(image.table)):
            row = image.table.row(index)
            parts = [
                await read(image, source, index, at, min(MIB, row.size_bytes - at)) for at in range(0, row.size_bytes, MIB)
            ]
            assert hashlib.sha256(b"".join(parts)).hexdigest() == row.key

    running(source, reads, timeout_s=120.0)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_table_makes_is_what_reading_the_layers_makes(
    writer: str, repository: Repository, proxy: Proxy, tmp_path: Path
) -> None:
    layers = [WRITERS[writer](*HURT), WRITERS[writer](*UPPER)]
    repository.push(*(layer.tar for layer in layers), **images(layers))
    whole = build(tmp_path / "whole", repository.reference())
    proxy.forget()
    indexed = build(tmp_path / "indexed", through(proxy, repository), lazy=True)
    assert made(indexed) == made(whole)
    assert proxy.body_bytes("/blobs/") < 0.01 * sum(len(layer.blob) for layer in layers)
    assert (whole.complete, indexed.complete) == (True, False)
    assert indexed.unpacked_bytes == whole.unpacked_bytes
    assert list((tmp_path / "indexed/cache").glob("??/*")) == []
    with closing(Image(tmp_path / "lazy", repository, proxy, lazy=True)) as image:
        check_all(image)


def test_content_comes_chunk_by_chunk(repository: Repository, proxy: Proxy, tmp_path: Path) -> None:
    """64 KiB in the middle of a file are moved with the chunk that they are in, and the spans ahead."""
    for name, most in (("eStargz", 8 * MIB + 10_000), ("eStargz of small chunks", 3 * MIB), ("zstd:chunked", 3 * MIB)):
        layer = WRITERS[name](member("big", NOISE), *(member(f"small/{n}", NOISE[n : n + 2000]) for n in range(300)))
        repository.push(layer.tar, **images([layer]))
        with closing(Image(tmp_path / name, repository, proxy, lazy=True)) as image:
            source, index = image.source(), image.find(len(NOISE))
            proxy.forget()
            data = running(source, lambda s=source, i=image, n=index: read(i, s, n, 5 * MIB, 64 << 10))  # type: ignore[misc]
            assert data == NOISE[5 * MIB :][: 64 << 10]
            assert image.moved_bytes() <= most


@pytest.mark.parametrize("writer", ["eStargz", "zstd:chunked"])
def test_layers_with_and_without_a_table_are_mixed(writer: str, repository: Repository, proxy: Proxy, tmp_path: Path) -> None:
    plain = tar(directory("plain"), member("plain/f", NOISE[:100_000]), member("opaque/plain", b"hidden"))
    layers = [Tabled(zstd.compress(plain), plain, {}), WRITERS[writer](*HURT), WRITERS[writer](*UPPER)]
    repository.push(*(layer.tar for layer in layers), **images(layers))
    whole = build(tmp_path / "whole", repository.reference())
    indexed = build(tmp_path / "indexed", repository.reference(), lazy=True)
    assert made(indexed) == made(whole)
    here = sorted(path.stat().st_size for path in (tmp_path / "indexed/cache").glob("??/*") if path.is_file())
    assert here == [6, 100_000]
    with closing(Image(tmp_path / "lazy", repository, proxy, lazy=True)) as image:
        check_all(image)


def test_zstd_chunked_as_skopeo_writes_it(repository: Repository, proxy: Proxy, tmp_path: Path) -> None:
    members = [item for item in HURT if not item[0].name.startswith("./")]
    repository.push(tar(*members), tar(*UPPER), architecture="amd64", tag="gzip")
    copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-compress", "--dest-compress-format", "zstd:chunked"]
    subprocess.run([*copy, f"docker://{repository.reference('gzip')}", f"dir:{tmp_path / 'dir'}"], check=True, timeout=300)
    document = json.loads((tmp_path / "dir/manifest.json").read_bytes())
    for blob in (document["config"], *document["layers"]):
        repository.push_blob((tmp_path / "dir" / blob["digest"].removeprefix("sha256:")).read_bytes())
    repository.push_document({"mediaType": f"{OCI}.manifest.v1+json"} | document, "latest")
    whole = build(tmp_path / "whole", repository.reference())
    proxy.forget()
    indexed = build(tmp_path / "indexed", through(proxy, repository), lazy=True)
    assert made(indexed) == made(whole)
    assert proxy.body_bytes("/blobs/") < 0.01 * sum(layer["size"] for layer in document["layers"])
    with closing(Image(tmp_path / "lazy", repository, proxy, lazy=True)) as image:
        check_all(image)


# What is not trusted, or cannot be used


def spoil(**fields: Any) -> Callable[[list[Entry]], None]:
    """Change the entry of "f" so."""

    def change(entries: list[Entry]) -> None:
        [entry] = [entry for entry in entries if entry["name"] == "f" and entry["type"] == "reg"]
        entry.update(fields)

    return change


def swap(entries: list[Entry]) -> None:
    """Two files that lie in the same place."""
    places = [entry for entry in entries if entry.get("size") == 5000]
    places[1]["offset"] = places[0]["offset"]


UNUSABLE: dict[str, tuple[Callable[[list[Entry]], Any], str]] = {
    "no digest": (spoil(digest=""), "no sha256 digest for 'f'"),
    "another digest": (spoil(digest="sha512:" + "0" * 128), "no sha256 digest for 'f'"),
    "a name that was not UTF-8": (spoil(name="�"), "not UTF-8"),
    "half a surrogate": (spoil(name="\ud800"), "not understood"),
    "a zero byte": (spoil(name="a\0b"), "zero byte"),
    "an unknown type": (spoil(type="socket"), "of type 'socket'"),
    "a number that is text": (spoil(size="5000"), "not understood"),
    "a number that is too big": (spoil(offset=1 << 63), "not understood"),
    "a negative number": (spoil(size=-1), "not understood"),
    "not all of the file": (spoil(chunkSize=4999), "do not make up the file"),
    "no time": (spoil(modtime="yesterday"), "where a time should be"),
    "no date": (spoil(modtime="2023-02-31T00:00:00Z"), "where a date should be"),
    "no attribute": (spoil(xattrs={"user.a": "!"}), "not understood"),
    "a place outside": (spoil(offset=1 << 40), "not all of the layer is"),
    "no place": (spoil(offset=0), "lies where no file"),
    "a place within a frame": (spoil(innerOffset=7), "lies where no file"),
    "a place far into a frame": (spoil(innerOffset=1 << 40), "lies where no file"),
    "a place much farther into a frame than it can be": (spoil(innerOffset=1 << 20), "most of which are nobody's"),
    "two in one place": (swap, "lies where no file"),
    "a chunk behind another file": (
        lambda entries: entries.append(entries[-1] | {"type": "chunk", "name": "g"}),
        "has a chunk of 'g'",
    ),
    "a chunk of a directory": (
        lambda entries: entries.extend([{"name": "x", "type": "dir"}, {"name": "x", "type": "chunk"}]),
        "which has no content",
    ),
    "an impossible device": (
        lambda entries: entries.append({"name": "x", "type": "char", "devMajor": 4096}),
        "Linux cannot have",
    ),
    "no version": (lambda entries: entries.append(None), "not understood"),
}


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_a_table_that_cannot_be_used_is_not(writer: Callable[..., Tabled], repository: Repository) -> None:
    with Registry(Reference.parse(repository.reference())) as registry:
        for what, (change, why) in UNUSABLE.items():
            layer = writer(member("e", NOISE[:5000]), member("f", NOISE[5000:10_000]), change=change)
            blob = Descriptor(**repository.push_blob(layer.blob), annotations=layer.annotations)
            with pytest.raises(TocUnusable) as unusable:
                read_table(registry, blob, Budget(1 << 40, 1000))
            assert why in str(unusable.value), what


UNTENABLE: dict[str, Callable[[list[Entry]], Any]] = {
    "a hard link to nothing": lambda entries: entries.append({"name": "x", "type": "hardlink", "linkName": "nothing"}),
    "out of the root": lambda entries: entries.append({"name": "../x", "type": "dir"}),
    "a name that is too long": lambda entries: entries.append({"name": "x" * 256, "type": "dir"}),
    "an owner that is too high": lambda entries: entries.append({"name": "x", "type": "dir", "uid": 1 << 32}),
}


@pytest.mark.parametrize("what", UNTENABLE)
def test_a_table_of_which_no_tree_can_be_made_is_not_used(
    what: str, repository: Repository, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = estargz(member("f", NOISE[:5000]), change=UNTENABLE[what])
    check_read_whole(layer, repository, tmp_path, "tables of contents are not used", capfd)


def check_read_whole(layer: Tabled, repository: Repository, home: Path, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    repository.push(layer.tar, **images([layer]))
    built = build(home, repository.reference(), lazy=True)
    assert built.complete
    assert f"{repository.reference()}: " in (said := capfd.readouterr().err)
    assert why in said
    assert made(built)[1] == {digest(content)[7:]: len(content) for content in contents_of(layer)}


def contents_of(layer: Tabled) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(layer.tar)) as opened:
        files = [opened.extractfile(found) for found in opened if found.isfile()]
        return [file.read() for file in files if file is not None]


def annotated(layer: Tabled, **annotations: str) -> Tabled:
    return Tabled(
        layer.blob,
        layer.tar,
        layer.annotations | {CHUNKED + name.replace("_", "-"): value for name, value in annotations.items()},
    )


def test_a_table_that_is_not_what_the_manifest_means_is_not_trusted(
    repository: Repository, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = member("f", NOISE[:5000]), member("g", NOISE[5000:5100])
    stargz, chunked = estargz(*files), zstd_chunked(*files)
    offset, length, size, _ = map(int, chunked.annotations[f"{CHUNKED}manifest-position"].split(":"))
    elsewhere = stargz.blob[:-51] + stargz.blob[-51:].replace(stargz.blob[-35:-19], b"%016x" % 0xFFFF)
    wrong = digest(b"another")
    for number, (layer, why) in enumerate(
        [
            (Tabled(stargz.blob, stargz.tar, {STARGZ: wrong}), f"the manifest says {wrong}"),
            (Tabled(stargz.blob[:-51], stargz.tar, stargz.annotations), "does not end with the footer"),
            (Tabled(elsewhere, stargz.tar, stargz.annotations), "where the layer is not"),
            (annotated(chunked, manifest_checksum=wrong), f"the manifest says {wrong}"),
            (annotated(chunked, manifest_position="0:1:1:1"), "where the layer is not"),
            (annotated(chunked, manifest_position=f"{len(chunked.blob)}:1:1:1"), "where the layer is not"),
            (annotated(chunked, manifest_position=f"{offset}:{length}:{size}:2"), "no place that is known"),
            (annotated(chunked, manifest_position=f"{offset}:{length}:{size - 1}:1"), "is not of"),
            (annotated(chunked, manifest_position=f"{offset}:{length}:{129 << 20}:1"), "is larger than"),
            (annotated(chunked, manifest_position=""), "no place that is known"),
        ]
    ):
        check_read_whole(layer, repository, tmp_path / str(number), why, capfd)


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_where_there_are_no_ranges_a_table_is_of_no_use(
    writer: Callable[..., Tabled], repository: Repository, proxy: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = writer(member("f", NOISE))
    repository.push(layer.tar, **images([layer]))
    proxy.on("/blobs/", without_ranges)
    assert build(tmp_path, through(proxy, repository), lazy=True).complete
    assert "the registry knows no ranges" in capfd.readouterr().err


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_a_table_that_a_mirror_damages_comes_from_the_registry(
    writer: Callable[..., Tabled], repository: Repository, proxy: Proxy
) -> None:
    layer = writer(*HURT)
    blob = Descriptor(**repository.push_blob(layer.blob), annotations=layer.annotations)
    proxy.on("/blobs/", damaged)
    with Registry(Reference.parse(repository.reference()), mirrors=[f"http://{proxy.address}"]) as registry:
        table = read_table(registry, blob, Budget(1 << 40, 1000))
    assert proxy.seen("/blobs/")
    assert {listed.key for listed in table.listed} >= {digest(NOISE[:5000])[7:]}


def test_a_chunk_that_is_too_long_to_be_checked(
    repository: Repository, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = estargz(member("f", NOISE[: 5 * MIB]), chunk_bytes=5 * MIB)
    check_read_whole(layer, repository, tmp_path, "has a chunk of 5242880 bytes", capfd)


def test_of_a_long_chunk_of_zeros_each_part_can_be_checked(repository: Repository, proxy: Proxy, tmp_path: Path) -> None:
    """As new tools say what it is, and as older ones, which only give its digest."""
    layer = zstd_chunked(member("f", bytes(11 * MIB + 5)), member("g", bytes(CHUNK_BYTES_MAX + 9)), chunk_bytes=9 * MIB)
    repository.push(layer.tar, **images([layer]))
    with closing(Image(tmp_path, repository, proxy, lazy=True)) as image:
        check_all(image)


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_content_that_is_not_what_the_table_says_is_never_answered(
    writer: Callable[..., Tabled], repository: Repository, proxy: Proxy, tmp_path: Path
) -> None:
    """The manifest vouches for the table, which lies: of the file's content, or of where it is."""
    wrong = digest(b"another")
    for number, change in enumerate([spoil(digest=wrong, chunkDigest=wrong), spoil(size=6000), spoil(size=700_000)]):
        layer = writer(member("e", NOISE[:5000]), member("f", NOISE[5000:10_000]), change=change)
        repository.push(layer.tar, **images([layer]))
        with closing(Image(tmp_path / str(number), repository, proxy, lazy=True)) as image:
            keys = {"sha256:" + image.table.row(index).key: index for index in range(len(image.table))}
            spoiled, other = keys[digest(NOISE[5000:10_000]) if number else wrong], keys[digest(NOISE[:5000])]
            source = image.source()

            async def reads(image: Image, source: RegistrySource, spoiled: int, other: int) -> None:
                with pytest.raises(SourceError, match="damaged"):
                    await read(image, source, spoiled, 0, 100)
                assert await read(image, source, other) == NOISE[:5000]

            running(source, partial(reads, image, source, spoiled, other))


def test_the_bounds_are_those_of_a_layer_that_is_read(repository: Repository, tmp_path: Path) -> None:
    layer = estargz(*(directory(f"d{number}") for number in range(30)), member("f", NOISE[:50_000]))
    repository.push(layer.tar, **images([layer]))
    with pytest.raises(OverBounds, match="more than 20 entries"):
        build(tmp_path / "1", repository.reference(), lazy=True, entries_max=20)
    with pytest.raises(OverBounds, match="unpacks to more than 40000 bytes"):
        build(tmp_path / "2", repository.reference(), lazy=True, unpacked_bytes_max=40_000)


def test_what_has_no_frames_is_readable_by_older_daemons(repository: Repository, tmp_path: Path) -> None:
    layer = estargz(member("f", NOISE[:5000]))
    repository.push(layer.tar, **images([layer]))
    whole, indexed = build(tmp_path / "1", repository.reference()), build(tmp_path / "2", repository.reference(), lazy=True)
    assert (version(whole), version(indexed)) == (VERSION_WITHOUT_FRAMES, VERSION)
    assert Archive.open(whole.archive).info.identity == whole.digest != Archive.open(indexed.archive).info.identity


values = some.recursive(
    some.none() | some.integers() | some.text(max_size=5) | some.sampled_from(["reg", "chunk", "dir", digest(b"1")]),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["name", "type", "size", "digest", "offset", "chunkOffset", "modtime", "xattrs"]
documents = some.lists(some.dictionaries(some.sampled_from(KEYS), values), max_size=4).map(
    lambda entries: json.dumps({"version": 1, "entries": entries}).encode()
)


@settings(max_examples=100, deadline=None)
@given(some.binary(max_size=50) | documents)
def test_whatever_a_table_is_it_is_read_or_refused(table: bytes) -> None:
    with contextlib.suppress(TocUnusable, OverBounds):
        parse(table, Budget(1 << 40, 1000))


DEEP = [b"[" * 100_000, b'{"version":1,"entries":' + b"[" * 100_000, b'{"version":1,"entries":[' + b'{"a":' * 50_000]


@pytest.mark.parametrize("table", [*DEEP, b"", b"{}", b'{"version":2,"entries":[]}', b'{"version":1,"entries":{}}'])
def test_a_table_that_is_none_is_refused(table: bytes) -> None:
    with pytest.raises(TocUnusable):
        parse(table, Budget(1 << 40, 1000))
