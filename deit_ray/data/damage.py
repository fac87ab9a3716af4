"""Names of the images that a run could not decode, kept beside its results."""

import csv
import io
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data.worklist import WorkList
from deit_ray.outcome import BAD_IMAGES

Bad = set[tuple[str, int]]  # (split, image id)


def note_bad(folder: str, worklist: WorkList, bad: Bad) -> list[tuple[str, int, str]]:
    """Adds images to a run's list of bad images; returns the whole list: (split, id, name) of each."""
    known = read_bad(folder)
    new = bad - {(split, image) for split, image, _ in known}
    if not new:
        return known
    found = sorted([*known, *name_images(worklist, new)])
    text = io.StringIO()
    csv.writer(text).writerows([("split", "id", "name"), *found])
    storage.write_bytes(storage.join(folder, BAD_IMAGES), text.getvalue().encode())
    return found


def read_bad(folder: str) -> list[tuple[str, int, str]]:
    """Reads a run's list of images that could not be decoded: (split, id, name) of each."""
    try:
        rows = csv.reader(io.StringIO(storage.read_bytes(storage.join(folder, BAD_IMAGES)).decode()))
    except FileNotFoundError:
        return []
    return [(split, int(image), name) for split, image, name in list(rows)[1:]]


def describe_bad(bad: list[tuple[str, int, str]]) -> str:
    """Names one image and counts the others: "train image 70 (n01440764/x.JPEG) and 3 more"."""
    split, image, name = bad[0]
    return f"{split} image {image} ({name})" + (f" and {len(bad) - 1} more" if bad[1:] else "")


def name_images(worklist: WorkList, bad: Bad) -> list[tuple[str, int, str]]:
    """Reads the names of images from their shards; returns (split, id, name) of each."""
    places = defaultdict(list)  # (split, id, row) of images by file and row group
    for split, image in sorted(bad):
        groups = worklist.train if split == "train" else worklist.evaluations[split]
        g = int(groups.first_id.searchsorted(image, "right")) - 1
        places[groups.files[groups.file[g]], int(groups.group[g])].append(
            (split, image, int(groups.start[g] + image - groups.first_id[g]))
        )
    found = []
    for (path, group), images in places.items():
        filesystem, inside = storage.open_uri(path)
        try:
            file = pq.ParquetFile(filesystem.open_input_file(inside))
            names = file.read_row_group(group, columns=["name"])["name"]
            found += [(split, image, names[row].as_py()) for split, image, row in images]
        except (OSError, pa.ArrowException) as error:  # the shard is missing; the ids are still known
            found += [(split, image, f"its name cannot be read: {error}") for split, image, _ in images]
    return found
