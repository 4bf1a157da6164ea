"""How long the 14B model has to take on a card, from shapes alone: `python benchmarks/roofline.py`.

Every operation of a forward, of a chunk and of decoding it has its FLOPs and the bytes that it has to move. Its floor
is the larger of both over what the card's data sheet says. What is to be expected is the floor over the share of it
that one H200 reached with operations of that kind (docs/benchmarks/h200.md). With --write the tables go to
docs/benchmarks/expected.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import paths  # noqa: F401
from card import TERA, TEXT_LENGTH
from fits import KEPT
from measure import ROOT

from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, LATENT_CHANNELS, PATCH, TransformerConfig

FILE = ROOT / "docs" / "benchmarks" / "expected.md"
GIGA = 1e9
BYTES = 2  # of a bf16 value
NATIVE = (48, 80)  # latents of 384x640
STAGES = 3
PRODUCTS, ATTENTION, BETWEEN, CONVOLUTIONS = "products", "attention", "between", "convolutions"
NAMES = {
    PRODUCTS: "matrix products",
    ATTENTION: "attention",
    BETWEEN: "what lies between them",
    CONVOLUTIONS: "decoding",
}


@dataclass(frozen=True)
class Operation:
    """What one kernel does; BETWEEN is what lies between products and attention, by the fused kernels.

    The shape of a product is its rows, inputs and outputs, that of attention its queries, keys, heads and their size.
    """

    kind: str
    flops: int
    bytes: int
    shape: tuple[int, ...] = ()


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


def count_flops(operations: Iterable[Operation]) -> int:
    return sum(operation.flops for operation in operations)


@dataclass(frozen=True)
class Weights:
    """A file of the network, by how many of its blocks have a byte for each value instead of two."""

    name: str
    quantised: int = 0

    def block_bytes(self, config: TransformerConfig) -> int:
        """What travels for each forward where the blocks are offloaded."""
        return block_values(config) * (BYTES * config.num_layers - self.quantised)

    def decoded(self, config: TransformerConfig) -> Operation:
        """Before a forward multiplies: to bf16, then times the scale."""
        return Operation(BETWEEN, 0, self.quantised * block_values(config) * (1 + 3 * BYTES))


@dataclass(frozen=True)
class Card:
    """By the maker's data sheet: dense bf16 with float32 sums, memory, and the bus to the host one way."""

    name: str
    matrix: float  # TFLOP/s
    bandwidth: float  # TB/s
    bus: float  # GB/s
    memory: float  # GB

    def seconds(self, operations: Iterable[Operation], reach: dict[str, float] | None = None) -> dict[str, float]:
        """By kind of operation: the floor, or where reach has a kind's share of the floor's rate, what that makes."""
        times = dict.fromkeys(NAMES, 0.0)
        for each in operations:
            times[each.kind] += max(each.flops / (self.matrix * TERA), each.bytes / (self.bandwidth * TERA))
        return {kind: took / (reach or {}).get(kind, 1.0) for kind, took in times.items()}

    def offloads(self, weights: Weights) -> bool:
        """Whether the transformer, what it computes with and the VAE are more than the card has."""
        return weights.block_bytes(CONFIG) / GIGA + BESIDE > self.memory


CONFIG = TransformerConfig()
BF16, FP8_SCALED = Weights("bf16"), Weights("fp8_scaled", CONFIG.num_layers - 2 * KEPT)
BESIDE = 4.0  # GB on the card beside the blocks
BUS_REACH = 0.8  # of the data sheet by pinned copies; assumed
CARDS = (
    Card("H200", 989, 4.8, 63, 141),
    Card("H100 SXM", 989, 3.35, 63, 80),
    Card("A100 80 GB SXM", 312, 2.04, 31.5, 80),
    Card("RTX 5090", 209, 1.79, 63, 32),
    Card("RTX 4090", 165, 1.01, 31.5, 24),
    Card("RTX 3090", 71, 0.94, 31.5, 24),
    Card("RTX 4080", 97, 0.72, 31.5, 16),
    Card("RTX 4060 Ti 16 GB", 44, 0.29, 15.8, 16),
    Card("RTX 3060 12 GB", 25, 0.36, 31.5, 12),
)
# Seconds on one H200, with fused kernels: of stage 2's forward in the profile, and of decoding.
MEASURED = {PRODUCTS: 0.3544, ATTENTION: 0.1990, BETWEEN: 0.0370, CONVOLUTIONS: 0.4226}
MEASURED_WHOLE = {"forward_stage0": 0.1141, "forward_stage1": 0.1939, "forward_stage2": 0.6135}
MEASURED_WHOLE |= {"chunk_111": 0.9211, "chunk_222": 1.837, "decode": 0.4226}
STEPS = {"111": (1, 1, 1), "222": (2, 2, 2)}


def block_values(config: TransformerConfig) -> int:
    """Of the matrices of one block."""
    width = config.inner_dim
    return 8 * width**2 + 2 * width * config.ffn_dim


def reached() -> dict[str, float]:
    """The share of the floor's rate that each kind of operation got on the H200."""
    floor = CARDS[0].seconds(forward(CONFIG, NATIVE, stage=2))
    floor[CONVOLUTIONS] = sum(CARDS[0].seconds(decoding(NATIVE)).values())
    return {kind: floor[kind] / took for kind, took in MEASURED.items()}


