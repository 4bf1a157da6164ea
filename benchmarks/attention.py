"""Self-attention of the largest stage by every backend that is here, and the matrix product that shares are of."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from card import TERA, Shape, median, random
from measure import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helios_core.attention import Attention, sdpa

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
LIBRARIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # each takes (B, S, heads, head_dim)
    "flash_attn_2": ("flash_attn", "flash_attn_func", {}),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_func", {}),
    "xformers": ("xformers.ops", "memory_efficient_attention", {}),
    "sage_not_exact": ("sageattention", "sageattn", {"tensor_layout": "NHD"}),
}


def rows(shape: Shape) -> Iterator[Row]:
    height, width = (size // 2 for size in shape.latents)
    history = height * width * 2 + -(-height // 2) * -(-width // 2) + 4 * -(-height // 4) * -(-width // 4)
    length, heads, size = (
        9 * height * width + history,
        shape.config.num_attention_heads,
        shape.config.attention_head_dim,
    )
    q, k, v = (random(1, length, heads, size) for _ in range(3))
    work = 4 * length**2 * heads * size
    for label, attend in backends().items():
        if isinstance(attend, str):
            yield Row.open(f"attention_{label}", attend)
            continue
        try:
            took = median(partial(attend, q, k, v), shape.turns)
        except RuntimeError as error:  # not for this device, dtype or size, or out of memory
            yield Row.open(f"attention_{label}", first_line(error))
            continue
        yield Row(f"attention_{label}", took, None, "s", note=f"{work / took / TERA:.1f} TFLOP/s")


def matrix_peak(shape: Shape) -> float:
    """FLOP/s of a large bf16 matrix product: what the percentages are of."""
    a, b = random(shape.matrix, shape.matrix), random(shape.matrix, shape.matrix)
    return 2 * shape.matrix**3 / median(lambda: a @ b, shape.turns)


def backends() -> dict[str, Attention | str]:
    """By name: torch's choice, each of its backends, each library that is here. Why not, where it is not."""
    found: dict[str, Attention | str] = {"default": sdpa}
    found |= {backend.name.lower(): partial(_by_torch, backend) for backend in BACKENDS}
    for label, (module, function, options) in LIBRARIES.items():
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            found[label] = f"{module} is not installed"
            continue
        try:
            call = getattr(importlib.import_module(module), function)
        except (ImportError, OSError) as error:  # built for another torch or CUDA
            found[label] = first_line(error)
            continue
        found[label] = partial(_by_library, partial(call, **options))
    return found


def _by_torch(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _by_library(call: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result = call(query, key, value)
    output: Tensor = result[0] if isinstance(result, tuple) else result  # early versions of FA3 add the log-sum-exp
    return output.flatten(2)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
