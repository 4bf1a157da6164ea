"""Ours against diffusers, on the same random weights and inputs, on this machine: `make bench`.

Both run on torch's own attention in float32, in turns (A B A B), and medians are compared; decoding takes long and gets
two turns, whose differences below a tenth say nothing. Single forwards have no caches, chunks those of a real run: the
prompt was prepared before, as for every chunk but a prompt's first, and the history is within. Rows go to
build/bench.json; ratio = peer / ours, so more than 1 is faster. Of some rows the peer is ourselves: node_overhead (the
core's path against the path through the nodes), chunk_time_slope (the first chunks against the last of 44 in one run)
and ways to decode (against one chunk at a time in float32).

The transformer has two layers, an ordinary one and the last. So few flatter us: the text projection that a chunk saves
and the part of the last layer that is not computed weigh less in a deep one. chunk_222_12_layers says how much less;
chunk_222_per_layer is what a further layer costs, and its ratio the one that a deep transformer tends to.
chunk_222_over_kernels has those 12 layers beside their products and attention alone, of which 1.10 times are wanted.
node_overhead has 12 layers too: what a node costs is lost in the noise of two.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import decode
import operations
import paths  # noqa: F401
import torch
import torch.nn.functional as F
from measure import ROOT, Compare, Row, in_turns, machine, peak_extra_bytes, seconds, table, write
from torch import Tensor

from harness.errors import difference
from harness.pack import load_comfyui, load_pack

load_pack()

from comfyui_helios.helios_core.attention import sdpa  # noqa: E402
from comfyui_helios.helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS, TransformerConfig  # noqa: E402
from comfyui_helios.helios_core.generate import BindChunk, Run, generate  # noqa: E402
from comfyui_helios.helios_core.history import Memory  # noqa: E402
from comfyui_helios.helios_core.predict import bind_transformer  # noqa: E402
from comfyui_helios.helios_core.schedule import DISTILLED, Schedule  # noqa: E402
from comfyui_helios.helios_core.transformer import HeliosTransformer  # noqa: E402
from harness import oracle  # noqa: E402

LATENTS = (24, 40)
STAGES = ((6, 10), (12, 20), (24, 40))
TEXT_LENGTH = 512
CHUNKS = (1, 4, 16, 44)
DECODED = (8, 16)  # latents of the chunk that the VAE decodes
SMALL = (8, 8)  # latents of the runs that are about the number of chunks

# The 14B model's proportions, in a fifth of its width; its text encoder is as wide as it is.
CONFIG: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "rope_dim": (44, 42, 42),
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 2816,
    "num_layers": 2,
}
DEEP_CONFIG = {**CONFIG, "num_layers": 12}
SMALL_CONFIG = {**CONFIG, "num_attention_heads": 2, "ffn_dim": 704, "text_dim": 256}


# What this benchmark cannot say; kept with its results.
OPEN = (
    "On a GPU (make gpu; docs/benchmarks/h200.md): compiled blocks, and diffusers in its best setting",
    "The PSNR of decoding in bf16 on the real VAE's weights: random ones stand in for them here",
)


@cache
def use_comfyui() -> tempfile.TemporaryDirectory[str]:
    """Load it into this process, once; its folder goes when the process ends."""
    base = tempfile.TemporaryDirectory(prefix="helios-bench-")
    load_comfyui(base.name)
    return base


def schedule(*steps: int) -> Schedule:
    """As diffusers shifts, so that both run the same timesteps."""
    return replace(DISTILLED, steps=steps, amplify_first_chunk=False, shift_level="stage_below")


def networks(config: dict[str, Any]) -> tuple[Any, HeliosTransformer]:
    """diffusers' and ours, on the same weights."""
    reference = oracle.transformer(0, **config)
    ours = HeliosTransformer(TransformerConfig(**config))
    ours.load_state_dict(oracle.weights(reference))
    return reference, ours.eval()


def prompt(config: dict[str, Any]) -> Tensor:
    return torch.randn(1, TEXT_LENGTH, config["text_dim"], generator=torch.Generator().manual_seed(1))


def our_chunks(bind: BindChunk, size: tuple[int, int], steps: tuple[int, ...], chunks: int = 1) -> Iterator[Tensor]:
    memory, rng = Memory.empty(1, *size), torch.Generator().manual_seed(0)
    for chunk in generate(bind, Run(schedule(*steps), memory, chunks, rng)):
        yield chunk.latents


