"""Writes a random checkpoint of 10 MB that a ComfyUI server loads and samples with in a fraction of a second, on a CPU.

    python scripts/tiny_checkpoint.py CHECKPOINTS/tiny.safetensors [BLOCKS]

The layout is that of Stable Diffusion 3 (Esser et al., arXiv 2403.03206): a transformer of two joint blocks, 128 wide
(64 a block), and a small convolutional autoencoder of 16 latent channels (the layout of madebyollin/taesd). There are
no text encoders, so prompts do not matter; what is drawn is noise. What it costs does depend on steps, sampler, size
and batch.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

BLOCKS, WIDTH_OF_A_BLOCK = 2, 64  # the width follows from the depth in this family
LATENT, TEXT, POOLED, TIME, SIDE = 16, 4096, 2048, 256, 64
CONV = 64


class Weights:
    """Random tensors by name, scaled so that what goes through them stays finite in half precision."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, name: str, *shape: int, scale: float) -> None:
        self.tensors[name] = (torch.randn(*shape, generator=self._generator) * scale).half()

    def zeros(self, name: str, *shape: int) -> None:
        self.tensors[name] = torch.zeros(*shape).half()

    def linear(self, name: str, outputs: int, inputs: int) -> None:
        self.random(f"{name}.weight", outputs, inputs, scale=0.5 / math.sqrt(inputs))
        self.zeros(f"{name}.bias", outputs)

    def conv(self, name: str, outputs: int, inputs: int, *, bias: bool = True) -> None:
        self.random(f"{name}.weight", outputs, inputs, 3, 3, scale=math.sqrt(2.0 / (9 * inputs)))
        if bias:
            self.zeros(f"{name}.bias", outputs)


def transformer(weights: Weights, prefix: str, blocks: int) -> None:
    """Patches and text in, joint blocks, patches out."""
    width = WIDTH_OF_A_BLOCK * blocks
    weights.random(f"{prefix}x_embedder.proj.weight", width, LATENT, 2, 2, scale=0.5 / math.sqrt(4 * LATENT))
    weights.zeros(f"{prefix}x_embedder.proj.bias", width)
    weights.random(f"{prefix}pos_embed", 1, SIDE * SIDE, width, scale=0.02)
    for name, inputs in (("t_embedder", TIME), ("y_embedder", POOLED)):
        weights.linear(f"{prefix}{name}.mlp.0", width, inputs)
        weights.linear(f"{prefix}{name}.mlp.2", width, width)
    weights.linear(f"{prefix}context_embedder", width, TEXT)
    for number in range(blocks):
        for side in ("x_block", "context_block"):
            # The text is not needed after the last block, which only reads it.
            only_read = side == "context_block" and number == blocks - 1
            block = f"{prefix}joint_blocks.{number}.{side}"
            weights.linear(f"{block}.attn.qkv", 3 * width, width)
            weights.linear(f"{block}.adaLN_modulation.1", (2 if only_read else 6) * width, width)
            if not only_read:
                weights.linear(f"{block}.attn.proj", width, width)
                weights.linear(f"{block}.mlp.fc1", 4 * width, width)
                weights.linear(f"{block}.mlp.fc2", width, 4 * width)
    weights.linear(f"{prefix}final_layer.adaLN_modulation.1", 2 * width, width)
    weights.linear(f"{prefix}final_layer.linear", 4 * LATENT, width)


def autoencoder(weights: Weights, prefix: str) -> None:
    """Numbers are places in a sequence; those that are left out have no weights (clamp, ReLU, upsampling)."""

    def residual(name: str) -> None:
        for place in (0, 2, 4):
            weights.conv(f"{name}.conv.{place}", CONV, CONV)

    encoder, decoder = f"{prefix}taesd_encoder", f"{prefix}taesd_decoder"
    weights.conv(f"{encoder}.0", CONV, 3)
    residual(f"{encoder}.1")
    for start in (2, 6, 10):
        weights.conv(f"{encoder}.{start}", CONV, CONV, bias=False)
        for place in range(start + 1, start + 4):
            residual(f"{encoder}.{place}")
    weights.conv(f"{encoder}.14", LATENT, CONV)

    weights.conv(f"{decoder}.1", CONV, LATENT)
    for start in (3, 8, 13):
        for place in range(start, start + 3):
            residual(f"{decoder}.{place}")
        weights.conv(f"{decoder}.{start + 4}", CONV, CONV, bias=False)
    residual(f"{decoder}.18")
    weights.conv(f"{decoder}.19", 3, CONV)
    weights.tensors[f"{prefix}vae_scale"] = torch.tensor(1.0)
    weights.tensors[f"{prefix}vae_shift"] = torch.tensor(0.0)


def main(path: Path, blocks: int) -> None:
    weights = Weights(seed=0)
    transformer(weights, "model.diffusion_model.", blocks)
    autoencoder(weights, "first_stage_model.")
    weights.zeros("text_encoders.none", 1)  # its prefix makes the loader build text encoders, all of them empty
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights.tensors, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else BLOCKS)
