"""The chunk loop: a video of any length, nine latent frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import CHUNK_LATENTS, SPATIAL_SCALE
from .history import History, Memory
from .pyramid import halve, renoise
from .schedule import Schedule, Stage, stages
from .solver import Point, dmd_step, euler_step, to_x0, unipc_step


@dataclass(frozen=True)
class Step:
    """One step of a solver, as `on_step` is given it: for progress bars and previews."""

    latents: Tensor  # (B, 16, 9, h, w) that the network was given
    flow: Tensor
    sigma: float
    result: Tensor  # the latents after the step

    def preview(self, frame: int) -> Tensor:
        """One clean latent frame as the network sees it coming, (B, 16, 1, h, w)."""
        latents, flow = (x[:, :, frame : frame + 1] for x in (self.latents, self.flow))
        return to_x0(latents, flow, self.sigma)


PredictFlow = Callable[[Tensor, float, float], Tensor]
"""(latents (B, 16, 9, h, w), timestep in 0..1000, sigma of the stage) -> guided flow, shaped as the latents."""

BindChunk = Callable[[int, History], PredictFlow]
"""(index of the chunk in its video, its history) -> how to predict within that chunk."""


@dataclass(frozen=True)
class Chunk:
    """A finished piece of video and all that is needed to go on after it."""

    index: int
    latents: Tensor  # (B, 16, 9, H, W), normalised
    memory: Memory  # with this chunk in it
    last: bool = False  # of its run


@dataclass(frozen=True)
class Run:
    """What is to be denoised: `chunks` chunks that follow on `memory`, and further ones while `more` says so."""

    schedule: Schedule
    memory: Memory  # before the first of them; where it lies is where they are made
    chunks: int
    rng: torch.Generator  # gives all noise, on its own device, in the reference's order
    first_index: int = 0  # chunks that this video has already: amplification is for chunk 0 alone
    # Take the second chunk's first latent frame for the anchor: a cure for image-to-video that starts static.
    skip_first_chunk: bool = False
    more: Callable[[int], bool] | None = None  # whether to make chunk `index`, after the `chunks`; asked before each

    @property
    def chunk_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one chunk's latents: (B, 16, 9, H, W)."""
        b, channels, _, height, width = self.memory.latents.shape
        return b, channels, CHUNK_LATENTS, height, width

    def steps(self, chunks: int) -> int:
        """How many steps of a solver the run's first `chunks` chunks take."""
        return sum(self.schedule.steps_in_chunk(self.first_index + i) for i in range(chunks))

    def goes_on(self, made: int) -> bool:
        """Whether another chunk is to follow on the first `made`."""
        return made < self.chunks or (self.more is not None and self.more(self.first_index + made))

    def after(self, done: int, memory: Memory) -> Run:
        """The run of the remaining chunks, where the first `done` exist already and `memory` ends with them."""
        return replace(self, memory=memory, chunks=self.chunks - done, first_index=self.first_index + done)


def generate(bind: BindChunk, run: Run, on_step: Callable[[Step], None] = lambda step: None) -> Iterator[Chunk]:
    """Denoise a run's chunks, yielding each as soon as it is clean.

    Raises FloatingPointError in place of a chunk that is not finite.
    """
    schedule, memory, rng = run.schedule, run.memory, run.rng
    *_, height, width = run.chunk_shape
    schedule.check_size(height * SPATIAL_SCALE, width * SPATIAL_SCALE)
    made, goes_on = 0, run.goes_on(0)
    while goes_on:
        index = run.first_index + made
        if schedule.anti_drift:
            memory = schedule.anti_drift.correct(memory, rng)
        noise = torch.randn(run.chunk_shape, generator=rng, device=rng.device)
        latents = denoise_chunk(
            bind(index, memory.history()), schedule, noise.to(memory.latents.device), rng, index, on_step
        )
        check_finite(latents, index)
        memory = memory.push(latents, reanchor=run.skip_first_chunk and index == 1)
        if schedule.anti_drift:
            memory = schedule.anti_drift.observe(memory, latents)
        made += 1
        goes_on = run.goes_on(made)
        yield Chunk(index, latents, memory, last=not goes_on)


def check_finite(latents: Tensor, index: int) -> None:
    """Raise FloatingPointError if the latents of chunk `index` are not all numbers; waits for the device."""
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"Chunk {index + 1} of the video is not finite: it has NaN or infinite values, and so would all that "
            "follows. Likely causes: a model or text encoder that runs in fp16, which reaches only to 65504 (choose "
            "bf16 or fp32); a LoRA that is too strong, broken or made for another model; a damaged model file "
            "(download it again)."
        )


def denoise_chunk(
    predict_flow: PredictFlow,
    schedule: Schedule,
    noise: Tensor,
    rng: torch.Generator,
    index: int,
    on_step: Callable[[Step], None],
) -> Tensor:
    """Take noise (B, 16, 9, H, W) through all stages of chunk `index`; returns clean latents of the same shape."""
    plan = stages(schedule, noise.shape[-2], noise.shape[-1], first_chunk=index == 0)
    latents = noise
    for _ in plan[1:]:
        latents = halve(latents)
    for number, stage in enumerate(plan):
        if stage.entry:
            latents = renoise(latents, *stage.entry, schedule.gamma, rng)
        for step in denoise_stage(predict_flow, schedule, stage, number, latents):
            on_step(step)
            latents = step.result
    return latents


def denoise_stage(
    predict_flow: PredictFlow, schedule: Schedule, stage: Stage, number: int, start: Tensor
) -> Iterator[Step]:
    """All steps of one pyramid level, from its starting point (B, 16, 9, h, w)."""
    # In the pyramid the network knows whole timesteps only; the reference truncates. None is so near a whole number
    # that another processor's rounding would lift it over (test_numbers).
    timesteps = (stage.timesteps.trunc() if schedule.is_pyramid else stage.timesteps).tolist()
    sigmas = stage.sigmas.tolist()
    latents = start
    past: tuple[Point, ...] = ()  # of UniPC
    for i, (timestep, sigma, sigma_next) in enumerate(zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)):
        flow = torch.zeros_like(latents) if schedule.zero_flow(number, i) else predict_flow(latents, timestep, sigma)
        if schedule.solver == "dmd":
            result = dmd_step(latents, flow, sigma, sigma_next, start)
        elif schedule.solver == "euler":
            result = euler_step(latents, flow, sigma, sigma_next)
        else:
            result, past = unipc_step(past, latents, flow, sigma, sigma_next, last=i == len(timesteps) - 1)
        yield Step(latents, flow, sigma, result)
        latents = result
