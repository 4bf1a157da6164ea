"""LoRA files in every trainer's names, by the host's own loaders: as if merged by hand, and as diffusers loads them."""

from __future__ import annotations

import comfy.hooks
import comfy.latent_formats
import comfy.lora
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

import nodes
from comfyui_helios.helios_core import lora_names as names
from comfyui_helios.host import compat
from comfyui_helios.host.model.loading import load_model
from harness import oracle
from harness.errors import difference
from support.loras import (
    IN_BLOCKS,
    LAYOUTS,
    RANK,
    WAN_NAMES,
    added,
    in_layout,
    matrices,
    merged,
    product,
    training_metadata,
    wan,
)
from support.runs import QUICK, conditioning, make_distilled, sample
from support.videos import CASES, CHUNKS, TOLERANCE, reference_video

ALPHAS = {"without alpha": None, "with alpha": 1.0}
STRENGTH = 0.8
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_distilled(tmp_path_factory.mktemp("lora") / "Helios-Distilled")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "fp32")


@pytest.fixture
def loras(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The video with all of `matrices()` merged, by alpha."""
    videos = {}
    for alpha in ALPHAS.values():
        scale = 1.0 if alpha is None else alpha / RANK
        deltas = {module: scale * product(*pair) for module, pair in matrices().items()}
        changed = merged(tmp_path_factory.mktemp("merged"), added(deltas, STRENGTH))
        videos[alpha] = sample(changed, QUICK)["samples"]
    return videos


def loaded(model, folder, tensors, strength=STRENGTH):
    """The MODEL behind the host's own node Load LoRA (Model Only)."""
    save_file(tensors, folder / "a.safetensors")
    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, "a.safetensors", strength)[0]


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_equals_merging_by_hand(model, loras, by_hand, layout, alpha):
    patched = loaded(model, loras, in_layout(layout, matrices(), alpha))
    assert difference(sample(patched, QUICK)["samples"], by_hand[alpha]) <= CLOSE


def test_a_wrong_mapping_or_a_forgotten_alpha_would_show(model, loras, by_hand):
    parts = matrices()
    q, k = "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"
    exchanged = in_layout(LAYOUTS["musubi"], {**parts, q: parts[k], k: parts[q]})
    assert difference(sample(loaded(model, loras, exchanged), QUICK)["samples"], by_hand[None]) > 1e-3
    assert difference(by_hand[1.0], by_hand[None]) > 1e-3


@pytest.mark.parametrize("left_out", WAN_NAMES)
def test_every_module_counts(model, by_hand, left_out):
    """Or the tests above would say nothing of it."""
    parts = {module: pair for module, pair in matrices().items() if module != left_out}
    patched, _ = comfy.sd.load_lora_for_models(model, None, in_layout(LAYOUTS["Wan's own"], parts), STRENGTH, 0)
    assert difference(sample(patched, QUICK)["samples"], by_hand[None]) > 100 * CLOSE


def test_wan_fun_files_without_the_mark_by_which_the_host_knows_them(model, tmp_path):
    parts = matrices(["blocks.1.attn1.to_v"])
    patched, _ = comfy.sd.load_lora_for_models(model, None, in_layout(LAYOUTS["Wan-Fun"], parts), 1.0, 0)
    deltas = {module: product(*pair) for module, pair in parts.items()}
    expected = sample(merged(tmp_path, added(deltas)), QUICK)["samples"]
    assert difference(sample(patched, QUICK)["samples"], expected) <= CLOSE


@pytest.mark.parametrize("name", ["Helios' training", "Wan's own", "musubi"])
def test_a_lora_beside_the_weights_equals_merging_by_hand(model, by_hand, name):
    """As Load LoRA (Bypass) of newer hosts (0.33) applies it: added to what each layer returns."""
    load = getattr(comfy.sd, "load_bypass_lora_for_models", None) or pytest.skip("this host only merges")
    patched, _ = load(model, None, in_layout(LAYOUTS[name], matrices(), 1.0), STRENGTH, 0.0)
    assert difference(sample(patched, QUICK)["samples"], by_hand[1.0]) < CLOSE


