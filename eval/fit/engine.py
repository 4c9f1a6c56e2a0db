"""Fit the step model of an LLM engine and the service time of an image replica.

    python -m eval.fit.engine --engine DIR --out swarmx/core/data/engine_profiles.json --report DIR

One iteration of continuous batching with chunked prefill takes (swarmx/core/engine.py)

    step_s = step_base_s + decode_seq_s * n + decode_ctx_token_s * C + prefill_token_s * P + prefill_ctx_token_s * S

n decoding sequences, C their context tokens, P prefill tokens, S the sum of the context before each of these.
Rows of the step table: `decode` has n=batch, C=batch*context; `prefill` has P=batch*context, S=batch*context^2/2;
`mixed` has n=batch at 2048 tokens each, and P=context tokens of prompts of at most 2048 (both lengths are inferred:
they reproduce the decode and prefill rows). Coefficients: non-negative least squares on relative residuals,
reweighted 30 times towards least absolute error, kinds weighted equally. Judged on rows held out by hash (20 %).

An image replica serves one flow at a time: service_s = base_s + step_s * steps. Base over step comes from runs that
differ only in steps, the level from the H100, the other devices from a fit of log seconds = (flow, case, month) +
device, weights kept in memory.
"""

import argparse
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.figure import Figure
from scipy.optimize import nnls

Array = npt.NDArray[np.float64]
Profile = dict[str, Any]
COEFFICIENTS = ("step_base_s", "decode_seq_s", "decode_ctx_token_s", "prefill_token_s", "prefill_ctx_token_s")
KEYS = ("model", "device", "tp", *COEFFICIENTS, "kv_capacity_tokens", "max_batch", "max_step_tokens",
        "fit_median_error", "fit_p90_error", "cost_weight", "errors")  # fmt: skip
MIXED_CONTEXT, MAX_BATCH, MAX_STEP_TOKENS, MIN_KV_TOKENS, GIB = 2048.0, 256, 8192, 16384, 2.0**30
# name, layers, KV heads, head dim, bytes a KV value, parameters, bytes a parameter (checkpoint over parameters).
# gpt-oss: half of the layers, the others keep 128 tokens. Left out: Qwen3-32B-FP8 (the table has it 2-13 times slower
# than BF16, except on H100 and H200) and DeepSeek-V3 (the same on Blackwell).
MODELS: dict[str, tuple[str, int, int, int, int, float, float]] = {
    "Qwen/Qwen3-0.6B": ("qwen3-0.6b", 28, 8, 128, 2, 0.596e9, 2.0),
    "Qwen/Qwen3-8B": ("qwen3-8b", 36, 8, 128, 2, 8.19e9, 2.0),
    "Qwen/Qwen3-32B": ("qwen3-32b", 64, 8, 128, 2, 32.76e9, 2.0),
    "Qwen/Qwen3-30B-A3B": ("qwen3-30b-a3b", 48, 4, 128, 2, 30.53e9, 2.0),
    "meta-llama/Meta-Llama-3.1-8B": ("llama-3.1-8b", 32, 8, 128, 2, 8.03e9, 2.0),
    "meta-llama/Meta-Llama-3.1-70B": ("llama-3.1-70b", 80, 8, 128, 2, 70.55e9, 2.0),
    "nvidia/Llama-3.1-70B-Instruct-FP8": ("llama-3.1-70b-fp8", 80, 8, 128, 1, 70.55e9, 1.03),
    "openai/gpt-oss-20b": ("gpt-oss-20b", 12, 8, 64, 2, 20.91e9, 0.66),
    "openai/gpt-oss-120b": ("gpt-oss-120b", 18, 8, 64, 2, 116.83e9, 0.56),
}
SYSTEMS = ("a100_sxm", "b200_sxm", "b300_sxm", "b60", "gb200", "h100_sxm", "h200_sxm", "l40s")
MEASURED = {("meta-llama/Llama-3.1-70B", "fp8"): "llama-3.1-70b-fp8", ("openai/gpt-oss-120b", "fp4"): "gpt-oss-120b"}
GPUS = {"H100": "h100", "A100": "a100", "A100-40GB": "a100", "L40S": "l40s", "RTXPRO6000": "rtx-pro-6000",
        "RTX6000Ada": "rtx-6000-ada"}  # the last links the months and gets no profile  # fmt: skip
