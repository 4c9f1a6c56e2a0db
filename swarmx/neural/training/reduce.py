"""Makes an isomorphic encoder of its target's own weights: the first layers, seen through fewer directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import PromptText
from swarmx.neural.encoders.isomorphic import IsomorphicEncoder, Reduction, build, pooled, reduced_config

_TABLE = "embed_tokens.weight"
_ROWS = 8192

Weights = dict[str, torch.Tensor]


def reduced(
    target: Path, reduction: Reduction, texts: Sequence[PromptText] = (), *, initialise: bool = True, seed: int = 0
) -> IsomorphicEncoder:
    """A reduced variant of the model in the folder `target`, with its `tokenizer.json`.

    At full width the first layers are copied. Below it the residual stream is turned into its principal directions
    and cut to the first `width`, which RMS normalisation allows (SliceGPT, Ashkboos et al., ICLR 2024, with one
    rotation for all layers); of the feed-forward neurons those stay that do most. Directions and neurons are measured
    on `texts`, or without them read off the weights. With `initialise` false the weights are random, by `seed`.

    Raises PredictorError when the target cannot be read, or has other parts than a Llama-like decoder.
    """
    config = reduced_config(target, reduction)
    try:
        tokenizer = (target / "tokenizer.json").read_bytes()
    except OSError as error:
        raise PredictorError(
            f"{target}/tokenizer.json cannot be read: {error.strerror}; the encoder needs it."
        ) from None
    torch.manual_seed(seed)
    module = build(config)
    if initialise:
        whole = Reduction(layers=reduction.layers, width=None)
        full_config = reduced_config(target, whole)
        weights = _read(target, module)
        if reduction.width is not None and reduction.width < full_config["hidden_size"]:
            weights = _cut(weights, config, full_config, tokenizer, texts)
        _check(weights, module)
        module.load_state_dict(weights)
    return IsomorphicEncoder(config, arrays_of(module), tokenizer)


def arrays_of(module: torch.nn.Module) -> dict[str, NDArray[Any]]:
    """The weights of a torch module, for an encoder."""
    return {name: value.detach().to(torch.float32).numpy().copy() for name, value in module.state_dict().items()}


def _read(target: Path, module: torch.nn.Module) -> Weights:
    """Those of the target's tensors that the reduced model has by name, whatever the prefix of their names."""
    files = _files(target)
    prefix = next((name[: -len(_TABLE)] for name in files if name.endswith(_TABLE)), None)
    if prefix is None:
        raise PredictorError(f"the weights in {target} hold no {_TABLE}: not a decoder that can be reduced.")
    weights: Weights = {}
    for name in module.state_dict():
        path = files.get(prefix + name)
        if path is None:
            raise PredictorError(
                f"the weights in {target} hold no {prefix + name}; use initialise=False, or another target."
            )
        with safe_open(path, framework="pt") as tensors:
            weights[name] = tensors.get_tensor(prefix + name).to(torch.float32)
    return weights


def _files(target: Path) -> dict[str, Path]:
    index = target / "model.safetensors.index.json"
    try:
        if index.exists():
            names: Mapping[str, str] = msgspec.json.decode(index.read_bytes())["weight_map"]
            return {name: target / file for name, file in names.items()}
        path = target / "model.safetensors"
        with safe_open(path, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), path)
    except (OSError, SafetensorError, msgspec.MsgspecError, KeyError, TypeError) as error:
        raise PredictorError(f"the weights of the target in {target} cannot be read: {error}.") from None


def _check(weights: Weights, module: torch.nn.Module) -> None:
    wrong = [name for name, value in module.state_dict().items() if weights[name].shape != value.shape]
    if wrong:
        raise PredictorError(f"the target's {wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, which does not fit.")


