"""vLLM plugin: find the tool calls that Qwen2.5-Coder writes as bare JSON.

Its template asks for `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, but the model leaves the tags out, or
puts a Markdown fence or a stray `<|im_start|>` in their place, and vLLM's "hermes" parser then finds no call at all.
This parser puts the tags back and leaves the rest to "hermes". Runs in `.venv-vllm`, loaded by `serve.sh`.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
# (vLLM and its libraries live in their own environment)
import json
from collections.abc import Sequence
from typing import Any

import regex
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NOISE = regex.compile(r"(?:\s|```(?:json)?|<\|im_start\|>(?:assistant)?)*")
CALL_HEAD = regex.compile(NOISE.pattern + r'\{\s*"name"\s*:\s*"(?P<name>[^"]+)"')


def tag_calls(text: str, tools: set[str]) -> tuple[str, str]:
    """Split the bare calls off the front of a text.

    Returns:
        The complete calls, each between tags as the model wrote it, and the text behind them.
    """
    tagged = ""
    while (head := CALL_HEAD.match(text)) and head["name"] in tools:
        start = NOISE.match(text).end()
        try:
            call, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError:
            break
        if "arguments" not in call:
            break
        tagged += OPEN + text[start:end] + CLOSE
        text = text[end:]
    return tagged, text


@ToolParserManager.register_module("raw_json")
class RawJsonToolParser(Hermes2ProToolParser):  # type: ignore[misc]  # the base is unknown to mypy
    """The hermes parser, for a model that forgets the tags."""

    def extract_tool_calls(self, model_output: str, request: Any) -> Any:
        """Read the calls of a whole answer; one that `max_tokens` cut off stays text."""
        if OPEN not in model_output:
            tagged, _ = tag_calls(model_output, tool_names(request))
            model_output = tagged or model_output
        return super().extract_tool_calls(model_output, request)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> Any:
        """Read what a growing answer adds; text is held back while it may still turn out to be a call.

        "hermes" reads `current_text` from the start each time and sends what is new, so rewriting it is enough.
        """
        if OPEN not in current_text:
            tools = tool_names(request)
            tagged, rest = tag_calls(current_text, tools)
            head = CALL_HEAD.match(rest, partial=True)
            if head and not head.partial and head["name"] in tools:
                current_text = tagged + OPEN + rest[NOISE.match(rest).end() :]
            elif tagged:
                current_text = tagged
            elif head and head.partial:
                return None
        return super().extract_tool_calls_streaming(
            previous_text,
            current_text,
            delta_text,
            previous_token_ids,
            current_token_ids,
            delta_token_ids,
            request,
        )


def tool_names(request: Any) -> set[str]:
    """Return the names that a call may have, for chat requests (nested) and responses requests (flat)."""
    return {getattr(tool, "function", tool).name for tool in request.tools or []}
