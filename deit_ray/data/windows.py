"""A window of the work list as Ray Data runs it: the source that makes its tasks, and the blocks that each
task yields.

The stream's tasks and Ray Data's coordinator load this module, so it imports neither torch nor Ray Train.
"""

import json
from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from deit_ray.cluster import ray_private
from deit_ray.cluster.code import check_same_code_once
from deit_ray.cluster.holdings import kv_prefix
from deit_ray.data.blocks import Recipe, make_samples, pack
from deit_ray.data.worklist import WorkList


class Cursor:
    """The steps that each dataset plays next, in the cluster's key-value store: an actor would be one more
    process a trial.

    Args:
        run: the run's name; see `holdings.run_of`.
    """

    def __init__(self, run: str):
        self.run = run

    def set(self, name: str, span: tuple[int, int]) -> None:
        """Sets a dataset's steps, from the first to the one after the last."""
        ray_private.put_value(self._key(name), json.dumps(span).encode())

    def get(self, name: str) -> tuple[int, int]:
        """A dataset's steps; (0, 0) before they are set."""
        found = ray_private.get_value(self._key(name))
        return tuple(json.loads(found)) if found else (0, 0)

    def clear(self) -> None:
        """Forgets the steps of all the run's datasets, so that none of them starts another execution."""
        ray_private.delete_values(self._key(""))

    def _key(self, name: str) -> str:
        return f"{kv_prefix(self.run)}window/{name}"


class WindowSource(Datasource):
    """A Ray Data source whose read tasks are the work list's tasks between two steps.

    Args:
        worklist: the run's.
        recipe: of the samples.
        block_steps: steps in a block.
        cursor: says between which steps.
        name: the dataset's name, by which the cursor knows it.
        code: of the tasks' machines; see `check_same_code`.
    """

    def __init__(
        self,
        worklist: WorkList,
        recipe: Recipe,
        block_steps: int,
        cursor: Cursor,
        name: str,
        code: str | None = None,
    ):
        super().__init__()
        self.worklist = worklist
        self.recipe = recipe
        self.block_steps = block_steps
        self.cursor = cursor
        self.name = name
        self.code = code

    def get_name(self) -> str:
        return "Stream"

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        """The tasks of an execution. Ray Data calls this several times for each, so it only reads the
        cursor."""
        start, stop = self.cursor.get(self.name)
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        batch, world = self.worklist.batch_size, self.worklist.world_size
        only_evaluates = not self.worklist.epochs
        tasks = self.worklist.tasks_between(start, stop) if stop > start or only_evaluates else ()
        return [
            # the first task yields each step as soon as it is made
            ReadTask(
                partial(
                    make_blocks, self.code, task, self.recipe, batch, world, self.block_steps if place else 1
                ),
                metadata,
            )
            for place, task in enumerate(tasks)
        ]


def make_blocks(code: str | None, *arguments) -> Iterator[pa.Table]:
    """The blocks of one task: the samples of `make_samples`, packed.

    Args:
        code: of this machine; see `check_same_code`.
        arguments: those of `make_samples`.
    """
    check_same_code_once(code)
    return map(pack, make_samples(*arguments))


@ray.remote(scheduling_strategy="SPREAD", max_retries=0)  # as Ray Data's tasks
def warm_up(context: DataContext) -> None:
    """Starts a process for the stream's first tasks, and has it import what they need: Ray reuses the
    processes of ended tasks.

    The data set's context is an argument because unpickling it imports most of it.
    """
