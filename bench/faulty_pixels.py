"""Cases of bench/faults.py: arrays, Parquet, image files, and what check, show and predict make of them."""

import datetime
import decimal
import shutil

import numpy as np
import pyarrow as pa
from PIL import Image

from bench.faulty_expect import Prepared, Sample, either, expect, expect_prepared, printed, refused
from bench.faulty_inputs import (
    array_truth,
    class_folders,
    image_cells,
    one_image_folders,
    packed,
    scene,
    seen_by_pil,
    stack,
    truth_of,
    write,
    write_arrays,
    write_table,
)
from bench.faulty_stage import Stage, case

LARGEST_BYTES = 900 << 20  # memory of a command that imports torch; one thin image took 1.3 GB
NOTE = r"\b(convert|scal|range|rescal|divid|as float|float|uint16|16.bit|12.bit|bits?)"

# arrays: pixels


@case("npz_float", "pixels", unit32=("<f4", 1, 0, 220), unit64=("<f8", 1, 0, 30), unit16=("<f2", 1, 0, 30),
      to_255=("<f4", 255, 0, 30), centred=("<f4", 2, -1, 30))  # fmt: skip
def npz_float(stage: Stage, dtype: str, scale: float, offset: float, size: int) -> None:
    """Float pixels: refused, or converted with a note. Never black, at any size."""
    images, labels = stack(20, size, size + 8), np.arange(20) % 4
    write_arrays(stage / "mine/x.npz", (images / 255 * scale + offset).astype(dtype), labels)
    noted = Prepared(array_truth(images, labels), words=(NOTE,))
    expect_prepared(stage, "mine", either(refused("x_train", "float"), noted))


@case("npz_wide", "pixels", uint16=("<u2", 257), big_endian=(">u2", 257), twelve_bits=("<u2", 16),
      int32=("<i4", 257), uint32=("<u4", 1 << 16))  # fmt: skip
def npz_wide(stage: Stage, dtype: str, factor: int) -> None:
    """Whole numbers above 255: refused, or converted with a note. Never white, never wrapped around."""
    images, labels = stack(24), np.arange(24) % 4
    write_arrays(stage / "mine/x.npz", images.astype(dtype) * np.array(factor, dtype), labels)
    noted = Prepared(array_truth(images, labels), words=(NOTE,))
    expect_prepared(stage, "mine", either(refused("x_train", r"int|16|32"), noted))


@case("npz_bytes", "pixels", int64=("<i8",), int8=("i1",), boolean=("?",), nan=("nan",), words=("<U3",))
def npz_bytes(stage: Stage, dtype: str) -> None:
    """Other dtypes: right, or refused; whole numbers up to 255 in a wide type are certain."""
    images, labels = stack(20), np.arange(20) % 2
    if dtype == "nan":
        given = (images / 255).astype(np.float32)
        given[3, 2:5] = np.nan
        expected = refused("x_train", "nan|finite|float")
    elif dtype == "?":
        given, images = images > 128, ((images > 128) * 255).astype(np.uint8)
        expected = either(refused("x_train", "bool"), Prepared(array_truth(images, labels), words=("bool",)))
    elif dtype == "i1":
        given = (images.astype(np.int16) - 128).astype(np.int8)
        expected = refused("x_train", "int8|negative|below 0|-1")
    elif dtype == "<U3":
        given, expected = images.astype("<U3"), refused("x_train", "number|text|str|U3|dtype")
    else:
        given = images.astype(dtype)
        expected = either(Prepared(array_truth(images, labels)), refused("x_train", "int64"))
    write_arrays(stage / "mine/x.npz", given, labels)
    expect_prepared(stage, "mine", expected)


@case("npz_axes", "pixels", first=((0, 3, 1, 2), 36), first_grey=("grey_first", 36), width_first=("fortran", 36),
      thin=((0, 3, 1, 2), 3), grey=("grey", 36), alpha=("alpha", 36), flat=("flat", 36), two=("two", 36))  # fmt: skip