SPECS = {"h100": "h100_sxm", "a100": "a100_sxm", "l40s": "l40s", "rtx-pro-6000": "rtx_pro_6000_server"}
FLOWS = {"sdxl": ("playground_2_5_prometheus", r"xl|playground|juggernaut"), "flux-dev": ("flux1_dev", "flux1_dev")}
NOTE = "no resolution in the data: 1.0 megapixel assumed; weights kept in memory; loading is not modelled"


class TableError(ValueError):
    """A table is absent, or lacks columns or rows that a fit needs."""


def read_table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Read `columns` of a parquet or csv file; raises TableError that names what is missing."""
    if not path.exists():
        raise TableError(f"{path} does not exist; expected a table with the columns {', '.join(columns)}")
    frame = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    if missing := [name for name in columns if name not in frame.columns]:
        raise TableError(f"{path} has no column {', '.join(missing)}; found {', '.join(frame.columns)}")
    return frame.select(columns).with_columns(pl.col(pl.Categorical).cast(pl.String))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in (header, ["---"] * len(header), *rows)) + "\n"


def percent(error: Array) -> str:
    """Median and 90 % quantile of the absolute relative error."""
    return f"{100 * np.median(np.abs(error)):.1f} / {100 * np.quantile(np.abs(error), 0.9):.1f}"


def step_features(rows: pl.DataFrame) -> Array:
    """Rows of the step table as multipliers of COEFFICIENTS, [rows, 5]."""
    kind, batch, context = rows["kind"].to_numpy(), rows["batch"].to_numpy() * 1.0, rows["context"].to_numpy() * 1.0
    prefill, mixed = kind == "prefill", kind == "mixed"
    prompts = np.where(prefill, batch, np.maximum(1.0, context / MIXED_CONTEXT))
    tokens = np.where(prefill, batch * context, np.where(mixed, context, 0.0))
    n = np.where(prefill, 0.0, batch)
    held = n * np.where(mixed, MIXED_CONTEXT, context)
    return np.stack([np.ones_like(n), n, held, tokens, tokens**2 / prompts / 2], axis=1)


def fit_steps(features: Array, seconds: Array, kind: npt.NDArray[Any]) -> Array:
    """Non-negative coefficients that minimise the absolute relative error, kinds weighted equally."""
    weight = share = np.array([1.0 / np.sum(kind == k) for k in kind])
    theta = np.zeros(features.shape[1])
    for _ in range(30):
        scaled = features * (np.sqrt(weight) / seconds)[:, None]
        norm = scaled.max(axis=0) + 1e-300
        theta = nnls(scaled / norm, np.sqrt(weight))[0] / norm
        weight = share / np.maximum(np.abs(features @ theta / seconds - 1), 0.02)
    return theta


def fit_engine(directory: Path) -> list[Profile]:
    """A profile for each (model, device, tp) of the step table; `errors` are the hold-out errors by kind."""
    columns = ("kind", "model", "system", "tp", "batch", "context", "latency_ms")
    table = read_table(directory / "modelled_steps_aiconfigurator.parquet", columns)
    specs = read_table(directory / "gpu_specs.csv", ("system", "mem_gib", "mem_bw_gbs"))
    memory, bandwidth = (dict(zip(specs["system"], specs[c], strict=True)) for c in ("mem_gib", "mem_bw_gbs"))
    table = table.filter(pl.col("model").is_in(MODELS), pl.col("system").is_in(SYSTEMS), pl.col("batch") <= MAX_BATCH)
    profiles = []
    for (source, system), of_pair in table.sort(columns).group_by("model", "system", maintain_order=True):
        name, layers, heads, dim, width, params, param_bytes = MODELS[str(source)]
        for tp in sorted(set(of_pair["tp"])):
            rows = of_pair.filter(tp=tp)
            held = np.array([zlib.crc32(repr(row[:-1]).encode()) % 5 == 0 for row in rows.iter_rows()])
            kind, features, seconds = rows["kind"].to_numpy(), step_features(rows), rows["latency_ms"].to_numpy() / 1e3
            theta = fit_steps(features[~held], seconds[~held], kind[~held])
            error = (features @ theta / seconds - 1)[held]
            free = 0.9 * memory[system] * GIB * tp - params * param_bytes - 2 * GIB
            kv_tokens, absolute = max(0, int(free / (2 * layers * heads * dim * width))), np.abs(error)
            spread = [round(float(np.quantile(absolute, q)), 4) for q in (0.5, 0.9)]
            cost = round(tp * bandwidth[system] / bandwidth["l40s"], 3)
            errors = {k: percent(error[kind[held] == k]) for k in sorted(set(kind[held]))} | {"all": percent(error)}
            coefficients = (float(f"{value:.5g}") for value in theta)
            values = (name, str(system).removesuffix("_sxm"), tp, *coefficients, kv_tokens, MAX_BATCH, MAX_STEP_TOKENS)
            profiles.append(dict(zip(KEYS, (*values, *spread, cost, errors), strict=True)))
    return profiles


def check_measured(directory: Path, profiles: list[Profile]) -> pl.DataFrame:
    """Measured vLLM TPOT against decode_step(b, isl + osl/2) + b/osl * prefill(isl), where the batch fits."""
    columns = ("backend", "model_path", "precision", "system", "mode", "isl", "osl", "tp_size", "concurrency")
    parallel = ("pp_size", "moe_ep_size", "attention_dp_size")
    rows = read_table(directory / "measured_ttft_tpot_silicon.parquet", (*columns, "tpot_ms", *parallel))
    rows = rows.filter(pl.all_horizontal(pl.col(parallel).fill_null(1) == 1), backend="vllm", mode="agg")
    known, found = {(p["model"], p["device"], p["tp"]): p for p in profiles}, []
    for row in rows.drop_nulls("concurrency").iter_rows(named=True):
        name, device = MEASURED.get((row["model_path"], row["precision"])), row["system"].removesuffix("_sxm")
        p, b, isl, osl = known.get((name, device, row["tp_size"])), row["concurrency"], row["isl"], row["osl"]
        context = b * (isl + osl / 2)
        if p is None or b > MAX_BATCH or context > p["kv_capacity_tokens"]:
            continue
        decode = p["step_base_s"] + b * p["decode_seq_s"] + context * p["decode_ctx_token_s"]
        prefill = p["step_base_s"] + isl * p["prefill_token_s"] + isl**2 / 2 * p["prefill_ctx_token_s"]
        found.append((name, device, int(p["tp"]), row["tpot_ms"] / 1e3, decode + b / osl * prefill))
    frame = pl.DataFrame(found, schema=["model", "device", "tp", "measured_s", "model_s"], orient="row")
    return frame.sort("model", "device", "tp", maintain_order=True)


def fit_images(directory: Path) -> list[Profile]:
    """Serial service-time profiles of SDXL- and Flux-like flows."""
    columns = ("date", "gpu", "flow", "test_case", "weights_unloaded", "exec_s")
    table = read_table(directory / "measured_comfyui_flows.parquet", columns).filter(~pl.col("weights_unloaded"))
    table = table.with_columns(steps=pl.col("test_case").str.extract(r"^(\d+)_?steps$").cast(pl.Float64))
    bandwidth = dict(read_table(directory / "gpu_specs.csv", ("system", "mem_bw_gbs")).iter_rows())
    found: list[Profile] = []
    for model, (reference, pattern) in FLOWS.items():
        anchor, ratios = table.filter(pl.col("flow") == reference, pl.col("steps").is_not_null()), []
        for _, run in anchor.group_by("gpu", "date", maintain_order=True):
            if run["steps"].n_unique() > 1:
                slope, base = np.polyfit(run["steps"].to_numpy(), run["exec_s"].to_numpy(), 1)
                ratios.append(max(0.0, base) / slope)
        level = anchor.filter(gpu="H100")
        if not ratios or level.is_empty():
            raise TableError(f"flow {reference}: expected cases '<n>steps' with two values of n, and one on H100")
        ratio = float(np.median(ratios))
        step_s = float(np.median(level["exec_s"].to_numpy() / (ratio + level["steps"].to_numpy())))
        rows = table.filter(pl.col("flow").str.contains(pattern), pl.col("gpu").is_in(GPUS))
        gpu, log_s = rows["gpu"].replace(GPUS).to_numpy(), np.log(rows["exec_s"].to_numpy().astype(np.float64))
        case = (rows["flow"] + "|" + rows["test_case"] + "|" + rows["date"].str.head(7)).to_numpy()
        gpus, cases = sorted(set(gpu)), sorted(set(case))
        design = np.hstack([gpu[:, None] == np.array(gpus), case[:, None] == np.array(cases)]).astype(np.float64)
        effect = np.linalg.lstsq(design, log_s, rcond=None)[0]
        error = np.abs(np.expm1(design @ effect - log_s))
        for device in (d for d in SPECS if d in gpus):
            seconds = step_s * float(np.exp(effect[gpus.index(device)] - effect[gpus.index("h100")]))
            profile = {"model": model, "device": device, "base_s": round(ratio * seconds, 4)}
            profile |= {"megapixel_step_s": round(seconds, 4), "n_rows": int(np.sum(gpu == device))}
            profile |= {"fit_median_error": round(float(np.median(error[gpu == device])), 4)}
            found.append(profile | {"cost_weight": round(bandwidth[SPECS[device]] / bandwidth["l40s"], 3)})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, write the profiles, print and plot the checks."""
    parser = argparse.ArgumentParser(description="Fit engine and image profiles from public tables.")
    parser.add_argument("--engine", type=Path, required=True, help="folder with the engine tables")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--report", type=Path, required=True, help="folder for the tables and the plot")
    args = parser.parse_args(argv)
    fitted, images = fit_engine(args.engine), fit_images(args.engine)
    roomy = [p for p in fitted if p["kv_capacity_tokens"] >= MIN_KV_TOKENS]
    shipped = list({(p["model"], p["device"]): p for p in reversed(roomy)}.values())[::-1]  # the smallest tp wins
    measured = check_measured(args.engine, fitted).with_columns(error=pl.col("model_s") / pl.col("measured_s") - 1)
    profiles = [{k: v for k, v in p.items() if k != "errors"} for p in shipped]
    source = "aiconfigurator 0.12 step tables (Apache-2.0), VixFlowsDocs ComfyUI timings (MIT)"
    document = {"version": 1, "source": source, "profiles": profiles, "note": NOTE, "image_profiles": images}
    for folder in (args.out.parent, args.report):
        folder.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    header, kinds = ("model", "device", "tp", "kv_capacity_tokens"), ("decode", "mixed", "prefill", "all")
    steps = [[*(p[k] for k in header), *(p["errors"].get(k) for k in kinds)] for p in shipped]
    figure, checks = Figure(layout="constrained"), []
    axes = figure.add_subplot(xlabel="measured TPOT, s", ylabel="model TPOT, s", xscale="log", yscale="log")
    for key, rows in measured.group_by("model", "device", "tp", maintain_order=True):
        checks.append([*key, len(rows), percent(rows["error"].to_numpy()), f"{1 + np.median(rows['error']):.2f}"])
        axes.plot(rows["measured_s"], rows["model_s"], ".", label=" ".join(map(str, key)))
    if checks:
        error = measured["error"].to_numpy()
        checks.append(["all", "", "", len(error), percent(error), f"{1 + np.median(error):.2f}"])
        axes.legend(fontsize=5)
    figure.savefig(args.report / "tpot.png", dpi=150)
    report = markdown((*header, *kinds), steps) + "\n"
    report += markdown((*header[:3], "points", "error median / p90, %", "bias"), checks) + "\n"
    report += markdown(tuple(images[0]), [tuple(i.values()) for i in images])
    (args.report / "engine.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
