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
        assert offloader.report().pinned == (12 * offloader.buffer_size if gather else 0)
    assert torch.equal(streamed, holder.net.cuda()(x))
