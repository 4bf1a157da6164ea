"""Helios under dynamic VRAM: weights that come to the card as they are asked for and are taken away at any time.

Without a card, on a stand-in for comfy-aimdo (`support.dynamic_vram`), and compared with the same host's plain patcher.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import comfy.cli_args
import comfy.hooks
import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy.memory_management", reason="this ComfyUI is older than dynamic VRAM (0.16)")
if not hasattr(comfy.model_management, "STREAM_AIMDO_CAST_BUFFERS"):
    pytest.skip("of this ComfyUI's dynamic VRAM (older than 0.24's) there is no stand-in", allow_module_level=True)

from comfyui_helios.helios_core.checkpoint import published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.schedule import BASE, MID
from comfyui_helios.host.cluster.remote_model import on_several_cards
from comfyui_helios.host.compat import is_dynamic, quantised_formats
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.messages import Notes
from comfyui_helios.host.model import offload_patcher
from comfyui_helios.host.model.compiled import compile_blocks
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.lora import add_lora
from comfyui_helios.host.model.offload_patcher import Offloading, OffloadPatcher, offloaded_clip, offloaded_vae
from comfyui_helios.host.sampling import guider
from comfyui_helios.host.sockets.text_encoding import encode_prompt
from comfyui_helios.host.stream.mp4 import VideoFile
from harness import oracle
from harness.errors import difference
from harness.tiny import make_official_folder
from support.cluster import ON_CPU
from support.computing_card import CARD
from support.dynamic_vram import host_with_card
from support.loras import LAYOUTS, in_layout, matrices
from support.pretended_card import needs_cuda_build
from support.quantised import block_layers, write_scaled
from support.runs import QUICK, conditioning, sample
from support.scripts import as_module
from support.streams import Parts, beginning, stream_video, watched

pytestmark = needs_cuda_build

STRENGTH = 0.7
TIMES = {  # of the network's 160 pages, in bf16
    "ample": {},
    "random": {"churn": 0},  # there is room for all, but some are taken
    "short": {"pages": 40},
    "none": {"pages": 0},
    "both": {"pages": 120, "churn": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dynamic") / "Helios-Distilled"
    make_official_folder(path, "distilled")
    oracle.transformer(0).save_pretrained(path / "transformer")
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """On every matrix, and on what has none: tables, and norms of both kinds."""
    rng, weights = torch.Generator().manual_seed(0), dict(oracle.transformer(0).named_parameters())
    tensors = in_layout(LAYOUTS["ComfyUI's own"], matrices())
    for name in ("blocks.0.attn1.norm_q.weight", "blocks.1.norm2.bias", "blocks.1.scale_shift_table"):
        part = "diff_b" if name.endswith("bias") else "diff"
        module = name.removesuffix(".weight").removesuffix(".bias")
        tensors[f"diffusion_model.{module}.{part}"] = 0.3 * torch.randn(weights[name].shape, generator=rng)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, file)
    return str(file)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    weights = {published_name(name): x for name, x in oracle.weights(oracle.transformer(0)).items()}
    file = tmp_path_factory.mktemp("scaled") / "a.safetensors"
    return write_scaled(file, weights, block_layers(weights), config=TransformerConfig(**oracle.TINY))


@pytest.fixture
def _small_layers_travel_too(monkeypatch):
    monkeypatch.setattr(offload_patcher, "KEEP_BELOW", 0)


@contextmanager
def dynamic_vram(**times):
    """Everything that was asked for is given back in the end."""
    with host_with_card(**times) as vram:
        yield vram
        assert vram.held == 0


def plainly(make):
    """What the host's plain patcher has, with all weights on the card."""
    with host_with_card(dynamic=False):
        return make()


def with_lora(model, lora):
    return add_lora(model, lora, STRENGTH, Notes(None))


def noise():
    return torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def latents(model, schedule=QUICK, **inputs):
    return sample(model, schedule, **inputs)["samples"]


