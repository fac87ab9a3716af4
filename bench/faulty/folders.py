"""Cases of bench/faults.py: class folders."""

import os
import unicodedata
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from bench.faulty.expect import (
    Prepared,
    Sample,
    either,
    expect_prepared,
    refused,
)
from bench.faulty.inputs import (
    class_folders,
    packed,
    scene,
    seen_by_pil,
    write,
    write_table,
    write_tar,
)
from bench.faulty.stage import Stage, case

OVERLAP = r"overlap|inside|same (folder|as|place)|is SOURCE|the source|holds? .*(files?|not)|not empty"
OTHERS = (
    r"not (empty|written by|ours|deit-ray|a data set|made|in its manifest)|other files|did not write|"
    r"nothing that|no data set of|foreign|choose|another folder|empty"
)


@case("only_train", "prepare", train=("train",), capital=("Train",), training=("training",))
def only_train(stage: Stage, name: str) -> None:
    """A fifth of each class is kept for testing."""
    samples = class_folders(stage / "mine" / name, ("apple", "pear", "plum"))
    expect_prepared(stage, "mine", Prepared({"all": samples}, tested=2))


@case(
    "training_and_testing",
    "prepare",
    Training=("Training", "Testing"),
    train_valid=("train", "valid"),
    TRAIN=("TRAIN", "TEST"),
    kaggle=("training_set", "test_set"),
)
def training_and_testing(stage: Stage, train: str, test: str) -> None:
    """Folders that are splits never become classes."""
    kept = class_folders(stage / "mine" / train)
    tested = class_folders(stage / "mine" / test, each=4, first=50)
    splits = Prepared({"train": kept, "test": tested})
    expect_prepared(stage, "mine", either(splits, refused(f"{train}|{test}|split")))


@case("flat_test", "prepare", flat=("",), one_folder=("unknown",), images=("images",))
def flat_test(stage: Stage, below: str) -> None:
    """test has no labels: val is used, and a line says so."""
    kept = class_folders(stage / "mine/train")
    tested = class_folders(stage / "mine/val", each=3, first=30)
    for i in range(5):
        write(stage / "mine/test" / below / f"{i}.jpg", packed(scene(600 + i), "JPEG"))
    used = Prepared({"train": kept, "test": tested}, words=(r"\btest\b.*(not used|label)",))
    expect_prepared(stage, "mine", either(used, refused("test", below)) if below else used)


@case("tiny_imagenet", "prepare", words=("n01", "n02"), names=("cat", "dog"))
def tiny_imagenet(stage: Stage, first: str, second: str) -> None:
    """train/CLASS/images/x.png, and val/val_annotations.txt with the labels of val/images."""
    kept, tested, lines = [], [], []
    for place, name in enumerate((first, second)):
        for i in range(8):
            content = packed(scene(place * 30 + i))
            write(stage / "mine/train" / name / "images" / f"{name}_{i}.png", content)
            kept.append(Sample(seen_by_pil(content), name))
        write(stage / "mine/train" / name / f"{name}_boxes.txt", "0\t0\t9\t9\n")
    for i in range(6):
        content, name = packed(scene(100 + i)), (first, second)[i % 2]
        write(stage / "mine/val/images" / f"val_{i}.png", content)
        lines.append(f"val_{i}.png\t{name}\t0\t0\t9\t9\n")
        tested.append(Sample(seen_by_pil(content), name))
    write(stage / "mine/val/val_annotations.txt", "".join(lines))
    write(stage / "mine/wnids.txt", f"{first}\n{second}\n")
    for i in range(3):
        write(stage / "mine/test/images" / f"test_{i}.png", packed(scene(200 + i)))
    expected = either(Prepared({"train": kept, "test": tested}), refused("val", "annotations|class|folder"))
    expect_prepared(stage, "mine", expected)


@case("wrapper", "prepare", one=("dataset", ""), two=("a/b", ""), beside=("photos", "__MACOSX"))
def wrapper(stage: Stage, inner: str, beside: str) -> None:
    """One folder too high: refused, naming the folder inside; or prepared."""
    samples = class_folders(stage / "mine" / inner, ("apple", "pear", "plum"))
    if beside:
        write(stage / "mine" / beside / "._photos", b"\0\5\x16\7")
    deeper = refused(Path(inner).parts[0], r"deeper|instead|inside|below|use|try")
    expect_prepared(stage, "mine", either(deeper, Prepared({"all": samples})))


