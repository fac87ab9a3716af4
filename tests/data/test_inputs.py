"""Inputs that people have: each is used whole, or what is not used is counted and named, or it is refused."""

import os
import re
import tarfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deit_ray.data import shards
from tests.support.commands import call
from tests.support.sources import (
    encoded,
    gzipped,
    samples,
    snapshot,
    sparse_tar,
    tar_of,
    write,
    write_classes,
    zipped,
)

RAW = re.compile(r"Traceback|\b\w+(Error|Exception)\b|b'|<class|\bNone\b")
TWO = {"cat": 10, "dog": 10}
CASES = {}


@dataclass(frozen=True)
class Case:
    """An input and what must become of it.

    Attributes:
        make: writes it into a folder; may return the source's path, by default the folder.
        train, test: the number of images; both None where it is refused.
        says: texts that stdout or stderr must have.
        classes: the names of the classes.
        options: further arguments.
    """

    make: Callable[[Path], Path | None]
    says: tuple[str, ...] = ()
    train: int | None = None
    test: int | None = None
    classes: tuple[str, ...] | None = None
    options: tuple[str, ...] = ()


def accepted(train: int, test: int, *says: str, classes: tuple[str, ...] | None = None, options=()):
    """The function writes an input that is prepared."""

    def register(make):
        CASES[make.__name__] = Case(make, says, train, test, classes, options)
        return make

    return register


def refused(*says: str, options=()):
    """The function writes an input that is refused."""

    def register(make):
        CASES[make.__name__] = Case(make, says, options=options)
        return make

    return register


# Folders: splits and classes


@accepted(20, 8, "train: Training/: 20 images of 2 classes", classes=("cat", "dog"))
def training_and_testing(folder):
    write_classes(folder / "Training", TWO)
    write_classes(folder / "Testing", {"cat": 4, "dog": 4}, 500)


@accepted(20, 6, "test: VAL/")
def upper_case_splits(folder):
    write_classes(folder / "TRAIN", TWO)
    write_classes(folder / "VAL", {"cat": 3, "dog": 3}, 500)


@accepted(20, 6, "test: validation_set/")
def splits_of_two_words(folder):
    write_classes(folder / "train_set", TWO)
    write_classes(folder / "validation_set", {"cat": 3, "dog": 3}, 500)


@accepted(20, 6, "test: dev/")
def dev_is_a_split(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "dev", {"cat": 3, "dog": 3}, 500)


@accepted(16, 4, "20% of each class are kept for testing")
def only_train(folder):
    write_classes(folder / "train", TWO)


@accepted(20, 6, "the folder test (5 images) is not used: its images have no labels", "test: val/")
def flat_test(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"cat": 3, "dog": 3}, 500)
    write_classes(folder, {"test": 5}, 900)


@accepted(16, 4, "the folder test (5 images) is not used: its images have no labels")
def flat_test_in_a_folder_that_is_no_class(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"unknown": 5}, 900)


@accepted(20, 4, "the folder val (6 images) is not used: test is the test split")
def both_test_and_val(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"cat": 3, "dog": 3}, 500)
    write_classes(folder / "test", {"cat": 2, "dog": 2}, 900)


@accepted(20, 2, "1 class has no test images: dog")
def class_missing_in_test(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"cat": 2}, 900)


@refused("has the class 'Cat', which the training images do not have; did you mean cat?")
def other_case_in_test(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"Cat": 3, "dog": 3}, 500)


@accepted(16, 6, "labels of val are those of val_annotations.txt", classes=("n01", "n02"))
def tiny_imagenet(folder):
    for label, name in enumerate(("n01", "n02")):
        write_classes(folder / "train" / name, {"images": 8}, 100 * label)
    write_classes(folder / "val", {"images": 6}, 500)
    lines = [f"{i}.png\t{('n01', 'n02')[i % 2]}\t0\t0\t9\t9\n" for i in range(6)]
    write(folder / "val" / "val_annotations.txt", "".join(lines).encode())
    write_classes(folder / "test", {"images": 3}, 900)


