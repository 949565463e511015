"""Tars, and layers of them, as one tree: pure logic, no registry and no mount."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.image.errors import ContentCorrupt, ImageError, LayerUnsafe, OverBounds, Unsupported
from actors.image.layers.content import CHUNK_BYTES, Contents, LayerContent
from actors.image.layers.overlaying import DEPTH_MAX, LayeredTree, is_whiteout
from actors.image.layers.stream import BLOCK_BYTES, Budget, LayerStream, Verified, decompress
from actors.image.layers.tar import EXTENDED_BYTES_MAX, Entry, entries
from actors.image.registry.manifests import Descriptor
from actors.lazytree.erofs import Node
from actors.lazytree.objects import Objects
from tests.actors.image.images import Member, digest, directory, encode, hard_link, member, symlink, tar

BOUNDLESS = 1 << 40


def budget() -> Budget:
    return Budget(BOUNDLESS, BOUNDLESS)


def stream(data: bytes, pieces_of: int = 10_000, bounds: Budget | None = None) -> LayerStream:
    pieces = (data[at : at + pieces_of] for at in range(0, len(data), pieces_of))
    return LayerStream(pieces, digest(data), bounds or budget())


def parse(data: bytes) -> list[Entry]:
    return list(entries(stream(data), budget()))


def overlay(*layers: bytes) -> LayeredTree:
    """The tree of layers, a file's key being the digest of its content."""
    bounds = budget()
    tree = LayeredTree(bounds)
    for layer in layers:
        source = stream(layer, bounds=bounds)
        tree.begin_layer()
        for entry in entries(source, bounds):
            tree.add(entry, hashlib.sha256(source.read(entry.stored)).hexdigest() if entry.is_file else None)
        tree.end_layer()
        source.finish()
    return tree