@case("two_spellings", "prepare", accents=("café", "crème"), umlauts=("Müsli", "Öl"), hangul=("한국", "日本"))
def two_spellings(stage: Stage, one: str, two: str) -> None:
    """The two spellings of a letter are one class."""
    kept = class_folders(stage / "mine/train", [unicodedata.normalize("NFD", name) for name in (one, two)])
    tested = class_folders(
        stage / "mine/val", [unicodedata.normalize("NFC", name) for name in (one, two)], 3, 30
    )
    splits = {
        split: [Sample(sample.pixels, form(sample.label)) for sample in samples]
        for split, samples in (("train", kept), ("test", tested))
        for form in [lambda name: unicodedata.normalize("NFC", name)]
    }
    expect_prepared(stage, "mine", Prepared(splits))


@case(
    "stray_archive",
    "prepare",
    npy=("embeddings.npy",),
    tar=("backup.tar",),
    parquet=("metadata.parquet",),
    batch=("data_batch_1",),
)
def stray_archive(stage: Stage, name: str) -> None:
    """A stray file beside class folders decides nothing."""
    samples = class_folders(stage / "mine")
    if name.endswith(".npy"):
        np.save(stage / "mine" / name, np.ones((4, 5)))
    elif name.endswith(".tar"):
        write_tar(stage / "mine" / name, [("notes.txt", b"old")])
    elif name.endswith(".parquet"):
        write_table(stage / "mine" / name, id=[1, 2], text=["a", "b"])
    else:
        write(stage / "mine" / name, b"not a pickle")
    expect_prepared(stage, "mine", either(Prepared({"all": samples}), refused("--format folders")))


@case(
    "other_suffixes",
    "prepare",
    rare=("tif", "tiff", "gif", "ppm", "jfif"),
    capitals=("JPG", "Png", "BMP"),
    none=("", "bak"),
    others=("pgm", "jpe", "jp2", "ico"),
)
def other_suffixes(stage: Stage, *suffixes: str) -> None:
    """Images under other names are read, or counted and named; never left out without a word."""
    kinds = {
        "tif": "TIFF",
        "tiff": "TIFF",
        "gif": "GIF",
        "ppm": "PPM",
        "bmp": "BMP",
        "png": "PNG",
        "pgm": "PPM",
        "jp2": "JPEG2000",
        "ico": "ICO",
    }
    common, rare = class_folders(stage / "mine", each=5), []
    for name in ("apple", "pear"):
        for i, suffix in enumerate(suffixes):
            pixels = scene(300 + i + 50 * (name == "pear"))
            options = {"sizes": [(52, 44)]} if suffix == "ico" else {}
            content = packed(pixels, kinds.get(suffix.lower(), "JPEG"), **options)
            write(stage / "mine" / name / (f"s{i}.{suffix}" if suffix else f"s{i}"), content)
            rare.append(Sample(seen_by_pil(content), name))
    choices = [refused(r"s\d", "suffix|format|kind|known|read")]
    for unread in subsets(sorted(set(suffixes))):
        read = [sample for sample, suffix in zip(rare, 2 * suffixes, strict=True) if suffix not in unread]
        left_out = len(rare) - len(read)
        words = (rf"\b{left_out}\b.*(not|left out)|(not|left out).*\b{left_out}\b",) if unread else ()
        named = tuple(rf"s\d\.{suffix}\b|\.{suffix}\b" if suffix else r"s\d\b" for suffix in unread)
        choices.append(Prepared({"all": common + read}, words=words + named))
    expect_prepared(stage, "mine", either(*choices))


