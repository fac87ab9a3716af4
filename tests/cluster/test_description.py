"""cluster.yaml from a laptop: what is wrong with it, and where the cluster keeps data and results."""

import pytest
import yaml

from deit_ray.cluster.description import Description, move_to_cluster, read_description
from deit_ray.cluster.head import Head
from deit_ray.cluster.jobs import job_command
from deit_ray.errors import UserError
from deit_ray.experiment.load import default_experiment
from tests.conftest import EXPERIMENTS
from tests.support.commands import call

TREE = {
    "cluster_name": "mine",
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": [], "bucket": "pool"},
    "auth": {"ssh_user": "ubuntu", "ssh_private_key": "~/keys/mine.pem"},
}
PLACES = {  # a key and its value in an experiment: where it is on the cluster
    ("data.uri", "data/imagenet"): "s3://pool/imagenet",
    ("data.uri", "./data/sets/small/"): "s3://pool/sets/small",
    ("data.uri", "imagenet"): "s3://pool/imagenet",
    ("data.uri", "data"): "s3://pool/data",
    ("data.uri", "/mnt/data/imagenet"): "/mnt/data/imagenet",
    ("data.uri", "~/data"): "~/data",
    ("data.uri", "s3://other/imagenet"): "s3://other/imagenet",
    ("data.uri", "file:///data"): "file:///data",
    ("results.uri", "results"): "s3://pool/results",
    ("results.uri", "data/results"): "s3://pool/data/results",
    ("results.uri", "gs://other/results"): "gs://other/results",
}


def tree_with(**sections) -> dict:
    return {
        key: value | sections.get(key, {}) if isinstance(value, dict) else value
        for key, value in TREE.items()
    }


@pytest.fixture
def written(tmp_path):
    """Writes a cluster.yaml; returns its path."""

    def write(tree) -> str:
        path = tmp_path / "cluster.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return str(path)

    return write


@pytest.mark.parametrize(("setting", "placed"), PLACES.items(), ids=lambda value: str(value))
def test_a_relative_path_means_the_bucket_and_anything_else_stays(setting, placed):
    key, uri = setting
    other = {"data.uri": "/data", "results.uri": "/results"}
    moved, note = move_to_cluster(default_experiment(other | {key: uri}), Description("cluster.yaml", TREE))
    assert moved.get(key) == placed
    assert note == (None if placed == uri else f"on the cluster, {key} {uri} is {placed}")


@pytest.mark.parametrize(
    ("overrides", "bucket", "said"),
    [
        (
            {"data.uri": "../data"},
            "pool",
            "data.uri: ../data: is outside this folder; give it as s3://BUCKET/PATH",
        ),
        (
            {"data.uri": "data/x"},
            None,
            "cluster.yaml: provider.bucket: missing, so data.uri data/x cannot be placed; add the name of "
            "an S3 bucket, or give data.uri as s3://BUCKET/PATH",
        ),
        (
            {"data.uri": "/data", "student.init": "runs/model.safetensors"},
            "pool",
            "student.init: runs/model.safetensors: is a file of this machine, which the cluster cannot read; "
            "name a run on the cluster (run:NAME), pretrained, or an absolute path that its machines have",
        ),
    ],
)
def test_what_the_cluster_cannot_have_is_refused_here(overrides, bucket, said):
    description = Description("cluster.yaml", tree_with(provider={"bucket": bucket}))
    with pytest.raises(UserError) as raised:
        move_to_cluster(default_experiment(overrides), description)
    assert str(raised.value) == said


def test_ssh_is_called_as_ray_calls_it_and_the_token_is_on_no_command_line(written):
    head = Head(read_description(written(TREE)), "10.0.0.1", "/keys/mine.pem", "nc %h %p")
    words = head.ssh("-T")
    assert words[:3] == ["ssh", "-i", "/keys/mine.pem"]
    assert {"UserKnownHostsFile=/dev/null", "IdentitiesOnly=yes", "ProxyCommand=nc %h %p"} <= set(words)
    assert words[-1] == "-T"
    assert head.target == "ubuntu@10.0.0.1"
    assert job_command(8266, "mine-1", ["/home/ubuntu/venv/bin/deit-ray", "tune", "x.yaml"], "/tmp/x") == [
        *("ray", "job", "submit", "--address", "http://127.0.0.1:8266", "--submission-id", "mine-1"),
        *("--working-dir", "/tmp/x", "--no-wait", "--", "/home/ubuntu/venv/bin/deit-ray", "tune", "x.yaml"),
    ]


COMMANDS = {
    "tune": ["tune", str(EXPERIMENTS / "digits_search.yaml")],
    "resume": ["tune", "--resume", "digits_search"],
    "status": ["status"],
    "stop": ["stop", "digits_search", "3"],
    "best": ["best", "digits_search"],
    "ui": ["ui"],
}
BAD_FILES = {  # the content of a cluster.yaml, or None for no file: what is said
    None: "no such file; name the cluster.yaml that `ray up` takes",
    "a: [": "line 1",
    "name: digits\n": "cluster_name: missing, so this is no description of a cluster for `ray up`",
    yaml.safe_dump(tree_with(auth={"ssh_user": None})): "auth.ssh_user: missing",
    yaml.safe_dump(tree_with(provider={"bucket": "FILL_IN"})): "provider.bucket: FILL_IN is not filled in",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_wrong_cluster_in_one_line(name, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, said in BAD_FILES.items():
        path = "none.yaml" if content is None else written(content)
        ended = call(*COMMANDS[name], "--cluster", path)
        assert ended.status == 1
        assert said in ended.error
    if name != "ui":
        ended = call(*COMMANDS[name], "--cluster", written(TREE), "--address", "auto")
        assert "exclude each other" in ended.error


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_to_do_where_no_cluster_is_up(name, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where `ray up` would have noted the head
    path = written(TREE)
    ended = call(*COMMANDS[name], "--cluster", path)
    assert ended.error == f"error: {path}: the cluster mine is not up; run: ray up {path}"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ssh is not installed on this machine" in call(*COMMANDS[name], "--cluster", path).error


def test_the_experiment_is_checked_before_the_cluster(written):
    ended = call(*COMMANDS["tune"], "--set", "optim.lrr=1", "--cluster", written(TREE))
    assert "optim.lrr: no such key" in ended.error
    plain = [str(EXPERIMENTS / "digits_student.yaml")]
    assert "search.space is empty" in call("tune", *plain, "--cluster", written(TREE)).error
