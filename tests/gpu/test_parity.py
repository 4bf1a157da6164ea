"""A card makes the videos that the CPU makes in float32, of every variant. `make gpu`; not part of CI."""

import functools

import pytest
import torch

from comfyui_helios.helios_core.history import Memory
from harness.errors import difference, mean_error
from support.core_videos import LATENTS, SCHEDULES, network, video

CPU = torch.device("cpu")
TOLERANCE = 2e-5  # of the largest value; processors differ by 7e-7 here
ROUNDING = 1.5  # times the error that bf16 has on the CPU; kernels of one processor differ by a tenth


@functools.cache
def made(variant, device, dtype=torch.float32):
    return video(network(device, dtype), SCHEDULES[variant], device)


@pytest.mark.parametrize("variant", SCHEDULES)
def test_float32_is_that_of_the_processor(variant, device, record_property):
    error = difference(made(variant, device), made(variant, CPU))
    record_property("error", f"{error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("variant", SCHEDULES)
def test_bf16_rounds_no_worse_than_the_processor(variant, device, record_property):
    exact = made(variant, CPU)
    error, of_processor = (mean_error(made(variant, place, torch.bfloat16), exact) for place in (device, CPU))
    record_property("error", f"{error:.1e}, of the processor {of_processor:.1e}")
    assert 0 < error <= ROUNDING * of_processor


def test_amplified_history(device):
    rng = torch.Generator().manual_seed(1)
    memory = Memory.empty(2, *LATENTS).push(torch.randn(2, 16, 9, *LATENTS, generator=rng))
    latents, text = torch.randn(2, 16, 9, 4, 4, generator=rng), torch.randn(2, 12, 32, generator=rng)
    timestep = torch.tensor([700.0, 300.0])

    @torch.inference_mode()
    def flow(place):
        model = network(place, is_amplify_history=True)
        inputs = (x.to(place) for x in (latents, timestep, text))
        return model(*inputs, memory.to(place).history()).cpu()

    assert difference(flow(device), flow(CPU)) <= TOLERANCE
