"""Train the VAE of Helios-Tiny: Wan 2.1's, 8 channels wide, on frames and short clips of the procedural world.

`python training/train_vae.py [--steps N] [--size 128] [--device cuda]`; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor
from trainer import CACHE, Average, Muon, Run, rngs, start_logging
from wan import decode, encode
from world import follow, render, sample_clip

WIDTH = 8
CLIP_FRAMES = (9, 17, 33)
IMAGE_STEPS = 400  # at first single frames only
VALIDATION_SEED = 900_000_000  # clips from here on are never trained on


def sample_batch(
    rng: np.random.Generator, count: int, frames: int, size: int, crop: int | None = None, device: str = "cpu"
) -> Tensor:
    """Random stretches of random clips: (count, frames, 3, size, size) in -1..1; with `crop` squares of that side,
    mostly around the thing."""
    clips = []
    for _ in range(count):
        clip = sample_clip(int(rng.integers(VALIDATION_SEED)))
        start = int(rng.integers(clip.frames - frames + 1))
        video = render(clip, start, start + frames, size, device=device)
        if crop:
            track = follow(clip)
            middle = start + frames // 2
            thing = np.array([track.y[middle], track.x[middle]]) * size + rng.uniform(-0.35, 0.35, 2) * crop - crop / 2
            anywhere = rng.uniform(0, size - crop, 2)
            y, x = np.clip(np.round(thing if rng.random() < 0.8 else anywhere), 0, size - crop).astype(int)
            video = video[..., y : y + crop, x : x + crop]
        clips.append(video)
    return torch.stack(clips) * 2 - 1


def loss_of(made: Tensor, video: Tensor) -> Tensor:
    """L1 and L2 on pixels, L1 on their differences in space and time.

    Brightness and hue are apart, or things stay gray for long; what stands out from its frame counts more, or the
    network learns backgrounds alone.
    """
    error = made - video
    gray = error.mean(2, keepdim=True)
    error = 3 * torch.cat([gray, error - gray], dim=2)
    weight = 1 + 2 * (video - video.mean(dim=(3, 4), keepdim=True)).abs().amax(2, keepdim=True)
    loss = (weight * (error.abs() + error.square())).mean()
    loss = loss + 0.5 * (error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean())
    return loss + 0.5 * error.diff(dim=1).abs().mean() if video.shape[1] > 1 else loss


def kl_of(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


@torch.no_grad()
def make_vae(width: int = WIDTH) -> AutoencoderKLWan:
    """A VAE that starts out as a pyramid of means: what its residual blocks leave alone is halved and doubled by
    averaging, and a clip is treated as images, each latent held for its four frames."""
    vae = AutoencoderKLWan(base_dim=width, z_dim=16)
    for name, layer in vae.named_modules():
        if name.endswith("conv2"):
            layer.weight.mul_(0.5)
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size[0] == 3:
            layer.weight[:, :, :-1] *= 0.1
        if name.endswith("time_conv"):
            layer.weight.mul_(0.1)
            layer.weight[:, :, -1, 0, 0] += torch.eye(layer.in_channels).repeat(
                layer.out_channels // layer.in_channels, 1
            )
            layer.bias.zero_()
        if name.endswith("resample.1"):
            eye = torch.eye(layer.out_channels).repeat_interleave(layer.in_channels // layer.out_channels, 1)
            layer.weight.mul_(0.3)
            taps = (slice(0, 2),) * 2 if layer.stride == (2, 2) else (1, 1)
            mean = eye[:, :, None, None] / 4 if layer.stride == (2, 2) else eye
            layer.weight[(slice(None), slice(None), *taps)] += mean
    vae.quant_conv.bias[16:] = -4.0  # little noise at first
    return vae


def train_step(vae: AutoencoderKLWan, video: Tensor, noise: torch.Generator, kl_weight: float, halve: bool) -> Tensor:
    """The loss of one batch. `halve` decodes latents of half the size to a video of half the size: the pyramid's
    lower stages then live in latents that mean something."""
    mean, log_variance = encode(vae, video)
    log_variance = log_variance.clamp(-20, 10)
    sigma = (0.5 * log_variance).exp()
    latents = mean + sigma * torch.randn(mean.shape, generator=noise, device=mean.device)
    kl = kl_of(mean, log_variance)
    if halve:
        latents = F.avg_pool3d(latents, (1, 2, 2))
        video = F.avg_pool3d(video, (1, 2, 2))
    return loss_of(decode(vae, latents), video) + kl_weight * kl


@torch.no_grad()
def measure(vae: AutoencoderKLWan, size: int, device: str) -> dict[str, float]:
    """PSNR of single frames and of whole chunks, and how large the latents are, on clips never trained on."""
    rows = []
    for seed in range(VALIDATION_SEED, VALIDATION_SEED + 12):
        video = render(sample_clip(seed), 33, 66, size, device=device)[None] * 2 - 1
        mean, log_variance = encode(vae, video)
        image = decode(vae, encode(vae, video[:, :1])[0])
        made = decode(vae, mean)
        psnr = [
            -10 * torch.log10((x.clamp(-1, 1) - y).square().mean() / 4).item()
            for x, y in ((image, video[:, :1]), (made, video))
        ]
        rows.append((*psnr, mean.std().item(), log_variance.exp().mean().sqrt().item()))
    return dict(zip(("psnr_image", "psnr_chunk", "std", "noise"), np.mean(rows, 0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kl", type=float, default=2e-4)
    parser.add_argument("--images", type=int, default=12, help="batch of single frames; a clip counts as 9 of them")
    parser.add_argument("--crop", type=int, help="train on squares of this side, two for one, in the first two thirds")
    parser.add_argument("--start", type=Path, help="a folder with a VAE to begin with")
    parser.add_argument("--folder", type=Path, default=CACHE)
    options = parser.parse_args()
    start_logging()
    torch.manual_seed(options.seed)
    vae = AutoencoderKLWan.from_pretrained(options.start).float() if options.start else make_vae()
    vae.to(options.device)
    optimizer = Muon(vae.named_parameters(), lr=options.lr)
    average = Average(vae.named_parameters(), 0.998)
    run = Run("vae", vae, optimizer, average, options.folder, options.steps)
    losses: dict[str, list[float]] = {"image": [], "clip": []}
    for step in run.steps(options.lr):
        rng, noise = rngs(options.seed, step, options.device)
        is_clip = (step >= IMAGE_STEPS or options.start is not None) and step % 3 == 2
        frames = int(rng.choice(CLIP_FRAMES)) if is_clip else 1
        count = max(1, options.images * 9 // (4 * frames)) if is_clip else options.images
        crop = options.crop if step < 0.65 * options.steps else None
        video = sample_batch(rng, count * (2 if crop else 1), frames, options.size, crop, options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=is_clip or options.device != "cpu"):
            loss = train_step(vae, video, noise, options.kl, halve=step % 12 in (4, 11))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        losses["clip" if is_clip else "image"].append(loss.item())
        if (step + 1) % 100 == 0:
            with run.averaged():
                values = measure(vae, options.size, options.device)
            run.write(**{k: float(np.mean(v)) if v else float("nan") for k, v in losses.items()}, **values)
            losses = {"image": [], "clip": []}


if __name__ == "__main__":
    main()
