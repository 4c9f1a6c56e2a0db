"""Measured latencies as observations: reads a folder of engine tables, whatever of them is there."""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np
import polars as pl

from swarmx.core.engine import EngineProfile, profiles
from swarmx.core.errors import PredictorError
from swarmx.core.forecast import from_samples
from swarmx.neural.facts import BYTES_A_WEIGHT, UNKNOWN_DEVICE, UNKNOWN_MODEL, device_facts, model_facts, plain_name
from swarmx.neural.heads.latency import Candidate
from swarmx.neural.roofline import idle_weights_s, roofline
from swarmx.neural.splits import Split, split_of

_NAN = float("nan")

# The requests of the runtime-state table have no output count: characters a prompt and an answer token there.
_PROMPT_CHARS, _ANSWER_CHARS, _ANSWER_LIMIT = 3.2, 4.4, 1024.0
_DELAYS_S = (0.0, 0.0, 1.0, 5.0)

_ARGONNE_DEVICES = {
    "nvidia a100 gpu": "a100", "nvidia h100 gpu": "h100", "nvidia gh200 gpu": "gh200", "amd mi250 gpu": "mi250",
    "amd mi300x gpu": "mi300x", "habana gaudi2": "gaudi2", "intel max 1550": "max-1550", "intel pvc gpu": "max-1550",
    "sambanova sn40l": "sn40l",
}  # fmt: skip
_ENGINES = {"tensorrt-llm": "trtllm"}


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One call, or the mean of many (`averaged`), that was measured: the candidate, its state, and what it took.

    State and outcome are as in `heads.latency`; NaN where the table does not say. `unseen` names what of a test row
    was never trained on: "model", "run", "setting" or "request".
    """

    source: str
    split: Split
    unseen: str = ""
    device: str
    model: str
    candidate: Candidate
    averaged: bool
    prompt_tokens: float
    output_tokens: float
    in_flight: float = _NAN
    remaining_work: float = _NAN
    context_tokens: float = _NAN
    prefill_tokens: float = _NAN
    running: float = _NAN
    waiting: float = _NAN
    kv_usage: float = _NAN
    signal_age_s: float = _NAN
    ttft_s: float = _NAN
    completion_s: float = _NAN


def observations(folder: Path) -> list[Observation]:
    """All that the tables of `folder` hold, in a fixed order. Raises PredictorError when there is none.

    A row is a test row when its model is one by hash, or its run (requests with a state), its setting (averages) or
    itself (hosted requests); likewise for validation.
    """
    readers = {
        "measured_requests_vllm_state": _vllm_state,
        "measured_ttft_tpot_silicon": _silicon,
        "measured_e2e_argonne": _argonne,
        "measured_ttft_argonne": _argonne,
        "measured_requests_llmperf": _llmperf,
    }
    found: list[Observation] = []
    for name, read in readers.items():
        path = folder / f"{name}.parquet"
        if path.exists():
            found += read(path)
    if not found:
        raise PredictorError(
            f"{folder} holds none of the latency tables {', '.join(readers)} (.parquet); give a folder with some."
        )
    return found


def read_table(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """The columns of a parquet or csv file, categories as text. Raises PredictorError that names what is missing."""
    try:
        frame = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise PredictorError(f"{path} cannot be read as a table: {error}") from None
    if missing := [name for name in columns if name not in frame.columns]:
        raise PredictorError(f"{path} has no column {', '.join(missing)}; it has {', '.join(frame.columns)}.")
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))


def candidate_of(
    model: str, device: str, *, engine: str, tensor_parallel: float = _NAN, precision: str = "bf16"
) -> Candidate:
    """What the tables' names stand for: the profile that ships for exactly this replica, else the roofline's."""
    parallel = int(tensor_parallel) if math.isfinite(tensor_parallel) else 1
    weight_bytes = BYTES_A_WEIGHT.get(precision, _NAN)
    known, facts = model_facts(model), device_facts(device)
    fitted = _fitted(plain_name(model), device, parallel, precision)
    size = weight_bytes if math.isfinite(weight_bytes) else 2.0
    profile = fitted or roofline(known, facts, tensor_parallel=parallel, bytes_a_weight=size)
    idle_s = 0.0 if fitted else idle_weights_s(known, facts, tensor_parallel=parallel, bytes_a_weight=size)
    return Candidate(
        profile=profile,
        device=facts,
        model=known,
        engine=engine,
        tensor_parallel=tensor_parallel,
        bytes_a_weight=weight_bytes,
        idle_weights_s=idle_s,
    )


def forgetful(observation: Observation, *, device: bool, model: bool, state: bool) -> Observation:
    """The same observation seen by someone who does not know the device, the model, or the engine's own word."""
    c = observation.candidate
    if device or model:
        facts, spec = (UNKNOWN_MODEL if model else c.model), (UNKNOWN_DEVICE if device else c.device)
        size = 2.0 if model or not math.isfinite(c.bytes_a_weight) else c.bytes_a_weight
        parallel = int(c.tensor_parallel) if math.isfinite(c.tensor_parallel) else 1
        profile = roofline(facts, spec, tensor_parallel=parallel, bytes_a_weight=size)
        idle_s = idle_weights_s(facts, spec, tensor_parallel=parallel, bytes_a_weight=size)
        c = c._replace(profile=profile, device=spec, model=facts, idle_weights_s=idle_s)
    changes: dict[str, float] = {}
    if state:
        changes = dict.fromkeys(("running", "waiting", "kv_usage", "signal_age_s"), _NAN)
    return msgspec.structs.replace(observation, candidate=c, **changes)


