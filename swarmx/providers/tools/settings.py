"""The file of a tool replica: which tools it has, and within which bounds they run."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import RESULT_LIMIT_BYTES, ToolSpec
from swarmx.providers.tools.profile import Limits


def _network(text: str) -> str:
    ipaddress.ip_network(text)
    return text


Network = Annotated[str, AfterValidator(_network)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,47}$")]
Seconds = Annotated[float, Field(gt=0.0, le=3600.0, allow_inf_nan=False)]
Host = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*|\[[0-9a-f:]+\])$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]

ANYTHING: dict[str, Any] = {"type": "object"}


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Bounds(_Form):
    """How long and how much."""

    timeout_s: Seconds = 30.0
    idempotent: bool = False
    tenants: tuple[str, ...] = ()
    result_limit_bytes: int = Field(RESULT_LIMIT_BYTES, ge=1024, le=16 * 1024 * 1024)


class _Tool(_Bounds):
    """What every tool says about itself. `parameters` is the JSON Schema of its arguments."""

    name: Name
    description: str = Field(max_length=4000)
    parameters: dict[str, Any] = ANYTHING

    def spec(self, pool: str) -> ToolSpec:
        """The tool as it is offered."""
        return ToolSpec(
            name=self.name,
            description=self.description,
            parameters=self.parameters,
            pool=pool,
            timeout_s=self.timeout_s,
            idempotent=self.idempotent,
            tenants=self.tenants,
            result_limit_bytes=self.result_limit_bytes,
        )


class _Jailed(_Form):
    """What a program may use and see. `mounts` are laid into its root at the same place, read only."""

    memory_mb: int = Field(512, ge=16, le=65536)
    cpu_s: int = Field(60, ge=1, le=3600)
    processes: int = Field(64, ge=1, le=4096)
    open_files: int = Field(256, ge=16, le=65536)
    file_mb: int = Field(64, ge=1, le=4096)
    mounts: tuple[Path, ...] = ()
    environment: dict[Variable, str] = {}

    def limits(self) -> Limits:
        """The same in bytes."""
        return Limits(
            memory_bytes=self.memory_mb * 1024 * 1024,
            cpu_s=self.cpu_s,
            processes=self.processes,
            open_files=self.open_files,
            file_bytes=self.file_mb * 1024 * 1024,
        )

    @field_validator("mounts")
    @classmethod
    def _absolute(cls, mounts: tuple[Path, ...]) -> tuple[Path, ...]:
        for mount in mounts:
            if not mount.is_absolute() or mount == Path("/") or ".." in mount.parts:
                raise ValueError(f"{mount}: name a folder by its whole path, and not the root")
        return mounts


class CommandTool(_Tool, _Jailed):
    """A command: it reads the arguments as JSON from its standard input, and its output is the result.

    Without a shell. `output` says whether what it prints is text, or JSON.
    """

    argv: tuple[str, ...] = Field(min_length=1)
    output: Literal["text", "json"] = "text"


class PythonTool(_Tool, _Jailed):
    """A file with a function `main`, which is called with the arguments by name and returns the result."""

    file: Path
    python: Path = Path("/usr/bin/python3")


class HttpTool(_Tool):
    """Requests that a workflow may make: with one of the `methods`, to one of the `hosts` and `ports`.

    A host is a name, `*.example.org` for all below it, or `*` for every public one. `networks` are addresses that are
    allowed although they are not public. A header whose value is secret is named in `secret_headers` with the
    environment variable that holds it.
    """

    parameters: dict[str, Any] = Field(ANYTHING, exclude=True)
    hosts: tuple[Host, ...] = Field(min_length=1)
    ports: tuple[Port, ...] = (443,)
    schemes: tuple[Literal["https", "http"], ...] = ("https",)
    methods: tuple[Method, ...] = ("GET",)
    networks: tuple[Network, ...] = ()
    headers: dict[HeaderName, str] = {}
    secret_headers: dict[HeaderName, Variable] = {}

    @model_validator(mode="after")
    def _secrets_stay(self) -> HttpTool:
        if self.secret_headers and "*" in self.hosts:
            raise ValueError("secret_headers would go to any host: name the hosts")
        return self


class McpServer(_Bounds, _Jailed):
    """A server of the Model Context Protocol: a program in the sandbox (`argv`), or one at a `url`.

    A program has no network, like all that is in the sandbox: one that needs it is run elsewhere, behind a `url`.
    """

    name: Name
    argv: tuple[str, ...] = ()
    url: str = ""
    networks: tuple[Network, ...] = ()
    secret_headers: dict[HeaderName, Variable] = {}
    start_s: Seconds = 30.0
    cpu_s: int = Field(3600, ge=1, le=1_000_000)  # over its life, and not a call's
    only: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> McpServer:
        if bool(self.argv) == bool(self.url):
            raise ValueError("give either argv, a program to run, or the url of a server")
        return self


class ToolSettings(_Form):
    """One tool replica: `slots` calls at a time, under the name `pool`."""

    pool: str = Field("tools", pattern=r"^[A-Za-z0-9][A-Za-z0-9:._-]{0,63}$")
    slots: int = Field(4, ge=1, le=99)
    waiting: int = Field(100, ge=0, le=10_000)
    bwrap: str = "bwrap"
    command: tuple[CommandTool, ...] = ()
    python: tuple[PythonTool, ...] = ()
    http: tuple[HttpTool, ...] = ()
    mcp: tuple[McpServer, ...] = ()

    @model_validator(mode="after")
    def _one_of_each(self) -> ToolSettings:
        tools: tuple[CommandTool | PythonTool | HttpTool, ...] = (*self.command, *self.python, *self.http)
        names = [tool.name for tool in tools] + [server.name for server in self.mcp]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tools or servers have one name: {', '.join(twice)}")
        return self


def parse(text: str, *, where: str) -> ToolSettings:
    """Read TOML. Raises ConfigError with every mistake."""
    try:
        return ToolSettings.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        raise ConfigError(f"{where}: {'; '.join(found)}") from None


def load(path: Path) -> ToolSettings:
    """Read the file. Raises ConfigError."""
    try:
        return parse(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
