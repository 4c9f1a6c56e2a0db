"""The latency heads: time to first token and completion of a call on each candidate, over the engine model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from swarmx.core.engine import EngineProfile
from swarmx.core.fleet import FleetView
from swarmx.neural.checkpoint import middle_of
from swarmx.neural.facts import UNKNOWN_DEVICE, UNKNOWN_MODEL, DeviceFacts, ModelFacts
from swarmx.neural.head import Head, HeadSpec
from swarmx.neural.net import Floats32

_PROFILE = ("step_base_s", "decode_seq_s", "decode_ctx_token_s", "prefill_token_s", "prefill_ctx_token_s",
            "call_base_s", "kv_capacity_tokens", "max_batch")  # fmt: skip
_FACTS = ("memory_gib", "bandwidth_gbs", "tflops", "params_b", "active_b", "layers", "hidden", "kv_width")
_ENGINES = ("vllm", "trtllm", "sglang")
_LOGGED = (*_FACTS, "tensor_parallel", "bytes_a_weight", "kv_capacity_tokens", "max_batch")
_STATIC = (
    *(f"log_{name}" for name in _LOGGED),
    "log_decode_ms", "log_prefill_1k_ms", *_ENGINES, "device_known", "model_known",
)  # fmt: skip
_STATE = ("running", "waiting", "in_flight", "remaining_work", "context_tokens", "prefill_tokens", "signal_age_s")
_DYNAMIC = (
    *(f"log_{name}" for name in _STATE), "log_uncached", "log_prompt", "log_wait_share", "log_queue_share",
    "log_crowd_share", "log_refill_share", "log_ttft_ms", "kv_usage", "batch_share", "averaged",
)  # fmt: skip
_OF_LENGTH = ("log_output", "log_prefill_share", "log_step_ms")

TTFT = HeadSpec(name="ttft", version=1, features=(*_STATIC, *_DYNAMIC), unit="s", softening=0.01)
COMPLETION = HeadSpec(
    name="completion", version=1, features=(*_STATIC, *_DYNAMIC, *_OF_LENGTH), unit="s", softening=0.05
)
GROUP = "request"

_TINY, _ZERO, _ONE, _MOST = np.float32(1e-9), np.float32(0.0), np.float32(1.0), np.float32(1e9)
_NAN = float("nan")
_BLOCK = 512


class Candidate(NamedTuple):
    """What is known of one replica before any call: its engine's profile, and facts. Unknown facts are NaN.

    Where the profile is an estimate by `neural.roofline`, `idle_weights_s` is that of the same module, else 0. `engine`
    is "vllm", "trtllm", "sglang", or another name.
    """

    profile: EngineProfile
    device: DeviceFacts = UNKNOWN_DEVICE
    model: ModelFacts = UNKNOWN_MODEL
    engine: str = "vllm"
    tensor_parallel: float = _NAN
    bytes_a_weight: float = _NAN
    idle_weights_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Replicas as columns [candidates]; made once a fleet, not once a call."""

    columns: dict[str, Floats32]

    @classmethod
    def of(cls, replicas: Iterable[Candidate]) -> Candidates:
        """From one or more replicas, in their order."""
        listed = list(replicas)
        rows = [
            (*(getattr(c.profile, name) for name in _PROFILE), *c.device, *c.model, c.tensor_parallel,
             c.bytes_a_weight, c.idle_weights_s, *(float(c.engine == e) for e in _ENGINES))
            for c in listed
        ]  # fmt: skip
        names = (*_PROFILE, *_FACTS, "tensor_parallel", "bytes_a_weight", "idle_weights_s", *_ENGINES)
        table = np.array(rows, dtype=np.float32).reshape(len(rows), len(names)).T
        columns = {name: np.ascontiguousarray(table[i]) for i, name in enumerate(names)}
        asleep = 1.0 - np.nan_to_num(columns["active_b"] / columns["params_b"], nan=1.0)
        columns["log_asleep"] = np.log(np.clip(asleep, 1e-6, 1.0)).astype(np.float32)
        return cls(columns=columns)

    def __len__(self) -> int:
        return len(self.columns["max_batch"])

    def take(self, rows: NDArray[np.intp]) -> Candidates:
        """The candidates at these positions, repeated as they are."""
        return Candidates(columns={name: column[rows] for name, column in self.columns.items()})

    @cached_property
    def block(self) -> Floats32:
        """The features that no call changes, [static features, candidates]."""
        c = self.columns
        out = np.empty((len(_STATIC), len(self)), dtype=np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            for i, name in enumerate(_LOGGED):
                out[i] = np.log(c[name])
            decode_s = c["step_base_s"] + c["decode_seq_s"] + 1000.0 * c["decode_ctx_token_s"]
            prefill_s = c["call_base_s"] + 1000.0 * c["prefill_token_s"] + 5e5 * c["prefill_ctx_token_s"]
            out[len(_LOGGED)] = np.log(decode_s * 1e3 + _TINY)
            out[len(_LOGGED) + 1] = np.log(prefill_s * 1e3 + _TINY)
        out[len(_LOGGED) + 2 : -2] = [c[name] for name in _ENGINES]
        out[-2] = np.isfinite(c["bandwidth_gbs"])
        out[-1] = np.isfinite(c["params_b"])
        out[~np.isfinite(out)] = np.nan
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeState:
    """What the replicas are doing, columns [candidates], as in `core.fleet.FleetView`; NaN where nobody knows."""

    in_flight: ArrayLike
    remaining_work: ArrayLike
    context_tokens: ArrayLike
    prefill_tokens: ArrayLike
    running: ArrayLike
    waiting: ArrayLike
    kv_usage: ArrayLike
    signal_age_s: ArrayLike

    @classmethod
    def of(cls, fleet: FleetView) -> RuntimeState:
        """The state that a router sees."""
        return cls(**{field.name: getattr(fleet, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the heads read for one call on each candidate.

    `fixed` and `moving` are the features that no call changes, and those that do, [features, candidates] float32; TTFT
    has no use for the last ones. `ttft_s`, and the parts of completion at output length n,
    `fixed_s + n * step_s + n² * half_ctx_s`, are the engine model's word [candidates].
    """

    fixed: Floats32
    moving: Floats32
    ttft_s: Floats32
    fixed_s: Floats32
    step_s: Floats32
    half_ctx_s: Floats32

    def features(self, spec: HeadSpec) -> Floats32:
        """[candidates, features] of TTFT or COMPLETION, a copy."""
        return np.concatenate([self.fixed, self.moving]).T[:, : len(spec.features)]

    @property
    def ttft_anchor(self) -> Floats32:
        anchor: Floats32 = np.log(self.ttft_s + np.float32(TTFT.softening))
        return anchor

    def completion_s(self, output_tokens: ArrayLike) -> Floats32:
        """The engine model's completion [candidates], or [candidates, K] for lengths of shape [1, K]."""
        n = np.asarray(output_tokens, dtype=np.float32)
        extra = (slice(None), None) if n.ndim == 2 else slice(None)
        s: Floats32 = self.fixed_s[extra] + n * (self.step_s[extra] + n * self.half_ctx_s[extra])
        return s

    def completion_anchor(self, output_tokens: ArrayLike) -> Floats32:
        anchor: Floats32 = np.log(self.completion_s(output_tokens) + np.float32(COMPLETION.softening))
        return anchor

    def at_length(self, output_tokens: ArrayLike) -> Inputs:
        """The same call, answered with so many tokens."""
        moving = self.moving.copy()
        _write_length(moving, self, np.asarray(output_tokens, dtype=np.float32))
        return replace(self, moving=moving)


def inputs(
    candidates: Candidates,
    state: RuntimeState,
    *,
    prompt_tokens: ArrayLike,
    uncached_tokens: ArrayLike,
    output_tokens: ArrayLike,
    averaged: ArrayLike = 0.0,
) -> Inputs:
    """Features and engine estimates of a call that needs `output_tokens` (a quantile or the mean of its forecast).

    With n calls there, expected work W left in them, B slots (or as many as the cache has room for), and step time
    s = s(min(n + 1, B), context there + prompt), as in the policy least_work:

        wait    = max(0, n + 1 - B) * (W / n * s + call_base) / B
        prefill = call_base + prefill of own uncached tokens, and of prompts not yet answered, at the device's rate
        TTFT    = wait + prefill + s,   completion = wait + prefill + output * s

    n is the larger of our own calls in flight and of what the engine says is running and waiting; s reads the experts
    that the batch wakes (`roofline.idle_weights_s`). The shares are those of the TTFT: of the wait, of the prompts in
    the queue, of everybody's prompt if all came at once ("crowd"); "refill" is the prefill in a step of decoding when
    those that end are replaced. `averaged` marks training rows that are means over many requests; a call is none.
    """
    c = candidates.columns
    running, waiting, ours, work, held, prefilling, age = (_count(getattr(state, name)) for name in _STATE)
    uncached = np.fmax(_count(uncached_tokens), _ZERO)
    prompt = np.fmax(_count(prompt_tokens), uncached)
    output = np.fmax(_count(output_tokens), _ONE)

    ahead = np.fmax(np.fmax(ours, running + waiting), _ZERO)
    context = np.fmax(held, _ZERO) + prompt
    slots = np.fmin(c["max_batch"], np.maximum(c["kv_capacity_tokens"] * (ahead + 1.0) / (context + 1.0), 1.0))
    batch = np.minimum(ahead + 1.0, slots)
    step_s = c["step_base_s"] + c["decode_seq_s"] * batch + c["decode_ctx_token_s"] * context
    step_s += c["idle_weights_s"] * (1.0 - np.exp(batch * c["log_asleep"]))
    known = np.fmax(ours, _ONE)
    left = np.where(work > 0.0, work / known, output)
    wait_s = np.maximum(ahead + 1.0 - slots, 0.0) * (left * step_s + c["call_base_s"]) / slots
    queue_s = c["prefill_token_s"] * np.fmax(prefilling, _ZERO)
    own_s = c["call_base_s"] + uncached * (
        c["prefill_token_s"] + c["prefill_ctx_token_s"] * (prompt - uncached * np.float32(0.5))
    )
    fixed_s = wait_s + queue_s + own_s
    ttft_s = fixed_s + step_s

    out = np.empty((len(_DYNAMIC) + len(_OF_LENGTH), len(candidates)), dtype=np.float32)
    logged = len(_STATE) + 2
    for row, values in enumerate((running, waiting, ours, work, held, prefilling, age, uncached, prompt)):
        out[row] = values
    out[:logged] += 1.0
    scale = 1.0 / ttft_s
    out[logged] = wait_s * scale
    out[logged + 1] = queue_s * scale
    out[logged + 2] = ahead * own_s * scale
    out[logged + 3] = batch * context / (ahead + 1.0) * c["prefill_token_s"] / (left * step_s)
    out[logged : logged + 4] += 0.01
    out[logged + 4] = ttft_s * 1e3
    np.maximum(out[: logged + 5], _TINY, out=out[: logged + 5])
    np.log(out[: logged + 5], out=out[: logged + 5])
    out[logged + 5] = state.kv_usage
    out[logged + 6] = batch / slots
    out[logged + 7] = averaged
    made = Inputs(
        fixed=candidates.block,
        moving=out,
        ttft_s=ttft_s,
        fixed_s=fixed_s,
        step_s=step_s,
        half_ctx_s=c["decode_ctx_token_s"] * np.float32(0.5),
    )
    _write_length(out, made, output)
    return made


def _count(values: ArrayLike) -> Floats32:
    """As float32, held at a billion; infinities would be NaN in the sums."""
    return np.minimum(np.asarray(values, dtype=np.float32), _MOST)


def _write_length(moving: Floats32, made: Inputs, output: Floats32) -> None:
    rows = moving[len(_DYNAMIC) :]
    rows[0] = output + 1.0
    rows[1] = made.fixed_s / made.completion_s(output) + 0.01
    rows[2] = made.step_s * 1e3 + _TINY
    np.log(rows, out=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetHead:
    """A latency head made ready for a fleet: its answers, at a third of the price.

    Most features belong to the replica and not to the call, so what they add to the first layer is computed once a
    fleet: `base` [candidates, hidden + K] for each network.
    """

    head: Head
    base: tuple[Floats32, ...]
    weights: tuple[Floats32, ...]

    @classmethod
    def of(cls, head: Head, candidates: Candidates) -> FleetHead:
        """Raises ValueError when the head is none of latency."""
        if head.spec.key not in (TTFT.key, COMPLETION.key):
            raise ValueError(f"expected a head for ttft or completion, got one for {head.spec.name}")
        split = len(_STATIC)
        x = _standard(candidates.block, head, slice(0, split)).T
        joint = [np.concatenate([net.hidden, net.skip], axis=1) for net in head.nets]
        bias = [np.concatenate([net.hidden_bias, net.out_bias]) for net in head.nets]
        return cls(
            head=head,
            base=tuple(x @ w[:split] + b for w, b in zip(joint, bias, strict=True)),
            weights=tuple(np.ascontiguousarray(w[split:]) for w in joint),
        )

    def log_quantiles(self, made: Inputs, anchor: Floats32) -> Floats32:
        """[candidates, K], as `Head.log_quantiles` would say, in float32."""
        nets = self.head.nets
        x = _standard(made.moving, self.head, slice(len(_STATIC), None)).T
        total = self._of_net(0, x)
        for i in range(1, len(nets)):
            total += self._of_net(i, x)
        if len(nets) > 1:
            total /= np.float32(len(nets))
        if self.head.shifts:
            total += self.head.shifts.get(GROUP, self.head.shifts[""])
            np.maximum.accumulate(total, axis=1, out=total)
        total += anchor[:, None]
        return total

    def _of_net(self, i: int, x: Floats32) -> Floats32:
        """[candidates, K] of one network, in blocks that stay in the cache and below malloc's limit for own pages."""
        net = self.head.nets[i]
        hidden = net.hidden.shape[1]
        out = np.empty((len(x), net.out.shape[1]), dtype=np.float32)
        for start in range(0, len(x), _BLOCK):
            rows = slice(start, start + _BLOCK)
            z = x[rows] @ self.weights[i]
            z += self.base[i][rows]
            out[rows] = net.finish(z[:, :hidden], z[:, hidden:])
        return out

    def quantiles(self, made: Inputs, anchor: Floats32) -> Floats32:
        """[candidates, K] in seconds: finite, not negative, rising along K."""
        return _seconds(self.log_quantiles(made, anchor), self.head.spec)


def _standard(rows: Floats32, head: Head, part: slice) -> Floats32:
    mean, scale = head.mean[part, None], head.scale[part, None]
    x: Floats32 = (rows[: len(mean)] - mean) / scale
    np.clip(x, -head.limit, head.limit, out=x)
    x[np.isnan(x)] = 0.0
    return x


def _seconds(log_q: Floats32, spec: HeadSpec) -> Floats32:
    np.clip(log_q, -40.0, 40.0, out=log_q)
    q = np.exp(log_q, out=log_q)
    q -= np.float32(spec.softening)
    np.maximum(q, 0.0, out=q)
    return q


def ttft_quantiles(head: FleetHead, made: Inputs) -> Floats32:
    """Quantiles [candidates, K] of the time to the first token, in seconds."""
    return head.quantiles(made, made.ttft_anchor)


def completion_quantiles(head: FleetHead, made: Inputs, lengths: Sequence[float]) -> Floats32:
    """Quantiles [candidates, K] of completion, in seconds, for a length known by its quantiles [K] at the same levels.

    The length and what the engine makes of it are taken as independent, so completion is the mixture over lengths of
    the head's distributions: in the logarithm a sum of what the length moves the median, and of the head's spread.
    Means and variances of the two add, and their departures from the normal shape count with the cubes of their
    shares, as third cumulants do (Cornish and Fisher, 1938); exact where either is certain. Adding the quantiles
    themselves (comonotone) would make every tail too long; sampling the mixture costs a run of the head a length. The
    engine model is asked at every length; the head's correction is read at three, and is linear in log n in between.
    """
    levels = head.head.spec.levels
    last = len(levels) - 1
    n = np.maximum(np.asarray(lengths, dtype=np.float32), 1.0)
    if n.shape != (len(levels),) or not np.isfinite(n).all():
        raise ValueError(f"lengths must be {len(levels)} finite quantiles at the levels of the head, got {lengths}")
    middle = middle_of(levels)
    anchors = made.completion_anchor(n[None, :])
    spread = head.log_quantiles(made.at_length(n[middle]), anchors[:, middle])
    centre = spread[:, middle].copy()
    moved = anchors + (centre - anchors[:, middle])[:, None]
    for end, side in ((0, slice(0, middle)), (last, slice(middle + 1, last + 1))):
        if n[end] == n[middle]:
            continue
        there = head.log_quantiles(made.at_length(n[end]), anchors[:, end])[:, middle]
        bend = there - moved[:, end]
        moved[:, side] += bend[:, None] * (np.log(n[side] / n[middle]) / np.log(n[end] / n[middle]))
    spread -= centre[:, None]
    return _seconds(_sum_of(moved, spread, levels), head.head.spec)


def _sum_of(a: Floats32, b: Floats32, levels: tuple[float, ...]) -> Floats32:
    """Quantiles [rows, K] of the sum of independent variables with quantiles a and b [rows, K] at `levels`."""
    mass, normal = _shape_of(levels)
    mean_a, mean_b = a @ mass, b @ mass
    a, b = a - mean_a[:, None], b - mean_b[:, None]
    var_a, var_b = (a * a) @ mass, (b * b) @ mass
    whole = np.sqrt(var_a + var_b)
    scale = 1.0 / np.maximum(whole, 1e-6)
    share_a, share_b = np.sqrt(var_a) * scale, np.sqrt(var_b) * scale
    shape = (1.0 - share_a**3 - share_b**3)[:, None] * normal
    shape += (share_a**2 * scale)[:, None] * a
    shape += (share_b**2 * scale)[:, None] * b
    total = (mean_a + mean_b)[:, None] + whole[:, None] * shape
    rising: Floats32 = np.maximum.accumulate(total, axis=1)
    return rising


@cache
def _shape_of(levels: tuple[float, ...]) -> tuple[Floats32, Floats32]:
    """The mass [K] that stands for each level, and normal quantiles [K] of mean 0 and variance 1 under these masses."""
    edges = np.concatenate([[0.0], (np.array(levels[1:]) + np.array(levels[:-1])) / 2.0, [1.0]])
    mass = np.diff(edges)
    z = np.array([NormalDist().inv_cdf(level) for level in levels])
    z = z - z @ mass
    return mass.astype(np.float32), (z / np.sqrt(z**2 @ mass)).astype(np.float32)
