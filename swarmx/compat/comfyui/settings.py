"""How a front is set up: a TOML file, or the options of `swarmx comfy`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarmx.config import is_loopback
from swarmx.core.errors import ConfigError

Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_URL = r"^https?://[^\s/?#@]+(/[^\s?#]*)?$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """One ComfyUI server, under `[[servers]]`."""

    name: str = Field(description="Its name, unique; file names that it makes begin with it.", pattern=_NAME)
    url: str = Field(description="Where it listens. It should be reachable for this front only.", pattern=_URL)


class TenantSettings(_Section):
    """What a tenant is owed and may take, under `[tenants.NAME]`."""

    weight: float = Field(1.0, gt=0.0, le=1000.0, description="Its share of the servers, next to others that wait.")
    priority: int = Field(0, ge=-10, le=10, description="The highest priority that its jobs may have.")
    max_waiting: int = Field(1000, ge=1, description="Jobs of it that may wait; further ones are answered 429.")
    max_waiting_bytes: int = Field(
        256 << 20, ge=1024, description="What the requests of those may come to; further ones are answered 429."
    )
    max_uploads: int = Field(10_000, ge=1, description="Files that it may have uploaded; more are answered 429.")
    max_uploaded_bytes: int = Field(
        10 << 30, ge=1024, description="What they may come to; a file that alone is larger is answered 413."
    )
    max_outputs: int = Field(
        100_000, ge=1, description="Files that its jobs may have made; further jobs are answered 429."
    )
    max_output_bytes: int | None = Field(
        None, ge=1, description="What those may come to; servers are asked for sizes where it is given."
    )


class FrontSettings(_Section):
    """The whole front. Times in seconds."""

    servers: tuple[ServerSettings, ...] = Field(min_length=1, description="The ComfyUI servers.")
    host: str = Field("127.0.0.1", description="Address to listen on. Beyond loopback, put TLS in front.")
    port: int = Field(8188, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    auth: bool = Field(True, description="Whether clients need a key. Only a loopback address may do without.")
    allow: tuple[str, ...] = Field(
        ("*",), min_length=1, description="Node classes that clients may use; * is a wild card."
    )
    policy: str = Field("marginal", description="Routing policy.")
    parameters: dict[str, float] = Field(default_factory=dict, description="Parameters of the policy.")
    tenants: dict[str, TenantSettings] = Field(default_factory=dict, description="Tenants that are not as the default.")
    default_tenant: TenantSettings = Field(TenantSettings(), description="What tenants have that are not named.")
    max_waiting: int = Field(10_000, ge=1, description="Jobs that may wait in all; further ones are answered 429.")
    max_waiting_bytes: int = Field(
        1 << 30, ge=1024, description="What the requests of all jobs that wait may come to; more are answered 429."
    )
    keep: int = Field(10_000, ge=1, description="Ended jobs that are kept.")
    keep_files_s: Seconds = Field(
        30 * 86_400.0, description="Outputs are forgotten so long after they were made, uploads after their last use."
    )
    split: bool = Field(True, description="Whether a graph may run in parts on several servers, where that pays.")
    split_classes: tuple[str, ...] = Field(
        (),
        description="Further classes that such a graph may have: custom nodes, and outputs that leave more than files.",
    )
    audit: bool = Field(True, description="Whether decisions are noted in an audit log, audit.jsonl beside the jobs.")
    attempts: int = Field(2, ge=1, le=10, description="Servers that a job may be lost with before it is given up.")
    poll_s: Seconds = Field(1.0, description="How often a server that says nothing is asked about its job.")
    timeout_s: Seconds = Field(10.0, description="How long a server may take for an answer.")
    lost_after_s: Seconds = Field(30.0, description="A server that says nothing for so long has lost its job.")
    refused_after_s: Seconds = Field(3.0, description="The same, where nothing listens at its address any more.")
    stall_s: Seconds = Field(1800.0, description="A job without progress for so long is stopped and run elsewhere.")
    refresh_s: Seconds = Field(60.0, description="How often a server is asked what it can run.")
    max_prompt_bytes: int = Field(16 << 20, ge=1024, description="Longest request with a graph.")
    max_upload_bytes: int = Field(100 << 20, ge=1024, description="Largest file that clients may upload.")

    @model_validator(mode="after")
    def _unique(self) -> FrontSettings:
        names = [server.name for server in self.servers]
        if len(set(names)) != len(names):
            raise ValueError(f"servers need different names, got {', '.join(names)}.")
        if len({server.url.rstrip("/") for server in self.servers}) != len(names):
            raise ValueError("servers need different URLs: one would be taken for two.")
        if not self.auth and not is_loopback(self.host):
            raise ValueError(f"without keys only a loopback address may be listened on, not {self.host!r}.")
        return self

    def tenant(self, name: str) -> TenantSettings:
        """What the tenant is owed."""
        return self.tenants.get(name, self.default_tenant)


def load(path: Path | None, **changes: object) -> FrontSettings:
    """Read the file, if there is one; `changes` win. Raises ConfigError."""
    try:
        raw = tomllib.loads(path.read_text()) if path is not None else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as settings: {error}.") from None
    try:
        return FrontSettings.model_validate(raw | {key: value for key, value in changes.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ConfigError(f"{where}: {first['msg']}.") from None
