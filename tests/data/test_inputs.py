"""Folders that people have: used whole, or what is not used is counted and named, or refused."""

import os
import unicodedata

import numpy as np
import pytest

from tests.support.inputs import Inputs, check_input
from tests.support.sources import encoded, tar_of, write, write_classes, zipped

CASES, TWO = Inputs(), {"cat": 10, "dog": 10}

# Splits and classes


@CASES.accepted(20, 8, "train: Training/: 20 images of 2 classes", classes=("cat", "dog"))
def training_and_testing(folder):
    write_classes(folder / "Training", TWO)
    write_classes(folder / "Testing", {"cat": 4, "dog": 4}, 500)


@CASES.accepted(20, 6, "test: VAL/")
def upper_case_splits(folder):
    write_classes(folder / "TRAIN", TWO)
    write_classes(folder / "VAL", {"cat": 3, "dog": 3}, 500)


@CASES.accepted(20, 6, "test: validation_set/")
def splits_of_two_words(folder):
    write_classes(folder / "train_set", TWO)
    write_classes(folder / "validation_set", {"cat": 3, "dog": 3}, 500)


@CASES.accepted(20, 6, "test: dev/")
def dev_is_a_split(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "dev", {"cat": 3, "dog": 3}, 500)


@CASES.accepted(16, 4, "20% of each class are kept for testing")
def only_train(folder):
    write_classes(folder / "train", TWO)


@CASES.accepted(20, 6, "the folder test (5 images) is not used: its images have no labels", "test: val/")
def flat_test(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"cat": 3, "dog": 3}, 500)
    write_classes(folder, {"test": 5}, 900)


@CASES.accepted(16, 4, "the folder test (5 images) is not used: its images have no labels")
def flat_test_in_a_folder_that_is_no_class(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"unknown": 5}, 900)


@CASES.accepted(20, 4, "the folder val (6 images) is not used: test is the test split")
def both_test_and_val(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"cat": 3, "dog": 3}, 500)
    write_classes(folder / "test", {"cat": 2, "dog": 2}, 900)


@CASES.accepted(20, 2, "1 class has no test images: dog")
def class_missing_in_test(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"cat": 2}, 900)


@CASES.refused("has the class 'Cat', which the training images do not have; did you mean cat?")
def other_case_in_test(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"Cat": 3, "dog": 3}, 500)


@CASES.accepted(16, 6, "labels of val are those of val_annotations.txt", classes=("n01", "n02"))
def tiny_imagenet(folder):
    for label, name in enumerate(("n01", "n02")):
        write_classes(folder / "train" / name, {"images": 8}, 100 * label)
    write_classes(folder / "val", {"images": 6}, 500)
    lines = [f"{i}.png\t{('n01', 'n02')[i % 2]}\t0\t0\t9\t9\n" for i in range(6)]
    write(folder / "val" / "val_annotations.txt", "".join(lines).encode())
    write_classes(folder / "test", {"images": 3}, 900)


@CASES.refused("val_annotations.txt: has no line for val/images/5.png")
def annotations_with_a_missing_line(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "val", {"images": 6}, 500)
    write(folder / "val" / "val_annotations.txt", b"".join(b"%d.png\tcat\n" % i for i in range(5)))


@CASES.refused("holds only the folder wrapper", "what is wanted is deeper: name ", "/source/wrapper")
def wrapper(folder):
    write_classes(folder / "wrapper", TWO)


@CASES.refused("what is wanted is deeper: name ", "/source/a/b")
def two_wrappers(folder):
    write_classes(folder / "a" / "b", TWO)


@CASES.refused("holds only the folder seg_train; its folders are the classes")
def wrapper_in_a_split(folder):
    write_classes(folder / "seg_train" / "seg_train", TWO)
    write_classes(folder / "seg_test" / "seg_test", TWO, 500)


@CASES.refused("all mean training; keep one of them")
def two_folders_for_training(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "Training", TWO, 500)


@CASES.refused("looks like a split for testing, and there is no folder train")
def no_train(folder):
    write_classes(folder / "test", TWO)
    write_classes(folder / "val", TWO, 500)


@CASES.refused("train holds images, but no folder for each class")
def flat_train(folder):
    write_classes(folder, {"train": 5, "test": 5})


@CASES.refused("test looks like a split, and cat, dog like a class")
def a_split_beside_classes(folder):
    write_classes(folder, TWO | {"test": 5})


