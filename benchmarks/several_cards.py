"""How long the 14B model has to take on several cards, from shapes alone: `python benchmarks/several_cards.py`.

The operations are those of `roofline`, in shares; to their time comes that of what the cards send each other, which
nothing overlaps. With --write the tables go into docs/cluster.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from measure import ROOT
from operations import (
    ATTENTION,
    BYTES,
    PRODUCTS,
    STAGES,
    Operation,
    attention,
    decoding,
    embedded_history,
    history_tokens,
    noisy_tokens,
    passes,
    product,
    step,
)
from roofline import CARDS, CONFIG, GIGA, NATIVE, STEPS, reached

from helios_core.config import CHUNK_FRAMES, LATENT_CHANNELS, PATCH, TransformerConfig
from helios_core.parallel import share

FILE = ROOT / "docs" / "cluster.md"
BEGIN, END = "<!-- computed by benchmarks/several_cards.py -->", "<!-- end of what is computed -->"
CARD = next(card for card in CARDS if card.name == "H100 SXM")
DEGREES = (1, 2, 4, 8)
LINK_REACH = 0.8  # of the data sheet; assumed
LATENCY = 30e-6  # s a message; assumed
BASE_STEPS = 50  # each of two forwards, with guidance


@dataclass(frozen=True)
class Link:
    """Between the cards of one machine, one way, by the data sheet: GB/s."""

    name: str
    bandwidth: float


LINKS = (Link("NVLink 4", 450), Link("PCIe 5.0 x16", 63))


def sent(
    config: TransformerConfig,
    history: int,
    noisy: int,
    degree: int,
    rank: int = 0,
    batch: int = 1,
    element: int = BYTES,
) -> int:
    """Bytes that process `rank` sends to the others in a forward."""
    width, tokens = config.inner_dim, history + noisy
    own_width = share(config.num_attention_heads, degree)[rank] * config.attention_head_dim
    own_noisy = share(noisy, degree)[rank]
    own_tokens = share(history, degree)[rank] + own_noisy
    values = own_noisy * width * (degree - 1)  # of the result, to everybody
    for block in range(config.num_layers):
        last = block == config.num_layers - 1
        queries, own_queries = (noisy, own_noisy) if last else (tokens, own_tokens)
        values += (own_queries + 2 * own_tokens) * (width - own_width)  # its tokens, for the heads of others
        values += (queries - own_queries) * own_width  # attention of its heads, for the tokens of others
    return batch * element * values


def messages(config: TransformerConfig) -> int:
    """How many times in a forward all wait for all."""
    return 3 * config.num_layers + 1


def shared(operation: Operation, degree: int) -> Operation:
    """What the busiest of the cards does of an operation; the embeddings, the head and all of a single row it does
    whole."""
    if operation.kind == ATTENTION:
        queries, keys, heads, size = operation.shape
        return attention(queries, keys, math.ceil(heads / degree), size)
    if operation.kind == PRODUCTS:
        rows, inputs, outputs = operation.shape
        whole = rows == 1 or LATENT_CHANNELS * PATCH**2 in (inputs, outputs)
        return operation if whole else product(math.ceil(rows / degree), inputs, outputs)
    return passes(math.ceil(operation.bytes / BYTES / degree))


def copied(rows: int, tokens: int, degree: int) -> Operation:
    """What a card packs and unpacks in a block: its queries, keys and values, and what attention makes of them."""
    return shared(passes(2 * (2 * rows + 2 * tokens) * CONFIG.inner_dim), degree)


def step_seconds(stage: int, degree: int, link: Link) -> tuple[float, float]:
    """Computing, and sending."""
    operations = [shared(each, degree) for each in step(CONFIG, NATIVE, stage)]
    if degree == 1:
        return sum(CARD.seconds(operations, reached()).values()), 0.0
    history, noisy = sum(history_tokens(NATIVE)), noisy_tokens(NATIVE, stage)
    operations += [copied(history + noisy, history + noisy, degree)] * (CONFIG.num_layers - 1)
    operations.append(copied(noisy, history + noisy, degree))
    sending = sent(CONFIG, history, noisy, degree) / (link.bandwidth * GIGA * LINK_REACH)
    return sum(CARD.seconds(operations, reached()).values()), sending + messages(CONFIG) * LATENCY


def chunk_seconds(steps: Iterable[int], degree: int, link: Link) -> float:
    """A chunk with so many forwards in each stage; its history is embedded by every card."""
    took = sum(CARD.seconds(embedded_history(CONFIG, NATIVE), reached()).values())
    return took + sum(count * sum(step_seconds(stage, degree, link)) for stage, count in enumerate(steps))


def tables() -> str:
    return "\n".join([*_forwards(), "", *_chunks()])


def _forwards() -> Iterator[str]:
    yield "| H100 SXM | sent by each, GB | " + " | ".join(f"{link.name}: stages 0, 1, 2" for link in LINKS) + " |"
    yield f"|---:|---:|{'---:|' * len(LINKS)}"
    for degree in DEGREES:
        history = sum(history_tokens(NATIVE))
        gigabytes = [sent(CONFIG, history, noisy_tokens(NATIVE, stage), degree) / GIGA for stage in range(STAGES)]
        cells = [f"{degree}", ", ".join(f"{each:.1f}" for each in gigabytes) if degree > 1 else "-"]
        for link in LINKS:
            times = [step_seconds(stage, degree, link) for stage in range(STAGES)]
            cells.append(", ".join(f"{1000 * (computing + sending):.0f} ms" for computing, sending in times))
        yield f"| {' | '.join(cells)} |"


def _chunks() -> Iterator[str]:
    decode = sum(CARD.seconds(decoding(NATIVE), reached()).values())
    names = ("1,1,1", "2,2,2", f"Base, {BASE_STEPS} steps")
    yield f"| H100 SXM | link | {' | '.join(f'{name}: a chunk | FPS' for name in names)} |"
    yield f"|---:|---|{'---:|---:|' * len(names)}"
    for degree in DEGREES:
        for link in LINKS if degree > 1 else LINKS[:1]:
            cells = [f"{degree}", link.name if degree > 1 else "-"]
            for steps in (*STEPS.values(), (0, 0, 2 * BASE_STEPS)):
                took = chunk_seconds(steps, degree, link)
                one_after_another, beside = took + decode, max(took, decode)
                cells += [f"{took:.2f} s", f"{CHUNK_FRAMES / one_after_another:.1f}, {CHUNK_FRAMES / beside:.1f}"]
            yield f"| {' | '.join(cells)} |"


def with_tables(document: str) -> str:
    """The document with its computed part made anew."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"into {FILE.relative_to(ROOT)}")
    options = parser.parse_args()
    print(tables())
    if options.write:
        FILE.write_text(with_tables(FILE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
