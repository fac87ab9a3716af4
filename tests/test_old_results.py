"""Results of an earlier version, which computed other numbers: they are shown and delivered, not continued.

bench/make_old_results.py says what is in the archive, and how it was made.
"""

import json
import re
import shutil
import tarfile
from pathlib import Path

import mlflow
import optuna
import pytest

from deit_ray.results.origin import NUMERICS
from deit_ray.tracking.curves import is_curve
from tests.support.commands import call
from tests.support.tracked import inputs_of, ranked_by_mlflow

ARCHIVE = Path(__file__).parent / "data" / "results-0.1.tar.xz"
STUDIES = ("finished-1", "interrupted-1")
RUNS = ("teacher-1", "student-1")


@pytest.fixture
def old(tmp_path, digits, monkeypatch) -> Path:
    """The working folder of the earlier version, moved to another place."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_results_of_an_earlier_version_are_shown(old):
    before = files_of(old / "results")
    studies = deit_ray("status")
    finished = deit_ray("status", "finished-1")
    interrupted = deit_ray("status", "interrupted-1")
    trial = deit_ray("status", "interrupted-1", "1")
    difference = deit_ray("diff", "finished-1/1", "student-1")
    assert all(study in studies for study in STUDIES)
    for study, shown in zip(STUDIES, (finished, interrupted), strict=True):
        values = [f"{found.value:.4f}" for found in trials_of(old, study) if found.state.name == "COMPLETE"]
        assert values
        assert all(value in shown for value in values)
    assert "interrupted" not in finished
    assert "interrupted" in interrupted
    assert "interrupted" in trial
    assert "optim.lr" in difference
    assert "distillation" not in difference  # is the same in both
    assert files_of(old / "results") == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("best.yaml", lambda content: content.replace(b"seed: 1", b"seed: 5")),
        ("best.yaml", lambda content: content + b"# for the paper\n"),
        ("best.yaml", lambda content: content.partition(b"\n")[2]),
        ("model.safetensors", lambda content: content[:-1] + b"x"),
        ("model.safetensors", None),  # another trial's, as before more trials
    ],
)
def test_best_keeps_a_file_that_a_person_changed(old, name, change):
    folder = old / "results" / "finished-1"
    assert "kept as best.yaml.kept-1" in call("best", "finished-1").err  # an earlier version wrote it
    ours = (folder / name).read_bytes()
    other = (old / "results" / "interrupted-1" / "trial-0000" / name) if change is None else None
    if other:
        (folder / "trial-0001" / name).write_bytes(other.read_bytes())
    changed = other.read_bytes() if other else change(ours)
    assert changed != ours
    (folder / name).write_bytes(changed)
    for _ in range(2):
        ended = call("best", "finished-1")
        assert ended.status == 0
        assert (folder / name).read_bytes() == ours
    kept = [path for path in folder.glob(f"{name}.kept-*") if path.read_bytes() == changed]
    assert len(kept) == (change is not None)
    copied = call("best", "finished-1", "--out", old / "copies")
    assert f"\n  {old}/copies/finished-1/{name}\n" in copied.out
    assert (old / "copies" / "finished-1" / name).read_bytes() == ours


def test_best_of_an_interrupted_study_says_so(old):
    said = call("best", "interrupted-1")
    assert said.status == 0
    (line,) = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert "interrupted-1 is interrupted (1 finished, 1 interrupted, 1 not drawn yet)" in line
    assert line.endswith("use that version, or start it again")  # numerics was raised since
    assert "is interrupted" not in call("best", "finished-1").err


def test_sync_brings_mlflow_runs_of_an_earlier_version_up_to_date(old):
    before = Tracked(old)
    assert [name for name in before.runs if before.points(name) != journal_points(old, name)]
    for name, runs in zip((*RUNS, *STUDIES), ("1 run", "1 run", "4 runs", "3 runs"), strict=True):
        for said in ("MLflow has everything of", "nothing to deliver: MLflow had everything of"):
            assert f"{name}: {said} {runs}\n" in deit_ray("sync", name)
    after = Tracked(old)
    after.check(*after.runs)
    assert after.ids() == before.ids()
    for name in STUDIES:
        ranked = [t for t in trials_of(old, name) if t.state.name in ("COMPLETE", "PRUNED")]
        best = {t.number: max(t.intermediate_values.values()) for t in ranked}
        assert best
        assert dict(ranked_by_mlflow(after.uri, f"{old}/results/{name}", "val/top1")) == best
    curve = [value for name, _, value, _ in after.points("teacher-1") if name == "val/top1"]
    assert after.runs["teacher-1"].data.metrics["best/val_top1"] == max(curve)
    for run in after.runs.values():  # the results were moved, and their artifacts with them
        assert run.info.artifact_uri.startswith(f"{old}/results/mlruns/")
        assert "experiment.yaml" in {file.path for file in after.client.list_artifacts(run.info.run_id)}
        assert "training" in inputs_of(run)
        assert run.data.tags["mlflow.source.git.commit"].startswith("cf08551")
    outcomes = after.outcomes()
    assert outcomes.pop("student-1") == outcomes.pop("interrupted-1/trial-0001") == ("RUNNING", None)
    assert outcomes.pop("interrupted-1") == ("RUNNING", None)
    assert set(outcomes.values()) == {("FINISHED", "finished"), ("FINISHED", "stopped early at epoch 1")}
    states = [run.data.tags.get("state") for run in after.runs.values()]
    assert states.count("PRUNED") == len(states) - states.count(None) == 2  # the two that were stopped early


def test_what_a_version_with_other_numbers_has_begun_is_refused_in_one_sentence(old):
    before = files_of(old / "results")
    for name, *arguments in (
        ("interrupted-1", "tune", "--resume", "interrupted-1"),
        ("interrupted-1", "tune", "--resume", "interrupted-1", "--dry-run"),
        ("student-1", "train", "--continue", "student-1"),
        ("finished-1/0", "train", "--continue", "finished-1/0", "--epochs", "4"),
        ("teacher-1", "reproduce", "teacher-1"),
    ):
        ended = call(*arguments)
        assert ended.status == 1, ended
        assert re.fullmatch(
            rf"error: {name}: was begun by deit_ray 0\.1\.0 \(commit cf08551\w{{5}}\), which computes "
            r"other numbers \(numerics 1, here 2\), so it cannot be continued here; use that version, "
            r"or start it again",
            ended.error,
        )
    assert files_of(old / "results") == before
    assert "numerics" in deit_ray("diff", "finished-1/1", now_begun(old))


def now_begun(folder: Path) -> str:
    """The name of a copy of the old student's run, as this version would have begun it."""
    shutil.copytree(folder / "results" / "student-1", folder / "results" / "student-2")
    origin = folder / "results" / "student-2" / "origin.json"
    entries = json.loads(origin.read_text())
    entries[-1]["code"]["numerics"] = NUMERICS
    origin.write_text(json.dumps(entries))
    return "student-2"


