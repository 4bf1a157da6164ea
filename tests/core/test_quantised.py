"""Scaled fp8 weights: every way of writing them reads the same, and computes what the weights they stand for do."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfyui_helios.helios_core.checkpoint import CONFIG_KEY, open_checkpoint, published_name
from comfyui_helios.helios_core.loading import load_transformer
from comfyui_helios.helios_core.offload import Offloader
from comfyui_helios.helios_core.quantised import read_parts
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.helios_core.scaled_linear import ScaledLinear, dequantise, quantise, relative_error, scale_of
from harness.errors import difference
from support.checkpoints import REPACK, make_weights
from support.core_videos import CONFIG, QUICK, network, video
from support.quantised import FP8, KINDS, block_layers, mark, scaled, unscaled, write_scaled


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {published_name(name): x for name, x in network().state_dict().items()}


def layers_of(path: Path) -> dict[str, dict[str, Any]]:
    return {name: dict(layer.settings) for name, layer in open_checkpoint(path).quantised.items()}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_transformer(path)
    return str(error.value)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("names", [{}, REPACK], ids=["diffusers", "repack"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_in_every_layout_loads_the_same(tmp_path, kind, names, prefix):
    weights = make_weights(dtype=torch.bfloat16)
    layers = block_layers(weights)[3:]
    file = write_scaled(tmp_path / "a.safetensors", weights, layers, kind=kind, names=names, prefix=prefix)
    assert layers_of(file) == dict.fromkeys(layers, FP8)
    found = load_transformer(file).state_dict()
    expected = scaled(weights, layers)
    assert {published_name(name) for name in found} == expected.keys()
    for name, x in found.items():
        assert torch.equal(x.float(), expected[published_name(name)].float()), name
        if published_name(name) in {f"{layer}.weight" for layer in layers}:
            assert x.dtype == torch.float8_e4m3fn


def test_metadata_may_name_the_layers_without_the_prefix_of_their_tensors(tmp_path):
    weights = make_weights()
    layers = block_layers(weights)
    made = {f"model.diffusion_model.{name}": x for name, x in scaled(weights, layers).items()}
    told = {"layers": {**dict.fromkeys(layers, FP8), "text_encoders.umt5xxl.transformer.shared": FP8}}
    save_file(made, tmp_path / "a.safetensors", {"_quantization_metadata": json.dumps(told)})
    assert layers_of(tmp_path / "a.safetensors") == dict.fromkeys(layers, FP8)


def test_a_legacy_file_says_for_all_layers_how_to_multiply_and_may_have_measured_inputs(tmp_path):
    weights = make_weights()
    first, second = block_layers(weights)[:2]
    measured = {f"{first}.scale_input".replace(".", "__"): torch.tensor(0.25)}
    both = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = write_scaled(
        tmp_path / "a.safetensors", weights, [first, second], kind="legacy", scaled_fp8=both, **measured
    )
    assert layers_of(file)[second] == FP8 | {"full_precision_matrix_mult": True}
    found = open_checkpoint(file).quantised
    assert found[first].parts.keys() == {"weight_scale", "input_scale"}
    assert found[second].parts.keys() == {"weight_scale"}  # 1 stands for: not measured


def test_a_video_of_scaled_weights_is_that_of_the_weights_they_stand_for(tmp_path, weights):
    layers = block_layers(weights)
    file = write_scaled(tmp_path / "a.safetensors", weights, layers, config=CONFIG)
    save_file(unscaled(weights, layers), tmp_path / "b.safetensors", {CONFIG_KEY: json.dumps(CONFIG.to_dict())})
    found, expected = (
        video(load_transformer(x, torch.float32), QUICK, "cpu") for x in (file, tmp_path / "b.safetensors")
    )
    assert difference(found, expected) <= 1e-6
    assert difference(found, video(network(), QUICK, "cpu")) > 1e-3  # rounding tells


@pytest.mark.parametrize(("kind", "name"), [("metadata", "input_scale"), ("legacy", "scale_input")])
def test_a_measured_input_changes_nothing_where_nobody_multiplies_in_fp8(tmp_path, weights, kind, name):
    layers = block_layers(weights)
    measured = {f"{layers[0]}.{name}".replace(".", "__"): torch.tensor(0.25)}
    files = [
        write_scaled(tmp_path / f"{len(more)}.safetensors", weights, layers, kind=kind, config=CONFIG, **more)
        for more in ({}, measured)
    ]
    expected, found = (load_transformer(file).state_dict() for file in files)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), x.float()) for name, x in expected.items())


def test_layers_outside_of_the_blocks_are_decoded_as_they_are_read(tmp_path, weights):
    layers = ["condition_embedder.time_proj", "condition_embedder.time_embedder.linear_1", "proj_out"]
    file = write_scaled(tmp_path / "a.safetensors", weights, layers, kind="legacy", config=CONFIG)
    network = load_transformer(file)
    assert not any(isinstance(module, ScaledLinear) for module in network.modules())
    expected = unscaled(weights, layers)
    for layer, dtype in zip(layers, (torch.bfloat16, torch.float32, torch.bfloat16), strict=True):
        weight = network.get_parameter(f"{layer}.weight")
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[f"{layer}.weight"].to(dtype))


@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("gather", [True, False])
def test_scaled_layers_travel_with_their_scales(tmp_path, weights, level, gather):
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights), config=CONFIG)
    model = load_transformer(file, torch.float32)
    expected = video(model, QUICK, "cpu", chunks=1)
    with Offloader(model, "cpu", level=level, gather=gather, keep_below=0):
        assert torch.equal(video(model, QUICK, "cpu", chunks=1, prepare_prompts=False), expected)


def test_quantising_uses_the_range_and_reports_its_error():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    scale = scale_of(weight)
    quantised = quantise(weight, scale)
    assert 224 <= quantised.float().abs().max() <= 448
    error = (quantised.float() * scale - weight).norm() / weight.norm()
    assert relative_error(weight, quantised, scale) == pytest.approx(float(error), rel=1e-4)
    assert 0.01 < error < 0.04  # three bits of mantissa


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_is_exact_in_every_dtype(dtype):
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)) * 0.02
    scale = scale_of(weight)
    quantised = quantise(weight, scale)
    assert torch.equal(dequantise(quantised, scale, dtype).float(), dequantise(quantised, scale, torch.float32))


@pytest.mark.parametrize(("largest", "scale"), [(448.0, 1.0), (449.0, 2.0), (7.0, 2.0**-6), (0.0, 1.0)])
def test_a_scale_is_the_least_power_of_two_that_does(largest, scale):
    assert scale_of(torch.tensor([[-largest, largest / 3]])) == scale


def test_a_matrix_of_zeros_stays_one():
    zeros = torch.zeros(4, 4)
    assert not quantise(zeros, scale_of(zeros)).float().any()
    assert relative_error(zeros, quantise(zeros, scale_of(zeros)), scale_of(zeros)) == 0


# What is refused

LAYER = "blocks__0__attn1__to_q"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight_scale": None}, "blocks.0.attn1.to_q.weight has no weight_scale"),
        ({"weight_scale": torch.ones(128, 1)}, "blocks.0.attn1.to_q.weight_scale (128, 1) of float32 for () of"),
        ({"weight_scale": torch.ones((), dtype=torch.int8)}, "weight_scale () of int8 for () of float32 or bfloat16"),
        ({"weight": torch.ones(128, 128)}, "blocks.0.attn1.to_q.weight (128, 128) of float32 for (128, 128) of float8"),
        ({"weight": torch.ones(128, 64).to(torch.float8_e4m3fn)}, "to_q.weight (128, 64) of float8_e4m3fn for (128, 1"),
        (
            {"comfy_quant": mark(FP8 | {"convrot": True, "convrot_groupsize": "all"})},
            "to_q.weight has convrot_groupsize 'all' for 128 col",
        ),
        ({"weight_scale_2": torch.ones(())}, "1 tensors of quantised layers that are missing or not as their format"),
    ],
)
def test_parts_that_are_missing_or_of_another_kind_are_refused(tmp_path, changed, said):
    changes = {f"{LAYER}__{part}": x for part, x in changed.items()}
    weights = make_weights()
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights), kind="marks", **changes)
    assert said in refusal(file)


def with_w4a8(**changed: Any) -> dict[str, torch.Tensor]:
    """Weights with one layer in asym_w4a8_int8; changed: its parts, and the settings of its mark."""
    settings = {"format": "asym_w4a8_int8"} | changed.pop("settings", {})
    parts = {
        "weight": torch.zeros(128, 64, dtype=torch.int8),
        "weight_s_rel": torch.ones(128, 8).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.ones(128),
        "weight_codebook": torch.linspace(-1, 1, 16),
        "comfy_quant": mark({"convrot_groupsize": 64} | settings),
    } | changed
    return make_weights() | {f"blocks.0.attn1.to_q.{part}": x for part, x in parts.items() if x is not None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "which only ComfyUI computes with"),
        ({"weight_codebook": None}, "which only ComfyUI computes with"),
        ({"settings": {"group_size": 32}, "weight_s_rel": torch.ones(128, 4)}, "which only ComfyUI computes with"),
        ({"weight_s_channel": None}, "to_q.weight has no weight_s_channel"),
        ({"settings": {"group_size": 32}}, "weight_s_rel (128, 8) of float8_e4m3fn for (128, 4) of float8_e4m3fn or"),
        ({"settings": {"group_size": 24}}, "to_q.weight has group_size 24 for 128 columns"),
        ({"settings": {"params": {"group_size": [16]}}}, "to_q.weight has group_size [16] for 128 columns"),
        ({"settings": {"convrot_groupsize": 256}}, "to_q.weight has convrot_groupsize 256 for 128 columns"),
        ({"settings": {"convrot_groupsize": 32}}, "to_q.weight has convrot_groupsize 32 for 128 columns"),
        ({"weight_correction": torch.ones(8, 128)}, "are unexpected: blocks.0.attn1.to_q.weight_correction"),
    ],
)
def test_of_four_bit_weights_the_groups_must_fit_the_columns(tmp_path, changed, said):
    save_file(with_w4a8(**changed), tmp_path / "a.safetensors")
    assert said in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("part", "value", "refused"),
    [("weight_s_channel", -1.0, True), ("weight_codebook", -1.0, False), ("weight_codebook", float("nan"), True)],
)
def test_a_codebook_has_values_below_zero_and_a_scale_has_none(tmp_path, part, value, refused):
    save_file(with_w4a8(**{part: torch.full((16 if part == "weight_codebook" else 128,), value)}), tmp_path / "a")
    [layer] = open_checkpoint(tmp_path / "a").quantised.values()
    with pytest.raises(CheckpointError, match="has values that are no scale") if refused else nullcontext():
        read_parts(layer)


def test_a_legacy_file_without_a_scale_is_refused(tmp_path):
    weights = make_weights()
    layers = block_layers(weights)
    file = write_scaled(tmp_path / "a.safetensors", weights, layers, kind="legacy", **{f"{LAYER}__scale_weight": None})
    assert "blocks.0.attn1.to_q.weight has no weight_scale" in refusal(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_none_is_refused(tmp_path, value):
    weights = make_weights()
    broken = {f"{LAYER}__weight_scale": torch.tensor(value)}
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights), **broken)
    assert "'blocks.0.attn1.to_q.weight_scale' has values that are no scale" in refusal(file)


@pytest.mark.parametrize("name", ["ternary", ["fp8"], None])
@pytest.mark.parametrize("kind", ["metadata", "marks"])
def test_an_unknown_format_is_refused_by_its_name(tmp_path, kind, name):
    weights = make_weights()
    unknown = {"format": name}
    if kind == "marks":
        save_file(weights | {"blocks.0.attn1.to_q.comfy_quant": mark(unknown)}, tmp_path / "a.safetensors")
    else:
        text = json.dumps({"layers": {"blocks.0.attn1.to_q": unknown}})
        save_file(weights, tmp_path / "a.safetensors", {"_quantization_metadata": text})
    said = f"has blocks.0.attn1.to_q in the quantised format {name!r}, which is none of float8"
    assert said in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (torch.ones(3), "'blocks.0.attn1.to_q.comfy_quant' of float32 in the shape (3,), which is no text"),
        (torch.full((5000,), 32, dtype=torch.uint8), "in the shape (5000,), which is no text"),
        (torch.tensor([123, 34], dtype=torch.uint8), "'blocks.0.attn1.to_q.comfy_quant' of"),
    ],
)
def test_a_damaged_mark_is_refused(tmp_path, settings, said):
    save_file(make_weights() | {"blocks.0.attn1.to_q.comfy_quant": settings}, tmp_path / "a.safetensors")
    assert said in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"blocks.0.attn1.to_q": "fp8"}}'])
def test_damaged_metadata_is_refused(tmp_path, text):
    save_file(make_weights(), tmp_path / "a.safetensors", {"_quantization_metadata": text})
    assert "The metadata '_quantization_metadata' of" in refusal(tmp_path / "a.safetensors")


def test_scales_that_nothing_explains_are_refused(tmp_path):
    """ComfyUI 0.3.75's own Save Model leaves such a file behind."""
    save_file(make_weights() | {"blocks.0.attn1.to_q.weight_scale": torch.ones(())}, tmp_path / "a.safetensors")
    assert "has scales (blocks.0.attn1.to_q.weight_scale) of layers that it does not say are quantised" in refusal(
        tmp_path / "a.safetensors"
    )


