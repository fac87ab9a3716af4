"""Makes what a cluster needs once in an AWS account, and prints the security group for cluster.yaml.

    python deploy/aws.py cluster.yaml

It makes the bucket, the security group (SSH from `ssh_from` alone, everything between the group's machines)
and the roles of head and workers with the rights of deploy/*-policy.json. What exists already is brought up
to date: run it again when your address changes.
"""

import json
import sys
from pathlib import Path

import boto3
import yaml
from botocore.exceptions import ClientError

GROUP = "deit-ray"
ROLES = {"deit-ray-head": "head-policy.json", "deit-ray-worker": "worker-policy.json"}
HERE = Path(__file__).parent


def main(file: str) -> None:
    provider = yaml.safe_load(Path(file).read_text())["provider"]
    region, bucket = provider["region"], provider["bucket"]
    make_bucket(bucket, region)
    for role, policy in ROLES.items():
        make_role(role, (HERE / policy).read_text().replace("BUCKET", bucket), region)
    group = make_group(provider["ssh_from"], provider["availability_zone"], region)
    print(f"security_group_ids: [{group}]")


def make_bucket(name: str, region: str) -> None:
    """Makes a bucket that nobody else can read, unless this account has it already."""
    s3 = boto3.client("s3", region_name=region)
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    with _unless("BucketAlreadyOwnedByYou"):
        s3.create_bucket(Bucket=name, **place)
    blocked = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=dict.fromkeys(blocked, True))


def make_role(name: str, policy: str, region: str) -> None:
    """Makes an instance profile with one role, which has the rights of a policy and no others."""
    iam = boto3.client("iam", region_name=region)
    with _unless("EntityAlreadyExists"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(HERE / "trust.json").read_text())
    iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=json.dumps(json.loads(policy)))
    with _unless("EntityAlreadyExists"):
        iam.create_instance_profile(InstanceProfileName=name)
    with _unless("LimitExceeded"):  # a profile has one role
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def make_group(address: str, zone: str, region: str) -> str:
    """The id of the security group, in the VPC of the zone's default subnet."""
    ec2 = boto3.resource("ec2", region_name=region)
    filters = {"availability-zone": zone, "map-public-ip-on-launch": "true"}
    subnets = list(ec2.subnets.filter(Filters=[{"Name": k, "Values": [v]} for k, v in filters.items()]))
    if not subnets:
        sys.exit(f"{zone}: has no subnet that gives its machines public addresses")
    vpc = sorted(subnets, key=lambda subnet: not subnet.default_for_az)[0].vpc
    found = list(vpc.security_groups.filter(Filters=[{"Name": "group-name", "Values": [GROUP]}]))
    group = found[0] if found else vpc.create_security_group(GroupName=GROUP, Description="deit-ray cluster")
    if group.ip_permissions:
        group.revoke_ingress(IpPermissions=group.ip_permissions)
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": f"{address}/32"}]}
    group.authorize_ingress(IpPermissions=[inside, ssh])
    return group.id


class _unless:
    """Continues if AWS says that the thing exists already."""

    def __init__(self, code: str):
        self.code = code

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        return isinstance(error, ClientError) and error.response["Error"]["Code"] == self.code


if __name__ == "__main__":
    main(*sys.argv[1:])
