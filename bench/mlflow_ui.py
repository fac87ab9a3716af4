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

Forty trials are written as a study writes them: a database of Optuna, and a journal for each trial, which
`deit_ray.sync` delivers to SQLite. The other trials are copies of their rows in MLflow's tables, with other
ids and values: a delivery of all would take a quarter of an hour. What everything has in addition is written
as rows too, and equals what MLflow's client would have written. PostgreSQL gets the same rows.

It takes about 10 minutes on 2 cores. In pieces, in a folder that is kept: --make until it says that all is
there, then --measure for each store and content, which keeps its figures there, then --record.

    python bench/mlflow_ui.py [--folder FOLDER [--make SECONDS | --measure STORE CONTENT | --record]]
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
import uuid
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

TRIALS, WRITTEN, POINTS, STEPS, COMPARED, ROUNDS = 1000, 40, 100, 10, 100, 3
STORES, CONTENTS = ("sqlite", "postgres"), ("ours", "everything")
LIMIT_S = 300  # of one round
INPUTS = "SELECT input_uuid FROM inputs WHERE destination_id = ?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a folder that is kept, to work in pieces")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--make", type=float, metavar="SECONDS", help="only make runs, at most so long")
    parser.add_argument("--measure", nargs=2, metavar=("sqlite|postgres", "ours|everything"))
    parser.add_argument("--record", action="store_true", help="only record what was measured")
    arguments = parser.parse_args()
    parts = [(store, content) for store in STORES for content in CONTENTS]
    if arguments.measure and tuple(arguments.measure) not in parts:
        parser.error(f"--measure: allowed are {', '.join(map(' '.join, parts))}")
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.make:
            made = make(folder, arguments.trials, arguments.make)
            return print("all is there" if made else "not all is there: repeat this")
        if arguments.measure:
            return keep(folder, *arguments.measure)
        if not arguments.record:
            make(folder, arguments.trials, math.inf)
            for store, content in parts:
                keep(folder, store, content)
        files = {part: folder / f"{'-'.join(part)}.json" for part in parts}
        measured = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
        record("mlflow_ui", {"trials": arguments.trials} | figures_of(measured))


def keep(folder: Path, store: str, content: str) -> None:
    """Measures, and keeps the medians."""
    measured = measure(folder, store, content)
    (folder / f"{store}-{content}.json").write_text(json.dumps(measured))


def figures_of(measured: dict[tuple[str, str], dict[str, float]]) -> dict[str, float]:
    """The figures by name from the medians by store and content."""
    figures = {}
    for (store, content), seconds in measured.items():
        prefix = "" if store == "sqlite" else f"{store}_"
        if content == "ours":
            figures |= {prefix + name: round(value, 2) for name, value in seconds.items()}
        else:
            ratio = seconds["compare_s"] / measured[store, "ours"]["compare_s"]
            figures[f"{prefix}compare_vs_everything"] = round(ratio, 2)
    return figures


# The trials


def make(folder: Path, trials: int, limit_s: float) -> bool:
    """Makes what is missing of the study and its runs in both databases; whether all is there."""
    from deit_ray.study.study import names_of_studies

    ends = time.monotonic() + limit_s
    results = folder / "results"
    if not (folder / "study.made").exists():
        shutil.rmtree(results, ignore_errors=True)
        make_study(folder, results, min(trials, WRITTEN))
        (folder / "study.made").touch()
    (name,) = names_of_studies(str(results))
    if not (folder / "delivered").exists():
        if not deliver(name, results, ends - time.monotonic()):
            return False
        (folder / "delivered").touch()
    source = results / "mlflow.db"
    for content in CONTENTS:
        target, partial = folder / f"{content}.db", folder / f"{content}.partial"
        if not target.exists():
            shutil.copy(source, partial)
            with closing(sqlite3.connect(partial)) as database, database:
                database.execute("PRAGMA synchronous = OFF")
                if content == "everything":
                    log_everything(database, results, name)
                else:
                    multiply(database, trials)
            partial.rename(target)
            source = target
    return True


def make_study(folder: Path, results: Path, trials: int) -> None:
    """A study whose trials have finished: its database, and the journal of each trial."""
    import optuna

    from deit_ray.experiment.load import load_experiment
    from deit_ray.outcome import Outcome
    from deit_ray.results.origin import note_origin
    from deit_ray.study.study import Study
    from tests.support.data import write_colours

    data = str(folder / "data")
    shutil.rmtree(data, ignore_errors=True)
    manifest = write_colours(data, {"train": 20}, classes=2)  # no trial reads it
    overrides = {"name": "large", "data.uri": data, "results.uri": str(results), "search.trials": trials}
    study = Study.create(load_experiment(ROOT / "experiments" / "digits_search.yaml", overrides))
    rows = {"train": 1294, "val": 144, "test": 359}
    note_origin(study.folder, study.experiment, manifest.fingerprint, "cpu", rows=rows)
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


def trial_runs(database: sqlite3.Connection) -> dict[int, str]:
    """MLflow's ids of the trials' runs, by number."""
    tagged = "SELECT run_uuid, value FROM tags WHERE key = 'deit_ray.trial'"
    return {int(number): run for run, number in database.execute(tagged)}


