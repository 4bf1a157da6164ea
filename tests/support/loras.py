"""LoRA files as trainers write them, and what each does to a model, worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfyui_helios.host.model.loading import load_model
from harness import oracle

RANK = 4
# What Wan 2.1's own code calls the modules that hold a matrix, by their published names; then all others with a weight.
BLOCK_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
IN_BLOCKS = {f"blocks.{i}.{ours}": f"blocks.{i}.{wans}" for i in (0, 1) for ours, wans in BLOCK_NAMES.items()}
WAN_NAMES = {
    **IN_BLOCKS,
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
NO_MATRICES = {
    "blocks.0.attn1.norm_q": "blocks.0.self_attn.norm_q",
    "blocks.1.attn2.norm_k": "blocks.1.cross_attn.norm_k",
    "blocks.1.norm2": "blocks.1.norm3",
    "blocks.1.scale_shift_table": "blocks.1.modulation",
    "norm_out.scale_shift_table": "head.modulation",
}


@dataclass(frozen=True)
class Layout:
    """How a trainer spells a module, and its two matrices."""

    spell: Callable[[str], str]
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"


def wan(module: str) -> str:
    return {**WAN_NAMES, **NO_MATRICES}[module]


def underscored(name: str) -> str:
    return name.replace(".", "_")


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
LAYOUTS = {
    "ComfyUI's own": Layout(lambda x: f"diffusion_model.{x}"),
    "Helios' training": Layout(lambda x: f"transformer.{x}"),
    "with the adapter's name": Layout(lambda x: f"transformer.{x}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers of before": Layout(lambda x: f"transformer.{x}", "lora.down.weight", "lora.up.weight"),
    "bare": Layout(lambda x: x),
    "PEFT": Layout(lambda x: f"base_model.model.{x}"),
    "kohya": Layout(lambda x: f"lora_unet_{underscored(x)}", **KOHYA),
    "SimpleTuner": Layout(lambda x: f"lycoris_{underscored(x)}", **KOHYA),
    "Wan's own": Layout(lambda x: f"diffusion_model.{wan(x)}", **KOHYA),
    "Wan's own, A and B": Layout(lambda x: f"diffusion_model.{wan(x)}"),
    "Wan's own, bare": Layout(wan, "lora_A.default.weight", "lora_B.default.weight"),
    "musubi": Layout(lambda x: f"lora_unet_{underscored(wan(x))}", **KOHYA),
    "Wan-Fun": Layout(lambda x: f"lora_unet__{underscored(wan(x))}", **KOHYA),
}


def matrices(modules: Any = tuple(WAN_NAMES), seed: int = 0, reference: Any = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (rank, in, ...) and up (out, rank, ...) by published module, loud enough to tell in a video.

    reference: the network that they are for, if not `oracle.transformer`.
    """
    rng = torch.Generator().manual_seed(seed)
    made = {}
    reference = reference or oracle.transformer(0)
    for module in modules:
        weight = reference.get_submodule(module).weight
        extra = (1,) * (weight.ndim - 2)
        down = torch.randn(RANK, *weight.shape[1:], generator=rng) / weight[0].numel() ** 0.5
        made[module] = down, 0.5 * torch.randn(weight.shape[0], RANK, *extra, generator=rng)
    return made


def in_layout(layout: Layout, parts: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> dict[str, Tensor]:
    tensors = {}
    for module, (down, up) in parts.items():
        name = layout.spell(module)
        tensors |= {f"{name}.{layout.down}": down, f"{name}.{layout.up}": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def training_metadata(modules: Any, alpha: float, **more: Any) -> dict[str, str]:
    """What Helios' training, by diffusers, writes beside the tensors: there alone stands alpha."""
    config = {"r": RANK, "lora_alpha": alpha, "target_modules": list(modules), **more}
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{k}": x for k, x in config.items()})}


def product(down: Tensor, up: Tensor) -> Tensor:
    """up x down in the shape of the weight."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def merged(folder: Path, change: Callable[[str, Tensor], Tensor], **config: Any) -> Any:
    """A MODEL from a checkpoint each tensor of which is change(published name, tensor of `oracle.transformer(0)`)."""
    reference = oracle.transformer(0, **config)
    for name, weight in reference.named_parameters():
        weight.data = change(name, weight.data)
    reference.save_pretrained(folder / "transformer")
    return load_model(str(folder / "transformer"), "fp32")


def added(deltas: dict[str, Tensor], strength: float = 1.0) -> Callable[[str, Tensor], Tensor]:
    """A change for `merged`: by module, what is added to its weight."""
    return lambda name, weight: weight + strength * deltas.get(name.removesuffix(".weight"), torch.zeros(()))