@pytest.mark.parametrize("name", ["Helios' training", "Wan's own", "musubi"])
def test_lora_hooks_know_the_layouts(model, by_hand, name):
    hooks = comfy.hooks.create_hook_lora(in_layout(LAYOUTS[name], matrices()), STRENGTH, 0.0)
    positive, negative = oracle.prompts()
    video = sample(model, QUICK, positive=conditioning(positive, hooks=hooks), negative=conditioning(negative))
    assert difference(video["samples"], by_hand[None]) <= CLOSE


# What diffusers' loader reads, it reads as the host does


@pytest.mark.parametrize(
    ("name", "alpha"),
    [("Helios' training", None), ("Helios' training", 1.0), ("Wan's own", None), ("Wan's own", 1.0), ("musubi", 1.0)],
)
def test_equals_diffusers(model, loras, name, alpha):
    parts = matrices(IN_BLOCKS)  # its conversions know no other modules that a video would show
    case = CASES["distilled 1, 1, 1"]
    tensors = in_layout(LAYOUTS[name], parts, alpha)
    reference = oracle.transformer(0)
    if name == "Helios' training" and alpha is not None:  # diffusers looks for it in the metadata only
        save_file(in_layout(LAYOUTS[name], parts), loras / "theirs.safetensors", training_metadata(parts, alpha))
    else:
        save_file(tensors, loras / "theirs.safetensors", {"format": "pt"})
    pipe = oracle.pipeline("distilled", reference)
    pipe.load_lora_weights(str(loras), weight_name="theirs.safetensors")
    patched = loaded(model, loras, tensors, 1.0)
    video = comfy.latent_formats.Wan21().process_in(sample(patched, case.schedule, case.size, CHUNKS)["samples"])
    assert difference(video, reference_video(case, reference, *oracle.prompts())) <= TOLERANCE


# The replaced function


def test_no_module_has_a_name_of_another(model):
    weights = model.model.diffusion_model.state_dict()
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    spelled = [name for module in modules for name in names.spellings(module)]
    assert len(spelled) == len(set(spelled))
    assert {names.wan_name(module) for module in WAN_NAMES} == set(map(wan, WAN_NAMES))


class OtherModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model_config = type("Config", (), {"unet_config": {}})
        self.diffusion_model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})


def test_the_maps_of_other_models_stay_as_they_are():
    ours = comfy.lora.model_lora_keys_unet
    original = ours.__wrapped__
    expected = original(OtherModel(), {})
    assert ours(OtherModel(), {}) == expected
    assert ours(OtherModel()) == expected
    given = {"kept": "x"}
    assert ours(OtherModel(), given) is given and given == {**expected, "kept": "x"}


def test_a_map_that_is_not_given_is_a_new_one(model):
    assert "transformer.blocks.0.attn1.to_q" in comfy.lora.model_lora_keys_unet(model.model)
    assert "transformer.blocks.0.attn1.to_q" not in comfy.lora.model_lora_keys_unet(OtherModel())


def test_names_that_are_there_already_stay(model):
    key_map = comfy.lora.model_lora_keys_unet(model.model, {"lora_unet_blocks_0_self_attn_q": "mine"})
    assert key_map["lora_unet_blocks_0_self_attn_q"] == "mine"


def test_it_is_replaced_once(model):
    before = comfy.lora.model_lora_keys_unet
    compat.offer_lora_names()
    assert comfy.lora.model_lora_keys_unet is before
    assert not hasattr(before.__wrapped__, compat.NAMES_OFFERED)


def test_what_other_arguments_a_host_gives_it_are_handed_on(monkeypatch):
    calls = []

    def newer(model, key_map, *args, **kwargs):
        calls.append((args, kwargs))
        return key_map

    monkeypatch.setattr(comfy.lora, "model_lora_keys_unet", newer)
    compat.offer_lora_names()
    comfy.lora.model_lora_keys_unet(OtherModel(), {}, "more", flag=True)
    assert calls == [(("more",), {"flag": True})]
