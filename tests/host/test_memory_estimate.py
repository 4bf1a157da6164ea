"""What the host is told that a forward takes: token by token, and against what torch's allocator counts."""

from pathlib import Path

import comfy.ops
import pytest
import torch

from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.history import HistoryLayout, Memory
from comfyui_helios.host.model.base_model import MEMORY_KEY, HeliosModel, HeliosModelConfig
from comfyui_helios.host.model.loading import load_model
from support.runs import QUICK, make_distilled, sample

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = TransformerConfig(num_attention_heads=4, attention_head_dim=128, ffn_dim=1408, text_dim=64, num_layers=2)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 2)])
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(make_distilled(tmp_path_factory.mktemp("models") / "Helios-Distilled")), "fp32")


def test_memory_estimate_counts_every_token(model):
    """Noisy 540 / 2160 / 8640 tokens at 384 x 640, history 2400 in every stage, and longer histories if asked for."""
    network = model.model.diffusion_model
    token = HeliosModel.memory_required(model.model, [1, 16, 1, 2, 2])
    assert token >= network.config.inner_dim * 4 * 5

    def tokens(scale, layout):
        shapes = model.model.extra_conds_shapes(**{MEMORY_KEY: Memory.empty(1, 48, 80, layout)})
        noisy = [1, 16, 9, 48 // scale, 80 // scale]
        return HeliosModel.memory_required(model.model, noisy, {k: [v] for k, v in shapes.items()}) / token

    assert [tokens(scale, HistoryLayout()) for scale in (4, 2, 1)] == pytest.approx([2940, 4560, 11040])
    assert tokens(1, HistoryLayout((64, 64, 64))) == pytest.approx(8640 + 16 * 60 + 32 * 240 + 65 * 960)


def test_the_host_is_told_of_the_history_before_it_loads(model, monkeypatch):
    asked = []
    right = HeliosModel.memory_required

    def memory_required(self, input_shape, cond_shapes=None):
        asked.append({name: len(shapes) for name, shapes in (cond_shapes or {}).items()})
        return right(self, input_shape, cond_shapes)

    monkeypatch.setattr(HeliosModel, "memory_required", memory_required)
    sample(model, QUICK)
    _, first, *_ = asked  # before it comes our own question, whether a chunk has room at all
    assert set(first) >= {"history_long", "history_mid", "history_short"}
