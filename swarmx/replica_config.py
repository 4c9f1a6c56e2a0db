"""The replicas that a settings file may name: run by somebody else, emulated here, or started on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from swarmx.core.nouns import EngineOrder, Priorities
from swarmx.providers.vllm_command import GpuServing, refused_option

_OF_GPUS = ("command", "gpu_memory_utilization", "tensor_parallel_size", "max_model_len")
_ENGINE_ORDER = "Whom its engine admits first: by arrival, or by the priority that the router sends with each call."

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the settings file: unknown names in it are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StaticReplica(Section):
    """A server that somebody else runs, under `[[replicas]]`."""

    id: str = Field(description="Name of the replica, unique.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    model: str = Field(description="Model name, as clients ask for it and as the server knows it.")
    url: str = Field(description="Base URL, without /v1.", pattern=r"^https?://[^\s/]+(/[^\s]*)?$")
    kind: Literal["llm", "image"] = Field("llm", description="What it serves: chat completions or images.")
    device: str = Field("unknown", description="Device type, such as h100; sets the speed that the router assumes.")
    profile: str | None = Field(None, description="Fitted profile to use, if its model has another name than this.")
    priorities: Priorities = Field(
        "ignored",
        description="Whom its engine serves first by a request's `priority`: low_first (vLLM with --scheduling-policy "
        "priority), high_first (SGLang with --enable-priority-scheduling), or ignored, and then none is sent.",
    )

    @model_validator(mode="after")
    def _text_only(self) -> Self:
        if self.kind != "llm" and self.priorities != "ignored":
            raise ValueError("servers of images know no priorities; leave priorities out.")
        return self


class EmulatedReplicas(Section):
    """Replicas that are emulated on this machine, under `[[emulated]]`. For trying things out; no model runs."""

    model: str = Field(description="Model of a fitted profile, such as qwen3-8b or sdxl.")
    device: str = Field(description="Device of a fitted profile, such as h100.")
    count: int = Field(1, ge=1, le=64, description="How many of them.")
    kind: Literal["llm", "image"] = Field("llm", description="What they serve.")
    size_class: Literal["small", "8b", "32b", "70b"] = Field("8b", description="Length statistics of the answers.")
    slots: int | None = Field(None, ge=1, description="Calls that one runs at a time (vLLM's --max-num-seqs).")
    engine_order: EngineOrder = Field("arrival", description=_ENGINE_ORDER)

    @model_validator(mode="after")
    def _text_only(self) -> Self:
        if self.kind != "llm" and self.engine_order != "arrival":
            raise ValueError("servers of images serve in order of arrival; leave engine_order out.")
        return self

    def ids(self) -> list[str]:
        """The names of the replicas."""
        return [f"{self.model}-{self.device}-{number}" for number in range(self.count)]


class ElasticReplicas(Section):
    """Replicas that the scaler starts and stops, under `[[elastic]]`: one entry a model and device."""

    model: str = Field(description="Model name, as clients ask for it, or the pool of tools.")
    device: str = Field(
        description='Device type; with provider = "emulated" that of a fitted profile; of tools it is cpu; with '
        '"process" it is cpu, or words of the name of GPUs of this host, such as h100.'
    )
    provider: Literal["emulated", "process", "comfyui", "tools"] = Field(
        "emulated",
        description="Emulated replicas, real vLLM or ComfyUI servers that run as processes on this host, or replicas "
        "of tools.",
    )
    kind: Literal["llm", "image", "tool"] = Field("llm", description="What they serve; of tools it is tool.")
    size_class: Literal["small", "8b", "32b", "70b"] = Field("8b", description="Length statistics of emulated answers.")
    slots: int | None = Field(None, ge=1, description="Calls that one runs at a time (vLLM's --max-num-seqs).")
    engine_order: EngineOrder = Field("arrival", description=_ENGINE_ORDER)
    folder: Path | None = Field(
        None, description='Folder of the model, for provider = "process"; the checkout of ComfyUI for "comfyui".'
    )
    graph: Path | None = Field(None, description='Graph that makes the images, in API format, for "comfyui".')
    python: Path | None = Field(None, description="Interpreter that can run ComfyUI; SwarmX's own by default.")
    options: tuple[str, ...] = Field(
        (), description="Further options of ComfyUI's command line, such as --cpu, or of `vllm serve` on GPUs."
    )
    command: str = Field("vllm", description="Program that is vLLM for GPUs: a path, or a name on PATH.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0.0, le=1.0, description="Share of a GPU's memory that a vLLM takes; several fit on one GPU by theirs."
    )
    tensor_parallel_size: int = Field(1, ge=1, le=64, description="GPUs over which a vLLM spreads its model.")
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Longest prompt and answer together, in tokens, of a vLLM on GPUs; the model's by default.",
    )
    file: Path | None = Field(None, description='File of the tools, for provider = "tools"; its pool is the model.')
    min: int = Field(1, ge=0, le=64, description="Fewest replicas at the start.")
    max: int = Field(4, ge=0, le=64, description="Most replicas at the start; operators move both bounds.")
    limit: int = Field(8, ge=0, le=64, description="Most replicas that anybody can have.")
    start_s: Seconds = Field(
        60.0, description="First guess of the time to start one; emulated ones take it, in emulated seconds."
    )
    resources: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] = Field(
        {"CPU": 1.0},
        description="What one takes of a node with `swarmx up --on`, by Ray's names: CPU, GPU, memory or own ones.",
    )
    labels: dict[str, str] = Field({}, description="Labels that its node must have, with `swarmx up --on`.")

    @model_validator(mode="before")
    @classmethod
    def _of_tools(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("provider") == "tools":
            return {"kind": "tool", "device": "cpu", "start_s": 5.0, **data}
        if isinstance(data, dict) and data.get("provider") == "comfyui":
            return {"kind": "image", "start_s": 30.0, **data}
        return data

    @model_validator(mode="after")
    def _tools_only(self) -> Self:
        if (self.provider == "tools") != (self.kind == "tool"):
            raise ValueError('kind = "tool" goes with provider = "tools", and only with that.')
        if (self.provider == "tools") != (self.file is not None):
            raise ValueError('provider = "tools" needs file, the tools of each replica; others have none.')
        if self.provider == "tools" and (self.device != "cpu" or self.slots is not None):
            raise ValueError("tools run on device cpu, in as many slots as their file says; leave both out.")
        if self.provider == "tools" and self.min < 1:
            raise ValueError("a pool of tools begins with min = 1 at least: its replicas say which tools there are.")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.max <= self.limit:
            raise ValueError(f"min <= max <= limit must hold, got {self.min}, {self.max}, {self.limit}.")
        if self.provider == "process" and (self.folder is None or self.kind != "llm"):
            raise ValueError('provider = "process" needs folder, the model to serve, and serves text; leave kind out.')
        if self.provider == "process" and self.device == "cpu" and self.slots is not None:
            raise ValueError('provider = "process" serves 8 calls at a time on the CPU; leave slots out.')
        if self.provider == "comfyui" and (self.folder is None or self.graph is None):
            raise ValueError('provider = "comfyui" needs folder, a checkout of ComfyUI, and graph, what it is to run.')
        if self.provider == "comfyui" and (self.slots is not None or self.kind != "image"):
            raise ValueError('provider = "comfyui" serves images, one at a time; leave slots and kind out.')
        if self.provider != "comfyui" and (self.graph is not None or self.python is not None):
            raise ValueError('graph and python are for provider = "comfyui".')
        if self.options and self.provider != "comfyui" and not self.on_gpus:
            raise ValueError('options are for provider = "comfyui", and for "process" on GPUs.')
        if self.kind != "llm" and self.engine_order != "arrival":
            raise ValueError("servers of images and tools serve in order of arrival; leave engine_order out.")
        return self

    @model_validator(mode="after")
    def _gpus_only(self) -> Self:
        if self.on_gpus:
            wrong = refused_option(self.options)
            if wrong is not None:
                raise ValueError(f"options: {wrong}")
            return self
        given = [name for name in _OF_GPUS if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(
                f'{" and ".join(given)}: for provider = "process" on GPUs only, got device {self.device!r}.'
            )
        return self

    @property
    def on_gpus(self) -> bool:
        """Whether its replicas are vLLM servers on GPUs."""
        return self.provider == "process" and self.device != "cpu"

    @property
    def gpu_serving(self) -> GpuServing:
        """How these servers use their GPUs."""
        return GpuServing(
            device=self.device,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            max_model_len=self.max_model_len,
            slots=self.slots,
            command=self.command,
            options=self.options,
        )

    @property
    def group_id(self) -> str:
        """The name of the group, and the beginning of its replicas' names."""
        return f"{self.model}-{self.device}"
