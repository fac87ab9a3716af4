"""Asks every node of a cluster for the hash of its code, before and while trials run there.

The processes of a trial compare their code themselves (`code.check_same_code`). But code that differs much
cannot even load what Ray sends it; a question that any version understands comes first.
"""

from collections.abc import Callable

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deit_ray.cluster.code import PACKAGE, describe_other_code, hash_of
from deit_ray.errors import OtherCodeError

ANSWER_S = 60.0  # the first process of a machine that is busy starting


class Codes:
    """The code of a cluster's nodes.

    Args:
        expected: the hash that each must have; None for a Ray of one machine, where nobody is asked.
    """

    def __init__(self, expected: str | None):
        self.expected = expected
        self.asked: set[str] = set()
        self.questions: dict[ray.ObjectRef, str] = {}  # the host's name

    def check(self, wait_s: float = 0.0) -> None:
        """Asks the nodes that are new, and reads the answers that have come.

        Args:
            wait_s: how long to wait for answers.

        Raises:
            OtherCodeError: a node has other code.
        """
        if self.expected is None:
            return
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] not in self.asked:
                self.asked.add(node["NodeID"])
                question = on_node(node["NodeID"], code_of_this_node).remote()
                self.questions[question] = node["NodeManagerHostname"]
        if not self.questions:
            return
        known = list(self.questions)
        for question in ray.wait(known, num_returns=len(known), timeout=wait_s)[0]:
            host = self.questions.pop(question)
            try:
                found = ray.get(question)
            except RayTaskError:
                found = "unknown"  # a version that cannot answer
            except RayError:  # the node is gone
                continue
            if found != self.expected:
                raise OtherCodeError(describe_other_code(host, found, self.expected))


def on_node(node: str, function: Callable):
    """A function as a task of Ray that runs once, on the node of an id, whatever else runs there."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy)


def code_of_this_node() -> str:
    """The hash of the code on this node."""
    return hash_of(PACKAGE)