@refused("val_annotations.txt: has no line for val/images/5.png")
def annotations_with_a_missing_line(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"images": 6}, 500)
    write(folder / "val" / "val_annotations.txt", b"".join(b"%d.png\tcat\n" % i for i in range(5)))


@refused("holds only the folder wrapper", "go deeper, to ", "/source/wrapper")
def wrapper(folder):
    write_classes(folder / "wrapper", TWO)


@refused("go deeper, to ", "/source/a/b")
def two_wrappers(folder):
    write_classes(folder / "a" / "b", TWO)


@refused("holds only the folder seg_train; its folders are the classes")
def wrapper_in_a_split(folder):
    write_classes(folder / "seg_train" / "seg_train", TWO)
    write_classes(folder / "seg_test" / "seg_test", TWO, 500)


@refused("all mean training; keep one of them")
def two_folders_for_training(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "Training", TWO, 500)


@refused("looks like a split for testing, and there is no folder train")
def no_train(folder):
    write_classes(folder / "test", TWO)
    write_classes(folder / "val", TWO, 500)


@refused("train holds images, but no folder for each class")
def flat_train(folder):
    write_classes(folder, {"train": 5, "test": 5})


@refused("test looks like a split, and cat, dog like a class")
def a_split_beside_classes(folder):
    write_classes(folder, TWO | {"test": 5})


@refused("cat holds test, train: the splits are inside the classes")
def splits_inside_classes(folder):
    for name in TWO:
        write_classes(folder / name, {"train": 5, "test": 2})


@accepted(16, 4, "each class holds the folders indoor, outdoor; all their images belong to the class")
def folders_inside_classes(folder):
    for label, name in enumerate(TWO):
        write_classes(folder / name, {"indoor": 5, "outdoor": 5}, 300 * label)


@accepted(20, 4, "the folder extra (3 images) is not used: it is beside train")
def a_folder_beside_the_splits(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"cat": 2, "dog": 2}, 500)
    write_classes(folder, {"extra": 3}, 900)


@accepted(16, 4, "2 files are not used, images beside the folders of images: 0.png, 1.png")
def images_beside_classes(folder):
    write_classes(folder, TWO)
    write_classes(folder.parent, {"source": 2}, 900)


@refused("holds 2 images, but no class folders")
def images_without_classes(folder):
    write_classes(folder.parent, {"source": 2})


@accepted(16, 4, "since the folder holds no images: empty/")
def empty_class(folder):
    write_classes(folder, TWO | {"empty": 0})


@accepted(13, 3, "1 class has no test images: rare", "1 class has fewer than 5 images: rare")
def class_of_one_image(folder):
    write_classes(folder, {"cat": 10, "rare": 1, "dog": 5})


@accepted(16, 4, "Cat and cat are different classes: are they the same?", classes=("Cat", "cat"))
def classes_that_differ_by_case(folder):
    write_classes(folder, {"Cat": 10, "cat": 10})


@accepted(20, 6, classes=("café", "thé"))
def two_spellings(folder):
    write_classes(folder / "train", {unicodedata.normalize("NFD", "café"): 10, "thé": 10})
    write_classes(folder / "val", {unicodedata.normalize("NFC", "café"): 3, "thé": 3}, 500)


@accepted(16, 4, "two folders are the class café", classes=("café", "thé"))
def two_spellings_of_a_class(folder):
    names = [unicodedata.normalize(form, "café") for form in ("NFD", "NFC")]
    write_classes(folder, {names[0]: 5, names[1]: 5, "thé": 10})


@accepted(24, 6, "🐶: 8 train", "a b: 8 train", r"c\nd: 8 train")
def names_of_all_kinds(folder):
    write_classes(folder, {"🐶": 10, "a b": 10, "c\nd": 9})
    write(folder / "c\nd" / ("x" * 250 + ".png"), encoded(999, "PNG"))


@accepted(16, 4)
def name_not_utf8(folder):
    write_classes(folder, TWO)
    os.rename(os.fsencode(folder / "cat" / "0.png"), os.fsencode(folder / "cat") + b"/caf\xe9.png")


