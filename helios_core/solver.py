"""One step of each ODE solver, from sigma to the next; no state but what is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .devices import NO_FLOAT64

SIGMA_MIN = 1e-8  # keeps log(sigma) finite at the end of a stage


def to_x0(latents: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """The clean latents that a flow points at: x0 = x - sigma * flow."""
    return latents - sigma * flow


def euler_step(latents: Tensor, flow: Tensor, sigma: float, sigma_next: float) -> Tensor:
    return (latents.float() + (sigma_next - sigma) * flow).to(flow.dtype)


def dmd_step(latents: Tensor, flow: Tensor, sigma: float, sigma_next: float, start: Tensor) -> Tensor:
    """Jump to x0, then re-noise with `start`, the point where the stage began (not with fresh noise).

    In float64, as the reference, where the device has it.
    """
    wide = torch.float32 if latents.device.type in NO_FLOAT64 else torch.float64
    x0 = to_x0(latents.to(wide), flow.to(wide), sigma).to(flow.dtype)
    if sigma_next == 0:
        return x0
    return ((1 - sigma_next) * x0.to(wide) + sigma_next * start.to(wide)).to(start.dtype)


@dataclass(frozen=True)
class Point:
    """What a multistep solver remembers of a step."""

    latents: Tensor  # where it started
    x0: Tensor  # its data prediction
    sigma: float


def unipc_step(
    past: tuple[Point, ...], latents: Tensor, flow: Tensor, sigma: float, sigma_next: float, last: bool
) -> tuple[Tensor, tuple[Point, ...]]:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2") on data predictions (arXiv 2302.04867).

    The flow just predicted first corrects how its own latents were reached, then predicts the next. The first step
    of a stage, for want of a past, and the last are of order 1. Hand the points that come back to the next step.
    """
    x0 = to_x0(latents, flow, sigma)
    if past:
        latents = _advance(past, sigma, x0)
    past = (*past[-1:], Point(latents, x0, sigma))
    return _advance(past[-1:] if last else past, sigma_next), past


def _advance(past: tuple[Point, ...], sigma: float, newest: Tensor | None = None) -> Tensor:
    """The latents at sigma from the last point (order 1) or two (order 2); corrected, if x0 at sigma is known."""
    start = past[-1]
    h = _log_snr(sigma) - _log_snr(start.sigma)
    weight = (1 - sigma) * math.expm1(-h)
    latents = max(sigma, SIGMA_MIN) / max(start.sigma, SIGMA_MIN) * start.latents - weight * start.x0
    if len(past) == 1:
        return latents if newest is None else latents - weight * (0.5 * (newest - start.x0))

    r = (_log_snr(past[0].sigma) - _log_snr(start.sigma)) / h  # where the older point is, in units of h
    slope = (past[0].x0 - start.x0) / r
    if newest is None:
        return latents - weight * (0.5 * slope)
    # Weights (a, b) of both differences: a + b = b1, r a + b = b2, with phi functions of -h over B(h).
    phi1 = math.expm1(-h) / -h - 1
    b1 = phi1 / math.expm1(-h)
    b2 = 2 * (phi1 / -h - 0.5) / math.expm1(-h)
    a = (b1 - b2) / (1 - r)
    return latents - weight * (a * slope + (b1 - a) * (newest - start.x0))


def _log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(max(sigma, SIGMA_MIN))
