"""Host and device memory of offloading, ours beside its peers: `make bench-memory`.

Each case runs in a process of its own, on the same file of random weights, and reports its peak. Host memory is the
largest sampled RssAnon minus its value after the imports; memory pinned in place is part of it. Pages of mapped files
are not: the system takes those back whenever something else needs the room. Rows go to build/bench-memory.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stream_memory
from measure import ROOT, Peak, Row, table, write

RESULT = ROOT / "build" / "bench-memory.json"
MB, GB = 1e6, 1e9

# 3.2 GB in float32: wide enough for real matrices, on inputs that two cores get through.
CONFIG = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "text_dim": 1024,
    "freq_dim": 256,
    "ffn_dim": 4096,
    "num_layers": 48,
    "rope_dim": (44, 42, 42),
}
STEPS = 3
GPU_FIGURES = ("vram_14b", "host_14b", "seconds_a_chunk")
GPU_CASES = ("resident", "block_host", "block_disk", "leaf_host", "leaf_disk")  # of memory_gpu.py
GPU_PEERS = {
    "comfyui_lowvram": "make gpu on a card, with a ComfyUI",
    "comfyui_dynamic_vram": "make gpu on a card, with a ComfyUI of 0.16 or later",
    "diffusers_leaf": "needs a card",
}


def inputs() -> dict[str, Any]:
    import torch

    torch.manual_seed(1)
    return {
        "latents": torch.randn(1, 16, 9, 16, 16),
        "text": torch.randn(1, 64, CONFIG["text_dim"]),  # type: ignore[call-overload]
        "past": torch.randn(1, 16, 19, 16, 16),
        "anchor": torch.randn(1, 16, 1, 16, 16),
    }


def digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


def write_model(folder: Path) -> None:
    """A transformer of random weights in the official layout, one file."""
    import torch
    from diffusers import HeliosTransformer3DModel

    torch.manual_seed(0)
    HeliosTransformer3DModel(**CONFIG).save_pretrained(folder / "transformer", max_shard_size="100GB")


@contextmanager
def ours(folder: Path, **settings: Any) -> Iterator[Callable[[], Any]]:
    """Steps of our transformer, read from the folder; offloaded where there are settings."""
    import torch

    from helios_core.history import HistoryLayout, Memory
    from helios_core.loading import load_transformer
    from helios_core.offload import Offloader

    model = load_transformer(folder, torch.float32)
    given = inputs()
    history = Memory(given["past"], given["anchor"], HistoryLayout()).history()

    def step() -> Any:
        return model(given["latents"], torch.tensor([500.0]), given["text"], history)

    with torch.inference_mode():
        if not settings:
            yield step
            return
        with Offloader(model, "cpu", **settings):
            yield step


@contextmanager
def diffusers(folder: Path, **settings: Any) -> Iterator[Callable[[], Any]]:
    """Steps of diffusers' transformer under its own group offloading."""
    import torch
    from diffusers import HeliosTransformer3DModel

    from helios_core.history import HistoryLayout, Memory

    model = HeliosTransformer3DModel.from_pretrained(folder / "transformer").eval().requires_grad_(False)
    if settings:
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **settings)
    given = inputs()
    history = Memory(given["past"], given["anchor"], HistoryLayout()).history()
    frames = history.indices
    index = [torch.tensor([getattr(frames, name)]) for name in ("noisy", "short", "mid", "long")]
    parts = (history.short, history.mid, history.long)
    with torch.inference_mode():
        yield lambda: model(given["latents"], torch.tensor([500.0]), given["text"], *index, *parts, return_dict=False)[
            0
        ]


