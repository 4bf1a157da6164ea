"""Group offloading as the nodes switch it on: the same numbers, the truth about memory, and nothing left behind."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import comfy.sd
import pytest
import torch

from comfyui_helios.helios_core.checkpoint import open_checkpoint
from comfyui_helios.helios_core.schedule import DISTILLED
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model import offload_patcher as subject
from comfyui_helios.host.model.loading import converted_on_reading, load_model
from comfyui_helios.host.model.offload_patcher import Offloading, OffloadPatcher, is_compiled, offloaded_vae, offloading
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.load import HeliosDiffusersLoader
from comfyui_helios.nodes.text import HeliosTextEncode
from harness import oracle
from harness.tiny import make_official_folder
from support import streams
from support.runs import QUICK, run_node, sample

SETTINGS = [
    Offloading("block", 1, "host"),
    Offloading("block", 2, "disk"),
    Offloading("leaf", 1, "host"),
    Offloading("leaf", 1, "disk"),
]


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes_and_tiny_layers_travel_too(monkeypatch):
    monkeypatch.setattr(subject, "KEEP_BELOW", 0)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "Helios-Distilled"
    oracle.transformer(0).save_pretrained(path / "transformer")
    (path / "model_index.json").write_text('{"_class_name": "HeliosPyramidPipeline", "is_distilled": true}')
    return path


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "tiny"
    make_official_folder(path, "distilled")
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return sample(load_model(str(folder), "fp32"), QUICK, chunks=2)["samples"]


def hooked(module):
    return [name for name, m in module.named_modules() if hasattr(m, "_hf_hook") or "forward" in m.__dict__]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_same_latents(folder, expected, how):
    model = load_model(str(folder), "fp32", offloading=how)
    for _ in range(2):
        assert torch.equal(sample(model, QUICK, chunks=2)["samples"], expected)
        assert not hooked(model.model)
    assert model.offloader.moved > 2 * sum(p.numel() * 4 for p in model.model.diffusion_model.blocks.parameters())
    assert model.offloader.used == 0 and not model.offloader.resident  # released
    assert model.loaded_size() == 0


def lora(model):
    torch.manual_seed(0)
    weights = {}
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.endswith(("to_q.weight", "proj.weight", "patch_short.weight")) and parameter.ndim == 2:
            down, up = torch.randn(4, parameter.shape[1]), torch.randn(parameter.shape[0], 4)
            weights[f"diffusion_model.{name.removesuffix('.weight')}.lora_A.weight"] = down
            weights[f"diffusion_model.{name.removesuffix('.weight')}.lora_B.weight"] = up * 0.05
    return weights


@pytest.mark.parametrize("how", SETTINGS[::3], ids=str)
def test_lora_patches_are_applied_as_the_host_applies_them(folder, expected, how, caplog):
    plain, offloaded = load_model(str(folder), "fp32"), load_model(str(folder), "fp32", offloading=how)
    with_lora = [comfy.sd.load_lora_for_models(m, None, lora(plain), 0.8, 0)[0] for m in (plain, offloaded)]
    wanted, got = (sample(m, QUICK, chunks=2)["samples"] for m in with_lora)
    assert torch.equal(got, wanted)
    assert not torch.allclose(wanted, expected)
    # the weights themselves are untouched: without the LoRA it is the plain model again
    assert torch.equal(sample(offloaded, QUICK, chunks=2)["samples"], expected)
    assert torch.equal(sample(with_lora[1], QUICK, chunks=2)["samples"], wanted)
    assert "has moved" not in caplog.text  # of the host's functions: newer ones warn at every weight


def test_the_host_is_told_what_it_takes(folder):
    whole = load_model(str(folder), "fp32").model_size()
    model = load_model(str(folder), "fp32", offloading=Offloading("leaf"))
    largest = max(p.numel() * 4 for p in model.model.parameters())
    assert model.model_size() == pytest.approx(2 * largest, rel=0.05)
    comfy.model_management.load_models_gpu([model])
    assert model.loaded_size() == model.model_size() == model.offloader.device_size
    assert model.partially_unload(None, 1) == 0 and hooked(model.model)
    comfy.model_management.unload_all_models()
    assert model.loaded_size() == 0 and not hooked(model.model)
    assert model.get_ram_usage() == whole


def test_patchers_of_one_model_share_its_offloader(folder):
    first, other = (load_model(str(folder), "fp32", offloading=Offloading("leaf")) for _ in range(2))
    clone = first.clone()
    assert clone.offloader is first.offloader
    clone.model = other.model  # as newer hosts make the patcher of a second card
    assert clone.offloader is other.offloader is not first.offloader
    factory, arguments = first.cached_patcher_init
    assert isinstance(factory(*arguments, disable_dynamic=True), OffloadPatcher)


def test_nothing_keeps_a_lora_alive(folder, expected):
    model = load_model(str(folder), "fp32", offloading=Offloading("leaf"))
    patched = comfy.sd.load_lora_for_models(model, None, lora(model), 0.8, 0)[0]
    assert patched.model_size() > model.model_size()  # room to compute it
    sample(patched, QUICK)
    gone = weakref.ref(patched)
    del patched
    gc.collect()
    assert gone() is None


def test_saving_with_loras_is_refused(folder):
    model = load_model(str(folder), "fp32", offloading=Offloading("block"))
    patched = comfy.sd.load_lora_for_models(model, None, lora(model), 0.8, 0)[0]
    with pytest.raises(ValueError, match="save a model with its LoRAs"):
        comfy.model_management.load_models_gpu([patched], force_patch_weights=True)
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("injected"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_failure_leaves_nothing_behind(folder, expected, error, monkeypatch):
    model = load_model(str(folder), "fp32", offloading=Offloading("leaf"))
    own = dict(model.model.named_parameters())
    calls = 0

    def fail(self, x):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise error
        return forward(self, x)

    linear = type(model.model.diffusion_model.blocks[0].attn1.to_q)
    forward = linear.forward
    with monkeypatch.context() as patch:
        patch.setattr(linear, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError, match="ran out of memory"):
            sample(model, QUICK, chunks=2)
    assert calls == 40 and not hooked(model.model)
    assert all(p.device.type == "cpu" and own[k].shape == p.shape for k, p in model.model.named_parameters())
    assert torch.equal(sample(model, QUICK, chunks=2)["samples"], expected)


def test_a_failed_copy_is_the_error_one_sees(folder, expected, monkeypatch):
    model = load_model(str(folder), "fp32", offloading=Offloading("block", weights_in="disk"))
    with monkeypatch.context() as patch:
        patch.setattr(type(model.offloader), "_fill", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("copy")))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            sample(model, QUICK)
        assert str(caught.value.__cause__) == "copy"
    assert not hooked(model.model)
    assert torch.equal(sample(model, QUICK, chunks=2)["samples"], expected)


def test_compiled_models_and_lora_hooks_are_refused(folder):
    import comfy.hooks
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = load_model(str(folder), "fp32", offloading=Offloading("block"))
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    assert is_compiled(compiled) and not is_compiled(model)
    with pytest.raises(ValueError, match="compile node"):
        sample(compiled, QUICK)
    replaced = model.clone()
    replaced.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    with pytest.raises(ValueError, match="compile node"):
        sample(replaced, QUICK)
    hooks = comfy.hooks.create_hook_lora(lora(model), strength_model=1.0, strength_clip=0.0)
    with pytest.raises(ValueError, match="LoRA hooks"):
        sample(model, QUICK, positive=[[oracle.prompts()[0], {"hooks": hooks}]])
    assert not hooked(model.model)


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_text_encoder(official, level):
    clip = load_text_encoder(official, torch.float32)
    plain = run_node(HeliosTextEncode, clip, "a red fox", "")
    offloaded = run_node(HeliosTextEncode, clip, "a red fox", "", level)
    for a, b in zip(plain, offloaded, strict=True):
        assert torch.equal(a[0][0], b[0][0])
    assert not hooked(clip.cond_stage_model)
    again = run_node(HeliosTextEncode, clip, "a red fox", "")
    assert torch.equal(again[0][0][0], plain[0][0][0])


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_vae_travels_and_tiles(official, level, monkeypatch):
    vae = load_vae(official)
    latent = {"samples": torch.randn(1, 16, 9, 8, 40, generator=torch.Generator().manual_seed(0))}
    tiled = vae.decode_tiled(latent["samples"], tile_x=32, tile_y=32, overlap=8)[0]
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, memory_required=0, **k: (asked.append(memory_required), load(models, memory_required, **k))[1],
    )
    images = run_node(HeliosChunkedVAEDecode, latent, vae, False, group_offload=level)[0]
    assert torch.equal(images, tiled)
    assert asked == [vae.memory_used_decode((1, 16, 9, 8, 32), vae.vae_dtype)]
    assert not hooked(vae.first_stage_model)
    whole = run_node(HeliosChunkedVAEDecode, latent, vae, False)[0]
    assert torch.equal(whole, vae.decode(latent["samples"])[0])


def test_vae_computes_in_bf16_where_the_device_can(official, monkeypatch):
    vae = load_vae(official)
    assert vae.vae_dtype == torch.float32  # the CPU's choice
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_, **__: True)
    samples = torch.randn(1, 16, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = set()
    with offloaded_vae(vae, Offloading("leaf")) as decoder:
        convolution = decoder.first_stage_model.decoder.conv1
        convolution.register_forward_hook(lambda m, x, y: seen.add((m.weight.dtype, y.dtype)))
        half = decoder.decode(samples)
        convolution._forward_hooks.clear()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {p.dtype for p in vae.first_stage_model.parameters()} == {torch.float32}
    natively = load_vae(official)
    natively.first_stage_model.to(torch.bfloat16)
    natively.vae_dtype = torch.bfloat16
    assert torch.equal(half, natively.decode(samples))


def test_switching_on_and_off_between_runs(official):
    clip, vae = load_text_encoder(official, torch.float32), load_vae(official)
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8)}
    for level in ("off", "leaf", "off", "block", "off"):
        run_node(HeliosTextEncode, clip, "a", "b", level)
        run_node(HeliosChunkedVAEDecode, latent, vae, False, group_offload=level)
        assert not hooked(clip.cond_stage_model) and not hooked(vae.first_stage_model)
        comfy.model_management.load_models_gpu([clip.patcher, vae.patcher])


def test_the_loader_says_what_cannot_stay_on_disk(folder, official, monkeypatch):
    checkpoint = open_checkpoint(folder)
    assert converted_on_reading(checkpoint, "fp32") is None
    warning = converted_on_reading(checkpoint, "bf16")
    assert "scripts/convert_checkpoint.py" in warning
    from comfyui_helios.nodes import load as loaders

    said = []
    monkeypatch.setattr(loaders, "find_folder", lambda name: official)
    monkeypatch.setattr("comfyui_helios.host.messages.tell", lambda text, node_id: said.append(text))
    assert isinstance(run_node(HeliosDiffusersLoader, "x", "bf16", "leaf", 1, "host")[0], OffloadPatcher)
    assert not said
    run_node(HeliosDiffusersLoader, "x", "bf16", "leaf", 1, "disk")
    assert len(said) == 1 and "used in (bf16)" in said[0] and "--dtype bf16" in said[0]
    assert not isinstance(run_node(HeliosDiffusersLoader, "x", "bf16")[0], OffloadPatcher)
    assert len(said) == 1
    run_node(HeliosDiffusersLoader, "x", "bf16", "off", 1, "disk")
    assert "does nothing while group_offload is off" in said[1]


@pytest.mark.parametrize("wrong", [("blocks",), ("block", 0), ("leaf", 1, "ram")], ids=str)
def test_other_values_than_the_widgets(wrong):
    with pytest.raises(ValueError, match="group_offload must be off or block or leaf"):
        offloading(*wrong)


def test_off_is_the_hosts_own_patcher(folder):
    assert type(load_model(str(folder), "fp32")) is not OffloadPatcher
    assert offloading("off", 1, "host") is None
    assert DISTILLED.variant == "distilled"


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_streaming_with_everything_offloaded(tmp_path, overlap):
    parts = streams.make_parts(tmp_path)
    start = streams.beginning(66)
    [plain], expected = streams.stream_video(parts, start)
    model = load_model(str(tmp_path), "fp32", offloading=Offloading("leaf"))
    offloaded = streams.Parts(model, parts.vae)
    [video], tail = streams.stream_video(offloaded, start, vae_offload="leaf", overlap_decode=overlap)
    assert torch.equal(tail["samples"], expected["samples"])
    assert video.get_frame_count() == plain.get_frame_count() == 66
    assert not hooked(model.model) and not hooked(parts.vae.first_stage_model)
