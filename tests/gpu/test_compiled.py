"""Compiled blocks make the eager ones' videos. `make gpu`; not part of CI."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo

from harness.errors import difference, mean_error
from support.core_videos import SCHEDULES, network, video

TWO_STEPS = replace(SCHEDULES["base"], steps=(2,), guidance_scale=1.0)
GRAPHS = 2  # an ordinary block's, and the last one's, which leaves the history out


@pytest.fixture
def compiled(device):
    """Networks whose blocks are compiled; on the CPU by a backend that compiles nothing."""
    backend = "inductor" if device.type == "cuda" else "eager"
    if backend == "inductor":
        pytest.importorskip("triton")

    def compile_blocks(dtype):
        model = network(device, dtype)
        for block in model.blocks:
            block.compile(dynamic=False, backend=backend)
        return model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield compile_blocks
    torch._dynamo.reset()


def test_float32_is_that_of_eager_blocks(device, compiled, record_property):
    expected = video(network(device), TWO_STEPS, device)
    error = difference(video(compiled(torch.float32), TWO_STEPS, device), expected)
    record_property("error", f"{error:.1e}")
    assert error <= 2e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == GRAPHS  # none for the second step or chunk


def test_bf16_rounds_no_worse_than_eager_blocks(device, compiled, record_property):
    exact = video(network(), TWO_STEPS, "cpu")
    eager = mean_error(video(network(device, torch.bfloat16), TWO_STEPS, device), exact)
    error = mean_error(video(compiled(torch.bfloat16), TWO_STEPS, device), exact)
    record_property("error", f"{error:.1e}, of eager blocks {eager:.1e}")
    assert 0 < error <= 1.25 * eager
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == GRAPHS
