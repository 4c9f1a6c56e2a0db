"""An external scaler for Serve: SwarmX's scaler agent outside of Serve, which tells it by its REST API.

    python -m swarmx.compat.ray_serve.external --app NAME --deployment NAME --max 8

The application needs `external_scaler_enabled: true` in the config file, and no autoscaling of its own. A cluster that
wants a token gets the one in RAY_AUTH_TOKEN.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from swarmx.compat.ray_serve.planner import Planner, PlannerOptions
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.messages import DemandReported

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class ServeRest:
    """What a scaler needs of Serve's REST API, at the `url` of the dashboard, with Ray's `token` if there is one."""

    def __init__(self, url: str = "http://127.0.0.1:8265", token: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a Ray dashboard; write http://HOST:PORT.")
        self._url = url.rstrip("/")
        self._token = token

    def running(self, app: str, deployment: str) -> tuple[int, int]:
        """How many replicas run, and how many Serve goes for. Raises ReplicaError."""
        found = self._ask("GET", "/api/serve/applications/")
        try:
            state = found["applications"][app]["deployments"][deployment]
        except KeyError:
            raise ReplicaError(f"Serve has no deployment {deployment!r} in an application {app!r}") from None
        ready = sum(replica["state"] == "RUNNING" for replica in state["replicas"])
        return ready, int(state["target_num_replicas"])

    def scale(self, app: str, deployment: str, replicas: int) -> None:
        """Have so many replicas. Raises ReplicaError, also where the application does not allow it."""
        path = f"/api/v1/applications/{quote(app, safe='')}/deployments/{quote(deployment, safe='')}/scale"
        self._ask("POST", path, {"target_num_replicas": replicas})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)  # noqa: S310
        if self._token:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310  # checked above
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            why = error.read()[:500].decode(errors="replace")
            if error.code == 412:
                why = "the application needs `external_scaler_enabled: true` in its config file"
            raise ReplicaError(f"{method} {path}: Serve answered {error.code}: {why}") from None
        except (OSError, ValueError) as error:
            raise ReplicaError(f"{method} {path}: {error}; is the dashboard of Ray at {self._url}?") from None


class ExternalScaler:
    """Asks, plans and tells, once a `step`. `demand` gives the reports that are new since it was asked last."""

    def __init__(
        self,
        rest: ServeRest,
        planner: Planner,
        *,
        app: str,
        deployment: str,
        least: int,
        most: int,
        demand: Callable[[], Sequence[DemandReported]],
    ) -> None:
        if not 0 <= least <= most:
            raise ConfigError(f"from {least} to {most} replicas is no range; write --min and --max with min <= max.")
        self._rest = rest
        self._planner = planner
        self._app, self._deployment = app, deployment
        self._least, self._most = least, most
        self._demand = demand

    def step(self, now_s: float) -> int:
        """How many replicas Serve goes for after this step. Raises ReplicaError."""
        current, target = self._rest.running(self._app, self._deployment)
        wanted = self._planner.plan(
            now_s, current=current, target=target, least=self._least, most=self._most, demand=self._reports()
        )
        if wanted != target:
            self._rest.scale(self._app, self._deployment, wanted)
            log.info(
                "%s/%s: %d replicas instead of %d (%s)",
                self._app,
                self._deployment,
                wanted,
                target,
                self._planner.terms,
            )
        return wanted

    def _reports(self) -> Sequence[DemandReported]:
        try:
            return self._demand()
        except Exception as error:  # noqa: BLE001  # the board of a cluster may be away for a while
            log.warning("no reports of %s/%s for now: %r", self._app, self._deployment, error)
            return []


def reports_of(name: str) -> Callable[[], Sequence[DemandReported]]:
    """What the routers of the deployment report, from the board of the cluster that this process is connected to."""
    import ray

    from swarmx.compat.ray_serve.board import find_board
    from swarmx.compat.ray_serve.signals import report_in

    seen: dict[str, float] = {}

    def fresh() -> Sequence[DemandReported]:
        found = []
        for data in ray.get(find_board().reports.remote(name), timeout=_TIMEOUT_S):
            report = report_in(data)
            if report.at_s > seen.get(report.router, 0.0):
                seen[report.router] = report.at_s
                found.append(report.demand)
        return found

    return fresh


def main(arguments: Sequence[str] | None = None) -> None:
    """Scale one deployment until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m swarmx.compat.ray_serve.external", description=__doc__)
    parser.add_argument("--app", required=True)
    parser.add_argument("--deployment", required=True)
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265")
    parser.add_argument("--ray", default="auto", help="address of the Ray cluster whose routers report")
    parser.add_argument("--min", type=int, default=1)
    parser.add_argument("--max", type=int, required=True)
    parser.add_argument("--calls-a-replica", type=float, default=2.0)
    wanted = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    import ray

    ray.init(address=wanted.ray, log_to_driver=False)
    name = f"{wanted.app}/{wanted.deployment}"
    options = PlannerOptions(parameters={"target_in_flight": wanted.calls_a_replica})
    scaler = ExternalScaler(
        ServeRest(wanted.dashboard, os.environ.get("RAY_AUTH_TOKEN", "")),
        Planner(name, options),
        app=wanted.app,
        deployment=wanted.deployment,
        least=wanted.min,
        most=wanted.max,
        demand=reports_of(name),
    )
    while True:
        try:
            scaler.step(time.time())
        except ReplicaError as error:
            log.warning("%s", error)
        time.sleep(options.every_s)


if __name__ == "__main__":
    main()
