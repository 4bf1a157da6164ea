"""The Helios transformer: a Wan-2.1-style video DiT over the sequence [long | mid | short | noisy]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import TransformerConfig
from .history import FrameIndices, History
from .layers import Block, Builder, ConditionEmbedder, KeysValues, OutputNorm
from .modulation import Modulation
from .prepared import PreparedHistory, PreparedText
from .rope import pad_to_multiple, rope_table

MID_POOL, LONG_POOL = 2, 4  # how much coarser than the short history they are patchified, in t, y and x
KEPT_ROPE_TABLES = 16  # a pyramid has six, of some 7 MB together at 384x640

BlockText = Tensor | KeysValues
RunBlock = Callable[[int, Block, Tensor, BlockText, Modulation, Tensor, bool], Tensor]
"""Block number, block and its arguments: x, text, time, rope, noisy_only."""


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
        self._rope_tables: dict[tuple, Tensor] = {}  # by what they were asked with, the oldest first
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
        text: Tensor | PreparedText,
        history: History | PreparedHistory,
        attend: Attention = sdpa,
        run_block: RunBlock | None = None,
    ) -> Tensor:
        """Noisy latents (B, 16, F, h, w), timestep (B,) in 0..1000, text (B, L, text_dim) -> flow, shaped as latents.

        The history keeps its full size (H, W) where (h, w) is a lower pyramid level. Text and history may come
        prepared, for many steps at once. `run_block` replaces the call of a block, for hosts that patch blocks; it may
        return the noisy tokens alone where noisy_only says that the rest is not read.
        """
        if isinstance(history, History):
            history = self.prepare_history(history)
        grid = self.token_grid(latents)
        x = torch.cat([history.tokens, self.patch_embedding(latents).flatten(2).transpose(1, 2)], dim=1)
        rope = torch.cat([history.rope, self.rope(history.indices.noisy, grid, 1, x.device)], dim=1)
        embedding, modulation = self.condition_embedder.time(timestep, x.dtype)
        past = modulation if history.modulation is None else history.modulation
        time = Modulation(past, modulation, history.tokens.shape[1])

        tokens = text.tokens if isinstance(text, PreparedText) else self.condition_embedder.text_embedder(text)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            block_text = text.keys_values[i] if isinstance(text, PreparedText) else tokens
            if run_block is None:
                x = block(x, block_text, time, rope, attend, noisy_only=i == last)
            else:
                x = run_block(i, cast(Block, block), x, block_text, time, rope, i == last)

        t, h, w = grid
        x = self.proj_out(self.norm_out(x[:, -t * h * w :], embedding))
        pt, ph, pw = self.config.patch_size
        x = x.unflatten(-1, (pt, ph, pw, -1)).unflatten(1, grid)  # (B, t, h, w, pt, ph, pw, C)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def prepare_text(self, text: Tensor) -> PreparedText:
        """Project a prompt (B, L, text_dim) and compute its cross-attention keys and values in every block.

        They take 2 * layers * L * D elements a prompt, and hold as long as prompt and weights stay the same.
        """
        tokens = self.condition_embedder.text_embedder(text)
        return PreparedText(tokens, tuple(cast(Block, block).attn2.keys_values(tokens) for block in self.blocks))

    def prepare_history(self, history: History) -> PreparedHistory:
        """Embed a chunk's history; it holds as long as the weights stay the same."""
        tokens, rope = self.embed_history(history)
        modulation = None
        if self.config.zero_history_timestep:
            _, modulation = self.condition_embedder.time(torch.zeros(1, device=tokens.device), tokens.dtype)
        return PreparedHistory(tokens, rope, modulation, history.indices)

    def kernel(self, pool: int) -> tuple[int, int, int]:
        """Latents that one token covers where patches are `pool` times coarser."""
        t, h, w = self.config.patch_size
        return t * pool, h * pool, w * pool

    def count_tokens(self, shape: Sequence[int], pool: int = 1) -> int:
        """How many tokens latents (..., T, H, W) become, padded up to whole patches that are `pool` times coarser."""
        return math.prod(math.ceil(size / kernel) for size, kernel in zip(shape[-3:], self.kernel(pool), strict=True))

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
        """The table of one part of the sequence, (2, S, head_dim / 2), kept for the next step. Not to be written to."""
        asked = (frames, grid[1], grid[2], self.config.rope_dim, self.config.rope_theta, pool, device)
        if torch.compiler.is_compiling():
            return rope_table(*asked)
        if asked not in self._rope_tables:
            if len(self._rope_tables) == KEPT_ROPE_TABLES:
                del self._rope_tables[next(iter(self._rope_tables))]
            # Whatever mode asks first: an inference tensor would not serve all others. On the CPU: the same for every
            # device, and before torch 2.9 Apple's cannot average.
            with torch.inference_mode(False):
                self._rope_tables[asked] = rope_table(*asked[:-1]).to(device)
        return self._rope_tables[asked]

    def _apply(self, *args: Any, **kwargs: Any) -> HeliosTransformer:
        """Called by `to`, `cuda` and the like: rope tables on the old device are dropped."""
        self._rope_tables.clear()
        return super()._apply(*args, **kwargs)
