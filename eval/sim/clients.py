"""The clients' side of a simulation: submits workflows, makes their calls ready, and sees each workflow to its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from eval.sim.flow import Flow, LiveCall
from eval.sim.forecasts import call_forecasts
from eval.sim.paths import Paths, Rest, mean_profiles, unloaded
from eval.workloads.plan import BLOCK_TOKENS, Workload
from swarmx.core.messages import (
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    Message,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.nouns import Call, FailureReason, Replica
from swarmx.core.prefixes import names_of_blocks

if TYPE_CHECKING:
    from eval.sim.world import World


class Clients:
    """All workflows. `left` have not ended, `live` are the calls that are ready and have not, by id."""

    def __init__(self, world: World, workload: Workload, fleet: Sequence[Replica], seed: int) -> None:
        settings = world.settings
        self.left = len(workload.workflows)
        self.live: dict[str, LiveCall] = {}
        self.refused: list[LiveCall] = []  # just now, by a router
        self._world = world
        self._workload = workload
        self._settings = settings
        self._forecasts = call_forecasts(settings.forecast, workload)
        self._paths = Paths(settings.path, settings.weights)
        self._profiles = mean_profiles(fleet)
        self._tokens = lognormal(settings.token_error, workload.calls, [seed, 2])
        self._owned = settings.ownership == "owned"

    def come(self, number: int, _: None) -> None:
        """The next workflow is submitted, and the one after it scheduled."""
        workflows, world = self._workload.workflows, self._world
        if number >= len(workflows):
            return
        planned = workflows[number]
        if planned.at_s > world.now_s:
            world.at(planned.at_s, self.come, number, None)
            return
        home = crc32(planned.workflow_id.encode()) % self._settings.routers
        deciders = tuple(dict.fromkeys(self._decider(home, call.model) for call in planned.calls))
        rest = Rest(unloaded=unloaded(planned, self._profiles))
        flow = Flow(planned=planned, number=number, home=home, deciders=deciders, rest=rest)
        flow.first = world.ledger.first[number]
        world.ledger.submitted(number, rest.unloaded.total_s)
        self._tell_all(flow, WorkflowSubmitted(workflow_id=planned.workflow_id, kind=planned.kind))
        for i, call in enumerate(planned.calls):
            if not call.after:
                self._due(flow, i)
        world.at(world.now_s, self.come, number + 1, None)

    def finished(self, live: LiveCall, message: CallFinished) -> None:
        """The answer is here: the calls behind it may go on."""
        if not live.is_at(message.attempt):
            return
        world, flow, position = self._world, live.flow, live.position
        live.ended = True
        del self.live[live.call_id], flow.live[position], flow.rest.ready_s[position]
        world.ledger.finished(live, world.now_s)
        self._forecasts.finished(flow.planned, live.planned)
        if self._paths.hears:
            self._paths.hear(message, world.now_s)
        world.tell(live.router, message)
        flow.left -= 1
        for i in flow.then[position]:
            flow.waits[i] -= 1
            if flow.waits[i] == 0:
                self._due(flow, i)
        if flow.left == 0:
            self._ended(flow, refused=False)

    def broke(self, live: LiveCall, why: tuple[int, FailureReason]) -> None:
        """The attempt failed; the router may try again elsewhere."""
        attempt, reason = why
        if not live.is_at(attempt):
            return
        live.placed = False
        retryable = not live.streamed and reason != "rejected"
        message = CallFailed(call_id=live.call_id, attempt=attempt, reason=reason, retryable=retryable)
        if self._paths.hears:
            self._paths.hear(message, self._world.now_s)
        self._world.tell(live.router, message)

    def give_up(self) -> None:
        """A call that cannot be had fails its workflow: what else runs of it is cancelled, the rest is never sent."""
        while self.refused:
            refused = self.refused.pop()
            flow = refused.flow
            refused.ended = True
            del self.live[refused.call_id], flow.live[refused.position]
            self._world.ledger.refusals += 1
            if flow.failed:
                continue
            flow.failed = True
            for live in list(flow.live.values()):
                if live in self.refused:
                    continue
                live.ended = True
                del self.live[live.call_id], flow.live[live.position]
                if live.announced is None:  # else the router does not know of it yet
                    message = CallCancelled(call_id=live.call_id)
                    if self._paths.hears:
                        self._paths.hear(message, self._world.now_s)
                    self._world.tell(live.router, message)
            self._ended(flow, refused=True)

    def _due(self, flow: Flow, position: int) -> None:
        """Nothing but its gap is before the call any more."""
        at_s = self._world.now_s + flow.planned.calls[position].gap_s
        flow.rest.ready_s[position] = at_s
        if at_s > self._world.now_s:
            self._world.at(at_s, self._ready, flow, position)
        else:
            self._ready(flow, position)

    def _ready(self, flow: Flow, position: int) -> None:
        """The gateway has the call, forecasts it and hands it to the router that decides."""
        if flow.failed:
            return
        world, settings = self._world, self._settings
        workflow, planned, number = flow.planned, flow.planned.calls[position], flow.first + position
        call_id = f"{workflow.workflow_id}/{position}"
        prompt_tokens = max(0, round(planned.prompt_tokens * self._tokens[number]))
        call = Call(
            call_id=call_id,
            tenant=workflow.tenant,
            kind=planned.kind,
            model=planned.model,
            role=planned.role,
            workflow_id=workflow.workflow_id,
            workflow_kind=workflow.kind,
            node=str(position),
            prompt_key="",
            prompt_bytes=4 * prompt_tokens,
            prompt_tokens=prompt_tokens,
            work_limit=planned.work_limit,
            stream=settings.stream and planned.kind == "llm",
            session=workflow.workflow_id if planned.kind == "llm" else "",
            prefix=names_of_blocks(planned.blocks[: planned.prompt_tokens // BLOCK_TOKENS]),
        )
        forecast = self._forecasts.of(workflow, planned)
        if self._paths.hears:
            self._paths.hear(CallReady(call=call, forecast=forecast), world.now_s)
        path = self._paths.of(workflow.workflow_id, flow.rest, position, world.now_s)
        live = LiveCall(
            flow=flow,
            position=position,
            number=number,
            call_id=call_id,
            planned=planned,
            router=self._decider(flow.home, planned.model),
            announced=CallReady(call=call, forecast=forecast, path=path),
        )
        flow.live[position] = self.live[call_id] = live
        world.ledger.ready(live, world.now_s)
        delay_s = settings.forecast_s + (settings.network_s if live.router != flow.home else 0.0)
        world.at(world.now_s + delay_s, self._announce, live, None)

    def _announce(self, live: LiveCall, _: None) -> None:
        message, live.announced = live.announced, None
        if message is not None and not live.ended:
            self._world.tell(live.router, message)

    def _ended(self, flow: Flow, *, refused: bool) -> None:
        self._world.ledger.ended(flow.number, self._world.now_s, refused=refused)
        self.left -= 1
        workflow_id = flow.planned.workflow_id
        self._tell_all(flow, WorkflowEnded(workflow_id=workflow_id, state="failed" if refused else "finished"))

    def _tell_all(self, flow: Flow, message: Message) -> None:
        """All routers that decide about calls of the workflow hear it, and the forecaster of workflows."""
        if self._paths.hears:
            self._paths.hear(message, self._world.now_s)
        for router in flow.deciders:
            self._world.tell(router, message)

    def _decider(self, home: int, model: str) -> int:
        return crc32(model.encode()) % self._settings.routers if self._owned else home


def lognormal(deviation: float, number: int, seed: list[int]) -> list[float]:
    """Factors with a median of 1; all are 1 for no deviation."""
    if deviation == 0.0:
        return [1.0] * number
    factors: list[float] = np.exp(deviation * np.random.default_rng(seed).standard_normal(number)).tolist()
    return factors
