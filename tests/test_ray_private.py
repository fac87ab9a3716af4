"""Whether the parts of Ray that it does not promise are still there: when Ray's version changes, this says
what breaks.

Each name stands in deit_ray/cluster/ray_private.py or deit_ray/trial/train_private.py, with what to do when
it is gone.
"""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from deit_ray.cluster import ray_private
from tests.conftest import ROOT

COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
CHECKPOINTS = "ray.train.v2._internal.execution.checkpoint.checkpoint_manager:CheckpointManager"
CALLED = {  # by name: the arguments that we give, or that Ray gives to what takes its place
    "ray.experimental.internal_kv:_internal_kv_put": ["key", "value", "overwrite"],
    "ray.experimental.internal_kv:_internal_kv_get": ["key"],
    "ray.experimental.internal_kv:_internal_kv_del": ["key", "del_by_prefix"],
    f"{COORDINATOR}:get_or_create_autoscaling_coordinator": [],
    f"{COORDINATOR}:_AutoscalingCoordinatorActor.cancel_request": [
        "self",
        "requester_id",
    ],
    "ray._private.grpc_utils:init_grpc_channel": ["address", "options"],
    "ray._private.services:canonicalize_bootstrap_address_or_die": ["addr"],
    "ray._common.utils:get_default_ray_temp_dir": [],
    "ray.air.execution._internal.actor_manager:RayActorManager._actor_start_failed": [
        "self",
        "tracked_actor",
        "exception",
    ],
    "ray.air.execution._internal.actor_manager:RayActorManager._actor_task_failed": [
        "self",
        "tracked_actor_task",
        "exception",
    ],
    "ray._private.internal_api:get_state_from_address": ["address"],
    "ray._private.worker:print_to_stdstream": ["data", "ignore_prefix"],
    "ray._private.node:Node.dead_processes": ["self"],
    "ray._private.parameter:RayParams": ["worker_path"],
    "ray._private.resource_and_label_spec:ResourceAndLabelSpec.resolve": ["self", "is_head"],
    "ray.train.torch:TorchTrainer._create_default_callbacks": ["self"],
    "ray.train.torch:TorchTrainer._initialize_and_run_controller": ["self", "controller_init_kwargs"],
    "ray.train.v2._internal.execution.controller:TrainController.run": ["self"],
    "ray.train.v2._internal.execution.controller:TrainController.get_state": ["self"],
    "ray.train.v2._internal.execution.controller:TrainController.get_result": ["self"],
    "ray.train.v2._internal.execution.controller:TrainController.get_worker_group": ["self"],
    "ray.train.v2._internal.execution.controller.state:TrainControllerState.is_terminal": ["self"],
    "ray.train.v2._internal.execution.callback_manager:CallbackManager.invoke_best_effort": [
        "self",
        "hook_name",
    ],
    "ray.train.v2._internal.execution.callback:ControllerCallback.before_controller_abort": ["self"],
    f"{CHECKPOINTS}._write_state_to_storage": ["self"],
    f"{CHECKPOINTS}._save_state": ["self"],
    "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy": ["failure_config"],
    "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy.make_decision": [
        "self",
        "training_failed_error",
    ],
    "ray.train.v2._internal.execution.worker_group.worker_group:placement_group": ["name"],
    "ray.train.v2._internal.execution.worker_group.worker_group:WorkerGroup.has_started": ["self"],
    "ray.train.v2._internal.execution.worker_group.worker_group:WorkerGroup.abort": ["self"],
    "ray.train.v2._internal.data_integration.dataset_manager:DatasetManager.shutdown_data_executors": [
        "self"
    ],
}
NAMES = [
    "ray._private.runtime_env.constants:RAY_JOB_CONFIG_JSON_ENV_VAR",
    "ray.dashboard.modules.job.common:JOB_ID_METADATA_KEY",
    "ray._private.thirdparty.pynvml:nvmlDeviceGetHandleByUUID",
    "ray._private.thirdparty.pynvml:nvmlDeviceGetUtilizationRates",
    "psutil:cpu_percent",
    "psutil:virtual_memory",
    "ray._private.worker:_global_node",
    "ray.tune.execution.class_cache:DEFAULT_ENV_VARS.copy",
    "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE",
    "ray.actor:ActorClassID.from_random",
    "ray:UniqueID.from_random",
    "ray:UniqueID.size",
    "ray._private.workers.default_worker:parser",
    "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
    "ray.train.v2._internal.execution.failure_handling:FailureDecision.RAISE",
    *(f"{module}:__name__" for module in ray_private.EXECUTOR_MODULES),
]
ATTRIBUTES = {  # by class: what its constructor sets
    f"{COORDINATOR}:_AutoscalingCoordinatorActor": ["_ongoing_reqs"],
    "ray.data._internal.iterator.stream_split_iterator:StreamSplitDataIterator": ["_coord_actor"],
    "ray._private.node:Node": ["head"],
    "ray._private.resource_and_label_spec:ResourceAndLabelSpec": ["num_cpus", "num_gpus"],
    "ray.tune:Trainable": ["_storage", "_logdir"],
    "ray.train.torch:TorchTrainer": ["train_loop_config", "train_run_context", "run_config"],
    "ray.train.v2._internal.execution.controller:TrainController": [
        "_callbacks",
        "_checkpoint_manager",
        "_controller_callback_manager",
    ],
    "ray.train.v2._internal.callbacks.datasets:DatasetsCallback": ["_dataset_shard_provider"],
    "ray.train.v2._internal.callbacks.datasets:RayDatasetShardProvider": ["_dataset_manager"],
    "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy": ["_worker_group_failures"],
}
CALLS = {  # by function: the names in its code on which ours rely
    "ray.tune:Trainable.__init__": ["_setup_logdir"],
    "ray.tune.execution.class_cache:_ActorClassCache.get": ["DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE"],
    "ray.train.torch:TorchTrainer.fit": ["_initialize_and_run_controller", "_create_default_callbacks"],
    "ray.train.v2._internal.execution.worker_group.worker_group:WorkerGroup._create_placement_group": [
        "placement_group"
    ],
    f"{CHECKPOINTS}._save_state_and_delete_old_checkpoints": ["_write_state_to_storage"],
    "ray.train.v2._internal.execution.controller:TrainController.__init__": [
        "HEALTH_CHECK_INTERVAL_S_ENV_VAR",
        "ENABLE_PREEMPTION_WATCHER_ENV_VAR",
    ],
}
PRIVATE = re.compile(
    r"\bray\.(\w+\.)*_\w|\binternal_kv\b|\._(coord_actor|ongoing_reqs|dataset_\w+|checkpoint_manager)\b"
)


