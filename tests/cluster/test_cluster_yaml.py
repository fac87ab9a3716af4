"""cluster.yaml, read as `ray up` reads it, with Ray's own defaults and checks, but without a cloud."""

import json
import shutil
import subprocess
from pathlib import Path

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray.autoscaler._private.util import prepare_config, validate_config

from deit_ray.cluster.connect import HEAD
from tests.conftest import ROOT
from tests.support.cluster_yaml import REPLACED, derive, differences


@pytest.fixture
def written() -> dict:
    """The contents of cluster.yaml."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def prepared(written) -> dict:
    """The file with Ray's defaults filled in."""
    return prepare_config(written)


def test_ray_accepts_the_file(prepared):
    validate_config(prepared)


@pytest.mark.parametrize("path", [(), ("available_node_types", "head"), ("auth",)])
def test_ray_refuses_a_copy_with_an_unknown_key(written, path):
    section = written
    for key in path:
        section = section[key]
    section["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        validate_config(prepare_config(written))


def test_every_machine_is_one_that_ec2_could_be_asked_for(prepared):
    """Ray has no schema for node_config, but EC2 has one, and botocore brings it along."""
    request = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for node_type in prepared["available_node_types"].values():
        report = ParamValidator().validate(
            {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}, request
        )
        assert not report.has_errors(), report.generate_report()


def test_head_has_room_for_drivers_of_trials_but_none_for_training(prepared, monkeypatch):
    head = prepared["available_node_types"][prepared["head_node_type"]]
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps(head["resources"]))  # as `ray up` passes them on
    spec = ResourceAndLabelSpec(object_store_memory=10**9).resolve(is_head=True, node_ip_address="10.0.0.1")
    offered = spec.to_resource_dict()
    assert "CPU" not in offered
    assert "GPU" not in offered
    assert offered[HEAD] == 1
    assert head["max_workers"] == 0  # no second machine of this kind either
    assert "InstanceMarketOptions" not in head["node_config"]  # no spot machine, which can vanish


def test_workers_come_from_zero_and_go_when_idle(prepared):
    types = prepared["available_node_types"]
    assert set(types) == {"head", "gpu_spot", "gpu_on_demand", "cpu_spot"}
    for name, node_type in types.items():
        assert node_type["min_workers"] == 0
        is_spot = "InstanceMarketOptions" in node_type["node_config"]
        assert is_spot == name.endswith("_spot")
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand["priority"]
    assert on_demand["max_workers"] == 0  # nobody pays for them unasked
    assert types["cpu_spot"]["resources"]["GPU"] == 0
    assert 0 < prepared["idle_timeout_minutes"] <= 30


def test_hosts_on_one_machine_run_this_file_but_for_the_listed_values(written):
    assert differences(written, derive("sg-1")) == set(REPLACED)
    for change in ({"idle_timeout_minutes": 1}, {"head_setup_commands": []}, {"auth": {"ssh_user": "root"}}):
        assert differences(written, derive("sg-1") | change) - set(REPLACED)


def test_every_value_to_fill_in_has_its_command_beside_it():
    lines = (ROOT / "cluster.yaml").read_text().splitlines()
    values = [line for line in lines if "FILL_IN" in line and not line.startswith("#")]
    assert len(values) <= 5
    assert all("  # " in line for line in values)
    assert [path for path, why in REPLACED.items() if path.startswith("provider.") and "user" in why] == [
        f"provider.{key}"
        for key in ("region", "availability_zone", "bucket", "ssh_from", "security_group_ids")
    ]


def test_every_node_starts_with_token_authentication(prepared, tmp_path):
    assert "~/.ray/auth_token" in prepared["cluster_synced_files"]  # made by the head's setup
    for commands in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        starts = [call for call in run_with_stub(commands, tmp_path) if call["arguments"][0] == "start"]
        assert len(starts) == 1
        assert starts[0]["RAY_AUTH_MODE"] == "token"


def test_head_shows_its_dashboard_to_itself_alone(prepared, tmp_path):
    (start,) = [
        c["arguments"]
        for c in run_with_stub(prepared["head_start_ray_commands"], tmp_path)
        if c["arguments"][0] == "start"
    ]
    assert [a for a in start if a.startswith("--dashboard-host")] == ["--dashboard-host=127.0.0.1"]


def test_no_machine_gets_the_open_port_and_wide_role_that_ray_would_make(prepared):
    for node_type in prepared["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]
        assert node_type["node_config"]["IamInstanceProfile"]["Name"]


def test_head_can_start_workers_and_workers_find_the_head(prepared, tmp_path):
    head, worker = (
        run_with_stub(prepared[f"{kind}_start_ray_commands"], tmp_path)[-1]["arguments"]
        for kind in ("head", "worker")
    )
    assert any(
        a.startswith("--autoscaling-config=") and a.endswith("/ray_bootstrap_config.yaml") for a in head
    )
    assert "--address=10.0.0.1:6379" in worker
    assert "--port=6379" in head
    assert any("[cluster]" in command for command in prepared["head_setup_commands"])  # brings boto3


def test_the_files_that_the_nodes_install_are_mounted(prepared):
    local = [path for path in prepared["file_mounts"].values() if not path.startswith("~")]
    assert {"deit_ray", "pyproject.toml", "constraints.txt"} <= set(local)
    assert [path for path in local if not (ROOT / path).exists()] == []


def run_with_stub(commands: list[str], folder: Path) -> list[dict]:
    """Runs shell commands with a `ray` that does nothing but note its arguments and RAY_AUTH_MODE.

    What the setup makes in the home folder is there.
    """
    stub = folder / "ray"
    stub.write_text('#!/bin/sh\necho "$RAY_AUTH_MODE" "$@"\n')
    stub.chmod(0o755)
    (folder / ".deit_ray_environment").write_text("export AWS_DEFAULT_REGION=us-west-2")
    (folder / "venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / "venv/bin/python").write_text("#!/bin/sh\n")
    (folder / "venv/bin/python").chmod(0o755)
    environment = {"PATH": str(folder), "HOME": str(folder), "RAY_HEAD_IP": "10.0.0.1"}
    calls = []
    for command in commands:
        run = subprocess.run(
            [shutil.which("bash"), "-c", command], env=environment, capture_output=True, text=True, check=True
        )
        for line in run.stdout.splitlines():
            mode, *arguments = line.split(" ")
            calls.append({"RAY_AUTH_MODE": mode, "arguments": arguments})
    return calls
