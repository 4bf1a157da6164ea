"""Group offloading on a card: copies on a stream of their own, from pinned memory. `make test-gpu`; not part of CI."""

import pytest
import torch
from torch import nn

from comfyui_helios.helios_core.offload import Offloader


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_on_cuda(level, gather):
    torch.manual_seed(0)
    holder = nn.Module()
    holder.net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12))).requires_grad_(False)
    x = torch.randn(4096, 2048, device="cuda")
    with Offloader(holder, "cuda", level=level, gather=gather) as offloader:
        for _ in range(3):
            streamed = holder.net(x)
        assert offloader.pinned == (12 * offloader.buffer_size if gather else 0)
    assert torch.equal(streamed, holder.net.cuda()(x))


def test_transforms_and_small_layers_on_cuda():
    """Kernels shorter than their copies, a transform for every weight, and work that is pending when it begins."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24))).requires_grad_(False)
    transforms = {name: lambda weight: weight * 1.5 for name, _ in holder.named_parameters()}
    x = torch.randn(1, 1024, device="cuda")
    for gather in (True, False):
        pending = torch.randn(8192, 8192, device="cuda")
        for _ in range(8):
            pending = pending @ pending / 90
        del pending  # its memory is free for the buffers while it is still being computed
        with Offloader(holder, "cuda", level="leaf", gather=gather, transforms=transforms) as offloader:
            results = [holder.net(x) for _ in range(5)]
            assert len(offloader.groups) == 24
        expected = x
        for layer in holder.net:
            expected = expected @ (layer.weight.cuda() * 1.5).T
        for result in results:
            torch.testing.assert_close(result, expected)
