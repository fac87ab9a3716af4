"""The cluster.yaml that hosts on one machine run: the project's own, with a few listed values replaced."""

import sys
import sysconfig
from pathlib import Path

import yaml

from tests.support.aws import REGION, ZONE
from tests.support.hosts import LAPTOP

ROOT = Path(__file__).parent.parent.parent
BUCKET = "deit-ray-test"
TYPES = ("head", "gpu_spot", "gpu_on_demand", "cpu_spot")
# Everything that may differ, and why. The first five are the values that each user sets.
REPLACED = {
    "provider.region": "the user's value",
    "provider.availability_zone": "the user's value",
    "provider.bucket": "the user's value",
    "provider.ssh_from": "the user's value",
    "provider.security_group_ids": "the user's value",
    "provider.use_internal_ips": "the hosts have no public addresses",
    "setup_commands.0": "the hosts share this machine's packages",
    "setup_commands.1": "the hosts share this machine's Python environment, so nothing is downloaded",
    **{f"available_node_types.{name}.node_config.ImageId": "moto has no parameters of AWS" for name in TYPES},
    **{f"available_node_types.{name}.node_config.SecurityGroupIds": "the user's value" for name in TYPES},
    "available_node_types.gpu_spot.resources": "two training CPUs and one for the stream, and no GPU",
    "available_node_types.gpu_on_demand.resources": "the same",
    "available_node_types.cpu_spot.resources": "one CPU for the stream",
}
CPUS = {"gpu_spot": 3, "gpu_on_demand": 3, "cpu_spot": 1}
INSTALL = r"""
python3={python} && [ -x ~/venv/bin/ray ] || {{ $python3 -m venv --without-pip ~/venv &&
printf '%s\n' ~/deit_ray {packages} > ~/venv/lib/{version}/site-packages/shared.pth &&
for name in ray deit-ray; do {{ echo "#!$HOME/venv/bin/python"; tail -n +2 {scripts}/$name; }} >
~/venv/bin/$name && chmod +x ~/venv/bin/$name; done; }}
"""


def derive(group: str = "sg-FILL_IN") -> dict:
    """What the hosts run instead of cluster.yaml.

    Args:
        group: the security group's id.
    """
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["provider"] |= {
        "region": REGION,
        "availability_zone": ZONE,
        "bucket": BUCKET,
        "ssh_from": LAPTOP,
        "security_group_ids": [group],
        "use_internal_ips": True,
    }
    for name in TYPES:
        machine = config["available_node_types"][name]["node_config"]
        machine["ImageId"] = "ami-12c6146b"  # one of moto's
        machine["SecurityGroupIds"] = [group]
    for name, cpus in CPUS.items():
        # Ray would fill in the GPUs of the machine
        config["available_node_types"][name]["resources"] = {"CPU": cpus, "GPU": 0}
    install = INSTALL.format(
        python=Path(sys.executable).resolve(),
        packages=sysconfig.get_path("purelib"),
        scripts=sysconfig.get_path("scripts"),
        version=f"python{sys.version_info.major}.{sys.version_info.minor}",
    )
    config["setup_commands"][:2] = ["true", " ".join(install.split("\n")).strip()]
    return config


def differences(one, other, path: str = "") -> set[str]:
    """The dotted paths of the values that differ between two YAML trees."""
    if isinstance(one, dict) and isinstance(other, dict) and path not in REPLACED:
        pairs = {key: (one.get(key), other.get(key)) for key in one.keys() | other.keys()}
    elif (
        isinstance(one, list) and isinstance(other, list) and len(one) == len(other) and path not in REPLACED
    ):
        pairs = dict(enumerate(zip(one, other, strict=True)))
    else:
        return set() if one == other else {path}
    return {
        found
        for key, (left, right) in pairs.items()
        for found in differences(left, right, f"{path}.{key}".lstrip("."))
    }
