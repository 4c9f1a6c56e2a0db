"""What may run in parts, what it is worth, and what is told of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swarmx.compat.comfyui.drafts import Fleet, is_ours, load_id, save_id
from swarmx.compat.comfyui.forecasts import JobFacts, ServerState
from swarmx.compat.comfyui.graph import Graph
from swarmx.compat.comfyui.jobs import Job, Outcome
from swarmx.compat.comfyui.merging import MergedEvents, merged
from swarmx.compat.comfyui.nodes import NodeBook
from swarmx.compat.comfyui.scheduling import Waiting
from swarmx.compat.comfyui.splitting import Plan, Splitter, part_jobs
from swarmx.core.forecast import Forecast, point
from tests.compat.comfyui.fake_nodes import node_info, object_info
from tests.compat.comfyui.test_parts import MODELS, branches, refined, relayed

ID = "0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a"
IMAGE: list[Any] = ["IMAGE", {}]


def book() -> NodeBook:
    made, info = NodeBook(), object_info(["tiny.safetensors", "other.safetensors"], custom=True)
    info["SetLatentNoiseMask"] = node_info("SetLatentNoiseMask", {"samples": ["LATENT", {}]}, ["LATENT"])
    info["LoraSave"] = node_info("LoraSave", {"model": ["MODEL", {}]}, [], out=True, module="comfy_extras.nodes_lora")
    info["Chat"] = node_info("Chat", {"image": IMAGE}, ["IMAGE"], module="comfy_api_nodes.nodes_chat")
    info["Shown"] = node_info("PreviewImage", {"images": IMAGE}, ["IMAGE"], out=True)
    for server in ("a", "b", "c"):
        made.told(server, info)
    return made


def job(graph: Graph, *outputs: str) -> Job:
    return Job(
        prompt_id=ID, tenant="t", client_id="c", number=1.0, seq=1, priority=0, graph=graph, extra={},
        outputs=outputs, files=frozenset(), created_s=0.0,
    )  # fmt: skip


def seconds(facts: JobFacts, server: ServerState) -> Forecast:
    """A second for a step, five for a load of weights that are away."""
    steps = sum(node.work.amounts[0] / 2 for node in facts.nodes.values() if len(node.work.amounts) == 3)
    return point(0.1 + steps + 5.0 * len(server.to_load(facts)), unit="s")


def planned(
    graph: Graph,
    *outputs: str,
    waiting: int = 0,
    told: tuple[str, ...] = (),
    servers: tuple[str, ...] = ("a", "b"),
    resident: tuple[str, ...] = ("a", "b"),
    free_in_s: dict[str, float] | None = None,
) -> Plan | None:
    known = book()
    made = job(graph, *outputs)
    states = {name: ServerState(name=name) for name in servers}
    for name in resident:
        states[name].resident["tiny.safetensors"] = None
    splitter = Splitter(
        specs=lambda: known.specs, able=lambda g, files: known.able(g, g, files), forecast=seconds, told=told
    )
    fleet = Fleet(
        states=states,
        free_in_s=dict.fromkeys(servers, 0.0) | (free_in_s or {}),
        waiting=waiting,
        up=len(servers),
        transfer_s=0.2,
    )
    return splitter.plan(made, JobFacts.of(made.graph, made.outputs), "a", fleet)


def test_outputs_go_to_the_servers_where_all_are_done_soonest() -> None:
    plan = planned(branches(10, 6, 5), "9", "19", "29")
    assert plan is not None
    assert plan.cuts == {}
    assert [(part.server, part.outputs) for part in plan.parts] == [("a", ("9",)), ("b", ("19", "29"))]
    assert plan.seconds == pytest.approx(11.1)
    assert plan.whole_s == pytest.approx(21.1)


def test_a_model_that_another_server_has_to_load_first_counts() -> None:
    graph = branches(4, 4)
    assert planned(graph, "9", "19") is not None
    assert planned(graph, "9", "19", resident=("a",)) is None


def test_a_cut_runs_what_is_shared_once() -> None:
    plan = planned(refined(10, 30), "9", "19")
    assert plan is not None
    [(latent, cut)] = plan.cuts.items()
    assert cut == ("2", 0)
    assert plan.extra_s < 1.0
    first, second = part_jobs(job(refined(10, 30), "9", "19"), plan)
    assert (first.outputs, second.outputs) == ((plan.parts[0].outputs[0], save_id(latent)), plan.parts[1].outputs)
    assert second.graph["13" if second.outputs == ("19",) else "3"]["inputs"]["latent_image"] == [load_id(latent), 0]
    assert first.graph.keys() - {save_id(latent)} == second.graph.keys() - {load_id(latent)} == refined(10, 30).keys()


def test_a_branch_that_will_not_run_keeps_no_graph_from_being_cut() -> None:
    graph = refined(10, 30)
    graph["50"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}}
    assert planned(graph, "9", "19") == planned(refined(10, 30), "9", "19")


def test_a_second_model_that_another_server_holds_is_worth_a_cut_between_two_samplers() -> None:
    graph = refined(10, 30)
    for node_id in ("13", "18", "19"):
        del graph[node_id]
    graph["40"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "other.safetensors"}}
    graph["3"]["inputs"]["model"] = ["40", 0]
    known, made = book(), job(graph, "9")
    states = {name: ServerState(name=name) for name in ("a", "b")}
    states["a"].resident["tiny.safetensors"] = None
    for model in ("tiny.safetensors", "other.safetensors"):
        states["b"].resident[model] = None
    splitter = Splitter(specs=lambda: known.specs, able=lambda g, files: known.able(g, g, files), forecast=seconds)
    fleet = Fleet(states=states, free_in_s={"a": 0.0, "b": 2.0}, waiting=0, up=2, transfer_s=0.2)
    plan = splitter.plan(made, JobFacts.of(made.graph, made.outputs), "a", fleet)
    assert plan is not None
    assert (list(plan.cuts.values()), [part.outputs for part in plan.parts]) == ([("2", 0)], [(), ("9",)])
    assert plan.extra_s < 0.0


def test_a_latent_is_loaded_on_every_server_that_goes_on_from_it() -> None:
    graph = refined(10, 30, 30, 30)
    plan = planned(graph, "9", "19", "29", servers=("a", "b", "c"), resident=("a", "b", "c"))
    assert plan is not None
    assert plan.seconds == pytest.approx(10.0 + 0.1 + 0.2 + 30.1)
    parts = part_jobs(job(graph, "9", "19", "29"), plan)
    assert sorted(output for part in plan.parts for output in part.outputs) == ["19", "29", "9"]
    [latent] = plan.cuts
    assert [(part.part.makes, part.part.needs) for part in parts if part.part] == [
        ((latent,), ()),
        ((), (latent,)),
        ((), (latent,)),
    ]


def test_a_part_knows_how_much_work_its_nodes_are_though_its_latent_comes_from_a_file() -> None:
    graph = refined(10, 30)
    whole, plan = job(graph, "9", "19"), planned(graph, "9", "19")
    assert plan is not None
    works = {key: node.work for key, node in JobFacts.of(graph, whole.outputs).nodes.items()}
    assert works["3"].amounts[1] < 1.0, "these pictures are small"
    found = set[str]()
    for part in part_jobs(whole, plan):
        kept = msgspec.json.decode(msgspec.json.encode(part), type=Job)
        facts = Waiting(job=kept, able=frozenset("a"), since_s=0.0).facts
        mine = {key: node.work for key, node in facts.nodes.items() if not is_ours(key)}
        assert mine == {key: works[key] for key in mine}
        found |= mine.keys()
    assert found == works.keys()


def test_a_server_that_ran_a_part_holds_nothing_of_that_part_of_another_job() -> None:
    second_parts = []
    for seed in (1, 2, 2):
        graph = refined(10, 30)
        graph["2"]["inputs"]["seed"] = seed
        plan = planned(graph, "9", "19")
        assert plan is not None
        part = next(part for part in part_jobs(job(graph, "9", "19"), plan) if part.part and part.part.needs)
        second_parts.append(Waiting(job=part, able=frozenset("a"), since_s=0.0).facts)
    one, other, again = second_parts
    state = ServerState(name="a")
    state.ran(one)
    new = {node_id for node_id, node in other.nodes.items() if node.signature not in state.cached}
    assert {"3", "8", "9"} < new, "what comes of another latent"
    assert "4" not in new, "the weights are the same"
    state.ran(other)
    assert again.signatures <= state.cached, "the same latent again"


def test_a_graph_is_cut_once_for_every_model_that_another_server_holds() -> None:
    graph, names = relayed(), ("a", "b", "c")
    states = {name: ServerState(name=name) for name in names}
    for name, model in zip(names, MODELS, strict=True):
        states[name].resident[model] = None
    known, made = NodeBook(), job(graph, "29")
    for name in names:
        known.told(name, object_info(list(MODELS)))
    splitter = Splitter(specs=lambda: known.specs, able=lambda g, files: known.able(g, g, files), forecast=seconds)
    fleet = Fleet(states=states, free_in_s=dict.fromkeys(names, 0.0), waiting=0, up=3, transfer_s=0.2)
    plan = splitter.plan(made, JobFacts.of(graph, made.outputs), "a", fleet)
    assert plan is not None
    assert [(part.server, part.outputs) for part in plan.parts] == [("a", ()), ("b", ()), ("c", ("29",))]
    assert plan.seconds == pytest.approx(3 * 4.1 + 2 * 0.2)
    first, second, third = part_jobs(made, plan)
    (one, two) = (latent for latent, cut in sorted(plan.cuts.items(), key=lambda row: row[1] != ("3", 0)))
    assert second.graph["13"]["inputs"]["latent_image"] == [load_id(one), 0]
    assert third.graph["23"]["inputs"]["latent_image"] == [load_id(two), 0]
    assert (first.outputs, second.outputs) == ((save_id(one),), (save_id(two),))
    assert {each.prompt_id for each in (first, second, third)}.isdisjoint({ID})


def test_a_further_cut_has_to_gain_as_much_as_the_first_one() -> None:
    least = planned(refined(10, 30, 30, 30), "9", "19", "29", servers=("a", "b", "c"), resident=("a", "b"))
    assert least is not None
    assert len(least.parts) == 3, "the third server has a model to load, and is done much sooner all the same"
    short = planned(refined(10, 4, 4, 4), "9", "19", "29", servers=("a", "b", "c"), resident=("a", "b"))
    assert short is not None
    assert len(short.parts) == 2


def test_where_many_wait_extra_work_is_dear() -> None:
    graph = branches(10, 10)
    graph["13"]["inputs"]["latent_image"] = ["3", 0]  # the second output needs all of the first one's steps
    assert planned(branches(10, 10), "9", "19", waiting=50) is not None, "it is hardly any more work"
    kept = planned(graph, "9", "19", waiting=50)
    assert kept is None


def test_a_server_that_is_busy_for_long_is_no_help_to_a_cut() -> None:
    plan = planned(refined(10, 30), "9", "19", free_in_s={"b": 100.0})
    assert plan is None


@pytest.mark.parametrize("name", ["Picky", "Chat", "LoraSave", "Shown"])
def test_what_may_have_effects_beyond_its_files_keeps_a_graph_whole_unless_told(name: str) -> None:
    graph, outputs = branches(20, 20), ["9", "19"]
    match name:
        case "Picky":
            graph["50"] = {"class_type": "Picky", "inputs": {"value": 1}}
            graph["51"] = {"class_type": "PreviewImage", "inputs": {"images": ["50", 0]}}
            outputs.append("51")
        case "Chat":
            graph["50"] = {"class_type": "Chat", "inputs": {"image": ["8", 0]}}
            graph["9"]["inputs"]["images"] = ["50", 0]
        case "LoraSave":
            graph["50"] = {"class_type": "LoraSave", "inputs": {"model": ["4", 0]}}
            outputs.append("50")
        case _:
            graph["50"] = {"class_type": "Shown", "inputs": {"images": ["8", 0]}}
            graph["9"]["inputs"]["images"] = ["50", 0]
            outputs.append("50")
    assert planned(graph, *outputs) is None
    told = planned(graph, *outputs, told=(name,))
    assert (told is None) == (name == "Shown"), "an output that feeds another one would be made twice"


def test_a_latent_with_more_than_its_tensor_is_not_cut() -> None:
    graph = refined(10, 30)
    graph["50"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["5", 0]}}
    graph["2"]["inputs"]["latent_image"] = ["50", 0]
    plan = planned(graph, "9", "19")
    assert plan is not None
    assert plan.cuts == {}, "both parts run the shared sampler"


def test_ids_of_nodes_that_are_ours_are_not_given_twice() -> None:
    graph = refined(10, 30)
    graph[save_id(0)] = graph.pop("9")
    plan = planned(graph, save_id(0), "19")
    assert plan is None or plan.cuts == {}


def test_a_node_that_two_parts_run_is_told_of_by_the_first_that_comes_to_it() -> None:
    events = MergedEvents(ID)
    assert events.heard(0, "execution_start", {"prompt_id": "p0"}) == ("execution_start", {"prompt_id": ID})
    assert events.heard(1, "execution_start", {"prompt_id": "p1"}) is None
    at = {"node": "4", "display_node": "4", "prompt_id": "p1"}
    assert events.heard(1, "executing", at) == ("executing", at | {"prompt_id": ID})
    assert events.heard(0, "executing", at | {"prompt_id": "p0"}) is None
    assert events.heard(0, "executing", {"node": save_id(0), "display_node": save_id(0)}) is None
    assert events.heard(0, "progress_state", {"nodes": 3}) == ("progress_state", {"nodes": {}, "prompt_id": ID})
    running = {"value": 1, "max": 4, "state": "running", "prompt_id": "p0"}
    events.heard(0, "progress_state", {"nodes": {"3": running}})
    told = events.heard(1, "progress_state", {"nodes": {"3": running | {"value": 3}, load_id(0): running}})
    assert told is not None
    assert told[1]["nodes"] == {"3": running | {"value": 3, "prompt_id": ID}}


def test_the_first_part_that_failed_speaks_for_the_job_and_a_cancelled_job_is_cancelled() -> None:
    def ended(state: Any, kind: str) -> Outcome:
        status = {"status_str": "x", "completed": False, "messages": [[kind, {"prompt_id": "p"}], "odd", [1]]}
        return Outcome(state=state, outputs={state: {}}, status=status, told=[(kind, {"prompt_id": "p"})])

    done, failed = ended("completed", "execution_success"), ended("failed", "execution_error")
    stopped = ended("cancelled", "execution_interrupted")
    unborn = Outcome(state="cancelled")
    made = job(branches(1), "9")
    both = merged(made, [done, failed, unborn], cancelled=False, facts={})
    assert (both.state, both.told) == ("failed", [("execution_error", {"prompt_id": ID})])
    assert both.outputs == {"completed": {}, "failed": {}}
    assert both.status["messages"] == [["execution_error", {"prompt_id": ID}]]
    assert merged(made, [unborn, stopped], cancelled=True, facts={}).told == [
        ("execution_interrupted", {"prompt_id": ID})
    ]
    assert merged(made, [done, done], cancelled=True, facts={}).state == "completed"
    assert merged(made, [unborn, unborn], cancelled=True, facts={}).status == {}
