"""The emulator's parts without a process: pictures, metrics and the honesty of the clock."""

from __future__ import annotations

import struct
import zlib

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarmx.core.batching import Counters
from swarmx.providers.emulated.images import image_work, picture
from swarmx.providers.emulated.telemetry import Ended, Telemetry

COUNTERS = Counters(
    running=2,
    waiting=1,
    kv_usage=0.25,
    prefix_query_tokens=100,
    prefix_hit_tokens=64,
    preemptions=3,
    generated_tokens=77,
)


def chunks(png: bytes) -> dict[bytes, bytes]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + data),)
        found[kind] = data
        at += 12 + size
    return found


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (333, 7), (1, 1)])
def test_a_picture_is_a_real_png_of_that_size_and_says_that_it_is_emulated(width: int, height: int) -> None:
    parts = chunks(picture("a cat", width, height))
    assert struct.unpack(">II", parts[b"IHDR"][:8]) == (width, height)
    assert len(zlib.decompress(parts[b"IDAT"])) == height * (1 + -(-width // 8))
    assert b"emulated" in parts[b"tEXt"]
    assert b"IEND" in parts


def test_a_picture_depends_on_its_key_alone() -> None:
    assert picture("a", 64, 64) == picture("a", 64, 64) != picture("b", 64, 64)
    assert len(picture("a", 1024, 1024)) < 4096


def test_image_work_counts_megapixel_steps() -> None:
    assert image_work(1, 1024, 1024, 30) == 30
    assert image_work(2, 512, 512, 30) == 15
    assert image_work(1, 64, 64, 1) == 1


def ended(latency_s: float, reason: str = "stop", tokens: int = 11) -> Ended:
    return Ended(
        reason=reason,
        arrived_s=10.0,
        admitted_s=10.5,
        first_token_s=11.0,
        ended_s=10.0 + latency_s,
        prompt_tokens=40,
        output_tokens=tokens,
    )


def samples(telemetry: Telemetry) -> dict[tuple[str, str], float]:
    return {
        (s.name, s.labels.get("finished_reason", s.labels.get("le", ""))): s.value
        for family in text_string_to_metric_families(telemetry.exposition().decode())
        for s in family.samples
    }


def test_metrics_carry_vllms_names_and_labels() -> None:
    telemetry = Telemetry("m", lambda: COUNTERS)
    telemetry.ended(ended(2.0))
    telemetry.ended(ended(1.2, "abort", 1))
    got = samples(telemetry)
    assert got["vllm:num_requests_running", ""] == 2
    assert got["vllm:num_requests_waiting", ""] == 1
    assert got["vllm:kv_cache_usage_perc", ""] == 0.25
    assert got["vllm:prefix_cache_queries_total", ""] == 100
    assert got["vllm:prefix_cache_hits_total", ""] == 64
    assert got["vllm:num_preemptions_total", ""] == 3
    assert got["vllm:generation_tokens_total", ""] == 77
    assert got["vllm:prompt_tokens_total", ""] == 80
    assert got["vllm:request_success_total", "stop"] == got["vllm:request_success_total", "abort"] == 1
    assert got["vllm:time_to_first_token_seconds_sum", ""] == 2.0
    assert got["vllm:e2e_request_latency_seconds_count", ""] == 1
    assert got["vllm:e2e_request_latency_seconds_bucket", "2.0"] == 1
    assert got["vllm:e2e_request_latency_seconds_bucket", "1.5"] == 0
    assert got["vllm:inter_token_latency_seconds_count", ""] == 10
    assert got["vllm:inter_token_latency_seconds_sum", ""] == pytest.approx(1.0)
    assert got["vllm:request_queue_time_seconds_sum", ""] == 1.0
    assert got["vllm:request_generation_tokens_sum", ""] == 11
    assert b'model_name="m"' in telemetry.exposition()
    assert b'engine="0"' in telemetry.exposition()


@pytest.mark.parametrize(
    ("lag_s", "latency_s", "void"), [(0.019, 0.02, False), (0.021, 0.02, True), (0.2, 1.0, False), (0.3, 1.0, True)]
)
def test_a_run_is_void_when_the_host_was_later_than_it_may_be(lag_s: float, latency_s: float, void: bool) -> None:
    telemetry = Telemetry("m", lambda: COUNTERS)
    telemetry.ended(ended(latency_s, tokens=2))
    telemetry.woke(lag_s)
    report = telemetry.report()
    assert report.void is void
    assert bool(report.why) is void
    assert report.lag_max_ms == pytest.approx(1e3 * lag_s)


def test_a_reset_forgets_everything() -> None:
    telemetry = Telemetry("m", lambda: COUNTERS)
    telemetry.ended(ended(1.0))
    telemetry.woke(9.0)
    telemetry.reset()
    report = telemetry.report()
    assert (report.requests, report.lag_max_ms, report.void) == (0, 0.0, False)
