"""What a client raises: the server's own explanation (RFC 9457), nobody there, or a workflow that ended otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any

from swarmx.core.errors import SwarmXError

if TYPE_CHECKING:
    from swarmx.sdk.models import Workflow


class Unreachable(SwarmXError):
    """Nobody answered, or nobody who speaks this API, for as long as the client is patient."""


class Problem(SwarmXError):
    """The server did not do what it was asked for; the text is its own. Subclasses name the status.

    `where` is the field or node at fault, `rule` the rule that refused; either may be missing. `passing`: the same
    request may fare better later, at the earliest in `retry_after_s` where the server said so.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        where: str | None = None,
        rule: str | None = None,
        passing: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.where = where
        self.rule = rule
        self.passing = passing
        self.retry_after_s = retry_after_s


class BadRequest(Problem):
    """400: the request is not one of this API."""


class Unauthorized(Problem):
    """401: no token, or one that the server does not know."""


class Forbidden(Problem):
    """403: the token's role does not allow it."""


class NotFound(Problem):
    """404: there is no such thing, or it belongs to another tenant."""


class Conflict(Problem):
    """409: the state of things does not allow it; `rule` says what."""


class Outdated(Problem):
    """412: what you looked at has changed since."""


class Unprocessable(Problem):
    """422: a definition or an input cannot be accepted, or an idempotency key came with another request before."""


class Unavailable(Problem):
    """429 or 503: not now; the client has asked again for as long as it is patient."""


class ServerFailed(Problem):
    """Any other status: a defect of the server, or of what is between."""


class WorkflowEnded(SwarmXError):
    """A workflow failed or was cancelled, and has no outputs. `workflow` is all of it."""

    def __init__(self, workflow: Workflow) -> None:
        at = f" at {workflow.error_node}" if workflow.error_node else ""
        why = f"{at}: {workflow.error}" if workflow.error else ""
        super().__init__(f"the workflow {workflow.workflow_id} is {workflow.state}{why}")
        self.workflow = workflow


_PASSING = frozenset({429, 502, 503, 504})
_KINDS: dict[int, type[Problem]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: Outdated,
    422: Unprocessable,
    429: Unavailable,
    503: Unavailable,
}


def problem_of(status: int, headers: Mapping[str, str], body: Any) -> Problem:
    """The error that an answer stands for; `body` is decoded, or bytes if it is no JSON."""
    said: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    rule = said.get("rule")
    passing = status in _PASSING or (status == 409 and rule == "in_flight")  # its first one is still at work
    return _KINDS.get(status, ServerFailed)(
        status,
        str(said.get("detail") or f"status {status}: {body!r:.300}"),
        where=said.get("where"),
        rule=rule,
        passing=passing and headers.get("x-should-retry") != "false",
        retry_after_s=_seconds(headers.get("retry-after", "")),
    )


def _seconds(retry_after: str) -> float | None:
    """From now on; the header has seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
    except ValueError:
        return None
