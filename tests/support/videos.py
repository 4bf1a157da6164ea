"""Whole runs to compare: every variant, as the reference makes it and as our loop does."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import HeliosScheduler

from comfyui_helios.helios_core.config import SPATIAL_SCALE, TransformerConfig
from comfyui_helios.helios_core.generate import Run, generate
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID, Schedule, dynamic_shift_mu
from comfyui_helios.helios_core.transformer import HeliosTransformer
from harness import oracle

TOLERANCE = 2e-5  # of the largest absolute value
CHUNKS = 3
SEED = 3


@dataclass(frozen=True)
class Case:
    schedule: Schedule
    size: tuple[int, int] = (64, 128)
    solver: str | None = None


def below(schedule, **changes):
    """As diffusers shifts."""
    return replace(schedule, shift_level="stage_below", **changes)


CASES = {
    "base unipc guided": Case(replace(BASE, steps=(5,)), (64, 80)),
    "base unipc": Case(replace(BASE, steps=(5,), guidance_scale=1.0)),
    "base euler guided": Case(replace(BASE, steps=(5,), solver="euler")),
    "base euler": Case(replace(BASE, steps=(4,), solver="euler", guidance_scale=1.0)),
    "mid": Case(below(MID, steps=(4, 3, 2))),
    "mid without guidance": Case(below(MID, steps=(1, 2, 5), guidance_scale=1.0)),
    "mid with plain guidance": Case(below(MID, steps=(3, 2, 2), guidance="cfg", zero_init=False)),
    "mid as trained": Case(replace(MID, steps=(4, 3, 2))),
    "distilled 1, 1, 1": Case(below(DISTILLED, steps=(1, 1, 1), amplify_first_chunk=False)),
    "distilled 1, 1, 1 amplified": Case(below(DISTILLED, steps=(1, 1, 1))),
    "distilled 2, 2, 2": Case(below(DISTILLED, amplify_first_chunk=False)),
    "distilled 2, 2, 2 amplified": Case(below(DISTILLED), (128, 64)),
    "distilled as trained": Case(DISTILLED),
}


def reference_video(
    case: Case, model: Any, positive: torch.Tensor, negative: torch.Tensor, frames: int = 33 * CHUNKS, **more: Any
):
    """Latents of diffusers' pipeline; what was put into the history comes in front of them."""
    schedule = case.schedule
    scheduler = None
    if schedule.solver == "euler":
        scheduler = HeliosScheduler(stages=1, use_dynamic_shifting=True, scheduler_type="euler")
    pipe = oracle.pipeline(schedule.variant, model, scheduler)
    if schedule.is_pyramid:
        pipe.register_to_config(is_cfg_zero_star=schedule.guidance == "cfg_zero_star")
        settings = {
            "pyramid_num_inference_steps_list": list(schedule.steps),
            "is_amplify_first_chunk": schedule.amplify_first_chunk,
            "use_zero_init": schedule.zero_init,
            "zero_steps": schedule.zero_steps,
        }
        if schedule.shift_level == "stage":
            shift_as_trained(pipe.scheduler, case)
    else:
        settings = {"num_inference_steps": schedule.steps[0]}
    return oracle.run(
        pipe,
        positive,
        negative,
        size=case.size,
        frames=frames,
        seed=SEED,
        guidance_scale=schedule.guidance_scale,
        **settings,
        **more,
    )


def shift_as_trained(scheduler, case):
    """Hand diffusers' scheduler the mu of the stage it is about to run, not of the one before."""
    original = scheduler.set_timesteps

    def set_timesteps(steps, stage, *args, mu, **kwargs):
        latents = [size // SPATIAL_SCALE // 2 ** (2 - stage) for size in case.size]
        return original(
            steps, stage, *args, mu=dynamic_shift_mu(9 * latents[0] * latents[1] // 4, case.schedule), **kwargs
        )

    scheduler.set_timesteps = set_timesteps


def our_transformer(reference) -> HeliosTransformer:
    config = TransformerConfig.from_dict(reference.config)
    model = HeliosTransformer(config)
    model.load_state_dict(oracle.weights(reference))
    return model.eval()


def guided(predict, schedule, positive, negative):
    """BindChunk around predict(latents, timestep (B,), text, history)."""

    def bind(index, history):
        def predict_flow(latents, timestep, sigma):
            batch = torch.full((latents.shape[0],), timestep)
            cond = predict(latents, batch, positive, history)
            if not schedule.guided:
                return cond
            return schedule.guide(cond, predict(latents, batch, negative, history))

        return predict_flow

    return bind


@torch.no_grad()
def our_video(case: Case, bind, batch: int = 1, seed: int = SEED) -> torch.Tensor:
    """Latents of our loop."""
    memory = Memory.empty(batch, case.size[0] // SPATIAL_SCALE, case.size[1] // SPATIAL_SCALE)
    chunks = generate(bind, Run(case.schedule, memory, CHUNKS, torch.Generator().manual_seed(seed)))
    return torch.cat([chunk.latents for chunk in chunks], dim=2)
