"""Memory that does not suffice: refused before it is asked for where that can be known, else told in one way."""

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch

from comfyui_helios.helios_core.video import VideoStart
from comfyui_helios.host import out_of_memory
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.out_of_memory import check_room, memory_errors, ran_out
from comfyui_helios.host.sockets.images import prepare_images
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from comfyui_helios.nodes.text import HeliosTextEncode
from harness import oracle
from harness.tiny import make_official_folder
from support.runs import QUICK, conditioning, run_node
from support.streams import make_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


@pytest.fixture
def little(monkeypatch):
    """A machine with a tenth of a GiB free."""
    monkeypatch.setattr(out_of_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=0.06 * 2**30))
    monkeypatch.setattr(out_of_memory.psutil, "swap_memory", lambda: SimpleNamespace(free=0.04 * 2**30))


def told(error):
    with pytest.raises(comfy.model_management.OOM_EXCEPTION) as caught, memory_errors("Helios Chunked Sampler"):
        raise error
    return str(caught.value)


CUDA = "CUDA out of memory. Tried to allocate 2.34 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.2 are free."


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), " when it asked for 2.34 GiB more"),
        (RuntimeError("could not create a primitive"), ""),
        (RuntimeError("could not create a memory object"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (MemoryError(), ""),
        (RuntimeError("MPS backend out of memory. Tried to allocate 2.00 GB"), " when it asked for 2.00 GB more"),
        (RuntimeError("Invalid buffer size: 19.29 GB"), " when it asked for 19.29 GB more"),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), ""),
        (RuntimeError("Could not allocate tensor with 9 bytes. There is not enough GPU video memory available!"), ""),
        (RuntimeError("a process has ended: numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1 GiB"), ""),
    ],
    ids=str,
)
def test_every_lack_of_memory_is_told_alike_and_as_the_hosts_own_kind(error, asked):
    message = told(error)
    assert message.startswith(f"Helios Chunked Sampler ran out of memory{asked}. Make the video smaller")


def test_the_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert "when it asked for 1125899906842624 bytes more. Make" in told(caught.value)


def test_torch_before_2_5_has_the_error_under_another_name(monkeypatch):
    monkeypatch.delattr(torch, "OutOfMemoryError")
    with pytest.raises(RuntimeError, match="a bug"), memory_errors("Helios Chunked Sampler"):
        raise RuntimeError("a bug")


def test_directml_does_not_say_how_large_it_is():
    """The host's answer for it is 1 GiB, whatever there is."""
    check_room("A chunk", 2**34, torch.device("privateuseone:0"))


@pytest.mark.parametrize(
    "error", [RuntimeError("could not create a primitive descriptor"), RuntimeError("a bug"), ValueError("memory")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=str(error)), memory_errors("Helios Chunked Sampler"):
        raise error


def test_what_says_itself_who_ran_out_is_not_told_again():
    message = "worker 2 of 4 ran out of memory when it asked for 2.34 GiB more. Take fewer cards."
    assert told(ran_out("worker 2 of 4", CUDA, "Take fewer cards.")) == message


def test_a_lack_of_memory_in_the_network_is_told_by_the_nodes_name(parts):
    model = parts.model.clone()

    def no_memory(apply_model, args):
        raise RuntimeError("could not create a primitive")

    model.set_model_unet_function_wrapper(no_memory)
    prompts = [conditioning(prompt) for prompt in oracle.prompts()]
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="^Helios Chunked Sampler ran out of memory"):
        run_node(HeliosChunkedSampler, model, *prompts, {"samples": torch.zeros(1, 16, 9, 8, 8)}, QUICK, 3)


def test_a_text_encoder_that_does_not_fit_is_not_cured_by_a_smaller_video(tmp_path, monkeypatch):
    make_official_folder(tmp_path / "tiny", "distilled")
    clip = load_text_encoder(tmp_path / "tiny", torch.float32)

    def no_memory(tokens):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", no_memory)
    message = r"^The text encoder ran out of memory when it asked for .* more\. Load it on the CPU: Load CLIP has"
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=message):
        run_node(HeliosTextEncode, clip, "a red fox", "")


def test_a_batch_out_of_all_proportion_is_refused_before_it_takes_memory(parts, little, monkeypatch):
    monkeypatch.setattr(VideoStart, "memory", lambda *args: pytest.fail("allocates"))
    prompts = [conditioning(prompt) for prompt in oracle.prompts()]
    start = run_node(HeliosHistoryInjection, *prompts, width=2048, height=2048, frames=33, batch_size=64)
    message = (
        r"2048x2048 in a batch of 64 would take \d+\.\d GiB of memory, and 0\.1 GiB are free\. Make the video smaller"
    )
    with pytest.raises(ValueError, match=message):
        run_node(HeliosChunkedSampler, parts.model, *start, QUICK, 3)


def test_a_video_longer_than_memory_is_refused_before_it_is_sampled(parts, little):
    prompts = [conditioning(prompt) for prompt in oracle.prompts()]
    start = run_node(HeliosHistoryInjection, *prompts, width=64, height=64, frames=99_000, batch_size=1)
    with pytest.raises(ValueError, match="The latents of 3000 chunks would take 0.1 GiB of memory"):
        run_node(HeliosChunkedSampler, parts.model, *start, QUICK, 3)


def test_frames_that_memory_does_not_hold_name_the_node_that_streams(little):
    vae = SimpleNamespace(encode=None, decode=lambda samples: pytest.fail("decodes"))
    latent = {"samples": torch.zeros(()).expand(1, 16, 36, 64, 64)}
    message = r"^132 frames of 512x512 would take 0\.4 GiB of memory, and 0\.1 GiB are free\. Take Helios Stream Video"
    with pytest.raises(ValueError, match=message):
        run_node(HeliosChunkedVAEDecode, latent, vae, False)
    with pytest.raises(ValueError, match="^99 frames of 512x512"):
        run_node(HeliosChunkedVAEDecode, latent, vae, False, drop_first=33)


def test_frames_that_memory_will_not_hold_are_told_before_they_are_sampled(parts, little, monkeypatch, caplog):
    monkeypatch.setattr("comfyui_helios.nodes.sample.collect", lambda guider: pytest.fail(caplog.text))
    prompts = [conditioning(prompt) for prompt in oracle.prompts()]
    start = run_node(HeliosHistoryInjection, *prompts, width=512, height=512, frames=100, batch_size=1)
    with pytest.raises(pytest.fail.Exception, match=r" 100 frames of 512x512 would .* Take Helios Stream Video"):
        run_node(HeliosChunkedSampler, parts.model, *start, QUICK, 3)


def test_images_that_memory_does_not_hold_are_refused(little):
    with pytest.raises(ValueError, match="40 images of 2048x2048 would take 1.9 GiB"):
        prepare_images(torch.zeros(40, 2, 2, 3), 2048, 2048, "crop")
