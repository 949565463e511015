"""A real S3 server as a process of its own: moto's, which speaks S3's conditional writes, or versitygw where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

from actors.image.wire import Bucket

SERVERS = ["moto", *(["versitygw"] if shutil.which("versitygw") else [])]
# Each request by itself: between looking whether a condition (If-None-Match, If-Match) holds and putting what it allows, moto's threads
# take turns, and of two nodes at once each was told that the lease is its own.  S3 does no such thing.
MOTO = """
import contextlib, io, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication as Application
from moto.server import main

lock, answer = threading.Lock(), Application.__call__

def answer_alone(self, environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # whose sender may hang
    with lock, contextlib.closing(answer(self, environ | {"wsgi.input": io.BytesIO(body)}, start_response)) as answered:
        return list(answered)

Application.__call__ = answer_alone
main(["-H", "127.0.0.1", "-p", "0"])
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_EC2_METADATA_DISABLED": "true"}


class RunningS3:
    """One server on a free loopback port, its storage (if it has any) below `home`."""

    def __init__(self, home: Path, server: str = "moto") -> None:
        if server == "moto":
            command = [sys.executable, "-W", "ignore", "-c", MOTO]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.address = "{}:{}".format(*free.getsockname())
            (home / "storage").mkdir()
            command = [
                "versitygw",
                "--access",
                "test",
                "--secret",
                "testtest",
                "--port",
                self.address,
                "posix",
                str(home / "storage"),
            ]
        self._log = open(home / "s3.log", "wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env={**os.environ, **CREDENTIALS})
        deadline = time.monotonic() + 180  # it loads much
        if server == "moto":
            while not (said := re.search(r"http://([\d.]+:\d+)\s", (home / "s3.log").read_text())):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((home / "s3.log").read_text())
                time.sleep(0.05)
            self.address = said[1]
        self.client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=f"http://{self.address}",
            region_name="us-east-1",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            config=botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )
        while True:
            try:
                self.client.list_buckets()
                return
            except botocore.exceptions.BotoCoreError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((home / "s3.log").read_text()) from None
                time.sleep(0.05)

    def bucket(self, name: str, through: str | None = None) -> Bucket:
        """A new bucket, as nodes are told of it; they reach it `through` this address, if given."""
        self.client.create_bucket(Bucket=name)
        return Bucket(name, "fleet", f"http://{through or self.address}", "us-east-1")

    def keys(self, bucket: Bucket) -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=bucket.name).get("Contents", [])]

    def read(self, bucket: Bucket, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())

    def write(self, bucket: Bucket, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=bucket.name, Key=key, Body=body)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()
        self.client.close()
