"""An encoder with the target model's own architecture, reduced: its first layers, a narrower residual stream."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import PromptText
from swarmx.neural.checkpoint import Card, load_arrays, save_arrays

NAME = "isomorphic"
MOST_TOKENS = 256
_BATCH = 8
_TOKENIZER = "tokenizer"
_NEEDED = {"model_type", "vocab_size", "hidden_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How much of the target is kept: the first `layers`, and `width` of the residual stream (None: all of it).

    Attention keeps its heads, so that rotary positions mean what they meant; the feed-forward part shrinks as the
    width does.
    """

    layers: int = 2
    width: int | None = 128


class IsomorphicEncoder:
    """Implements `core.ports.Encoder`: mean and last hidden state of a reduced target model, [2 * width].

    The tokenizer is the target's. Of a prompt above `MOST_TOKENS` tokens the first and the last half of them are
    read. The vector of a prompt does not depend on its neighbours in a batch, but for the rounding of the matrix
    products. An encoder never changes: training makes a new one of `module` (`neural.training.encoder`).
    """

    name = NAME
    slow = True

    def __init__(self, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], tokenizer: bytes) -> None:
        """`config` as `reduced_config` makes it, `arrays` by the names of the architecture, `tokenizer` the JSON.

        Raises PredictorError when they do not fit each other.
        """
        torch = _torch()
        self.config = dict(config)
        self._tokenizer_json = tokenizer
        self._tokenizer = _tokenizer(tokenizer, self.config)
        self._arrays = {name: _stored(name, array) for name, array in arrays.items()}
        self.module = build(self.config)
        try:
            self.module.load_state_dict({n: torch.from_numpy(a.astype(np.float32)) for n, a in self._arrays.items()})
        except RuntimeError as error:
            raise PredictorError(
                f"the weights do not fit an encoder of type {self.config['model_type']!r}: {str(error)[:300]}"
            ) from None
        self.module.eval()

    @functools.cached_property
    def version(self) -> str:
        """That of the card when saved: the beginning of the hash of weights and tokenizer."""
        return f"{NAME}-{sha256(save(self._everything())).hexdigest()[:12]}"

    @property
    def dimension(self) -> int:
        return 2 * int(self.config["hidden_size"])

    @property
    def parameters(self) -> int:
        """How many numbers the networks hold, those of the token table included."""
        return sum(array.size for array in self._arrays.values())

    @property
    def table_size(self) -> int:
        """How many of them are in the token table, which is kept in half precision."""
        return sum(array.size for array in self._arrays.values() if array.dtype == np.float16)

    def encode(self, prompts: Sequence[PromptText]) -> NDArray[np.float32]:
        """[prompts, dimension] float32, finite."""
        torch = _torch()
        tokens = [self.tokens(prompt) for prompt in prompts]
        out = np.zeros((len(prompts), self.dimension), dtype=np.float32)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                out[rows] = pooled(self.module, [tokens[i] for i in rows]).numpy()
        return np.nan_to_num(out, copy=False)

    def tokens(self, prompt: PromptText) -> list[int]:
        """What the network reads of a prompt: at least one token, at most `MOST_TOKENS`."""
        ids: list[int] = self._tokenizer.encode(prompt.text.decode("utf-8", "replace"), add_special_tokens=False).ids
        if len(ids) > MOST_TOKENS:
            ids = ids[: MOST_TOKENS // 2] + ids[-(MOST_TOKENS // 2) :]
        return ids or [0]

    def with_weights(self, arrays: Mapping[str, NDArray[Any]]) -> IsomorphicEncoder:
        """The same architecture and tokenizer with other numbers."""
        return IsomorphicEncoder(self.config, arrays, self._tokenizer_json)

    def save(self, folder: Path, card: Mapping[str, Any]) -> Card:
        """Write weights, tokenizer and card; `card` gives what `checkpoint.Card` wants beside them (`licence` ...).

        The folder then holds parts of the target: its licence rules over them.
        """
        story = {**card, "extra": {**card.get("extra", {}), "config": self.config}}
        return save_arrays(folder, NAME, self._everything(), story)

    @classmethod
    def load(cls, folder: Path) -> IsomorphicEncoder:
        """What `save` wrote. Raises PredictorError when it is missing, damaged or does not fit."""
        arrays, card = load_arrays(folder, NAME)
        config, tokenizer = card.extra.get("config"), arrays.pop(_TOKENIZER, None)
        if not isinstance(config, dict) or not config.keys() >= _NEEDED or tokenizer is None:
            raise PredictorError(f"the weights {card.version} in {folder} are no isomorphic encoder; train one again.")
        encoder = cls(config, arrays, tokenizer.tobytes())
        encoder.__dict__["version"] = card.version
        return encoder

    def _everything(self) -> dict[str, NDArray[Any]]:
        return {**self._arrays, _TOKENIZER: np.frombuffer(self._tokenizer_json, dtype=np.uint8)}


def reduced_config(target: Path, reduction: Reduction) -> dict[str, Any]:
    """The configuration of the reduced model, from the target's `config.json`. Raises PredictorError."""
    path = target / "config.json"
    try:
        config: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        inner, depth = int(config["intermediate_size"]), int(config["num_hidden_layers"])
        model_type, _ = str(config["model_type"]), int(config["vocab_size"])
    except OSError as error:
        raise PredictorError(
            f"{path} cannot be read: {error.strerror}; give the folder of a model that transformers can read."
        ) from None
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise PredictorError(f"{path} describes no decoder that can be reduced: {error!r}.") from None
    width = hidden if reduction.width is None else reduction.width
    if not (1 <= reduction.layers <= depth and 1 <= width <= hidden):
        raise PredictorError(
            f"{asdict(reduction)} cannot be had of {model_type} with {depth} layers of width {hidden}: "
            "give 1 to that many of each."
        )
    config |= {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": reduction.layers,
        "intermediate_size": max(8, round(inner * width / hidden)),
        "head_dim": config.get("head_dim") or hidden // heads,
        "use_cache": False,
        "dtype": "float32",
    }
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][: reduction.layers]
    return config


