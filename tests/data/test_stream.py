"""The stream on a real Ray: each rank gets its samples of the work list, over windows and after a seek."""

import itertools
import time
from functools import partial

import numpy as np
import pytest
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from deit_ray.cluster.ray_private import store_stats
from deit_ray.data import stream, windows
from deit_ray.data.shards import read_manifest
from deit_ray.trial import assemble
from tests.conftest import SMALL_STEPS
from tests.support.training import local_batches


@ray.remote(num_cpus=0)
class Log:
    def __init__(self):
        self.batches = {}

    def add(self, rank, batch):
        self.batches.setdefault(rank, []).append(batch)

    def get(self):
        return self.batches


def read_stream(config):
    rank = ray.train.get_context().get_world_rank()
    for batch in stream.Stream(
        config["worklist"], ray.train.get_dataset_shard, config["cursor"], rank, config["start"]
    ):
        entry = (
            batch.split,
            batch.epoch,
            batch.first_step,
            batch.ids.tolist(),
            batch.views.tolist(),
            batch.images.sum(),
        )
        ray.get(config["log"].add.remote(rank, entry))


def hold_stream(config):
    """Takes one batch, sleeps, and logs how many more bytes the object store holds then."""
    used = partial(store_stats, ray.get_runtime_context().gcs_address)
    before = used().object_store_bytes_used
    batches = stream.Stream(config["worklist"], ray.train.get_dataset_shard, config["cursor"], 0, 0)
    next(batches)
    time.sleep(10)
    ray.get(config["log"].add.remote(0, used().object_store_bytes_used - before))


def stream_through_ray(experiment, start: int, folder, read=read_stream, store_bytes=None) -> dict[int, list]:
    manifest = read_manifest(experiment.data.uri)
    worklist = assemble.make_worklist(experiment, manifest, experiment.data.uri, ("val",))
    if read is read_stream:
        worklist.window = 1  # task: an epoch's, so that the two datasets take turns
    datasets, data_config, cursor = stream.make_datasets(
        "test", worklist, assemble.make_recipe(experiment, "cpu"), start, 1.0, store_bytes
    )
    log = Log.remote()
    TorchTrainer(
        read,
        train_loop_config={"worklist": worklist, "cursor": cursor, "start": start, "log": log},
        datasets=datasets,
        dataset_config=data_config,
        scaling_config=ScalingConfig(num_workers=experiment.train.workers),
        run_config=ray.train.RunConfig(storage_path=str(folder), name="stream"),
    ).fit()
    return ray.get(log.get.remote())


def expected(experiment, start: int) -> dict[int, list]:
    """The samples that each rank must get, made without Ray."""
    found = {}
    world, local = experiment.train.workers, experiment.train.batch_size // experiment.train.workers
    for b in local_batches(experiment, splits=("val",)):
        if (b.split == "train" and b.first_step < start) or (
            b.split != "train" and b.epoch < start // SMALL_STEPS
        ):
            continue
        for rank in range(world):
            part = b.slice(rank * local, (rank + 1) * local, b.first_step)
            entry = (
                b.split,
                b.epoch,
                b.first_step,
                part.ids.tolist(),
                part.views.tolist(),
                part.images.sum(),
            )
            found.setdefault(rank, []).append(entry)
    return found


def test_each_rank_gets_its_samples_in_order_over_windows_and_after_a_seek(
    ray_cluster, small, tmp_path, monkeypatch, thorough
):
    exp = small(**{"train.workers": 2, "train.epochs": 5, "data.views": 3})
    monkeypatch.setattr(
        stream, "BLOCK_BYTES", 2 * exp.train.batch_size // 2 * 3 * exp.data.image_size**2
    )  # 2 of a task's steps
    start = SMALL_STEPS + 2  # in the middle of the second epoch
    got = stream_through_ray(exp, start, tmp_path)
    want = expected(exp, start)
    assert sorted(got) == [0, 1]
    for rank in got:
        assert len(got[rank]) == len(want[rank])
        for a, b in zip(got[rank], want[rank], strict=True):
            assert a[:5] == b[:5]
            assert np.array_equal(a[5], b[5])


def test_a_consumer_that_sleeps_does_not_fill_the_object_store(ray_cluster, experiment, tmp_path):
    keys = {
        "distillation.kind": "none",
        "train.epochs": 300,
        "data.image_size": 224,
        "augment.policy": "none",
        "augment.color_jitter": 0.0,
    }
    exp = experiment("digits_student", keys)
    block, limit = (
        exp.train.batch_size * 3 * 224**2,
        60 << 20,
    )  # a step, since it is more than a sixteenth of the limit
    held = stream_through_ray(exp, 0, tmp_path, hold_stream, limit)[0][0]
    # what make_datasets declares: the limit, a block for the one task, and QUEUED_BLOCKS + 2 for the one rank
    assert block < held <= limit + (1 + stream.QUEUED_BLOCKS + 2) * block


class LocalDataset:
    """Plays a window's tasks in this process, and ends slowly, as a dataset whose end crosses the network."""

    def __init__(self, source, blocks=None):
        self.source, self.blocks, self.playing = source, blocks, False

    def iter_batches(self, **_):
        assert not self.playing, "a second iteration before the end of the first"
        self.playing = True
        yield from itertools.islice(
            (block for task in self.source.get_read_tasks(1) for block in task()), self.blocks
        )
        time.sleep(0.3)
        self.playing = False


class LocalCursor(dict):
    run, set, get = "test", dict.__setitem__, dict.__getitem__


def local_stream(experiment, blocks=None) -> stream.Stream:
    worklist = assemble.make_worklist(experiment, read_manifest(experiment.data.uri), experiment.data.uri, ())
    worklist.window, cursor, recipe = 1, LocalCursor(), assemble.make_recipe(experiment, "cpu")
    datasets = {
        name: LocalDataset(windows.WindowSource(worklist, recipe, 8, cursor, name), blocks)
        for name in ("window0", "window1")
    }
    return stream.Stream(worklist, datasets.get, cursor, 0, 0)


def test_a_dataset_plays_its_next_window_after_the_end_of_its_last_one(experiment):
    exp = experiment(
        "digits_student", {"distillation.kind": "none", "train.epochs": 6, "optim.warmup_epochs": 0}
    )
    assert [samples.first_step for samples in local_stream(exp)] == list(range(6 * 20))


def test_a_window_that_ends_too_early_is_an_error_and_no_waiting_for_ever(experiment):
    exp = experiment(
        "digits_student", {"distillation.kind": "none", "train.epochs": 1, "optim.warmup_epochs": 0}
    )
    with pytest.raises(RuntimeError, match="ended 4 batches before the end"):
        list(local_stream(exp, blocks=16))  # of 20, since a window's first task makes one of each step