def chunk_seconds(
    card: Card, steps: Iterable[int], weights: Weights = BF16, reach: dict[str, float] | None = None
) -> float:
    """Where the blocks do not fit each step waits for them to travel, and prompts are not prepared."""
    offloads = card.offloads(weights)
    travel = weights.block_bytes(CONFIG) / (card.bus * GIGA * (BUS_REACH if reach else 1.0)) if offloads else 0.0
    before = [weights.decoded(CONFIG), *(prompt(CONFIG) if offloads else ())]
    took = sum(card.seconds(embedded_history(CONFIG, NATIVE), reach).values())
    for stage, count in enumerate(steps):
        computed = sum(card.seconds(chain(before, step(CONFIG, NATIVE, stage)), reach).values())
        took += count * max(computed, travel)
    return took


def fps(card: Card, steps: Iterable[int], weights: Weights = BF16, reach: dict[str, float] | None = None) -> float:
    """Each chunk denoised and then decoded: beside each other they gain nothing."""
    decoded = sum(card.seconds(decoding(NATIVE), reach).values())
    return CHUNK_FRAMES / (chunk_seconds(card, steps, weights, reach) + decoded)


DOCUMENT = """\
# What to expect on your card: computed

14B, bf16, 384x640, one video, decoding included, the text encoder not. Of these cards only the H200
[was measured](h200.md); all numbers here are computed, by `python benchmarks/roofline.py --write`.

The *floor* is what data sheets allow: each operation takes its FLOPs over the matrix rate or its bytes over the
memory's, whichever is longer, and nothing else takes time. *Expected* is the floor over the share of it that the H200
reached: {shares}. Other cards reach other shares, in
decoding most of all, and older ones may have no attention kernel as good: take it for the order of magnitude.

Where a file's blocks ({bf16:.0f} GB in bf16, {fp8:.0f} in fp8_scaled) do not fit beside the rest they are offloaded to
the host's memory, and a step takes at least as long as they travel, at {bus:.0%} of the bus (assumed). Those of
fp8_scaled are decoded to bf16 in each forward; multiplying in fp8, as newer ComfyUI does on RTX 40, RTX 50 and H100, is
not computed. A cell has the floor, then what is expected.

{expected}

## The H200, computed beside measured

The shares are those of stage 2's profile and of decoding; the other rows check the model.

{measured}

## What share each kind of operation should take

Of a chunk at 2,2,2 with the blocks on the card; a profile of `make gpu` is read against it.

{kinds}
"""


def document() -> str:
    reach = reached()
    return DOCUMENT.format(
        shares=", ".join(f"{name} {reach[kind]:.0%}" for kind, name in NAMES.items()),
        bf16=BF16.block_bytes(CONFIG) / GIGA,
        fp8=FP8_SCALED.block_bytes(CONFIG) / GIGA,
        bus=BUS_REACH,
        expected="\n".join(_expected(reach)),
        measured="\n".join(_beside_measured(reach)),
        kinds="\n".join(_kinds(reach)),
    )


def _expected(reach: dict[str, float]) -> Iterator[str]:
    yield "| card | TFLOP/s | TB/s | bus GB/s | file | blocks | chunk at 1,1,1 | FPS | chunk at 2,2,2 | FPS |"
    yield "|---|---:|---:|---:|---|---|---:|---:|---:|---:|"
    for card in CARDS:
        for weights in (BF16, FP8_SCALED) if card.offloads(BF16) else (BF16,):
            cells = [card.name, f"{card.matrix}", f"{card.bandwidth}", f"{card.bus}", weights.name]
            cells.append("offloaded" if card.offloads(weights) else "on the card")
            for steps in STEPS.values():
                times = [chunk_seconds(card, steps, weights, each) for each in (None, reach)]
                rates = [fps(card, steps, weights, each) for each in (None, reach)]
                cells += [f"{times[0]:.2f} s, {times[1]:.2f} s", f"{rates[0]:.1f}, **{rates[1]:.1f}**"]
            yield f"| {' | '.join(cells)} |"


def _beside_measured(reach: dict[str, float]) -> Iterator[str]:
    yield "| | TFLOP | floor | expected | measured |"
    yield "|---|---:|---:|---:|---:|"
    works = {f"forward_stage{stage}": list(forward(CONFIG, NATIVE, stage)) for stage in range(STAGES)}
    works |= {f"chunk_{name}": list(chunk(CONFIG, NATIVE, steps)) for name, steps in STEPS.items()}
    works["decode"] = list(decoding(NATIVE))
    for name, work in works.items():
        floor, expected = (sum(CARDS[0].seconds(work, each).values()) for each in (None, reach))
        flops = count_flops(work) / TERA
        yield f"| {name} | {flops:.1f} | {floor:.3f} s | {expected:.3f} s | {MEASURED_WHOLE[name]:.3f} s |"


def _kinds(reach: dict[str, float]) -> Iterator[str]:
    kinds = [kind for kind in NAMES if kind != CONVOLUTIONS]
    yield f"| card | {' | '.join(NAMES[kind] for kind in kinds)} |"
    yield f"|---|{'---:|' * len(kinds)}"
    for card in CARDS:
        cells = [card.name]
        both = [card.seconds(chunk(CONFIG, NATIVE, STEPS["222"]), each) for each in (None, reach)]
        cells += [", ".join(f"{times[kind] / sum(times.values()):.1%}" for times in both) for kind in kinds]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {FILE.relative_to(ROOT)}")
    options = parser.parse_args()
    print(document(), end="")
    if options.write:
        FILE.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
