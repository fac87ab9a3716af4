"""A study's trials and curves as tables, its best model, and the files that `export` writes."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deit_ray import storage
from deit_ray.commands.predict import predict
from deit_ray.errors import UserError
from deit_ray.outcome import MODEL, Outcome
from deit_ray.results.journal import JournalWriter, iterate_points
from deit_ray.study.study import Study
from deit_ray.study.tables import CURVE_COLUMNS, TRIAL_COLUMNS
from tests.commands.test_predict import CLASSES, write_model
from tests.support.commands import call
from tests.support.pictures import image_file
from tests.support.studies import STEPS, end_trial

ENDS = [
    (Outcome.finished(), 0.5),
    (Outcome.stopped_early(3), 0.25),
    (Outcome.failed("the loss is nan, at last"), 0.125),
    (Outcome.finished(), 0.75),
]
KEYS = ["optim.lr", "augment.cutmix", "augment.policy"]


@pytest.fixture
def study(request, experiment) -> Study:
    """A study of four trials that have ended, with journals; on S3 if the test says so."""
    keys = {
        "name": "made",
        "distillation.kind": "none",
        "search.metric": "val/top1_ema",
        "search.space": {
            "optim.lr": {"log": [3e-4, 1e-2]},
            "augment.cutmix": {"choice": [0.0, 1.0]},
            "augment.policy": {"choice": ["none", "randaugment"]},
        },
    }
    if getattr(request, "param", "disk") == "s3":
        keys["results.uri"] = f"{request.getfixturevalue('bucket')}/results"
    made = Study.create(experiment("digits_student", keys))
    with made.driving():
        for outcome, value in ENDS:
            end_trial(made, outcome, value)
        journal = JournalWriter(f"{made.trial_folder(0)}/journal")
        journal.add({"train/loss": float("nan"), "val/top1_ema": 0.5, "epoch": 4}, 4 * STEPS)
        journal.flush()
        made.ended = "all trials have ended"
    return made


@pytest.mark.parametrize("study", ["disk", "s3"], indirect=True)
def test_trials_and_curves_are_data_frames_and_export_writes_them(study, tmp_path):
    trials, curves = study.trials(), study.curves()
    assert list(trials) == [*TRIAL_COLUMNS, *KEYS]
    assert list(trials["trial"]) == [0, 1, 2, 3]
    assert list(trials["outcome"]) == [outcome.text for outcome, _ in ENDS]
    assert list(trials["best"]) == [value for _, value in ENDS]
    assert list(trials["best_epoch"]) == [2, 2, 2, 2]
    assert set(trials["metric"]) == {"val/top1_ema"}
    assert all((trials["ended"] >= trials["started"]) & (trials["started"].dt.tz is not None))
    assert [dict(row) for _, row in trials[KEYS].iterrows()] == [trial.params for trial in study.records()]

    assert list(curves) == CURVE_COLUMNS
    written = [point for n in range(4) for point in iterate_points(f"{study.trial_folder(n)}/journal")]
    assert len(curves) == len(written) - 1  # the epoch is a column
    last = curves[(curves["trial"] == 0) & (curves["step"] == 4 * STEPS)]
    assert dict(zip(last["metric"], last["epoch"], strict=True)) == {"train/loss": 4, "val/top1_ema": 4}
    assert curves["epoch"].isna().sum() == len(curves) - 2

    options = ["--results", study.experiment.results.uri, "--out", tmp_path / "tables"]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "made-1-trials.csv").write_text("mine")
    for format in ("csv", "parquet"):
        for _ in range(2):
            ended = call("export", "made", "--format", format, *options)
            assert ended.status == 0, ended
            assert ended.out == (
                f"{tmp_path}/tables/made-1-trials.{format}: 4 rows\n"
                f"{tmp_path}/tables/made-1-curves.{format}: {len(curves)} rows\n"
            )
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "made-1-curves.csv",
        "made-1-curves.parquet",
        "made-1-trials.csv",
        "made-1-trials.csv.kept-1",
        "made-1-trials.parquet",
    ]
    for name, frame in (("trials", trials), ("curves", curves)):
        of_parquet = pd.read_parquet(tmp_path / "tables" / f"made-1-{name}.parquet")
        pd.testing.assert_frame_equal(of_parquet, frame, check_dtype=False)
        times = [column for column in frame if str(frame[column].dtype).startswith("datetime")]
        of_csv = pd.read_csv(
            tmp_path / "tables" / f"made-1-{name}.csv", parse_dates=times, date_format="ISO8601"
        )
        assert list(of_csv) == list(frame)
        for column in frame.select_dtypes("number"):
            np.testing.assert_array_equal(of_csv[column], frame[column].astype("float64"))


def test_a_study_without_trials_gives_empty_tables(experiment):
    study = Study.create(experiment("digits_student", {"search.space": {"optim.lr": {"log": [1e-4, 1e-2]}}}))
    assert list(study.trials()) == [*TRIAL_COLUMNS, "optim.lr"]
    assert list(study.curves()) == CURVE_COLUMNS
    assert len(study.trials()) == len(study.curves()) == 0


def test_a_loaded_model_answers_as_predict_does(study, tmp_path):
    for number in (0, 3):
        path = write_model(tmp_path, eval_crop=0.9 if number else 1.0)
        with open(path, "rb") as file:
            storage.write_bytes(storage.join(study.trial_folder(number), MODEL), file.read())
    study.save_best()
    for name, content in (("a.jpg", image_file("JPEG")), ("b.png", image_file("PNG", mode="RGBA"))):
        (tmp_path / name).write_bytes(content)
    answers = predict(f"{study.folder}/{MODEL}", [str(tmp_path / name) for name in ("a.jpg", "b.png")])
    for trial in (None, 3):  # the best one
        model, transform = study.load_model(trial)
        assert (model.training, transform.classes) == (False, CLASSES)
        for answer in answers:
            with Image.open(answer.image) as image:
                probabilities = model(transform(image)[None]).softmax(1)[0].tolist()
            assert dict(zip(CLASSES, probabilities, strict=True)) == pytest.approx(
                dict(answer.classes), abs=1e-6
            )
    assert study.load_model(0)[1].geometry.eval_crop == 1.0
    with pytest.raises(UserError, match="made-1: trial 1 has no model; finished trials have one: 0, 3"):
        study.load_model(1)
