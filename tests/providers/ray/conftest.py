"""Three nodes of a real Ray on this machine, for all tests that need them; without Ray they are skipped."""

import importlib.util
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
VLLM = ROOT / ".venv-vllm" / "bin"
HAS_RAY = importlib.util.find_spec("ray") is not None
NO_RAY = "Ray is not installed here: `make setup-ray`, then `make test-ray`"

collect_ignore = [] if HAS_RAY else ["program.py", "guarded.py"]


@dataclass(slots=True)
class Nodes:
    """The cluster: `address` is what `--on` takes, on these hosts, and `client_address` elsewhere; the head has no room
    for replicas, the others have labels.
    """

    cluster: Any
    address: str
    workers: dict[str, Any]
    client_address: str = ""

    def add(self, name: str) -> Any:
        """One more node, named by its label `place`."""
        node = self.cluster.add_node(num_cpus=2, labels={"place": name}, resources={"slots": 4})
        self.workers[name] = node
        return node

    def remove(self, name: str) -> None:
        """As when it loses its power."""
        self.cluster.remove_node(self.workers.pop(name), allow_graceful=False)

    def remove_id(self, node_id: str) -> None:
        """The same, by Ray's name of the node."""
        self.remove(next(name for name, node in self.workers.items() if node.node_id == node_id))


def first_node(form: Any, *, cpus: int = 0, ports: Sequence[str] = ()) -> Any:
    """Ray gives its processes half a minute to come up, which is little where the machine is busy."""
    for _ in range(3):
        free = {name: free_port() for name in ports}
        try:
            return form(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False, **free})
        except Exception as error:
            problem = error
    raise problem


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    if not HAS_RAY:
        pytest.skip(NO_RAY)
    if (address := os.environ.get("SWARMX_TEST_RAY")) is not None:  # a cluster that stays up, while developing
        yield Nodes(
            cluster=None, address=address, client_address=os.environ.get("SWARMX_TEST_RAY_CLIENT", ""), workers={}
        )
        return
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
        # Ray's client server forks a process for each client. By gRPC's own handlers its threads begin anew in the
        # fork, which may die of them (SIGSEGV) before it is that process.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
    }
    from ray.cluster_utils import Cluster

    os.environ["PATH"] += f":{VLLM}"  # behind all else: the nodes' own interpreter stays the one of the tests
    cluster = first_node(Cluster, ports=("ray_client_server_port", "runtime_env_agent_port"))
    port = cluster.head_node._ray_params.ray_client_server_port
    found = Nodes(cluster=cluster, address=cluster.address, client_address=f"ray://127.0.0.1:{port}", workers={})
    try:
        found.add("a")
        found.add("b")
        yield found
    finally:
        cluster.shutdown()
