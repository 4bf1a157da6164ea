"""Triton's kernels give what plain torch gives. On a card; without one in Triton's interpreter, and so part of CI."""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

pytest.importorskip("triton")

from comfyui_helios.helios_core import elementwise
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.modulation import Modulation, Table
from comfyui_helios.helios_core.rope import rope_table
from harness.errors import difference, mean_error
from support.core_videos import LATENTS, SCHEDULES, network, video

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 9, 96, 4), (2, 7, 48, 2), (1, 3, 5120, 40)]  # batch, tokens, width, heads: one width is the 14B model's
EPS = 1e-6
# How much worse than plain torch bf16 may be: a kernel and a video. Triton's interpreter cuts off where a card rounds.
WORSE, WORSE_VIDEO = (1.05, 1.1) if torch.cuda.is_available() else (2.1, 2.5)


@pytest.fixture
def fused():
    """A card's, or the interpreter's."""
    with torch.inference_mode():
        from comfyui_helios.helios_core import fused

        yield fused


def inputs(device, batch, tokens, width, dtype):
    """x, update, two modulations of which the history has the first 4 tokens, and norms with weights."""
    rng = torch.Generator().manual_seed(batch * tokens * width)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=rng).to(device, dtype)

    rows = random(1, 2, width, dtype=torch.float32), random(batch, 2, width, dtype=torch.float32)
    shift, scale = Modulation(*rows, min(4, tokens)).chunk(Table(random(1, 2, width, dtype=torch.float32)))
    layer_norm = nn.LayerNorm(width, eps=EPS, device=device)
    rms_norm = nn.RMSNorm(width, eps=EPS, device=device, dtype=dtype)
    for parameter in (layer_norm.weight, layer_norm.bias, rms_norm.weight):
        parameter.copy_(random(width))
    return random(batch, tokens, width), random(batch, tokens, width), shift, scale, layer_norm, rms_norm


def calls(x, update, shift, scale, layer_norm, rms_norm, heads):
    """Every function, by name, with arguments of its own to overwrite: what it returns."""
    half = x.shape[-1] // heads // 2
    rope = rope_table([0], 1, x.shape[1], (0, 0, 2 * half), 1e4, device=x.device)
    start = min(2, x.shape[1] - 1)
    return {
        "modulated_norm": lambda by: by.modulated_norm(x, shift, scale, EPS),
        "modulated_norm_of_a_part": lambda by: by.modulated_norm(x[:, start:], shift, scale, EPS),
        "gated_residual": lambda by: by.gated_residual(x, update.clone(), shift),
        "gated_residual_norm": lambda by: torch.cat(
            by.gated_residual_norm(x, update.clone(), shift, layer_norm, start), dim=1
        ),
        "residual_modulated_norm_": lambda by: torch.cat(
            [x2 := x.clone(), by.residual_modulated_norm_(x2, update[:, start:], start, shift, scale, EPS)], dim=1
        ),
        "rms_norm_rope": lambda by: by.rms_norm_rope(x.clone(), rms_norm, rope, heads),
        "rms_norm": lambda by: by.rms_norm_rope(x.clone(), rms_norm, None, heads),
    }


