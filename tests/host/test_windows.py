"""Streaming where open files can be neither removed nor replaced, as on Windows."""

import errno
import os
import time
from types import SimpleNamespace

import folder_paths
import pytest
import torch

from comfyui_helios.helios_core import regular_file
from comfyui_helios.host.stream import run_folder
from comfyui_helios.host.stream.live_file import LiveFile
from comfyui_helios.host.stream.mp4 import VideoFile, new_path, remove_old_videos
from comfyui_helios.host.stream.plain_files import DAY
from comfyui_helios.host.stream.run_folder import LOCKED_BYTE, InUse, claimed, tidy
from support.streams import beginning, graph, make_parts, packets, stream_video, temporary_files
from support.windows_files import needs_proc, windows_files

fcntl = pytest.importorskip("fcntl")
pytestmark = needs_proc


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    """Its files, and its locks: of a byte, on an open file."""

    def locking(handle, mode, length):
        assert (os.lseek(handle, 0, os.SEEK_CUR), mode, length) == (LOCKED_BYTE, "a lock", 1)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    monkeypatch.setattr(run_folder, "sys", SimpleNamespace(platform="win32"))
    msvcrt = SimpleNamespace(LK_NBLCK="a lock", locking=locking)
    monkeypatch.setattr(run_folder, "msvcrt", msvcrt, raising=False)
    with windows_files():
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


@pytest.mark.parametrize("live", [False, True])
def test_a_video_is_written_and_nothing_else_stays(parts, live):
    before = set(temporary_files())
    [video], _ = stream_video(parts, beginning(66), live=live)
    assert len(packets(video.get_stream_source())) == 66
    assert len(set(temporary_files()) - before) == 1


def test_a_new_video_that_a_virus_scanner_looks_at_is_waited_for(tmp_path, monkeypatch):
    file = VideoFile(tmp_path, 24, 18, "8")
    file.write(torch.rand(99, 64, 64, 3))
    scanner = file.part.open("rb")
    monkeypatch.setattr(regular_file, "sleep", lambda seconds: scanner.close())
    assert file.finish().is_file()


def test_somebody_who_still_watches_keeps_the_growing_file_and_nothing_else(tmp_path):
    file = LiveFile(tmp_path, 24, 18, "8")
    for frames in torch.rand(2, 33, 64, 64, 3):
        file.write(frames)
    with file.part.open("rb") as watched:
        target = file.finish()
        assert watched.read(8)[4:] == b"ftyp"
    assert sorted(tmp_path.iterdir()) == sorted([target, file.part])


def test_a_run_folder_is_for_one_is_cleaned_of_what_nobody_reads_and_goes_where_nothing_was_saved(tmp_path):
    folder = tmp_path / ("0" * 64)
    with claimed(folder):
        left = [folder / f"{number:032x}.part" for number in range(3)]
        for file in left:
            file.touch()
        with left[1].open("rb"):
            tidy(folder, "a note")
        assert [file.exists() for file in left] == [False, True, False]
        with pytest.raises(InUse, match=f"process {os.getpid()}"), claimed(folder):
            pass
    assert not folder.exists()


def test_a_run_that_was_cut_off_goes_on_over_a_damaged_chunk_that_somebody_reads(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    resume = {"resume": True, "prompt": graph(), "unique_id": "5"}
    [whole], _ = stream_video(parts, beginning(99), **resume)
    [run] = (tmp_path / "helios_resume").iterdir()
    (run / "chunk_00002.safetensors").write_bytes(b"damaged")
    reader = (run / "chunk_00002.safetensors").open("rb")
    monkeypatch.setattr(regular_file, "sleep", lambda seconds: reader.close())
    [resumed], _ = stream_video(parts, beginning(99), **resume)
    assert packets(resumed.get_stream_source()) == packets(whole.get_stream_source())


def test_an_old_video_that_is_read_does_not_keep_the_others(tmp_path):
    old = [new_path(tmp_path) for _ in range(5)]
    for file in old:
        file.touch()
        os.utime(file, (0, time.time() - 2 * DAY))
    with next(tmp_path.iterdir()).open("rb") as read:
        remove_old_videos(tmp_path)
        assert [str(file) for file in tmp_path.iterdir()] == [read.name]
