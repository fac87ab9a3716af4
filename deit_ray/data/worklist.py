"""A training run as one list of work: which images, crops and evaluations come when, and on which rank.

Pure functions of the seed and the data set's shape; nothing here reads an image. The list is made of tasks. A task is
what one Ray Data task does: it reads some row groups and makes blocks; a block is what one rank gets of a few
consecutive steps. Block i of the run goes to rank i mod world size, so the order of the list is the order of training.

An epoch: row groups are permuted by (seed, epoch) and laid end to end; this sequence of images is cut into pools
of about POOL images, each shuffled within itself, so that the images of one row group are spread over many
batches; every image then stands `views` times in a row (repeated augmentation, as in the reference's RASampler, where
the views are on different ranks). The first floor(images / batch) x batch samples are the epoch. A task makes about as many
samples as a pool has images: with several views a pool is the work of as many tasks, since what a task has made waits for its turn.
An evaluation follows its epoch in the same list: images in the order of their ids, padded with masked rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deit_ray import rng
from deit_ray.data.shards import RowGroups

POOL = 5120  # images that are shuffled among themselves: 80 row groups, of which any batch of 342 images meets more than 64
WINDOW = 256  # tasks in one Ray Data execution: each costs a millisecond before the first one starts
EVALUATIONS = ("val", "test")
MASKED = -1


@dataclass(frozen=True)
class Task:
    """What one Ray Data task reads and makes. It travels through Ray for every task, so samples are drawn where it runs.

    Attributes:
        split: train, val or test.
        epoch: of the crops; evaluations carry the epoch they follow.
        first_step: the global step of the first block's first batch; for evaluations a count from 0.
        steps: batches that it makes.
        batch_size: global.
        sources: (file, row group, first row, rows, first image id) of each row group it reads.
        images: rows of all sources together.
        pool: which of the epoch's; None for evaluations, which are not shuffled.
        skip: samples of the pool that come before the first one.
        repeats: samples made of each image.
        seed: the experiment's.
    """

    split: str
    epoch: int
    first_step: int
    steps: int
    batch_size: int
    sources: list[tuple[str, int, int, int, int]]
    images: int
    pool: int | None
    skip: int
    repeats: int
    seed: int

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """(row within the concatenated sources, or MASKED; which view of that image) of each sample; int64 [steps x batch]."""
        places = np.arange(self.skip, self.skip + self.steps * self.batch_size)
        if self.pool is None:
            return np.where(places < self.images, places, MASKED), np.zeros(len(places), np.int64)
        shuffled = rng.permutation(self.seed, "rows", self.images, self.epoch, self.pool)
        return shuffled[places // self.repeats], places % self.repeats


class WorkList:
    """The tasks of a run.

    Args:
        train: the training images' row groups.
        evaluations: for `val` and `test`, those images' row groups; what is missing is not evaluated.
        batch_size: global.
        world_size: ranks; divides batch_size.
        views: crops of an image in one epoch.
        epochs, eval_every: `val` is evaluated after each eval_every-th epoch and the last, `test` after the last.
        seed: the experiment's.

    Raises:
        ValueError: fewer training images than one batch.
    """

    def __init__(
        self,
        train: RowGroups,
        evaluations: dict[str, RowGroups],
        batch_size: int,
        world_size: int,
        views: int,
        epochs: int,
        eval_every: int,
        seed: int,
    ):
        self.train, self.evaluations = train, evaluations
        self.batch_size, self.world_size, self.views = batch_size, world_size, views
        self.epochs, self.eval_every, self.seed = epochs, eval_every, seed
        self.steps_per_epoch = train.images // batch_size
        if epochs and not self.steps_per_epoch:
            raise ValueError(f"{train.images} training images are fewer than one batch of {batch_size}")
        self.window = WINDOW
        unit = batch_size // math.gcd(batch_size, views)  # images whose views fill whole steps
        self.pool = max(1, POOL // unit) * unit
        self.pool_steps = self.pool * views // batch_size
        self.pools = max(1, train.images // self.pool)  # the last one takes the rest too
        self.task_steps = math.ceil(self.pool_steps / views)

    def evaluations_after(self, epoch: int) -> list[str]:
        """Which splits are evaluated after this epoch, counted from 0; -1 stands for the end of a run of no epochs."""
        last = epoch == self.epochs - 1
        due = {"val": last or (epoch + 1) % self.eval_every == 0, "test": last}
        return [split for split in EVALUATIONS if split in self.evaluations and due[split]]

    def evaluation_steps(self, split: str) -> int:
        """Batches each rank gets of an evaluation."""
        return math.ceil(self.evaluations[split].images / self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    def window_from(self, step: int) -> tuple[int, int]:
        """The window that begins at this step: about `self.window` tasks, ending where a training task ends.

        Returns:
            (stop, batches): the step at which the next window begins, and the batches a rank gets from this one,
            evaluations included.
        """
        tasks, batches = 0, 0
        while step < self.steps and tasks < self.window:
            epoch, inside = divmod(step, self.steps_per_epoch)
            stop = self._task_end(inside)
            tasks, batches, step = tasks + 1, batches + stop - inside, step + stop - inside
            if stop == self.steps_per_epoch:
                for split in self.evaluations_after(epoch):
                    batches += self.evaluation_steps(split)
                    tasks += math.ceil(self.evaluation_steps(split) / self._evaluation_task_steps)
        if not self.epochs:
            batches = sum(self.evaluation_steps(split) for split in self.evaluations_after(-1))
        return step, batches

    def tasks_between(self, start: int, stop: int) -> Iterator[Task]:
        """The tasks of the steps [start, stop), each epoch's evaluations behind its last step."""
        if not self.epochs:
            yield from self._evaluation_tasks(-1)
            return
        for epoch in range(start // self.steps_per_epoch, math.ceil(stop / self.steps_per_epoch)):
            begin = epoch * self.steps_per_epoch
            yield from self._epoch_tasks(
                epoch, max(0, start - begin), min(self.steps_per_epoch, stop - begin)
            )
            if stop - begin >= self.steps_per_epoch:
                yield from self._evaluation_tasks(epoch)

    def _task_end(self, inside: int) -> int:
        """The step of an epoch at which the task that makes this step ends."""
        pool = self._pool_of(inside)
        begin = pool * self.pool_steps
        end = begin + ((inside - begin) // self.task_steps + 1) * self.task_steps
        return min(end, self.steps_per_epoch if pool == self.pools - 1 else begin + self.pool_steps)

    def _pool_of(self, inside: int) -> int:
        return min(inside // self.pool_steps, self.pools - 1)

    @property
    def _evaluation_task_steps(self) -> int:
        return max(1, POOL // self.batch_size)

    def _evaluation_tasks(self, epoch: int) -> Iterator[Task]:
        for split in self.evaluations_after(epoch):
            yield from self._split_tasks(split, epoch)

    def _epoch_tasks(self, epoch: int, start: int, stop: int) -> Iterator[Task]:
        order = rng.permutation(self.seed, "row groups", len(self.train), epoch)
        ends = np.cumsum(self.train.rows[order])  # of each row group in the epoch's sequence of images
        while start < stop:
            pool, end = self._pool_of(start), min(self._task_end(start), stop)
            low, high = (
                pool * self.pool,
                self.train.images if pool == self.pools - 1 else (pool + 1) * self.pool,
            )
            sources = self._sources(self.train, order, ends, low, high)
            yield self._task("train", epoch, epoch * self.steps_per_epoch + start, end - start, sources, high - low, pool,
                             start * self.batch_size - low * self.views)  # fmt: skip
            start = end

    def _split_tasks(self, split: str, epoch: int) -> Iterator[Task]:
        groups, steps = self.evaluations[split], self._evaluation_task_steps
        order, ends = np.arange(len(groups)), np.cumsum(groups.rows)
        for first in range(0, self.evaluation_steps(split), steps):
            low, high = first * self.batch_size, min((first + steps) * self.batch_size, groups.images)
            sources = self._sources(groups, order, ends, low, high)
            yield self._task(
                split, epoch, first, math.ceil((high - low) / self.batch_size), sources, high - low, None, 0
            )

    def _task(
        self,
        split: str,
        epoch: int,
        first_step: int,
        steps: int,
        sources: list,
        images: int,
        pool: int | None,
        skip: int,
    ) -> Task:
        repeats = self.views if split == "train" else 1
        return Task(
            split, epoch, first_step, steps, self.batch_size, sources, images, pool, skip, repeats, self.seed
        )

    @staticmethod
    def _sources(groups: RowGroups, order: np.ndarray, ends: np.ndarray, low: int, high: int) -> list:
        """The row groups, or parts of them, that hold places [low, high) of the sequence."""
        places = slice(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left") + 1)
        g, ends = order[places], ends[places]
        begins = ends - groups.rows[g]
        skips = np.maximum(0, low - begins)
        rows = np.minimum(high, ends) - begins - skips
        columns = (groups.group[g], groups.start[g] + skips, rows, groups.first_id[g] + skips)
        return list(
            zip(
                [groups.files[f] for f in groups.file[g]],
                *(column.tolist() for column in columns),
                strict=True,
            )
        )
