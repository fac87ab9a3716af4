"""The work list: every epoch's samples and their order. Seeks and the number of workers change nothing."""

import itertools
import pickle

import numpy as np
import pytest

from deit_ray.data.shards import RowGroups
from deit_ray.data.worklist import MASKED, WorkList


def groups(images: int, size: int = 64) -> RowGroups:
    rows = np.array([min(size, images - first) for first in range(0, images, size)])
    n = len(rows)
    return RowGroups(("f",), np.zeros(n, int), np.arange(n), np.zeros(n, int), rows, np.cumsum(rows) - rows)


def make(
    images=1000, holdout=100, batch=64, world=1, views=1, epochs=3, eval_every=1, seed=5, test=0
) -> WorkList:
    everything = groups(images + holdout)
    evaluations = {"val": everything.between(images, images + holdout)} if holdout else {}
    if test:
        evaluations["test"] = groups(test)
    return WorkList(everything.between(0, images), evaluations, batch, world, views, epochs, eval_every, seed)


def samples(tasks) -> list[tuple]:
    """(split, epoch, step, image id, view) of every sample, in order."""
    found = []
    for task in tasks:
        ids = np.concatenate(
            [np.arange(first_id, first_id + rows) for _, _, _, rows, first_id in task.sources]
        )
        for place, (row, view) in enumerate(zip(*task.samples(), strict=True)):
            image = int(ids[row]) if row != MASKED else MASKED
            found.append(
                (task.split, task.epoch, task.first_step + place // task.batch_size, image, int(view))
            )
    return found


def test_an_epoch_takes_each_image_once_and_leaves_others_out_every_time():
    worklist = make()
    assert worklist.steps_per_epoch == 1000 // 64
    left_out = []
    for epoch in range(3):
        s = worklist.steps_per_epoch
        ids = [
            image
            for split, _, _, image, _ in samples(worklist.tasks_between(epoch * s, (epoch + 1) * s))
            if split == "train"
        ]
        assert len(ids) == len(set(ids)) == 15 * 64
        assert set(ids) <= set(range(1000))
        left_out.append(set(range(1000)) - set(ids))
    assert left_out[0] != left_out[1] != left_out[2]


def test_repeated_augmentation_shows_a_third_of_the_images_three_times():
    worklist = make(views=3)
    found = [
        (image, view)
        for split, _, _, image, view in samples(worklist.tasks_between(0, worklist.steps_per_epoch))
        if split == "train"
    ]
    assert len(found) == 15 * 64
    assert len(set(found)) == len(found)
    images = [image for image, _ in found]
    assert len(set(images)) == 15 * 64 // 3
    by_step = [set(images[k : k + 64]) for k in range(0, len(images), 64)]
    shared = [len(a & b) for a, b in itertools.pairwise(by_step)]
    assert max(shared) <= 1  # 64 does not divide by 3: at most one image is cut between two batches


@pytest.mark.parametrize("views", [1, 3])
def test_the_order_is_the_same_for_any_number_of_workers(views):
    expected = samples(make(views=views, test=100).tasks_between(0, 45))
    for world in (2, 4):
        assert samples(make(views=views, test=100, world=world).tasks_between(0, 45)) == expected


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("images", [1000, 20_000])
def test_a_seek_gives_exactly_what_is_left(images, views):
    worklist = make(images=images, views=views)
    everything = samples(worklist.tasks_between(0, worklist.steps))

    def from_step(step):
        epoch = step // worklist.steps_per_epoch
        return [s for s in everything if (s[1], s[0] != "train", s[2]) >= (epoch, False, step)]

    for step in (1, worklist.steps_per_epoch - 1, worklist.steps_per_epoch, worklist.steps - 1):
        assert samples(worklist.tasks_between(step, worklist.steps)) == from_step(step)


def test_windows_meet_without_gap_or_overlap():
    worklist = make(images=30_000, epochs=2)
    worklist.window = 3
    step, found = 0, []
    while step < worklist.steps:
        stop, batches = worklist.window_from(step)
        window = samples(worklist.tasks_between(step, stop))
        assert len(window) == batches * 64
        found += window
        step = stop
    assert found == samples(worklist.tasks_between(0, worklist.steps))


def test_an_evaluation_has_every_image_once_and_padding_for_the_rest():
    worklist = make(holdout=361, world=2, epochs=1)
    found = [
        image
        for split, _, _, image, _ in samples(worklist.tasks_between(0, worklist.steps))
        if split == "val"
    ]
    assert sorted(i for i in found if i != MASKED) == list(range(1000, 1361))
    assert len(found) == worklist.evaluation_steps("val") * 64 == 6 * 64


def test_evaluations_come_when_they_are_due():
    worklist = make(epochs=5, eval_every=2, test=50)
    assert [worklist.evaluations_after(epoch) for epoch in range(5)] == [
        [],
        ["val"],
        [],
        ["val"],
        ["val", "test"],
    ]


def test_images_of_one_row_group_are_spread_over_batches():
    # without pools the probability of sharing a batch would be 1; a pool of 5120 images is 80 batches
    worklist = make(images=64_000, holdout=0, epochs=1)
    group_of = {}
    for _, _, step, image, _ in samples(worklist.tasks_between(0, worklist.steps)):
        group_of.setdefault(image // 64, []).append(step)
    pairs = same = 0
    for steps in group_of.values():
        steps = np.array(steps)
        same += (steps[:, None] == steps[None]).sum() - len(steps)
        pairs += len(steps) ** 2 - len(steps)
    assert same / pairs < 0.05


@pytest.mark.parametrize("views", [1, 3])
def test_the_shuffle_is_good_at_the_size_of_imagenet(views):
    worklist = make(images=1_281_167, holdout=0, batch=1024, views=views, epochs=1)
    group, step = [], []
    for task in worklist.tasks_between(0, worklist.steps):
        ids = np.concatenate(
            [np.arange(first_id, first_id + rows) for _, _, _, rows, first_id in task.sources]
        )
        rows, view = task.samples()
        first = view == 0  # of an image's views, so that it counts once
        group.append(ids[rows[first]] // 64)
        step.append((task.first_step + np.arange(len(rows)) // 1024)[first])
    group, step = np.concatenate(group), np.concatenate(step)

    def pairs(labels: np.ndarray) -> int:
        counts = np.unique(labels, return_counts=True)[1]
        return int((counts * (counts - 1) // 2).sum())

    shared = pairs(group * worklist.steps + step) / pairs(group)
    # two images of a row group are nearly always in one pool of 5,120, and a batch has 1024 / views images of
    # a pool; without pools the probability would be 1, and in a shuffle of all images 1023 / 1281166 = 0.0008
    assert abs(shared - (1024 / views - 1) / 5119) < 0.005
    assert shared <= 0.25
    meets = np.unique(np.stack([step, group]), axis=1)[0]
    assert np.unique(meets, return_counts=True)[1].min() >= 64


@pytest.mark.parametrize("views", [1, 3])
def test_the_first_window_of_a_long_run_is_as_small_as_that_of_a_short_one(views):
    sizes = []
    for epochs in (1, 300):
        worklist = make(images=1_281_167, holdout=0, batch=1024, views=views, epochs=epochs)
        stop, _ = worklist.window_from(0)
        tasks = list(worklist.tasks_between(0, stop))
        sizes.append((len(tasks), sum(len(pickle.dumps(task)) for task in tasks)))
    assert sizes[1][0] <= 1.1 * sizes[0][0]
    assert sizes[1][1] < 256 * 10_000  # bytes: a task is sent as what it reads, not as every sample it makes


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        make(images=63)
