"""Decisions that a router inside another system sends here."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarmx.agents.kept_view import FIXED
from swarmx.compat.ray_serve.decision_log import DecisionLog
from swarmx.core.fleet import MOVING
from swarmx.core.forecast import point
from swarmx.core.nouns import Candidates, Decision, KeptView
from tests.compat.ray_serve.test_desk import desk, ticket
from tests.e2e.fleet import Http, Server
from tests.gateway.whole import Whole, whole

pytestmark = pytest.mark.process


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Whole]:
    async with whole(tmp_path / "state", predictor={"engine": "empirical"}) as found:
        yield found


def decision(call_id: str, *, replica_id: str = "r0") -> Decision:
    at = desk()
    call = msgspec.structs.replace(ticket(at).call, call_id=call_id, tenant="somebody")
    at.close()
    return Decision(
        call=call,
        attempt=1,
        at_s=1.0,
        policy="marginal",
        parameters={},
        replica_id=replica_id,
        runner_up=None,
        forecast=point(100.0, unit="tokens"),
        candidates=Candidates(
            total=1,
            replica_ids=("r0",),
            in_flight=(0,),
            remaining_work=(0.0,),
            context_tokens=(0.0,),
            signal_age_s=(None,),
            cost_s=(1.0,),
            terms_s={},
        ),
    )


async def test_what_was_sent_is_explained_here_and_belongs_to_the_tenant_of_its_key(world: Whole) -> None:
    body = b"\n".join(msgspec.json.encode(decision(f"call-{number}")) for number in range(3))
    sent = await world.client("client").post("/api/v1/decisions", content=body)
    assert (sent.status_code, sent.json()) == (202, {"kept": 3})
    found = await world.client("client").get("/api/v1/calls/call-1/why")
    assert found.status_code == 200
    assert "told by the key" in found.text
    [kept] = await world.context.store.decisions("call-1", tenant=None)
    assert kept.call.tenant != "somebody"


@pytest.mark.parametrize(
    "body", [b"{}", b"not json", msgspec.json.encode(decision("c", replica_id="unknown")) + b"\n[]"], ids=repr
)
async def test_what_is_no_decision_is_refused_and_nothing_of_it_kept(world: Whole, body: bytes) -> None:
    refused = await world.client("client").post("/api/v1/decisions", content=body)
    assert refused.status_code == 400
    assert await world.context.store.decisions("c", tenant=None) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"in_flight": ()},
        {"signal_age_s": (None, None)},
        {"cost_s": ()},
        {"terms_s": {"queue_s": ()}},
        {"view": KeptView(chosen=bytes(4), moving=bytes(4 * len(MOVING)), fixed=bytes(4 * len(FIXED)), which=b"x")},
    ],
    ids=str,
)
async def test_what_could_not_be_explained_is_refused(world: Whole, changed: dict[str, Any]) -> None:
    sent = decision("c")
    broken = msgspec.structs.replace(sent, candidates=msgspec.structs.replace(sent.candidates, **changed))
    body = msgspec.json.encode(sent) + b"\n" + msgspec.json.encode(broken)
    refused = await world.client("client").post("/api/v1/decisions", content=body)
    assert refused.status_code == 400
    assert "line 2 is no decision" in refused.text
    assert await world.context.store.decisions("c", tenant=None) == []


async def test_too_many_at_once_are_refused(world: Whole) -> None:
    refused = await world.client("client").post("/api/v1/decisions", content=b"{}\n" * 1001)
    assert refused.status_code == 400


async def test_the_log_of_a_router_elsewhere_reaches_a_gateway(server: Server, http: Http) -> None:
    log = DecisionLog(path=None, url=server.url, token=server.token)
    log.write(decision("call-from-ray"))
    log.close()
    assert log.lost == 0
    found = await http.get("/api/v1/calls/call-from-ray/why")
    assert found.status == 200


def test_a_gateway_that_is_not_there_costs_the_decisions_and_nothing_else() -> None:
    log = DecisionLog(path=None, url="http://127.0.0.1:1")
    log.write(decision("call-1"))
    log.close()
    assert log.lost == 1
