"""FLOPs and bytes of every operation of a forward, of a chunk and of decoding it, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import paths  # noqa: F401
from card import TEXT_LENGTH

from helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS, PATCH, TransformerConfig

BYTES = 2  # of a bf16 value
STAGES = 3
ROTATED = 256  # columns at once, before int8
PRODUCTS, ATTENTION, BETWEEN, CONVOLUTIONS = "products", "attention", "between", "convolutions"


@dataclass(frozen=True)
class Operation:
    """What one kernel does; BETWEEN is what lies between products and attention, by the fused kernels.

    The shape of a product is its rows, inputs and outputs, that of attention its queries, keys, heads and their size.
    """

    kind: str
    flops: float
    bytes: float
    shape: tuple[int, ...] = ()
    int8: bool = False  # at the rate of int8


def product(rows: int, inputs: int, outputs: int) -> Operation:
    moved = BYTES * (rows * inputs + inputs * outputs + rows * outputs)
    return Operation(PRODUCTS, 2 * rows * inputs * outputs, moved, (rows, inputs, outputs))


def attention(queries: int, keys: int, heads: int, size: int) -> Operation:
    moved = BYTES * 2 * (queries + keys) * heads * size
    return Operation(ATTENTION, 4 * queries * keys * heads * size, moved, (queries, keys, heads, size))


def passes(values: int) -> Operation:
    """Something that reads and writes this many values in all."""
    return Operation(BETWEEN, 0, BYTES * values)


def history_tokens(size: tuple[int, int]) -> tuple[int, int, int]:
    """Tokens of the long, mid and short history at this size in latents; each is padded to whole patches."""
    frames_and_patches = ((4, 4 * PATCH), (1, 2 * PATCH), (2, PATCH))  # frames of tokens, latents a token is wide
    long, mid, short = (
        frames * math.prod(math.ceil(side / patch) for side in size) for frames, patch in frames_and_patches
    )
    return long, mid, short


def noisy_tokens(size: tuple[int, int], stage: int) -> int:
    return CHUNK_LATENTS * math.prod(side // 2 ** (STAGES - 1 - stage) // PATCH for side in size)


def time_embedding(config: TransformerConfig) -> Iterator[Operation]:
    width = config.inner_dim
    yield product(1, config.freq_dim, width)
    yield product(1, width, width)
    yield product(1, width, 6 * width)


def embedded_history(config: TransformerConfig, size: tuple[int, int]) -> Iterator[Operation]:
    """Once a chunk."""
    for tokens, pool in zip(history_tokens(size), (4, 2, 1), strict=True):
        yield product(tokens, LATENT_CHANNELS * PATCH**2 * pool**3, config.inner_dim)
    yield from time_embedding(config)


def prompt(config: TransformerConfig) -> Iterator[Operation]:
    """Once a run: its projection, and keys and values for every block."""
    width = config.inner_dim
    yield product(TEXT_LENGTH, config.text_dim, width)
    yield product(TEXT_LENGTH, width, width)
    for _ in range(2 * config.num_layers):
        yield product(TEXT_LENGTH, width, width)


def step(
    config: TransformerConfig, size: tuple[int, int], stage: int, whole_last_block: bool = False
) -> Iterator[Operation]:
    """One call of the network with prompt and history prepared.

    diffusers computes the whole last block; ours, of which nothing reads the history any more, only its noisy tokens.
    """
    width, heads, hidden = config.inner_dim, config.num_attention_heads, config.ffn_dim
    noisy = noisy_tokens(size, stage)
    tokens = sum(history_tokens(size)) + noisy
    yield product(noisy, LATENT_CHANNELS * PATCH**2, width)
    yield from time_embedding(config)
    for block in range(config.num_layers):
        rows = noisy if block == config.num_layers - 1 and not whole_last_block else tokens
        yield passes(2 * tokens * width)  # modulated norm
        yield product(rows, width, width)
        yield from (product(tokens, width, width) for _ in range(2))
        yield passes(2 * (rows + tokens) * width)  # RMSNorm and rope of queries and keys
        yield attention(rows, tokens, heads, config.attention_head_dim)
        yield product(rows, width, width)
        yield passes((3 * rows + noisy) * width)  # gated residual, and the cross-attention's norm
        yield product(noisy, width, width)
        yield passes(2 * noisy * width)  # RMSNorm of its queries
        yield attention(noisy, TEXT_LENGTH, heads, config.attention_head_dim)
        yield product(noisy, width, width)
        yield passes(2 * (rows + noisy) * width)  # residual and modulated norm
        yield product(rows, width, hidden)
        yield passes(2 * rows * hidden)  # GELU
        yield product(rows, hidden, width)
        yield passes(3 * rows * width)  # gated residual
    yield passes(2 * noisy * width)
    yield product(noisy, width, LATENT_CHANNELS * PATCH**2)


def forward(
    config: TransformerConfig, size: tuple[int, int], stage: int, whole_last_block: bool = False
) -> Iterator[Operation]:
    """One call of the network without anything prepared."""
    yield from prompt(config)
    yield from embedded_history(config, size)
    yield from step(config, size, stage, whole_last_block)


def chunk(config: TransformerConfig, size: tuple[int, int], steps: Iterable[int]) -> Iterator[Operation]:
    """A chunk of a video whose prompt is prepared: steps in each stage."""
    yield from embedded_history(config, size)
    for stage, count in enumerate(steps):
        for _ in range(count):
            yield from step(config, size, stage)


def decoding(size: tuple[int, int], dim: int = 96) -> Iterator[Operation]:
    """A chunk by the Wan 2.1 VAE's decoder; frames double where it upsamples in time, but for the first."""
    area, frames = math.prod(size), CHUNK_LATENTS

    def convolution(inputs: int, outputs: int, kernel: int, count: int | None = None) -> Operation:
        positions = area * (frames if count is None else count)
        moved = BYTES * (positions * (inputs + outputs) + inputs * outputs * kernel)
        return Operation(CONVOLUTIONS, 2 * positions * inputs * outputs * kernel, moved)

    def residual(inputs: int, outputs: int) -> Iterator[Operation]:
        yield convolution(inputs, outputs, 27)
        yield convolution(outputs, outputs, 27)
        if inputs != outputs:
            yield convolution(inputs, outputs, 1)

    widths = [4 * dim, 4 * dim, 4 * dim, 2 * dim, dim]
    yield convolution(LATENT_CHANNELS, LATENT_CHANNELS, 1)
    yield convolution(LATENT_CHANNELS, widths[0], 27)
    yield from residual(widths[0], widths[0])
    yield convolution(widths[0], 3 * widths[0], 1)
    yield from (attention(area, area, 1, widths[0]) for _ in range(frames))
    yield convolution(widths[0], widths[0], 1)
    yield from residual(widths[0], widths[0])
    for level, (before, width) in enumerate(pairwise(widths)):
        yield from residual(before if level == 0 else before // 2, width)
        yield from residual(width, width)
        yield from residual(width, width)
        if level == 3:
            break
        if level < 2:  # in time as well
            yield convolution(width, 2 * width, 3, frames - 1)
            frames = 2 * frames - 1
        area *= 4
        yield convolution(width, width // 2, 9)
    yield convolution(widths[-1], 3, 27)


def in_int8(operations: Iterable[Operation], share: float, value: float) -> Iterator[Operation]:
    """The same with this share of the blocks' matrices multiplied in int8, of which a value has so many bytes: what
    comes in is rotated and rounded before."""
    for each in operations:
        rows = each.shape[0] if each.kind == PRODUCTS else 1
        if rows == 1:  # of the time embedding, which stays as it is
            yield each
            continue
        _, inputs, outputs = each.shape
        yield replace(each, flops=(1 - share) * each.flops, bytes=(1 - share) * each.bytes)
        yield Operation(PRODUCTS, share * 2 * rows * inputs * ROTATED, 0)
        yield Operation(BETWEEN, 0, share * rows * inputs * (BYTES + 1))
        moved = rows * inputs + inputs * outputs * value + BYTES * rows * outputs
        yield Operation(PRODUCTS, share * each.flops, share * moved, int8=True)


def count_flops(operations: Iterable[Operation]) -> float:
    return sum(operation.flops for operation in operations)