@accepted(20, 4, classes=("caf\\xe9", "dog"))
def class_name_not_utf8(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"cat": 2, "dog": 2}, 500)
    for split in ("train", "test"):
        os.rename(os.fsencode(folder / split / "cat"), os.fsencode(folder / split) + b"/caf\xe9")


# Folders: files and links


@accepted(20, 4, "24 images of 2 classes (10 .png, 2 .jpg, 2 .bmp, 2 .gif, 2 .jfif, 2 .ppm, 2 .tif, 2 .webp)")
def other_suffixes(folder):
    write_classes(folder, {"cat": 5, "dog": 5})
    kinds = {
        "tif": "TIFF",
        "gif": "GIF",
        "ppm": "PPM",
        "jfif": "JPEG",
        "webp": "WEBP",
        "bmp": "BMP",
        "JPG": "JPEG",
    }
    for label, name in enumerate(TWO):
        for number, (suffix, kind) in enumerate(kinds.items()):
            write(folder / name / f"s.{suffix}", encoded(300 + 10 * label + number, kind))


@accepted(16, 4, "20 without a suffix")
def images_without_a_suffix(folder):
    write_classes(folder, TWO, suffix="")


@accepted(
    16,
    4,
    "1 file is not used, since they are no images that Pillow reads (.heic): cat/a.heic",
    "(.svg): dog/b.svg",
    "(without a suffix): dog/README",
)
def files_that_are_no_images(folder):
    write_classes(folder, TWO)
    write(folder / "cat" / "a.heic", b"\0\0\0\x18ftypheic")
    write(folder / "dog" / "b.svg", b"<svg/>")
    write(folder / "dog" / "README", b"about dogs")


@refused("2 of 22 images cannot be read, such as cat/empty.jpg (an empty file)", "--max-bad")
def broken_images(folder):
    write_classes(folder, TWO)
    write(folder / "cat" / "empty.jpg", b"")
    write(folder / "dog" / "page.jpg", b"<!DOCTYPE html>")


@accepted(
    16,
    4,
    "since other programs made them: __MACOSX/ (1 file), cat/@eaDir/ (10 files), dog/Thumbs.db",
    "are hidden: cat/.DS_Store, dog/.ipynb_checkpoints/ (1 file)",
)
def leftovers(folder):
    write_classes(folder, TWO)
    for i in range(10):
        write(folder / "cat" / "@eaDir" / f"{i}.png" / "SYNOPHOTO_THUMB_M.jpg", encoded(i))
    for name in ("__MACOSX/._cat", "cat/.DS_Store", "dog/Thumbs.db", "dog/.ipynb_checkpoints/0.png"):
        write(folder / name, b"x")
    (folder / "lost+found").mkdir()


@accepted(16, 4, "1 file is not used, beside the folders of images: embeddings.npy")
def stray_array(folder):
    write_classes(folder, TWO)
    np.save(folder / "embeddings.npy", np.zeros((3, 4)))


@accepted(16, 4, "train: train/", "beside the folders of images: all.tar, labels.parquet")
def stray_archives_beside_splits(folder):
    write_classes(folder / "train", TWO)
    write(folder / "all.tar", tar_of([("a", b"a")]))
    write(folder / "labels.parquet", b"")


@refused("holds no images, but images.zip: unpack it first")
def only_a_zip(folder):
    write(folder / "images.zip", zipped([("cat/0.jpg", encoded(0))]))


@refused("a file of no known kind", "unpack it first, and name the folder")
def a_zip(folder):
    write(folder / "images.zip", zipped([("cat/0.jpg", encoded(0))]))
    return folder / "images.zip"


@accepted(
    16,
    4,
    "6 files are not used, links that lead nowhere: cat/gone0.png",
    "folders that are read already: cat/above, cat/loop",
)
def links(folder):
    write_classes(folder, TWO)
    for i in range(5):
        (folder / "cat" / f"gone{i}.png").symlink_to("/gone/1.png")
    (folder / "cat" / "loop").symlink_to("..")
    (folder / "cat" / "above").symlink_to("../../..")
    (folder / "cat" / "itself.png").symlink_to("itself.png")


