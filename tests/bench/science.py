"""The image of the cold start's bench: Debian minbase, python3 and numpy in three gzip layers, kept in the bench's cache."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

from actors.lazytree.mounts import bind, mount_overlay, unmount
from tests.actors.image.images import Repository
from tests.bench.site import CACHE, Site

PACKAGES = ("python3", "python3-numpy")  # each a layer, on top of minbase
LEFT_OUT = ("var/cache/apt", "var/lib/apt/lists")  # as in every image: packages and lists that nobody needs any more
PROCESS = {"Env": ["PATH=/usr/bin:/bin"]}


def push(site: Site) -> Repository:
    """The image, in the site's registry, tag `1`."""
    repository = site.registry.repository("science")
    home = CACHE / "science"
    if not home.exists():
        _make(site, home)
    diff_ids = json.loads((home / "diff_ids").read_text())
    blobs = [(home / str(number)).read_bytes() for number in range(len(diff_ids))]
    repository.push(blobs=blobs, diff_ids=diff_ids, tag="1", process=PROCESS)
    return repository


def _make(site: Site, home: Path) -> None:
    work = home.with_name("science.unfinished")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    diff_ids = [_pack(site.debian, work / "0")]
    lower = [str(site.debian)]
    for number, package in enumerate(PACKAGES, 1):
        site.say(f"installing {package} (kept for the next run)")
        upper = work / f"{number}.upper"
        upper.mkdir(mode=0o755)
        (work / "scratch").mkdir(exist_ok=True)
        root = work / "root"
        root.mkdir(exist_ok=True)
        mount_overlay(str(root), lower, upper=str(upper), work=str(work / "scratch"))
        try:
            _install(root, package)
        finally:
            unmount(str(root), lazily=True)
        diff_ids.append(_pack(upper, work / str(number)))
        lower.insert(0, str(upper))
    for path in (*work.glob("*.upper"), work / "root", work / "scratch"):
        shutil.rmtree(path)
    (work / "diff_ids").write_text(json.dumps(diff_ids))
    work.rename(home)


def _install(root: Path, package: str) -> None:
    """Install a package as this host installs its own: by the same mirror, with the same configuration of apt."""
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    for path in Path("/etc/apt/apt.conf.d").iterdir():
        if "Acquire::" in path.read_text():
            shutil.copy(path, root / path.relative_to("/"))
    (root / "proc").mkdir(exist_ok=True)
    bind("/proc", str(root / "proc"))
    try:
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-q", "-y", "--no-install-recommends", package]):
            subprocess.run(
                ["chroot", str(root), *command],
                check=True,
                stdout=subprocess.DEVNULL,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            )
    finally:
        unmount(str(root / "proc"), lazily=True)


def _pack(directory: Path, blob: Path) -> str:
    """Write the directory, an overlay's upper perhaps, as a layer; returns its diff_id."""
    plain = blob.with_suffix(".tar")
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as tar:
        for parent, directories, files in os.walk(directory):
            directories[:] = sorted(
                name for name in directories if str(Path(parent, name).relative_to(directory)) not in LEFT_OUT
            )
            for name in sorted(directories + files):
                path = Path(parent, name)
                inside = path.relative_to(directory)
                status = path.lstat()
                if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                    tar.addfile(tarfile.TarInfo(str(inside.with_name(f".wh.{name}"))))
                else:
                    tar.add(path, str(inside), recursive=False)
    diff_id = hashlib.sha256()
    with open(plain, "rb") as source, open(blob, "wb") as target, gzip.GzipFile("", "wb", 6, target, 0) as packed:
        while piece := source.read(1 << 20):
            diff_id.update(piece)
            packed.write(piece)
    plain.unlink()
    return f"sha256:{diff_id.hexdigest()}"
