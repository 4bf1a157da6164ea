"""The cards that workers run on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
import torch.distributed as dist

from ...helios_core.checkpoint import open_checkpoint
from ..model.loading import converted_on_reading
from ..model.offload_patcher import OffloadPatcher

GB = 1e9
ON_CPU = "HELIOS_MULTI_GPU_ON_CPU"  # in the environment, for tests: workers without cards


def find_cards(count: int, patcher: Any, address: str = "") -> tuple[str | None, ...]:
    """The first so many, as CUDA_VISIBLE_DEVICES names them; None for each where tests run without.

    Of a Ray cluster at an address they have no names here. Raises ValueError where there are fewer, or where they could
    not talk to each other.
    """
    heads = patcher.model.diffusion_model.config.num_attention_heads
    if count > heads:
        raise ValueError(f"{count} cards are too many: this model has {heads} attention heads to share out.")
    if os.environ.get(ON_CPU) == "1":
        return (None,) * count
    device = comfy.model_management.get_torch_device()
    if address and device.type != "cuda":
        raise ValueError("Helios Multi-GPU needs an NVIDIA card in the machine of ComfyUI, too, which has none.")
    if not (dist.is_available() and dist.is_nccl_available()):
        raise ValueError(
            "Helios Multi-GPU needs NCCL, which this PyTorch is without: it is there on Linux only, for NVIDIA and AMD "
            "cards."
        )
    if address:
        return ("",) * count
    there = torch.cuda.device_count() if device.type == "cuda" else 0
    if there < count:
        raise ValueError(
            f"Helios Multi-GPU is set to {count} cards, and ComfyUI sees {there} on this machine. Take the node "
            "out, or set it to as many as there are; --cuda-device and CUDA_VISIBLE_DEVICES hide cards."
        )
    names = os.environ.get("HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES", "")
    visible = [name.strip() for name in names.split(",") if name.strip()]
    return tuple((visible or [str(i) for i in range(there)])[:count])


def loading_warning(patcher: Any, count: int) -> str | None:
    """The node's warning of weights that each worker converts as it loads them; None where all map the same file."""
    path, dtype, _ = patcher.model.recipe
    if converted_on_reading(open_checkpoint(Path(path)), dtype) is None:
        return None
    size = comfy.model_management.module_size(patcher.model) / GB
    long = "as long as they run" if isinstance(patcher, OffloadPatcher) else "until they are on the cards"
    return (
        f"The weights are stored in another dtype than they are used in, and each of {count} workers converts them as "
        f"it loads: {count} times {size:.1f} GB of the computer's memory, {long}. A file made with "
        "scripts/convert_checkpoint.py in that dtype is read by all of them, and takes none."
    )
