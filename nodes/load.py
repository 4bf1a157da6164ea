"""Load the model, from one file or from an official folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..helios_core.checkpoint import open_checkpoint
from ..host.compat import advanced, schema
from ..host.files.named_files import fingerprint
from ..host.files.official import find_folder, list_folders, read_schedule
from ..host.files.single_file import find_file, list_files
from ..host.files.text_encoder import load_text_encoder
from ..host.files.vae import load_vae
from ..host.messages import Notes
from ..host.model.loading import DTYPE_CHOICES, DTYPES, DtypeChoice, converted_on_reading, make_model
from ..host.model.offload_patcher import WEIGHTS_IN, Offloading, offloading
from ..host.widget_checks import found
from .inputs import HeliosScheduleSocket, offload_inputs

DTYPE_TOOLTIP = (
    "What the weights are kept in. auto: bf16 where the device can. fp8_e4m3fn halves the memory of the blocks' "
    "matrices at some loss of quality. A quantised file stays as it is: dtype is then that of the rest."
)


WEIGHTS_IN_TOOLTIP = (
    "Where group offloading keeps the weights. host: in memory, once. disk: in the file, read again for every step; a "
    "file from scripts/convert_checkpoint.py, on a fast SSD."
)
IDLE_WEIGHTS_IN = (
    "weights_in is disk, but does nothing while group_offload is off: ComfyUI decides where the weights are. Set "
    "group_offload to block or leaf to run them from disk."
)


def weights_in_input() -> io.Combo.Input:
    return advanced(
        io.Combo.Input,
        "weights_in",
        options=list(WEIGHTS_IN),
        default="host",
        optional=True,
        tooltip=WEIGHTS_IN_TOOLTIP,
    )


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input("dtype", options=list(DTYPE_CHOICES), default="auto", tooltip=DTYPE_TOOLTIP)


def load(path: str, dtype: DtypeChoice, how: Offloading | None, weights_in: str, notes: Notes) -> Any:
    """The MODEL of a file or folder. Says so on the node where weights_in disk spares no memory."""
    checkpoint = open_checkpoint(Path(path))
    if weights_in == "disk":
        notes.warn(IDLE_WEIGHTS_IN if how is None else converted_on_reading(checkpoint, dtype))
    return make_model(checkpoint, dtype, how)


class HeliosModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosModelLoader",
            display_name="Helios Model Loader",
            category="Helios/loaders",
            description="Loads a Helios transformer from one safetensors file in models/diffusion_models.",
            search_aliases=["helios", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=list_files("diffusion_models"),
                    tooltip="A file made by scripts/convert_checkpoint.py, or any single-file Helios transformer.",
                ),
                dtype_input(),
                *offload_inputs(),
                weights_in_input(),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def validate_inputs(cls, model_name) -> bool | str:
        return await found(partial(find_file, "diffusion_models"), model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name=None, **_) -> str:
        return fingerprint(model_name)

    @classmethod
    def execute(cls, model_name, dtype, group_offload="off", blocks_per_group=1, weights_in="host") -> io.NodeOutput:
        how = offloading(group_offload, blocks_per_group, weights_in)
        return io.NodeOutput(
            load(find_file("diffusion_models", model_name), dtype, how, weights_in, Notes(cls.hidden.unique_id))
        )


class HeliosDiffusersLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosDiffusersLoader",
            display_name="Helios Diffusers Loader",
            category="Helios/loaders",
            description=(
                "Loads everything from an official Helios folder in models/diffusers, or Helios-Tiny, which comes with "
                "the pack: transformer, text encoder, VAE and the variant's schedule."
            ),
            search_aliases=["helios", "load diffusers"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list_folders(),
                    tooltip="A copy of BestWishYsh/Helios-Distilled, -Mid or -Base below models/diffusers. Helios-Tiny "
                    "comes with the pack: a toy that draws coloured shapes.",
                ),
                dtype_input(),
                *offload_inputs(),
                weights_in_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                HeliosScheduleSocket.Output(display_name="schedule", tooltip="As the folder's own files say."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def validate_inputs(cls, folder) -> bool | str:
        return await found(find_folder, folder)

    @classmethod
    def fingerprint_inputs(cls, folder=None, **_) -> str:
        return fingerprint(folder)

    @classmethod
    def execute(cls, folder, dtype, group_offload="off", blocks_per_group=1, weights_in="host") -> io.NodeOutput:
        how = offloading(group_offload, blocks_per_group, weights_in)
        path = find_folder(folder)
        notes = Notes(cls.hidden.unique_id)
        schedule, warning = read_schedule(path)
        notes.warn(warning)
        model = load(str(path), dtype, how, weights_in, notes)
        text_dtype = None if dtype in ("auto", "fp8_e4m3fn") else DTYPES[dtype]
        return io.NodeOutput(model, load_text_encoder(path, text_dtype), load_vae(path), schedule)


NODES = [HeliosModelLoader, HeliosDiffusersLoader]
