"""Cases of bench/faults.py: where a data set is written, class folders, and tars."""

import os
import signal
import subprocess
import time
import unicodedata
from pathlib import Path

import numpy as np

from bench.faulty_expect import (
    Prepared,
    Sample,
    differ,
    either,
    expect_prepared,
    read_shards,
    refused,
)
from bench.faulty_inputs import (
    class_folders,
    image_cells,
    packed,
    scene,
    seen_by_pil,
    stack,
    tar_samples,
    truth_of,
    write,
    write_arrays,
    write_table,
    write_tar,
)
from bench.faulty_raw import raw_parts
from bench.faulty_stage import DEIT_RAY, Launch, Reader, Stage, case, digests, start

OVERLAP = r"overlap|inside|same (folder|as|place)|is SOURCE|the source|holds? .*(files?|not)|not empty"
OTHERS = (
    r"not (empty|written by|ours|deit-ray|a data set|made|in its manifest)|other files|did not write|"
    r"nothing that|no data set of|foreign|choose|another folder|empty"
)


# OUT


@case("out_is_source", "prepare", parquet=("parquet",), folders_inside=("inside",), parent=("parent",),
      link=("link",), array=("array",), dots=("dots",), uri=("uri",))  # fmt: skip
def out_is_source(stage: Stage, how: str) -> None:
    """OUT and SOURCE overlap by their real paths: refused, and no file changes."""
    source, out = stage / "mine", "mine"
    if how in ("parquet", "link", "uri"):
        for number in range(2):
            cells = image_cells(12, 40 * number)
            write_table(source / f"train-{number:05d}.parquet", image=cells, label=[i % 2 for i in range(12)])
        write_table(source / "test-00000.parquet", image=image_cells(6, 90), label=[0, 1] * 3)
    elif how == "array":
        write_arrays(source / "arrays.npz", stack(20), np.arange(20) % 2)
        write(source / "manifest.json", "{}")
    else:
        class_folders(source)
    words = {"inside": "mine/prepared", "parent": ".", "link": "alias", "dots": "x/../mine/pear"}
    out = words.get(how, "mine")
    if how == "link":
        (stage / "alias").symlink_to(source)
    if how == "dots":
        (stage / "x").mkdir()
    if how == "uri":
        out = source.as_uri()
    given = "mine/arrays.npz" if how == "array" else "mine"
    stage.outs = ("out",)
    expect_prepared(stage, given, refused(r"out|" + OVERLAP), out=out)


@case("out_has_others_files", "prepare", extension=("extension",), project=("project",), added=("added",),
      cut_manifest=("cut",), a_file=("file",), hidden_parts=("parts",))  # fmt: skip
def out_has_others_files(stage: Stage, how: str) -> None:
    """Files in OUT that are not the product's stay as they are, or OUT is refused."""
    class_folders(stage / "mine")
    out, expected = stage / "out", refused(OTHERS + r"|out")
    if how == "extension":
        write(out / "manifest.json", '{"manifest_version": 3, "name": "tabs"}')
        write(out / "unreadable.csv", "name,reason\nmy own list,\n")
        write_table(out / "train-clicks.parquet", a=[1, 2])
    elif how == "project":
        write(out / "README.md", "# my project\n")
        write(out / "train-00000.parquet", b"PAR1 mine PAR1")
        write(out / "test-00000.parquet", b"PAR1 mine PAR1")
    elif how == "added":
        stage.setup("data", "prepare", "mine", "--out", "out")
        write(out / "notes.txt", "what I tried\n")
        write(out / "train-00007.parquet", b"PAR1 mine PAR1")
        write(out / "test-extra.parquet", b"PAR1 mine PAR1")
        class_folders(stage / "mine", ("fig",))
        samples = class_folders(stage / "mine", ("apple", "fig", "pear"))
        expected = either(expected, Prepared({"all": samples}))
    elif how == "cut":
        write(out / "manifest.json", '{"format": 1, "classes": ["a"')
        write(out / "train-00000.parquet", b"PAR1 mine PAR1")
    elif how == "file":
        write(out, "a letter")
        expected = refused("out", "file|folder|director")
    else:
        write(out / ".parts" / "thesis.txt", "chapter 1\n")
        write(out / ".git" / "config", "[core]\n")
    expect_prepared(stage, "mine", expected)


