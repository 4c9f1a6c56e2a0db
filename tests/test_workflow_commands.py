"""What the commands about workflows print."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from swarmx.workflow_commands import print_workflow

NODE = {
    "path": "send",
    "kind": "llm",
    "state": "ready",
    "started_at_s": None,
    "ended_at_s": None,
    "awaits": ["approve"],
}
ROW: dict[str, Any] = {
    "workflow_id": "wf-1",
    "state": "running",
    "created_at_s": 0.0,
    "ended_at_s": None,
    "nodes": [NODE],
    "signals": [{"name": "approve", "state": "awaited", "timeout_at_s": 60.0, "value": None}],
    "spent": {"steps": 2, "prompt_tokens": 1_200_000, "output_tokens": 34_567, "money": 0.25, "replica_s": 1.50000984},
    "budget": {"tokens": 2_000_000, "steps": None, "money": 1.0, "replica_s": None},
}


def printed(row: dict[str, Any]) -> str:
    out = io.StringIO()
    print_workflow(Console(file=out, width=200, no_color=True), row)
    return out.getvalue()


def test_a_workflow_is_printed_with_what_it_waits_for_and_what_it_used_up() -> None:
    text = printed(ROW)
    assert "ready (awaits approve)" in text
    assert "Signal approve: awaited" in text
    assert "Used up: 1,234,567 of 2,000,000 tokens, 2 steps, 0.25 of 1 money, 1.5 s of replicas" in text


def test_a_workflow_of_its_client_has_neither() -> None:
    text = printed({"workflow_id": "wf-2", "state": "running", "created_at_s": 0.0, "ended_at_s": None})
    assert "Used up" not in text
    assert "Signal" not in text