def test_a_layer_that_is_no_matrix_cannot_be_quantised(tmp_path):
    weights = make_weights() | {"blocks.0.norm2.comfy_quant": mark(FP8)}
    save_file(weights, tmp_path / "a.safetensors")
    assert "says that blocks.0.norm2 is quantised, which is no matrix" in refusal(tmp_path / "a.safetensors")


def test_a_format_that_only_comfyui_computes_with_is_refused_without_it(tmp_path):
    made = make_weights() | {
        "blocks.0.attn1.to_q.weight": torch.zeros(128, 128, dtype=torch.int8),
        "blocks.0.attn1.to_q.weight_scale": torch.ones(128, 1),
        "blocks.0.attn1.to_q.comfy_quant": mark({"format": "int8_tensorwise"}),
    }
    save_file(made, tmp_path / "a.safetensors")
    assert "has layers in int8_tensorwise, which only ComfyUI computes with" in refusal(tmp_path / "a.safetensors")


def test_formats_with_more_than_one_scale_are_refused_outside_of_the_blocks(tmp_path):
    made = make_weights() | {"proj_out.comfy_quant": mark({"format": "nvfp4"})}
    save_file(made, tmp_path / "a.safetensors")
    assert "has proj_out in nvfp4; outside of the blocks only" in refusal(tmp_path / "a.safetensors")


def test_other_ways_of_quantising_are_refused(tmp_path):
    save_file(make_weights() | {"blocks.0.attn1.to_q.weight.absmax": torch.ones(8)}, tmp_path / "a.safetensors")
    assert "is quantised in a way that is not ComfyUI's (blocks.0.attn1.to_q.weight.absmax)" in refusal(
        tmp_path / "a.safetensors"
    )


def test_a_truncated_file_is_refused(tmp_path):
    weights = make_weights()
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights))
    file.write_bytes(file.read_bytes()[:-100])
    assert "is truncated" in refusal(file)
