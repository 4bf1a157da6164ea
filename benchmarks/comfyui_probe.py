"""Nodes for a ComfyUI that is measured: each hands on a value, and says when, and what torch had allocated until then.

A pack of its own, which comfyui_server.py puts beside ours.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

PROMPT = "prompt.safetensors"  # what passes as CONDITIONING, in the folder of outputs


def probe(name: str, socket: Any) -> type[io.ComfyNode]:
    class Probe(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(name, category="benchmarks", inputs=[socket.Input("value")], outputs=[socket.Output()])

        @classmethod
        def fingerprint_inputs(cls, value: Any = None) -> float:
            return float("nan")  # it and all behind it run every time

        @classmethod
        def execute(cls, value: Any) -> io.NodeOutput:
            allocated = 0
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                allocated = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            told: dict[str, Any] = {"seen": [{"time": time.monotonic(), "allocated": allocated}]}
            if socket is io.Conditioning:
                save_file({"text": value[0][0].contiguous()}, Path(folder_paths.get_output_directory()) / PROMPT)
                told["saved"] = [{"filename": PROMPT, "subfolder": "", "type": "output"}]
            return io.NodeOutput(value, ui=told)

    return Probe


class Probes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        sockets = {"ProbeText": io.Conditioning, "ProbeLatent": io.Latent, "ProbeImages": io.Image}
        return [probe(name, socket) for name, socket in sockets.items()]


async def comfy_entrypoint() -> ComfyExtension:
    return Probes()
