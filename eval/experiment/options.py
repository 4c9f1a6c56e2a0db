"""The options that the experiments with simulated routers share, and what they say to bad ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from eval.workloads.reading import Sources
from swarmx.core.errors import ConfigError, SwarmXError

FEWEST_WORKFLOWS = 20


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `python -m eval NAME` that knows the shared options."""
    parser = argparse.ArgumentParser(prog=f"python -m eval {name}", description=description)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results; what is there already is not simulated again")
    add("--quick", action="store_true", help="under three minutes: does it run?")
    add("--prompts", type=Path, help="prompts and recorded lengths: a folder or file, see docs/evaluation.md")
    add("--sessions", type=Path, help="recorded agent sessions")
    add("--engine", type=Path, help="recorded image flows")
    add("--seeds", type=int, help="how many")
    add("--count", type=int, help="workflows a seed, those of the warm-up among them")
    add("--tuned", type=Path, help="tuned.json of an earlier `python -m eval routing`, for the policies' settings")
    add("--workers", type=int, default=2, help="processes")
    add("--stale-ok", action="store_true", help="use runs of older code, too")
    return parser


def sources_of(given: argparse.Namespace) -> Sources:
    """The files that were given; an experiment without recorded arrivals has no option for them."""
    arrivals: Path | None = getattr(given, "arrivals", None)
    return Sources(prompts=given.prompts, arrivals=arrivals, sessions=given.sessions, engine=given.engine)


def check(given: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that will not do."""
    for name, least in (("seeds", 1), ("count", FEWEST_WORKFLOWS), ("workers", 1)):
        value: int | None = getattr(given, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}, expected at least {least}.")


def status_of(experiment: Callable[[], int], out: Path) -> int:
    """What the experiment returns; 2 for options or data that will not do, 130 when it is interrupted."""
    try:
        return experiment()
    except SwarmXError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Stopped. What is done is in {out}: the same command goes on from there.", file=sys.stderr)
        return 130
