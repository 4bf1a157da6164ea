"""Moving between the levels of the latent pyramid (pyramidal flow matching, arXiv 2410.05954)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2  # noise is correlated in blocks of 2 x 2 latents: one latent of the level below


def _per_frame(x: Tensor, **interpolation: Any) -> Tensor:
    b = x.shape[0]
    frames = F.interpolate(x.transpose(1, 2).flatten(0, 1), **interpolation)
    return frames.unflatten(0, (b, -1)).transpose(1, 2)


def halve(noise: Tensor) -> Tensor:
    """Gaussian noise (B, C, T, H, W) one level down; the factor 2 restores the unit variance that averaging takes."""
    return _per_frame(noise, size=(noise.shape[-2] // 2, noise.shape[-1] // 2), mode="bilinear") * 2


def double(latents: Tensor) -> Tensor:
    """Latents (B, C, T, H, W) one level up, each value repeated in a 2 x 2 block."""
    return _per_frame(latents, scale_factor=2, mode="nearest")


def block_noise(shape: torch.Size, gamma: float, rng: torch.Generator) -> Tensor:
    """Noise (B, C, T, H, W) float32 on rng's device, with correlation -gamma inside each 2 x 2 block.

    It undoes the blockiness that `double` leaves. The covariance of a block is (1 + gamma) I - gamma J + 1e-8 I, all
    but singular for gamma = 1/3: its factor hangs on the rounding, so these operations come in the reference's order.
    """
    b, c, t, h, w = shape
    size = BLOCK * BLOCK
    covariance = torch.eye(size) * (1 + gamma) - torch.ones(size, size) * gamma + torch.eye(size) * 1e-8
    factor = torch.linalg.cholesky(covariance).to(rng.device)
    z = torch.randn(b * c * t * (h // BLOCK) * (w // BLOCK), size, generator=rng, device=rng.device)
    blocks = (z @ factor.T).view(b, c, t, h // BLOCK, w // BLOCK, BLOCK, BLOCK)
    return blocks.permute(0, 1, 2, 3, 5, 4, 6).reshape(shape)


def renoise(latents: Tensor, alpha: float, beta: float, gamma: float, rng: torch.Generator) -> Tensor:
    """Enter a level from the one below: double, then mix in block noise."""
    latents = double(latents)
    noise = block_noise(latents.shape, gamma, rng).to(device=latents.device, dtype=latents.dtype)
    return alpha * latents + beta * noise
