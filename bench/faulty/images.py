"""Cases of bench/faults.py: image files, and what check, show and predict make of them."""

import shutil

import numpy as np
from PIL import Image

from bench.faulty.expect import Prepared, Sample, either, expect, expect_prepared, printed, refused
from bench.faulty.inputs import (
    class_folders,
    one_image_folders,
    packed,
    scene,
    seen_by_pil,
    write,
    write_model,
)
from bench.faulty.stage import Stage, case

MORE_BYTES = 250 << 20  # memory that thin images may take; one took 1.3 GB

# image files


def deep(number: int, factor: int) -> np.ndarray:
    return scene(number)[..., 1].astype(np.uint16) * factor


@case(
    "deep_images",
    "pixels",
    twelve_bits=(16, "PNG"),
    ten_bits=(4, "PNG"),
    full=(257, "PNG"),
    tiff=(16, "TIFF"),
)
def deep_images(stage: Stage, factor: int, kind: str) -> None:
    """Images of more than 8 bits: counted in a note, or refused; never black without a word."""
    grey = []
    for place, name in enumerate("ab"):
        for i in range(8):
            write(stage / "mine" / name / f"{i}.{kind.lower()}", packed(deep(place * 8 + i, factor), kind))
            grey.append(Sample(np.repeat(scene(place * 8 + i)[..., 1:2], 3, 2), name))
    dark = [
        Sample((sample.pixels.astype(np.uint16) * factor // 257).astype(np.uint8), sample.label)
        for sample in grey
    ]
    words = (r"\b16\b", "bit")
    choices = [
        Prepared({"all": grey}, words=words),
        Prepared({"all": dark}, words=(*words, "range|dark|small")),
    ]
    expect_prepared(stage, "mine", either(*choices, refused("16|deep|bit", r"\.(png|tif)|image")))


@case("deep_images", "pixels", float_tiff=("F",), int_tiff=("I",))
def deeper_images(stage: Stage, mode: str) -> None:
    """Images of 32 bits have no range that is known: refused or left out, by name."""
    for name in "ab":
        for i in range(8):
            pixels = scene(i)[..., 1] / 255 if mode == "F" else scene(i)[..., 1].astype(np.int32) * 1000
            write(
                stage / "mine" / name / f"{i}.tiff",
                packed(pixels.astype("<f4" if mode == "F" else "<i4"), "TIFF"),
            )
    expect_prepared(stage, "mine", refused(r"\.tiff|image", "32|float|bit|mode|range|known"))


def palette(i: int) -> bytes:
    image = Image.fromarray(scene(i)).quantize(32)
    return saved(image, "PNG", transparency=3)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    import io

    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


MODES = {
    "palette": (palette, "png"),
    "grey_alpha": (lambda i: saved(Image.fromarray(scene(i)).convert("LA"), "PNG"), "png"),
    "cmyk": (lambda i: saved(Image.fromarray(scene(i)).convert("CMYK"), "JPEG", quality=95), "jpg"),
    "one_bit": (lambda i: saved(Image.fromarray(scene(i)).convert("1"), "PNG"), "png"),
    "animated": (
        lambda i: saved(
            Image.fromarray(scene(i)), "GIF", save_all=True, append_images=[Image.fromarray(scene(99))]
        ),
        "gif",
    ),
    "lab_profile": (lambda i: packed(scene(i), "JPEG", quality=95, icc_profile=b"x" * 200), "jpg"),
    "grey_jpeg": (lambda i: saved(Image.fromarray(scene(i)).convert("L"), "JPEG", quality=95), "jpg"),
    "webp_alpha": (
        lambda i: saved(
            Image.fromarray(np.dstack([scene(i), scene(i + 50)[..., :1]])), "WEBP", lossless=True
        ),
        "webp",
    ),
    "trailing": (lambda i: packed(scene(i), "JPEG", quality=95) + b"\0" * 300, "jpg"),
    "png_in_jpg": (lambda i: packed(scene(i)), "jpg"),
}


@case("image_modes", "pixels", **{name: (name,) for name in MODES})
def image_modes(stage: Stage, name: str) -> None:
    """An 8-bit image is what PIL's conversion to RGB gives."""
    make, suffix = MODES[name]
    samples = one_image_folders(stage / "mine", make, suffix=suffix)
    expected = Prepared({"all": samples})
    if suffix == "gif":
        expected = either(expected, refused("gif"))
    expect_prepared(stage, "mine", expected)


def turned(i: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return packed(scene(i, 40, 64), kind, exif=exif)


@case(
    "rotation",
    "pixels",
    jpeg=("JPEG", False),
    png=("PNG", False),
    jpeg_exif=("JPEG", True),
    png_exif=("PNG", True),
)
def rotation(stage: Stage, kind: str, apply: bool) -> None:
    """EXIF's rotation is not applied without --exif, whatever the format; such images are counted."""
    samples = one_image_folders(stage / "mine", lambda i: turned(i, kind), suffix=kind.lower())
    if apply:
        samples = [Sample(np.rot90(sample.pixels, -1).copy(), sample.label) for sample in samples]
    words = () if apply else (r"\b16\b.*(rotat|EXIF|turn)|(rotat|EXIF|turn).*\b16\b",)
    expect_prepared(stage, "mine", Prepared({"all": samples}, words=words), *(["--exif"] if apply else []))


@case("thin_images", "pixels", wide=(1, 6000), high=(6000, 1), wider=(2, 9000))
def thin_images(stage: Stage, height: int, width: int) -> None:
    """A thin image costs neither a second nor a gigabyte in prepare, check, show and predict."""
    samples = class_folders(stage / "mine", "ab", each=10)
    for name in "ab":
        for i in range(4):
            write(stage / "mine" / name / f"thin{i}.png", packed(scene(i, height, width)))
            samples.append(Sample(None, name))
    model = stage.shared / "old/results/teacher-1/model.safetensors"
    usual = expect(stage, ["predict", model, stage / "mine/a/00.png"], printed("00.png"))
    shown = ["data", "show", "out", "--set", "data.image_size=16", "--samples", "24"]
    for seen in (
        expect_prepared(stage, "mine", Prepared({"all": samples})),
        expect(stage, ["data", "check", "out"], printed()),
        expect(stage, shown, printed()),
        expect(stage, ["predict", model, stage / "mine/a/thin0.png"], printed("thin0")),
    ):
        if seen.peak_bytes > usual.peak_bytes + MORE_BYTES:
            taken, bound = seen.peak_bytes >> 20, (usual.peak_bytes + MORE_BYTES) >> 20
            stage.fault("silent", f"{seen.line}: took {taken} MB, bound {bound} MB")


# check, show, predict


@case("check_copied", "pixels", copied=(True,), moved=(False,))
def check_copied(stage: Stage, keep: bool) -> None:
    """The repair command of a copied data set names the copy."""
    class_folders(stage / "mine")
    stage.setup("data", "prepare", "mine", "--out", "first/set")
    shutil.copytree(stage / "first/set", stage / "second")
    if not keep:
        shutil.rmtree(stage / "first")
    shard = sorted((stage / "second").glob("train-*.parquet"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 255
    shard.write_bytes(bytes(data))
    expect(
        stage,
        ["data", "check", "second"],
        printed("second", shard.name, never=("--out first/set",), status=1),
    )


@case(
    "check_foreign",
    "pixels",
    no_manifest=(None,),
    extension=('{"name": "tabs"}',),
    cut=('{"format": 1, "cl',),
    newer=('{"format": 99, "classes": []}',),
)
def check_foreign(stage: Stage, manifest: str | None) -> None:
    """A folder that is no data set is refused by name."""
    class_folders(stage / "mine")
    if manifest is not None:
        write(stage / "mine/manifest.json", manifest)
    expect(stage, ["data", "check", "mine"], refused("mine|manifest"))
    expect(stage, ["data", "show", "mine"], refused("mine|manifest"))


@case(
    "show_names",
    "pixels",
    greek=(("αβγδε", "ζηθικ"), ("λμνξο", "πρστυ")),
    cyrillic=(("кошка", "пёсик"), ("птица", "рыбка")),
    chinese=(("猫", "狗"), ("鸟", "鱼")),
)
def show_names(stage: Stage, first: tuple, second: tuple) -> None:
    """Class names that are not ASCII are drawn as they are: other names give other pictures."""
    pictures = []
    for number, names in enumerate((first, second)):
        class_folders(stage / f"mine{number}", names, each=6)
        stage.setup("data", "prepare", f"mine{number}", "--out", f"out{number}")
        words = ["data", "show", f"out{number}", "--out", f"sheet{number}.png", "--set", "data.image_size=32"]
        seen = expect(stage, words, printed())
        if seen.status != 0:
            return
        pictures.append(np.asarray(Image.open(stage / f"sheet{number}.png").convert("RGB")))
    said = any(name in entry.text for entry in stage.seen for name in (*first, *second))
    if pictures[0].shape == pictures[1].shape and (pictures[0] == pictures[1]).all() and not said:
        stage.fault(
            "silent", f"data show: {'/'.join(first)} and {'/'.join(second)} are drawn alike, as boxes"
        )


@case("predict_images", "pixels", bad=("bad",), missing=("missing",), folder=("folder",), deep=("deep",))
def predict_images(stage: Stage, how: str) -> None:
    """One bad image among good ones costs no answer; a folder is taken; deep images are noted."""
    model = stage.shared / "old/results/teacher-1/model.safetensors"
    for i in range(3):
        write(stage / f"mine/good{i}.png", packed(scene(i)))
    images = [f"mine/good{i}.png" for i in range(3)]
    goods = [rf"good{i}\.png: " for i in range(3)]
    if how == "folder":
        expect(stage, ["predict", model, "mine"], printed(*goods))
    elif how == "deep":
        write(stage / "mine/deep.png", packed(deep(4, 16)))
        expect(
            stage,
            ["predict", model, "mine/deep.png"],
            either(printed("16|bit"), refused(r"deep\.png", "16|bit")),
        )
    else:
        bad = write(stage / "mine/bad.png", b"<html>") if how == "bad" else "mine/gone.png"
        name = "bad" if how == "bad" else "gone"
        answers = either(
            printed(*goods, rf"{name}\.png", status=1),
            printed(*goods, rf"{name}\.png", status=2),
            printed(*goods, rf"{name}\.png"),
        )
        expect(stage, ["predict", model, images[0], bad, *images[1:]], answers)


@case("predict_rotation", "pixels", png=("PNG",), jpeg=("JPEG",), webp=("WEBP",))
def predict_rotation(stage: Stage, kind: str) -> None:
    """prepare and predict have one rule: EXIF's rotation changes no prediction."""
    old = stage.shared / "old/results/teacher-1/model.safetensors"
    model = write_model(old, stage / "model.safetensors", exif=False)  # as new models say
    options = {"lossless": True} if kind == "WEBP" else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    write(stage / "mine/plain", packed(scene(3, 40, 64), kind, **options))
    write(stage / "mine/turned", packed(scene(3, 40, 64), kind, exif=exif, **options))
    seen = expect(stage, ["predict", model, "mine/plain", "mine/turned"], printed("plain", "turned"))
    answers = [line.partition(": ")[2] for line in seen.out.splitlines() if ": " in line and "%" in line]
    if seen.status == 0 and (len(answers) != 2 or answers[0] != answers[1]):
        stage.fault("silent", f"predict: the image with an EXIF rotation is turned: {answers}")


@case("predict_notes", "pixels", as_stored=(False,), turned=(True,))
def predict_notes(stage: Stage, exif: bool) -> None:
    """predict says what it did to images, and which files of a folder it did not use; once, with counts."""
    old = stage.shared / "old/results/teacher-1/model.safetensors"
    model = write_model(old, stage / "model.safetensors", exif=exif)
    for i in range(3):
        write(stage / f"mine/turned{i}.jpg", turned(i, "JPEG"))
        write(stage / f"mine/palette{i}.png", palette(i))
    write(stage / "mine/notes.txt", "no image")
    applied = r"3 images.*(rotat|EXIF).*" + (" applied" if exif else "not applied")
    words = (applied, r"3 images.*transparen", r"not used.*notes\.txt", r"turned2\.jpg: ")
    expect(stage, ["predict", model, "mine"], printed(*words))


@case("codec_lines", "pixels", png=("png",), jpeg=("jpg",))
def codec_lines(stage: Stage, suffix: str) -> None:
    """What libpng and libjpeg have to say comes with a file's name, or not at all."""
    samples = class_folders(stage / "mine", "ab")
    if suffix == "png":  # a damaged checksum in a chunk that no decoder needs
        content = bytearray(packed(scene(7), pnginfo=comment()))
        content[content.find(b"tEXt") + 8] ^= 1
    else:  # the picture's last bits are damaged
        content = bytearray(packed(scene(7, 200, 200), "JPEG", quality=95))
        content[len(content) // 2 : len(content) // 2 + 40] = b"\xff\x11" * 20
    write(stage / f"mine/a/odd.{suffix}", bytes(content))
    try:
        samples = [*samples, Sample(seen_by_pil(bytes(content)), "a")]
        expected = either(Prepared({"all": samples}), Prepared({"all": samples[:-1]}, words=("odd",)))
    except (OSError, SyntaxError):
        expected = Prepared({"all": samples}, words=("odd",))
    expect_prepared(stage, "mine", expected, "--max-bad", "20%")


def comment():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "a summer's day")
    return info
