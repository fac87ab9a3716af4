"""What a person sees of a finished study in a browser: MLflow's pages, and the report.

`make screenshots` keeps pictures of the pages in docs/.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deit_ray.experiment.load import dump_experiment, load_experiment
from deit_ray.study.study import Study
from tests.conftest import EXPERIMENTS, Finished
from tests.support.browser import Browser, chromium
from tests.support.commands import call, command
from tests.support.servers import free_port

EPOCHS, TRIALS = 4, 6
BEST = "best/val_top1"


@pytest.fixture(scope="module")
def digits_study(ray_cluster, digits, teacher_file, tmp_path_factory) -> Finished:
    """The search over the digits of experiments/digits_search.yaml, with fewer epochs."""
    folder = tmp_path_factory.mktemp("digits")
    keys = {
        "data.uri": digits,
        "results.uri": str(folder / "results"),
        "distillation.teacher": {"weights": teacher_file},
        "train.epochs": EPOCHS,
        "search.trials": TRIALS,
        "search.grace_epochs": 1,
    }
    experiment = load_experiment(EXPERIMENTS / "digits_search.yaml", keys)
    (folder / "digits_search.yaml").write_text(dump_experiment(experiment))
    ended = call("tune", folder / "digits_search.yaml")
    assert ended.status == 0, ended
    return Finished("digits_search-1", folder / "results", ended)


@pytest.fixture(scope="module")
def page(digits_study) -> Iterator[str]:
    """The address that `deit-ray ui` shows for the study."""
    arguments = ("digits_search", "--results", digits_study.results, "--port", free_port(), "--no-open")
    with command("ui", *arguments, start_new_session=True) as process:
        try:
            process.stdout.readline()
            shown = process.stdout.readline()
            assert shown.startswith("digits_search-1: http://127.0.0.1:"), shown
            yield shown.split()[1]
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def browser(page) -> Iterator[Browser]:
    with chromium(1880, 1300) as made:
        made.open(page)
        made.close_assistant()
        yield made


@pytest.fixture
def keep(browser, request, tmp_path):
    """Saves a picture of the page, in docs/ for `make screenshots`."""
    folder = Path(request.config.getoption("--screenshots") or tmp_path)

    def save(name: str, height: int | None = None) -> None:
        path = folder / f"{name}.webp"
        browser.save(path, height)
        assert path.stat().st_size < 150_000

    return save


def open_table(browser: Browser, page: str) -> list[dict[str, str]]:
    """Opens the study's table; returns its rows once all are there."""
    browser.open(page)
    browser.wait_for(lambda: len(browser.table()) == 1 + TRIALS)
    browser.wait_for(lambda: all(row.get(f"metrics.`{BEST}`") for row in browser.table()))
    return browser.table()


def test_the_table_has_the_study_its_trials_and_the_columns_that_matter(page, browser, keep, digits_study):
    study = Study.open("digits_search-1", str(digits_study.results))
    keys = list(study.experiment.search.space)
    rows = open_table(browser, page)
    columns = browser.columns()
    wanted = [f"metrics.`{BEST}`", f"metrics.`{BEST}_error`", "tags.`outcome`"]
    wanted += [f"params.`{key}`" for key in keys] + ["metrics.`best/epoch`"]
    assert [column for column in columns if column in wanted] == wanted
    assert "metrics.`cost/cpu_hours`" in columns or "metrics.`cost/gpu_hours`" in columns

    names = {row["attributes.`Run Name`"].split()[0] for row in rows}
    assert names == {"digits_search-1", "trial"}
    values = [float(row[f"metrics.`{BEST}`"]) for row in rows]
    assert values == sorted(values, reverse=True)
    board = study.leaderboard()
    assert max(values) == pytest.approx(board["best"].max())
    for state in (
        "finished",
        "stopped early",
    ):  # the leaderboard has those that have finished before the others
        ranked = [
            float(row[f"metrics.`{BEST}`"])
            for row in rows
            if row["tags.`outcome`"].startswith(state) and row[f"params.`{keys[0]}`"] != "-"
        ]
        assert ranked == pytest.approx(list(board[board["state"] == state]["best"]))
    keep("mlflow_runs", 640)


