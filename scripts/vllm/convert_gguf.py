"""Turn a quantised GGUF file into the bf16 Hugging Face directory that vLLM serves on a CPU.

vLLM's own GGUF loader needs CUDA kernels, so the weights are dequantised once, here. Runs in
`.venv-vllm`, never in the project's environment.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
# (vLLM and its libraries live in their own environment)
import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: it reads it once

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="quantised file to read")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--source", default="", help="where the file came from, kept in SOURCE.json")
    parser.add_argument("--sha256", default="", help="digest of the file, kept in SOURCE.json")
    parser.add_argument(
        "--chat-template-from",
        type=Path,
        help="model directory whose chat template replaces the one inside the GGUF",
    )
    args = parser.parse_args()

    folder, name = str(args.gguf.parent), args.gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if args.chat_template_from is not None:
        donor = AutoTokenizer.from_pretrained(str(args.chat_template_from))
        tokenizer.chat_template = donor.chat_template
    if not tokenizer.chat_template:
        print(f"{name} has no chat template: an instruction-tuned model is needed", file=sys.stderr)
        return 1
    # Without dequantize=True the tensors stay packed and save_pretrained refuses them.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    source = {"source": args.source, "gguf": name, "gguf_sha256": args.sha256}
    (args.out / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    print(f"{args.gguf.stem}: {sum(p.numel() for p in model.parameters()):,} parameters in bf16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
