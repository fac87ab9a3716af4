"""deploy/aws.py against AWS's API (moto)."""

import runpy

import boto3
import pytest
import yaml

from tests.conftest import ROOT
from tests.support.cluster_yaml import derive

MAIN = runpy.run_path(str(ROOT / "deploy" / "aws.py"))["main"]


@pytest.fixture
def file(bucket, tmp_path):
    """A cluster.yaml whose values are filled in, but for the security group."""

    def write(**values):
        path = tmp_path / "cluster.yaml"
        config = derive()
        config["provider"] |= {"availability_zone": "eu-west-1b", "bucket": "deit-ray-account"} | values
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


def test_the_account_is_prepared_once_and_brought_up_to_date_after_that(file, capsys):
    MAIN(file(ssh_from="198.51.100.7"))
    first = capsys.readouterr().out
    MAIN(file(ssh_from="198.51.100.8"))
    assert capsys.readouterr().out == first
    (group,) = yaml.safe_load(first)["security_group_ids"]

    ec2, iam, s3 = (boto3.client(name, region_name="eu-west-1") for name in ("ec2", "iam", "s3"))
    allowed = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    assert [(p.get("FromPort"), p["IpRanges"]) for p in allowed if p["IpRanges"]] == [
        (22, [{"CidrIp": "198.51.100.8/32"}])
    ]
    assert [pair["GroupId"] for p in allowed for pair in p["UserIdGroupPairs"]] == [group]
    for name in ("deit-ray-head", "deit-ray-worker"):
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name
        policy = iam.get_role_policy(RoleName=name, PolicyName=name)["PolicyDocument"]
        places = {place for s in policy["Statement"] for place in [s["Resource"]] if "s3" in place}
        assert places == {"arn:aws:s3:::deit-ray-account", "arn:aws:s3:::deit-ray-account/*"}
        assert iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"] == []
    blocked = s3.get_public_access_block(Bucket="deit-ray-account")["PublicAccessBlockConfiguration"]
    assert set(blocked.values()) == {True}


def test_a_zone_without_public_addresses_is_named(file):
    with pytest.raises(SystemExit, match="eu-west-1z: has no subnet"):
        MAIN(file(availability_zone="eu-west-1z"))
