"""A study's trials and curves as files, for other programs; docs/results.md describes the columns."""

import io
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.study.study import Study, replace_file
from deit_ray.study.tables import CURVE_COLUMNS, TRIAL_COLUMNS
from deit_ray.terminal.session import Session

MADE_BY = b"deit_ray export"  # in the metadata of every Parquet file


@dataclass(frozen=True)
class Exported:
    """A table that was written: its URI, and its number of rows."""

    uri: str
    rows: int


def export(
    study: str,
    format: Literal["csv", "parquet"] = "csv",
    out: str = ".",
    session: Session | None = None,
) -> list[Exported]:
    """Writes a study's tables as OUT/STUDY-trials.FORMAT and OUT/STUDY-curves.FORMAT.

    A file of such a name that another program has written is kept under another name.

    Args:
        study: name of a study, such as digits_search-1, or digits_search for the newest.
        format: csv or parquet.
        out: URI of the folder for the files.
        session: see `Session`; the study is looked up in its `results`.

    Returns:
        Both files: the trials, see `Study.trials`, and their curves, see `Study.curves`.

    Raises:
        UserError: there is no such study, or the files cannot be written.
    """
    session = session or Session()
    found = Study.open(study, session.results)
    storage.check_writable("--out", out)
    written = []
    for name, table, columns in (
        ("trials", found.trials(), TRIAL_COLUMNS),
        ("curves", found.curves(), CURVE_COLUMNS),
    ):
        uri = storage.join(out, f"{found.name}-{name}.{format}")
        content = _csv(table) if format == "csv" else _parquet(table)
        head = ",".join(columns).encode()
        replace_file(uri, content, lambda before, head=head: _is_ours(before, head), session.console.warn)
        written.append(Exported(uri, len(table)))
    return written


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def _parquet(table: pd.DataFrame) -> bytes:
    converted = pa.Table.from_pandas(table, preserve_index=False)
    metadata = (converted.schema.metadata or {}) | {b"software": MADE_BY}
    buffer = io.BytesIO()
    pq.write_table(converted.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def _is_ours(content: bytes, head: bytes) -> bool:
    """Whether a file is one that `export` wrote.

    Args:
        head: the first columns of a CSV.
    """
    if content.startswith(head):
        return True
    try:
        metadata = pq.read_schema(io.BytesIO(content)).metadata or {}
    except pa.ArrowInvalid:
        return False
    return metadata.get(b"software") == MADE_BY
