"""Forwards and whole runs of small networks, by one process or shared out among several.

`PYTHONPATH=.:tests:scripts python tests/support/shared_out.py FOLDER RANK` is one of WORKERS processes that make
everything in groups of every degree; each writes FOLDER/RANK.safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from harness.counted import Counted
from harness.tiny import TINY, make_loud
from helios_core.config import CHUNK_LATENTS, LATENT_CHANNELS, TransformerConfig
from helios_core.generate import Chunk, Run, generate
from helios_core.history import HistoryLayout, Memory
from helios_core.offload import Offloader
from helios_core.parallel import share_out
from helios_core.predict import bind_transformer
from helios_core.schedule import BASE, DISTILLED, MID
from helios_core.transformer import HeliosTransformer, RunBlock
from helios_core.video import EncodedPast, VideoStart

WORKERS = 4
DEGREES = (2, 3, 4)  # processes 0 to degree - 1 are a group
DEGREES_OF_RUNS = (2, 4)
PATIENCE = timedelta(seconds=120)
HEADS = 4
TEXT_LENGTH = 12


@dataclass(frozen=True)
class Forward:
    """One call of a network with random inputs, of which most cannot be shared out evenly."""

    config: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    size: tuple[int, int] = (12, 20)  # of the history, in latents
    noisy: tuple[int, int] = (6, 10)
    dtype: torch.dtype = torch.float32
    prepared: bool = False
    offloaded: bool = False
    layout: HistoryLayout = field(default_factory=HistoryLayout)


FORWARDS = {
    "one head each": Forward(),
    "five heads": Forward({"num_attention_heads": 5}),
    "even shares": Forward(size=(16, 16), noisy=(16, 16)),
    "batch of two": Forward(batch=2),
    "prepared": Forward(prepared=True),
    "one block": Forward({"num_layers": 1}),
    "text as long as a share": Forward(size=(8, 8), noisy=(2, 2)),
    "no history for some": Forward(size=(2, 2), noisy=(2, 2), layout=HistoryLayout((1, 1, 1), keep_first_frame=False)),
    "history cross-attends": Forward({"guidance_cross_attn": False}),
    "history has the noisy timestep": Forward({"zero_history_timestep": False}),
    "amplified per head": Forward({"is_amplify_history": True, "num_attention_heads": 5}),
    "offloaded": Forward(offloaded=True),
    "bf16": Forward(dtype=torch.bfloat16),
}
SCHEDULES = {
    "base": replace(BASE, steps=(3,), guidance_scale=2.0),
    "mid": replace(MID, steps=(2, 1, 1), guidance_scale=2.0, zero_steps=0),
    "distilled": replace(DISTILLED, steps=(1, 1, 1)),
}
TASKS = ("text", "image", "video")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(dtype: torch.dtype = torch.float32, **config: Any) -> HeliosTransformer:
    config = {**TINY, "num_attention_heads": HEADS, **config}
    exact = make_loud(HeliosTransformer(TransformerConfig(**config)), seed=0)
    model = HeliosTransformer(exact.config, dtype=dtype).eval().requires_grad_(False)
    model.load_state_dict(exact.state_dict())
    return model


@torch.inference_mode()
def forward(case: Forward, run_block: RunBlock | None = None) -> Tensor:
    """The flow (B, 16, 9, h, w)."""
    model = network(case.dtype, **case.config)
    past = random(case.batch, LATENT_CHANNELS, case.layout.frames, *case.size, seed=1)
    anchor = random(case.batch, LATENT_CHANNELS, 1, *case.size, seed=2)
    history: Any = Memory(past, anchor, case.layout).history().to(case.dtype)
    latents = random(case.batch, LATENT_CHANNELS, CHUNK_LATENTS, *case.noisy, seed=3).to(case.dtype)
    text: Any = random(case.batch, TEXT_LENGTH, model.config.text_dim, seed=4).to(case.dtype)
    timestep = torch.linspace(300, 900, case.batch)
    if case.prepared:
        text, history = model.prepare_text(text), model.prepare_history(history)
    if not case.offloaded:
        return model(latents, timestep, text, history, run_block=run_block)
    with Offloader(model, torch.device("cpu"), level="block", blocks_per_group=1):
        return model(latents, timestep, text, history, run_block=run_block)


@torch.inference_mode()
def video(variant: str, task: str, run_block: RunBlock | None = None) -> Tensor:
    """Latents (1, 16, 9k, 8, 8): two chunks from text, the first that follows on an image or a video."""
    model, schedule = network(), SCHEDULES[variant]
    image, still = random(2, 1, LATENT_CHANNELS, 1, 8, 8, seed=5)
    past = {
        "text": None,
        "image": EncodedPast(image, still),
        "video": EncodedPast(image, random(1, LATENT_CHANNELS, CHUNK_LATENTS, 8, 8, seed=6)),
    }[task]
    rng = torch.Generator().manual_seed(7)
    memory = VideoStart(past).memory(1, 8, 8, rng)
    prompts = random(2, 1, TEXT_LENGTH, model.config.text_dim, seed=8)
    bind = bind_transformer(model, schedule, *prompts, run_block=run_block)
    chunks: Iterator[Chunk] = generate(bind, Run(schedule, memory, 2 if past is None else 1, rng))
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rank", type=int)
    options = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else it listens on whatever the host's name resolves to
    store = dist.FileStore(str(options.folder / "rendezvous"), WORKERS)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=WORKERS, timeout=PATIENCE)
    results: dict[str, Tensor] = {}
    counts: dict[str, tuple[int, int]] = {}
    for degree in DEGREES:
        group = dist.new_group(list(range(degree)))
        if options.rank >= degree:
            continue
        run_block = share_out(group)
        for name, case in FORWARDS.items():
            with patch.object(dist, "all_to_all_single", Counted(options.rank)) as counted:
                results[f"{degree} {name}"] = forward(case, run_block)
            counts[f"{degree} {name}"] = (counted.messages, counted.bytes)
        for variant, task in product(SCHEDULES, TASKS) if degree in DEGREES_OF_RUNS else ():
            results[f"{degree} {variant} {task}"] = video(variant, task, run_block)
    save_file(
        {name: x.contiguous() for name, x in results.items()},
        options.folder / f"{options.rank}.safetensors",
        {"counts": json.dumps(counts)},
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
