"""Bytes that a node fetches which has an image's archive and none of its content; by a counting proxy before the registry."""

from __future__ import annotations

from collections.abc import Iterator

from isal import igzip

from tests.actors.image.images import directory, member, tar
from tests.actors.image.proxy import Proxy
from tests.bench.site import Site
from tests.bench.table import Row, within
from tests.node.conftest import busybox_layer
from tests.node.test_lazy_images import BLOBS, FILES, LARGE_MIB, content

MB = 1e6


def rows(site: Site) -> Iterator[Row]:
    site.say("an image of 200 MB")
    small = tar(directory("data"), *(member(f"data/{number}", content(number), mode=0o755) for number in range(FILES)))
    large = tar(member("large", b"".join(content(1000 + number) for number in range(LARGE_MIB))))
    layers = [busybox_layer(), small, large]
    blobs = [igzip.compress(layer, 1, mtime=0) for layer in layers]
    with Proxy(site.registry.address) as proxy:
        site.registry.repository("big").push(*layers, tag="1", blobs=blobs, process={"Env": ["PATH=/bin"]})
        image = f"{proxy.address}/big:1"
        archives = site.archived(image)
        for work, script, bound_mb in (
            ("lazy image of 200 MB: moved for 1 % of it", "cat /data/7 /data/42", sum(map(len, blobs)) / 10 / MB),
            ("lazy image: moved for 64 KiB in the middle of 100 MB", "dd if=/large bs=64k skip=800 count=1", 6),
        ):
            daemon = site.new_daemon(image, AERIE_IMAGE_ARCHIVE_DIR=archives)
            proxy.forget()
            result = daemon.run(script)
            if result.exit_code != 0:
                raise RuntimeError(result)
            yield within(work, proxy.body_bytes(BLOBS) / MB, round(bound_mb, 1), "MB")
