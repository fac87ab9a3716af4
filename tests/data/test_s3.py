"""Prepared data on an object store: a real S3 API server on loopback, over a connection that can be cut."""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import threading

import boto3
import cv2
import numpy as np
import pytest

from deit_ray import storage
from deit_ray.commands.show import show
from deit_ray.data import claim as claim_module
from deit_ray.data import shards
from deit_ray.data.check import check
from deit_ray.data.claim import CLAIM, LOCK, claimed
from deit_ray.data.prepare import prepare
from deit_ray.errors import UnavailableError, UserError
from tests.data.test_inputs import CASES as FOLDERS
from tests.data.test_prepare import contents, write_source
from tests.data.test_tar_inputs import CASES as TARS
from tests.support.servers import s3_environment
from tests.support.sources import write_classes

BUCKET = "s3://images"


class Line:
    """Forwards connections to a port.

    After `left` bytes from clients it forwards nothing more, even in the middle of a request.
    """

    def __init__(self, to: int):
        self.to, self.left = to, None
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: int | None) -> None:
        self.left = count

    def _accept(self) -> None:
        while True:
            client, _ = self.server.accept()
            if self.left is not None and self.left <= 0:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.to))
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):  # one end has hung up
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if source is client and self.left is not None:
                        self.left -= len(data)
                        if self.left <= 0:
                            _reset(client, server)
                            return
                    if not data:
                        return
                    (server if source is client else client).sendall(data)


def _reset(*ends: socket.socket) -> None:
    """Resets connections when they are closed, instead of ending them in order.

    At an orderly end within a request, werkzeug's development server, which moto runs on, tells Python that
    it has read more bytes than there are, and Python then reads beyond its buffer.
    """
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture
def line(s3_server, monkeypatch):
    """A connection to an empty bucket; pyarrow uses it."""
    line = Line(s3_server.port)
    for name, value in s3_environment(line.port).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_server.port}")
    client.create_bucket(Bucket="images")
    line.client = client
    yield line
    for entry in client.list_objects_v2(Bucket="images").get("Contents", []):
        client.delete_object(Bucket="images", Key=entry["Key"])


def test_prepared_on_s3_is_what_is_prepared_on_a_disk(line, tmp_path):
    source = write_source(tmp_path / "source", 150)
    local = prepare(source, str(tmp_path / "out"), shard_images=64).manifest
    assert prepare(source, f"{BUCKET}/set", shard_images=64).manifest == local
    assert storage.list_names(f"{BUCKET}/set") == sorted(
        [shards.MANIFEST, *(s.file for found in local.splits.values() for s in found)]
    )
    for name, content in contents(tmp_path / "out").items():
        assert storage.read_bytes(f"{BUCKET}/set/{name}") == content
    checked = check(f"{BUCKET}/set")
    assert (checked.images, checked.problems) == (160, [])
    show(f"{BUCKET}/set", f"{BUCKET}/sheet.png", samples=2)
    assert storage.read_bytes(f"{BUCKET}/sheet.png").startswith(b"\x89PNG")


def test_a_source_on_s3(line, tmp_path):
    local = prepare(write_source(tmp_path / "source", 12), str(tmp_path / "out")).manifest
    for path in (tmp_path / "source").rglob("*.jpg"):
        line.client.upload_file(str(path), "images", f"source/{path.relative_to(tmp_path / 'source')}")
    assert prepare(f"{BUCKET}/source", str(tmp_path / "again")).manifest == local


def test_an_upload_that_is_cut_leaves_no_shard_and_the_next_call_resumes(line, tmp_path, thorough):
    """The parts of a shard of 12 MB have arrived; then the shard's own upload is cut half-way."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 95), ("test", 2)):
        for i in range(count):
            path = tmp_path / "source" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(
                str(path),
                noise.integers(0, 256, (320, 320, 3), dtype=np.uint8),
                [cv2.IMWRITE_JPEG_QUALITY, 97],
            )
    source, out = str(tmp_path / "source"), f"{BUCKET}/cut"
    local = prepare(source, str(tmp_path / "out"), short_side=0).manifest
    size = local.splits["train"][0].bytes
    assert size > 12_000_000
    line.cut_after(size + size // 2)
    with pytest.raises(UnavailableError, match=f"^{out}/train-00000.parquet: cannot be written"):
        prepare(source, out, short_side=0)
    line.cut_after(None)
    assert [name for name in storage.list_names(out) if not CLAIM.fullmatch(name)] == [".parts"]
    assert storage.list_names(f"{out}/.parts") == ["plan.json", "test-00000.arrow", "train-00000.arrow"]
    assert prepare(source, out, short_side=0).manifest == local
    assert (
        storage.read_bytes(f"{out}/train-00000.parquet")
        == (tmp_path / "out" / "train-00000.parquet").read_bytes()
    )
    assert {".parts", LOCK}.isdisjoint(name[: len(LOCK)] for name in storage.list_names(out))


def upload(line, folder, prefix: str) -> None:
    """Copies the files below a folder to the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            line.client.upload_file(str(path), "images", f"{prefix}/{path.relative_to(folder)}")


