"""What servers say of the jobs that run there: attempts hear it, and their clients are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swarmx.compat.comfyui.attempt import Run
from swarmx.compat.comfyui.events import event_of, prompt_of
from swarmx.compat.comfyui.files import Files, files_in, tagged
from swarmx.compat.comfyui.parts import Parts
from swarmx.compat.comfyui.relay import Relay

# Held back until the job's end is stored: a client that asks for its history then finds it.
_ENDS = frozenset({"execution_success", "execution_error", "execution_interrupted"})
_PASSED_ON = frozenset({"progress", "progress_state"})  # unread: most of what servers say


class Hearing:
    """`runs` are the jobs at the servers, by server. What is said of others is for nobody."""

    def __init__(self, *, runs: Mapping[str, Run], files: Files, parts: Parts, relay: Callable[[], Relay]) -> None:
        self._runs = runs
        self._files = files
        self._parts = parts
        self._relay = relay

    def event(self, server: str, kind: str, prompt_id: str | None, text: bytes) -> None:
        """The server says something of a job; `text` is the whole message."""
        run = self._runs.get(server)
        if run is None or prompt_id != run.job.prompt_id:
            return
        job = run.job
        if kind in _PASSED_ON and job.part is None:
            run.attempt.progressed()
            self._relay().forward(job.tenant, job.client_id, text, progress=f"{kind} {prompt_id}")
        elif (event := event_of(text)) is not None:
            self._said(run, server, *event, text)

    def binary(self, server: str, frame: bytes) -> None:
        """The server sends a preview."""
        run = self._runs.get(server)
        if run is not None and prompt_of(frame) in (None, run.job.prompt_id):
            self._relay().preview(run.job.tenant, run.job.client_id, self._parts.preview(run.job, frame))

    def _said(self, run: Run, server: str, kind: str, data: dict[str, Any], text: bytes) -> None:
        job = run.job
        run.attempt.heard(kind, data)
        if kind == "executed":
            data = data | {"output": tagged(server, data.get("output"))}
            self._files.made(job.tenant, files_in(data["output"]))
        if kind in _ENDS:
            run.held.append((kind, data))
        elif kind == "executing" and data.get("node") is None:
            return
        elif job.part is not None:
            self._parts.heard(job, kind, data)
        elif kind == "executed":
            self._relay().send(job.tenant, job.client_id, kind, data)
        else:
            self._relay().forward(job.tenant, job.client_id, text)
