"""Fold a change of coordinates into a trained VAE, so that a host that only knows Wan's statistics is right about it.

The host normalises latents with Wan's means and deviations and previews them with Wan's colour factors. A map M and a
shift, found here and multiplied into the two 1x1 convolutions, make normalised latents of mean 0 and deviation 1 whose
previews have about the true colours. Nothing changes in what the VAE reconstructs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from train_vae import VALIDATION_SEED, make_vae, measure, sample_batch
from trainer import CACHE, log, start_logging
from wan import encode

# What Wan 2.1's latent format in ComfyUI (comfy/latent_formats.py) previews normalised latents with: rgb = z @ F + b.
PREVIEW = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
PREVIEW_BIAS = (-0.1835, -0.0868, -0.3360)


def wan_statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    return torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)


@torch.no_grad()
def sample_latents(vae: AutoencoderKLWan, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, 16) of whole chunks, the mean colours (N, 3) of their pixels in -1..1, the posterior's variance."""
    rng = np.random.default_rng(5)
    latents, colours, variances = [], [], []
    for _ in range(chunks):
        video = sample_batch(rng, 1, 33, 64)
        mean, log_variance = encode(vae, video)
        rgb = torch.nn.functional.avg_pool2d(video[0], 8)  # (33, 3, 8, 8)
        rgb = torch.cat([rgb[:1], rgb[1:].unflatten(0, (8, 4)).mean(1)])
        latents.append(mean[0].permute(0, 2, 3, 1).reshape(-1, 16))
        colours.append(rgb.permute(0, 2, 3, 1).reshape(-1, 3))
        variances.append(log_variance[0].exp().permute(0, 2, 3, 1).reshape(-1, 16))
    return torch.cat(latents), torch.cat(colours), torch.cat(variances).mean(0)


def find_map(latents: Tensor, colours: Tensor, spread: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """M (16, 16), shift (16,) and the preview's error, so that latents @ M.T + shift has mean 0, deviation 1 and the
    preview's colours.

    Between a rotation, which keeps strong directions strong, and whitening, which makes all equal: singular values of
    the latents are taken to the power 1 - `spread` first, then rotated.
    """
    mean = latents.mean(0)
    centred = latents - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    values = values.clamp_min(values.max() * 1e-4)
    scaled = vectors * values.pow(-spread / 2)  # principal directions, levelled
    base = centred @ scaled
    base_scale = base.square().mean().sqrt()
    base, scaled = base / base_scale, scaled / base_scale
    factors, bias = torch.tensor(PREVIEW), torch.tensor(PREVIEW_BIAS)
    skew = torch.zeros(16, 16, requires_grad=True)
    tilt = torch.zeros(16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([skew, tilt], lr=0.02)
    sample = torch.randperm(len(base), generator=torch.Generator().manual_seed(0))[:20000]
    gram = base[sample].T @ base[sample] / len(sample)
    cross = base[sample].T @ (colours[sample] - bias) / len(sample)
    power = (colours[sample] - bias).square().mean(0).sum()
    for step in range(3000):
        rotation = torch.linalg.matrix_exp(skew - skew.T)
        matrix = rotation @ (torch.eye(16) + tilt)  # z = base @ matrix.T
        deviations = torch.einsum("ij,jk,ik->i", matrix, gram, matrix).sqrt()
        seen = matrix.T @ factors
        error = torch.einsum("ic,ij,jc->", seen, gram, seen) - 2 * (seen * cross).sum() + power
        loss = error + (deviations - 1).square().sum() + 0.05 * tilt.square().sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 3000)
        optimizer.step()
    with torch.no_grad():
        matrix = matrix / torch.einsum("ij,jk,ik->i", matrix, gram, matrix).sqrt()[:, None]
        full = matrix @ scaled.T
        z = centred[sample] @ full.T
        error = (z @ factors + bias - colours[sample]).square().mean().sqrt()
    return full, -full @ mean, error


@torch.no_grad()
def fold(vae: AutoencoderKLWan, matrix: Tensor, shift: Tensor, variance: Tensor) -> None:
    """Make `vae` give latents @ (std * matrix).T + std * shift + mean, and take them back apart."""
    mean, std = wan_statistics(vae)
    matrix, shift = std[:, None] * matrix, std * shift + mean
    layer, back = vae.quant_conv, vae.post_quant_conv
    weight, bias = layer.weight[:16, :, 0, 0, 0].clone(), layer.bias[:16].clone()
    layer.weight[:16, :, 0, 0, 0] = matrix @ weight
    layer.bias[:16] = matrix @ bias + shift
    layer.weight[16:] = 0  # the posterior's variance as it is on average: no linear map of its logarithm would be right
    layer.bias[16:] = (matrix.square() @ variance).log()
    inverse = torch.linalg.inv(matrix.double())
    weight = back.weight[:, :, 0, 0, 0].double() @ inverse
    back.bias -= (weight @ shift.double()).float()
    back.weight[:, :, 0, 0, 0] = weight.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the folder to write, such as models/Helios-Tiny/vae")
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--chunks", type=int, default=40)
    options = parser.parse_args()
    start_logging()
    vae = make_vae()
    state = torch.load(options.folder / "vae.pt", weights_only=True)
    with torch.no_grad():
        vae.load_state_dict(state["average"], strict=False)
    vae.requires_grad_(False)
    log.info("step %d: %s", state["step"], measure(vae, 64, "cpu"))
    latents, colours, variance = sample_latents(vae, options.chunks)
    matrix, shift, error = find_map(latents, colours)
    log.info("condition %.1f, previews are off by %.3f of 2", torch.linalg.cond(matrix), error)
    fold(vae, matrix, shift, variance)
    vae.to(torch.bfloat16).save_pretrained(options.target)
    vae = AutoencoderKLWan.from_pretrained(options.target).float()
    latents, _, variance = sample_latents(vae, options.chunks)
    mean, std = wan_statistics(vae)
    z = (latents - mean) / std
    log.info("saved in bfloat16: %s", measure(vae, 64, "cpu"))
    log.info("normalised: mean %s, deviation %s", z.mean(0).abs().max(), z.std(0))
    log.info("clips from seed %d on were not trained on", VALIDATION_SEED)


if __name__ == "__main__":
    main()
