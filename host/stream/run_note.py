"""The note in a run's folder, for somebody who finds it and wonders."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from comfy_execution.graph_utils import is_link

from ...helios_core.config import CHUNK_FRAMES, SPATIAL_SCALE
from ...helios_core.quoting import quoted
from .run_folder import KEPT_RUNS

SHOWN = 200  # characters of the prompt
FIRST_PROMPT = ("positive", "prompt_1", "text")  # inputs that hold a prompt or lead to one, ours and the host's


def about(chunk_shape: tuple[int, ...], chunks: int, seed: int, prompt: str | None) -> str:
    """The note's text. chunk_shape: (B, 16, 9, H, W) of the run's chunks; prompt: as far as the graph tells."""
    batch, _, _, height, width = chunk_shape
    lines = [
        "Chunks of a video that ComfyUI-Helios is making, saved so that it can go on after a crash or Cancel.",
        f"Begun: {datetime.now():%Y-%m-%d %H:%M}",
        f"Video: {width * SPATIAL_SCALE} x {height * SPATIAL_SCALE}, {chunks * CHUNK_FRAMES} frames ({chunks} chunks), "
        f"{batch} at once, seed {seed}",
    ]
    if prompt is not None:
        lines.append(f"Prompt: {quoted(prompt, SHOWN)}")
    lines += [
        "The folder may be deleted: the video is then made anew when its graph runs again. ComfyUI-Helios deletes it",
        f"by itself a day after its last use, unless it is among the {KEPT_RUNS} newest.",
    ]
    return "\n".join(lines) + "\n"


def first_prompt(graph: dict[str, Any], node_id: str, of: Collection[str] | None = None) -> str | None:
    """The text of the prompt that leads to this node; None where another node makes it, or is none `of` these kinds."""
    for _ in range(len(graph)):  # a chain is no longer than that, a circle is
        inputs = graph.get(node_id, {}).get("inputs", {})
        value: Any = next((inputs[name] for name in FIRST_PROMPT if name in inputs), None)
        if not is_link(value):
            known = of is None or graph.get(node_id, {}).get("class_type") in of
            return value if known and isinstance(value, str) else None
        node_id = value[0]
    return None
