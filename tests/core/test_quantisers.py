"""What `scripts/convert_checkpoint.py --quant` makes by comfy-kitchen: int8, w4a8 and nvfp4."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import comfy_kitchen.tensor
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_helios.helios_core.checkpoint import open_checkpoint
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.loading import load_transformer
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.helios_core.scaled_linear import quantise, relative_error, scale_of
from harness.tiny import TEXT_DIM
from support.checkpoints import make_weights
from support.quantised import block_layers

CONFIG = TransformerConfig(num_attention_heads=1, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=192, num_layers=2)
# Bits a weight, and the error of normally distributed ones: of fp8_scaled it is 2.7 %.
MADE = {"int8": (8.3, 0.01), "w4a8": (4.8, 0.08), "nvfp4": (4.6, 0.10)}

pytestmark = pytest.mark.skipif(
    not hasattr(comfy_kitchen.tensor, "AsymW4A8Int8Layout"), reason="an older ComfyUI's comfy-kitchen makes no w4a8"
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return make_weights(CONFIG)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    file = tmp_path_factory.mktemp("source") / "fp32.safetensors"
    save_file(weights, file)
    return file


def convert(script: Any, source: Path, target: Path, quant: str, *more: str) -> int:
    status: int = script.main([str(source), str(target), "--quant", quant, "--keep", *more])
    return status


def unpacked(file: Path, layer: str, shape: tuple[int, ...]) -> Tensor:
    """A layer's matrix, as comfy-kitchen unpacks what the file has of it."""
    quantised = open_checkpoint(file).quantised[layer]
    tensors, settings = load_file(file), dict(quantised.settings)
    name = settings.pop("format")
    parts = {part: tensors[f"{layer}.{part}"] for part in ("weight", *quantised.parts)}
    weight = parts.pop("weight")
    kinds = {"int8_tensorwise": "TensorWiseINT8Layout", "asym_w4a8_int8": "AsymW4A8Int8Layout"}
    kind = getattr(comfy_kitchen.tensor, kinds.get(name, "TensorCoreNVFP4Layout"))
    if name == "int8_tensorwise":
        told = {"scale": parts["weight_scale"]}
    elif name == "nvfp4":
        told = {"scale": parts["weight_scale_2"], "block_scale": parts["weight_scale"]}
    else:
        told = {"scale": parts["weight_s_rel"]}
        told |= {part: parts[f"weight_{part}"] for part in ("s_channel", "codebook")}
    made: Tensor = kind.dequantize(weight, kind.Params(orig_dtype=torch.float32, orig_shape=shape, **told, **settings))
    return made


@pytest.mark.parametrize("quant", MADE)
def test_a_file_holds_what_it_was_made_of_as_closely_as_its_report_says(script, source, weights, tmp_path, quant):
    target = tmp_path / "a.safetensors"
    assert convert(script, source, target, quant) == 0
    layers = block_layers(weights)
    assert open_checkpoint(target).quantised.keys() == set(layers)
    bits, most = MADE[quant]
    stored = load_file(target)
    size = sum(8 * x.nbytes for name, x in stored.items() if name.rpartition(".weight")[0] in layers)
    assert size <= bits * sum(weights[f"{layer}.weight"].numel() for layer in layers)
    lines = (tmp_path / "a.report.txt").read_text().splitlines()
    assert lines[0].startswith(f"20 matrices of a.safetensors in {quant}: ")
    errors = {layer: float(error) for error, layer in map(str.split, lines[2:])}
    for layer in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
        weight = weights[f"{layer}.weight"]
        error = (unpacked(target, layer, weight.shape) - weight).norm() / weight.norm()
        assert errors[layer] == pytest.approx(float(error), rel=0.01)
        assert error <= most


def test_int8_is_closer_to_the_original_than_fp8_of_the_same_size(script, source, weights, tmp_path):
    target = tmp_path / "a.safetensors"
    convert(script, source, target, "int8")
    weight = weights["blocks.0.attn1.to_q.weight"]
    scale = scale_of(weight)
    fp8 = relative_error(weight, quantise(weight, scale), scale)
    change = unpacked(target, "blocks.0.attn1.to_q", weight.shape) - weight
    assert change.norm() / weight.norm() <= 0.4 * fp8


@pytest.mark.parametrize("quant", ["int8", "w4a8"])
def test_columns_are_rotated_as_many_at_once_as_divide_them(script, source, tmp_path, quant):
    target = tmp_path / "a.safetensors"
    convert(script, source, target, quant)
    told = {name: layer.together["convrot_groupsize"] for name, layer in open_checkpoint(target).quantised.items()}
    assert told["blocks.0.ffn.net.2"] == told["blocks.0.attn1.to_q"] == 64  # 192 and 128 columns


def test_columns_that_cannot_be_rotated_are_refused_before_anything_is_written(script, tmp_path, capsys):
    save_file(make_weights(dataclasses.replace(CONFIG, ffn_dim=72)), tmp_path / "a.safetensors")
    assert convert(script, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "w4a8") == 1
    assert "A matrix of 72 columns cannot be asym_w4a8_int8, which wants a multiple of 16" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["a.safetensors"]


def test_without_comfy_kitchen_it_is_said_whose_python_has_it(script, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", None)
    assert convert(script, source, tmp_path / "a.safetensors", "int8") == 1
    said = capsys.readouterr().err
    assert "comfy-kitchen 0.2.31 or newer, which this Python does not have" in said
    assert "Run the script with that of ComfyUI 0.33 or newer" in said
    assert not list(tmp_path.iterdir())


def test_a_comfy_kitchen_that_makes_something_else_is_refused(script, source, tmp_path, capsys, monkeypatch):
    layout = comfy_kitchen.tensor.AsymW4A8Int8Layout

    def without_codebook(values: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": values, "_s_rel": params.scale, "_s_channel": params.s_channel}

    monkeypatch.setattr(layout, "state_dict_tensors", without_codebook)
    assert convert(script, source, tmp_path / "a.safetensors", "w4a8") == 1
    assert "makes something else of blocks.0.attn1.to_k than what ComfyUI 0.33 reads" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", ["int8", "w4a8"])
def test_what_is_always_multiplied_in_int8_cannot_be_asked_not_to(script, source, tmp_path, capsys, quant):
    with pytest.raises(SystemExit):
        convert(script, source, tmp_path / "a.safetensors", quant, "--full-precision")
    assert f"ComfyUI multiplies {quant} in int8 whatever a file says" in capsys.readouterr().err


def test_the_core_says_that_only_comfyui_computes_with_it(script, source, tmp_path):
    convert(script, source, tmp_path / "a.safetensors", "w4a8")
    with pytest.raises(CheckpointError, match="has layers in asym_w4a8_int8, which only ComfyUI computes with"):
        load_transformer(tmp_path / "a.safetensors")
