"""What the end of a request tells: how much work its answer was, in tokens, and what it says of the replica."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from swarmx.core.nouns import FailureReason

_BYTES_PER_TOKEN = 4.0
_COMPLETION_TOKENS = re.compile(r'"completion_tokens"\s*:\s*(\d+)')
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


class StreamedWork:
    """How much work a stream was, from its parts as they pass.

    What a part says of usage counts, the last one of them: Ray Serve LLM hands on a whole answer as a stream of one
    part. Otherwise a part is a token, and so is each event of a text of server-sent events, and each member of a list:
    Serve LLM gathers what comes within some milliseconds.
    """

    def __init__(self) -> None:
        self.parts = 0
        self.whole: float | None = None  # tokens, where the first part is an answer by itself: another may not follow
        self._tokens = 0
        self._said: float | None = None

    def add(self, part: Any) -> None:
        """The next part. Never raises: it may be of any type."""
        self.parts += 1
        try:
            for one in part if isinstance(part, list | tuple) else (part,):
                self._count(one)
            if self.parts == 1 and not isinstance(part, str | bytes | list | tuple):
                self.whole = self._said
        except Exception:  # noqa: BLE001
            self._tokens += 1

    def total(self) -> float | None:
        """Output tokens so far; None before the first."""
        if self._said is not None:
            return self._said
        return float(self._tokens) if self._tokens else None

    def _count(self, one: Any) -> None:
        if isinstance(one, str) and one.startswith("data:"):
            self._tokens += one.count("data: {")
            if found := _COMPLETION_TOKENS.findall(one):
                self._said = float(found[-1]) or self._said
            return
        self._tokens += 1
        if not isinstance(one, str | bytes | bytearray) and (work := work_of(one)) is not None:
            self._said = work


def outcomes(error: object) -> FailureReason | None:
    """What the end of a request says of its replica; None for an answer."""
    if not isinstance(error, BaseException):
        return None
    name = type(error).__name__
    names: Mapping[str, FailureReason] = {"ActorDiedError": "replica_gone", "ActorUnavailableError": "connection_lost"}
    return names.get(name, "rejected")
