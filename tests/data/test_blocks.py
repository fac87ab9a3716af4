"""Samples: the pixels are the same for any number of workers; a damaged image costs only itself."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.data.blocks import Recipe, Samples, make_samples, pack, unpack
from deit_ray.data.crop import Geometry
from deit_ray.data.damage import note_bad, read_bad
from deit_ray.data.shards import read_manifest
from deit_ray.data.worklist import Task
from deit_ray.training.step import Batch
from deit_ray.trial import assemble
from tests.support.training import local_batches


def pixels_by_coordinates(experiment, world_size: int) -> dict:
    found = {}
    for samples in local_batches(experiment, splits=("val",), world_size=world_size):
        for image, i, view in zip(samples.images, samples.ids, samples.views, strict=True):
            key = (samples.split, samples.epoch, int(i), int(view))
            if i >= 0:
                assert key not in found
                found[key] = image.tobytes()
    return found


def test_samples_and_pixels_do_not_depend_on_the_number_of_workers(experiment):
    overrides = {
        "train.epochs": 2,
        "optim.warmup_epochs": 0,
        "data.views": 3,
        "distillation.kind": "none",
        "train.batch_size": 60,
    }
    one = pixels_by_coordinates(experiment("digits_student", overrides), 1)
    two = pixels_by_coordinates(experiment("digits_student", overrides | {"train.workers": 2}), 2)
    three = pixels_by_coordinates(experiment("digits_student", overrides | {"train.workers": 3}), 3)
    assert one == two == three
    assert len(one) > 2 * 1200


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_seek_gives_each_rank_what_an_uninterrupted_stream_gives_from_there_on(experiment, world_size):
    overrides = {
        "train.epochs": 2,
        "optim.warmup_epochs": 0,
        "data.views": 3,
        "distillation.kind": "none",
        "train.batch_size": 60,
    }
    exp = experiment("digits_student", overrides | {"train.workers": world_size})

    def parts(start: int) -> list[tuple]:
        found = local_batches(exp, splits=("val",), world_size=world_size, start=start)
        return sorted(
            (s.epoch, s.split != "train", s.first_step, s.ids.tolist(), s.views.tolist(), s.images.tobytes())
            for s in found
        )

    everything, start = parts(0), 13  # in the middle of the first epoch
    assert parts(start) == [part for part in everything if part[:3] >= (0, False, start)]
    assert len(everything) > len(parts(start)) > world_size


def first_task(exp, steps: int = 1) -> tuple[Task, Recipe]:
    """The task of an experiment's first steps, and the recipe that the stream follows on a CPU."""
    worklist = assemble.make_worklist(exp, read_manifest(exp.data.uri), exp.data.uri, ("val",))
    return next(worklist.tasks_between(0, steps)), assemble.make_recipe(exp, "cpu")


def test_a_block_is_one_row_and_comes_back_equal(experiment):
    samples = next(
        make_samples(*first_task(experiment("digits_student", {"distillation.kind": "none"})), 64, 1)
    )
    block = pack(samples)
    assert isinstance(block, pa.Table)
    assert block.num_rows == 1
    back = unpack(block)
    assert list(back.arrays) == ["images", "labels", "ids", "views", "valid"]
    for name, array in samples.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array, strict=True)
    assert (back.split, back.epoch, back.first_step) == ("train", 0, 0)


