"""Whole models mixed, patched and saved by the host's own nodes: every tensor counts, by the names that files have."""

from __future__ import annotations

import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_merging import (
    CheckpointSave,
    ModelMergeBlocks,
    ModelMergeSimple,
    ModelSave,
    ModelSubtract,
)
from safetensors.torch import load_file, save_file

from comfyui_helios.helios_core.checkpoint import CONFIG_KEY
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model import offload_patcher
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from harness import oracle
from harness.errors import difference
from harness.tiny import TEXT_DIM, make_official_folder
from support.checkpoints import make_weights
from support.runs import QUICK, sample

AMPLIFIED = {"is_amplify_history": True}  # so that every kind of tensor is there
OFFLOADING = [None, Offloading("block"), Offloading("leaf")]


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes_and_tiny_layers_travel_too(monkeypatch):
    monkeypatch.setattr(offload_patcher, "KEEP_BELOW", 0)
    with torch.inference_mode():
        yield


def save(folder, model):
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "HeliosPyramidPipeline", "is_distilled": true}')
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [save(tmp_path_factory.mktemp("merged"), oracle.transformer(seed, **AMPLIFIED)) for seed in (0, 1)]


def by_hand(tmp_path, mix):
    """The video of a third model, each tensor of which is mix(name, tensor of the first, tensor of the second)."""
    first, second = (oracle.transformer(seed, **AMPLIFIED) for seed in (0, 1))
    others = dict(second.named_parameters())
    for name, weight in first.named_parameters():
        weight.data = mix(name, weight.data, others[name].data)
    return sample(load_model(save(tmp_path, first), "fp32"), QUICK)["samples"]


@pytest.mark.parametrize("how", OFFLOADING, ids=str)
def test_two_models_are_merged_in_every_tensor(folders, tmp_path, how):
    first, second = (load_model(folder, "fp32", how) for folder in folders)
    [merged] = ModelMergeSimple().merge(first, second, 0.25)
    expected = by_hand(tmp_path, lambda name, a, b: 0.25 * a + 0.75 * b)
    assert difference(sample(merged, QUICK)["samples"], expected) < 1e-5


def test_tables_are_patched_where_the_model_does_not_fit_whole(folders):
    first, second = (load_model(folder, "fp32") for folder in folders)
    [merged] = ModelMergeSimple().merge(first, second, 0.25)
    merged.load(torch.device("cpu"), lowvram_model_memory=1)
    for get in (lambda net: net.blocks[1].scale_shift_table, lambda net: net.blocks[0].attn1.history_key_scale):
        a, b = (get(model.model.diffusion_model).weight for model in (first, second))
        assert difference(get(merged.model.diffusion_model)(torch.device("cpu")), 0.25 * a + 0.75 * b) < 1e-6
    merged.detach()


@pytest.mark.parametrize("how", OFFLOADING, ids=str)
def test_the_tables_of_blocks_are_merged_with_their_block(folders, tmp_path, how):
    first, second = (load_model(folder, "fp32", how) for folder in folders)
    ratios = {"blocks.0.": 0.0, "blocks.1.": 0.75}
    [merged] = ModelMergeBlocks().merge(first, second, input=1.0, **ratios)

    def mix(name, a, b):
        ratio = next((ratio for start, ratio in ratios.items() if name.startswith(start)), 1.0)
        return ratio * a + (1 - ratio) * b

    assert difference(sample(merged, QUICK)["samples"], by_hand(tmp_path, mix)) < 1e-5


@pytest.mark.parametrize("how", OFFLOADING, ids=str)
def test_a_difference_of_models_as_a_lora_file_reaches_tables_by_their_published_names(folders, tmp_path, how):
    diffs = {
        name: 0.5 * torch.randn_like(weight)
        for name, weight in oracle.transformer(0, **AMPLIFIED).named_parameters()
        if name.endswith(("scale_shift_table", "history_key_scale"))
    }
    assert len(diffs) == 2 + 2 + 1
    lora = {f"diffusion_model.{name}.diff": diff for name, diff in diffs.items()}
    patched, _ = comfy.sd.load_lora_for_models(load_model(folders[0], "fp32", how), None, lora, 0.5, 0.0)
    expected = by_hand(tmp_path, lambda name, a, b: a + 0.5 * diffs.get(name, 0.0))
    assert difference(sample(patched, QUICK)["samples"], expected) < 1e-5


def saving_into(folder, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *_: (str(folder), "merged", 0, "", ""))


def test_a_saved_model_has_the_names_of_published_files(folders, tmp_path, monkeypatch):
    saving_into(tmp_path, monkeypatch)
    first, second = (load_model(folder, "fp32") for folder in folders)
    [difference_of_both] = ModelSubtract().merge(first, second, 1.0)
    ModelSave().save(difference_of_both, "merged")
    [file] = tmp_path.glob("*.safetensors")
    names = [*oracle.transformer(0, **AMPLIFIED).state_dict(), CONFIG_KEY]
    assert load_file(file).keys() == {f"model.diffusion_model.{name}" for name in names}


def test_a_saved_model_whose_heads_no_shape_tells_loads_as_the_same_model(folders, tmp_path, monkeypatch):
    """Helios-Tiny's too: taken for heads of 128, it made gray videos."""
    saving_into(tmp_path, monkeypatch)
    model = load_model(folders[0], "fp32")
    ModelSave().save(model, "merged")
    again = load_model(str(*tmp_path.glob("*.safetensors")), "fp32")
    assert again.model.diffusion_model.config == model.model.diffusion_model.config
    assert difference(sample(again, QUICK)["samples"], sample(model, QUICK)["samples"]) < 1e-5


def test_a_checkpoint_saved_with_text_encoder_and_vae_loads_again(tmp_path, monkeypatch):
    """By its shapes: the host's metadata says nothing of the model, and most tensors are not the model's."""
    saving_into(tmp_path, monkeypatch)
    make_official_folder(tmp_path / "parts", "base")
    config = TransformerConfig(num_attention_heads=1, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=1)
    weights = {name: 0.1 * weight for name, weight in make_weights(config).items()}
    save_file(weights, tmp_path / "parts" / "model.safetensors")
    model = load_model(str(tmp_path / "parts" / "model.safetensors"), "fp32")
    clip, vae = load_text_encoder(tmp_path / "parts", torch.float32), load_vae(tmp_path / "parts")
    CheckpointSave().save(model, clip, vae, "merged")
    [file] = tmp_path.glob("*.safetensors")
    assert len(load_file(file)) > 2 * len(weights)
    again = load_model(str(file), "fp32")
    assert again.model.diffusion_model.config == config
    assert difference(sample(again, QUICK)["samples"], sample(model, QUICK)["samples"]) < 1e-5
