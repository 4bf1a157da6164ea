"""Compile a model for speed."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.compat import advanced, schema
from ..host.model.compiled import compile_blocks

BACKENDS = ("inductor", "cudagraphs")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class HeliosCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosCompile",
            display_name="Helios Compile",
            category="Helios",
            description=(
                "Compiles the blocks of a Helios model with torch.compile. The first chunk takes longer, the "
                "later ones less. Without Triton or a compiler the model runs as it is, and the node says so."
            ),
            search_aliases=["helios", "torch.compile", "inductor", "speed", "optimize"],
            inputs=[
                io.Model.Input("model", tooltip="After LoRA loaders. Not together with group offloading."),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="inductor",
                    optional=True,
                    tooltip="inductor: fused kernels. cudagraphs: the same kernels, launched together.",
                ),
                advanced(
                    io.Combo.Input,
                    "mode",
                    options=list(MODES),
                    default="default",
                    optional=True,
                    tooltip="For inductor. max-autotune tries many kernels: minutes for the first chunk.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, backend="inductor", mode="default") -> io.NodeOutput:
        return io.NodeOutput(compile_blocks(model, backend, mode, cls.hidden.unique_id))


NODES = [HeliosCompile]
