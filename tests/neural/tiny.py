"""A model of a few thousand numbers with a tokenizer, in the files that a real one has; made on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SENTENCES = (
    "Name the capital of Peru.",
    "Write an essay on the history of Peru, with ten chapters.",
    "def f(x): return x ** 2",
    "Explain why the sky is blue, step by step.",
)


def a_target(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Qwen2 of 2 layers and width 16 with a byte-level tokenizer, as the files of a model folder."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModel, Qwen2Config

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "qwen2",
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModel.from_config(Qwen2Config(**rest)).float()
    with torch.no_grad():
        for parameter in model.parameters():  # far from their initial zeros and ones, so that every one matters
            parameter += 0.1 * torch.randn(parameter.shape)
    save_file({f"model.{name}": value for name, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder
