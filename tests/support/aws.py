"""AWS's API on one machine: moto's server, which notes who called what, and can be out of spot machines."""

import io
import logging
import re
import threading
from dataclasses import dataclass
from urllib.parse import parse_qs

from tests.support.hosts import LAPTOP, NETWORK

REGION = "eu-west-1"
ZONE = "eu-west-1b"
PORT = 5555
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_ENDPOINT_URL": f"http://{LAPTOP}:{PORT}",
}
REFUSED = (
    "<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code><Message>There is no Spot capacity "
    "available that matches your request.</Message></Error></Errors><RequestID>1</RequestID></Response>"
)


@dataclass(frozen=True)
class Call:
    """One request: the address that it came from, and the right that it needs, such as ec2:RunInstances."""

    address: str
    right: str


class Aws:
    """The API at ENVIRONMENT's address, while the context is entered.

    Attributes:
        calls: all requests.
        has_spot: whether it has spot machines.
        refused: number of spot machines that were asked for in vain.
    """

    def __init__(self):
        self.calls: list[Call] = []
        self.has_spot, self.refused = True, 0

    def __enter__(self) -> "Aws":
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would show every request
        self.application = DomainDispatcherApplication(create_backend_app)
        self.server = make_server(LAPTOP, PORT, self._answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()

    def resource(self, service: str):
        import boto3

        return boto3.resource(service, region_name=REGION, **_client_options())

    def client(self, service: str):
        import boto3

        return boto3.client(service, region_name=REGION, **_client_options())

    def make_network(self) -> None:
        """Replaces the region's default network by the hosts' own; moto gives addresses from .4 on."""
        ec2 = self.resource("ec2")
        for subnet in ec2.subnets.all():
            subnet.delete()
        vpc = ec2.create_vpc(CidrBlock=f"{NETWORK}0/24")
        subnet = vpc.create_subnet(CidrBlock=f"{NETWORK}0/24", AvailabilityZone=ZONE)
        subnet.meta.client.modify_subnet_attribute(SubnetId=subnet.id, MapPublicIpOnLaunch={"Value": True})

    def instances(self, *states: str) -> list:
        """The machines in some states, such as running, or all."""
        found = self.resource("ec2").instances.all()
        return [instance for instance in found if not states or instance.state["Name"] in states]

    def rights_used(self, addresses: set[str]) -> set[str]:
        """The rights that the calls from some addresses needed."""
        return {call.right for call in self.calls if call.address in addresses}

    def _answer(self, environ: dict, start_response):
        size = int(environ.get("CONTENT_LENGTH") or 0)
        body = b""
        if size and environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
            body = environ["wsgi.input"].read(size)
            environ["wsgi.input"] = io.BytesIO(body)
        call = Call(environ["REMOTE_ADDR"], _right(environ, body))
        self.calls.append(call)
        if call.right == "ec2:RunInstances" and b"MarketType=spot" in body and not self.has_spot:
            self.refused += 1
            start_response("500 Internal Server Error", [("Content-Type", "text/xml")])
            return [REFUSED.encode()]
        return self.application(environ, start_response)


def _client_options() -> dict:
    return {
        "endpoint_url": ENVIRONMENT["AWS_ENDPOINT_URL"],
        "aws_access_key_id": "a",
        "aws_secret_access_key": "b",
    }


def _right(environ: dict, body: bytes) -> str:
    """The right that a request needs."""
    scope = re.search(r"Credential=[^/]+/\d+/[^/]+/([a-z0-9]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    service = scope[1] if scope else "none"
    if service == "s3":
        return f"s3:{_s3_right(environ)}"
    action = parse_qs(body.decode()).get("Action") if body else None
    target = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
    return f"{service}:{action[0] if action else target}"


def _s3_right(environ: dict) -> str:
    """As AWS's list of S3's actions and rights has it."""
    method, query = environ["REQUEST_METHOD"], parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    is_object = "/" in environ["PATH_INFO"].strip("/")
    if "uploadId" in query and method == "DELETE":
        return "AbortMultipartUpload"
    if not is_object:
        if "delete" in query:
            return "DeleteObject"
        named = {"location": "GetBucketLocation", "publicAccessBlock": "PutBucketPublicAccessBlock"}
        other = {"GET": "ListBucket", "HEAD": "ListBucket", "PUT": "CreateBucket", "DELETE": "DeleteBucket"}
        return next((right for name, right in named.items() if name in query), other[method])
    return {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "DeleteObject"}.get(method, "PutObject")
