"""The folder that a preparation writes. Nothing of a person's is written over, moved or deleted there.

A file there is ours if our manifest (or the plan of an unfinished preparation) lists it and it still has the
size and digest that are listed. Shards and parts of an unfinished preparation are ours if they carry its key
or form.
"""

import csv
import hashlib
import io
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from deit_ray import storage
from deit_ray.data import shards, shuffle
from deit_ray.data.claim import CLAIM, LOCK
from deit_ray.data.listing import printable
from deit_ray.data.walk import SYSTEM, reason_to_skip
from deit_ray.errors import UserError

PARTS, PLAN = ".parts", "plan.json"  # a folder that is removed once all shards are written, and a file in it
UNREADABLE = "unreadable.csv"
PART_FILE = re.compile(r"(train|test)-\d{5,}\.arrow")
SHARD_FILE = re.compile(r"(train|test)-\d{5,}\.parquet")
PARTIAL = re.compile(
    r"\.(manifest\.json|plan\.json|unreadable\.csv|(train|test)-\d{5,}\.(parquet|arrow))\.[0-9a-f]{32}\.partial"
)
NAMED = 5  # files that a message names
SUGGESTION = "choose another --out, or move what is there"
Listed = tuple[int, str]  # size in bytes and SHA-256 of a file


def check_apart(source: str, out: str) -> None:
    """Refuses an OUT that is SOURCE, is inside it or holds it, by resolved paths.

    Raises:
        UserError: naming both.
    """
    if (same := _relation(source, out)) is not None:
        raise UserError(
            f"--out {out}: {same} SOURCE ({source}); nothing is written into a source: choose another --out"
        )


def _relation(source: str, out: str) -> str | None:
    if storage.is_local(source) != storage.is_local(out):
        return None
    if storage.is_local(out):
        one, other = (Path(os.path.realpath(storage.local_path(uri))) for uri in (source, out))
        if one == other or (_identity(one) and _identity(one) == _identity(other)):
            return "is"
        if other in one.parents or _identity(other) in _identities(one):
            return "holds"
        return "is inside" if one in other.parents or _identity(one) in _identities(other) else None
    if source.partition("?")[2] != out.partition("?")[2]:  # options, such as another server
        return None
    (one_fs, one), (other_fs, other) = storage.open_uri(source), storage.open_uri(out)
    one, other = (re.sub("/+", "/", path.strip("/")) + "/" for path in (one, other))
    if one_fs.type_name != other_fs.type_name:
        return None
    if one == other:
        return "is"
    return "holds" if one.startswith(other) else "is inside" if other.startswith(one) else None


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; they are equal for two mounts of a folder."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities(path: Path) -> set[tuple[int, int]]:
    """Those of the folders above a path."""
    return {identity for identity in map(_identity, path.parents) if identity}


def check_files_apart(files: list[str], out: str) -> None:
    """Refuses an OUT that holds files that a source reads, over links."""
    if not storage.is_local(out):
        return
    folder = os.path.realpath(storage.local_path(out))
    for file in files:
        if storage.is_local(file) and os.path.realpath(storage.local_path(file)).startswith(folder + "/"):
            raise UserError(f"--out {out}: holds a file of SOURCE ({file}); choose another --out")


