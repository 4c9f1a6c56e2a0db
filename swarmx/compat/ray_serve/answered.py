"""How much work an answer was, in tokens, read from the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BYTES_PER_TOKEN = 4.0
_TEXTS = ("text", "content", "output", "generated_text", "answer", "response")


def work_of(answer: Any) -> float | None:
    """Output tokens: what its `usage` says, or a fourth of its text; None where there is neither. Never raises: an
    answer may be of any type, and looking at it must not lose it."""
    try:
        return _work_of(answer)
    except Exception:  # noqa: BLE001
        return None


def _work_of(answer: Any) -> float | None:
    usage = _field(answer, "usage")
    tokens = _field(usage, "completion_tokens") if usage is not None else None
    if isinstance(tokens, int | float) and not isinstance(tokens, bool) and tokens > 0:
        return float(tokens)
    if isinstance(answer, str):
        return max(1.0, len(answer) / _BYTES_PER_TOKEN)
    if isinstance(answer, bytes | bytearray):
        return max(1.0, len(answer) / _BYTES_PER_TOKEN)
    for name in _TEXTS:
        if isinstance(text := _field(answer, name), str):
            return max(1.0, len(text) / _BYTES_PER_TOKEN)
    return None


def _field(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name)
    return getattr(value, "__dict__", {}).get(name)
