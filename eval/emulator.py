"""How true the engine emulator is: to its own arithmetic over HTTP, and to a real vLLM on requests of no fit.

python -m eval.emulator check --out out/emulator
python -m eval.emulator check --url http://127.0.0.1:8100 --model coordinator --max-batch 8 --out out/emulator
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec
import numpy as np
from scipy.optimize import nnls

from eval.result import table, write_result
from swarmx.core.batching import BLOCK_TOKENS, Counters, Engine, Request
from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.errors import ReplicaError
from swarmx.providers.emulated.provider import EmulatedProvider, EmulatedSpec
from swarmx.providers.emulated.telemetry import Report
from swarmx.providers.emulated.truth import BYTES_PER_TOKEN, prefix_hashes, prompt_tokens

POINTS = (("qwen3-8b", "h100"), ("qwen3-8b", "l40s"), ("llama-3.1-70b", "h100"))
LOADS = (0.2, 0.5, 0.8)  # share of the rate at which a full batch would leave the engine
ANALYTIC_REQUESTS = 80
BUSY_BATCH = 24
FIT_BATCHES = (1, 2, 4, 8, 16, 32, 64)
FIT_PROMPTS = (16, 64, 256, 512, 1024, 2048, 4096)
FIT_CONTEXTS = (32, 512)
FIT_OUTPUT = 24
TWIN_SCALE = 5.0  # the emulated twin runs faster than the real server, which can be slow
TIMEOUT = aiohttp.ClientTimeout(total=600.0)
WORDS = ("river", "table", "seven", "cloud", "paper", "green", "music", "stone", "winter", "letter", "garden", "window")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request of the load: when, and how much."""

    at_s: float
    prompt: str
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a client measured; `sent_s` counts from the start of the load."""

    sent_s: float
    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens."""
        return (self.e2e_s - self.ttft_s) / max(1, self.output_tokens - 1)


def words(rng: np.random.Generator, count: int) -> str:
    """A prompt of its own: begins with a number that no other prompt has, so that no prefix is shared."""
    return " ".join([str(rng.integers(1 << 40)), *rng.choice(WORDS, size=count)])


