"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a torch without it.

Python runs this at its start where this folder is on PYTHONPATH. What torchvision's own library would declare is
declared here if that library cannot be loaded; nothing that ComfyUI's core needs calls it.
"""

import importlib.util
from pathlib import Path

_found = importlib.util.find_spec("torchvision")
if _found is not None and _found.origin is not None:
    import torch

    try:
        for _library in Path(_found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(_library))
    except OSError:
        _declared = torch.library.Library("torchvision", "DEF")
        for _name in ("nms", "qnms"):
            _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