def _fitted(model: str, device: str, parallel: int, precision: str) -> EngineProfile | None:
    name = model if precision not in ("fp8", "fp4") or model.startswith("gpt-oss") else f"{model}-fp8"
    key = (name, device)
    return profiles().get(key) if _parallel_of_profiles().get(key) == parallel else None


@cache
def _parallel_of_profiles() -> dict[tuple[str, str], int]:
    raw = msgspec.json.decode(files("swarmx.core").joinpath("data/engine_profiles.json").read_bytes())
    return {(row["model"], row["device"]): int(row["tp"]) for row in raw["profiles"]}


def _place(model: str, key: str, kind: str) -> tuple[Split, str]:
    """The split of a row, and what of a test row is unseen."""
    by_model, by_key = split_of("model", plain_name(model)), split_of("row", key)
    if by_model == "test":
        return "test", "model"
    if by_key == "test":
        return "test", kind
    return ("validation" if "validation" in (by_model, by_key) else "train"), ""


def _vllm_state(path: Path) -> list[Observation]:
    """Single requests with the engine's state at arrival; the rest of the state is what a router would have counted.

    Those in flight, the context they hold and their unanswered prompts come from the run's own clock, their remaining
    work from the lengths of the training runs, conditioned on what each had produced. A quarter of the rows each sees
    a signal of one and of five seconds' age, where the timeline is there to take it from. All runs are of one model,
    the only one with such a state: runs are held out, the model is not. Validation has a tenth of the training runs.
    """
    columns = ("run", "req", "prompt_tokens", "out_chars_incl_prompt", "ttft_s", "e2e_s", "arrive_s", "finish_s",
               "running_at_arrival", "pending_at_arrival", "kv_usage_pct_at_arrival")  # fmt: skip
    table = read_table(path, columns).sort("run", "arrive_s", "req")
    prompt = table["prompt_tokens"].to_numpy().astype(np.float64)
    chars = table["out_chars_incl_prompt"].to_numpy().astype(np.float64)
    output = np.clip(np.round((chars - _PROMPT_CHARS * prompt) / _ANSWER_CHARS), 1.0, _ANSWER_LIMIT)
    model, device = "llama-3.2-1b", "unnamed-24gb"
    candidate = candidate_of(model, device, engine="vllm", tensor_parallel=1.0)
    candidate = candidate._replace(device=UNKNOWN_DEVICE._replace(memory_gib=24.0))
    places = {run: split_of("row", f"run:{run}") for run in table["run"].unique().to_list()}
    trained = np.array([places[run] == "train" for run in table["run"].to_list()], dtype=bool)
    lengths = from_samples(output[trained if trained.any() else slice(None)].tolist(), unit="tokens")
    grid = np.arange(_ANSWER_LIMIT + 1.0)
    remaining = np.array([lengths.mean_remaining(float(n)) for n in grid])
    timeline = _timeline(path.with_name("measured_timeline_vllm_state.parquet"))
    found: list[Observation] = []
    for (run,), rows in table.with_row_index("at").group_by("run", maintain_order=True):
        at = rows["at"].to_numpy()
        arrive, finish = (rows[name].to_numpy().astype(np.float64) for name in ("arrive_s", "finish_s"))
        ttft, e2e = (rows[name].to_numpy().astype(np.float64) for name in ("ttft_s", "e2e_s"))
        signals = rows.select(columns[-3:]).fill_null(_NAN).to_numpy().astype(np.float64)
        for i, row in enumerate(at):
            there = (arrive < arrive[i]) & (finish > arrive[i])
            there[i] = False
            begun = arrive[there] + ttft[there]
            rate = output[at[there]] / np.maximum(e2e[there] - ttft[there], 1e-3)
            produced = np.clip((arrive[i] - begun) * rate, 0.0, output[at[there]])
            split: Split = places[run]
            if split == "train" and split_of("row", f"run:{run}/{rows['req'][i]}") == "validation":
                split = "validation"
            running, waiting, kv_usage = signals[i]
            state = (running, waiting, kv_usage / 100.0, 0.25)
            delay = _DELAYS_S[int(rows["req"][i]) % len(_DELAYS_S)]
            if delay and run in timeline:
                state = _signal(timeline[run], arrive[i], delay)
            found.append(
                Observation(
                    source="vllm_state", split=split, unseen="run" if split == "test" else "",
                    device=device, model=model, candidate=candidate,
                    averaged=False, prompt_tokens=prompt[row], output_tokens=output[row],
                    in_flight=float(there.sum()),
                    remaining_work=float(np.interp(produced, grid, remaining).sum()),
                    context_tokens=float((prompt[at[there]] + produced).sum()),
                    prefill_tokens=float(prompt[at[there]][begun > arrive[i]].sum()),
                    running=state[0], waiting=state[1], kv_usage=state[2], signal_age_s=state[3],
                    ttft_s=float(ttft[i]), completion_s=float(e2e[i]),
                )
            )  # fmt: skip
    return found


