"""cluster.yaml comes up, runs studies on several hosts and goes down: docs/cluster.md, as a person does it.

AWS's API is moto's server, and its machines are hosts on this machine (tests/support/). The tests share one
cluster, in the order in which they are written.
"""

import json
import re
import subprocess
import time
import urllib.request

import pytest
import yaml
from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.results.folders import saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.study.study import Study
from tests.study.test_study import assert_mlflow_agrees
from tests.support import aws
from tests.support.cluster_yaml import BUCKET
from tests.support.commands import wait_for
from tests.support.hosts import LAPTOP, NETWORK, address_of
from tests.support.laptop import IMPATIENT, Laptop, documented

pytestmark = pytest.mark.timeout(720)
MACHINES = range(4, 16)  # moto gives addresses in this order
OUTSIDER = 30
UP, DOWN = "ray up cluster.yaml", "ray down cluster.yaml"
TUNE = "deit-ray tune experiments/imagenet_deit_small_search.yaml --cluster cluster.yaml"
SYNC = "ray exec cluster.yaml 'deit-ray sync STUDY --results s3://BUCKET/results'"
RESULTS = f"s3://{BUCKET}/results"
MLFLOW = "http://127.0.0.1:5000"
TRIALS, EPOCHS, STEPS = 2, 8, 5  # of 1,293 images, 256 at a time
UNSEEN = {
    "iam:PassRole": "EC2 asks for it when a machine with a role starts",
    "ssm:GetParameters": "EC2 asks for it where ImageId names a parameter",
    "s3:AbortMultipartUpload": "after an upload that failed",
}
STUDY = f"""
extends: digits_student.yaml
data: {{cpus_per_worker: 0.5}}
distillation: {{kind: none}}
student: {{depth: 1}}
optim: {{warmup_epochs: 1, ema_decay: 0.5}}
train: {{workers: 2, cpus_per_worker: 2, batch_size: 256, epochs: {EPOCHS}, log_every: 1}}
search:
  trials: {TRIALS}
  max_concurrent: 1
  scheduler: none
  sampler: random
  metric: val/top1_ema
  space: {{optim.lr: {{log: [3e-4, 1e-2]}}}}
"""


@pytest.fixture(scope="module")
def cloud(hosts):
    with aws.Aws() as cloud, pytest.MonkeyPatch.context() as patch:
        for name, value in aws.ENVIRONMENT.items():
            patch.setenv(name, value)
        cloud.make_network()
        yield cloud


@pytest.fixture(scope="module")
def laptop(hosts, cloud, tmp_path_factory) -> Laptop:
    """The laptop of a person who has done what docs/cluster.md asks for once."""
    hosts.environment |= aws.ENVIRONMENT | IMPATIENT
    hosts.start(*MACHINES)
    laptop = Laptop(tmp_path_factory.mktemp("laptop"), cloud, hosts)
    laptop.fill_in()
    words = {"SOURCE": "digits", "BUCKET": BUCKET, "imagenet": "digits"}
    laptop.type("deit-ray data prepare SOURCE --out s3://BUCKET/imagenet", **words)
    for name in ("first", "second", "third"):
        (laptop.project / "experiments" / f"{name}.yaml").write_text(f"name: {name}\n{STUDY}")
    return laptop


@pytest.fixture(scope="module")
def up(laptop):
    """The cluster that `ray up` has started. Its hosts end with the tests."""
    laptop.type(UP)


def number_of(instance) -> int:
    """The host that is an AWS machine."""
    return int(instance.private_ip_address.rpartition(".")[2])


def of_kind(cloud, kind: str) -> list:
    """The running machines of a node type."""
    return [i for i in cloud.instances("running") if tags_of(i)["ray-user-node-type"] == kind]


def tags_of(instance) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.tags}


def begin(laptop: Laptop, name: str) -> subprocess.Popen:
    return laptop.begin(TUNE, imagenet_deit_small_search=name)


def resume(laptop: Laptop, name: str) -> subprocess.Popen:
    return laptop.begin("deit-ray tune --resume STUDY --cluster cluster.yaml", STUDY=name)


def await_checkpoint(driver: subprocess.Popen, trial: str, after: int = 0) -> int:
    """Waits until a checkpoint later than a step is whole; returns its step."""
    deadline = time.monotonic() + 400
    while (step := max(saved_steps(f"{RESULTS}/{trial}"), default=0)) <= after:
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            raise AssertionError(f"no checkpoint of {trial}:\n{driver.communicate()[0]}")
        time.sleep(0.2)
    return step


def assert_ended(driver: subprocess.Popen, seconds: float = 400) -> None:
    """A study's command ends well."""
    try:
        output = driver.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        driver.kill()
        raise AssertionError(f"the study did not end:\n{driver.communicate()[0]}") from None
    assert driver.returncode == 0, output