@pytest.fixture(scope="module")
def expected_latents(folder):
    return plainly(lambda: latents(load_model(str(folder), "bf16"), chunks=2))


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_latents_are_the_same(folder, expected_latents, times):
    with dynamic_vram(**times) as vram:
        model = load_model(str(folder), "bf16")
        assert is_dynamic(model)
        assert torch.equal(latents(model, chunks=2), expected_latents)
        assert bool(vram.evicted) == (times not in (TIMES["ample"], TIMES["none"]))


def test_fast_disk_pins_nothing_that_has_room_on_the_card(folder, expected_latents, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "fast_disk", True)
    with dynamic_vram():
        assert torch.equal(latents(load_model(str(folder), "bf16"), chunks=2), expected_latents)
        assert comfy.model_management.TOTAL_PINNED_MEMORY == 0


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [(replace(BASE, steps=(2,)), "bf16"), (replace(MID, steps=(2, 1, 1)), "bf16"), (QUICK, "fp8_e4m3fn")],
    ids=["base", "mid", "fp8"],
)
def test_latents_of_other_schedules_and_dtypes_are_the_same(folder, schedule, dtype):
    expected = plainly(lambda: latents(load_model(str(folder), dtype), schedule))
    with dynamic_vram(churn=0):
        assert torch.equal(latents(load_model(str(folder), dtype), schedule), expected)


def test_the_card_has_the_numbers_of_the_cpu(folder):
    with torch.inference_mode():
        expected = latents(load_model(str(folder), "fp32"))
    with dynamic_vram(small_ones_too=False):  # which the host then loads whole
        assert difference(latents(load_model(str(folder), "fp32")), expected) < 1e-5


@pytest.mark.parametrize("quant", ["fp8_scaled", "int8", "w4a8", "nvfp4"])
def test_quantised_files_stay_so(folder, tmp_path, quant):
    file = tmp_path / "a.safetensors"
    with as_module("convert_checkpoint") as script:
        if script.QUANTISERS[quant].format not in quantised_formats():
            pytest.skip(f"this ComfyUI does not know {quant}")
        assert script.main([str(folder), str(file), "--quant", quant, "--keep"]) == 0
    expected = plainly(lambda: latents(load_model(str(file), "bf16")))
    with dynamic_vram(churn=0):
        found = latents(load_model(str(file), "bf16"))
    # Where what comes in is rounded to int8, too, the last bit of a sum may tip a value over.
    assert difference(found, expected) <= (1e-3 if quant in ("int8", "w4a8") else 0)


@pytest.mark.parametrize("times", [{"churn": 0}, {"pages": 40}], ids=["random", "short"])
def test_a_lora_is_added_in_use_and_to_its_clone_alone(folder, lora, times):
    with torch.inference_mode():
        without = load_model(str(folder), "fp32")
        expected, changed = latents(without), latents(with_lora(without, lora))
    assert difference(changed, expected) > 1e-2
    with dynamic_vram(**times):
        model = load_model(str(folder), "fp32")
        assert difference(latents(model), expected) < 1e-5
        assert difference(latents(with_lora(model, lora)), changed) < 1e-5
        assert difference(latents(model), expected) < 1e-5


def test_a_lora_on_scaled_fp8_takes_effect(scaled, lora):
    """The host rounds such a weight anew, at random where it is patched for good: near is all that can be asked."""
    with torch.inference_mode():
        expected = latents(with_lora(load_model(str(scaled), "fp32"), lora))
    with dynamic_vram(churn=0):
        model = load_model(str(scaled), "bf16")
        found = latents(with_lora(model, lora))
        assert 3 * difference(found, expected) < difference(latents(model), expected)


def test_models_are_merged_in_use(folder, lora):
    def merged():
        model = load_model(str(folder), "fp32")
        return latents(ModelMergeSimple().merge(model, with_lora(load_model(str(folder), "fp32"), lora), 0.25)[0])

    with torch.inference_mode():
        expected = merged()
    with dynamic_vram(churn=0):
        assert difference(merged(), expected) < 1e-5


