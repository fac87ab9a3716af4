"""Files on a local disk or an object store (pyarrow.fs): one way to name, read and write them.

A local file is read without pyarrow, whose import would delay every message. Conditional writes, which
pyarrow does not have, use boto3 (`pip install 'deit-ray[s3]'`). No other file imports it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import importlib.util
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from deit_ray.errors import UnavailableError, UserError, explain_os_error, first_line

if TYPE_CHECKING:
    from pyarrow import fs

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # of file systems without hard links
S3_URI = re.compile(r"s3://([a-zA-Z0-9._-]+)(/[a-zA-Z0-9._~!$&'()*+,;=:@%/-]*)?(?:\?(.*))?")
LOCAL_SCHEMES = ("", "file")
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # between the tries of a conditional write
READS = 5  # tries of another request of boto3
TIMEOUT_S = 10


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI (a path, file://, s3:// or gs://), and the path on that file system.

    Raises:
        UserError: the URI cannot be opened.
        UnavailableError: the file system cannot be reached.
    """
    import pyarrow as pa
    from pyarrow import fs

    if is_local(uri):
        return fs.LocalFileSystem(), local_path(uri)
    try:
        if found := S3_URI.fullmatch(uri):
            bucket, path, options = found.groups(default="")
            return _open_bucket(bucket, options, _environment()), (bucket + unquote(path)).rstrip("/")
        return fs.FileSystem.from_uri(uri)
    except OSError as error:  # for s3://, pyarrow asks for the bucket's region
        raise UnavailableError(f"{uri}: cannot be reached: {error}") from error
    except (pa.ArrowInvalid, ValueError) as error:
        raise UserError(
            f"{uri}: cannot be opened; allowed are a path, file://, s3:// and gs:// ({error})"
        ) from None


@functools.lru_cache(maxsize=8)
def _open_bucket(bucket: str, options: str, environment: tuple) -> fs.FileSystem:
    """A bucket's file system, which takes 10 ms to make. It writes small files with one request."""
    from pyarrow import fs

    return fs.FileSystem.from_uri(f"s3://{bucket}?{options}&allow_delayed_open=true".replace("?&", "?"))[0]


def _environment() -> tuple:
    """What the file systems and clients of S3 read of the environment, by which they are cached."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def is_local(uri: str) -> bool:
    return uri.partition("://")[0] in LOCAL_SCHEMES if "://" in uri else True


def local_path(uri: str) -> str:
    """The absolute local path of a path or a file:// URI."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def absolute(uri: str) -> str:
    """The URI in a form that does not depend on the working directory of a process."""
    return local_path(uri) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """The URI of an entry of a folder; options such as ?endpoint_override=HOST stay at its end."""
    folder, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([folder.rstrip("/"), *parts]) + mark + options


def bucket_of(uri: str) -> str:
    """The URI of the whole bucket, for a URI of an object store."""
    place, mark, options = uri.partition("?")
    return "/".join(place.split("/")[:3]) + mark + options