@case("two_prepares", "prepare", same=("same",), different=("different",))
def two_prepares(stage: Stage, how: str) -> None:
    """Two at once into one OUT: whoever exits 0 has its own images there, and nobody dies of the other."""
    one = class_folders(stage / "one", each=120)
    two = class_folders(stage / "two", each=120, first=7000) if how == "different" else one
    stage.before = digests(stage.root)
    processes = []
    for source in ("one", "two" if how == "different" else "one"):
        launch = Launch([*DEIT_RAY, "data", "prepare", source, "--out", "out"], stage.root, stage.environment)
        processes.append(start(launch, 0))
        time.sleep(0.2)
    ended = [finish(stage, process, ends) for process, ends in processes]
    winners = [samples for samples, (status, _) in zip((one, two), ended, strict=True) if status == 0]
    for status, text in ended:
        if status not in (0, 1, 2):
            stage.fault("raw", f"two prepares: exit status {status}: {text[-200:]}")
        elif status and "error: " not in text:
            stage.fault("silent", f"two prepares: exit status {status} without an error: {text[-200:]}")
        elif status and not any(
            word in text for word in ("another", "already", "lock", "running", "process")
        ):
            stage.fault("silent", f"two prepares: the one that fails does not name the other: {text[-200:]}")
    if not winners:
        stage.fault("silent", "two prepares: none of them has prepared OUT")
        return
    found = [sample for samples in read_shards(stage / "out").values() for sample in samples]
    wrong = [differ(samples, found) for samples in winners]
    if None not in wrong or (len(winners) == 2 and how == "same" and any(wrong)):
        stage.fault("silent", f"two prepares: exit status 0, but OUT holds other images: {wrong[0]}")
    if how == "different" and len(winners) == 2 and ended[0][0] == ended[1][0] == 0:
        overlapped(stage, wrong)


def overlapped(stage: Stage, wrong: list) -> None:
    """Both exit 0: the second must have waited for the first, so OUT holds the images of exactly one."""
    if sum(found is None for found in wrong) != 1:
        stage.fault("silent", "two prepares of different sources: OUT holds images of both or of neither")


