"""Writes the reference pages that the code itself can tell: `python -m swarmx.docs docs/reference`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from swarmx.agents.policies import DEFAULT_POLICY, POLICIES, describe, parameters_of
from swarmx.cli import main as command_line
from swarmx.config import Settings, rows

_MADE = "<!-- Written by `make docs`. Change the code, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """The text of every generated page, by file name."""
    return {
        "settings.md": settings_page(),
        "cli.md": cli_page(),
        "policies.md": policies_page(),
        "modules.md": modules_page(),
    }


def settings_page() -> str:
    """Every setting with its default and its meaning."""
    out = [
        _MADE + "# Settings",
        "Settings are one TOML file: `swarmx up --config FILE`, or its path in `SWARMX_CONFIG`. Without a file all "
        "defaults hold. A name that is not listed here is an error, and the error names the nearest one. "
        "`swarmx config --config FILE` checks a file without starting anything.",
        "`[[replicas]]` and `[[emulated]]` are lists: write the table once for each entry. `[tenants.NAME]` and "
        "`[prices.NAME]` are written once for each tenant or model, with its own name.",
    ]
    by_section: dict[str, list[tuple[str, str, str]]] = {}
    for name, _, meaning in rows(Settings()):
        section, _, field = name.rpartition(".")
        by_section.setdefault(section, []).append((field, _default(section, field), meaning))
    for section, fields in by_section.items():
        model = _model(section)
        title = f"[[{section.removesuffix('[]')}]]" if section.endswith("[]") else f"[{section}]"
        lines = [f"| `{field}` | {default} | {_cell(meaning)} |" for field, default, meaning in fields]
        table = "\n".join(["| Setting | Default | Meaning |", "| --- | --- | --- |", *lines])
        out += [f"## `{title}`", (model.__doc__ or "").strip(), table]
    return "\n\n".join(out) + "\n"


def cli_page() -> str:
    """Every command with its arguments and options."""
    context = click.Context(command_line, info_name="swarmx")
    out = [
        _MADE + "# Command line",
        f"`swarmx [OPTIONS] COMMAND`. {' '.join((command_line.help or '').split())}",
        "These options stand before the command:",
        _options(command_line, context),
        "An option that names a variable can be set in the environment instead. `SWARMX_TOKEN` holds the token; "
        "without it the file `admin.token` in the state folder is used. A command that fails says why in one sentence "
        "and exits with 1; one that was written wrongly exits with 2.",
    ]
    for path, command, inner in _commands(command_line, context, "swarmx"):
        arguments = " ".join(p.make_metavar(inner) for p in command.params if isinstance(p, click.Argument))
        out += [f"## `{f'{path} {arguments}'.strip()}`", " ".join((command.help or "").split())]
        if table := _options(command, inner):
            out.append(table)
    return "\n\n".join(out) + "\n"


def policies_page() -> str:
    """The catalogue of routing policies."""
    lines = [
        f"| `{name}`{' (default)' if name == DEFAULT_POLICY else ''} | {_cell(describe(name))} | "
        f"{', '.join(f'`{k}` = {v:g}' for k, v in parameters_of(name).items()) or 'none'} |"
        for name in POLICIES
    ]
    out = [
        _MADE + "# Catalogue of policies",
        "[Policies](../policies.md) says how each decides and when to use it.",
        "\n".join(["| Policy | What it does | Parameters |", "| --- | --- | --- |", *lines]),
    ]
    return "\n\n".join(out) + "\n"


def modules_page() -> str:
    """Every module with the first line of its docstring, read from the source: nothing is imported."""
    root = files("swarmx")
    rows: list[str] = []
    for name in sorted(_sources(root)):
        doc = ast.get_docstring(ast.parse(root.joinpath(name).read_text(encoding="utf-8"))) or ""
        rows.append(f"| `swarmx/{name}` | {_cell(doc.splitlines()[0] if doc else '')} |")
    out = [_MADE + "# Modules", "\n".join(["| Module | What it is for |", "| --- | --- |", *rows])]
    return "\n\n".join(out) + "\n"


def _sources(folder: Traversable, path: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield path + entry.name


def _commands(
    group: click.Group, context: click.Context, path: str
) -> Iterator[tuple[str, click.Command, click.Context]]:
    for name in group.list_commands(context):
        command = group.commands[name]
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            if command.invoke_without_command:
                yield f"{path} {name}", command, inner
            yield from _commands(command, inner, f"{path} {name}")
        else:
            yield f"{path} {name}", command, inner


def _options(command: click.Command, context: click.Context) -> str:
    lines = []
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        names = ", ".join(option.opts)
        value = "" if option.is_flag else f" {option.make_metavar(context)}"
        cells = [f"`{names}{value}`".replace("|", "\\|"), *_facts(option)]
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "\n".join(["| Option | Default | Variable | Meaning |", "| --- | --- | --- | --- |", *lines]) if lines else ""
    )


def _facts(option: click.Option) -> tuple[str, str, str]:
    """Default, environment variable, and meaning; an option that must be given says so."""
    default = option.default
    shown = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    told = "required" if option.required else f"`{default}`" if shown else ""
    return told, f"`{option.envvar}`" if option.envvar else "", _cell(option.help or "")


def _model(section: str) -> type[BaseModel]:
    """The model of a section, or of the entries of a list or of tables with names."""
    annotation: Any = Settings.model_fields[section.removesuffix("[]").removesuffix(".NAME")].annotation
    inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
    found: type[BaseModel] = inner[0] if inner else annotation
    return found


def _default(section: str, field: str) -> str:
    """A default as TOML writes it."""
    value = _model(section).model_fields[field].default
    if value is PydanticUndefined:
        return "must be given"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, Mapping):
        return "`{}`"
    return f"`{value}`" if isinstance(value, int | float) else f'`"{value}"`'


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the pages into the folder that is named."""
    if len(arguments) != 1:
        click.echo("Name the folder to write to: python -m swarmx.docs docs/reference", err=True)
        return 2
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
        click.echo(f"Written: {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
