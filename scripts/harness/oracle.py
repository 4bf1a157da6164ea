"""The reference that our numbers are compared with: diffusers' Helios on small, loud random weights."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKLWan,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)
from torch import Tensor

from harness.tiny import TEXT_DIM, TINY
from helios_core.checkpoint import own_name
from helios_core.history import History
from helios_core.pyramid import block_factor
from helios_core.schedule import GAMMA_MAX


def make_sensitive(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights of a scale at which every part of a network tells in its output."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            noise = torch.randn(p.shape, generator=rng)
            if p.ndim > 1 and "table" not in name:
                p.copy_(noise / p[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.5 * noise)
    return module.eval().requires_grad_(False)


def transformer(seed: int = 0, **config: Any) -> Any:
    model = make_sensitive(HeliosTransformer3DModel(**{**TINY, **config}), seed)
    # At 64x64 the first stage has one token a frame, and the pipeline's `view` then fails on the output's strides.
    model.register_forward_hook(lambda module, args, output: tuple(x.contiguous() for x in output))
    return model


def weights(model: Any) -> dict[str, Tensor]:
    """The reference transformer's, by the names that `HeliosTransformer` has for them."""
    return {own_name(name): weight for name, weight in model.state_dict().items()}


def ask(model: Any, latents: Tensor, timestep: Tensor, text: Tensor, history: History) -> Tensor:
    """The reference transformer's flow, with our `History`."""
    index = {name: torch.tensor([getattr(history.indices, name)]) for name in ("noisy", "short", "mid", "long")}
    return model(
        latents,
        timestep,
        text,
        index["noisy"],
        index["short"],
        index["mid"],
        index["long"],
        history.short,
        history.mid,
        history.long,
        return_dict=False,
    )[0]


def schedulers(variant: str) -> Any:
    if variant == "distilled":
        return HeliosDMDScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    stages = {"base": 1, "mid": 3}[variant]
    return HeliosScheduler(stages=stages, use_dynamic_shifting=True, time_shift_type="exponential")


def pipeline(variant: str, model: Any, scheduler: Any = None) -> Any:
    """A reference pipeline without a text encoder; its VAE is there because it insists on decoding."""
    vae = AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval().requires_grad_(False)
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae,
        "scheduler": scheduler or schedulers(variant),
        "transformer": model,
    }
    if variant == "base":
        pipe = HeliosPipeline(**parts)
    else:
        flags = {"is_cfg_zero_star": variant == "mid", "is_distilled": variant == "distilled"}
        known = inspect.signature(HeliosPyramidPipeline.__init__).parameters
        pipe = HeliosPyramidPipeline(**parts, **{k: v for k, v in flags.items() if k in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(seed: int = 0, batch: int = 1, dim: int = TEXT_DIM, length: int = 12) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(2, batch, length, dim, generator=rng).unbind(0)


def run(
    pipe: Any,
    positive: Tensor,
    negative: Tensor,
    *,
    size: tuple[int, int] = (64, 64),
    frames: int = 99,
    seed: int = 0,
    guidance_scale: float = 1.0,
    **kwargs: Any,
) -> Any:
    """Latents of a whole video, (B, 16, 9k, H, W), normalised.

    Pyramids are handed our factor of the block noise's covariance: theirs, taken in float32, is rounding noise that
    differs between processors, and none at all on AMD's. `test_pyramid` compares ours with one taken in float64.
    """
    factor = block_factor(pipe.scheduler.config.get("gamma", GAMMA_MAX))
    with patch.object(torch.linalg, "cholesky", lambda covariance: factor):
        return pipe(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            height=size[0],
            width=size[1],
            num_frames=frames,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **kwargs,
        ).frames
