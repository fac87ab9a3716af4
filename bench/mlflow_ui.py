"""Measures how long MLflow's pages take with a study of 1,000 finished trials of 100 evaluations each.

- table_s: from the click on the link of `deit-ray ui STUDY` until the last of all rows is drawn. MLflow loads
  100 runs at a time; the next are loaded by a click on "Load more" as soon as it is there.
- compare_s: the best 100 runs are selected; from the click on "Compare" until the page has drawn their
  parallel coordinates.
- charts_s: from the click on the link of the same view with charts until the curves of its 20 runs are drawn.
- compare_vs_everything: compare_s of the same trials with every key of their configurations as a param and
  every metric at every evaluation, over compare_s.

Each is a median of three rounds, in headless Chromium with a new profile, whose cache has MLflow's scripts.
Figures that begin with postgres_ are those with PostgreSQL behind the server, the others those with SQLite.

The trials are written as a study writes them: a database of Optuna, a journal for each trial, delivered to
SQLite by `deit_ray.sync`. PostgreSQL gets the same rows. What everything has in addition is written as rows
of MLflow's tables, and equals what its clients would have written.

It takes about 20 minutes on 2 cores. In pieces, in a folder that is kept: --make until it says that all is
there, then --measure STORE, which keeps its figures there, then --record.

    python bench/mlflow_ui.py [--folder FOLDER [--make SECONDS | --measure sqlite|postgres | --record]]
"""

import argparse
import csv
import io
import json
import math
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from datetime import datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.metrics import EVALUATION, TRAIN  # noqa: E402
from bench.record import record  # noqa: E402
from deit_ray.results.folders import JOURNAL  # noqa: E402
from deit_ray.results.journal import JournalWriter  # noqa: E402
from tests.support.browser import Browser, chromium  # noqa: E402
from tests.support.servers import MlflowServer, Postgres  # noqa: E402

TRIALS, POINTS, STEPS, COMPARED, ROUNDS = 1000, 100, 10, 100, 3
STORES, CONTENTS = ("sqlite", "postgres"), ("ours", "everything")
LIMIT_S = 300  # of one round
METRIC, BEST = "val/top1", "best/val_top1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a folder that is kept, to work in pieces")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--make", type=float, metavar="SECONDS", help="only make runs, at most so long")
    parser.add_argument("--measure", choices=STORES, help="only measure with this store")
    parser.add_argument("--record", action="store_true", help="only record what was measured")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.make:
            made = make(folder, arguments.trials, arguments.make)
            return print("all is there" if made else "not all is there: repeat this")
        if not (arguments.measure or arguments.record):
            make(folder, arguments.trials, math.inf)
        for store in [arguments.measure] if arguments.measure else [] if arguments.record else STORES:
            measured = {content: measure(folder, store, content) for content in CONTENTS}
            (folder / f"{store}.json").write_text(json.dumps(measured))
            print(json.dumps(measured))
        if not arguments.measure:
            measured = {store: json.loads((folder / f"{store}.json").read_text()) for store in STORES}
            record("mlflow_ui", {"trials": arguments.trials} | figures_of(measured))


def figures_of(measured: dict) -> dict[str, float]:
    """The figures by name from the medians by store and content."""
    figures = {}
    for store, contents in measured.items():
        prefix = "" if store == "sqlite" else f"{store}_"
        ours, everything = contents["ours"], contents["everything"]
        figures |= {prefix + name: round(seconds, 2) for name, seconds in ours.items()}
        for name in ("table", "compare", "charts"):
            ratio = everything[f"{name}_s"] / ours[f"{name}_s"]
            figures[f"{prefix}{name}_vs_everything"] = round(ratio, 2)
    return figures


# The trials


def make(folder: Path, trials: int, limit_s: float) -> bool:
    """Makes what is missing of the study and its runs in both databases; whether all is there."""
    from deit_ray.study.study import names_of_studies

    ends = time.monotonic() + limit_s
    results = folder / "results"
    if not (folder / "study.made").exists():
        shutil.rmtree(results, ignore_errors=True)
        make_study(folder, results, trials)
        (folder / "study.made").touch()
    (name,) = names_of_studies(str(results))
    if not (folder / "ours.made").exists():
        if not deliver(name, results, ends - time.monotonic()):
            return False
        (folder / "ours.made").touch()
    if not (folder / "everything.db").exists():
        log_everything(results, name, folder / "everything.partial")
        (folder / "everything.partial").rename(folder / "everything.db")
    return True


