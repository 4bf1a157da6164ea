"""What `scripts/convert_checkpoint.py` makes of a checkpoint, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comfyui_helios.helios_core.checkpoint import open_checkpoint, published_name
from comfyui_helios.helios_core.safetensors_file import read_tensors
from comfyui_helios.helios_core.transformer import HeliosTransformer
from support.checkpoints import ODD_HEADS, SMALL, assert_same, make_weights
from support.scripts import SCRIPTS

SCRIPT = SCRIPTS / "convert_checkpoint.py"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_the_converted_file_holds_what_a_direct_read_gives(script, official, tmp_path, capsys, dtype):
    target = tmp_path / "helios.safetensors"
    assert script.main([str(official), str(target), "--dtype", dtype]) == 0
    assert "distilled" in capsys.readouterr().out
    source, made = open_checkpoint(official), open_checkpoint(target)
    model = HeliosTransformer(ODD_HEADS, dtype=script.CHOICES[dtype], device="meta").state_dict()
    direct = dict(read_tensors(source.tensors, lambda name: model[name].dtype))
    published = {published_name(name): tensor for name, tensor in direct.items()}
    assert (made.config, made.variant) == (ODD_HEADS, "distilled")
    assert_same(dict(read_tensors(made.tensors, lambda name: model[name].dtype)), direct)
    assert_same(load_file(target), published)  # safetensors itself reads it
    assert published["norm_out.scale_shift_table"].dtype == torch.float32
    assert direct["blocks.0.ffn.net.2.weight"].dtype == script.CHOICES[dtype]
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["helios_config"])["num_layers"] == 2
        assert file.metadata()["helios_variant"] == "distilled"
    assert [x.name for x in tmp_path.iterdir()] == [target.name]


def test_every_tensor_of_a_converted_file_is_aligned(script, tmp_path):
    """A bias of 63 bf16 values would put what follows it between two fp32 places."""
    config = dataclasses.replace(SMALL, ffn_dim=63)
    save_file(make_weights(config), tmp_path / "a.safetensors")
    assert script.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    made = open_checkpoint(tmp_path / "b.safetensors")
    assert made.config == config
    assert [name for name, x in made.tensors.items() if x.offset % x.dtype.itemsize] == []


def test_a_converted_file_converts_again(script, official, tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    assert script.main([str(official), str(first)]) == 0
    assert script.main([str(first), str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_the_variant_can_be_told_where_the_source_does_not_say(script, official, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    assert script.main([str(official / "transformer"), str(target), "--variant", "mid"]) == 0
    assert open_checkpoint(target).variant == "mid"
    assert script.main([str(official), str(tmp_path / "b.safetensors"), "--variant", "mid"]) == 1
    assert "says that it is distilled, not mid" in capsys.readouterr().err


def test_an_existing_target_is_kept_without_force(script, official, tmp_path, capsys):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")
    assert script.main([str(official), str(target)]) == 1
    assert "--force" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert script.main([str(official), str(target), "--force"]) == 0
    assert script.main([str(target), str(target), "--force"]) == 1
    assert "is itself read" in capsys.readouterr().err
    assert open_checkpoint(target).variant == "distilled"


def test_a_failure_leaves_the_folder_as_it_was(script, official, tmp_path, capsys, monkeypatch):
    def fail(*args):
        yield from list(read_tensors(*args))[:5]
        raise OSError("No space left on device")

    target = tmp_path / "a.safetensors"
    target.write_bytes(b"mine")
    monkeypatch.setattr(script, "read_tensors", fail)
    assert script.main([str(official), str(target), "--force"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [x.read_bytes() for x in tmp_path.iterdir()] == [b"mine"]


def test_a_full_disk_is_noticed_before_anything_is_written(script, official, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert script.main([str(official), str(tmp_path / "a.safetensors")]) == 1
    assert "0.00 GB free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_script_says_what_is_wrong_without_a_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(tmp_path / "a.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert (
        run.stderr
        == f"error: {tmp_path} holds no .safetensors file. Give a folder of a Helios repository, such as Helios-Mid.\n"
    )
