"""How true the simulator is: to queueing theory, to the emulated fleet over real HTTP, and to a real vLLM.

    python -m eval validation --out out/validation [--quick]
    python -m eval validation --out out/validation --part vllm --vllm .models/qwen2.5-coder-0.5b-instruct

The last starts a vLLM server on this CPU for about a quarter of an hour (after `make setup-vllm`); `--url` and
`--model` take one that runs already, on any device; its limits and the sizes of requests are options. Nothing else
should use the machine meanwhile. What the emulated fleet did is kept in `emulated.json`; `--again` compares it with the
simulator of today, without a fleet.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import click
import msgspec

from eval.result import Claim, Row, claim, table, write_result
from eval.sim.against_http import FLEETS, Measured, compared, measured
from eval.sim.against_vllm import LOADS, Traffic, vllm_rows
from eval.sim.queueing import queue_rows
from eval.sim.vllm_sessions import Sessions
from swarmx.core.engine import profiles
from swarmx.providers.process import CPU_PROFILE, VllmServer, check_model

PARTS = ("queueing", "emulated", "vllm")
POLICY, LOAD = "least_work", 0.5
WORKFLOWS = {"one a model": 150, "five, mixed": 900}
"""Where the router chooses, it takes so many until a quantile of one run is within a tenth of that of many."""

QUEUE_AIM, SAME_AIM, EMULATED_AIM, VLLM_AIM = 3.0, 0.001, 0.10, 0.20


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for result.json and result.md.")
@click.option("--quick", is_flag=True, help="Fewer calls and workflows: under three minutes.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only this; all but vllm by default.")
@click.option("--seed", default=0, show_default=True)
@click.option("--time-scale", default=1.0, show_default=True, help="How many times faster than real the fleet runs.")
@click.option("--workflows", type=int, help="Workflows for each emulated fleet.")
@click.option("--fleet", "fleets", multiple=True, type=click.Choice(list(FLEETS)), help="Only this emulated fleet.")
@click.option("--again", type=click.Path(path_type=Path, exists=True), help="The emulated.json of an earlier run.")
@click.option("--vllm", type=click.Path(path_type=Path), help="Folder of a model to serve with vLLM on this CPU.")
@click.option("--url", help="A vLLM server that runs already.")
@click.option("--model", default="m", show_default=True, help="Name of the model at --url.")
@click.option("--max-batch", default=CPU_PROFILE.max_batch, show_default=True, help="--max-num-seqs of it.")
@click.option(
    "--max-step-tokens", default=CPU_PROFILE.max_step_tokens, show_default=True, help="--max-num-batched-tokens."
)
@click.option("--kv-tokens", default=CPU_PROFILE.kv_capacity_tokens, show_default=True, help="Tokens of its KV cache.")
@click.option("--requests", default=40, show_default=True, help="Requests of each load for vLLM.")
@click.option("--load", "loads", multiple=True, type=float, default=LOADS, show_default=True, help="Loads for vLLM.")
@click.option("--prompt-words", type=(int, int), default=Traffic().prompt_words, show_default=True, help="From and to.")
@click.option(
    "--output-tokens", type=(int, int), default=Traffic().output_tokens, show_default=True, help="From and to."
)
@click.option(
    "--sessions", type=(int, float), help="So many agent sessions after the loads, and how many begin a second."
)
@click.option("--shipped", type=(str, str), help="Model and device of a profile of ours to judge beside the fit.")
def main(
    out: Path,
    quick: bool,
    parts: Sequence[str],
    seed: int,
    time_scale: float,
    workflows: int | None,
    fleets: Sequence[str],
    again: Path | None,
    vllm: Path | None,
    url: str | None,
    model: str,
    max_batch: int,
    max_step_tokens: int,
    kv_tokens: int,
    requests: int,
    loads: Sequence[float],
    prompt_words: tuple[int, int],
    output_tokens: tuple[int, int],
    sessions: tuple[int, float] | None,
    shipped: tuple[str, str] | None,
) -> None:
    """Validate the simulator."""
    wanted = parts or ("queueing", "emulated")
    rows: list[Row] = []
    if "queueing" in wanted:
        rows += queue_rows(4_000 if quick else 8_000, range(seed, seed + (2 if quick else 5)))
    if "emulated" in wanted:
        if again is None:
            runs = [
                asyncio.run(
                    measured(
                        name, POLICY, workflows or (36 if quick else WORKFLOWS[name]),
                        time_scale=time_scale, load=LOAD, seed=seed,
                    )
                )
                for name in fleets or (list(FLEETS)[:1] if quick else FLEETS)
            ]  # fmt: skip
            out.mkdir(parents=True, exist_ok=True)
            (out / "emulated.json").write_bytes(msgspec.json.encode(runs))
        else:
            runs = msgspec.json.decode(again.read_bytes(), type=list[Measured])
        rows += [row for run in runs for row in compared(run)]
    if "vllm" in wanted:
        if (url is None) == (vllm is None):
            raise click.UsageError("the part vllm needs --vllm, a folder with a model, or else --url.")
        if shipped is not None and shipped not in profiles():
            raise click.UsageError(f"--shipped: there is no profile of {shipped[0]} on {shipped[1]}.")
        run = partial(
            vllm_rows,
            model=model,
            limits=msgspec.structs.replace(
                CPU_PROFILE, max_batch=max_batch, max_step_tokens=max_step_tokens, kv_capacity_tokens=kv_tokens
            ),
            requests=requests,
            seed=seed,
            traffic=Traffic(prompt_words=prompt_words, output_tokens=output_tokens),
            loads=loads,
            shipped=None if shipped is None else profiles()[shipped],
            sessions=None if sessions is None else Sessions(count=sessions[0], rate=sessions[1]),
        )
        rows += asyncio.run(run(url) if url is not None else _on_own_vllm(vllm, model, run))
    print(table(rows))
    print(
        write_result(out, shlex.join(["python", "-m", "eval", "validation", *sys.argv[1:]]), rows, claims(rows), [seed])
    )


async def _on_own_vllm(folder: Path | None, model: str, run: Callable[[str], Awaitable[list[Row]]]) -> list[Row]:
    assert folder is not None
    check_model(folder)
    with tempfile.TemporaryDirectory(prefix="swarmx-validation-") as logs:
        server = VllmServer(model_dir=folder, name=model, log=Path(logs) / "vllm.log")
        url = await server.start()
        try:
            return await run(url)
        finally:
            await server.stop()


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The largest relative errors, workflow kinds each by itself; of what the books say, in standard errors."""
    found: list[Claim] = []
    queues = [_distance(row) for row in rows if row["part"] == "queueing"]
    if queues:
        found.append(claim("sim_vs_queueing_standard_errors", max(queues), "<=", QUEUE_AIM))
    same = [abs(float(ratio) - 1.0) for row in rows if (ratio := row.get("ratio_same")) is not None]
    if same:
        found.append(claim("sim_vs_recursion", max(same), "<=", SAME_AIM))
    for part, aim in (("emulated", EMULATED_AIM), ("vllm", VLLM_AIM)):
        for level in ("p50", "p95"):
            errors = [abs(float(row[f"ratio_{level}"] or 0.0) - 1.0) for row in rows if row["part"] == part]
            if errors:
                found.append(claim(f"sim_vs_{part}_{level}", max(errors), "<=", aim))
    return found


def _distance(row: Row) -> float:
    simulated_s, expected_s, error_s = (
        float(row[name] or 0.0) for name in ("simulated_s", "expected_s", "standard_error_s")
    )
    return abs(simulated_s - expected_s) / error_s
