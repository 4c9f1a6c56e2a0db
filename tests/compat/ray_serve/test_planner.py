"""The scaler agent over a Serve deployment; no Ray in it."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from swarmx.compat.ray_serve.external import ExternalScaler, ServeRest
from swarmx.compat.ray_serve.planner import Planner, PlannerOptions, read_planner_options
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.messages import DemandReported


def planner(**options: Any) -> Planner:
    wanted = {"parameters": {"target_in_flight": 2.0}, "every_s": 1.0, "up_cooldown_s": 0.0, "down_cooldown_s": 5.0}
    return Planner("app/m", PlannerOptions(**{**wanted, **options}))


def step(of: Planner, now_s: float, calls: float, *, current: int, least: int = 1, most: int = 5) -> int:
    load = of.load(running=calls, waiting=0.0, window_s=1.0)
    return of.plan(now_s, current=current, target=current, least=least, most=most, demand=[load])


def test_more_calls_want_more_replicas_and_no_more_than_is_allowed() -> None:
    made = planner()
    assert step(made, 0.0, 2.0, current=1) == 1
    assert step(made, 1.1, 6.0, current=1) == 3
    assert step(made, 2.2, 600.0, current=3) == 5


def test_fewer_calls_want_fewer_replicas_once_they_have_been_few_for_a_while() -> None:
    made = planner()
    assert step(made, 0.0, 8.0, current=4) == 4
    assert step(made, 1.1, 0.0, current=4) == 4
    for tick in range(2, 12):
        left = step(made, tick * 1.1, 0.0, current=4)
    assert left == 1


def test_a_deployment_that_is_there_is_taken_over_as_it_is() -> None:
    made = planner()
    assert step(made, 0.0, 6.0, current=3) == 3


def test_new_bounds_hold_at_once() -> None:
    made = planner()
    step(made, 0.0, 8.0, current=4)
    assert step(made, 1.0, 8.0, current=4, most=2) == 2
    assert step(made, 2.0, 8.0, current=2, least=3, most=3) == 3


def test_options_are_read_strictly() -> None:
    assert read_planner_options({"start_s": 5}).start_s == 5.0
    for wrong in ({"start": 5}, {"policy": "no_such"}, {"parameters": {"x": 1.0}}, {"every_s": "often"}):
        with pytest.raises(ConfigError):
            read_planner_options(wrong)


class Serve(http.server.BaseHTTPRequestHandler):
    """The two endpoints of Serve's REST API, over one deployment."""

    replicas = 1
    allows = True

    def do_GET(self) -> None:
        replica = {"state": "RUNNING"}
        deployment = {"target_num_replicas": Serve.replicas, "replicas": [replica] * Serve.replicas}
        self._answer(200, {"applications": {"app": {"deployments": {"m": deployment}}}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not Serve.allows or self.path != "/api/v1/applications/app/deployments/m/scale":
            return self._answer(412, {"error": "external_scaler_enabled is not set"})
        Serve.replicas = body["target_num_replicas"]
        return self._answer(200, {})

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def rest() -> Iterator[ServeRest]:
    Serve.replicas, Serve.allows = 1, True
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield ServeRest(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def external(rest: ServeRest, calls: float, *, app: str = "app") -> ExternalScaler:
    made = planner()
    load = made.load(running=calls, waiting=0.0, window_s=1.0)
    return ExternalScaler(rest, made, app=app, deployment="m", least=1, most=4, demand=lambda: [load])


def test_an_external_scaler_tells_serve_what_the_agent_wants(rest: ServeRest) -> None:
    assert external(rest, 6.0).step(0.0) == 3
    assert rest.running("app", "m") == (3, 3)


def test_a_board_that_is_away_does_not_end_the_scaler(rest: ServeRest) -> None:
    def away() -> list[DemandReported]:
        raise RuntimeError("the actor died")

    scaler = ExternalScaler(rest, planner(), app="app", deployment="m", least=2, most=4, demand=away)
    assert scaler.step(0.0) == 2


def test_what_serve_does_not_allow_or_know_is_said_so(rest: ServeRest) -> None:
    Serve.allows = False
    with pytest.raises(ReplicaError, match="external_scaler_enabled"):
        external(rest, 6.0).step(0.0)
    with pytest.raises(ReplicaError, match="no deployment"):
        external(rest, 6.0, app="other").step(0.0)
    with pytest.raises(ReplicaError, match="dashboard"):
        ServeRest("http://127.0.0.1:1").running("app", "m")
    with pytest.raises(ConfigError):
        ServeRest("127.0.0.1:8265")
