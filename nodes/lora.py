"""Put a LoRA on top of a model."""

from __future__ import annotations

from functools import partial

from comfy_api.latest import io

from ..host.compat import schema
from ..host.files.named_files import fingerprint
from ..host.files.single_file import find_file, list_files
from ..host.messages import Notes
from ..host.model.base_model import check_model
from ..host.model.lora import add_lora
from ..host.widget_checks import found


class HeliosLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosLoraLoader",
            display_name="Helios LoRA Loader",
            category="Helios/loaders",
            description=(
                "Puts a LoRA for Helios or for Wan 2.1 T2V 14B on top of a Helios model, and says how much of the file "
                "takes effect."
            ),
            search_aliases=["helios", "lora", "load lora", "wan lora"],
            inputs=[
                io.Model.Input("model", tooltip="From a Helios loader, or from another LoRA loader. Before Compile."),
                io.Combo.Input(
                    "lora_name", options=list_files("loras"), tooltip="A .safetensors file in models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="0 leaves the model as it is; below 0 it goes the other way.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def validate_inputs(cls, lora_name) -> bool | str:
        return await found(partial(find_file, "loras"), lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **_) -> str:
        return fingerprint(lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength=1.0) -> io.NodeOutput:
        check_model("Helios LoRA Loader", model)
        return io.NodeOutput(add_lora(model, find_file("loras", lora_name), strength, Notes(cls.hidden.unique_id)))


NODES = [HeliosLoraLoader]
