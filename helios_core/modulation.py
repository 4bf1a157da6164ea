"""Tables, which hold values of a layer's own, and modulation: what these and the time embedding do to tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


class Table(nn.Module):
    """Float32 values that belong to no layer of torch's. In a file they are a bare tensor; hosts patch and move
    `weight`s of modules."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, device: torch.device) -> Tensor:
        return self.weight.to(device=device, dtype=torch.float32)


@dataclass(frozen=True)
class Modulation:
    """What the time embedding does to tokens: one row for the history, at timestep 0, and one for the noisy tokens."""

    history: Tensor  # (B or 1, rows, D)
    noisy: Tensor  # (B, rows, D)
    history_tokens: int

    def chunk(self, table: Table) -> list[Modulation]:
        """Add a layer's own table (1, rows, D) and part the rows: as many modulations, of one row each."""
        rows = table(self.noisy.device)
        history, noisy = ((x.float() + rows).split(1, dim=1) for x in (self.history, self.noisy))
        return [Modulation(*pair, self.history_tokens) for pair in zip(history, noisy, strict=True)]

    def without_history(self) -> Modulation:
        """The same modulation for a sequence of the noisy tokens alone."""
        return replace(self, history_tokens=0)

    def apply_(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Let function(part, row) overwrite the history tokens and then the noisy tokens of x (B, S, D); returns x."""
        function(x[:, : self.history_tokens], self.history)
        function(x[:, self.history_tokens :], self.noisy)
        return x
