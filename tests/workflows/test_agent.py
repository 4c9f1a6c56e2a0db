"""An agent asks its model, has tools called, and ends: with an answer, or for a reason that can be read."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.workflows.answers import Unusable, Usable
from swarmx.workflows.events import Cancelled, CancelRequested, Failed, Finished, NodeFailed, Spent
from swarmx.workflows.plan import calls_in_flight, read_answer
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from swarmx.workflows.work import StartModelCall, StartToolCall
from tests.workflows.agents import CATALOGUE, CITY, VERDICT, Agent, called, said, spec_of


def test_a_model_that_needs_no_tool_answers_at_once() -> None:
    agent = Agent(system="Be short.", role="guide")
    call = agent.out["a.1"]
    assert isinstance(call, StartModelCall)
    assert (call.kind, call.role, call.model) == ("llm", "guide", "m")
    assert agent.messages("a.1") == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Go."}]
    agent.model("a.1", said("Hello.", prompt_tokens=7, completion_tokens=2))
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    assert agent.left == {"text": "Hello.", "json": None, "steps": 1, "usage": usage}


def test_the_model_is_told_its_tools_as_it_can_name_them() -> None:
    agent = Agent(functions=["upper"])
    told = {tool["function"]["name"]: tool["function"] for tool in agent.body("a.1")["tools"]}
    assert list(told) == ["weather", "maps__find", "pay", "upper"]
    assert told["maps__find"] == {"name": "maps__find", "description": "What maps.find is for.", "parameters": CITY}
    assert told["upper"]["parameters"]["properties"] == {"text": {"type": "string"}}
    assert "tool_choice" not in agent.body("a.1")


def test_what_a_tool_left_is_read_before_the_next_step() -> None:
    agent = Agent()
    (call,) = agent.model("a.1", called(("maps__find", {"city": "Oslo"}), text="Let me look."))
    assert call == StartToolCall(path="a.1.1", tool="maps.find", arguments={"city": "Oslo"})
    agent.tool("a.1.1", {"degrees": 3})
    assert agent.messages("a.2")[1:] == [
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {
                    "id": "id-1",
                    "type": "function",
                    "function": {"name": "maps__find", "arguments": '{"city": "Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "id-1", "content": '{"degrees":3}'},
    ]
    agent.model("a.2", said("Three degrees."))
    assert agent.left["steps"] == 2


def test_the_usage_of_all_steps_counts() -> None:
    agent = Agent()
    agent.model("a.1", called(("weather", {"city": "Oslo"}), prompt_tokens=10, completion_tokens=4))
    agent.tool("a.1.1", "cold")
    agent.model("a.2", said("Cold.", prompt_tokens=30, completion_tokens=1))
    assert agent.left["usage"] == {"prompt_tokens": 40, "completion_tokens": 5}


def test_no_more_tools_of_a_step_are_out_at_a_time_than_the_author_allows() -> None:
    agent = Agent(parallel_tools=2)
    cities = [("weather", {"city": name}) for name in ("Oslo", "Rome", "Bern", "Kyiv")]
    agent.model("a.1", called(*cities))
    assert list(agent.out) == ["a.1.1", "a.1.2"]
    assert [call.path for call in agent.tool("a.1.2", "mild")] == ["a.1.3"]
    assert [call.path for call in agent.tool("a.1.1", "cold")] == ["a.1.4"]
    agent.tool("a.1.4", "d")
    agent.tool("a.1.3", "c")
    told = [message["content"] for message in agent.messages("a.2") if message["role"] == "tool"]
    assert told == ["cold", "mild", "c", "d"], "in the order in which they were asked for"


def test_a_function_is_called_on_the_spot_and_its_refusal_is_told() -> None:
    agent = Agent(functions=["upper", "mean"])
    agent.model("a.1", called(("upper", {"text": "oslo"}), ("mean", {"items": []}), ("upper", {"texts": "x"})))
    told = [message["content"] for message in agent.messages("a.2") if message["role"] == "tool"]
    assert told[0] == "OSLO"
    assert told[1].startswith("Error: a list with at least one item was expected")
    assert "unexpected keyword argument" in told[2]


def test_what_went_wrong_with_a_tool_is_told_to_the_model_and_does_not_end_the_agent() -> None:
    agent = Agent()
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.take(NodeFailed(path="a.1.1", error="no such city", reason="tool"))
    assert agent.messages("a.2")[-1]["content"] == "Error: no such city"
    assert agent.run.nodes["a.1.1"].state == "failed"
    agent.model("a.2", said("I cannot tell."))
    assert agent.left["text"] == "I cannot tell."


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (("wether", {"city": "Oslo"}), "there is no tool 'wether' (did you mean 'weather'?); tools are"),
        (("weather", "{city: Oslo"), "the arguments are not JSON, or were cut off at max_tokens"),
        (("weather", "[1, 2]"), "the arguments should be a JSON object, they were '[1, 2]'"),
        (("weather", {"town": "Oslo"}), "weather cannot be called with these arguments: 'city' is a required property"),
        (("weather", {"city": 3}), "weather cannot be called with these arguments: city: 3 is not of type 'string'"),
        (("weather", ""), "'city' is a required property"),
        (("weather", "1e999"), "the arguments are not JSON"),
        (("weather", "[" * 5000), "the arguments are not JSON"),
    ],
)
def test_what_cannot_be_called_is_not_called_but_told(use: tuple[str, Any], why: str) -> None:
    agent = Agent()
    agent.model("a.1", called(use))
    assert list(agent.out) == ["a.2"], "the model is asked again at once"
    assert why in agent.messages("a.2")[-1]["content"]
    assert agent.run.nodes["a.1.1"].state == "failed"


def test_arguments_that_are_no_object_do_not_go_back_to_the_engine_which_would_refuse_them() -> None:
    agent = Agent()
    agent.model("a.1", called(("weather", "{city: Oslo"), ("weather", "")))
    calls = agent.messages("a.2")[1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ["{}", "{}"]


def test_a_long_result_is_cut_for_the_model_and_kept_whole_in_the_run() -> None:
    agent = Agent(result_chars=100)
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", "x" * 5000)
    content = agent.messages("a.2")[-1]["content"]
    assert content == "x" * 100 + "\n[Cut: 100 of 5000 characters are shown.]"
    assert agent.run.nodes["a.1.1"].scope.outputs["1"] == "x" * 5000


def test_the_largest_output_that_a_node_may_leave_is_cut_like_any_other() -> None:
    agent = Agent(result_chars=100)
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", ["x" * 2_000_000, "y" * 2_000_000])
    assert agent.messages("a.2")[-1]["content"].endswith("[Cut: 100 of 4000007 characters are shown.]")


def test_a_conversation_that_nears_the_models_context_loses_its_oldest_results() -> None:
    agent = Agent(context_tokens=2500, system="Be short.")
    for step in range(1, 5):
        agent.model(f"a.{step}", called(("weather", {"city": "Oslo"})))
        agent.tool(f"a.{step}.1", "x" * 2000)
    told = [message["content"] for message in agent.messages("a.5") if message["role"] == "tool"]
    assert told == ["[Left out to save room: 2000 characters.]"] + ["x" * 2000] * 3
    assert [message["content"] for message in agent.messages("a.5")[:2]] == ["Be short.", "Go."]
    assert agent.run.nodes["a.1.1"].scope.outputs["1"] == "x" * 2000, "the run has it whole"


def test_a_prompt_that_cannot_be_made_to_fit_fails_the_agent_with_the_figures() -> None:
    agent = Agent(context_tokens=2000, result_chars=9000)
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", "x" * 9000)
    assert agent.run.end == Failed(
        error="the prompt would have about 2441 tokens, with no more than the task, the tools and the last step; "
        "context_tokens allows 1488 beside the 512 of the answer (max_tokens). Raise context_tokens if the model takes "
        "more, or lower max_tokens, result_chars or the number of tools",
        path="a.2",
    )


def test_what_is_out_is_asked_again_although_its_tools_have_become_too_many_for_the_context() -> None:
    agent = Agent(context_tokens=800)
    longer = {name: spec_of(name, parameters=CITY | {"description": "x" * 5000}) for name in CATALOGUE}
    (call,) = calls_in_flight(Run.rebuild(agent.events), longer)
    assert call.path == "a.1"


def test_the_last_step_has_to_answer_in_words() -> None:
    agent = Agent(max_steps=2)
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", "cold")
    assert agent.body("a.2")["tool_choice"] == "none"
    assert agent.body("a.2")["tools"], "engines need them to show the conversation so far"
    agent.model("a.2", called(("weather", {"city": "Rome"}), text="Cold in Oslo."))
    assert agent.left["text"] == "Cold in Oslo.", "what it asks for besides is not called any more"


def test_an_agent_that_only_asks_for_tools_fails_when_its_steps_are_used_up() -> None:
    agent = Agent(max_steps=2)
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", "cold")
    agent.model("a.2", called(("weather", {"city": "Rome"})))
    assert agent.run.end == Failed(
        error="the agent has used up its 2 steps (max_steps) without an answer: it asked for tools only", path="a"
    )
    failed = agent.events[-2]
    assert isinstance(failed, NodeFailed)
    assert failed.reason == "steps"


def test_with_a_schema_the_model_answers_by_a_tool_of_its_own() -> None:
    agent = Agent(schema=VERDICT)
    told = agent.body("a.1")["tools"][-1]["function"]
    assert (told["name"], told["parameters"]) == ("answer", VERDICT)
    agent.model("a.1", called(("answer", {"verdict": "yes"}), text="That was easy."))
    assert agent.left == {"text": "That was easy.", "json": {"verdict": "yes"}, "steps": 1, "usage": {}}


def test_where_there_is_nothing_else_to_call_the_answer_is_forced_from_the_start() -> None:
    assert "tool_choice" not in Agent(schema=VERDICT).body("a.1")
    alone = Agent(schema=VERDICT, tools=[]).body("a.1")
    assert alone["tool_choice"] == {"type": "function", "function": {"name": "answer"}}


def test_on_the_last_step_the_answer_is_forced() -> None:
    agent = Agent(schema=VERDICT, max_steps=1)
    assert agent.body("a.1")["tool_choice"] == {"type": "function", "function": {"name": "answer"}}
    agent.model("a.1", called(("answer", {"verdikt": "yes"})))
    assert agent.error.endswith("without an answer: the answer lacks the field 'verdict'")


def test_an_answer_that_does_not_follow_the_schema_may_be_corrected() -> None:
    agent = Agent(schema=VERDICT)
    agent.model("a.1", called(("answer", {"verdict": 3})))
    assert agent.messages("a.2")[-1]["content"] == "Error: the answer.verdict should be string, got 3"
    agent.model("a.2", called(("answer", {"verdict": "yes"})))
    assert agent.left["json"] == {"verdict": "yes"}


def test_all_of_the_schema_counts_and_the_model_reads_what_is_wrong() -> None:
    strict = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "additionalProperties": False}
    agent = Agent(schema=strict)
    agent.model("a.1", called(("answer", {"n": 0, "m": 1})))
    told = agent.body("a.2")["messages"][-1]["content"]
    assert told.startswith("Error: ")
    for part in ("the answer: Additional properties are not allowed", "the answer.n: 0 is less than the minimum of 1"):
        assert part in told
    agent.model("a.2", called(("answer", {"n": 1})))
    assert agent.run.nodes["a"].state == "finished"


def test_an_answer_in_words_counts_if_it_follows_the_schema_and_is_asked_for_again_if_not() -> None:
    agent = Agent(schema=VERDICT)
    agent.model("a.1", said("Yes, I think."))
    assert agent.messages("a.2")[1:] == [
        {"role": "assistant", "content": "Yes, I think."},
        {"role": "user", "content": "Give your answer by calling the tool `answer`."},
    ]
    agent.model("a.2", said('{"verdict": "yes"}'))
    assert agent.left["json"] == {"verdict": "yes"}


def test_what_is_asked_for_along_with_the_answer_is_done_first() -> None:
    agent = Agent(schema=VERDICT)
    agent.model("a.1", called(("answer", {"verdict": "yes"}), ("pay", {"city": "Oslo"})))
    assert list(agent.out) == ["a.1.2"]
    agent.tool("a.1.2", "paid")
    assert agent.left["json"] == {"verdict": "yes"}


def test_a_tool_that_nobody_has_fails_the_agent_before_its_model_is_asked() -> None:
    agent = Agent(catalogue={"weather": spec_of("weather")})
    assert agent.run.end == Failed(error="there is no tool 'maps.find'; tools are weather", path="a")


def test_a_tool_that_vanishes_later_is_no_longer_offered_and_its_use_is_told() -> None:
    agent = Agent()
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    del agent.catalogue["weather"]
    agent.tool("a.1.1", "cold")
    assert [tool["function"]["name"] for tool in agent.body("a.2")["tools"]] == ["maps__find", "pay"]
    agent.model("a.2", called(("weather", {"city": "Rome"})))
    assert "there is no tool 'weather'" in agent.messages("a.3")[-1]["content"]


def test_a_tool_whose_schema_is_none_is_told_to_the_model_as_an_error() -> None:
    agent = Agent(catalogue=CATALOGUE | {"weather": spec_of("weather", parameters={"type": "object", "properties": 3})})
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    assert "not a JSON Schema" in agent.messages("a.2")[-1]["content"]


def test_an_agent_is_one_node_to_those_that_name_it() -> None:
    after = {"kind": "llm", "model": "m", "prompt": "{{ a.text }} in {{ a.steps }}"}
    agent = Agent(nodes={"after": after})
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", "cold")
    agent.model("a.2", said("Cold."))
    assert agent.messages("after")[-1]["content"] == "Cold. in 2"


def test_a_step_whose_model_fails_fails_the_agent_by_name() -> None:
    agent = Agent()
    agent.take(after_failure(agent.run, "a.1", Failure(cause="replica", error="broke"), 0.0))
    assert agent.run.end == Failed(error="broke", path="a.1")


def test_a_step_is_attempted_again_as_its_author_says() -> None:
    agent = Agent(retry={"attempts": 2, "backoff_s": 0}, timeout_s=5)
    agent.take(after_failure(agent.run, "a.1", Failure(cause="invalid", error="nothing"), 0.0))
    assert [(call.path, call.attempt, call.timeout_at_s) for call in agent.out.values()] == [("a.1", 2, 5.0)]
    agent.model("a.1", said("Hello."))
    assert agent.left["steps"] == 1


def test_cancelling_ends_an_agent_in_the_middle_of_a_tool() -> None:
    agent = Agent()
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.take(CancelRequested())
    assert agent.run.end == Cancelled()


def test_the_parts_of_an_agent_count_against_the_nodes_of_a_run() -> None:
    agent = Agent(whole={"limits": {"nodes": 3}})
    agent.model("a.1", called(("weather", {"city": "Oslo"})))
    agent.tool("a.1.1", "cold")
    assert agent.error.startswith("the run would come to 4 nodes, at most 3 may be expanded")


def test_an_agent_works_in_a_map_like_any_other_node() -> None:
    each = {"over": "[1, 2]", "as": "n", "do": {"look": {"kind": "agent", "model": "m", "prompt": "{{ n }}"}}}
    agent = Agent(nodes={"m": {"kind": "map", "needs": ["a"], "result": "{{ look.text }}", **each}})
    agent.model("a.1", said("Go on."))
    assert [message["content"] for message in agent.messages("m[1].look.1")] == ["2"]
    agent.model("m[0].look.1", said("one"))
    agent.model("m[1].look.1", said("two"))
    assert agent.run.end == Finished(outputs={"m": ["one", "two"]})


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"choices": []}, "no 'choices' list"),
        ({}, "no 'choices' list"),
        ([], "no 'choices' list"),
        ({"choices": [{"message": None}]}, "without a message"),
        (said(None), "neither with text nor with a tool to call"),
        (said("  "), "neither with text nor with a tool to call"),
        (said(None, reason="length"), "cut off at max_tokens, which should be higher"),
        ({"choices": [{"message": {"content": None, "tool_calls": {"a": 1}}}]}, "tool_calls are no list"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"id": "x"}]}}]}, "a tool without a name"),
        ({"choices": [{"message": {"tool_calls": [{"function": {"name": ""}}]}}]}, "a tool without a name"),
        (called(*[("weather", "{}")] * 33), "asked for 33 tools at once, at most 32"),
        (said("x" * 1_048_577), "at most 1048576 are kept"),
    ],
)
def test_an_answer_of_no_use_is_told_from_one_that_can_be_used(answer: Any, why: str) -> None:
    read = read_answer(Agent().run, "a.1", answer)
    assert isinstance(read, Unusable)
    assert why in read.error


def test_what_engines_leave_out_or_write_otherwise_is_filled_in() -> None:
    calls = [
        {"function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        {"id": "same", "function": {"name": "we ather", "arguments": None}},
        {"id": "same", "function": {"name": "weather", "arguments": '{"city": "Rome\ud800"}'}},
    ]
    read = read_answer(Agent().run, "a.1", {"choices": [{"message": {"tool_calls": calls}}], "usage": None})
    assert isinstance(read, Usable)
    assert read.output == {
        "text": "",
        "uses": [
            {"id": "call00001", "name": "weather", "arguments": '{"city":"Oslo"}'},
            {"id": "same", "name": "we_ather", "arguments": ""},
            {"id": "call00003", "name": "weather", "arguments": '{"city": "Rome?"}'},
        ],
        "usage": {},
    }


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"functions": ["uper"]}, "functions: there is no function 'uper' (did you mean 'upper'?)"),
        ({"tools": ["a.b", "a__b"]}, "tools: 'a__b' is 'a__b' for the model, and so is 'a.b'; list only one"),
        ({"tools": ["trim"], "functions": ["trim"]}, "functions: 'trim' is 'trim' for the model, and so is 'trim'"),
        ({"tools": ["answer"], "schema": VERDICT}, "and so is the tool by which the agent answers"),
        ({"tools": ["x" * 65]}, "longer than the 64 characters"),
        ({"tools": ["rm -rf"]}, "was given, a text like"),
        ({"max_steps": 0}, "greater than or equal to 1"),
        ({"context_tokens": 512}, "is for prompt and answer together, and should be more than max_tokens (512)"),
        ({"tool": ["x"]}, "unknown field 'tool' (did you mean 'tools'?)"),
    ],
)
def test_a_mistake_in_the_definition_of_an_agent_is_named(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(WorkflowError) as error:
        parse_workflow({"name": "x", "nodes": {"a": {"kind": "agent", "model": "m", "prompt": "p", **fields}}})
    assert why in str(error.value)


def test_a_tool_may_be_called_answer_where_no_schema_asks_for_one() -> None:
    agent = Agent(catalogue={"answer": spec_of("answer")}, tools=["answer"])
    (call,) = agent.model("a.1", called(("answer", {"city": "Oslo"})))
    assert isinstance(call, StartToolCall)


LOOK_UP = {
    "description": "Looks a place up.",
    "inputs": {"place": None, "depth": 1},
    "nodes": {
        "find": {"kind": "llm", "model": "small", "prompt": "{{ inputs.place }}"},
        "also": {"kind": "llm", "model": "small", "prompt": "{{ inputs.depth }}"},
    },
    "outputs": {"found": "{{ find.text }}"},
}


def test_a_workflow_of_the_definition_can_be_a_tool() -> None:
    agent = Agent(whole={"workflows": {"look_up": LOOK_UP}}, workflows=["look_up"])
    assert agent.body("a.1")["tools"][-1]["function"] == {
        "name": "look_up",
        "description": "Looks a place up.",
        "parameters": {
            "type": "object",
            "properties": {"place": {}, "depth": {"type": "number"}},
            "required": ["place"],
        },
    }
    agent.model("a.1", called(("look_up", {"place": "Oslo"})))
    assert list(agent.out) == ["a.1.1.find", "a.1.1.also"]
    for path in ("a.1.1.find", "a.1.1.also"):
        agent.model(path, said(f"from {path}"))
    assert agent.messages("a.2")[-1]["content"] == '{"found":"from a.1.1.find"}'


def test_a_workflow_that_fails_as_a_tool_is_told_to_the_model_and_takes_what_is_out_inside_it_along() -> None:
    agent = Agent(whole={"workflows": {"look_up": LOOK_UP}}, workflows=["look_up"])
    agent.model("a.1", called(("look_up", {"place": "Oslo"}), ("look_up", {"town": "Oslo"}), ("look_up", {})))
    agent.take(after_failure(agent.run, "a.1.1.find", Failure(cause="replica", error="broke"), 0.0))
    told = [message["content"] for message in agent.messages("a.2")[-3:]]
    assert told[0] == "Error: broke"
    assert told[1].startswith("Error: inputs.town: the workflow declares no such input")
    assert told[2] == "Error: inputs.place: this input has no default and must be given"
    assert list(agent.run.in_flight) == ["a.2"], "the other node of the workflow is given up"
    agent.model("a.2", said("Unknown."))
    assert isinstance(agent.run.end, Finished)


def test_an_agent_that_comes_to_use_itself_is_refused() -> None:
    inside = {"nodes": {"b": {"kind": "agent", "model": "m", "prompt": "p", "workflows": ["again"]}}}
    with pytest.raises(WorkflowError, match="use each other in a circle: again -> again"):
        Agent(whole={"workflows": {"again": inside}}, workflows=["again"])


def test_an_agent_answers_with_what_is_left_of_its_budget_before_that_is_used_up() -> None:
    agent = Agent(budget={"tokens": 2000}, max_tokens=500, schema=VERDICT)
    assert "tool_choice" not in agent.body("a.1")
    agent.model(
        "a.1", called(("weather", {"city": "Oslo"})), spent=Spent(steps=1, prompt_tokens=250, output_tokens=500)
    )
    agent.tool("a.1.1", "cold")
    assert agent.body("a.2")["tool_choice"] == {"type": "function", "function": {"name": "answer"}}
    agent.model("a.2", called(("answer", {"verdict": 1})), spent=Spent(steps=1, prompt_tokens=300, output_tokens=500))
    failed = agent.events[-2]
    assert isinstance(failed, NodeFailed)
    assert (failed.path, failed.reason) == ("a", "budget")
    assert "the answer.verdict should be string" in failed.error


def test_a_budget_that_is_too_small_for_a_step_fails_the_agent_before_its_model_is_asked() -> None:
    agent = Agent(budget={"tokens": 100})
    assert isinstance(agent.run.end, Failed)
    assert agent.run.end.error.startswith("the budget of a allows 100 tokens; 0 are spent")
    assert agent.run.end.path == "a.1"
