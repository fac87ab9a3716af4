"""Indexes a tar by its headers, and refuses a tar that cannot be read to its end."""

import io
import posixpath
import tarfile
from dataclasses import dataclass, field

import pyarrow as pa

from deit_ray import storage
from deit_ray.data.listing import Unused, printable
from deit_ray.errors import UnavailableError, UserError

LOCAL_BUFFER = 4096  # bytes read at once from a disk: a few headers
REMOTE_BUFFER = 1 << 20  # bytes read at once from an object store, where every request waits long
BLOCK = tarfile.BLOCKSIZE
ZEROS = 1 << 20  # bytes read at once behind a tar's end
FOREIGN = {  # first bytes of files that are no tars, and what to do with them
    b"\x1f\x8b": "it is compressed with gzip: unpack it first (gunzip)",
    b"BZh": "it is compressed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ": "it is compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it first (unzstd)",
    b"PK\x03\x04": "it is a zip archive: unpack it first (unzip)",
    b"PK\x05\x06": "it is an empty zip archive",
    b"Rar!": "it is a rar archive: unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it first",
}


@dataclass(frozen=True)
class Index:
    """The members of a tar.

    Attributes:
        members: (name, offset in the file, size) of each file, in the archive's order. A link has its
            target's place.
        notes: what a person should know about the archive.
    """

    members: list[tuple[str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def members(
    uri: str, start: int = 0, size: int | None = None, called: str | None = None
) -> list[tuple[str, int, int]]:
    """(name, offset in the file, size) of each file in a tar; see `index`."""
    return index(uri, Unused(), start, size, called).members


def index(
    uri: str, unused: Unused, start: int = 0, size: int | None = None, called: str | None = None
) -> Index:
    """Reads the headers of a tar to its end.

    Args:
        uri: the file's URI.
        unused: gets the members that hold no data, such as devices and links that lead nowhere.
        start, size: place of the tar in that file; by default the whole file.
        called: the tar's name in messages; by default its URI.

    Raises:
        UserError: the file is compressed, is no tar, is damaged, or ends too early.
        UnavailableError: the file cannot be read.
    """
    filesystem, path = storage.open_uri(uri)
    buffer = LOCAL_BUFFER if storage.is_local(uri) else REMOTE_BUFFER
    try:
        with filesystem.open_input_file(path) as file:
            return _Reader(called or uri, file, start, size, buffer, unused).read()
    except OSError as error:
        raise UnavailableError(f"{uri}: cannot be read: {error.strerror or error}") from None


class _Reader:
    """Reads one tar, or several that were joined to one file."""

    def __init__(
        self, uri: str, file: pa.NativeFile, start: int, size: int | None, buffer: int, unused: Unused
    ):
        self.uri, self.file, self.start, self.buffer, self.unused = uri, file, start, buffer, unused
        self.size = file.size() - start if size is None else size
        self.index = Index()
        self.places: dict[str, tuple[int, int]] = {}  # of the files, by normalised name
        self.links: list[tuple[int, str, str]] = []  # (number of the member, name, normalised target)
        self.last = ""  # the last member's name

    def read(self) -> Index:
        if not self.size:
            raise UserError(f"{self.uri}: the file is empty")
        place, joined = 0, 0
        while place is not None:
            place = self._after(self._read_archive(place))
            joined += place is not None
        if joined:
            self.index.notes.append(
                f"{self.uri} is {joined + 1} tars, one behind the other; the members of all are used"
            )
        self._resolve_links()
        found = [member for member in self.index.members if member is not None]
        return Index(found, self.index.notes)

    def _read_archive(self, place: int) -> int:
        """Reads the members of the tar that begins at a place; returns where it ends."""
        window = io.BufferedReader(Window(self.file, self.start + place, self.size - place), self.buffer)
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    self._add(member, place)
                    tar.members.clear()  # tarfile would keep them all
                return place + tar.offset
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise UserError(f"{self.uri}: {self._why(place, error)}") from None

    def _why(self, place: int, error: Exception) -> str:
        """Why a tar cannot be read, with what to do about it."""
        if place == 0 and not self.last:
            first = self.file.read_at(8, self.start)
            reason = next((text for begin, text in FOREIGN.items() if first.startswith(begin)), None)
            return reason or f"it is no tar ({error})"
        behind = f" behind {printable(self.last)}" if self.last else ""
        return f"the tar is damaged{behind} ({error}); make or download it again"

    def _add(self, member: tarfile.TarInfo, place: int) -> None:
        name = member.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        if "\0" in name:
            raise UserError(
                f"{self.uri}: the header of {printable(name[:40])} is damaged; make the tar again"
            )
        offset = place + member.offset_data
        if member.issparse():
            raise UserError(
                f"{self.uri}: {printable(name)} is stored with holes; make the tar without --sparse"
            )
        if member.isreg():
            if offset + member.size > self.size:
                raise UserError(
                    f"{self.uri}: ends within {printable(name)}, which should have {member.size} bytes from "
                    f"byte {offset} on; make or download it again"
                )
            self.index.members.append((name, self.start + offset, member.size))
            self.places[posixpath.normpath(name)] = (self.start + offset, member.size)
        elif member.islnk() or member.issym():
            target = (
                member.linkname
                if member.islnk()
                else posixpath.join(posixpath.dirname(name), member.linkname)
            )
            self.links.append((len(self.index.members), name, posixpath.normpath(target)))
            self.index.members.append(None)
        elif not member.isdir():
            self.unused.add(name, "devices or the like")
        self.last = name

    def _resolve_links(self) -> None:
        """Gives each link the place of the file that it leads to, in one step or over other links."""
        targets = {posixpath.normpath(name): target for _, name, target in self.links}
        for number, name, target in self.links:
            followed = set()
            while target not in self.places and target in targets and target not in followed:
                followed.add(target)
                target = targets[target]
            if target in self.places:
                self.index.members[number] = (name, *self.places[target])
            else:
                self.unused.add(name, "links to what is not in the tar")

    def _after(self, end: int) -> int | None:
        """Where the next tar begins behind the end of one; None where nothing follows.

        Raises:
            UserError: what follows is neither an end nor a tar.
        """
        block = self._block(end)
        behind = f"behind {printable(self.last)}, at byte {end}" if self.last else f"at byte {end}"
        if not block:
            if self.last:
                self.index.notes.append(f"{self.uri} has no mark at its end: was it cut behind {self.last}?")
            return None
        if block.strip(b"\0"):
            raise UserError(
                f"{self.uri}: is damaged {behind}: there is neither a member nor the end of the tar; make or "
                "download it again"
            )
        place = end
        while chunk := self.file.read_at(min(ZEROS, self.size - place), self.start + place):
            rest = chunk.lstrip(b"\0")
            if rest:
                place += (len(chunk) - len(rest)) // BLOCK * BLOCK
                break
            place += len(chunk)
        else:
            return None
        try:
            tarfile.TarInfo.frombuf(self._block(place), tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError:
            raise UserError(
                f"{self.uri}: something that is no tar follows the end of the tar, at byte {place}; cut it "
                "off, or make the tar again"
            ) from None
        return place

    def _block(self, place: int) -> bytes:
        return self.file.read_at(max(0, min(BLOCK, self.size - place)), self.start + place)


class Window(io.RawIOBase):
    """A part of a random-access file, as a file."""

    def __init__(self, file: pa.NativeFile, start: int = 0, size: int | None = None):
        self.file, self.start, self.place = file, start, 0
        self.size = file.size() - start if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:
        content = self.file.read_at(max(0, min(len(buffer), self.size - self.place)), self.start + self.place)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)
