"""Progress bar, previews and interruption of a node."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview

from ..helios_core.generate import Step


class SamplingProgress:
    """One bar over all steps of all chunks, with a preview of the frame in the middle of the chunk.

    An earlier run may have taken the first `done` steps. Build it on the node's thread: the host ties the bar to the
    node that is executing there.
    """

    def __init__(self, model_patcher: Any, steps: int, done: int = 0):
        self.bar = comfy.utils.ProgressBar(steps)
        self.previewer = latent_preview.get_previewer(model_patcher.load_device, model_patcher.model.latent_format)
        self.done = done

    def __call__(self, step: Step) -> None:
        check_interrupt()
        preview = None
        if self.previewer is not None:
            frame = step.preview(step.latents.shape[2] // 2)[:1]  # the host's previewers show a video's frame 0
            preview = self.previewer.decode_latent_to_preview_image("JPEG", frame)
        self.done += 1
        # A run without an end has a full bar once it has made what was asked for at least.
        self.bar.update_absolute(self.done, max(self.done, self.bar.total), preview)


def check_interrupt() -> None:
    """Raise the host's InterruptProcessingException if the user has pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
