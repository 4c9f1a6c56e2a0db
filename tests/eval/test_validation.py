"""What the simulator is held against: real runs that are kept, and profiles of servers that are busy."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("scipy")

from eval import validation
from eval.emulator import Seen, predict
from eval.sim import against_http, against_vllm, vllm_sessions
from eval.sim.against_http import FLEETS, Measured, declare, imitate
from eval.sim.vllm_sessions import Turn, chained
from swarmx.core.batching import BLOCK_TOKENS, Request
from swarmx.core.engine import EngineProfile
from swarmx.providers.emulated.provider import EmulatedProvider, EmulatedSpec

QUIET = EngineProfile(
    model="m", device="cpu", step_base_s=0.2, decode_seq_s=0.008, decode_ctx_token_s=5e-7, prefill_token_s=0.006,
    prefill_ctx_token_s=2.5e-6, call_base_s=0.05, kv_capacity_tokens=43_600, max_batch=8, max_step_tokens=4096,
)  # fmt: skip
BUSY = msgspec.structs.replace(QUIET, step_base_s=0.25, decode_seq_s=0.012, prefill_token_s=0.0075)


def kept_run(fleet: str, count: int, *, slower: float = 1.0, gap_s: float = 1.0) -> Measured:
    """As if a gateway had taken `slower` times as long as the simulator."""
    at_s = np.cumsum(np.random.default_rng(3).exponential(gap_s, size=count)).tolist()
    took_s = imitate(FLEETS[fleet], declare(count, 0), at_s, "least_work", time_scale=1.0, seed=99) * slower
    times = [(at, at + took) for at, took in zip(at_s, took_s.tolist(), strict=True)]
    return Measured(fleet=fleet, policy="least_work", seed=0, time_scale=1.0, load=0.5, times=times, late=[])


def seen_by(profile: EngineProfile, count: int, seed: int, gap_s: float = 4.0) -> list[Seen]:
    """What a client of such a server would measure, exactly."""
    rng = np.random.default_rng(seed)
    sent_s = np.cumsum(rng.exponential(gap_s, size=count)).tolist()
    requests = [
        Request(request_id=str(i), prompt_tokens=int(rng.integers(20, 600)), output_tokens=int(rng.integers(8, 64)))
        for i in range(count)
    ]
    return [
        Seen(
            sent_s=sent, ttft_s=ttft_s, e2e_s=e2e_s, prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
        )
        for sent, request, (ttft_s, e2e_s) in zip(sent_s, requests, predict(profile, requests, sent_s), strict=True)
    ]  # fmt: skip


def test_a_run_as_the_simulator_has_it_is_met_where_nothing_is_chosen() -> None:
    rows = against_http.compared(kept_run("one a model", 30), runs=3)
    assert [row["kind"] for row in rows] == ["chain", "fan", "single", "all"]
    for row in rows:
        assert row["ratio_p50"] == pytest.approx(1.0, abs=0.02)
        assert row["ratio_p95"] == pytest.approx(1.0, abs=0.05)


def test_a_slower_run_is_told_as_slower() -> None:
    rows = against_http.compared(kept_run("one a model", 30, slower=1.5), runs=3)
    assert rows[-1]["ratio_p95"] == pytest.approx(1 / 1.5, abs=0.05)
    assert rows[-1]["median_ratio"] == pytest.approx(1 / 1.5, abs=0.02)


def test_where_a_router_chooses_milliseconds_lead_to_other_times() -> None:
    alone, chosen = (against_http.compared(kept_run(fleet, 45, gap_s=0.3), runs=4) for fleet in FLEETS)
    assert chosen[-1]["noise_p95"] > alone[-1]["noise_p95"]


def test_a_run_that_was_kept_is_compared_again(tmp_path: Path) -> None:
    kept = tmp_path / "emulated.json"
    kept.write_bytes(msgspec.json.encode([kept_run("one a model", 12)]))
    out = tmp_path / "out"
    done = CliRunner().invoke(
        validation.main, ["--part", "emulated", "--again", str(kept), "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    claims = {each["name"]: each for each in json.loads((out / "result.json").read_bytes())["claims"]}
    assert claims["sim_vs_emulated_p50"]["met"]
    assert claims["sim_vs_emulated_p95"]["met"]


def test_the_fit_on_a_busy_server_is_right_about_requests_that_it_has_not_seen() -> None:
    busy = against_vllm.fit_busy(QUIET, seen_by(BUSY, 40, seed=0))
    row = against_vllm.compared(seen_by(BUSY, 40, seed=1), {"quiet": QUIET, "busy": busy}, 0.6, seed=0)
    assert abs(float(row["ratio_p50"] or 0.0) - 1.0) < 0.05
    assert abs(float(row["ratio_p95"] or 0.0) - 1.0) < 0.05
    assert float(row["quiet_ratio_p95"] or 0.0) < 0.9


def test_a_busy_server_that_is_like_the_quiet_one_changes_nothing() -> None:
    busy = against_vllm.fit_busy(QUIET, seen_by(QUIET, 20, seed=0))
    for name in ("step_base_s", "prefill_token_s"):
        assert getattr(busy, name) == pytest.approx(getattr(QUIET, name), rel=0.05)


def test_a_constant_that_the_quiet_fit_found_to_be_nothing_can_grow() -> None:
    nothing = msgspec.structs.replace(QUIET, call_base_s=0.0)
    assert against_vllm.fit_busy(nothing, seen_by(QUIET, 20, seed=0)).call_base_s > 0.0


async def test_a_server_is_fitted_and_judged_at_two_loads(tmp_path: Path) -> None:
    row = {"key": "", "model": "x", "prompt_tokens": 1, "output_tokens": 1, "finish_reason": "stop", "reply": None}
    (tmp_path / "unused.jsonl").write_text(json.dumps(row) + "\n")  # requests say how long their answers are
    spec = EmulatedSpec(replica_id="r", model="m", kind="llm", device="cpu", profile=BUSY)
    provider = EmulatedProvider([spec], time_scale=50.0, recorded=tmp_path)
    (replica,) = await provider.start()
    try:
        rows = await against_vllm.vllm_rows(
            replica.url, "m", BUSY, requests=6, seed=0, traffic=against_vllm.Traffic(), loads=(0.3, 0.9), shipped=QUIET
        )
    finally:
        await provider.stop()
    assert [(row["part"], row.get("fit", row.get("load"))) for row in rows] == [
        ("vllm profile", "busy"), ("vllm profile", "quiet"), ("vllm profile", "shipped"), ("vllm", 0.3), ("vllm", 0.9),
    ]  # fmt: skip
    assert all(float(row["shipped_ratio_p50"] or 0.0) > 0.0 for row in rows if row["part"] == "vllm")
    assert {each.name for each in validation.claims(rows)} == {"sim_vs_vllm_p50", "sim_vs_vllm_p95"}


def test_vllm_needs_a_server_or_a_model(tmp_path: Path) -> None:
    done = CliRunner().invoke(validation.main, ["--part", "vllm", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "needs --vllm" in done.output


def test_a_profile_that_does_not_ship_is_an_error(tmp_path: Path) -> None:
    options = ["--part", "vllm", "--url", "http://127.0.0.1:1", "--shipped", "qwen3-8b", "abacus"]
    done = CliRunner().invoke(validation.main, [*options, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "no profile of qwen3-8b on abacus" in done.output


def turns_of_a_session(profile: EngineProfile, count: int) -> list[Turn]:
    """What a client of such a server would measure of one session, whose turns follow each other a minute apart."""
    rng = np.random.default_rng(1)
    prompt: tuple[int, ...] = tuple(rng.integers(1, 1000, 300).tolist())
    sizes, requests = [], []
    for i in range(count):
        answer = tuple(rng.integers(1, 1000, 80).tolist())
        sizes.append((prompt, answer))
        requests.append(
            Request(request_id=str(i), prompt_tokens=len(prompt), output_tokens=80, prefix=chained(prompt + answer))
        )
        prompt += answer + tuple(rng.integers(1, 1000, 120).tolist())
    times = predict(profile, requests, [60.0 * i for i in range(count)])
    return [
        Turn(prompt=prompt, answer=answer, sent_s=60.0 * i, ttft_s=ttft_s, e2e_s=e2e_s)
        for i, ((prompt, answer), (ttft_s, e2e_s)) in enumerate(zip(sizes, times, strict=True))
    ]


def test_what_a_session_said_before_is_found_in_the_cache_of_the_engine_model() -> None:
    told = {"hits": 1_800.0, "queries": 3_000.0, "preemptions": 0.0}
    row = vllm_sessions.compared("shipped", QUIET, turns_of_a_session(QUIET, 6), told)
    assert row["real_cached"] == pytest.approx(0.6)
    assert 0.5 < float(row["simulated_cached"] or 0.0) < 0.9
    for name in ("ttft", "e2e"):
        assert row[f"{name}_ratio_p50"] == pytest.approx(1.0)
        assert row[f"{name}_ratio_p95"] == pytest.approx(1.0)


def test_blocks_have_one_name_as_long_as_all_before_them_is_the_same() -> None:
    tokens = tuple(range(BLOCK_TOKENS * 3 + 5))
    other = (*tokens[: BLOCK_TOKENS + 1], -1, *tokens[BLOCK_TOKENS + 2 :])
    assert len(chained(tokens)) == 3
    assert chained(tokens)[:1] == chained(other)[:1]
    assert not set(chained(tokens)[1:]) & set(chained(other)[1:])
