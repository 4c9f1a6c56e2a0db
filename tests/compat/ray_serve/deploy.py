"""Deploys the app of `apps` by a Serve config, as `serve deploy` does; the router is named there and nowhere else."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

ROUTER = "swarmx.compat.ray_serve:Router"
HOOK = "swarmx.compat.ray_serve.replica_hook.install"


def config(
    name: str, deployment: Mapping[str, Any], kwargs: Mapping[str, Any] | None, *, hook: bool = False
) -> dict[str, Any]:
    """One application of the config file; without `kwargs` the router is Serve's own."""
    model: dict[str, Any] = {"name": "Model", **deployment}
    if kwargs is not None:
        model["request_router_config"] = {"request_router_class": ROUTER, "request_router_kwargs": dict(kwargs)}
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "tests.compat.ray_serve.apps:app",
        "runtime_env": {"env_vars": {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": HOOK}} if hook else {},
        "deployments": [model],
    }


def deploy_all(applications: list[dict[str, Any]], *, patience_s: float = 90.0) -> None:
    """Deploy these applications, and no others; waits until they run."""
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))
    ends_s = time.monotonic() + patience_s
    while time.monotonic() < ends_s:
        time.sleep(0.25)
        now = serve.status().applications
        states = {a["name"]: now[a["name"]] for a in applications if a["name"] in now}
        if len(states) == len(applications) and all(s.status == "RUNNING" for s in states.values()):
            return
        for name, state in states.items():
            if state.status == "DEPLOY_FAILED":
                raise AssertionError(f"{name}: {state.message}")
    raise AssertionError(f"not running after {patience_s} s: {serve.status().applications}")


def deploy(name: str, deployment: Mapping[str, Any], kwargs: Mapping[str, Any] | None, *, hook: bool = False) -> Any:
    """Deploy one application; returns a handle of its model."""
    deploy_all([config(name, deployment, kwargs, hook=hook)])
    return serve.get_deployment_handle("Model", name)


def router_of(handle: Any) -> Any:
    """The router that this handle uses, once it was used."""
    return handle._router._asyncio_router.request_router
