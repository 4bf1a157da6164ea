"""The transformer on a GPU, of one set of random weights: what is worth most comes first, and no section takes the
others along.

Everything is exact bf16, but for rows that say otherwise. `network` is eager, with and without fused kernels;
`compiled` is torch.compile's.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import decode
import kernels_gpu
import profile_gpu
import torch
from attention import backends, first_line, matrix_peak
from attention import rows as attention_rows
from card import TERA, TEXT_LENGTH, Shape, device, median, random
from measure import Row, in_turns, peak_extra_bytes, seconds, synchronize
from parts import MissingError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from harness.errors import mean_error
from helios_core import elementwise
from helios_core.checkpoint import published_name
from helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, LATENT_CHANNELS
from helios_core.generate import Run, generate
from helios_core.history import History, Memory
from helios_core.layers import Block
from helios_core.predict import bind_transformer
from helios_core.schedule import DISTILLED, Schedule
from helios_core.transformer import HeliosTransformer

RECOMPILE_LIMIT = 64  # as the node Helios Compile has it
STEPS = ((1, 1, 1), (2, 2, 2))
# What other versions of torch, Triton and diffusers may raise, and a card that is too small.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ImportError, ValueError, TypeError, AttributeError)
if importlib.util.find_spec("triton") is not None:
    from triton.runtime.errors import TritonError

    LIBRARY_ERRORS += (TritonError,)


def rows(shape: Shape, folder: Path) -> Iterator[Row]:
    network = transformer(shape)
    _never_fuse(network)
    peak = matrix_peak(shape)
    work = count_work(network, shape)
    yield Row("matrix_peak", peak / TERA, None, "TFLOP/s", note=f"bf16, {shape.matrix} cubed")
    yield from section("fused", fused_forwards(network, shape, work, peak))
    with fusing(network):
        decoder = yield from section("decoding", decoding(shape))
        yield from section("chunks_fused", chunks(network, shape, "_fused", decoder))
    yield from section("profile", profiles(network, shape, folder))
    yield from section("chunks", chunks(network, shape, "", None))
    peer = _diffusers(network) if importlib.util.find_spec("diffusers") else None
    if peer is None:
        yield Row.open("forward_of_diffusers", "diffusers is not installed")
    yield from section("forwards", forwards(network, shape, "", work, peak, peer))
    yield from section("attention", attention_rows(shape))
    yield from section("kernels", kernels_gpu.rows(network, shape))
    with fusing(network):
        yield from section("by_backend", by_backend(network, shape))


def compiled(shape: Shape) -> Iterator[Row]:
    """The blocks compiled, but for the last: its graphs, one a stage, would take as long to compile as all others."""
    network = transformer(shape)
    if shape.compiler == "inductor" and importlib.util.find_spec("triton") is None:
        raise MissingError("triton not installed")
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    peak, work = matrix_peak(shape), count_work(network, shape)
    _compile(network, shape)
    for stage in range(3):
        took = seconds(partial(network, *inputs(shape, stage)))
        yield Row(f"compile_stage{stage}", took, None, "s", note="the first forward")
    yield from section("forwards", forwards(network, shape, "_compiled", work, peak))
    yield from section("chunks", chunks(network, shape, "_compiled", None))
    if importlib.util.find_spec("diffusers") is None:
        yield Row.open("forward_of_diffusers_compiled", "diffusers is not installed")
        return
    peer = _diffusers(network)
    _compile(peer, shape)
    suffix = "_compiled_beside_diffusers"
    yield from section("diffusers", forwards(network, shape, suffix, work, peak, peer, stages=(2,)))


def transformer(shape: Shape) -> HeliosTransformer:
    torch.manual_seed(0)
    return HeliosTransformer(shape.config, dtype=torch.bfloat16, device=device()).eval().requires_grad_(False)


def section(name: str, rows: Iterable[Row]) -> Generator[Row, None, Any]:
    """The rows, up to an error, which becomes a row; returns what they return, or else None."""
    try:
        return (yield from rows)
    except LIBRARY_ERRORS as error:
        traceback.print_exc()
        yield Row.open(name, first_line(error))
    return None


@contextmanager
def fusing(network: HeliosTransformer, interpreted: bool = False) -> Iterator[None]:
    """Blocks with fused kernels; without a card only one, and if it may be interpreted, which takes its time."""
    for block in network.blocks if device().type == "cuda" else network.blocks[-1:] if interpreted else ():
        cast(Block, block).fuse = True
    try:
        yield
    finally:
        _never_fuse(network)


def _never_fuse(network: HeliosTransformer) -> None:
    for block in network.blocks:
        cast(Block, block).fuse = False


def _compile(network: Any, shape: Shape) -> None:
    for block in network.blocks[:-1]:
        block.compile(dynamic=False, backend=shape.compiler)


def fused_forwards(network: HeliosTransformer, shape: Shape, work: list[int], peak: float) -> Iterator[Row]:
    """A forward of each stage with fused kernels, without caches; the peer is eager."""
    if elementwise.fused_where_possible(random(1, 1, 2)) is elementwise:
        raise RuntimeError("Triton is missing or does not run here: all that is called fused is plain torch.")
    for stage in range(3):
        ask = partial(network, *inputs(shape, stage))

        def fused(ask: Callable[[], Tensor] = ask) -> Tensor:
            with fusing(network, interpreted=True):
                return ask()

        error = mean_error(fused().float(), ask().float())
        ours, theirs = in_turns(fused, ask, shape.turns)
        note = f"peer: eager; differs by {error:.1e} of its values; {_rate(work[stage], ours, peak)}"
        yield Row.compare(f"forward_stage{stage}_fused", ours, theirs, "s", note)
    yield Row.compare(
        "forward_extra_memory_fused", peak_extra_bytes(fused) / 1e6, peak_extra_bytes(ask) / 1e6, "MB", "peer: eager"
    )


def _rate(work: float, took: float, peak: float) -> str:
    rate = work / took
    return f"{work / TERA:.1f} TFLOP, {rate / TERA:.0f} TFLOP/s, {100 * rate / peak:.0f} % of the matrix peak"


def forwards(
    network: HeliosTransformer,
    shape: Shape,
    suffix: str,
    work: list[int],
    peak: float,
    peer: Any = None,
    stages: tuple[int, ...] = (0, 1, 2),
) -> Iterator[Row]:
    """One forward of each stage, without caches."""
    for stage in stages:
        args = inputs(shape, stage)
        mine = partial(network, *args)
        if peer is None:
            took, theirs = median(mine, shape.turns), None
        else:
            asking = _asking(peer, *args)
            asking()
            took, theirs = in_turns(mine, asking, shape.turns)
        ratio = theirs / took if theirs else None
        yield Row(f"forward_stage{stage}{suffix}", took, theirs, "s", ratio, _rate(work[stage], took, peak))


def count_work(network: HeliosTransformer, shape: Shape) -> list[int]:
    """FLOPs of a forward of each stage."""
    found = []
    for stage in range(3):
        with FlopCounterMode(display=False) as counter:
            network(*inputs(shape, stage))
        found.append(counter.get_total_flops())
    return found


def profiles(network: HeliosTransformer, shape: Shape, folder: Path) -> Iterator[Row]:
    """Where the time goes, by kind of kernel: fused, and the peer eager."""
    file = folder / "profile.txt"
    file.unlink(missing_ok=True)
    forward = partial(network, *inputs(shape, stage=2))
    text = random(1, TEXT_LENGTH, shape.config.text_dim)
    chunk = partial(_first, partial(make, network, text, _schedule((2, 2, 2)), shape.latents))
    for name, work in {"forward_stage2": forward, "chunk_222": chunk}.items():
        with fusing(network):
            ours = profile_gpu.profile(work)
        theirs = profile_gpu.profile(work)
        profile_gpu.append(file, {f"{name}, fused": ours, f"{name}, eager": theirs})
        yield from profile_gpu.rows(f"profile_{name}", ours, theirs)


def by_backend(network: HeliosTransformer, shape: Shape) -> Iterator[Row]:
    """The forward of the largest stage by each attention backend that torch's choice may be compared with."""
    args = inputs(shape, stage=2)
    for label, attend in backends().items():
        name = f"forward_stage2_{label}"
        if isinstance(attend, str) or label in ("default", "math"):
            continue  # attention_`label` says why; the first is another row, the other too slow to be chosen
        yield from section(name, _by_backend(name, partial(network, *args, attend=attend), shape.turns))