def read_bytes(uri: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file; what its path names as a folder may be a file.
        UnavailableError: the file cannot be read or reached.
    """
    if is_local(uri):
        with naming(uri, "read"):
            try:
                return Path(local_path(uri)).read_bytes()
            except NotADirectoryError:
                raise FileNotFoundError(uri) from None
    filesystem, path = open_uri(uri)
    with naming(uri, "read"), filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file. The file is then whole or absent: a disk renames it, an object store promises it.

    Raises:
        UnavailableError: the disk is full, or the place cannot be written or reached.
    """
    with naming(uri, "written"):
        if is_local(uri):
            with _partial(uri, content) as partial:
                os.rename(partial, local_path(uri))
        else:
            _upload(uri, content)


def copy(source: str, target: str) -> None:
    """Copies a file within a disk or an object store, as `write_bytes` writes it. An object store copies by
    itself: the content does not come here.

    Raises:
        FileNotFoundError, UnavailableError: as for `read_bytes` and `write_bytes`.
    """
    if is_local(source):
        write_bytes(target, read_bytes(source))
        return
    filesystem, path = open_uri(source)
    with naming(target, "written"):
        filesystem.copy_file(path, open_uri(target)[1])


def create_bytes(uri: str, content: bytes) -> None:
    """Writes a file as `write_bytes` does, but never over an existing file.

    If two processes write at once, exactly one succeeds on a local disk with hard links and, with boto3, on
    S3. Elsewhere both can.

    Raises:
        FileExistsError: the file exists.
        UnavailableError: as for `write_bytes`.
    """
    with naming(uri, "written"):
        if is_local(uri):
            if exists(uri):  # without writing first; `_link` decides between two processes
                raise FileExistsError(uri)
            with _partial(uri, content) as partial:
                _link(partial, local_path(uri))
        elif not _create_object(uri, content):
            if exists(uri):
                raise FileExistsError(uri)
            _upload(uri, content)


def fetch(uri: str) -> str:
    """The local path of a file: the given one, or that of a copy that goes when the process ends."""
    if is_local(uri):
        return uri.removeprefix("file://")
    folder = tempfile.mkdtemp(prefix="deit_ray-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, posixpath.basename(uri.partition("?")[0]))
    path.write_bytes(read_bytes(uri))
    return str(path)


@contextlib.contextmanager
def naming(uri: str, what: str) -> Iterator[None]:
    """Names the failed place in one message: it cannot be `what`, such as "written". That a file exists or is
    missing is an answer, not a failure."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        reason = explain_os_error(OSError(error.errno, error.strerror or str(error)))
        raise UnavailableError(f"{uri}: cannot be {what}: {reason}") from error


@contextlib.contextmanager
def _partial(uri: str, content: bytes) -> Iterator[Path]:
    """A file next to the target, with the target's content, flushed to the disk; deleted afterwards."""
    path = Path(local_path(uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: str) -> None:
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.exists(path):
            raise FileExistsError(path) from None
        os.rename(partial, path)


def _upload(uri: str, content: bytes) -> None:
    filesystem, path = open_uri(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def _create_object(uri: str, content: bytes) -> bool:
    """Writes an object that must not exist; False if that is not possible there."""
    if not uri.startswith("s3://") or importlib.util.find_spec("boto3") is None:
        return False
    try:
        write_version(uri, content, None)
    except ChangedError:
        raise FileExistsError(uri) from None
    except NoConditionsError:
        return False
    return True


def set_aside(uri: str, word: str) -> str:
    """Renames a file to NAME.WORD-1, or the next number that is free; returns the new name."""
    folder, _, name = uri.partition("?")[0].rpartition("/")
    existing = list_names(folder + uri[len(folder) + 1 + len(name) :])
    new = next(f"{name}.{word}-{n}" for n in range(1, 1 << 30) if f"{name}.{word}-{n}" not in existing)
    filesystem, path = open_uri(uri)
    filesystem.move(path, path.removesuffix(name) + new)
    return new


def check_writable(key: str, uri: str) -> None:
    """Refuses a local folder in which nothing can be written, or that cannot be made.

    Args:
        key: the setting that names the folder, for the message.
        uri: the folder; on an object store nothing is checked.

    Raises:
        UserError: naming the key and the folder.
    """
    if not is_local(uri):
        return
    folder = Path(local_path(uri))
    found = next(place for place in (folder, *folder.parents) if place.exists())
    if not found.is_dir():
        raise UserError(f"{key}: {uri}: {found} is a file; name a folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {uri}: {found} cannot be written; allow it, or name another folder")


def remove(uri: str) -> None:
    """Deletes a file, if it exists."""
    if is_local(uri):
        with naming(uri, "deleted"):
            Path(local_path(uri)).unlink(missing_ok=True)
    elif exists(uri):
        filesystem, path = open_uri(uri)
        filesystem.delete_file(path)


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""
    if is_local(uri):
        with naming(uri, "read"):
            try:
                os.stat(local_path(uri))  # os.path.exists would hide that it cannot be looked at
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True
    from pyarrow import fs

    filesystem, path = open_uri(uri)
    with naming(uri, "read"):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


def modified_ns(uri: str) -> int | None:
    """When a file was last written, in ns since 1970; None if there is no file."""
    filesystem, path = open_uri(uri)
    return filesystem.get_file_info(path).mtime_ns


def list_names(uri: str) -> list[str]:
    """The names of a folder's entries, sorted; an empty list if there is no folder."""
    if is_local(uri):  # pyarrow fails at names that are not UTF-8
        with naming(uri, "read"), contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(local_path(uri)))
        return []
    from pyarrow import fs

    filesystem, path = open_uri(uri)
    with naming(uri, "read"):
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in found)


class ChangedError(Exception):
    """A conditional write found another version of the object than the expected one."""


class NoConditionsError(UserError):
    """A store has no conditional writes."""

    def __init__(self, place: str):
        super().__init__(
            f"{place}: the store has no conditional writes (If-None-Match and If-Match), so two drivers "
            "could write one study there; use another store, such as AWS S3, or a shared file system"
        )


@dataclass(frozen=True)
class Version:
    """A version of an object: its bytes, the tag that identifies them, and its age by the store's clock."""

    content: bytes
    tag: str
    age_s: float


def check_boto3(place: str) -> None:
    """Refuses a study on an object store without boto3. Raises UserError, which names the place."""
    if importlib.util.find_spec("boto3") is None:
        raise UserError(f"{place}: a study there needs boto3: pip install 'deit-ray[s3]'")


def check_conditions(key: str, uri: str) -> None:
    """Refuses a folder where no object can be written on a condition. For a look it writes two objects.

    Args:
        key: the setting that names the folder, for the message.

    Raises:
        UserError: naming the key, the folder, and what to use instead.
        UnavailableError: the store cannot be reached, or the folder cannot be written.
    """
    if not uri.startswith("s3://"):
        raise UserError(
            f"{key}: {uri}: cannot hold a study; use s3://BUCKET/PATH, a local path or a shared file system"
        )
    if "?" in uri:
        raise UserError(
            f"{key}: {uri}: cannot hold a study, since options follow the path; leave them out, and name the "
            "server with AWS_ENDPOINT_URL"
        )
    check_boto3(f"{key}: {uri}")
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        write_version(probe, b"probe", None)
        is_able = not any([_accepts(probe, None), _accepts(probe, f'"{uuid.uuid4().hex}"')])
        _client(probe, READS).delete_object(**_place(probe))  # pyarrow would leave an object for the folder
    except NoConditionsError:
        is_able = False
    if not is_able:
        raise NoConditionsError(f"{key}: {uri}")


def _accepts(uri: str, wrong: str | None) -> bool:
    """Whether a store accepts a write on a condition that does not hold."""
    try:
        write_version(uri, uuid.uuid4().hex.encode(), wrong)
    except ChangedError:
        return False
    return True


def read_version(uri: str) -> Version | None:
    """An object's present version; None if there is no object. Raises UnavailableError."""
    client = _client(uri, READS)
    try:
        found = client.get_object(**_place(uri))
        content = found["Body"].read()
    except _failures() as error:
        if _code(error) == "NoSuchKey":
            return None
        raise UnavailableError(f"{uri}: cannot be read: {_reason(error)}") from error
    now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
    return Version(content, found["ETag"], (now - found["LastModified"]).total_seconds())


def write_version(uri: str, content: bytes, expected: str | None) -> str:
    """Writes an object if its present version is the expected one; returns the new version's tag.

    If the answer to a request is lost, the object is read before the request is repeated: it is this write's
    if it has its content.

    Args:
        expected: tag of the expected version; None if there must be no object.

    Raises:
        ChangedError: there is another version.
        UnavailableError: the object cannot be written or reached.
        NoConditionsError: the store says that it has no conditional writes.
    """
    condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
    client, place, is_uncertain = _client(uri, 1), _place(uri), False
    for pause_s in (*PAUSES_S, None):
        try:
            return client.put_object(**place, Body=content, **condition)["ETag"]
        except _failures() as error:
            failure = error
        if _status(failure) == 501:
            raise NoConditionsError(uri) from failure
        if _status(failure) == 412 or _code(failure) == "NoSuchKey":  # there is another version, or none
            if not is_uncertain:
                raise ChangedError(uri) from None
        elif _is_lasting(failure):
            break
        is_uncertain = True
        try:
            found = read_version(uri)
        except UnavailableError as error:
            failure = error.__cause__ or error
        else:
            if found is not None and found.content == content:
                return found.tag
            if (None if found is None else found.tag) != expected:
                raise ChangedError(uri) from None
        if pause_s is not None:
            time.sleep(pause_s)
    raise UnavailableError(f"{uri}: cannot be written: {_reason(failure)}") from failure


def _is_lasting(failure: Exception) -> bool:
    """Whether a write failed for sure, and would fail again; after a time-out it may have been done."""
    from botocore.exceptions import HTTPClientError

    status = _status(failure)
    if status is None:
        return not isinstance(failure, (HTTPClientError, OSError))
    return status < 500 and status not in (408, 409, 429)


def _code(failure: Exception) -> str | None:
    """The store's name of an error; None without an answer."""
    return (getattr(failure, "response", None) or {}).get("Error", {}).get("Code")


def _status(failure: Exception) -> int | None:
    """The status that a store answered with; None without an answer."""
    answer = getattr(failure, "response", None)
    return answer["ResponseMetadata"]["HTTPStatusCode"] if answer else None


def names_after(uri: str, last: str) -> list[str]:
    """The names of a folder's objects that follow `last`, sorted. Raises UnavailableError."""
    place = _place(uri)
    folder = place.pop("Key") + "/"
    pages = _client(uri, READS).get_paginator("list_objects_v2")
    try:
        found = [
            entry["Key"].removeprefix(folder)
            for page in pages.paginate(**place, Prefix=folder, Delimiter="/", StartAfter=folder + last)
            for entry in page.get("Contents", [])
        ]
    except _failures() as error:
        raise UnavailableError(f"{uri}: cannot be read: {_reason(error)}") from error
    return sorted(found)


def _place(uri: str) -> dict[str, str]:
    parts = urlsplit(uri)
    return {"Bucket": parts.netloc, "Key": unquote(parts.path.strip("/"))}


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of a request of boto3, which must be installed."""
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, OSError


def _client(uri: str, attempts: int):
    """boto3's client for a URI, whose options are pyarrow's."""
    options = dict(parse_qsl(urlsplit(uri).query))
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    return _make_client(endpoint, options.get("region"), attempts, _environment())


@functools.lru_cache(maxsize=8)
def _make_client(endpoint: str | None, region: str | None, attempts: int, environment: tuple):
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # not all stores know AWS's newer checksums
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _reason(failure: BaseException) -> str:
    """Why a request failed, in the store's or boto3's own words."""
    said = _code(failure) and failure.response["Error"].get("Message")
    return f"{_code(failure)}: {said.rstrip('.')}" if said else first_line(failure)
