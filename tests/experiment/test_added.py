"""Studies and runs that were recorded before a setting existed continue as they began."""

import tarfile

import pytest
import yaml

from deit_ray.errors import UserError
from deit_ray.experiment import added
from deit_ray.experiment.config import Experiment, field_keys
from deit_ray.experiment.load import load_recorded
from deit_ray.study.study import Study
from tests.test_old_results import ARCHIVE


def test_every_setting_since_version_0_1_has_a_row():
    with tarfile.open(ARCHIVE) as archive:
        recorded = yaml.safe_load(archive.extractfile("results/interrupted-1/experiment.yaml"))
    assert recorded["distillation"]["teacher"]
    completed = added.with_added_keys(recorded)
    missing = [key for key in field_keys() if not _has(completed, key)]
    assert not missing, "each of these needs a row in ADDED_KEYS"
    assert set(added.ADDED_KEYS) <= set(field_keys())
    assert Experiment.model_validate(completed).name == recorded["name"]


@pytest.fixture
def earlier_study(experiment) -> str:
    """The results folder of a study that was recorded without augment.policy and cost.*."""
    study = Study.create(
        experiment("digits_search", {"name": "made", "distillation.kind": "none", "search.space": LR})
    )
    for tree, write in (
        (study.made_with, lambda tree: setattr(study, "made_with", tree)),
        (study.experiment.as_dict(), _writer(study.folder)),
    ):
        del tree["augment"]["policy"], tree["cost"]
        write(tree)
    return study.experiment.results.uri


LR = {"optim.lr": {"log": [1e-4, 1e-2]}}
ROWS = {"augment.policy": "three_augment", "cost.images_per_s": None, "cost.per_gpu_hour": 3.0}


def test_a_study_without_a_setting_is_resumed_with_the_tables_value(earlier_study, monkeypatch):
    monkeypatch.setattr(added, "ADDED_KEYS", ROWS)
    study = Study.open("made", earlier_study)
    amended = study.amended({"search.trials": 50})
    assert (amended.augment.policy, amended.cost.per_gpu_hour) == ("three_augment", 3.0)
    assert amended.search.trials == 50
    study.amend({"search.trials": 50})
    monkeypatch.setattr(added, "ADDED_KEYS", {})  # the file has the values from now on
    assert Study.open("made", earlier_study).experiment == study.experiment == amended


def test_a_study_without_a_setting_that_the_table_lacks_is_shown_and_not_continued(
    earlier_study, monkeypatch
):
    monkeypatch.setattr(added, "ADDED_KEYS", {key: ROWS[key] for key in ROWS if key != "augment.policy"})
    study = Study.open("made", earlier_study)
    with pytest.raises(UserError, match=r"made by a version of deit_ray without augment\.policy"):
        study.amended({})


def test_a_setting_of_a_section_that_is_null_is_not_added(earlier_study, monkeypatch, tmp_path):
    monkeypatch.setattr(added, "ADDED_KEYS", ROWS | {"distillation.teacher.mean": [0.5] * 3})
    assert added.with_added_keys({"distillation": {"teacher": None}})["distillation"] == {"teacher": None}
    (tmp_path / "run.yaml").write_text("name: x\ndata: {uri: d}\ndistillation: {kind: none, teacher: null}\n")
    assert load_recorded(tmp_path / "run.yaml").distillation.teacher is None


def _has(tree, key: str) -> bool:
    for part in key.split("."):
        if part not in tree:
            return False
        tree = tree[part]
    return True


def _writer(folder: str):
    def write(tree: dict) -> None:
        with open(f"{folder}/experiment.yaml", "w") as file:
            yaml.safe_dump(tree, file)

    return write
