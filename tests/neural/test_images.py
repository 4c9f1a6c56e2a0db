from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.neural.checkpoint import middle_of
from swarmx.neural.facts import DEVICES, UNKNOWN_DEVICE
from swarmx.neural.head import Head
from swarmx.neural.heads.comfy_graph import MAX_NODES, ImageJob, graph_key, model_size_b, read_graph
from swarmx.neural.heads.images import IMAGE, Factors, ImageHistory, estimate_s, image_rows
from swarmx.neural.net import QuantileNet


def text_to_image(*, steps: object = 20, width: object = 1024, batch: object = 1, seed: int = 1) -> dict[str, Any]:
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": 1024, "batch_size": batch}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red fox", "clip": ["4", 1]}},
        "3": {
            "class_type": "KSampler",
            "inputs": {"steps": steps, "seed": seed, "model": ["4", 0], "positive": ["6", 0], "latent_image": ["5", 0]},
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    }


def test_a_graph_says_steps_resolution_batch_and_model() -> None:
    job = read_graph(text_to_image(steps=25, width=2048, batch=2))
    assert (job.samplers, job.steps, job.megapixels, job.batch, job.work) == (1, 25.0, 2.0, 2.0, 100.0)
    assert (job.nodes, job.links, job.model_b) == (5.0, 6.0, 2.6)


def test_numbers_are_followed_through_primitive_nodes() -> None:
    graph = text_to_image(steps=["20", 0])
    graph["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": ["21", 0]}}
    graph["21"] = {"class_type": "PrimitiveInt", "inputs": {"value": 12}}
    assert read_graph(graph).steps == 12.0


def test_steps_of_a_scheduler_upstream_are_those_of_its_sampler_whatever_its_denoise() -> None:
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev-fp8.safetensors"}},
        "2": {"class_type": "BasicScheduler", "inputs": {"steps": 28, "denoise": 0.5, "model": ["1", 0]}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024}},
        "4": {"class_type": "SamplerCustomAdvanced", "inputs": {"sigmas": ["2", 0], "latent_image": ["3", 0]}},
        "5": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }
    job = read_graph(graph)
    assert (job.samplers, job.steps, job.work, job.model_b, job.eight_bit) == (1, 28.0, 28.0, 12.0, True)


def test_kinds_of_nodes_that_cost_are_counted() -> None:
    names = ("ImageUpscaleWithModel", "OllamaGenerateV2", "ControlNetApply", "SaveAnimatedWEBP", "RembgByBiRefNet")
    job = read_graph({str(i): {"class_type": name, "inputs": {}} for i, name in enumerate(names)})
    assert (job.upscalers, job.language, job.controls, job.video, job.masks, job.samplers) == (1, 1, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("flux1-schnell.safetensors", 12.0),
        ("sd3.5_large.safetensors", 8.1),
        ("juggernautXL_v9.ckpt", 2.6),
        ("v1-5-pruned.ckpt", 0.86),
    ],
)
def test_the_size_of_a_model_is_guessed_from_its_name(name: str, size: float) -> None:
    assert model_size_b([name]) == size


def test_a_name_without_a_hint_has_no_size() -> None:
    assert math.isnan(model_size_b(["my-secret-finetune.safetensors"]))


