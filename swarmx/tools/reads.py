"""Tools that only look: the cluster, a model, the reasons of a routing decision; and the choice to do nothing."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import BaseModel

from swarmx.core.control import ControlView
from swarmx.core.errors import NotFound
from swarmx.core.words import near
from swarmx.tools.catalogue import Catalogue
from swarmx.tools.facts import cost_rate, listed
from swarmx.tools.tool import STRICT, CallId, ModelName, ReadTool

_LAST = 10


class InspectCluster(BaseModel):
    """Arguments of inspect_cluster."""

    model_config = STRICT


class InspectModel(BaseModel):
    """Arguments of inspect_model."""

    model_config = STRICT
    model: ModelName


class WhyDecision(BaseModel):
    """Arguments of why_decision."""

    model_config = STRICT
    call_id: CallId


class NoOp(BaseModel):
    """Arguments of no_op."""

    model_config = STRICT


def _inspect_cluster(args: InspectCluster, view: ControlView) -> dict[str, Any]:
    return {
        "at_s": view.at_s,
        "window_s": view.window_s,
        "cost_rate": cost_rate(view),
        "workflows": {
            "running": view.workflows_running,
            "ended": view.workflows_ended,
            "p95_s": view.workflow_p95_s,
        },
        "routing": msgspec.to_builtins(view.routing),
        "scaling": msgspec.to_builtins(view.scaling),
        "models": msgspec.to_builtins(view.models),
        "alerts": msgspec.to_builtins(view.alerts[-_LAST:]),
        "open_proposals": [proposal.proposal_id for proposal in view.proposals if proposal.state == "open"],
    }


def _inspect_model(args: InspectModel, view: ControlView) -> dict[str, Any]:
    if args.model not in view.models:
        raise NotFound(
            f"there is no model {args.model!r}; there are {listed(view.models)}.{near(args.model, view.models)}"
        )
    replicas = [row for row in view.replicas.values() if row.model == args.model]
    names = {args.model} | {row.replica_id for row in replicas}
    plans = [plan for plan in view.plans if plan.model == args.model]
    return {
        "at_s": view.at_s,
        "model": msgspec.to_builtins(view.models[args.model]),
        "replicas": msgspec.to_builtins(replicas),
        "last_plan": msgspec.to_builtins(plans[-1]) if plans else None,
        "alerts": msgspec.to_builtins([alert for alert in view.alerts if alert.subject in names][-_LAST:]),
    }


def read_tools(catalogue: Catalogue) -> tuple[ReadTool[Any], ...]:
    """The tools that change nothing."""

    def why(args: WhyDecision, view: ControlView) -> dict[str, Any]:
        made = view.decisions.get(args.call_id, ())
        if not made:
            raise NotFound(f"no decision about the call {args.call_id!r} is kept; check the id")
        return {
            "call_id": args.call_id,
            "decisions": [
                {
                    "attempt": decision.attempt,
                    "at_s": decision.at_s,
                    "policy": decision.policy,
                    "replica_id": decision.replica_id,
                    "runner_up": decision.runner_up,
                    "why": catalogue.explain(decision),
                }
                for decision in made
            ],
        }

    return (
        ReadTool(
            name="inspect_cluster",
            help="Look at all models, the policies in force, workflows, cost, alerts and open proposals.",
            arguments=InspectCluster,
            read=_inspect_cluster,
        ),
        ReadTool(
            name="inspect_model",
            help="Look at one model: load, latency, bounds, replicas, the last scaling plan and alerts.",
            arguments=InspectModel,
            read=_inspect_model,
        ),
        ReadTool(
            name="why_decision",
            help="Say why a call went to the replica that it went to.",
            arguments=WhyDecision,
            read=why,
            calls=lambda args: (args.call_id,),
        ),
        ReadTool(
            name="no_op",
            help="Do nothing: all is well, or waiting is best.",
            arguments=NoOp,
            read=lambda args, view: {},
        ),
    )
