"""What a failure means to its node: another attempt after a rest, or the end; by the author's `retry` and budgets."""

from __future__ import annotations

from swarmx.core.failures import Failure
from swarmx.workflows.events import NodeFailed, NodeRetried
from swarmx.workflows.nodes import ImageNode, LlmNode
from swarmx.workflows.state import Run


def after_failure(
    run: Run, path: str, failure: Failure, now_s: float, *, call_id: str | None = None
) -> NodeRetried | NodeFailed:
    """The event that follows from the failure of the attempt that is out. Times are Unix seconds.

    A retry never goes beyond the attempts of its node, the retries of its workflow, or the deadline; a replica that
    said when to come back is not asked before.
    """
    node = run.nodes[path].step.node
    attempt = run.nodes[path].attempt
    retry = node.retry if isinstance(node, LlmNode | ImageNode) else None
    why = failure.error
    if retry is not None and failure.cause in retry.on:
        rest_s = min(retry.max_s, retry.backoff_s * retry.factor ** (attempt - 1))
        not_before_s = now_s + max(rest_s, failure.retry_after_s or 0.0)
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
                reason=failure.cause,
                call_id=call_id,
            )
    return NodeFailed(path=path, error=why, call_id=call_id, reason=failure.cause)
