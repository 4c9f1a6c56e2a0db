"""Fit how a larger model's output length follows from a small model's, prompt by prompt.

    python -m eval.fit.lengths --prompts DIR --out swarmx/core/data/length_factors.json --report DIR

For a class of models c and a prompt p of one source, with y = log output tokens:

    y_small = pivot + u_p + noise,        y_c = pivot + offset_c + slope_c * u_p + noise_c

u_p is the latent prompt effect of the small class, so an ordinary regression on y_small would flatten the slope
(errors in variables). z, the mean over all models outside both classes, is the instrument:

    slope_c = cov(z, y_c) / cov(z, y_small)            var(u) = cov(z, y_small) * cov(y_small, y_c) / cov(z, y_c)
    residual_sd_c^2 = var(y_c | model) - slope_c^2 * var(u) = interaction_sd_c^2 + run_noise_sd^2

`predictive_slope` and `predictive_residual_sd` are the ordinary regression of one larger model on one small model:
what to use when a single small output is all there is. To stretch an output of n tokens:

    log n_c = pivot + offset_c + predictive_slope_c * (log n - pivot) + predictive_residual_sd_c * gaussian

where the pivot is the small model's mean log tokens on that kind of prompts (the file's holds for the sources only).

Figures are means over sources. Standard errors: bootstrap over prompts, and over models within a class.
Run noise: sd of the difference of two runs of one model, over sqrt 2.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.figure import Figure

from eval.fit.engine import markdown, read_table

Array = npt.NDArray[np.float64]
CLASSES = {"small": (0.0, 4.0), "8b": (7.0, 9.5), "32b": (12.0, 34.5), "70b": (65.0, 110.0)}  # 1e9 parameters
# A model that is no assistant, and one whose answers leave out the hidden reasoning.
SKIPPED = ("llama-13b", "o1-mini-2024-09-12")
REPEATS = (("zeroeval/crux", "Llama-3.1-405B-Inst-fp8", "Meta-Llama-3.1-405B-Instruct@hyperbolic"),
           ("zeroeval/gsm", "Llama-3.1-405B-Instruct-Turbo", "Meta-Llama-3.1-405B-Instruct@hyperbolic"),
           ("zeroeval/gsm", "Llama-3.1-405B-Inst@sambanova", "Llama-3.1-405B-Instruct-Turbo"),
           ("zeroeval/numersense-v2", "gpt-4o-2024-05-13", "gpt-4o-2024-05-13~sampling"))  # fmt: skip
LIMIT_SHARE, UNKNOWN_LIMIT = 0.9, 1024
TRUNCATION = (
    f"rows with out_tokens >= {LIMIT_SHARE} x limit are excluded (the limit counts the model's own tokens, "
    "out_tokens another tokenizer's; most are loops), as are empty outputs; an unknown limit is taken as "
    f"{UNKNOWN_LIMIT}; the rest is winsorised at 4 robust sd around the model's median"
)
Source = tuple[list[str], Array, npt.NDArray[np.str_]]  # models, log tokens [prompts, models], class or "" [models]


def size_class(params_b: float | None) -> str:
    """The class of a model by its total parameters in 1e9, or "" outside the classes."""
    found = [name for name, (low, high) in CLASSES.items() if params_b is not None and low <= params_b <= high]
    return found[0] if found else ""


def load(directory: Path) -> dict[str, Source]:
    """Per source the matrix of log output tokens with NaN for what is absent, truncated or empty."""
    rows = read_table(directory / "lengths.parquet", ("prompt_id", "source", "model", "out_tokens", "limit"))
    models = read_table(directory / "models.csv", ("model", "params_total_b"))
    params: dict[str, float | None] = dict(models.iter_rows())
    limit = LIMIT_SHARE * pl.col("limit").fill_null(UNKNOWN_LIMIT)
    rows = rows.filter(pl.col("out_tokens").is_between(1, limit, closed="left"), ~pl.col("model").is_in(SKIPPED))
    found = {}
    for (source,), part in rows.sort("source", "prompt_id", "model").group_by("source", maintain_order=True):
        wide = part.pivot(on="model", index="prompt_id", values="out_tokens", aggregate_function="first")
        wide = wide.drop("prompt_id")
        y = np.log(wide.to_numpy().astype(np.float64))
        middle = np.nanmedian(y, axis=0)
        spread = 4 * 1.4826 * np.nanmedian(np.abs(y - middle), axis=0)
        classes = np.array([size_class(params.get(name)) for name in wide.columns])
        found[str(source)] = (wide.columns, np.clip(y, middle - spread, middle + spread), classes)
    return found


def covariance(a: Array, b: Array) -> Array:
    """Covariances between the columns of a and of b over the rows present in both, [columns of a, columns of b]."""
    present_a, present_b = ~np.isnan(a), ~np.isnan(b)
    n = present_a.T.astype(float) @ present_b
    zero_a, zero_b = np.nan_to_num(a - np.nanmean(a, axis=0)), np.nan_to_num(b - np.nanmean(b, axis=0))
    product: Array = zero_a.T @ zero_b / n - (zero_a.T @ present_b / n) * (present_a.T @ zero_b / n)
    return product


def compare(source: Source, reference: str, target: str, rng: np.random.Generator | None) -> dict[str, float] | None:
    """The figures of one class in one source, on a bootstrap sample if `rng` is given; None if a class is absent."""
    _, y, classes = source
    small, big = np.flatnonzero(classes == reference), np.flatnonzero(classes == target)
    if not len(small) or not len(big):
        return None
    other = np.flatnonzero((classes != reference) & (classes != target))
    if rng is not None:
        y = y[rng.integers(len(y), size=len(y))]
        small, big = rng.choice(small, len(small)), rng.choice(big, len(big))
    centred = y - np.nanmean(y, axis=0)
    count = np.sum(~np.isnan(centred[:, other]), axis=1, keepdims=True)
    z = np.where(count > 0, np.nansum(centred[:, other], axis=1, keepdims=True) / np.maximum(count, 1), np.nan)
    with_small, with_big = float(np.mean(covariance(z, y[:, small]))), float(np.mean(covariance(z, y[:, big])))
    both = float(np.mean(covariance(y[:, small], y[:, big])))
    var_small, var_big = float(np.mean(np.nanvar(y[:, small], axis=0))), float(np.mean(np.nanvar(y[:, big], axis=0)))
    slope, predictive = with_big / with_small, both / var_small
    return {
        "pivot": float(np.mean(np.nanmean(y[:, small], axis=0))),
        "offset": float(np.mean(np.nanmean(y[:, big], axis=0)) - np.mean(np.nanmean(y[:, small], axis=0))),
        "slope": slope,
        "residual_var": var_big - slope * both,  # slope^2 var(u) = slope * cov(y_small, y_c)
        "predictive_slope": predictive,
        "predictive_residual_var": var_big - predictive * both,
        "model_spread_var": float(np.var(np.nanmean(y[:, big], axis=0))),
    }


def run_noise(sources: dict[str, Source]) -> float | None:
    """Median over REPEATS of the sd of log tokens between runs of one model; None if no pair is present."""
    found = []
    for source, one, other in REPEATS:
        models, y, _ = sources.get(source, ([], np.zeros((0, 0)), np.array([])))
        if one in models and other in models:
            found.append(float(np.nanstd(y[:, models.index(one)] - y[:, models.index(other)]) / np.sqrt(2)))
    return float(np.median(found)) if found else None


def average(used: dict[str, Source], reference: str, target: str, rng: np.random.Generator | None) -> dict[str, float]:
    """The figures of `compare`, averaged over the sources that hold both classes."""
    parts = [part for source in used.values() if (part := compare(source, reference, target, rng))]
    return {key: float(np.mean([part[key] for part in parts])) for key in parts[0]}


def fit(sources: dict[str, Source], reference: str, noise: float, draws: int) -> dict[str, dict[str, Any]]:
    """The figures of every class against `reference` over the sources that hold both."""
    rng, result = np.random.default_rng(0), {}
    for target in CLASSES:
        used = {name: source for name, source in sources.items() if compare(source, reference, target, None)}
        if target == reference or not used:
            continue
        point = average(used, reference, target, None)
        samples = [average(used, reference, target, rng) for _ in range(draws)]
        residual = max(0.0, point["residual_var"])
        values = {
            "offset": point["offset"],
            "offset_se": np.std([s["offset"] for s in samples]),
            "slope": point["slope"],
            "slope_se": np.std([s["slope"] for s in samples]),
            "residual_sd": residual**0.5,
            "interaction_sd": max(0.0, residual - noise**2) ** 0.5,
            "predictive_slope": point["predictive_slope"],
            "predictive_residual_sd": max(0.0, point["predictive_residual_var"]) ** 0.5,
            "model_spread_sd": point["model_spread_var"] ** 0.5,
            "pivot_log_tokens": point["pivot"],
        }
        models = {name for names, _, classes in used.values() for name in np.array(names)[classes == target]}
        counts = {"n_models": len(models), "n_prompts": sum(len(source[1]) for source in used.values())}
        rounded = {key: round(float(value), 4) for key, value in values.items()}
        result[target] = rounded | counts | {"sources": sorted(used)}
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, write the factors, print and plot the tables."""
    parser = argparse.ArgumentParser(description="Fit output length factors between model sizes.")
    parser.add_argument("--prompts", type=Path, required=True, help="folder with lengths.parquet and models.csv")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--report", type=Path, required=True, help="folder for the table and the plot")
    parser.add_argument("--draws", type=int, default=200, help="bootstrap samples")
    args = parser.parse_args(argv)
    sources = load(args.prompts)
    measured = run_noise(sources)
    noise = 0.25 if measured is None else measured
    arena = {name: source for name, source in sources.items() if name.startswith("arena")}
    main_fit, chat = fit(sources, "small", noise, args.draws), fit(arena, "8b", noise, args.draws)
    document = {"version": 1, "reference": "small", "classes": main_fit, "run_noise_sd": round(noise, 4),
                "chat": {"reference": "8b", "classes": chat}, "truncation": TRUNCATION,
                "source": "ZeroEval, arena-hard-auto (Apache-2.0), output lengths in cl100k tokens"}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    args.report.mkdir(parents=True, exist_ok=True)
    shown = ("offset", "offset_se", "slope", "slope_se", "residual_sd", "interaction_sd", "predictive_slope",
             "predictive_residual_sd", "model_spread_sd", "n_models", "n_prompts")  # fmt: skip
    cells = [[f"{name} / {ref}", *(str(f[key]) for key in shown)]
             for ref, part in (("small", main_fit), ("8b", chat)) for name, f in part.items()]  # fmt: skip
    text = markdown(["class / reference", *shown], cells) + f"\n\nRun noise sd(log): {noise:.3f}\n"
    (args.report / "lengths.md").write_text(text)
    print(text)
    figure = Figure()
    axes = figure.add_subplot(xlabel="offset, log tokens", ylabel="slope")
    for name, f in main_fit.items():
        axes.errorbar(f["offset"], f["slope"], xerr=f["offset_se"], yerr=f["slope_se"], fmt="o", label=name)
    figure.savefig(args.report / "lengths.png", dpi=120)


if __name__ == "__main__":
    main()
