"""Runs inside the sandbox, with nothing of SwarmX: calls `main` of a tool's file with the arguments of the call."""

import json
import os
import sys


def run() -> int:
    """Arguments come as JSON from the standard input; the result leaves as JSON by what was the standard output."""
    result_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the tool prints is not its result
    arguments = json.load(sys.stdin)
    scope: dict[str, object] = {"__name__": "tool", "__file__": sys.argv[1]}
    with open(sys.argv[1], encoding="utf-8") as file:
        source = file.read()
    try:
        exec(compile(source, sys.argv[1], "exec"), scope)  # noqa: S102  # the tool, in its sandbox
        main = scope.get("main")
        if not callable(main):
            raise TypeError("the file has no function main")
        result = json.dumps(main(**arguments), allow_nan=False)
    except Exception as error:  # noqa: BLE001  # whatever the tool raises is its answer
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    result_to.write(result)
    result_to.close()
    return 0


if __name__ == "__main__":
    sys.exit(run())
