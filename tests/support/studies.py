"""Studies whose trials have ended, made without training."""

import json

from deit_ray import storage
from deit_ray.outcome import Outcome
from deit_ray.results.folders import EMA, MODEL, SNAPSHOT, STATE
from deit_ray.results.journal import JournalWriter, checkpoint_name
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.study import Study

STEPS = 20  # of an epoch


def end_trial(study: Study, outcome: Outcome, value: float) -> None:
    """Ends a new trial, whose second epoch was its best, and which has the checkpoints of two epochs."""
    trial = StudySearcher(study.optuna, study.experiment, study.trial_folder).ask()
    folder = study.trial_folder(trial.number)
    journal = JournalWriter(f"{folder}/journal")
    for epoch, measured in enumerate((value, value - 0.1), 2):
        journal.add({"val/top1_ema": measured}, epoch * STEPS)
        for file in (MODEL, EMA, STATE):
            saved = f"{file} of {trial.number}, epoch {epoch}".encode()
            storage.write_bytes(storage.join(folder, checkpoint_name(epoch * STEPS), file), saved)
        study.report(trial.number, epoch, measured)
    journal.flush()
    best, latest = ({"checkpoint_dir_name": checkpoint_name(epoch * STEPS)} for epoch in (2, 3))
    snapshot = {"checkpoint_results": [best, latest], "latest_checkpoint_result": latest}
    storage.write_bytes(storage.join(folder, SNAPSHOT), json.dumps(snapshot).encode())
    if outcome == Outcome.finished():
        storage.write_bytes(storage.join(folder, MODEL), f"{EMA} of {trial.number}, epoch 2".encode())
    study.end_trial(trial.number, outcome, value if outcome == Outcome.finished() else None)
