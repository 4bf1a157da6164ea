"""Helios Stream Video: the pictures of sampler and decoder, in files that are whole or not there at all."""

import errno
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import InputImpl, Types

from comfyui_helios.host.sampling.guider import HeliosGuider
from comfyui_helios.host.stream import background
from comfyui_helios.host.stream import fit_together as room
from comfyui_helios.host.stream import mp4 as video_file
from comfyui_helios.host.stream.mp4 import VideoFile, check_target
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from support import oracle
from support.streams import (
    HEIGHT,
    QUICK,
    WIDTH,
    Parts,
    beginning,
    cleaned_up,
    make_parts,
    packets,
    planes,
    run_node,
    stream_video,
    temporary_files,
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


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("decoding", [{}, {"trim": True}, {"drop_first": 40}, {"trim": True, "drop_first": 7}])
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
        context = video.codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tuple(map(int, tags)) == (6, 1, 1, 1)  # BT.601's matrix; primaries, transfer of BT.709; limited range
        pictures = list(container.decode(video))
        seen = pictures[0].to_ndarray(format="gbrpf32le")
    assert colours / 2 < len(np.unique(pictures[0].to_ndarray()[:64])) <= colours
    assert [picture.pts * picture.time_base for picture in pictures] == [Fraction(i * 1000, 23976) for i in range(5)]
    assert np.abs(seen - ramp[0].numpy()).max() < error


def test_colours_come_back(tmp_path):
    """Of large areas, which h264 hardly touches: that matrix, range and tags belong together."""
    colours = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [1, 1, 1], [0, 0, 0], [0.9, 0.7, 0.2]])
    picture = colours.repeat_interleave(32, 0).view(1, 1, -1, 3).expand(4, 64, -1, 3)
    file = VideoFile(tmp_path, 24, 10, "8")
    file.write(picture)
    components = InputImpl.VideoFromFile(str(file.finish())).get_components()
    middles = components.images[0, 32, 16::32]
    assert (middles - colours).abs().max() < 3 / 255


@pytest.mark.parametrize(("container", "codec"), [("auto", "auto"), ("mp4", "h264")])
@pytest.mark.parametrize("bit_depth", ["8", "10"])
def test_save_video_only_remuxes(parts, tmp_path, container, codec, bit_depth):
    [video], _ = stream_video(parts, beginning(66), bit_depth=bit_depth)
    saved = tmp_path / "saved.mp4"
    video.save_to(str(saved), format=Types.VideoContainer(container), codec=Types.VideoCodec(codec))
    assert packets(saved) == packets(video.get_stream_source())
    assert len(planes(saved)) == 66


def test_the_tail_goes_on_as_the_samplers_latent_does(parts):
    start = beginning(66)
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


class WatchedVAE:
    """The host's VAE, with something that happens at each decoding."""

    def __init__(self, vae, action):
        self.vae, self.action, self.seen = vae, action, []  # a copy of it shares the list
        self.patcher, self.vae_dtype, self.memory_used_decode = vae.patcher, vae.vae_dtype, vae.memory_used_decode

    @property
    def calls(self):
        return len(self.seen)

    def decode(self, samples):
        self.seen.append(samples)
        self.action(self.calls)
        return self.vae.decode(samples)


def watched(parts, action):
    vae = WatchedVAE(parts.vae, action)
    return Parts(parts.model, vae), vae


def test_a_chunk_is_decoded_while_the_next_is_denoised(parts):
    """Each but the last: its decoding may only end once the model is at work again."""
    predicted = threading.Event()
    threads = []

    def action(call):
        threads.append(threading.current_thread())
        if call < 3:
            assert predicted.wait(60)
            predicted.clear()

    def wrapper(executor, *args, **kwargs):
        if threads:
            predicted.set()
        return executor(*args, **kwargs)

    model = parts.model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    both, _ = watched(Parts(model, parts.vae), action)
    stream_video(both, beginning(99))
    assert len(threads) == 3
    assert threading.main_thread() not in threads
    assert not [thread for thread in threads if thread.is_alive()]


