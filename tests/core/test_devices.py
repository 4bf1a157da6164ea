"""The chunk loop on a pretended card: everything is where it should be, as what it should be, and no step waits."""

import copy
import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_helios.helios_core import elementwise, layers, rope, solver
from comfyui_helios.helios_core import generate as loop
from comfyui_helios.helios_core import transformer as transformer_module
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.drift import AntiDrift
from comfyui_helios.helios_core.generate import Run, generate
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.pyramid import block_noise, double
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID
from comfyui_helios.helios_core.transformer import HeliosTransformer
from harness import oracle
from support.core_videos import QUICK
from support.mps_kernels import runs_on_mps
from support.pretended_card import (
    CARD,
    check_step,
    needs_cuda_build,
    pretended_card,
    tensors_in,
    watch_dtypes,
    without_wide_numbers,
)

CHUNKS = 2
PROMPTS_OF_THE_TEST = {"up: the test": 2}


@pytest.fixture
def card():
    with torch.inference_mode(), pretended_card() as card:
        yield card


def network(dtype=torch.float32, device=CARD):
    net = HeliosTransformer(TransformerConfig(**oracle.TINY), dtype=dtype, device=device)
    return net.eval().requires_grad_(False)


def sample(schedule, dtype=torch.float32, prepared=True, net=None, chunks=CHUNKS):
    net = net or network(dtype)
    watch_dtypes(net, dtype)
    texts = [x.to(CARD, dtype) for x in oracle.prompts()]
    if prepared:
        texts = [net.prepare_text(text) for text in texts]

    def bind(index, history):
        past = net.prepare_history(history.to(dtype)) if prepared else history.to(dtype)

        def predict(latents, timestep, sigma):
            timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)
            flows = [net(latents.to(dtype), timesteps, text, past).float() for text in texts[: 1 + schedule.guided]]
            return schedule.guide(*flows) if schedule.guided else flows[0]

        return predict

    memory = Memory.empty(1, 8, 8).to(CARD)
    for chunk in generate(bind, Run(schedule, memory, chunks, torch.Generator().manual_seed(0)), on_step=check_step):
        for x in (chunk.latents, chunk.memory.latents, chunk.memory.anchor):
            assert (x.device, x.dtype) == (CARD, torch.float32)


def crossings(schedule, chunks=CHUNKS):
    """All that may go between host and card; noise comes from the CPU, so that a seed is the same on every machine."""
    stages = len(schedule.steps)
    return PROMPTS_OF_THE_TEST | {
        "up: Memory.to": 1,
        "up: generate": chunks,  # noise
        **({"up: renoise": chunks * (stages - 1)} if stages > 1 else {}),
        "up: HeliosTransformer.rope": 3 + stages,  # for each part of the history and each size of a chunk
        "wait: check_finite": chunks,
    }


DRIFT = {"wait: AntiDrift.observe": 2 * CHUNKS, "up: AntiDrift.correct": CHUNKS - 1}  # of mean and variance; noise


RUNS = {
    "base": (replace(BASE, steps=(3,)), torch.float32, True, {}),
    "base by Euler, nothing prepared": (
        replace(BASE, steps=(3,), guidance_scale=1.0, solver="euler"),
        torch.bfloat16,
        False,
        {},
    ),
    "mid": (replace(MID, steps=(3, 1, 2)), torch.bfloat16, True, {}),
    "distilled, amplified": (replace(DISTILLED, steps=(1, 1, 1)), torch.bfloat16, True, {}),
    "distilled, drifting": (replace(QUICK, anti_drift=AntiDrift()), torch.float32, False, DRIFT),
}


@needs_cuda_build
@pytest.mark.parametrize(("schedule", "dtype", "prepared", "more"), RUNS.values(), ids=RUNS.keys())
def test_only_noise_goes_up_while_chunks_are_made(card, schedule, dtype, prepared, more):
    sample(schedule, dtype, prepared)
    card.check(crossings(schedule) | more)


