"""What a forecast costs: `python -m eval.inference --out DIR`.

CPU time of one thread, with the weights that ship: reading a prompt and forecasting its length, for prompts of three
sizes; and the same with the latency of the call on 1,000 replicas.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eval.result import Claim, Row, claim, table, write_result
from swarmx.core.engine import profiles
from swarmx.core.forecast import LEVELS
from swarmx.core.nouns import Call
from swarmx.core.prompts import cut
from swarmx.neural.checkpoint import load_head
from swarmx.neural.facts import device_facts, model_facts
from swarmx.neural.forecaster import NeuralForecaster, shipped_weights
from swarmx.neural.heads.latency import COMPLETION, Candidate, Candidates, FleetHead, RuntimeState, inputs
from swarmx.neural.leader import FollowTheLeader
from swarmx.neural.tracking import QuantileTracker

SIZES = {"2kB": 2_000, "50kB": 50_000, "1MB": 1_000_000}
CANDIDATES = 1000
_WARM_UP = 200
_SYLLABLES = ("ta", "re", "mo", "lin", "ver", "sa", "ku", "ti", "on", "pre", "al", "des")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.inference", description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000, help="forecasts that are timed, one by one")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and result.md")
    options = parser.parse_args(arguments)
    rows, claims = measure(options.repeats)
    command = " ".join(["python -m eval.inference", *(sys.argv[1:] if arguments is None else arguments)])
    path = write_result(options.out, command, rows, claims, [0])
    print(table(rows))
    for made in claims:
        print(f"{made.name}: {made.value:.3f} {made.op} {made.aim:g} {'met' if made.met else 'NOT met'}")
    print(f"Written to {path}.")
    return 0


def measure(repeats: int) -> tuple[list[Row], list[Claim]]:
    """One row a prompt size and a row for the fleet: P50, P10 and P99 in milliseconds of CPU."""
    forecaster = NeuralForecaster.load(None, QuantileTracker(LEVELS), FollowTheLeader(LEVELS))
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for name, size in SIZES.items():
        prompt, call = cut(_text(size, rng)), _call(size)
        for i in range(_WARM_UP):
            forecaster.observe(call, forecaster.encode(call, prompt), 50.0 + i % 100)

        def forecast(prompt=prompt, call=call) -> None:  # type: ignore[no-untyped-def]
            forecaster.forecast(call, forecaster.encode(call, prompt))

        rows.append(_row(f"length@{name}", _times_ms(forecast, repeats)))
    known = [profile for profile in profiles().values() if profile.max_batch > 1]
    chosen = [known[i % len(known)] for i in range(CANDIDATES)]
    fleet = Candidates.of(
        Candidate(profile=p, device=device_facts(p.device), model=model_facts(p.model)) for p in chosen
    )
    head = FleetHead.of(load_head(shipped_weights(), COMPLETION)[0], fleet)
    state = RuntimeState(
        in_flight=rng.integers(0, 64, CANDIDATES).astype(float),
        remaining_work=rng.uniform(0.0, 1e4, CANDIDATES),
        context_tokens=rng.uniform(0.0, 1e5, CANDIDATES),
        prefill_tokens=np.zeros(CANDIDATES),
        running=rng.integers(0, 64, CANDIDATES).astype(float),
        waiting=np.zeros(CANDIDATES),
        kv_usage=rng.random(CANDIDATES),
        signal_age_s=rng.random(CANDIDATES),
    )
    prompt, call = cut(_text(SIZES["2kB"], rng)), _call(SIZES["2kB"])

    def everywhere() -> None:
        length = forecaster.forecast(call, forecaster.encode(call, prompt)).mean
        made = inputs(fleet, state, prompt_tokens=500.0, uncached_tokens=500.0, output_tokens=length)
        head.quantiles(made, made.completion_anchor(length))

    rows.append(_row(f"length and completion@{CANDIDATES}", _times_ms(everywhere, max(1, repeats // 4))))
    by_what = {row["what"]: row["p50_ms"] for row in rows}
    return rows, [
        claim("latency_ms@2kB", float(by_what["length@2kB"] or 0.0), "<=", 0.15),
        claim(f"latency_ms@{CANDIDATES}", float(by_what[f"length and completion@{CANDIDATES}"] or 0.0), "<=", 0.5),
    ]


def _times_ms(work: Callable[[], None], repeats: int) -> np.ndarray:
    """Milliseconds of this thread's CPU time, one for each repeat."""
    for _ in range(50):
        work()
    times = np.empty(repeats)
    for i in range(repeats):
        begun = time.thread_time_ns()
        work()
        times[i] = (time.thread_time_ns() - begun) / 1e6
    return times


def _row(what: str, times_ms: np.ndarray) -> Row:
    p10, p50, p99 = np.percentile(times_ms, (10, 50, 99)).tolist()
    return {"experiment": "inference", "what": what, "p10_ms": p10, "p50_ms": p50, "p99_ms": p99, "n": len(times_ms)}


def _text(size: int, rng: np.random.Generator) -> bytes:
    """Words of two or three syllables, sentences of about twelve words."""
    words = ["".join(rng.choice(_SYLLABLES, rng.integers(2, 4))) for _ in range(size // 5)]
    return " ".join(word + "." if i % 12 == 11 else word for i, word in enumerate(words))[:size].encode()


def _call(size: int) -> Call:
    return Call(
        call_id="c", tenant="t", kind="llm", model="house-7b", role="writer", workflow_id="w", workflow_kind="report",
        node="n", prompt_key="0", prompt_bytes=size, prompt_tokens=size // 4, work_limit=4096.0,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
