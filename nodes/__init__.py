"""The nodes, in the order a graph uses them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host.guard import guarded
from ..host.stream.live_routes import add_live_routes
from . import cluster, compile, decode, history, load, lora, prompts, sample, schedule, stream, text


class HeliosExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        add_live_routes()
        modules = (load, lora, cluster, compile, text, prompts, history, schedule, sample, decode, stream)
        return [guarded(node) for module in modules for node in module.NODES]
