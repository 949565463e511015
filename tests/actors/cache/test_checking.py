"""Damaged objects of a real image, sparse ones too: found and fetched again from a real registry."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from actors.cache.archives import source_of
from actors.cache.checking import all_prefixes, check
from actors.image.archives.archive import Archive
from actors.image.archives.builder import Build
from actors.image.layers.content import decode_content
from actors.image.wire import BuildImage, Built
from actors.lazytree import trees
from actors.lazytree.objects import Objects
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.actors.image.layers.tables import Tabled, estargz, images, zstd_chunked
from tests.actors.image.lazy.test_source import prose, sparse_layer


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    running = RunningRegistry(tmp_path_factory.mktemp("registry"))
    yield running
    running.stop()


def test_every_sort_of_object(tmp_path: Path, registry: RunningRegistry) -> None:
    repository = registry.repository("checked")
    files = [member(f"f{number}", prose(1 + number * 40_000, number)) for number in range(30)]
    layers = [tar(*files, member("large", prose(5 << 20, 99))), sparse_layer(), tar(member("plain", prose(1 << 20, 7)))]
    repository.push(*layers, blobs=[gzip.compress(layers[0]), gzip.compress(layers[1]), layers[2]])
    check_repairs(tmp_path, repository)


@pytest.mark.parametrize("writer", [estargz, zstd_chunked])
def test_objects_of_layers_with_tables_of_contents(
    writer: Callable[..., Tabled], tmp_path: Path, registry: RunningRegistry
) -> None:
    repository = registry.repository(f"tabled-{writer.__name__}")
    layer = writer(
        *(member(f"f{number}", prose(1 + number * 40_000, number)) for number in range(9)), member("l", prose(9 << 20, 1))
    )
    repository.push(layer.tar, **images([layer]))
    # Built twice: what the archive does not bring to OBJECTS, reading the layer does.
    Build(BuildImage(repository.reference(), str(tmp_path / "whole"), str(tmp_path / "objects"))).run()
    check_repairs(tmp_path, repository, lazy=True)


def check_repairs(tmp_path: Path, repository: Repository, lazy: bool = False) -> None:
    archives = str(tmp_path / "archives")
    built = Build(BuildImage(repository.reference(), archives, str(tmp_path / "objects"), lazy=lazy)).run()
    assert isinstance(built, Built)
    archive = Archive.open(built.archive)
    with closing(Objects(str(tmp_path / "objects"))) as objects, closing(archive.objects()) as table:
        tree = archive.info.digest.replace(":", "-")
        trees.record(objects.descriptor, tree, source_of(archive), table.keys())
        rows = [table.row(index) for index in range(len(table))]
        report = check(objects, archives, all_prefixes(), "")
        assert (report.checked, report.damaged) == (len(rows), 0)

        expected = {row.key: (tmp_path / "objects" / Objects.path(row.key)).read_bytes() for row in rows}
        for row in rows:
            extents = decode_content(row).extents
            at = extents[0][0] if extents else row.size_bytes // 2
            file = os.open(Objects.path(row.key), os.O_WRONLY, dir_fd=objects.descriptor)
            os.pwrite(file, bytes([expected[row.key][at] ^ 1]), at)
            os.close(file)
        assert lazy != any(decode_content(row).extents for row in rows)
        report = check(objects, archives, all_prefixes(), "")
        assert (report.checked, report.damaged, report.repaired) == (len(rows), len(rows), len(rows)), report.texts
        for row in rows:
            path = tmp_path / "objects" / Objects.path(row.key)
            assert path.read_bytes() == expected[row.key] and path.stat().st_mode & 0o7777 == 0o444
        assert check(objects, archives, all_prefixes(), "").damaged == 0
