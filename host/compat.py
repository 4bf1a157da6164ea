"""Every difference between versions of ComfyUI that the pack has to ask for: 0.3.75, the oldest it runs on, to 0.38.

Code elsewhere calls these and asks for no version. The one function of ComfyUI that we replace is here as well.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
from comfy_api.latest import InputImpl, io
from torch import Tensor

NEWER = ("search_aliases", "advanced")  # of schemas and inputs: 0.24 has them, 0.3.75 raises TypeError for them

NAMES_OFFERED = "helios_names_offered"  # attribute of the host's function that we replace

# What a widget does after each queued run: 0.24 can be told to begin with "increment"; 0.3.75 knows only on and off
# here, and its page then begins with "randomize".
INCREMENT = getattr(getattr(io, "ControlAfterGenerate", None), "increment", True)

# Matrix and transfer, in numbers of ITU-T H.273, of the host's own videos, which ours are to equal: where Save Video
# knows colour spaces (0.33), BT.709's and sRGB's. Before, BT.601's matrix, of which the file does not speak; ours does,
# with BT.709's transfer, so that frames come out alike wherever they are read.
SAYS_COLOURS = "color_space" in inspect.signature(InputImpl.VideoFromComponents.save_to).parameters
VIDEO_MATRIX, VIDEO_TRANSFER = (1, 13) if SAYS_COLOURS else (6, 1)


def schema(**kwargs: Any) -> io.Schema:
    """`io.Schema` without the fields this host does not know, such as `search_aliases`."""
    return io.Schema(**_known(io.Schema, kwargs))


def advanced(make: type, *args: Any, **kwargs: Any) -> Any:
    """An input that is folded away under "advanced": by newer hosts themselves, and by web/helios_fold.js."""
    known = _known(make, {**kwargs, "advanced": True})
    made = make(*args, **known)
    if "advanced" not in known:
        made.extra_dict = {"advanced": True}  # goes to the page as it is
    return made


def _known(make: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters
    return {name: value for name, value in kwargs.items() if name in parameters or name not in NEWER}


def usual_patcher() -> type[comfy.model_patcher.ModelPatcher]:
    """The class of the host's own MODELs. From 0.16 on, with dynamic VRAM, one that streams weights in."""
    patcher: type = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher


def disk_policy(make_patcher: Any) -> dict[str, bool]:
    """Arguments for a patcher: what --fast-disk says, where it is to say so for its model alone (0.38).

    Such hosts also look at the disk under a file, to read it past the computer's memory. Ours are mapped.
    """
    knows = "fast_disk" in inspect.signature(make_patcher).parameters
    return {"fast_disk": getattr(comfy.cli_args.args, "fast_disk", False)} if knows else {}


def is_dynamic(patcher: Any) -> bool:
    """Whether the host may take any weight of it away at any time (dynamic VRAM, 0.16 and later)."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def static_clone(patcher: Any) -> Any:
    """A clone whose layers do not fetch their weights themselves, as those under dynamic VRAM do (0.16 and later)."""
    knows = "disable_dynamic" in inspect.signature(patcher.clone).parameters
    return patcher.clone(disable_dynamic=True) if knows else patcher.clone()


def free_memory(patcher: Any, device: torch.device) -> float:
    """Bytes free for activations; under dynamic VRAM (0.16 and later) with those of weights, which give way to them."""
    get: Any = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return float(get(device))


def with_own_model(clip: Any) -> Any:
    """A CLIP that encodes with the model that its patcher loads. From 0.33 on Select CLIP Device gives the patcher a
    model on another card and goes on encoding with the first one, in the computer's memory."""
    patcher = getattr(clip, "patcher", None)  # which the CLIPs of some other nodes are without
    if patcher is None or clip.cond_stage_model is patcher.model:
        return clip
    moved = copy.copy(clip)
    moved.cond_stage_model = patcher.model
    return moved


def without_dynamic(disable_dynamic: bool) -> dict[str, bool]:
    """Arguments for the host's loaders: only hosts that know the option (0.16 and later) ask us to set it."""
    return {"disable_dynamic": True} if disable_dynamic else {}


