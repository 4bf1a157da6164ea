"""Quantised checkpoints as the host's MODEL: its own quantised layers in the blocks, ordinary ones everywhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_model_merging import ModelSave
from safetensors.torch import save_file

from comfyui_helios.helios_core.checkpoint import open_checkpoint, published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.loading import load_transformer
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model import offload_patcher
from comfyui_helios.host.model.compiled import compile_blocks
from comfyui_helios.host.model.loading import converted_on_reading, load_model
from comfyui_helios.host.model.lora import add_lora
from comfyui_helios.host.model.offload_patcher import Offloading
from harness.errors import difference, mean_error
from harness.tiny import TEXT_DIM, make_vae
from support.checkpoints import REPACK, make_weights
from support.core_videos import CONFIG
from support.core_videos import network as loud_network
from support.loras import IN_BLOCKS, LAYOUTS, in_layout, matrices
from support.quantised import KINDS, block_layers, unscaled, write_scaled
from support.runs import QUICK, sample
from support.streams import GRAPH, Parts, beginning, cleaned_up, stream_video, watched


@pytest.fixture(scope="module")
def weights():
    return {published_name(name): x for name, x in loud_network().state_dict().items()}


@pytest.fixture(scope="module")
def layers(weights):
    return block_layers(weights)


@pytest.fixture(scope="module")
def file(tmp_path_factory, weights, layers):
    return str(write_scaled(tmp_path_factory.mktemp("models") / "a.safetensors", weights, layers, config=CONFIG))


def kinds_of(model):
    """By name: the dtype in which a parameter is stored, and whether it is the host's quantised kind."""
    kinds = {}
    for name, x in model.model.diffusion_model.named_parameters():
        quantised = isinstance(x, QuantizedTensor)
        kinds[name] = (x._qdata.dtype if quantised else x.dtype, quantised)
    return kinds


@pytest.mark.parametrize(
    ("choice", "rest"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp8_e4m3fn", torch.float32)]
)
def test_every_dtype_is_what_the_file_and_the_widget_say(file, layers, choice, rest):
    """auto is float32 on this processor, as for files that are not quantised."""
    for name, kind in kinds_of(load_model(file, choice)).items():
        expected = (rest, False)
        if name.removesuffix(".weight") in layers:
            expected = (torch.float8_e4m3fn, True)
        elif "time_embedder" in name or "table" in name or "norm2" in name:
            expected = (torch.float32, False)
        assert kind == expected, name


def test_from_disk_it_runs_in_the_dtype_that_the_rest_is_stored_in(file):
    checkpoint = open_checkpoint(Path(file))
    assert converted_on_reading(checkpoint, "fp32") is None
    assert "of the weights are stored in another dtype" in converted_on_reading(checkpoint, "bf16")


def test_only_quantised_layers_are_of_the_hosts_quantised_kind(tmp_path, weights, layers):
    """It would keep all others in the dtype that it computes in."""
    file = write_scaled(tmp_path / "a.safetensors", weights, layers[:3], config=CONFIG)
    model = load_model(str(file), "bf16").model.diffusion_model
    ordinary = {name for name, x in model.named_modules() if isinstance(x, comfy.ops.disable_weight_init.Linear)}
    assert ordinary.isdisjoint(layers[:3])
    assert ordinary >= {*layers[3:], "proj_out"}


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, weights, layers):
    """The MODEL of the weights that the file stands for."""
    target = tmp_path_factory.mktemp("rounded") / "b.safetensors"
    return load_model(str(write_scaled(target, unscaled(weights, layers), [], config=CONFIG)), "fp32")


@pytest.fixture(scope="module")
def expected(rounded):
    return sample(rounded, QUICK)["samples"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_makes_the_video_of_the_weights_it_stands_for(tmp_path, weights, layers, expected, kind):
    prefix, names = {"metadata": ("", REPACK), "marks": ("model.diffusion_model.", {})}.get(kind, ("transformer.", {}))
    path = tmp_path / "a.safetensors"
    write_scaled(path, weights, layers, kind=kind, config=CONFIG, prefix=prefix, names=names)
    assert difference(sample(load_model(str(path), "fp32"), QUICK)["samples"], expected) <= 1e-5


def test_the_cores_layer_is_as_exact_as_the_hosts(file, weights):
    name, half = "blocks.1.ffn.net.2", torch.bfloat16
    networks = load_transformer(file), load_model(file, "bf16").model.diffusion_model
    x = torch.randn(200, CONFIG.ffn_dim, generator=torch.Generator().manual_seed(0))
    rounded = unscaled(weights, [name])[f"{name}.weight"]
    exact = torch.nn.functional.linear(x.to(half).float(), rounded, weights[f"{name}.bias"].to(half).float())
    with torch.inference_mode():
        core, host = (mean_error(network.get_submodule(name)(x.to(half)).float(), exact) for network in networks)
    assert core <= 1.1 * host
    assert host <= 1.1 * core
    assert 1e-4 < core < 1e-2  # bf16's, not fp8's


@pytest.fixture
def all_layers_travel(monkeypatch):
    monkeypatch.setattr(offload_patcher, "KEEP_BELOW", 0)


OFFLOADINGS = [Offloading("block"), Offloading("block", 2, "disk"), Offloading("leaf"), Offloading("leaf", 1, "disk")]


@pytest.mark.usefixtures("all_layers_travel")
@pytest.mark.parametrize("how", OFFLOADINGS, ids=str)
def test_under_group_offloading_the_latents_are_the_same(file, how):
    model = load_model(file, "fp32", how)
    assert torch.equal(sample(model, QUICK)["samples"], sample(load_model(file, "fp32"), QUICK)["samples"])
    travelling = [weight for group in model.offloader.groups for weight in group.in_buffer]
    scaled = [weight for weight in travelling if isinstance(weight.own, QuantizedTensor)]
    assert len(scaled) == 20
    assert all(weight.size == weight.own.numel() + 4 for weight in scaled)  # a byte for each value, and the scale


def with_lora(model):
    """A LoRA on every matrix of the blocks, loud enough to tell."""
    tensors = in_layout(LAYOUTS["Helios' training"], matrices(IN_BLOCKS))
    return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0]