def make_study(folder: Path, results: Path, trials: int) -> None:
    """A study whose trials have finished: its database, and the journal of each trial."""
    import optuna

    from deit_ray.experiment.load import load_experiment
    from deit_ray.outcome import Outcome
    from deit_ray.study.study import Study
    from tests.support.data import write_colours

    data = str(folder / "data")
    shutil.rmtree(data, ignore_errors=True)
    write_colours(data, {"train": 20}, classes=2)  # no trial reads it
    overrides = {"name": "large", "data.uri": data, "results.uri": str(results), "search.trials": trials}
    study = Study.create(load_experiment(ROOT / "experiments" / "digits_search.yaml", overrides))
    space = {
        "augment.strength": optuna.distributions.FloatDistribution(0, 2),
        "optim.lr": optuna.distributions.FloatDistribution(3e-4, 1e-2, log=True),
        "distillation.weight": optuna.distributions.FloatDistribution(0.1, 0.9),
    }
    made = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))  # draws the values
    begin = datetime.now() - timedelta(days=2)
    for number in range(trials):
        params = made.ask(space).params
        values = curve_of(params, number)
        best, started = max(values), begin + timedelta(minutes=2 * number)
        trial = optuna.trial.create_trial(
            params=params,
            distributions=space,
            value=best,
            intermediate_values=dict(enumerate(values, 1)),
            user_attrs={"outcome": Outcome.finished().text, "images": 1000},
        )
        trial.datetime_start, trial.datetime_complete = started, started + timedelta(minutes=2)
        study.optuna.add_trial(trial)
        write_journal(f"{study.trial_folder(number)}/{JOURNAL}", values)
    study.outcome = Outcome.finished()


def curve_of(params: dict, number: int) -> list[float]:
    """The metric after each epoch, better near a learning rate of 2e-3 and a strength of 1."""
    distance = math.log10(params["optim.lr"] / 2e-3) ** 2 + (params["augment.strength"] - 1) ** 2 / 8
    top = 0.98 * math.exp(-distance) + (number % 97) * 1e-4
    return [round(top * (1 - math.exp(-(epoch + 1) / 20)), 5) for epoch in range(POINTS)]


def write_journal(uri: str, values: list[float]) -> None:
    journal = JournalWriter(uri)
    for epoch, value in enumerate(values, 1):
        measured = dict.fromkeys((*TRAIN, *EVALUATION), value)
        journal.add(measured | {"train/loss": 1 - value, "val/images": 1000, "epoch": epoch}, epoch * STEPS)
    journal.flush()


def deliver(name: str, results: Path, limit_s: float) -> bool:
    """Delivers the study to the database beside its results, as `deit-ray sync` does.

    Returns:
        Whether all is there.
    """
    from deit_ray.study import sync
    from deit_ray.study.study import Study
    from deit_ray.tracking.tracker import Tracker

    def warn(text: str) -> None:
        print(text, file=sys.stderr)

    study = Study.open(name, str(results))
    with Tracker(f"sqlite:///{results}/mlflow.db", "deit_ray", f"{results}/mlruns", warn) as tracker:
        with tracker.runs.collecting():
            list(sync.deliver_study(tracker, study))
        left = tracker.finish(limit_s, limit_s, lambda done, total: print(f"{done} of {total} runs"))
    return not left


def log_everything(results: Path, name: str, path: Path) -> None:
    """A copy of the database in which every run has all keys as params, and all metrics at every point."""
    from deit_ray.experiment.config import flatten
    from deit_ray.results.journal import iterate_points
    from deit_ray.study.study import Study

    shutil.copy(results / "mlflow.db", path)
    study = Study.open(name, str(results))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA synchronous = OFF")
        tagged = "SELECT run_uuid, value FROM tags WHERE key = 'deit_ray.trial'"
        runs = {int(number): run for run, number in database.execute(tagged)}
        for trial in study.optuna.trials:
            run, folder = runs[trial.number], study.trial_folder(trial.number)
            keys = flatten(study.trial_experiment(trial.params).as_dict())
            params = [(key, str(value)[:6000], run) for key, value in keys.items()]
            database.executemany(
                "INSERT OR IGNORE INTO params (key, value, run_uuid) VALUES (?, ?, ?)", params
            )
            points = list(iterate_points(f"{folder}/{JOURNAL}"))
            rows = [(p.name, p.value, p.time_ms, run, p.step, False) for p in points]
            last = list({row[0]: row for row in rows}.values())
            for table, content in (("metrics", rows), ("latest_metrics", last)):
                database.executemany(
                    f"INSERT OR IGNORE INTO {table} (key, value, timestamp, run_uuid, step, is_nan) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    content,
                )