def offer_lora_names() -> None:
    """Let the host's LoRA loaders know the names that a model has for its weights in LoRA files.

    A model class can offer none: the host's map of them is hard-coded (0.3.75 to 0.33). A model of ours has
    `helios_lora_names`; the maps of all others stay as they are. The only thing of the host that we replace, and once
    only, even where the pack is there twice.
    """
    original = comfy.lora.model_lora_keys_unet
    if hasattr(original, NAMES_OFFERED):
        return

    @functools.wraps(original)
    def model_lora_keys_unet(model: Any, key_map: dict | None = None, *args: Any, **kwargs: Any) -> dict:
        # The host's own default is a dict that all calls without one share.
        key_map = original(model, {} if key_map is None else key_map, *args, **kwargs)
        for name, key in getattr(model, "helios_lora_names", dict)().items():
            key_map.setdefault(name, key)
        return key_map

    setattr(model_lora_keys_unet, NAMES_OFFERED, True)
    comfy.lora.model_lora_keys_unet = model_lora_keys_unet


def lora_compute_dtype(device: torch.device) -> torch.dtype:
    """What LoRA patches are computed in. 0.24 chooses by the device; 0.3.75 has float32."""
    choose = getattr(comfy.model_management, "lora_compute_dtype", lambda device: torch.float32)
    dtype: torch.dtype = choose(device)
    return dtype


def rounding_seed(key: str) -> int:
    """What the host rounds a patched weight with. 0.24 keeps it elsewhere, and warns at every call of the old name."""
    of: Any = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
    return int(of(key))


Settings = Mapping[str, Mapping[str, Any]]
"""Of quantised layers, by name: their formats, and what files say beside."""


def _marks_layers() -> bool:
    """Whether quantised layers read their settings from the weights' dict. 0.3.75 is told them beforehand."""
    return "layer_quant_config" not in inspect.signature(comfy.ops.mixed_precision_ops).parameters


def quantised_formats() -> Collection[str]:
    """The quantised formats that the host computes with: newer ones by comfy-kitchen, and none where that is not."""
    if not getattr(comfy.quant_ops, "_CK_AVAILABLE", True):
        return ()
    formats: dict[str, Any] = comfy.quant_ops.QUANT_ALGOS
    return formats.keys()


def quantised_linear(settings: Settings, dtype: torch.dtype, device: torch.device) -> type[torch.nn.Module]:
    """The host's class of quantised Linears, which compute in dtype or, on devices that can, in their own format."""
    if not _marks_layers():
        # In full precision: with a LoRA on top its fast path is given two dtypes, and raises.
        operations = comfy.ops.mixed_precision_ops(settings, dtype, full_precision_mm=True)
    else:
        config = SimpleNamespace(quant_config={"mixed_ops": True})
        operations = comfy.ops.pick_operations(dtype, dtype, load_device=device, model_config=config)
    linear: type[torch.nn.Module] = operations.Linear
    return linear


def quantised_marks(settings: Settings) -> dict[str, Tensor]:
    """What newer hosts' quantised layers want beside their weights."""
    if not _marks_layers():
        return {}
    return {f"{layer}.comfy_quant": as_bytes(values) for layer, values in settings.items()}


def quantised_for_saving(weights: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """A network's weights as files hold them: newer hosts take quantised ones apart, 0.3.75 forgets their scales."""
    apart: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not isinstance(weight, comfy.quant_ops.QuantizedTensor):
            apart[name] = weight
            continue
        layer = name.removesuffix(".weight")
        apart[name], apart[f"{layer}.weight_scale"] = comfy.quant_ops.TensorCoreFP8Layout.get_plain_tensors(weight)
        apart[f"{layer}.comfy_quant"] = as_bytes(settings[layer])
    return apart


def as_bytes(settings: Mapping[str, Any]) -> Tensor:
    """Settings as a tensor of their text, which is how the host puts them into files."""
    return torch.tensor(list(json.dumps(dict(settings)).encode()), dtype=torch.uint8)


def room_to_pin() -> int:
    """Bytes of host memory that the host would still pin, by the count that 0.3.75 keeps; none where there is none."""
    management = comfy.model_management
    limit = getattr(management, "MAX_PINNED_MEMORY", 0) - getattr(management, "TOTAL_PINNED_MEMORY", 0)
    return max(0, int(limit))


def noise_scale(sampling: Any) -> float:
    """What a MODEL's model_sampling multiplies noise by: 1, but for a node of newer hosts (ModelNoiseScale of 0.33)."""
    return float(getattr(sampling, "noise_scale", 1.0))
