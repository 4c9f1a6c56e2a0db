"""What an emulated replica tells about itself: vLLM's metrics, and how honest its clock was."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from swarmx.core.batching import Counters

_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
            960.0, 1920.0, 7680.0)  # fmt: skip
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
         160.0, 640.0, 2560.0)  # fmt: skip
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)

FINISH_REASONS = ("stop", "length", "abort", "error")
SAMPLES = 50_000
LATE_MS = 20.0
LATE_SHARE = 0.25


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How late the process woke for engine events, on the wall clock.

    Emulated times are `void` when the 99th percentile of that lag exceeds the larger of 20 ms and a quarter of the
    median request latency: then the host, not the modelled device, decided what was measured.
    """

    requests: int
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float
    step_p50_ms: float
    void: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request that left the engine, with the engine's own times; None for what it did not live to see."""

    reason: str
    arrived_s: float
    admitted_s: float | None
    first_token_s: float | None
    ended_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Histogram:
    """A histogram that can count one value many times at once; bounds are vLLM's."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Buckets as Prometheus wants them."""
        rows, below = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            rows.append((bound, float(below)))
        return rows


@dataclass(slots=True)
class _Tally:
    """Everything that a reset forgets."""

    ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    prompt_tokens: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(_TTFT))
    itl: Histogram = field(default_factory=lambda: Histogram(_ITL))
    e2e: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    queue: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    prompts: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    outputs: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    lags_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


class Telemetry(Collector):
    """Counts ended requests and lags, and exposes them with the engine's counters under vLLM's names."""

    def __init__(self, model: str, counters: Callable[[], Counters]) -> None:
        self._labels = {"model_name": model, "engine": "0"}
        self._counters = counters
        self._tally = _Tally()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def reset(self) -> None:
        """Forget everything."""
        self._tally = _Tally()

    def woke(self, lag_s: float) -> None:
        """The process woke `lag_s` after an engine event."""
        self._tally.lags_s.append(lag_s)

    def ended(self, request: Ended) -> None:
        """A request left the engine. Gaps between tokens are counted with their mean."""
        tally = self._tally
        tally.ended[request.reason] += 1
        if request.admitted_s is not None:
            tally.queue.observe(request.admitted_s - request.arrived_s)
        if request.first_token_s is not None:
            tally.prompt_tokens += request.prompt_tokens
            tally.ttft.observe(request.first_token_s - request.arrived_s)
        if request.reason == "abort" or request.first_token_s is None:
            return
        tally.e2e.observe(request.ended_s - request.arrived_s)
        tally.prompts.observe(request.prompt_tokens)
        tally.outputs.observe(request.output_tokens)
        tally.latencies_s.append(request.ended_s - request.arrived_s)
        if request.output_tokens > 1:
            step_s = (request.ended_s - request.first_token_s) / (request.output_tokens - 1)
            tally.itl.observe(step_s, request.output_tokens - 1)
            tally.steps_s.append(step_s)

    def report(self) -> Report:
        """The state of the clock so far."""
        lags, latencies = self._tally.lags_s, self._tally.latencies_s
        p99_ms = 1e3 * _quantile(lags, 0.99)
        latency_ms = 1e3 * _quantile(latencies, 0.5)
        limit_ms = max(LATE_MS, LATE_SHARE * latency_ms)
        void = p99_ms > limit_ms
        return Report(
            requests=sum(self._tally.ended.values()),
            lag_p50_ms=1e3 * _quantile(lags, 0.5),
            lag_p99_ms=p99_ms,
            lag_max_ms=1e3 * max(lags, default=0.0),
            step_p50_ms=1e3 * _quantile(self._tally.steps_s, 0.5),
            void=void,
            why=f"the process woke {p99_ms:.1f} ms late (p99), at most {limit_ms:.1f} ms are allowed: lower the load, "
            "the time scale or the number of replicas on this host"
            if void
            else "",
        )

    def exposition(self) -> bytes:
        """The body of /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """All metric families (called by the registry)."""
        now, tally = self._counters(), self._tally
        yield self._gauge("num_requests_running", "Requests in the batch.", now.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for admission.", now.waiting)
        yield self._gauge("kv_cache_usage_perc", "KV cache usage, 1 is full.", now.kv_usage)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.", now.prefix_query_tokens)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache.", now.prefix_hit_tokens)
        yield self._counter("num_preemptions", "Preemptions.", now.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens processed.", tally.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", now.generated_tokens)
        success = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended.", labels=[*self._labels, "finished_reason"]
        )
        for reason, count in tally.ended.items():
            success.add_metric([*self._labels.values(), reason], count)
        yield success
        yield self._histogram("time_to_first_token_seconds", "Arrival to first token.", tally.ttft)
        yield self._histogram("inter_token_latency_seconds", "Between tokens, by request means.", tally.itl)
        yield self._histogram("e2e_request_latency_seconds", "Arrival to end.", tally.e2e)
        yield self._histogram("request_queue_time_seconds", "Arrival to admission.", tally.queue)
        yield self._histogram("request_prompt_tokens", "Prompt tokens a request.", tally.prompts)
        yield self._histogram("request_generation_tokens", "Output tokens a request.", tally.outputs)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.total)
        return family


def _quantile(values: Iterable[float], level: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))] if ordered else 0.0
