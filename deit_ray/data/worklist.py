"""A training run as one list of work: which images, crops and evaluations come when, and on which rank.

Pure functions of the seed and the data set's shape; nothing here reads an image. The list is made of tasks. A task is
what one Ray Data task does: it reads some row groups and makes blocks; a block is what one rank gets of a few
consecutive steps. Block i of the run goes to rank i mod world size, so the order of the list is the order of training.

An epoch: row groups are permuted by (seed, epoch) and laid end to end; this sequence of images is cut into pools
of about POOL images, each shuffled within itself, so that the images of one row group are spread over many
batches; every image then stands `views` times in a row (repeated augmentation, as in the reference's RASampler, where
the views are on different ranks). The first floor(images / batch) x batch samples are the epoch.
An evaluation follows its epoch in the same list: images in the order of their ids, padded with masked rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deit_ray import rng
from deit_ray.data.shards import RowGroups

POOL = 4096  # images that are shuffled among themselves
BLOCK_BYTES = 8 << 20  # a block holds as many steps as fit: few, full blocks
WINDOW = 2000  # tasks in one Ray Data execution at most
EVALUATIONS = ("val", "test")
MASKED = -1


@dataclass(frozen=True)
class Task:
    """What one Ray Data task reads and makes.

    Attributes:
        split: train, val or test.
        epoch: of the crops; evaluations carry the epoch they follow.
        first_step: the global step of the first block's first batch; for evaluations a count from 0.
        sources: (file, row group, first row, rows, first image id) of each row group it reads.
        rows: for each sample, the row within the concatenated sources, or MASKED; [steps x batch].
        views: for each sample, which view of its image; same shape.
        block_steps: steps in a block.
    """

    split: str
    epoch: int
    first_step: int
    sources: list[tuple[str, int, int, int, int]]
    rows: np.ndarray
    views: np.ndarray
    block_steps: int


class WorkList:
    """The tasks of a run.

    Args:
        train: the training images' row groups.
        evaluations: for `val` and `test`, those images' row groups; what is missing is not evaluated.
        batch_size: global.
        world_size: ranks; divides batch_size.
        views: crops of an image in one epoch.
        sample_bytes: of one decoded sample, to size blocks.
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
        sample_bytes: int,
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
        self.block_steps = max(1, BLOCK_BYTES // (batch_size // world_size * sample_bytes))
        unit = batch_size // math.gcd(batch_size, views)  # images whose views fill whole steps
        self.pool = max(1, POOL // unit) * unit
        self.pool_steps = self.pool * views // batch_size

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
            pools_left = math.ceil(self.steps_per_epoch / self.pool_steps) - inside // self.pool_steps
            pools = min(pools_left, self.window - tasks)
            stop = min(self.steps_per_epoch, (inside // self.pool_steps + pools) * self.pool_steps)
            tasks, batches, step = tasks + pools, batches + stop - inside, step + stop - inside
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
            yield from self._epoch_tasks(epoch, max(0, start - begin), min(self.steps_per_epoch, stop - begin))
            if stop - begin >= self.steps_per_epoch:
                yield from self._evaluation_tasks(epoch)

    @property
    def _evaluation_task_steps(self) -> int:
        return max(1, POOL // self.batch_size)

    def _evaluation_tasks(self, epoch: int) -> Iterator[Task]:
        for split in self.evaluations_after(epoch):
            yield from self._split_tasks(split, epoch)

    def _epoch_tasks(self, epoch: int, start: int, stop: int) -> Iterator[Task]:
        order = rng.permutation(self.seed, "row groups", len(self.train), epoch)
        ends = np.cumsum(self.train.rows[order])  # of each row group in the epoch's sequence of images
        for pool in range(start // self.pool_steps, math.ceil(stop / self.pool_steps)):
            low, high = pool * self.pool, min((pool + 1) * self.pool, self.train.images)
            sources = self._sources(self.train, order, ends, low, high)
            first = max(start, pool * self.pool_steps)
            last = min(stop, (pool + 1) * self.pool_steps)
            shuffled = rng.permutation(self.seed, "rows", high - low, epoch, pool)
            samples = np.arange(first * self.batch_size, last * self.batch_size) - low * self.views
            rows, views = shuffled[samples // self.views], samples % self.views
            yield Task("train", epoch, epoch * self.steps_per_epoch + first, sources, rows, views, self.block_steps)

    def _split_tasks(self, split: str, epoch: int) -> Iterator[Task]:
        groups = self.evaluations[split]
        order, ends = np.arange(len(groups)), np.cumsum(groups.rows)
        steps = self._evaluation_task_steps
        for first in range(0, self.evaluation_steps(split), steps):
            low, high = first * self.batch_size, min((first + steps) * self.batch_size, groups.images)
            padded = math.ceil((high - low) / self.batch_size) * self.batch_size
            rows = np.where(np.arange(padded) < high - low, np.arange(padded), MASKED)
            sources = self._sources(groups, order, ends, low, high)
            yield Task(split, epoch, first, sources, rows, np.zeros(padded, np.int64), self.block_steps)

    @staticmethod
    def _sources(groups: RowGroups, order: np.ndarray, ends: np.ndarray, low: int, high: int) -> list:
        """The row groups, or parts of them, that hold places [low, high) of the sequence."""
        sources = []
        for place in range(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left") + 1):
            g = order[place]
            begin = ends[place] - groups.rows[g]
            skip = max(0, low - begin)
            rows = min(high, ends[place]) - begin - skip
            sources.append((groups.files[groups.file[g]], int(groups.group[g]), int(groups.start[g] + skip),
                            int(rows), int(groups.first_id[g] + skip)))  # fmt: skip
        return sources
