"""A LoRA file on top of a Helios MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import torch
from torch import Tensor

from ...helios_core.lora_file import LoraFile, open_lora
from ...helios_core.safetensors_file import StoredTensor, read_tensors
from ..messages import Notes


def add_lora(patcher: Any, path: str, strength: float, notes: Notes) -> Any:
    """A clone of a Helios MODEL with what fits of a LoRA file on top. What that is, and what does not fit, is noted.

    Raises CheckpointError for a file that cannot be read, and where nothing of it fits.
    """
    # Not its state_dict, in which quantised weights are packed.
    weights = {name: tuple(x.shape) for name, x in patcher.model.diffusion_model.named_parameters()}
    lora = open_lora(Path(path), weights)
    if strength == 0:
        notes.inform(f"{lora.path.name} has no effect at strength 0.")
        return patcher
    tensors = read(lora)
    keys = {weight: f"diffusion_model.{weight}" for weight in lora.changes}
    clone = patcher.clone()
    clone.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    notes.inform(f"{lora.used} of {lora.total} tensors of {lora.path.name} take effect: {lora.kind}.")
    if lora.left_out:
        notes.warn(lora.left_out)
    if any("set_weight" in parts for parts in lora.changes.values()):
        notes.warn("Some tensors take the place of weights as they are, whatever the strength.")
    return clone


def read(lora: LoraFile) -> dict[str, Tensor]:
    """What fits of a file, by names that the host knows: of the weight, and of the part."""
    stored: dict[str, StoredTensor] = {
        f"{weight}.{part}": tensor for weight, parts in lora.changes.items() for part, tensor in parts.items()
    }
    # Copies: patches outlive this run, and a file that is mapped must not be cut short meanwhile.
    tensors = {name: x.clone() for name, x in read_tensors(stored)}
    return tensors | {f"{weight}.alpha": torch.tensor(alpha) for weight, alpha in lora.alphas.items()}
