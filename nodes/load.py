"""Load the model, from one file or from an official folder."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from .host.compat import schema
from .host.folder import load_text_encoder, load_vae
from .host.model import DTYPE_CHOICES, DTYPES, load_model
from .host.official import find_folder, list_folders, read_schedule
from .host.progress import clear_warning, warn
from .schedule import HeliosScheduleSocket

DTYPE_TOOLTIP = (
    "What the weights are kept in. auto: bf16 where the device can. fp8_e4m3fn halves the memory of the blocks' "
    "matrices at some loss of quality."
)


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input("dtype", options=list(DTYPE_CHOICES), default="auto", tooltip=DTYPE_TOOLTIP)


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
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file made by scripts/convert_checkpoint.py, or any single-file Helios transformer.",
                ),
                dtype_input(),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model_name, dtype) -> io.NodeOutput:
        return io.NodeOutput(load_model(folder_paths.get_full_path_or_raise("diffusion_models", model_name), dtype))


class HeliosDiffusersLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosDiffusersLoader",
            display_name="Helios Diffusers Loader",
            category="Helios/loaders",
            description=(
                "Loads everything from an official Helios folder in models/diffusers: transformer, text encoder, VAE "
                "and the variant's schedule."
            ),
            search_aliases=["helios", "load diffusers"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list_folders(),
                    tooltip="A copy of BestWishYsh/Helios-Distilled, -Mid or -Base below models/diffusers.",
                ),
                dtype_input(),
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
    def execute(cls, folder, dtype) -> io.NodeOutput:
        path = find_folder(folder)
        clear_warning(cls.hidden.unique_id)
        schedule, warning = read_schedule(path)
        if warning:
            warn(warning, cls.hidden.unique_id)
        model = load_model(str(path), dtype)
        text_dtype = None if dtype in ("auto", "fp8_e4m3fn") else DTYPES[dtype]
        return io.NodeOutput(model, load_text_encoder(path, text_dtype), load_vae(path), schedule)


NODES = [HeliosModelLoader, HeliosDiffusersLoader]
