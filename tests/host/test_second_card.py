"""Parts of an official folder on a second card, by the nodes that newer hosts have for it (0.33)."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.host.sockets.text_encoding import encode_prompt
from harness.tiny import make_official_folder

SECOND = torch.device("cuda:1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "Helios-Distilled"
    make_official_folder(path, "distilled")
    return path


@pytest.fixture
def select(monkeypatch):
    """Runs one of the host's nodes as if there were two cards; nothing is computed on them."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this host has no nodes that select a device")
    cards = [torch.device("cuda:0"), SECOND]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *args, **more: cards)
    return lambda node, part, device: getattr(nodes, node).execute(part, device).args[0]


def same_weights(patcher, other):
    weights, others = patcher.model.state_dict(), other.model.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(x, others[name]) for name, x in weights.items())


def test_a_vae_is_made_again_for_the_second_card(folder, select):
    vae = load_vae(folder)
    there = select("SelectVAEDeviceNode", vae, "gpu:1")
    assert there.patcher.load_device == there.device == SECOND
    assert there.first_stage_model is there.patcher.model is not vae.patcher.model
    assert same_weights(there.patcher, vae.patcher)
    latents = torch.rand(1, 16, 1, 4, 4)
    assert torch.equal(select("SelectVAEDeviceNode", there, "default").decode(latents), vae.decode(latents))


def test_a_text_encoder_is_made_again_for_the_second_card(folder, select):
    clip = load_text_encoder(folder, torch.float32)
    there = select("SelectCLIPDeviceNode", clip, "gpu:1")
    assert there.patcher.load_device == SECOND
    assert there.patcher.model is not clip.patcher.model and same_weights(there.patcher, clip.patcher)


@pytest.mark.parametrize("offloading", [None, Offloading("block")], ids=["whole", "offloaded"])
def test_a_model_is_made_again_for_the_second_card(folder, select, offloading):
    model = load_model(str(folder), "fp32", offloading)
    there = select("SelectModelDeviceNode", model, "gpu:1")
    assert there.load_device == SECOND and type(there) is type(model)
    assert there.model is not model.model and same_weights(there, model)


def test_prompts_are_encoded_by_the_model_that_was_made_for_the_card(folder):
    """Not by the first one, to which the host's node leaves it."""
    clip = load_text_encoder(folder, torch.float32)
    there = clip.clone()
    there.patcher = load_text_encoder(folder, torch.float32).patcher
    asked = []
    for part in (clip, there):
        part.patcher.model.umt5xxl.register_forward_hook(lambda model, *args: asked.append(model))
    encoded = [encode_prompt(part, "a red fox")[0][0] for part in (clip, there)]
    assert torch.equal(*encoded)
    assert asked == [clip.patcher.model.umt5xxl, there.patcher.model.umt5xxl]
