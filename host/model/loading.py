"""From a checkpoint to a MODEL."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ...helios_core.checkpoint import Checkpoint, loaded_dtypes, open_checkpoint
from ...helios_core.devices import name_of
from ...helios_core.loading import load_weights
from ..compat import disk_policy, offer_lora_names, usual_patcher
from .base_model import SUPPORTED_DTYPES, HeliosModelConfig
from .offload_patcher import Offloading, OffloadPatcher
from .quantised import check_formats, use_quantised_layers

DtypeChoice = Literal["auto", "bf16", "fp16", "fp32", "fp8_e4m3fn"]
DTYPE_CHOICES: tuple[DtypeChoice, ...] = get_args(DtypeChoice)
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}

MAY_BE_CONVERTED = 0.05  # of the bytes, while weights still count as being on disk


def choose_dtype(choice: DtypeChoice, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype weights are kept in. `auto` asks the host, which prefers bf16 wherever the device can.

    Of a quantised checkpoint: the dtype of what is not.
    """
    if choice == "fp8_e4m3fn" and checkpoint.quantised:  # which it is already, where its maker wanted it
        choice = "auto"
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    if choice == "fp8_e4m3fn" and not management.supports_cast(device, DTYPES[choice]):
        raise ValueError(f"dtype is fp8_e4m3fn, and {name_of(device)} has no such numbers. Choose auto, bf16 or fp16.")
    if choice != "auto":
        return DTYPES[choice]
    parameters: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        parameters[tensor.dtype] += math.prod(tensor.shape)
    stored = parameters.most_common(1)[0][0]
    return management.unet_dtype(
        model_params=parameters.total(),
        supported_dtypes=SUPPORTED_DTYPES,
        weight_dtype=None if checkpoint.quantised or not management.supports_cast(device, stored) else stored,
    )


def converted_on_reading(checkpoint: Checkpoint, dtype: DtypeChoice) -> str | None:
    """The loaders' warning for `weights_in` disk where most weights are stored in another dtype than they are used in.

    None where they can be used as they lie on disk.
    """
    used = choose_dtype(dtype, checkpoint)
    targets = loaded_dtypes(checkpoint, used)
    sizes = {name: math.prod(tensor.shape) * targets[name].itemsize for name, tensor in checkpoint.tensors.items()}
    total = sum(sizes.values())
    converted = sum(sizes[name] for name, tensor in checkpoint.tensors.items() if tensor.dtype != targets[name])
    if converted <= MAY_BE_CONVERTED * total:
        return None
    name = next((name for name, known in DTYPES.items() if known == used), str(used))
    convert = "" if used == torch.float32 else f", or make a file with scripts/convert_checkpoint.py --dtype {name}"
    return (
        f"{100 * converted / total:.0f} % of the weights are stored in another dtype than they are used in ({name}), "
        f"and stay in memory. To run from disk, choose the dtype they are stored in{convert}."
    )


def load_model(
    path: str, dtype: DtypeChoice = "auto", offloading: Offloading | None = None, *, disable_dynamic: bool = False
) -> Any:
    """`make_model` of the checkpoint at a path, a file or an official folder."""
    return make_model(open_checkpoint(Path(path)), dtype, offloading, disable_dynamic=disable_dynamic)


def make_model(
    checkpoint: Checkpoint, dtype: DtypeChoice, offloading: Offloading | None = None, *, disable_dynamic: bool = False
) -> Any:
    """Read an opened checkpoint into a host ModelPatcher, or into one of ours that offloads.

    Weights stay memory-mapped where they are stored in the dtype they are used in; otherwise they are converted one
    by one, so loading takes no more than the weights in that dtype.
    """
    check_formats(checkpoint)
    offer_lora_names()
    management = comfy.model_management
    weight_dtype = choose_dtype(dtype, checkpoint)
    load_device = management.get_torch_device()
    offload_device = management.unet_offload_device()

    config = HeliosModelConfig({"image_model": "helios", "config": checkpoint.config})
    cast_dtype = management.unet_manual_cast(weight_dtype, load_device, SUPPORTED_DTYPES)
    config.set_inference_dtype(weight_dtype, cast_dtype)
    config.quantised = {name: layer.settings for name, layer in checkpoint.quantised_blocks.items()}
    model = config.get_model(None, device="meta")
    model.variant, model.files = checkpoint.variant, checkpoint.files
    model.recipe = (str(checkpoint.path), dtype, offloading)
    bar = comfy.utils.ProgressBar(len(checkpoint.tensors))
    compute_dtype = cast_dtype or weight_dtype
    marks = use_quantised_layers(model.diffusion_model, config.quantised, compute_dtype, load_device)
    load_weights(model.diffusion_model, checkpoint, weight_dtype, on_tensor=lambda: bar.update(1), marks=marks)
    model.diffusion_model.requires_grad_(False)

    model.device = offload_device
    make_patcher = comfy.model_patcher.ModelPatcher
    if offloading is not None:
        make_patcher = OffloadPatcher
    elif not disable_dynamic:
        make_patcher = usual_patcher()
    policy = disk_policy(make_patcher)
    patcher = make_patcher(model, load_device=load_device, offload_device=offload_device, **policy)
    if offloading is not None:
        patcher.offload(offloading)
    # How newer hosts make a second, independent patcher (torch.compile, multi-GPU).
    patcher.cached_patcher_init = (load_model, model.recipe)
    return patcher
