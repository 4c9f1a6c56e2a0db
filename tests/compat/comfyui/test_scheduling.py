"""Who goes where next: residency, speed, order, shares; with forecasts that are told, not learnt."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from swarmx.compat.comfyui.forecasts import JobFacts, JobForecaster, ServerState
from swarmx.compat.comfyui.jobs import Job
from swarmx.compat.comfyui.scheduling import Placement, Scheduler, Waiting
from swarmx.core.forecast import Forecast, from_samples, point
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import SAMPLERS, graph, node_info
from tests.compat.comfyui.fronts import front

_NUMBERS = itertools.count(1)
BOTH = frozenset({"a", "b"})


class Told:
    """Seconds by server, and what a load takes."""

    def __init__(self, seconds: dict[str, float], *, load_s: float = 0.0) -> None:
        self.seconds, self.load_s = seconds, load_s

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        mean = self.seconds.get(server.name, 1.0) + self.load_s * len(server.to_load(facts))
        return from_samples([0.9 * mean, mean, 1.1 * mean], unit="s")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        pass


class Stepwise:
    """A second for each evaluation of the network, on any server."""

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        return point(facts.nodes["3"].work.amounts[0], unit="s")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        pass


class Learns:
    """A hundred seconds for every job until one has ended, and one from then on."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        return point(self.seconds, unit="s")

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        self.seconds = 1.0


def waiting(
    *,
    tenant: str = "t",
    model: str = "tiny.safetensors",
    able: frozenset[str] = BOTH,
    priority: int = 0,
    steps: int = 4,
    number: float | None = None,
    since_s: float = 0.0,
) -> Waiting:
    seq = next(_NUMBERS)
    job = Job(
        prompt_id=f"job{seq}",
        tenant=tenant,
        client_id=None,
        number=float(seq) if number is None else number,
        seq=seq,
        priority=priority,
        graph=graph(seq, model=model, steps=steps),
        extra={},
        outputs=("9",),
        files=frozenset(),
        created_s=since_s,
    )
    return Waiting(job=job, able=able, since_s=since_s)


def scheduler(
    forecaster: JobForecaster,
    *,
    policy: str = "marginal",
    weights: dict[str, float] | None = None,
    by_ratio: bool = True,
) -> Scheduler:
    made = Scheduler(forecaster, policy=policy, weights=weights, by_ratio=by_ratio)
    for name in ("a", "b"):
        made.server(name, up=True)
    return made


def run(made: Scheduler, now_s: float = 0.0) -> Placement | None:
    """The next placement, begun."""
    placed = made.next(now_s)
    if placed is not None:
        made.started(placed.server, placed.waiting, placed.forecast, now_s)
    return placed


def test_an_idle_faster_server_is_chosen() -> None:
    made = scheduler(Told({"a": 5.0, "b": 1.0}))
    made.add(waiting())
    placed = run(made)
    assert placed is not None
    assert placed.server == "b"


def test_a_server_that_holds_the_model_is_worth_more_than_a_faster_one_that_has_to_load_it() -> None:
    made = scheduler(Told({"a": 1.2, "b": 1.0}, load_s=10.0))
    first = waiting(able=frozenset({"a"}))
    made.add(first)
    assert run(made) is not None
    made.ended("a", seconds=11.2)
    made.add(waiting())
    placed = run(made, 20.0)
    assert placed is not None
    assert placed.server == "a"
    assert placed.decision.candidates.terms_s["prefill_s"][1] == pytest.approx(9.8, rel=0.01)


def test_a_job_waits_for_a_fast_busy_server_rather_than_take_a_slow_idle_one() -> None:
    made = scheduler(Told({"a": 100.0, "b": 1.0}))
    made.add(waiting())
    assert run(made) is not None
    made.add(waiting())
    assert run(made, 0.5) is None
    made.ended("b", seconds=1.0)
    placed = run(made, 1.0)
    assert placed is not None
    assert placed.server == "b"


