"""`python -m eval NAME ...` runs the experiment eval.NAME; without a known name it lists them."""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

_HERE = Path(__file__).parent


def experiments() -> dict[str, str]:
    """The modules of eval that have a main, with the first line of what they say about themselves; none is imported."""
    found: dict[str, str] = {}
    for path in sorted(_HERE.rglob("*.py")):
        name = ".".join(path.relative_to(_HERE).with_suffix("").parts)
        if path.name.startswith("__"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        if any(function.name == "main" for function in functions):
            found[name] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the arguments after the name to the experiment's own main; 2 when there is no such name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = experiments()
    if not given or given[0] not in known:
        if given and given[0] not in ("-h", "--help"):
            print(f"There is no experiment {given[0]!r}.", file=sys.stderr)
        width = max(map(len, known))
        print("python -m eval NAME [--help | options]\n", file=sys.stderr)
        for name, text in known.items():
            print(f"  {name:{width}}  {text}", file=sys.stderr)
        return 0 if given and given[0] in ("-h", "--help") else 2
    name, rest = given[0], given[1:]
    run = import_module(f"eval.{name}").main
    sys.argv = [f"python -m eval {name}", *rest]
    result = run(rest) if inspect.signature(run).parameters else run()
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
