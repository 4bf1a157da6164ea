"""The folder of a resumable run: what others do to it harms nobody's files, ends nobody's run, and is told in words."""

import os
import re
import subprocess
import sys
import threading
import time

import folder_paths
import pytest

from comfyui_helios.host.stream import mp4 as video_file
from comfyui_helios.host.stream import run_folder, run_note
from comfyui_helios.host.stream.plain_files import DAY
from comfyui_helios.host.stream.run_folder import InUse, claimed
from comfyui_helios.host.stream.saved_chunks import open_run
from support.saved_runs import KEY, KIND, SHAPE, count, save_run
from support.streams import GRAPH, beginning, cleaned_up, make_parts, stream_video

posix = pytest.mark.skipif(os.name != "posix", reason="links and pipes for everybody are POSIX's")
HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+b")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.truncate(0)
lock.write(b"process 4242 on attic")
lock.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path / run_folder.FOLDER


@pytest.fixture
def folder(output):
    return output / KEY


# Whose the folder is


def test_a_second_run_in_the_same_folder_is_refused(folder):
    with open_run(KEY, KIND, "note"):
        with pytest.raises(InUse, match=rf"\('process {os.getpid()} on .*'\) is making the same video .* {folder}"):
            count()
        with open_run("b" * 64, KIND, "note"):
            pass
    save_run()
    assert count() == (2, None)


@posix
def test_a_folder_is_free_as_soon_as_its_process_dies(folder):
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, folder / "lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InUse, match="'process 4242 on attic'.*Wait until it has finished, or switch resume off"):
            save_run()
        holder.kill()
    save_run()
    assert count() == (2, None)


def test_a_run_that_makes_no_chunk_leaves_no_folder(output, folder):
    with open_run(KEY, KIND, "note"):
        assert folder.is_dir()
    assert list(output.iterdir()) == []


def test_a_lock_that_was_deleted_before_it_was_taken_is_none(folder, monkeypatch):
    """As when another process removes the folder in that moment."""
    open_lock, left = run_folder._open_lock, []

    def opened(path):
        lock = open_lock(path)
        if not left:
            left.append((path / "lock").unlink())
        return lock

    monkeypatch.setattr(run_folder, "_open_lock", opened)
    with claimed(folder):
        assert (folder / "lock").exists()
        with pytest.raises(InUse), claimed(folder):
            pass


# What others have put there


@posix
@pytest.mark.parametrize("name", ["chunk_00000.safetensors.part", "chunk_00000.safetensors", "about.txt"])
def test_a_link_in_the_folder_harms_no_file_elsewhere(folder, tmp_path, name):
    folder.mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (folder / name).symlink_to(mine)
    save_run()
    assert mine.read_text() == "mine"
    assert count() == (2, None)


@posix
def test_a_linked_chunk_is_not_read(folder, tmp_path):
    save_run()
    chunk = folder / "chunk_00001.safetensors"
    chunk.rename(tmp_path / "moved")
    chunk.symlink_to(tmp_path / "moved")
    done, problem = count()
    assert done == 1
    assert problem == f"{chunk} cannot be read: it is a link."


@posix
def test_a_linked_folder_is_refused_and_nothing_is_written_where_it_leads(folder, tmp_path):
    folder.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=rf"cannot be saved in the folder {folder}: it is a link.*switch resume off"):
        save_run()
    assert list(elsewhere.iterdir()) == []


@posix
@pytest.mark.timeout(60)  # reading a pipe waits for ever
def test_a_pipe_for_a_chunk_is_not_read_and_makes_room(folder):
    save_run(chunks=1)
    os.mkfifo(folder / "chunk_00001.safetensors")
    done, problem = count()
    assert done == 1
    assert "it is no ordinary file" in problem
    save_run()
    assert count() == (2, None)


@posix
@pytest.mark.timeout(60)
def test_a_pipe_for_a_lock_is_refused(folder):
    folder.mkdir(parents=True)
    os.mkfifo(folder / "lock")
    with pytest.raises(ValueError, match="it is no ordinary file"):
        save_run()