def test_a_job_that_only_a_busy_server_can_run_holds_up_nobody() -> None:
    made = scheduler(Told({}))
    only_a = frozenset({"a"})
    made.add(waiting(able=only_a))
    run(made)
    for _ in range(20):
        made.add(waiting(able=only_a))
    last = waiting(able=frozenset({"b"}))
    made.add(last)
    placed = run(made)
    assert placed is not None
    assert placed.waiting is last


def test_tenants_get_service_by_weight() -> None:
    made = scheduler(Told({}), weights={"big": 3.0}, policy="least_work")
    for _ in range(40):
        made.add(waiting(tenant="big"))
        made.add(waiting(tenant="small"))
    served = []
    for second in range(20):
        placed = run(made, float(second))
        assert placed is not None
        served.append(placed.waiting.job.tenant)
        made.ended(placed.server, seconds=1.0)
    assert served.count("big") == 15


def test_a_server_that_lost_the_job_is_asked_last() -> None:
    made = scheduler(Told({"a": 1.0, "b": 50.0}))
    again = waiting()
    again.tried, again.attempt = frozenset({"a"}), 1
    made.add(again)
    placed = run(made)
    assert placed is not None
    assert (placed.server, placed.decision.note, placed.decision.attempt) == ("b", "retry", 2)


@pytest.mark.parametrize("policy", ["marginal", "least_work", "round_robin", "swarmx_paper", "least_outstanding"])
def test_every_job_is_placed_once_under_any_policy(policy: str) -> None:
    made = scheduler(Told({"a": 1.0, "b": 2.0}), policy=policy)
    jobs = [waiting() for _ in range(30)]
    for each in jobs:
        made.add(each)
    placed, now_s = [], 0.0
    while len(made):
        now_s += 0.5
        while (found := run(made, now_s)) is not None:
            placed.append(found.waiting.job.prompt_id)
        for name, running in list(made.running.items()):
            if now_s - running.since_s >= 1.0:
                made.ended(name, seconds=1.0)
    assert sorted(placed) == sorted(each.job.prompt_id for each in jobs)


def order_of(made: Scheduler, jobs: list[Waiting]) -> list[Waiting]:
    """The order in which one server gets them at the second 100, once all wait."""
    for each in jobs:
        made.add(each)
    began = []
    while (placed := run(made, 100.0)) is not None:
        began.append(placed.waiting)
        made.ended(placed.server, seconds=1.0)
    return began


def test_a_short_job_passes_long_ones_that_have_waited_less_for_each_second_that_they_take() -> None:
    early, long = waiting(steps=40, since_s=0.0), waiting(steps=40, since_s=99.0)
    short, late = waiting(steps=2, since_s=99.5), waiting(steps=40, since_s=100.0)
    assert order_of(scheduler(Stepwise()), [long, late, short, early]) == [early, short, long, late]
    older = waiting(steps=2, since_s=90.0)
    assert order_of(scheduler(Stepwise()), [early, older]) == [older, early]


def test_without_ratios_the_first_that_came_goes_first() -> None:
    early, late = waiting(steps=40, since_s=99.0), waiting(steps=2, since_s=99.5)
    made = scheduler(Stepwise(), by_ratio=False)
    assert order_of(made, [late, early]) == [early, late]


def test_numbers_that_clients_give_are_kept_however_long_their_jobs_are() -> None:
    plain, last = waiting(steps=2), waiting(steps=1, number=1e6)
    second, first = waiting(steps=40, number=-1.0), waiting(steps=50, number=-2.0)
    assert order_of(scheduler(Stepwise()), [last, plain, second, first]) == [first, second, plain, last]


def test_a_forecast_is_made_anew_once_its_server_has_changed() -> None:
    made = scheduler(Told({"a": 100.0, "b": 1.2}, load_s=10.0))
    made.add(waiting())
    made.add(waiting())
    assert run(made) is not None
    assert run(made, 1.0) is None, "it waits for the fast server, where it would have to load the model"
    made.ended("b", seconds=11.2)
    placed = run(made, 11.2)
    assert placed is not None
    assert placed.forecast.mean == pytest.approx(1.2, rel=0.01)


