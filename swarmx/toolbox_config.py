"""The pools of tools that a settings file may name: replicas that are started here, or that somebody else runs."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from swarmx.replica_config import Section

POOL = r"^[A-Za-z0-9][A-Za-z0-9:._-]{0,63}$"


class ToolReplicasEntry(Section):
    """Replicas of tools, under `[[tools]]`: a number of them here with the tools of a file, or one at a URL."""

    file: Path | None = Field(
        None, description="File of the tools and of their pool's name, see docs/workflow_tools.md; they run here."
    )
    count: int = Field(1, ge=1, le=64, description="How many replicas of the file are started.")
    url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+(/[^\s]*)?$",
        description="Base URL of a replica that somebody else runs, in place of a file.",
    )
    id: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$", description="Name of the replica at the URL.")
    pool: str = Field("", pattern=f"^({POOL[1:-1]})?$", description="Name of the pool of the replica at the URL.")
    slots: int = Field(4, ge=1, le=99, description="Calls that the replica at the URL runs at a time.")
    token_variable: str = Field("", description="Environment variable that holds the token of the replica at the URL.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.file is None) == (self.url is None):
            raise ValueError("tools: give either file, whose tools run here, or the url of a replica.")
        if self.url is not None and not (self.id and self.pool and self.token_variable):
            raise ValueError("tools: a replica at a url needs id, pool and token_variable.")
        return self