@pytest.mark.parametrize("name", calls(*[torch.zeros(1, 2, 2)] * 2, *[None] * 4, 1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_kernel_rounds_once(fused, device, name, shape):
    batch, tokens, width, heads = shape
    for dtype in DTYPES:
        given = inputs(device, batch, tokens, width, dtype)
        exact = [x.float() if isinstance(x, torch.Tensor) else x for x in given]
        exact[-1] = nn.RMSNorm(width, eps=EPS, device=device)
        exact[-1].weight.copy_(given[-1].weight)
        before = given[0].clone()
        found = calls(*given, heads)[name](fused)
        assert found.dtype == dtype
        assert torch.equal(given[0], before)
        expected = calls(*exact, heads)[name](elementwise)
        if dtype == torch.float32:
            assert difference(found, expected) <= 4e-6
        else:
            plain = calls(*given, heads)[name](elementwise)
            assert 0 < mean_error(found.float(), expected) <= WORSE * mean_error(plain.float(), expected)


@pytest.fixture
def launched(fused, monkeypatch):
    """Every kernel that has run, by name."""
    names, launch = [], fused._launch

    def noting(kernel, x, *args):
        names.append(kernel.fn.__name__)
        launch(kernel, x, *args)

    monkeypatch.setattr(fused, "_launch", noting)
    return names


def plain_network(*args, **config):
    model = network(*args, **config)
    for block in model.blocks:
        block.fuse = False
    return model


KERNELS = 7  # of a block: modulated norm and gated residual twice, q and k of self-attention, q of cross-attention
NETWORKS = {"usual": {}, "amplified": {"is_amplify_history": True}, "all_see_text": {"guidance_cross_attn": False}}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_float32_is_that_of_plain_torch(device, launched, config, record_property):
    rng = torch.Generator().manual_seed(1)
    memory = Memory.empty(2, *LATENTS).push(torch.randn(2, 16, 9, *LATENTS, generator=rng)).to(device)
    latents, text = torch.randn(2, 16, 9, 4, 4, generator=rng), torch.randn(2, 12, 32, generator=rng)
    given = [x.to(device) for x in (latents, torch.tensor([700.0, 300.0]), text)]
    with torch.inference_mode():
        expected = plain_network(device, **config)(*given, memory.history())
        found = network(device, **config)(*given, memory.history())
    error = difference(found, expected)
    record_property("error", f"{error:.1e}")
    assert error <= 1e-5
    assert len(launched) >= 2 * KERNELS


def test_bf16_rounds_no_worse_than_plain_torch(device, launched, record_property):
    schedule = replace(SCHEDULES["distilled"], amplify_first_chunk=False)
    exact = video(plain_network(), schedule, "cpu", chunks=1)
    plain = mean_error(video(plain_network(device, torch.bfloat16), schedule, device, chunks=1), exact)
    error = mean_error(video(network(device, torch.bfloat16), schedule, device, chunks=1), exact)
    record_property("error", f"{error:.1e}, of plain torch {plain:.1e}")
    assert 0 < error <= WORSE_VIDEO * plain
    assert len(launched) >= 3 * 2 * KERNELS


class Doubling(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_norm_that_does_more_is_called(fused, device):
    x, update, gate, _, layer_norm, rms_norm = inputs(device, 1, 9, 96, torch.float32)
    doubling = Doubling(96, eps=EPS, device=device)
    hooked = rms_norm.register_forward_hook(lambda module, args, result: 3 * result)
    layer_norm.forward = lambda x: 5 * x
    for by in (fused, elementwise):
        torch.testing.assert_close(
            by.rms_norm_rope(x.clone(), doubling, None, 4).flatten(2), 2 * nn.functional.rms_norm(x, (96,), eps=EPS)
        )
        normed = by.rms_norm_rope(x.clone(), rms_norm, None, 4).flatten(2)
        torch.testing.assert_close(normed, 3 * nn.functional.rms_norm(x, (96,), rms_norm.weight, eps=EPS))
        summed, normed = by.gated_residual_norm(x, update.clone(), gate, layer_norm, 2)
        torch.testing.assert_close(normed, 5 * summed[:, 2:])
    hooked.remove()


def test_what_needs_a_gradient_or_is_compiled_is_plain(device):
    x = torch.randn(1, 3, 8, device=device)
    assert elementwise.fused_where_possible(x) is elementwise
    with torch.inference_mode():
        assert elementwise.fused_where_possible(x) is not elementwise
        assert elementwise.fused_where_possible(x.transpose(1, 2)) is elementwise
        compiled = torch.compile(lambda x: x + (elementwise.fused_where_possible(x) is elementwise), backend="eager")
        torch.testing.assert_close(compiled(x), x + 1)