def their_pipeline(reference: Any, after_chunk: Callable[[], None] = lambda: None) -> Any:
    """diffusers' pipeline; it insists on decoding every chunk, which is left out here."""
    pipe = oracle.pipeline("distilled", reference)

    def decode(latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        after_chunk()
        return (torch.zeros(1, 3, 33, 1, 1),)

    pipe.vae.decode = decode
    return pipe


def their_chunks(pipe: Any, text: Tensor, size: tuple[int, int], steps: tuple[int, ...], chunks: int = 1) -> Tensor:
    return oracle.run(
        pipe,
        text,
        text,
        size=(size[0] * 8, size[1] * 8),
        frames=33 * chunks,
        pyramid_num_inference_steps_list=list(steps),
        is_amplify_first_chunk=False,
    )


def same(name: str, ours: Tensor, theirs: Tensor) -> None:
    """A benchmark of something else than the reference's result would be worth nothing."""
    error = difference(ours, theirs)
    if not error <= 2e-5:
        raise AssertionError(f"{name}: ours differs from diffusers by {error:.1e} of the largest value")


def forwards(reference: Any, ours: HeliosTransformer, compare: Compare) -> Iterator[Row]:
    rng = torch.Generator().manual_seed(0)
    past = torch.randn(1, 16, 19, *LATENTS, generator=rng)
    history = Memory(past, torch.randn(1, 16, 1, *LATENTS, generator=rng)).history()
    text = prompt(CONFIG)
    for stage, size in enumerate(STAGES):
        args = (torch.randn(1, 16, 9, *size, generator=rng), torch.tensor([500.0]), text, history)

        def mine(args: tuple = args) -> Tensor:
            return ours(*args)

        def theirs(args: tuple = args) -> Tensor:
            return oracle.ask(reference, *args)

        same(f"forward_stage{stage}", mine(), theirs())
        yield Row.compare(f"forward_stage{stage}", *compare(mine, theirs), "s")
    yield Row.compare("forward_extra_memory", peak_extra_bytes(mine) / 1e6, peak_extra_bytes(theirs) / 1e6, "MB")


def chunks(reference: Any, ours: HeliosTransformer, compare: Compare) -> Iterator[Row]:
    def times(
        name: str, steps: tuple[int, int, int], reference: Any = reference, ours: HeliosTransformer = ours
    ) -> tuple[float, float]:
        pipe, text = their_pipeline(reference), prompt(CONFIG)
        bind = bind_transformer(ours, DISTILLED, text)

        def mine() -> Tensor:
            return next(our_chunks(bind, LATENTS, steps))

        def theirs() -> Tensor:
            return their_chunks(pipe, text, LATENTS, steps)

        same(name, mine(), theirs())
        return compare(mine, theirs)

    yield Row.compare("chunk_111", *times("chunk_111", (1, 1, 1)), "s")
    few = times("chunk_222", (2, 2, 2))
    yield Row.compare("chunk_222", *few, "s")
    deep = networks(DEEP_CONFIG)
    many = times("chunk_222_12_layers", (2, 2, 2), *deep)
    yield Row.compare("chunk_222_12_layers", *many, "s")
    further = DEEP_CONFIG["num_layers"] - CONFIG["num_layers"]
    ours_each, theirs_each = ((deep - shallow) / further for deep, shallow in zip(many, few, strict=True))
    note = "the difference of the two rows above, per layer"
    yield Row.compare("chunk_222_per_layer", ours_each, theirs_each, "s", note)
    bind = bind_transformer(deep[1], DISTILLED, prompt(DEEP_CONFIG))
    alone = kernels_alone(deep[1].config, (2, 2, 2))
    took, kernels = compare(lambda: next(our_chunks(bind, LATENTS, (2, 2, 2))), alone)
    note = f"peer: its products and attention alone; {took / kernels:.3f} of them, 1.10 wanted"
    yield Row.compare("chunk_222_over_kernels", took, kernels, "s", note)


def kernels_alone(config: Any, steps: tuple[int, ...]) -> Callable[[], None]:
    """The matrix products and attention of a chunk, in its order, on random inputs that those of one shape share."""
    shapes = [operation.shape for operation in operations.chunk(config, LATENTS, steps) if operation.shape]
    calls = {shape: product_alone(*shape) if len(shape) == 3 else attention_alone(*shape) for shape in set(shapes)}

    def run() -> None:
        for shape in shapes:
            calls[shape]()

    return run


def product_alone(rows: int, inputs: int, outputs: int) -> Callable[[], Tensor]:
    return partial(F.linear, torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs))


def attention_alone(queries: int, keys: int, heads: int, size: int) -> Callable[[], Tensor]:
    return partial(sdpa, *(torch.randn(1, length, heads, size) for length in (queries, keys, keys)))


