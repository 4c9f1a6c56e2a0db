"""Graphs are judged without a server; what only a server can know is left to it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.compat.comfyui.graph import cycle_in, models_in, signatures, upstream_first
from swarmx.compat.comfyui.nodes import NodeBook, merged, read_spec
from swarmx.compat.comfyui.validation import Accepted, Rejected, validate
from tests.compat.comfyui.fake_nodes import graph, node_info, object_info

SPECS = {name: read_spec(name, info) for name, info in object_info(["tiny.safetensors"], custom=True).items()}

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


def test_a_sound_graph_is_accepted_with_its_outputs() -> None:
    found = validate(graph(), SPECS)
    assert found == Accepted(outputs=("9",))


def test_an_output_that_cannot_be_made_does_not_keep_others_from_it() -> None:
    both = graph()
    both["10"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}}
    found = validate(both, SPECS)
    assert isinstance(found, Accepted)
    assert found.outputs == ("9",)
    assert found.node_errors["10"]["dependent_outputs"] == ["10"]


def test_a_cycle_is_found_and_named() -> None:
    loop = graph()
    loop["8"]["inputs"]["samples"] = ["3", 0]
    loop["3"]["inputs"]["latent_image"] = ["3", 0]
    found = validate(loop, SPECS)
    assert isinstance(found, Rejected)
    assert found.node_errors["3"]["errors"][0]["type"] == "dependency_cycle"


def test_a_chain_as_long_as_a_request_is_no_problem() -> None:
    chain: dict[str, Any] = {"0": {"class_type": "EmptyImage", "inputs": graph()["5"]["inputs"] | {"color": 0}}}
    for i in range(1, 10_000):
        chain[str(i)] = {"class_type": "ImageUpscaleWithModel", "inputs": {"image": [str(i - 1), 0]}}
    chain["end"] = {"class_type": "PreviewImage", "inputs": {"images": ["9999", 0]}}
    assert isinstance(validate(chain, SPECS), Rejected)
    assert len(signatures(chain, ["end"])) == 10_001


def test_values_are_converted_as_servers_do() -> None:
    loose = graph()
    loose["5"]["inputs"]["width"] = "128"
    loose["6"]["inputs"]["text"] = 5
    assert isinstance(validate(loose, SPECS), Accepted)
    assert loose["5"]["inputs"]["width"] == 128
    assert loose["6"]["inputs"]["text"] == "5"


def test_errors_of_a_graph_with_very_many_outputs_are_told_for_the_first_of_them() -> None:
    chain: dict[str, Any] = {"0": {"class_type": "EmptyImage", "inputs": {}}}
    for i in range(1, 2_000):
        chain[str(i)] = {"class_type": "ImageUpscaleWithModel", "inputs": {"image": [str(i - 1), 0]}}
    for i in range(2_000):
        chain[f"out{i}"] = {"class_type": "PreviewImage", "inputs": {"images": ["1999", 0]}}
    found = validate(chain, SPECS)
    assert isinstance(found, Rejected)
    assert found.node_errors["0"]["dependent_outputs"][0] == "out0"
    assert len(found.node_errors["0"]["dependent_outputs"]) < 100


def test_a_value_may_not_lead_a_server_out_of_what_it_offers() -> None:
    for value in ("x.png [output]", "x.png[temp]", "../x.png", "a\\..\\x.png", "/etc/x.png", {"image": ["x [temp]"]}):
        loads = {
            "1": {"class_type": "LoadImage", "inputs": {"image": value}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
        open_ended = replace(SPECS["LoadImage"].inputs["image"], type="COMBO", options=None)
        specs = {**SPECS, "LoadImage": replace(SPECS["LoadImage"], inputs={"image": open_ended}, core=False)}
        assert isinstance(validate(loads, specs), Rejected), value
    words = graph()
    words["6"]["inputs"]["text"] = "../ what a prompt says is its own affair [output]"
    assert isinstance(validate(words, SPECS), Accepted)


def _shows(value: Any, **more: Any) -> dict[str, Any]:
    """A custom node that takes any value, and shows it."""
    return {"1": {"class_type": "Shows", "inputs": {"value": value, **more}}, "2": graph()["4"]}


_SHOWS = {**SPECS, "Shows": read_spec("Shows", node_info("Shows", {"value": ["*", {}]}, [], out=True, module="odd"))}


@pytest.mark.parametrize("link", [["2", 0], ["2", 0.0], ["2", True], ["nobody", 0]])
def test_a_wrapped_list_that_a_server_takes_for_a_link_is_refused(link: Any) -> None:
    """It would make the server run a node that nobody has judged."""
    found = validate(_shows({"__value__": link}), _SHOWS)
    assert isinstance(found, Rejected)
    assert [each["type"] for each in found.node_errors["1"]["errors"]] == ["bad_linked_input"]


@pytest.mark.parametrize("value", [[1, 2, 3], ["a", "b"], [["2", 0]], {"__value__": ["2", 0]}, []])
def test_a_list_stays_wrapped_or_the_server_would_take_it_for_a_link(value: Any) -> None:
    wrapped = _shows({"__value__": value})
    assert isinstance(validate(wrapped, _SHOWS), Accepted)
    assert wrapped == _shows({"__value__": value})


def test_a_wrapped_number_or_text_is_taken_out() -> None:
    loose = graph()
    loose["5"]["inputs"]["width"] = {"__value__": "128"}
    loose["6"]["inputs"]["text"] = {"__value__": ["4", 0]}
    assert isinstance(validate(loose, SPECS), Accepted)
    assert (loose["5"]["inputs"]["width"], loose["6"]["inputs"]["text"]) == (128, "['4', 0]")


_FILE = {"filename": "ann_00001_.png", "subfolder": "", "type": "output"}


@pytest.mark.parametrize("value", [_FILE, {"camera": [_FILE]}, {"__value__": _FILE}, {"__value__": [_FILE]}])
def test_a_value_that_names_a_file_as_outputs_do_is_refused(value: Any) -> None:
    """A node that shows its inputs would make it an output of this client."""
    found = validate(_shows(value), _SHOWS)
    assert isinstance(found, Rejected)
    assert [each["type"] for each in found.node_errors["1"]["errors"]] == ["invalid_input_type"]


@pytest.mark.parametrize("note", [_FILE, {"params": _FILE}, [_FILE]])
def test_a_note_of_a_web_page_on_what_was_made_before_is_left_out(note: Any) -> None:
    """The class has no such input; some nodes take everything, and show it."""
    noted = _shows("x", videopreview=note, comment={"type": "x"})
    assert isinstance(validate(noted, _SHOWS), Accepted)
    assert noted == _shows("x", comment={"type": "x"})


def test_files_and_doubts_are_those_of_nodes_that_will_run() -> None:
    both = graph()
    both["20"] = {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}
    both["21"] = {"class_type": "Picky", "inputs": {"value": 1}}
    both["22"] = {"class_type": "PreviewImage", "inputs": {"images": ["20", 0], "also": ["21", 0]}}
    found = validate(both, SPECS, uploads=["cat.png"])
    assert isinstance(found, Accepted)
    assert (found.files, found.doubtful) == ({("20", "image")}, True)
    both["22"]["inputs"]["images"] = ["20", 7]
    found = validate(both, SPECS, uploads=["cat.png"])
    assert isinstance(found, Accepted)
    assert (found.outputs, found.files, found.doubtful) == (("9",), frozenset(), False)


def test_only_a_custom_node_may_take_what_its_description_does_not_allow() -> None:
    custom = {
        "1": {"class_type": "Picky", "inputs": {"value": 99}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    found = validate(custom, SPECS)
    assert isinstance(found, Accepted)
    assert found.doubtful


@given(changes=st.dictionaries(st.sampled_from(["3", "4", "5", "8", "9"]), _json, max_size=3), targets=_json)
@settings(max_examples=150, deadline=None)
def test_no_graph_at_all_raises(changes: dict[str, Any], targets: Any) -> None:
    odd: dict[str, Any] = copy.deepcopy(graph()) | changes
    for key, value in changes.items():
        if isinstance(value, dict):
            odd[key] = {"class_type": "KSampler", "inputs": value}
    found = validate(odd, SPECS, targets=targets)
    assert isinstance(found, Accepted | Rejected)
    if isinstance(found, Rejected):
        assert set(found.body) == {"error", "node_errors"}


def test_sources_come_before_what_they_feed() -> None:
    order = upstream_first(graph(), ["9"])
    assert set(order) == set(graph())
    assert order.index("4") < order.index("6") < order.index("3") < order.index("8") < order.index("9")
    assert cycle_in(graph(), ["9"]) == []


def test_the_same_seed_computes_the_same_and_another_one_only_part_of_it() -> None:
    first, same, other = (signatures(graph(seed), ["9"]) for seed in (1, 1, 2))
    assert first == same
    assert {node for node in first if first[node] != other[node]} == {"3", "8", "9"}


def test_the_union_offers_what_any_server_has_and_a_graph_goes_where_it_can_run() -> None:
    book = NodeBook()
    book.told("s1", object_info(["one.safetensors"]))
    book.told("s2", object_info(["two.safetensors"], custom=True))
    options = book.specs["CheckpointLoaderSimple"].inputs["ckpt_name"].options
    assert options == ("one.safetensors", "two.safetensors")
    assert book.able(graph(model="two.safetensors"), graph(), frozenset()) == {"s2"}
    assert book.able(graph(model="none.safetensors"), graph(), frozenset()) == frozenset()
    assert "Picky" in book.union
    assert models_in(graph(model="two.safetensors")) == {"two.safetensors"}


def test_of_two_ranges_the_wider_one_counts_and_an_input_that_one_lacks_is_optional() -> None:
    one = {"input": {"required": {"x": ["INT", {"min": 0, "max": 5}], "y": ["INT", {}]}}}
    two = {"input": {"required": {"x": ["INT", {"min": 2, "max": 9}]}}}
    found = merged(one, two)["input"]
    assert found == {"required": {"x": ["INT", {"min": 0, "max": 9}]}, "optional": {"y": ["INT", {}]}}


@pytest.mark.parametrize("info", [{}, {"input": None}, {"input": {"required": {"x": 3}}}, {"output": "IMAGE"}])
def test_a_description_that_is_odd_is_read_as_far_as_it_goes(info: dict[str, Any]) -> None:
    assert read_spec("Odd", info).outputs == ()


def _with(node: str, **inputs: Any) -> dict[str, Any]:
    made = graph()
    made[node]["inputs"] |= inputs
    return made


def _without(node: str, name: str) -> dict[str, Any]:
    made = graph()
    del made[node]["inputs"][name]
    return made


@pytest.mark.parametrize(
    ("wrong", "whole", "node", "kind"),
    [
        (None, "invalid_prompt", None, None),
        ({"9": {"inputs": {}}}, "invalid_prompt", None, None),
        ({"9": {"class_type": "NoSuchNode", "inputs": {}}}, "invalid_prompt", None, None),
        ({}, "prompt_no_outputs", None, None),
        ({"4": graph()["4"]}, "prompt_no_outputs", None, None),
        (_without("3", "steps"), "prompt_outputs_failed_validation", "3", "required_input_missing"),
        (_with("8", samples=["3"]), "prompt_outputs_failed_validation", "8", "bad_linked_input"),
        (_with("8", samples=["77", 0]), "prompt_outputs_failed_validation", "8", "bad_linked_input"),
        (_with("8", samples=["3", 5]), "prompt_outputs_failed_validation", "8", "bad_linked_input"),
        (_with("8", samples=["4", 0]), "prompt_outputs_failed_validation", "8", "return_type_mismatch"),
        (_with("3", steps="many"), "prompt_outputs_failed_validation", "3", "invalid_input_type"),
        (_with("5", width=1), "prompt_outputs_failed_validation", "5", "value_smaller_than_min"),
        (_with("5", width=1 << 20), "prompt_outputs_failed_validation", "5", "value_bigger_than_max"),
        (_with("3", sampler_name="none"), "prompt_outputs_failed_validation", "3", "value_not_in_list"),
        (_with("4", ckpt_name="x.safetensors"), "prompt_outputs_failed_validation", "4", "value_not_in_list"),
        (_with("3", latent_image=["3", 0]), "prompt_outputs_failed_validation", "3", "dependency_cycle"),
    ],
)
def test_each_kind_of_invalid_graph_is_refused_by_its_name_at_its_node(
    wrong: Any, whole: str, node: str | None, kind: str | None
) -> None:
    found = validate(wrong, SPECS)
    assert isinstance(found, Rejected)
    assert found.error["type"] == whole
    assert list(found.node_errors) == ([] if node is None else [node])
    if node is not None:
        assert [each["type"] for each in found.node_errors[node]["errors"]] == [kind]
        assert found.node_errors[node]["dependent_outputs"] == ["9"]


@pytest.mark.parametrize("link", [["nobody", 0], ["4", 0.0], ["4", True]])
def test_a_link_under_a_name_that_the_class_has_not_leads_to_a_node_of_the_graph_all_the_same(link: list[Any]) -> None:
    astray = graph()
    astray["9"]["inputs"]["more"] = link
    found = validate(astray, SPECS)
    assert isinstance(found, Rejected)
    assert found.body["node_errors"]["9"]["errors"][0]["type"] == "bad_linked_input"
    astray["9"]["inputs"]["more"] = ["4", 0]
    assert isinstance(validate(astray, SPECS), Accepted)


def test_a_chain_that_servers_cannot_go_up_is_refused_also_under_names_that_classes_have_not() -> None:
    chain = graph()
    for number in range(600):
        inputs = graph()["5"]["inputs"] | ({"more": [f"c{number - 1}", 0]} if number else {})
        chain[f"c{number}"] = {"class_type": "EmptyLatentImage", "inputs": inputs}
    chain["9"]["inputs"]["more"] = ["c599", 0]
    assert isinstance(validate(chain, SPECS), Rejected)
    chain["9"]["inputs"]["more"] = ["c400", 0]
    assert isinstance(validate(chain, SPECS), Accepted)


def test_the_copy_of_an_upload_is_nobodys_to_name() -> None:
    named = graph() | {
        "20": {"class_type": "LoadImage", "inputs": {"image": "swarmx-0123456789abcdef.png"}},
        "21": {"class_type": "PreviewImage", "inputs": {"images": ["20", 0]}},
    }
    found = validate(named, SPECS)
    assert isinstance(found, Accepted)
    assert found.node_errors["20"]["errors"][0]["message"] == "there is no such file of this client"
