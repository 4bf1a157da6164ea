"""Helios-Tiny's transformer: diffusers' module and weights, with a forward for training that does no work twice.

The same function as HeliosTransformer3DModel's on texts of 512 zero-padded tokens. Zero tokens all have the same key
and value, so they are one token whose score is raised by the logarithm of their number; and of the modulation there
are only two rows a sample, one of the history and one of the noisy tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import HeliosTransformer3DModel
from torch import Tensor, nn

TEXT_DIM = 64
TEXT_TOKENS = 512
TOLD_TOKENS = 31  # the most that a caption of the world has; the next one stands for all the zeros
LONG, MID, NOISY = 16, 2, 9  # latent frames of the parts
CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "rope_dim": (12, 10, 10),
    "text_dim": TEXT_DIM,
    "ffn_dim": 512,
    "num_layers": 6,
}


@dataclass(frozen=True)
class History:
    """Clean latents of the past, (B, 16, T, H, W): short is the anchor and the last one."""

    long: Tensor
    mid: Tensor
    short: Tensor


def split_history(past: Tensor, anchor: Tensor) -> History:
    """past: (B, 16, 19, H, W), oldest first; anchor: (B, 16, 1, H, W)."""
    return History(past[:, :, :LONG], past[:, :, LONG : LONG + MID], torch.cat([anchor, past[:, :, -1:]], 2))


def make_transformer(seed: int) -> HeliosTransformer3DModel:
    """Starts as the identity: gates near 0, no output, small attention to the text."""
    torch.manual_seed(seed)
    model = HeliosTransformer3DModel(**CONFIG)
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.to_out[0].weight.mul_(0.5)
            block.attn2.to_out[0].weight.mul_(0.5)
        model.proj_out.weight.mul_(0.1)
        model.proj_out.bias.zero_()
    return model


def padding_bias(device: torch.device | str = "cpu") -> Tensor:
    """(32,), what is added to the scores of the told tokens (0) and of the one for the zeros (log of their number)."""
    bias = torch.zeros(TOLD_TOKENS + 1, device=device)
    bias[-1] = math.log(TEXT_TOKENS - TOLD_TOKENS)
    return bias


def rotary_tables(model: HeliosTransformer3DModel, grid: int, history_grid: int) -> Tensor:
    """cos and sin of every token in the order long, mid, short, noisy: (2, S, head_dim / 2)."""
    indices = torch.arange(1 + LONG + MID + 1 + NOISY, dtype=torch.float32)
    long, mid = indices[1 : 1 + LONG], indices[1 + LONG : 1 + LONG + MID]
    short = indices[[0, LONG + MID + 1]]
    parts = [
        F.avg_pool3d(_replicate(_angles(model, long, history_grid), 4), 4),
        F.avg_pool3d(_replicate(_angles(model, mid, history_grid), 2), 2),
        _angles(model, short, history_grid),
        _angles(model, indices[-NOISY:], grid),
    ]
    table = torch.cat([part.flatten(2) for part in parts], 2)[0].T  # (S, 2 * pairs)
    return torch.stack(table.chunk(2, dim=1))


def _angles(model: HeliosTransformer3DModel, frames: Tensor, grid: int) -> Tensor:
    """(1, cos and sin of a head's pairs, T, grid, grid)."""
    place = torch.arange(grid, dtype=torch.float32)
    axes = torch.meshgrid(frames, place, place, indexing="ij")
    rope = model.rope
    bases = (rope.freqs_base_t, rope.freqs_base_y, rope.freqs_base_x)
    angles = torch.cat([base.cpu()[:, None, None, None] * axis for base, axis in zip(bases, axes, strict=True)])
    return torch.cat([angles.cos(), angles.sin()])[None]


def _replicate(x: Tensor, size: int) -> Tensor:
    """Padded at the far ends to multiples of `size`; `size` is one number or three."""
    sizes = (size,) * 3 if isinstance(size, int) else size
    pad = [(-length) % step for length, step in zip(x.shape[2:], sizes, strict=True)]
    return F.pad(x, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")


def _patches(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution whose kernel is its stride, as a matrix product: (B, C, T, H, W) -> (B, S, D)."""
    t, h, w = layer.kernel_size
    x = _replicate(x, (t, h, w))
    x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t)).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return F.linear(x.flatten(4).flatten(1, 3), layer.weight.flatten(1), layer.bias)


def predict_flow(
    model: HeliosTransformer3DModel,
    noisy: Tensor,
    timestep: Tensor,
    text: Tensor,
    history: History,
    rotary: Tensor,
    bias: Tensor,
) -> Tensor:
    """noisy: (B, 16, 9, H, W), timestep: (B,), text: (B, 32, 64) -> (B, 16, 9, H, W)."""
    batch, grid = len(noisy), noisy.shape[-1] // 2
    parts = (
        _patches(model.patch_long, history.long),
        _patches(model.patch_mid, history.mid),
        _patches(model.patch_short, history.short),
        _patches(model.patch_embedding, noisy),
    )
    x = torch.cat(parts, dim=1)
    own = parts[3].shape[1]
    past = x.shape[1] - own

    embedder = model.condition_embedder
    times = torch.cat([timestep.float(), timestep.new_zeros(1)])
    embedded = embedder.time_embedder(embedder.timesteps_proj(times))  # (B + 1, D)
    rows = embedder.time_proj(F.silu(embedded)).unflatten(1, (6, -1)).float()  # (B + 1, 6, D)
    text = embedder.text_embedder(text)
    for block in model.blocks:
        table = rows + block.scale_shift_table.float()
        now, then = table[:-1].unsqueeze(2), table[-1:].unsqueeze(2)  # (B, 6, 1, D), (1, 6, 1, D)

        def modulated(x: Tensor, norm: nn.Module, k: int, now: Tensor = now, then: Tensor = then) -> Tensor:
            x = norm(x)
            old = x[:, :past] * (1 + then[:, k + 1]) + then[:, k]
            return torch.cat([old, x[:, past:] * (1 + now[:, k + 1]) + now[:, k]], 1)

        def gated(x: Tensor, update: Tensor, k: int, now: Tensor = now, then: Tensor = then) -> Tensor:
            return x + torch.cat([update[:, :past] * then[:, k], update[:, past:] * now[:, k]], 1)

        x = gated(x, _attend(block.attn1, modulated(x, block.norm1, 0), None, rotary, None), 2)
        seen = _attend(block.attn2, block.norm2(x[:, past:]), text, None, bias)
        x = torch.cat([x[:, :past], x[:, past:] + seen], 1)
        x = gated(x, block.ffn(modulated(x, block.norm3, 3)), 5)

    shift, scale = (model.norm_out.scale_shift_table + embedded[:-1, None].float()).chunk(2, dim=1)  # (B, 1, D)
    out = model.proj_out(model.norm_out.norm(x[:, past:]) * (1 + scale) + shift)
    out = out.view(batch, NOISY, grid, grid, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
    return out.reshape(batch, -1, NOISY, 2 * grid, 2 * grid).float()


def _attend(layer: nn.Module, x: Tensor, context: Tensor | None, rotary: Tensor | None, bias: Tensor | None) -> Tensor:
    source = x if context is None else context
    query, key, value = _rms(layer.norm_q, layer.to_q(x)), _rms(layer.norm_k, layer.to_k(source)), layer.to_v(source)
    query, key, value = (part.unflatten(2, (layer.heads, -1)) for part in (query, key, value))
    if rotary is not None:
        query, key = _rotate(query, rotary), _rotate(key, rotary)
    query, key, value = (part.transpose(1, 2).to(value.dtype) for part in (query, key, value))
    if x.is_cuda:
        mask = None if bias is None else bias.to(query.dtype).view(1, 1, 1, -1)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:  # the fused one going backward takes as long on a CPU as all the rest of a step
        scores = query @ key.transpose(2, 3) * key.shape[-1] ** -0.5
        seen = torch.softmax(scores if bias is None else scores + bias, dim=-1).to(value.dtype) @ value
    return layer.to_out[0](seen.transpose(1, 2).flatten(2))


def _rms(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), norm.weight.shape, norm.weight, norm.eps)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x: (B, S, heads, head_dim), pairs interleaved."""
    cos, sin = rotary[:, :, None]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
