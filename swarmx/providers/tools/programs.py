"""Tools that are programs: commands and Python functions, each call a process in the sandbox."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolCall, ToolResult, ToolSpec
from swarmx.providers.tools import harness
from swarmx.providers.tools.jail import Ended, Inmate, Jail
from swarmx.providers.tools.pipes import read_some
from swarmx.providers.tools.profile import Program
from swarmx.providers.tools.settings import CommandTool, PythonTool
from swarmx.providers.tools.toolbox import over_limit

_STDERR_LIMIT_BYTES = 1024 * 1024
_STDERR_SHOWN = 2000
_HARNESS = "/tool/harness.py"
_FILE = "/tool/tool.py"


class _Flood(Exception):
    """A program wrote more than it may."""


class ProgramProvider:
    """A ToolProvider of commands and Python functions. Where there is no sandbox, none of them is ever run."""

    name = "sandbox"

    def __init__(self, tools: Sequence[CommandTool | PythonTool], *, pool: str, jail: Jail) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._specs = tuple(tool.spec(pool) for tool in tools)
        self._jail = jail
        self._files: dict[str, dict[str, bytes]] = {}

    async def open(self) -> None:
        """Make sure of the sandbox, and read the Python files. Raises ConfigError."""
        for name, tool in self._tools.items():
            if isinstance(tool, PythonTool):
                self._files[name] = {_HARNESS: _source(Path(harness.__file__)), _FILE: _source(tool.file)}
        await self._jail.open()

    async def close(self) -> None:
        """End the sandbox."""
        await self._jail.close()

    def tools(self) -> Sequence[ToolSpec]:
        """All of them, whether or not it is open."""
        return self._specs

    async def call(self, call: ToolCall) -> ToolResult:
        """Run the program of the tool."""
        tool = self._tools[call.tool]
        program = self._program(tool, call)
        limit = tool.result_limit_bytes
        try:
            async with self._jail.running(program) as inmate:
                output, errors = await _both(inmate, limit)
                ended = await inmate.wait()
        except _Flood:
            return over_limit(tool.name, limit)
        except OSError as error:
            return ToolResult(error=f"{tool.name} could not be started: {error}", cause="unavailable")
        if ended.status != 0:
            return _failure(tool, ended, errors)
        return _success(tool, ended, output)

    def _program(self, tool: CommandTool | PythonTool, call: ToolCall) -> Program:
        match tool:
            case CommandTool():
                argv: tuple[str, ...] = tool.argv
            case PythonTool():
                argv = (str(tool.python), "-I", "-B", _HARNESS, _FILE)
        limits = tool.limits()
        return Program(
            argv=argv,
            # Processors' time without end is of no use to who waits for a bounded time only.
            limits=msgspec.structs.replace(limits, cpu_s=min(limits.cpu_s, math.ceil(tool.timeout_s) * 4)),
            stdin=msgspec.json.encode(call.arguments),
            files=self._files.get(tool.name, {}),
            mounts=tool.mounts,
            environment={**tool.environment, "SWARMX_IDEMPOTENCY_KEY": call.key},
        )


async def _both(inmate: Inmate, limit_bytes: int) -> tuple[bytes, bytes]:
    """Everything that it writes, until both ends are closed. Raises _Flood when it is too much."""
    output = asyncio.create_task(_all(inmate.stdout, limit_bytes))
    errors = asyncio.create_task(_all(inmate.stderr, _STDERR_LIMIT_BYTES))
    try:
        await asyncio.gather(output, errors)
        return output.result(), errors.result()
    finally:
        output.cancel()
        errors.cancel()
        await asyncio.gather(output, errors, return_exceptions=True)


async def _all(descriptor: int, limit_bytes: int) -> bytes:
    found = bytearray()
    while chunk := await read_some(descriptor):
        found += chunk
        if len(found) > limit_bytes:
            raise _Flood
    return bytes(found)


def _failure(tool: CommandTool | PythonTool, ended: Ended, errors: bytes) -> ToolResult:
    said = errors.decode(errors="replace").strip()[-_STDERR_SHOWN:]
    if ended.status == 128 + signal.SIGXCPU:
        return _over(tool, f"used its {tool.cpu_s} s of processors' time", ended)
    if ended.status == 128 + signal.SIGXFSZ:
        return _over(tool, f"wrote a file of more than {tool.file_mb} MB", ended)
    if ended.status == 128 + signal.SIGKILL:
        return _over(tool, f"was killed, most likely over its {tool.memory_mb} MB of memory", ended)
    return ToolResult(
        error=f"{tool.name} ended with {ended.status}: {said or 'it said nothing'}", cause="tool", cpu_s=ended.cpu_s
    )


def _over(tool: CommandTool | PythonTool, what: str, ended: Ended) -> ToolResult:
    return ToolResult(error=f"{tool.name} {what}", cause="limit", cpu_s=ended.cpu_s)


def _success(tool: CommandTool | PythonTool, ended: Ended, output: bytes) -> ToolResult:
    if isinstance(tool, CommandTool) and tool.output == "text":
        return ToolResult(output=output.decode(errors="replace"), cpu_s=ended.cpu_s)
    try:
        return ToolResult(output=msgspec.json.decode(output), cpu_s=ended.cpu_s)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return ToolResult(error=f"{tool.name} did not print JSON: {error}", cause="tool", cpu_s=ended.cpu_s)


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the file of a Python tool cannot be read: {error}") from None
