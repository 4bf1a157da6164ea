"""A video file that can be watched while it grows."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import av
from av.video.frame import PictureType
from torch import Tensor

from .mp4 import VideoFile, new_path

# Each frame is a fragment, so that what is written can be shown; the index comes first, and is empty.
FRAGMENTED = {"movflags": "+frag_every_frame+empty_moov+default_base_moof"}


class Sink:
    """Where the muxer writes: straight into the file, since FFmpeg holds back what it writes to a path itself."""

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=0)
        self.size = 0

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:  # a nearly full disk takes a part
            rest = rest[self.file.write(rest) :]
        self.size += len(data)
        return len(data)


class LiveFile(VideoFile):
    """A VideoFile whose .part is itself a video, the only buffer for all who watch: each reads on from where it is.

    Others read `size`, `keys`, `rate_of_frames` and `closed` from their own threads. `finish` copies the packets into a
    plain file: players and the host find no number of frames in a fragmented one.
    """

    # Without zerolatency the encoder holds back dozens of frames; a key frame is where a player can begin.
    encoder_options = {"tune": "zerolatency", "bf": "0", "forced-idr": "1", "sc_threshold": "0"}

    def __init__(self, folder: Path, fps: float, crf: int, bit_depth: str):
        super().__init__(folder, fps, crf, bit_depth)
        self.copy = new_path(folder).with_suffix(".mp4.part")
        self.keys: list[int] = []  # offsets of the fragments that begin with a key frame
        self.written: list[tuple[float, int]] = []  # when a chunk was written, and the frames until then
        self.closed = False
        self._sink: Sink | None = None
        self._chunk_begins = False

    @property
    def size(self) -> int:
        """Bytes that can be read."""
        return self._sink.size if self._sink else 0

    @property
    def rate_of_frames(self) -> float | None:
        """Frames a second since the first chunk was written, once there are more."""
        if len(self.written) < 2:
            return None
        (begin, before), (end, after) = self.written[0], self.written[-1]
        return (after - before) / max(end - begin, 1e-6)

    def write(self, frames: Tensor) -> None:
        self._chunk_begins = True
        super().write(frames)
        self.written.append((time.monotonic(), self.frames))

    def finish(self) -> Path:
        target = super().finish()
        with contextlib.suppress(OSError):  # Windows keeps a file that somebody reads; it goes with the old videos
            self.part.unlink()
        return target

    def discard(self) -> None:
        super().discard()
        self._close()
        for file in (self.part, self.copy):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def _muxer(self) -> av.container.OutputContainer:
        self._sink = Sink(self.part)
        return av.open(self._sink, "w", format="mp4", options=FRAGMENTED)

    def _whole(self) -> Path:
        self._close()
        with av.open(str(self.part), format="mp4") as grown, av.open(str(self.copy), "w", format="mp4") as plain:
            video = grown.streams.video[0]
            stream = plain.add_stream_from_template(video)
            for packet in grown.demux(video):
                if packet.size:  # the last one only says that there are no more
                    packet.stream = stream
                    plain.mux(packet)
        return self.copy

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.file.close()
        self.closed = True

    def _picture(self, frame: Tensor) -> av.VideoFrame:
        picture = super()._picture(frame)
        if self._chunk_begins:
            picture.pict_type = PictureType.I
        self._chunk_begins = False
        return picture

    def _encode(self, picture: av.VideoFrame | None) -> None:
        assert self.container is not None
        for packet in self.stream.encode(picture):
            self.container.mux(packet)
            if packet.is_keyframe:  # the muxer has written what came before, and holds this one until the next
                self.keys.append(self.size)
