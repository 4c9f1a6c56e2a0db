"""The page about tools does not lie: each tool with its arguments and limits, each rule, state and mode is on it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from swarmx.core.control import Mode, ProposalState
from swarmx.tools.figures import COMPARABLE, ENOUGH_CALLS, MORE_FAILURES, WORSE
from swarmx.tools.registry import make_registry
from swarmx.tools.tool import ControlTool
from tests.tools.worlds import CATALOGUE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
REGISTRY = make_registry(CATALOGUE)


@pytest.mark.parametrize("name", REGISTRY.tools)
def test_a_tool_is_listed_with_its_arguments_effect_and_limits(name: str) -> None:
    tool = REGISTRY.tools[name]
    shown = [f"`{key}`" if field.is_required() else f"[`{key}`]" for key, field in tool.arguments.model_fields.items()]
    limits = [f"{tool.cooldown_s:g} s", str(tool.per_hour)] if isinstance(tool, ControlTool) else ["-", "-"]
    cells = [f"`{name}`", ", ".join(shown) or "none", tool.effect, *limits]
    assert f"| {' | '.join(cells)} |" in PAGE
    assert f"**`{name}`**" in PAGE


def test_every_rule_that_refuses_is_explained() -> None:
    files = [*(ROOT / "swarmx" / "tools").glob("*.py"), ROOT / "swarmx" / "runtime" / "desk.py"]
    rules: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if not isinstance(node, ast.Call):
            continue
        if getattr(node.func, "id", "") == "_no" and isinstance(node.args[0], ast.Constant):
            rules.add(str(node.args[0].value))
        rules |= {
            str(word.value.value)
            for word in node.keywords
            if word.arg == "rule" and isinstance(word.value, ast.Constant)
        }
    rules.discard("allowed")
    assert len(rules) > 15
    assert {rule for rule in rules if f"| `{rule}` |" not in PAGE} == set()


def test_every_state_and_mode_is_explained() -> None:
    assert [word for word in (*get_args(ProposalState), *get_args(Mode)) if f"| `{word}` |" not in PAGE] == []


def test_the_numbers_of_the_verification_are_those_of_the_code() -> None:
    assert (WORSE, COMPARABLE, MORE_FAILURES, ENOUGH_CALLS) == (1.25, 1.25, 0.1, 10)
    assert "more than 25 % while arrivals grew by no more than 25 %; or 10 % more" in PAGE
    assert "fewer than ten calls" in PAGE
