"""What the parts of a run on a GPU share: the shape that is measured, random inputs, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paths  # noqa: F401
import torch
from measure import seconds
from torch import Tensor

from helios_core.config import TransformerConfig

TEXT_LENGTH = 512
TERA = 1e12


@dataclass(frozen=True)
class Shape:
    """A model and its video."""

    config: TransformerConfig = field(default_factory=TransformerConfig)
    latents: tuple[int, int] = (48, 80)
    decoded: tuple[int, int] = (48, 80)  # latents, from the first row and column on
    matrix: int = 8192  # rows and columns of the product that the peak is measured with
    vae: dict[str, Any] = field(default_factory=lambda: {"dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2})
    compiler: str = "inductor"
    turns: int = 3
    chunks: int = 3  # of a run


REAL = Shape()
TINY = Shape(
    TransformerConfig(
        num_attention_heads=2, attention_head_dim=32, rope_dim=(12, 10, 10), ffn_dim=128, text_dim=64, num_layers=2
    ),
    (8, 8),
    (2, 2),
    512,
    {"dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "eager",  # compiles nothing, which any machine can
    turns=1,
    chunks=1,
)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=torch.bfloat16)


def median(function: Callable[[], Any], turns: int) -> float:
    """Seconds; warm, but for a single turn, which is for the rehearsal."""
    if turns > 1:
        function()
    return statistics.median(seconds(function) for _ in range(turns))
