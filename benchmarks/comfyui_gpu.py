"""The pack inside ComfyUI on a GPU: its nodes by the server's API, as a person's graph runs them.

COMFYUI_PATH names the ComfyUI; the Python that runs this has its requirements and the pack's. Helios-Tiny makes the
first video that a new user makes. All else is the 14B's shape at 384x640, random bf16 weights in one file, with a Wan
VAE of the real size and a text encoder as wide as UMT5-XXL, of two small blocks. Device memory is what the whole card
has taken since before the server started, its context included; host memory is the server's RssAnon, pinned memory
included, minus its value before the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import network_gpu
import numpy as np
import paths
import torch
from card import device
from cards_gpu import SPARE
from comfyui_server import (
    LORA,
    WEIGHTS,
    Card,
    Seen,
    behind,
    check,
    execute,
    graph,
    having,
    make_models,
    server,
    watch,
)
from measure import Peak, Row
from memory_gpu import GB
from torch import Tensor

from harness.errors import mean_error
from harness.host import Host, comfyui_path
from harness.small import FIRST_RUN, find, read_workflow
from harness.workflow import to_api
from helios_core.config import CHUNK_FRAMES
from helios_core.loading import load_transformer
from helios_core.schedule import DISTILLED

CHUNKS = 3
COUNTED = 8  # GiB that a host which is to be short of VRAM counts
# Of the values of the first video, between a card in bf16 and the processor in float32. On the processor bf16
# differed from float32 by 0.028 of them, and another seed by 0.84.
FRAMES_DIFFER = 0.1
EXACT, ROUNDINGS = 1e-5, 3  # of the values of latents: in float32, and in bf16 times what another order makes of them
OFFLOADED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # inputs of nodes; options of hosts that have them
    "block": ({"group_offload": "block"}, ()),
    "leaf": ({"group_offload": "leaf"}, ()),
    "lowvram": ({}, ("--lowvram", "--disable-dynamic-vram")),
    "dynamic_vram": ({}, ()),
}
DYNAMIC = "DynamicVRAM support detected and enabled"  # in the log of a host that has it and uses it


def rows(name: str, models: Path, base: Path, tiny: bool) -> Iterator[Row]:
    """Those of the part comfyui_`name`. models: a folder of models, made where they are not there; base: of servers."""
    check()
    if name == "first_run":
        return first_run(base, tiny)
    make_models(models, tiny)
    if name in OFFLOADED:
        return offloaded(name, models, base, tiny)
    return {"14b": resident, "patched": patched}[name](models, base, tiny)


def first_run(base: Path, tiny: bool) -> Iterator[Row]:
    """The workflow that a new user runs first, on the card and on the processor; a rehearsal makes one chunk."""
    videos = []
    for place in ("card", "processor"):
        with server(base / place, None, cpu=place == "processor") as host:
            api = to_api(read_workflow(FIRST_RUN), host.get("/object_info"))
            api = having(api, frames=CHUNK_FRAMES, width=64, height=64) if tiny else api
            run, [file] = execute(host, api)
            yield Row(f"first_run_{place}", run.seconds, None, "s", note="Helios-Tiny to an mp4, loading included")
            videos.append(read_video(file))
            if place == "card":
                again, _ = execute(host, having(api, seed=7))
                yield Row("first_run_again", again.seconds, None, "s", note="with another seed")
    error = mean_error(*videos)
    yield Row("first_run_differs", error, None, "", note=f"the card's frames; right up to {FRAMES_DIFFER}")
    if not error <= FRAMES_DIFFER:
        raise RuntimeError(f"The card's first video differs from the processor's by {error:.2f} of its values.")


def resident(models: Path, base: Path, tiny: bool) -> Iterator[Row]:
    """The model on the card: memory, loading and speed, and its latents beside those of the core alone."""
    card = Card()
    with server(base, models) as host:
        api = graph(host, tiny, CHUNKS)
        with card, peak(host) as memory:
            cold = watch(host, api)
        yield from taken("resident", cold, card, memory)
        seen = watch(host, api)
        yield Row("load_comfyui", cold.seconds - seen.seconds, None, "s", note="what the first run took more")
        yield from speed("222", seen)
        yield from speed("111", watch(host, having(api, steps_stage_1=1, steps_stage_2=1, steps_stage_3=1)))
    yield from beside_core(seen, models / WEIGHTS, tiny)


def speed(steps: str, seen: Seen) -> Iterator[Row]:
    note = f"{len(seen.chunks) * CHUNK_FRAMES} frames, from the queue to the mp4"
    yield Row(f"video_{steps}_comfyui", seen.seconds, None, "s", note=note)
    yield Row(f"first_chunk_{steps}_comfyui", seen.chunks[0], None, "s", note="without VAE")
    yield Row(f"chunk_{steps}_comfyui", seen.chunk, None, "s", note=f"{CHUNK_FRAMES / seen.chunk:.2f} FPS without VAE")
    note = f"{seen.decoding:.2f} s of it decoding, when all is sampled; without text encoder and file"
    yield Row(f"fps_{steps}_comfyui", seen.rate, None, "FPS", note=note)


def taken(case: str, seen: Seen, card: Card, memory: Peak) -> Iterator[Row]:
    decoding = card.between(seen.latent, seen.images) or 0.0
    note = f"while sampling, {seen.allocated / GB:.2f} GB of it by torch; while decoding {decoding:.2f} GB"
    yield Row(f"vram_14b_comfyui_{case}", card.between(seen.text, seen.latent), None, "GB", note=note)
    yield Row(f"host_14b_comfyui_{case}", memory.bytes / GB, None, "GB")
    yield Row(f"seconds_a_chunk_comfyui_{case}", seen.chunks[-1], None, "s")


def beside_core(seen: Seen, weights: Path, tiny: bool) -> Iterator[Row]:
    """Raises RuntimeError where the latents are others than those of the core, by more than rounding."""
    from safetensors.torch import load_file

    needed = SPARE * weights.stat().st_size
    if device().type == "cuda" and needed > torch.cuda.mem_get_info()[1]:
        yield Row.open("latents_222_comfyui_differ", f"the core alone takes {needed / GB:.0f} GB of the card")
        return
    paths.add_comfyui()
    from comfy.latent_formats import Wan21

    found = Wan21().process_in(load_file(seen.file(".latent"))["latent_tensor"])
    dtype = torch.float32 if tiny else torch.bfloat16
    network = load_transformer(weights, dtype).to(device())
    text = load_file(seen.file(".safetensors"))["text"].to(device(), dtype)
    schedule = replace(DISTILLED, steps=(2, 2, 2), amplify_first_chunk=False)
    video = partial(network_gpu.make, network, text, schedule, found.shape[-2:], CHUNKS)
    with network_gpu.fusing(network):
        expected, took = timed(video())
    rounded, _ = timed(video())
    yield Row.compare("chunk_222_comfyui_beside_core", seen.chunk, took, "s", "peer: the core alone")
    error, rounding = mean_error(found, expected), mean_error(rounded, expected)
    most = max(EXACT, ROUNDINGS * rounding)
    note = f"from the core's; peer: the core's without fused kernels; right up to {most:.1e} of the values"
    yield Row("latents_222_comfyui_differ", error, rounding, "", note=note)
    if not error <= most:
        raise RuntimeError(f"ComfyUI's latents differ from the core's by {error:.1e} of their values.")


def timed(video: Iterator[Tensor]) -> tuple[Tensor, float]:
    """Latents (1, 16, 9k, H, W) on the CPU, and seconds a chunk but for the first."""
    chunks, ends = [], []
    for latents in video:
        chunks.append(latents.float().cpu())
        ends.append(time.perf_counter())
    return torch.cat(chunks, dim=2), (ends[-1] - ends[0]) / (len(ends) - 1)


def offloaded(name: str, models: Path, base: Path, tiny: bool) -> Iterator[Row]:
    """Two chunks: by the pack's group offloading of everything, or by a host that takes the card for a small one."""
    inputs, flags = OFFLOADED[name]
    options: tuple[str, ...] = ()
    if not inputs and device().type == "cuda":
        known = (comfyui_path() / "comfy" / "cli_args.py").read_text(encoding="utf-8")
        reserved = max(0.0, torch.cuda.mem_get_info()[1] / 2**30 - COUNTED)
        options = (*(flag for flag in flags if flag in known), "--reserve-vram", f"{reserved:.1f}")
    card = Card()
    with server(base, models, *options) as host:
        if name == "dynamic_vram" and DYNAMIC not in host.log.read_text(errors="replace"):
            yield Row.open("vram_14b_comfyui_dynamic_vram", "this ComfyUI has none (0.16 has), or not on this machine")
            return
        with card, peak(host) as memory:
            seen = watch(host, having(graph(host, tiny, 2), **inputs))
    yield from taken(name, seen, card, memory)


