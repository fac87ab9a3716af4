"""A training run as one list of work: the images, crops and evaluations of every step and rank, in order.

Everything here is a pure function of the seed and the data set's shape; nothing reads an image. The list
consists of tasks. A task is the work of one Ray Data task: it reads some row groups and makes blocks. A block
holds one rank's samples of a few consecutive steps. Block i of the run goes to rank i mod world size, so the
order of the list is the order of training.

An epoch: row groups are permuted by (seed, epoch) and joined to one sequence of images. The sequence is cut
into pools of about POOL images, and each pool is shuffled, so the images of one row group are spread over
many batches. Then every image comes `views` times in a row (repeated augmentation, as in the reference's
RASampler, where the views are on different ranks). The first floor(images / batch) x batch samples are the
epoch.

Finished samples wait in memory for their turn. So a task makes only about as many samples as a pool has
images, and with several views, several tasks share a pool.

An evaluation follows its epoch in the same list. Its images are in the order of their ids, padded with masked
rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deit_ray import rng
from deit_ray.data.shards import RowGroups

# Images shuffled together: 80 row groups. A batch of 342 images has images of more than 64 row groups.
POOL = 5120
WINDOW = 256  # tasks in one Ray Data execution; each task delays the first one by a millisecond
EVALUATIONS = ("val", "test")
MASKED = -1  # row of a sample that is padding


@dataclass(frozen=True)
class Task:
    """The work of one Ray Data task. It travels through Ray, so it is small: `samples` runs in the task.

    Attributes:
        split: train, val or test.
        epoch: the epoch of the crops; an evaluation has the epoch that it follows.
        first_step: the step of the first batch in the run; in an evaluation the number of the batch, from 0.
        steps: number of batches to make.
        batch_size: samples of all ranks together.
        sources: (file, row group, first row, rows, first image id) of each row group to read.
        images: rows of all sources together.
        pool: number of the pool in its epoch; None for evaluations, which are not shuffled.
        skip: samples of the pool before the first one of this task.
        repeats: samples of each image.
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
        """Draws the task's samples.

        Returns:
            (row of each sample's image among the rows of all sources, or MASKED; view of each sample): int64
            [steps x batch] each.
        """
        places = np.arange(self.skip, self.skip + self.steps * self.batch_size)
        if self.pool is None:
            return np.where(places < self.images, places, MASKED), np.zeros(len(places), np.int64)
        shuffled = rng.permutation(self.seed, "rows", self.images, self.epoch, self.pool)
        return shuffled[places // self.repeats], places % self.repeats


class WorkList:
    """The tasks of a run.

    Args:
        train: row groups of the training images.
        evaluations: row groups of `val` and `test`. A split that is missing is not evaluated.
        batch_size: samples of all ranks together.
        world_size: number of ranks; divides batch_size.
        views: crops of an image in one epoch.
        epochs: number of epochs. After the last one, `val` and `test` are evaluated.
        eval_every: number of epochs from one evaluation of `val` to the next.
        seed: the experiment's.

    Attributes:
        steps_per_epoch: optimizer steps of an epoch.
        window: tasks in a window.
        pool: images in a pool.
        task_steps: batches that a training task makes.

    Raises:
        ValueError: there are fewer training images than one batch.
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
        unit = batch_size // math.gcd(batch_size, views)  # fewest images whose views fill whole steps
        self.pool = max(1, POOL // unit) * unit
        self.pool_steps = self.pool * views // batch_size
        self.pools = max(1, train.images // self.pool)  # the last pool also has the remaining images
        self.task_steps = math.ceil(self.pool_steps / views)

    def evaluations_after(self, epoch: int) -> list[str]:
        """The splits evaluated after this epoch, counted from 0.

        A run without epochs evaluates after epoch -1.
        """
        due = {"val": self.reports_after(epoch), "test": epoch == self.epochs - 1}
        return [split for split in EVALUATIONS if split in self.evaluations and due[split]]

    def reports_after(self, epoch: int) -> bool:
        """Whether the run reports and saves a checkpoint after this epoch, evaluated or not."""
        return epoch == self.epochs - 1 or (epoch + 1) % self.eval_every == 0

    def evaluation_steps(self, split: str) -> int:
        """The number of batches that each rank gets of an evaluation."""
        return math.ceil(self.evaluations[split].images / self.batch_size)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    def window_from(self, step: int) -> tuple[int, int]:
        """The window that begins at this step: about `self.window` tasks, ending where a training task ends.

        Returns:
            (step at which the next window begins, number of batches that a rank gets from this window,
            including those of evaluations).
        """
        tasks, batches = 0, 0
        while step < self.steps and tasks < self.window:
            epoch, inside = divmod(step, self.steps_per_epoch)
            stop = self._task_end(inside)
            tasks += 1
            batches += stop - inside
            step += stop - inside
            if stop == self.steps_per_epoch:
                for split in self.evaluations_after(epoch):
                    batches += self.evaluation_steps(split)
                    tasks += math.ceil(self.evaluation_steps(split) / self._evaluation_task_steps)
        if not self.epochs:
            batches = sum(self.evaluation_steps(split) for split in self.evaluations_after(-1))
        return step, batches

    def tasks_between(self, start: int, stop: int) -> Iterator[Task]:
        """Yields the tasks of the steps `start` to `stop` - 1.

        An epoch's evaluations follow its last step.
        """
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
        """The step at which the task ends that makes the step `inside`. Both count from the epoch's start."""
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
        ends = np.cumsum(self.train.rows[order])  # end of each row group in the epoch's sequence of images
        while start < stop:
            pool, end = self._pool_of(start), min(self._task_end(start), stop)
            low = pool * self.pool
            high = self.train.images if pool == self.pools - 1 else low + self.pool
            yield Task(
                split="train",
                epoch=epoch,
                first_step=epoch * self.steps_per_epoch + start,
                steps=end - start,
                batch_size=self.batch_size,
                sources=self._sources(self.train, order, ends, low, high),
                images=high - low,
                pool=pool,
                skip=start * self.batch_size - low * self.views,
                repeats=self.views,
                seed=self.seed,
            )
            start = end

    def _split_tasks(self, split: str, epoch: int) -> Iterator[Task]:
        groups, steps = self.evaluations[split], self._evaluation_task_steps
        order, ends = np.arange(len(groups)), np.cumsum(groups.rows)
        for first in range(0, self.evaluation_steps(split), steps):
            low, high = first * self.batch_size, min((first + steps) * self.batch_size, groups.images)
            yield Task(
                split=split,
                epoch=epoch,
                first_step=first,
                steps=math.ceil((high - low) / self.batch_size),
                batch_size=self.batch_size,
                sources=self._sources(groups, order, ends, low, high),
                images=high - low,
                pool=None,
                skip=0,
                repeats=1,
                seed=self.seed,
            )

    @staticmethod
    def _sources(groups: RowGroups, order: np.ndarray, ends: np.ndarray, low: int, high: int) -> list:
        """The row groups, or parts of them, that hold the places `low` to `high` - 1 of the sequence."""
        places = slice(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left") + 1)
        g, ends = order[places], ends[places]
        begins = ends - groups.rows[g]
        skips = np.maximum(0, low - begins)
        rows = np.minimum(high, ends) - begins - skips
        files = [groups.files[f] for f in groups.file[g]]
        columns = (groups.group[g], groups.start[g] + skips, rows, groups.first_id[g] + skips)
        return list(zip(files, *(column.tolist() for column in columns), strict=True))