def assert_whole(laptop: Laptop, name: str) -> None:
    """A study has all its trials, with each point once; MLflow, read from the laptop, has the same."""
    with laptop.pages(name):
        assert_mlflow_agrees(Study.open(name, RESULTS), MLFLOW, TRIALS, STEPS)
    for number in range(TRIALS):
        points = iterate_points(f"{RESULTS}/{name}-1/trial-{number:04d}/journal")
        names = [(point.name, point.step) for point in points]
        assert len(names) == len(set(names))
        assert max(step for _, step in names) == EPOCHS * STEPS


def test_a_study_trains_on_two_hosts_and_survives_the_loss_of_a_spot_machine(up, laptop, cloud, hosts):
    assert "no studies here yet" in laptop.type("deit-ray status --cluster cluster.yaml")
    driver = begin(laptop, "first")
    step = await_checkpoint(driver, "first-1/trial-0000")
    spot = of_kind(cloud, "gpu_spot")
    training = "ps -A -o args | grep -c '[R]ayTrainWorker'"
    assert [hosts.ssh(number_of(i), training).stdout.strip() for i in spot] == ["1", "1"]
    lost = spot[0]
    lost.terminate()
    hosts.cut(number_of(lost))
    await_checkpoint(driver, "first-1/trial-0000", step)
    assert_ended(driver)
    now = {i.id for i in of_kind(cloud, "gpu_spot")}
    assert now - {i.id for i in spot}  # another machine came
    assert lost.id not in now
    assert_whole(laptop, "first")
    kept = laptop.type("deit-ray tune --resume STUDY --dry-run --cluster cluster.yaml", STUDY="first")
    assert "first-1" in kept
    assert "first-1" in laptop.type("deit-ray status --cluster cluster.yaml")
    laptop.type("deit-ray best STUDY --cluster cluster.yaml", STUDY="first")
    home = laptop.project / "results" / "first-1"
    assert sorted(path.name for path in home.iterdir()) == ["best.yaml", "model.safetensors"]
    best = Study.open("first", RESULTS).find_best()
    assert yaml.safe_load((home / "best.yaml").read_text())["optim"]["lr"] == best.params["optim.lr"]


def test_the_machines_are_those_of_cluster_yaml(up, laptop, cloud):
    (head,), workers = of_kind(cloud, "head"), of_kind(cloud, "gpu_spot")
    assert "InstanceLifecycle" not in head.meta.data
    for instance in workers:
        assert instance.instance_lifecycle == "spot"
    for instance, role in [(head, "deit-ray-head"), *((worker, "deit-ray-worker") for worker in workers)]:
        assert tags_of(instance)["ray-cluster-name"] == "deit-ray"
        assert instance.iam_instance_profile["Arn"].endswith(f"/{role}")
        (group,) = instance.security_groups
        allowed = cloud.resource("ec2").SecurityGroup(group["GroupId"]).ip_permissions
        assert [(p.get("FromPort"), p.get("ToPort"), p["IpRanges"]) for p in allowed if p["IpRanges"]] == [
            (22, 22, [{"CidrIp": f"{LAPTOP}/32"}])
        ]
        inside = [pair["GroupId"] for p in allowed for pair in p["UserIdGroupPairs"]]
        assert inside == [group["GroupId"]]


def test_an_outsider_on_the_same_network_is_refused(up, hosts, laptop):
    hosts.start(OUTSIDER)
    head = address_of(MACHINES[0])
    for port in (5000, 8080, 8265):  # MLflow, optuna-dashboard, Ray's dashboard: on the head's loopback
        knock = f"timeout 2 bash -c 'echo > /dev/tcp/{head}/{port}'"
        assert "refused" in hosts.ssh(OUTSIDER, knock, check=False).stderr
    install = yaml.safe_load(laptop.file.read_text())["setup_commands"][1]
    connect = f"import ray; ray.init(address='{head}:6379', _node_ip_address='{address_of(OUTSIDER)}')"
    hosts.ssh(OUTSIDER, install)
    for token in ("", "mkdir -p ~/.ray && echo wrong > ~/.ray/auth_token && export RAY_AUTH_MODE=token && "):
        ended = hosts.ssh(OUTSIDER, f'{token}~/venv/bin/python -c "{connect}"', check=False, timeout=120)
        assert ended.returncode != 0
        assert re.search("(?i)authenticat|token|unauthorized", ended.stdout + ended.stderr), ended
    with laptop.pages("first"), pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen("http://127.0.0.1:8265/api/jobs/", timeout=10)
    hosts.stop(OUTSIDER)


