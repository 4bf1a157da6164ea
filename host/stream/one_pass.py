"""Sampler, decoder and video encoder in one pass, chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ...helios_core.generate import Chunk
from ..progress import check_interrupt
from ..sampling.guider import HeliosGuider
from ..sockets.latent import to_vae_space
from .background import Background
from .fit_together import already_loaded, fits_now, may_fit
from .prompt_turns import PromptTurns
from .saved_chunks import SavedChunk, SavedRun
from .video_writer import VideoWriter


class OnePass:
    """Samples what is not done and writes everything; what changes on the way are its last four fields.

    With `overlap` a chunk is encoded, and where both models fit also decoded, while the next one is denoised; otherwise
    all take turns on the node's own thread.
    """

    def __init__(
        self, guider: HeliosGuider, writer: VideoWriter, overlap: bool, saved: SavedRun | None, prompts: PromptTurns
    ):
        self.guider, self.writer, self.overlap, self.saved = guider, writer, overlap, saved
        self.prompts, self.steering = prompts, prompts.steering
        self.decode_beside = overlap and may_fit(guider, writer.vae)
        self.background = Background()
        self.tail: Tensor | None = None  # the newest chunk (B, 16, 9, H, W), in VAE space
        self.model_may_be_gone = False  # another model has asked for room
        self.disk_is_full = False  # nearly: it ends, and with `resume` it goes on another time

    def run(self) -> tuple[list[Path], Tensor]:
        """The files of the batch, and the last chunk (B, 16, 9, H, W) in VAE space.

        Whatever ends it early drops the chunk and the files under way, but for an interrupt of a video that is
        watched: it ends with the chunks that are finished. Saved chunks stay.
        """
        with self.writer:
            try:
                self.write_all()
            except InterruptProcessingException:
                self.writer.keep()
                if files := self.writer.kept:
                    self.prompts.notes.warn(
                        f"Cancelled. What was finished is in {files[0]} until ComfyUI is started again: save it from "
                        "there, or from the player on this node."
                    )
                    self.prompts.write_beside(files[0])
                raise
            files = self.writer.finish()
        assert self.tail is not None
        self.prompts.write_beside(files[0])
        return files, self.tail

    def write_all(self) -> None:
        with self.background:
            try:
                if self.saved is not None:
                    self.prompts.replay(self.saved.changes)
                self.write_saved()
                if self.guider.run.goes_on(self.guider.done):
                    beside = [self.writer.vae.patcher] if self.decode_beside else []
                    # A video that cannot be written is not sampled to its end.
                    self.guider.denoise(self.take, beside, self.background.check, self.make_ready)
                    self.background.wait()
            except BaseException:
                self.writer.stop()
                raise

    def write_saved(self) -> None:
        """Write the chunks that an earlier run has made."""
        if self.saved is None or not self.guider.done:
            return
        run = self.guider.run
        bar = comfy.utils.ProgressBar(run.steps(max(run.chunks, self.guider.done)))
        for position in range(self.guider.done):
            check_interrupt()
            self.tail = to_vae_space(self.saved.load(position).latents)
            self.writer.write(position, self.tail)
            bar.update_absolute(run.steps(position + 1))

    def take(self, chunk: Chunk) -> None:
        """A chunk that was just denoised: save it, decode it, write it."""
        guider, writer = self.guider, self.writer
        position = chunk.index - guider.run.first_index
        if self.saved is not None:
            change, state = self.steering.applied.get(position), guider.run.rng.get_state()
            finished = chunk.last and self.steering.endless and not self.disk_is_full
            self.saved.save(position, SavedChunk(chunk.latents, chunk.memory, state, change, finished))
        self.tail = to_vae_space(chunk.latents)
        self.background.wait()
        check_interrupt()
        if self.steering.goes_on(chunk.index + 1) and writer.is_short_of_room():
            self.disk_is_full = True
            self.steering.finish()
            self.prompts.notes.warn("The disk is nearly full: the video ends here, while there is room to finish it.")
        if self.decode_beside and fits_now(guider, writer.vae):
            self.background.start(writer.write, position, self.tail, already_loaded(writer.vae))
            if chunk.last:  # the host cleans up what it has loaded as soon as sampling ends
                self.background.wait()
            return
        for item, frames in writer.decode(position, self.tail):
            if self.overlap:
                self.background.start(writer.encode, item, frames)
            else:
                writer.encode(item, frames)
        self.model_may_be_gone = True  # decoding may have taken its place

    def make_ready(self, position: int) -> None:
        """Before chunk `position` of the run: a prompt that waits takes over, and the model is where it has to be."""
        if self.steering.is_asked:
            self.background.wait()  # the text encoder may take the place of the VAE it decodes with
            self.model_may_be_gone |= self.prompts.take_up(position)
        if self.model_may_be_gone:
            self.guider.load_again()
        self.model_may_be_gone = False
