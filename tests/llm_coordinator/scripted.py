"""A language model that says what a test wrote down for it, and fails the test on any other turn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from swarmx.core.control import Prompt, Reply

FOREVER = "forever"  # a step that never answers


def says(tool: str, **arguments: Any) -> Reply:
    """A proper tool call."""
    return Reply(tool=tool, arguments=json.dumps(arguments), prompt_tokens=900, output_tokens=30, seconds=0.1)


class ScriptedModel:
    """Implements `core.ports.LanguageModel`. Used as a context: a step that nobody asked for fails the test as well."""

    name = "scripted"

    def __init__(self, *steps: Reply | str | Exception) -> None:
        self._steps = list(steps)
        self._unexpected: list[Prompt] = []
        self.asked: list[Prompt] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            assert not self._unexpected, f"{len(self._unexpected)} questions more than the script has answers for"
            assert not self._steps, f"nobody asked for {self._steps}"

    async def reply(self, prompt: Prompt, *, deadline_s: float) -> Reply:
        self.asked.append(prompt)
        if not self._steps:
            self._unexpected.append(prompt)
            return Reply(error="refused", detail="not in the script")
        match self._steps.pop(0):
            case Reply() as reply:
                return reply
            case Exception() as error:
                raise error
            case _:
                await asyncio.Event().wait()
                raise AssertionError("unreachable")


def tool_names(prompt: Prompt) -> Sequence[str]:
    return [tool["function"]["name"] for tool in prompt.tools]