def patched(models: Path, base: Path, tiny: bool) -> Iterator[Row]:
    """A LoRA on every matrix of the blocks, and compiled blocks, beside the model as it is.

    A rehearsal compiles nothing. Raises RuntimeError where the LoRA changes nothing.
    """
    from safetensors.torch import load_file

    with server(base, models) as host:
        api = graph(host, tiny, CHUNKS)
        watch(host, api)  # loads
        plain = watch(host, api)
        latents = load_file(plain.file(".latent"))["latent_tensor"]
        lora = {"lora_name": LORA.name, "strength": 1.0}
        compiled = {"backend": "cudagraphs" if tiny else "inductor", "mode": "default"}
        for label, kind, settings in (("lora", "HeliosLoraLoader", lora), ("compiled", "HeliosCompile", compiled)):
            other = behind(api, find(api, "HeliosModelLoader"), kind, "model", **settings)
            first, seen = watch(host, other), watch(host, other)
            differs = mean_error(load_file(seen.file(".latent"))["latent_tensor"], latents)
            more = first.seconds - seen.seconds
            note = f"peer: without; the first run took {more:.1f} s more; latents differ by {differs:.1e}"
            yield Row.compare(f"chunk_222_comfyui_{label}", seen.chunk, plain.chunk, "s", note)
            if label == "lora" and not differs > 0:
                raise RuntimeError("A LoRA of random weights on every matrix changes nothing.")


def peak(host: Host) -> Peak:
    assert host.process is not None
    return Peak(host.process.pid)


def read_video(file: Path) -> Tensor:
    """Its frames, (T, H, W, 3) in 0..255."""
    import av

    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).float()