def objects(line) -> dict[str, bytes]:
    """The objects in the bucket, without those that stand for folders."""
    listed = line.client.list_objects_v2(Bucket="images").get("Contents", [])
    keys = [entry["Key"] for entry in listed if not entry["Key"].endswith("/")]
    return {key: line.client.get_object(Bucket="images", Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize(
    ("given", "out", "says"),
    [
        ("/data", f"{BUCKET}/mine", "is not empty, and holds no data set of deit-ray but notes.txt"),
        ("/data", f"{BUCKET}/other", "manifest.json there was not written by this version of deit-ray"),
        ("/data", f"{BUCKET}/mine/notes.txt", "is a file; --out must be a folder"),
        (f"{BUCKET}/data", f"{BUCKET}/data/", "is SOURCE"),
        (f"{BUCKET}/data/", f"{BUCKET}/data/out", "is inside SOURCE"),
        (f"{BUCKET}/data/cat", f"{BUCKET}/data", "holds SOURCE"),
    ],
)
def test_no_object_of_a_person_is_lost(line, tmp_path, given, out, says):
    write_classes(tmp_path / "data", {"cat": 5, "dog": 5})
    upload(line, tmp_path / "data", "data")
    for key, content in {"mine/notes.txt": b"mine", "other/manifest.json": b"[]"}.items():
        line.client.put_object(Bucket="images", Key=key, Body=content)
    before = objects(line)
    with pytest.raises(UserError, match=f"^--out {out.rstrip('/')}: {says}"):
        prepare(f"{tmp_path}/data" if given == "/data" else given, out)
    assert objects(line) == before


CASES = FOLDERS | TARS
SAME = ("leftovers", "flat_test", "tiny_imagenet", "images_without_a_suffix", "tar_of_links_and_more")


@pytest.mark.parametrize("name", SAME)
def test_a_source_on_s3_is_read_as_on_a_disk(line, tmp_path, name):
    (tmp_path / "source").mkdir()
    CASES[name].make(tmp_path / "source")
    upload(line, tmp_path / "source", "source")
    local = prepare(str(tmp_path / "source"), str(tmp_path / "out"))
    there = prepare(f"{BUCKET}/source", f"{BUCKET}/out")
    assert (there.manifest, there.recognised) == (local.manifest, local.recognised)
    if name != "leftovers":  # there are no folders, so each file is counted by itself
        assert there.notes == local.notes
    assert [note.partition(":")[0] for note in there.notes] == [n.partition(":")[0] for n in local.notes]


def test_tars_on_s3_are_refused_as_on_a_disk(line, tmp_path):
    for name in ("tar_damaged_header", "tar_cut_in_an_image", "tar_key_twice", "tar_compressed"):
        (tmp_path / name).mkdir()
        CASES[name].make(tmp_path / name)
        upload(line, tmp_path / name, name)
        messages = []
        for place in (f"{tmp_path}/{name}", f"{BUCKET}/{name}"):
            with pytest.raises(UserError) as caught:
                prepare(place, f"{BUCKET}/out")
            messages.append(str(caught.value).replace(place, ""))
        assert messages[0] == messages[1]
    assert not storage.exists(f"{BUCKET}/out")


def test_one_preparation_at_a_time_writes_a_bucket(line, tmp_path, monkeypatch):
    write_classes(tmp_path / "data", {"cat": 5, "dog": 5})
    out = f"{BUCKET}/out"
    monkeypatch.setattr(claim_module, "PAUSE_S", (0.0, 0.1))
    with claimed(out):
        with pytest.raises(
            UserError, match=rf"another data prepare \(process {os.getpid()} on .*\) writes there"
        ):
            prepare(str(tmp_path / "data"), out)
        (name,) = storage.list_names(out)
        claim = storage.read_bytes(f"{out}/{name}")
    assert storage.list_names(out) == []

    def leave(change: dict) -> None:
        """Leaves a claim as a kill does."""
        left = json.dumps(json.loads(claim) | {"since": 0.0} | change).encode()
        storage.write_bytes(f"{out}/{name}", left)

    ended = subprocess.Popen(["true"])
    ended.wait()
    leave({"pid": ended.pid})
    with claimed(out):
        assert name not in storage.list_names(out)
    leave({"host": "elsewhere"})
    with pytest.raises(UserError, match="on elsewhere"), claimed(out):
        pass
    monkeypatch.setattr(claim_module, "LEASE_S", -1.0)
    with claimed(out) as check_claim:
        assert name not in storage.list_names(out)
        with pytest.raises(UnavailableError, match="could not be reached"):
            check_claim()
