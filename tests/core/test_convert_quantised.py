"""What `scripts/convert_checkpoint.py --quant fp8_scaled` makes, and what it says of its errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_helios.helios_core.checkpoint import open_checkpoint, published_name
from comfyui_helios.helios_core.loading import load_transformer
from comfyui_helios.helios_core.safetensors_file import read_tensors
from support.checkpoints import ODD_HEADS, make_weights
from support.quantised import FP8, block_layers, write_scaled

LONG = dataclasses.replace(ODD_HEADS, num_layers=8)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of eight blocks, as a folder."""
    folder = tmp_path_factory.mktemp("long")
    save_file(make_weights(LONG), folder / "a.safetensors")
    (folder / "config.json").write_text(json.dumps(LONG.to_dict()))
    return folder


def quantised_blocks(file: Path) -> set[int]:
    return {int(layer.split(".")[1]) for layer in open_checkpoint(file).quantised}


def test_an_official_folder_becomes_scaled_fp8(script, official, tmp_path):
    target = tmp_path / "a.safetensors"
    assert script.main([str(official), str(target), "--quant", "fp8_scaled", "--keep"]) == 0
    source, made = open_checkpoint(official), open_checkpoint(target)
    full = dict(read_tensors(source.tensors, lambda name: torch.float32))
    layers = block_layers(full)
    assert (made.config, made.variant) == (ODD_HEADS, "distilled")
    assert {name: dict(layer.settings) for name, layer in made.quantised.items()} == dict.fromkeys(layers, FP8)
    stored = load_file(target)  # safetensors itself reads it
    for name, tensor in full.items():
        found = stored[published_name(name)].float()
        if (layer := name.removesuffix(".weight")) in layers:
            found = found * stored[f"{layer}.weight_scale"]
        assert (found - tensor).norm() <= 0.04 * tensor.norm(), name
    with safe_open(target, "pt") as file:  # ComfyUI 0.3.75 looks a layer up by its name without prefix
        assert json.loads(file.metadata()["_quantization_metadata"])["layers"].keys() == set(layers)


def test_the_same_file_loads_as_the_same_network_everywhere(script, official, tmp_path):
    target = tmp_path / "a.safetensors"
    script.main([str(official), str(target), "--quant", "fp8_scaled", "--keep"])
    dtypes = {name: x.dtype for name, x in load_transformer(target).state_dict().items()}
    assert dtypes["blocks.0.ffn.net.2.weight"] == torch.float8_e4m3fn
    assert dtypes["blocks.0.ffn.net.2.weight_scale"] == torch.float32
    assert dtypes["blocks.0.ffn.net.2.bias"] == dtypes["condition_embedder.time_proj.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table.weight"] == dtypes["blocks.0.norm2.weight"] == torch.float32


def test_the_report_has_the_error_of_each_matrix_the_worst_first(script, official, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    script.main([str(official), str(target), "--quant", "fp8_scaled", "--keep"])
    title, _columns, *lines = (tmp_path / "a.report.txt").read_text().splitlines()
    assert title.startswith("20 matrices of a.safetensors in fp8_scaled")
    errors = {layer: float(error) for error, layer in map(str.split, lines)}
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    weight = dict(read_tensors(open_checkpoint(official).tensors, lambda name: torch.float32))
    stored = load_file(target)
    layer = "blocks.1.attn1.to_v"
    rounded = stored[f"{layer}.weight"].float() * stored[f"{layer}.weight_scale"]
    expected = (rounded - weight[f"{layer}.weight"]).norm() / weight[f"{layer}.weight"].norm()
    assert errors[layer] == pytest.approx(float(expected), rel=1e-3)
    assert f"at most {100 * errors[lines[0].split()[1]]:.2f} % ({lines[0].split()[1]})" in capsys.readouterr().out


def test_a_report_that_is_there_is_kept(script, official, tmp_path, capsys):
    target, report = tmp_path / "a.safetensors", tmp_path / "a.report.txt"
    report.write_text("of another file")
    quantise = [str(official), str(target), "--quant", "fp8_scaled", "--keep"]
    assert script.main(quantise) == 1
    assert f"{report} exists. Choose another name, or overwrite it with --force." in capsys.readouterr().err
    assert not target.exists() and report.read_text() == "of another file"
    assert script.main([*quantise, "--force"]) == 0
    assert report.read_text() != "of another file"


@pytest.mark.parametrize(
    ("keep", "blocks"),
    [
        (None, {3, 4}),
        ([], set(range(8))),
        (["0", "-1"], set(range(1, 7))),
        (["attn1", "ffn.net.0", "1"], {0, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_what_is_kept_can_be_chosen(script, long, tmp_path, keep, blocks):
    target = tmp_path / "a.safetensors"
    assert (
        script.main([str(long), str(target), "--quant", "fp8_scaled", *([] if keep is None else ["--keep", *keep])])
        == 0
    )
    assert quantised_blocks(target) == blocks
    if keep and "attn1" in keep:
        assert {layer.split(".", 2)[2] for layer in open_checkpoint(target).quantised} == {
            *(f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")),
            "ffn.net.2",
        }


def test_hosts_can_be_asked_to_multiply_in_full_precision(script, official, tmp_path):
    target = tmp_path / "a.safetensors"
    script.main([str(official), str(target), "--quant", "fp8_scaled", "--keep", "--full-precision"])
    settings = next(iter(open_checkpoint(target).quantised.values())).settings
    assert settings == FP8 | {"full_precision_matrix_mult": True}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "of 2 blocks is left to quantise: without --keep the first 3 and the last 3 blocks stay in full"),
        (["--keep", "0", "1"], "of 2 blocks is left to quantise: --keep names all of it"),
        (["--keep", "attn3"], "--keep attn3: there is no such thing in a model of 2 blocks"),
        (["--keep", "7"], "--keep 7: there is no such thing"),
    ],
)
def test_what_cannot_be_kept_is_refused(script, official, tmp_path, capsys, arguments, said):
    assert script.main([str(official), str(tmp_path / "a.safetensors"), "--quant", "fp8_scaled", *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--keep", "0"], ["--full-precision"], ["--quant", "fp8_scaled", "--dtype", "fp8_e4m3fn"]]
)
def test_options_that_do_not_go_together_are_refused(script, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), str(tmp_path / "a.safetensors"), *arguments])
    assert "--quant" in capsys.readouterr().err


def test_a_quantised_source_is_refused(script, tmp_path, capsys):
    weights = make_weights()
    file = write_scaled(tmp_path / "a.safetensors", weights, block_layers(weights))
    assert script.main([str(file), str(tmp_path / "b.safetensors")]) == 1
    assert "a.safetensors is quantised already. Convert the weights that it was made from" in capsys.readouterr().err


def test_a_matrix_with_nan_is_refused(script, tmp_path, capsys):
    weights = make_weights()
    weights["blocks.1.attn1.to_q.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    assert script.main([str(tmp_path / "a.safetensors"), str(target), "--quant", "fp8_scaled", "--keep"]) == 1
    assert "has NaN or infinity in blocks.1.attn1.to_q.weight" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["a.safetensors"]
