"""One step of each ODE solver, from sigma to the next; no state but what is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NO_FLOAT64 = ("mps", "xpu", "privateuseone")  # Apple, Intel, DirectML
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
class UniPCState:
    """What a multistep solver remembers between two steps of a stage."""

    latents: Tensor  # where the last prediction started
    x0: Tensor  # its data prediction
    sigma: float
    order: int
    older_x0: Tensor | None = None  # the data prediction before that
    older_sigma: float = 1.0


def unipc_step(
    state: UniPCState | None, latents: Tensor, flow: Tensor, sigma: float, sigma_next: float, last: bool
) -> tuple[Tensor, UniPCState]:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2") on data predictions (arXiv 2302.04867).

    The flow just predicted first corrects how its own latents were reached, then predicts the next. The first step
    of a stage, for want of a past, and the last are of order 1.
    """
    x0 = to_x0(latents, flow, sigma)
    if state is not None:
        latents = _correct(state, x0, sigma)
    order = 1 if state is None or last else 2
    older_x0, older_sigma = (state.x0, state.sigma) if state is not None else (None, 1.0)
    new = UniPCState(latents, x0, sigma, order, older_x0, older_sigma)
    return _predict(new, sigma_next), new


def _log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(max(sigma, SIGMA_MIN))


def _linear_part(state: UniPCState, sigma: float) -> tuple[Tensor, float, float]:
    """(the step without differences, its weight for differences, h in log-SNR)"""
    h = _log_snr(sigma) - _log_snr(state.sigma)
    weight = (1 - sigma) * math.expm1(-h)
    ratio = max(sigma, SIGMA_MIN) / max(state.sigma, SIGMA_MIN)
    return ratio * state.latents - weight * state.x0, weight, h


def _older_difference(state: UniPCState, h: float) -> tuple[Tensor, float]:
    """Slope towards the data prediction before the last, and its distance in units of h."""
    assert state.older_x0 is not None
    r = (_log_snr(state.older_sigma) - _log_snr(state.sigma)) / h
    return (state.older_x0 - state.x0) / r, r


def _predict(state: UniPCState, sigma_next: float) -> Tensor:
    linear, weight, h = _linear_part(state, sigma_next)
    if state.order == 1:
        return linear
    slope, _ = _older_difference(state, h)
    return linear - weight * (0.5 * slope)


def _correct(state: UniPCState, x0: Tensor, sigma: float) -> Tensor:
    linear, weight, h = _linear_part(state, sigma)
    newest = x0 - state.x0
    if state.order == 1:
        return linear - weight * (0.5 * newest)
    # Weights (a, b) of both differences: a + b = b1, r a + b = b2, with phi functions of -h over B(h).
    slope, r = _older_difference(state, h)
    phi1 = math.expm1(-h) / -h - 1
    b1 = phi1 / math.expm1(-h)
    b2 = 2 * (phi1 / -h - 0.5) / math.expm1(-h)
    a = (b1 - b2) / (1 - r)
    return linear - weight * (a * slope + (b1 - a) * newest)
