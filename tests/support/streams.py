"""Helios Stream Video on tiny weights, inside the host but without its server."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import folder_paths

from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.stream import HeliosStreamVideo
from harness import oracle
from harness.tiny import make_vae
from support.runs import QUICK, make_distilled, run_node

WIDTH, HEIGHT = 128, 64
GRAPH = {
    "1": {"class_type": "HeliosDiffusersLoader", "inputs": {"folder": "Helios-Distilled", "dtype": "auto"}},
    "2": {"class_type": "HeliosTextEncode", "inputs": {"clip": ["1", 1], "positive": "A red fox.", "negative": ""}},
    "3": {"class_type": "LoadImage", "inputs": {"image": "start.png"}},
    "4": {
        "class_type": "HeliosHistoryInjection",
        "inputs": {"positive": ["2", 0], "negative": ["2", 1], "frames": 132, "start_image": ["3", 0], "vae": ["1", 2]},
    },
    "5": {
        "class_type": "HeliosStreamVideo",
        "inputs": {
            "model": ["1", 0],
            "positive": ["4", 0],
            "negative": ["4", 1],
            "latent": ["4", 2],
            "schedule": ["1", 3],
            "vae": ["1", 2],
            "seed": 3,
            "fps": 24.0,
            "resume": True,
        },
    },
    "6": {"class_type": "SaveVideo", "inputs": {"video": ["5", 0], "filename_prefix": "video/fox"}},
}
SETTINGS = {"fps": 24.0, "crf": 18, "bit_depth": "8", "trim": False}


@dataclass(frozen=True)
class Parts:
    """What a graph has loaded."""

    model: Any
    vae: Any


def make_parts(folder: Path) -> Parts:
    make_distilled(folder)
    make_vae(7).save_pretrained(folder / "vae")
    return Parts(load_model(str(folder), "fp32"), load_vae(folder))


def beginning(frames: int, **inputs: Any) -> tuple[Any, Any, Any]:
    """Positive, negative and LATENT of a video of so many frames."""
    positive, negative = ([[embedding, {}]] for embedding in oracle.prompts())
    options = {"width": WIDTH, "height": HEIGHT, "batch_size": 1, **inputs}
    return run_node(HeliosHistoryInjection, positive, negative, frames=frames, **options)


def stream_video(parts: Parts, start: tuple, schedule: Any = QUICK, seed: int = 3, **settings: Any) -> tuple[list, Any]:
    """(videos, tail LATENT) of Helios Stream Video."""
    return run_node(HeliosStreamVideo, parts.model, *start, schedule, parts.vae, seed=seed, **{**SETTINGS, **settings})


class WatchedVAE:
    """The host's VAE, with something that happens at each decoding."""

    def __init__(self, vae: Any, action: Callable[[int], None]) -> None:
        self.vae, self.action, self.seen = vae, action, []  # a copy of it shares the list
        self.patcher, self.vae_dtype, self.memory_used_decode = vae.patcher, vae.vae_dtype, vae.memory_used_decode

    @property
    def calls(self) -> int:
        return len(self.seen)

    def decode(self, samples: Any) -> Any:
        self.seen.append(samples)
        self.action(self.calls)
        return self.vae.decode(samples)


def watched(parts: Parts, action: Callable[[int], None]) -> tuple[Parts, WatchedVAE]:
    """The same parts, with a VAE that calls action with the number of each decoding."""
    vae = WatchedVAE(parts.vae, action)
    return Parts(parts.model, vae), vae


def cleaned_up() -> None:
    """Wait for what is cleaned up in the background."""
    for thread in threading.enumerate():
        if thread.name == "helios-clean-up":
            thread.join()


def temporary_files() -> list[str]:
    folder = Path(folder_paths.get_temp_directory())
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def planes(path: str) -> list[Any]:
    """The decoded frames of a file, as they are stored: no conversion of colours."""
    with av.open(path) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


def packets(path: str) -> list[bytes]:
    with av.open(path) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def graph(**inputs: Any) -> dict[str, Any]:
    """GRAPH with these inputs of the streaming node."""
    changed: dict[str, Any] = copy.deepcopy(GRAPH)
    changed["5"]["inputs"] |= inputs
    return changed
