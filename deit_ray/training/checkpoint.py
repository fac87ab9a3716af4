"""Saves and restores everything that the training loop needs to resume.

The student and its moving average are safetensors files, the rest is in state.pt.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from deit_ray.models.student import save_model
from deit_ray.models.weights import read_weights
from deit_ray.results.folders import EMA, MODEL, STATE


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: number of optimizer steps taken.
    """

    step: int


def save_checkpoint(folder: Path, train_step, progress: Progress, description: dict) -> None:
    """Writes a checkpoint of a `TrainStep`. `description` is that of `save_model`."""
    state = train_step.state_dict()
    save_model(folder / MODEL, state.pop("model"), description)
    if "ema" in state:
        save_model(folder / EMA, state.pop("ema"), description)
    torch.save({**state, "step": progress.step}, folder / STATE)


def load_checkpoint(folder: Path, train_step) -> Progress:
    """Restores a `TrainStep`.

    `weights_only=True` makes sure that the files are read as data, never run as code.
    """
    state = torch.load(folder / STATE, map_location=train_step.device, weights_only=True)
    step = state.pop("step")
    ema = {"ema": read_weights(folder / EMA, "checkpoint")} if train_step.ema else {}
    train_step.load_state_dict({"model": read_weights(folder / MODEL, "checkpoint"), **ema, **state})
    return Progress(step)
