"""The corpus of the demo: its roles and tasks are complete, distinct and well-formed."""

import json
from collections import Counter, defaultdict
from importlib.resources import files

import pytest
import yaml
from jsonschema import Draft202012Validator

DEMO = files("swarmx.demo")
ROLES = yaml.safe_load((DEMO / "roles.yaml").read_text(encoding="utf-8"))
TASKS = [json.loads(line) for line in (DEMO / "tasks.jsonl").read_text(encoding="utf-8").split("\n") if line]

KINDS = {
    "coding": {"planner", "coder", "reviewer", "tester"},
    "research": {"scoper", "searcher", "critic", "writer"},
    "media": {"director", "prompter", "captioner"},
    "general": {"assistant", "summariser", "extractor"},
}
DIFFICULTIES = {"easy", "medium", "hard"}
FAN_OUT = {
    "planner": ("steps", 6),
    "scoper": ("questions", 6),
    "director": ("scenes", 5),
}
SCHEMA_ROLES = sorted(name for name, role in ROLES.items() if role["schema"] is not None)


def objects(schema):
    """Every object schema within ``schema``, itself included."""
    if schema.get("type") == "object":
        yield schema
    for sub in [*schema.get("properties", {}).values(), schema.get("items")]:
        if sub:
            yield from objects(sub)


def longest(schema):
    """The most characters that the values of an answer may hold."""
    kind = schema["type"]
    if kind == "object":
        return sum(longest(sub) for sub in schema["properties"].values())
    if kind == "array":
        return schema["maxItems"] * longest(schema["items"])
    if kind == "boolean":
        return len("false")
    assert kind == "string"
    if "enum" in schema:
        return max(len(value) for value in schema["enum"])
    return schema["maxLength"]


def test_there_are_at_least_300_tasks():
    assert len(TASKS) >= 300


@pytest.mark.parametrize("field", ["id", "text"])
def test_values_are_unique(field):
    counts = Counter(task[field] for task in TASKS)
    assert [value for value, n in counts.items() if n > 1] == []


def test_tasks_have_the_expected_fields():
    for task in TASKS:
        assert set(task) == {"id", "kind", "role", "difficulty", "text"}, task["id"]
        assert task["id"].rpartition("-")[0] == task["role"]
        assert task["role"] in KINDS[task["kind"]], task["id"]
        assert task["difficulty"] in DIFFICULTIES, task["id"]


def test_every_role_is_defined_and_used():
    used = {task["role"] for task in TASKS}
    assert used == set(ROLES) == set().union(*KINDS.values())


def test_every_difficulty_is_present_for_the_larger_roles():
    seen = defaultdict(list)
    for task in TASKS:
        seen[task["role"]].append(task["difficulty"])
    for role, difficulties in seen.items():
        if len(difficulties) >= 12:
            assert set(difficulties) == DIFFICULTIES, role


@pytest.mark.parametrize("role", FAN_OUT)
def test_fan_out_roles_have_twelve_tasks_of_each_difficulty(role):
    counts = Counter(task["difficulty"] for task in TASKS if task["role"] == role)
    assert counts == dict.fromkeys(DIFFICULTIES, 12)


def test_texts_have_no_blank_lines_or_outer_space():
    for task in TASKS:
        assert task["text"] == task["text"].strip(), task["id"]
        assert all(line.strip() for line in task["text"].split("\n")), task["id"]


@pytest.mark.parametrize("name", sorted(ROLES))
def test_role_is_well_formed(name):
    role = ROLES[name]
    assert set(role) == {"system", "max_tokens", "temperature", "schema"}
    assert isinstance(role["system"], str)
    assert len(role["system"]) > 80
    assert "\n" not in role["system"].strip()
    assert type(role["max_tokens"]) is int
    assert role["max_tokens"] > 0
    assert role["temperature"] == (0.7 if role["schema"] is None else 0.6)


@pytest.mark.parametrize("name", SCHEMA_ROLES)
def test_schema_is_valid_and_closed(name):
    schema = ROLES[name]["schema"]
    Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    for part in objects(schema):
        assert part["additionalProperties"] is False
        assert sorted(part["required"]) == sorted(part["properties"])


@pytest.mark.parametrize("name", SCHEMA_ROLES)
def test_max_tokens_leave_room_for_the_longest_answer(name):
    role = ROLES[name]
    assert role["max_tokens"] >= longest(role["schema"]) / 3


@pytest.mark.parametrize("name", FAN_OUT)
def test_fan_out_is_bounded_and_left_to_the_model(name):
    key, most = FAN_OUT[name]
    schema = ROLES[name]["schema"]
    assert list(schema["properties"]) == [key]
    assert schema["properties"][key]["minItems"] == 1
    assert schema["properties"][key]["maxItems"] == most
    assert "one for a trivial job, up to" in ROLES[name]["system"]
