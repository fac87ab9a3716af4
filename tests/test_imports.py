"""Modules that a process loads: imports take most of the start of a command, a task or a trial."""

import subprocess
import sys

import pytest

TRAINING = {"torch", "timm", "ray.train", "mlflow"}


@pytest.mark.parametrize(
    ("modules", "not_needed"),
    [
        (
            "deit_ray.cli.views, deit_ray.study.status, deit_ray.commands.diff, deit_ray.study.study",
            TRAINING | {"ray.data"},
        ),  # commands that look at results
        (
            "deit_ray.data.windows, deit_ray.cluster.holdings",
            TRAINING | {"optuna"},
        ),  # the stream's tasks, Ray's coordinators
        ("deit_ray.data.stream", TRAINING - {"ray.train"} | {"optuna"}),  # Ray Train's manager of data sets
        (
            "deit_ray.augment.policy, deit_ray.augment.kernel_torch",
            {"ray", "mlflow", "optuna"},
        ),  # a machine without Ray
    ],
)
def test_a_process_loads_what_it_needs_alone(modules, not_needed):
    code = f"import sys, {modules}; print(sorted({not_needed} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


def test_what_the_fork_server_imports_asks_for_no_gpu():
    """CUDA cannot be used in the child of a process that has asked for it."""
    code = """
import importlib, torch

def refuse(*arguments):
    raise AssertionError("an import asks for a GPU")

torch._C._cuda_getDeviceCount = torch.cuda.device_count = torch.cuda.is_available = refuse
from deit_ray.cluster.ray_private import EXECUTOR_MODULES
from deit_ray.trial.needs import MODULES

for name in (*MODULES, *EXECUTOR_MODULES):
    importlib.import_module(name)
print(torch.cuda.is_initialized())
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "False\n"