def paths(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    for name, child in sorted((node.children or {}).items()):
        yield prefix + os.fsdecode(name), child
        yield from paths(child, prefix + os.fsdecode(name) + "/")


def tree_of(*layers: bytes) -> dict[str, str]:
    """Path → what is there: "/" a directory, "-> target", or the first line of known content."""
    known = {hashlib.sha256(text).hexdigest(): text.decode() for text in (b"1", b"2", b"3", b"")}
    found = {}
    for path, node in paths(overlay(*layers).root):
        if node.children is not None:
            found[path] = "/"
        elif node.target is not None:
            found[path] = "-> " + os.fsdecode(node.target)
        else:
            found[path] = known[node.key] if node.key else oct(stat.S_IFMT(node.mode))
    return found


def one(name: str) -> Member:
    return member(name, b"1")


def two(name: str) -> Member:
    return member(name, b"2")


def three(name: str) -> Member:
    return member(name, b"3")


# Expected trees, by hand from the image specification's layer.md.
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        pytest.param([[one("a")], [two("b")]], {"a": "1", "b": "2"}, id="layers add up"),
        pytest.param([[one("a")], [two("a")]], {"a": "2"}, id="a later layer replaces a file"),
        pytest.param([[one("a"), two("a")]], {"a": "2"}, id="of duplicates the last one counts"),
        pytest.param([[one("d/e/a")]], {"d": "/", "d/e": "/", "d/e/a": "1"}, id="missing parents are implied"),
        pytest.param([[one("./d/a"), two("/d/b"), three("d//./c")]],
                     {"d": "/", "d/a": "1", "d/b": "2", "d/c": "3"}, id="prefixes"),
        pytest.param([[one("d/x/../a")]], {"d": "/", "d/a": "1"}, id=".. inside the root"),
        pytest.param([[directory("d"), one("d/a")], [directory("d")]],
                     {"d": "/", "d/a": "1"}, id="a directory keeps its entries"),
        pytest.param([[one("d/a")], [two("d")]], {"d": "2"}, id="a file replaces a directory"),
        pytest.param([[one("d/a")], [two("d")], [three("d/b")]], None, id="an entry below a file"),
        pytest.param([[one("d/a")], [two("d")], [directory("d"), three("d/b")]], {"d": "/", "d/b": "3"}, id="and back again"),
        pytest.param([[one("d/a"), directory("e"), symlink("s", "e")], [directory("s"), two("s/b")]],
                     {"d": "/", "d/a": "1", "e": "/", "s": "/", "s/b": "2"}, id="a directory replaces a link"),
        # Whiteouts
        pytest.param([[one("a"), two("b")], [one(".wh.a")]], {"b": "2"}, id="whiteout"),
        pytest.param([[one("d/a"), two("b")], [one(".wh.d")]], {"b": "2"}, id="whiteout of a directory"),
        pytest.param([[one("a")], [one(".wh.b")], [one("d/.wh.a")]], {"a": "1"}, id="whiteout of nothing"),
        pytest.param([[one("a")], [one(".wh.a"), two("a")]], {"a": "2"}, id="whiteout before its own layer's file"),
        pytest.param([[one("a")], [two("a"), one(".wh.a")]], {"a": "2"}, id="whiteout behind its own layer's file"),
        pytest.param([[one("d/a")], [one(".wh.d"), two("d/b")]], {"d": "/", "d/b": "2"}, id="deleted and made anew"),
        pytest.param([[one("d/a")], [two("d/b"), one(".wh.d")]], {"d": "/", "d/b": "2"}, id="made anew, whiteout behind it"),
        pytest.param([[one("d/e/a"), one("d/c")], [two("d/e/b"), one(".wh.d")]],
                     {"d": "/", "d/e": "/", "d/e/b": "2"}, id="deep"),
        pytest.param([[one("d/a")], [directory("d"), one(".wh.d")]], {"d": "/"}, id="whiteout and an empty directory"),
        pytest.param([[one("a")], [one(".wh.a")], [two("a")]], {"a": "2"}, id="deleted, and there again a layer later"),
        pytest.param([[directory("d")], [one(".wh.d")]], {}, id="whiteout of an empty directory"),
        pytest.param([[one("d/a"), symlink("s", "d")], [one(".wh.s")]],
                     {"d": "/", "d/a": "1"}, id="whiteout of a link hides the link"),
        pytest.param([[one("d/a"), symlink("s", "d")], [one("s/.wh.a")]],
                     {"d": "/", "d/a": "1", "s": "-> d"}, id="whiteouts follow no link"),
        pytest.param([[one("a")], [member(".wh.a", b"not empty"), two("b")]], {"b": "2"}, id="a whiteout with content"),
        pytest.param([[one("a")], [directory(".wh.a")]], {}, id="a whiteout that is a directory"),
        # Opaque directories
        pytest.param([[one("d/a"), two("d/b")], [directory("d"), one("d/.wh..wh..opq"), three("d/c")]],
                     {"d": "/", "d/c": "3"}, id="opaque"),
        pytest.param([[one("d/a")], [three("d/c"), one("d/.wh..wh..opq")]],
                     {"d": "/", "d/c": "3"}, id="opaque behind the entries"),
        pytest.param([[one("d/a"), one("d/e/f")], [two("d/e/g"), one("d/.wh..wh..opq")]],
                     {"d": "/", "d/e": "/", "d/e/g": "2"}, id="opaque, deep"),
        pytest.param([[one("a"), one("d/b")], [one(".wh..wh..opq"), two("c")]], {"c": "2"}, id="opaque root"),
        pytest.param([[one("d/a")], [one("e/.wh..wh..opq")]], {"d": "/", "d/a": "1"}, id="opaque nothing"),
        pytest.param([[one("d/a"), symlink("s", "d")], [one("s/.wh..wh..opq")]],
                     {"d": "/", "d/a": "1", "s": "-> d"}, id="opaque follows no link"),
        pytest.param([[one("a"), one(".wh..wh.plnk"), directory(".wh..wh.aufs")]], {"a": "1"}, id="aufs' own files"),
        # Symbolic links as parents
        pytest.param([[directory("usr/lib"), symlink("lib", "usr/lib")], [one("lib/a")]],
                     {"usr": "/", "usr/lib": "/", "usr/lib/a": "1", "lib": "-> usr/lib"}, id="through a link"),
        pytest.param([[directory("usr/lib"), symlink("lib", "/usr/lib"), one("lib/x/a")]],
                     {"usr": "/", "usr/lib": "/", "usr/lib/x": "/", "usr/lib/x/a": "1", "lib": "-> /usr/lib"}, id="absolute"),
        pytest.param([[directory("d/e"), directory("f"), symlink("d/s", "../f"), symlink("t", "d/s"), one("t/a")]],
                     {"d": "/", "d/e": "/", "d/s": "-> ../f", "f": "/", "f/a": "1", "t": "-> d/s"}, id="through two links"),
        pytest.param([[directory("d"), directory("e"), symlink("d/s", "/e"), one("d/s/a")]],
                     {"d": "/", "d/s": "-> /e", "e": "/", "e/a": "1"}, id="absolute, from a directory"),
        pytest.param([[symlink("s", "nowhere")], [one("s")]], {"s": "1"}, id="a file replaces a link"),
        # Hard links
        pytest.param([[one("a"), hard_link("b", "a")], [one(".wh.a")]], {"b": "1"}, id="a link outlives its target"),
        pytest.param([[one("a"), hard_link("b", "a")], [two("a")]], {"a": "2", "b": "1"}, id="a link keeps the old content"),
        pytest.param([[hard_link("b", "a"), one("a")]], {"a": "1", "b": "1"}, id="a link before its target"),
        pytest.param([[hard_link("c", "b"), hard_link("b", "d/a"), one("d/a")]],
                     {"b": "1", "c": "1", "d": "/", "d/a": "1"}, id="links before theirs"),
        pytest.param([[hard_link("b", "a"), two("b"), one("a")]], {"a": "1", "b": "2"}, id="a link before its target, and replaced"),
        pytest.param([[two("b"), hard_link("b", "a"), one("a")]], {"a": "1", "b": "1"}, id="a link that replaces, before its target"),
        pytest.param([[two("b")], [hard_link("b", "a"), one("a")]], {"a": "1", "b": "1"}, id="and what a lower layer has"),
        pytest.param([[one("a")], [hard_link("b", "a"), two("a")]], {"a": "2", "b": "1"}, id="a link to what is there already"),
        pytest.param([[one("a")], [hard_link("d/b", "./a")]], {"a": "1", "d": "/", "d/b": "1"}, id="across layers"),
        pytest.param([[one("a"), hard_link("a", "a")]], {"a": "1"}, id="a link to itself"),
        pytest.param([[one("a"), one("d/x"), hard_link("d", "a")]], {"a": "1", "d": "1"}, id="a link replaces a directory"),
        pytest.param([[directory("u"), one("u/a"), symlink("s", "u"), hard_link("b", "s/a")]],
                     {"b": "1", "s": "-> u", "u": "/", "u/a": "1"}, id="to a target through a link"),
        pytest.param([[symlink("s", "x"), hard_link("t", "s")]], {"s": "-> x", "t": "-> x"}, id="to a symbolic link"),
        pytest.param([[member("p", kind=tarfile.FIFOTYPE), hard_link("q", "p")]],
                     {"p": "0o10000", "q": "0o10000"}, id="to a fifo"),
        pytest.param([[]], {}, id="an empty layer"),
    ],
)  # fmt: skip
def test_layers_make_this_tree(layers: list[list[Member]], expected: dict[str, str] | None) -> None:
    if expected is None:
        with pytest.raises(ContentCorrupt, match="not a directory"):
            tree_of(*(tar(*layer) for layer in layers))
    else:
        assert tree_of(*(tar(*layer) for layer in layers)) == expected


