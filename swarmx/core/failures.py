"""Why a piece of a workflow's work failed, in the words by which its author says what is worth another attempt."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

PassingCause = Literal["refused", "timeout", "replica", "invalid"]
Cause = Literal[PassingCause, "rejected", "deadline", "tool", "interrupted", "defect"]
PASSING: tuple[PassingCause, ...] = get_args(PassingCause)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. Only a `passing` cause is ever worth another attempt.

    refused: no replica could be had, or too much is going on. timeout: it took too long. replica: replicas broke down.
    invalid: the answer is of no use, another one may be. rejected: who was asked does not take this request. deadline:
    there is no time left for it. tool: the tool itself says so, or went over a limit. interrupted: nobody knows whether
    it was done, and it must not be done twice. defect: SwarmX itself failed.

    `begun`: it was sent, so the work on it may have begun.
    """

    cause: Cause
    error: str
    retry_after_s: float | None = None
    begun: bool = False

    @property
    def passing(self) -> bool:
        return self.cause in PASSING
