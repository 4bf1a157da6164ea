"""Helios Stream Video decodes a chunk while the next is denoised, where both fit; otherwise they take turns."""

import threading
from types import SimpleNamespace

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import pytest
import torch

from comfyui_helios.host.stream import fit_together
from comfyui_helios.host.stream.background import Background
from comfyui_helios.host.stream.mp4 import VideoFile
from support.streams import Parts, beginning, make_parts, stream_video, watched


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


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


def test_a_card_that_the_host_does_not_use_is_left_alone(monkeypatch):
    """As with --cpu, for somebody whose card is busy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: pytest.fail("used"))
    with Background() as background:
        background.start(lambda: None)
        background.wait()


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
    with monkeypatch.context() as patch:  # as Apple's
        patch.setattr(fit_together, "TWO_THREADS", ())
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
    monkeypatch.setattr(fit_together, "_at_work", lambda *args: {torch.device("cuda"): 200})
    guider = SimpleNamespace(model_patcher=on_a_card(**model))
    assert fit_together.fits_now(guider, SimpleNamespace(patcher=on_a_card(**vae))) is expected


@pytest.mark.parametrize(("device", "whole", "at_work"), [("cuda:0", 440, 220), ("cuda:1", 220, 110)])
@pytest.mark.parametrize("more", [0, 1])
def test_each_card_has_to_hold_what_is_on_it(monkeypatch, device, whole, at_work, more):
    """Weights of 100, or 110 with the host's own factor, and 110 for the work of each: together, or on two cards."""
    management = comfy.model_management
    monkeypatch.setattr(management, "get_total_memory", lambda device: whole + more)
    monkeypatch.setattr(management, "get_free_memory", lambda device: at_work + more)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 110)
    model, decoder = on_a_card(), on_a_card()
    model.load_device, decoder.load_device = torch.device("cuda:0"), torch.device(device)
    vae = SimpleNamespace(patcher=decoder, memory_used_decode=lambda *args: 50, vae_dtype=None)
    run = SimpleNamespace(chunk_shape=(1, 16, 9, 8, 8))
    guider = SimpleNamespace(model_patcher=model, original_conds={}, run=run, sampling_memory=lambda: (110, 0))
    assert fit_together.may_fit(guider, vae) is bool(more)
    assert fit_together.fits_now(guider, vae) is bool(more)


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
