"""Train the finished VAE's decoder on, its encoder untouched: the transformers' latents stay what they are.

What this is for is the seam: a chunk's first frame is decoded as an image, its last ones from a latent for four, and a
plain background that comes out a little darker from the one than from the other jumps. The loss compares both sides of
a seam too. `python training/refine_decoder.py [--steps N]` goes on where it was and, once done, writes the VAE back.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from parts import weights_folder
from torch import Tensor
from train_vae import VALIDATION_SEED, loss_of, measure
from trainer import CACHE, Average, Muon, Run, TrainStep, log, rngs, start_logging
from wan import decode, encode
from world import FRAMES_PER_CHUNK, render, sample_clip

NOISE = 0.1  # on latents, in their deviations: what a transformer makes is not exact


def sample_seam(rng: np.random.Generator, count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """A chunk and the first frame of the next: (count, 33, 3, size, size), (count, 1, 3, size, size) in -1..1."""
    videos = []
    for _ in range(count):
        clip = sample_clip(int(rng.integers(VALIDATION_SEED)))
        start = int(rng.integers(len(clip.acts) - 1)) * FRAMES_PER_CHUNK
        videos.append(render(clip, start, start + FRAMES_PER_CHUNK + 1, size, device=device))
    video = torch.stack(videos) * 2 - 1
    return video[:, :FRAMES_PER_CHUNK], video[:, FRAMES_PER_CHUNK:]


@torch.no_grad()
def seam_ratio(vae: AutoencoderKLWan, size: int, device: str) -> float:
    """Mean difference of frames at seams by that within chunks, over clips without changes; 1 is seamless."""
    at, within = [], []
    for seed in range(VALIDATION_SEED, VALIDATION_SEED + 8):
        video = render(sample_clip(seed), 0, 2 * FRAMES_PER_CHUNK, size, device=device) * 2 - 1
        made = decode(vae, encode(vae, video.unflatten(0, (2, FRAMES_PER_CHUNK)))[0]).flatten(0, 1)
        steps = made.clamp(-1, 1).diff(dim=0).abs().mean((1, 2, 3))
        at.append(steps[FRAMES_PER_CHUNK - 1].item())
        within.append(steps[FRAMES_PER_CHUNK - 9 : FRAMES_PER_CHUNK - 1].mean().item())
    return float(np.sum(at) / np.sum(within))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so many, if steps are left")
    parser.add_argument("--batch", type=int, default=1, help="seams a step")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    start_logging()
    device, target = options.device, weights_folder() / "vae"
    vae = AutoencoderKLWan.from_pretrained(target).float().to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    deviation = torch.tensor(vae.config.latents_std, device=device).view(-1, 1, 1)
    trained = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    optimizer = Muon(trained, options.lr)
    run = Run("decoder", vae, optimizer, Average(trained, 0.995), options.folder, options.steps, options.seconds)

    def loss_with_seam(before: Tensor, after: Tensor, latents: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            made, image = decode(vae, latents[:, :-1]).float(), decode(vae, latents[:, -1:]).float()
        seam = ((image[:, 0] - made[:, -1]) - (after[:, 0] - before[:, -1])).abs().mean()
        return loss_of(made, before) + loss_of(image, after) + 3 * seam

    train_step = TrainStep(loss_with_seam, (p for _, p in trained), optimizer)
    losses: list[Tensor] = []
    for step in run.steps(options.lr):
        rng, noise = rngs(options.seed, step, device)
        before, after = sample_seam(rng, options.batch, options.size, device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            latents = torch.cat([encode(vae, before)[0], encode(vae, after)[0]], 1).float()
        latents += NOISE * deviation * torch.randn(latents.shape, generator=noise, device=device)
        losses.append(train_step(before, after, latents))
        if (step + 1) % 250 == 0:
            with run.averaged():
                values = measure(vae, options.size, device) | {"ratio": seam_ratio(vae, options.size, device)}
            run.write(loss=torch.stack(losses).mean().item(), **values)
            losses = []
    if run.progress >= 1:
        run.average.exchange()
        log.info("done: %s, seam %.2f", measure(vae, options.size, device), seam_ratio(vae, options.size, device))
        vae.to(torch.bfloat16).save_pretrained(target)


if __name__ == "__main__":
    main()
