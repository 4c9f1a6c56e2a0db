"""`Prefer: wait=N`: an answer that takes its time until the workflow has ended, or the client's patience has."""

from __future__ import annotations

import asyncio
import re
from contextlib import ExitStack

from starlette.requests import Request

from swarmx.core.errors import NotFound, Unavailable
from swarmx.core.ports import Store
from swarmx.core.records import TERMINAL, WorkflowRecord
from swarmx.runtime.changes import Changes, Watch
from swarmx.runtime.requests import BadRequest

LONGEST_S = 60
POLL_S = 1.0  # between looks at a workflow that another process may run
APPLIED = "preference-applied"
_SECONDS = re.compile(r"[0-9]{1,9}")


def wait_of(request: Request) -> int | None:
    """The seconds that the client prefers to wait, at most 60; None without such a wish. Raises BadRequest.

    Other preferences are none of this server's, and are ignored as RFC 7240 has it.
    """
    for value in request.headers.getlist("prefer"):
        for preference in value.split(","):
            name, _, seconds = preference.partition(";")[0].partition("=")
            if name.strip().lower() != "wait":
                continue
            seconds = seconds.strip().strip('"')
            if not _SECONDS.fullmatch(seconds):
                raise BadRequest(
                    f"Prefer: wait={seconds[:40]}: whole seconds were expected, such as wait=30.", param="prefer"
                )
            return min(int(seconds), LONGEST_S)
    return None


async def ended(
    store: Store, changes: Changes, workflow_id: str, tenant: str | None, *, within_s: float
) -> WorkflowRecord:
    """The workflow's record once it has ended, or as it is after that time. Raises NotFound.

    Where too many wait already, nobody waits: that the wish cannot be granted must not hide what was done.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + within_s
    with ExitStack() as stack:
        try:
            watch = stack.enter_context(changes.watching(workflow_id))
        except Unavailable:
            watch, until_s = Watch(), loop.time()
        while True:
            record = await store.workflow(workflow_id, tenant=tenant)
            if record is None:
                raise NotFound(f"there is no workflow {workflow_id!r}; `swarmx workflows` lists those that there are")
            left_s = until_s - loop.time()
            if record.state in TERMINAL or left_s <= 0.0 or changes.closed:
                return record
            await watch.wait(min(left_s, POLL_S))