@accepted(16, 4)
def class_folder_and_images_that_are_links(folder):
    write_classes(folder / ".pool", TWO)
    write_classes(folder, {"dog": 0})
    (folder / "cat").symlink_to(".pool/cat")
    for i in range(10):
        (folder / "dog" / f"{i}.png").symlink_to(f"../.pool/dog/{i}.png")


@accepted(24, 6, "links to folders that are read already: a_link", classes=("cat", "dog", "fish"))
def a_link_to_another_class(folder):
    write_classes(folder, TWO | {"fish": 10})
    (folder / "a_link").symlink_to("fish")


@accepted(16, 4, "read already: val/cat")
def splits_that_link_to_the_same_images(folder):
    write_classes(folder / "train", TWO)
    (folder / "val").mkdir()
    for name in TWO:
        (folder / "val" / name).symlink_to(f"../train/{name}")


# Tars


def write_tar(folder: Path, members, name: str = "train.tar", **options) -> None:
    write(folder / name, tar_of(members, **options))


@accepted(16, 4, "train: train.tar: 20 samples (20 .jpg; labels .cls)", classes=("0", "1"))
def tar(folder):
    write_tar(folder, samples(0, 20))


@refused("train.tar: is damaged behind s003.cls, at byte", "neither a member nor the end of the tar")
def tar_damaged_header(folder):
    content = bytearray(tar_of(samples(0, 10)))
    content[content.find(b"s004.jpg") + 150] ^= 3
    write(folder / "train.tar", bytes(content))


@refused("is no tar")
def tar_damaged_first_header(folder):
    content = bytearray(tar_of(samples(0, 10)))
    content[150] ^= 3
    write(folder / "train.tar", bytes(content))


@accepted(16, 4, "train.tar is 2 tars, one behind the other; the members of all are used")
def tar_concatenated(folder):
    write(folder / "train.tar", tar_of(samples(0, 10)) + tar_of(samples(10, 10)))


@refused("s000.jpg is in it twice")
def tar_concatenated_with_itself(folder):
    write(folder / "train.tar", 2 * tar_of(samples(0, 10)))


@refused("something that is no tar follows the end of the tar")
def tar_with_something_behind(folder):
    write(folder / "train.tar", tar_of(samples(0, 10)) + b"x" * 512)