def test_a_saved_model_has_its_lora_in_it(folder, lora, monkeypatch, tmp_path):
    def saved(name):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: (str(tmp_path / name), "a", 0, "", ""))
        ModelSave().save(with_lora(load_model(str(folder), "fp32"), lora), "a")
        return load_file(next((tmp_path / name).iterdir()))

    with torch.inference_mode():
        expected = saved("plainly")
    with dynamic_vram():
        found = saved("dynamically")
    assert found.keys() == expected.keys()
    assert all(difference(found[name], weight) < 2e-3 for name, weight in expected.items())  # by the host, in fp16


def test_loras_on_a_prompt_take_the_hosts_plain_patcher(folder, lora):
    def hooked():
        hooks = comfy.hooks.create_hook_lora(load_file(lora), STRENGTH, 0.0)
        return latents(load_model(str(folder), "fp32"), positive=conditioning(oracle.prompts()[0], hooks=hooks))

    expected = plainly(hooked)
    with dynamic_vram(churn=0):
        assert torch.equal(hooked(), expected)


def test_after_a_cut_off_run_the_next_one_goes_well(folder):
    expected = plainly(lambda: latents(load_model(str(folder), "bf16")))
    steps = []

    def cut_off(executor, *args, **kwargs):
        steps.append(args)
        if len(steps) == 2:
            raise comfy.model_management.InterruptProcessingException
        return executor(*args, **kwargs)

    with dynamic_vram(churn=0) as vram:
        model = load_model(str(folder), "bf16")
        cut = model.clone()
        cut.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", cut_off)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            latents(cut)
        assert vram.held == 0
        assert torch.equal(latents(model), expected)


def test_a_lent_norm_stays_until_it_is_given_back(folder):
    """What a fused kernel computes with."""
    with dynamic_vram() as vram:
        model = load_model(str(folder), "bf16")
        latents(model)
        norm = model.model.diffusion_model.blocks[0].attn1.norm_q
        with norm.lend(CARD, torch.bfloat16) as (weight, bias):
            assert vram.held and bias is None
            vram.models[0].free_memory(1e12)
            assert torch.equal(weight.cpu(), norm.weight)
        assert vram.there == 0


def test_the_values_of_a_table_outlast_its_weights_on_the_card(folder):
    with dynamic_vram() as vram:
        model = load_model(str(folder), "bf16")
        latents(model)
        table = model.model.diffusion_model.blocks[0].scale_shift_table
        values = table(CARD)
        vram.models[0].free_memory(1e12)
        assert vram.there == 0
        assert torch.equal(values.cpu(), table.weight)


def test_prompts_are_kept_in_the_next_run_too(folder, monkeypatch):
    """Weights of the run before fill the card then, and give way."""
    limits, needed = [], []
    make = guider.RunCache
    monkeypatch.setattr(guider, "RunCache", lambda limit: limits.append(limit) or make(limit))
    estimate = guider.HeliosGuider.sampling_memory

    def sampling_memory(self):
        needed.append(estimate(self)[0])
        return estimate(self)

    monkeypatch.setattr(guider.HeliosGuider, "sampling_memory", sampling_memory)
    with dynamic_vram() as vram:
        model = load_model(str(folder), "bf16")
        latents(model)
        vram.size = int(needed[0]) + 1  # of the card: enough, were nothing on it
        latents(model)
    assert limits[0] == limits[1] > 0


def test_compiled_code_has_a_model_of_its_own(folder, lora):
    """Run outside of the card, which torch cannot compile for."""
    schedule = replace(BASE, steps=(1,), guidance_scale=1.0)
    with torch.inference_mode():
        expected = latents(with_lora(load_model(str(folder), "fp32"), lora), schedule)
    with dynamic_vram():
        model = with_lora(load_model(str(folder), "fp32"), lora)
        compiled = compile_blocks(model, "aot_eager", "default", None)
        assert not is_dynamic(compiled) and compiled.model is not model.model
    compiled.load_device = torch.device("cpu")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        assert difference(latents(compiled, schedule), expected) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("_small_layers_travel_too")
