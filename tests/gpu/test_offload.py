"""Group offloading on a card: copies on a stream of their own, from pinned memory. `make gpu`; not part of CI."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from support.core_videos import SCHEDULES, network, video

pytest.importorskip("accelerate")

from comfyui_helios.helios_core.offload import Offloader

NORMS = 512  # bytes: more than a norm has here, less than a matrix


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_layers(level, gather, device):
    torch.manual_seed(0)
    width = 2048 if device.type == "cuda" else 512
    holder = nn.Module()
    holder.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(12))).requires_grad_(False)
    x = torch.randn(2 * width, width, device=device)
    with Offloader(holder, device, level=level, gather=gather) as offloader:
        for _ in range(3):
            streamed = holder.net(x)
        assert offloader.pinned == (12 * offloader.buffer_size if gather and device.type == "cuda" else 0)
    assert torch.equal(streamed, holder.net.to(device)(x))


def test_transforms_and_small_layers(device):
    """Kernels shorter than their copies, a transform for every weight, and work that is pending when it begins."""
    torch.manual_seed(0)
    pending_width = 8192 if device.type == "cuda" else 512
    holder = nn.Module()
    holder.net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24))).requires_grad_(False)
    transforms = {name: lambda weight: weight * 1.5 for name, _ in holder.named_parameters()}
    x = torch.randn(1, 1024, device=device)
    for gather in (True, False):
        pending = torch.randn(pending_width, pending_width, device=device)
        for _ in range(8):
            pending = pending @ pending / 90
        del pending  # its memory is free for the buffers while it is still being computed
        with Offloader(holder, device, level="leaf", gather=gather, transforms=transforms) as offloader:
            results = [holder.net(x) for _ in range(5)]
            assert len(offloader.groups) == 24
        expected = x
        for layer in holder.net:
            expected = expected @ (layer.weight.to(device) * 1.5).T
        for result in results:
            torch.testing.assert_close(result, expected)


def quick_video(model, device, **options):
    return video(model, replace(SCHEDULES["distilled"], amplify_first_chunk=False), device, chunks=1, **options)


@functools.cache
def resident_video(device):
    return quick_video(network(device, torch.bfloat16), device)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_a_video_has_the_same_bits(level, gather, device):
    model = network("cpu", torch.bfloat16)
    # Norms stay on the device, as the real network's do: fused kernels read their weights there.
    with Offloader(model, device, level=level, gather=gather, keep_below=NORMS):
        assert torch.equal(quick_video(model, device, prepare_prompts=False), resident_video(device))
