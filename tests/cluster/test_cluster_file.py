"""`doctor cluster.yaml`: the values that a person fills in, and whether AWS takes them."""

import pytest

from deit_ray.cluster.cluster_file import check_file
from deit_ray.errors import UserError
from tests.support.commands import call

FILE = """
cluster_name: mine
provider:
  type: aws
  region: us-east-1  # aws configure get region
  availability_zone: us-east-1a
  bucket: studies  # aws s3 ls
  ssh_from: 203.0.113.7
  security_group_ids: [sg-0123456789abcdef0]  # FILL_IN is only in this comment
auth:
  ssh_user: ubuntu
"""
WRONG = {  # a line, what replaces it, and what is said: the subject, what was found, the remedy
    "  bucket: studies": (
        "  bucket: FILL_IN",
        ("line 7", "bucket is not filled in", "find it: aws s3 ls"),
    ),
    "  region: us-east-1 ": (
        "  region: us-east ",
        ("region", "us-east is not a region", "aws configure"),
    ),
    "  availability_zone: us-east-1a": (
        "  availability_zone: us-west-2a",
        ("zone", "us-west-2a is not in us-east-1", "such as us-east-1a"),
    ),
    "bucket: studies ": ("bucket: s3://studies ", ("bucket", "s3://studies cannot be right", "aws s3 ls")),
    "203.0.113.7": ("0.0.0.0/0", ("ssh_from", "0.0.0.0/0 cannot be right", "checkip.amazonaws.com")),
    "sg-0123456789abcdef0": ("default", ("group", "default is no id of a security group", "deploy/aws.py")),
    "type: aws": ("type: gcp", ("provider", "type: gcp", "set provider.type to aws")),
}


@pytest.fixture
def file(tmp_path):
    """Writes a cluster.yaml with something replaced."""

    def write(old: str = "", new: str = "") -> str:
        path = tmp_path / "cluster.yaml"
        path.write_text(FILE.replace(old, new) if old else FILE)
        return str(path)

    return write


def test_a_whole_file_is_right_and_its_bucket_is_read(file, bucket):
    assert [check for check in check_file(file()) if check.remedy] == []
    ended = call("doctor", file())
    assert ended.status == 0, ended
    assert "s3://studies can be read with these credentials" in ended.out
    assert ended.out.splitlines()[-1] == "nothing is wrong"


@pytest.mark.parametrize("old", WRONG)
def test_a_value_that_is_missing_or_cannot_be_right_is_said_with_its_remedy(file, old):
    new, (subject, said, remedy) = WRONG[old]
    (check,) = [check for check in check_file(file(old, new)) if check.remedy]
    assert (check.subject, check.found) == (subject, said)
    assert remedy in check.remedy
    ended = call("doctor", file(old, new))
    assert (ended.status, ended.out.splitlines()[-1]) == (1, "1 thing to fix")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("a: [", "line 1"),
        ("name: x", "is no description of a cluster"),
        ("", "is no description of a cluster"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, said):
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        check_file(str(path))


def test_what_aws_refuses_is_said_with_its_remedy(file, bucket, monkeypatch):
    def said(name: str = "studies") -> str:
        (check,) = [check for check in check_file(file("studies", name)) if check.remedy]
        return f"{check.found}; {check.remedy}"

    found, remedy = "NoSuchBucket: The specified bucket does not exist", "python deploy/aws.py cluster.yaml"
    assert said("missing") == f"s3://missing: {found}; correct provider.bucket, or make it: {remedy}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "Unable to locate credentials; log in: aws configure" in said()
