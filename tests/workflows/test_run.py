"""A run is a fold: whatever the order of answers, failures and cancels, it ends once and can be rebuilt."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import (
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Finished,
    NodeExpanded,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    Submitted,
    decode_event,
    encode_event,
)
from swarmx.workflows.plan import advance, calls_in_flight, plan
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from swarmx.workflows.work import Start

TERMINAL = (Finished, Failed, Cancelled)


def text(value: str, json: Any = None) -> dict[str, Any]:
    return {"text": value, "json": json, "usage": {}}


def started(source: str, **inputs: Any) -> tuple[Run, list[Event], list[Start]]:
    run, submitted = Run.start(parse_workflow(source), inputs)
    events, calls = advance(run, now_s=0.0)
    return run, [submitted, *events], calls


def paths(calls: list[Start]) -> list[str]:
    return [call.path for call in calls]


def test_independent_nodes_start_together_and_dependent_ones_after_them() -> None:
    run, _, calls = started(
        "{name: x, nodes: {c: {kind: llm, model: m, prompt: '{{ a.text }}', needs: [b]}, "
        "a: {kind: llm, model: m, prompt: p}, b: {kind: llm, model: m, prompt: p}}}"
    )
    assert paths(calls) == ["a", "b"]
    _, calls = advance(run, [NodeFinished(path="b", output=text("B"))], now_s=0.0)
    assert calls == []
    _, calls = advance(run, [NodeFinished(path="a", output=text("A"))], now_s=0.0)
    assert paths(calls) == ["c"]
    assert calls[0].body["messages"] == [{"role": "user", "content": "A"}]


def test_the_body_of_an_llm_call_is_ready_for_the_wire() -> None:
    _, _, calls = started(
        """
        name: x
        nodes:
          plan:
            kind: llm
            model: big
            role: planner
            system: You plan.
            prompt: Go
            max_tokens: 7
            temperature: 0
            schema: {type: object, properties: {n: {type: integer}}, required: [n]}
        """
    )
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert calls[0].body == {
        "model": "big",
        "messages": [{"role": "system", "content": "You plan."}, {"role": "user", "content": "Go"}],
        "max_tokens": 7,
        "temperature": 0.0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "plan", "schema": schema, "strict": True}},
    }


def test_the_body_of_an_image_call_takes_sizes_from_templates() -> None:
    source = (
        "{name: x, inputs: {side: 256}, nodes: {pic: {kind: image, model: sdxl, prompt: a bee, "
        "width: '{{ inputs.side * 2 }}', height: '{{ inputs.side }}', n: 2}}}"
    )
    _, _, calls = started(source)
    assert calls[0].body == {"model": "sdxl", "prompt": "a bee", "n": 2, "size": "512x256", "steps": 20}
    run, _, calls = started(source, side=5000)
    assert calls == []
    assert run.end == Failed(error="width: a whole number from 64 to 4096 was expected, got 10000", path="pic")


def test_a_map_runs_its_items_and_keeps_their_order() -> None:
    run, _, calls = started(
        "{name: x, nodes: {m: {kind: map, over: '[3, 1, 2]', as: n, "
        "do: {w: {kind: llm, model: m, prompt: 'n={{ n }}'}}, result: '{{ w.text }}'}}}"
    )
    assert paths(calls) == ["m[0].w", "m[1].w", "m[2].w"]
    assert [call.body["messages"][0]["content"] for call in calls] == ["n=3", "n=1", "n=2"]
    for path in ("m[2].w", "m[0].w", "m[1].w"):
        advance(run, [NodeFinished(path=path, output=text(path))], now_s=0.0)
    assert run.end == Finished(outputs={"m": ["m[0].w", "m[1].w", "m[2].w"]})


def test_a_map_over_nothing_is_finished_at_once() -> None:
    run, _, _ = started("{name: x, nodes: {m: {kind: map, over: '[]', do: {w: {kind: llm, model: m, prompt: p}}}}}")
    assert run.end == Finished(outputs={"m": []})


def test_a_map_over_too_much_or_over_no_list_fails_by_name() -> None:
    body = "do: {w: {kind: llm, model: m, prompt: p}}"
    run, _, _ = started("{name: x, nodes: {m: {kind: map, over: '[1, 2, 3]', max_items: 2, " + body + "}}}")
    assert isinstance(run.end, Failed)
    assert "3 items were given, max_items allows 2" in run.end.error
    run, _, _ = started("{name: x, nodes: {m: {kind: map, over: '7', " + body + "}}}")
    assert run.end == Failed(error="over: a list was expected, got 7", path="m")


def test_a_loop_sees_its_previous_result_and_stops_when_told() -> None:
    run, _, calls = started(
        """
        name: x
        nodes:
          refine:
            kind: loop
            max_iterations: 5
            until: review.json.ok
            do:
              draft: {kind: llm, model: m, prompt: "{{ iteration }}: {{ previous | default('none') }}"}
              review: {kind: llm, model: m, prompt: "{{ draft.text }}"}
            result: "{{ draft.text }}"
        """
    )
    prompts = []
    for i in range(1, 4):
        prompts.append(calls[0].body["messages"][0]["content"])
        _, calls = advance(run, [NodeFinished(path=f"refine[{i}].draft", output=text(f"draft {i}"))], now_s=0.0)
        _, calls = advance(run, [NodeFinished(path=f"refine[{i}].review", output=text("", {"ok": i == 3}))], now_s=0.0)
    assert prompts == ["1: none", "2: draft 1", "3: draft 2"]
    assert run.end == Finished(outputs={"refine": "draft 3"})


def test_a_loop_ends_with_its_iterations() -> None:
    run, _, _ = started(
        "{name: x, nodes: {l: {kind: loop, max_iterations: 3, "
        "do: {t: {kind: tool, function: length, args: {value: [1, 2]}}}, result: '{{ t + iteration }}'}}}"
    )
    assert run.end == Finished(outputs={"l": 5})


def test_tools_and_joins_need_no_call() -> None:
    run, events, calls = started(
        """
        name: x
        inputs: {lines: "b\\na\\nb"}
        nodes:
          split: {kind: tool, function: split_lines, args: {text: "{{ inputs.lines }}"}}
          sorted: {kind: tool, function: sort, args: {items: "{{ split | unique }}"}}
          both: {kind: join, of: [sorted, split]}
        outputs: {all: "{{ both }}", said: "{{ sorted | join('+') }}!"}
        """
    )
    assert calls == []
    assert run.end == Finished(outputs={"all": [["a", "b"], ["b", "a", "b"]], "said": "a+b!"})
    assert not any(isinstance(event, NodeStarted) for event in events)


def test_more_nodes_than_a_run_may_have_fail_it() -> None:
    run, _, _ = started(
        "{name: x, inputs: {n: null}, nodes: {m: {kind: map, over: inputs.n, max_items: 2000, "
        "do: {a: {kind: llm, model: m, prompt: p}, b: {kind: llm, model: m, prompt: p}}}}}",
        n=[0] * 1000,
    )
    assert isinstance(run.end, Failed)
    assert "2001 nodes, at most 2000" in run.end.error


def test_bodies_that_fit_one_by_one_but_not_together_fail_it_too() -> None:
    body = "{kind: map, over: '[1, 2, 3]', do: {w: {kind: llm, model: m, prompt: p}}}"
    run, _, _ = started(f"{{name: x, limits: {{nodes: 7}}, nodes: {{a: {body}, b: {body}}}}}")
    assert isinstance(run.end, Failed)
    assert run.end.path == "b"
    assert "would come to 8 nodes, at most 7" in run.end.error
    assert len(run.nodes) == 5


def test_an_output_that_cannot_be_evaluated_fails_the_run() -> None:
    run, _, _ = started(
        "{name: x, nodes: {t: {kind: tool, function: length, args: {value: [1]}}}, outputs: {o: '{{ t.nope }}'}}"
    )
    assert isinstance(run.end, Failed)
    assert run.end.error.startswith("outputs.o: there is no field 'nope'")


def test_calls_in_flight_are_made_again_with_the_same_bodies() -> None:
    _, events, calls = started("{name: x, nodes: {a: {kind: llm, model: m, prompt: p}}}")
    assert calls_in_flight(Run.rebuild(events)) == calls


def test_events_that_do_not_fit_are_refused_and_change_nothing() -> None:
    run, events, _ = started("{name: x, nodes: {a: {kind: llm, model: m, prompt: p}}}")
    wrong: list[Event] = [
        NodeFinished(path="nix", output=1),
        NodeStarted(path="a", kind="llm"),
        NodeExpanded(path="a", items=[1]),
        Submitted(spec="", inputs={}),
    ]
    for event in wrong:
        with pytest.raises(WorkflowError):
            run.apply(event)
    assert run == Run.rebuild(events)
    advance(run, [NodeFinished(path="a", output=1)], now_s=0.0)
    with pytest.raises(WorkflowError, match="has ended with Finished"):
        run.apply(CancelRequested())


def test_a_definition_is_bound_to_its_run_by_the_events_alone() -> None:
    _, events, _ = started("{name: x, inputs: {a: 1}, nodes: {t: {kind: llm, model: m, prompt: '{{ inputs.a }}'}}}")
    first = events[0]
    assert isinstance(first, Submitted)
    assert first.inputs == {"a": 1}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"v":1,"event":{"type":"Nope"}}', b"[" * 100_000, b'{"v":2,"event":{"type":"N"}}']
)
def test_garbage_events_are_refused(body: bytes) -> None:
    with pytest.raises(WorkflowError):
        decode_event(body)


def test_a_map_of_500_is_planned_in_far_less_than_a_second() -> None:
    begin = time.process_time()
    run, events, calls = started(
        "{name: x, inputs: {n: null}, nodes: {m: {kind: map, over: inputs.n, max_items: 500, "
        "do: {a: {kind: llm, model: m, prompt: 'do {{ item }}'}}}}}",
        n=list(range(500)),
    )
    for call in calls:
        more, _ = advance(run, [NodeFinished(path=call.path, output=text("x" * 500))], now_s=0.0)
        events += more
    assert run == Run.rebuild([decode_event(encode_event(event)) for event in events])
    assert time.process_time() - begin < 1.0
    assert isinstance(run.end, Finished)


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def bodies(draw: st.DrawFn, prefix: str, depth: int) -> dict[str, Any]:
    """Nodes of one scope; each may read or need earlier ones of its scope."""
    nodes: dict[str, Any] = {}
    for i in range(draw(st.integers(1, 4 if depth == 0 else 2))):
        earlier = list(nodes)
        needs: list[str] = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=2)) if earlier else []
        kinds = ["llm", "image", "tool", "join", "map", "loop", "branch"] if depth < 2 else ["llm", "tool"]
        kind = draw(st.sampled_from([k for k in kinds if k != "join" or earlier]))
        node: dict[str, Any] = {"kind": kind, "needs": needs}
        reads = draw(st.booleans())
        read = f"{{{{ {draw(st.sampled_from(earlier))} }}}}" if earlier and reads else "nothing"
        id = f"{prefix}n{i}"
        match kind:
            case "llm" | "image":
                node |= {"model": "m", "prompt": f"do {read}"}
            case "tool":
                node |= {"function": "json_dump", "args": {"value": [read, 1]}}
            case "join":
                node |= {"of": draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=2, unique=True))}
            case "map":
                items = draw(st.integers(0, 3))
                node |= {"over": str(list(range(items))), "do": draw(bodies(f"{id}_", depth + 1))}
            case "branch":
                first, other = draw(st.booleans()), draw(st.booleans())
                node |= {"cases": [{"when": str(first).lower(), "do": draw(bodies(f"{id}_", depth + 1))}]}
                if other:
                    node |= {"else": {"do": draw(bodies(f"{id}_", depth + 1))}}
            case _:
                stop = draw(st.integers(1, 4))
                node |= {
                    "until": f"iteration >= {stop}",
                    "max_iterations": draw(st.integers(1, 3)),
                    "do": draw(bodies(f"{id}_", depth + 1)),
                }
        nodes[id] = node
    shuffled = draw(st.permutations(list(nodes)))
    return {id: nodes[id] for id in shuffled}


def needs_of(run: Run, path: str) -> list[str]:
    node = run.nodes[path]
    return [node.scope.prefix + need for need in node.step.needs]


def check_order(run: Run, events: list[Event]) -> None:
    """Dependencies are respected, nothing finishes twice, and what is inside a map or loop comes before its end."""
    finished: set[str] = set()
    begun: set[str] = set()
    for event in events:
        if isinstance(event, NodeStarted | NodeExpanded | NodeFinished) and event.path not in begun:
            begun.add(event.path)
            assert finished.issuperset(needs_of(run, event.path))
            owner = run.nodes[event.path].scope.owner
            assert owner is None or (owner in begun and owner not in finished)
        if isinstance(event, NodeFinished):
            assert event.path not in finished
            finished.add(event.path)
            for scope in run.nodes[event.path].scopes:
                assert all(scope.prefix + id in finished for id in scope.body.steps)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_run_ends_once_whatever_happens(data: st.DataObject) -> None:
    spec = parse_workflow({"name": "random", "nodes": data.draw(bodies("", 0))})
    trouble = data.draw(st.sampled_from(["none", "none", "fail", "cancel"]))
    run, submitted = Run.start(spec, {})
    events, calls = advance(run, now_s=0.0)
    journal: list[Event] = [submitted, *events]
    out = [call.path for call in calls]
    while not run.ended:
        assert out, "a run that has not ended waits for something"
        assert set(out) == set(run.in_flight)
        path = out.pop(data.draw(st.integers(0, len(out) - 1)))
        happened: Event = NodeFinished(path=path, output=text(path))
        if trouble != "none" and data.draw(st.integers(0, 3)) == 0:
            happened = NodeFailed(path=path, error="broke") if trouble == "fail" else CancelRequested()
        rebuilt = Run.rebuild(journal)
        events, calls = advance(run, [happened], now_s=0.0)
        journal += events
        out += [call.path for call in calls]
        assert advance(rebuilt, [happened], now_s=0.0) == (events, calls), "what follows depends on the events alone"
    assert sum(isinstance(event, TERMINAL) for event in journal) == 1
    assert isinstance(journal[-1], TERMINAL)
    assert plan(run, 0.0) == []
    again = Run.rebuild([decode_event(encode_event(event)) for event in journal])
    assert again == run
    assert (list(again.due), list(again.in_flight)) == (list(run.due), list(run.in_flight))
    check_order(run, journal)
    if trouble == "none":
        assert isinstance(run.end, Finished)
        assert all(node.state == "finished" for node in run.nodes.values())
    if any(isinstance(event, NodeFailed) for event in journal):
        assert isinstance(run.end, Failed)
    if any(isinstance(event, CancelRequested) for event in journal):
        assert isinstance(run.end, Cancelled)
    assert advance(run, [CancelRequested(), NodeFinished(path="x", output=1)], now_s=0.0) == ([], []), (
        "late events are dropped"
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_run_can_be_rebuilt_after_each_of_its_events(data: st.DataObject) -> None:
    spec = parse_workflow({"name": "random", "nodes": data.draw(bodies("", 0))})
    run, submitted = Run.start(spec, {})
    journal: list[Event] = [submitted]
    replayed = Run.rebuild(journal)
    while not run.ended:
        out = list(run.in_flight)
        happened = [NodeFinished(path=data.draw(st.sampled_from(out)), output=text("t"))] if out else []
        for event in advance(run, happened, now_s=0.0)[0]:
            assert plan(replayed, 0.0) == plan(Run.rebuild(journal), 0.0), (
                "planning changes nothing and depends on nothing else"
            )
            replayed.apply(event)
            journal.append(event)
            assert replayed == Run.rebuild(journal)
    assert replayed == run
