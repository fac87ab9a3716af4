"""Sources: small data sets in each supported layout, made here, are read correctly."""

import io
import json
import os
import pickle
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from deit_ray.data.listing import Unreadable
from deit_ray.data.sources import open_source, recognise
from deit_ray.errors import UserError

SYNSETS = ["n01440764", "n01443537", "n02085620"]


def picture(seed: int, size=(24, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def jpeg(seed: int) -> bytes:
    return cv2.imencode(".jpg", picture(seed))[1].tobytes()


def write_tar(path, members: list[tuple[str, bytes]]) -> bytes:
    """Writes a tar to a path, or, if it is None, to memory; returns its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def read_all(split) -> list:
    return list(split.reader.read(split.images))


def labels_of(split) -> list[int]:
    return split.images["label"].to_pylist()


# ILSVRC2012: the devkit's ids are not in the order of the synsets, and meta.mat also holds inner nodes


def write_ilsvrc(folder, val: int = 6):
    """Class tars in an order that is not the sorted one.

    Validation image i has the synset (2 i) mod 3 of the sorted ones.
    """
    inner = [
        (
            f"{synset}.tar",
            write_tar(
                None, [(f"{synset}_{i}.JPEG", jpeg(100 * SYNSETS.index(synset) + i)) for i in (10, 7, 300)]
            ),
        )
        for synset in reversed(SYNSETS)
    ]
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    write_tar(
        folder / "ILSVRC2012_img_val.tar",
        [(f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(1000 + i)) for i in range(val, 0, -1)],
    )
    return [SYNSETS[2 * i % 3] for i in range(1, val + 1)]


def write_devkit(folder, truth: list[str], packed: bool):
    ids = {"n02085620": 1, "n01440764": 2, "n01443537": 3}  # as in the real devkit, where ID 1 is n02119789
    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
    ]
    rows = [(i, synset, "words", "gloss", 0, np.zeros((1, 0))) for synset, i in ids.items()] + [
        (4, "n00001740", "entity", "all", 3, [1, 2, 3])
    ]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    files = {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{ids[s]}\n" for s in truth
        ).encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
    }
    if packed:
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
def test_ilsvrc2012_has_sorted_synsets_and_the_devkits_labels(tmp_path, packed):
    truth = write_ilsvrc(tmp_path)
    write_devkit(tmp_path, truth, packed)
    assert recognise(str(tmp_path)) == "ilsvrc2012"
    source = open_source(str(tmp_path))
    assert source.classes == SYNSETS
    assert labels_of(source.splits["train"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert source.splits["train"].images["name"].to_pylist()[:3] == [
        f"n01440764_{i}.JPEG" for i in (10, 300, 7)
    ]
    assert read_all(source.splits["train"])[3] == jpeg(110)  # through both tars, without unpacking either
    assert [SYNSETS[label] for label in labels_of(source.splits["test"])] == truth
    assert read_all(source.splits["test"]) == [jpeg(1001 + i) for i in range(6)]


@pytest.mark.parametrize("kind", ["synsets", "name synset", "csv"])
def test_ilsvrc2012_labels_from_a_given_file(tmp_path, kind):
    truth = write_ilsvrc(tmp_path / "tars")
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 7)]
    lines = {
        "synsets": truth,
        "name synset": [
            f"{name}.JPEG {synset}" for name, synset in reversed(list(zip(names, truth, strict=True)))
        ],
        "csv": [
            "ImageId,PredictionString",
            *(f"{name},{synset} 85 1 499 272" for name, synset in zip(names, truth, strict=True)),
        ],
    }[kind]
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
    source = open_source(
        str(tmp_path / "tars" / "ILSVRC2012_img_train.tar"), labels=str(tmp_path / "labels.txt")
    )
    assert [SYNSETS[label] for label in labels_of(source.splits["test"])] == truth


def test_ilsvrc2012_without_labels_or_with_wrong_ones_is_refused(tmp_path):
    truth = write_ilsvrc(tmp_path)
    with pytest.raises(
        UserError, match=r"labels of ILSVRC2012_img_val.tar are missing: put ILSVRC2012_devkit_t12.tar.gz"
    ):
        open_source(str(tmp_path))
    (tmp_path / "labels.txt").write_text("\n".join(truth[:-1]))
    with pytest.raises(UserError, match=r"has 5 labels, but ILSVRC2012_img_val.tar holds 6 images"):
        open_source(str(tmp_path), labels=str(tmp_path / "labels.txt"))
    (tmp_path / "labels.txt").write_text("\n".join(["n99999999", *truth[1:]]))
    with pytest.raises(UserError, match=r"'n99999999' is no class of ILSVRC2012_img_train.tar"):
        open_source(str(tmp_path), labels=str(tmp_path / "labels.txt"))


def test_a_tar_that_ends_too_early_and_a_compressed_one_are_refused(tmp_path):
    write_ilsvrc(tmp_path)
    whole = (tmp_path / "ILSVRC2012_img_train.tar").read_bytes()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"ILSVRC2012_img_train.tar: ends within n0\d+.tar, which should have"
    ):
        open_source(str(tmp_path))
    with tarfile.open(tmp_path / "train.tar", "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(UserError, match=r"it is compressed with gzip: unpack it first"):
        open_source(str(tmp_path / "train.tar"))


def test_webdataset_tars(tmp_path):
    for shard in range(2):
        samples = []
        for i in range(4):
            content = {"cls": f"{i % 3}\n".encode(), "jpg": jpeg(10 * shard + i), "json": b"{}"}
            samples += [(f"{shard}{i:03d}.{kind}", data) for kind, data in content.items()]
        write_tar(
            tmp_path / f"imagenet-train-{shard:06d}.tar",
            samples,
        )
    write_tar(
        tmp_path / "imagenet-validation-000000.tar",
        [("a/0.jpg", jpeg(90)), ("a/0.cls", b"2"), ("b/0.cls", b"1"), ("b/0.png", jpeg(91))],
    )
    source = open_source(str(tmp_path))
    assert (source.format, source.classes) == ("webdataset", ["0", "1", "2"])
    assert labels_of(source.splits["train"]) == [0, 1, 2, 0, 0, 1, 2, 0]
    assert read_all(source.splits["train"]) == [jpeg(10 * shard + i) for shard in range(2) for i in range(4)]
    assert labels_of(source.splits["test"]) == [2, 1]
    assert read_all(source.splits["test"]) == [jpeg(90), jpeg(91)]
    (tmp_path / "classnames.txt").write_text("cat\ndog\nfish\n")
    assert open_source(str(tmp_path)).classes == ["cat", "dog", "fish"]


def test_a_webdataset_sample_without_a_label_is_refused(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("1.jpg", jpeg(1)), ("1.cls", b"0"), ("2.jpg", jpeg(2))])
    with pytest.raises(UserError, match=r"2.jpg has no label; a sample is KEY.jpg and KEY.cls"):
        open_source(str(tmp_path))
    write_tar(tmp_path / "train-0.tar", [("1.jpg", jpeg(1)), ("1.cls", b"-1")])
    with pytest.raises(UserError, match=r"1.cls: is -1; must be the number of the class"):
        open_source(str(tmp_path))


def write_hub_parquet(path, labels: list[int], first: int, names: list[str] | None = ("cat", "dog")):
    """Writes Parquet as `datasets` does: a struct of bytes and path, and the class names in the metadata."""
    rows = [{"bytes": jpeg(first + i), "path": f"{i}.jpg"} for i in range(len(labels))]
    images = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=5)


def test_hugging_face_parquet(tmp_path):
    write_hub_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1] * 6, 0)
    write_hub_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 1, 0], 50)
    write_hub_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [0, 1], 70)
    write_hub_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [-1, -1], 80)  # as ImageNet's
    source = open_source(str(tmp_path))
    assert (source.format, source.classes) == ("parquet", ["cat", "dog"])
    assert labels_of(source.splits["train"]) == [0, 1] * 6 + [1, 1, 0]
    assert read_all(source.splits["train"]) == [jpeg(i) for i in [*range(12), 50, 51, 52]]
    assert read_all(source.splits["test"]) == [jpeg(70), jpeg(71)]
    assert source.notes == ["the files named test are not used: they have no labels"]
    some = source.splits["train"].images.take([3, 4, 11, 14])
    assert list(source.splits["train"].reader.read(some)) == [jpeg(3), jpeg(4), jpeg(11), jpeg(52)]


def test_parquet_with_words_for_labels_in_one_file(tmp_path):
    table = pa.table({"jpg": [jpeg(i) for i in range(10)], "label": ["dog", "cat"] * 5})
    pq.write_table(table, tmp_path / "pets.parquet")
    source = open_source(str(tmp_path / "pets.parquet"))
    assert source.classes == ["cat", "dog"]
    assert (labels_of(source.splits["train"]).count(0), labels_of(source.splits["test"]).count(0)) == (
        4,
        1,
    )  # a fifth of five
    pq.write_table(table.drop_columns("label"), tmp_path / "pets.parquet")
    with pytest.raises(UserError, match=r"no column of labels; known are label, labels, .*, it has jpg"):
        open_source(str(tmp_path / "pets.parquet"))


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
def test_arrays(tmp_path, kind):
    train, test = (
        np.stack([picture(i) for i in range(6)]),
        np.stack([picture(10 + i)[:, :, 0] for i in range(2)]),
    )
    arrays = {
        "x_train": train,
        "y_train": np.array([[0], [1], [2]] * 2),
        "x_test": test,
        "y_test": np.array([2, 0]),
    }
    if kind == "npy":
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(tmp_path / "cifar.npz", **arrays)
    source = open_source(str(tmp_path if kind == "npy" else tmp_path / "cifar.npz"))
    assert (source.format, source.classes) == ("arrays", ["0", "1", "2"])
    assert labels_of(source.splits["train"]) == [0, 1, 2] * 2
    np.testing.assert_array_equal(np.stack(read_all(source.splits["train"])), train)
    np.testing.assert_array_equal(np.stack(read_all(source.splits["test"])), np.repeat(test[..., None], 3, 3))


def write_cifar(folder):
    """Writes a folder like cifar-10-batches-py, with 4 images a batch."""
    pixels = {
        name: np.random.default_rng(i).integers(0, 256, (4, 3072), dtype=np.uint8)
        for i, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"])
    }
    for name, data in pixels.items():
        content = {
            b"batch_label": name.encode(),
            b"labels": [1, 0, 1, 0],
            b"data": data,
            b"filenames": [f"{name}_{i}.png".encode() for i in range(4)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"num_cases_per_batch": 4, b"label_names": [b"airplane", b"automobile"]}, protocol=2)
    )
    (folder / "readme.html").write_text("")
    return pixels


def test_cifars_own_batches(tmp_path):
    pixels = write_cifar(tmp_path)
    source = open_source(str(tmp_path))
    assert (source.format, source.classes) == ("arrays", ["airplane", "automobile"])
    assert labels_of(source.splits["train"]) == [1, 0, 1, 0] * 2
    red = read_all(source.splits["train"])[5][:, :, 0]
    np.testing.assert_array_equal(
        red.ravel(), pixels["data_batch_2"][1][:1024]
    )  # row-major planes of red, green, blue
    assert len(read_all(source.splits["test"])) == 4


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": os.system}))
    with pytest.raises(UserError, match=r"holds \w+.system, which is not an array"):
        open_source(str(tmp_path))


def test_a_format_is_what_the_option_says(tmp_path):
    write_ilsvrc(tmp_path)
    with pytest.raises(UserError, match=r"ILSVRC2012_img_\w+.tar: holds no samples"):
        open_source(str(tmp_path), "webdataset")
    with pytest.raises(
        UserError,
        match="--format tars: must be one of ilsvrc2012, folders, parquet, webdataset, arrays, digits",
    ):
        open_source(str(tmp_path), "tars")
    with pytest.raises(UserError, match="only ILSVRC2012's tars need labels"):
        open_source("file://" + str(tmp_path), "folders", labels="x")


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    for place in ("here", "there"):
        write_tar(
            tmp_path / place / "train.tar",
            [
                (f"{i}.{k}", jpeg(i) if k == "jpg" else b"%d" % (i % 2))
                for i in range(4)
                for k in ("jpg", "cls")
            ],
        )
    here, there = (open_source(str(tmp_path / place)).fingerprint() for place in ("here", "there"))
    assert here == there
    write_tar(
        tmp_path / "there" / "train.tar",
        [(f"{i}.{k}", jpeg(i) if k == "jpg" else b"%d" % (i // 2)) for i in range(4) for k in ("jpg", "cls")],
    )
    assert open_source(str(tmp_path / "there")).fingerprint() != here


def test_a_file_that_vanished_costs_that_image(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    source = open_source(str(tmp_path))
    (tmp_path / source.splits["test"].images["name"][0].as_py()).unlink()
    found = read_all(source.splits["test"])
    assert isinstance(found[0], Unreadable)
    assert "No such file" in str(found[0])
    assert found[1] == jpeg(1)
