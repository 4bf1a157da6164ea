"""Sampler, decoder and video encoder in one pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import comfy.utils
import folder_paths
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES
from ...helios_core.generate import Chunk
from .background import Background
from .decode import decode_chunk
from .graph_key import graph_key
from .guider import HeliosGuider
from .latent import to_vae_space
from .progress import Notes, check_interrupt
from .resume import Kind, SavedChunk, SavedRun, open_run
from .room import already_loaded, fits_now, may_fit
from .run_folder import count_others
from .run_note import about, first_prompt
from .video_file import VideoFile


class VideoWriter:
    """Decodes the chunks of a batch and writes one video file an item; files that are not finished do not stay."""

    def __init__(self, vae: Any, batch: int, shown: tuple[int, int], fps: float, crf: int, bit_depth: str):
        """shown: the first frame of the video to write, and the one before which to stop."""
        folder = Path(folder_paths.get_temp_directory())
        self.vae, self.shown = vae, shown
        self.files = [VideoFile(folder, fps, crf, bit_depth) for _ in range(batch)]
        self.stopped = False

    def write(self, position: int, samples: Tensor, vae: Any = None) -> None:
        """Decode a chunk (B, 16, 9, H, W) in VAE space, number `position` of this video, and append its frames."""
        for item, frames in self.decode(position, samples, vae):
            self.encode(item, frames)

    def decode(self, position: int, samples: Tensor, vae: Any = None) -> Iterator[tuple[int, Tensor]]:
        """Each item's number and its frames to write, one item at a time; none of a chunk that is left out."""
        start = position * CHUNK_FRAMES
        first, end = (min(max(frame - start, 0), CHUNK_FRAMES) for frame in self.shown)
        for item in range(len(self.files)):
            if first < end and not self.stopped:
                yield item, decode_chunk(vae or self.vae, samples[item : item + 1])[first:end]

    def encode(self, item: int, frames: Tensor) -> None:
        if not self.stopped:
            self.files[item].write(frames)

    def finish(self) -> list[Path]:
        return [file.finish() for file in self.files]

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for file in self.files:
                file.discard()


def stream(
    guider: HeliosGuider, writer: VideoWriter, overlap: bool, saved: SavedRun | None
) -> tuple[list[Path], Tensor]:
    """Sample what is not done, and write everything.

    Returns the files and the last chunk (B, 16, 9, H, W) in VAE space. With `overlap` a chunk is encoded, and where
    both models fit also decoded, while the next one is denoised; otherwise all take turns on the node's own thread.
    """
    decode_beside = overlap and may_fit(guider, writer.vae)
    tail: list[Tensor] = []

    def on_chunk(chunk: Chunk) -> None:
        position = chunk.index - guider.first_index
        if saved is not None:
            saved.save(position, SavedChunk(chunk.latents, chunk.memory, guider.rng.get_state()))
        tail[:] = [to_vae_space(chunk.latents)]
        background.wait()
        check_interrupt()
        more = position + 1 < guider.chunks
        if decode_beside and fits_now(guider, writer.vae):
            background.start(writer.write, position, tail[0], already_loaded(writer.vae))
            if not more:  # the host cleans up what it has loaded as soon as sampling ends
                background.wait()
            return
        for item, frames in writer.decode(position, tail[0]):
            if overlap:
                background.start(writer.encode, item, frames)
            else:
                writer.encode(item, frames)
        if more:
            guider.load_again()  # decoding may have taken its place

    with writer, Background() as background:
        if guider.done and saved is not None:
            tail[:] = [write_saved(guider, writer, saved)]
        try:
            if guider.done < guider.chunks:
                beside = [writer.vae.patcher] if decode_beside else []
                guider.run(on_chunk, beside, on_step=background.check)  # a video that cannot be written is not sampled
                background.wait()
        except BaseException:
            writer.stopped = True
            raise
        return writer.finish(), tail[0]


def write_saved(guider: HeliosGuider, writer: VideoWriter, saved: SavedRun) -> Tensor:
    """Write the chunks an earlier run has made; returns the last one in VAE space."""
    bar = comfy.utils.ProgressBar(guider.steps(guider.chunks))
    for position in range(guider.done):
        check_interrupt()
        samples = to_vae_space(saved.load(position).latents)
        writer.write(position, samples)
        bar.update_absolute(guider.steps(position + 1))
    return samples


@contextmanager
def pick_up(guider: HeliosGuider, prompt: dict[str, Any], node_id: str, notes: Notes) -> Iterator[SavedRun | None]:
    """Let the guider go on after the chunks that are saved for this node's graph; where the next ones are to be saved.

    None where the graph cannot be known again. Raises ValueError where another process is making the same video.
    """
    if node_id not in (prompt or {}):
        notes.warn("resume does not work on a node that another node has made: nothing is saved, nothing resumed.")
        yield None
        return
    kind = Kind.after(guider.memory, watched=guider.schedule.anti_drift is not None)
    note = about(guider.chunk_shape, guider.chunks, guider.rng.initial_seed(), first_prompt(prompt, node_id))
    with open_run(graph_key(prompt, node_id), kind, note) as saved:
        done, problem = saved.count(guider.chunks)
        if problem:
            notes.warn(f"{problem} It is not used, and made again.")
        if done:
            last = saved.load(done - 1)
            guider.resume(done, last.memory, last.rng_state)
        if done == guider.chunks:
            notes.inform(f"All chunks ({done}) were saved: nothing is sampled, the video is encoded again.")
        elif done:
            notes.inform(f"Resumed after chunk {done} of {guider.chunks}.")
        elif others := count_others(saved.folder):
            notes.inform(
                f"Starts anew: no chunk is saved for this graph ({others} other run{'s are' if others > 1 else ' is'} "
                "kept). To resume, everything upstream must be as it was: prompts, frames, seed, files."
            )
        yield saved
