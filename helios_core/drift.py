"""Adaptive anti-drifting: when a chunk's statistics run away, the history it leaves is made less certain.

From the authors' repository, with one difference: there the noise is added to the chunk itself and shows in the video;
here only the memory gets it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import CHUNK_LATENTS
from .history import Memory, Statistics


@dataclass(frozen=True)
class AntiDrift:
    """When to correct and how strongly. The defaults are the authors'."""

    mean_momentum: float = 0.9
    var_momentum: float = 0.9
    mean_threshold: float = 0.15
    var_threshold: float = 0.15
    strength: float = 0.1  # standard deviation of the noise

    def observe(self, memory: Memory, latents: Tensor) -> Memory:
        """Take a chunk (B, 16, 9, H, W) that was just pushed into the running averages, and judge it by them."""
        mean, var = latents.float().mean(dim=(2, 3, 4)), latents.float().var(dim=(2, 3, 4))  # (B, 16)
        past = memory.statistics
        if past is not None:
            averages = Statistics(
                self.mean_momentum * past.mean + (1 - self.mean_momentum) * mean,
                self.var_momentum * past.var + (1 - self.var_momentum) * var,
            )
        else:
            averages = Statistics(mean, var)
        # A threshold is a boundary: a drift that equals it to six digits may be judged otherwise on another machine.
        mean_drift = (mean - averages.mean).norm(dim=-1).mean().item()
        var_drift = (var - averages.var).norm(dim=-1).mean().item()
        drifted = mean_drift > self.mean_threshold and var_drift > self.var_threshold
        return replace(memory, statistics=averages, drifted=drifted)

    def correct(self, memory: Memory, rng: torch.Generator) -> Memory:
        """Before the next chunk: add noise to the newest chunk in a memory that has drifted; nothing to any other."""
        if not memory.drifted:
            return memory
        newest = memory.latents[:, :, -CHUNK_LATENTS:]
        noise = torch.randn(newest.shape, generator=rng, device=rng.device).to(newest.device)
        older = memory.latents[:, :, :-CHUNK_LATENTS]
        return replace(memory, latents=torch.cat([older, newest + self.strength * noise], dim=2), drifted=False)
