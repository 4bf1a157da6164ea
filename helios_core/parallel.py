"""One forward on several devices: each process has a share of the tokens, and during self-attention of the heads.

DeepSpeed-Ulysses (arXiv 2309.14509). All processes have all weights, and call the network with the same inputs at the
same time. The history and the noisy tokens are shared out each on their own, so that cross-attention, which only the
noisy ones take part in, is balanced too. Shares may be uneven: nothing is padded, and attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import Attention, sdpa
from .layers import Block
from .modulation import Modulation
from .transformer import BlockText, RunBlock


@dataclass(frozen=True)
class Shares:
    """How many tokens of a sequence [history | noisy] each process has."""

    history: list[int]
    noisy: list[int]

    @classmethod
    def of(cls, history_tokens: int, tokens: int, degree: int) -> Shares:
        if tokens - history_tokens < degree:
            raise ValueError(
                f"{tokens - history_tokens} tokens of a chunk are too few for {degree} devices. Make a larger video, "
                "or use fewer devices."
            )
        return cls(share(history_tokens, degree), share(tokens - history_tokens, degree))

    @property
    def whole(self) -> list[int]:
        return [history + noisy for history, noisy in zip(self.history, self.noisy, strict=True)]

    def take(self, x: Tensor, rank: int) -> Tensor:
        """What a process has of x (B, S, ...): its part of the history and then that of the noisy tokens."""
        parts = x.split([*self.history, *self.noisy], dim=1)
        return torch.cat([parts[rank], parts[len(self.history) + rank]], dim=1)


def share(total: int, degree: int) -> list[int]:
    """Sizes of as many parts, which differ by at most one."""
    return [total // degree + (rank < total % degree) for rank in range(degree)]


def share_out(group: dist.ProcessGroup | None = None, attend: Attention = sdpa) -> RunBlock:
    """How `HeliosTransformer` runs its blocks in every process of this group, or of all: the flow is the same in each.

    attend is given all tokens and some of the heads. Raises ValueError where there are fewer heads or noisy tokens than
    processes.
    """
    rank, degree = dist.get_rank(group), dist.get_world_size(group)

    def run_block(
        i: int, block: Block, x: Tensor, text: BlockText, time: Modulation, rope: Tensor, noisy_only: bool
    ) -> Tensor:
        if block.attn1.heads < degree:
            raise ValueError(f"{block.attn1.heads} attention heads cannot be shared out among {degree} devices.")
        shares = Shares.of(time.history_tokens, rope.shape[1], degree)
        if i == 0:
            x = shares.take(x, rank)
        time = replace(time, history_tokens=shares.history[rank])
        heads = share(block.attn1.heads, degree)
        queries = shares.noisy if noisy_only else shares.whole

        def attend_together(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """Own tokens to those of all, which lie in the order of the processes: attention does not look at it."""
            [q] = share_heads([query], queries, heads, group)
            k, v = share_heads([key, value], shares.whole, heads, group)
            return share_tokens(attend(q, k, v), queries, [count * query.shape[-1] for count in heads], group)

        x = block(x, text, time, shares.take(rope, rank), attend, noisy_only, attend_together)
        return gather(x, shares.noisy, group) if noisy_only else x

    return run_block


def share_heads(
    tensors: Sequence[Tensor], tokens: list[int], heads: list[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Of each (B, a process's tokens, heads, head_dim): (B, all tokens, a process's heads, head_dim)."""
    batch, own, _, head_dim = tensors[0].shape
    unit = len(tensors) * batch * head_dim
    given = [own * count * unit for count in heads]
    outgoing = tensors[0].new_empty(sum(given))
    parts = zip(*(x.split(heads, dim=2) for x in tensors), strict=True)
    # Tokens come first, so that what arrives is in order, and is not copied once more.
    for room, count, part in zip(outgoing.split(given), heads, parts, strict=True):
        torch.stack([x.transpose(0, 1) for x in part], dim=1, out=room.view(own, len(part), batch, count, head_dim))
    own_heads = heads[dist.get_rank(group)]
    incoming = exchange(outgoing, given, [count * own_heads * unit for count in tokens], group)
    return [x.transpose(0, 1) for x in incoming.view(-1, len(tensors), batch, own_heads, head_dim).unbind(1)]


def share_tokens(x: Tensor, tokens: list[int], widths: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Of (B, all tokens, a process's width): (B, a process's tokens, all widths)."""
    batch, _, width = x.shape
    own = tokens[dist.get_rank(group)]
    outgoing = x.transpose(0, 1).reshape(-1)
    sizes = [own * batch * each for each in widths]
    incoming = exchange(outgoing, [count * batch * width for count in tokens], sizes, group)
    parts = (part.view(own, batch, -1) for part in incoming.split(sizes))
    return torch.cat(list(parts), dim=-1).transpose(0, 1)


def gather(x: Tensor, tokens: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Of (B, a process's tokens, D): (B, all tokens, D)."""
    batch, own, width = x.shape
    outgoing = x.transpose(0, 1).reshape(-1).repeat(len(tokens))
    sizes = [count * batch * width for count in tokens]
    incoming = exchange(outgoing, [own * batch * width] * len(tokens), sizes, group)
    return incoming.view(-1, batch, width).transpose(0, 1)


def exchange(outgoing: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Send as many values as `given` says to each process, and take so many from each; both flat."""
    incoming = outgoing.new_empty(sum(taken))
    dist.all_to_all_single(incoming, outgoing, taken, given, group)
    return incoming
