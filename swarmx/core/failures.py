"""Why a piece of a workflow's work failed, in the words by which its author says what is worth another attempt."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

PassingCause = Literal["refused", "timeout", "replica", "invalid"]
Cause = Literal[PassingCause, "rejected", "deadline", "defect"]
PASSING: tuple[PassingCause, ...] = get_args(PassingCause)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. Only a `passing` cause is ever worth another attempt.

    refused: no replica could be had, or too much is going on. timeout: it took too long. replica: replicas broke down.
    invalid: the answer is of no use, another one may be. rejected: the engine does not take this request. deadline:
    there is no time left for it. defect: SwarmX itself failed.
    """

    cause: Cause
    error: str
    retry_after_s: float | None = None

    @property
    def passing(self) -> bool:
        return self.cause in PASSING