def test_the_charts_show_the_search_and_the_curves_of_several_runs(page, browser, keep, digits_study):
    browser.open(f"{page}&compareRunsMode=CHART")
    labels = browser.wait_for(lambda: [one.text for one in browser.find("svg .dimension .label")])
    assert labels == ["augment.strength", "optim.lr", "distillation.weight", BEST]
    browser.wait_for(lambda: len(browser.find(".scatterlayer .trace path.js-line")) >= 2 * (TRIALS - 1))
    browser.wait_for_text("val/top1", "train/loss")
    keep("mlflow_charts", 1150)


def test_the_compare_page_draws_the_searched_values_against_the_ranked_metric(page, browser, keep):
    rows = open_table(browser, page)
    boxes = browser.find(".ag-pinned-left-cols-container .ag-row .ag-selection-checkbox input")
    for box, row in zip(boxes, rows, strict=True):
        if row["attributes.`Run Name`"].startswith("trial"):
            box.click()
    press(browser, "Compare")
    browser.wait_for_text(f"Comparing {TRIALS} Runs")
    browser.wait_for(lambda: axes(browser))
    wanted = ["augment.strength", "distillation.weight", "optim.lr", BEST]
    choose(browser, "Parameters:", wanted[:-1])
    choose(browser, "Metrics:", [BEST])
    browser.wait_for(lambda: sorted(axes(browser)) == sorted(wanted))
    keep("mlflow_compare", 640)


def test_the_studys_page_tells_its_story(page, browser, keep):
    open_table(browser, page)
    (link,) = [
        one for one in browser.find(".ag-pinned-left-cols-container a") if one.text == "digits_search-1"
    ]
    link.click()
    browser.wait_for_text("Leaderboard", "Best", "deit-ray")
    rows = browser.wait_for(lambda: browser.find("table tbody tr"))
    assert len(rows) >= TRIALS
    keep("mlflow_study", 1000)


def test_the_report_renders_without_a_network(browser, keep, digits_study):
    ended = call("report", "digits_search", "--results", digits_study.results)
    assert ended.status == 0, ended
    report = Path(re.search(r"\S+\.html", ended.out)[0])
    browser.open(report.absolute().as_uri())
    browser.wait_for_text("digits_search-1", "Leaderboard")
    browser.wait_for(lambda: len(browser.find(".js-plotly-plot .main-svg")) >= 5)
    asked = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    keep("report", 1000)


def axes(browser: Browser) -> list[str]:
    """The axes of the parallel coordinates that the page has drawn."""
    return [title.text for title in browser.find(".parcoords .axis-title")]


def press(browser: Browser, label: str) -> None:
    """Clicks on the button of a label."""
    browser.wait_for(
        lambda: [one for one in browser.find("button") if one.text.strip() == label and one.is_enabled()]
    )[0].click()


def choose(browser: Browser, label: str, values: list[str]) -> None:
    """Chooses these values, and no others, in the list below a label."""
    script = "return [...document.querySelectorAll('div')].find(one => one.innerText === arguments[0])"
    field = browser.run(f"{script}.nextElementSibling", label)
    while extra := [
        one
        for one in field.find_elements("css selector", ".du-bois-light-select-selection-item")
        if one.text not in values
    ]:
        extra[0].find_element("css selector", ".du-bois-light-select-selection-item-remove").click()
    field.find_element("css selector", "input").send_keys("\ue015")  # the arrow down opens the list
    for value in values:
        if value not in field.text.split("\n"):
            browser.wait_for(lambda value=value: option(browser, value)).click()
    field.find_element("css selector", "input").send_keys("\ue00c")  # escape


def option(browser: Browser, value: str):
    """The entry of the open list; None until it is drawn, for which the list scrolls on."""
    entries = browser.find(f".du-bois-light-select-item-option[title='{value}']")
    if shown := [entry for entry in entries if entry.is_displayed()]:
        return shown[0]
    browser.run("document.querySelectorAll('.rc-virtual-list-holder').forEach(one => one.scrollTop += 100)")
    return None
