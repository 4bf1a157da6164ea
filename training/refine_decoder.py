"""Train the finished VAE's decoder on, its encoder untouched: the transformers' latents stay what they are.

What this is for is the seam: a chunk's first frame is decoded as an image, its last ones from a latent for four, and a
plain background that comes out a little darker from the one than from the other jumps. The loss compares both sides of
a seam too. `python training/refine_decoder.py [--steps N]` goes on where it was and, once done, writes the VAE back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from parts import weights_folder
from torch import Tensor
from train_vae import VALIDATION_SEED, loss_of, measure
from trainer import CACHE, Average, Muon, Run, log, rngs, start_logging, warm_cosine
from wan import decode, encode
from world import FRAMES_PER_CHUNK, render, sample_clip

NOISE = 0.1  # on latents, in their deviations: what a transformer makes is not exact


def sample_seam(rng: np.random.Generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """A chunk and the first frame of the next: (count, 33, 3, size, size), (count, 1, 3, size, size) in -1..1."""
    videos = []
    for _ in range(count):
        clip = sample_clip(int(rng.integers(VALIDATION_SEED)))
        start = int(rng.integers(len(clip.acts) - 1)) * FRAMES_PER_CHUNK
        videos.append(render(clip, start, start + FRAMES_PER_CHUNK + 1, size))
    video = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3) * 2 - 1
    return video[:, :FRAMES_PER_CHUNK], video[:, FRAMES_PER_CHUNK:]


@torch.no_grad()
def seam_ratio(vae: AutoencoderKLWan, size: int, device: str) -> float:
    """Mean difference of frames at seams by that within chunks, over clips without changes; 1 is seamless."""
    at, within = [], []
    for seed in range(VALIDATION_SEED, VALIDATION_SEED + 8):
        video = torch.from_numpy(render(sample_clip(seed), 0, 2 * FRAMES_PER_CHUNK, size)).permute(0, 3, 1, 2) * 2 - 1
        chunks = video.to(device).unflatten(0, (2, FRAMES_PER_CHUNK))
        made = torch.cat([decode(vae, encode(vae, chunk[None])[0])[0] for chunk in chunks])
        steps = made.clamp(-1, 1).diff(dim=0).abs().mean((1, 2, 3))
        at.append(steps[FRAMES_PER_CHUNK - 1].item())
        within.append(steps[FRAMES_PER_CHUNK - 9 : FRAMES_PER_CHUNK - 1].mean().item())
    return float(np.sum(at) / np.sum(within))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=1, help="seams a step")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args()
    start_logging()
    device, target = options.device, weights_folder() / "vae"
    vae = AutoencoderKLWan.from_pretrained(target).float().to(device)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    deviation = torch.tensor(vae.config.latents_std, device=device).view(-1, 1, 1)
    trained = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    run = Run("decoder", vae, Muon(trained, options.lr), Average((p for _, p in trained), 0.995), options.folder)
    losses: list[tuple[float, float]] = []
    for step in run.steps(options.steps):
        rng, noise = rngs(options.seed, step, device)
        before, after = (part.to(device) for part in sample_seam(rng, options.batch, options.size))
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = torch.cat([encode(vae, before)[0], encode(vae, after)[0]], 1).float()
                latents += NOISE * deviation * torch.randn(latents.shape, generator=noise, device=device)
            made, image = decode(vae, latents[:, :-1]).float(), decode(vae, latents[:, -1:]).float()
            seam = (image[:, 0] - made[:, -1]) - (after[:, 0] - before[:, -1])
            loss = loss_of(made, before) + loss_of(image, after) + 3 * seam.abs().mean()
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        for group in run.optimizer.param_groups:
            group["lr"] = options.lr * warm_cosine(step, options.steps, 50)
        run.optimizer.step()
        losses.append((loss.item(), seam.abs().mean().item()))
        if (step + 1) % 250 == 0:
            run.average.exchange()
            values = measure(vae, options.size, device) | {"ratio": seam_ratio(vae, options.size, device)}
            run.average.exchange()
            loss_mean, seam_mean = np.mean(losses, 0)
            run.write(loss=float(loss_mean), seam=float(seam_mean), **values)
            losses = []
    if run.step >= options.steps:
        run.average.exchange()
        log.info("done: %s, seam %.2f", measure(vae, options.size, device), seam_ratio(vae, options.size, device))
        vae.to(torch.bfloat16).save_pretrained(target)


if __name__ == "__main__":
    main()
