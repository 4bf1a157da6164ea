"""Each fused kernel alone, at the size of the largest stage, beside plain torch: seconds and bytes a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from card import TERA, Shape, device, median, random
from measure import Row, in_turns
from torch import Tensor, nn

from harness.errors import mean_error
from helios_core import elementwise
from helios_core.history import Memory
from helios_core.layers import GELU, Block
from helios_core.modulation import Modulation, Table
from helios_core.transformer import HeliosTransformer

WARPS = (4, 8, 16) if torch.cuda.is_available() else ()  # the interpreter knows none
CALLS = 10 if torch.cuda.is_available() else 1  # in a row, so that a launch is not what is measured


def rows(network: HeliosTransformer, shape: Shape) -> Iterator[Row]:
    """Ours with as many warps a token as `fused` takes; the note has other numbers of them."""
    fused: Any = elementwise.fused_where_possible(random(1, 1, 2))
    if fused is elementwise:
        yield Row.open("kernels", "Triton is missing or does not run here")
        return
    own = fused.WARPS
    for name, (call, size) in calls(network, shape).items():
        plain, ours = (median(partial(call, by), shape.turns) / CALLS for by in (elementwise, fused))
        rates = [f"{size / ours / TERA:.2f} TB/s"]
        for warps in WARPS:
            fused.WARPS = dict.fromkeys(own, warps)
            took = median(partial(call, fused), shape.turns) / CALLS
            rates.append(f"{size / took / TERA:.2f} with {warps} warps")
        fused.WARPS = own
        yield Row.compare(f"kernel_{name}", ours, plain, "s", f"peer: plain torch; {', '.join(rates)}")
    yield from product_with_gelu(network, shape)


def product_with_gelu(network: HeliosTransformer, shape: Shape) -> Iterator[Row]:
    """The feed-forward's first product with GELU in its epilogue; the peer is what the network does, one by one."""
    gelu = cast(GELU, cast(Block, network.blocks[0]).ffn.net[0])
    x = random(sequence(network, shape)[1], shape.config.inner_dim)
    together = partial(torch._addmm_activation, gelu.proj.bias, x, gelu.proj.weight.T, use_gelu=True)
    error = mean_error(together().float(), gelu(x).float())
    ours, theirs = in_turns(together, partial(gelu, x), shape.turns)
    yield Row.compare("product_with_gelu", ours, theirs, "s", f"peer: one by one; differs by {error:.1e} of its values")


def calls(network: HeliosTransformer, shape: Shape) -> dict[str, tuple[Callable[[Any], None], int]]:
    """By name: CALLS calls of a module's function, and the bytes that one has to read and to write."""
    width, heads = shape.config.inner_dim, shape.config.num_attention_heads
    past, tokens = sequence(network, shape)
    x, update = random(1, tokens, width), random(1, tokens, width)
    noisy = update[:, past:].contiguous()
    row = torch.randn(1, 6, width, device=device()) / 10
    shift, scale, gate, *_ = Modulation(row, row, past).chunk(Table(row))
    layer_norm = nn.LayerNorm(width, eps=1e-6, device=device())
    rms_norm = nn.RMSNorm(width, eps=1e-6, device=device(), dtype=torch.bfloat16)
    rope = torch.randn(2, tokens, width // heads // 2, device=device())
    whole, part = x.nbytes, noisy.nbytes

    def repeated(call: Callable[[Any], Any]) -> Callable[[Any], None]:
        def repeat(by: Any) -> None:
            for _ in range(CALLS):
                call(by)

        return repeat

    found: dict[str, tuple[Callable[[Any], Tensor], int]] = {
        "modulated_norm": (lambda by: by.modulated_norm(x, shift, scale, 1e-6), 2 * whole),
        "gated_residual_norm": (
            lambda by: by.gated_residual_norm(x, update, gate, layer_norm, past)[1],
            3 * whole + part,
        ),
        "residual_modulated_norm": (
            lambda by: by.residual_modulated_norm_(x, noisy, past, shift, scale, 1e-6),
            2 * whole + 2 * part,
        ),
        "gated_residual": (lambda by: by.gated_residual(x, update, gate), 3 * whole),
        "rms_norm_rope": (lambda by: by.rms_norm_rope(x, rms_norm, rope, heads), 2 * whole),
    }
    return {name: (repeated(call), size) for name, (call, size) in found.items()}


def sequence(network: HeliosTransformer, shape: Shape) -> tuple[int, int]:
    """Tokens of the history, and of the whole sequence in the largest stage."""
    history = Memory.empty(1, *shape.latents).history()
    past = sum(
        network.count_tokens(part.shape, pool)
        for part, pool in ((history.long, 4), (history.mid, 2), (history.short, 1))
    )
    return past, past + network.count_tokens((9, *shape.latents))
