"""SwarmX's router inside Ray Serve against the routers that Serve ships, over replicas of unequal speed.

Real Ray Serve on this machine, one application after the other, each with the same four replicas (emulated engines of
different devices, sped up), the same workflows and the same arrivals; only the router in the config differs. A workflow
plans, reads three things at a time, and writes: five calls of one session. Needs `make setup-ray`:

    .venv-ray/bin/python -m eval.ray_serve --out DIR [--prompts FOLDER] [--count 300] [--rate 2.2] [--routers ...]

Without --prompts the lengths are drawn from lognormals and the prompts say nothing of them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eval.ray_serve_plan import (
    DEVICES,
    OURS,
    SLOTS,
    Asked,
    Planned,
    claims_of,
    parser_of,
    plan,
    row_of,
    seeds_of,
    truth_of,
)
from eval.result import Row, table, write_result

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "power_of_two": {},
    "round_robin": {"request_router_class": "ray.serve.experimental.round_robin_router:RoundRobinRouter"},
    "capacity_queue": {
        "request_router_class": "ray.serve.experimental.capacity_queue_router:CapacityQueueRouter",
        "request_router_kwargs": {"capacity_queue_actor_name": "capacity_queue"},
    },
    "prefix_aware": {
        "request_router_class": "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
        ":PrefixCacheAffinityRouter"
    },
    OURS: {"request_router_class": "swarmx.compat.ray_serve:Router"},
}
_QUEUE_ACTOR = {
    "name": "capacity_queue",
    "actor_class": "ray.serve.experimental.capacity_queue:CapacityQueue",
    "init_kwargs": {"acquire_timeout_s": 1.0, "token_ttl_s": 120.0},
    "actor_options": {"num_cpus": 0},
}
_HOOK = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "swarmx.compat.ray_serve.replica_hook.install"}


def config(router: str, truth: Path, *, time_scale: float, log_dir: Path) -> dict[str, Any]:
    """The application in the config file, with this router."""
    chosen = dict(ROUTERS[router])
    model: dict[str, Any] = {"name": "Model", "num_replicas": len(DEVICES), "max_ongoing_requests": SLOTS}
    if router == OURS:
        chosen["request_router_kwargs"] = {"workflow_idle_s": 4.0, "log_dir": str(log_dir)}
    if router == "capacity_queue":
        model["deployment_actors"] = [_QUEUE_ACTOR]
    if chosen:
        model["request_router_config"] = chosen
    args = {"truth": str(truth), "devices": list(DEVICES), "slots": SLOTS, "time_scale": time_scale}
    return {
        "name": f"eval-{router}",
        "route_prefix": f"/{router}",
        "import_path": "eval.ray_serve_app:build",
        "args": args,
        "runtime_env": {"env_vars": _HOOK} if router == OURS else {},
        "deployments": [model],
    }


def deploy(applications: Sequence[Mapping[str, Any]], *, patience_s: float = 180.0) -> dict[str, Any]:
    """Have these applications and no others; returns a handle of each one's model, by its name. Raises RuntimeError."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))
    names, ends_s = {str(each["name"]) for each in applications}, time.monotonic() + patience_s
    states: dict[str, str] = {}
    while time.monotonic() < ends_s:
        time.sleep(0.5)
        found = serve.status().applications
        states = {name: state.status.value for name, state in found.items()}
        if states == dict.fromkeys(names, "RUNNING"):
            return {name: serve.get_deployment_handle("Model", name) for name in names}
        if failed := [f"{n}: {found[n].message}" for n in names & states.keys() if states[n] == "DEPLOY_FAILED"]:
            raise RuntimeError(f"not deployed: {'; '.join(failed)}")
    raise RuntimeError(f"after {patience_s:g} s not everything runs, expected {sorted(names)}: {states}")


@contextmanager
def serving(**environment: str) -> Iterator[None]:
    """A Ray of its own with Serve, and this process as one that routes; `environment` are further variables."""
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # on their own machines replicas would not come after this process, either
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **environment,
    }
    import ray
    from ray import serve

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        gc.collect()
        gc.freeze()  # as Serve does in its proxies and replicas, which are where handles live otherwise
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


async def drive(handle: Any, planned: Sequence[Planned]) -> tuple[list[float | None], dict[str, int]]:
    """Run all workflows at their times; the seconds that each took (None for a failed one), and calls by device."""
    devices: dict[str, int] = dict.fromkeys(DEVICES, 0)
    begins_s = time.monotonic() + 0.5

    async def one(number: int, workflow: Planned) -> float | None:
        await asyncio.sleep(max(0.0, begins_s + workflow.at_s - time.monotonic()))
        session = handle.options(session_id=f"workflow-{number}")
        submitted_s = time.monotonic()
        try:
            for stage in workflow.stages:
                asked = [Asked(messages=messages, max_tokens=limit) for messages, _, _, limit in stage]
                for answer in await asyncio.gather(*[session.remote(request) for request in asked]):
                    devices[answer["device"]] += 1
        except Exception as error:  # noqa: BLE001  # counted, whatever it is
            print(f"workflow {number}: {error!r}")
            return None
        return time.monotonic() - submitted_s

    times = await asyncio.gather(*[one(number, workflow) for number, workflow in enumerate(planned)])
    return list(times), devices


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every router on the same workflows, and write the result."""
    wanted = parser_of("eval.ray_serve", __doc__, list(ROUTERS)).parse_args(arguments)
    wanted.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with serving(RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S="1.0"):
        for seed in seeds_of(wanted):
            planned = plan(wanted.count, wanted.rate, seed=seed, prompts=wanted.prompts)
            truth = wanted.out.resolve() / f"truth-{seed}.json"
            truth.write_text(json.dumps(truth_of(planned)))
            for router in wanted.routers:
                rows.append(_measure(router, planned, truth, wanted, seed))
                print(table([rows[-1]]), flush=True)
            truth.unlink()
    claims = claims_of(rows)
    command = "python -m eval.ray_serve" + (" --prompts FOLDER" if wanted.prompts else "")
    print(table(rows))
    print(f"Written: {write_result(wanted.out, command, rows, claims, seeds_of(wanted))}")


def _measure(router: str, planned: Sequence[Planned], truth: Path, wanted: argparse.Namespace, seed: int) -> Row:
    log_dir = wanted.out.resolve() / "decisions"
    [handle] = deploy([config(router, truth, time_scale=wanted.time_scale, log_dir=log_dir)]).values()
    times, devices = asyncio.run(drive(handle, planned))
    row = row_of(router, seed, times, devices, wanted.time_scale)
    row["load_average"] = os.getloadavg()[0]
    if router == OURS:
        status = handle._router._asyncio_router.request_router.swarmx_status()
        took_ms = np.array(status["decision_s"]) * 1e3
        row["decision_p50_ms"], row["decision_p99_ms"] = np.percentile(took_ms, (50, 99)).tolist()
        busy_ms = np.array(status["decision_busy_s"]) * 1e3
        row["busy_p50_ms"], row["busy_p99_ms"] = np.percentile(busy_ms, (50, 99)).tolist()
        added_ms = np.array(status["added_s"]) * 1e3
        row["added_p50_ms"], row["added_p99_ms"] = np.percentile(added_ms, (50, 99)).tolist()
        row["stood_in"], row["faults"] = status["stood_in"], status["faults"]
    return row


if __name__ == "__main__":
    main()
