"""What a block does between its matrix products and its attention, in plain torch, and who does it on which tensor.

`fused` has the same functions as one Triton kernel each. Both compute in float32; a fused one rounds its result once,
where these round on the way, too.

What a function overwrites is named in it: a fresh tensor of a whole sequence costs more time and memory than the
arithmetic on it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import too_old_for_triton
from .modulation import Modulation
from .rope import apply_rope_

logger = logging.getLogger(__name__)


def modulated_norm(x: Tensor, shift: Modulation, scale: Modulation, eps: float) -> Tensor:
    """LayerNorm in float32 without weights, then x * (1 + scale) + shift; (B, S, D) in x's dtype."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    scale.apply_(lambda part, row: part.mul_(1 + row), normed)
    return shift.apply_(Tensor.add_, normed).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Modulation) -> Tensor:
    """x + update * gate, summed in float32; (B, S, D) in x's dtype. Overwrites update."""
    return gate.apply_(Tensor.mul_, update.float()).add_(x).to(x.dtype)


def gated_residual_norm(
    x: Tensor, update: Tensor, gate: Modulation, norm: nn.Module, start: int
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and norm of its tokens from start on, (B, S - start, D) in x's dtype."""
    x = gated_residual(x, update, gate)
    return x, norm(x[:, start:].float()).to(x.dtype)


def residual_modulated_norm_(
    x: Tensor, update: Tensor, start: int, shift: Modulation, scale: Modulation, eps: float
) -> Tensor:
    """Add update (B, S - start, D) to the tokens of x from start on, in x itself; returns `modulated_norm` of all x."""
    x[:, start:] += update
    return modulated_norm(x, shift, scale, eps)


def rms_norm_rope(x: Tensor, norm: nn.Module, rope: Tensor | None, heads: int) -> Tensor:
    """norm of x (B, S, D), then the rotation by rope (2, S, head_dim / 2) -> (B, S, heads, head_dim).

    May overwrite x.
    """
    normed = norm(x).unflatten(-1, (heads, -1))
    return normed if rope is None else apply_rope_(normed, rope)


def fused_where_possible(x: Tensor) -> ModuleType:
    """The module whose functions are for x: `fused` where its kernels run, this one anywhere else.

    They have no backward, and what is compiled is fused by its compiler.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton itself, on any device
    possible = (x.is_cuda or interpreted) and not torch.is_grad_enabled() and x.stride(-1) == 1
    fused = None if torch.compiler.is_compiling() or not possible else _fused(x.device, x.dtype)
    return sys.modules[__name__] if fused is None else fused


@cache
def _fused(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernels, if Triton is here, knows device and dtype, and finds the compiler it builds its launchers with."""
    if device.type == "cuda":  # where Triton may end the process
        reason = "on AMD cards they were never tried." if torch.version.hip else too_old_for_triton(device, dtype)
        if reason:
            logger.info("Without fused kernels: %s", reason)
            return None
    try:
        from triton.runtime.errors import TritonError

        from . import fused
    except (ImportError, OSError) as error:
        logger.info("Without fused kernels: %s", error)
        return None
    try:
        fused.try_out(device)
    except torch.cuda.OutOfMemoryError:  # which says nothing of the kernels
        raise
    except (TritonError, ImportError, AttributeError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        logger.warning("Without fused kernels, which do not run on %s: %s", device, error)
        return None
    return fused
