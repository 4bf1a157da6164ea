"""The functions of `elementwise` as Triton kernels: each reads a tensor once and writes it once.

A program has one token, whose row stays in registers. Where a norm is not torch's own it may cast, patch or fetch its
weights: if it does not lend them, it is called, and what is left is fused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from . import elementwise
from .modulation import Modulation

# That share a row: of 4, 8 and 16 what an H200 was fastest with, or no slower.
WARPS = {"_residual_modulated_norm": 16, "_gated_residual_norm": 8, "_rms_norm_rope": 8}
LENGTHS = ("tokens", "history_tokens", "start")  # one kernel for all of them: each takes a second to compile
TRIED_OUT = 1e-5  # how far from plain torch, relative to the largest value


@triton.jit
def _layer_norm(row, inside, width, eps):
    centred = tl.where(inside, row - tl.sum(row) / width, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)


@triton.jit(do_not_specialize=LENGTHS)
def _residual_modulated_norm(
    x,
    update,
    normed,
    shift_history,
    shift_noisy,
    scale_history,
    scale_noisy,
    x_batch,
    x_token,
    history_batch,
    noisy_batch,
    tokens,
    history_tokens,
    start,
    width,
    eps,
    adds: tl.constexpr,
    block: tl.constexpr,
):
    """x += update from token start on, then normed = LayerNorm(x) * (1 + scale) + shift. Programs (S, B)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    at = x + batch * x_batch + token * x_token + column
    row = tl.load(at, mask=inside, other=0.0)
    if adds:
        added = inside & (token >= start)
        change = tl.load(update + (batch * (tokens - start) + token - start) * width + column, mask=added, other=0.0)
        row = (row.to(tl.float32) + change.to(tl.float32)).to(row.dtype)
        tl.store(at, row, mask=added)
    shift, scale = shift_noisy + batch * noisy_batch, scale_noisy + batch * noisy_batch
    if token < history_tokens:
        shift, scale = shift_history + batch * history_batch, scale_history + batch * history_batch
    factor = 1 + tl.load(scale + column, mask=inside, other=0.0)
    result = _layer_norm(row.to(tl.float32), inside, width, eps) * factor
    result += tl.load(shift + column, mask=inside, other=0.0)
    tl.store(normed + (batch * tokens + token) * width + column, result.to(row.dtype), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _gated_residual_norm(
    x,
    update,
    normed,
    gate_history,
    gate_noisy,
    weight,
    bias,
    x_batch,
    x_token,
    history_batch,
    noisy_batch,
    tokens,
    history_tokens,
    start,
    width,
    eps,
    block: tl.constexpr,
):
    """update = x + update * gate; from token start on, normed = LayerNorm(update) * weight + bias. Programs (S, B)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    row = tl.load(x + batch * x_batch + token * x_token + column, mask=inside, other=0.0)
    at = update + (batch * tokens + token) * width + column
    change = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = gate_noisy + batch * noisy_batch
    if token < history_tokens:
        gate = gate_history + batch * history_batch
    change *= tl.load(gate + column, mask=inside, other=0.0)
    row = (row.to(tl.float32) + change).to(row.dtype)
    tl.store(at, row, mask=inside)
    if token >= start:
        result = _layer_norm(row.to(tl.float32), inside, width, eps)
        result *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        at = normed + (batch * (tokens - start) + token - start) * width + column
        tl.store(at, result.to(row.dtype), mask=inside)


@triton.jit
def _rms_norm_rope(
    x,
    weight,
    rope,
    x_batch,
    x_token,
    rope_sine,
    rope_token,
    width,
    eps,
    pairs: tl.constexpr,
    norms: tl.constexpr,
    rotates: tl.constexpr,
    block: tl.constexpr,
):
    """x = RMSNorm(x) * weight, and each head's pairs of neighbours rotated by rope, in x itself. Programs (S, B)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    at = x + batch * x_batch + token * x_token + column
    row = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if norms:
        row *= tl.rsqrt(tl.sum(row * row) / width + eps)
        row *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if rotates:
        pair = tl.arange(0, block // 2)
        angle = rope + token * rope_token + pair % pairs
        cosine = tl.load(angle)
        sine = tl.load(angle + rope_sine)
        even, odd = tl.split(tl.reshape(row, (block // 2, 2)))
        row = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (block,))
    tl.store(at, row.to(x.dtype.element_ty), mask=inside)


def modulated_norm(x: Tensor, shift: Modulation, scale: Modulation, eps: float) -> Tensor:
    """As in `elementwise`."""
    return _modulate(x, None, 0, shift, scale, eps)


def residual_modulated_norm_(
    x: Tensor, update: Tensor, start: int, shift: Modulation, scale: Modulation, eps: float
) -> Tensor:
    """As in `elementwise`."""
    return _modulate(x, update, start, shift, scale, eps)


def gated_residual(x: Tensor, update: Tensor, gate: Modulation) -> Tensor:
    """As in `elementwise`."""
    return _gate(x, update, gate)[0]


def gated_residual_norm(
    x: Tensor, update: Tensor, gate: Modulation, norm: nn.Module, start: int
) -> tuple[Tensor, Tensor]:
    """As in `elementwise`."""
    with _lent(norm, nn.LayerNorm, x.device, torch.float32) as weights:
        if weights is not None:
            return _gate(x, update, gate, (*weights, norm.eps), start)
    x = gated_residual(x, update, gate)
    return x, norm(x[:, start:].float()).to(x.dtype)


def rms_norm_rope(x: Tensor, norm: nn.Module, rope: Tensor | None, heads: int) -> Tensor:
    """As in `elementwise`."""
    with _lent(norm, nn.RMSNorm, x.device, x.dtype) as weights:
        norms = weights is not None
        if not norms:
            x = norm(x).contiguous()
        if norms or rope is not None:
            weight, eps = (weights[0], norm.eps) if weights is not None else (x, 0.0)
            table = x if rope is None else rope if rope.stride(-1) == 1 else rope.contiguous()
            strides = (*x.stride()[:2], *table.stride()[:2])
            pairs = x.shape[-1] // heads // 2
            _launch(_rms_norm_rope, x, weight, table, *strides, x.shape[-1], eps, pairs, norms, rope is not None)
    return x.unflatten(-1, (heads, -1))


def _modulate(x: Tensor, update: Tensor | None, start: int, shift: Modulation, scale: Modulation, eps: float) -> Tensor:
    batch, tokens, width = x.shape
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    change = normed if update is None else update.contiguous()
    rows, strides = _rows(batch, shift, scale)
    sizes = (tokens, shift.history_tokens, start, width)
    adds = update is not None
    _launch(_residual_modulated_norm, x, change, normed, *rows, *x.stride()[:2], *strides, *sizes, eps, adds)
    return normed


def _gate(x: Tensor, update: Tensor, gate: Modulation, norm: Any = None, start: int = -1) -> tuple[Tensor, Tensor]:
    """The sum, in update's memory, and what a norm (weight, bias, eps) makes of its tokens from start on, if any."""
    batch, tokens, width = x.shape
    if norm is None:
        start = tokens
    summed = update.to(x.dtype).contiguous()
    normed = torch.empty((batch, tokens - start, width), dtype=x.dtype, device=x.device)
    weight, bias, eps = (normed, normed, 0.0) if norm is None else norm
    rows, strides = _rows(batch, gate)
    sizes = (tokens, gate.history_tokens, start, width)
    _launch(_gated_residual_norm, x, summed, normed, *rows, weight, bias, *x.stride()[:2], *strides, *sizes, eps)
    return summed, normed


def _rows(batch: int, *modulations: Modulation) -> tuple[list[Tensor], tuple[int, int]]:
    """History's and noisy row of each, and how far it is from one sample to the next: parts of one tensor each."""
    pairs = [(each.history.expand(batch, -1, -1), each.noisy.expand(batch, -1, -1)) for each in modulations]
    [strides] = {(history.stride(0), noisy.stride(0)) for history, noisy in pairs}
    return [row for pair in pairs for row in pair], strides


@contextmanager
def _lent(
    norm: nn.Module, kind: type[nn.Module], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None] | None]:
    """Weight and bias to compute with in place of this norm, on this device; None where calling it may do more.

    A norm of a host's lends them by a method `lend(device, dtype)`; torch's own has nothing to cast or to fetch.
    """
    replaced = "forward" in vars(norm) or norm._forward_pre_hooks or norm._forward_hooks
    lend, weight = getattr(norm, "lend", None), getattr(norm, "weight", None)
    if lend is not None and not replaced:
        with lend(device, dtype) as weights:
            yield weights
    elif replaced or type(norm).forward is not kind.forward or weight is None:
        yield None
    else:
        yield (weight, getattr(norm, "bias", None)) if (weight.device, weight.dtype) == (device, dtype) else None


def _launch(kernel: Any, x: Tensor, *args: Any) -> None:
    """A program for every token of x (B, S, D)."""
    batch, tokens, width = x.shape
    with torch.cuda.device_of(x):  # Triton takes the current one
        kernel[tokens, batch](x, *args, triton.next_power_of_2(width), num_warps=WARPS[kernel.fn.__name__])


def try_out(device: torch.device) -> None:
    """Raises RuntimeError where a kernel gives another result than plain torch on this device."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 64), (1, 2, 64), (1, 1, 64), (1, 1, 64), (2, 2, 16))
    x, update, past, now, rope = (torch.randn(shape, generator=rng).to(device) for shape in shapes)
    row = Modulation(past, now, history_tokens=1)
    layer_norm, rms_norm = nn.LayerNorm(64, eps=1e-6, device=device), nn.RMSNorm(64, eps=1e-6, device=device)

    def results(by: Any) -> list[Tensor]:
        gated = by.gated_residual_norm(x, update.clone(), row, layer_norm, 0)
        return [by.modulated_norm(x, row, row, 1e-6), *gated, by.rms_norm_rope(x.clone(), rms_norm, rope, 2)]

    for found, expected in zip(results(sys.modules[__name__]), results(elementwise), strict=True):
        if not torch.allclose(found, expected, atol=TRIED_OUT * expected.abs().max().item()):
            raise RuntimeError("their result is wrong")
