"""Helios Stream Video: the pictures of sampler and decoder, in files that are whole or not there at all."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import comfy.model_management
import comfy.patcher_extension
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types

from comfyui_helios.host.sampling.guider import HeliosGuider
from comfyui_helios.host.stream import background
from comfyui_helios.host.stream.mp4 import VideoFile
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from harness import oracle
from support.runs import QUICK, run_node
from support.streams import (
    HEIGHT,
    WIDTH,
    Parts,
    beginning,
    cleaned_up,
    make_parts,
    packets,
    planes,
    stream_video,
    temporary_files,
    watched,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


@pytest.fixture(autouse=True)
def empty_temp():
    cleaned_up()
    for name in temporary_files():
        (Path(folder_paths.get_temp_directory()) / name).unlink()


def node_by_node(parts, start, seed=3, **decoding):
    """(LATENT, IMAGE) of the sampler and the decoder."""
    [latent] = run_node(HeliosChunkedSampler, parts.model, *start, QUICK, seed)
    images, _ = run_node(HeliosChunkedVAEDecode, latent, parts.vae, **{"trim": False, **decoding})
    return latent, images


@pytest.fixture
def written(monkeypatch):
    """Frames by the file that they were written to, as they were before they were encoded."""
    frames = {}
    original = VideoFile.write

    def write(self, images):
        frames.setdefault(self.target.name, []).append(images.clone())
        original(self, images)

    monkeypatch.setattr(VideoFile, "write", write)
    return frames


@pytest.mark.parametrize(
    ("overlap", "decoding"), [("auto", {}), ("auto", {"drop_first": 40}), ("off", {"trim": True, "drop_first": 7})]
)
def test_the_same_pictures_as_node_by_node(parts, written, overlap, decoding):
    start = beginning(70)
    _, images = node_by_node(parts, start, **decoding)
    [video], _ = stream_video(parts, start, overlap_decode=overlap, **decoding)
    [shown] = written.values()
    assert torch.equal(torch.cat(shown), images)
    expected = (70 if decoding.get("trim") else 99) - decoding.get("drop_first", 0)
    assert len(planes(video.get_stream_source())) == expected == video.get_frame_count()


def test_a_batch_makes_a_file_for_each_item(parts, written):
    start = beginning(66, batch_size=2)
    _, images = node_by_node(parts, start)
    videos, tail = stream_video(parts, start)
    assert len(videos) == 2
    assert tail["samples"].shape[0] == 2
    names = [Path(video.get_stream_source()).name for video in videos]
    assert torch.equal(torch.cat([frame for name in names for frame in written[name]]), images)
    assert sorted(names) == temporary_files()


@pytest.mark.parametrize("bit_depth", ["8", "10"])
def test_the_file_is_what_create_video_and_save_video_make(parts, tmp_path, bit_depth):
    """With the crf they use, each decoded frame is theirs, bit for bit."""
    start = beginning(66)
    _, images = node_by_node(parts, start)
    components = Types.VideoComponents(images=images, frame_rate=Fraction(24))
    try:
        theirs = InputImpl.VideoFromComponents(components, **({"bit_depth": 10} if bit_depth == "10" else {}))
    except TypeError:
        pytest.skip("this host writes 8 bit only")
    theirs.save_to(str(tmp_path / "theirs.mp4"))
    [video], _ = stream_video(parts, start, crf=23, bit_depth=bit_depth)
    for ours, expected in zip(planes(video.get_stream_source()), planes(tmp_path / "theirs.mp4"), strict=True):
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize(("container", "codec"), [("auto", "auto"), ("mp4", "h264")])
@pytest.mark.parametrize("bit_depth", ["8", "10"])
def test_save_video_only_remuxes(parts, tmp_path, container, codec, bit_depth):
    [video], _ = stream_video(parts, beginning(66), bit_depth=bit_depth)
    saved = tmp_path / "saved.mp4"
    video.save_to(str(saved), format=Types.VideoContainer(container), codec=Types.VideoCodec(codec))
    assert packets(saved) == packets(video.get_stream_source())
    assert len(planes(saved)) == 66


@pytest.mark.parametrize("before", [{}, {"keep_first_frame": False}], ids=["", "without the anchor so far"])
def test_the_tail_goes_on_as_the_samplers_latent_does(parts, before):
    start = beginning(66, **before)
    latent, _ = node_by_node(parts, start)
    _, tail = stream_video(parts, start)
    assert torch.equal(tail["samples"], latent["samples"][:, :, -9:])
    first, second = (
        run_node(HeliosChunkedSampler, parts.model, *beginning(66, previous=p), QUICK, 99)[0] for p in (latent, tail)
    )
    assert torch.equal(first["samples"], second["samples"])
    videos_from_tail, second_tail = stream_video(parts, beginning(66, previous=tail), seed=99)
    assert torch.equal(second_tail["samples"], first["samples"][:, :, -9:])
    assert videos_from_tail[0].get_frame_count() == 66


def failing(error, at):
    def action(call):
        if call == at:
            raise error

    return action


@pytest.mark.parametrize(("overlap", "at"), [("auto", 1), ("auto", 3), ("off", 2)])
def test_an_error_while_decoding_leaves_nothing(parts, overlap, at):
    threads = threading.active_count()
    both, _ = watched(parts, failing(RuntimeError("not enough memory: you tried to allocate"), at))
    with pytest.raises(RuntimeError, match="not enough memory"):
        stream_video(both, beginning(99), overlap_decode=overlap)
    assert temporary_files() == []
    assert threading.active_count() == threads
    assert stream_video(parts, beginning(33))[0][0].get_frame_count() == 33


def test_a_failed_decoding_ends_the_run_at_the_next_step(parts, monkeypatch):
    """Not only when the next chunk is finished, which at full size takes minutes."""
    works, steps = [], []

    class Watched(ThreadPoolExecutor):
        def submit(self, *args, **kwargs):
            works.append(super().submit(*args, **kwargs))
            return works[-1]

    def wrapper(executor, *args, **kwargs):
        steps.append(args)
        if works:
            assert works[0].exception(60)
        return executor(*args, **kwargs)

    monkeypatch.setattr(background, "ThreadPoolExecutor", Watched)
    model = parts.model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    both, _ = watched(Parts(model, parts.vae), failing(RuntimeError("not enough memory"), 1))
    with pytest.raises(RuntimeError, match="not enough memory"):
        stream_video(both, beginning(99))
    assert len(steps) == 3 + 1  # the first chunk, and one step of the second
    assert temporary_files() == []


@pytest.mark.parametrize(("overlap", "at"), [("auto", 1), ("auto", 9), ("off", 4)])
def test_running_out_of_memory_in_a_step_leaves_nothing(parts, overlap, at):
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise torch.OutOfMemoryError("injected")
        return executor(*args, **kwargs)

    model = parts.model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    threads = threading.active_count()
    start = beginning(99)
    with pytest.raises(torch.OutOfMemoryError, match=r"^Helios Stream Video ran out of memory\. Make"):
        stream_video(Parts(model, parts.vae), start, overlap_decode=overlap)
    assert temporary_files() == []
    assert threading.active_count() == threads
    modules = [*parts.model.model.modules(), *parts.vae.first_stage_model.modules()]
    assert not [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    latent, _ = node_by_node(parts, start)
    assert torch.equal(stream_video(parts, start)[1]["samples"], latent["samples"][:, :, -9:])


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_cancelling_leaves_nothing(parts, overlap):
    both, vae = watched(parts, lambda call: comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream_video(both, beginning(330), overlap_decode=overlap)
    assert vae.calls == 1
    assert temporary_files() == []


@pytest.mark.parametrize(("overlap", "after"), [("auto", 0), ("auto", 65), ("off", 20)])
def test_a_full_disk_is_explained_and_leaves_nothing(parts, monkeypatch, overlap, after):
    original = VideoFile._encode

    def encode(self, picture):
        if self.frames > after:
            raise av.error.OSError(errno.ENOSPC, "No space left on device", str(self.part))
        original(self, picture)

    with monkeypatch.context() as patch:
        patch.setattr(VideoFile, "_encode", encode)
        with pytest.raises(OSError, match=r"no room for the video in .*No space left.*Free some space") as caught:
            stream_video(parts, beginning(66, batch_size=2), overlap_decode=overlap)
    assert caught.value.errno == errno.ENOSPC
    assert temporary_files() == []
    assert stream_video(parts, beginning(33))[0][0].get_frame_count() == 33


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bit_depth": "12"}, "bit_depth must be one of 8, 10, got '12'"),
        ({"overlap_decode": "on"}, "overlap_decode must be one of auto, off, got 'on'"),
        ({"seed_mode": "old"}, "seed_mode must be one of continue, new"),
        ({"drop_first": 66}, "drop_first is 66, but the video has 66 frames"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(parts, settings, message):
    both, vae = watched(parts, lambda call: None)
    model = replace(both, model=parts.model.clone())
    model.model.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", failing(AssertionError("it ran"), 1)
    )
    with pytest.raises(ValueError, match=message):
        stream_video(model, beginning(66), **settings)
    assert vae.calls == 0
    assert temporary_files() == []


def test_another_vae_is_refused_before_anything_runs(parts):
    other = type("Wan22VAE", (), {"latent_channels": 48, "latent_dim": 3})()
    with pytest.raises(ValueError, match="48 channels; expected the Wan 2.1 VAE .*16 channels"):
        stream_video(Parts(parts.model, other), beginning(66))


def test_another_model_is_refused_by_this_nodes_name(parts):
    with pytest.raises(ValueError, match="Helios Stream Video needs a Helios model, got Other"):
        stream_video(Parts(type("Patcher", (), {"model": type("Other", (), {})()})(), parts.vae), beginning(66))


def test_conditioning_from_elsewhere_works(parts):
    """Without Helios History Injection a video begins from nothing."""
    positive, negative = ([[embedding, {}]] for embedding in oracle.prompts())
    latent = {"samples": torch.zeros(1, 16, 18, HEIGHT // 8, WIDTH // 8)}
    [video], tail = stream_video(parts, (positive, negative, latent))
    _, expected = stream_video(parts, beginning(66))
    assert torch.equal(tail["samples"], expected["samples"])
    assert video.get_frame_count() == 66


def test_a_temporary_folder_that_is_a_file_is_told_before_anything_is_sampled(parts, tmp_path, monkeypatch):
    (tmp_path / "temp").write_bytes(b"")
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(HeliosGuider, "denoise", lambda *args, **kwargs: pytest.fail("samples"))
    with pytest.raises(OSError, match=r"cannot be written to .*temp \(.*\)\. Make that a folder.*--temp-directory"):
        stream_video(parts, beginning(66))
