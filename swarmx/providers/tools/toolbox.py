"""All tools of one process by name: checks, times and bounds every call, whoever provides the tool."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolCall, ToolProvider, ToolResult, ToolSpec
from swarmx.core.words import near
from swarmx.workflows.arguments import Arguments

_LOG = logging.getLogger(__name__)
_ERROR_CHARACTERS = 2000


class Toolbox:
    """The tools of several providers; one that does not open does not stop the others.

    `now_s` is the time since 1970, on which deadlines are.
    """

    def __init__(self, providers: Sequence[ToolProvider], *, now_s: Callable[[], float] = time.time) -> None:
        names = [provider.name for provider in providers]
        if len(set(names)) < len(names):
            raise ConfigError(f"two tool providers have one name: {', '.join(sorted(names))}")
        self._providers = tuple(providers)
        self._now_s = now_s
        self._opened: list[ToolProvider] = []
        self._refused: dict[str, str] = {}
        self._checked: dict[str, tuple[ToolSpec, Arguments | str]] = {}

    @property
    def refused(self) -> dict[str, str]:
        """Why a provider did not open, by its name."""
        return dict(self._refused)

    async def open(self) -> None:
        """Open, at once, all providers that are not open; those that cannot are in `refused`, for another time."""

        async def one(provider: ToolProvider) -> None:
            try:
                await provider.open()
            except ConfigError as error:
                self._refused[provider.name] = str(error)
            else:
                self._refused.pop(provider.name, None)

        await asyncio.gather(*(one(provider) for provider in self._providers if provider not in self._opened))
        self._opened = [provider for provider in self._providers if provider.name not in self._refused]

    async def close(self) -> None:
        """Close all providers, those that are being opened too. Safe at any time."""
        self._opened = []
        await asyncio.gather(*(provider.close() for provider in self._providers))

    def tools(self) -> list[ToolSpec]:
        """Everything that can be called now."""
        return [spec for provider in self._opened for spec in provider.tools()]

    async def call(self, call: ToolCall) -> ToolResult:
        """Have the tool called, within its time and the call's deadline. Raises nothing but cancellation."""
        found = self._find(call.tool)
        if isinstance(found, ToolResult):
            return found
        provider, spec = found
        if spec.tenants and call.tenant not in spec.tenants:
            return self._unknown(call.tool)
        problem = self._problem(spec, call)
        if problem:
            return ToolResult(error=f"{call.tool}: {problem}"[:_ERROR_CHARACTERS], cause="refused")
        left_s = spec.timeout_s
        if call.deadline_at_s is not None:
            left_s = min(left_s, call.deadline_at_s - self._now_s())
        if left_s <= 0.0:
            return ToolResult(error=f"{call.tool}: its deadline has passed already", cause="timeout")
        began_s = time.perf_counter()
        result = await self._timed(provider, call, left_s)
        wall_s = time.perf_counter() - began_s
        return msgspec.structs.replace(_bounded(spec, result), wall_s=wall_s)

    def _find(self, tool: str) -> tuple[ToolProvider, ToolSpec] | ToolResult:
        for provider in self._opened:
            for spec in provider.tools():
                if spec.name == tool:
                    return provider, spec
        for provider in self._providers:
            reason = self._refused.get(provider.name)
            theirs = tool.startswith(f"{provider.name}.") or any(spec.name == tool for spec in provider.tools())
            if reason is not None and theirs:
                return ToolResult(error=f"{tool} is not offered here: {reason}", cause="refused")
        return self._unknown(tool)

    def _unknown(self, tool: str) -> ToolResult:
        names = [spec.name for spec in self.tools() if not spec.tenants]
        return ToolResult(error=f"there is no tool {tool[:80]!r}.{near(tool, names)}", cause="refused")

    def _problem(self, spec: ToolSpec, call: ToolCall) -> str:
        known = self._checked.get(spec.name)
        if known is None or known[0] != spec:
            try:
                arguments: Arguments | str = Arguments(spec.parameters)
            except ConfigError as error:
                arguments = str(error)
            self._checked[spec.name] = known = (spec, arguments)
        return known[1] if isinstance(known[1], str) else known[1].problem(call.arguments)

    async def _timed(self, provider: ToolProvider, call: ToolCall, left_s: float) -> ToolResult:
        try:
            async with asyncio.timeout(left_s):
                return await provider.call(call)
        except TimeoutError:
            return ToolResult(error=f"{call.tool} took longer than {left_s:.3g} s and was ended", cause="timeout")
        except Exception as error:  # noqa: BLE001  # a broken provider must not take the replica along
            _LOG.exception("the provider of %s failed", call.tool)
            return ToolResult(error=f"{call.tool}: its provider failed ({type(error).__name__})", cause="unavailable")


def _bounded(spec: ToolSpec, result: ToolResult) -> ToolResult:
    if result.cause:
        return msgspec.structs.replace(result, error=result.error[:_ERROR_CHARACTERS])
    try:
        size = len(msgspec.json.encode(result.output))
    except (TypeError, ValueError, RecursionError) as error:
        return ToolResult(error=f"{spec.name}: its output is not JSON: {error}", cause="tool", cpu_s=result.cpu_s)
    if size > spec.result_limit_bytes:
        return over_limit(spec.name, spec.result_limit_bytes, cpu_s=result.cpu_s)
    return result


def over_limit(tool: str, limit_bytes: int, *, cpu_s: float = 0.0) -> ToolResult:
    """The result of a call that answered too much."""
    return ToolResult(error=f"{tool} answered with more than {limit_bytes} bytes", cause="limit", cpu_s=cpu_s)
