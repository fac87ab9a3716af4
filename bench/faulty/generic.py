"""Runs the inputs of another script, of which only the making is known, by rules that hold for every input.

The script has CASES: name -> (function of a folder, what must become of it).
"""

import importlib.util
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench.faulty.expect import read_shards, tail
from bench.faulty.stage import Case, Stage

IMAGES = re.compile(r"\.(jpe?g|png|bmp|webp|tiff?|gif|ppm|pgm|jfif|heic|avif)$", re.I)
SAYS_SO = re.compile(
    r"not used|unused|left out|ignored|skipped|cannot be read|unreadable|no labels?\b|without|dropped"
    r"|lead nowhere|\bnote\b|warning|not (an )?images?|not read|hidden|links?\b|loop",
    re.I,
)


def cases_of(script: Path) -> list[Case]:
    """The cases of a script; the owner of all is `inputs`."""
    spec = importlib.util.spec_from_file_location("given_inputs", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return [
        Case("inputs", name, "inputs", lambda stage, make=make: judge(stage, make))
        for name, (make, _) in module.CASES.items()
    ]


def judge(stage: Stage, make) -> None:
    """Prepares the folder elsewhere, and tries to prepare into the folder; neither may lose anything.

    An exit status of 0 with fewer samples than the folder has needs a line that says so.
    """
    make(stage / "mine")
    there = count_samples(stage / "mine")
    seen = stage.run("data", "prepare", "mine", "--out", "out")
    stage.run("data", "prepare", "mine", "--out", "mine", answers=False)
    stage.run("data", "prepare", "digits", "--out", "mine", answers=False)
    stage.outs = ("out",)
    for entry in stage.seen[1:]:
        if entry.status == 0:
            stage.fault("silent", f"{entry.line}: exit status 0: a folder with others' files is no OUT")
    if seen.status == 0:
        prepared = sum(map(len, read_shards(stage / "out").values()))
        if prepared < there and not SAYS_SO.search(seen.text):
            text = f"{prepared} samples of {there}, and no line says so: {tail(seen)}"
            stage.fault("silent", f"{seen.line}: {text}")
    elif seen.status is not None and not re.search(r"^error: .{20}", seen.text, re.M):
        stage.fault("silent", f"{seen.line}: exit status {seen.status} without an error line: {tail(seen)}")


def count_samples(folder: Path) -> int:
    """Images, rows and members of images in a folder; links are counted and not followed."""
    count = 0
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            continue
        name = str(path).encode(errors="replace").decode()
        if IMAGES.search(name):
            count += 1
        elif path.suffix == ".parquet":
            count += pq.read_metadata(path).num_rows
        elif path.suffix == ".tar":
            count += count_members(path)
        elif path.suffix == ".npz":
            count += count_rows(path)
    return count


def count_members(path: Path) -> int:
    """Images in a tar, whatever follows an end that is none; each block that names one counts."""
    with tarfile.open(path, ignore_zeros=True) as tar:
        try:
            return sum(bool(IMAGES.search(member.name)) for member in tar)
        except tarfile.TarError:
            return 0


def count_rows(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if re.match(r"(x|.*images)[_.]", name)]
        shapes = []
        for name in names:
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shapes.append(header(file)[0])
    return sum(shape[0] for shape in shapes)