def padded(tokens: int, rng: np.random.Generator) -> str:
    """A prompt that the emulator counts as so many tokens."""
    size = int(tokens * BYTES_PER_TOKEN)
    text = words(rng, size // 4)[:size]
    return text.ljust(size, ".")


def poisson(
    rate: float, count: int, rng: np.random.Generator, prompt: Callable[[], str], outputs: tuple[int, int]
) -> list[Ask]:
    """`count` requests at `rate` a second with log-uniform output lengths."""
    times = np.cumsum(rng.exponential(1.0 / rate, size=count))
    lengths = np.exp(rng.uniform(math.log(outputs[0]), math.log(outputs[1]), size=count)).astype(int)
    return [Ask(at_s=float(t), prompt=prompt(), output_tokens=int(n)) for t, n in zip(times, lengths, strict=True)]


async def send(session: aiohttp.ClientSession, url: str, model: str, ask: Ask, start_s: float) -> Seen:
    """Stream one completion at its time; the first event with text is the first token."""
    await asyncio.sleep(max(0.0, start_s + ask.at_s - time.perf_counter()))
    body = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent_s = time.perf_counter()
    first_s = usage = None
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise ReplicaError(f"{url} answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if first_s is None and line.startswith(b"data: {"):
                first_s = time.perf_counter()
            if b'"usage":{' in line or b'"usage": {' in line:
                usage = json.loads(line.removeprefix(b"data: "))["usage"]
    ended_s = time.perf_counter()
    if first_s is None or usage is None:
        raise ReplicaError(f"{url} ended a stream without text or usage")
    return Seen(
        sent_s=sent_s - start_s,
        ttft_s=first_s - sent_s,
        e2e_s=ended_s - sent_s,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
    )


async def play(url: str, model: str, load: Sequence[Ask]) -> list[Seen]:
    """Send the load and wait for all of it."""
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0)) as session:
        start_s = time.perf_counter() + 0.05
        return list(await asyncio.gather(*(send(session, url, model, ask, start_s) for ask in load)))


def replay(
    profile: EngineProfile, requests: Sequence[Request], arrivals_s: Sequence[float]
) -> tuple[list[tuple[float, float]], Counters]:
    """(TTFT, E2E) of each request in pure virtual time, and what the engine counted by the end."""
    engine = Engine(profile)
    events = []
    for i in sorted(range(len(requests)), key=lambda i: arrivals_s[i]):
        events += engine.advance(arrivals_s[i])
        engine.submit(requests[i], arrivals_s[i])
    events += engine.advance(math.inf)
    at = {(e.kind, e.request_id): e.at_s for e in events}
    times = [
        (at["first_token", r.request_id] - arrived_s, at["finished", r.request_id] - arrived_s)
        for r, arrived_s in zip(requests, arrivals_s, strict=True)
    ]
    return times, engine.counters()


def predict(
    profile: EngineProfile, requests: Sequence[Request], arrivals_s: Sequence[float]
) -> list[tuple[float, float]]:
    """(TTFT, E2E) of each request in pure virtual time."""
    return replay(profile, requests, arrivals_s)[0]


async def emulate(profile: EngineProfile, load: Sequence[Ask], time_scale: float) -> tuple[list[Seen], Report]:
    """The load over HTTP against one emulated replica; all times on the wall clock."""
    with tempfile.TemporaryDirectory() as folder:
        row = {
            "key": "",
            "model": "none",
            "prompt_tokens": 1,
            "output_tokens": 1,
            "finish_reason": "stop",
            "reply": None,
        }
        Path(folder, "unused.jsonl").write_text(json.dumps(row) + "\n")  # the load says how long its answers are
        spec = EmulatedSpec(replica_id="r", model="m", kind="llm", device=profile.device, profile=profile)
        provider = EmulatedProvider([spec], time_scale=time_scale, recorded=Path(folder))
        (replica,) = await provider.start()
        try:
            await play(replica.url, "m", [Ask(at_s=0.0, prompt="warm up", output_tokens=2)])
            await provider.reset()
            seen = await play(replica.url, "m", load)
            return seen, (await provider.reports())["r"]
        finally:
            await provider.stop()


def compare(seen: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """How far measured times are from the expected ones, request by request."""
    errors = [abs(s - e) / e for s, e in zip(seen, expected, strict=True)]
    return {"median_error": statistics.median(errors), "p95_error": float(np.quantile(errors, 0.95))}


async def against_arithmetic(seed: int) -> list[dict[str, Any]]:
    """Measured HTTP times of the emulator against the same engine in virtual time, at several points."""
    rows: list[dict[str, Any]] = []
    for model, device in POINTS:
        profile = profiles()[model, device]
        full_s = profile.alone_s(400, 150) / BUSY_BATCH * 2.0
        for load_share in LOADS:
            rng = np.random.default_rng([seed, len(rows)])
            scale = max(1.0, ANALYTIC_REQUESTS * full_s / load_share / 12.0)  # about 12 s of wall time a point

            def prompt(rng: np.random.Generator = rng) -> str:
                return padded(int(np.exp(rng.uniform(math.log(40), math.log(2000)))), rng)

            load = poisson(load_share / full_s * scale, ANALYTIC_REQUESTS, rng, prompt, (30, 500))
            seen, report = await emulate(profile, load, scale)
            requests = [
                Request(
                    request_id=str(i),
                    prompt_tokens=prompt_tokens(a.prompt),
                    output_tokens=a.output_tokens,
                    prefix=prefix_hashes(a.prompt, BLOCK_TOKENS),
                )
                for i, a in enumerate(load)
            ]
            expected = predict(profile.scaled(scale), requests, [s.sent_s for s in seen])
            ttft = compare([s.ttft_s for s in seen], [e[0] for e in expected])
            e2e = compare([s.e2e_s for s in seen], [e[1] for e in expected])
            rows.append(
                {
                    "part": "arithmetic",
                    "model": model,
                    "device": device,
                    "load": load_share,
                    "time_scale": round(scale, 3),
                    "ttft_median_ms": 1e3 * statistics.median(e[0] for e in expected),
                    "ttft_median_late_ms": 1e3
                    * statistics.median(s.ttft_s - e[0] for s, e in zip(seen, expected, strict=True)),
                    "ttft_median_error": ttft["median_error"],
                    "e2e_median_error": e2e["median_error"],
                    "e2e_p95_error": e2e["p95_error"],
                    "lag_p99_ms": report.lag_p99_ms,
                    "void": report.void,
                }
            )
    return rows


async def fit(
    url: str, model: str, limits: EngineProfile, rng: np.random.Generator, largest: int = 1024
) -> EngineProfile:
    """A profile of the real server, up to `largest` words a prompt, by non-negative least squares on relative errors.

    Alone, TTFT = call_base + step_base + prefill_token p + prefill_ctx p^2 / 2; in a batch of n equal requests, the
    mean time between tokens = step_base + decode_seq n + decode_ctx c. One more equation per prompt size would be
    needed to tell call_base from step_base; the decodes give step_base.
    """
    await play(url, model, [Ask(at_s=0.0, prompt=words(rng, 64), output_tokens=8)])
    equations: list[tuple[list[float], float]] = []
    for size in [each for each in FIT_PROMPTS if each <= largest] * 2:
        (alone,) = await play(url, model, [Ask(at_s=0.0, prompt=words(rng, size), output_tokens=2)])
        p = alone.prompt_tokens
        equations.append(([1.0, 0.0, 0.0, p, p * p / 2.0, 1.0], alone.ttft_s))
    for batch in FIT_BATCHES:
        for size in FIT_CONTEXTS:
            if batch > limits.max_batch:
                continue
            together = [Ask(at_s=0.0, prompt=words(rng, size), output_tokens=FIT_OUTPUT) for _ in range(batch)]
            seen = await play(url, model, together)
            last_first_s = max(s.sent_s + s.ttft_s for s in seen)  # from here on all of them decode together
            first_end_s = min(s.sent_s + s.e2e_s for s in seen)
            context = sum(s.prompt_tokens + FIT_OUTPUT / 2.0 for s in seen)
            late = max(seen, key=lambda s: s.ttft_s)
            if first_end_s > last_first_s:
                equations.append(([1.0, float(batch), context, 0.0, 0.0, 0.0], late.tpot_s))
    matrix, times = np.array([e[0] for e in equations]), np.array([e[1] for e in equations])
    found, _ = nnls(matrix / times[:, None], np.ones(len(times)))
    names = (
        "step_base_s",
        "decode_seq_s",
        "decode_ctx_token_s",
        "prefill_token_s",
        "prefill_ctx_token_s",
        "call_base_s",
    )
    return msgspec.structs.replace(limits, **dict(zip(names, map(float, found), strict=True)))


async def against_vllm(
    url: str, model: str, limits: EngineProfile, seed: int, count: int
) -> tuple[EngineProfile, list[dict[str, Any]]]:
    """Fit on a quiet server, then the same Poisson load, of prompts the fit never saw, to both."""
    rng = np.random.default_rng([seed, 1000])
    profile = await fit(url, model, limits, rng)
    rows = []
    for load_share in (0.3, 0.7):
        step_s = profile.step_s(limits.max_batch, limits.max_batch * 200)
        call_s = profile.alone_s(200, 1) + 40 * step_s / limits.max_batch

        def prompt() -> str:
            return words(rng, int(np.exp(rng.uniform(math.log(20), math.log(600)))))

        load = poisson(load_share / call_s, count, rng, prompt, (8, 64))
        real = await play(url, model, load)
        twin = [
            Ask(at_s=s.sent_s / TWIN_SCALE, prompt=padded(s.prompt_tokens, rng), output_tokens=s.output_tokens)
            for s in real
        ]
        emulated, report = await emulate(profile, twin, TWIN_SCALE)
        requests = [
            Request(request_id=str(i), prompt_tokens=s.prompt_tokens, output_tokens=s.output_tokens)
            for i, s in enumerate(real)
        ]
        virtual = predict(profile, requests, [s.sent_s for s in real])
        row: dict[str, Any] = {"part": "vllm", "load": load_share, "requests": len(real), "void": report.void}
        for name, reals, emus, virtuals in (
            ("ttft", [s.ttft_s for s in real], [s.ttft_s * TWIN_SCALE for s in emulated], [v[0] for v in virtual]),
            ("e2e", [s.e2e_s for s in real], [s.e2e_s * TWIN_SCALE for s in emulated], [v[1] for v in virtual]),
        ):
            row[f"{name}_real_p50_s"] = float(np.quantile(reals, 0.5))
            row[f"{name}_real_p95_s"] = float(np.quantile(reals, 0.95))
            row[f"{name}_ratio_p50"] = float(np.quantile(emus, 0.5) / np.quantile(reals, 0.5))
            row[f"{name}_ratio_p95"] = float(np.quantile(emus, 0.95) / np.quantile(reals, 0.95))
            row[f"{name}_median_error"] = compare(emus, reals)["median_error"]
            row[f"{name}_virtual_median_error"] = compare(virtuals, reals)["median_error"]
        rows.append(row)
    return profile, rows


@click.group()
def main() -> None:
    """Check the engine emulator."""


@main.command()
@click.option("--url", help="A real vLLM to fit and compare; without it only the arithmetic is checked.")
@click.option("--model", default="coordinator", show_default=True, help="Name of the model at --url.")
@click.option("--max-batch", default=8, show_default=True, help="--max-num-seqs of the server at --url.")
@click.option("--max-step-tokens", default=2048, show_default=True, help="--max-num-batched-tokens of it.")
@click.option("--kv-tokens", default=87_296, show_default=True, help="Tokens that its KV cache holds.")
@click.option("--requests", default=40, show_default=True, help="Requests of each comparison with --url.")
@click.option("--seed", default=0, show_default=True)
@click.option("--skip-arithmetic", is_flag=True, help="Only compare with --url.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for result.json and result.md.")
def check(
    url: str | None,
    model: str,
    max_batch: int,
    max_step_tokens: int,
    kv_tokens: int,
    requests: int,
    seed: int,
    skip_arithmetic: bool,
    out: Path | None,
) -> None:
    """Compare the emulator with its arithmetic, and with a real vLLM if there is one."""
    rows: list[dict[str, Any]] = [] if skip_arithmetic else asyncio.run(against_arithmetic(seed))
    if url is not None:
        limits = EngineProfile(
            model=model,
            device="cpu",
            step_base_s=0.0,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            kv_capacity_tokens=kv_tokens,
        )
        profile, real_rows = asyncio.run(against_vllm(url, model, limits, seed, requests))
        rows += [{"part": "profile", **msgspec.to_builtins(profile)}, *real_rows]
    print(table(rows))
    if out is not None:
        write_result(out, "python -m eval.emulator check", rows, claims=[], seeds=[seed])


if __name__ == "__main__":
    main()