def deit_ray(*arguments: str) -> str:
    """Runs a command in the working folder; returns what it prints."""
    ended = call(*arguments)
    assert ended.status == 0, ended
    return ended.out


def trials_of(folder: Path, study: str) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder}/results/{study}/study.db"
    return optuna.load_study(study_name=study, storage=storage).trials


def journal_points(folder: Path, run: str) -> list[tuple]:
    """All points of a run's journal that are curves in MLflow: (name, step, value, time in ms)."""
    points = []
    for segment in (folder / "results" / run / "journal").glob("*.jsonl"):
        for line in segment.read_text().splitlines():
            name, value, step, time_ms = json.loads(line)
            if is_curve(name):
                points.append((name, step, value, time_ms))
    return sorted(points)


def files_of(folder: Path) -> dict[Path, bytes]:
    """The contents of all files but databases: opening one rolls back what its killed driver had begun."""
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".db" not in path.name
    }


class Tracked:
    """MLflow's runs by the name of their folder, such as finished-1/trial-0000."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.uri = f"sqlite:///{folder}/results/mlflow.db"
        self.client = mlflow.MlflowClient(self.uri)
        experiment = self.client.get_experiment_by_name("deit_ray")
        found = self.client.search_runs([experiment.experiment_id], max_results=1000)
        self.runs = {run.data.tags["deit_ray.folder"].partition("/results/")[2]: run for run in found}
        assert len(self.runs) == len(found), "a run is there twice"

    def ids(self) -> dict[str, str]:
        return {name: run.info.run_id for name, run in self.runs.items()}

    def outcomes(self) -> dict[str, tuple[str, str | None]]:
        return {name: (run.info.status, run.data.tags.get("outcome")) for name, run in self.runs.items()}

    def points(self, name: str) -> list[tuple]:
        """All points of a run's curves, as `journal_points` gives them."""
        run = self.runs[name]
        names = [name for name in run.data.metrics if not name.startswith("best/") and is_curve(name)]
        curves = [self.client.get_metric_history(run.info.run_id, name) for name in names]
        return sorted(
            (point.key, point.step, point.value, point.timestamp) for curve in curves for point in curve
        )

    def check(self, *names: str) -> None:
        """Checks that each of these runs has its folder's present path, and every point once."""
        for name in names:
            assert self.runs[name].data.tags["deit_ray.folder"] == f"{self.folder}/results/{name}"
            if (self.folder / "results" / name / "journal").exists():
                assert self.points(name) == journal_points(self.folder, name)


def test_status_takes_the_name_of_a_run_or_of_a_trial(old):
    results = old / "results"
    run = min(file.parent.name for file in results.glob("*/run.json"))
    shown = call("status", run)
    assert shown.status == 0, shown
    assert run in shown.out
    study = min(file.parent.name for file in results.glob("*/study.db"))
    assert call("status", f"{study}/0").out == call("status", study, "0").out != ""


def test_results_of_an_earlier_version_are_deleted_with_their_mlflow_runs(old):
    assert "has it as its teacher, and cannot be resumed without" in call("rm", "teacher-1", "--yes").out
    for name in (*STUDIES, "student-1"):
        deit_ray("rm", name, "--yes")
    # an earlier version did not sign best.yaml, so nobody can say whether a person has changed it
    left = [path.relative_to(old / "results").as_posix() for path in files_of(old / "results")]
    assert [name for name in left if not name.startswith("mlruns/")] == ["finished-1/best.yaml"]
    assert Tracked(old).runs == {}
