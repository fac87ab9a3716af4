"""Cases of bench/faults.py: addresses, folders, proxies, signals, pipes, servers and ports; without a Ray."""

import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from bench.faulty.expect import Prepared, either, expect, expect_prepared, printed, refused
from bench.faulty.experiments import distilled, judge, teacher_of, write_experiment
from bench.faulty.inputs import class_folders, packed, scene, write
from bench.faulty.stage import Stage, case

# root may write everywhere; a command without these capabilities may not
AS_A_PERSON = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)
ANSWER_S = 40  # for what must be said within 20 s on a machine that has nothing else to do


def old_results(stage: Stage, folder: str = "results") -> Path:
    """Copies the results of an earlier version into the stage; their data is where it was."""
    shutil.copytree(stage.shared / "old/results", stage / folder)
    stage.results.add(folder.partition("/")[0])
    (stage / "data").mkdir(exist_ok=True)
    if not (stage / "data/digits").exists():
        (stage / "data/digits").symlink_to(stage.shared / "digits")
    return stage / folder


# addresses of Ray


@case(
    "dead_address",
    "environment",
    port=("127.0.0.1:1",),
    name=("no-such-host.invalid:6379",),
    word=("nonsense",),
    client=("ray://127.0.0.1:1",),
    auto=("auto",),
)
def dead_address(stage: Stage, address: str) -> None:
    """A RAY_ADDRESS at which nothing answers: one sentence within 20 s."""
    file = write_experiment(stage)
    told = refused(r"RAY_ADDRESS|address", re.escape(address))
    expect(stage, ["train", file], told, env={"RAY_ADDRESS": address}, within_s=ANSWER_S)
    if address == "127.0.0.1:1":
        expect(stage, ["plan", file, "--address", address], told, within_s=ANSWER_S)
        expect(stage, ["status", "--address", address], told, within_s=ANSWER_S)
        evaluate = ["evaluate", teacher_of(stage), "--data", stage.shared / "digits", "--address", address]
        expect(stage, evaluate, told, within_s=ANSWER_S)


# MLflow's address


@case(
    "tracking_uri",
    "environment",
    file_uri=("file:results/mlruns",),
    file_path=("file:///tmp/mlruns",),
    folder=("./mlruns",),
    typo=("htp://localhost:5000",),
    databricks=("databricks",),
    word=("mlflow",),
)
def tracking_uri(stage: Stage, uri: str) -> None:
    """A tracking.uri that MLflow cannot use is refused at the start."""
    judge(stage, {"tracking.uri": uri}, refused(r"tracking\.uri", re.escape(uri)), ("train",))


@case("tracking_variable", "environment", file_uri=("file:///tmp/mlruns",), folder=("./mlruns",))
def tracking_variable(stage: Stage, uri: str) -> None:
    """So is a MLFLOW_TRACKING_URI that it cannot use."""
    told = refused("MLFLOW_TRACKING_URI", re.escape(uri))
    judge(stage, {}, told, ("train",), env={"MLFLOW_TRACKING_URI": uri})


# homes and folders


@case("home", "environment", unset=(None,), missing=("/nowhere/at/all",), unwritable=("/proc/1",))
def home(stage: Stage, folder: str | None) -> None:
    """No HOME, or one that cannot be written: commands work."""
    env = {"HOME": folder, "HF_HOME": None}
    samples = class_folders(stage / "mine")
    expect_prepared(stage, "mine", Prepared({"all": samples}), env=env)
    old_results(stage)
    expect(stage, ["status"], printed("finished-1"), env=env)
    write(stage / "x.png", packed(scene(1)))
    expect(stage, ["predict", teacher_of(stage), "x.png"], printed(r"x\.png: "), env=env)
    judge(stage, {}, printed(), env=env)


@case("read_only_results", "environment", modes=("a-w",))
def read_only_results(stage: Stage, mode: str) -> None:
    """Looking at results needs no writing."""
    results = old_results(stage)
    subprocess.run(["chmod", "-R", mode, str(results)], check=True)
    stage.undo.append(lambda: subprocess.run(["chmod", "-R", "u+w", str(results)], check=True))
    as_a_person = {"prefix": AS_A_PERSON}
    expect(stage, ["status"], printed("finished-1", "interrupted-1"), **as_a_person)
    expect(stage, ["status", "finished-1"], printed(r"0\.1875"), **as_a_person)
    expect(stage, ["status", "interrupted-1", "1"], printed("trial 1"), **as_a_person)
    expect(stage, ["diff", "finished-1/1", "student-1"], printed(r"optim\.lr"), **as_a_person)
    write(stage / "x.png", packed(scene(1)))
    expect(stage, ["predict", "run:teacher-1", "x.png"], printed(r"x\.png: "), **as_a_person)
    expect(
        stage,
        ["best", "finished-1"],
        either(printed(), refused("results|finished-1", "writ|read-only|permission")),
        **as_a_person,
    )
    judge(
        stage,
        distilled("run:teacher-1"),
        refused("results", "writ|read-only|permission"),
        ("train",),
        **as_a_person,
    )


@case(
    "broken_study",
    "environment",
    database=("study.db", b"SQLite format 3\0broken"),
    empty=("study.db", b""),
    experiment=("experiment.yaml", b"name: [\n"),
    older_key=("experiment.yaml", b"name: x\nnew: {key: 1}\ndata: {uri: d}\n"),
    no_experiment=("experiment.yaml", None),
)
def broken_study(stage: Stage, name: str, content: bytes | None) -> None:
    """A broken study among good ones is a line; the good ones are shown."""
    results = old_results(stage)
    shutil.copytree(results / "finished-1", results / "broken-1")
    if content is None:
        (results / "broken-1" / name).unlink()
    else:
        write(results / "broken-1" / name, content)
    expect(stage, ["status"], printed("finished-1", r"0\.1875", "interrupted-1", "broken-1"))
    new = printed("broken-1.*interrupted")  # as a study whose driver ended before it drew a trial
    told = refused("broken-1")
    expect(stage, ["status", "broken-1"], either(told, new) if content == b"" else told)


