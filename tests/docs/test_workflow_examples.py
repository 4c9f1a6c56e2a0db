"""The workflows page tells the truth: its examples parse, its tables list what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swarmx.workflows import limits
from swarmx.workflows.functions import FUNCTIONS
from swarmx.workflows.nodes import KINDS
from swarmx.workflows.spec import parse_workflow

PAGE = (Path(__file__).parents[2] / "docs" / "workflows.md").read_text()
EXAMPLES = re.findall(r"```yaml workflow\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[0])
def test_an_example_is_a_workflow(example: str) -> None:
    spec = parse_workflow(example)
    assert parse_workflow(spec.to_json()) == spec


def test_every_node_kind_has_a_section_with_an_example() -> None:
    sections = {part.split("\n")[0]: part for part in PAGE.split("\n## ")}
    for kind in KINDS:
        assert f"kind: {kind}" in sections[kind]


def test_every_function_is_listed_with_its_arguments() -> None:
    for name, function in FUNCTIONS.items():
        arguments = [f"`{a}`" for a in function.required] + [f"`{a}` (optional)" for a in function.optional]
        assert f"| `{name}` | {', '.join(arguments)} | {function.doc} |" in PAGE
    assert len(re.findall(r"^\| `\w+` \| `\w+`", PAGE, flags=re.MULTILINE)) == len(FUNCTIONS)


def test_every_limit_is_stated() -> None:
    for name in ("SOURCE_BYTES", "NODES_DEFINED", "NODES_EXPANDED", "NESTING", "TEMPLATE_BYTES", "TEMPLATE_PARTS",
                 "TEMPLATE_OPERATIONS", "TEXT_CHARS", "OUTPUT_CHARS", "LIST_ITEMS", "IMAGE_BYTES"):  # fmt: skip
        assert re.search(rf"\b{getattr(limits, name)}\b", PAGE), name
