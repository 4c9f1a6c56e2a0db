"""The demo's fleet with real language models: two vLLM servers on the CPU; the images stay emulated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from swarmx.providers.vllm import DEFAULT_MODEL, VllmProvider

NAME = "qwen2.5-coder-0.5b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Settings of a server over running replicas, what the workflows' models are called there, and a label."""

    settings: Mapping[str, Any]
    models: Mapping[str, str]
    label: str


@asynccontextmanager
async def vllm_fleet(folder: Path, model: Path | None, console: Console) -> AsyncIterator[Fleet]:
    """Two real servers, stopped again at the end."""
    provider = VllmProvider(model=model or DEFAULT_MODEL, name=NAME, count=2, logs=folder / "vllm")
    try:
        with console.status("Starting two vLLM servers on the CPU (about a minute)"):
            replicas = await provider.start()
        yield Fleet(
            settings={
                "emulation": {"time_scale": 1.0},
                "replicas": [{"id": r.replica_id, "model": r.model, "url": r.url, "device": "cpu"} for r in replicas],
                "emulated": [{"model": "sdxl", "device": "h100", "count": 1, "kind": "image"}],
            },
            models={"small": NAME, "large": NAME, "image": "sdxl"},
            label=(
                "Language models: [bold]real vLLM[/], two servers on this CPU; free text is cut short. "
                "Images: [bold]emulated[/]."
            ),
        )
    finally:
        await provider.stop()
