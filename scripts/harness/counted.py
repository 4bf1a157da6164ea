"""How much a process sends the others of its group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class Counted:
    """`all_to_all_single`, counting messages, and the bytes that go to other processes."""

    def __init__(self, rank: int):
        self.rank, self.messages, self.bytes = rank, 0, 0
        self.right = dist.all_to_all_single

    def __call__(
        self, output: Tensor, given: Tensor, output_sizes: list[int], sizes: list[int], group: dist.ProcessGroup | None
    ) -> None:
        self.messages += 1
        self.bytes += (sum(sizes) - sizes[self.rank]) * given.element_size()
        self.right(output, given, output_sizes, sizes, group)
