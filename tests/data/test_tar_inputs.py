"""Tars that people have: each is used whole, or what is not used is counted and named, or it is refused."""

import tarfile
from pathlib import Path

import pytest

from tests.support.inputs import Inputs, check_input
from tests.support.sources import encoded, gzipped, samples, sparse_tar, tar_of, write, write_classes, zipped

CASES = Inputs()


def write_tar(folder: Path, members, name: str = "train.tar", **options) -> None:
    write(folder / name, tar_of(members, **options))


@CASES.accepted(16, 4, "train: train.tar: 20 samples (20 .jpg; labels .cls)", classes=("0", "1"))
def tar(folder):
    write_tar(folder, samples(0, 20))


@CASES.refused("train.tar: is damaged behind s003.cls, at byte", "neither a member nor the end of the tar")
def tar_damaged_header(folder):
    content = bytearray(tar_of(samples(0, 10)))
    content[content.find(b"s004.jpg") + 150] ^= 3
    write(folder / "train.tar", bytes(content))


@CASES.refused("is no tar")
def tar_damaged_first_header(folder):
    content = bytearray(tar_of(samples(0, 10)))
    content[150] ^= 3
    write(folder / "train.tar", bytes(content))


@CASES.accepted(16, 4, "train.tar is 2 tars, one behind the other; the members of all are used")
def tar_concatenated(folder):
    write(folder / "train.tar", tar_of(samples(0, 10)) + tar_of(samples(10, 10)))


@CASES.refused("s000.jpg is in it twice")
def tar_concatenated_with_itself(folder):
    write(folder / "train.tar", 2 * tar_of(samples(0, 10)))


@CASES.refused("something that is no tar follows the end of the tar")
def tar_with_something_behind(folder):
    write(folder / "train.tar", tar_of(samples(0, 10)) + b"x" * 512)


