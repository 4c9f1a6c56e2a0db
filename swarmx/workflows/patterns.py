"""Regular expressions of strangers, matched by RE2: time grows with the text in proportion, whatever the pattern.

Python's engine backtracks, and some patterns keep it busy with thirty characters for years (docs/adr/0031).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import re2

from swarmx.core.errors import WorkflowError
from swarmx.workflows.limits import PATTERN_CHARS, PATTERN_STEPS, PATTERN_WORK

_MEMORY_BYTES = 1 << 20  # of one compiled pattern with what it remembers of its matches
_SHOWN_CHARS = 80
_WHOLE = "patterns are those of RE2: look-around and back-references do not exist"
_CODE_POINT = re.compile(r"\\(?:u((?![dD][89a-fA-F])[0-9a-fA-F]{4})|.)", re.DOTALL)

_left: ContextVar[list[int]] = ContextVar("left")


def refused(pattern: str) -> str:
    """Why the pattern cannot be used, or nothing."""
    found = _compiled(pattern)
    return found if isinstance(found, str) else ""


def matches(pattern: str, text: str) -> bool:
    """Whether the pattern, which is not refused, is found anywhere in the text.

    Within `bounded_work`, raises WorkflowError once all that was matched is more than one check may cost.
    """
    expression = _compiled(pattern)
    data = text.encode("utf-8", "replace")
    left = _left.get(None)
    if left is not None:
        left[0] -= len(data) * expression.programsize
        if left[0] < 0:
            raise WorkflowError("there is more text than the patterns of the schema can be held against; bound it")
    return expression.search(data) is not None


@contextmanager
def bounded_work() -> Iterator[None]:
    """All matches inside have one bound together."""
    token = _left.set([PATTERN_WORK])
    try:
        yield
    finally:
        _left.reset(token)


@lru_cache(maxsize=128)
def _compiled(pattern: str) -> Any:
    """The compiled pattern, or why there is none."""
    shown = f"the pattern {pattern[:_SHOWN_CHARS]!r}"
    if len(pattern) > PATTERN_CHARS:
        return f"{shown} has {len(pattern)} characters, at most {PATTERN_CHARS} were expected"
    options = re2.Options()
    options.max_mem = _MEMORY_BYTES
    options.never_capture = True
    options.log_errors = False
    try:
        expression = re2.compile(_CODE_POINT.sub(_as_re2, pattern).encode("utf-8", "replace"), options)
    except re2.error as error:
        (reason,) = error.args
        return f"{shown} cannot be used: {reason.decode('utf-8', 'replace')}; {_WHOLE}"
    if expression.programsize > PATTERN_STEPS:
        return (
            f"{shown} takes {expression.programsize} steps when it is compiled, at most {PATTERN_STEPS} were expected"
        )
    return expression


def _as_re2(escape: re.Match[str]) -> str:
    r"""JSON Schema writes `\u20ac`, RE2 writes `\x{20ac}`; any other escape stays."""
    return f"\\x{{{escape[1]}}}" if escape[1] else escape[0]
