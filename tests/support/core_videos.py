"""Videos from the core alone, made by small and loud weights on any device: without diffusers, without a host."""

from dataclasses import replace

import torch

from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.generate import Run, generate
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.predict import bind_transformer
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID
from comfyui_helios.helios_core.transformer import HeliosTransformer
from harness.tiny import TINY, make_loud

CONFIG = TransformerConfig(**TINY)
SCHEDULES = {
    "base": replace(BASE, steps=(3,), guidance_scale=2.0),
    "mid": replace(MID, steps=(2, 1, 1), guidance_scale=2.0, zero_steps=0),
    "distilled": replace(DISTILLED, steps=(1, 1, 1)),
}
QUICK = replace(DISTILLED, steps=(1, 1, 1), amplify_first_chunk=False)
LATENTS = (8, 8)


def network(device="cpu", dtype=torch.float32, **config):
    """Always the same weights, rounded to dtype."""
    exact = make_loud(HeliosTransformer(replace(CONFIG, **config)), seed=0)
    model = HeliosTransformer(exact.config, dtype=dtype).eval().requires_grad_(False)
    model.load_state_dict(exact.state_dict())
    return model.to(device)


@torch.inference_mode()
def video(model, schedule, device, chunks=2, **options):
    """Latents (1, 16, 9k, H, W), float32 on the CPU, of a text-to-video run on this device."""
    rng = torch.Generator().manual_seed(1)
    prompts = torch.randn(2, 1, 12, CONFIG.text_dim, generator=rng).to(device, model.dtype)
    bind = bind_transformer(model, schedule, *prompts, **options)
    memory = Memory.empty(1, *LATENTS).to(device)
    return torch.cat([chunk.latents.cpu() for chunk in generate(bind, Run(schedule, memory, chunks, rng))], dim=2)
