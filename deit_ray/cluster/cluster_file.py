"""Checks a cluster.yaml for AWS before `ray up` reads it: a person's values, and whether AWS takes them."""

import importlib.util
import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from deit_ray import storage
from deit_ray.cluster.description import FILL_IN, read_tree
from deit_ray.cluster.machine import Check
from deit_ray.errors import UnavailableError

REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
GROUP = re.compile(r"sg-[0-9a-f]{8,17}")
WIDEST = 24  # bits of the smallest prefix of ssh_from that lets in few enough
PROBE = "results"  # a folder in the bucket; it need not exist


def check_file(path: str) -> list[Check]:
    """What is right and wrong in a cluster.yaml. AWS is asked once the values are filled in.

    Raises:
        UserError: there is no such file, or it is no YAML of a cluster.
    """
    provider = read_tree(path)["provider"]
    missing = list(_missing(Path(path).read_text()))
    values = list(_values(provider))
    if missing or any(check.remedy for check in values):
        return [*missing, *values]
    return [Check("file", f"{path}: every value is filled in"), *values, *_aws(provider)]


def _missing(text: str) -> Iterator[Check]:
    """The lines in which a value is still missing, each with the command that prints it."""
    for number, line in enumerate(text.splitlines(), 1):
        value, _, comment = line.partition(" #")
        if FILL_IN not in value or line.lstrip().startswith("#"):
            continue
        key = value.partition(":")[0].strip(" -")
        how = f"to find it: {comment.strip()}" if comment else "the comments above it say how"
        yield Check(f"line {number}", f"{key} is not filled in", how)


def _values(provider: dict) -> Iterator[Check]:
    """Whether the values that a person fills in have the right form."""
    kind = provider.get("type")
    if kind != "aws":
        yield Check("provider", f"type: {kind}", "doctor knows AWS alone; set provider.type to aws")
        return
    region, zone = str(provider.get("region")), str(provider.get("availability_zone") or "")
    zones = [name.strip() for name in zone.split(",") if name.strip()]
    if not REGION.fullmatch(region):
        remedy = "set provider.region, such as us-west-2: aws configure get region"
        yield Check("region", f"{region} is not a region", remedy)
    elif any(not re.fullmatch(rf"{region}[a-z]", name) for name in zones):
        remedy = f"set provider.availability_zone to one of {region}, such as {region}a"
        yield Check("zone", f"{zone} is not in {region}", remedy)
    else:
        yield Check("region", f"{region}, {zone or 'any zone'}")
    yield from _known(provider, "bucket", BUCKET.fullmatch, "the name of an S3 bucket: aws s3 ls")
    narrow = f"your own address, or at most a /{WIDEST}: curl https://checkip.amazonaws.com"
    yield from _known(provider, "ssh_from", _is_narrow, narrow)
    groups = provider.get("security_group_ids")
    for group in groups if isinstance(groups, list) else []:
        if FILL_IN not in str(group) and not GROUP.fullmatch(str(group)):
            yield Check("group", f"{group} is no id of a security group", "python deploy/aws.py cluster.yaml")


def _known(provider: dict, key: str, is_right: Callable[[str], object], meant: str) -> Iterator[Check]:
    """Checks a value that a person has filled in; a file may lack it."""
    value = provider.get(key)
    if value is None or FILL_IN in str(value):
        return
    if is_right(str(value)):
        yield Check(key, str(value))
    else:
        yield Check(key, f"{value} cannot be right", f"set provider.{key} to {meant}")


def _is_narrow(text: str) -> bool:
    """Whether an address, or a range of them, lets in few machines."""
    try:
        return ipaddress.ip_network(text, strict=False).prefixlen >= WIDEST
    except ValueError:
        return False


def _aws(provider: dict) -> Iterator[Check]:
    """Whether AWS knows this person, and lets the bucket be read."""
    if importlib.util.find_spec("boto3") is None:
        yield Check("AWS", "boto3 is missing, which ray up needs", "pip install 'deit-ray[s3]'")
        return
    bucket, region = provider.get("bucket"), provider["region"]
    if bucket is None:
        return
    os.environ.setdefault("AWS_DEFAULT_REGION", region)
    uri = f"s3://{bucket}/{PROBE}"
    try:
        storage.names_after(uri, "")
    except UnavailableError as error:
        reason = str(error).partition(": cannot be read: ")[2]
        yield Check("AWS", f"s3://{bucket}: {reason}", _remedy(reason))
        return
    yield Check("AWS", f"s3://{bucket} can be read with these credentials")


def _remedy(reason: str) -> str:
    """What to do about a request that AWS did not answer."""
    if "credentials" in reason.lower() or "InvalidAccessKeyId" in reason or "SignatureDoesNotMatch" in reason:
        return "log in: aws configure, or aws sso login; check it with: aws sts get-caller-identity"
    if "NoSuchBucket" in reason:
        return "correct provider.bucket, or make it: python deploy/aws.py cluster.yaml"
    if "AccessDenied" in reason or "Forbidden" in reason:
        return "ask for the right s3:ListBucket on it, or use a bucket of your own"
    if "TooSkewed" in reason:
        return "set this machine's clock: sudo timedatectl set-ntp true"
    return "check the network, https_proxy and AWS_ENDPOINT_URL"
