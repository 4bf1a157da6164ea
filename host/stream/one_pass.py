"""Sampler, decoder and video encoder in one pass, chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
from torch import Tensor

from ...helios_core.generate import Chunk
from ..progress import check_interrupt
from ..sampling.guider import HeliosGuider
from ..sockets.latent import to_vae_space
from .background import Background
from .fit_together import already_loaded, fits_now, may_fit
from .saved_chunks import SavedChunk, SavedRun
from .video_writer import VideoWriter


class OnePass:
    """Samples what is not done and writes everything; what changes on the way are two fields, `background` and `tail`.

    With `overlap` a chunk is encoded, and where both models fit also decoded, while the next one is denoised; otherwise
    all take turns on the node's own thread.
    """

    def __init__(self, guider: HeliosGuider, writer: VideoWriter, overlap: bool, saved: SavedRun | None):
        self.guider, self.writer, self.overlap, self.saved = guider, writer, overlap, saved
        self.decode_beside = overlap and may_fit(guider, writer.vae)
        self.background = Background()
        self.tail: Tensor | None = None  # the newest chunk (B, 16, 9, H, W), in VAE space

    def run(self) -> tuple[list[Path], Tensor]:
        """The files of the batch, and the last chunk (B, 16, 9, H, W) in VAE space.

        Whatever ends it early, an interrupt too, drops the chunk and the files under way; saved chunks stay.
        """
        with self.writer, self.background:
            try:
                self.write_saved()
                if self.guider.done < self.guider.run.chunks:
                    beside = [self.writer.vae.patcher] if self.decode_beside else []
                    # A video that cannot be written is not sampled to its end.
                    self.guider.denoise(self.take, beside, on_step=self.background.check)
                    self.background.wait()
            except BaseException:
                self.writer.stop()
                raise
            assert self.tail is not None
            return self.writer.finish(), self.tail

    def write_saved(self) -> None:
        """Write the chunks that an earlier run has made."""
        if self.saved is None or not self.guider.done:
            return
        run = self.guider.run
        bar = comfy.utils.ProgressBar(run.steps(run.chunks))
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
            self.saved.save(position, SavedChunk(chunk.latents, chunk.memory, guider.run.rng.get_state()))
        self.tail = to_vae_space(chunk.latents)
        self.background.wait()
        check_interrupt()
        more = position + 1 < guider.run.chunks
        if self.decode_beside and fits_now(guider, writer.vae):
            self.background.start(writer.write, position, self.tail, already_loaded(writer.vae))
            if not more:  # the host cleans up what it has loaded as soon as sampling ends
                self.background.wait()
            return
        for item, frames in writer.decode(position, self.tail):
            if self.overlap:
                self.background.start(writer.encode, item, frames)
            else:
                writer.encode(item, frames)
        if more:
            guider.load_again()  # decoding may have taken its place
