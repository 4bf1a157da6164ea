"""An h264 file that grows with the frames it is given and has its name only once it is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from comfy_api.latest import InputImpl
from torch import Tensor

from ...helios_core.regular_file import put_in_place
from ..compat import VIDEO_MATRIX, VIDEO_TRANSFER
from ..printable import printable_log
from .plain_files import DAY, NO_ROOM, disk_errors, in_background

log = printable_log(__name__)

PIXEL_FORMATS = {"8": "yuv420p", "10": "yuv420p10le"}
BIT_DEPTHS = tuple(PIXEL_FORMATS)
PRIMARIES_BT709 = MATRIX_BT709 = 1  # of ITU-T H.273, which the file speaks; FFmpeg's scaler has numbers of its own
SCALER_MATRIX = Colorspace.ITU709 if VIDEO_MATRIX == MATRIX_BT709 else Colorspace.ITU601
LONGEST_SIDE = 16384  # pixels that the encoder takes
OUR_FILE = re.compile(r"helios_[0-9a-f]{32}\.(mp4|json)(\.part)?")
PACKET_CHECK = "The video was written, but its file holds {found} frames instead of {expected}."


def check_target(folder: Path, width: int, height: int) -> None:
    """Before any work, raise ValueError for a size that h264 has not, OSError for a folder that takes no files."""
    if max(width, height) > LONGEST_SIDE:
        raise ValueError(
            f"{width}x{height} is too large for a video in h264: at most {LONGEST_SIDE} pixels a side. Make it smaller."
        )
    with folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn the system's words for a folder that cannot be written to into a sentence; a full disk is told apart."""
    try:
        with disk_errors("the video", folder):
            yield
    except OSError as error:
        if error.errno in NO_ROOM or error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"The video cannot be written to {folder} ({os.strerror(error.errno)}). Make that a folder that ComfyUI "
            "may write to (--temp-directory names another), leave it alone while the graph runs, and run it again.",
        ) from error


class VideoFile:
    """Frames to `folder`/helios_<random>.mp4; until `finish` a file that ends in .part."""

    encoder_options: Mapping[str, str] = {}  # beside crf

    def __init__(self, folder: Path, fps: float, crf: int, bit_depth: str):
        self.target = new_path(folder)
        self.part = self.target.with_suffix(".mp4.part")
        self.rate = Fraction(round(fps * 1000), 1000)  # as the host's Create Video rounds it
        self.crf, self.bit_depth = crf, bit_depth
        self.frames = 0
        self.container: av.container.OutputContainer | None = None
        self.stream: Any = None  # and with it the encoder, whose memory goes when this does

    def write(self, frames: Tensor) -> None:
        """Append frames (F, H, W, 3) in 0..1. Raises OSError when the disk is full or the folder gone."""
        with self._errors():
            if self.container is None:
                self._open(frames.shape[2], frames.shape[1])
            elif not self.part.parent.is_dir():  # writing would go on, into a file that nobody sees
                raise FileNotFoundError(errno.ENOENT, "")
            for frame in frames:
                self._encode(self._picture(frame))

    def finish(self) -> Path:
        """Write what the encoder still holds and give the file its name."""
        with self._errors():
            assert self.container is not None
            self._encode(None)
            container, self.container = self.container, None
            container.close()
            whole = self._whole()
            with av.open(str(whole), format="mp4") as written:
                found = written.streams.video[0].frames
            if found != self.frames:
                raise OSError(PACKET_CHECK.format(found=found, expected=self.frames))
            put_in_place(whole, self.target)
        self.stream = None
        return self.target

    def discard(self) -> None:
        """Take the file away, finished or not."""
        container, self.container = self.container, None
        try:
            if container is not None:
                container.close()
        except (OSError, av.FFmpegError) as error:  # the disk may be full; the file goes anyway
            log.debug("Closing %s, which is taken away: %s", self.part, error)
        finally:
            self.stream = None
            for file in (self.part, self.target):
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with folder_errors(self.part.parent):
            try:
                yield
            except av.FFmpegError as error:
                if isinstance(error, OSError):
                    raise
                raise ValueError(
                    f"The h264 encoder does not take this video ({error.strerror}): "
                    f"{self.stream.width}x{self.stream.height} at {float(self.rate):g} frames a second in "
                    f"{self.bit_depth} bit. Choose another size, fps or bit_depth."
                ) from error

    def _open(self, width: int, height: int) -> None:
        self.part.parent.mkdir(parents=True, exist_ok=True)
        self.container = self._muxer()
        options = {"crf": str(self.crf), **self.encoder_options}
        self.stream = self.container.add_stream("libx264", rate=self.rate, options=options)
        self.stream.width, self.stream.height = width, height
        self.stream.pix_fmt = PIXEL_FORMATS[self.bit_depth]
        context = self.stream.codec_context
        context.colorspace, context.color_range = VIDEO_MATRIX, ColorRange.MPEG
        context.color_primaries, context.color_trc = PRIMARIES_BT709, VIDEO_TRANSFER

    def _muxer(self) -> av.container.OutputContainer:
        return av.open(str(self.part), "w", format="mp4")

    def _whole(self) -> Path:
        """The file that is to have the name, once everything is in the container."""
        return self.part

    def _picture(self, frame: Tensor) -> av.VideoFrame:
        """As the host's Save Video makes it from an image, on any host: 8 bit from bytes, 10 bit from 16."""
        if self.bit_depth == "10":
            values = (frame.float() * 65535).clamp(0, 65535).cpu().numpy().astype(np.uint16)
            picture = av.VideoFrame.from_ndarray(values, format="rgb48le")
        else:
            values = (frame * 255).clamp(0, 255).to("cpu", torch.uint8).numpy()
            picture = av.VideoFrame.from_ndarray(values, format="rgb24")
        picture = picture.reformat(format=PIXEL_FORMATS[self.bit_depth], dst_colorspace=SCALER_MATRIX)
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        self.frames += 1
        return picture

    def _encode(self, picture: av.VideoFrame | None) -> None:
        assert self.container is not None
        self.container.mux(self.stream.encode(picture))


_in_use: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()


def finished_video(file: Path) -> Any:
    """The VIDEO of a finished file, which stays for as long as the host or a node holds on to it.

    The temp folder is emptied when the host starts and ends; one that runs for weeks is rid of old files here.
    """
    video = _in_use[file] = InputImpl.VideoFromFile(str(file))
    in_background(remove_old_videos, file.parent)
    return video


def new_path(folder: Path) -> Path:
    """Of a video that nobody has, by a name that OUR_FILE knows."""
    return folder / f"helios_{uuid.uuid4().hex}.mp4"


def prompts_beside(video: Path) -> Path:
    """Where the prompts of a video are that was steered."""
    return video.with_suffix(".json")


def remove_old_videos(folder: Path) -> None:
    """Delete our files of which no VIDEO is left, a day after they were written: a page may still show one."""
    for file in folder.glob("helios_*"):
        if OUR_FILE.fullmatch(file.name) and file.with_suffix(".mp4") not in _in_use and not file.is_symlink():
            with contextlib.suppress(OSError):  # somebody was faster, or, on Windows, still reads it
                if time.time() - file.stat().st_mtime > DAY:
                    file.unlink()