@pytest.mark.parametrize("name", ["chunk_00003.safetensors", "about.txt"])
def test_a_folder_for_a_file_is_refused_before_anything_is_made(folder, name):
    (folder / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{name} is a folder, where a file is to be saved. Move it away"):
        count()


def test_a_file_for_the_folder_is_refused(output):
    output.write_text("mine")
    with pytest.raises(ValueError, match="Make it a folder that ComfyUI can write to, or switch resume off"):
        count()


def test_what_a_crash_has_left_goes(folder):
    save_run()
    (folder / f"{'0' * 32}.part").write_bytes(b"half")
    assert count() == (2, None)
    assert {file.name for file in folder.iterdir()} == {
        "lock",
        "about.txt",
        "chunk_00000.safetensors",
        "chunk_00001.safetensors",
    }


# When it goes


def make_old(output, number):
    """Runs of the last weeks, one chunk each, the first the oldest."""
    folders = []
    for i in range(number):
        save_run(f"{i:064x}", chunks=1)
        folders.append(output / f"{i:064x}")
    for i, folder in enumerate(folders):
        when = time.time() - (number - i + 1) * DAY
        os.utime(folder, (when, when))
    return folders


def test_old_runs_go_and_one_at_work_stays(output):
    folders = make_old(output, 5)
    with claimed(folders[1]):
        when = time.time() - 30 * DAY
        os.utime(folders[1], (when, when))
        save_run()
    assert {path.name for path in output.iterdir()} == {folders[i].name for i in (1, 3, 4)} | {KEY}


def test_no_more_than_a_few_go_at_once(output, monkeypatch):
    make_old(output, 6)
    monkeypatch.setattr(run_folder, "REMOVED_AT_ONCE", 2)
    save_run()
    assert sorted(path.name for path in output.iterdir()) == [f"{i:064x}" for i in (2, 3, 4, 5)] + [KEY]


def test_other_runs_are_looked_at_once_a_run_and_never_while_it_waits(output, monkeypatch):
    looked, our_folders = [], run_folder._our_folders

    def look(root):
        looked.append(threading.current_thread().name)
        return our_folders(root)

    monkeypatch.setattr(run_folder, "_our_folders", look)
    save_run(chunks=5)
    assert looked == ["helios-clean-up"]


def test_a_folder_with_a_strangers_file_or_link_stays(output, tmp_path):
    old = make_old(output, 5)
    (old[0] / "holiday.jpg").touch()
    if os.name == "posix":
        (old[1] / "chunk_00001.safetensors").symlink_to(tmp_path / "mine")
    for folder in old[:2]:
        os.utime(folder, (1, 1))
    save_run()
    assert old[0].is_dir()
    assert old[1].is_dir()
    assert not old[2].exists()


def test_videos_in_temp_go_a_day_after_nothing_needs_them(tmp_path):
    names = [f"helios_{i:032x}.mp4" for i in range(3)]
    names += [f"helios_{3:032x}.{kind}.part" for kind in ("mp4", "json")] + ["helios_mine.mp4", "other.mp4"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / names[0])
    video = video_file.finished_video(tmp_path / names[1])
    cleaned_up()
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[1], "helios_mine.mp4", "other.mp4"}
    del video
    video_file.remove_old_videos(tmp_path)
    assert not (tmp_path / names[1]).exists()


# What it says of itself


def test_the_note_says_what_the_folder_is(output, tmp_path):
    parts = make_parts(tmp_path / "Helios-Distilled")
    stream_video(parts, beginning(66), resume=True, unique_id="5", prompt=GRAPH)
    cleaned_up()
    [note] = output.rglob("about.txt")
    text = note.read_text(encoding="utf-8")
    assert re.search(
        r"ComfyUI-Helios.*\nBegun: 20\d\d-\d\d-\d\d \d\d:\d\d\nVideo: 128 x 64, 66 frames \(2 chunks\)", text
    )
    assert "seed 3\nPrompt: 'A red fox.'\nThe folder may be deleted" in text


def test_the_note_holds_no_more_than_the_start_of_a_prompt():
    text = run_note.about(SHAPE, 3, 7, "\x1b[31m fox \n" * 10**5)
    assert len(text) < 1000
    assert "Prompt: '" + r"\x1b[31m fox \n" in text


LINKED = {
    "schedule": {"class_type": "HeliosPromptSchedule", "inputs": {"clip": ["1", 1], "prompt_1": "A fox."}},
    "of another node": {"class_type": "HeliosTextEncode", "inputs": {"positive": ["9", 0]}},
    "no text": {"class_type": "HeliosTextEncode", "inputs": {"positive": 5}},
    "itself": {"class_type": "HeliosTextEncode", "inputs": {"positive": ["2", 0]}},
}


@pytest.mark.parametrize(("name", "expected"), zip(LINKED, ["A fox.", None, None, None], strict=True))
def test_the_first_prompt_is_found_or_left_out(name, expected):
    assert run_note.first_prompt({**GRAPH, "2": LINKED[name]}, "5") == expected
