"""A prompt and a chunk's history as `HeliosTransformer` prepares them once, to be given to each step in their place.

The network keeps none of them. Who runs the steps does, and drops them when prompt, history or weights change.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .history import FrameIndices
from .layers import KeysValues


@dataclass(frozen=True)
class PreparedText:
    """A prompt as the blocks' cross-attention reads it."""

    tokens: Tensor  # (B, L, D)
    keys_values: tuple[KeysValues, ...]  # of each block

    @property
    def nbytes(self) -> int:
        tensors = [self.tokens, *(x for pair in self.keys_values for x in pair)]
        return sum(x.numel() * x.element_size() for x in tensors)


@dataclass(frozen=True)
class PreparedHistory:
    """A history as tokens [long | mid | short], and what timestep 0 does to them."""

    tokens: Tensor  # (B, S, D)
    rope: Tensor  # (2, S, head_dim / 2)
    modulation: Tensor | None  # (1, 6, D); None where history shares the noisy tokens' timestep
    indices: FrameIndices
