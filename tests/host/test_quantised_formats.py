"""Formats beyond scaled fp8: run where the host knows them, else refused with the version that does."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.quant_ops
import folder_paths
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_extras.nodes_model_merging import ModelSave
from safetensors.torch import save_file

from comfyui_helios.helios_core.checkpoint import published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.quantised import FORMATS
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.host.compat import quantised_formats
from comfyui_helios.host.model import offload_patcher
from comfyui_helios.host.model.compiled import compile_blocks
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.lora import add_lora
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.host.model.quantised import NOT_TRACED, SINCE
from harness.errors import difference
from harness.tiny import TEXT_DIM
from support.checkpoints import make_weights
from support.core_videos import network
from support.loras import IN_BLOCKS, LAYOUTS, in_layout, matrices
from support.quantised import block_layers, mark, write_scaled
from support.runs import QUICK, sample

NEWER = sorted(SINCE)


def known_here(known):
    """The newer formats, of which those are skipped that this host does or does not know."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                (name in quantised_formats()) != known,
                reason=f"this ComfyUI {'does not know' if known else 'knows'} {name}",
            ),
        )
        for name in NEWER
    ]


@pytest.fixture(scope="module")
def wide():
    """Of a width that every format can hold."""
    return network(attention_head_dim=32, rope_dim=(8, 12, 12))


@pytest.fixture(scope="module")
def weights(wide):
    return {published_name(name): x for name, x in wide.state_dict().items()}


def rotation(name):
    """What a file says of the columns that a format rotates together, for matrices of this width."""
    return {"convrot_groupsize": 64} if name in ("convrot_w4a4", "asym_w4a8_int8") else {}


@pytest.mark.parametrize("name", known_here(False))
def test_a_format_that_this_host_does_not_know_is_refused_with_the_version_that_does(tmp_path, wide, weights, name):
    layer = "blocks.1.ffn.net.2"
    made = weights | {f"{layer}.comfy_quant": mark({"format": name, **rotation(name)})}
    for part, kind in FORMATS[name](*weights[f"{layer}.weight"].shape).items():
        made[f"{layer}.{part}"] = torch.zeros(kind.shapes[0], dtype=kind.dtypes[0])
    file = write_scaled(tmp_path / "a.safetensors", made, [], config=wide.config, kind="marks")
    with pytest.raises(CheckpointError) as error:
        load_model(str(file))
    assert f"has blocks.1.ffn.net.2 in {name}, which this ComfyUI does not compute with" in str(error.value)
    assert f"needs ComfyUI {SINCE[name]} or newer" in str(error.value)


@pytest.mark.parametrize("name", ["float8_e4m3fn"])
def test_without_comfy_kitchen_nothing_quantised_runs_on_a_newer_host(tmp_path, wide, weights, name, monkeypatch):
    monkeypatch.setattr(comfy.quant_ops, "_CK_AVAILABLE", False, raising=False)
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights), config=wide.config)
    with pytest.raises(CheckpointError, match="with comfy-kitchen installed"):
        load_model(str(file))


def test_float8_on_a_device_without_it_is_refused(tmp_path, wide, weights, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("privateuseone"))
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights), config=wide.config)
    with pytest.raises(CheckpointError, match=r"in float8_e4m3fn, and DirectML has no such numbers\. Use bf16 weights"):
        load_model(str(file))


def packed(weights, layers, name):
    """The weights with these layers in a format, as the host itself packs them, and as it unpacks them again."""
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    made, unpacked = dict(weights), dict(weights)
    rotated = rotation(name)
    for layer in layers:
        quantised = QuantizedTensor.from_float(weights[f"{layer}.weight"], layout, scale="recalculate", **rotated)
        made |= {part: x.contiguous() for part, x in quantised.state_dict(f"{layer}.weight").items()}
        made[f"{layer}.comfy_quant"] = mark({"format": name, **rotated})
        unpacked[f"{layer}.weight"] = quantised.dequantize().contiguous()
    return made, unpacked