def through_nodes(compare: Compare) -> Iterator[Row]:
    """A chunk through ComfyUI's nodes, on its own MODEL, against the same chunk from the core."""
    use_comfyui()
    import comfy.latent_formats

    from comfyui_helios.host.model.loading import load_model
    from comfyui_helios.nodes.history import HeliosHistoryInjection
    from comfyui_helios.nodes.sample import HeliosChunkedSampler
    from harness.nodes import run_node

    reference, ours = networks(DEEP_CONFIG)
    text = prompt(DEEP_CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(f"{folder}/transformer")
        model = load_model(f"{folder}/transformer", "fp32")
        size: dict[str, Any] = {"width": LATENTS[1] * 8, "height": LATENTS[0] * 8, "frames": 33, "batch_size": 1}
        inputs = run_node(HeliosHistoryInjection, [[text, {}]], [[text, {}]], **size)

        def nodes() -> Tensor:
            return run_node(HeliosChunkedSampler, model, *inputs, schedule(1, 1, 1), 0)[0]["samples"]

        def core() -> Tensor:
            return next(our_chunks(bind_transformer(ours, DISTILLED, text), LATENTS, (1, 1, 1)))

        same("node_overhead", comfy.latent_formats.Wan21().process_in(nodes()), core())
        yield Row.compare("node_overhead", *compare(nodes, core), "s", "peer: the core's own path; 12 layers")


def decoding(compare: Compare) -> Iterator[Row]:
    """A chunk by the host's Wan VAE, which the nodes decode with, against diffusers'; then other ways to run it."""
    use_comfyui()
    from comfyui_helios.host.files.vae import load_vae

    theirs = decode.random_vae()
    chunk = torch.randn(1, LATENT_CHANNELS, CHUNK_LATENTS, *DECODED, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(f"{folder}/vae")
        host: Any = load_vae(Path(folder)).first_stage_model.float()

    def by_host(decoder: Any, latents: Tensor) -> Tensor:
        return decoder.decode(latents).clamp(-1, 1)

    def mine() -> Tensor:
        return by_host(host, chunk)

    def peer() -> Tensor:
        return decode.by_diffusers(theirs, chunk)

    same("decode_fp32", mine(), peer())
    yield Row.compare("decode_fp32", *compare(mine, peer), "s")
    yield from decode.rows(host, by_host, chunk, compare)


def growth(quiet: bool) -> tuple[Row, list[dict[str, float]]]:
    """One run of 44 chunks each, ours and theirs, at a small size where what grows would show most."""
    reference, ours = networks(SMALL_CONFIG)
    text = prompt(SMALL_CONFIG)
    times: list[float] = []

    def stamp() -> None:
        times.append(time.perf_counter())

    def mine() -> None:
        times[:] = [time.perf_counter()]
        for _ in our_chunks(bind_transformer(ours, DISTILLED, text), SMALL, (2, 2, 2), max(CHUNKS)):
            stamp()

    def theirs() -> None:
        times[:] = [time.perf_counter()]
        their_chunks(their_pipeline(reference, stamp), text, SMALL, (2, 2, 2), max(CHUNKS))

    next(our_chunks(bind_transformer(ours, DISTILLED, text), SMALL, (1, 1, 1)))
    seconds(mine, quiet)
    our_times = times.copy()
    seconds(theirs, quiet)
    each = [after - before for before, after in pairwise(our_times)]
    row = Row.compare(
        "chunk_time_slope",
        statistics.median(each[-9:]),
        statistics.median(each[1:10]),
        "s",
        "ours: chunks 36 to 44, peer: chunks 2 to 10",
    )
    costs = [{"chunks": n, "ours": our_times[n] - our_times[0], "peer": times[n] - times[0]} for n in CHUNKS]
    return row, costs


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quiet", action="store_true", help="take no sample while other processes are busy (Linux)")
    options = parser.parse_args()

    print("  ".join(f"{name} {value}" for name, value in machine().items() if value is not None))
    compare = partial(in_turns, turns=options.turns, quiet=options.quiet)
    rows = []
    few = partial(in_turns, turns=min(options.turns, 2), quiet=options.quiet)  # a minute each
    shallow = networks(CONFIG)
    for row in chain(forwards(*shallow, compare), chunks(*shallow, compare), through_nodes(compare), decoding(few)):
        print(f"{row.name} {row.ours:.4g} {row.unit}, peer {row.peer:.4g}", flush=True)
        rows.append(row)
    slope, costs = growth(options.quiet)
    rows.append(slope)
    print(table(rows))
    print("seconds for a number of chunks (8x8 latents, width 256):")
    for cost in costs:
        print(f"  {cost['chunks']:3}: ours {cost['ours']:.2f}, diffusers {cost['peer']:.2f}")
    for missing in OPEN:
        print(f"open: {missing}")
    write(
        options.out,
        rows,
        config=CONFIG,
        latents=LATENTS,
        text_length=TEXT_LENGTH,
        cost_of_chunks=costs,
        decoded_latents=DECODED,
        open=OPEN,
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
