"""The demo's tasks and roles, and the workflows that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
import yaml

KINDS = ("coding", "research", "media")
_FIRST_ROLE = {"coding": "planner", "research": "scoper", "media": "director"}
# More steps for a more demanding picture; the values that ComfyUI templates use for drafts, default and final.
_IMAGE_STEPS = {"easy": 20, "medium": 30, "hard": 40}


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Something to do, written for SwarmX."""

    id: str
    kind: str
    role: str
    difficulty: str
    text: str


@cache
def tasks() -> tuple[Task, ...]:
    """All tasks, in the order of the file."""
    lines = files("swarmx.demo").joinpath("tasks.jsonl").read_bytes().splitlines()
    return tuple(msgspec.json.decode(line, type=Task) for line in lines if line.strip())


@cache
def roles() -> dict[str, dict[str, Any]]:
    """System prompt, limits and answer schema by role."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(files("swarmx.demo").joinpath("roles.yaml").read_text())
    return loaded


def openers(kind: str) -> tuple[Task, ...]:
    """The tasks that a workflow of this kind can start from."""
    return tuple(task for task in tasks() if task.role == _FIRST_ROLE[kind])


def flow(kind: str, task: Task, models: Mapping[str, str], *, longest_text: int = 32_768) -> dict[str, Any]:
    """The workflow of a kind for one task; `models` says what `large`, `small` and `image` are called here.

    Free text is cut at `longest_text` tokens; answers with a schema need their room and keep it.
    """
    spec: dict[str, Any] = yaml.safe_load(files("swarmx.demo.flows").joinpath(f"{kind}.yaml").read_text())
    _fill(spec["nodes"], models, longest_text)
    spec["inputs"]["task"] = task.text
    if "steps" in spec["inputs"]:
        spec["inputs"]["steps"] = _IMAGE_STEPS[task.difficulty]
    return spec


def _fill(nodes: dict[str, dict[str, Any]], models: Mapping[str, str], longest_text: int) -> None:
    """Give every node its model's name and, by its role, its instructions and limits."""
    for node in nodes.values():
        if "model" in node:
            node["model"] = models[node["model"]]
        if node["kind"] == "llm":
            role = roles()[node["role"]]
            node |= {"system": role["system"], "max_tokens": role["max_tokens"], "temperature": role["temperature"]}
            if role["schema"] is not None:
                node["schema"] = role["schema"]
            else:
                node["max_tokens"] = min(node["max_tokens"], longest_text)
        _fill(node.get("do", {}), models, longest_text)
