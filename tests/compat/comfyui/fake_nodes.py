"""What the server without ComfyUI can run, and the graph that everybody starts with."""

from __future__ import annotations

from typing import Any

from swarmx.compat.comfyui.graph import Graph

SAMPLERS = ["euler", "heun", "dpmpp_2m"]


def node_info(
    name: str, required: dict[str, Any], output: list[str], *, out: bool = False, module: str = "nodes"
) -> dict[str, Any]:
    """A class as `/object_info` describes it. Inputs are types with their settings."""
    return {
        "input": {"required": required},
        "input_order": {"required": list(required)},
        "output": output,
        "output_is_list": [False] * len(output),
        "output_name": output,
        "name": name,
        "display_name": name,
        "description": "",
        "python_module": module,
        "category": "tests",
        "output_node": out,
    }


def object_info(models: list[str], *, custom: bool = False) -> dict[str, Any]:
    """What a small server can run."""

    def whole(default: int, least: int, most: int) -> list[Any]:
        return ["INT", {"default": default, "min": least, "max": most}]

    size = whole(512, 16, 16384)
    nodes = [
        node_info("CheckpointLoaderSimple", {"ckpt_name": [models, {}]}, ["MODEL", "CLIP", "VAE"]),
        node_info("CLIPTextEncode", {"text": ["STRING", {"multiline": True}], "clip": ["CLIP", {}]}, ["CONDITIONING"]),
        node_info("EmptyLatentImage", {"width": size, "height": size, "batch_size": whole(1, 1, 4096)}, ["LATENT"]),
        node_info(
            "KSampler",
            {
                "model": ["MODEL", {}],
                "seed": whole(0, 0, 2**64 - 1),
                "steps": whole(20, 1, 10000),
                "cfg": ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}],
                "sampler_name": [SAMPLERS, {}],
                "scheduler": [["normal", "karras"], {}],
                "positive": ["CONDITIONING", {}],
                "negative": ["CONDITIONING", {}],
                "latent_image": ["LATENT", {}],
                "denoise": ["FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0}],
            },
            ["LATENT"],
        ),
        node_info("VAEDecode", {"samples": ["LATENT", {}], "vae": ["VAE", {}]}, ["IMAGE"]),
        node_info(
            "EmptyImage",
            {
                "width": whole(512, 1, 16384),
                "height": whole(512, 1, 16384),
                "batch_size": whole(1, 1, 4096),
                "color": whole(0, 0, 0xFFFFFF),
            },
            ["IMAGE"],
        ),
        node_info("LoadImage", {"image": [[], {"image_upload": True}]}, ["IMAGE", "MASK"]),
        node_info(
            "SaveImage", {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "x"}]}, [], out=True
        ),
        node_info("PreviewImage", {"images": ["IMAGE", {}]}, [], out=True),
        node_info(
            "SaveLatent", {"samples": ["LATENT", {}], "filename_prefix": ["STRING", {"default": "x"}]}, [], out=True
        ),
        node_info("LoadLatent", {"latent": [[], {}]}, ["LATENT"]),
        node_info(
            "ImageUpscaleWithModel",
            {"upscale_model": ["UPSCALE_MODEL", {}], "image": ["IMAGE", {}]},
            ["IMAGE"],
            module="comfy_extras.nodes_upscale_model",
        ),
    ]
    if custom:
        nodes.append(node_info("Picky", {"value": whole(0, 0, 10)}, ["IMAGE"], module="custom_nodes.picky"))
    return {row["name"]: row for row in nodes}


def graph(
    seed: int = 1, *, steps: int = 4, model: str = "tiny.safetensors", side: int = 128, sampler: str = "euler"
) -> Graph:
    """The graph that everybody starts with."""
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": model}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": side, "height": side, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["4", 1]}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": seed,
                "steps": steps,
                "cfg": 7.0,
                "sampler_name": sampler,
                "scheduler": "normal",
                "denoise": 1.0,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "tiny"}},
    }