def subsets(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Every choice of the words, the smallest first."""
    return [chosen for size in range(len(words) + 1) for chosen in combinations(words, size)]


@case(
    "leftovers",
    "prepare",
    nas=("@eaDir/{}.png/SYNOPHOTO_THUMB_M.jpg", "lost+found"),
    mac=(".thumbs/{}.png", "__MACOSX"),
    notebook=(".ipynb_checkpoints/{}-checkpoint.png", ".ipynb_checkpoints"),
    windows=("$RECYCLE.BIN/{}.png", "System Volume Information"),
)
def leftovers(stage: Stage, thumbnail: str, empty: str) -> None:
    """Thumbnails and folders of systems are neither images nor classes."""
    samples = class_folders(stage / "mine")
    for i in range(10):
        write(stage / "mine/apple" / thumbnail.format(i), packed(scene(i, 20, 24), "JPEG"))
    (stage / "mine" / empty).mkdir(exist_ok=True)
    write(stage / "mine" / empty / "._apple", b"x")
    write(stage / "mine/apple/Thumbs.db", b"\xd0\xcf\x11\xe0")
    write(stage / "mine/.DS_Store", b"\0\0\0\1Bud1")
    expect_prepared(stage, "mine", Prepared({"all": samples}))


@case("links", "prepare", dangling=("gone",), loop=("loop",), class_link=("class",), file_links=("files",))
def links(stage: Stage, how: str) -> None:
    """Links that lead nowhere are named; a loop is followed once at most; good links are images."""
    samples, words = class_folders(stage / "mine"), ()
    if how == "gone":
        for i in range(5):
            (stage / "mine/apple" / f"gone{i}.png").symlink_to(f"/nowhere/{i}.png")
        words = (r"\b5\b", r"gone\d|link")
    elif how == "loop":
        (stage / "mine/apple/again").symlink_to("..")
        (stage / "mine/pear/self").symlink_to(".")
    elif how == "class":
        more = class_folders(stage / "elsewhere", ("plum",), first=900)
        (stage / "mine/plum").symlink_to(stage / "elsewhere/plum")
        samples += more
    else:
        more = class_folders(stage / "store", ("apple",), each=4, first=900)
        for i in range(4):
            (stage / "mine/apple" / f"linked{i}.png").symlink_to(stage / f"store/apple/{i:02d}.png")
        samples += more
    expect_prepared(stage, "mine", Prepared({"all": samples}, words=words))


@case("name_not_utf8", "prepare", file=("file",), folder=("folder",), control=("control",))
def name_not_utf8(stage: Stage, how: str) -> None:
    """A name that is no UTF-8 is read, or the file is named."""
    samples = class_folders(stage / "mine")
    base = os.fsencode(stage / "mine")
    if how == "file":
        os.rename(base + b"/apple/00.png", base + b"/apple/caf\xe9.png")
    elif how == "control":
        os.rename(base + b"/apple/00.png", base + b"/apple/two\nlines.png")
    else:
        os.rename(base + b"/apple", base + b"/p\xf6mme")
        samples = [Sample(s.pixels, "pear" if s.label == "pear" else r"p\xf6mme") for s in samples]
    named = refused(r"caf|mme|lines", r"UTF-8|name|read|renam")
    expect_prepared(stage, "mine", either(Prepared({"all": samples}), named))


@case(
    "uneven_classes",
    "prepare",
    empty=("empty",),
    two_images=("few",),
    only_in_test=("test",),
    missing_in_test=("train",),
    deep=("deep",),
    in_root=("root",),
)
def uneven_classes(stage: Stage, how: str) -> None:
    """Classes that are empty, small or in one split, and images in odd places, are reported."""
    folder = stage / "mine"
    if how in ("test", "train"):
        kept = class_folders(folder / "train", ("apple", "pear") + ("plum",) * (how == "train"))
        tested = class_folders(folder / "test", ("apple", "pear") + ("plum",) * (how == "test"), 4, 40)
        named = Prepared(
            {"train": kept, "test": tested},
            words=("plum.*(no |without|missing)|(no |without|missing).*plum",),
        )
        expect_prepared(stage, "mine", either(refused("plum"), named) if how == "test" else named)
        return
    samples, words = class_folders(folder), ()
    if how == "empty":
        (folder / "plum").mkdir()
        expect_prepared(
            stage, "mine", either(refused("plum", "no images|empty"), Prepared({"all": samples}, ("plum",)))
        )
        return
    if how == "few":
        samples += class_folders(folder, ("plum",), each=2, first=900)
        words = ("plum", r"\b(few|fewer|only|2)\b")
    elif how == "deep":
        content = packed(scene(700))
        write(folder / "apple/2021/summer/a.png", content)
        samples.append(Sample(seen_by_pil(content), "apple"))
    else:
        write(folder / "stray.png", packed(scene(800)))
        words = (r"stray\.png|\b1 (file|image).*(not|no class)",)
    expect_prepared(stage, "mine", Prepared({"all": samples}, words=words))


@case("unreadable", "prepare", cut=("cut",), text=("text",), empty=("empty",))
def unreadable(stage: Stage, how: str) -> None:
    """Images that cannot be decoded are left out, counted and named."""
    samples = class_folders(stage / "mine", each=12)
    content = packed(scene(5, 200, 200))
    bad = {"cut": content[: len(content) // 2], "text": b"<html>not found</html>", "empty": b""}[how]
    write(stage / "mine/apple/broken.png", bad)
    expect_prepared(
        stage, "mine", Prepared({"all": samples}, words=(r"broken\.png", r"\b1 image")), "--max-bad", "20%"
    )
