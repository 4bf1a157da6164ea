"""Memory and speed of a chunk of the 14B model on one GPU, offloaded and not; one way to offload in a process.

Random bf16 weights in one file, 384x640, steps [2, 2, 2], one prompt. Reported are the peak of device memory that torch
allocated, the peak of host memory (sampled RssAnon, pinned memory included, minus its value before the weights were
read) and seconds a chunk. Needs Linux, safetensors and accelerate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from card import TEXT_LENGTH, device, random
from measure import Peak, Row
from parts import require
from torch import Tensor

from helios_core.checkpoint import CONFIG_KEY, published_name, target_dtypes
from helios_core.config import NATIVE_HEIGHT, NATIVE_WIDTH, SPATIAL_SCALE, TransformerConfig
from helios_core.generate import Run, generate
from helios_core.history import Memory
from helios_core.loading import load_transformer
from helios_core.predict import bind_transformer
from helios_core.schedule import DISTILLED
from helios_core.transformer import HeliosTransformer

GB = 1e9
TINY: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 4, "ffn_dim": 704, "text_dim": 256}
CASES: dict[str, dict[str, Any]] = {
    "resident": {},
    "block_host": {"level": "block", "gather": True},
    "block_disk": {"level": "block", "gather": False},
    "leaf_host": {"level": "leaf", "gather": True},
    "leaf_disk": {"level": "leaf", "gather": False},
}
CHUNKS = 2  # the first warms up
WANTED_VRAM, WANTED_HOST = 6.0, {True: 34.0, False: 8.0}  # GB of what is offloaded, from host memory or from disk


def rows(case: str, file: Path, tiny: bool, size: tuple[int, int] | None = None) -> Iterator[Row]:
    """file: the random weights; written if it is not there. size: of the video in latents, if not the usual one."""
    require("accelerate", "safetensors")
    from helios_core.offload import Offloader

    if not file.exists():
        write_weights(file, TransformerConfig(**(TINY if tiny else {})))
    native = NATIVE_HEIGHT // SPATIAL_SCALE, NATIVE_WIDTH // SPATIAL_SCALE
    height, width = size or ((8, 16) if tiny else native)
    schedule = replace(DISTILLED, steps=(2, 2, 2), amplify_first_chunk=False)
    torch.zeros(1, device=device())  # what a GPU takes of the host's memory from the start is no part of the case
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with Peak() as host:
        model = load_transformer(file, torch.bfloat16)
        settings = CASES[case]
        if not settings:
            model.to(device())
        text = random(1, TEXT_LENGTH, model.config.text_dim)
        bind = bind_transformer(model, schedule, text, prepare_prompts=False)
        memory = Memory.empty(1, height, width).to(device())
        times = []
        with Offloader(model, device(), **settings) if settings else nullcontext():
            start = time.perf_counter()
            for chunk in generate(bind, Run(schedule, memory, CHUNKS, torch.Generator().manual_seed(0))):
                chunk.latents.sum().item()  # waits for the device
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
    vram = torch.cuda.max_memory_allocated() / GB if device().type == "cuda" else None
    wanted = (WANTED_VRAM, WANTED_HOST[settings["gather"]]) if settings else (None, None)
    for name, used, most in zip(("vram", "host"), (vram, host.bytes / GB), wanted, strict=True):
        yield Row(f"{name}_14b_{case}", used, None, "GB", note=f"at most {most} GB are wanted" if most else "")
    yield Row(f"seconds_a_chunk_{case}", times[-1], None, "s")


def write_weights(file: Path, config: TransformerConfig) -> None:
    torch.manual_seed(0)
    dtypes = target_dtypes(config, torch.bfloat16)
    empty = HeliosTransformer(config, dtype=torch.bfloat16, device="meta").state_dict()
    weights = {
        name: (torch.randn(tensor.shape, device=device()) / tensor.shape[-1] ** 0.5).to("cpu", dtypes[name])
        for name, tensor in empty.items()
    }
    weights = {published_name(name): weight for name, weight in weights.items()}
    save_whole(file, weights, {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())})


def save_whole(file: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file that is there is all there, whenever writing it was cut off."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    save_file(weights, unfinished, metadata)
    unfinished.replace(file)
