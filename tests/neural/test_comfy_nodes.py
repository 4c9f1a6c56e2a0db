"""What the nodes of a ComfyUI graph have to do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.neural.heads.comfy_nodes import NodeWork, node_works

MEGAPIXEL = 1024 * 1024


def a_graph(**changes: dict[str, Any]) -> dict[str, Any]:
    """Text to image; `changes` are inputs by the name of the node."""
    inputs: dict[str, dict[str, Any]] = {
        "CheckpointLoaderSimple": {"ckpt_name": "tiny.safetensors"},
        "CLIPTextEncode": {"text": "a lighthouse", "clip": ["1", 1]},
        "EmptyLatentImage": {"width": 512, "height": 512, "batch_size": 1},
        "KSampler": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "steps": 20,
            "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "seed": 1,
        },
        "VAEDecode": {"samples": ["4", 0], "vae": ["1", 2]},
        "SaveImage": {"images": ["5", 0], "filename_prefix": "x"},
    }  # fmt: skip
    return {
        str(number): {"class_type": name, "inputs": {**values, **changes.get(name, {})}}
        for number, (name, values) in enumerate(inputs.items(), 1)
    }


def sampler(**inputs: Any) -> NodeWork:
    return node_works(a_graph(KSampler=inputs))["4"]


def test_a_sampler_evaluates_its_network_twice_a_step_with_guidance_and_once_without() -> None:
    assert sampler().amounts == (40.0, 40.0 * 0.25, 40.0 * 0.25 * 0.25)
    assert sampler(cfg=1.0).amounts[0] == 20.0


def test_a_sampler_of_second_order_evaluates_it_twice_a_step_but_for_the_last() -> None:
    assert sampler(sampler_name="heun", cfg=1.0).amounts[0] == 39.0
    assert sampler(sampler_name="a sampler of tomorrow", cfg=1.0).amounts[0] == 20.0


def test_a_name_that_comes_from_a_selector_is_the_selectors() -> None:
    graph = a_graph(KSampler={"sampler_name": ["7", 0], "cfg": 1.0})
    graph["7"] = {"class_type": "Sampler Selector", "inputs": {"sampler_name": "heun"}}
    assert node_works(graph)["4"].amounts[0] == 39.0
    graph["7"]["inputs"] = {}
    assert node_works(graph)["4"].amounts[0] == 20.0


def test_less_denoise_makes_steps_smaller_and_not_fewer() -> None:
    assert sampler(denoise=0.3).amounts == sampler().amounts


def test_a_sampler_that_does_part_of_the_steps_evaluates_only_those() -> None:
    assert sampler(start_at_step=5, end_at_step=15, cfg=1.0).amounts[0] == 10.0
    assert sampler(start_at_step=5, end_at_step=10000, cfg=1.0).amounts[0] == 15.0


def test_nodes_that_handle_pictures_know_how_many_pixels() -> None:
    works = node_works(a_graph(EmptyLatentImage={"width": 1024, "batch_size": 3}))
    assert works["5"] == NodeWork(node="5", class_type="vaedecode", model="tiny.safetensors", amounts=(1.5,))
    assert works["6"].amounts == (1.5,)
    assert works["2"].amounts == ()


def test_the_weights_that_a_node_runs_or_loads_are_named() -> None:
    works = node_works(a_graph())
    assert [works[key].model for key in "12456"] == [*["tiny.safetensors"] * 4, ""]


def test_an_upscaled_latent_is_larger_for_all_that_follow() -> None:
    graph = a_graph()
    graph["7"] = {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["4", 0], "scale_by": 2.0}}
    graph["5"]["inputs"]["samples"] = ["7", 0]
    assert node_works(graph)["5"].amounts == (1.0,)


def test_numbers_are_followed_through_primitives_and_guiders() -> None:
    graph = {
        "n": {"class_type": "PrimitiveInt", "inputs": {"value": 8}},
        "m": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors"}},
        "s": {"class_type": "BasicScheduler", "inputs": {"model": ["m", 0], "steps": ["n", 0], "denoise": 1.0}},
        "k": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "g": {"class_type": "BasicGuider", "inputs": {"model": ["m", 0]}},
        "l": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}},
        "x": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"guider": ["g", 0], "sampler": ["k", 0], "sigmas": ["s", 0], "latent_image": ["l", 0]},
        },
    }
    works = node_works(graph)
    assert works["x"].amounts == (8.0, 8.0, 8.0)
    assert works["x"].model == "flux.safetensors"
    assert works["k"].amounts == ()


def test_a_graph_that_goes_round_in_a_circle_ends() -> None:
    graph = a_graph(EmptyLatentImage={"width": ["4", 0]})
    graph["3"]["inputs"] = {"samples": ["4", 0]}
    assert node_works(graph)["4"].amounts[0] == 40.0


def test_a_picture_that_is_upscaled_again_and_again_stays_finite() -> None:
    graph = a_graph()
    for number in range(7, 307):
        source = "4" if number == 7 else str(number - 1)
        graph[str(number)] = {"class_type": "LatentUpscaleBy", "inputs": {"samples": [source, 0], "scale_by": 64.0}}
    graph["5"]["inputs"]["samples"] = ["306", 0]
    assert 4000.0 < node_works(graph)["5"].amounts[0] < 5000.0


def test_the_inputs_of_a_node_are_gone_through_no_oftener_for_all_that_it_feeds() -> None:
    class Counted(dict[str, Any]):
        times = 0

        def values(self) -> Any:
            self.times += 1
            return super().values()

    loader = Counted({f"more {number}": ["x", 0] for number in range(10)})
    graph: dict[str, Any] = {"0": {"class_type": "CheckpointLoaderSimple", "inputs": loader}}
    for number in range(1, 100):
        graph[str(number)] = {"class_type": "KSampler", "inputs": {"latent_image": ["0", 0]}}
    node_works(graph)
    assert 1 <= loader.times <= 2


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


links = st.tuples(st.sampled_from("1234567"), st.integers(0, 2)).map(list)
names = ["steps", "cfg", "width", "height", "batch_size", "latent_image", "sampler_name", "guider", "start_at_step"]


@given(inputs=st.dictionaries(st.sampled_from(names), json_values | links | st.just(10**400)))
def test_whatever_the_inputs_amounts_are_finite_and_not_negative(inputs: dict[str, Any]) -> None:
    for work in node_works(a_graph(KSampler=inputs, EmptyLatentImage=inputs)).values():
        assert all(0.0 <= amount < float("inf") for amount in work.amounts)


@given(graph=json_values)
def test_anything_else_is_a_graph_without_nodes(graph: object) -> None:
    assert node_works(graph) == {}


@pytest.mark.parametrize("side", [0, -5, "wide", None, 10**400])
def test_a_size_that_says_nothing_counts_as_one_megapixel(side: object) -> None:
    assert node_works(a_graph(EmptyLatentImage={"width": side}))["6"].amounts == (1.0,)
