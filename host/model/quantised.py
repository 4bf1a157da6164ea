"""Quantised layers of a checkpoint, as the host's own: its fp8, nvfp4 and int8 products, its LoRAs on top of them."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...helios_core.checkpoint import Checkpoint
from ...helios_core.devices import name_of
from ...helios_core.loading import replace_layers
from ...helios_core.regular_file import CheckpointError
from ..compat import Settings, quantised_formats, quantised_linear, quantised_marks

# The oldest ComfyUI that was seen to compute with a format.
SINCE = {
    **dict.fromkeys(("float8_e5m2", "mxfp8", "nvfp4"), "0.24"),
    **dict.fromkeys(("int8_tensorwise", "convrot_w4a4"), "0.28"),
    "asym_w4a8_int8": "0.33",
}
NOT_TRACED = ("convrot_w4a4", "asym_w4a8_int8")  # comfy-kitchen's products that torch.compile cannot see into
IN_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "asym_w4a8_int8")  # their weights, or the scales of them


class InEitherMode(nn.Module):
    """Quantised weights that can be computed with in inference mode and moved outside of it.

    The host runs nodes in inference mode, and unloads models from without when it is asked to free memory: what is made
    of such a weight in one mode then raises in the other. What is made in inference mode works in both.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, QuantizedTensor) and not param.is_inference():
            names, context = param.__tensor_flatten__()
            inner = {part: getattr(param, part) for part in names}
            with torch.inference_mode():
                again = QuantizedTensor.__tensor_unflatten__(inner, context, param.size(), param.stride())
                param = nn.Parameter(again, requires_grad=False)
        super().register_parameter(name, param)

    def _apply(self, *args: Any, **kwargs: Any) -> InEitherMode:
        with torch.inference_mode():
            return super()._apply(*args, **kwargs)


def check_formats(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where this host, or its device, cannot compute with a quantised layer."""
    known, device = quantised_formats(), comfy.model_management.get_torch_device()
    has_float8 = comfy.model_management.supports_cast(device, torch.float8_e4m3fn)
    for name, layer in checkpoint.quantised_blocks.items():
        if layer.format in IN_FLOAT8 and not has_float8:
            raise CheckpointError(
                f"{checkpoint.path} has {name} in {layer.format}, and {name_of(device)} has no such numbers. Use bf16 "
                "weights."
            )
        if layer.format not in known:
            since = SINCE.get(layer.format, "0.3.75")
            raise CheckpointError(
                f"{checkpoint.path} has {name} in {layer.format}, which this ComfyUI does not compute with: that needs "
                f"ComfyUI {since} or newer, with comfy-kitchen installed. Update it, or use bf16 weights or scaled fp8 "
                "ones (float8_e4m3fn)."
            )


def use_quantised_layers(
    network: nn.Module, settings: Settings, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Put the host's quantised layers into a network that is on meta; returns what loading must give them beside.

    settings: of the layers. dtype: that they compute in. All other layers stay the host's ordinary ones: its quantised
    kind would keep what is not quantised in the dtype it computes in.
    """
    if not settings:
        return {}
    linear: Any = type("Linear", (InEitherMode, quantised_linear(settings, dtype, device)), {})
    # On the CPU: what they are given they move to where they were made, and away from the file they are mapped to.
    replace_layers(network, settings, lambda _, old: linear(old.in_features, old.out_features, device="cpu"))
    return quantised_marks(settings)
