"""The fused kernels have the weights of ComfyUI's norms: as they are, cast, or with a LoRA that is added in use."""

from __future__ import annotations

import os
import subprocess
import sys

import comfy.ops
import pytest
import torch

from comfyui_helios.host.model.network import lending

fused = pytest.importorskip("comfyui_helios.helios_core.fused")  # where there is Triton

WIDTH = 8
# A chunk by the kernels in Triton's interpreter, which must be chosen before Triton is imported. How far it is from one
# without them, and how often norms were called beyond once a block, for the keys of the prompt.
BY_KERNELS = """
import sys
from dataclasses import replace
import torch
from harness.pack import load_comfyui, load_pack
load_pack()
load_comfyui(sys.argv[1])
import comfy.ops
from comfyui_helios.helios_core import elementwise, fused
from comfyui_helios.helios_core.transformer import HeliosTransformer
from comfyui_helios.host.model.network import HeliosNetwork
from comfyui_helios.helios_core.schedule import BASE
from harness.errors import difference
from harness.tiny import make_loud
from support.core_videos import CONFIG, video

exact = make_loud(HeliosTransformer(CONFIG), seed=0)

def made_with(operations):
    network = HeliosNetwork(CONFIG, torch.float32, "cpu", operations).eval()
    network.load_state_dict(exact.state_dict())
    network.forward = lambda *args, **kwargs: HeliosTransformer.forward(network, *args, **kwargs)
    if operations.LayerNorm.comfy_cast_weights:
        network.blocks[0].attn1.norm_q.weight_function = [lambda weight: 2 * weight]
    return video(network, replace(BASE, steps=(1,), guidance_scale=1.0), "cpu", chunks=1)

called = []
for kind in (comfy.ops.disable_weight_init.LayerNorm, comfy.ops.disable_weight_init.RMSNorm):  # manual_cast's are these
    forward = kind.forward
    kind.forward = lambda *args, forward=forward: called.append(args) or forward(*args)

for operations in (comfy.ops.disable_weight_init, comfy.ops.manual_cast):
    chosen, elementwise.fused_where_possible = elementwise.fused_where_possible, lambda x: elementwise
    expected = made_with(operations)
    elementwise.fused_where_possible = chosen
    called.clear()
    print(difference(made_with(operations), expected), len(called) - len(exact.blocks))
"""


@pytest.mark.parametrize("operations", [comfy.ops.disable_weight_init, comfy.ops.manual_cast])
@pytest.mark.parametrize(("name", "kind"), [("RMSNorm", torch.nn.RMSNorm), ("LayerNorm", torch.nn.LayerNorm)])
def test_what_is_lent_is_what_the_norm_computes_with(operations, name, kind):
    norm = lending(getattr(operations, name))(WIDTH, eps=1e-6, dtype=torch.bfloat16)
    norm.requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(WIDTH, generator=rng))
    x = torch.randn(3, WIDTH, generator=rng, dtype=torch.bfloat16)
    norm.weight_function = [lambda weight: weight + 1]  # as of a LoRA on a model that is not loaded whole
    with fused._lent(norm, kind, x.device, x.dtype) as (weight, bias):
        more = {} if bias is None else {"bias": bias}
        function = getattr(torch.nn.functional, {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm"}[name])
        assert torch.equal(function(x, (WIDTH,), weight, eps=norm.eps, **more), norm(x))
    with fused._lent(norm, kind, x.device, torch.float32) as (weight, _):
        assert weight.dtype == torch.float32


def test_a_norm_that_does_more_is_called():
    for spoil in (
        lambda norm: norm.register_forward_hook(lambda *_: None),
        lambda norm: norm.register_forward_pre_hook(lambda *_: None),
        lambda norm: setattr(norm, "forward", lambda x: x),
    ):
        norm = lending(comfy.ops.manual_cast.RMSNorm)(WIDTH, eps=1e-6)
        spoil(norm)
        with fused._lent(norm, torch.nn.RMSNorm, torch.device("cpu"), torch.float32) as weights:
            assert weights is None


def test_the_kernels_norm_in_place_of_comfyuis_norms(tmp_path):
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", BY_KERNELS, tmp_path]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for line in run.stdout.splitlines()[-2:]:
        error, called = line.split()
        assert float(error) <= 2e-5 and int(called) == 0