def fill_postgres(postgres: Postgres, path: Path) -> None:
    """Copies all rows of an MLflow database in SQLite to an empty PostgreSQL."""
    import psycopg2
    import sqlalchemy
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(postgres.uri, "/nowhere")  # makes the tables
    target = postgres.uri.replace("+psycopg2", "")
    metadata = sqlalchemy.MetaData()
    metadata.reflect(sqlalchemy.create_engine(postgres.uri))
    with closing(psycopg2.connect(target)) as there, closing(sqlite3.connect(path)) as here, there:
        cursor = there.cursor()
        for table in reversed(metadata.sorted_tables):
            if table.name != "alembic_version":
                cursor.execute(f'DELETE FROM "{table.name}"')
        for table in metadata.sorted_tables:
            if table.name == "alembic_version":
                continue
            names = [column.name for column in table.columns]
            flags = [isinstance(column.type, sqlalchemy.Boolean) for column in table.columns]
            quoted = ", ".join(f'"{name}"' for name in names)
            text = io.StringIO()
            writer = csv.writer(text)
            for row in here.execute(f'SELECT {quoted} FROM "{table.name}"'):
                pairs = zip(row, flags, strict=True)
                writer.writerow(
                    ["\\N" if v is None else str(bool(v)).lower() if flag else v for v, flag in pairs]
                )
            text.seek(0)
            cursor.copy_expert(f"COPY \"{table.name}\" ({quoted}) FROM STDIN (FORMAT csv, NULL '\\N')", text)
        cursor.execute("ANALYZE")


# The pages


def measure(folder: Path, store: str, content: str) -> dict[str, float]:
    """The median seconds of each page."""
    path = folder / ("results/mlflow.db" if content == "ours" else "everything.db")
    with ExitStack() as stack:
        backend = f"sqlite:///{path}"
        if store == "postgres":
            postgres = stack.enter_context(Postgres())
            fill_postgres(postgres, path)
            backend = postgres.uri
        server = stack.enter_context(MlflowServer(folder / "server", backend))
        browser = stack.enter_context(chromium())
        browser.driver.set_script_timeout(LIMIT_S)
        page, rows = link_of(server.uri)
        browser.open(page)  # the browser's cache has the scripts from now on
        browser.wait_for(browser.table)
        rounds = [look(browser, page, rows) for _ in range(ROUNDS)]
    print(store, content, json.dumps(rounds), file=sys.stderr)
    return {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}


def link_of(uri: str) -> tuple[str, int]:
    """The link of the study's view, and the number of its rows."""
    from mlflow.tracking import MlflowClient

    from deit_ray.tracking.pages import page_by_view

    client = MlflowClient(uri)
    found = client.get_experiment_by_name("deit_ray")
    rows, token = 0, None
    while rows == 0 or token:
        runs = client.search_runs([found.experiment_id], max_results=1000, page_token=token)
        rows, token = rows + len(runs), runs.token
    return page_by_view(uri, "large"), rows


ALL_ROWS = """
const [total, done] = arguments;
let loaded = 0;
(function next() {
  const viewport = document.querySelector('.ag-body-viewport');
  const rows = document.querySelectorAll('.ag-center-cols-container .ag-row[row-index]');
  const last = Math.max(-1, ...[...rows].map(row => Number(row.getAttribute('row-index'))));
  if (last >= total - 1) return done(last + 1);
  if (viewport) viewport.scrollTop = viewport.scrollHeight;
  const button = [...document.querySelectorAll('button')].find(one => one.innerText.trim() === 'Load more');
  if (button && last > loaded) { loaded = last; button.click(); }
  setTimeout(next, 10);
})();
"""


def look(browser: Browser, page: str, rows: int) -> dict[str, float]:
    """One round: the seconds of each page."""
    browser.driver.get("about:blank")
    begin = time.perf_counter()
    browser.driver.get(page)
    drawn = browser.driver.execute_async_script(ALL_ROWS, rows)
    seconds = {"table_s": time.perf_counter() - begin}
    assert drawn == rows

    browser.open(page)
    browser.wait_for(browser.table)
    browser.wait_for(lambda: browser.find(".ag-header-select-all input"))[0].click()
    button = browser.wait_for(
        lambda: [one for one in browser.find("button") if one.text.strip() == "Compare" and one.is_enabled()]
    )[0]
    begin = time.perf_counter()
    button.click()
    browser.wait_for(lambda: browser.find(".parcoords .axis-title"), LIMIT_S, 0.02)
    seconds["compare_s"] = time.perf_counter() - begin
    assert f"Comparing {COMPARED} Runs" in browser.text()

    browser.driver.get("about:blank")
    begin = time.perf_counter()
    browser.driver.get(f"{page}&compareRunsMode=CHART")
    browser.wait_for(lambda: len(browser.find(".scatterlayer .trace path.js-line")) >= 20, LIMIT_S, 0.02)
    seconds["charts_s"] = time.perf_counter() - begin
    return seconds


if __name__ == "__main__":
    main()
