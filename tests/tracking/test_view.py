"""The view of a study in MLflow's pages: names that MLflow does not promise, and whose view stays."""

import json
from pathlib import Path

import mlflow
import pytest

from deit_ray.tracking.delivery import quiet_mlflow
from deit_ray.tracking.server import Server
from deit_ray.tracking.view import PARAMETER, TAG, WORKFLOW, View, newest, run_page, runs_page, study_view

KEYS = ["optim.lr", "augment.strength"]
VIEW = study_view("s-1", "val/top1", "best/val_top1", "best/val_top1_error", KEYS)
STATE = json.loads(VIEW.state)
PAGES = Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js"


def test_mlflows_pages_know_every_name_of_a_view():
    """If this fails with another MLflow, its pages open without the view: see tracking/view.py."""
    scripts = "\n".join(path.read_text() for path in PAGES.glob("*.js"))
    fields = {
        *STATE,
        *(key for card in STATE["compareRunCharts"] for key in card),
        *(key for section in STATE["compareRunSections"] for key in section),
    }
    words = {
        TAG,
        PARAMETER,
        *WORKFLOW.split("="),
        "FIRST_20_RUNS",
        "PARALLEL",
        "LINE",
        "runDateAndNestInfo",
        "createdAt",
    }
    assert {name for name in fields | words if name not in scripts} == set()


def test_a_view_has_the_columns_that_matter_and_sorts_by_the_best():
    names = [column.partition(".")[2].strip("`") for column in STATE["selectedColumns"]]
    assert names[:2] == ["best/val_top1", "best/val_top1_error"]
    assert {"outcome", "optim.lr", "augment.strength", "epoch", "cost/gpu_hours"} <= set(names)
    assert (STATE["orderByKey"], STATE["orderByAsc"]) == ("metrics.`best/val_top1`", False)
    assert STATE["searchFilter"] == "tags.`deit_ray.study` = 's-1'"
    parallel = STATE["compareRunCharts"][0]
    assert parallel["selectedParams"] == KEYS
    assert parallel["selectedMetrics"] == ["best/val_top1"]
    assert len(VIEW.value(0)) < 5000  # earlier MLflows take no longer tag of an experiment


def test_addresses_name_the_view_and_the_newest_study():
    page = runs_page("http://h:1/mlflow/", "7", "s-1")
    assert (
        page
        == "http://h:1/mlflow/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=deit-ray-s-1"
    )
    assert (
        run_page("http://h:1", "7", "abc")
        == "http://h:1/#/experiments/7/runs/abc?workflowType=machine_learning"
    )
    tags = {f"{TAG}deit-ray-{study}": "" for study in ("s-2", "s-10", "s", "s-1-2")} | {f"{TAG}mine": ""}
    assert [newest(name, tags) for name in ("s-2", "s-1", "s-1-2", "t", "mine")] == [
        *("s-2", "s-1-2", "s-1-2"),
        *(None, None),
    ]
    assert newest("s", [f"{TAG}deit-ray-s-2", f"{TAG}deit-ray-s-10"]) == "s-10"


@pytest.fixture
def connected(server):
    """A connection to the session's MLflow, for an experiment of its own."""
    quiet_mlflow()
    made = Server(server.uri, "views", None, lambda: None)
    made.connect()
    return made


def test_a_view_is_set_once_and_brought_up_to_date_and_a_persons_stays(connected):
    client, view = mlflow.MlflowClient(connected.uri), VIEW

    def kept() -> str | None:
        return client.get_experiment(connected.experiment_id).tags.get(view.tag)

    assert [connected.share_view(view) for _ in range(3)] == [True, False, False]
    later = View("s-1", json.dumps(STATE | {"runsHiddenMode": "SHOW_ALL"}))
    assert [connected.share_view(later), connected.share_view(later)] == [True, False]
    known = json.loads(kept())
    assert (known["name"], known["state"]) == ("s-1", later.state)
    persons = {key: known[key] for key in ("name", "createdAt", "updatedAt")} | {"state": "{}"}
    for value in (json.dumps(persons), "deflate;eJyrrgUAAXUA+Q==", '"text"'):
        client.set_experiment_tag(connected.experiment_id, view.tag, value)
        assert not connected.share_view(view)
        assert kept() == value
    connected.delete_view(view.tag)
    connected.delete_view(view.tag)
    assert kept() is None
