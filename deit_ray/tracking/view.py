"""How MLflow's UI shows a study: the columns of its run table, their order, and the charts of its runs.

MLflow keeps a saved view of an experiment as one of the experiment's tags, and opens it by a parameter of the
page's address. Neither is documented. tests/tracking/test_view.py compares every name with the pages that the
installed MLflow serves; a page that does not know a view opens without it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

TAG = "mlflow.sharedViewState."  # begins the name of a view's tag
PARAMETER = "viewStateShareKey"
KEY = "deit-ray-"  # begins the key of a study's view
WRITER = "deit_ray"  # MLflow leaves it out when a person saves a view of the same key
WORKFLOW = "workflowType=machine_learning"  # else MLflow shows a menu for language models


@dataclass(frozen=True)
class View:
    """A view of a study.

    Attributes:
        study: name of the study; MLflow lists the view under it.
        state: what the page shows, as JSON.
    """

    study: str
    state: str

    @property
    def tag(self) -> str:
        return view_tag(self.study)

    def value(self, now_ms: int) -> str:
        """The tag's value, as MLflow's page writes one."""
        known = {"name": self.study, "createdAt": now_ms, "updatedAt": now_ms, "state": self.state}
        return json.dumps(known | {WRITER: True})

    def is_missing(self, found: str | None) -> bool:
        """Whether the tag must be set: there is none, or an earlier version of deit-ray has set it. A view
        that a person has saved under the same key stays.

        Args:
            found: the tag's value.
        """
        if found is None:
            return True
        try:
            known = json.loads(found)
        except ValueError:
            return False
        return isinstance(known, dict) and WRITER in known and known.get("state") != self.state


def study_view(study: str, metric: str, best: str, error: str, keys: Sequence[str]) -> View:
    """The view of a study: its trials and its own run, best first.

    MLflow nests runs only in the order of their start, so with another order the study's run is a row like
    those of its trials.

    Args:
        metric: by which the study ranks, such as val/top1.
        best, error: MLflow's names of a run's best value of it and of that value's error.
        keys: the searched keys.
    """
    columns = [
        column("metrics", best),
        column("metrics", error),
        column("tags", "outcome"),
        *(column("params", key) for key in keys),
        *(column("metrics", name) for name in ("best/epoch", "epoch", "best/test_top1")),
        *(column("metrics", f"cost/{device}_hours") for device in ("gpu", "cpu")),
    ]
    name, outcome = column("attributes", "Run Name"), columns[2]
    widths = {one: min(8 * len(one) - 50, 130) for one in columns}  # pixels
    state = {
        "searchFilter": f"{column('tags', 'deit_ray.study')} = '{study}'",
        "orderByKey": column("metrics", best),
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": [name, "runDateAndNestInfo", *columns],
        "columnWidths": widths | {name: 250, outcome: 150},
        "runsHiddenMode": "FIRST_20_RUNS",  # in charts
        "compareRunSections": [_section("search", 1), _section("curves", 2)],
        "isAccordionReordered": True,  # else the sections are sorted by name
        "compareRunCharts": [_parallel(best, keys), *map(_curve, (metric, "train/loss"))],
    }
    return View(study, json.dumps(state))


def column(kind: str, name: str) -> str:
    """MLflow's name of a column, which it also sorts and filters by.

    Args:
        kind: metrics, params, tags or attributes.
    """
    return f"{kind}.`{name}`"


def _parallel(best: str, keys: Sequence[str]) -> dict:
    """A chart with an axis for each searched key and one for the best value, and a line for each trial."""
    return {
        "type": "PARALLEL",
        **_card("search", "parallel"),
        "selectedParams": list(keys),
        "selectedMetrics": [best],
        "showAllRuns": True,
    }


def _curve(metric: str) -> dict:
    """A chart with a line over the steps for each run."""
    return {
        "type": "LINE",
        **_card("curves", metric),
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "selectedXAxisMetricKey": "",
        "lineSmoothness": 0,
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _card(section: str, name: str) -> dict:
    known = {"uuid": f"{WRITER}-{name}", "metricSectionId": f"{WRITER}-{section}"}
    return known | {"deleted": False, "isGenerated": False}


def _section(name: str, columns: int) -> dict:
    """A section of charts, with so many beside each other."""
    known = {"uuid": f"{WRITER}-{name}", "name": name, "columns": columns}
    return known | {"display": True, "isReordered": True, "isGenerated": False}


# Addresses of MLflow's pages


def runs_page(server: str, experiment_id: str, study: str | None = None) -> str:
    """The address of the run table of an experiment, in the view of a study if it is named.

    Args:
        server: URL of the MLflow server.
    """
    page = f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{WORKFLOW}"
    return page if study is None else f"{page}&{PARAMETER}={quote(key_of(study))}"


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """The address of the page of a run."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{WORKFLOW}"


def list_page(server: str) -> str:
    """The address of the list of experiments."""
    return f"{server.rstrip('/')}/#/experiments?{WORKFLOW}"


def key_of(study: str) -> str:
    """The key of a study's view."""
    return KEY + study


def view_tag(study: str) -> str:
    """The tag of an experiment that holds the view of a study."""
    return TAG + key_of(study)


def newest(name: str, tags: Iterable[str]) -> str | None:
    """The study of a name whose view is among the tags of an experiment; None if there is none.

    Args:
        name: of a study, such as digits_search-1, or digits_search for the newest.
    """
    studies = [tag.removeprefix(TAG + KEY) for tag in tags if tag.startswith(TAG + KEY)]
    if name in studies:
        return name
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    numbered = [(int(found[1]), study) for study in studies if (found := pattern.fullmatch(study))]
    return max(numbered)[1] if numbered else None
