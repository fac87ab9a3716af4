"""The stream: Ray Data runs the work list's tasks over the cluster's CPUs and hands each rank its blocks in
order.

The list is cut into windows, each one Ray Data execution, since one execution must not hold a run of any
length. Two re-executed datasets take turns, so that the next window flows before the present one ends; a
cursor tells each dataset which steps it plays. A run of one window needs no second dataset.
"""

import queue
import threading
import time
from collections.abc import Iterator

import ray
import ray.train
from ray.data import ExecutionOptions, ExecutionResources

from deit_ray.cluster import ray_private
from deit_ray.data.blocks import Recipe, Samples, unpack
from deit_ray.data.windows import Cursor, WindowSource, warm_up
from deit_ray.data.worklist import WorkList

BLOCK_BYTES = 96 << 20  # a block holds as many steps as fit, since each costs Ray 10 ms of CPU time and more
BLOCKS_HELD = 16  # at least, by the share of the object store that a window is given
QUEUED_BLOCKS = 2  # that a rank holds beyond the one it works on
WINDOWS = ("window0", "window1")  # the datasets' names
EARLY_TASKS = 4  # the next window starts when this many tasks of the present one are left


def make_datasets(
    run: str,
    worklist: WorkList,
    recipe: Recipe,
    start: int,
    cpus: float,
    store_bytes: float | None = None,
    code: str | None = None,
):
    """What `TorchTrainer` needs to stream a run from step `start` on.

    Args:
        run: a name that is the run's alone; what the run holds of the cluster can be found by it.
        worklist: the run's.
        recipe: of the samples.
        start: the earliest step that can be asked for; a later one is asked for by `Stream`.
        cpus: of all the stream's tasks together.
        store_bytes: of the object store, that the blocks of a window may take, made and not yet given to a
            rank; by default Ray's own limit. A block more for each task and QUEUED_BLOCKS + 2 for each rank
            may stand beside them.
        code: of the tasks' machines; see `check_same_code`.

    Returns:
        (datasets, data_config, cursor) for `TorchTrainer(datasets=..., dataset_config=...)` and for `Stream`.
    """
    names = WINDOWS[:1] if worklist.window_from(start)[0] >= worklist.steps else WINDOWS
    cursor = Cursor(run)
    block_bytes = min(BLOCK_BYTES, store_bytes / BLOCKS_HELD) if store_bytes else BLOCK_BYTES
    block_steps = max(
        1, int(block_bytes // (worklist.batch_size // worklist.world_size * recipe.sample_bytes))
    )
    limits = ExecutionResources.for_limits(cpu=max(cpus, 1.0), object_store_memory=store_bytes)
    options = ExecutionOptions(preserve_order=True, resource_limits=limits)
    datasets = {
        name: DatasetFactory(WindowSource(worklist, recipe, block_steps, cursor, name, code), cpus, options)
        for name in names
    }
    return datasets, Splits(), cursor


class DatasetFactory:
    """Makes the dataset where Ray Train wants it: in its controller, at every start of a worker group.

    The first window's is split for the ranks at once, so that Ray Data's coordinator and the tasks' processes
    start and import what they need while the workers do. Ray Train alone would begin that at a worker's first
    request.
    """

    def __init__(self, source: WindowSource, cpus: float, options: ExecutionOptions):
        self.source, self.cpus, self.options = source, cpus, options

    def __call__(self) -> ray.data.Dataset | list[ray.data.DataIterator]:
        cpus, tasks = min(1.0, self.cpus), max(1, int(self.cpus))
        # tasks at once: Ray Data alone would start as many as fit into the whole CPUs of its limit
        dataset = ray.data.read_datasource(
            self.source, override_num_blocks=1, num_cpus=cpus, concurrency=tasks
        )
        dataset.set_name(f"{self.source.name}-{self.source.cursor.run}")
        dataset.context.enable_progress_bars = False
        dataset.context.target_max_block_size = (
            1  # each yielded table, being one row, stays a block of its own
        )
        dataset.context.execution_no_progress_timeout_s = -1  # a window that waits for its turn is no error
        dataset.context.execution_options = self.options
        if self.source.name != WINDOWS[0]:
            return dataset
        splits = split(dataset, self.source.worklist.world_size)
        ray_private.import_in_coordinator(splits)
        for _ in range(tasks):
            warm_up.options(num_cpus=cpus).remote(dataset.context)
        return splits


def split(dataset: ray.data.Dataset, world_size: int) -> list[ray.data.DataIterator]:
    """One for each rank; starts the coordinator's process."""
    return dataset.streaming_split(world_size, equal=True)


class Splits(ray.train.DataConfig):
    """Hands out what `DatasetFactory` made, split at the first request where it is not yet."""

    def configure(
        self, datasets, world_size, worker_handles, worker_node_ids, **_
    ) -> list[dict[str, ray.data.DataIterator]]:
        found = {
            name: made if isinstance(made, list) else split(made, world_size)
            for name, made in datasets.items()
        }
        return [{name: splits[rank] for name, splits in found.items()} for rank in range(world_size)]


class Stream:
    """One rank's batches, in the order of the work list, from a step on. Iterate to get `Samples` of one
    batch each.

    Args:
        worklist: the run's.
        datasets: by name, something whose `iter_batches` gives this rank's blocks
            (`ray.train.get_dataset_shard`).
        cursor: what the datasets listen to.
        rank: this worker's.
        start: the optimizer step to start at.

    Attributes:
        wait_s: seconds spent waiting in `next` so far.
        bad: (split, image id) of the images among them that could not be decoded.
    """

    def __init__(self, worklist: WorkList, datasets, cursor: Cursor, rank: int, start: int):
        self.worklist, self.cursor, self.rank = worklist, cursor, rank
        self.datasets, self.start = datasets, start
        self.wait_s, self.bad = 0.0, set()
        self._pumps: dict[str, threading.Thread] = {}  # the latest of each dataset
        self._batches = self._iterate(self._begin(0, start))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Samples:
        begin = time.perf_counter()
        samples = next(self._batches)
        self.wait_s += time.perf_counter() - begin
        if not samples.valid.all():
            self.bad.update(
                (samples.split, i) for i in samples.ids[~samples.valid].tolist() if i >= 0
            )  # the others are padding
        return samples

    def _iterate(self, begun: tuple[queue.Queue, int, int]) -> Iterator[Samples]:
        local = self.worklist.batch_size // self.worklist.world_size
        early = EARLY_TASKS * self.worklist.task_steps
        window = 0
        blocks, stop, count = begun
        while count:
            following = None
            while count:
                block = blocks.get()
                if isinstance(block, BaseException):
                    raise block
                if block is None:
                    raise RuntimeError(
                        f"the stream ended {count} batches before the end of its window, which goes to "
                        f"step {stop}"
                    )
                steps = len(block.ids) // local
                for s in range(steps):
                    yield block.slice(s * local, (s + 1) * local, block.first_step + s)
                del block  # before waiting for the next one: it pins shared memory
                count -= steps
                if following is None and count <= early and stop < self.worklist.steps:
                    window += 1
                    following = self._begin(window, stop)
            if following is None:
                return
            blocks, stop, count = following

    def _begin(self, window: int, step: int) -> tuple[queue.Queue, int, int]:
        """Starts a window's execution; its blocks come through the queue."""
        stop, count = self.worklist.window_from(step)
        name = WINDOWS[window % len(WINDOWS)]
        if self.rank == 0:
            self.cursor.set(name, (step, stop))
        blocks, before = queue.Queue(QUEUED_BLOCKS), self._pumps.get(name)

        def pump():
            try:
                if before:
                    before.join()  # a dataset's next execution would be ended by the end of its last one
                # with prefetch_batches Ray would keep the first block until there is another one; the queue
                # is our own
                for block in self.datasets(name).iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=0
                ):
                    blocks.put(unpack(block))
                    del block  # before waiting for the next one: it pins shared memory
                blocks.put(None)
            except BaseException as error:  # raised again where the batch is awaited
                blocks.put(error)

        self._pumps[name] = threading.Thread(target=pump, name=f"stream {name}", daemon=True)
        self._pumps[name].start()
        return blocks, stop, count
