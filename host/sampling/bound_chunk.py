"""One chunk inside the host: its prompts and its history as the host's conds, and the guided flow they give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch
from torch import Tensor

from ...helios_core.guidance import projection
from ...helios_core.schedule import TRAIN_STEPS, Schedule
from ..model.base_model import FlowSampling
from ..model.foreign_patches import refusing_by_name
from ..model.run_cache import GUIDANCE_FUNCTIONS

if TYPE_CHECKING:
    from .guider import HeliosGuider

STEP_KEY = "helios_step"  # in the model_options of a prediction


@dataclass(frozen=True)
class BoundChunk:
    """How the flow of one chunk is predicted: called by the core's loop, answered through the host's guider."""

    guider: HeliosGuider
    conds: dict[str, list[dict[str, Any]]]  # processed, with this chunk's prompts and history
    history: dict[str, Any]  # as model_conds

    def everywhere(self, state: Callable[..., AbstractContextManager[None]], value: float) -> ExitStack:
        """A state of the model_sampling, and of those that the MODEL's copies on other cards have."""
        stack = ExitStack()
        for patcher in self.guider.patchers:
            stack.enter_context(state(patcher.model.model_sampling, value))
        return stack

    def __call__(self, latents: Tensor, timestep: float, sigma: float) -> Tensor:
        """The guided flow at latents (B, 16, 9, h, w), through the MODEL's PREDICT_NOISE wrappers."""
        guider, options = self.guider, self.guider.options
        host_sigma = torch.full((latents.shape[0],), timestep / TRAIN_STEPS, device=latents.device)
        latents = latents.contiguous()  # as other nodes expect them, with `view`
        guider.enter_stage(latents)
        sampling = self.everywhere(FlowSampling.at, timestep)
        with sampling, guider.inner_model.showing(self.history), refusing_by_name(options):
            seed = guider.run.rng.initial_seed()
            return guider(latents, host_sigma, {**options, STEP_KEY: BoundStep(self, sigma)}, seed)


@dataclass(frozen=True)
class BoundStep:
    """One step of a chunk: what `HeliosGuider.predict_noise` finds in the options it is called with."""

    chunk: BoundChunk
    sigma: float  # of the stage

    @property
    def schedule(self) -> Schedule:
        """With this step's guidance scale: a wrapper around it may have set another (CFG Override of 0.33)."""
        return replace(self.chunk.guider.run.schedule, guidance_scale=self.chunk.guider.cfg)

    def predict(self, x: Tensor, timestep: Tensor, options: dict[str, Any], seed: int | None) -> Tensor:
        """The guided flow at x (B, 16, 9, h, w); timestep (B,) in the host's unit."""
        chunk, schedule = self.chunk, self.schedule
        positive, negative = chunk.conds["positive"], chunk.conds.get("negative")
        if any(options.get(name) for name in (*GUIDANCE_FUNCTIONS, "disable_cfg1_optimization")):
            return self._hooked(x, timestep, positive, negative, options, seed)
        if not schedule.guided:
            negative = None
        inner = chunk.guider.inner_model
        cond, uncond = comfy.samplers.calc_cond_batch(inner, [positive, negative], x, timestep, options)
        return cond if negative is None else schedule.guide(cond, uncond)

    def _hooked(self, x, timestep, positive, negative, options, seed) -> Tensor:
        """Guidance by the host, with the MODEL's own functions, which think in denoised latents: there and back."""
        schedule, sigma = self.schedule, self.sigma
        if schedule.guided and schedule.guidance == "cfg_zero_star":

            def scale_uncond(args: dict[str, Any]) -> list[Tensor]:
                cond, uncond, *rest = args["conds_out"]
                flow, negative_flow = (x - cond) / sigma, (x - uncond) / sigma
                return [cond, x - sigma * projection(flow, negative_flow) * negative_flow, *rest]

            options = {
                **options,
                "sampler_pre_cfg_function": [scale_uncond, *options.get("sampler_pre_cfg_function", [])],
            }
        with self.chunk.everywhere(FlowSampling.denoising, sigma):
            inner, scale = self.chunk.guider.inner_model, schedule.guidance_scale
            denoised = comfy.samplers.sampling_function(
                inner, x, timestep, negative, positive, scale, model_options=options, seed=seed
            )
        return (x - denoised) / sigma