def find(name: str):
    module, _, path = name.partition(":")
    found = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", CALLED)
def test_ray_has_a_function_with_these_arguments(name):
    assert list(CALLED[name]) == [
        argument for argument in inspect.signature(find(name)).parameters if argument in CALLED[name]
    ]


@pytest.mark.parametrize("name", CALLED)
def test_ray_asks_for_no_other_argument(name):
    asked = [
        argument.name
        for argument in inspect.signature(find(name)).parameters.values()
        if argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    assert name.endswith(":placement_group") or set(asked) <= set(CALLED[name])


@pytest.mark.parametrize("name", NAMES)
def test_ray_has_a_name(name):
    find(name)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_constructor_of_a_class_of_rays_sets_these_attributes(name):
    constructors = [
        cls.__init__ for cls in find(name).__mro__ if "__init__" in vars(cls) and cls is not object
    ]
    names = {attribute for function in constructors for attribute in function.__code__.co_names}
    assert set(ATTRIBUTES[name]) <= names


@pytest.mark.parametrize("name", CALLS)
def test_the_code_of_a_function_of_rays_uses_these_names(name):
    assert set(CALLS[name]) <= set(find(name).__code__.co_names)


def test_a_run_has_an_id_that_can_be_set():
    context = find("ray.train.v2._internal.execution.context:TrainRunContext")
    assert "run_id" in context.__dataclass_fields__


def test_rays_coordinators_load_neither_torch_nor_ray_train():
    code = """
import sys, deit_ray.cluster.ray_private
print(sorted({"torch", "ray.train", "ray.data"} & sys.modules.keys()))
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_no_other_module_uses_what_ray_does_not_promise():
    allowed = {"ray_private.py", "train_private.py"}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(Path(ROOT, "deit_ray").rglob("*.py"))
        if path.name not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert found == []
