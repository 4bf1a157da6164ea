"""A video file that is watched while it grows: what can be read at any moment, and what is left at the end."""

import errno
import gc
from fractions import Fraction
from io import BytesIO

import av
import pytest
import torch

from comfyui_helios.host.compat import VIDEO_MATRIX
from comfyui_helios.host.stream.live_file import LiveFile

CHUNK = 33


def chunks(number, height=64, width=96):
    """Chunks of pictures (33, height, width, 3) that move, with some noise."""
    torch.manual_seed(0)
    x = torch.linspace(0, 1, width).view(1, 1, -1, 1)
    time = torch.arange(number * CHUNK).view(-1, 1, 1, 1) / 20
    frames = 0.5 + 0.4 * torch.sin(6 * x + time) + 0.02 * torch.randn(number * CHUNK, height, width, 3)
    return frames.clamp(0, 1).split(CHUNK)


def decoded(data):
    with av.open(BytesIO(data), format="mp4") as container:
        return [(frame.pts * frame.time_base, frame.to_ndarray()) for frame in container.decode(video=0)]


def test_what_is_written_can_be_watched_but_for_the_newest_frame(tmp_path):
    file = LiveFile(tmp_path, 24, 18, "8")
    for number, frames in enumerate(chunks(3), 1):
        file.write(frames)
        data = file.part.read_bytes()
        assert len(data) == file.size
        assert len(decoded(data)) == number * CHUNK - 1  # the muxer waits for how long the newest is shown
    file.discard()


def test_each_chunk_begins_with_a_key_frame_where_the_index_says(tmp_path):
    file = LiveFile(tmp_path, 24, 18, "8")
    for frames in chunks(3):
        file.write(frames)
    data = file.part.read_bytes()
    assert len(file.keys) == 3
    for number, offset in enumerate(file.keys):
        seen = decoded(data[: file.keys[0]] + data[offset:])
        assert seen[0][0] == Fraction(number * CHUNK, 24)
        assert len(seen) == (3 - number) * CHUNK - 1
    file.discard()


@pytest.mark.parametrize("bit_depth", ["8", "10"])
def test_the_finished_file_is_a_plain_one_of_the_same_pictures(tmp_path, bit_depth):
    file = LiveFile(tmp_path, 23.976, 18, bit_depth)
    for frames in chunks(2):
        file.write(frames)
    watched = decoded(file.part.read_bytes())
    target = file.finish()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    data = target.read_bytes()
    assert b"moof" not in data
    with av.open(str(target)) as container:
        video = container.streams.video[0]
        assert (video.frames, video.average_rate) == (2 * CHUNK, Fraction(23976, 1000))
        assert (int(video.codec_context.colorspace), int(video.codec_context.color_range)) == (VIDEO_MATRIX, 1)
    shown = decoded(data)
    assert len(shown) == 2 * CHUNK
    for (moment, picture), (expected_moment, expected) in zip(shown, watched, strict=False):
        assert moment == expected_moment
        assert (picture == expected).all()


def test_who_reads_while_it_ends_has_all_of_it(tmp_path):
    file = LiveFile(tmp_path, 24, 18, "8")
    [frames] = chunks(1)
    file.write(frames)
    with file.part.open("rb") as reader:
        begin = reader.read()
        file.finish()
        assert file.closed
        assert len(decoded(begin + reader.read())) == CHUNK


@pytest.mark.parametrize("end", [LiveFile.finish, LiveFile.discard])
def test_a_file_that_has_ended_holds_no_encoder(tmp_path, end):
    """The host's server remembers the newest of them, and an encoder takes dozens of megabytes."""

    def encoders():
        gc.collect()
        return sum(isinstance(x, av.VideoStream) for x in gc.get_objects())

    before = encoders()
    file = LiveFile(tmp_path, 24, 18, "8")
    file.write(chunks(1)[0])
    assert encoders() == before + 1
    end(file)
    assert encoders() == before


class FullDisk(BytesIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path):
    file = LiveFile(tmp_path, 24, 18, "8")
    first, second = chunks(2)
    file.write(first)
    file._sink.file.close()
    file._sink.file = FullDisk()
    with pytest.raises(OSError, match=r"no room for the video in .*Free some space"):
        file.write(second)
    file.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_rate_is_that_of_the_chunks_after_the_first(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("comfyui_helios.host.stream.live_file.time.monotonic", lambda: next(clock))
    file = LiveFile(tmp_path, 24, 18, "8")
    rates = []
    for frames in chunks(3):
        file.write(frames)
        rates.append(file.rate_of_frames)
    assert rates == [None, 16.5, 16.5]
    file.discard()