def test_who_waits_since_nothing_was_known_is_forecast_anew_once_something_is() -> None:
    made = scheduler(Learns())
    made.add(waiting(able=frozenset({"a"})))
    made.add(waiting(able=frozenset({"b"})))
    assert run(made) is not None
    assert run(made) is not None
    made.add(waiting(able=frozenset({"b"})))
    assert made.expected_wait_s(0.0) == pytest.approx(150.0)
    made.ended("a", seconds=1.0)
    assert made.expected_wait_s(0.0) == pytest.approx(50.5), "what runs at b was taken to need 100 s, this job 1 s"


class Fails(Told):
    """Cannot tell what jobs with this many steps take, and learns of none."""

    def __init__(self, steps: int) -> None:
        super().__init__({})
        self.steps = steps

    def forecast(self, facts: JobFacts, server: ServerState) -> Forecast:
        if facts.nodes["3"].work.amounts[0] == 2.0 * self.steps:
            raise ZeroDivisionError("no forecast")
        return super().forecast(facts, server)

    def ended(self, facts: JobFacts, server: ServerState, seconds: float, nodes: Mapping[str, float]) -> None:
        raise ZeroDivisionError("no lesson")


def unreadable() -> Waiting:
    """A job with a text that cannot be written as JSON."""
    made = waiting()
    made.job.graph["6"]["inputs"]["text"] = "\ud800"
    return made


def test_a_job_whose_graph_cannot_be_read_runs_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    made, odd, plain = scheduler(Told({"a": 1.0, "b": 1.0})), unreadable(), waiting()
    assert order_of(made, [odd, plain]) == [plain, odd], "it is not taken to be short"
    assert odd.facts.only({"3"}) is odd.facts, "nor are its parts"
    assert odd.job.prompt_id in caplog.text


def test_a_job_that_cannot_be_forecast_runs_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    made, odd, plain = scheduler(Fails(7)), waiting(steps=7), waiting(steps=8)
    assert order_of(made, [odd, plain]) == [plain, odd]
    assert odd.job.prompt_id in caplog.text
    assert made.idle == BOTH, "that nothing is learnt of a job holds no server"


def test_a_job_that_cannot_be_placed_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    made, odd, plain = scheduler(Told({})), waiting(), waiting()
    odd.job = msgspec.structs.replace(odd.job, created_s=None)  # type: ignore[arg-type]
    made.add(odd)
    made.add(plain)
    placed = run(made)
    assert placed is not None
    assert placed.waiting is plain
    assert run(made, 1.0) is None
    assert caplog.text.count(f"{odd.job.prompt_id} cannot be placed") == 1


@pytest.mark.process
async def test_a_graph_that_is_odd_or_nested_deep_stops_nobody(tmp_path: Path) -> None:
    fake = FakeComfy()
    selector = node_info("Selector", {"sampler_name": [SAMPLERS, {}]}, [SAMPLERS], module="custom_nodes.selector")
    fake.info["Selector"] = selector
    chosen = graph(1)
    chosen["20"] = {"class_type": "Selector", "inputs": {"sampler_name": "heun"}}
    chosen["3"]["inputs"]["sampler_name"] = ["20", 0]
    statuses = set()
    async with serving(fake), front(tmp_path, fake) as client:
        _, _, entry = await client.run(chosen)
        assert entry["status"]["status_str"] == "success"
        for depth in (100, *range(880, 1000)):  # up to what the interpreter can read at all
            nested = '{"a": ' * depth + "1" + "}" * depth
            body = json.dumps({"prompt": graph(depth), "prompt_id": str(uuid.uuid4())})
            nested = body.replace('"tiny"', f'"tiny", "more": {nested}')
            async with client.session.post(f"{client.url}/prompt", data=nested) as response:
                statuses.add(response.status)
        _, _, entry = await client.run(graph(2))
        assert entry["status"]["status_str"] == "success"
        _, queue = await client.ask("GET", "/prompt")
    assert queue["exec_info"]["queue_remaining"] == 0
    assert statuses == {200, 400}
