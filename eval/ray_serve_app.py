"""The Serve app of `eval.ray_serve`: an emulated engine a replica, each on another device, and nothing of SwarmX's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
from ray import serve

from eval.ray_serve_plan import MODEL, Asked, key_of
from swarmx.core.engine import profiles
from swarmx.providers.emulated.pacing import PacedEngine


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=1)
class Model:
    """One replica: the device is the one of its rank, the length of each answer is in the file `truth`."""

    def __init__(self, truth: str, devices: list[str], slots: int, time_scale: float) -> None:
        rank = serve.get_replica_context().rank
        device = devices[int(getattr(rank, "rank", rank) or 0) % len(devices)]
        profile = profiles()[MODEL, device].scaled(time_scale)
        self._engine = PacedEngine(model=MODEL, profile=msgspec.structs.replace(profile, max_batch=slots))
        self._device = device
        self._truth: dict[str, list[int]] = json.loads(Path(truth).read_text())

    async def __call__(self, asked: Asked) -> dict[str, Any]:
        prompt_tokens, output_tokens = self._truth[key_of(asked.messages)]
        run = self._engine.submit(prompt_tokens=prompt_tokens, output_tokens=output_tokens, reason="stop")
        if run is None:
            raise ValueError(f"a prompt of {prompt_tokens} tokens does not fit")
        try:
            await run.finished
        except asyncio.CancelledError:
            self._engine.abort(run)
            raise
        return {"device": self._device, "usage": {"completion_tokens": output_tokens}}


def build(args: dict[str, Any]) -> Any:
    """The application, by the `args` of the config."""
    deployment: Any = Model
    return deployment.bind(args["truth"], args["devices"], int(args["slots"]), float(args["time_scale"]))
