"""Everything about the workloads that no data set tells: each number with its spread, which `vary` makes wider."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np

from eval.result import Row
from swarmx.core.errors import ConfigError

Shape = Literal["count", "lognormal", "share", "constant"]


class Invention(msgspec.Struct, frozen=True, kw_only=True):
    """One invented quantity.

    A `count` is a whole number, uniform in `middle` +- `spread` * vary and at least `least`; a `lognormal` has the
    median `middle` and the deviation `spread` * vary of its logarithm; a `share` is the probability `middle` * vary, at
    most 0.95; a `constant` is `middle`, whatever `vary` is.
    """

    name: str
    shape: Shape
    middle: float
    spread: float = 0.0
    least: float = 0.0
    unit: str
    why: str


INVENTED: Mapping[str, Invention] = {
    each.name: each
    for each in (
        Invention(name="system_prompt", shape="lognormal", middle=800.0, spread=0.4, unit="tokens",
                  why="instructions and tool schemas of a role, one text for all workflows"),
        Invention(name="repository", shape="lognormal", middle=3000.0, spread=0.6, unit="tokens",
                  why="coding: files that all calls of a workflow read"),
        Invention(name="page", shape="lognormal", middle=2000.0, spread=0.6, unit="tokens",
                  why="research: what one reader is given"),
        Invention(name="chat_history", shape="lognormal", middle=600.0, spread=1.0, unit="tokens",
                  why="chat: earlier turns in front of the prompt; Azure's conversations have a median input of 1015"),
        Invention(name="coders", shape="count", middle=4.0, spread=2.0, least=1.0, unit="calls",
                  why="coding: parallel coders, 2 to 6"),
        Invention(name="repairs", shape="count", middle=1.5, spread=1.5, unit="loops",
                  why="coding: loops of fix and review, 0 to 3"),
        Invention(name="readers", shape="count", middle=5.5, spread=2.5, least=1.0, unit="branches",
                  why="research: parallel searches, 3 to 8"),
        Invention(name="second_round", shape="share", middle=0.35, unit="",
                  why="research: probability of a second round of searches"),
        Invention(name="more_readers", shape="count", middle=3.0, spread=1.0, least=1.0, unit="branches",
                  why="research: searches of the second round, 2 to 4"),
        Invention(name="search_gap", shape="lognormal", middle=0.8, spread=0.6, unit="s",
                  why="research: a search and the download of its page"),
        Invention(name="test_gap", shape="lognormal", middle=3.0, spread=0.7, unit="s",
                  why="coding: running the tests before a repair"),
        Invention(name="images", shape="count", middle=2.5, spread=1.5, least=1.0, unit="calls",
                  why="media: images of one request, 1 to 4"),
        Invention(name="on_flux", shape="share", middle=0.35, unit="",
                  why="media: probability that a request is for the large image model"),
        Invention(name="upscale", shape="share", middle=0.2, unit="",
                  why="media: probability that the first image is made larger"),
        Invention(name="upscale_work", shape="lognormal", middle=40.0, spread=0.3, unit="megapixel-steps",
                  why="media: ten steps on four megapixels"),
        Invention(name="pages", shape="count", middle=3.5, spread=2.5, least=1.0, unit="calls",
                  why="pools: parallel tasks of the middle stage, 1 to 6"),
        Invention(name="intake_work", shape="lognormal", middle=150.0, spread=0.5, unit="10 ms of a fast core",
                  why="pools: reading and cutting what came in"),
        Invention(name="ocr_work", shape="lognormal", middle=150.0, spread=0.8, unit="10 ms of a fast core",
                  why="pools: one page or clip"),
        Invention(name="index_work", shape="lognormal", middle=150.0, spread=0.5, unit="10 ms of a fast core",
                  why="pools: putting it together"),
        Invention(name="task_noise", shape="lognormal", middle=1.0, spread=0.25, unit="x",
                  why="pools: what the work comes to, over what the size of the input says"),
        Invention(name="foresight", shape="constant", middle=0.6, unit="",
                  why="correlation of a workflow's branches and loops with the length of its first prompt"),
        Invention(name="session_shared", shape="constant", middle=0.9, unit="",
                  why="sessions: the system prompt's share of the shortest first prompt of a domain"),
        Invention(name="session_gap", shape="constant", middle=0.05, unit="s",
                  why="sessions: from an answer to the next call where no clock ran"),
        Invention(name="longest_session_gap", shape="constant", middle=60.0, unit="s",
                  why="sessions: pauses beyond it are cut, they are a person's"),
        Invention(name="work_limit", shape="constant", middle=4096.0, unit="tokens",
                  why="the client's limit where none was recorded"),
        Invention(name="task_limit", shape="constant", middle=4.0, unit="x",
                  why="pools: where a client gives up, over what the size of the input says"),
        Invention(name="cpu_fast", shape="constant", middle=0.010, unit="s",
                  why="fleets: a unit of work on the fast processors"),
        Invention(name="cpu_slow", shape="constant", middle=0.017, unit="s",
                  why="fleets: the same on the slow ones"),
        Invention(name="cpu_call", shape="constant", middle=0.005, unit="s",
                  why="fleets: what every call to a processor pays"),
        Invention(name="cpu_cost", shape="constant", middle=0.04, unit="of an L40S",
                  why="fleets: a few of a socket's cores, by their share of its memory bandwidth"),
        Invention(name="outcome_lag", shape="constant", middle=2000.0, unit="workflows",
                  why="forecasts: until answers are learnt from; 250 s at 8 a second, the longest takes 200 s alone"),
        Invention(name="past_workflows", shape="constant", middle=500.0, unit="workflows",
                  why="forecasts and running means: what ended before the first one came"),
        Invention(name="burst_share", shape="constant", middle=0.3, unit="of the time",
                  why="bursty arrivals: chosen for the empty windows of Azure's code trace, whose CV is given"),
    )
}  # fmt: skip

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventions:
    """Draws of the invented quantities; `vary` = 0.5 and 1.5 are the halved and the half wider spreads."""

    vary: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.vary <= 3.0:
            raise ConfigError(f"vary is {self.vary}, expected 0 to 3: 0.5 halves the invented spreads, 1.5 adds half.")

    def count(self, name: str, rng: np.random.Generator, hint: float = 0.0) -> int:
        """A whole number; `hint`, standard normal, is what the first prompt tells, and counts as `foresight` says."""
        it = _of(name, "count")
        low = max(it.least, it.middle - it.spread * self.vary)
        high = max(low, it.middle + it.spread * self.vary)
        known = constant("foresight")
        place = _NORMAL.cdf(known * hint + math.sqrt(1.0 - known * known) * rng.standard_normal())
        whole_low, whole_high = math.ceil(low), max(math.ceil(low), math.floor(high))
        return min(whole_high, whole_low + int(place * (whole_high - whole_low + 1)))

    def amount(self, name: str, rng: np.random.Generator) -> float:
        """A lognormal amount, in the unit of the table."""
        it = _of(name, "lognormal")
        return float(it.middle * math.exp(it.spread * self.vary * rng.standard_normal()))

    def deviation(self, name: str) -> float:
        """Of the logarithm of a lognormal amount."""
        return _of(name, "lognormal").spread * self.vary

    def tokens(self, name: str, rng: np.random.Generator) -> int:
        """The same as a number of tokens or units of work: whole, and at least one."""
        return max(1, round(self.amount(name, rng)))

    def happens(self, name: str, rng: np.random.Generator) -> bool:
        """Whether it does, with the share's probability."""
        return bool(rng.random() < min(0.95, _of(name, "share").middle * self.vary))


