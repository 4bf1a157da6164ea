"""How far a result is from the one that is expected, relative to the size of its values."""

from __future__ import annotations

from torch import Tensor


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def mean_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square, of that of the values: what rounding comes to, whichever way it falls."""
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
