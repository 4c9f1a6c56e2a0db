"""When workflows arrive: Poisson, in bursts, or as in a recorded trace; all at the rate that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eval.workloads.invented import constant
from swarmx.core.errors import ConfigError

Floats = NDArray[np.float64]
Arrivals = Literal["poisson", "bursty", "azure_code", "azure_conv", "mooncake", "servegen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """A Poisson process that is on for the share `share` of the time and silent else: an MMPP of two states, of which
    one is at rest (Kuczura's interrupted Poisson process, Bell System Technical Journal 52, 1973).

    `cv` is the coefficient of variation of its gaps. With gaps of mean 1 it follows that bursts come at rate 1 / share,
    and from CV^2 = 1 + 2 r (1 - share) / share that the state relaxes within r = (on + off rates)^-1.
    """

    share: float
    cv: float

    @property
    def burst(self) -> float:
        """The mean time of being on, in mean gaps."""
        return (self.cv**2 - 1.0) * self.share / (2.0 * (1.0 - self.share) ** 2)

    @property
    def silence(self) -> float:
        """The mean time of being silent, in mean gaps."""
        return self.burst * (1.0 - self.share) / self.share

    def gaps(self, count: int, rng: np.random.Generator) -> Floats:
        """`count` gaps with a mean near 1, [count]; the first burst has just begun."""
        gaps = rng.exponential(self.share, size=count)  # while it is on
        on = np.cumsum(gaps)
        ends = np.cumsum(rng.exponential(self.burst, size=int(on[-1] / self.burst * 2.0) + 50))
        pauses = np.bincount(np.searchsorted(on, ends), rng.exponential(self.silence, size=len(ends)), count + 1)
        return gaps + pauses[:count]


BURSTS = Bursts(share=constant("burst_share"), cv=12.6)
"""As Azure's code trace of 2023: gaps with CV 12.6, and 49 % of its ten-second windows are empty, here 53 %; a burst
lasts 48 mean gaps and a silence 113."""


def arrival_times(kind: Arrivals, count: int, rate_per_s: float, seed: int, trace: Floats | None = None) -> Floats:
    """`count` times in seconds, [count], rising from 0 on; the last is at `count / rate_per_s`.

    The shape depends on `seed` alone: another rate stretches it. `trace` are the times of a recorded one, of which
    consecutive gaps are taken from a place that the seed chooses, around its end if need be. Raises ConfigError.
    """
    if kind not in get_args(Arrivals):
        raise ConfigError(f"arrivals are {kind!r}, expected one of {', '.join(get_args(Arrivals))}.")
    if not (count > 0 and 0.0 < rate_per_s < np.inf):
        raise ConfigError(f"{count} workflows at {rate_per_s} per second: expected at least one, at a rate above zero.")
    rng = np.random.default_rng([seed, 0xA551])
    if trace is not None:
        gaps = np.diff(trace)
        gaps = gaps[(int(rng.integers(len(gaps))) + np.arange(count)) % len(gaps)]
        if not gaps.sum() > 0.0:
            raise ConfigError(f"{count} arrivals of the trace all come at once; ask for more of them.")
    elif kind == "poisson":
        gaps = rng.exponential(size=count)
    elif kind == "bursty":
        gaps = BURSTS.gaps(count, rng)
    else:
        raise ConfigError(f"arrivals {kind!r} need a trace: give --arrivals.")
    times: Floats = np.cumsum(gaps)
    times *= count / rate_per_s / times[-1]
    return times
