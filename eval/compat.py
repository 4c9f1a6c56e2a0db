"""Ours inside Ray Serve and in front of ComfyUI, against what those bring along, in one result.

Runs `eval.ray_serve` and `eval.comfy_servers` one after the other, each with the interpreter that has what it needs,
and judges what they leave behind. A part whose interpreter, or checkout, is not there is left out, and said to be:

    python -m eval compat --out DIR [--part serve] [--part comfy] [--quick] [--seeds 3] [--prompts FOLDER]
        [--ray-python PYTHON] [--comfyui-dir CHECKOUT --comfyui-python PYTHON]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from eval.ray_serve_plan import claims_of
from eval.result import Claim, Row, claim, table, write_result

_ROOT = Path(__file__).parents[1]
_RAY_PYTHON = _ROOT / ".venv-ray/bin/python"  # of `make setup-ray`
_OURS = "ours"  # among the ways of `eval.comfy_servers`


class Left(msgspec.Struct, frozen=True):
    """What is read of the `result.json` that an experiment leaves."""

    rows: list[dict[str, str | int | float | bool | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One comparison: the runs to make, by the folder under `--out` for what each leaves, and how to judge their rows.

    `absent` says what is missing for it; empty where nothing is.
    """

    runs: Mapping[str, Sequence[str]]
    claims: Callable[[Sequence[Row]], list[Claim]]
    absent: str = ""


def serve_part(given: argparse.Namespace) -> Part:
    """Workflows in real Ray Serve, by its routers and by ours; all seeds in one run."""
    command = [str(given.ray_python), "-m", "eval.ray_serve", "--seeds", str(given.seeds)]
    if given.prompts is not None:
        command += ["--prompts", str(given.prompts.resolve())]
    routers = ["power_of_two", "round_robin", "capacity_queue", "swarmx"]
    if given.quick:
        command += ["--count", "24"]
        del routers[0]
    command += ["--routers", ",".join(routers)]
    absent = "" if given.ray_python.exists() else f"there is no {given.ray_python}: make setup-ray, or --ray-python"
    return Part(runs={"serve": command}, claims=claims_of, absent=absent)


def comfy_part(given: argparse.Namespace) -> Part:
    """Jobs on two real ComfyUI servers, by the rules of gateways and by ours; a run for each seed."""
    command = [
        *(sys.executable, "-m", "eval.comfy_servers"),
        *("--comfyui-dir", str(given.comfyui_dir), "--comfyui-python", str(given.comfyui_python)),
        *(("--rounds", "1", "--jobs", "8", "--warm-up", "2") if given.quick else ()),
    ]
    absent = ""
    if given.comfyui_dir is None or given.comfyui_python is None:
        absent = "it needs --comfyui-dir and --comfyui-python"
    elif missing := next((path for path in (given.comfyui_dir, given.comfyui_python) if not path.exists()), None):
        absent = f"there is no {missing}"
    runs = {f"comfy-{seed}": [*command, "--seed", str(seed)] for seed in range(given.seeds)}
    return Part(runs=runs, claims=comfy_claims, absent=absent)


def comfy_claims(rows: Sequence[Row]) -> list[Claim]:
    """P95 of our jobs over that of the rule that does best: medians over the seeds, the best one in hindsight."""
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if isinstance(p95_s := row.get("p95_s"), int | float):  # a calibration has none
            seconds.setdefault(str(row["way"]), []).append(float(p95_s))
    medians = {way: float(np.median(found)) for way, found in seconds.items()}
    ours = medians.pop(_OURS, None)
    if ours is None or not medians:
        return []
    return [claim("comfy_p95_vs_best", ours / min(medians.values()), "<=", 0.85)]


PARTS: Mapping[str, Callable[[argparse.Namespace], Part]] = {"serve": serve_part, "comfy": comfy_part}


def run(command: Sequence[str], out: Path) -> list[Row]:
    """The rows that the experiment leaves in `out`. Raises RuntimeError where it leaves no new result.

    Its exit status does not count: it may say that an aim was missed.
    """
    result = out / "result.json"
    result.unlink(missing_ok=True)
    status = subprocess.run([*command, "--out", str(out.resolve())], cwd=_ROOT, check=False).returncode
    if not result.exists():
        raise RuntimeError(f"{' '.join(command)} ended with status {status} and left no {result}")
    return list(msgspec.json.decode(result.read_bytes(), type=Left).rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 when each that was asked for ran and met its aims, 2 when none could run."""
    parser = argparse.ArgumentParser(
        prog="python -m eval compat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all without it")
    parser.add_argument("--quick", action="store_true", help="few workflows and jobs: that all runs, not who is better")
    parser.add_argument("--seeds", type=int, default=1, help="draws of workflows and of jobs")
    parser.add_argument("--prompts", type=Path, help="recorded prompts with lengths, for workflows in Serve")
    parser.add_argument("--ray-python", type=Path, default=_RAY_PYTHON, help="an interpreter with swarmx[ray]")
    parser.add_argument("--comfyui-dir", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--comfyui-python", type=Path, help="its interpreter")
    given = parser.parse_args(arguments)
    for name in ("ray_python", "comfyui_dir", "comfyui_python"):  # not resolved: a link tells Python its environment
        if (path := getattr(given, name)) is not None:
            setattr(given, name, path.absolute())
    rows: list[Row] = []
    claims: list[Claim] = []
    whole = True
    for name in given.part or PARTS:
        part = PARTS[name](given)
        if part.absent:
            print(f"{name} is LEFT OUT: {part.absent}.", flush=True)
            whole = whole and not given.part
            continue
        found: list[Row] = []
        try:
            for folder, command in part.runs.items():
                found += [{"part": name, "run": folder, **row} for row in run(command, given.out / folder)]
        except RuntimeError as error:  # what the other part came to is kept
            print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
            whole = False
        rows += found
        claims += part.claims(found)
    if not rows:
        return 2
    command = " ".join(["python -m eval compat", *(sys.argv[1:] if arguments is None else arguments)])
    print(table(rows))
    print(write_result(given.out, command, rows, claims, seeds=list(range(given.seeds))))
    return 0 if whole and all(each.met for each in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