class Target:
    """What OUT holds, and what may be done there.

    Attributes:
        manifest: our manifest there, None if there is none.
        plan: the plan of an unfinished preparation, empty if there is none.
        notes: what was left alone or set aside.

    Raises:
        UserError: OUT is no folder, or holds what deit-ray did not write and is not ours.
    """

    def __init__(self, out: str):
        self.out, self.parts, self.notes = out, storage.join(out, PARTS), []
        self._check_folder()
        self.plan = self._read_plan()
        names = [name for name in storage.list_names(out) if name != PARTS and not _is_passing(name)]
        self.manifest = _read_manifest(out)
        if self.manifest is None and not self.plan and names:
            named = ", ".join(map(printable, names[:NAMED]))
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise UserError(
                f"--out {out}: is not empty, and holds no data set of deit-ray but {named}{more}; "
                f"{SUGGESTION}"
            )
        self.listed = self._all_listed()
        self.keys = {self.plan["key"], *self.plan.get("replaces", ())} if self.plan else set()

    def _check_folder(self) -> None:
        if storage.is_local(self.out):
            path = storage.local_path(self.out)
            if os.path.lexists(path) and not os.path.exists(path):
                raise UserError(f"--out {self.out}: is a link that leads nowhere; choose another --out")
            above = next(folder for folder in Path(path).parents if folder.exists())
            if not above.is_dir():
                raise UserError(f"--out {self.out}: cannot be made: {above} is no folder")
        filesystem, path = storage.open_uri(self.out)
        if filesystem.get_file_info(path).type == fs.FileType.File:
            raise UserError(f"--out {self.out}: is a file; --out must be a folder")

    def _read_plan(self) -> dict:
        names = [name for name in storage.list_names(self.parts) if not PARTIAL.fullmatch(name)]
        if not names:
            return {}
        try:
            plan = json.loads(storage.read_bytes(storage.join(self.parts, PLAN)))
        except (FileNotFoundError, ValueError):
            plan = None
        if not (isinstance(plan, dict) and isinstance(plan.get("key"), str) and "shards" in plan):
            raise UserError(
                f"--out {self.out}: deit-ray did not write the folder {PARTS} there, which holds "
                f"{printable(names[0])}; {SUGGESTION}"
            )
        return plan

    def _all_listed(self) -> dict[str, Listed]:
        """Size and digest of every file that the plan or the manifest lists."""
        found = {name: (size, digest) for name, (size, digest) in self.plan.get("files", {}).items()}
        if self.manifest:
            for listed in self.manifest.splits.values():
                found |= {shard.file: (shard.bytes, shard.sha256) for shard in listed}
            found |= {name: tuple(entry) for name, entry in self.manifest.files.items()}
            if not self.manifest.files:
                found |= _listed_before(self.out, self.manifest)
        return found

    def is_ours(self, name: str) -> bool:
        """Whether a file of this name in OUT is certainly what deit-ray wrote."""
        content = self._content(name)
        if name in self.listed:
            return describe(content) == tuple(self.listed[name])
        return bool(SHARD_FILE.fullmatch(name)) and self._key_of(content) in self.keys

    def _content(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.out, name))

    def _key_of(self, content: bytes) -> str | None:
        """The key of the preparation that wrote a shard."""
        try:
            metadata = pq.read_schema(pa.BufferReader(content)).metadata or {}
        except (OSError, pa.ArrowException):
            return None
        return metadata.get(shuffle.KEY, b"").decode(errors="replace") or None

    def check_free(self, names: list[str], damaged_too: bool) -> None:
        """Refuses to write over files that are not ours.

        Args:
            names: files to write.
            damaged_too: whether a listed file with another digest may be set aside: it is a damaged shard.
        """
        existing = set(storage.list_names(self.out))
        for name in names:
            if name in existing and not (damaged_too and name in self.listed) and not self.is_ours(name):
                raise UserError(f"--out {self.out}: {name} there is not what deit-ray wrote; {SUGGESTION}")

    def set_aside(self, names: list[str]) -> None:
        """Renames those of the files that are not ours: shards that were damaged or changed."""
        existing = set(storage.list_names(self.out))
        for name in names:
            if name not in existing or self.is_ours(name):
                continue
            kept = storage.set_aside(storage.join(self.out, name), "damaged")
            self.notes.append(f"{name} was not what the manifest lists: it is kept as {kept}, and made again")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, but never over one that is not ours."""
        where = storage.join(self.out, name)
        if storage.exists(where):
            if self._content(name) == content:
                return
            self.check_free([name], False)
        self.listed[name] = describe(content)
        if self.plan:
            self.write_plan(self.plan | {"files": self.listed})
        storage.write_bytes(where, content)

    def remove(self, name: str) -> None:
        """Deletes a file if it is ours; otherwise it stays, with a note if it was ours."""
        if not storage.exists(storage.join(self.out, name)):
            return
        if self.is_ours(name):
            storage.remove(storage.join(self.out, name))
        elif name in self.listed:
            self.notes.append(f"{name} is left in {self.out}: it was changed since deit-ray wrote it")

    def remove_manifest(self) -> None:
        """Deletes our manifest; the plan, written before, lists its files."""
        storage.remove(storage.join(self.out, shards.MANIFEST))
        self.manifest = None

    def remove_others(self, kept: set[str]) -> None:
        """Deletes our files of earlier preparations, but those to keep, and what a kill left of a file."""
        for name in storage.list_names(self.out):
            if PARTIAL.fullmatch(name):
                storage.remove(storage.join(self.out, name))
            elif name not in kept and (name in self.listed or SHARD_FILE.fullmatch(name)):
                self.remove(name)

    def write_plan(self, plan: dict) -> None:
        self.plan = plan
        self.keys |= {plan["key"], *plan.get("replaces", ())}
        storage.write_bytes(storage.join(self.parts, PLAN), json.dumps(plan).encode())

    def check_parts(self) -> list[str]:
        """The names of the parts that exist.

        Raises:
            UserError: a file has a part's name, but is none.
        """
        found = [name for name in storage.list_names(self.parts) if PART_FILE.fullmatch(name)]
        for name in found:
            if not self._is_part(name):
                raise UserError(
                    f"--out {self.out}: {PARTS}/{name} there is not what deit-ray wrote; {SUGGESTION}"
                )
        return found

    def _is_part(self, name: str) -> bool:
        filesystem, path = storage.open_uri(storage.join(self.parts, name))
        try:
            with filesystem.open_input_file(path) as file:
                return pa.ipc.open_file(file).schema.equals(shuffle.PART_SCHEMA)
        except pa.ArrowException:
            return False

    def remove_part_files(self) -> None:
        """Deletes the parts."""
        for name in storage.list_names(self.parts):
            if PARTIAL.fullmatch(name) or (PART_FILE.fullmatch(name) and self._is_part(name)):
                storage.remove(storage.join(self.parts, name))

    def remove_parts(self) -> None:
        """Deletes the parts and the plan; the folder too, unless something else is in it."""
        self.remove_part_files()
        if self.plan:
            storage.remove(storage.join(self.parts, PLAN))
        filesystem, path = storage.open_uri(self.parts)
        if left := storage.list_names(self.parts):
            self.notes.append(
                f"{PARTS} is left in {self.out}: deit-ray did not write {printable(left[0])} there"
            )
        elif storage.is_local(self.out):
            if os.path.isdir(path):
                os.rmdir(path)
        elif filesystem.get_file_info(path).type == fs.FileType.Directory:
            filesystem.delete_dir(path)


def _read_manifest(out: str) -> shards.Manifest | None:
    """Our manifest, None if there is none. What makes it ours: its fingerprint follows from its own digests.

    Raises:
        UserError: the manifest is not ours.
    """
    try:
        found = json.loads(storage.read_bytes(storage.join(out, shards.MANIFEST)))
        splits = {s: [shards.Shard(**shard) for shard in listed] for s, listed in found["splits"].items()}
        again = shards.make_manifest(found["classes"], splits, {}, {}).fingerprint
        names = [shard.file for listed in splits.values() for shard in listed]
        is_ours = found["format"] == shards.FORMAT and again == found["fingerprint"]
        is_ours = is_ours and all(map(SHARD_FILE.fullmatch, names))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(
            f"--out {out}: {shards.MANIFEST} there was not written by this version of deit-ray, or was "
            f"changed since; {SUGGESTION}"
        )
    return shards.read_manifest(out)


def _listed_before(out: str, manifest: shards.Manifest) -> dict[str, Listed]:
    """The list of unreadable images of an earlier version, whose manifest only counts its lines."""
    count = sum(manifest.unreadable.values())
    if not count or not storage.exists(storage.join(out, UNREADABLE)):
        return {}
    content = storage.read_bytes(storage.join(out, UNREADABLE))
    rows = list(csv.reader(io.StringIO(content.decode(errors="replace"))))
    is_ours = rows[:1] == [["split", "name", "reason"]] and len(rows) == count + 1
    return {UNREADABLE: describe(content)} if is_ours else {}


def describe(content: bytes) -> Listed:
    """The entry of a file with this content."""
    return len(content), hashlib.sha256(content).hexdigest()


def _is_passing(name: str) -> bool:
    """Whether a file or folder says nothing about whose OUT is: a lock, or a leftover of the system."""
    is_lock = name == LOCK or CLAIM.fullmatch(name) or PARTIAL.fullmatch(name)
    leftover = name == ".DS_Store" or SYSTEM in (reason_to_skip(name, True), reason_to_skip(name, False))
    return bool(is_lock or leftover)
