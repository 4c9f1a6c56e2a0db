"""Which tool an emulated model calls, and with which arguments: chosen by a hash, so that nobody can know it before."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

import msgspec

from swarmx.providers.emulated.schema import Schema, minimal
from swarmx.providers.emulated.truth import Answer, prompt_tokens
from swarmx.providers.emulated.wire import ApiError

CALLED_OF_FOUR = 3  # answers out of four that call a tool where the model is free to; the others end the loop


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """What a model may call; without `parameters` it takes none."""

    name: str
    parameters: Schema | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class _Name(msgspec.Struct, frozen=True):
    name: str


class Named(msgspec.Struct, frozen=True):
    """A `tool_choice` that leaves no choice."""

    type: Literal["function"]
    function: _Name


Choice = Literal["none", "auto", "required"] | Named


def tool_call(
    tools: Sequence[Tool], choice: Choice | None, *, text: str, model: str, seed: int, max_tokens: int
) -> Answer | None:
    """The call that answers this prompt; None for an answer in words. Raises ApiError for tools that cannot be called.

    The same prompt, model and seed always call the same tool, with the smallest arguments that its schema allows.
    """
    functions = [tool.function for tool in tools]
    if isinstance(choice, Named):
        wanted = choice.function.name
        functions = [function for function in functions if function.name == wanted]
        if not functions:
            raise ApiError(400, f"tool_choice names {wanted!r}, which is not among the tools.", param="tool_choice")
    draw = int.from_bytes(blake2b(f"{text}\x1f{model}\x1f{seed}".encode(), digest_size=8).digest())
    free = choice in (None, "auto")
    if not functions or choice == "none" or (free and draw % 4 >= CALLED_OF_FOUR):
        return None
    function = functions[draw // 4 % len(functions)]
    arguments = _arguments(function)
    tokens = prompt_tokens(function.name + arguments)
    pieces = [arguments[i * len(arguments) // tokens : (i + 1) * len(arguments) // tokens] for i in range(tokens)]
    whole = tokens <= max_tokens
    return Answer(pieces=pieces[:max_tokens], finish_reason="tool_calls" if whole else "length", tool=function.name)


def _arguments(function: Function) -> str:
    try:
        return msgspec.json.encode(minimal({"type": "object", **(function.parameters or {})})).decode()
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ApiError(
            400, f"The parameters of the tool {function.name!r} are no schema with an instance.", param="tools"
        ) from error