def npz_axes(stage: Stage, how, size: int) -> None:
    """Axes in another order: converted where that is certain, else refused; never strips."""
    images, labels = stack(24, size, size if size > 3 else 30), np.arange(24) % 4
    grey = np.repeat(images[..., :1], 3, axis=3)
    right = Prepared(array_truth(images, labels))
    wrong = refused("x_train", "channel|axis|axes|shape|height")
    if how == "fortran":
        given, expected = np.asfortranarray(images), either(right, refused("x_train", "order|Fortran"))
    elif how == "grey":
        given, expected = grey[..., 0], Prepared(array_truth(grey, labels))
    elif how == "grey_first":
        given, expected = grey[..., 0][:, None], either(Prepared(array_truth(grey, labels)), wrong)
    elif how == "alpha":
        given = np.concatenate([images, np.full((*images.shape[:3], 1), 255, np.uint8)], axis=3)
        expected = right
    elif how == "flat":
        given, expected = images.reshape(len(images), -1), wrong
    elif how == "two":
        given, expected = images[..., :2], wrong
    else:
        given, expected = images.transpose(how).copy(), either(right, wrong) if size > 3 else wrong
    write_arrays(stage / "mine/x.npz", given, labels)
    expect_prepared(stage, "mine", expected)


# arrays: labels


@case("npz_labels", "pixels", one_hot=(np.eye(5)[np.arange(40) % 5], "5|shape|one-hot"),
      one_hot_bool=(np.eye(4, dtype=bool)[np.arange(40) % 4], "4|shape|one-hot"),
      negative=(np.arange(40) % 3 - 1, "-1"), negative8=((np.arange(40) % 4 - 2).astype(np.int8), "-2|-1"),
      fractional=(np.array([0.2, 0.9, 1.7, 0.2] * 10), r"0\.2|whole"), nan=(np.array([0, 1, np.nan, 1] * 10), "nan|whole"),
      huge=(np.array([0, 2**62] * 20, np.uint64), str(2**62) + "|large|classes"), short=(np.arange(39) % 3, "39|40"),
      empty=(np.zeros((40, 0)), "shape|0"))  # fmt: skip
def npz_labels(stage: Stage, labels: np.ndarray, words: str) -> None:
    """Labels that are no single whole number: refused, saying what is there."""
    write_arrays(stage / "mine/x.npz", stack(40, 20, 20), labels)
    expect_prepared(stage, "mine", refused("y_train|x_train", words), within_s=40)


@case(
    "npz_right_labels",
    "pixels",
    column=("column",),
    whole_floats=("float",),
    text=("text",),
    uint8=("uint8",),
)
def npz_right_labels(stage: Stage, how: str) -> None:
    """Labels that mean one thing only are right, or refused where they are no numbers."""
    images, numbers = stack(30, 24, 24), np.arange(30) % 3
    given = {
        "column": numbers[:, None],
        "float": numbers.astype(np.float64),
        "text": np.array(["fig", "kiwi", "lime"])[numbers],
        "uint8": numbers.astype(np.uint8),
    }[how]
    truth = Prepared(array_truth(images, given if how == "text" else numbers))
    write_arrays(stage / "mine/x.npz", images, given, names=("x", "y"))
    others = either(truth, refused("y_train", "float|text|str|number|word|whole"))
    expect_prepared(stage, "mine", truth if how in ("column", "uint8") else others)


# Parquet: labels

TIME = datetime.datetime(2024, 1, 1)


@case("parquet_labels", "pixels", huge=([0, 3_000_000_000] * 10, None, "3.?000.?000.?000|classes"),
      huge_unsigned=([0, 2**63 + 5] * 10, pa.uint64(), "922|large|classes"),
      null=([None if i % 3 == 2 else i % 3 for i in range(20)], None, "6|null|no label"),
      null_text=(["a", None] * 10, None, "10|null|no label"), list=([[i % 3] for i in range(20)], None, "list"),
      struct=([{"id": i % 2} for i in range(20)], None, "struct"), fraction=([0.5, 1.0] * 10, None, r"0\.5|double|float|whole"),
      negative=([0, -3] * 10, None, "-3"), time=([TIME, TIME.replace(day=2)] * 10, None, "timestamp|time|date"),
      binary=([b"a", b"\xff"] * 10, None, "binary|bytes"))  # fmt: skip
def parquet_labels(stage: Stage, labels: list, kind, words: str) -> None:
    """Labels that are no single number or word: one sentence that names column and type."""
    cells = image_cells(20)
    write_table(stage / "mine/train.parquet", image=cells, label=pa.array(labels, kind))
    expect_prepared(stage, "mine", refused("label", words), within_s=40)


