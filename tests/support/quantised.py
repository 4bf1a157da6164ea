"""Files of scaled fp8 weights, in every way in which ComfyUI has ever written them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_helios.helios_core.checkpoint import CONFIG_KEY
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.scaled_linear import quantise, scale_of

Kind = Literal["metadata", "marks", "legacy"]
KINDS: tuple[Kind, ...] = ("metadata", "marks", "legacy")
FP8 = {"format": "float8_e4m3fn"}


def block_layers(weights: Mapping[str, Tensor]) -> list[str]:
    """The matrices of the blocks, which are what is usually quantised."""
    return [
        name.removesuffix(".weight")
        for name, x in weights.items()
        if name.startswith("blocks.") and name.endswith(".weight") and x.ndim == 2
    ]


def scaled(weights: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """The weights with these layers in fp8 and a `weight_scale` beside each; the rest as it is."""
    made = dict(weights)
    for layer in layers:
        weight = weights[f"{layer}.weight"]
        made[f"{layer}.weight_scale"] = scale_of(weight)
        made[f"{layer}.weight"] = quantise(weight, made[f"{layer}.weight_scale"])
    return made


def unscaled(weights: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """The weights with these layers as `scaled` rounds them, in float32."""
    made = scaled(weights, layers)
    rounded = {f"{layer}.weight": made[f"{layer}.weight"].float() * made[f"{layer}.weight_scale"] for layer in layers}
    return dict(weights) | rounded


def write_scaled(
    file: Path,
    weights: Mapping[str, Tensor],
    layers: Sequence[str],
    *,
    kind: Kind = "metadata",
    config: TransformerConfig | None = None,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    **changed: Tensor | None,
) -> Path:
    """Save `scaled` weights; names: parts of names that this file writes otherwise; changed: by name, __ for dots."""

    def spelled(name: str) -> str:
        for ours, theirs in (names or {}).items():
            name = name.replace(ours, theirs)
        return prefix + name

    made = {spelled(name): tensor for name, tensor in scaled(weights, layers).items()}
    metadata = {} if config is None else {CONFIG_KEY: json.dumps(config.to_dict())}
    if kind == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"layers": {spelled(layer): FP8 for layer in layers}})
    elif kind == "marks":
        made |= {spelled(f"{layer}.comfy_quant"): mark(FP8) for layer in layers}
    else:
        made = {name.replace("weight_scale", "scale_weight"): tensor for name, tensor in made.items()}
        made |= {spelled(f"{layer}.scale_input"): torch.ones(()) for layer in layers}
        made[f"{prefix}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    changes = {name.replace("__", "."): tensor for name, tensor in changed.items()}
    made = {name: tensor for name, tensor in (made | changes).items() if tensor is not None}
    save_file(made, file, metadata)
    return file


def mark(settings: Mapping[str, Any]) -> Tensor:
    """What stands beside a layer's weight as `comfy_quant`."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
