"""How long the 14B model has to take on a card, from shapes alone: `python benchmarks/roofline.py`.

Every operation has its FLOPs and the bytes that it has to move (operations.py). Its floor is the larger of both over
what the card's data sheet says. What is to be expected is the floor over the share of it that one H200 reached with
operations of that kind (docs/benchmarks/h200.md). With --write the tables go to docs/benchmarks/expected.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import paths  # noqa: F401
from card import TERA
from fits import KEPT
from measure import ROOT
from operations import (
    ATTENTION,
    BETWEEN,
    BYTES,
    CONVOLUTIONS,
    PRODUCTS,
    STAGES,
    Operation,
    chunk,
    count_flops,
    decoding,
    embedded_history,
    forward,
    in_int8,
    prompt,
    step,
)

from helios_core.config import CHUNK_FRAMES, TransformerConfig

FILE = ROOT / "docs" / "benchmarks" / "expected.md"
GIGA = 1e9
NATIVE = (48, 80)  # latents of 384x640
NAMES = {
    PRODUCTS: "matrix products",
    ATTENTION: "attention",
    BETWEEN: "what lies between them",
    CONVOLUTIONS: "decoding",
}


@dataclass(frozen=True)
class Weights:
    """A file of the network: how many of its blocks are quantised, and how."""

    name: str
    quantised: int = 0
    value: float = 1  # bytes, with its share of the scales
    in_int8: bool = False  # multiplied so

    def block_bytes(self, config: TransformerConfig) -> float:
        """What travels for each forward where the blocks are offloaded."""
        return block_values(config) * (BYTES * config.num_layers - (BYTES - self.value) * self.quantised)

    def decoded(self, config: TransformerConfig) -> Operation:
        """Before a forward multiplies: to bf16, then times the scale; or of less than a byte to int8."""
        moved = self.value + 3 * BYTES if not self.in_int8 else self.value + 1 if self.value < 1 else 0
        return Operation(BETWEEN, 0, self.quantised * block_values(config) * moved)


@dataclass(frozen=True)
class Card:
    """By the maker's data sheet: dense bf16 with float32 sums, int8, memory, and the bus to the host one way."""

    name: str
    matrix: float  # TFLOP/s
    int8: float  # TOP/s
    bandwidth: float  # TB/s
    bus: float  # GB/s
    memory: float  # GB

    def seconds(self, operations: Iterable[Operation], reach: dict[str, float] | None = None) -> dict[str, float]:
        """By kind of operation: the floor, or where reach has a kind's share of the floor's rate, what that makes."""
        times = dict.fromkeys(NAMES, 0.0)
        for each in operations:
            rate = self.int8 if each.int8 else self.matrix
            times[each.kind] += max(each.flops / (rate * TERA), each.bytes / (self.bandwidth * TERA))
        return {kind: took / (reach or {}).get(kind, 1.0) for kind, took in times.items()}

    def offloads(self, weights: Weights) -> bool:
        """Whether the transformer, what it computes with and the VAE are more than the card has."""
        return weights.block_bytes(CONFIG) / GIGA + BESIDE > self.memory


CONFIG = TransformerConfig()
BF16, FP8_SCALED = Weights("bf16"), Weights("fp8_scaled", CONFIG.num_layers - 2 * KEPT)
INT8 = Weights("int8", FP8_SCALED.quantised, in_int8=True)
W4A8 = Weights("w4a8", FP8_SCALED.quantised, value=1 / 2 + 1 / 16, in_int8=True)
BESIDE = 4.0  # GB on the card beside the blocks
BUS_REACH = 0.8  # of the data sheet by pinned copies; assumed
CARDS = (
    Card("H200", 989, 1979, 4.8, 63, 141),
    Card("H100 SXM", 989, 1979, 3.35, 63, 80),
    Card("A100 80 GB SXM", 312, 624, 2.04, 31.5, 80),
    Card("RTX 5090", 209, 838, 1.79, 63, 32),
    Card("RTX 4090", 165, 661, 1.01, 31.5, 24),
    Card("RTX 3090", 71, 284, 0.94, 31.5, 24),
    Card("RTX 4080", 97, 390, 0.72, 31.5, 16),
    Card("RTX 4060 Ti 16 GB", 44, 177, 0.29, 15.8, 16),
    Card("RTX 3060 12 GB", 25, 102, 0.36, 31.5, 12),
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
        operations = step(CONFIG, NATIVE, stage)
        if weights.in_int8:
            operations = in_int8(operations, weights.quantised / CONFIG.num_layers, weights.value)
        computed = sum(card.seconds(chain(before, operations), reach).values())
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

Where a file's blocks ({bf16:.0f} GB in bf16, {fp8:.0f} in fp8_scaled and int8, {w4a8:.0f} in w4a8) do not fit
beside the rest they are offloaded to the host's memory, and a step takes at least as long as they travel, at
{bus:.0%} of the bus (assumed). Those of fp8_scaled are decoded to bf16 in each forward; multiplying in fp8, as
newer ComfyUI does on RTX 40, RTX 50 and H100, is not computed. int8 and w4a8 are multiplied at the rate of int8
(TOP/s), after what comes in was rotated and rounded; that ComfyUI's kernels for it reach the share of their
rate that bf16 reached of its own is a guess. A cell has the floor, then what is expected.

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
        w4a8=W4A8.block_bytes(CONFIG) / GIGA,
        bus=BUS_REACH,
        expected="\n".join(_expected(reach)),
        measured="\n".join(_beside_measured(reach)),
        kinds="\n".join(_kinds(reach)),
    )


def _expected(reach: dict[str, float]) -> Iterator[str]:
    yield "| card | TFLOP/s, TOP/s | TB/s | bus GB/s | file | blocks | chunk at 1,1,1 | FPS | chunk at 2,2,2 | FPS |"
    yield "|---|---:|---:|---:|---|---|---:|---:|---:|---:|"
    for card in CARDS:
        for weights in (BF16, FP8_SCALED, INT8, W4A8) if card.offloads(BF16) else (BF16, INT8):
            cells = [card.name, f"{card.matrix}, {card.int8}", f"{card.bandwidth}", f"{card.bus}", weights.name]
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
