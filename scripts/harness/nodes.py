"""The pack's nodes, run outside of a server. Import it once ComfyUI is on sys.path."""

from types import SimpleNamespace
from typing import Any

import torch

from comfyui_helios.host.guard import guarded


def run_node(node: type, *args: Any, unique_id: str | None = None, prompt: Any = None, **kwargs: Any) -> Any:
    """Its outputs, run as the host runs it: guarded, without gradients, on this node of this graph, or on none."""
    hidden = SimpleNamespace(unique_id=unique_id, prompt=prompt, extra_pnginfo=None)
    with torch.inference_mode():
        return type("Node", (guarded(node),), {"hidden": hidden}).execute(*args, **kwargs).result  # type: ignore[attr-defined]
