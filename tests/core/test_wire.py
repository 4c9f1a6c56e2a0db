"""The wire schema of messages and actions, and the page that documents it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from swarmx.core import actions, messages
from swarmx.core.actions import Action
from swarmx.core.messages import WIRE_VERSION, Envelope, Message
from swarmx.core.nouns import Candidates, Decision
from swarmx.core.scaling import ScalePlan
from swarmx.runtime.journal import Entry
from tests.agents.worlds import FORECAST, a_call, a_replica

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "messages.md"
CANDIDATES = Candidates(
    total=2,
    replica_ids=("a", "b"),
    in_flight=(0, 1),
    remaining_work=(0.0, 10.5),
    context_tokens=(0.0, 7.0),
    signal_age_s=(None, 0.5),
    cost_s=(1.0, None),
    terms_s={"wait_s": (0.0, 1.0)},
)
EXAMPLES: list[Message | Action] = [
    messages.CallReady(call=a_call("c"), forecast=FORECAST),
    messages.ForecastRefined(call_id="c", forecast=FORECAST),
    messages.FirstToken(call_id="c", attempt=1),
    messages.TokensProgressed(call_id="c", attempt=1, work_done=0.1),
    messages.CallFinished(call_id="c", attempt=1, prompt_tokens=3, cached_tokens=1, work_done=2.0),
    messages.CallFailed(call_id="c", attempt=1, reason="connect", retryable=True),
    messages.CallCancelled(call_id="c"),
    messages.ReplicaChanged(replica=a_replica("a"), state="draining"),
    messages.ReplicaChanged(replica=a_replica("a"), state="starting", group_id="m-cpu"),
    messages.DrainNoticed(replica_id="a", deadline_at_s=1e9 / 3),
    messages.DrainNoticed(replica_id="a", deadline_at_s=None),
    messages.SignalReported(replica_id="a", running=1, waiting=2, kv_usage=0.3, measured_at_s=1e9 / 3),
    messages.ServiceCurvePublished(
        replica_id="a",
        work=(64.0, 256.0),
        uncached=(0.0,),
        levels=(0.5, 0.9),
        completion_s=(1.0, 2.0, 3.0, 1e1 / 3),
        ttft_s=(0.1, 0.2),
        measured_at_s=1.5,
        version="latency-1",
    ),
    messages.ForecastScored(head="length", version="v", prompt_class="k/r", device="", loss=0.1, covered=True),
    messages.RetrainEnded(
        retrain_id="length-1", head="length", outcome="better", version="w", loss_before=0.2, loss_after=0.1
    ),
    messages.PredictorReady(head="length", version="w", previous="v"),
    messages.PolicyChanged(policy="random", parameters={"x": 1.5}),
    messages.WorkflowSubmitted(workflow_id="w", kind="report"),
    messages.WorkflowSubmitted(workflow_id="w", kind="report", target_s=60.0, submitted_at_s=1e9 / 3),
    messages.WorkflowEnded(workflow_id="w", state="cancelled"),
    messages.DemandReported(
        model="m",
        window_s=2.0,
        arrived=3,
        arrived_work=100.5,
        finished=1,
        in_flight=4,
        waiting=2,
        work_left=1e3 / 3,
        work_per_call=33.5,
        horizons_s=(2.0, 4.0),
        upcoming_mean=(0.1, 0.2),
        upcoming_p90=(0.5, 1.0),
        fresh_mean=(0.0, 1e-9),
    ),
    messages.BoundsChanged(model="m", min_replicas=0, max_replicas=3),
    messages.ScaleRequested(model="m", replicas=2, hold_s=60.0),
    messages.ScalingPolicyChanged(policy="static", parameters={"x": 1.5}),
    messages.ScalePlanned(
        plan=ScalePlan(
            model="m",
            at_s=1.0,
            policy="target_tracking",
            parameters={"target_in_flight": 8.0},
            have=1.0,
            wanted=2.5,
            target=3,
            min_replicas=1,
            max_replicas=4,
            horizon_s=12.0,
            terms={"calls": 20.0},
            deploys=("g-1", "g-2"),
            drains=(),
            reason="grow",
        )
    ),
    messages.TimerFired(key="answer:c"),
    messages.DecisionMade(
        decision=Decision(
            call=a_call("c"),
            attempt=1,
            at_s=1.0,
            policy="random",
            parameters={},
            replica_id="a",
            runner_up=None,
            forecast=FORECAST,
            candidates=CANDIDATES,
        )
    ),
    messages.AlertRaised(kind="breaker_opened", subject="a", value=3.0),
    actions.Dispatch(call_id="c", attempt=1, replica_id="a"),
    actions.Cancel(call_id="c", attempt=1, replica_id="a"),
    actions.Refuse(call_id="c", reason="failed", attempts=1, detail="x"),
    actions.StartTimer(key="k", at_s=0.1),
    actions.StopTimer(key="k"),
    actions.Deploy(replica_id="g-0", group_id="g"),
    actions.Drain(replica_id="g-0", deadline_at_s=2.5),
    actions.Cordon(replica_id="g-0", cordoned=True),
    actions.Retrain(retrain_id="length-1", head="length", keys=(("k/r", ""), ("other", "h100"))),
    actions.UsePredictor(head="length", version="w"),
]
EVERY_TYPE = get_args(Message) + get_args(Action)


def an_envelope(message: Any) -> Envelope:
    return Envelope(sender="world", epoch=1, seq=7, message=message, cause="router/1/6")


def test_there_is_an_example_of_every_message_and_action() -> None:
    assert {type(example) for example in EXAMPLES} == set(EVERY_TYPE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_everything_survives_the_wire(example: Any) -> None:
    entry = Entry(at_s=0.1, agent="router", heard=an_envelope(EXAMPLES[0]), answered=[example])
    assert msgspec.json.decode(msgspec.json.encode(entry), type=Entry) == entry
    if isinstance(example, Message):
        envelope = an_envelope(example)
        assert msgspec.json.decode(msgspec.json.encode(envelope), type=Envelope) == envelope


@pytest.mark.parametrize("example", [e for e in EXAMPLES if isinstance(e, Message)], ids=lambda e: type(e).__name__)
def test_a_field_of_a_newer_version_is_ignored(example: Any) -> None:
    raw = msgspec.to_builtins(an_envelope(example))
    raw["priority"] = raw["message"]["mood"] = {"new": [1]}
    assert msgspec.convert(raw, Envelope) == an_envelope(example)


def test_a_field_that_an_older_version_did_not_have_takes_its_default() -> None:
    raw = msgspec.to_builtins(an_envelope(messages.AlertRaised(kind="policy_failed", subject="a")))
    del raw["cause"], raw["version"], raw["message"]["value"]
    envelope = msgspec.convert(raw, Envelope)
    assert (envelope.cause, envelope.version) == ("", WIRE_VERSION)
    assert envelope.message == messages.AlertRaised(kind="policy_failed", subject="a", value=0.0)


def test_what_breaks_a_rule_of_its_type_does_not_get_in() -> None:
    raw = msgspec.to_builtins(an_envelope(EXAMPLES[0]))
    raw["message"]["forecast"]["quantiles"] = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, Envelope)


def test_an_envelope_is_named_by_sender_life_and_number() -> None:
    assert an_envelope(EXAMPLES[0]).ref == "world/1/7"


def test_no_two_messages_or_actions_share_a_name() -> None:
    names = [kind.__name__ for kind in EVERY_TYPE]
    assert len(names) == len(set(names))


def test_every_message_and_action_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    expected = [
        (kind.__name__, _first_line(kind), ", ".join(f"`{name}`" for name in kind.__struct_fields__))
        for kind in EVERY_TYPE
    ]
    assert rows == expected, f"{PAGE.name} should hold these rows"


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]
