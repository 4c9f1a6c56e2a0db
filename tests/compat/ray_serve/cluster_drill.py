"""Three nodes on this machine: one is drained with notice, another is lost without, under load. Prints JSON.

Run in an environment with Ray: `python -m tests.compat.ray_serve.cluster_drill`. A process of its own, since it starts
and ends a cluster.
"""

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1.0")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")

import ray
from ray import serve
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from tests.compat.ray_serve.conftest import started
from tests.compat.ray_serve.deploy import deploy, router_of

_SECONDS = 0.4  # a call takes, so that some are under way when a node is lost


class Load:
    """A call every 80 ms on a thread of its own, until it is ended."""

    def __init__(self, handle: Any) -> None:
        self.answered: list[tuple[float, str]] = []
        self.errors: list[str] = []
        self._handle = handle
        self._ended = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def end(self) -> None:
        self._ended = True
        self._thread.join(60)

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        number = 0
        while not self._ended:
            task = asyncio.create_task(self._one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            await asyncio.sleep(0.08)
        await asyncio.gather(*tasks)

    async def _one(self, number: int) -> None:
        begun_s = time.monotonic()
        try:
            answer = await asyncio.wait_for(
                self._handle.remote({"prompt": f"number {number}", "seconds": _SECONDS}), 40
            )
            self.answered.append((time.monotonic() - begun_s, answer["replica"]))
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {str(error)[:200]}")


def until(seconds: float, condition: Any) -> bool:
    """Wait for it, for so long."""
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s:
        if condition():
            return True
        time.sleep(0.25)
    return False


def running() -> int:
    states = serve.status().applications["drill"].deployments["Model"].replica_states
    return int(states.get("RUNNING", 0))


def main() -> None:
    begun_s = time.monotonic()
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args=dict(head)))
    worker = {"num_cpus": 2, "resources": {"worker": 1}}
    drained, lost = (started(lambda: cluster.add_node(**worker)) for _ in range(2))
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, Any] = {}
    try:
        serve.start(proxy_location="Disabled")
        kwargs = {"retries": 4, "retry_methods": ["__call__"], "predictor": "empirical"}
        model = {
            "num_replicas": 4,
            "ray_actor_options": {"num_cpus": 0.2, "resources": {"worker": 0.01}},
            "health_check_period_s": 1,
            "health_check_timeout_s": 2,
        }
        chosen = kwargs if "--serve" not in sys.argv else None
        handle = deploy("drill", model, chosen)
        load = Load(handle)
        time.sleep(2.0)
        gcs = GcsClient(address=cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        gcs.drain_node(drained.node_id, reason, "spot notice", int(time.time() * 1000) + 15_000)
        time.sleep(1.0)
        until(20, lambda: running() == 4)
        try:
            cluster.remove_node(drained, allow_graceful=False)
        except AssertionError:  # its raylet has left by itself
            found["left"] = True
        time.sleep(1.0)
        found["errors_after_drain"] = list(load.errors)
        started(lambda: cluster.add_node(**worker))
        deploy("drill", model | {"num_replicas": 8}, chosen)  # so that both nodes have some
        until(40, lambda: running() == 8)
        calls = len(load.answered)
        cluster.remove_node(lost, allow_graceful=False)
        time.sleep(3.0)
        until(40, lambda: running() == 8)
        time.sleep(2.0)
        load.end()
        times = sorted(took for took, _ in load.answered)
        found |= {
            "errors": load.errors,
            "answered": len(load.answered),
            "answered_before_loss": calls,
            "p50_s": times[len(times) // 2],
            "longest_s": times[-1],
            "seconds": time.monotonic() - begun_s,
        }
        if "--serve" not in sys.argv:
            found["router"] = {
                k: v for k, v in router_of(handle).swarmx_status().items() if not k.startswith("decision_")
            }
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
