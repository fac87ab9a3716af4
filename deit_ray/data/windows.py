"""A window of the work list as Ray Data runs it: the source that makes its tasks, and what each task gives away.

Ray's coordinators and tasks load this much and no more: neither torch nor Ray Train.
"""

import importlib
import json
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.experimental import internal_kv

from deit_ray.cluster.holdings import kv_prefix
from deit_ray.data.blocks import Recipe, make_samples, pack
from deit_ray.data.worklist import WorkList


class Cursor:
    """Which steps each dataset plays next, in the cluster's own key-value store: an actor would be one more process a trial."""

    def __init__(self, run: str):
        self.run = run

    def set(self, name: str, span: tuple[int, int]) -> None:
        internal_kv._internal_kv_put(self._key(name), json.dumps(span), overwrite=True)

    def get(self, name: str) -> tuple[int, int]:
        found = internal_kv._internal_kv_get(self._key(name))
        return tuple(json.loads(found)) if found else (0, 0)

    def clear(self) -> None:
        internal_kv._internal_kv_del(self._key(""), del_by_prefix=True)

    def _key(self, name: str) -> str:
        return f"{kv_prefix(self.run)}window/{name}"


class WindowSource(Datasource):
    """A Ray Data source whose read tasks are the work list's tasks between two steps."""

    def __init__(self, worklist: WorkList, recipe: Recipe, block_steps: int, cursor: Cursor, name: str):
        super().__init__()
        self.worklist, self.recipe, self.block_steps, self.cursor, self.name = (
            worklist,
            recipe,
            block_steps,
            cursor,
            name,
        )

    def get_name(self) -> str:
        return "Stream"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        """Called several times an execution; it only reads."""
        start, stop = self.cursor.get(self.name)
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        batch, world = self.worklist.batch_size, self.worklist.world_size
        tasks = self.worklist.tasks_between(start, stop) if stop > start or not self.worklist.epochs else ()
        return [
            # the first one gives each step away as soon as it is made
            ReadTask(
                partial(make_blocks, task, self.recipe, batch, world, self.block_steps if place else 1),
                metadata,
            )
            for place, task in enumerate(tasks)
        ]


def make_blocks(*arguments) -> Iterator[pa.Table]:
    """What one task gives away: the samples of `make_samples`, packed."""
    return map(pack, make_samples(*arguments))


@ray.remote(scheduling_strategy="SPREAD", max_retries=0)  # as Ray Data's tasks
def warm_up(context: DataContext) -> None:
    """Nothing but what a process imports before its first task, which is sent its data set's context too: Ray gives the processes
    of ended tasks to the next ones."""


def warm_up_coordinator(coordinator) -> None:
    """Imports what Ray Data's coordinator would import at the first request."""
    for module in ("execution.streaming_executor", "logical.optimizers", "planner.planner"):
        importlib.import_module(f"ray.data._internal.{module}")
