"""ILSVRC2012's own archives from image-net.org: a tar of class tars, and a tar of validation images.

Only headers are read to list the images; nothing is unpacked.
"""

import io
import re
import tarfile

import numpy as np
import pyarrow as pa

from deit_ray import storage
from deit_ray.data.listing import Ranges, Source, Split, Unused, listing, split_by_class
from deit_ray.data.tarfiles import members
from deit_ray.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


def ilsvrc2012(folder: str, labels: str | None) -> Source:
    """ILSVRC2012: ILSVRC2012_img_train.tar, a tar of class tars, and ILSVRC2012_img_val.tar with its labels.

    Args:
        folder: the folder that holds the two tars.
        labels: a text file with the labels of the validation images: lines of `name synset`, or synsets in
            the order of the names. By default the labels come from the devkit beside the tars
            (ILSVRC2012_devkit_t12.tar.gz, or unpacked).

    Raises:
        UserError: a tar or a label is missing or broken.
    """
    names = storage.list_names(folder)
    if TRAIN_TAR not in names:
        raise UserError(f"{folder}: holds no {TRAIN_TAR}")
    uri = storage.join(folder, TRAIN_TAR)
    unused, inside = Unused(), members(uri)
    tars = sorted((name.removesuffix(".tar"), *place) for name, *place in inside if name.endswith(".tar"))
    for name, *_ in inside:
        if not name.endswith(".tar"):
            unused.add(name, f"no class tar in {TRAIN_TAR}")
    classes = [name.rpartition("/")[2] for name, _, _ in tars]
    if len(classes) < 2:
        raise UserError(
            f"{uri}: holds {len(classes)} class tars; ILSVRC2012's holds 1,000, such as n01440764.tar"
        )
    parts = []
    for label, (_, start, size) in enumerate(tars):
        found = sorted(members(uri, start, size, f"{uri}: {classes[label]}.tar"))
        if not found:
            raise UserError(f"{uri}: {classes[label]}.tar holds no images")
        inner, offsets, sizes = zip(*found, strict=True)
        parts.append(listing(list(inner), label, 0, offsets, sizes))
    train = pa.concat_tables(parts).combine_chunks()
    if VAL_TAR not in names:
        note = f"no {VAL_TAR} there: a fifth of each class of the training images is kept for testing"
        notes = [note, *unused.notes()]
        return Source("ilsvrc2012", classes, split_by_class(train, Ranges((uri,))), notes)
    val_uri = storage.join(folder, VAL_TAR)
    inner, offsets, sizes = zip(*sorted(members(val_uri)), strict=True)
    synsets = _given_synsets(labels, inner) if labels else _devkit_synsets(folder, names)
    where = labels or f"the devkit's {GROUND_TRUTH}"
    test_labels = _to_labels(where, synsets, inner, classes)
    test = Split(listing(list(inner), test_labels, 0, offsets, sizes), Ranges((val_uri,)))
    recognised = [f"train: {TRAIN_TAR}, {len(train)} images of {len(classes)} class tars"]
    recognised.append(f"test: {VAL_TAR}, {len(test)} images, labels from {where}")
    splits = {"train": Split(train, Ranges((uri,))), "test": test}
    return Source("ilsvrc2012", classes, splits, unused.notes(), recognised)


def _devkit_synsets(folder: str, names: list[str]) -> list[str]:
    """The synsets of the validation images, in the order of the images, from the devkit.

    Line i of the ground truth is the ILSVRC2012_ID of image i, and meta.mat maps the id to a synset. Ids and
    synsets are in different orders.
    """
    from scipy.io import loadmat

    if DEVKIT in names:
        where = storage.join(folder, DEVKIT)
        truth, meta = (storage.read_bytes(storage.join(where, file)) for file in (GROUND_TRUTH, META))
    elif f"{DEVKIT}.tar.gz" in names:
        packed = io.BytesIO(storage.read_bytes(storage.join(folder, f"{DEVKIT}.tar.gz")))
        with tarfile.open(fileobj=packed) as tar:
            truth, meta = (tar.extractfile(f"{DEVKIT}/{file}").read() for file in (GROUND_TRUTH, META))
    else:
        raise UserError(
            f"{folder}: the labels of {VAL_TAR} are missing: put {DEVKIT}.tar.gz beside it, "
            "or name a file with --labels FILE (lines of: name synset)"
        )
    synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    synset_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    return [synset_of.get(int(line), line) for line in truth.decode().split()]


def _given_synsets(uri: str, images: tuple[str, ...]) -> list[str]:
    """The synsets of the validation images, in the order of the images, from the file of --labels."""
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError:
        raise UserError(f"--labels {uri}: no such file") from None
    lines = [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]
    if all(len(words) == 1 for words in lines):
        return [words[0] for words in lines]
    by_name = {words[0].rpartition("/")[2].partition(".")[0]: words[1] for words in lines if len(words) > 1}
    keys = [name.rpartition("/")[2].partition(".")[0] for name in images]
    if missing := [key for key in keys if key not in by_name]:
        raise UserError(
            f"--labels {uri}: has no line for {missing[0]} and {len(missing) - 1} others; "
            "a line is: name synset"
        )
    return [by_name[key] for key in keys]


def _to_labels(where: str, synsets: list[str], images: tuple[str, ...], classes: list[str]) -> list[int]:
    """The labels of synsets, one for each image. Errors name `where`, the file of the synsets."""
    if len(synsets) != len(images):
        raise UserError(f"{where}: has {len(synsets)} labels, but {VAL_TAR} holds {len(images)} images")
    index = {name: label for label, name in enumerate(classes)}
    if strange := sorted(set(synsets) - set(index)):
        raise UserError(
            f"{where}: {strange[0]!r} is no class of {TRAIN_TAR}, "
            f"whose classes are {classes[0]} to {classes[-1]}"
        )
    return [index[synset] for synset in synsets]
