"""Make videos with Helios-Tiny and count how often they show what was asked for.

A loop of its own around diffusers' schedulers, for a batch of prompts at once: the three variants' recipes at full
length are those of diffusers' HeliosPipeline and HeliosPyramidPipeline.

`python training/sample.py base --sheet out.png`
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, HeliosDMDScheduler, HeliosScheduler
from helios import NOISY, History, padding_bias, predict_flow, rotary_tables, split_history
from parts import Variant, load_part, reader, weights_folder
from text import embed
from torch import Tensor, nn
from wan import decode

PAST = 19
GUIDANCE = {"base": 5.0, "mid": 5.0, "distilled": 1.0}
Predict = Callable[[Tensor, Tensor], Tensor]  # latents, timestep (B,) -> flow


@dataclass(frozen=True)
class Sampler:
    """Everything a video takes: networks, the variant and its steps, one number for Base, three for a pyramid."""

    variant: Variant
    transformer: nn.Module
    encoder: nn.Module
    steps: tuple[int, ...]
    guidance: float
    negative: str = ""
    device: str = "cpu"

    def embed(self, captions: Sequence[str]) -> Tensor:
        ids, mask = reader()(captions)
        return embed(self.encoder, ids.to(self.device), mask.to(self.device))


def make_scheduler(variant: Variant) -> HeliosScheduler | HeliosDMDScheduler:
    if variant == "distilled":
        return HeliosDMDScheduler(stages=3, use_dynamic_shifting=True, time_shift_type="linear")
    return HeliosScheduler(
        stages=1 if variant == "base" else 3,
        stage_range=[0, 1] if variant == "base" else [0, 1 / 3, 2 / 3, 1],
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )


def shift_of(latents: Tensor) -> float:
    """mu of the schedule, linear in the number of tokens."""
    tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


@torch.no_grad()
def generate(sampler: Sampler, captions: Sequence[Sequence[str]], size: int, seed: int) -> Tensor:
    """captions[chunk][video] -> normalised latents (B, 16, 9 * chunks, size / 8, size / 8)."""
    side, count = size // 8, len(captions[0])
    rng = torch.Generator().manual_seed(seed)
    video = torch.zeros(count, 16, 0, side, side, device=sampler.device)
    negative = sampler.embed([sampler.negative] * count)
    for texts in captions:
        past = torch.cat([video.new_zeros(count, 16, PAST, side, side), video], 2)[:, :, -PAST:]
        anchor = video[:, :, :1] if video.shape[2] else video.new_zeros(count, 16, 1, side, side)
        noise = torch.randn((count, 16, NOISY, side, side), generator=rng).to(sampler.device)
        predict = make_predictor(sampler, sampler.embed(texts), negative, split_history(past, anchor))
        make = _denoise_base if sampler.variant == "base" else _denoise_pyramid
        video = torch.cat([video, make(sampler, predict, noise, rng)], 2)
    return video


def make_predictor(sampler: Sampler, text: Tensor, negative: Tensor, history: History) -> Predict:
    """The guided flow: CFG for Base, CFG-Zero* for a pyramid."""
    grid = history.short.shape[-1] // 2
    bias = padding_bias(sampler.device)
    twice = History(*(torch.cat([part, part]) for part in (history.long, history.mid, history.short)))
    texts = torch.cat([text, negative])

    @cache
    def table_of(own: int) -> Tensor:
        return rotary_tables(sampler.transformer, own, grid).to(sampler.device)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        table = table_of(latents.shape[-1] // 2)
        if sampler.guidance <= 1:
            return predict_flow(sampler.transformer, latents, timestep, text, history, table, bias)
        both = predict_flow(
            sampler.transformer, latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2), texts, twice, table, bias
        )
        wanted, other = both.chunk(2)
        if sampler.variant != "base":
            a, b = wanted.flatten(1), other.flatten(1)
            scale = (a * b).sum(1) / (b.square().sum(1) + 1e-8)
            other = other * scale.view(-1, 1, 1, 1, 1)
        return other + sampler.guidance * (wanted - other)

    return predict


def _denoise_base(sampler: Sampler, predict: Predict, latents: Tensor, rng: torch.Generator) -> Tensor:
    scheduler = make_scheduler("base")
    (count,) = sampler.steps
    scheduler.set_timesteps(count, sigmas=np.linspace(0.999, 0, count + 1)[:-1], mu=shift_of(latents))
    for t in scheduler.timesteps:
        flow = predict(latents, t.expand(len(latents)).to(latents.device))
        latents = scheduler.step(flow, t, latents, return_dict=False)[0].float()
    return latents


def _denoise_pyramid(sampler: Sampler, predict: Predict, latents: Tensor, rng: torch.Generator) -> Tensor:
    *_, (_, end) = pyramid_stages(sampler, predict, latents, rng)
    return end


def pyramid_stages(
    sampler: Sampler, predict: Predict, noise: Tensor, rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The latents that each stage starts from and ends with; noise: (B, 16, 9, H, W)."""
    scheduler = make_scheduler(sampler.variant)
    latents = 4 * F.avg_pool3d(noise, (1, 4, 4))
    for stage, count in enumerate(sampler.steps):
        scheduler.set_timesteps(count, stage, mu=shift_of(latents))
        if stage > 0:
            latents = enter_stage(latents, scheduler, stage, rng)
        start = latents
        for i, t in enumerate(scheduler.timesteps):
            timestep = t.long().expand(len(latents)).to(latents.device)
            if sampler.variant == "mid" and stage == 0 and i <= 1:
                flow = torch.zeros_like(latents)  # zero-init of CFG-Zero*
            else:
                flow = predict(latents, timestep)
            if sampler.variant == "distilled":
                sigma, later = (scheduler.sigmas[i + k].item() for k in (0, 1))
                clean = latents - sigma * flow
                latents = clean if i + 1 == len(scheduler.timesteps) else (1 - later) * clean + later * start
            else:
                latents = scheduler.step(flow, t, latents, return_dict=False)[0].float()
        yield start, latents