def test_crops_travel_beside_the_images_where_the_teacher_sees_them():
    numbers = np.arange(3)
    arrays = {
        "images": np.full((3, 4, 4, 3), 1, np.uint8),
        "labels": numbers,
        "ids": numbers,
        "views": numbers,
        "valid": numbers > 0,
        "crops": np.full((3, 4, 4, 3), 2, np.uint8),
    }
    back = unpack(pack(Samples(arrays, "train", 0, 5)))
    np.testing.assert_array_equal(back.arrays["crops"], arrays["crops"])
    np.testing.assert_array_equal(back.slice(1, 2, 6).arrays["crops"], arrays["crops"][1:2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_more_array_per_sample_travels_from_the_task_to_the_batch(experiment, dtype):
    made = next(make_samples(*first_task(experiment("digits_student", {"distillation.kind": "none"})), 64, 1))
    logits = np.linspace(-9, 9, 64 * 10).reshape(64, 10).astype(dtype)
    samples = Samples(made.arrays | {"teacher_logits": logits}, made.split, made.epoch, made.first_step)
    back = unpack(pack(samples))
    np.testing.assert_array_equal(back.arrays["teacher_logits"], logits, strict=True)
    part = back.slice(16, 48, 3)
    assert part.first_step == 3
    tensor = Batch.of(part, torch.device("cpu")).tensors["teacher_logits"]
    np.testing.assert_array_equal(tensor.numpy(), logits[16:48], strict=True)


def packed_pixels(exp, hold: bool) -> tuple[list[bytes], int]:
    """The pixels of a task's blocks, packed as the stream packs them, and the number of different addresses.

    Args:
        hold: whether the reader holds all blocks to the end, or only one at a time.
    """
    task, recipe = first_task(exp, 15)
    held, pixels, addresses = [], [], set()
    for block in map(pack, make_samples(task, recipe, exp.train.batch_size, 1)):
        addresses.add(block["images"].chunks[0].buffers()[2].address)
        if hold:
            held.append(block)
        else:
            pixels.append(unpack(block).images.tobytes())
    return pixels or [unpack(block).images.tobytes() for block in held], len(addresses)


def test_blocks_share_memory_only_once_nobody_holds_them(experiment):
    exp = experiment("digits_student", {"distillation.kind": "none", "train.batch_size": 60})
    pixels, addresses = packed_pixels(exp, hold=True)
    assert addresses == len(pixels) == len(set(pixels)) > 10
    # while a block is made, the reader still holds the one before it
    assert packed_pixels(exp, hold=False) == (pixels, 2)


def test_a_corrupt_image_keeps_its_row_and_counts_nowhere(tmp_path, experiment):
    rows = [(b"broken" if i == 70 else pq_image(i), i % 3, f"image {i}") for i in range(200)]
    uri = str(tmp_path / "damaged")
    splits = {split: shards.write_split(uri, split, rows) for split in ("train", "test")}
    shards.write_manifest(
        uri, ["a", "b", "c"], {s: x[0] for s, x in splits.items()}, {s: x[1] for s, x in splits.items()}, {}
    )
    exp = experiment(
        "digits_student",
        {"distillation.kind": "none", "data.uri": uri, "data.holdout": 0.0, "train.batch_size": 40},
    )
    invalid = [
        (s.split, s.epoch, int(i))
        for s in local_batches(exp)
        for i, ok in zip(s.ids, s.valid, strict=True)
        if not ok and i >= 0
    ]
    assert invalid == [("train", epoch, 70) for epoch in range(30)] + [("test", 29, 70)]

    worklist = assemble.make_worklist(exp, read_manifest(uri), uri, ("test",))
    results = str(tmp_path / "results")
    named = note_bad(results, worklist, {("train", 70), ("test", 70)})
    assert named == [("test", 70, "image 70"), ("train", 70, "image 70")] == read_bad(results)
    assert note_bad(results, worklist, {("train", 71)}) == [
        *named,
        ("train", 71, "image 71"),
    ]  # of a resumed run


def pq_image(i: int) -> bytes:
    from deit_ray.data.images import encode

    return encode(np.full((20, 20, 3), i, np.uint8), 0, 95)


def test_a_missing_shard_is_named(tmp_path, experiment):
    import shutil

    from deit_ray.errors import UserError

    exp = experiment("digits_student", {"distillation.kind": "none"})
    shutil.copytree(exp.data.uri, tmp_path / "copy")
    (tmp_path / "copy" / "train-00000.parquet").unlink()
    broken = exp.with_overrides({"data.uri": str(tmp_path / "copy")})
    with pytest.raises(
        UserError,
        match=r"train-00000.parquet, row groups? [\d, ]+, is missing or damaged .*deit-ray data check .*copy",
    ):
        next(local_batches(broken))


def test_many_shards_are_read_at_once(tmp_path, monkeypatch):
    files, open_uri = [f"train-{i:05d}.parquet" for i in range(48)], storage.open_uri
    for i, file in enumerate(files):
        shards.write_shard(str(tmp_path), file, [(pq_image(i), i, "", b"")])

    def open_late(uri: str):
        time.sleep(0.1)  # as an object store answers
        return open_uri(uri)

    monkeypatch.setattr(storage, "open_uri", open_late)
    task = Task(
        "val",
        0,
        0,
        1,
        48,
        [(str(tmp_path / file), 0, 0, 1, i) for i, file in enumerate(files)],
        48,
        None,
        0,
        1,
        0,
    )
    begin = time.monotonic()
    (samples,) = make_samples(
        task, Recipe(Geometry(16, (0.08, 1.0), (0.75, 1.33), 0.5, 0.875, 0), None), 48, 1
    )
    assert time.monotonic() - begin < 48 * 0.1 / 3
    assert samples.labels.tolist() == samples.ids.tolist() == list(range(48))
    assert np.abs(samples.images.mean((1, 2, 3)) - np.arange(48)).max() < 2  # pq_image(i) is grey i


def test_row_groups_are_small_and_in_the_order_written(digits):
    file = pq.ParquetFile(f"{digits}/train-00000.parquet")
    manifest = read_manifest(digits)
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == manifest.splits[
        "train"
    ][0].row_groups
    assert max(manifest.splits["train"][0].row_groups) == shards.ROW_GROUP == 64