@accepted(8, 2, "has no mark at its end: was it cut behind s009.cls?")
def tar_without_an_end(folder):
    content = tar_of(samples(0, 10))
    write(folder / "train.tar", content[: len(content.rstrip(b"\0")) // 512 * 512 + 512])


@refused("ends within s009.jpg")
def tar_cut_in_an_image(folder):
    content = tar_of(samples(0, 10))
    write(folder / "train.tar", content[: content.find(b"s009.jpg") + 600])


@refused("is damaged behind s008.cls")
def tar_cut_in_a_header(folder):
    content = tar_of(samples(0, 10))
    write(folder / "train.tar", content[: content.find(b"s009.jpg") + 100])


@refused("train.tar: the file is empty")
def tar_of_no_bytes(folder):
    write(folder / "train.tar", b"")


@refused("holds no samples; a sample is KEY.jpg and KEY.cls; it holds nothing")
def tar_of_no_members(folder):
    write_tar(folder, [])


@refused("it is compressed with gzip: unpack it first (gunzip)")
def tar_compressed(folder):
    write(folder / "train.tar", gzipped(tar_of(samples(0, 10))))


@refused("holds no images, but train.tar.gz: unpack it first")
def tar_gz(folder):
    write(folder / "train.tar.gz", gzipped(tar_of(samples(0, 10))))


@refused("it is a zip archive: unpack it first (unzip)")
def zip_named_tar(folder):
    write(folder / "train.tar", zipped(samples(0, 10)))


@refused("it is no tar")
def page_named_tar(folder):
    write(folder / "train.tar", b"<!DOCTYPE html>" + b" " * 2000)


@refused("s000.jpg is in it twice; a key must stand for one sample")
def tar_key_twice(folder):
    write_tar(folder, [*samples(0, 5), *samples(0, 5)])


@accepted(16, 4, "train-1.tar; they are used as different samples")
def tars_with_the_same_keys(folder):
    write_tar(folder, samples(0, 10), "train-0.tar")
    write_tar(
        folder, [(name, content + b"\0" * ("jpg" in name)) for name, content in samples(0, 10)], "train-1.tar"
    )


def with_masks(count: int, mask: str) -> list[tuple[str, bytes]]:
    return [*samples(0, count), *((f"s{i:03d}.{mask}", encoded(50 + i, "PNG")) for i in range(count))]


@refused("s000 has 2 images (jpg, png); choose one with --image jpg")
def tar_image_and_mask(folder):
    write_tar(folder, with_masks(10, "png"))


@accepted(
    8, 2, "10 files are not used, since another image of the sample is used (png)", options=("--image", "jpg")
)
def tar_image_chosen(folder):
    write_tar(folder, with_masks(10, "png"))


@refused("s000 has no image webp: it has jpg, png (--image)", options=("--image", "webp"))
def tar_image_that_is_not_there(folder):
    write_tar(folder, with_masks(10, "png"))


@accepted(8, 2, "10 files are not used, since another image of the sample is used (seg.png): s000.seg.png")
def tar_further_images(folder):
    write_tar(folder, with_masks(10, "seg.png"))


@accepted(8, 2, classes=("0", "1"))
def tar_dots_in_keys(folder):
    members = []
    for i in range(5):
        members += [(f"22.0{i}.jpg", encoded(i)), (f"22.0{i}.cls", b"0")]
        members += [(f"t{i}.input.jpg", encoded(9 + i)), (f"t{i}.cls", b"1")]
    write_tar(folder, members)


@accepted(8, 2)
def tar_upper_case_and_dot_folder(folder):
    write_tar(folder, [(f"./{name.upper()}", content) for name, content in samples(0, 10)])


@accepted(8, 2)
def tar_absolute_names(folder):
    write_tar(folder, [(f"/data/{name}", content) for name, content in samples(0, 10)])


@accepted(8, 2)
def tar_with_long_names(folder):
    write_tar(
        folder,
        [("d" * 150 + "/" + name, content) for name, content in samples(0, 10)],
        format=tarfile.GNU_FORMAT,
    )


@accepted(8, 2)
def tar_with_pax_headers(folder):
    write_tar(folder, [("é" * 120 + name, content) for name, content in samples(0, 10)])


@accepted(
    8,
    2,
    "1 file is not used, links to what is not in the tar: gone.jpg",
    "devices or the like: pipe",
    "since other programs made them: ._s000.jpg",
)
def tar_of_links_and_more(folder):
    links = [
        ("folder", {"type": tarfile.DIRTYPE}),
        ("s009.jpg", {"type": tarfile.LNKTYPE, "linkname": "s001.jpg"}),
        ("s009.cls", {"type": tarfile.SYMTYPE, "linkname": "./s001.cls"}),
        ("gone.jpg", {"type": tarfile.SYMTYPE, "linkname": "../gone.jpg"}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
        ("._s000.jpg", b"x"),
    ]
    write_tar(folder, [*samples(0, 9), *links])


@refused("s000.jpg is stored with holes; make the tar without --sparse")
def tar_sparse(folder):
    write(folder / "train.tar", sparse_tar(folder.parent / "with-holes"))


@refused("s010.jpg has no label")
def tar_sample_without_a_label(folder):
    write_tar(folder, [*samples(0, 10), ("s010.jpg", encoded(10))])


@accepted(8, 2, "labels without an image: s010.cls", "(.json): s000.json")
def tar_label_without_an_image(folder):
    write_tar(folder, [*samples(0, 10), ("s010.cls", b"1"), ("s000.json", b"{}")])


@refused("it holds 2 .jpg; if folders are the classes, unpack it")
def tar_of_class_folders(folder):
    write_tar(folder, [("cat/0.jpg", encoded(0)), ("dog/0.jpg", encoded(1))])


@accepted(8, 2, classes=("class0", "class1"))
def tar_with_words(folder):
    write_tar(folder, samples(0, 10, "class{}\n"))


@refused("the labels are numbers and words, such as 0 and cat")
def tar_with_words_and_numbers(folder):
    write_tar(folder, [*samples(0, 10), ("x.jpg", encoded(10)), ("x.cls", b"cat")])


def label(text: bytes, shown: str):
    @refused(f"s010.cls: is {shown}; must be the number of the class, from 0, or a word")
    def make(folder):
        write_tar(folder, [*samples(0, 10), ("s010.jpg", encoded(10)), ("s010.cls", text)])

    CASES[f"label_{shown.replace(' ', '_')}"] = CASES.pop("make")


for text, shown in (
    (b"-1", "-1"),
    (b"1.0", "1.0"),
    (b"", "empty"),
    (b" \n", "empty"),
    (b"1\n2", r"1\n2"),
    (b"nan", "nan"),
    (b"\x00\x01", r"\x00\x01"),
    (b"30000000000", "30000000000"),
    (b"\x80\x04K\x01.", "\ufffd\\x04K\\x01."),
):
    label(text, shown)


@refused("the label 300000 of 11 images can be no class number")
def tar_huge_label(folder):
    write_tar(folder, [*samples(0, 10), ("s010.jpg", encoded(10)), ("s010.cls", b"300000")])


@accepted(8, 2, "4 classes have no images: 1, 2, 3, 4")
def tar_gaps_in_labels(folder):
    write_tar(
        folder,
        [
            (name, content.replace(b"1", b"5") if "cls" in name else content)
            for name, content in samples(0, 10)
        ],
    )


@accepted(10, 4, "train: a.tar: 10 samples", "test: b.tar: 4 samples")
def tars_in_folders(folder):
    write_tar(folder / "train", samples(0, 10), "a.tar")
    write_tar(folder / "val", samples(10, 4), "b.tar")


@accepted(10, 4, "1 tars are not used, since no word in their names is a split: extra.tar")
def tar_of_no_split(folder):
    write_tar(folder, samples(0, 10), "train.tar")
    write_tar(folder, samples(10, 4), "test.tar")
    write_tar(folder, samples(20, 4), "extra.tar")


@accepted(8, 2, "since they are no .tar files: notes.md")
def file_beside_tars(folder):
    write_tar(folder, samples(0, 10))
    write(folder / "notes.md", b"notes")


@refused("no such folder or file", "braces are not expanded: name the folder that holds the tars")
def tars_in_braces(folder):
    write_tar(folder, samples(0, 10), "train-0.tar")
    return folder / "train-{0..9}.tar"


@refused("--image jpg: chooses among the images of a WebDataset sample", options=("--image", "jpg"))
def image_of_folders(folder):
    write_classes(folder, TWO)


@pytest.mark.parametrize("name", CASES)
def test_an_input_is_used_whole_or_named_or_refused(name, tmp_path):
    case, source, out = CASES[name], tmp_path / "source", tmp_path / "out"
    source.mkdir()
    given = case.make(source) or source
    before = snapshot(source)
    ended = call("data", "prepare", given, "--out", out, *case.options)
    assert snapshot(source) == before
    assert not RAW.search(ended.out + ended.err), ended
    for text in case.says:
        assert text in ended.out + ended.err, ended
    if case.train is None:
        assert ended.status, ended
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        assert set(os.listdir(out) if out.exists() else ()) <= {".parts", "unreadable.csv"}
        return
    assert ended.status == 0, ended
    manifest = shards.read_manifest(str(out))
    assert {split: manifest.rows(split) for split in manifest.splits} == {
        "train": case.train,
        "test": case.test,
    }
    assert case.classes in (None, tuple(manifest.classes))
    assert f"recognised as {manifest.source['format']}" in ended.out