@pytest.mark.parametrize("how", [Offloading("leaf"), Offloading("block", 1, "disk")], ids=str)
def test_group_offloading_is_left_alone(folder, lora, how):
    make = lambda: latents(with_lora(load_model(str(folder), "fp32", how), lora))  # noqa: E731
    expected = plainly(make)
    with dynamic_vram() as vram:
        assert torch.equal(make(), expected)
        assert not vram.models


def test_text_encoder_and_vae_give_the_same(folder):
    def both():
        clip, vae = load_text_encoder(folder, torch.float32), load_vae(folder)
        [(embedding, _)] = encode_prompt(clip, "A red fox.")
        image = vae.decode(noise())
        return is_dynamic(clip.patcher), is_dynamic(vae.patcher), embedding, image, vae.encode(image[0])

    _, _, *expected = plainly(both)
    with dynamic_vram(pages=40, churn=0):
        *dynamic, embedding, image, encoded = both()
        assert dynamic == [True, True]
        assert all(map(torch.equal, (embedding, image, encoded), expected))


@pytest.mark.usefixtures("_small_layers_travel_too")
def test_text_encoder_and_vae_can_be_offloaded(folder):
    """The VAE's file is in float32, and the card computes in bf16."""

    def both():
        clip, vae = load_text_encoder(folder, torch.float32), load_vae(folder)
        with offloaded_clip(clip, Offloading("leaf")) as encoder, offloaded_vae(vae, Offloading("leaf")) as decoder:
            assert isinstance(encoder.patcher, OffloadPatcher) and isinstance(decoder.patcher, OffloadPatcher)
            return encode_prompt(encoder, "A red fox.")[0][0], decoder.decode(noise())

    expected = plainly(both)
    with dynamic_vram():
        assert all(map(torch.equal, both(), expected))


def test_a_stream_in_which_decoding_unloads_the_model(folder, monkeypatch, tmp_path):
    frames = []
    monkeypatch.setattr(VideoFile, "write", lambda self, x: frames.append(torch.as_tensor(x).clone()))
    monkeypatch.setattr(VideoFile, "finish", lambda self: tmp_path / "no.mp4")
    monkeypatch.setattr(comfy.model_management, "vae_dtype", lambda *_: torch.float32)  # CPUs are slow in bf16
    start = beginning(66, width=64, height=64)

    def stream(unloads=False, **settings):
        frames.clear()
        parts = Parts(load_model(str(folder), "bf16"), load_vae(folder))
        if unloads:
            parts, _ = watched(parts, lambda number: comfy.model_management.unload_all_models())
        _, tail = stream_video(parts, start, **settings)
        return [*frames, tail["samples"]]

    expected = plainly(lambda: stream(overlap_decode="off"))
    assert len(expected) == 3
    with dynamic_vram(pages=120, churn=0):
        assert all(map(torch.equal, stream(unloads=True), expected))


def test_a_model_on_several_cards_is_known_by_all_its_weights(folder, lora):
    """To the nodes for LoRAs. Its source forgets it, or would never give its pins back."""
    with dynamic_vram():
        model = load_model(str(folder), "bf16")
        patchers = len(getattr(model.model, "dynamic_patchers", ()))
        remote = on_several_cards(model, ON_CPU)
        shapes = [
            {name: weight.shape for name, weight in each.model.diffusion_model.named_parameters()}
            for each in (model, remote)
        ]
        assert shapes[0] == shapes[1] and not is_dynamic(remote)
        assert with_lora(remote, lora).patches.keys() == with_lora(model, lora).patches.keys()
        del remote
        assert len(getattr(model.model, "dynamic_patchers", ())) == patchers