def build(config: Mapping[str, Any]) -> Any:
    """The torch module of a configuration, with random weights from torch's current seed. Raises PredictorError."""
    _torch()
    from transformers import AutoConfig, AutoModel

    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        make: Any = AutoModel.from_config  # without types in transformers
        module = make(AutoConfig.for_model(config["model_type"], **rest))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise PredictorError(f"no encoder of type {config.get('model_type')!r} can be built: {error}") from None
    return module.float()


def pooled(module: Any, tokens: Sequence[Sequence[int]]) -> Any:
    """The mean of the last layer and its last token, a tensor [prompts, 2 * width]; padding is on the right."""
    torch = _torch()
    longest = max(len(ids) for ids in tokens)
    ids = torch.zeros((len(tokens), longest), dtype=torch.long)
    mask = torch.zeros((len(tokens), longest), dtype=torch.long)
    for row, of_prompt in enumerate(tokens):
        ids[row, : len(of_prompt)] = torch.tensor(of_prompt, dtype=torch.long)
        mask[row, : len(of_prompt)] = 1
    ragged = bool((mask == 0).any())
    hidden = module(input_ids=ids, attention_mask=mask if ragged else None, use_cache=False).last_hidden_state
    counts = mask.sum(1)
    mean = (hidden * mask[:, :, None]).sum(1) / counts[:, None]
    last = hidden[torch.arange(len(tokens)), counts - 1]
    return torch.cat([mean, last], 1)


def _tokenizer(raw: bytes, config: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise PredictorError(f"the tokenizer of the isomorphic encoder cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise PredictorError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model knows {config['vocab_size']}: "
            "take both files from the same model."
        )
    return tokenizer


def _stored(name: str, array: NDArray[Any]) -> NDArray[Any]:
    # The token table is nine tenths of the bytes, and half precision does not change what is forecast.
    return array.astype(np.float16 if name.endswith("embed_tokens.weight") else np.float32, copy=False)


def _torch() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise PredictorError(
            f"the encoder 'isomorphic' needs torch and transformers ({error}); "
            'install them with `pip install "swarmx[train]"`, or set predictor.encoder to "hashed".'
        ) from None
    return torch
