"""The pages do not lie: what they name exists, what exists is named, and their code blocks can be read."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args
from xml.etree import ElementTree

import click
import pytest
import yaml
from fastapi import FastAPI

from swarmx import docs
from swarmx.agents.policies import POLICIES, parameters_of
from swarmx.cli import main as command_line
from swarmx.config import Settings, parse, rows
from swarmx.core.actions import Action
from swarmx.core.messages import Message
from swarmx.gateway.app import create_app
from swarmx.gateway.keys import RIGHTS
from swarmx.gateway.telemetry import Telemetry
from swarmx.runtime.fleet_book import FleetBook
from swarmx.workflows.spec import parse_workflow

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "prompts" / "README.md", ROOT / "eval" / "LOG.md"]
)
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
EVERY = pytest.mark.parametrize("page", TEXT)
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MADE = {"WORKFLOW_ID", "CALL_ID", "FILE", "SHA256"}  # places to fill in


def blocks(language: str) -> list[Any]:
    """Every code block in the language, named by page and position."""
    found = []
    for page, text in TEXT.items():
        for number, block in enumerate(BLOCK.finditer(text)):
            if block[1].strip() == language:
                found.append(pytest.param(block[2], id=f"{page}-{number}"))
    return found


def without_blocks(text: str) -> str:
    return BLOCK.sub("", text)


def mentioned(word: str) -> bool:
    return any(f"`{word}`" in text for page, text in TEXT.items())


@pytest.mark.parametrize("name", docs.pages())
def test_a_generated_page_is_up_to_date(name: str) -> None:
    written = TEXT.get(f"docs/reference/{name}", "")
    assert written == docs.pages()[name], "run `make docs`"


def test_the_writer_of_pages_wants_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main([]) == 2
    assert docs.main([str(tmp_path / "new")]) == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(docs.pages())
    assert "Name the folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, _, _ in rows(Settings())])
def test_a_setting_is_documented_with_a_meaning(name: str) -> None:
    section, _, field = name.rpartition(".")
    title = f"[[{section.removesuffix('[]')}]]" if section.endswith("[]") else f"[{section}]"
    part = TEXT["docs/reference/settings.md"].split(f"## `{title}`\n")[1].split("\n## ")[0]
    line = next(line for line in part.splitlines() if line.startswith(f"| `{field}` |"))
    assert line.split("|")[3].strip()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_has_a_section_and_its_parameters_are_listed(name: str) -> None:
    assert f"\n## {name}\n" in TEXT["docs/policies.md"]
    assert f"| `{name}` |" in TEXT["docs/policies.md"]
    assert all(f"`{parameter}`" in TEXT["docs/reference/policies.md"] for parameter in parameters_of(name))


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            if command.invoke_without_command:
                yield f"{path} {name}", command
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize("path", [path for path, _ in commands(command_line, "swarmx")])
def test_a_command_is_on_its_page_with_every_option(path: str) -> None:
    command = dict(commands(command_line, "swarmx"))[path]
    part = TEXT["docs/reference/cli.md"].split(f"\n## `{path}")[1].split("\n## ")[0]
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert f"`{option.opts[0]}" in part


@functools.cache
def app() -> FastAPI:
    # Building routes reads nothing of the context; only a request does.
    return create_app(cast(Any, None), max_body_bytes=1)


ENDPOINTS = [f"{method.upper()} {path}" for path, methods in app().openapi()["paths"].items() for method in methods]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_endpoint_is_on_the_rest_page(endpoint: str) -> None:
    assert f"`{endpoint}`" in TEXT["docs/rest.md"]


def test_the_rest_page_names_no_endpoint_that_is_not_there() -> None:
    named = set(re.findall(r"`((?:GET|POST|PUT|DELETE|PATCH) /[^`]*)`", TEXT["docs/rest.md"] + TEXT["docs/openai.md"]))
    assert named <= set(ENDPOINTS)


@pytest.mark.parametrize("member", [*get_args(Message), *get_args(Action)], ids=lambda member: member.__name__)
def test_a_message_or_action_is_listed_with_its_fields(member: Any) -> None:
    page = TEXT["docs/reference/messages.md"]
    line = next(line for line in page.splitlines() if line.startswith(f"| `{member.__name__}` |"))
    assert all(f"`{field}`" in line for field in member.__struct_fields__)


class StoppedClock:
    def now_s(self) -> float:
        return time.monotonic()


def test_every_metric_is_on_the_operations_page() -> None:
    metrics = re.findall(
        rb"^# TYPE (\S+) ", Telemetry(FleetBook(StoppedClock()), faults=lambda: 0).text(), re.MULTILINE
    )
    own = {name.decode() for name in metrics if name.startswith(b"swarmx_") and not name.endswith(b"_created")}
    assert own
    assert all(f"`{name}`" in TEXT["docs/operations.md"] for name in own)


@pytest.mark.parametrize("role", RIGHTS)
def test_a_role_has_the_rights_that_the_security_page_says(role: str) -> None:
    line = next(line for line in TEXT["docs/security.md"].splitlines() if line.startswith(f"| `{role}` |"))
    said = [bool(cell.strip()) for cell in line.split("|")[2:-1]]
    rights = RIGHTS[cast(Any, role)]
    assert said == [right in rights for right in ("submit", "read", "read_all", "control", "keys")]


@EVERY
def test_a_link_leads_somewhere(page: str) -> None:
    for target in LINK.findall(without_blocks(TEXT[page])):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY
def test_a_file_that_is_named_exists(page: str) -> None:
    own = (ROOT / "swarmx", ROOT / "eval", ROOT / "tests", ROOT / "docs", ROOT / "scripts", ROOT / "prompts")
    for name in re.findall(r"`((?:swarmx|eval|tests|docs|scripts|prompts)/[\w./-]+)`", TEXT[page]):
        assert (ROOT / name).exists(), name
    assert all(folder.is_dir() for folder in own)


@EVERY
def test_a_make_target_that_is_named_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join([*re.findall(r"`([^`\n]+)`", TEXT[page]), *(b[2] for b in BLOCK.finditer(TEXT[page]))])
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= targets


@EVERY
def test_a_command_that_is_named_exists_with_its_options(page: str) -> None:
    known = dict(commands(command_line, "swarmx"))
    top = {option for parameter in command_line.params for option in parameter.opts}
    lines = [*re.findall(r"`(swarmx [^`\n]+)`", TEXT[page])]
    for block in BLOCK.finditer(TEXT[page]):
        lines += [line for line in block[2].splitlines() if block[1].strip() == "bash" and line.startswith("swarmx ")]
    for line in lines:
        if "OPTIONS" in line or "|" in line:
            continue
        words = shlex.split(line, comments=True)[1:]
        while words and words[0].startswith("--"):
            assert words.pop(0) in top, line
        if not words:
            continue
        two = " ".join(["swarmx", *words[:2]])
        path = two if two in known else f"swarmx {words[0]}"
        if path == "swarmx keys":
            continue
        assert path in known, line
        options = {option for parameter in known[path].params for option in parameter.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, line


@EVERY
def test_an_evaluation_command_that_is_named_exists(page: str) -> None:
    for name in re.findall(r"python -m ((?:eval|swarmx)[\w.]*)", TEXT[page]):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_compiles(block: str) -> None:
    ast.parse(block)


@pytest.mark.parametrize("block", blocks("toml"))
def test_a_settings_block_is_accepted(block: str) -> None:
    parse(tomllib.loads(block))


@pytest.mark.parametrize("block", blocks("yaml workflow"))
def test_a_workflow_block_is_a_workflow(block: str) -> None:
    assert parse_workflow(block).nodes


@pytest.mark.parametrize("block", blocks("yaml"))
def test_a_yaml_block_parses(block: str) -> None:
    assert yaml.safe_load(block)


@pytest.mark.parametrize("block", blocks("json"))
def test_a_json_block_parses(block: str) -> None:
    assert json.loads(block)


def test_every_code_block_says_its_language() -> None:
    known = {"bash", "python", "toml", "yaml", "yaml workflow", "json", "text"}
    for page, text in TEXT.items():
        assert {block[1].strip() for block in BLOCK.finditer(text)} <= known, page


def test_the_policy_of_the_contributing_page_works(monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(b[2] for b in BLOCK.finditer(TEXT["CONTRIBUTING.md"]) if b[1].strip() == "python")
    space: dict[str, Any] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), space)  # noqa: S102  # our own page
    monkeypatch.setitem(cast(dict[str, Any], POLICIES), "most_room", space["MostRoom"])
    assert parameters_of("most_room") == {"reserve_tokens": 0.0}
    assert parse({"router": {"policy": "most_room"}}).router.policy == "most_room"


def test_the_picture_is_xml_and_names_the_parts() -> None:
    text = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    words = " ".join(ElementTree.fromstring(text).itertext())  # noqa: S314  # our own file
    for part in (
        "Gateway",
        "Workflow runner",
        "Forecaster",
        "Router agent",
        "Journal",
        "Call service",
        "Watch",
        "Store",
    ):
        assert part in words


@EVERY
def test_a_page_is_in_a_map(page: str) -> None:
    maps = {
        "docs": TEXT["docs/index.md"],
        "docs/reference": TEXT["docs/index.md"],
        "docs/adr": TEXT["docs/adr/README.md"],
    }
    folder, name = Path(page).parent.as_posix(), Path(page).name
    if folder in maps and name not in ("index.md", "README.md"):
        assert f"{name})" in maps[folder]


@EVERY
def test_a_page_speaks_of_the_project_alone(page: str) -> None:
    assert not re.search(r"/(tmp|home|root)/", TEXT[page])
    assert TEXT[page].endswith("\n")
    assert not re.search(r"[ \t]+$", TEXT[page], re.MULTILINE)
