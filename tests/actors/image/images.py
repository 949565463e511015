"""Images made by hand: tars, gzip, configs, manifests, and a registry to push them to over HTTP."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import urllib3

Member = tuple[tarfile.TarInfo, bytes]
OCI = "application/vnd.oci.image"
PUSH_TIMEOUT_S = 300.0  # for each answer: a registry on a slow disk takes its time, and urllib3 has but 3 s for it by itself


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> Member:
    """A tar member: mode 0644, or 0755 for a directory, of 0:0, at time 0, unless `fields` say something else."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def directory(name: str, **fields: Any) -> Member:
    return member(name, kind=tarfile.DIRTYPE, **fields)


def symlink(name: str, target: str, **fields: Any) -> Member:
    return member(name, kind=tarfile.SYMTYPE, linkname=target, **fields)


def hard_link(name: str, target: str, **fields: Any) -> Member:
    return member(name, kind=tarfile.LNKTYPE, linkname=target, **fields)


def tar(*members: Member, format: Literal[0, 1, 2] = tarfile.PAX_FORMAT) -> bytes:
    """A tar of the members, with its end mark."""
    body = b"".join(encode(item, format) for item in members)
    return body + bytes(1024)


def encode(item: Member, format: Literal[0, 1, 2] = tarfile.PAX_FORMAT) -> bytes:
    """One member: its headers, and its content padded to whole records.  Names that are not UTF-8 are surrogate-escaped."""
    info, content = item
    return info.tobuf(format, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Repository:
    """A repository of a running registry, and what a test does to it."""

    def __init__(self, registry: RunningRegistry, name: str) -> None:
        self.registry = registry
        self.name = name
        self.url = f"http://{registry.address}/v2/{name}"

    def reference(self, tag: str = "latest") -> str:
        return f"{self.registry.address}/{self.name}:{tag}"

    def push_blob(self, data: bytes) -> dict[str, Any]:
        """Its descriptor, without a media type."""
        place = urllib3.request("POST", f"{self.url}/blobs/uploads/", timeout=PUSH_TIMEOUT_S).headers["Location"]
        answer = urllib3.request("PUT", f"{place}&digest={digest(data)}", body=data, timeout=PUSH_TIMEOUT_S)
        assert answer.status == 201, answer.data
        return {"digest": digest(data), "size": len(data)}

    def push_document(self, document: dict[str, Any], name: str) -> dict[str, Any]:
        """Its descriptor."""
        body = json.dumps(document).encode()
        kind = document["mediaType"]
        answer = urllib3.request(
            "PUT", f"{self.url}/manifests/{name}", body=body, headers={"Content-Type": kind}, timeout=PUSH_TIMEOUT_S
        )
        assert answer.status == 201, answer.data
        return {"digest": digest(body), "size": len(body), "mediaType": kind}

    def push(
        self,
        *layers: bytes,
        tag: str = "latest",
        blobs: Sequence[bytes] | None = None,
        diff_ids: Sequence[str] | None = None,
        process: dict[str, Any] | None = None,
        media_type: str = f"{OCI}.layer.v1.tar+gzip",
        architecture: str | None = None,
        annotations: Sequence[dict[str, str]] = (),
    ) -> dict[str, Any]:
        """Push an image of these tars, gzipped unless `blobs` are given in their place; returns the manifest's descriptor.

        `annotations`: of its layers.
        """
        config = {
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids or map(digest, layers))},
            "config": process or {},
        }
        if architecture:
            config["architecture"] = architecture
        packed = [gzip.compress(layer, 1, mtime=0) for layer in layers] if blobs is None else blobs
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.push_blob(json.dumps(config).encode()) | {"mediaType": f"{OCI}.config.v1+json"},
            "layers": [self.push_blob(blob) | {"mediaType": media_type} for blob in packed],
        }
        for layer, noted in zip(manifest["layers"], annotations, strict=False):
            layer["annotations"] = noted
        return self.push_document(manifest, tag)

    def blob_file(self, of: str) -> Path:
        """The file in which the registry keeps a blob or manifest."""
        hexadecimal = of.removeprefix("sha256:")
        return self.registry.storage / f"docker/registry/v2/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"


class RunningRegistry:
    """Debian's docker-registry on a free loopback port, its storage below `home`."""

    def __init__(self, home: Path, extra: str = "") -> None:
        self.storage = home / "storage"
        config = home / "registry.yml"
        config.write_text(
            f"""version: 0.1
log: {{level: info, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {self.storage}}}}}
http: {{addr: "127.0.0.1:0"}}
{extra}"""
        )
        self._process = subprocess.Popen(["docker-registry", "serve", str(config)], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        for line in self._process.stderr:
            if "listening on" in line:
                self.address = line.partition("listening on ")[2].split('"')[0].split(",")[0].strip()
                break
        else:
            raise RuntimeError("docker-registry does not start")
        # It blocks when nobody reads its log.
        self._reader = threading.Thread(target=self._process.stderr.read)
        self._reader.start()

    def repository(self, name: str) -> Repository:
        return Repository(self, name)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._reader.join(60)
        assert self._process.stderr
        self._process.stderr.close()
