"""Moving between the levels of the latent pyramid (pyramidal flow matching, arXiv 2410.05954)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2  # noise is correlated in blocks of 2 x 2 latents: one latent of the level below
JITTER = 1e-8  # the reference's, on the diagonal of a block's covariance


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


def block_factor(gamma: float) -> Tensor:
    """Lower Cholesky factor (4, 4) float32 of a block's covariance, (1 + gamma) I - gamma J + 1e-8 I.

    In closed form and rounded once, so the same on every processor. At gamma = 1/3 the covariance is all but singular:
    the last pivot squared is 4e-8, of which the reference's float32 arithmetic makes 1.8e-7 or, with another LAPACK,
    an error.
    """
    size = BLOCK * BLOCK
    diagonal = 1 + gamma + JITTER
    factor = torch.zeros(size, size)
    for column in range(size):
        # The leading minor of order n is diagonal^(n - 1) (diagonal - n gamma); pivots squared are ratios of minors.
        rest, rest_below = 1 + JITTER - (column - 1) * gamma, 1 + JITTER - column * gamma
        pivot = math.sqrt(diagonal * rest_below / rest)
        factor[column, column] = pivot
        factor[column + 1 :, column] = -gamma * diagonal / (rest * pivot)
    return factor


def block_noise(shape: torch.Size, gamma: float, rng: torch.Generator) -> Tensor:
    """Noise (B, C, T, H, W) float32 on rng's device, with correlation -gamma inside each 2 x 2 block.

    It undoes the blockiness that `double` leaves.
    """
    b, c, t, h, w = shape
    size = BLOCK * BLOCK
    z = torch.randn(b * c * t * (h // BLOCK) * (w // BLOCK), size, generator=rng, device=rng.device)
    blocks = (z @ block_factor(gamma).to(rng.device).T).view(b, c, t, h // BLOCK, w // BLOCK, BLOCK, BLOCK)
    return blocks.permute(0, 1, 2, 3, 5, 4, 6).reshape(shape)


def renoise(latents: Tensor, alpha: float, beta: float, gamma: float, rng: torch.Generator) -> Tensor:
    """Enter a level from the one below: double, then mix in block noise."""
    latents = double(latents)
    noise = block_noise(latents.shape, gamma, rng).to(device=latents.device, dtype=latents.dtype)
    return alpha * latents + beta * noise
