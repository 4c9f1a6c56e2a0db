"""How fast a replica is, learnt from what its calls took: the constants of its engine profile."""

from __future__ import annotations

import msgspec
import numpy as np

from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import Floats

_FORGET = 0.97  # of each earlier call's weight with every further one
_PRIOR = 0.05  # calls that the first guess counts for: where it is far off, one call has to do
_SWEEPS = 12
_LEAST_S = 1e-4
_MOST, _MOST_BATCH = 1e8, 1e5  # beyond, it is no number of seconds, tokens or calls


class Pace:
    """Fits seconds = base + prompt * read + work * (step + share * batch) to the last calls, none below zero.

    `batch` is the mean number of calls on the replica meanwhile, this one included. The variance of an error is taken
    to grow with the time, so that long calls do not drown short ones (weighted least squares with forgetting;
    non-negative by coordinate descent).
    """

    def __init__(self, first: EngineProfile) -> None:
        self._first = first
        guess = [first.call_base_s, first.prefill_token_s, first.step_base_s, first.decode_seq_s]
        self._fit: Floats = np.array(guess, dtype=np.float64)
        self._gram: Floats = np.zeros((4, 4))
        self._aim: Floats = np.zeros(4)
        self._guess: Floats = self._fit.copy()
        self.calls = 0

    def observe(self, seconds: float, *, work: float, prompt_tokens: float, batch: float) -> None:
        """A call of so much work took so long; numbers that cannot be are not learnt from."""
        if not (_LEAST_S <= seconds <= _MOST and 0.0 < work <= _MOST and 0.0 <= prompt_tokens <= _MOST):
            return
        if not 0.0 <= batch <= _MOST_BATCH:
            return
        row = np.array([1.0, prompt_tokens, work, work * batch])
        self._gram = _FORGET * self._gram + np.outer(row, row) / seconds
        self._aim = _FORGET * self._aim + row
        self.calls += 1
        self._solve()

    def profile(self, max_batch: int) -> EngineProfile:
        """The first guess, with what was learnt in the place of its constants."""
        base_s, read_s, step_s, share_s = self._fit.tolist()
        return msgspec.structs.replace(
            self._first,
            call_base_s=base_s,
            prefill_token_s=read_s,
            step_base_s=max(step_s, 1e-7),
            decode_seq_s=share_s,
            max_batch=max_batch,
        )

    def _solve(self) -> None:
        """The guess is so many calls of typical size, that took what the guess says; less and less of it counts."""
        weight = (_PRIOR * _FORGET**self.calls + 1e-3) / max(1, min(self.calls, 33))
        prior = weight * np.diag(self._gram)
        gram: list[list[float]] = (self._gram + np.diag(prior + 1e-12)).tolist()
        aim: list[float] = (self._aim + prior * self._guess).tolist()
        fit: list[float] = self._fit.tolist()
        for _ in range(_SWEEPS):  # four numbers: an operation on arrays takes longer to start than all of it
            for i in range(4):
                g = gram[i]
                fit[i] = max(
                    0.0, fit[i] + (aim[i] - g[0] * fit[0] - g[1] * fit[1] - g[2] * fit[2] - g[3] * fit[3]) / g[i]
                )
        self._fit = np.array(fit)
