"""The chunk loop's `bind` for the core's own transformer, as scripts without ComfyUI use it."""

from __future__ import annotations

import torch
from torch import Tensor

from .generate import BindChunk, PredictFlow
from .history import History
from .schedule import Schedule
from .transformer import HeliosTransformer, RunBlock


def bind_transformer(
    network: HeliosTransformer,
    schedule: Schedule,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    prepare_prompts: bool = True,
    run_block: RunBlock | None = None,
) -> BindChunk:
    """Predict with prompts (B, L, text_dim), guided as the schedule says; latents keep their dtype.

    Prompts are prepared once and histories once a chunk, so the weights must not change meanwhile. Without
    prepare_prompts every step takes them as they are: under group offloading by blocks, whose weights are there only
    while their block runs. run_block is the network's own argument: `parallel.share_out` makes one for several devices.
    Raises ValueError where the schedule guides and there is no negative prompt.
    """
    prompts = [positive]
    if schedule.guided:
        if negative is None:
            raise ValueError(f"guidance_scale {schedule.guidance_scale} needs a negative prompt; give its embedding.")
        prompts.append(negative)
    raw = [prompt.to(network.dtype) for prompt in prompts]
    texts = [network.prepare_text(prompt) for prompt in raw] if prepare_prompts else raw

    def bind(index: int, history: History) -> PredictFlow:
        past = network.prepare_history(history.to(network.dtype))

        def predict(latents: Tensor, timestep: float, sigma: float) -> Tensor:
            time = torch.full(latents.shape[:1], timestep, device=latents.device)
            flows = [
                network(latents.to(network.dtype), time, text, past, run_block=run_block).to(latents.dtype)
                for text in texts
            ]
            return schedule.guide(*flows) if schedule.guided else flows[0]

        return predict

    return bind