@CASES.refused("cat holds test, train: the splits are inside the classes")
def splits_inside_classes(folder):
    for name in TWO:
        write_classes(folder / name, {"train": 5, "test": 2})


@CASES.accepted(16, 4, "each class holds the folders indoor, outdoor; all their images belong to the class")
def folders_inside_classes(folder):
    for label, name in enumerate(TWO):
        write_classes(folder / name, {"indoor": 5, "outdoor": 5}, 300 * label)


@CASES.accepted(20, 4, "the folder extra (3 images) is not used: it is beside train")
def a_folder_beside_the_splits(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"cat": 2, "dog": 2}, 500)
    write_classes(folder, {"extra": 3}, 900)


@CASES.accepted(16, 4, "2 files are not used (images beside the folders of images): 0.png, 1.png")
def images_beside_classes(folder):
    write_classes(folder, TWO)
    write_classes(folder.parent, {"source": 2}, 900)


@CASES.refused("holds 2 images, but no class folders")
def images_without_classes(folder):
    write_classes(folder.parent, {"source": 2})


@CASES.refused(
    "holds 2 images, but no class folders; wanted is ",
    "Labels are the names of folders: labels.csv (columns: file, breed) is not read; move",
)
def images_and_a_list_of_labels(folder):
    write_classes(folder.parent, {"source": 2})
    write(folder / "labels.csv", b"\xef\xbb\xbffile;breed\r\n0.png;pug\r\n")


@CASES.accepted(16, 4, "1 folder is not used (no files in them): empty/")
def empty_class(folder):
    write_classes(folder, TWO | {"empty": 0})


@CASES.accepted(13, 3, "1 class has no test images: rare", "1 class has fewer than 5 images: rare")
def class_of_one_image(folder):
    write_classes(folder, {"cat": 10, "rare": 1, "dog": 5})


@CASES.accepted(16, 4, "Cat and cat are different classes: are they the same?", classes=("Cat", "cat"))
def classes_that_differ_by_case(folder):
    write_classes(folder, {"Cat": 10, "cat": 10})


@CASES.accepted(20, 6, classes=("café", "thé"))
def two_spellings(folder):
    write_classes(folder / "train", {unicodedata.normalize("NFD", "café"): 10, "thé": 10})
    write_classes(folder / "val", {unicodedata.normalize("NFC", "café"): 3, "thé": 3}, 500)


@CASES.accepted(16, 4, "two folders are the class café", classes=("café", "thé"))
def two_spellings_of_a_class(folder):
    names = [unicodedata.normalize(form, "café") for form in ("NFD", "NFC")]
    write_classes(folder, {names[0]: 5, names[1]: 5, "thé": 10})


@CASES.accepted(24, 6, "🐶: 8 train", "a b: 8 train", r"c\nd: 8 train")
def names_of_all_kinds(folder):
    write_classes(folder, {"🐶": 10, "a b": 10, "c\nd": 9})
    write(folder / "c\nd" / ("x" * 250 + ".png"), encoded(999, "PNG"))


@CASES.accepted(16, 4)
def name_not_utf8(folder):
    write_classes(folder, TWO)
    os.rename(os.fsencode(folder / "cat" / "0.png"), os.fsencode(folder / "cat") + b"/caf\xe9.png")


@CASES.accepted(20, 4, classes=("caf\\xe9", "dog"))
def class_name_not_utf8(folder):
    write_classes(folder / "train", TWO)
    write_classes(folder / "test", {"cat": 2, "dog": 2}, 500)
    for split in ("train", "test"):
        os.rename(os.fsencode(folder / split / "cat"), os.fsencode(folder / split) + b"/caf\xe9")


# Files and links


@CASES.accepted(
    20, 4, "24 images of 2 classes (10 .png, 2 .jpg, 2 .bmp, 2 .gif, 2 .jfif, 2 .ppm, 2 .tif, 2 .webp)"
)
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


@CASES.accepted(16, 4, "20 without a suffix")
def images_without_a_suffix(folder):
    write_classes(folder, TWO, suffix="")


