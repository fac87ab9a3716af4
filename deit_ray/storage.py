"""Files on a local disk or an object store (pyarrow.fs): one way to name, read and write them.

A local file is read without pyarrow, whose import would delay every message.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deit_ray.errors import UnavailableError, UserError, explain_os_error

if TYPE_CHECKING:
    from pyarrow import fs

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)  # of file systems without hard links
LOCAL_SCHEMES = ("", "file")


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
        return fs.FileSystem.from_uri(uri)
    except OSError as error:  # for s3://, pyarrow asks for the bucket's region
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
    """The URI in a form that does not depend on the working directory of a process."""
    return local_path(uri) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """The URI of an entry of a folder; options such as ?endpoint_override=HOST stay at its end."""
    folder, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([folder.rstrip("/"), *parts]) + mark + options


def read_bytes(uri: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file; what its path names as a folder may be a file.
        UnavailableError: the file cannot be read or reached.
    """
    if is_local(uri):
        with _naming(uri, "read"):
            try:
                return Path(local_path(uri)).read_bytes()
            except NotADirectoryError:
                raise FileNotFoundError(uri) from None
    filesystem, path = open_uri(uri)
    with _naming(uri, "read"), filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file. The file is then whole or absent: a disk renames it, an object store promises it.

    Raises:
        UnavailableError: the disk is full, or the place cannot be written or reached.
    """
    with _naming(uri, "written"):
        if is_local(uri):
            with _partial(uri, content) as partial:
                os.rename(partial, local_path(uri))
        else:
            _upload(uri, content)


def create_bytes(uri: str, content: bytes) -> None:
    """Writes a file as `write_bytes` does, but never over an existing file.

    If two processes write at once, exactly one succeeds on a local disk with hard links. Elsewhere both can.

    Raises:
        FileExistsError: the file exists.
        UnavailableError: as for `write_bytes`.
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
    """Names the failed place in one message. That a file exists or is missing is an answer, not a failure."""
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


def set_aside(uri: str, word: str) -> str:
    """Renames a file to NAME.WORD-1, or the next number that is free; returns the new name."""
    folder, _, name = uri.partition("?")[0].rpartition("/")
    existing = set(list_names(folder + uri[len(folder) + 1 + len(name) :]))
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
        with _naming(uri, "deleted"):
            Path(local_path(uri)).unlink(missing_ok=True)
    elif exists(uri):
        filesystem, path = open_uri(uri)
        filesystem.delete_file(path)


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""
    if is_local(uri):
        with _naming(uri, "read"):
            return _exists(local_path(uri))
    from pyarrow import fs

    filesystem, path = open_uri(uri)
    with _naming(uri, "read"):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


def _exists(path: str) -> bool:
    """Whether a local file or folder exists; `os.path.exists` would hide that it cannot be looked at."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def modified_ns(uri: str) -> int | None:
    """When a file was last written, in ns since 1970; None if there is no file."""
    filesystem, path = open_uri(uri)
    return filesystem.get_file_info(path).mtime_ns


def list_names(uri: str) -> list[str]:
    """The names of a folder's entries, sorted; an empty list if there is no folder."""
    if is_local(uri):  # pyarrow fails at names that are not UTF-8
        with _naming(uri, "read"), contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(local_path(uri)))
        return []
    from pyarrow import fs

    filesystem, path = open_uri(uri)
    with _naming(uri, "read"):
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in found)
