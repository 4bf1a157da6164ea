"""Nothing is lost: a run that was cut off goes on after its last finished chunk, to the very same video."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.patcher_extension
import folder_paths
import pytest
import torch
from safetensors.torch import load_file

from comfyui_helios.helios_core.drift import AntiDrift
from comfyui_helios.host.stream import run_folder
from comfyui_helios.host.stream import saved_chunks as resume
from comfyui_helios.host.stream.graph_key import graph_key
from support.runs import QUICK
from support.streams import (
    GRAPH,
    HEIGHT,
    WIDTH,
    Parts,
    beginning,
    cleaned_up,
    graph,
    make_parts,
    planes,
    stream_video,
    temporary_files,
)

DRIFTING = replace(QUICK, anti_drift=AntiDrift(mean_threshold=0, var_threshold=0))  # noise before every other chunk
CHUNKS = 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """An output folder of its own; the host's temp folder empty."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    for name in temporary_files():
        (Path(folder_paths.get_temp_directory()) / name).unlink()
    return tmp_path / run_folder.FOLDER


class Killed(BaseException):
    pass


class Counted:
    """A VAE whose decoding raises at the call `at`."""

    def __init__(self, vae, at, error=Killed):
        self.vae, self.at, self.error, self.calls = vae, at, error, 0

    def decode(self, samples):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.vae.decode(samples)


@pytest.fixture
def said(monkeypatch):
    """What the node has been told to show."""
    messages = []
    monkeypatch.setattr("comfyui_helios.host.messages.tell", lambda text, node: messages.append(text))
    return messages


def run(parts, prompt=GRAPH, schedule=DRIFTING, start=None, **settings):
    try:
        return stream_video(
            parts, start or beginning(33 * CHUNKS), schedule, resume=True, unique_id="5", prompt=prompt, **settings
        )
    finally:
        cleaned_up()


