"""What the host is told a forward takes, against what torch's allocator counts."""

from pathlib import Path

import comfy.ops
import pytest
import torch

from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.host.model.base_model import MEMORY_KEY, HeliosModelConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = TransformerConfig(num_attention_heads=4, attention_head_dim=128, ffn_dim=1408, text_dim=64, num_layers=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_estimate_is_no_less_and_not_much_more_than_the_peak(monkeypatch, dtype, batch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from measure import peak_extra_bytes

    config = HeliosModelConfig({"image_model": "helios", "config": CONFIG})
    config.set_inference_dtype(dtype, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model(None)
    for parameter in model.diffusion_model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    memory = Memory(torch.randn(batch, 16, 19, 24, 40), torch.randn(batch, 16, 1, 24, 40))
    past = memory.history()
    values = {
        "history_long": past.long.to(dtype),
        "history_mid": past.mid.to(dtype),
        "history_short": past.short.to(dtype),
        "history_layout": memory.layout,
    }
    latents, text = torch.randn(batch, 16, 9, 24, 40).to(dtype), torch.randn(batch, 64, 64).to(dtype)

    def forward():
        return model.diffusion_model(latents, torch.full((batch,), 500.0), text, **values)

    with torch.inference_mode():
        forward()
        peak = peak_extra_bytes(forward)
    shapes = {name: [shape] for name, shape in model.extra_conds_shapes(**{MEMORY_KEY: memory}).items()}
    assert peak <= model.memory_required(latents.shape, shapes) <= 1.5 * peak
