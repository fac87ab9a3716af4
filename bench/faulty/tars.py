"""Cases of bench/faults.py: tars of images."""

import numpy as np

from bench.faulty.expect import (
    Prepared,
    Sample,
    either,
    expect_prepared,
    refused,
)
from bench.faulty.inputs import (
    packed,
    scene,
    seen_by_pil,
    tar_samples,
    truth_of,
    write,
    write_tar,
)
from bench.faulty.stage import Stage, case

OVERLAP = r"overlap|inside|same (folder|as|place)|is SOURCE|the source|holds? .*(files?|not)|not empty"
OTHERS = (
    r"not (empty|written by|ours|deit-ray|a data set|made|in its manifest)|other files|did not write|"
    r"nothing that|no data set of|foreign|choose|another folder|empty"
)


@case("tar_damaged", "prepare", header=("header",), zeros=("zeros",), cut=("cut",), garbage=("garbage",))
def tar_damaged(stage: Stage, how: str) -> None:
    """A damaged tar is never used in part without a word."""
    members, _ = tar_samples(0, 12)
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
        again = [
            (name, packed(scene(50 + i // 2), "JPEG", quality=95) if name.endswith("jpg") else content)
            for i, (name, content) in enumerate(members)
        ]
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


@case(
    "tar_dots_in_keys",
    "prepare",
    number=("22.05-{}", ""),
    version=("img.v1.{}", ""),
    typed=("t{}", "input."),
    folder=("data.v2/t{}", ""),
    leading=("./t{}", ""),
)
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


@case(
    "tar_labels",
    "prepare",
    newline=(b"1\n",),
    word=(b"cat",),
    negative=(b"-1",),
    fraction=(b"0.5",),
    missing=(None,),
    empty=(b"",),
)
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
        expected = refused(r"k0005|train\.tar|labels", "cls|label|number|class")
    expect_prepared(stage, "mine", expected)