def multiply(database: sqlite3.Connection, trials: int) -> None:
    """Copies the rows of the trials' runs until there are `trials` runs."""
    runs = trial_runs(database)
    for number in range(len(runs), trials):
        source = number % len(runs)
        copy_run(database, runs[source], number, number // len(runs), 120_000 * (number - source))


def copy_run(database: sqlite3.Connection, source: str, number: int, copy: int, shift_ms: int) -> None:
    """Copies the rows of a trial's run, with ids and values of its own.

    Args:
        number: of the new trial.
        copy: number of the copy of this run.
        shift_ms: how much later it began.
    """
    run, factor = uuid.uuid4().hex, 1 - 1e-4 * copy
    own = {"run_uuid": lambda known: run}
    value = own | {"value": lambda known: known * factor}
    times = dict.fromkeys(("start_time", "end_time"), lambda known: known + shift_ms)
    words = {"name": lambda known: f"trial {number:03d} {known.split(' ', 2)[2]}"}
    copy_rows(database, "runs", "run_uuid", source, own | times | words)
    copy_rows(database, "tags", "run_uuid", source, own)
    copy_rows(database, "params", "run_uuid", source, own | {"value": lambda known: varied(known, factor)})
    copy_rows(database, "metrics", "run_uuid", source, value)
    copy_rows(database, "latest_metrics", "run_uuid", source, value)
    ids = {"input_uuid": lambda known: f"{known[:16]}{run[:16]}"}
    inputs = [row[0] for row in database.execute(INPUTS, (source,))]
    copy_rows(database, "inputs", "destination_id", source, ids | {"destination_id": lambda known: run})
    for one in inputs:
        copy_rows(database, "input_tags", "input_uuid", one, ids)
    for key, text in {"deit_ray.trial": str(number), "deit_ray.id": uuid.uuid4().hex}.items():
        database.execute("UPDATE tags SET value = ? WHERE run_uuid = ? AND key = ?", (text, run, key))


def varied(value: str, factor: float) -> str:
    """A fraction times a factor; other values as they are."""
    try:
        return str(float(value) * factor) if "." in value else value
    except ValueError:
        return value


def copy_rows(database: sqlite3.Connection, table: str, key: str, value: str, changed: dict) -> None:
    """Copies the rows of a table whose `key` has a value; functions change the columns in `changed`."""
    rows = database.execute(f"SELECT * FROM {table} WHERE {key} = ?", (value,))
    names = [column[0] for column in rows.description]
    copies = [
        [changed[name](known) if name in changed else known for name, known in zip(names, row, strict=True)]
        for row in rows.fetchall()
    ]
    marks = ", ".join("?" * len(names))
    database.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", copies)


def log_everything(database: sqlite3.Connection, results: Path, name: str) -> None:
    """Gives every trial's run all keys as params, and all metrics of its journal at every point."""
    from deit_ray.experiment.config import flatten
    from deit_ray.results.journal import iterate_points
    from deit_ray.study.study import Study

    study = Study.open(name, str(results))
    contents = []
    for trial in study.optuna.trials:
        keys = flatten(study.trial_experiment(trial.params).as_dict())
        params = [(key, str(value)[:6000]) for key, value in keys.items()]
        points = list(iterate_points(f"{study.trial_folder(trial.number)}/{JOURNAL}"))
        contents.append((params, points, list({point.name: point for point in points}.values())))
    columns = "(key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)"
    for number, run in trial_runs(database).items():
        params, points, last = contents[number % len(contents)]
        insert = "INSERT OR IGNORE INTO params (key, value, run_uuid) VALUES (?, ?, ?)"
        database.executemany(insert, [(*param, run) for param in params])
        there = database.execute("SELECT key FROM latest_metrics WHERE run_uuid = ?", (run,))
        known = {row[0] for row in there}
        for table, content in (("metrics", points), ("latest_metrics", last)):
            rows = [(p.name, p.value, p.time_ms, run, p.step) for p in content if p.name not in known]
            database.executemany(f"INSERT INTO {table} {columns}", rows)


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
            columns = [column for column in table.columns if column.computed is None]
            names = [column.name for column in columns]
            flags = [isinstance(column.type, sqlalchemy.Boolean) for column in columns]
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
    path = folder / f"{content}.db"
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
        views = [compare] if content == "everything" else [table, compare, charts]
        rounds = [{f"{view.__name__}_s": view(browser, page, rows) for view in views} for _ in range(ROUNDS)]
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


def table(browser: Browser, page: str, rows: int) -> float:
    """Seconds until the last of all rows is drawn."""
    browser.driver.get("about:blank")
    begin = time.perf_counter()
    browser.driver.get(page)
    drawn = browser.driver.execute_async_script(ALL_ROWS, rows)
    seconds = time.perf_counter() - begin
    assert drawn == rows
    return seconds


def compare(browser: Browser, page: str, rows: int) -> float:
    """Seconds from the click on "Compare" until the parallel coordinates of the best 100 runs are drawn."""
    browser.open(page)
    browser.wait_for(browser.table)
    browser.wait_for(lambda: browser.find(".ag-header-select-all input"))[0].click()
    button = browser.wait_for(
        lambda: [one for one in browser.find("button") if one.text.strip() == "Compare" and one.is_enabled()]
    )[0]
    begin = time.perf_counter()
    button.click()
    browser.wait_for(lambda: browser.find(".parcoords .axis-title"), LIMIT_S, 0.02)
    seconds = time.perf_counter() - begin
    assert f"Comparing {COMPARED} Runs" in browser.text()
    return seconds


def charts(browser: Browser, page: str, rows: int) -> float:
    """Seconds until the curves of the first 20 rows are drawn; the study's own run has none."""
    browser.driver.get("about:blank")
    begin = time.perf_counter()
    browser.driver.get(f"{page}&compareRunsMode=CHART")
    browser.wait_for(lambda: len(browser.find(".scatterlayer .trace path.js-line")) >= 19, LIMIT_S, 0.02)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