@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        ([one("../a")], LayerUnsafe, "climbs out"),
        ([one("d/../../a")], LayerUnsafe, "climbs out"),
        ([one("/../a")], LayerUnsafe, "climbs out"),
        ([directory("..")], LayerUnsafe, "climbs out"),
        ([one("../.wh.a")], LayerUnsafe, "climbs out"),
        ([one("a"), hard_link("b", "../a")], LayerUnsafe, "climbs out"),
        ([symlink("s", "../../etc"), one("s/a")], LayerUnsafe, "out of the image's root"),
        ([symlink("s", "/../etc"), one("s/a")], LayerUnsafe, "out of the image's root"),
        ([directory("d"), symlink("d/s", "../../etc"), one("d/s/a")], LayerUnsafe, "out of the image's root"),
        ([symlink("s", "/tmp/there"), one("s/a")], LayerUnsafe, "where nothing is"),
        ([directory("d"), symlink("s", "d/e"), one("s/f/a")], LayerUnsafe, "where nothing is"),
        ([directory("d"), symlink("t", "d"), symlink("s", "t/nowhere"), one("s/a")], LayerUnsafe, "where nothing is"),
        ([symlink("s", "t"), symlink("t", "s"), one("s/a")], LayerUnsafe, "symbolic links"),
        ([symlink("s", "/etc/passwd"), hard_link("b", "s/x")], LayerUnsafe, "where nothing is"),
        ([one("d/.wh.")], LayerUnsafe, "hides nothing"),
        ([one("d/.wh..")], LayerUnsafe, "hides nothing"),
        ([one("d/.wh...")], LayerUnsafe, "hides nothing"),
        ([hard_link("b", "a")], ContentCorrupt, "not there"),
        ([hard_link("b", "d/a")], ContentCorrupt, "not there"),
        ([hard_link("b", "c"), hard_link("c", "b")], ContentCorrupt, "not there"),
        ([hard_link("b", "c"), one("a"), hard_link("c", "x"), hard_link("d", "a")], ContentCorrupt, "not there"),
        ([directory("d"), hard_link("b", "d")], ContentCorrupt, "is a directory"),
        ([hard_link("b", ".")], ContentCorrupt, "is a directory"),
        ([hard_link(".", "b")], ContentCorrupt, "root"),
        ([one(".")], ContentCorrupt, "root"),
        ([one("a"), one("a/b")], ContentCorrupt, "not a directory"),
        ([one("d/" * (DEPTH_MAX + 1) + "a")], ContentCorrupt, "deep"),
    ],
)
def test_layers_that_cannot_be_or_mean_harm_are_refused(layer: list[Member], error: type[ImageError], text: str) -> None:
    with pytest.raises(error, match=text):
        tree_of(tar(directory("d"), one("d/a"), one("d/e/f")) if "hides" in text else tar(), tar(*layer))