def constant(name: str) -> float:
    """The value of a constant, which does not vary."""
    return _of(name, "constant").middle


def rows() -> list[Row]:
    """The table for a report: what each value is, and halved and half wider."""
    return [
        {
            "name": it.name, "shape": it.shape, "middle": it.middle, "spread": it.spread or None, "unit": it.unit,
            "at 0.5": _range(it, 0.5), "at 1": _range(it, 1.0), "at 1.5": _range(it, 1.5), "why": it.why,
        }
        for it in INVENTED.values()
    ]  # fmt: skip


def _range(it: Invention, vary: float) -> str:
    match it.shape:
        case "count":
            low, high = max(it.least, it.middle - it.spread * vary), it.middle + it.spread * vary
            return f"{math.ceil(low)} to {max(math.ceil(low), math.floor(high))}"
        case "lognormal":
            low, high = (it.middle * math.exp(sign * 1.2816 * it.spread * vary) for sign in (-1.0, 1.0))
            return f"{low:.3g} to {high:.3g} (80 %)"
        case "share":
            return f"{min(0.95, it.middle * vary):.2f}"
        case "constant":
            return f"{it.middle:g}"


def _of(name: str, shape: Shape) -> Invention:
    it = INVENTED[name]
    if it.shape != shape:
        raise ValueError(f"{name} is a {it.shape}, and was asked for as a {shape}")
    return it
