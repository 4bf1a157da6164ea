"""The transformer on a GPU, eager or compiled: a forward of each stage, by each attention backend, and whole chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import decode
import torch
from attention import backends, first_line, matrix_peak
from card import TERA, TEXT_LENGTH, Shape, device, median, random
from measure import Row, in_turns, peak_extra_bytes
from parts import MissingError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helios_core.checkpoint import published_name
from helios_core.config import CHUNK_FRAMES
from helios_core.generate import Run, generate
from helios_core.history import History, Memory
from helios_core.predict import bind_transformer
from helios_core.schedule import DISTILLED, Schedule
from helios_core.transformer import HeliosTransformer

RECOMPILE_LIMIT = 64  # as the node Helios Compile has it


def rows(shape: Shape, compiled: bool) -> Iterator[Row]:
    """Everything is exact bf16, but for rows that say otherwise."""
    torch.manual_seed(0)
    network = HeliosTransformer(shape.config, dtype=torch.bfloat16, device=device()).eval().requires_grad_(False)
    peer = _diffusers(network) if importlib.util.find_spec("diffusers") else None
    peak = matrix_peak(shape)
    if compiled:
        if shape.compiler == "inductor" and importlib.util.find_spec("triton") is None:
            raise MissingError("triton not installed")
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for transformer in filter(None, (network, peer)):
            for block in transformer.blocks:
                block.compile(dynamic=False, backend=shape.compiler)
    suffix = "_compiled" if compiled else ""
    yield from forwards(network, shape, suffix, peer, peak)
    if not compiled:
        yield from by_backend(network, shape)
    yield from chunks(network, shape, suffix)


def forwards(network: HeliosTransformer, shape: Shape, suffix: str, peer: Any, peak: float) -> Iterator[Row]:
    """One forward of each stage, without caches."""
    if peer is None:
        yield Row.open(f"forward_of_diffusers{suffix}", "diffusers is not installed")
    for stage in range(3):
        args = inputs(shape, stage)
        mine = partial(network, *args)
        with FlopCounterMode(display=False) as counter:
            mine()
        work = counter.get_total_flops()
        if peer is None:
            took, theirs = median(mine, shape.turns), None
        else:
            asking = _asking(peer, *args)
            asking()
            took, theirs = in_turns(mine, asking, shape.turns)
        rate = work / took
        note = f"{work / TERA:.1f} TFLOP, {rate / TERA:.0f} TFLOP/s, {100 * rate / peak:.0f} % of the matrix peak"
        yield Row(f"forward_stage{stage}{suffix}", took, theirs, "s", theirs / took if theirs else None, note)
    yield Row(f"forward_extra_memory{suffix}", peak_extra_bytes(mine) / 1e6, None, "MB")


def by_backend(network: HeliosTransformer, shape: Shape) -> Iterator[Row]:
    """The forward of the largest stage by each attention backend."""
    args = inputs(shape, stage=2)
    for label, attend in backends().items():
        name = f"forward_stage2_{label}"
        if isinstance(attend, str):
            yield Row.open(name, attend)
            continue
        try:
            yield Row(name, median(partial(network, *args, attend=attend), shape.turns), None, "s")
        except RuntimeError as error:
            yield Row.open(name, first_line(error))


def inputs(shape: Shape, stage: int) -> tuple[Tensor, Tensor, Tensor, History]:
    """Latents, timestep, text and history, in the order of the network's arguments."""
    height, width = (size // 2 ** (2 - stage) for size in shape.latents)
    past = Memory(random(1, 16, 19, *shape.latents), random(1, 16, 1, *shape.latents))
    timestep = torch.tensor([500.0], device=device())
    return random(1, 16, 9, height, width), timestep, random(1, TEXT_LENGTH, shape.config.text_dim), past.history()


def chunks(network: HeliosTransformer, shape: Shape, suffix: str) -> Iterator[Row]:
    """Whole chunks with the caches of a run, then with decoding, one after the other."""
    embeddings = random(1, TEXT_LENGTH, shape.config.text_dim)
    decoder: decode.Decoder | str
    try:
        decoder = decode.find(shape.vae, device()).to(torch.bfloat16)
    except MissingError as error:
        decoder = str(error)
    height, width = shape.decoded
    for steps in ((1, 1, 1), (2, 2, 2)):
        schedule = replace(DISTILLED, steps=steps, amplify_first_chunk=False)
        name = "".join(map(str, steps)) + suffix
        video = partial(make, network, embeddings, schedule, shape.latents)
        took = median(partial(_first, video), shape.turns)
        yield Row(f"chunk_{name}", took, None, "s", note=f"{CHUNK_FRAMES / took:.2f} FPS without VAE")
        if isinstance(decoder, str):
            yield Row.open(f"first_chunk_{name}", decoder)
            yield Row.open(f"fps_{name}", decoder)
            continue

        def decoded(count: int, video: Callable = video, decoder: decode.Decoder = decoder) -> None:
            for latents in video(count):
                decoder(latents[..., :height, :width].bfloat16())

        yield Row(
            f"first_chunk_{name}", median(partial(decoded, 1), shape.turns), None, "s", note="latency, VAE included"
        )
        rate = shape.chunks * CHUNK_FRAMES / median(partial(decoded, shape.chunks), shape.turns)
        yield Row(f"fps_{name}", rate, None, "FPS", note=f"with the VAE of {decoder.label}, without the text encoder")


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