@case("parquet_right_labels", "pixels", boolean=([False, True] * 10, None), dictionary=(["kiwi", "fig"] * 10, "dictionary"),
      large_text=(["kiwi", "fig"] * 10, pa.large_string()), number_text=(["10", "9"] * 10, None),
      whole_floats=([0.0, 1.0] * 10, None), decimals=([decimal.Decimal(0), decimal.Decimal(1)] * 10, None),
      uint8=([0, 1] * 10, pa.uint8()), view=(["kiwi", "fig"] * 10, pa.string_view()))  # fmt: skip
def parquet_right_labels(stage: Stage, labels: list, kind) -> None:
    """Labels that mean one thing only: right, or refused naming column and type."""
    cells, column = image_cells(20), pa.array(labels, None if kind == "dictionary" else kind)
    column = column.dictionary_encode() if kind == "dictionary" else column
    write_table(stage / "mine/train.parquet", image=cells, label=column)
    names = [
        str(int(label)) if isinstance(label, (float, decimal.Decimal)) else str(label) for label in labels
    ]
    right = Prepared({"all": truth_of(cells, names)})
    certain = kind == "dictionary" or kind in (pa.large_string(), pa.uint8()) or labels[0] == "10"
    expect_prepared(
        stage, "mine", right if certain else either(right, refused("label", str(column.type)[:4]))
    )


@case("parquet_gaps", "pixels", numbers=([5, 9] * 10, None), late=([0, 40] * 10, None),
      named=([0, 2] * 10, ["apple", "fig", "kiwi"]))  # fmt: skip
def parquet_gaps(stage: Stage, labels: list, names: list | None) -> None:
    """Ids without images are reported, or refused; the others keep their numbers."""
    cells = image_cells(20)
    hub = {"label": {"names": names, "_type": "ClassLabel"}} if names else None
    write_table(stage / "mine/train.parquet", hub, image=cells, label=labels)
    classes = [names[label] if names else label for label in labels]
    gap = r"(no|without) (\w+ )?images|empty|gap|have no|has no"
    expect_prepared(
        stage, "mine", either(Prepared({"all": truth_of(cells, classes)}, words=(gap,)), refused("label"))
    )


@case("parquet_few_names", "pixels", two=(["apple", "fig"],), none=([],))
def parquet_few_names(stage: Stage, names: list) -> None:
    """More ids than the hub's names: refused."""
    hub = {"label": {"names": names, "_type": "ClassLabel"}}
    cells, labels = image_cells(21), [0, 1, 2] * 7
    write_table(stage / "mine/train.parquet", hub, image=cells, label=labels)
    expected = (
        refused("label", r"\b2\b")
        if names
        else either(refused("label"), Prepared({"all": truth_of(cells, labels)}))
    )
    expect_prepared(stage, "mine", expected)


# Parquet: images


@case("parquet_images", "pixels", large=(pa.large_binary(),), view=(pa.binary_view(),), binary=(pa.binary(),))
def parquet_images(stage: Stage, kind) -> None:
    """Every binary type holds images."""
    cells, labels = image_cells(20), [i % 2 for i in range(20)]
    write_table(stage / "mine/train.parquet", image=pa.array(cells, kind), label=labels)
    expect_prepared(stage, "mine", Prepared({"all": truth_of(cells, labels)}))


@case("parquet_columns", "pixels", depth=("depth", "image", True), mask=("mask", "image", False),
      jpg=("annotation", "img", True), neither=("left", "right", True))  # fmt: skip
def parquet_columns(stage: Stage, first: str, second: str, is_struct: bool) -> None:
    """Two columns of images: the one called image is taken; or refused, naming both."""
    cells, labels = image_cells(20), [i % 2 for i in range(20)]
    flat = [packed(np.full((44, 52, 3), 4, np.uint8))] * 20
    wrap = (lambda values: [{"bytes": value, "path": None} for value in values]) if is_struct else list
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if is_struct else pa.binary()
    columns = {first: pa.array(wrap(flat), kind), second: pa.array(wrap(cells), kind), "label": labels}
    write_table(stage / "mine/train.parquet", **columns)
    named = refused(first, second)
    right = Prepared({"all": truth_of(cells, labels)})
    expect_prepared(stage, "mine", named if first == "left" else right if second == "image" and not is_struct
                    else either(right, named))  # fmt: skip