@CASES.accepted(
    16,
    4,
    "1 file is not used (no image that Pillow reads: .heic): cat/a.heic",
    ".svg): dog/b.svg",
    "without a suffix): dog/README",
)
def files_that_are_no_images(folder):
    write_classes(folder, TWO)
    write(folder / "cat" / "a.heic", b"\0\0\0\x18ftypheic")
    write(folder / "dog" / "b.svg", b"<svg/>")
    write(folder / "dog" / "README", b"about dogs")


@CASES.refused("2 of 22 images cannot be read, such as cat/empty.jpg (an empty file)", "--max-bad")
def broken_images(folder):
    write_classes(folder, TWO)
    write(folder / "cat" / "empty.jpg", b"")
    write(folder / "dog" / "page.jpg", b"<!DOCTYPE html>")


@CASES.accepted(
    16,
    4,
    "made by other programs): __MACOSX/ (1 file), cat/@eaDir/ (10 files), dog/Thumbs.db",
    "not used (hidden): cat/.DS_Store, dog/.ipynb_checkpoints/ (1 file)",
)
def leftovers(folder):
    write_classes(folder, TWO)
    for i in range(10):
        write(folder / "cat" / "@eaDir" / f"{i}.png" / "SYNOPHOTO_THUMB_M.jpg", encoded(i))
    for name in ("__MACOSX/._cat", "cat/.DS_Store", "dog/Thumbs.db", "dog/.ipynb_checkpoints/0.png"):
        write(folder / name, b"x")
    (folder / "lost+found").mkdir()


@CASES.accepted(16, 4, "1 file is not used (beside the folders of images): embeddings.npy")
def stray_array(folder):
    write_classes(folder, TWO)
    np.save(folder / "embeddings.npy", np.zeros((3, 4)))


@CASES.accepted(16, 4, "3 files are not used (beside the folders of images): data_batch_1, meta, test_batch")
def stray_batches(folder):
    write_classes(folder, TWO)
    for name in ("data_batch_1", "test_batch", "meta"):
        write(folder / name, b"no pickle")


@CASES.accepted(16, 4, "train: train/", "(beside the folders of images): all.tar, labels.parquet")
def stray_archives_beside_splits(folder):
    write_classes(folder / "train", TWO)
    write(folder / "all.tar", tar_of([("a", b"a")]))
    write(folder / "labels.parquet", b"")


@CASES.refused("holds 2 files, and none is an image that Pillow reads (.heic)")
def only_what_pillow_does_not_read(folder):
    write(folder / "cat" / "0.heic", b"x")
    write(folder / "dog" / "1.heic", b"x")


@CASES.refused("holds no images, but images.zip: unpack it first")
def only_a_zip(folder):
    write(folder / "images.zip", zipped([("cat/0.jpg", encoded(0))]))


@CASES.refused("a file of no known kind", "unpack it first, and name the folder")
def a_zip(folder):
    write(folder / "images.zip", zipped([("cat/0.jpg", encoded(0))]))
    return folder / "images.zip"


@CASES.accepted(
    16,
    4,
    "6 files are not used (links that lead nowhere): cat/gone0.png",
    "folders that are read already): cat/above, cat/loop",
)
def links(folder):
    write_classes(folder, TWO)
    for i in range(5):
        (folder / "cat" / f"gone{i}.png").symlink_to("/gone/1.png")
    (folder / "cat" / "loop").symlink_to("..")
    (folder / "cat" / "above").symlink_to("../../..")
    (folder / "cat" / "itself.png").symlink_to("itself.png")


@CASES.accepted(16, 4)
def class_folder_and_images_that_are_links(folder):
    write_classes(folder / ".pool", TWO)
    write_classes(folder, {"dog": 0})
    (folder / "cat").symlink_to(".pool/cat")
    for i in range(10):
        (folder / "dog" / f"{i}.png").symlink_to(f"../.pool/dog/{i}.png")


@CASES.accepted(24, 6, "links to folders that are read already): a_link", classes=("cat", "dog", "fish"))
def a_link_to_another_class(folder):
    write_classes(folder, TWO | {"fish": 10})
    (folder / "a_link").symlink_to("fish")


@CASES.accepted(16, 4, "read already): val/cat")
def splits_that_link_to_the_same_images(folder):
    write_classes(folder / "train", TWO)
    (folder / "val").mkdir()
    for name in TWO:
        (folder / "val" / name).symlink_to(f"../train/{name}")


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_used_whole_or_named_or_refused(name, tmp_path):
    check_input(CASES[name], tmp_path)
