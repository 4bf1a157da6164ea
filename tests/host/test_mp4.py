"""The video file itself: its format and colours, and what is told where it cannot be written."""

import errno
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types

from comfyui_helios.host.stream import mp4
from comfyui_helios.host.stream.mp4 import VideoFile, check_target


@pytest.mark.parametrize(
    ("bit_depth", "pixel_format", "colours", "error"),
    [("8", "yuv420p", 256, 3 / 255), ("10", "yuv420p10le", 1024, 0.6 / 255)],
)
def test_the_file_says_what_it_is(tmp_path, bit_depth, pixel_format, colours, error):
    ramp = torch.linspace(0, 1, 1024).view(1, 1, -1, 1).expand(5, 64, -1, 3)
    file = VideoFile(tmp_path, 23.976, 0, bit_depth)
    file.write(ramp[:3])
    file.write(ramp[3:])
    with av.open(str(file.finish())) as container:
        video = container.streams.video[0]
        assert (video.codec.name, video.pix_fmt, video.frames) == ("h264", pixel_format, 5)
        assert (video.width, video.height, video.average_rate) == (1024, 64, Fraction(23976, 1000))
        pictures = list(container.decode(video))
        seen = pictures[0].to_ndarray(format="gbrpf32le")
    assert colours / 2 < len(np.unique(pictures[0].to_ndarray()[:64])) <= colours
    assert [picture.pts * picture.time_base for picture in pictures] == [Fraction(i * 1000, 23976) for i in range(5)]
    assert np.abs(seen - ramp[0].numpy()).max() < error


def colour_tags(path):
    """Matrix, primaries, transfer and range, in numbers of ITU-T H.273."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        return tuple(map(int, tags))


def test_the_file_says_the_colours_of_the_hosts_own_videos(tmp_path):
    images = torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    theirs = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(24)))
    theirs.save_to(str(tmp_path / "theirs.mp4"))
    file = VideoFile(tmp_path, 24, 18, "8")
    file.write(images)
    said = colour_tags(tmp_path / "theirs.mp4")
    silent = said == (2, 2, 2, 0)  # older hosts do not say that theirs have BT.601's matrix; test_stream.py shows it
    assert colour_tags(file.finish()) == ((6, 1, 1, 1) if silent else said)


def test_colours_come_back(tmp_path):
    """Of large areas, which h264 hardly touches: that matrix, range and tags belong together."""
    colours = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [1, 1, 1], [0, 0, 0], [0.9, 0.7, 0.2]])
    picture = colours.repeat_interleave(32, 0).view(1, 1, -1, 3).expand(4, 64, -1, 3)
    file = VideoFile(tmp_path, 24, 10, "8")
    file.write(picture)
    components = InputImpl.VideoFromFile(str(file.finish())).get_components()
    middles = components.images[0, 32, 16::32]
    assert (middles - colours).abs().max() < 3 / 255


def test_a_folder_without_write_permission_is_told(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "refused")  # root is never refused

    monkeypatch.setattr(mp4.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot be written to .* \(Permission denied\)\. Make that a folder"):
        check_target(tmp_path, 64, 64)


def test_a_size_that_h264_has_not_is_told_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="16392x64 is too large for a video in h264: at most 16384 pixels a side"):
        check_target(tmp_path, 16392, 64)


def test_a_folder_that_goes_while_the_video_is_written_is_told_at_the_next_chunk(tmp_path):
    folder = tmp_path / "temp"
    file = VideoFile(folder, 24, 18, "8")
    file.write(torch.rand(5, 64, 64, 3))
    shutil.rmtree(folder)
    with pytest.raises(OSError, match=r"cannot be written to .*temp \(No such file or directory\)\..*leave it alone"):
        file.write(torch.rand(5, 64, 64, 3))
    file.discard()


def test_what_the_encoder_does_not_take_is_told_with_its_numbers(tmp_path):
    file = VideoFile(tmp_path, 24, 18, "8")
    with pytest.raises(ValueError, match="encoder does not take this video .*63x65 at 24 frames a second in 8 bit"):
        file.write(torch.rand(5, 65, 63, 3))
    file.discard()
    assert not list(tmp_path.iterdir())
