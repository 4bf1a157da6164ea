"""What the 14B model needs of a card by the pack's own estimate, for each format and way of offloading:
`python benchmarks/fits.py`.

Computed, not measured: weights that are on the card, or group offloading's buffers, and what ComfyUI is told that a
forward takes (`HeliosModel.memory_required`) at 384x640 with one prompt, its keys and values kept where they can be.
Nothing is allocated. The text encoder has gone by then, and the VAE's turn comes later.
"""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import paths  # noqa: F401
import torch
from quantisers import QUANTISERS, planned_parts

GB = 1e9
KEPT = 3  # blocks at either end, by scripts/convert_checkpoint.py
FORMATS: dict[str, tuple[str, int] | None] = {  # --quant, and how many blocks are kept at either end
    "bf16": None,
    **{quant: (quant, KEPT) for quant in QUANTISERS},
    **{f"{quant}, all blocks": (quant, 0) for quant in QUANTISERS},
}
LEVELS: tuple[Literal["block", "leaf"] | None, ...] = (None, "block", "leaf")


def network(made: tuple[str, int] | None) -> Any:
    """The 14B on meta, quantised but for some blocks."""
    from comfyui_helios.helios_core.config import TransformerConfig
    from comfyui_helios.helios_core.loading import replace_layers
    from comfyui_helios.helios_core.transformer import HeliosTransformer

    model = HeliosTransformer(TransformerConfig(), dtype=torch.bfloat16, device="meta").requires_grad_(False)
    quant, kept = made or ("", len(model.blocks))
    for block in model.blocks[kept : len(model.blocks) - kept]:
        linears = [name for name, x in block.named_modules() if isinstance(x, torch.nn.Linear)]
        replace_layers(block, linears, lambda name, linear: packed(quant, linear))
    return model


def packed(quant: str, linear: torch.nn.Linear) -> torch.nn.Module:
    """What has the parameters that a Linear has in a format."""
    quantiser, size = QUANTISERS[quant], (linear.out_features, linear.in_features)
    layer = torch.nn.Module()
    layer.bias = linear.bias
    for part, (dtype, shape) in planned_parts(quantiser, quantiser.settings(size[1]), *size).items():
        values = torch.empty(shape, dtype=dtype, device="meta")
        setattr(layer, part, torch.nn.Parameter(values, requires_grad=False))
    return layer


def activations(cached: bool) -> float:
    """Bytes that ComfyUI is told a forward takes. cached: with a prompt's keys and values."""
    from comfyui_helios.helios_core.config import NATIVE_HEIGHT, NATIVE_WIDTH, SPATIAL_SCALE, TransformerConfig
    from comfyui_helios.helios_core.history import Memory
    from comfyui_helios.host.model.base_model import TEXT_CACHED_KEY, HeliosModelConfig, history_shapes

    config = HeliosModelConfig({"image_model": "helios", "config": TransformerConfig()})
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(None, device="meta")
    height, width = NATIVE_HEIGHT // SPATIAL_SCALE, NATIVE_WIDTH // SPATIAL_SCALE
    shapes = {name: [shape] for name, shape in history_shapes(Memory.empty(1, height, width)).items()}
    if cached:
        shapes[TEXT_CACHED_KEY] = [[1, 512]]
    return float(model.memory_required((1, 16, 9, height, width), shapes))


def main() -> None:
    from harness.pack import load_comfyui, load_pack

    with tempfile.TemporaryDirectory() as folder:
        load_pack()
        load_comfyui(folder)
        from comfyui_helios.helios_core.offload import Offloader

        print("| format | group_offload | weights on the card | with a forward |\n|---|---|---:|---:|")
        for name, made in FORMATS.items():
            model = network(made)
            for level in LEVELS:
                weights = sum(x.nbytes for x in model.parameters())
                if level is not None:
                    weights = Offloader(model, "cpu", level=level).device_size
                whole = weights + activations(cached=level is None)
                print(f"| {name} | {level or 'off'} | {weights / GB:.1f} GB | {whole / GB:.1f} GB |")


if __name__ == "__main__":
    main()