CASES: dict[str, Callable[[Path], Any]] = {
    "ours_plain": ours,
    "ours_disk_block": lambda folder: ours(folder, level="block", gather=False),
    "ours_disk_leaf": lambda folder: ours(folder, level="leaf", gather=False),
    "ours_host_block": lambda folder: ours(folder, level="block", gather=True),
    "ours_host_leaf": lambda folder: ours(folder, level="leaf", gather=True),
    "diffusers_plain": diffusers,
    "diffusers_block": lambda folder: diffusers(folder, offload_type="block_level", num_blocks_per_group=1),
    "diffusers_leaf": lambda folder: diffusers(folder, offload_type="leaf_level"),
    "diffusers_disk_leaf": lambda folder: diffusers(
        folder, offload_type="leaf_level", offload_to_disk_path=str(folder / "offload")
    ),
    "diffusers_disk_block": lambda folder: diffusers(
        folder, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder / "offload")
    ),
}


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """In this process: peak host memory, seconds a step and a digest of the result."""
    import torch  # noqa: F401

    for module in ("helios_core.offload", "helios_core.loading", "diffusers.models", "diffusers.hooks"):
        importlib.import_module(module)
    from diffusers import HeliosTransformer3DModel  # noqa: F401  # its import is not part of the case

    with Peak() as memory, CASES[name](folder) as step:
        result, times = step(), []
        for _ in range(STEPS):
            start = time.perf_counter()
            result = step()
            times.append(time.perf_counter() - start)
    return {"bytes": memory.bytes, "seconds": min(times), "digest": digest(result)}


def run_apart(name: str, folder: Path) -> dict[str, Any]:
    """The case in a new process."""
    command = [sys.executable, __file__, "--case", name, "--model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:22} {result['bytes'] / MB:8.0f} MB {result['seconds']:7.2f} s a step  {result['digest'][:12]}")
    return dict(result)


def measure(folder: Path) -> list[Row]:
    results = {name: run_apart(name, folder) for name in CASES}
    digests = {results[name]["digest"] for name in results if name.startswith("ours")}
    if len(digests) != 1:
        raise RuntimeError("Offloaded runs differ from the run without offloading.")
    weights = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    size = {name: result["bytes"] for name, result in results.items()}
    seconds = {name: result["seconds"] for name, result in results.items()}
    on_gpu = "; its copies are made on a GPU only"
    return [
        Row("weights", weights / GB, None, "GB"),
        Row.compare(
            "disk_tier_anonymous",
            size["ours_disk_block"] / MB,
            size["diffusers_disk_block"] / MB,
            "MB",
            "block level; diffusers with offload_to_disk_path",
        ),
        Row.compare(
            "disk_tier_anonymous_leaf",
            size["ours_disk_leaf"] / MB,
            size["diffusers_disk_leaf"] / MB,
            "MB",
            "leaf level; diffusers with offload_to_disk_path",
        ),
        Row.compare(
            "host_tier_peak",
            size["ours_host_block"] / weights,
            size["diffusers_block"] / weights,
            "weights",
            f"block level{on_gpu}",
        ),
        Row.compare(
            "host_tier_peak_leaf",
            size["ours_host_leaf"] / weights,
            size["diffusers_leaf"] / weights,
            "weights",
            f"leaf level{on_gpu}",
        ),
        Row.compare(
            "step_disk_over_plain",
            seconds["ours_disk_block"] / seconds["ours_plain"],
            seconds["diffusers_disk_block"] / seconds["diffusers_plain"],
            "x",
            "seconds a step, offloaded to disk over not offloaded",
        ),
        Row.compare(
            "step_host_over_plain",
            seconds["ours_host_block"] / seconds["ours_plain"],
            seconds["diffusers_block"] / seconds["diffusers_plain"],
            "x",
            "the same for host memory",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="only this one, in this process")
    parser.add_argument("--model", type=Path, help="folder with the random weights; made if left out")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.model)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary)
        if not (folder / "transformer").is_dir():
            write_model(folder)
        rows = measure(folder)
    rows += stream_memory.rows()
    for figure in GPU_FIGURES:
        for case in GPU_CASES:
            rows.append(Row(f"{figure}_{case}", None, None, "", note="open: make bench-memory-gpu on a card"))
        for peer, part in GPU_PEERS.items():
            rows.append(Row(f"{figure}_{peer}", None, None, "", note=f"open: {part}"))
    write(RESULT, rows)
    print(table(rows), f"-> {RESULT}", sep="\n")


if __name__ == "__main__":
    main()
