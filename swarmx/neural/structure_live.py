"""Forecasts of what the running workflows still have before them, kept up to date by the messages that agents hear."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from swarmx.core.errors import PredictorError
from swarmx.core.forecast import Forecast
from swarmx.core.messages import (
    CallCancelled,
    CallFailed,
    CallFinished,
    CallReady,
    DecisionMade,
    Message,
    WorkflowEnded,
    WorkflowSubmitted,
)
from swarmx.core.nouns import Call
from swarmx.neural.head import Floats, Head
from swarmx.neural.heads.fused import FusedHeads
from swarmx.neural.heads.remaining_memory import EVERY_MODEL, QUANTITIES, Recall, RemainingMemory, Trail
from swarmx.neural.heads.structure import SPECS, features, recalled_forecast, trusted
from swarmx.neural.heads.text_marks import marks_of
from swarmx.neural.heads.workflow_so_far import WorkflowSoFar
from swarmx.neural.net import Floats32
from swarmx.neural.tool_gaps import Gap, ToolGaps

MOST_RUNNING = 10_000
MOST_OPEN_CALLS = 256  # of one workflow that are followed
MOST_MODELS = 16  # of one workflow that are forecast apart

_PATH = QUANTITIES.index("path")
_Recalled = tuple[Recall, Recall, Recall]


class Remaining(msgspec.Struct, frozen=True, kw_only=True):
    """What a workflow still has before it.

    `calls` that have not arrived yet, of any model and `by_model`; `work`, the output tokens of calls that have not
    ended; `path`, the seconds to the end of its last call. `pause`, the seconds until the tools that its last answer
    asked for have come back; None where it waits for none, or nobody has seen any tool come back.
    """

    calls: Forecast
    work: Forecast
    path: Forecast
    by_model: dict[str, Forecast]
    pause: Forecast | None = None


@dataclass(slots=True, kw_only=True)
class _Open:
    """A call on its way; `failed` until somebody tries it again."""

    call: Call
    failed: bool = False


@dataclass(slots=True, kw_only=True)
class _Running:
    """A workflow as it was heard; of one that is `resumed` that is not all: its first calls went before a restart."""

    so_far: WorkflowSoFar
    resumed: bool
    trail: Trail = field(default_factory=Trail)
    calls: OrderedDict[str, _Open] = field(default_factory=OrderedDict)

    def silent_s(self, now_s: float) -> float:
        """Seconds without any news of it."""
        w = self.so_far
        return max(0.0, now_s - (w.submitted_at_s if w.last_at_s is None else w.last_at_s))


class WorkflowForecasts:
    """An observer of messages: `hear` them all, ask `remaining` at any time.

    It keeps a few numbers for each of `limit` workflows at most; the one that has been silent for longest makes room,
    and is not forecast any more. Without heads, or where a head's numbers cannot be used, the memory answers alone.
    """

    def __init__(
        self,
        heads: Mapping[str, Head] | None = None,
        memory: RemainingMemory | None = None,
        *,
        limit: int = MOST_RUNNING,
    ) -> None:
        self.memory = RemainingMemory() if memory is None else memory
        self.gaps = ToolGaps()
        self._limit = limit
        self._heads: dict[str, Head] = {}
        self._fused: FusedHeads | None = None
        self._running: OrderedDict[str, _Running] = OrderedDict()
        self._workflow_of: dict[str, str] = {}
        for quantity, head in (heads or {}).items():
            self.use(quantity, head)

    def __len__(self) -> int:
        return len(self._running)

    def use(self, quantity: str, head: Head) -> None:
        """Forecast "calls", "work" or "path" by this head from now on. Raises PredictorError for a foreign one."""
        if quantity not in SPECS:
            raise PredictorError(f"there is no quantity {quantity!r} of workflows; known are {', '.join(SPECS)}.")
        if head.spec.key != SPECS[quantity].key:
            raise PredictorError(
                f"the head {head.spec.name} has spec {head.spec.key}, remaining {quantity} needs {SPECS[quantity].key}."
            )
        self._heads[quantity] = head
        self._fused = FusedHeads(list(self._heads.values()))

    def hear(self, message: Message, now_s: float) -> None:
        """Take the message in; messages about unknown workflows or calls, and repeated ones, change nothing."""
        match message:
            case WorkflowSubmitted():
                self._submitted(message, now_s)
            case CallReady():
                self.call_ready(message.call, now_s)
            case DecisionMade():
                if (found := self._open(message.decision.call.call_id)) is not None and found[1].failed:
                    found[1].failed = False
                    found[0].so_far.call_retried()
            case CallFinished():
                self._finished(message, now_s)
            case CallFailed():
                # Whether it is tried again is the router's to decide: its decision will be heard.
                if (found := self._open(message.call_id)) is not None and not found[1].failed:
                    found[1].failed = True
                    found[0].so_far.call_failed(now_s)
            case CallCancelled():
                if (found := self._open(message.call_id)) is not None:
                    if not found[1].failed:
                        found[0].so_far.call_failed(now_s)
                    self._close(found[0], message.call_id)
            case WorkflowEnded():
                self._ended(message)
            case _:
                return

    def call_ready(self, call: Call, now_s: float) -> None:
        """A call of a workflow has come; whoever asks for `path` on its behalf says so before CallReady is heard."""
        running = self._running.get(call.workflow_id)
        if running is None or call.call_id in self._workflow_of:
            return
        self._running.move_to_end(call.workflow_id)
        running.so_far.call_arrived(
            role=call.role, model=call.model, prompt_tokens=float(call.prompt_tokens), at_s=now_s
        )
        running.trail.call_arrived(call.model)
        running.calls[call.call_id] = _Open(call=call)
        self._workflow_of[call.call_id] = call.workflow_id
        if len(running.calls) > MOST_OPEN_CALLS:
            self._close(running, next(iter(running.calls)))

    def prompt_read(self, workflow_id: str, text: bytes | str) -> None:
        """Whoever has the prompt of the workflow's newest call shows its end; a few marks of it are kept, no text."""
        if (running := self._running.get(workflow_id)) is not None:
            running.so_far.marked(marks_of(text))

    def answer_read(self, call: Call, tools: Sequence[str], now_s: float) -> None:
        """Whoever has the whole answer to the call says which tools it asks for (none: it is a message to read)."""
        if (running := self._running.get(call.workflow_id)) is not None:
            running.so_far.answered(tools[0] if tools else "")
            self.gaps.asked(call.workflow_id, call.prompt_key, tools, now_s)

    def tools_returned(self, call: Call, *, returns_tools: bool, now_s: float) -> Gap | None:
        """Whoever has the prompt of a call that came says whether it ends in a tool's result; returns what that took.

        Calls of a conversation share their prompt key: it is that of their first messages.
        """
        return self.gaps.called(call.workflow_id, call.prompt_key, returns_tools=returns_tools, now_s=now_s)

    def remaining(self, workflow_id: str, now_s: float) -> Remaining | None:
        """The forecast as of now; None for a workflow that is not running here, or was silent for too long."""
        running = self._running.get(workflow_id)
        if running is None:
            return None
        w = running.so_far
        ended = w.done + w.failed
        whole = self.memory.recall(w.kind, EVERY_MODEL, w.arrived, ended)
        models = list(dict.fromkeys((*w.models, *self.memory.models(w.kind))))[:MOST_MODELS]
        parts = [self.memory.recall(w.kind, model, w.arrived, ended) for model in models]
        row = features(w, whole, whole[0])
        rows = np.stack([row, *(features(w, part, whole[0], model=m) for m, part in zip(models, parts, strict=True))])
        forecasts = self._forecasts(rows, [whole, *parts], w.kind)
        calls, path = forecasts["calls"], forecasts["path"][0]
        pause = self.gaps.pause(workflow_id, now_s)
        return Remaining(
            calls=calls[0],
            work=forecasts["work"][0],
            path=_later(path, running.silent_s(now_s)),
            by_model=dict(zip(models, calls[1:], strict=True)),
            pause=None if pause is None else _later(*pause),
        )

    def path(self, workflow_id: str, now_s: float) -> Forecast | None:
        """The path of `remaining` alone, at a quarter of its price."""
        running = self._running.get(workflow_id)
        if running is None:
            return None
        w, found = running.so_far, None
        whole = self.memory.recall(w.kind, EVERY_MODEL, w.arrived, w.done + w.failed)
        if (head := self._heads.get("path")) is not None:
            known = np.array([whole[_PATH]])
            log_q = head.log_quantiles_of(features(w, whole, whole[0]), whole[_PATH].mean, w.kind)
            found = _sound(head, trusted(log_q[None], known, head.spec.softening), known)[0]
        return _later(found or recalled_forecast(whole, "path"), running.silent_s(now_s))

    def _forecasts(self, rows: Floats32, recalled: list[_Recalled], kind: str) -> dict[str, list[Forecast]]:
        """Of calls, work and path, one for each row; work and path are asked for the first row alone."""
        known = np.array(recalled).transpose(1, 0, 2)
        answers = {}
        log_q = None
        if self._fused is not None:
            places = [QUANTITIES.index(quantity) for quantity in self._heads]
            log_q = self._fused.log_quantiles(rows, known[places, :, 0], kind)
        for place, quantity in enumerate(QUANTITIES):
            count = len(rows) if quantity == "calls" else 1
            head = self._heads.get(quantity)
            if head is None or log_q is None:
                answers[quantity] = [recalled_forecast(one, quantity) for one in recalled[:count]]
                continue
            own = known[place, :count]
            q = trusted(log_q[list(self._heads).index(quantity), :count], own, head.spec.softening)
            answers[quantity] = [
                found or recalled_forecast(one, quantity)
                for found, one in zip(_sound(head, q, own), recalled, strict=False)
            ]
        return answers

    def _submitted(self, message: WorkflowSubmitted, now_s: float) -> None:
        if message.workflow_id in self._running:
            return
        # One that goes on after a restart counts from here as well: its pace is that of the calls that are heard.
        self._running[message.workflow_id] = _Running(
            so_far=WorkflowSoFar(kind=message.kind, submitted_at_s=now_s), resumed=message.submitted_at_s is not None
        )
        if len(self._running) > self._limit:
            silent_id, silent = self._running.popitem(last=False)
            self._let_go(silent)
            self.gaps.ended(silent_id)

    def _finished(self, message: CallFinished, now_s: float) -> None:
        found = self._open(message.call_id)
        if found is None:
            return
        running, opened = found
        call = opened.call
        if opened.failed:
            running.so_far.call_retried()
        tokens = message.work_done if call.kind == "llm" else 0.0
        running.so_far.call_finished(model=call.model, output_tokens=tokens, at_s=now_s)
        running.trail.call_ended(call.model, tokens, now_s - running.so_far.submitted_at_s)
        self._running.move_to_end(call.workflow_id)
        self._close(running, message.call_id)

    def _ended(self, message: WorkflowEnded) -> None:
        running = self._running.pop(message.workflow_id, None)
        if running is None:
            return
        self._let_go(running)
        self.gaps.ended(message.workflow_id)
        w = running.so_far
        if message.state == "finished" and w.arrived and not running.resumed:  # else it would teach half a workflow
            # A transparent workflow's end is announced after a silence: its last call is what counts.
            last_s = w.submitted_at_s if w.last_at_s is None else w.last_at_s
            self.memory.learn(w.kind, running.trail, ended_s=max(0.0, last_s - w.submitted_at_s))

    def _open(self, call_id: str) -> tuple[_Running, _Open] | None:
        running = self._running.get(self._workflow_of.get(call_id, ""))
        if running is None:
            return None
        opened = running.calls.get(call_id)
        return None if opened is None else (running, opened)

    def _close(self, running: _Running, call_id: str) -> None:
        running.calls.pop(call_id, None)
        self._workflow_of.pop(call_id, None)

    def _let_go(self, running: _Running) -> None:
        for call_id in running.calls:
            self._workflow_of.pop(call_id, None)


def _sound(head: Head, quantiles: Floats, recalled: Floats) -> list[Forecast | None]:
    """The head's forecasts, of quantiles [rows, K]; None where they cannot be used or nobody of the kind spoke."""
    usable = np.isfinite(quantiles).all(axis=1) & (recalled[:, 3] > 0.0)
    return [
        Forecast(
            levels=head.spec.levels,
            quantiles=tuple(row),
            unit=head.spec.unit,
            source="neural",
            version=head.version,
        )
        if good
        else None
        for row, good in zip(quantiles.tolist(), usable.tolist(), strict=True)
    ]


def _later(whole: Forecast, silent_s: float) -> Forecast:
    """What is left of a path or a pause of which `silent_s` have gone by without news."""
    if silent_s <= 0.0:
        return whole
    known = whole.given(silent_s)
    return msgspec.structs.replace(known, quantiles=tuple(max(0.0, q - silent_s) for q in known.quantiles))
