"""Attention backends: a plain function, so that any host's own can take its place."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, S, heads, head_dim) queries, keys and values -> (B, S, heads * head_dim)."""


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's scaled dot product attention, without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
