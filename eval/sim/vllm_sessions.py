"""Sessions of agents on a real vLLM, and the same requests in the engine model.

A session's prompts grow: each is the last prompt, the answer to it, and what a tool found, after a gap. What a server
still has of them in its prefix cache, and whom it preempts when the cache is full, is what is judged here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from eval.emulator import TIMEOUT, replay
from eval.result import Row
from swarmx.core.batching import BLOCK_TOKENS, Request
from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ReplicaError

_COUNTED = {
    "hits": "vllm:prefix_cache_hits",
    "queries": "vllm:prefix_cache_queries",
    "preemptions": "vllm:num_preemptions",
}
_TOKENS = (1_000, 100_000)
"""Ids to draw from: any words will do, but none that ends or opens something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """So many sessions, begun at `rate` a second; sizes are log-uniform, from and to, gaps exponential."""

    count: int
    rate: float
    shared_tokens: int = 512
    turns: tuple[int, int] = (3, 8)
    found_tokens: tuple[int, int] = (50, 1_500)
    output_tokens: tuple[int, int] = (16, 300)
    gap_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A call of a session as a client measured it: prompt and answer as token ids, `sent_s` from the start."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    sent_s: float
    ttft_s: float
    e2e_s: float


async def session_rows(
    url: str, model: str, fitted: Mapping[str, EngineProfile], sessions: Sessions, seed: int
) -> list[Row]:
    """One row for each profile of what `sessions` took on the server at `url`, real and in the engine model."""
    rng = np.random.default_rng([seed, 0x5E55])
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0)) as client:
        before = await _counted(client, url)
        turns = await _play(client, url, model, sessions, rng)
        after = await _counted(client, url)
    real = {name: after[name] - before[name] for name in _COUNTED}
    return [compared(name, profile, turns, real) for name, profile in fitted.items()]


def compared(fit: str, profile: EngineProfile, turns: Sequence[Turn], real: Mapping[str, float]) -> Row:
    """What the engine model makes of these turns, sent when they were sent; `ratio_`s are model over real."""
    requests = [
        Request(
            request_id=str(i),
            prompt_tokens=len(turn.prompt),
            output_tokens=len(turn.answer),
            prefix=chained((*turn.prompt, *turn.answer)),
        )
        for i, turn in enumerate(turns)
    ]
    times, counters = replay(profile, requests, [turn.sent_s for turn in turns])
    row: dict[str, Any] = {
        "part": "vllm sessions",
        "fit": fit,
        "calls": len(turns),
        "prompt_tokens": float(np.mean([len(turn.prompt) for turn in turns])),
        "real_cached": real["hits"] / max(1.0, real["queries"]),
        "simulated_cached": counters.prefix_hit_tokens / max(1, counters.prefix_query_tokens),
        "real_preemptions": int(real["preemptions"]),
        "simulated_preemptions": counters.preemptions,
    }
    for column, name, took in (
        (0, "ttft", [turn.ttft_s for turn in turns]),
        (1, "e2e", [turn.e2e_s for turn in turns]),
    ):
        ours = [each[column] for each in times]
        for title, level in (("p50", 0.5), ("p95", 0.95)):
            row[f"{name}_real_{title}_s"] = float(np.quantile(took, level))
            row[f"{name}_ratio_{title}"] = float(np.quantile(ours, level)) / row[f"{name}_real_{title}_s"]
    return row


def chained(tokens: Sequence[int]) -> tuple[int, ...]:
    """A name for each full block: equal only where all tokens before are equal."""
    chain, names = b"", []
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = np.array(tokens[start : start + BLOCK_TOKENS], dtype=np.int32).tobytes()
        chain = blake2b(chain + block, digest_size=8).digest()
        names.append(int.from_bytes(chain))
    return tuple(names)


async def _play(
    client: aiohttp.ClientSession, url: str, model: str, sessions: Sessions, rng: np.random.Generator
) -> list[Turn]:
    shared = _drawn(rng, sessions.shared_tokens)
    starts_s = np.cumsum(rng.exponential(1.0 / sessions.rate, sessions.count))
    begin_s = time.perf_counter() + 0.1
    played = await asyncio.gather(
        *(
            _session(client, url, model, sessions, shared, begin_s, float(at_s), child)
            for at_s, child in zip(starts_s, rng.spawn(sessions.count), strict=True)
        )
    )
    return sorted((turn for session in played for turn in session), key=lambda turn: turn.sent_s)


async def _session(
    client: aiohttp.ClientSession,
    url: str,
    model: str,
    sessions: Sessions,
    shared: tuple[int, ...],
    begin_s: float,
    at_s: float,
    rng: np.random.Generator,
) -> list[Turn]:
    prompt, turns = shared, []
    await asyncio.sleep(begin_s + at_s - time.perf_counter())
    for _ in range(int(rng.integers(sessions.turns[0], sessions.turns[1] + 1))):
        prompt += _drawn(rng, _size(rng, sessions.found_tokens))
        turns.append(await _turn(client, url, model, prompt, _size(rng, sessions.output_tokens), begin_s))
        prompt += turns[-1].answer
        await asyncio.sleep(rng.exponential(sessions.gap_s))
    return turns


async def _turn(
    client: aiohttp.ClientSession, url: str, model: str, prompt: tuple[int, ...], output_tokens: int, begin_s: float
) -> Turn:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "return_token_ids": True,
    }
    sent_s = time.perf_counter()
    first_s, answer = None, list[int]()
    async with client.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise ReplicaError(f"{url} answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter()
                answer += json.loads(line[6:])["choices"][0].get("token_ids") or []
    ended_s = time.perf_counter()
    if first_s is None or not answer:
        raise ReplicaError(f"{url} ended a stream without tokens, expected a vLLM that knows return_token_ids")
    return Turn(
        prompt=prompt,
        answer=tuple(answer),
        sent_s=sent_s - begin_s,
        ttft_s=first_s - sent_s,
        e2e_s=ended_s - sent_s,
    )


async def _counted(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with client.get(f"{url}/metrics") as response:
        found = {family.name: family for family in text_string_to_metric_families(await response.text())}
    return {
        name: sum(sample.value for sample in found[metric].samples if sample.name == f"{metric}_total")
        for name, metric in _COUNTED.items()
    }


def _drawn(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(*_TOKENS, size=count).tolist())


def _size(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(np.exp(rng.uniform(*np.log(bounds))))
