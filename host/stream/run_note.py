"""The note in a run's folder, for somebody who finds it and wonders."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
    *_, (kind, _, value) = prompt_nodes(graph, node_id)
    return value if isinstance(value, str) and (of is None or kind in of) else None


def prompt_nodes(graph: dict[str, Any], node_id: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(class, inputs, the one of them with the first prompt) of this node and those before it, up to the prompt."""
    for _ in range(1 + len(graph)):  # a chain is no longer than that, a circle is
        node = graph.get(node_id, {})
        inputs = node.get("inputs", {})
        value: Any = next((inputs[name] for name in FIRST_PROMPT if name in inputs), None)
        yield node.get("class_type", ""), inputs, value
        if not is_link(value):
            return
        node_id = value[0]