def services(hosts, head: int) -> dict[str, list[str]]:
    """The processes of each service of the head, by pid and start."""
    listed = hosts.ssh(head, "ps -A -o pid=,lstart=,args=").stdout.splitlines()
    words = {"mlflow": "mlflow server --backend", "dashboard": "head.py dashboard"}
    return {name: [line for line in listed if text in line] for name, text in words.items()}


def test_ray_up_again_changes_nothing_of_the_services(up, laptop, hosts):
    before = services(hosts, MACHINES[0])
    assert {name: len(lines) for name, lines in before.items()} == {"mlflow": 1, "dashboard": 1}
    laptop.type(UP)
    assert services(hosts, MACHINES[0]) == before
    with laptop.pages("first"):
        listed = json.load(urllib.request.urlopen("http://127.0.0.1:8080/api/studies", timeout=60))
    assert [study["study_name"] for study in listed["study_summaries"]] == ["first-1"]


def test_a_study_is_stopped_from_the_laptop(up, laptop):
    driver = begin(laptop, "third")
    wait_for(lambda: storage.exists(f"{RESULTS}/third-1/trial-0000"), 240)
    laptop.type("deit-ray stop STUDY --cluster cluster.yaml", STUDY="third")
    driver.communicate(timeout=240)
    assert [trial.state for trial in Study.open("third", RESULTS).optuna.trials] == [TrialState.FAIL]
    assert "cancelled" in laptop.type("deit-ray status --cluster cluster.yaml")


def test_a_study_survives_the_death_of_the_head_s_processes_and_the_loss_of_the_head(
    up, laptop, cloud, hosts
):
    config = yaml.safe_load(laptop.file.read_text())
    config["available_node_types"]["gpu_spot"]["max_workers"] = 1
    config["available_node_types"]["gpu_on_demand"]["max_workers"] = 2
    laptop.write(config)
    (head,) = of_kind(cloud, "head")
    cloud.has_spot = False
    laptop.type(UP)  # ends the machines of the other studies that are more than allowed
    wait_for(lambda: len(of_kind(cloud, "gpu_spot")) == 1, 60)
    (spot,) = of_kind(cloud, "gpu_spot")
    spot.terminate()  # AWS takes the last one away
    hosts.stop(number_of(spot))
    driver = begin(laptop, "second")
    wait_for(lambda: cloud.refused > 3, 120)  # Ray asks for spot machines first, and again and again
    # on demand comes what is beyond gpu_spot's max_workers, and nothing instead of a missing spot machine
    wait_for(lambda: of_kind(cloud, "gpu_on_demand"))
    assert not of_kind(cloud, "gpu_spot")
    shown = laptop.type("ray exec cluster.yaml 'ray status -v'")
    assert re.search(r"Demands:\s+\{'CPU'", shown), shown  # what waits
    cloud.has_spot = True
    await_checkpoint(driver, "second-1/trial-0000")
    assert len(of_kind(cloud, "gpu_spot")) == len(of_kind(cloud, "gpu_on_demand")) == 1
    hosts.ssh(number_of(head), "kill -KILL -1", check=False)  # all processes of the user
    assert driver.communicate(timeout=120)[0]
    laptop.type(UP)
    driver = resume(laptop, "second")
    await_checkpoint(driver, "second-1/trial-0001")

    head.terminate()  # with its disk
    hosts.stop(number_of(head))
    assert driver.communicate(timeout=120)[0]
    laptop.type(UP)
    assert_ended(resume(laptop, "second"))
    for name in ("first", "second"):  # the new head's MLflow was empty
        laptop.type(SYNC, STUDY=name, BUCKET=BUCKET)
        assert_whole(laptop, name)


def test_no_role_has_rights_that_it_does_not_need(up, cloud):
    heads = {address_of(number_of(i)) for i in cloud.instances() if tags_of(i).get("ray-node-type") == "head"}
    machines = {f"{NETWORK}{number}" for number in MACHINES}
    for name, used in {
        "deit-ray-head": cloud.rights_used(heads),
        "deit-ray-worker": cloud.rights_used(machines - heads),
    }.items():
        policy = cloud.client("iam").get_role_policy(RoleName=name, PolicyName=name)["PolicyDocument"]
        allowed = set()
        for statement in policy["Statement"]:
            actions = statement["Action"]
            allowed |= {actions} if isinstance(actions, str) else set(actions)
        assert used <= allowed
        assert allowed - used <= set(UNSEEN), name


def test_ray_down_ends_every_machine(up, laptop, cloud):
    laptop.type(DOWN)
    assert cloud.instances("pending", "running", "stopping", "stopped") == []
    assert set(laptop.typed) == set(documented())
