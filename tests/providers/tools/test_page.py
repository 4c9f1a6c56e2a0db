"""The page about tools of workflows: its file can be read, and every setting is on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from swarmx.core.errors import ConfigError
from swarmx.providers.tools import settings

PAGE = (Path(__file__).parents[3] / "docs" / "workflow_tools.md").read_text()


def test_the_file_of_the_page_is_read() -> None:
    block = re.search(r"^```text\n# tools\.toml\n(.*?)^```", PAGE, re.M | re.S)
    assert block is not None
    read = settings.parse(block[1], where="the page")
    assert [tool.name for tool in (*read.command, *read.python, *read.http, *read.mcp)] == [
        "word-count", "statistics", "weather", "notes", "wiki",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "form", [settings.ToolSettings, settings.CommandTool, settings.PythonTool, settings.HttpTool, settings.McpServer]
)
def test_every_setting_is_on_the_page(form: type[BaseModel]) -> None:
    for name in form.model_fields:
        assert re.search(rf"\b{name}\b", PAGE), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[command]]\nname='a b'\ndescription=''\nargv=['x']", "command.0.name"),
        ("[[command]]\nname='a'\ndescription=''\nargv=[]", "argv"),
        ("[[command]]\nname='a'\ndescription=''\nargv=['x']\nenvironment={path='x'}", "environment"),
        ("[[command]]\nname='a'\ndescription=''\nargv=['x']\nmounts=['../x']", "whole path"),
        ("[[http]]\nname='a'\ndescription=''\nhosts=['Exa mple']", "hosts"),
        ("[[http]]\nname='a'\ndescription=''\nhosts=['*']\nnetworks=['10.0.0.1/8']", "networks"),
        ("[[mcp]]\nname='a'\nurl='http://x'\nargv=['x']", "either argv"),
        ("[[mcp]]\nname='a'\nargv=['x']\n[[mcp]]\nname='a'\nargv=['x']", "one name"),
        ("slots = 0", "slots"),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings.parse(text, where="here")
