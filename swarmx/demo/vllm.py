"""The demo's fleet with real language models: two vLLM servers on the CPU; the images stay emulated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from swarmx.core.nouns import ReplicaGroup
from swarmx.providers.process import CPU_PROFILE, DEFAULT_MODEL, ProcessProvider

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
    group = ReplicaGroup(
        group_id=f"{NAME}-cpu",
        model=NAME,
        kind="llm",
        device="cpu",
        provider="process",
        profile=msgspec.structs.replace(CPU_PROFILE, model=NAME),
        min_replicas=2,
        max_replicas=2,
        limit=2,
        start_s=60.0,
    )
    provider = ProcessProvider(models={group.group_id: model or DEFAULT_MODEL}, logs=folder / "vllm")
    try:
        with console.status("Starting two vLLM servers on the CPU (about a minute)"):
            replicas = await asyncio.gather(*(provider.deploy(f"vllm-{number}", group) for number in range(2)))
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
