"""Where files live: one way to name, open and write them, on a local disk or an object store (pyarrow.fs)."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deit_ray.errors import UnavailableError, UserError

if TYPE_CHECKING:
    from pyarrow import fs

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # of file systems that have no hard links
LOCAL_SCHEMES = ("", "file")


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path on it, for a path or file://, s3://, gs://.

    Raises:
        UserError: the URI is none that can be opened.
        UnavailableError: its place cannot be reached.
    """
    import pyarrow as pa
    from pyarrow import fs

    if is_local(uri):
        return fs.LocalFileSystem(), local_path(uri)
    try:
        return fs.FileSystem.from_uri(uri)
    except OSError as error:  # it looks for the bucket's region
        raise UnavailableError(f"{uri}: cannot be reached: {error}") from error
    except (pa.ArrowInvalid, ValueError) as error:
        raise UserError(
            f"{uri}: cannot be opened; allowed are a path, file://, s3:// and gs:// ({error})"
        ) from None


def is_local(uri: str) -> bool:
    return uri.partition("://")[0] in LOCAL_SCHEMES if "://" in uri else True


def local_path(uri: str) -> str:
    """The absolute local path of a path or a file:// URI."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def absolute(uri: str) -> str:
    """The URI as every process understands it, whatever its working directory."""
    return local_path(uri) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """The URI of something in a folder; options such as ?endpoint_override=HOST stay at its end."""
    folder, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([folder.rstrip("/"), *parts]) + mark + options


def results_option(uri: str) -> str:
    """What a command must say to find the results that are at a URI, where they are not in the usual folder."""
    return "" if uri == "results" else f" --results {uri}"


def read_bytes(uri: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: there is none.
        UnavailableError: it cannot be read or reached.
    """
    filesystem, path = open_uri(uri)
    with _naming(uri, "read"), filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file that is afterwards whole or absent: on a disk by rename, on an object store by its own promise.

    Raises:
        UnavailableError: the disk is full, the place cannot be written or reached.
    """
    with _naming(uri, "written"):
        if is_local(uri):
            with _partial(uri, content) as partial:
                os.rename(partial, local_path(uri))
        else:
            _upload(uri, content)


def create_bytes(uri: str, content: bytes) -> None:
    """As `write_bytes`, but never over a file that is there; between two who write at once, a local disk decides.

    Raises:
        FileExistsError: it is there.
        UnavailableError: as `write_bytes`.
    """
    with _naming(uri, "written"):
        if is_local(uri):
            with _partial(uri, content) as partial:
                _link(partial, local_path(uri))
        elif exists(uri):
            raise FileExistsError(uri)
        else:
            _upload(uri, content)


@contextlib.contextmanager
def _naming(uri: str, what: str) -> Iterator[None]:
    """Says in one message which place has failed; that something is there, or not, is an answer and no failure."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        raise UnavailableError(f"{uri}: cannot be {what}: {error.strerror or error}") from error


@contextlib.contextmanager
def _partial(uri: str, content: bytes) -> Iterator[Path]:
    """A file beside the one to be written, with its content, on the disk and not only in its cache; removed afterwards."""
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


def remove(uri: str) -> None:
    """Removes a file, where there is one."""
    if exists(uri):
        filesystem, path = open_uri(uri)
        filesystem.delete_file(path)


def exists(uri: str) -> bool:
    """Whether there is a file or folder."""
    from pyarrow import fs

    filesystem, path = open_uri(uri)
    with _naming(uri, "read"):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


def modified_ns(uri: str) -> int | None:
    """When a file was last written; None where there is none."""
    filesystem, path = open_uri(uri)
    return filesystem.get_file_info(path).mtime_ns


def list_names(uri: str) -> list[str]:
    """The names of what a folder holds, sorted; none where there is no folder."""
    from pyarrow import fs

    filesystem, path = open_uri(uri)
    with _naming(uri, "read"):
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in found)
