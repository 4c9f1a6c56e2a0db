"""What a failure means to its node: another attempt after a rest, or the end; by the author's `retry` and budgets."""

from __future__ import annotations

from hashlib import sha256

from swarmx.core.failures import Failure
from swarmx.workflows.events import NodeFailed, NodeRetried, Spent
from swarmx.workflows.nodes import ImageNode, LlmNode, ToolNode, UseNode
from swarmx.workflows.state import Run


def after_failure(
    run: Run, path: str, failure: Failure, now_s: float, *, call_id: str | None = None, spent: Spent | None = None
) -> NodeRetried | NodeFailed:
    """The event that follows from the failure of the attempt that is out. Times are Unix seconds.

    A retry never goes beyond the attempts of its node, the retries of its workflow, or the deadline; a replica that
    said when to come back is not asked before. What failed at once does not come back at once: a rest is shorter, or
    longer than a replica asked for, by a share that looks random and is always the same for the same attempt.
    """
    node = run.nodes[path].step.node
    attempt = run.nodes[path].attempt
    unsure = failure.begun and failure.passing and not run.nodes[path].idempotent
    cause = "interrupted" if unsure else failure.cause
    retry = node.retry if isinstance(node, LlmNode | ImageNode | ToolNode | UseNode) else None
    why = failure.error
    if retry is not None and cause in retry.on:
        longest_s = min(retry.max_s, retry.backoff_s * retry.factor ** (attempt - 1))
        spread_s = longest_s * retry.jitter * _share(run, path, attempt)
        asked_s = 0.0 if failure.retry_after_s is None else failure.retry_after_s + spread_s
        not_before_s = now_s + max(longest_s - spread_s, asked_s)
        most = run.graph.spec.limits.retries
        if attempt >= retry.attempts:
            why += f"; it was attempted {attempt} times"
        elif run.retries >= most:
            why += f"; the workflow has used up its {most} retries"
        elif run.deadline_at_s is not None and not_before_s >= run.deadline_at_s:
            why += "; another attempt would come after the deadline"
        else:
            return NodeRetried(
                path=path,
                attempt=attempt,
                not_before_s=not_before_s,
                error=failure.error,
                reason=cause,
                call_id=call_id,
                spent=spent,
            )
    elif cause == "interrupted":
        why += "; it would be called again only if its `retry.on` had `interrupted`"
    return NodeFailed(path=path, error=why, call_id=call_id, reason=cause, spent=spent)


def _share(run: Run, path: str, attempt: int) -> float:
    """A number from 0 to 1, other for each attempt at each node of each workflow."""
    digest = sha256(f"{run.workflow_id}/{path}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
