"""The transformer's parts. Parameter names are those of the published (diffusers) checkpoints.

Every layer that owns weights comes from `operations`, a namespace like `torch.nn`: a host passes its own to stream,
cast, quantise or patch weights.

What a layer has just computed is its own, and later operations write into it: a fresh tensor of a whole sequence costs
more time and memory than the arithmetic on it. What a caller hands in is never written to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import elementwise
from .attention import Attention
from .config import TransformerConfig
from .modulation import Modulation, Table

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HISTORY_KEY_SCALE_MAX = 10.0

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Builder:
    """Where layers come from and the dtype each kind of weight is stored in.

    Time embedder, modulation tables and layer norms are always float32. With float8, that type is for the matrices of
    the blocks alone: a bias or a norm stored in it would cost quality and save nothing.
    """

    operations: Any
    dtype: torch.dtype
    device: torch.device | str | None

    @property
    def edge_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype in FLOAT8 else self.dtype

    def block_linear(self, inputs: int, outputs: int) -> nn.Linear:
        layer = self.operations.Linear(inputs, outputs, dtype=self.dtype, device=self.device)
        if self.edge_dtype != self.dtype:
            bias = torch.empty(outputs, dtype=self.edge_dtype, device=self.device)
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def linear(self, inputs: int, outputs: int, dtype: torch.dtype | None = None) -> nn.Linear:
        return self.operations.Linear(inputs, outputs, dtype=dtype or self.edge_dtype, device=self.device)

    def patch_embedding(self, channels: int, width: int, kernel: tuple[int, int, int]) -> nn.Conv3d:
        return self.operations.Conv3d(
            channels, width, kernel_size=kernel, stride=kernel, dtype=self.edge_dtype, device=self.device
        )

    def rms_norm(self, width: int, eps: float) -> nn.Module:
        dtype = torch.float32 if self.dtype in FLOAT8 else self.dtype
        return self.operations.RMSNorm(width, eps=eps, elementwise_affine=True, dtype=dtype, device=self.device)

    def layer_norm(self, width: int, eps: float) -> nn.LayerNorm:
        return self.operations.LayerNorm(width, eps=eps, dtype=torch.float32, device=self.device)

    def modulation_table(self, rows: int, width: int) -> Table:
        return self.table(torch.randn(1, rows, width, device=self.device) / math.sqrt(width))

    def table(self, values: Tensor) -> Table:
        kind: type[Table] = getattr(self.operations, "Table", Table)
        return kind(values)


class TimestepEmbedding(nn.Module):
    """Sinusoid (cosines first) and a two-layer perceptron, all float32."""

    def __init__(self, freq_dim: int, width: int, build: Builder):
        super().__init__()
        self.freq_dim = freq_dim
        self.linear_1 = build.linear(freq_dim, width, dtype=torch.float32)
        self.linear_2 = build.linear(width, width, dtype=torch.float32)

    def forward(self, timestep: Tensor) -> Tensor:
        """(N,) in train-step units, 0..1000 -> (N, D) float32."""
        half = self.freq_dim // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float()[:, None] * exponent.exp()
        return self.linear_2(F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class TextProjection(nn.Module):
    def __init__(self, text_dim: int, width: int, build: Builder):
        super().__init__()
        self.linear_1 = build.linear(text_dim, width)
        self.linear_2 = build.linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, text_dim) -> (B, L, D)"""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class ConditionEmbedder(nn.Module):
    """Embeds timestep and prompt for the blocks."""

    def __init__(self, config: TransformerConfig, build: Builder):
        super().__init__()
        width = config.inner_dim
        self.time_embedder = TimestepEmbedding(config.freq_dim, width, build)
        self.time_proj = build.linear(width, 6 * width)
        self.text_embedder = TextProjection(config.text_dim, width, build)

    def time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(N,) -> embedding (N, 1, D) for the head and its projection (N, 6, D) for the blocks, in dtype."""
        embedding = self.time_embedder(timestep).to(dtype)
        return embedding.unsqueeze(1), self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class GELU(nn.Module):
    def __init__(self, width: int, hidden: int, build: Builder):
        super().__init__()
        self.proj = build.block_linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, build: Builder):
        super().__init__()
        # In the middle there was a dropout: the published names are net.0.proj and net.2.
        self.net = nn.Sequential(GELU(width, hidden, build), nn.Identity(), build.block_linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SelfOrCrossAttention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys (over the full width, before the split into heads)."""

    def __init__(self, config: TransformerConfig, build: Builder, amplify_history: bool = False):
        super().__init__()
        width = config.inner_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (build.block_linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([build.block_linear(width, width)])
        self.norm_q, self.norm_k = (build.rms_norm(width, config.eps) for _ in range(2))
        scales = 1 if config.history_scale_mode == "scalar" else self.heads
        self.history_key_scale = build.table(torch.ones(scales, device=build.device)) if amplify_history else None

    def queries(self, x: Tensor, rope: Tensor | None = None, between: ModuleType = elementwise) -> Tensor:
        """x (B, S, D) -> (B, S, heads, head_dim); rope (2, S, head_dim / 2) is for self-attention."""
        return between.rms_norm_rope(self.to_q(x), self.norm_q, rope, self.heads)

    def keys_values(
        self, x: Tensor, rope: Tensor | None = None, history_tokens: int = 0, between: ModuleType = elementwise
    ) -> KeysValues:
        """Keys and values of x (B, L, D), each (B, L, heads, head_dim). Keys of the history may be amplified."""
        key = between.rms_norm_rope(self.to_k(x), self.norm_k, rope, self.heads)
        if self.history_key_scale is not None:
            scale = torch.sigmoid(self.history_key_scale(key.device))  # of all heads, or of each
            key[:, :history_tokens] *= (1 + scale * (HISTORY_KEY_SCALE_MAX - 1)).view(1, 1, -1, 1)
        return key, self.to_v(x).unflatten(-1, (self.heads, -1))

    def forward(self, query: Tensor, keys_values: KeysValues, attend: Attention) -> Tensor:
        """-> (B, S, D)"""
        return self.to_out[0](attend(query, *keys_values))


class Block(nn.Module):
    fuse = True  # what lies between products and attention, by `fused` where that runs

    def __init__(self, config: TransformerConfig, build: Builder):
        super().__init__()
        self.eps = config.eps
        self.cross_attend_history = not config.guidance_cross_attn
        self.attn1 = SelfOrCrossAttention(config, build, amplify_history=config.is_amplify_history)
        self.attn2 = SelfOrCrossAttention(config, build)
        self.norm2 = build.layer_norm(config.inner_dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(config.inner_dim, config.ffn_dim, build)
        self.scale_shift_table = build.modulation_table(6, config.inner_dim)

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        time: Modulation,
        rope: Tensor,
        attend: Attention,
        noisy_only: bool = False,
        self_attend: Attention | None = None,
    ) -> Tensor:
        """x (B, S, D) in the order [history | noisy], text (B, L, D), time of 6 rows -> (B, S, D).

        text may also be what `attn2.keys_values` makes of it. noisy_only returns the noisy tokens alone: all that is
        left to compute where nothing reads the history any more. self_attend is for the tokens among themselves, where
        x is only a part of them.
        """
        history_tokens = time.history_tokens
        start = history_tokens if noisy_only else 0
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = time.chunk(self.scale_shift_table)
        if noisy_only:
            gate, ffn_shift, ffn_scale, ffn_gate = (m.without_history() for m in (gate, ffn_shift, ffn_scale, ffn_gate))

        between = elementwise.fused_where_possible(x) if self.fuse else elementwise
        normed = between.modulated_norm(x, shift, scale, self.eps)
        query = self.attn1.queries(normed[:, start:], rope[:, start:], between)
        keys_values = self.attn1.keys_values(normed, rope, history_tokens, between)
        del normed
        update = self.attn1(query, keys_values, self_attend or attend)
        del query, keys_values
        blind = 0 if noisy_only or self.cross_attend_history else history_tokens  # tokens that do not see the text
        x, normed = between.gated_residual_norm(x[:, start:], update, gate, self.norm2, blind)

        query = self.attn2.queries(normed, between=between)
        del normed
        update = self.attn2(query, self.attn2.keys_values(text) if isinstance(text, Tensor) else text, attend)
        del query
        normed = between.residual_modulated_norm_(x, update, blind, ffn_shift, ffn_scale, self.eps)
        del update
        return between.gated_residual(x, self.ffn(normed), ffn_gate)


class OutputNorm(nn.Module):
    """LayerNorm and modulation of the noisy tokens."""

    def __init__(self, config: TransformerConfig, build: Builder):
        super().__init__()
        self.eps = config.eps
        self.scale_shift_table = build.modulation_table(2, config.inner_dim)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, N, D), embedding (B, 1, D) -> (B, N, D)"""
        shift, scale = (self.scale_shift_table(x.device) + embedding.float()).split(1, dim=1)
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).mul_(1 + scale).add_(shift).to(x.dtype)