def opened(key, note=""):
    """The saved run of DRIFTING at the usual size."""
    kind = resume.Kind((1, 16, 9, HEIGHT // 8, WIDTH // 8), resume.HistoryLayout(), watched=True)
    return resume.open_run(key, kind, note)


def chunk_files(folder):
    return sorted(folder.rglob("*.safetensors"))


def contents(folder):
    return [load_file(file) for file in chunk_files(folder)]


def same_contents(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def cut_off(parts, after, error=Killed, **kwargs):
    """A run that ends while chunk `after` + 1 is decoded: it is saved, since it is finished."""
    with pytest.raises(error):
        run(Parts(parts.model, Counted(parts.vae, after + 1, error)), **kwargs)


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """(decoded frames, tail, chunk files) of a run that nothing has cut off."""
    folder = tmp_path_factory.mktemp("whole")
    before = folder_paths.output_directory
    folder_paths.output_directory = str(folder)
    try:
        [video], tail = run(parts)
        return planes(video.get_stream_source()), tail, contents(folder)
    finally:
        folder_paths.output_directory = before


def check_same(result, whole, output):
    [video], tail = result
    frames, expected, files = whole
    shown = planes(video.get_stream_source())
    assert len(shown) == len(frames) == 33 * CHUNKS
    assert all((a == b).all() for a, b in zip(shown, frames, strict=True))
    assert torch.equal(tail["samples"], expected["samples"])
    ours, theirs = tail["helios"], expected["helios"]
    assert (ours.next_chunk, ours.frames) == (theirs.next_chunk, theirs.frames) == (CHUNKS, 33)
    assert torch.equal(ours.rng_state, theirs.rng_state)
    assert torch.equal(ours.memory.latents, theirs.memory.latents)
    assert torch.equal(ours.memory.anchor, theirs.memory.anchor)
    assert same_contents(contents(output), files)


def test_resuming_changes_nothing_but_files(parts, whole):
    """A run that saves is a run that does not."""
    [video], tail = stream_video(parts, beginning(33 * CHUNKS), DRIFTING)
    assert torch.equal(tail["samples"], whole[1]["samples"])
    assert all((a == b).all() for a, b in zip(planes(video.get_stream_source()), whole[0], strict=True))


def test_a_chunk_that_is_not_finite_is_neither_saved_nor_encoded(parts, whole, output, said):
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(args)
        flow = executor(*args, **kwargs)
        return flow * float("nan") if len(calls) == 8 else flow  # in the third chunk of three steps each

    broken = parts.model.clone()
    broken.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    with pytest.raises(FloatingPointError, match="Chunk 3 of the video is not finite"):
        run(Parts(broken, parts.vae))
    assert len(calls) == 9
    assert len(chunk_files(output)) == 2
    assert temporary_files() == []
    check_same(run(parts), whole, output)
    assert said[-1] == f"Resumed after chunk 2 of {CHUNKS}."


@pytest.mark.parametrize("after", range(CHUNKS - 1))
def test_a_run_that_was_cut_off_goes_on_to_the_same_video(parts, whole, output, said, after):
    cut_off(parts, after)
    assert temporary_files() == []
    assert len(chunk_files(output)) == after + 1
    check_same(run(parts), whole, output)
    assert said[-1] == f"Resumed after chunk {after + 1} of {CHUNKS}."


def test_what_is_whole_is_only_encoded_again(parts, whole, output, said):
    run(parts)
    nothing = parts.model.clone()
    nothing.add_wrapper_with_key("diffusion_model", "test", lambda *args, **kwargs: pytest.fail("it was sampled"))
    check_same(run(Parts(nothing, parts.vae), graph(crf=30, fps=12)), whole, output)
    assert said[-1].startswith(f"All chunks ({CHUNKS}) were saved: nothing is sampled")


def test_cut_off_twice(parts, whole, output, said):
    cut_off(parts, 0)
    cut_off(parts, 2, comfy.model_management.InterruptProcessingException)
    assert said[-1].splitlines()[-1].startswith("Interrupted: 3 chunks are saved.")
    check_same(run(parts), whole, output)


def test_cancel_reads_no_saved_chunk_again(parts, output, monkeypatch):
    """Of an hour of video they are 18 GB at 640x384."""
    read, original = [], resume._read_file
    monkeypatch.setattr(resume, "_read_file", lambda path, kind: read.append(path) or original(path, kind))
    cut_off(parts, 2, comfy.model_management.InterruptProcessingException)
    assert read == []
    assert len(chunk_files(output)) == 3


def test_an_image_and_a_batch_go_on_too(parts, output):
    """What is drawn before the first chunk is drawn again, and not twice."""
    image = torch.rand((1, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(5))
    start = beginning(99, vae=parts.vae, start_image=image, batch_size=2, skip_first_chunk=True)
    _, expected = stream_video(parts, start)
    cut_off(parts, 3, start=start, schedule=QUICK)  # the second chunk's second item
    videos, tail = run(parts, start=start, schedule=QUICK)
    assert [video.get_frame_count() for video in videos] == [99, 99]
    assert torch.equal(tail["samples"], expected["samples"])
    assert torch.equal(tail["helios"].memory.anchor, expected["helios"].memory.anchor)


def test_a_video_that_goes_on_from_another_resumes(parts, output):
    _, first = stream_video(parts, beginning(66))
    start = beginning(99, previous=first)
    _, expected = stream_video(parts, start)
    cut_off(parts, 1, start=start, schedule=QUICK)
    _, tail = run(parts, start=start, schedule=QUICK)
    assert torch.equal(tail["samples"], expected["samples"])
    assert tail["helios"].next_chunk == 5


def test_a_damaged_chunk_is_refused_by_name_and_made_again(parts, whole, output, said):
    run(parts)
    harmed = chunk_files(output)[2]
    harmed.write_bytes(harmed.read_bytes()[:-100])
    check_same(run(parts), whole, output)
    assert str(harmed) in said[-1]
    assert "It is not used, and made again." in said[-1]
    assert "Resumed after chunk 2 of 4." in said[-1]


def test_a_chunk_that_follows_on_another_one_is_refused(parts, output):
    """As after a change of hardware in between, where the same graph gives other latents."""
    run(parts)
    key = next(output.iterdir()).name
    with opened(key) as first:
        first.count(1)
        chunk = first.load(0)
        first.save(0, replace(chunk, latents=chunk.latents + 1e-3))
        done, problem = first.count(CHUNKS)
    assert done == 1
    assert "chunk_00001" in problem
    assert "it follows on another chunk before it" in problem


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_keeps_what_is_saved(parts, whole, output, monkeypatch, at):
    calls = []
    original = os.fsync

    def fsync(file):
        calls.append(file)
        if len(calls) == 2 * at - 1:  # each chunk syncs file and folder
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=rf"no room for chunk {at} of the video in .*Free some space"):
            run(parts)
    assert temporary_files() == []
    assert [file.name for file in chunk_files(output)] == [f"chunk_{i:05}.safetensors" for i in range(at - 1)]
    assert not list(output.rglob("*.part"))
    check_same(run(parts), whole, output)


def test_another_graph_starts_anew_and_says_so(parts, output, said):
    run(parts)
    assert not any(said)  # nothing to tell of a first run
    cut_off(parts, 1, prompt=graph(seed=4), seed=4)
    assert said[-1].startswith("Starts anew: no chunk is saved for this graph (1 other run is kept).")
    assert len(list(output.iterdir())) == 2


def test_a_node_that_is_not_in_the_graph_runs_without(parts, output, said):
    [video], _ = run(parts, prompt={"1": GRAPH["1"]})
    assert video.get_frame_count() == 33 * CHUNKS
    assert "resume does not work on a node that another node has made" in said[-1]
    assert not output.exists()


def test_only_the_newest_runs_stay_and_nothing_of_others_goes(parts, output):
    output.mkdir()
    (output / "mine").mkdir()
    (output / "notes.txt").write_text("mine")
    strange = output / ("b" * 64)
    strange.mkdir()
    (strange / "holiday.jpg").write_bytes(b"mine")
    elsewhere = output.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "chunk_00000.safetensors").write_bytes(b"mine")
    (output / ("c" * 64)).symlink_to(elsewhere, target_is_directory=True)
    before = {path.name for path in output.iterdir()}
    keys = []
    for i in range(5):
        prompt = graph(seed=i)
        keys.append(graph_key(prompt, "5"))
        run(parts, prompt, start=beginning(33))
        folder = output / keys[-1]
        os.utime(folder, ns=(i, i))  # older than any of today
    (output / keys[3] / "chunk_00001.safetensors.part").write_bytes(b"left by a crash")
    run(parts, graph(seed=5), start=beginning(33))
    keys.append(graph_key(graph(seed=5), "5"))
    assert {path.name for path in output.iterdir()} - before == {keys[3], keys[4], keys[5]}
    assert {path.name for path in output.iterdir()} >= before
    assert (elsewhere / "chunk_00000.safetensors").read_bytes() == b"mine"
    run(parts, graph(seed=3), start=beginning(33))  # again the newest
    run(parts, graph(seed=6), start=beginning(33))
    keys.append(graph_key(graph(seed=6), "5"))
    assert {path.name for path in output.iterdir()} - before == {keys[3], keys[5], keys[6]}
    run(parts, graph(seed=7), start=beginning(33))
    keys.append(graph_key(graph(seed=7), "5"))  # a fourth, but all are of today: one graph may have many nodes
    assert {path.name for path in output.iterdir()} - before == {keys[3], keys[5], keys[6], keys[7]}


def test_runs_that_fail_early_push_out_nothing(parts, output):
    run(parts, graph(seed=1), start=beginning(33))
    valuable = output / graph_key(graph(seed=1), "5")
    for seed in range(2, 6):
        with pytest.raises(Killed):
            run(Parts(failing(parts.model), parts.vae), graph(seed=seed), start=beginning(33))
    assert [path for path in output.iterdir() if path.is_dir()] == [valuable]


def failing(model):
    """A MODEL that fails in its first prediction."""

    def fail(*_, **__):
        raise Killed

    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", fail)
    return clone