def test_what_is_refused_has_changed_nothing_outside(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    with pytest.raises(LayerUnsafe):
        tree_of(tar(symlink("s", str(outside)), one("s/a")))
    assert not outside.exists()


def test_metadata_is_the_last_layers_and_of_hard_links_the_targets() -> None:
    old = directory("d", mode=0o2750, uid=1, gid=2, mtime=3, pax_headers={"SCHILY.xattr.user.old": "x"})
    new = directory("d/", mode=0o1777, uid=100_000, gid=2_000_000, mtime=5, pax_headers={"SCHILY.xattr.user.new": "y"})
    root = overlay(
        tar(directory("./", mode=0o700, uid=7), old, one("d/a")),
        tar(new, member("f", b"1", mode=0o4755), hard_link("g", "f", mode=0)),
    ).root
    assert (stat.S_IMODE(root.mode), root.uid) == (0o700, 7)
    found = dict(paths(root))
    d = found["d"]
    assert (d.mode, d.uid, d.gid, d.mtime_ns) == (stat.S_IFDIR | 0o1777, 100_000, 2_000_000, 5 * 10**9)
    assert d.xattrs == {b"user.new": b"y"}
    assert found["f"] is found["g"]
    assert found["f"].mode == stat.S_IFREG | 0o4755


def test_a_hidden_directory_that_its_layer_has_entries_in_has_no_old_metadata() -> None:
    root = overlay(tar(directory("d", mode=0o700, uid=9), one("d/a")), tar(one("d/b"), one(".wh.d"))).root
    d = dict(paths(root))["d"]
    assert (d.mode, d.uid) == (stat.S_IFDIR | 0o755, 0)


def test_devices_fifos_and_the_attributes_that_linux_has_are_kept() -> None:
    capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    raw = pax(b"SCHILY.xattr.security.capability=" + capability, b"SCHILY.xattr.com.apple.thing=x", b"SCHILY.xattr.user.=\n")
    layer = tar(
        member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("disk", kind=tarfile.BLKTYPE, devmajor=259, devminor=70_000),
        member("pipe", kind=tarfile.FIFOTYPE, mode=0o600),
    )
    root = overlay(layer[:-1024] + raw + tar(one("ping"))).root
    found = dict(paths(root))
    assert (found["null"].mode, found["null"].rdev) == (stat.S_IFCHR | 0o644, os.makedev(1, 3))
    assert (found["disk"].mode, found["disk"].rdev) == (stat.S_IFBLK | 0o644, os.makedev(259, 70_000))
    assert found["pipe"].mode == stat.S_IFIFO | 0o600
    assert found["ping"].xattrs == {b"security.capability": capability, b"user.": b"\n"}


# An oracle for layers without links: each layer a tree of its own, merged over what is below.
# a and b are directories, x and y files.
parents = st.lists(st.sampled_from("ab"), max_size=2)
step = st.tuples(st.sampled_from(["put", "hide", "opaque"]), parents, st.sampled_from("abxy"))


def merged(lower: dict[str, Any], upper: dict[str, Any], hidden: set[str], opaque: set[str], at: str = "") -> dict[str, Any]:
    """`lower` with one layer's changes: files are numbers, directories dicts, `hidden` and `opaque` the whiteouts' paths."""
    result = {} if at in opaque else {name: below for name, below in lower.items() if at + name not in hidden}
    for name in result.keys() | upper.keys():
        if name in "ab":
            result[name] = merged(result.get(name, {}), upper.get(name, {}), hidden, opaque, f"{at}{name}/")
        elif name in upper:
            result[name] = upper[name]
    return result


def nested(node: Node) -> Any:
    if node.children is None:
        return node.mtime_ns // 10**9
    return {os.fsdecode(name): nested(child) for name, child in node.children.items()}


@settings(max_examples=300)
@given(st.lists(st.lists(step, max_size=6), min_size=1, max_size=4))
def test_whiteouts_and_opaque_directories_do_what_a_merge_of_trees_does(layers: list[list[tuple[str, list[str], str]]]) -> None:
    expected: dict[str, Any] = {}
    tars = []
    for layer in layers:
        upper: dict[str, Any] = {}
        members, hidden, opaque = [], set(), set()
        for number, (kind, above, last) in enumerate(layer, 1):
            at = "".join(f"{parent}/" for parent in above)
            if kind == "hide":
                hidden.add(at + last)
                members.append(member(f"{at}.wh.{last}"))
            elif kind == "opaque":
                opaque.add(at)
                members.append(member(f"{at}.wh..wh..opq"))
            else:
                here = upper
                for parent in above:
                    here = here.setdefault(parent, {})
                if last in "ab":
                    here.setdefault(last, {})
                    members.append(directory(at + last))
                else:
                    here[last] = number
                    members.append(member(at + last, b"1", mtime=number))
        expected = merged(expected, upper, hidden, opaque)
        tars.append(tar(*members))
    assert nested(overlay(*tars).root) == expected


def pax(*records: bytes) -> bytes:
    """A pax header of these records (KEY=VALUE)."""
    body = b""
    for record in records:
        length = len(record) + 3
        while length != len(b"%d %s\n" % (length, record)):
            length += 1
        body += b"%d %s\n" % (length, record)
    return encode(member("PaxHeader", body, kind=tarfile.XHDTYPE))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length_and_any_bytes_are_read(format: Literal[0, 1, 2]) -> None:
    names = [b"a", b"\xff\xfe/not utf-8", "é".encode(), b"d/" + b"n" * 90, b"p" * 80 + b"/" + b"n" * 90, b" spaces \n"]
    if format != tarfile.USTAR_FORMAT:
        names += [b"l" * 255, b"d/" * 400 + b"x"]
    layer = tar(*(member(os.fsdecode(name)) for name in names), symlink("s", "t" * 90), format=format)
    found = parse(layer)
    assert [entry.name for entry in found] == [*names, b"s"]
    assert found[-1].target == b"t" * 90


def test_long_targets_are_read_in_both_dialects() -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        [link] = parse(tar(symlink("s", "t" * 4000), format=format))
        assert (link.name, link.target) == (b"s", b"t" * 4000)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"0", 0), (b"1.5", 1_500_000_000), (b"-1", -(10**9)), (b"-1.25", -1_250_000_000), (b"1.123456789", 1_123_456_789),
        (b"1.1234567899", 1_123_456_789), (b"7.", 7 * 10**9), (b"253402300800", 253402300800 * 10**9),
    ],
)  # fmt: skip
def test_times_are_exact_to_the_nanosecond_and_may_lie_before_1970(text: bytes, nanoseconds: int) -> None:
    [entry] = parse(pax(b"mtime=" + text) + tar(one("a")))
    assert entry.mtime_ns == nanoseconds


