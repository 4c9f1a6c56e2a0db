"""What a predictor reads of a prompt: its beginning and its end, bounded, and never kept."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

HEAD_BYTES = 4096
TAIL_BYTES = 4096


class PromptText(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The text of a conversation, its messages joined by line ends: at most `HEAD_BYTES` and `TAIL_BYTES` of it.

    `text` is UTF-8, cut between any two bytes; `total_bytes` is the size before cutting; `messages` and `tools` count
    what the request carries; it `returns_tools` when its last message is the result of a tool. It lives as long as
    the call waits for its encoding and is written nowhere.
    """

    text: bytes
    total_bytes: int
    messages: int = 1
    tools: int = 0
    returns_tools: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """An encoder's word on a prompt, [dimension] float32; reused by every later forecast of the call.

    `encoder` is the version of the encoder: heads that were trained on another one cannot read it.
    """

    encoder: str
    vector: NDArray[np.float32]


def cut(text: bytes, *, messages: int = 1, tools: int = 0) -> PromptText:
    """The prompt with its middle left out where it is too long."""
    if len(text) <= HEAD_BYTES + TAIL_BYTES:
        return PromptText(text=text, total_bytes=len(text), messages=messages, tools=tools)
    kept = text[:HEAD_BYTES] + text[-TAIL_BYTES:]
    return PromptText(text=kept, total_bytes=len(text), messages=messages, tools=tools)
