"""The Helios transformer: a Wan-2.1-style video DiT over the sequence [long | mid | short | noisy]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import TransformerConfig
from .history import FrameIndices, History
from .layers import Block, Builder, ConditionEmbedder, Modulation, OutputNorm
from .rope import pad_to_multiple, rope_table

MID_POOL, LONG_POOL = 2, 4  # how much coarser than the short history they are patchified, in t, y and x

RunBlock = Callable[[int, Block, Tensor, Tensor, Modulation, Tensor], Tensor]


class HeliosTransformer(nn.Module):
    """Predicts the flow (noise - data) of one chunk, given the history and a prompt.

    dtype is that of the matrices; time embedder, modulation tables and layer norms stay float32 (see `Builder`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype
        build = Builder(operations, dtype, device)
        width, channels = config.inner_dim, config.in_channels
        self.patch_embedding = build.patch_embedding(channels, width, self.kernel(1))
        self.patch_short = build.patch_embedding(channels, width, self.kernel(1))
        self.patch_mid = build.patch_embedding(channels, width, self.kernel(MID_POOL))
        self.patch_long = build.patch_embedding(channels, width, self.kernel(LONG_POOL))
        self.condition_embedder = ConditionEmbedder(config, build)
        self.blocks = nn.ModuleList([Block(config, build) for _ in range(config.num_layers)])
        self.norm_out = OutputNorm(config, build)
        self.proj_out = build.linear(width, config.out_channels * math.prod(config.patch_size))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        history: History,
        attend: Attention = sdpa,
        run_block: RunBlock | None = None,
    ) -> Tensor:
        """Noisy latents (B, 16, F, h, w), timestep (B,) in 0..1000, text (B, L, text_dim) -> flow, shaped as latents.

        The history keeps its full size (H, W) where (h, w) is a lower pyramid level. `run_block` replaces the call of
        a block, for hosts that patch blocks.
        """
        grid = self.token_grid(latents)
        noisy = self.patch_embedding(latents).flatten(2).transpose(1, 2)
        tokens, rope = self.embed_history(history)
        x = torch.cat([tokens, noisy], dim=1)
        rope = torch.cat([rope, self.rope(history.indices.noisy, grid, 1, x.device)], dim=1)

        history_tokens = tokens.shape[1]
        embedding, time = self.modulation(timestep, history_tokens, x.dtype)
        text = self.condition_embedder.text_embedder(text)
        for i, block in enumerate(self.blocks):
            if run_block is None:
                x = block(x, text, time, rope, attend)
            else:
                x = run_block(i, cast(Block, block), x, text, time, rope)

        x = self.proj_out(self.norm_out(x[:, history_tokens:], embedding))
        t, h, w = grid
        pt, ph, pw = self.config.patch_size
        return rearrange(x, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)

    def kernel(self, pool: int) -> tuple[int, int, int]:
        """Latents that one token covers where patches are `pool` times coarser."""
        t, h, w = self.config.patch_size
        return t * pool, h * pool, w * pool

    def token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens in time, height and width; latents the patch size does not divide are cut, as the convolution does."""
        t, h, w = (size // patch for size, patch in zip(latents.shape[-3:], self.config.patch_size, strict=True))
        return t, h, w

    def embed_history(self, history: History) -> tuple[Tensor, Tensor]:
        """Tokens (B, S, D) of [long | mid | short] and their rope table (2, S, head_dim / 2)."""
        grid = self.token_grid(history.short)
        indices: FrameIndices = history.indices
        parts = (
            (self.patch_long, history.long, indices.long, LONG_POOL),
            (self.patch_mid, history.mid, indices.mid, MID_POOL),
            (self.patch_short, history.short, indices.short, 1),
        )
        tokens, tables = [], []
        for embed, latents, frames, pool in parts:
            padded = pad_to_multiple(latents, self.kernel(pool)) if pool > 1 else latents
            tokens.append(embed(padded).flatten(2).transpose(1, 2))
            tables.append(self.rope(frames, grid, pool, latents.device))
        return torch.cat(tokens, dim=1), torch.cat(tables, dim=1)

    def rope(self, frames: tuple[int, ...], grid: tuple[int, int, int], pool: int, device: torch.device) -> Tensor:
        return rope_table(frames, grid[1], grid[2], self.config.rope_dim, self.config.rope_theta, pool, device)

    def modulation(self, timestep: Tensor, history_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Modulation]:
        """The noisy tokens' time embedding (B, 1, D) for the head, and both rows for the blocks."""
        embedding, noisy = self.condition_embedder.time(timestep, dtype)
        history = noisy
        if self.config.zero_history_timestep:
            _, history = self.condition_embedder.time(torch.zeros_like(timestep[:1]), dtype)
        return embedding, Modulation(history, noisy, history_tokens)