def _by_backend(name: str, ask: Callable[[], Tensor], turns: int) -> Iterator[Row]:
    yield Row(name, median(ask, turns), None, "s")


def inputs(shape: Shape, stage: int) -> tuple[Tensor, Tensor, Tensor, History]:
    """Latents, timestep, text and history, in the order of the network's arguments."""
    height, width = (size // 2 ** (2 - stage) for size in shape.latents)
    past = Memory(random(1, 16, 19, *shape.latents), random(1, 16, 1, *shape.latents))
    timestep = torch.tensor([500.0], device=device())
    return random(1, 16, 9, height, width), timestep, random(1, TEXT_LENGTH, shape.config.text_dim), past.history()


def decoding(shape: Shape) -> Generator[Row, None, decode.Decoder | None]:
    """Ways to decode a chunk; returns the fastest in bf16, or None where there is no VAE."""
    height, width = shape.decoded
    chunk = random(1, LATENT_CHANNELS, CHUNK_LATENTS, height, width).float()
    try:
        decoder = decode.find(shape.vae, device())
    except MissingError as error:
        yield Row.open("decoding", str(error))
        return None
    return (yield from decode.on_card(decoder, chunk, shape.turns))


def chunks(network: HeliosTransformer, shape: Shape, suffix: str, decoder: decode.Decoder | None) -> Iterator[Row]:
    """Whole chunks with the caches of a run; then decoded, one after the other and beside the next chunk's sampling."""
    embeddings = random(1, TEXT_LENGTH, shape.config.text_dim)
    for steps in STEPS:
        name = "".join(map(str, steps)) + suffix
        video = partial(make, network, embeddings, _schedule(steps), shape.latents)
        took = statistics.median(_stamps(video(shape.chunks), lambda latents: None))
        yield Row(f"chunk_{name}", took, None, "s", note=f"{CHUNK_FRAMES / took:.2f} FPS without VAE")
        if decoder is None:
            continue
        by = f"with the VAE of {decoder.label}, frames left on the card, without the text encoder"
        use = partial(_decode, decoder, shape)
        stamps = _stamps(video(shape.chunks), use)
        yield Row(f"first_chunk_{name}", stamps[0], None, "s", note="latency, VAE included")
        yield Row(f"fps_{name}", CHUNK_FRAMES / statistics.median(stamps), None, "FPS", note=f"one by one, {by}")
        count = shape.chunks + 1
        overlapped = partial(_use_beside, video, count, use)
        rate = count * CHUNK_FRAMES / seconds(overlapped)
        yield Row(f"fps_overlapped_{name}", rate, None, "FPS", note=f"{count} chunks decoded on a second stream, {by}")


def _decode(decoder: decode.Decoder, shape: Shape, latents: Tensor) -> Tensor:
    height, width = shape.decoded
    return decoder(latents[..., :height, :width].bfloat16())


def _stamps(video: Iterator[Tensor], use: Callable[[Tensor], Any]) -> list[float]:
    """Seconds of each chunk, with its use."""
    times = []
    start = time.perf_counter()
    for latents in video:
        use(latents)
        synchronize()
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times


def _use_beside(video: Callable[[int], Iterator[Tensor]], count: int, use: Callable[[Tensor], Any]) -> None:
    """Each chunk used on a stream of its own, while the next one is sampled."""
    card = device().type == "cuda"
    stream = torch.cuda.Stream() if card else None
    for latents in video(count):
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            latents.record_stream(stream)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            use(latents)


def _schedule(steps: tuple[int, int, int]) -> Schedule:
    return replace(DISTILLED, steps=steps, amplify_first_chunk=False)


def _first(video: Callable[[int], Iterator[Tensor]]) -> Tensor:
    return next(video(1))


def make(
    network: HeliosTransformer, embeddings: Tensor, schedule: Schedule, latents: tuple[int, int], count: int
) -> Iterator[Tensor]:
    """Chunks of a new video, latents (1, 16, 9, H, W)."""
    bind = bind_transformer(network, schedule, embeddings)
    memory = Memory.empty(1, *latents).to(device())
    for chunk in generate(bind, Run(schedule, memory, count, torch.Generator().manual_seed(0))):
        yield chunk.latents


def _diffusers(network: HeliosTransformer) -> Any:
    """diffusers' transformer on the very same weights: no second copy."""
    from diffusers import HeliosTransformer3DModel

    with torch.device("meta"):
        peer = HeliosTransformer3DModel(**network.config.to_dict())
    weights = {published_name(name): weight for name, weight in network.state_dict().items()}
    peer.load_state_dict(weights, assign=True)
    peer.rope = type(peer.rope)(rope_dim=network.config.rope_dim, theta=network.config.rope_theta).to(device())
    return peer.eval()


def _asking(peer: Any, latents: Tensor, timestep: Tensor, text: Tensor, history: History) -> Callable[[], Any]:
    index = (
        torch.tensor([getattr(history.indices, name)], device=latents.device)
        for name in ("noisy", "short", "mid", "long")
    )
    return partial(peer, latents, timestep, text, *index, history.short, history.mid, history.long, return_dict=False)
