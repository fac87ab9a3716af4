"""Artifacts of the SQLite file next to the results follow the results when these are moved or copied.

MLflow writes absolute paths into its database, and has no request that changes them. So this file writes the
columns itself; tests/tracking/test_moved.py finds out whether MLflow still reads them. When it does not: a
person must name the old place to MLflow.
"""

import contextlib
import os
import sqlite3

# where MLflow has paths of artifacts: table, column, and the column that shows the experiment, if any
COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
WAIT_S = 30.0  # for another process that writes the database


def follow_artifacts(uri: str, artifacts: str) -> None:
    """Changes the paths of artifacts in a database whose results were moved or copied. It may be repeated.

    Args:
        uri: MLflow's tracking URI.
        artifacts: folder of the artifacts of a database next to the results, where it is now.
    """
    database = f"{os.path.dirname(artifacts)}/mlflow.db"
    if uri != f"sqlite:///{database}" or not os.path.exists(database):
        return
    with contextlib.closing(sqlite3.connect(database, timeout=WAIT_S)) as connection, connection:
        tables = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if "experiments" not in tables:
            return
        known = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (location,) in known:
            if location is not None and _was_here(location.removeprefix("file://"), artifacts):
                for table, column in COLUMNS:
                    if table in tables:
                        _replace(connection, table, column, location, artifacts)


def _was_here(location: str, artifacts: str) -> bool:
    """Whether a path was the folder of the artifacts before the results were moved or copied.

    A person's own folder of that name is none: it exists, and nothing was copied from it.
    """
    if location == artifacts or os.path.basename(location) != os.path.basename(artifacts):
        return False
    if not os.path.isabs(location) or (os.path.exists(location) and not os.path.exists(artifacts)):
        return False
    return not (os.path.exists(location) and os.path.samefile(location, artifacts))


def _replace(connection: sqlite3.Connection, table: str, column: str, old: str, new: str) -> None:
    """Replaces a folder at the beginning of all paths in a column."""
    starts = f"{column} = ? OR substr({column}, 1, ?) = ?"
    connection.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {starts}",
        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
    )