def test_numbers_beyond_octal_are_read() -> None:
    [entry] = parse(tar(member("a", uid=2**31 + 5, gid=2**32 - 2, mtime=-5), format=tarfile.GNU_FORMAT))
    assert (entry.uid, entry.gid, entry.mtime_ns) == (2**31 + 5, 2**32 - 2, -5 * 10**9)
    [entry] = parse(pax(b"uid=4000000000", b"gid=70000", b"path=") + tar(one("a")))
    assert (entry.uid, entry.gid, entry.name) == (4_000_000_000, 70_000, b"a")


def test_attributes_are_read_in_both_dialects() -> None:
    layer = pax(b"LIBARCHIVE.xattr.user.%C3%BC=AAEC/w", b"LIBARCHIVE.xattr.user.both=AA==", b"SCHILY.xattr.user.both=raw\n\0=")
    [entry] = parse(layer + tar(one("a")))
    assert entry.xattrs == {"user.ü".encode(): b"\0\x01\x02\xff", b"user.both": b"raw\n\0="}


def test_global_headers_are_passed_over_and_v7_directories_known() -> None:
    layer = encode(member("g", b"12 path=xyz\n", kind=tarfile.XGLTYPE)) + encode(member("d/", kind=tarfile.AREGTYPE))
    [entry] = parse(layer + bytes(1024))
    assert (entry.name, stat.S_ISDIR(entry.mode)) == (b"d/", True)


@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        (b"x" * 512, ContentCorrupt, "a number should be"),
        (b"x" * 100, ContentCorrupt, "ends in the middle"),
        (tar(one("a"))[:512], ContentCorrupt, "ends in the middle"),
        (tar(one("a"))[:-1000] + b"x", ContentCorrupt, "ends in the middle"),
        (bytes(512) + tar(one("a")), ContentCorrupt, "behind its end"),
        (tar(one("a"))[:100] + b"?" + tar(one("a"))[101:], ContentCorrupt, "damaged header"),
        (encode(member("x", b"11 path=a\n", kind=tarfile.XHDTYPE)) + tar(one("a")), ContentCorrupt, "damaged extended header"),
        (encode(member("x", b"pathless", kind=tarfile.XHDTYPE)) + tar(one("a")), ContentCorrupt, "damaged extended header"),
        (encode(member("x", b"7 path\n", kind=tarfile.XHDTYPE)) + tar(one("a")), ContentCorrupt, "damaged extended header"),
        (pax(b"path=a\0b") + tar(one("a")), ContentCorrupt, "zero byte"),
        (pax(b"linkpath=a\0b") + tar(symlink("a", "b")), ContentCorrupt, "zero byte"),
        (pax(b"size=-1") + tar(one("a")), ContentCorrupt, "number"),
        (pax(b"size=99999999999999999999") + tar(one("a")), ContentCorrupt, "number"),
        (pax(b"uid=1e9") + tar(one("a")), ContentCorrupt, "number"),
        (pax(b"mtime=soon") + tar(one("a")), ContentCorrupt, "time"),
        (pax(b"LIBARCHIVE.xattr.user.a=!") + tar(one("a")), ContentCorrupt, "base64"),
        (tar(member("a", kind=b"M")), Unsupported, "type 'M'"),
        (tar(member("a", kind=tarfile.CHRTYPE, devmajor=5000)), ContentCorrupt, "device"),
        (tar(member("x", b"x" * (EXTENDED_BYTES_MAX + 1), kind=tarfile.XHDTYPE)), Unsupported, "extended tar header"),
    ],
)
def test_a_tar_that_is_none_is_refused(layer: bytes, error: type[ImageError], text: str) -> None:
    with pytest.raises(error, match=text):
        parse(layer)