@CASES.accepted(8, 2, "has no mark at its end: was it cut behind s009.cls?")
def tar_without_an_end(folder):
    content = tar_of(samples(0, 10))
    write(folder / "train.tar", content[: len(content.rstrip(b"\0")) // 512 * 512 + 512])


@CASES.refused("ends within s009.jpg")
def tar_cut_in_an_image(folder):
    content = tar_of(samples(0, 10))
    write(folder / "train.tar", content[: content.find(b"s009.jpg") + 600])


@CASES.refused("is damaged behind s008.cls")
def tar_cut_in_a_header(folder):
    content = tar_of(samples(0, 10))
    write(folder / "train.tar", content[: content.find(b"s009.jpg") + 100])


@CASES.refused("train.tar: the file is empty")
def tar_of_no_bytes(folder):
    write(folder / "train.tar", b"")


@CASES.refused("holds no samples; a sample is KEY.jpg and KEY.cls; it holds nothing")
def tar_of_no_members(folder):
    write_tar(folder, [])


@CASES.refused("it is compressed with gzip: unpack it first (gunzip)")
def tar_compressed(folder):
    write(folder / "train.tar", gzipped(tar_of(samples(0, 10))))


@CASES.refused("holds no images, but train.tar.gz: unpack it first")
def tar_gz(folder):
    write(folder / "train.tar.gz", gzipped(tar_of(samples(0, 10))))


@CASES.refused("it is a zip archive: unpack it first (unzip)")
def zip_named_tar(folder):
    write(folder / "train.tar", zipped(samples(0, 10)))


@CASES.refused("it is no tar")
def page_named_tar(folder):
    write(folder / "train.tar", b"<!DOCTYPE html>" + b" " * 2000)


@CASES.refused("s000.jpg is in it twice; a key must stand for one sample")
def tar_key_twice(folder):
    write_tar(folder, [*samples(0, 5), *samples(0, 5)])


@CASES.accepted(16, 4, "train-1.tar; they are used as different samples")
def tars_with_the_same_keys(folder):
    write_tar(folder, samples(0, 10), "train-0.tar")
    write_tar(
        folder, [(name, content + b"\0" * ("jpg" in name)) for name, content in samples(0, 10)], "train-1.tar"
    )


def with_masks(count: int, mask: str) -> list[tuple[str, bytes]]:
    return [*samples(0, count), *((f"s{i:03d}.{mask}", encoded(50 + i, "PNG")) for i in range(count))]


@CASES.refused("s000 has 2 images (jpg, png); choose one with --image jpg")
def tar_image_and_mask(folder):
    write_tar(folder, with_masks(10, "png"))


@CASES.accepted(
    8, 2, "10 files are not used (another image of the sample is used: png)", options=("--image", "jpg")
)
def tar_image_chosen(folder):
    write_tar(folder, with_masks(10, "png"))


@CASES.refused("s000 has no image webp: it has jpg, png (--image)", options=("--image", "webp"))
def tar_image_that_is_not_there(folder):
    write_tar(folder, with_masks(10, "png"))


@CASES.accepted(8, 2, "10 files are not used (another image of the sample is used: seg.png): s000.seg.png")
def tar_further_images(folder):
    write_tar(folder, with_masks(10, "seg.png"))


@CASES.accepted(8, 2, classes=("0", "1"))
def tar_dots_in_keys(folder):
    members = []
    for i in range(5):
        members += [(f"22.0{i}.jpg", encoded(i)), (f"22.0{i}.cls", b"0")]
        members += [(f"t{i}.input.jpg", encoded(9 + i)), (f"t{i}.cls", b"1")]
    write_tar(folder, members)


@CASES.accepted(8, 2)
def tar_upper_case_and_dot_folder(folder):
    write_tar(folder, [(f"./{name.upper()}", content) for name, content in samples(0, 10)])


@CASES.accepted(8, 2)
def tar_absolute_names(folder):
    write_tar(folder, [(f"/data/{name}", content) for name, content in samples(0, 10)])


@CASES.accepted(8, 2)
def tar_with_long_names(folder):
    write_tar(
        folder,
        [("d" * 150 + "/" + name, content) for name, content in samples(0, 10)],
        format=tarfile.GNU_FORMAT,
    )


@CASES.accepted(8, 2)
def tar_with_pax_headers(folder):
    write_tar(folder, [("é" * 120 + name, content) for name, content in samples(0, 10)])


@CASES.accepted(
    8,
    2,
    "1 file is not used (links to what is not in the tar): gone.jpg",
    "devices or the like): pipe",
    "made by other programs): ._s000.jpg",
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


@CASES.refused("s000.jpg is stored with holes; make the tar without --sparse")
def tar_sparse(folder):
    write(folder / "train.tar", sparse_tar(folder.parent / "with-holes"))


@CASES.refused("s010.jpg has no label")
def tar_sample_without_a_label(folder):
    write_tar(folder, [*samples(0, 10), ("s010.jpg", encoded(10))])


@CASES.accepted(8, 2, "labels without an image): s010.cls", ".json): s000.json")
def tar_label_without_an_image(folder):
    write_tar(folder, [*samples(0, 10), ("s010.cls", b"1"), ("s000.json", b"{}")])


@CASES.refused("it holds 2 .jpg; if folders are the classes, unpack it")
def tar_of_class_folders(folder):
    write_tar(folder, [("cat/0.jpg", encoded(0)), ("dog/0.jpg", encoded(1))])


@CASES.accepted(8, 2, classes=("class0", "class1"))
def tar_with_words(folder):
    write_tar(folder, samples(0, 10, "class{}\n"))


@CASES.refused("the labels are numbers and words, such as 0 and cat")
def tar_with_words_and_numbers(folder):
    write_tar(folder, [*samples(0, 10), ("x.jpg", encoded(10)), ("x.cls", b"cat")])


def label(text: bytes, shown: str):
    @CASES.refused(f"s010.cls: is {shown}; must be the number of the class, from 0, or a word")
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


@CASES.refused("has the label 300000, which can be no class of 11 images")
def tar_huge_label(folder):
    write_tar(folder, [*samples(0, 10), ("s010.jpg", encoded(10)), ("s010.cls", b"300000")])


@CASES.accepted(8, 2, "4 classes have no images: 1, 2, 3, 4")
def tar_gaps_in_labels(folder):
    write_tar(
        folder,
        [
            (name, content.replace(b"1", b"5") if "cls" in name else content)
            for name, content in samples(0, 10)
        ],
    )


@CASES.accepted(10, 4, "train: a.tar: 10 samples", "test: b.tar: 4 samples")
def tars_in_folders(folder):
    write_tar(folder / "train", samples(0, 10), "a.tar")
    write_tar(folder / "val", samples(10, 4), "b.tar")


@CASES.accepted(10, 4, "1 tars are not used, since no word in their names is a split: extra.tar")
def tar_of_no_split(folder):
    write_tar(folder, samples(0, 10), "train.tar")
    write_tar(folder, samples(10, 4), "test.tar")
    write_tar(folder, samples(20, 4), "extra.tar")


@CASES.accepted(8, 2, "no .tar file): notes.md")
def file_beside_tars(folder):
    write_tar(folder, samples(0, 10))
    write(folder / "notes.md", b"notes")


@CASES.refused("its members lie in folders for train and val; make a tar for each split")
def tar_of_two_splits(folder):
    members = samples(0, 10)
    write_tar(
        folder,
        [(f"train/{name}", content) for name, content in members[:10]]
        + [(f"val/{name}", content) for name, content in members[10:]],
    )


@CASES.refused("no such folder or file", "braces are not expanded: name the folder that holds the tars")
def tars_in_braces(folder):
    write_tar(folder, samples(0, 10), "train-0.tar")
    return folder / "train-{0..9}.tar"


@CASES.refused("--image jpg: chooses among the images of a WebDataset sample", options=("--image", "jpg"))
def image_of_folders(folder):
    write_classes(folder, {"cat": 5, "dog": 5})


@pytest.mark.parametrize("name", CASES)
def test_a_tar_is_used_whole_or_named_or_refused(name, tmp_path):
    check_input(CASES[name], tmp_path)
