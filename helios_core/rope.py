"""Rotary position embedding over (frame, row, column), with pooled tables for coarsely patchified history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import COMPLEX


def pad_to_multiple(x: Tensor, multiple: tuple[int, int, int]) -> Tensor:
    """Replicate-pad the last three axes of (B, C, T, H, W) upwards to multiples of the given sizes."""
    t, h, w = (-size % m for size, m in zip(x.shape[-3:], multiple, strict=True))
    return F.pad(x, (0, w, 0, h, 0, t), mode="replicate") if t or h or w else x


def rope_table(
    frame_indices: Sequence[int],
    height: int,
    width: int,
    rope_dim: tuple[int, int, int],
    theta: float,
    pool: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cosines and sines of one part of the sequence, (2, S, head_dim / 2) float32.

    height and width count tokens of the full-resolution grid. A part that is patchified `pool` times coarser gets
    the average of the tables of the tokens it covers (Helios paper, multi-term memory patchification).
    """
    axes = (
        torch.tensor(frame_indices, dtype=torch.float32, device=device),
        torch.arange(height, dtype=torch.float32, device=device),
        torch.arange(width, dtype=torch.float32, device=device),
    )
    grid = (len(frame_indices), height, width)
    angles = []  # per axis: (dim / 2, T, H, W)
    for axis, (positions, dim) in enumerate(zip(axes, rope_dim, strict=True)):
        frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        shape = [-1 if i == axis else 1 for i in range(3)]
        angles.append((frequencies[:, None, None, None] * positions.view(1, *shape)).expand(-1, *grid))
    angle = torch.cat(angles)
    table = torch.stack([angle.cos(), angle.sin()])  # (2, head_dim / 2, T, H, W)
    if pool > 1:
        table = F.avg_pool3d(pad_to_multiple(table, (pool, pool, pool)), pool)
    return table.flatten(2).transpose(1, 2)


def apply_rope_(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (B, S, heads, head_dim) by table (2, S, head_dim / 2), in float32.

    Overwrites x where it is float32 already.
    """
    cos, sin = table.unsqueeze(2)  # (S, 1, head_dim / 2)
    pairs = x.float().unflatten(-1, (-1, 2))
    # A pair as one complex number: one pass over memory, not eight. Inductor writes no code for those.
    if x.device.type in COMPLEX and not torch.compiler.is_compiling():
        torch.view_as_complex(pairs).mul_(torch.complex(cos, sin))
        return pairs.flatten(-2).to(x.dtype)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