@pytest.mark.usefixtures("all_layers_travel")
@pytest.mark.parametrize("how", [None, OFFLOADINGS[0], OFFLOADINGS[3]], ids=str)
def test_a_lora_does_what_it_does_to_the_decoded_weights(file, rounded, expected, how):
    change = sample(with_lora(rounded), QUICK)["samples"] - expected
    model = load_model(file, "fp32", how)
    found = sample(with_lora(model), QUICK)["samples"] - sample(model, QUICK)["samples"]
    # The host rounds what it has patched to fp8 again; group offloading decodes it and leaves it so.
    assert (found - change).square().mean() < (0.25 if how is None else 1e-8) * change.square().mean()
    assert change.abs().max() > 1e-3


@pytest.mark.usefixtures("all_layers_travel")
def test_an_offloaded_lora_leaves_nothing_behind(file):
    model = load_model(file, "fp32", OFFLOADINGS[0])
    before = sample(model, QUICK)["samples"]
    assert not torch.equal(sample(with_lora(model), QUICK)["samples"], before)
    comfy.model_management.unload_all_models()
    layers = [x for x in model.model.modules() if isinstance(getattr(x, "weight", None), QuantizedTensor)]
    assert [layer.weight_function for layer in layers] == [[]] * 20
    assert torch.equal(sample(model, QUICK)["samples"], before)


@pytest.mark.usefixtures("all_layers_travel")
@pytest.mark.parametrize("how", [None, OFFLOADINGS[0]], ids=str)
@pytest.mark.parametrize("change", [lambda model: model, with_lora], ids=["as it is", "with a LoRA"])
def test_a_model_that_was_unloaded_outside_of_inference_mode_runs_again(file, how, change):
    """As the host does when it is asked to free memory between two runs."""
    with torch.inference_mode():
        model = change(load_model(file, "fp32", how))
        before = sample(model, QUICK)["samples"]
    comfy.model_management.unload_all_models()
    with torch.inference_mode():
        assert torch.equal(sample(model, QUICK)["samples"], before)


def test_compiled_blocks_give_the_same_latents(file, expected):
    torch.compiler.reset()
    compiled = compile_blocks(load_model(file, "fp32"), "aot_eager", "default", None)
    assert difference(sample(compiled, QUICK)["samples"], expected) <= 1e-5


def test_our_lora_loader_knows_the_sizes_of_quantised_weights(file, tmp_path):
    save_file(in_layout(LAYOUTS["Wan's own"], matrices(IN_BLOCKS)), tmp_path / "lora.safetensors")
    said = []
    notes = SimpleNamespace(inform=said.append, warn=said.append)
    add_lora(load_model(file, "fp32"), str(tmp_path / "lora.safetensors"), 1.0, notes)
    assert said == ["40 of 40 tensors of lora.safetensors take effect: a LoRA of rank 4, in the names of Wan."]


@pytest.mark.parametrize("patched", [False, True], ids=["as it is", "with a LoRA"])
def test_what_save_model_writes_loads_as_the_same_model(tmp_path, patched, monkeypatch):
    """By its shapes: the host's metadata says nothing of the model."""
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: (str(tmp_path), "saved", 0, "", ""))
    config = TransformerConfig(num_attention_heads=1, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=1)
    weights = {name: 0.1 * weight for name, weight in make_weights(config).items()}
    layers = block_layers(weights)[1:]
    both = torch.zeros(2, dtype=torch.float8_e4m3fn)  # for: not to be multiplied in fp8
    file = write_scaled(tmp_path / "a.safetensors", weights, layers, kind="legacy", scaled_fp8=both)
    model = load_model(str(file), "fp32")
    if patched:
        key = f"diffusion_model.{layers[0]}.weight"
        model.add_patches({key: ("diff", (0.1 * torch.randn(128, 128),))}, 1.0)
    ModelSave().save(model, "saved")
    again = load_model(str(*tmp_path.glob("saved*")), "fp32")
    assert kinds_of(again) == kinds_of(model)
    assert again.model.model_config.quantised == model.model.model_config.quantised
    assert difference(sample(again, QUICK)["samples"], sample(model, QUICK)["samples"]) <= 1e-5


class Killed(BaseException):
    pass


def test_a_stream_that_was_cut_off_goes_on_to_the_same_video(file, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("comfyui_helios.host.messages.tell", lambda text, node: said.append(text))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    make_vae(7).save_pretrained(tmp_path / "parts" / "vae")
    vae, start = load_vae(tmp_path / "parts"), beginning(66)

    def kill(call):
        raise Killed

    resumed = {"resume": True, "unique_id": "5", "prompt": GRAPH}
    _, whole = stream_video(Parts(load_model(file, "fp32"), vae), start)
    with pytest.raises(Killed):
        stream_video(watched(Parts(load_model(file, "fp32"), vae), kill)[0], start, **resumed)
    _, again = stream_video(Parts(load_model(file, "fp32"), vae), start, **resumed)
    cleaned_up()
    assert said[-1] == "Resumed after chunk 1 of 2."
    assert torch.equal(again["samples"], whole["samples"])