def finish(stage: Stage, process: subprocess.Popen, ends: dict[int, int]) -> tuple[int, str]:
    """Waits for a process; its exit status and output, which is judged for `raw`."""
    reader = Reader(ends)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        reader.read(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()
        stage.fault("late", "has not ended within 120 s")
    reader.read(0.0, rest=True)
    text = "".join(reader.texts())
    for part in raw_parts(text):
        stage.fault("raw", part)
    return process.returncode, text


@case("killed_prepare", "prepare", twice=("SIGKILL",))
def killed_prepare(stage: Stage, name: str) -> None:
    """A killed preparation leaves a lock that stops nobody: the same command, run again, ends it."""
    samples = class_folders(stage / "mine", each=150)

    def kill(process):
        if (stage / "out").exists() and any((stage / "out").rglob("*")):
            process.send_signal(getattr(signal, name))
            return True

    stage.run("data", "prepare", "mine", "--out", "out", during=kill, answers=False)
    stage.faults.clear()
    expect_prepared(stage, "mine", Prepared({"all": samples}))


@case("full_disk", "environment", prepare=("200k",))
def full_disk(stage: Stage, size: str) -> None:
    """A disk that is full while a data set is prepared: one sentence, nothing half-written."""
    class_folders(stage / "mine", each=200)
    disk = stage / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    stage.undo.append(lambda: subprocess.run(["umount", "-l", str(disk)], check=True))
    expect_prepared(stage, "mine", refused(r"no space|full", "out"))


# class folders


@case("only_train", "prepare", train=("train",), capital=("Train",), training=("training",))
def only_train(stage: Stage, name: str) -> None:
    """A fifth of each class is kept for testing."""
    samples = class_folders(stage / "mine" / name, ("apple", "pear", "plum"))
    expect_prepared(stage, "mine", Prepared({"all": samples}, tested=2))


@case("training_and_testing", "prepare", Training=("Training", "Testing"), train_valid=("train", "valid"),
      TRAIN=("TRAIN", "TEST"), kaggle=("training_set", "test_set"))  # fmt: skip
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


@case("stray_archive", "prepare", npy=("embeddings.npy",), tar=("backup.tar",), parquet=("metadata.parquet",),
      batch=("data_batch_1",))  # fmt: skip
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


@case("other_suffixes", "prepare", rare=("tif", "tiff", "gif", "ppm", "jfif"), capitals=("JPG", "Png", "BMP"),
      none=("", "bak"), others=("pgm", "jpe", "jp2", "ico"))  # fmt: skip
def other_suffixes(stage: Stage, *suffixes: str) -> None:
    """Images under other names are read, or counted and named; never left out without a word."""
    kinds = {"tif": "TIFF", "tiff": "TIFF", "gif": "GIF", "ppm": "PPM", "bmp": "BMP", "png": "PNG", "pgm": "PPM",
             "jp2": "JPEG2000", "ico": "ICO"}  # fmt: skip
    common, rare = class_folders(stage / "mine", each=5), []
    for name in ("apple", "pear"):
        for i, suffix in enumerate(suffixes):
            pixels = scene(300 + i + 50 * (name == "pear"))
            options = {"sizes": [(52, 44)]} if suffix == "ico" else {}
            content = packed(pixels, kinds.get(suffix.lower(), "JPEG"), **options)
            write(stage / "mine" / name / (f"s{i}.{suffix}" if suffix else f"s{i}"), content)
            rare.append(Sample(seen_by_pil(content), name))
    left_out = rf"\b{len(rare)}\b.*(not|left out|unknown|ignored|skipped)|(not|left out|unknown|ignored).*\b{len(rare)}\b"
    expected = either(
        Prepared({"all": common + rare}),
        Prepared({"all": common}, words=(left_out, r"s\d")),
        refused(r"s\d", "suffix|format|kind|known|read"),
    )
    expect_prepared(stage, "mine", expected)


@case("leftovers", "prepare", nas=("@eaDir/{}.png/SYNOPHOTO_THUMB_M.jpg", "lost+found"),
      mac=(".thumbs/{}.png", "__MACOSX"), notebook=(".ipynb_checkpoints/{}-checkpoint.png", ".ipynb_checkpoints"),
      windows=("$RECYCLE.BIN/{}.png", "System Volume Information"))  # fmt: skip
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
        samples = [Sample(s.pixels, "pear" if s.label == "pear" else "p\udcf6mme") for s in samples]
    named = refused(r"caf|mme|lines", r"UTF-8|name|read|renam")
    if how == "folder":
        expect_prepared(stage, "mine", named)
    else:
        expect_prepared(stage, "mine", either(Prepared({"all": samples}), named))


@case("uneven_classes", "prepare", empty=("empty",), two_images=("few",), only_in_test=("test",),
      missing_in_test=("train",), deep=("deep",), in_root=("root",))  # fmt: skip
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


# tars


@case("tar_damaged", "prepare", header=("header",), zeros=("zeros",), cut=("cut",), garbage=("garbage",))
def tar_damaged(stage: Stage, how: str) -> None:
    """A damaged tar is never used in part without a word."""
    members, samples = tar_samples(0, 12)
    data = bytearray(write_tar(stage / "mine/train.tar", members))
    place = data.find(b"k0006.jpg")
    if how == "header":
        data[place + 149] ^= 5
    elif how == "zeros":
        data[place : place + 1024] = bytes(1024)
    elif how == "cut":
        del data[place + 700 :]
    else:
        end = place
        data[end:end] = b"\x07garbage" * 128
    write(stage / "mine/train.tar", bytes(data))
    expect_prepared(stage, "mine", refused(r"train\.tar"))


@case("tar_concatenated", "prepare", two=(2, False), three_padded=(3, True))
def tar_concatenated(stage: Stage, count: int, padded: bool) -> None:
    """Joined tars: every sample, or refused."""
    joined, samples = b"", []
    for number in range(count):
        members, more = tar_samples(10 * number, 10)
        data = write_tar(stage / "part.tar", members)
        joined += data + (bytes(10240) if padded else b"")
        samples += more
    (stage / "part.tar").unlink()
    write(stage / "mine/train.tar", joined)
    expect_prepared(stage, "mine", either(Prepared({"all": samples}), refused(r"train\.tar")))


@case("tar_key_twice", "prepare", sample=("sample",), label=("label",), two_tars=("tars",))
def tar_key_twice(stage: Stage, how: str) -> None:
    """A key that stands twice is named. In two tars it is two samples, or refused."""
    members, samples = tar_samples(0, 10)
    if how == "sample":
        write_tar(stage / "mine/train.tar", members + members[:6])
    elif how == "label":
        write_tar(stage / "mine/train.tar", [*members, ("k0003.cls", b"0")])
    else:
        write_tar(stage / "mine/train-000.tar", members)
        again = [(name, packed(scene(50 + i // 2), "JPEG", quality=95) if name.endswith("jpg") else content)
                 for i, (name, content) in enumerate(members)]  # fmt: skip
        write_tar(stage / "mine/train-001.tar", again)
        samples += truth_of(
            [content for name, content in again if name.endswith("jpg")], [i % 2 for i in range(10)]
        )
        expect_prepared(stage, "mine", either(Prepared({"all": samples}), refused(r"k000\d")))
        return
    expect_prepared(stage, "mine", refused(r"k000[0-3]", "twice|again|two|already|more than one"))


@case("tar_two_images", "prepare", png=("png",), webp=("webp",), mask=("seg.png",))
def tar_two_images(stage: Stage, suffix: str) -> None:
    """A sample with two images is refused, naming both; or the one with the plain name is taken, and said."""
    members, samples = tar_samples(0, 10)
    kind = suffix.rpartition(".")[2].upper()
    masks = [(f"k{i:04d}.{suffix}", packed(np.zeros((44, 52, 3), np.uint8), kind)) for i in range(10)]
    mixed = sorted(members + masks)
    write_tar(stage / "mine/train.tar", mixed)
    expected = refused(r"k0000", "jpg", suffix.rpartition(".")[2])
    if suffix == "seg.png":
        expected = either(refused("seg"), Prepared({"all": samples}, words=(r"seg",)))
    expect_prepared(stage, "mine", expected)


@case("tar_dots_in_keys", "prepare", number=("22.05-{}", ""), version=("img.v1.{}", ""), typed=("t{}", "input."),
      folder=("data.v2/t{}", ""), leading=("./t{}", ""))  # fmt: skip
def tar_dots_in_keys(stage: Stage, key: str, middle: str) -> None:
    """Keys with dots: every sample, or refused, saying which names were seen."""
    members, samples = [], []
    for i in range(10):
        content, name = packed(scene(i), "JPEG", quality=95), key.format(i)
        members += [(f"{name}.{middle}jpg", content), (f"{name}.cls", str(i % 2).encode())]
        samples.append(Sample(seen_by_pil(content), str(i % 2)))
    write_tar(stage / "mine/train.tar", members)
    expect_prepared(stage, "mine", either(Prepared({"all": samples}), refused(r"train\.tar", r"jpg")))


@case("tar_compressed", "prepare", gz=("gz",), xz=("xz",))
def tar_compressed(stage: Stage, kind: str) -> None:
    """A compressed tar is refused with a hint, also under the name .tar; an error of another tar has none."""
    members, _ = tar_samples(0, 10)
    write_tar(stage / f"mine/train.tar{'.gz' if kind == 'gz' else ''}", members, f"w:{kind}")
    expect_prepared(stage, "mine", refused(r"train\.tar", r"gunzip|unpack|decompress|compressed|unxz|gzip"))


@case("tar_labels", "prepare", newline=(b"1\n",), word=(b"cat",), negative=(b"-1",), fraction=(b"0.5",),
      missing=(None,), empty=(b"",))  # fmt: skip
def tar_labels(stage: Stage, label: bytes | None) -> None:
    """A label is one whole number or word; samples without one are named."""
    members, samples = tar_samples(0, 10)
    members = [(name, content if name != "k0005.cls" else label) for name, content in members]
    write_tar(stage / "mine/train.tar", [member for member in members if member[1] is not None])
    if label == b"1\n":
        expected = Prepared({"all": samples})
    elif label is None:
        rest = [sample for i, sample in enumerate(samples) if i != 5]
        expected = either(refused("k0005"), Prepared({"all": rest}, words=("k0005|1 (sample|image)",)))
    else:
        expected = refused(r"k0005|train\.tar", "cls|label|number|class")
    expect_prepared(stage, "mine", expected)