@case("broken_run", "environment", run_json=("run.json", b"{"), folder=("junk", None))
def broken_run(stage: Stage, name: str, content: bytes | None) -> None:
    """Foreign and broken files in the results folder do not hide the rest."""
    results = old_results(stage)
    if content is None:
        write(results / "my notes" / "a.txt", "x")
        write(results / "loose.txt", "x")
    else:
        write(results / "teacher-1" / name, content)
    expect(stage, ["status"], printed("finished-1", "interrupted-1"))


@case("hints", "environment", status=("status", "interrupted-1"), trial=("status", "interrupted-1", "1"))
def hints(stage: Stage, *words: str) -> None:
    """Commands in hints can be typed: they name the results folder."""
    old_results(stage, "elsewhere/kept")
    seen = expect(stage, [*words, "--results", "elsewhere/kept"], printed())
    for line in seen.text.splitlines():
        if re.search(r"deit-ray (tune|train|sync|best|status)\b", line) and "elsewhere/kept" not in line:
            stage.fault("silent", f"{seen.line}: a hint without the results folder: {line.strip()}")
    if len(words) == 2 and "use that version" not in seen.text:
        stage.fault("silent", f"{seen.line}: does not say that an older version has to resume it")


# pipes and signals


@case(
    "closed_pipe",
    "environment",
    status=("status",),
    study=("status", "finished-1"),
    plan=("plan", "x.yaml"),
    prepare=("data", "prepare", "digits", "--out", "out"),
)
def closed_pipe(stage: Stage, *words: str) -> None:
    """`deit-ray ... | head -1` ends without a word of Python's."""
    old_results(stage)
    write_experiment(stage)
    seen = stage.run(*words, prefix=("bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "sh"))
    if "prepare" in words and not (stage / "out/manifest.json").exists():
        stage.fault(
            "silent",
            f"{seen.line} | head -1: nothing was prepared, exit status {seen.status}: {seen.err[-200:]}",
        )


@case("signals", "environment", SIGTERM=("SIGTERM",), SIGINT=("SIGINT",), SIGHUP=("SIGHUP",))
def signals(stage: Stage, name: str) -> None:
    """A signal to `data prepare`: interrupted, and how to go on; then the same command ends it."""
    samples = class_folders(stage / "mine", each=250)
    sent = []

    def send(process):
        if any((stage / "out").rglob("*")):
            sent.append(process.send_signal(getattr(signal, name)))
            return True

    seen = stage.run("data", "prepare", "mine", "--out", "out", during=send)
    if not sent:
        stage.fault("silent", f"{seen.line}: had ended before the signal: the case shows nothing")
    elif seen.status not in (130, 143, 129) or not re.search("interrupt|stopped|ended by", seen.text, re.I):
        stage.fault("silent", f"{seen.line}: {name}: exit status {seen.status}, said {seen.text[-160:]!r}")
    expect_prepared(stage, "mine", Prepared({"all": samples}))


# servers


@case("busy_port", "environment", by_a_server=(True,), privileged=(False,))
def busy_port(stage: Stage, taken: bool) -> None:
    """`ui` on a busy port: another port, or an error."""
    old_results(stage)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1] if taken else 1_000_000
        ends = time.monotonic() + 30

        def stop(process):
            if time.monotonic() > ends:
                process.send_signal(signal.SIGTERM)
                return True

        seen = stage.run("ui", "--port", port, during=stop, within_s=60)
        other = [found for found in re.findall(r"127\.0\.0\.1:(\d+)", seen.text) if int(found) != port]
        named = re.search(rf"error: .*{port}", seen.text)
        if not (named and seen.status) and not other:
            stage.fault(
                "silent",
                f"{seen.line}: exit status {seen.status}, neither an error nor another port: "
                f"{seen.text[-200:]!r}",
            )


@case("sync", "environment", dead=("http://127.0.0.1:1",))
def sync(stage: Stage, uri: str) -> None:
    """`sync` to a server that does not answer ends in one sentence."""
    results = old_results(stage)
    file = results / "student-1/experiment.yaml"
    text = file.read_text()
    write(file, re.sub(r"tracking:.*", f"tracking: {{uri: '{uri}', experiment: deit_ray}}", text))
    expect(stage, ["sync", "student-1"], refused(r"127\.0\.0\.1:1|MLflow|tracking"), within_s=90)


# processors


@case("bfloat16", "environment", plan=("plan",), train=("train",))
def bfloat16(stage: Stage, command: str) -> None:
    """bfloat16 on a CPU with AVX512-BF16: refused where a convolution may see 1x1 pixels; else it plans."""
    unsafe = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    keys = {
        "train.precision": "bfloat16",
        "student.model": "test_resnet",
        "student.patch_size": None,
        "student.width": None,
        "student.depth": None,
        "student.heads": None,
    }
    if unsafe:
        judge(stage, keys, refused("precision", "bfloat16"), (command,))
    else:
        judge(stage, keys, printed(), ("plan",))


@case(
    "moved_results",
    "environment",
    preview=("tune", "--resume", "interrupted-1", "--dry-run"),
    shown=("status", "finished-1", "0"),
)
def moved_results(stage: Stage, *words: str) -> None:
    """Results that were moved are shown from where they are now; those of other numbers are not resumed."""
    old_results(stage, "moved")
    expected = refused("interrupted-1", "numerics") if words[0] == "tune" else printed(words[1])
    expect(stage, [*words, "--results", "moved"], expected)
