"""A Linear with a float8 weight and one scale, as ComfyUI's `float8_e4m3fn` files hold it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max
VALUES_AT_ONCE = 1 << 18  # of which quantising and comparing hold copies in float32 and float64


class ScaledLinear(nn.Module):
    """Multiplies by weight * weight_scale, in the dtype of what comes in."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.float8_e4m3fn):
        """In place of `linear`, of which it takes sizes and bias. Its own values are on meta until they are loaded."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty((), device="meta"), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.weight, self.weight_scale, x.dtype), self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}input_scale", None)  # is for those who multiply in fp8
        super()._load_from_state_dict(state_dict, prefix, *args)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale)


def scale_of(weight: Tensor) -> Tensor:
    """The scale (), float32, with which float8_e4m3fn holds the largest value of a weight: the least power of two.

    Decoding is exact with it in every dtype. Newer hosts round other scales to the dtype that they compute in, which
    costs as much as bf16 does.
    """
    low, high = weight.aminmax()
    mantissa, exponent = torch.frexp(torch.maximum(-low, high).float() / LARGEST)  # the mantissa is 0.5 or more, or 0
    power = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())
    return torch.where(mantissa.isfinite(), power, mantissa)


def quantise(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale in float8_e4m3fn. Takes little memory beside weight and result."""
    result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for rows in _rows(weight):
        result[rows] = (weight[rows].float() / scale).clamp_(-LARGEST, LARGEST).to(result.dtype)
    return result


def relative_error(weight: Tensor, quantised: Tensor, scale: Tensor) -> float:
    """Root of the mean square of what quantising changed, as a fraction of the weight's own."""
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for rows in _rows(weight):
        values = weight[rows].float()
        change = dequantise(quantised[rows], scale, torch.float32) - values
        squares += torch.stack([change.double().square().sum(), values.double().square().sum()])
    error, whole = squares.tolist()
    return (error / whole) ** 0.5 if whole else 0.0


def _rows(weight: Tensor) -> Iterator[slice]:
    step = max(1, VALUES_AT_ONCE // max(1, weight[0].numel()))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