@case("parquet_no_images", "pixels", paths=("paths",), null=("null",), lists=("lists",), text=("text",))
def parquet_no_images(stage: Stage, how: str) -> None:
    """Rows without an image's bytes are named, or refused."""
    cells, labels = image_cells(20), [i % 2 for i in range(20)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    expected = refused("image")
    if how == "paths":
        column = pa.array([{"bytes": None, "path": f"/data/{i}.png"} for i in range(20)], kind)
    elif how == "lists":
        column = pa.array([list(cell[:20]) for cell in cells], pa.list_(pa.uint8()))
    elif how == "text":
        column = pa.array([f"/data/{i}.png" for i in range(20)])
    else:
        cells[4] = None
        column = pa.array(cells)
        left_out = Prepared({"all": truth_of(cells, labels)}, words=(r"\b1 (image|row)",))
        expected = either(left_out, refused("image|train", r"\b1\b|row 4|/4"))
    write_table(stage / "mine/train.parquet", image=column, label=labels)
    expect_prepared(stage, "mine", expected, "--max-bad", "20%")


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
    tall = expect_prepared(stage, "mine", Prepared({"all": samples}))
    model = stage.shared / "old/results/teacher-1/model.safetensors"
    shown = ["data", "show", "out", "--set", "data.image_size=16", "--samples", "24"]
    for seen in (
        tall,
        expect(stage, ["data", "check", "out"], printed()),
        expect(stage, shown, printed()),
        expect(stage, ["predict", model, stage / "mine/a/thin0.png"], printed("thin0")),
    ):
        if seen.peak_bytes > LARGEST_BYTES:
            stage.fault(
                "silent", f"{seen.line}: took {seen.peak_bytes >> 20} MB, bound {LARGEST_BYTES >> 20} MB"
            )


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


@case("check_foreign", "pixels", no_manifest=(None,), extension=('{"name": "tabs"}',), cut=('{"format": 1, "cl',),
      newer=('{"format": 99, "classes": []}',))  # fmt: skip
def check_foreign(stage: Stage, manifest: str | None) -> None:
    """A folder that is no data set is refused by name."""
    class_folders(stage / "mine")
    if manifest is not None:
        write(stage / "mine/manifest.json", manifest)
    expect(stage, ["data", "check", "mine"], refused("mine|manifest"))
    expect(stage, ["data", "show", "mine"], refused("mine|manifest"))


@case("show_names", "pixels", greek=(("αβγδε", "ζηθικ"), ("λμνξο", "πρστυ")), cyrillic=(("кошка", "пёсик"), ("птица", "рыбка")),
      chinese=(("猫", "狗"), ("鸟", "鱼")))  # fmt: skip
def show_names(stage: Stage, first: tuple, second: tuple) -> None:
    """Class names that are not ASCII are drawn as they are: two data sets of other names give other pictures."""
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
        answers = either(printed(*goods, rf"{name}\.png", status=1), printed(*goods, rf"{name}\.png", status=2),
                         printed(*goods, rf"{name}\.png"))  # fmt: skip
        expect(stage, ["predict", model, images[0], bad, *images[1:]], answers)


@case("predict_rotation", "pixels", png=("PNG",), jpeg=("JPEG",), webp=("WEBP",))
def predict_rotation(stage: Stage, kind: str) -> None:
    """prepare and predict have one rule: an EXIF rotation changes no prediction of a model that knows none."""
    model = stage.shared / "old/results/teacher-1/model.safetensors"
    options = {"lossless": True} if kind == "WEBP" else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    write(stage / "mine/plain", packed(scene(3, 40, 64), kind, **options))
    write(stage / "mine/turned", packed(scene(3, 40, 64), kind, exif=exif, **options))
    seen = expect(stage, ["predict", model, "mine/plain", "mine/turned"], printed("plain", "turned"))
    answers = [line.partition(": ")[2] for line in seen.out.splitlines() if ": " in line and "%" in line]
    if seen.status == 0 and (len(answers) != 2 or answers[0] != answers[1]):
        stage.fault("silent", f"predict: the image with an EXIF rotation is turned: {answers}")


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