def _cut(
    weights: Weights,
    config: Mapping[str, Any],
    full_config: Mapping[str, Any],
    tokenizer: bytes,
    texts: Sequence[PromptText],
) -> Weights:
    """The weights between the first principal directions of the residual stream only."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    hidden = full_config["hidden_size"]
    if texts:
        second, work = _measured(weights, full_config, tokenizer, texts)
    else:
        second, work = _moment(weights[_TABLE]), {}
    energy, directions = torch.linalg.eigh(second)
    basis = directions[:, -width:].flip(1).to(torch.float32)  # [hidden, width], the strongest first
    # What is cut off no longer counts in the norm: x / rms(x) keeps its size with this factor.
    factor = float(np.sqrt(hidden / width) * np.sqrt(float(energy[-width:].sum() / energy.sum())))
    cut: Weights = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".self_attn.")
        if name == _TABLE:
            cut[name] = torch.cat([rows @ basis for rows in torch.split(value, _ROWS)])
        elif layer and part in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            cut[name] = (value * weights[f"{layer}.input_layernorm.weight"]) @ basis
        elif layer and part == "o_proj.weight":
            cut[name] = basis.T @ value
        elif layer and part in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"):
            cut[name] = value
        elif name.endswith("layernorm.weight") or name == "norm.weight":
            cut[name] = torch.full((width,), factor)
        elif name.endswith(".mlp.down_proj.weight"):
            block = name.removesuffix(".mlp.down_proj.weight")
            gate, up = weights[f"{block}.mlp.gate_proj.weight"], weights[f"{block}.mlp.up_proj.weight"]
            gamma = weights[f"{block}.post_attention_layernorm.weight"]
            size = work.get(block, (gate * gamma).norm(dim=1) * (up * gamma).norm(dim=1)) * value.norm(dim=0)
            kept = size.topk(inner).indices.sort().values
            cut[name] = basis.T @ value[:, kept]
            cut[f"{block}.mlp.gate_proj.weight"] = (gate * gamma)[kept] @ basis
            cut[f"{block}.mlp.up_proj.weight"] = (up * gamma)[kept] @ basis
        elif not name.endswith((".gate_proj.weight", ".up_proj.weight")):
            raise PredictorError(f"the target's {name} is no part of a Llama-like decoder; use initialise=False.")
    return cut


def _measured(
    weights: Weights, full_config: Mapping[str, Any], tokenizer: bytes, texts: Sequence[PromptText]
) -> tuple[torch.Tensor, Weights]:
    """The second moment [hidden, hidden] of the normalised residual stream, and the mean |activation| of the neurons
    by layer, on `texts`."""
    encoder = IsomorphicEncoder(full_config, {name: value.numpy() for name, value in weights.items()}, tokenizer)
    hidden = full_config["hidden_size"]
    second = torch.zeros((hidden, hidden), dtype=torch.float64)
    work: Weights = {}
    module = encoder.module

    def stream(_: Any, inputs: tuple[Any, ...]) -> None:
        second.add_(_moment(inputs[0].reshape(-1, hidden)))

    def neurons(block: str) -> Any:
        def seen(_: Any, inputs: tuple[Any, ...]) -> None:
            value = inputs[0].abs().sum((0, 1))
            work[block] = work[block] + value if block in work else value

        return seen

    for name, part in module.named_modules():
        if name.endswith("layernorm") or name == "norm":
            part.register_forward_pre_hook(stream)
        elif name.endswith(".mlp.down_proj"):
            part.register_forward_pre_hook(neurons(name.removesuffix(".mlp.down_proj")))
    with torch.inference_mode():
        for text in texts:
            pooled(module, [encoder.tokens(text)])
    return second, {block: value.clone() for block, value in work.items()}


def _moment(rows: torch.Tensor) -> torch.Tensor:
    """The second moment [width, width], in double precision, of rows that are first scaled to length 1."""
    total = torch.zeros((rows.shape[1], rows.shape[1]), dtype=torch.float64)
    for part in torch.split(rows, _ROWS):
        unit = part / part.norm(dim=1, keepdim=True).clamp(min=1e-6)
        total += (unit.T @ unit).to(torch.float64)
    return total
