"""The sweep of encoders: accuracy of the same length head behind each, against size and CPU time a prompt.

    python -m eval.encoders --prompts DIR --out DIR [--quick] [--target MODEL_DIR] [--work DIR] [--seeds 0,1,2]
                            [--only NAMES]

`--prompts` is a folder with prompts.parquet and lengths.parquet. `--target` is the folder of a small decoder that
transformers can read: without it the isomorphic encoders are left out. What takes minutes (their weights, the vectors
of the prompts, the finished rows) is kept in `--work` and used again. `--only` takes beginnings of names, separated by
commas. One thread, CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from eval.encoder_head import Downstream, LengthData, read_lengths, score
from eval.result import Row, claim, table, write_result
from swarmx.core.errors import PredictorError
from swarmx.core.ports import Encoder
from swarmx.core.prompts import PromptText, cut
from swarmx.neural.encoders import make_encoder
from swarmx.neural.encoders.bag import Bag, bag_of
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.encoders.isomorphic import IsomorphicEncoder, Reduction
from swarmx.neural.head import Floats
from swarmx.neural.net import Floats32
from swarmx.neural.training.encoder import EncoderSettings, Lessons, fit_encoder
from swarmx.neural.training.hashed import HashedSettings, HashedTrainer, corpus_of
from swarmx.neural.training.reduce import reduced

SIZES = {"2kb": 2_000, "50kb": 50_000, "1mb": 1_000_000}
WITHIN = 1.03  # of the best encoder's loss: the aim for the default
_CALIBRATION = 96
_HASHED_RIDGES = (0.3, 1.0, 3.0)

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One encoder of the sweep: its effects [prompts] for the head, None without any; `cost` encodes one prompt."""

    name: str
    note: str = ""
    parameters: int = 0
    megabytes: float = 0.0
    ridge: float | None = None
    effects: Floats | None = None
    counts: bool = True
    cost: Callable[[PromptText], object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Isomorphic:
    """A size of the isomorphic encoder, and where its weights come from."""

    layers: int
    width: int | None
    real: bool
    trained: bool = False

    @property
    def name(self) -> str:
        start = "trained" if self.trained else "real" if self.real else "random"
        return f"isomorphic-{self.layers}x{self.width or 'full'}-{start}"


ISOMORPHIC = (
    Isomorphic(layers=1, width=64, real=True),
    Isomorphic(layers=2, width=128, real=False),
    Isomorphic(layers=2, width=128, real=True),
    Isomorphic(layers=4, width=None, real=True),
    Isomorphic(layers=4, width=256, real=True),
    Isomorphic(layers=2, width=128, real=True, trained=True),
)
HASHED = (
    HashedSettings(bits=10),
    HashedSettings(bits=12),
    HashedSettings(bits=14, experts=1),
    HashedSettings(bits=15),
)


def entries(
    down: Downstream, *, target: Path | None, work: Path, quick: bool, log: Log
) -> Iterator[tuple[str, Callable[[], Entry]]]:
    """Names and how to make them, from the cheapest on. The isomorphic ones need a target."""
    yield "none", lambda: Entry(name="none", note="means of model and kind only", counts=False)
    yield "counts", lambda: _counts(down)
    for settings in HASHED[1:2] if quick else HASHED:
        yield _hashed_name(settings), functools.partial(_hashed, down, settings)
    yield "sentence", lambda: _dense(down, "sentence", make_encoder("sentence"), work, log, "MiniLM, frozen")
    for variant in () if target is None else ISOMORPHIC[:1] if quick else ISOMORPHIC:
        assert target is not None
        yield variant.name, functools.partial(_of_target, down, variant, target, work, log)


def _counts(down: Downstream) -> Entry:
    effects, ridge = down.linear(None)
    return Entry(name="counts", note="and 16 counts", effects=effects, ridge=ridge, cost=lambda p: bag_of(p, 10))


def _hashed_name(settings: HashedSettings) -> str:
    return f"hashed-{settings.bits}bits-{settings.experts}experts"


def _of_target(down: Downstream, variant: Isomorphic, target: Path, work: Path, log: Log) -> Entry:
    encoder = _isomorphic(down.data, down, variant, target, work, log)
    return _dense(down, variant.name, encoder, work, log, "trained end to end" if variant.trained else "frozen")


def _hashed(down: Downstream, settings: HashedSettings) -> Entry:
    """The default encoder; the effects of training prompts are those of encoders that did not see them."""
    data, bits = down.data, settings.bits
    bags: list[Bag] = [bag_of(prompt, bits) for prompt in data.prompts]
    trainer = HashedTrainer(corpus_of(bags, bits), data.split == "train", settings)
    raw, observations = np.zeros(len(bags)), np.zeros(len(bags), dtype=np.int64)
    raw[down.train] = down.effects * down.unit[down.train]
    observations[down.train] = down.train_counts

    def train(places: np.ndarray, ridge: float) -> HashedEncoder:
        trainer.settings = dataclasses.replace(settings, ridge=ridge)
        return trainer.train(raw, observations, down.train[places])

    def effects_of(places: np.ndarray, ridge: float) -> Floats:
        encoder = train(places, ridge)
        return np.array([encoder.effect_of(encoder.of_bag(bag)) for bag in bags]) / down.unit

    effects, ridge = down.out_of_fold(effects_of, _HASHED_RIDGES)
    encoder = train(np.arange(len(down.train)), ridge)
    return Entry(
        name=_hashed_name(settings),
        note="closed form",
        parameters=encoder.parameters,
        megabytes=encoder.parameters * 4 / 1e6,
        effects=effects,
        ridge=ridge,
        cost=encoder.encode_one,
    )


def _dense(down: Downstream, name: str, encoder: Encoder, work: Path, log: Log, note: str) -> Entry:
    vectors = _vectors(encoder, down.data, work, log)
    effects, ridge = down.linear(vectors)
    parameters = int(getattr(encoder, "parameters", 0))
    # The isomorphic token table is kept in half precision.
    table_size = encoder.table_size if isinstance(encoder, IsomorphicEncoder) else 0
    return Entry(
        name=name,
        note=note,
        parameters=parameters,
        megabytes=(4 * parameters - 2 * table_size) / 1e6,
        effects=effects,
        ridge=ridge,
        cost=lambda prompt: encoder.encode([prompt]),
    )


def _vectors(encoder: Encoder, data: LengthData, work: Path, log: Log) -> Floats32:
    path = work / f"{encoder.version}-{prompts_key(data)}.npy"
    if path.exists():
        vectors: Floats32 = np.load(path, allow_pickle=False)
        return vectors
    log(f"encoding {len(data.prompts)} prompts with {encoder.version}")
    vectors = np.concatenate([encoder.encode(data.prompts[i : i + 64]) for i in range(0, len(data.prompts), 64)])
    work.mkdir(parents=True, exist_ok=True)
    np.save(path, vectors)
    return vectors


def prompts_key(data: LengthData) -> str:
    """The beginning of the hash of the prompts in their order."""
    digest = sha256()
    for prompt in data.prompts:
        digest.update(sha256(prompt.text).digest())
    return digest.hexdigest()[:12]


def _isomorphic(
    data: LengthData, down: Downstream, variant: Isomorphic, target: Path, work: Path, log: Log
) -> IsomorphicEncoder:
    folder = work / variant.name
    if (folder / "isomorphic.json").exists():
        return IsomorphicEncoder.load(folder)
    if variant.trained:
        start = _isomorphic(data, down, dataclasses.replace(variant, trained=False), target, work, log)
        log(f"training {variant.name}")
        encoder = fit_encoder(
            start, lessons_of(down), EncoderSettings(), progress=lambda e, loss: log(f"epoch {e}: {loss:.4f}")
        )
    else:
        log(f"making {variant.name}")
        known = np.flatnonzero(data.split == "train")
        chosen = np.random.default_rng(0).choice(known, min(_CALIBRATION, len(known)), replace=False)
        texts = [data.prompts[i] for i in chosen]
        size = Reduction(layers=variant.layers, width=variant.width)
        encoder = reduced(target, size, texts, initialise=variant.real)
    encoder.save(folder, {"licence": "that of the target"})
    return encoder


def lessons_of(down: Downstream) -> Lessons:
    """What an encoder can be trained on end to end."""
    data = down.data
    residual = down.log - down.expected
    order = np.argsort(data.prompt, kind="stable")
    ends = np.cumsum(np.bincount(data.prompt, minlength=len(data.prompts)))[:-1]
    return Lessons(
        prompts=data.prompts,
        residuals=np.split(residual[order], ends),
        classes=data.kind.tolist(),
        split=data.split,
    )


def cpu_ms(cost: Callable[[PromptText], object], text: bytes, *, least_s: float = 0.3) -> float:
    """Median CPU milliseconds of one call with one prompt, the cutting included."""
    cost(cut(text))
    times: list[float] = []
    while sum(times) < least_s * 1e3 or len(times) < 5:
        begin = time.process_time_ns()
        cost(cut(text))
        times.append((time.process_time_ns() - begin) / 1e6)
    return float(np.median(times))


def measure(down: Downstream, entry: Entry, seeds: list[int], epochs: int) -> Row:
    """One row: losses, size, time."""
    rows, spec = down.table(entry.effects, None, counts=entry.counts)
    losses = [score(rows, spec, seed, epochs=epochs) for seed in seeds]
    explained = down.explained(entry.effects) if entry.effects is not None else (0.0, 0.0)
    some = b"\n".join(prompt.text for prompt in down.data.prompts[::17])
    times = {
        f"cpu_ms_{size}": cpu_ms(entry.cost, (some * (1 + count // max(1, len(some))))[:count]) if entry.cost else 0.0
        for size, count in SIZES.items()
    }
    return {
        "experiment": "encoders",
        "encoder": entry.name,
        "note": entry.note,
        "pinball_validation": float(np.mean([loss["validation"] for loss in losses])),
        "pinball_test": float(np.mean([loss["test"] for loss in losses])),
        "pinball_test_range": float(np.ptp([loss["test"] for loss in losses])),
        "effect_r2_folds": explained[0],
        "effect_r2_validation": explained[1],
        "parameters": entry.parameters,
        "megabytes": entry.megabytes,
        **times,
        "ridge": entry.ridge,
    }


def knee(rows: list[Row]) -> str:
    """The cheapest encoder whose validation loss is within 3 % of the best one's."""
    best = min(float(row["pinball_validation"] or np.inf) for row in rows)
    near = [row for row in rows if float(row["pinball_validation"] or np.inf) <= WITHIN * best]
    return str(min(near, key=lambda row: float(row["cpu_ms_2kb"] or 0.0))["encoder"])


def plot(rows: list[Row], path: Path) -> None:
    """Loss on unseen prompts against CPU time of a 2 kB prompt; the area of a mark is the size of the encoder."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        x, y = max(float(row["cpu_ms_2kb"] or 0.0), 1e-3), float(row["pinball_test"] or np.nan)
        family = str(row["encoder"]).split("-")[0]
        colour = {"hashed": "tab:blue", "sentence": "tab:green", "isomorphic": "tab:orange"}.get(family, "tab:gray")
        axes.scatter(x, y, s=25.0 + 2.0 * float(row["megabytes"] or 0.0), color=colour, alpha=0.5)
        axes.annotate(str(row["encoder"]), (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("CPU ms a prompt of 2 kB, one thread (batch of one)")
    axes.set_ylabel("pinball loss on unseen prompts, tokens")
    axes.set_title("Encoders: accuracy, latency and size (area)")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")][: 1 if args.quick else None]
    data = read_lengths(args.prompts, most_prompts=400 if args.quick else None)
    down = Downstream(data)
    rows: list[Row] = []
    work = args.work or args.out / "work"
    epochs = 6 if args.quick else 15
    key = f"{prompts_key(data)}-{args.seeds}-{epochs}"
    for name, make in entries(down, target=args.target, work=work, quick=args.quick, log=console.log):
        if not name.startswith(tuple(args.only.split(","))):
            continue
        kept = work / f"row-{name}-{key}.json"
        if not kept.exists():
            try:
                row = measure(down, make(), seeds, epochs)
            except PredictorError as error:
                console.log(f"{name} is left out: {error}")
                continue
            work.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(msgspec.json.encode(row))
        rows.append(msgspec.json.decode(kept.read_bytes()))
        console.log(f"{name}: {rows[-1]['pinball_validation']:.3f} {rows[-1]['pinball_test']:.3f}")
        _write(args.out, rows, seeds, args.prompts, args.quick)  # the last encoders take long: keep what is known
    print(table(rows))
    print(f"\nThe knee: {knee(rows)}")


def _write(out: Path, rows: list[Row], seeds: list[int], prompts: Path, quick: bool) -> None:
    chosen = knee(rows)
    default = next(row for row in rows if row["encoder"] == chosen)
    best = min(float(row["pinball_test"] or np.inf) for row in rows)
    claims = [
        claim("default_encoder_vs_best", float(default["pinball_test"] or np.inf) / best, "<=", WITHIN),
        claim("default_encoder_ms@2kb", float(default["cpu_ms_2kb"] or 0.0), "<=", 0.15),
    ]
    command = "python -m eval.encoders" + (" --quick" if quick else "")
    write_result(out, command, rows, claims, seeds, [prompts / "prompts.parquet", prompts / "lengths.parquet"])
    plot(rows, out / "encoders.png")


if __name__ == "__main__":
    main()