@needs_cuda_build
@pytest.mark.parametrize(("schedule", "dtype", "prepared", "more"), RUNS.values(), ids=RUNS.keys())
def test_a_run_on_a_card_like_apples(card, schedule, dtype, prepared, more):
    """Without float64 and complex numbers, and with the operations that such a card has."""
    with without_wide_numbers(card):
        sample(schedule, dtype, prepared)
    card.check(crossings(schedule) | more)
    assert card.kernels
    assert not [name for name in card.kernels if not runs_on_mps(name)]
    assert not runs_on_mps("segment_reduce")


@needs_cuda_build
@pytest.mark.parametrize(
    ("there", "told"), [((solver, "NO_FLOAT64"), "float64"), ((rope, "COMPLEX"), "Complex numbers")]
)
def test_on_such_a_card_either_is_noticed(card, monkeypatch, there, told):
    with without_wide_numbers(card), monkeypatch.context() as patch:
        patch.setattr(*there, () if told == "float64" else (CARD.type,))
        with pytest.raises(AssertionError, match=f"{told} on the card"):
            sample(QUICK, chunks=1)


class Dtypes(TorchDispatchMode):
    """Of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tensors_in((result,))}
        return result


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_apples_and_intels_are_such_cards(kind):
    with FakeTensorMode(), Dtypes() as dtypes:
        x = torch.zeros(1, 4, 2, 8, device=kind)
        solver.dmd_step(x, x, 0.9, 0.5, x)
        rope.apply_rope_(x, torch.zeros(2, 4, 4, device=kind))
    assert dtypes.seen == {torch.float32}


def noise_left_behind(latents, alpha, beta, gamma, rng):
    latents = double(latents)
    return alpha * latents + beta * block_noise(latents.shape, gamma, rng)


def asking(question):
    def step(latents, flow, *rest, original=loop.dmd_step):
        question(flow)
        return original(latents, flow, *rest)

    return step


def half(function):
    return lambda *args: function(*args).bfloat16()


def half_norm(x, shift, scale, eps):
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return shift.apply_(torch.Tensor.add_, scale.apply_(lambda part, row: part.mul_(1 + row), normed))


IN_EACH_STEP = "denoise_stage, 3 times, 0 expected: aten."
AT = "at helios_core/generate.py:"
MISTAKES = {
    "noise stays on the CPU": (
        (loop, "renoise", noise_left_behind),
        ("A tensor was left on the CPU, (1, 16, 9, 4, 4) torch.float32 on cpu, in aten.add.Tensor", AT),
    ),
    "a number is asked for": (
        (loop, "dmd_step", asking(lambda flow: flow.mean().item())),
        (f"wait: {IN_EACH_STEP}_local_scalar_dense.default of () torch.float32 on cuda:0", AT),
    ),
    "an answer is asked for": (
        (loop, "dmd_step", asking(lambda flow: bool(flow.isnan().any()))),
        (f"wait: {IN_EACH_STEP}_local_scalar_dense.default of () torch.bool on cuda:0", AT),
    ),
    "two tensors are compared": (
        (loop, "dmd_step", asking(lambda flow: torch.equal(flow, flow))),
        (f"wait: {IN_EACH_STEP}equal.default of (1, 16, 9, 2, 2) torch.float32 on cuda:0", AT),
    ),
    "a mask selects": (
        (loop, "dmd_step", asking(lambda flow: flow[flow > 0])),
        ("A size that only the card knows: aten.index.Tensor of (1, 16, 9, 2, 2) torch.float32 on cuda:0", AT),
    ),
    "a tensor comes down": (
        (loop, "dmd_step", asking(lambda flow: flow.cpu())),
        (f"down: {IN_EACH_STEP}_to_copy.default of (1, 16, 9, 2, 2) torch.float32 on cuda:0", AT),
    ),
    "a tensor comes down into another": (
        (loop, "dmd_step", asking(lambda flow: torch.empty(9).copy_(flow[0, 0, :, 0, 0]))),
        (f"down: {IN_EACH_STEP}copy_.default of (9,) torch.float32 on cuda:0", AT),
    ),
    "a tensor goes up": (
        (loop, "dmd_step", asking(lambda flow: torch.tensor([0.5], device=flow.device))),
        (f"up: {IN_EACH_STEP}_to_copy.default of (1,) torch.float32 on cpu", AT),
    ),
    "float64": (
        (loop, "dmd_step", lambda latents, flow, *_: latents.double() - flow),
        ("float64 on the card, in aten._to_copy.default", AT),
    ),
    "latents in half precision": (
        (loop, "dmd_step", half(loop.dmd_step)),
        ("result of the step at sigma 0.9978 is (1, 16, 9, 2, 2) torch.bfloat16 on cuda:0; expected torch.float32",),
    ),
    "time embedding in half precision": (
        (layers.TimestepEmbedding, "forward", half(layers.TimestepEmbedding.forward)),
        ("condition_embedder.time_embedder returns (1, 48) torch.bfloat16 on cuda:0; expected torch.float32",),
    ),
    "rope tables in half precision": (
        (transformer_module, "rope_table", half(transformer_module.rope_table)),
        ("blocks.0 is given the rope table (2, 49, 12) torch.bfloat16 on cuda:0; expected torch.float32",),
    ),
    "a norm in half precision": (
        (elementwise, "modulated_norm", half_norm),
        ("A layer norm of (1, 49, 48) torch.bfloat16 on cuda:0, expected torch.float32", "at helios_core/layers.py:"),
    ),
    "a residual stream in float32": (
        (elementwise, "gated_residual", lambda x, update, gate: gate.apply_(Tensor.mul_, update.float()).add_(x)),
        ("blocks.0.attn2.to_q is given (1, 9, 48) torch.float32 on cuda:0; expected torch.bfloat16",),
    ),
}


@needs_cuda_build
@pytest.mark.parametrize(("planted", "told"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_noticed_by_name_and_place(card, monkeypatch, planted, told):
    monkeypatch.setattr(*planted)
    with pytest.raises(AssertionError) as caught:
        sample(QUICK, torch.bfloat16, chunks=1)
        card.check(crossings(QUICK, chunks=1))
    assert all(part in str(caught.value) for part in told), caught.value


@needs_cuda_build
def test_weights_left_on_the_cpu_are_noticed(card):
    net = network()
    net.blocks[1].attn2.to_k = nn.Linear(48, 48, device="cpu")
    with pytest.raises(AssertionError, match=re.compile("left on the CPU.*SelfOrCrossAttention.keys_values", re.S)):
        sample(QUICK, net=net)


@needs_cuda_build
def test_a_copy_on_another_device_has_rope_tables_of_its_own(card):
    here = network(device="cpu")
    history = Memory.empty(1, 8, 8)
    here.prepare_history(history.history())
    there = copy.deepcopy(here).to(CARD)
    assert there.prepare_history(history.to(CARD).history()).rope.device == CARD
    assert here.prepare_history(history.history()).rope.device.type == "cpu"


@needs_cuda_build
def test_weights_of_another_dtype_are_noticed(card):
    net = network(torch.bfloat16)
    net.blocks[0].scale_shift_table.bfloat16()
    with pytest.raises(AssertionError, match=r"0.scale_shift_table.weight is torch.bfloat16; expected torch.float32"):
        sample(QUICK, torch.bfloat16, net=net)


def test_rope_tables_go_with_the_network():
    net = network(device="cpu")
    table = weakref.ref(net.rope((0, 1), (2, 4, 4), 1, torch.device("cpu")))
    assert table() is not None
    net.bfloat16()  # or wherever else the weights go
    gc.collect()
    assert table() is None

    table = weakref.ref(net.rope((0, 1), (2, 4, 4), 1, torch.device("cpu")))
    del net
    gc.collect()
    assert table() is None
