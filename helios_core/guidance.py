"""Classifier-free guidance, and CFG-Zero* (arXiv 2503.18886)."""

from __future__ import annotations

from torch import Tensor


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return uncond + scale * (cond - uncond)


def cfg_zero_star(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guidance from the unconditional flow scaled to fit the conditional one best."""
    return cfg(cond, uncond * projection(cond, uncond), scale)


def projection(cond: Tensor, uncond: Tensor) -> Tensor:
    """<c, u> / (|u|^2 + 1e-8) per sample, shaped (B, 1, 1, ...) to multiply the flow with.

    Well-conditioned even where u is almost zero: the sums' rounding, some 1e-7 |c| |u|, is 1e-7 |c| in the product.
    """
    c, u = cond.float().flatten(1), uncond.float().flatten(1)
    scale = (c * u).sum(dim=1) / (u.square().sum(dim=1) + 1e-8)
    return scale.to(cond.dtype).view(-1, *[1] * (cond.ndim - 1))
