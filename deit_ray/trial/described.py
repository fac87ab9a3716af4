"""What MLflow shows of a run beside its curves: params, tags, data sets and final values."""

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from deit_ray import storage
from deit_ray.accuracy import interval
from deit_ray.data.shards import read_manifest, rows_of
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment, flatten
from deit_ray.experiment.load import default_experiment
from deit_ray.results.folders import MODEL, best_step, measured
from deit_ray.results.origin import read_origins
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.model_state import Weights
from deit_ray.trial.failure import read_worker

# of the study, its price or a place, so not part of what a trial learns
APART = ("name", "search.", "cost.", "tracking.", "results.")
PEAK_LR = "derived.peak_lr"


def params_of(experiment: Experiment, searched: Iterable[str] = ()) -> dict[str, str]:
    """The params of a run that trains: its searched keys, the seed, every key whose value is not the default,
    and the peak learning rate, which follows from lr and batch size.

    Args:
        searched: the keys that its study searches.
    """
    own, default = flatten(experiment.as_dict()), flatten(default_experiment().as_dict())
    keys = [key for key in own if own[key] != default.get(key) and not key.startswith(APART)]
    kept = dict.fromkeys([*searched, "seed", *keys])
    peak = experiment.optim.peak_lr(experiment.train.batch_size)
    return {key: as_param(own.get(key)) for key in kept} | {PEAK_LR: as_param(peak)}


def params_of_study(experiment: Experiment, changeable: tuple[str, ...]) -> dict[str, str]:
    """The params of a study's own run: its whole configuration without the searched keys, beside whose values
    a chart would show the best trial's result. MLflow's params never change, so those keys that a resume may
    change are left out.

    Args:
        changeable: these keys, and sections of them.
    """
    left_out = (*changeable, "results", *experiment.search.space)
    return {
        key: as_param(value)
        for key, value in flatten(experiment.as_dict()).items()
        if not any(key == section or key.startswith(f"{section}.") for section in left_out)
    }


def as_param(value: Any) -> str:
    """A setting as MLflow shows it, as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def best_name(experiment: Experiment) -> str:
    """The name of the metric by which MLflow ranks runs: their best value of the searched metric."""
    return f"best/{experiment.search.metric.replace('/', '_')}"


def error_name(experiment: Experiment) -> str:
    """The name of the metric beside it: half the width of its 95% interval."""
    return f"{best_name(experiment)}_error"


def final_metrics(
    experiment: Experiment,
    value: float | None,
    epoch: int | None,
    tested: dict[str, float],
    images: float | None = None,
    choices: int = 1,
) -> dict[str, float]:
    """The metrics by which runs that have ended are sorted, and half the width of the best value's interval.

    Args:
        value: the best value of the searched metric; None if there is none.
        epoch: its epoch, if it is known.
        tested: metrics on the test images, by name; empty if they were not measured.
        images, choices: see `accuracy.interval`; without images there is no interval.
    """
    metrics = {} if "test/top1" not in tested else {"best/test_top1": tested["test/top1"]}
    if value is not None and math.isfinite(value):
        metrics[best_name(experiment)] = value
        if images:
            low, high = interval(value, images, choices)
            metrics[error_name(experiment)] = (high - low) / 2
        if epoch is not None:
            metrics["best/epoch"] = epoch
    return metrics


def final_metrics_of_run(experiment: Experiment, folder: str) -> dict[str, float]:
    """`final_metrics` of a finished run of its own, from its journal."""
    found = best_step(folder, experiment.search.metric)
    if found is None:
        return {}
    step, value = found
    tested, metric = measured(folder, "test/top1"), experiment.search.metric
    return final_metrics(
        experiment,
        value,
        measured(folder, "epoch").get(step),
        {"test/top1": tested[step]} if step in tested else {},
        measured(folder, f"{metric.partition('/')[0]}/images").get(step),
        len(measured(folder, metric)),
    )


def weights_of(folder: str, metrics: dict[str, float]) -> Weights:
    """The best student of a trial or run that has finished, in its folder.

    Args:
        metrics: see `final_metrics`.
    """
    return Weights(storage.join(folder, MODEL), f"epoch-{metrics.get('best/epoch', 0):g}")


@dataclass(frozen=True)
class Made:
    """How the runs of a study, or a run of its own, were made.

    Attributes:
        origins: the entries of its origin.json, oldest first.
        rows: number of images by split, of entries that do not have them.
    """

    origins: list[dict]
    experiment: Experiment
    rows: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str, experiment: Experiment) -> "Made":
        """Reads it from the folder of a study or run."""
        origins = read_origins(folder)
        rows = {}
        if any("rows" not in entry["data"] for entry in origins):  # of an earlier version
            with contextlib.suppress(UserError):  # the data set is not there any more
                manifest = read_manifest(experiment.data.uri)
                if manifest.fingerprint == origins[-1]["data"]["fingerprint"]:
                    rows = rows_of(manifest, experiment.data.holdout)
        return cls(origins, experiment, rows)

    def tags(self, until: datetime | None = None) -> dict[str, str]:
        """The tags of a run that names its code, data, driver and user.

        Args:
            until: when the run ended; None if it runs. A later resume of its study is not its origin.
        """
        entry = self._entry(until)
        driver = entry.get("driver", {})
        tags = {"mlflow.source.name": "deit-ray", "mlflow.source.type": "LOCAL"}
        if not entry:
            return tags
        if commit := entry["code"]["commit"]:
            tags["mlflow.source.git.commit"] = commit
            tags["mlflow.source.git.dirty"] = str(bool(entry["code"]["changes"])).lower()
        tags["deit_ray.version"] = entry["code"]["version"]
        tags["deit_ray.data"] = entry["data"]["fingerprint"]
        tags["mlflow.user"], tags["deit_ray.driver"] = driver.get("user", ""), driver.get("host", "")
        tags["deit_ray.job"] = driver.get("job", "")
        return {key: value for key, value in tags.items() if value}

    def datasets(self, splits: tuple[str, ...]) -> tuple[Dataset, ...]:
        """The data sets of a run that reads some splits, as far as they have images."""
        entry = self._entry(None)
        if not entry:
            return ()
        data, holdout = entry["data"], self.experiment.data.holdout
        rows = data.get("rows") or self.rows
        rows = rows or {"train": None}  # nobody knows any more which other splits it has
        return tuple(
            Dataset.of(data["uri"], data["fingerprint"], split, holdout, rows[split])
            for split in splits
            if split in rows
        )

    def _entry(self, until: datetime | None) -> dict:
        if until is None or not self.origins:
            return self.origins[-1] if self.origins else {}
        moment = until.astimezone()
        before = [entry for entry in self.origins if datetime.fromisoformat(entry["date"]) <= moment]
        return before[-1] if before else self.origins[0]


def worker_tags(folder: str, workers: int) -> dict[str, str]:
    """The tags that name the hosts and GPUs of a run's workers, as the workers have noted them."""
    found = [worker for rank in range(workers) if (worker := read_worker(folder, rank))]
    hosts = sorted({worker["host"] for worker in found})
    gpus = sorted({worker["gpu"] for worker in found if worker.get("gpu")})
    tags = {"deit_ray.host": ", ".join(hosts), "deit_ray.gpu": ", ".join(gpus)}
    return {key: value for key, value in tags.items() if value}