def with_lora(model, wide, folder):
    save_file(in_layout(LAYOUTS["Wan's own"], matrices(IN_BLOCKS, reference=wide)), folder / "lora.safetensors")
    said: list[str] = []
    notes = SimpleNamespace(inform=said.append, warn=said.append)
    patched = add_lora(model, str(folder / "lora.safetensors"), 1.0, notes)
    assert said == ["40 of 40 tensors of lora.safetensors take effect: a LoRA of rank 4, in the names of Wan."]
    return patched


@pytest.mark.parametrize("how", [None, Offloading("block"), Offloading("leaf", 1, "disk")], ids=str)
@pytest.mark.parametrize("name", known_here(True))
def test_a_format_that_this_host_knows_makes_the_video_of_the_weights_it_stands_for_and_takes_loras(
    tmp_path, wide, weights, name, how, monkeypatch
):
    monkeypatch.setattr(offload_patcher, "KEEP_BELOW", 0)
    made, unpacked = packed(weights, block_layers(weights), name)
    found = load_model(
        str(write_scaled(tmp_path / "a.safetensors", made, [], config=wide.config, kind="marks")), "fp32", how
    )
    expected = load_model(str(write_scaled(tmp_path / "b.safetensors", unpacked, [], config=wide.config)), "fp32")
    assert len([x for x in found.model.parameters() if isinstance(x, QuantizedTensor)]) == 20
    before = sample(expected, QUICK)["samples"]
    # Of the formats below, what is multiplied with is rounded, too, unless a LoRA is on top.
    allowed = {"int8_tensorwise": 0.02, "asym_w4a8_int8": 0.02, "convrot_w4a4": 0.2}.get(name, 1e-5)
    assert difference(sample(found, QUICK)["samples"], before) <= allowed
    change = sample(with_lora(expected, wide, tmp_path), QUICK)["samples"] - before
    error = sample(with_lora(found, wide, tmp_path), QUICK)["samples"] - before - change
    # The host packs what it has patched again; group offloading leaves it unpacked.
    assert error.norm() <= (0.5 if how is None else 1e-4) * change.norm()


@pytest.mark.parametrize("name", known_here(True))
def test_compiled_blocks_give_the_same_latents_or_are_left_as_they_are(tmp_path, wide, weights, name, monkeypatch):
    said = []
    monkeypatch.setattr("comfyui_helios.host.messages.tell", lambda text, node: said.append(text))
    torch.compiler.reset()
    made, _ = packed(weights, block_layers(weights), name)
    model = load_model(
        str(write_scaled(tmp_path / "a.safetensors", made, [], config=wide.config, kind="marks")), "fp32"
    )
    compiled = compile_blocks(model, "aot_eager", "default", name)
    reason = f"torch.compile cannot see into products in {name}."
    told = [f"Not compiled: {reason} The model runs as it is, with the same result."]
    assert said == (told if name in NOT_TRACED else [])
    assert (compiled is model) == (name in NOT_TRACED)
    assert difference(sample(compiled, QUICK)["samples"], sample(model, QUICK)["samples"]) <= 1e-5


@pytest.mark.parametrize("name", known_here(True))
def test_what_save_model_writes_loads_as_the_same_model(tmp_path, name, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: (str(tmp_path), "saved", 0, "", ""))
    # By its shapes, which tell a head of 128 alone: the host's metadata says nothing of the model.
    config = TransformerConfig(num_attention_heads=1, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=1)
    weights = make_weights(config)
    made, _ = packed(weights, block_layers(weights), name)
    file = write_scaled(tmp_path / "a.safetensors", made, [], config=config, kind="marks")
    model = load_model(str(file), "fp32")
    ModelSave().save(model, "saved")
    again = load_model(str(*tmp_path.glob("saved*")), "fp32")
    assert len([x for x in again.model.parameters() if isinstance(x, QuantizedTensor)]) == len(block_layers(weights))
    assert difference(sample(again, QUICK)["samples"], sample(model, QUICK)["samples"]) <= 1e-5
