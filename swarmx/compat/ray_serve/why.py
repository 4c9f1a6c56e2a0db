"""Tells from a file of a Serve router's decisions why calls went where they went.

python -m swarmx.compat.ray_serve.why FILE [CALL_ID]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from swarmx.agents.explain import explain
from swarmx.core.errors import ConfigError
from swarmx.core.nouns import Decision


def decisions_in(path: Path) -> Iterator[Decision]:
    """The decisions of a file, as they were made; a last line that is being written is left out. Raises ConfigError."""
    decoder = msgspec.json.Decoder(Decision)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a file in the router's log_dir.") from None
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                yield decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path}, line {number} is no decision: {error}.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sentences, of one call or of all; 1 when there is no such call, 2 when the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m swarmx.compat.ray_serve.why", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("call_id", nargs="?")
    wanted = parser.parse_args(arguments)
    found = 0
    try:
        for decision in decisions_in(wanted.file):
            if wanted.call_id in (None, decision.call.call_id):
                found += 1
                sys.stdout.write("\n".join(explain(decision)) + "\n\n")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