def enter_stage(latents: Tensor, scheduler: HeliosScheduler, stage: int, rng: torch.Generator) -> Tensor:
    """Double the size and add noise that sums to 0 in each block of 2x2, so that the enlarged noise is white again."""
    latents = F.interpolate(latents, scale_factor=(1, 2, 2), mode="nearest")
    z = torch.randn(latents.shape, generator=rng).to(latents.device)
    gamma = scheduler.config.gamma
    blocks = math.sqrt(1 + gamma) * (z - F.interpolate(F.avg_pool3d(z, (1, 2, 2)), scale_factor=(1, 2, 2)))
    noise = scheduler.ori_start_sigmas[stage]
    alpha = 1 / (math.sqrt(1 + 1 / gamma) * noise + 1 - noise)
    return alpha * latents + alpha * noise / math.sqrt(gamma) * blocks


@torch.no_grad()
def decode_chunks(vae: AutoencoderKLWan, latents: Tensor) -> np.ndarray:
    """Each chunk alone: (B, 16, 9k, h, w), normalised -> (B, 33k, H, W, 3) in 0..1."""
    mean, std = (
        torch.tensor(v, device=latents.device).view(-1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    chunks = latents.transpose(1, 2).unflatten(1, (-1, NOISY)) * std + mean  # (B, k, 9, 16, h, w)
    videos = [torch.cat([decode(vae, chunk[None])[0] for chunk in video]) for video in chunks]
    return ((torch.stack(videos).permute(0, 1, 3, 4, 2).clamp(-1, 1) + 1) / 2).cpu().numpy()


def save_sheet(path: Path, videos: Sequence[np.ndarray], columns: int = 12, scale: int = 2) -> None:
    """One row a video, frames evenly spread."""
    from PIL import Image

    rows = [np.concatenate(list(video[np.linspace(0, len(video) - 1, columns).astype(int)]), 1) for video in videos]
    image = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def load_sampler(variant: Variant, steps: tuple[int, ...], guidance: float | None, device: str) -> Sampler:
    return Sampler(
        variant,
        load_part(variant, "transformer").to(device).eval(),
        load_part(variant, "text_encoder").to(device).eval(),
        steps,
        GUIDANCE[variant] if guidance is None else guidance,
        device=device,
    )


def load_vae(device: str) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(weights_folder() / "vae").float().to(device).requires_grad_(False)


def main() -> None:
    from detect import count_right, find, truth
    from train_transformer import load_average
    from trainer import CACHE, log, start_logging
    from world import sample_clip

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=("base", "mid", "distilled"))
    parser.add_argument("--steps", type=int, nargs="+", help="one number for base, three for the others")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--held-out", action="store_true", help="combinations that training never shows")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet there")
    parser.add_argument("--running", action="store_true", help="the averaged weights of the run in the cache folder")
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args()
    start_logging()
    default = {"base": (12,), "mid": (6, 6, 6), "distilled": (2, 2, 2)}[options.variant]
    steps = tuple(options.steps or default)
    if options.running:
        transformer, encoder = load_average(options.variant, options.folder, options.device)
        guidance = GUIDANCE[options.variant] if options.guidance is None else options.guidance
        sampler = Sampler(options.variant, transformer, encoder, steps, guidance, device=options.device)
    else:
        sampler = load_sampler(options.variant, steps, options.guidance, options.device)
    clips = [sample_clip(800_000_000 + k, 1, options.held_out) for k in range(options.prompts)]
    captions = [[clip.acts[0].caption for clip in clips]] * options.chunks
    videos = decode_chunks(load_vae(options.device), generate(sampler, captions, options.size, options.seed))
    pairs = [(find(video), truth(clip, 0)) for video, clip in zip(videos, clips, strict=True)]
    for (found, _), clip in zip(pairs, clips, strict=True):
        log.info("%s -> %s", clip.acts[0].caption, found)
    log.info("%s", count_right(pairs))
    if options.sheet:
        save_sheet(options.sheet, list(videos[:12]))


if __name__ == "__main__":
    main()
