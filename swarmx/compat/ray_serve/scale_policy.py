"""`ScalePolicy`: an autoscaling policy that a Serve config file names, deciding with SwarmX's scaler agent.

Serve ships this class by value to its controller, so SwarmX is imported where it is used: without it, Serve's own
policy decides.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from typing import Any

from ray.serve.autoscaling_policy import default_autoscaling_policy

_LOGGER = "ray.serve"
_READ_S = 1.0
_WINDOW_S = 1.0


class ScalePolicy:
    """Built once in the controller with the `policy_kwargs`, then asked every tenth of a second.

    The demand is what SwarmX's routers of the deployment report, with their outlook on workflows; without any, Serve's
    own counts of requests. Serve still applies its delays and bounds to the answer.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._given = kwargs
        self._planner: Any = None
        self._absent = False
        self._complained = False
        self._fresh: deque[Any] = deque(maxlen=64)
        self._reported_at_s = 0.0
        self._counted_at_s = 0.0

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        if not self._absent:
            try:
                return self._plan(ctx)
            except ImportError as error:
                self._absent = True
                self._complain(error)
            except Exception as error:  # noqa: BLE001  # a policy that raises stops all scaling of the controller
                self._complain(error)
        replicas, state = default_autoscaling_policy(ctx)
        return replicas, {**state, "swarmx": "default_autoscaling_policy"}

    def _plan(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        name = f"{ctx.app_name}/{ctx.deployment_name}" if ctx.app_name else ctx.deployment_name
        if self._planner is None:
            from swarmx.compat.ray_serve.planner import Planner, read_planner_options

            self._planner = Planner(name, read_planner_options(self._given))
            reading = threading.Thread(
                target=_read, args=(weakref.ref(self), name, self._fresh), name="swarmx demand", daemon=True
            )
            reading.start()
        now_s = ctx.current_time or time.time()
        demand = [self._fresh.popleft() for _ in range(len(self._fresh))]
        if not demand and now_s - max(self._counted_at_s, self._reported_at_s) >= _WINDOW_S:
            self._counted_at_s = now_s
            waiting = float(ctx.total_queued_requests or 0.0)
            running = max(0.0, float(ctx.total_num_requests) - waiting)
            demand = [self._planner.load(running=running, waiting=waiting, window_s=_WINDOW_S)]
        elif demand:
            self._reported_at_s = now_s
        wanted = self._planner.plan(
            now_s,
            current=ctx.current_num_replicas,
            target=ctx.target_num_replicas,
            least=ctx.capacity_adjusted_min_replicas,
            most=ctx.capacity_adjusted_max_replicas,
            demand=demand,
        )
        return wanted, {"swarmx": "scaler agent", **self._planner.terms}

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logging.getLogger(_LOGGER).warning("Serve's default_autoscaling_policy decides, SwarmX did not: %r", error)


def _read(policy: weakref.ref[ScalePolicy], name: str, fresh: deque[Any]) -> None:
    """On a thread, as long as there is the policy: what routers have put on the board since the last time."""
    import ray

    from swarmx.compat.ray_serve.board import find_board
    from swarmx.compat.ray_serve.signals import report_in

    seen: dict[str, float] = {}
    while policy() is not None:
        try:
            for data in ray.get(find_board().reports.remote(name), timeout=5.0):
                report = report_in(data)
                if report.at_s > seen.get(report.router, 0.0):
                    seen[report.router] = report.at_s
                    fresh.append(report.demand)
        except Exception as error:  # noqa: BLE001  # without reports, Serve's own counts do
            logging.getLogger(_LOGGER).debug("no reports of %s for now: %r", name, error)
        time.sleep(_READ_S)