def _timeline(path: Path) -> dict[object, np.ndarray]:
    if not path.exists():
        return {}
    table = read_table(path, ("run", "t_s", "num_running", "num_pending", "gpu_kvcache_usage")).sort("run", "t_s")
    return {
        run: rows.select("t_s", "num_running", "num_pending", "gpu_kvcache_usage").to_numpy().astype(np.float64)
        for (run,), rows in table.group_by("run", maintain_order=True)
    }


def _signal(line: np.ndarray, now_s: float, delay_s: float) -> tuple[float, float, float, float]:
    i = int(np.searchsorted(line[:, 0], now_s - delay_s, side="right")) - 1
    if i < 0:
        return (_NAN, _NAN, _NAN, _NAN)
    at_s, running, waiting, kv_usage = line[i].tolist()
    return running, waiting, kv_usage / 100.0, now_s - at_s


def _silicon(path: Path) -> list[Observation]:
    """Means over closed loops of `concurrency` clients on one replica: on average each finds the others half done."""
    columns = ("backend", "model_path", "system", "precision", "mode", "isl", "osl", "concurrency", "batch_size",
               "tp_size", "pp_size", "attention_dp_size", "ttft_ms", "tpot_ms")  # fmt: skip
    found = []
    for row in read_table(path, columns).filter(mode="agg").iter_rows(named=True):
        clients = row["concurrency"] or row["batch_size"]
        if not clients or not row["ttft_ms"] or not row["tpot_ms"] or row["ttft_ms"] <= 0.0 or row["tpot_ms"] <= 0.0:
            continue
        isl, osl, others = float(row["isl"]), float(row["osl"]), float(clients) - 1.0
        device, precision = row["system"].removesuffix("_sxm"), row["precision"] or "bf16"
        parallel = (row["tp_size"] or 1.0) * (row["pp_size"] or 1.0) * (row["attention_dp_size"] or 1.0)
        key = f"silicon/{row['backend']}/{device}/{precision}/{parallel:.0f}/{isl:.0f}/{osl:.0f}/{clients:.0f}"
        split, unseen = _place(row["model_path"], key, "setting")
        ttft_s = row["ttft_ms"] / 1e3
        found.append(
            Observation(
                source="silicon", split=split, unseen=unseen, device=device, model=plain_name(row["model_path"]),
                candidate=candidate_of(row["model_path"], device, engine=row["backend"], tensor_parallel=parallel,
                                       precision=precision),
                averaged=True, prompt_tokens=isl, output_tokens=osl, in_flight=others,
                remaining_work=others * osl / 2.0, context_tokens=others * (isl + osl / 2.0),
                ttft_s=ttft_s, completion_s=ttft_s + row["tpot_ms"] / 1e3 * (osl - 1.0),
            )
        )  # fmt: skip
    return found