def test_otherwise_it_is_only_encoded_then(parts, monkeypatch):
    threads = []
    original = VideoFile.write

    def write(self, frames):
        threads.append(threading.current_thread())
        original(self, frames)

    monkeypatch.setattr(VideoFile, "write", write)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *args: 10_000)
    start = beginning(66, batch_size=2)
    assert in_turns(parts, start)
    assert threading.main_thread() not in threads
    threads.clear()
    assert in_turns(parts, start, overlap_decode="off")
    assert set(threads) == {threading.main_thread()}


def in_turns(parts, start, **settings):
    """Whether all decoding was done on the node's own thread."""
    threads = set()
    both, _ = watched(parts, lambda call: threads.add(threading.current_thread()))
    stream_video(both, start, **settings)
    return threads == {threading.main_thread()}


def test_they_take_turns_where_both_do_not_fit(parts, monkeypatch):
    start = beginning(66)
    assert in_turns(parts, start, overlap_decode="off")
    assert not in_turns(parts, start)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_total_memory", lambda *args: 10_000)
        assert in_turns(parts, start)
    with monkeypatch.context() as patch:  # something else has taken the room since
        patch.setattr(comfy.model_management, "get_free_memory", lambda *args: 10_000)
        assert in_turns(parts, start)
    unknown = Parts(parts.model, type("OtherVAE", (), {"decode": lambda self, x: parts.vae.decode(x)})())
    assert stream_video(unknown, start)[0][0].get_frame_count() == 66


def on_a_card(size=100, loaded=100, lowvram=False, dynamic=False):
    return SimpleNamespace(
        load_device=torch.device("cuda"),
        model=SimpleNamespace(model_lowvram=lowvram),
        model_size=lambda: size,
        loaded_size=lambda: loaded,
        is_dynamic=lambda: dynamic,
    )


@pytest.mark.parametrize(
    ("model", "vae", "free", "expected"),
    [
        ({}, {}, 201, True),
        ({}, {}, 199, False),  # decoding would make the host unload something
        ({"loaded": 99}, {}, 201, True),  # parameters that the host does not count
        ({"loaded": 60}, {}, 201, False),
        ({"lowvram": True}, {}, 201, False),
        ({}, {"loaded": 0}, 201, False),
        ({}, {"lowvram": True}, 201, False),
        ({"dynamic": True}, {}, 201, False),
    ],
)
def test_on_a_card_both_must_be_there_as_a_whole(monkeypatch, model, vae, free, expected):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args: free)
    monkeypatch.setattr(room, "_at_work", lambda *args: 200)
    guider = SimpleNamespace(model_patcher=on_a_card(**model))
    assert room.fits_now(guider, SimpleNamespace(patcher=on_a_card(**vae))) is expected


def test_they_take_turns_where_hooks_swap_weights(parts):
    positive, negative, latent = beginning(66)
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook()
    hook.weights = {}
    hooks.add(hook)
    positive = [[embedding, {**values, "hooks": hooks}] for embedding, values in positive]
    assert in_turns(parts, (positive, negative, latent))


def test_the_model_comes_back_after_decoding_has_unloaded_it(parts):
    """With a patch, whose weights are only in place while the model is loaded."""
    patched = parts.model.clone()
    key = "diffusion_model.blocks.0.attn1.to_q.weight"
    assert patched.add_patches({key: ("diff", (torch.randn(patched.model.state_dict()[key].shape),))}, 1.0) == [key]
    start = beginning(99)
    _, tail = stream_video(parts, start)
    _, expected = stream_video(Parts(patched, parts.vae), start, overlap_decode="off")
    assert not torch.allclose(tail["samples"], expected["samples"])
    both, _ = watched(Parts(patched, parts.vae), lambda call: comfy.model_management.unload_all_models())
    _, unloaded = stream_video(both, start, overlap_decode="off")
    assert torch.equal(unloaded["samples"], expected["samples"])


def failing(error, at):
    def action(call):
        if call == at:
            raise error

    return action


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("at", [1, 2, 3])
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


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("at", [1, 4, 9])
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


@pytest.mark.parametrize("after", [0, 20, 65])
@pytest.mark.parametrize("overlap", ["auto", "off"])
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


def test_a_folder_without_write_permission_is_told(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "refused")  # root is never refused

    monkeypatch.setattr(video_file.tempfile, "TemporaryFile", refuse)
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