def test_a_tar_without_its_end_mark_ends_where_it_ends() -> None:
    for cut in (0, 100, 511):
        assert [entry.name for entry in parse(encode(one("a"))[: 1024 - cut])] == [b"a"]
    assert parse(b"") == []


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_tar_is_an_error_of_ours_or_another_tar(data: st.DataObject) -> None:
    good = bytearray(
        pax(b"path=name", b"mtime=1.5", b"SCHILY.xattr.user.a=b")
        + tar(symlink("s", "x" * 200), directory("d"), member("d/f", b"content"), format=tarfile.GNU_FORMAT)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for at in range(0, len(good), 512):  # with right checksums the damage gets further
        if good[at + 257 : at + 262] == b"ustar":
            good[at + 148 : at + 156] = b"        "
            good[at + 148 : at + 156] = b"%06o\0 " % sum(good[at : at + 512])
    with contextlib.suppress(ImageError):
        overlay(bytes(good))


members = st.builds(
    lambda name, content, mode, uid, mtime: member(name, content, mode=mode, uid=uid, mtime=mtime),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.binary(max_size=1500),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 2),
    st.integers(-(2**40), 2**40),
)  # fmt: skip


@given(st.lists(members, max_size=5), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_what_tarfile_writes_is_read_as_tarfile_reads_it(items: list[Member], format: Literal[0, 1, 2]) -> None:
    layer = tar(*items, format=format)
    with tarfile.open(fileobj=io.BytesIO(layer), errors="surrogateescape") as reader:
        expected = [(os.fsencode(i.name), i.mode, i.uid, i.mtime, i.size, i.offset_data) for i in reader]
    assert [(e.name, stat.S_IMODE(e.mode), e.uid, e.mtime_ns / 10**9, e.size, e.offset) for e in parse(layer)] == expected


# Sparse files: 3 MiB, with data at 512 Ki and at the end of the second MiB over its border.
EXTENTS = [(512 << 10, 1000), ((2 << 20) - 500, 1000)]
SPARSE_SIZE = 3 << 20
SPARSE_DATA = bytes(range(250)) * 8


def sparse_tars() -> dict[str, bytes]:
    numbers = [number for extent in EXTENTS for number in extent]
    flat = b"".join(b"%d\n" % number for number in [len(EXTENTS), *numbers])
    flat += bytes(-len(flat) % 512)
    size = b"%d" % SPARSE_SIZE
    body = tar(member("GNUSparseFile.0/f", SPARSE_DATA))
    pairs = [r for o, n in EXTENTS for r in (b"GNU.sparse.offset=%d" % o, b"GNU.sparse.numbytes=%d" % n)]
    joined = b",".join(b"%d" % number for number in numbers)
    return {
        "old": old_sparse(4),
        "old, extended": old_sparse(1),
        "0.0": pax(b"GNU.sparse.size=" + size, b"GNU.sparse.numblocks=2", *pairs) + tar(member("f", SPARSE_DATA)),
        "0.1": pax(b"GNU.sparse.size=" + size, b"GNU.sparse.name=f", b"GNU.sparse.map=" + joined) + body,
        "1.0": pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=f", b"GNU.sparse.realsize=" + size)
        + tar(member("GNUSparseFile.0/f", flat + SPARSE_DATA)),
    }


def old_sparse(in_header: int) -> bytes:
    """GNU's old format, with so many extents in the header and the rest in a record behind it."""
    header = bytearray(encode(member("f", SPARSE_DATA, kind=b"S"), tarfile.GNU_FORMAT)[:512])
    for index, (offset, length) in enumerate(EXTENTS[:in_header]):
        header[386 + 24 * index : 410 + 24 * index] = b"%011o\0%011o\0" % (offset, length)
    header[483:495] = b"%011o\0" % SPARSE_SIZE
    rest = EXTENTS[in_header:]
    extension = b""
    if rest:
        header[482] = 1
        extension = b"".join(b"%011o\0%011o\0" % extent for extent in rest).ljust(512, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + extension + SPARSE_DATA + bytes(-len(SPARSE_DATA) % 512) + bytes(1024)


@pytest.mark.parametrize("dialect", sparse_tars())
def test_sparse_files_of_every_dialect_keep_their_holes(dialect: str, tmp_path: Path) -> None:
    layer = sparse_tars()[dialect]
    with tarfile.open(fileobj=io.BytesIO(layer)) as reader:
        file = reader.extractfile("f")
        assert file is not None
        expected = file.read()
    assert len(expected) == SPARSE_SIZE
    objects = Objects(str(tmp_path))
    contents = Contents(objects)
    source = stream(layer)
    [(entry, key)] = [(entry, contents.take(source, entry, 3)) for entry in entries(source, budget())]
    source.finish()
    assert key is not None
    assert (entry.name, entry.size, entry.stored) == (b"f", SPARSE_SIZE, 2000)
    made = tmp_path / objects.path(key)
    assert made.read_bytes() == expected
    assert made.stat().st_blocks * 512 < 64 << 10
    where = msgspec.msgpack.decode(contents.rows[key].source, type=LayerContent)
    assert (where.layer, where.extents) == (3, EXTENTS)
    assert layer[where.offset :][:2000] == SPARSE_DATA
    assert where.chunks == hashlib.sha256(SPARSE_DATA).digest()
    objects.close()


def test_a_terabyte_of_hole_costs_nothing(tmp_path: Path) -> None:
    layer = pax(b"GNU.sparse.size=1099511627776", b"GNU.sparse.map=1099511627775,1") + tar(one("f"))
    objects, bounds = Objects(str(tmp_path)), Budget(10_000, 10)
    contents = Contents(objects)
    source = stream(layer, bounds=bounds)
    [key] = [contents.take(source, entry, 0) for entry in entries(source, bounds)]
    assert key is not None
    assert contents.rows[key].size_bytes == (tmp_path / objects.path(key)).stat().st_size == 1 << 40
    objects.close()


@pytest.mark.parametrize(
    "map_",
    [b"0,2", b"5,1,4,1", b"0,1,0,1", b"3145728,1", b"0", b"0,1,", b"0,-1", b"0,1,2", b"99999999999999999999,1"],
)
def test_a_sparse_map_that_cannot_be_is_refused(map_: bytes) -> None:
    with pytest.raises(ContentCorrupt):
        parse(pax(b"GNU.sparse.size=3145728", b"GNU.sparse.map=" + map_) + tar(one("f")))


def test_a_sparse_map_without_end_is_refused() -> None:
    head = pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=5")
    for flat in (b"1" * 5000, b"999999999\n" + b"1\n" * 5000, b"3\n1\n"):
        with pytest.raises((ContentCorrupt, Unsupported)):
            parse(head + tar(member("f", flat)))


@pytest.mark.parametrize(
    "size", [0, 1, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 77]
)
def test_an_object_has_the_files_content_and_its_row_says_where_in_the_layer_it_is(size: int, tmp_path: Path) -> None:
    content = bytes(index * 31 % 251 for index in range(1000)) * (size // 1000 + 1)
    content = content[:size]
    layer = tar(one("first"), member("f", content), member("g", content))
    objects = Objects(str(tmp_path))
    contents = Contents(objects)
    source = stream(layer)
    keys = [contents.take(source, entry, 1) for entry in entries(source, budget())]
    source.finish()
    objects.close()
    if not size:
        assert keys == [hashlib.sha256(b"1").hexdigest(), None, None]
        return
    key = hashlib.sha256(content).hexdigest()
    assert keys[1:] == [key, key]
    assert (tmp_path / objects.path(key)).read_bytes() == content
    row = contents.rows[key]
    where = msgspec.msgpack.decode(row.source, type=LayerContent)
    assert (row.size_bytes, where.layer, where.extents) == (size, 1, None)
    assert layer[where.offset : where.offset + size] == content
    chunks = [hashlib.sha256(content[at : at + CHUNK_BYTES]).digest() for at in range(0, size, CHUNK_BYTES)]
    assert where.chunks == (b"" if size <= CHUNK_BYTES else b"".join(chunks))


def test_nothing_partial_is_left_of_a_file_that_breaks_off(tmp_path: Path) -> None:
    layer = tar(one("whole"), member("f", bytes(3 * CHUNK_BYTES)))[: 2 * CHUNK_BYTES]
    objects = Objects(str(tmp_path))
    contents = Contents(objects)
    source = stream(layer)
    with pytest.raises(ContentCorrupt, match="ends in the middle"):
        for entry in entries(source, budget()):
            contents.take(source, entry, 0)
    objects.close()
    assert [path.read_bytes() for path in tmp_path.glob("??/*")] == [b"1"]


def unpacked(blob: bytes, pieces_of: int = 1000) -> bytes:
    return b"".join(decompress((blob[at : at + pieces_of] for at in range(0, len(blob), pieces_of)), lambda _: None))


TEXT = b"some text that is long enough to be worth compressing. " * 2000


@pytest.mark.parametrize("pieces_of", [1, 7, 1000, 1 << 20])
def test_plain_and_gzip_in_one_or_many_members_are_unpacked(pieces_of: int) -> None:
    members = b"".join(gzip.compress(TEXT[at : at + 10_000]) for at in range(0, len(TEXT), 10_000))
    for blob in (
        TEXT,
        gzip.compress(TEXT),
        members,
        gzip.compress(b"") + gzip.compress(TEXT),
        gzip.compress(TEXT) + bytes(500),
    ):
        assert unpacked(blob, pieces_of) == TEXT
    assert unpacked(b"", pieces_of) == unpacked(gzip.compress(b""), pieces_of) == b""


def test_blocks_are_bounded_however_much_a_piece_unpacks_to() -> None:
    bomb = gzip.compress(bytes(20 << 20))
    assert len(bomb) < 100_000
    sizes = [len(block) for block in decompress(iter([bomb]), lambda _: None)]
    assert (max(sizes), sum(sizes)) == (BLOCK_BYTES, 20 << 20)


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (gzip.compress(TEXT, mtime=0)[:-1], ContentCorrupt),
        (gzip.compress(TEXT, mtime=0)[:20], ContentCorrupt),
        (gzip.compress(TEXT, mtime=0)[:5], ContentCorrupt),
        (gzip.compress(TEXT, mtime=0) + b"garbage", ContentCorrupt),
        (gzip.compress(TEXT, mtime=0) + gzip.compress(TEXT, mtime=0)[:30], ContentCorrupt),
        (gzip.compress(TEXT, mtime=0)[:-8] + bytes(8), ContentCorrupt),
        (b"\x1f\x8b\x07" + bytes(100), ContentCorrupt),
        (b"\x28\xb5\x2f\xfd" + bytes(100), ContentCorrupt),
    ],
)
def test_damaged_gzip_and_zstd_are_refused(blob: bytes, error: type[ImageError]) -> None:
    with pytest.raises(error):
        unpacked(blob)


@given(st.integers(0, len(gzip.compress(TEXT, mtime=0)) - 1), st.integers(1, 255))
def test_any_damage_to_gzip_is_an_error_or_another_content(at: int, change: int) -> None:
    blob = bytearray(gzip.compress(TEXT, mtime=0))
    blob[at] ^= change
    try:
        assert unpacked(bytes(blob)) in (TEXT, bytes(blob))
    except ContentCorrupt:
        pass


def verified(data: bytes, claimed: bytes) -> bytes:
    return b"".join(Verified(iter([data[:10], data[10:]]), Descriptor(digest(claimed), len(claimed))))


def test_a_blob_is_what_its_digest_and_size_say() -> None:
    assert verified(TEXT, TEXT) == TEXT
    with pytest.raises(ContentCorrupt, match="its digest is"):
        verified(TEXT[:-1] + b"!", TEXT)
    with pytest.raises(ContentCorrupt, match="ends after"):
        verified(TEXT[:-1], TEXT)
    with pytest.raises(ContentCorrupt, match="longer"):
        verified(TEXT + b"!", TEXT)


@given(st.binary(max_size=2000), st.integers(1, 700), st.lists(st.integers(0, 900), max_size=8))
def test_a_stream_gives_the_same_bytes_whatever_the_pieces(data: bytes, pieces_of: int, reads: list[int]) -> None:
    source = stream(data, pieces_of)
    at = 0
    for size in reads:
        assert source.read(size) == data[at : at + size]
        at = min(at + size, len(data))
        assert source.offset == at
    source.finish()
    assert source.offset == len(data)


def test_a_stream_that_is_not_its_diff_id_is_refused_at_its_end() -> None:
    source = LayerStream(iter([tar(one("a"))]), digest(b"else"), budget())
    assert len(list(entries(source, budget()))) == 1
    with pytest.raises(ContentCorrupt, match="config says"):
        source.finish()


def test_the_bounds_are_absolute_and_exact() -> None:
    layer = tar(one("a"), one("d/b"))
    assert bounded(layer, len(layer), 3) == {"a", "d", "d/b"}
    with pytest.raises(OverBounds, match="bytes"):
        bounded(layer, len(layer) - 1, 3)
    with pytest.raises(OverBounds, match="entries"):
        bounded(layer, len(layer), 2)


def bounded(layer: bytes, unpacked_bytes_max: int, entries_max: int) -> set[str]:
    bounds = Budget(unpacked_bytes_max, entries_max)
    tree, source = LayeredTree(bounds), stream(layer, bounds=bounds)
    for entry in entries(source, bounds):
        tree.add(entry, None)
    source.finish()
    return {path for path, _ in paths(tree.root)}


def test_headers_that_are_nothing_but_metadata_are_bounded() -> None:
    header = pax(b"comment=" + b"x" * (EXTENDED_BYTES_MAX - 100))
    source = LayerStream((header for _ in range(1000)), "", budget())
    with pytest.raises(OverBounds, match="names and attributes"):
        list(entries(source, budget()))


def test_whiteouts_are_known_by_their_name() -> None:
    names = {
        "a": False,
        ".wh.a": True,
        "d/.wh.a": True,
        ".wh.d/a": False,
        "d/.wh..wh..opq": True,
        ".wh.a/": True,
        "a.wh.": False,
    }
    assert {name: is_whiteout(parse(tar(one(name)))[0]) for name in names} == names
