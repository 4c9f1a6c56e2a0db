"""What an attempt at a node used up, from the answer's own word and the record of its call."""

from __future__ import annotations

from typing import Any

from swarmx.core.records import CallRecord, ModelResult
from swarmx.workflows.answers import usage_of
from swarmx.workflows.events import Spent
from swarmx.workflows.spending import Prices, used
from swarmx.workflows.work import Start, StartModelCall


def spent_by(call: Start, result: ModelResult, prices: Prices) -> Spent:
    """Tokens as the model counted them, else as its record has them; the seconds of the last replica that had it."""
    record = result.record
    replica_s = 0.0
    if record is not None and record.dispatched_at_s is not None:
        replica_s = max(0.0, record.ended_at_s - record.dispatched_at_s)
    if not isinstance(call, StartModelCall):
        return Spent(steps=1, replica_s=replica_s)
    if call.kind == "image":
        images = _images(result.answer)
        return used(call.model, prices, prompt_tokens=0, output_tokens=0, images=images, replica_s=replica_s)
    prompt_tokens, output_tokens = _tokens(result.answer, record)
    return used(call.model, prices, prompt_tokens=prompt_tokens, output_tokens=output_tokens, replica_s=replica_s)


def _tokens(answer: dict[str, Any] | None, record: CallRecord | None) -> tuple[int, int]:
    counted = usage_of((answer or {}).get("usage"))
    prompt_tokens, output_tokens = counted.get("prompt_tokens"), counted.get("completion_tokens")
    sent = record is not None and record.dispatched_at_s is not None
    if prompt_tokens is None:
        prompt_tokens = record.prompt_tokens if record is not None and sent else 0
    if output_tokens is None:
        output_tokens = int(record.work_done) if record is not None and sent else 0
    return prompt_tokens, output_tokens


def _images(answer: dict[str, Any] | None) -> int:
    made = (answer or {}).get("data")
    return len(made) if isinstance(made, list) else 0
