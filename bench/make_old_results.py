"""Makes an archive of the results of a revision, for tests/test_old_results.py.

The archive holds a results folder with

- a finished run, which is the teacher of the others;
- a finished study of three trials, two of them stopped early;
- a study of three trials whose driver was killed while the second trial ran, after the first had finished;
- a run of `train` that was killed half-way;
- mlflow.db and mlruns as the drivers left them: of some runs MLflow has only a part, which `sync` completes.

The data set is not in the archive: `data prepare digits` makes it again. The experiments name data and
results relative to the working folder, so both can be moved.

The archive of version 0.1 was made, within 10 minutes on two slow and busy CPU cores, by:

    python bench/make_old_results.py cf08551 tests/data/results-0.1.tar.xz
"""

import argparse
import json
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.revisions import CommandLine, checked_out, clean_up_when_terminated  # noqa: E402

LARGEST_BYTES = 2_000_000

STUDENT = {
    "data": {
        "uri": "data/digits",
        "image_size": 16,
        "crop_scale": [0.8, 1.0],
        "flip": 0.0,
        "views": 1,
        "eval_crop": 1.0,
        "cpus_per_worker": 0.25,
    },
    "student": {
        "model": "deit_tiny_distilled_patch16_224",
        "patch_size": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "drop_path": 0.0,
    },
    "augment": {"strength": 0.2, "mixup": 0.2, "cutmix": 0.0},
    "optim": {"lr": 0.01, "scale_lr": False, "warmup_epochs": 1, "ema_decay": 0.9},
    "train": {"epochs": 3, "batch_size": 32, "cpus_per_worker": 0.75, "device": "cpu", "log_every": 5},
}
TEACHER = STUDENT | {"distillation": {"kind": "none"}}
DISTILLED = STUDENT | {"distillation": {"kind": "hard", "teacher": {"weights": "run:teacher"}}}
SEARCH = DISTILLED | {
    "search": {
        "trials": 3,
        "sampler": "random",
        "scheduler": "asha",
        "max_concurrent": 1,
        "space": {"optim.lr": {"log": [1e-3, 1e-2]}, "augment.strength": {"float": [0, 1]}},
    },
}
EXPERIMENTS = {
    "teacher": TEACHER,
    "student": DISTILLED,
    "finished": SEARCH | {"seed": 1, "search": SEARCH["search"] | {"grace_epochs": 1}},  # stops trials early
    "interrupted": SEARCH | {"search": SEARCH["search"] | {"grace_epochs": 2}},  # stops none before the kill
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="the git revision that makes the results")
    parser.add_argument("archive", type=Path, help="the file to write, such as tests/data/results-0.1.tar.xz")
    arguments = parser.parse_args()
    clean_up_when_terminated()
    with tempfile.TemporaryDirectory(prefix="results-") as name:
        folder = Path(name).resolve()
        work = folder / "work"
        work.mkdir()
        with checked_out(arguments.revision, folder / "revision") as tree:
            make_results(CommandLine(tree, work, folder), work)
        with tarfile.open(arguments.archive, "w:xz", preset=9) as archive:
            archive.add(work / "results", "results", filter=without_owner)
    size_bytes = arguments.archive.stat().st_size
    print(f"{arguments.archive}: {size_bytes} bytes")
    if size_bytes > LARGEST_BYTES:
        sys.exit(f"{arguments.archive} is larger than {LARGEST_BYTES} bytes")


def make_results(command_line: CommandLine, work: Path) -> None:
    """Runs the commands, and kills two of them."""
    for name, experiment in EXPERIMENTS.items():
        (work / f"{name}.yaml").write_text(json.dumps({"name": name} | experiment))
    command_line.run("data", "prepare", "digits", "--out", "data/digits")
    command_line.run("train", "teacher.yaml")
    command_line.run("tune", "finished.yaml")
    command_line.kill_at_checkpoint("interrupted-1/trial-0001", "tune", "interrupted.yaml")
    command_line.kill_at_checkpoint("student-1", "train", "student.yaml")


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
