"""Parts of an official folder on a second card, by the nodes that newer hosts have for it (0.33)."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import comfy.model_management
import pytest
import torch

from comfyui_helios.helios_core.schedule import MID
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.host.sockets.text_encoding import encode_prompt
from harness import oracle
from harness.tiny import make_official_folder
from support.runs import conditioning, make_distilled, sample

GUIDED = replace(MID, steps=(1, 1, 1), zero_init=False)
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


# MultiGPU CFG Split


@pytest.fixture
def split(monkeypatch):
    """Shares a model out among two cards, which are the CPU under two names: one has the prompt, one the negative."""
    multigpu = pytest.importorskip("comfy.multigpu", reason="this host shares out no guidance")
    cards = [torch.device("cpu"), torch.device("cpu:0")]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *args, **more: cards)
    return lambda model: multigpu.create_multigpu_deepclones(model, len(cards))


def test_a_guidance_node_gets_denoised_latents_of_every_card(tmp_path, split):
    """Not the flow, from the copies on the other cards."""
    model = load_model(str(make_distilled(tmp_path)), "fp32")
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    with torch.inference_mode():
        whole, shared = (sample(each, GUIDED)["samples"] for each in (model, split(model)))
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-4 * whole.abs().max().item())


def test_offloaded_copies_leave_their_cards_when_the_video_is_made(tmp_path, split):
    model = split(load_model(str(make_distilled(tmp_path)), "fp32", Offloading("block")))
    with torch.inference_mode():
        sample(model, GUIDED)
    copies = model.get_additional_models_with_key("multigpu")
    assert [patcher.offloader.installed for patcher in (model, *copies)] == [False, False]


def test_hook_keyframes_begin_again_in_every_chunk_on_every_card(tmp_path, split):
    """A LoRA hook on both prompts, which fades: the second chunk begins with all of it."""
    model = load_model(str(make_distilled(tmp_path)), "fp32")
    rng = torch.Generator().manual_seed(1)
    shapes = {"lora_A": (4, 48), "lora_B": (48, 4)}
    lora = {f"diffusion_model.blocks.0.attn1.to_q.{n}.weight": torch.randn(s, generator=rng) for n, s in shapes.items()}
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.3))
    hooks.set_keyframes_on_hooks(hook_kf=keyframes)
    prompts = [conditioning(prompt, hooks=hooks) for prompt in oracle.prompts()]
    with torch.inference_mode():
        whole, shared = (
            sample(each, GUIDED, chunks=2, positive=prompts[0], negative=prompts[1])["samples"]
            for each in (model, split(model))
        )
    torch.testing.assert_close(shared, whole, rtol=0, atol=1e-4 * whole.abs().max().item())
