"""ComfyUI-Helios: long, real-time video with the Helios models, as ComfyUI nodes."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The host's entry point. Imported late, so that `helios_core` can be used without ComfyUI."""
    from .nodes import HeliosExtension

    return HeliosExtension()
