"""The frozen splits: which prompts, models and sessions are for training, validation and test, by hash alone."""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

Split = Literal["train", "validation", "test"]
SplitBy = Literal["prompt", "model", "session", "task", "row"]

_TEST = 0.15
_VALIDATION = 0.10


def split_of(by: SplitBy, key: str) -> Split:
    """Where the thing belongs, whatever file it comes from: 15 % are test, 10 % validation.

    A row is a test row when any part of it is: its prompt (unseen prompts), its model (unseen models), or both. Frozen
    before the first training: a change here invalidates every number that was ever reported.
    """
    digest = sha256(f"{by}:{key}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < _TEST:
        return "test"
    return "validation" if place < _TEST + _VALIDATION else "train"
