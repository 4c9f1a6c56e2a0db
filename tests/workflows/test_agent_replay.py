"""Whatever a model answers and whatever becomes of its tools: an agent ends, within its caps, and can be rebuilt."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmx.core.failures import Failure
from swarmx.workflows.answers import Unusable
from swarmx.workflows.events import CancelRequested, Event, Failed, Finished, NodeFinished, decode_event, encode_event
from swarmx.workflows.forks import fork
from swarmx.workflows.nodes import AgentNode, TurnNode, UseNode
from swarmx.workflows.plan import advance, calls_in_flight, read_answer
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.spending import prompt_estimate
from swarmx.workflows.state import Run
from swarmx.workflows.work import Start, StartModelCall
from tests.workflows.agents import CATALOGUE, VERDICT, Agent, called, said

NAMES = st.sampled_from(["weather", "maps__find", "pay", "upper", "answer", "nobody"])
FITTING = ['{"city": "Oslo"}', '{"text": "x"}', '{"verdict": "yes"}']
ARGUMENTS = st.sampled_from([*FITTING, "{}", "", "{bad", "[1]", "null"])
USES = st.one_of(
    st.tuples(st.sampled_from(["weather", "maps__find", "pay"]), st.just(FITTING[0])), st.tuples(NAMES, ARGUMENTS)
)
ANSWERS = st.one_of(
    st.sampled_from([said("done"), said('{"verdict": "yes"}'), said(None), {"choices": []}, {}]),
    st.lists(USES, min_size=1, max_size=4).map(lambda uses: called(*uses, prompt_tokens=3)),
)
AGENTS = st.fixed_dictionaries(
    {
        "max_steps": st.integers(1, 4),
        "parallel_tools": st.integers(1, 3),
        "retry": st.sampled_from([None, {"attempts": 2, "backoff_s": 0}, {"attempts": 3, "on": ["interrupted"]}]),
        "timeout_s": st.sampled_from([None, 5.0]),
    },
    optional={"schema": st.just(VERDICT)},
)
CAUSES = st.sampled_from(["refused", "timeout", "replica", "tool", "rejected", "interrupted"])


def spec_with(agent: dict[str, Any], *, mapped: bool) -> dict[str, Any]:
    base = {"kind": "agent", "model": "m", "prompt": "p", "tools": list(CATALOGUE), "functions": ["upper"]}
    node: dict[str, Any] = base | {name: value for name, value in agent.items() if value is not None}
    if mapped:
        node = {"kind": "map", "over": "[1, 2]", "do": {"each": node}}
    return {
        "name": "random",
        "nodes": {"a": node, "after": {"kind": "tool", "function": "json_dump", "args": {"value": "{{ a }}"}}},
    }


def happening(data: st.DataObject, run: Run, call: Start, now_s: float) -> Event:
    """What comes of a call: an answer, of use or not, or a failure."""
    failed = data.draw(st.integers(0, 4)) == 0
    if not failed and isinstance(call, StartModelCall):
        read = read_answer(run, call.path, data.draw(ANSWERS))
        if not isinstance(read, Unusable):
            return NodeFinished(path=call.path, output=read.output)
        return after_failure(run, call.path, Failure(cause="invalid", error=read.error), now_s)
    if not failed:
        return NodeFinished(path=call.path, output=data.draw(st.sampled_from(["cold", {"degrees": 3}, None, []])))
    failure = Failure(cause=data.draw(CAUSES), error="broke", begun=data.draw(st.booleans()))
    return after_failure(run, call.path, failure, now_s)


def check_caps(run: Run) -> None:
    for node in run.nodes.values():
        match node.step.node:
            case AgentNode(max_steps=most):
                turns = [scope for scope in node.scopes if isinstance(scope.body.steps[scope.body.last].node, TurnNode)]
                assert len(turns) <= most
            case UseNode(agent=agent):
                inside = [run.nodes[node.scope.prefix + id] for id in node.scope.body.steps]
                busy = [use for use in inside if use.state == "running" or use.path in run.resting]
                assert len(busy) <= agent.parallel_tools
            case _:
                pass


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_agent_ends_once_within_its_caps_and_continues_alike_after_each_event(data: st.DataObject) -> None:
    spec = parse_workflow(spec_with(data.draw(AGENTS), mapped=data.draw(st.booleans())))
    now_s = 0.0
    run, submitted = Run.start(spec, {})
    events, calls = advance(run, now_s=now_s, tools=CATALOGUE)
    journal: list[Event] = [submitted, *events]
    out = {call.path: call for call in calls}
    for _ in range(400):
        if run.ended:
            break
        assert set(out) == set(run.in_flight)
        again = calls_in_flight(Run.rebuild(journal), CATALOGUE)
        assert {call.path: call for call in again} == out, "a call is made again as it was"
        check_caps(run)
        rebuilt = Run.rebuild([decode_event(encode_event(event)) for event in journal])
        happened = []
        if out:
            path = data.draw(st.sampled_from(sorted(out)))
            event = happening(data, run, out[path], now_s)
            happened = [CancelRequested() if data.draw(st.integers(0, 30)) == 0 else event]
        else:
            assert run.resting, "a run that has not ended waits for something"
            now_s = max(run.resting.values())
        events, calls = advance(run, happened, now_s=now_s, tools=CATALOGUE)
        assert advance(rebuilt, happened, now_s=now_s, tools=CATALOGUE) == (events, calls)
        assert rebuilt == run
        journal += events
        out |= {call.path: call for call in calls}
        out = {path: call for path, call in out.items() if path in run.in_flight}
    assert run.ended, "within its steps, attempts and tools, an agent comes to an end"
    replayed = Run.rebuild(journal[:1])
    for event in journal[1:]:
        replayed.apply(event)
    assert replayed == run


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_fork_at_any_part_of_an_agent_keeps_what_was_before_it_and_comes_to_an_end(data: st.DataObject) -> None:
    run, submitted = Run.start(parse_workflow(spec_with(data.draw(AGENTS), mapped=False)), {})
    events, calls = advance(run, now_s=0.0, tools=CATALOGUE)
    journal: list[Event] = [submitted, *events]
    out = {call.path: call for call in calls}
    while out and not run.ended and data.draw(st.integers(0, 9)):
        path = data.draw(st.sampled_from(sorted(out)))
        happened = happening(data, run, out[path], 0.0)
        events, calls = advance(run, [happened], now_s=0.0, tools=CATALOGUE)
        journal += events
        out |= {call.path: call for call in calls}
        out = {path: call for path, call in out.items() if path in run.in_flight}
    path = data.draw(st.sampled_from(list(run.nodes)))
    begun = fork(journal, path, forked_from="old")
    forked = Run.rebuild(begun)
    if path in forked.nodes:
        assert forked.nodes[path].state in ("waiting", "ready"), "it is still to be done"
    for other in forked.nodes.values():
        if other.state == "finished":
            assert other.scope.outputs[other.step.id] == run.nodes[other.path].scope.outputs[other.step.id]
    _, calls = advance(forked, now_s=0.0, tools=CATALOGUE)
    while forked.in_flight:
        path = next(iter(forked.in_flight))
        read: Any = read_answer(forked, path, said('{"verdict": "yes"}')) if "llm" in _kind(forked, path) else None
        output = "cold" if read is None else read.output
        advance(forked, [NodeFinished(path=path, output=output)], now_s=0.0, tools=CATALOGUE)
    assert isinstance(forked.end, Finished | Failed)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=4, max_size=9),
    context_tokens=st.integers(1600, 4000),
    off=st.sampled_from([None, 0.8, 1.5]),
)
def test_a_shortened_conversation_is_the_same_after_a_restart_and_in_a_fork(
    lengths: list[int], context_tokens: int, off: float | None
) -> None:
    agent = Agent(context_tokens=context_tokens, max_steps=len(lengths) + 1)
    for step, length in enumerate(lengths, 1):
        asked = agent.out[f"a.{step}"]
        (again,) = calls_in_flight(Run.rebuild(agent.events), CATALOGUE)
        assert again == asked
        forked = Run.rebuild(fork(agent.events, asked.path, forked_from="old"))
        _, (anew,) = advance(forked, now_s=0.0, tools=CATALOGUE)
        assert anew == asked
        usage = {} if off is None else {"prompt_tokens": int(off * prompt_estimate(agent.body(asked.path)))}
        agent.model(asked.path, called(("weather", {"city": "Oslo"}), **usage))
        agent.tool(f"a.{step}.1", "x" * length)


def _kind(run: Run, path: str) -> str:
    return run.nodes[path].step.node.kind
