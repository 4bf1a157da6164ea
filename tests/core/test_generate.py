"""Whole videos against diffusers' pipelines, and proof that a mistake would show."""

from dataclasses import replace

import pytest
import torch

from comfyui_helios.helios_core import generate as loop
from comfyui_helios.helios_core import history, schedule
from comfyui_helios.helios_core.history import HistoryLayout, Memory
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID
from harness import oracle
from harness.errors import difference
from support.videos import (
    CASES,
    CHUNKS,
    TOLERANCE,
    Case,
    below,
    guided,
    our_transformer,
    our_video,
    reference_video,
)


@pytest.fixture(scope="module")
def models():
    reference = oracle.transformer(0)
    return reference, our_transformer(reference)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(models, case):
    reference, ours = models
    positive, negative = oracle.prompts()
    video = our_video(case, guided(ours, case.schedule, positive, negative))
    assert video.shape == (1, 16, 9 * CHUNKS, case.size[0] // 8, case.size[1] // 8)
    assert difference(video, reference_video(case, reference, positive, negative)) <= TOLERANCE


@pytest.mark.parametrize("name", ["base unipc guided", "mid", "distilled 2, 2, 2 amplified"])
def test_equals_the_reference_in_batches(models, name):
    reference, ours = models
    positive, negative = oracle.prompts(batch=2)
    video = our_video(CASES[name], guided(ours, CASES[name].schedule, positive, negative), batch=2)
    assert difference(video, reference_video(CASES[name], reference, positive, negative)) <= TOLERANCE


def shift_long_indices(monkeypatch):
    right = HistoryLayout.indices.fget
    monkeypatch.setattr(
        HistoryLayout,
        "indices",
        property(lambda self: replace(right(self), long=tuple(i + 1 for i in right(self).long))),
    )


def drop_anchor(monkeypatch):
    right = Memory.history

    def anchorless(self):
        return right(replace(self, anchor=None))

    monkeypatch.setattr(Memory, "history", anchorless)


def swap_mid_and_long(monkeypatch):
    """The two oldest terms trade places in time: the past is cut [mid | long | short]."""

    def swapped(self):
        mid, long, short = self.latents.split((2, 16, 1), dim=2)
        anchor = torch.zeros_like(short) if self.anchor is None else self.anchor
        return history.History(long, mid, torch.cat([anchor, short], dim=2), self.layout.indices)

    monkeypatch.setattr(Memory, "history", swapped)


def exponential_shift(monkeypatch):
    right = schedule.shift_time
    monkeypatch.setattr(schedule, "shift_time", lambda sigmas, kind, mu: right(sigmas, "exponential", mu))


def dmd_grid_of_n_points(monkeypatch):
    """A plain linspace(n), as one public port has it."""
    right = schedule.np.linspace

    class Numpy:
        def __getattr__(self, name):
            return getattr(schedule_np, name)

        @staticmethod
        def linspace(start, stop, count):
            few = start == schedule.SIGMA_MAX and 2 < count < 20
            return schedule_np.append(right(start, stop, count - 1), 0) if few else right(start, stop, count)

    schedule_np = schedule.np
    monkeypatch.setattr(schedule, "np", Numpy())


def fresh_noise_for_the_start_point(monkeypatch):
    right, rng = loop.dmd_step, torch.Generator().manual_seed(99)

    def step(latents, flow, sigma, sigma_next, start):
        return right(latents, flow, sigma, sigma_next, torch.randn(start.shape, generator=rng))

    monkeypatch.setattr(loop, "dmd_step", step)


def cfg_zero_without_init(monkeypatch):
    monkeypatch.setattr(schedule.Schedule, "zero_flow", lambda self, stage, step: False)


def euler_for_unipc(monkeypatch):
    def step(past, latents, flow, sigma, sigma_next, last):
        return latents + (sigma_next - sigma) * flow, past

    monkeypatch.setattr(loop, "unipc_step", step)


MUTATIONS = [
    (shift_long_indices, "distilled 2, 2, 2"),
    (drop_anchor, "distilled 2, 2, 2"),
    (swap_mid_and_long, "distilled 2, 2, 2"),
    (exponential_shift, "distilled 2, 2, 2"),
    (dmd_grid_of_n_points, "distilled 2, 2, 2"),
    (fresh_noise_for_the_start_point, "distilled 2, 2, 2"),
    (cfg_zero_without_init, "mid"),
    (euler_for_unipc, "mid"),
]


@pytest.mark.parametrize(("mutate", "name"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
def test_a_mistake_shows(models, monkeypatch, mutate, name):
    _, ours = models
    bind = guided(ours, CASES[name].schedule, *oracle.prompts())
    right = our_video(CASES[name], bind)
    mutate(monkeypatch)
    assert difference(our_video(CASES[name], bind), right) > 1e-3


def test_bf16_run_is_no_worse_than_the_references(models):
    """A whole distilled run in bf16, ours and the reference's, against the float32 result."""
    _, ours = models
    case = Case(below(DISTILLED, amplify_first_chunk=False))
    positive, negative = oracle.prompts()
    exact = our_video(case, guided(ours, case.schedule, positive, negative))

    half = type(ours)(ours.config, dtype=torch.bfloat16)
    half.load_state_dict(ours.state_dict())

    def predict(latents, timestep, text, past):
        return half(latents.bfloat16(), timestep, text.bfloat16(), past.to(torch.bfloat16)).float()

    theirs = oracle.transformer(0)
    for name, parameter in theirs.named_parameters():
        if not any(x in name for x in ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")):
            parameter.data = parameter.data.bfloat16()
    error = (our_video(case, guided(predict, case.schedule, positive, negative)) - exact).square().mean()
    peer = (reference_video(case, theirs, positive, negative).float() - exact).square().mean()
    assert 0 < error.sqrt() <= 1.1 * peer.sqrt()


def test_chunks_come_as_soon_as_they_are_made(models):
    """The loop is a generator: nothing of a chunk is computed before it is asked for."""
    bind = guided(models[1], DISTILLED, *oracle.prompts())
    steps = []
    chunks = loop.generate(
        bind, loop.Run(DISTILLED, Memory.empty(1, 8, 8), 2, torch.Generator().manual_seed(0)), on_step=steps.append
    )
    with torch.no_grad():
        next(chunks)
        assert [step.latents.shape[-1] for step in steps] == [2] * 4 + [4] * 4 + [8] * 4  # amplified
        next(chunks)
    assert [step.latents.shape[-1] for step in steps[12:]] == [2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize(("least", "refused_at", "made"), [(2, 0, 2), (2, 4, 4), (0, 1, 1), (0, 0, 0)])
def test_a_run_goes_on_beyond_its_chunks_for_as_long_as_it_is_told(models, least, refused_at, made):
    """first_index is 5, and counts: chunks are asked for by their place in the video."""
    asked = []

    def more(index):
        asked.append(index - 5)
        return index - 5 < refused_at

    case = CASES["distilled 1, 1, 1"]
    bind = guided(models[1], case.schedule, *oracle.prompts())
    memory = Memory.empty(1, 8, 8)
    run = loop.Run(case.schedule, memory, least, torch.Generator().manual_seed(0), first_index=5, more=more)
    with torch.no_grad():
        chunks = list(loop.generate(bind, run))
    assert [chunk.index for chunk in chunks] == [5 + i for i in range(made)]
    assert [chunk.last for chunk in chunks] == [False] * (made - 1) + [True] * bool(made)
    assert asked == list(range(least, made + 1))  # once each


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_chunk_that_is_not_finite_ends_the_video(value):
    def bind(index, past):
        def predict_flow(latents, timestep, sigma):
            flow = torch.randn_like(latents)
            if index == 1:
                flow[0, 3, 4, 5, 6] = value
            return flow

        return predict_flow

    schedule_ = replace(BASE, steps=(2,))
    chunks = loop.generate(bind, loop.Run(schedule_, Memory.empty(1, 8, 8), 3, torch.Generator()))
    assert next(chunks).latents.isfinite().all()
    with pytest.raises(FloatingPointError, match=r"Chunk 2 of the video is not finite.*fp16.*LoRA.*model file"):
        next(chunks)


@pytest.mark.parametrize(("schedule_", "skipped"), [(MID, 2), (replace(MID, zero_steps=0), 1), (BASE, 0)])
def test_steps_of_zero_flow_do_not_run(schedule_, skipped):
    """CFG-Zero* leaves the first steps out, and only there is the network not asked."""
    schedule_ = replace(schedule_, steps=(3,) * len(schedule_.steps))
    asked, steps = [], []

    def bind(index, past):
        def predict_flow(latents, timestep, sigma):
            asked.append(timestep)
            return torch.ones_like(latents)

        return predict_flow

    next(loop.generate(bind, loop.Run(schedule_, Memory.empty(1, 8, 8), 1, torch.Generator()), on_step=steps.append))
    assert len(asked) == len(steps) - skipped == sum(schedule_.steps) - skipped


def test_memory_keeps_its_size_and_the_first_anchor():
    memory = Memory.empty(1, 4, 4)
    chunks = [torch.full((1, 16, 9, 4, 4), float(i + 1)) for i in range(4)]
    for chunk in chunks:
        memory = memory.push(chunk)
        assert memory.latents.shape == (1, 16, 19, 4, 4)
    assert memory.latents[0, 0, :, 0, 0].tolist() == [2.0] * 1 + [3.0] * 9 + [4.0] * 9
    assert memory.anchor.unique().tolist() == [1.0]
    assert memory.push(chunks[0], reanchor=True).anchor.unique().tolist() == [1.0]
    assert memory.push(chunks[2], reanchor=True).anchor.unique().tolist() == [3.0]


def test_without_an_anchor_the_smallest_history_grows():
    layout = HistoryLayout(keep_first_frame=False)
    memory = Memory.empty(1, 4, 4, layout).push(torch.rand(1, 16, 9, 4, 4))
    past = memory.history()
    assert (past.long.shape[2], past.mid.shape[2], past.short.shape[2]) == (16, 2, 2)
    assert past.indices.short == (18, 19)
    assert past.indices.noisy == tuple(range(20, 29))


def test_indices_with_an_anchor():
    indices = HistoryLayout().indices
    assert indices.long == tuple(range(1, 17))
    assert indices.mid == (17, 18)
    assert indices.short == (0, 19)
    assert indices.noisy == tuple(range(20, 29))


def test_a_size_the_pyramid_cannot_make_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="nearest that works is 64x64"):
        next(loop.generate(None, loop.Run(DISTILLED, Memory.empty(1, 6, 8), 1, torch.Generator())))
