"""Text encoder, tokenizer and VAE of a folder whose files claim what is not so: a sentence, and nothing is built."""

import json
import math
import os
import shutil

import comfy.sd
import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import save_file

from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.host.files import text_encoder as subject
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from harness.tiny import VOCAB_SIZE, make_official_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "Helios-Base"
    make_official_folder(path, "base")
    return path


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """A copy to harm, and a host that must not be asked to build anything."""
    monkeypatch.setattr(subject.comfy.sd, "load_text_encoder_state_dicts", lambda *_, **__: pytest.fail("was built"))
    return shutil.copytree(whole, tmp_path / "Helios-Base")


def refusal(load, folder):
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert "Download" in str(error.value)
    return str(error.value)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_weights(file, **changes):
    """Tensors replaced; `__` in a name stands for a dot."""
    tensors = parse(file.read_bytes())
    save_file(tensors | {name.replace("__", "."): x for name, x in changes.items()}, file)


@pytest.mark.parametrize("layers", [3, 1000, 10**6])
def test_blocks_of_the_text_encoder_are_counted_in_the_weights(copy, layers):
    edit(copy / "text_encoder" / "config.json", num_layers=layers)
    assert f"says that there are {layers} blocks, but the weights have 2" in refusal(load_text_encoder, copy)


@pytest.mark.parametrize("name", ["num_layers", "d_model", "d_kv", "num_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 10**9, 2.0, True, "64", None, [64], math.nan], ids=str)
def test_sizes_of_the_text_encoder_are_whole_numbers(copy, name, value):
    edit(copy / "text_encoder" / "config.json", **{name: value})
    message = refusal(load_text_encoder, copy)
    assert f"{name} " in message or "NaN is no number" in message


def test_an_epsilon_that_is_no_number_is_refused(copy):
    edit(copy / "text_encoder" / "config.json", layer_norm_epsilon="1e-6")
    assert "has layer_norm_epsilon '1e-6'" in refusal(load_text_encoder, copy)


def test_a_text_encoder_of_integers_is_refused(copy):
    file = copy / "text_encoder" / "model.safetensors"
    edit_weights(file, encoder__final_layer_norm__weight=torch.ones(32, dtype=torch.int8))
    assert "stores encoder.final_layer_norm.weight in a type that is none of" in refusal(load_text_encoder, copy)


def test_a_tokenizer_of_more_pieces_than_embeddings_is_refused(copy):
    edit(copy / "text_encoder" / "config.json", vocab_size=100)
    edit_weights(copy / "text_encoder" / "model.safetensors", shared__weight=torch.ones(100, 32))
    message = f"has {VOCAB_SIZE} pieces, but the text encoder knows 100: they do not belong together"
    assert message in refusal(load_text_encoder, copy)


@pytest.mark.parametrize("content", [b"", b"\0", b"no model" * 99, bytes(10_000)])
def test_a_tokenizer_that_is_none_is_refused(copy, content):
    (copy / "tokenizer" / "spiece.model").write_bytes(content)
    assert "spiece.model" in refusal(load_text_encoder, copy)


def test_a_huge_tokenizer_is_not_read(copy):
    os.truncate(copy / "tokenizer" / "spiece.model", 1_500_000_000)
    assert "has 1500000000 bytes, too many for a tokenizer" in refusal(load_text_encoder, copy)


@pytest.mark.skipif(os.name != "posix", reason="makes pipes and links")
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("text_encoder/config.json", load_text_encoder),
        ("text_encoder/model.safetensors", load_text_encoder),
        ("tokenizer/spiece.model", load_text_encoder),
        ("vae/config.json", load_vae),
        ("vae/diffusion_pytorch_model.safetensors", load_vae),
    ],
)
def test_pipes_and_devices_are_neither_waited_for_nor_read(copy, name, load):
    file = copy / name
    file.unlink()
    os.mkfifo(file)
    assert f"{file} is a pipe" in refusal(load, copy)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert f"{file} is a device" in refusal(load, copy)


@pytest.mark.parametrize("names", ["[]", '["a.safetensors"]', '"a.safetensors"', "5", "null"])
def test_an_index_without_a_map_is_refused(copy, names):
    (copy / "text_encoder" / "model.safetensors.index.json").write_text('{"weight_map": ' + names + "}")
    assert "has no 'weight_map'" in refusal(load_text_encoder, copy)


@pytest.mark.parametrize("width", [0, 2, 1000, 10**6])
def test_a_vae_that_claims_another_width_is_not_built(copy, monkeypatch, width):
    monkeypatch.setattr(comfy.sd, "VAE", lambda **_: pytest.fail("was built"))
    edit_weights(
        copy / "vae" / "diffusion_pytorch_model.safetensors", decoder__norm_out__gamma=torch.ones(width, 1, 1, 1)
    )
    assert "weights of another shape than a Wan 2.1 VAE: decoder.middle.0" in refusal(load_vae, copy)


def test_a_vae_of_another_shape_is_refused_by_name(copy):
    edit_weights(copy / "vae" / "diffusion_pytorch_model.safetensors", decoder__conv_in__bias=torch.ones(5))
    assert "weights of another shape than a Wan 2.1 VAE: decoder.conv1.bias" in refusal(load_vae, copy)
