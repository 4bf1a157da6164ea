"""A batch's chunks, decoded and written to one video file an item."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage
from types import TracebackType
from typing import Any

import folder_paths
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES
from ..sockets.decoding import decode_chunk
from .live_file import LiveFile
from .mp4 import VideoFile, folder_errors

SPARE_ROOM = 2**28  # bytes on the disk, beside a video's own


def video_folder() -> Path:
    """Where videos lie until the user saves them: ComfyUI's temporary folder."""
    return Path(folder_paths.get_temp_directory())


class VideoWriter:
    """Decodes the chunks of a batch and writes one video file an item; files that are not finished do not stay."""

    def __init__(
        self, vae: Any, batch: int, shown: tuple[int, int], fps: float, crf: int, bit_depth: str, live: bool = False
    ):
        """shown: the first frame of the video to write, and the one before which to stop.

        live: item 1 can be watched while it is made.
        """
        self.vae, self.shown = vae, shown
        target = (video_folder(), fps, crf, bit_depth)
        self.live = LiveFile(*target) if live else None
        self.files = [self.live if self.live and item == 0 else VideoFile(*target) for item in range(batch)]
        self.kept: list[Path] = []  # of a run that was cut short
        self._stopped = False

    def write(self, position: int, samples: Tensor, vae: Any = None) -> None:
        """Decode a chunk (B, 16, 9, H, W) in VAE space, number `position` of this video, and append its frames."""
        for item, frames in self.decode(position, samples, vae):
            self.encode(item, frames)

    def decode(self, position: int, samples: Tensor, vae: Any = None) -> Iterator[tuple[int, Tensor]]:
        """Each item's number and its frames to write, one item at a time; none of a chunk that is left out.

        On the CPU, also where the host leaves images on the device: that may be for one thread at a time.
        """
        start = position * CHUNK_FRAMES
        first, end = (min(max(frame - start, 0), CHUNK_FRAMES) for frame in self.shown)
        for item in range(len(self.files)):
            if first < end and not self._stopped:
                yield item, decode_chunk(vae or self.vae, samples[item : item + 1])[first:end].cpu()

    def encode(self, item: int, frames: Tensor) -> None:
        if not self._stopped:
            self.files[item].write(frames)

    def stop(self) -> None:
        """Write no further frame: the run has failed, and a thread may still be at work for it."""
        self._stopped = True

    def finish(self) -> list[Path]:
        return [file.finish() for file in self.files]

    def keep(self) -> None:
        """Finish what is there of a video that can be watched, with nothing more to come."""
        if self.live and all(file.frames for file in self.files):
            self.kept = self.finish()

    def is_short_of_room(self) -> bool:
        """Whether the disk could hardly take what is watched once more, as it has to at its end. Raises OSError."""
        if self.live is None:
            return False
        with folder_errors(video_folder()):
            return self.live.size + SPARE_ROOM > disk_usage(video_folder()).free

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.kept:
            for file in self.files:
                file.discard()