def _argonne(path: Path) -> list[Observation]:
    """Batches that begin together on an empty engine: everybody's prompt is still to be answered."""
    columns = ("gpu", "n_gpus", "framework", "model", "batch", "input_tokens", "output_tokens")
    found = []
    for row in read_table(path, columns).iter_rows(named=True):
        isl, osl, others = float(row["input_tokens"]), float(row["output_tokens"]), float(row["batch"]) - 1.0
        device = _ARGONNE_DEVICES.get(row["gpu"].lower(), row["gpu"].lower())
        engine = _ENGINES.get(row["framework"].lower(), row["framework"].lower())
        key = f"argonne/{engine}/{device}/{row['n_gpus']}/{isl:.0f}/{osl:.0f}/{others:.0f}"
        split, unseen = _place(row["model"], key, "setting")
        found.append(
            Observation(
                source="argonne", split=split, unseen=unseen, device=device, model=plain_name(row["model"]),
                candidate=candidate_of(row["model"], device, engine=engine, tensor_parallel=float(row["n_gpus"])),
                averaged=True, prompt_tokens=isl, output_tokens=osl, in_flight=others, remaining_work=others * osl,
                context_tokens=others * isl, prefill_tokens=others * isl, running=0.0, waiting=others, kv_usage=0.0,
                ttft_s=row.get("ttft_s") or _NAN, completion_s=row.get("latency_s") or _NAN,
            )
        )  # fmt: skip
    return found


def _llmperf(path: Path) -> list[Observation]:
    """Single requests to hosted services: the model is known, nothing else. They teach what not knowing costs."""
    columns = ("ttft_s", "end_to_end_latency_s", "number_output_tokens", "number_input_tokens", "provider", "model")
    found = []
    for i, row in enumerate(read_table(path, columns).iter_rows(named=True)):
        split, unseen = _place(row["model"], f"llmperf/{row['provider']}/{row['model']}/{i}", "request")
        found.append(
            Observation(
                source="llmperf", split=split, unseen=unseen, device=f"hosted:{row['provider']}",
                model=plain_name(row["model"]),
                candidate=candidate_of(row["model"], "", engine="hosted", precision=""),
                averaged=False, prompt_tokens=row["number_input_tokens"], output_tokens=row["number_output_tokens"],
                ttft_s=row["ttft_s"] or _NAN, completion_s=row["end_to_end_latency_s"] or _NAN,
            )
        )  # fmt: skip
    return found