@pytest.mark.parametrize(
    "graph",
    [None, 7, "graph", [], {}, {"1": None}, {"1": {"inputs": {}}}, {"1": {"class_type": 3}}, [{"class_type": "X"}]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_graph_is_a_job_that_knows_nothing(graph: object) -> None:
    job = read_graph(graph)
    assert math.isnan(job.nodes)
    assert math.isnan(job.work)
    assert job.samplers == 0


def test_a_circle_of_links_ends() -> None:
    graph = text_to_image(steps=["20", 0], width=["21", 0])
    graph["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": ["21", 0]}}
    graph["21"] = {"class_type": "PrimitiveInt", "inputs": {"value": ["20", 0], "model": ["3", 0]}}
    job = read_graph(graph)
    assert math.isnan(job.steps)
    assert math.isnan(job.work)
    assert job.samplers == 1


def test_of_a_huge_graph_the_first_nodes_are_read() -> None:
    graph = {str(i): {"class_type": "KSampler", "inputs": {"model": [str(i + 1), 0]}} for i in range(MAX_NODES + 500)}
    assert read_graph(graph).samplers == MAX_NODES


def test_absurd_numbers_are_held_or_unknown() -> None:
    assert read_graph(text_to_image(steps=10**400)).steps != read_graph(text_to_image(steps=10**400)).steps
    assert read_graph(text_to_image(steps=1e300)).steps == 10_000.0
    assert math.isnan(read_graph(text_to_image(steps=-4)).steps)
    assert math.isnan(read_graph(text_to_image(steps=True)).steps)
    assert math.isnan(read_graph(text_to_image(width="wide")).megapixels)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
nodes = st.dictionaries(
    st.sampled_from("12345"),
    st.fixed_dictionaries(
        {
            "class_type": st.sampled_from(["KSampler", "EmptyLatentImage", "Odd"]) | anything,
            "inputs": st.dictionaries(
                st.sampled_from(["steps", "width", "height", "batch_size", "length", "value", "denoise", "model"]),
                anything | st.tuples(st.sampled_from("123456"), st.integers(0, 2)).map(list),
                max_size=6,
            )
            | anything,
        }
    )
    | anything,
    max_size=5,
)


@settings(max_examples=200)
@given(graph=nodes | anything)
def test_no_graph_is_too_strange(graph: object) -> None:
    job = read_graph(graph)
    graph_key(graph)
    assert 0.0 < estimate_s(job, UNKNOWN_DEVICE, cold=True) < 1e12
    features, anchor = image_rows([job], [UNKNOWN_DEVICE], [False], [Factors()])
    assert not np.isinf(features).any()
    assert np.isfinite(anchor).all()


def test_a_job_that_knows_nothing_gets_a_finite_forecast() -> None:
    k, width = len(IMAGE.levels), len(IMAGE.features)
    rng = np.random.default_rng(0)
    net = QuantileNet(
        hidden=rng.normal(size=(width, 4)).astype(np.float32), hidden_bias=np.zeros(4, dtype=np.float32),
        out=rng.normal(size=(4, k)).astype(np.float32), skip=np.zeros((width, k), dtype=np.float32),
        out_bias=np.zeros(k, dtype=np.float32), middle=middle_of(IMAGE.levels),
    )  # fmt: skip
    head = Head(spec=IMAGE, mean=np.zeros(width, np.float32), scale=np.ones(width, np.float32), nets=(net,))
    features, anchor = image_rows([ImageJob()], [UNKNOWN_DEVICE], [False], [Factors()])
    forecast = head.forecast(features[0], float(anchor[0]))
    assert forecast.unit == "s"
    assert all(math.isfinite(q) for q in forecast.quantiles)


def test_graphs_that_differ_in_words_and_seeds_only_are_the_same() -> None:
    other = text_to_image(seed=99)
    other["6"]["inputs"]["text"] = "a blue whale"
    assert graph_key(other) == graph_key(text_to_image())
    assert graph_key(text_to_image(steps=21)) != graph_key(text_to_image())


def test_the_estimate_grows_with_the_work_and_falls_with_the_device() -> None:
    job, twice = read_graph(text_to_image()), read_graph(text_to_image(batch=2))
    assert estimate_s(twice, DEVICES["h100"]) > estimate_s(job, DEVICES["h100"])
    assert estimate_s(job, DEVICES["rtx-3090"]) > estimate_s(job, DEVICES["h100"])
    assert estimate_s(job, DEVICES["h100"], cold=True) > estimate_s(job, DEVICES["h100"])


def test_a_graph_known_on_one_device_is_known_on_all() -> None:
    history = ImageHistory()
    for _ in range(3):
        for device, slow in (("a", 0.0), ("b", 1.0)):
            for graph, long in [("y", 2.0), *((f"z{i}", i % 3 - 1.0) for i in range(12))]:
                if (graph, device) != ("y", "b"):
                    history.observe(graph, device, slow + long)
    found = history.factors("y", "b")
    assert found.overall + found.graph + found.device == pytest.approx(3.0, abs=0.5)
    assert (found.graph_seen, found.device_seen) == (3, 36)


def test_a_history_without_runs_knows_no_factor_and_forgets_the_oldest_pairs() -> None:
    assert ImageHistory().factors("x", "a") == Factors()
    history = ImageHistory(size=2)
    for graph in "xyz":
        history.observe(graph, "a", 1.0)
    history.observe("w", "a", math.nan)
    assert [history.factors(graph, "a").graph_seen for graph in "wxyz"] == [0, 0, 1, 1]
