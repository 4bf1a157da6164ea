"""Nodes of the host and of other packs on a Helios MODEL or LATENT: they work, or are refused by their name."""

from __future__ import annotations

import copy
import logging
import re
import unittest.mock
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from comfy_extras.nodes_context_windows import ContextWindowsManualNode, WanContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel

import nodes
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID
from comfyui_helios.host import messages
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.network import HeliosNetwork
from comfyui_helios.host.sampling.inputs import source_warning
from comfyui_helios.nodes.decode import HeliosChunkedVAEDecode
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from harness import oracle
from harness.errors import difference
from support import streams
from support.runs import QUICK, conditioning, make_distilled, run_node, sample

SCHEDULES = {
    "base": replace(BASE, steps=(8,)),
    "mid": replace(MID, steps=(4, 4, 4)),
    "distilled": replace(DISTILLED, steps=(4, 4, 4)),
}
EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
SIZE = (128, 64)  # at 64x64 the lowest stage has one token a frame


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(make_distilled(tmp_path_factory.mktemp("models") / "Helios-Distilled")), "fp32")


# Caches of steps

CACHES = pytest.mark.parametrize("cache", [EasyCacheNode, LazyCacheNode], ids=["EasyCache", "LazyCache"])


def cached(model, cache, threshold=1e9):
    """With this threshold it skips every step that it can compare with two before it."""
    return cache.execute(model.clone(), threshold, 0.0, 1.0, False).result[0]


@CACHES
@EACH_SCHEDULE
def test_a_cache_of_steps_begins_anew_in_every_stage_of_every_chunk(model, cache, schedule, monkeypatch):
    """Which steps run the network: the same ones in every chunk, and the first two of every stage."""
    ran = []
    predict = HeliosNetwork._predict

    def watch(self, x, timestep, *args, **kwargs):
        ran.append((tuple(x.shape[-2:]), timestep[0].item()))
        return predict(self, x, timestep, *args, **kwargs)

    monkeypatch.setattr(HeliosNetwork, "_predict", watch)
    chunks = 3
    schedule = replace(schedule, amplify_first_chunk=False, zero_init=False)
    video = sample(cached(model, cache), schedule, SIZE, chunks)["samples"]
    assert torch.isfinite(video).all()
    each = [ran[i : i + len(ran) // chunks] for i in range(0, len(ran), len(ran) // chunks)]
    assert len(each) == chunks and each[0] == each[1] == each[2]
    assert len(each[0]) == 2 * len(schedule.steps)
    assert sorted({shape for shape, _ in each[0]}) == sorted({shape for shape, _ in each[0][::2]})


@CACHES
def test_a_cache_counts_the_steps_of_the_whole_video(model, cache, caplog):
    caplog.set_level(logging.INFO)
    sample(cached(model, cache), SCHEDULES["base"], SIZE, 3)
    [line] = [line for line in caplog.messages if " - skipped " in line]
    assert re.search(r"skipped 6/8 steps \(4\.00x speedup\)", line)  # a chunk's, on average


@CACHES
def test_a_cache_that_never_skips_changes_nothing(model, cache):
    expected = sample(model, SCHEDULES["mid"], SIZE, 2)["samples"]
    assert difference(sample(cached(model, cache, 0.0), SCHEDULES["mid"], SIZE, 2)["samples"], expected) < 1e-5


# Functions on the MODEL


@EACH_SCHEDULE
@pytest.mark.parametrize("size", [(64, 64), SIZE], ids=str)
def test_functions_of_the_model_are_given_contiguous_latents(model, schedule, size):
    """As CFGZeroStarAndInit of KJNodes takes for granted."""
    seen = []

    def look(args):
        found = {name: x for name, x in args.items() if isinstance(x, torch.Tensor) and x.ndim == 5}
        seen.extend(name for name, x in found.items() if not x.is_contiguous())
        return found.get("denoised", args["cond"])

    clone = model.clone()
    clone.set_model_sampler_cfg_function(look, disable_cfg1_optimization=True)
    clone.set_model_sampler_post_cfg_function(look)
    sample(clone, schedule, size)
    assert seen == []


@EACH_SCHEDULE
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_guidance_scale_that_a_wrapper_sets_counts(model, schedule, hooked, scale):
    """As CFG Override does it; `hooked`: beside a node with a guidance function of its own."""

    def override(executor, *args, **kwargs):
        guider, given = executor.class_obj, executor.class_obj.cfg
        guider.cfg = scale
        try:
            return executor(*args, **kwargs)
        finally:
            guider.cfg = given

    clone = model.clone()
    if hooked:
        clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    schedule = replace(schedule, zero_init=False)
    expected = sample(clone, replace(schedule, guidance_scale=scale), SIZE)["samples"]
    clone = clone.clone()
    clone.add_wrapper(WrappersMP.PREDICT_NOISE, override)
    found = sample(clone, replace(schedule, guidance_scale=2.0), SIZE)["samples"]
    assert torch.equal(found, expected)


@EACH_SCHEDULE
def test_perp_neg_asks_with_a_prompt_of_its_own(model, schedule):
    """With the negative prompt for the empty one nothing is perpendicular: what is left is plain guidance."""
    _, negative = oracle.prompts()
    [patched] = PerpNeg.execute(model, conditioning(negative), 1.0).result
    schedule = replace(schedule, guidance_scale=3.0, guidance="cfg", zero_init=False)
    expected = sample(model, schedule, SIZE)["samples"]
    assert difference(sample(patched, schedule, SIZE)["samples"], expected) < 1e-4
    [patched] = PerpNeg.execute(model, conditioning(-negative), 1.0).result
    assert difference(sample(patched, schedule, SIZE)["samples"], expected) > 1e-3


def test_a_prompt_of_another_node_gets_no_history_after_the_run(model):
    sample(model, QUICK)
    assert model.model.extra_conds(cross_attn=oracle.prompts()[0]).keys() == {"c_crossattn"}


def at_defaults(node, model, **given):
    """The node on a model: newer hosts have more inputs."""
    inputs = node.define_schema().inputs
    values = {widget.id: getattr(widget, "default", None) for widget in inputs}
    values |= {
        widget.id: widget.default or widget.options[0] for widget in inputs if isinstance(widget, io.Combo.Input)
    }
    return node.execute(**{**values, "model": model, **given})


def with_start_image(model):
    """As ARVideoI2V of newer hosts (0.33) leaves a model."""
    clone = model.clone()
    clone.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.zeros(1)}
    return io.NodeOutput(clone)


def with_noise_scale(model):
    """As ModelNoiseScale of newer hosts (0.33) leaves a model."""
    clone = model.clone()
    sampling = type(model.get_model_object("model_sampling"))(model.model.model_config)
    sampling.noise_scale = 8.0
    clone.add_object_patch("model_sampling", sampling)
    return io.NodeOutput(clone)


REFUSED = {
    "context windows": (lambda m: at_defaults(ContextWindowsManualNode, m, dim=2)),
    "context windows of 5": (lambda m: at_defaults(WanContextWindowsManualNode, m, context_length=5)),
    "ScaleROPE": (lambda m: ScaleROPE.execute(m, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0)),
    "HyperTile": (lambda m: io.NodeOutput(*HyperTile.execute(m, 256, 2, 0, False))),  # a tuple, on this host
    "TomePatchModel": (lambda m: TomePatchModel.execute(m, 0.3)),
    "SelfAttentionGuidance": (lambda m: SelfAttentionGuidance.execute(m, 0.5, 2.0)),
    "ARVideoI2V": with_start_image,
    "ModelNoiseScale": with_noise_scale,
}
NAMES = {"context windows of 5": "IndexListContextHandler", "context windows": "IndexListContextHandler"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_helios_has_no_place_for_is_refused_before_anything_loads(model, name, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: pytest.fail("was loaded"))
    [patched] = REFUSED[name](model).result
    with pytest.raises(ValueError, match=rf"{NAMES.get(name, name)}.*Take"):
        sample(patched, QUICK)


def test_what_a_node_asks_the_network_for_during_a_step_is_refused_too(model):
    [patched] = PerturbedAttentionGuidance.execute(model, 3.0).result
    with pytest.raises(ValueError, match="PerturbedAttentionGuidance .*, which Helios does not have"):
        sample(patched, QUICK)


def test_a_replaced_part_that_helios_does_not_have_is_refused(model):
    clone = model.clone()
    clone.add_object_patch("diffusion_model.rope_embedder.k", 3)
    with pytest.raises(ValueError, match="replaces diffusion_model.rope_embedder.k, which Helios does not have"):
        sample(clone, QUICK)


def test_a_function_that_looks_for_parts_of_another_network_is_refused_by_its_name(model):
    """As TeaCache and MagCache do it."""

    def wrapper(apply_model, args):
        with unittest.mock.patch.multiple(model.model.diffusion_model, forward_orig=None):
            return apply_model(args["input"], args["timestep"], **args["c"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match=r"^test_a_function_.* changes forward_orig of a network, which Helios"):
        sample(clone, QUICK)


# What is in a LATENT


def inputs(frames=66, **more):
    prompts = map(conditioning, oracle.prompts())
    return run_node(HeliosHistoryInjection, *prompts, width=64, height=64, frames=frames, batch_size=1, **more)


def test_the_samples_of_a_latent_are_not_used_and_the_node_says_so(model, shown):
    positive, negative, empty = inputs()
    [made] = run_node(HeliosChunkedSampler, model, positive, negative, empty, QUICK, 3, unique_id="1")
    assert shown == []
    [again] = run_node(HeliosChunkedSampler, model, positive, negative, made, QUICK, 3, unique_id="1")
    assert "What is in `latent` is not used" in shown[0][0]
    assert torch.equal(again["samples"], made["samples"])


def test_a_start_image_that_the_sampler_is_not_given_is_told(model, parts, shown):
    """As from a graph for Wan: the prompts go straight to the sampler, and only the latent is connected."""
    past = map(conditioning, oracle.prompts())
    positive, negative, empty = inputs(vae=parts.vae, start_image=torch.rand(1, 64, 64, 3))
    run_node(HeliosChunkedSampler, model, positive, negative, empty, QUICK, 3, unique_id="1")
    assert shown == []
    run_node(HeliosChunkedSampler, model, *past, empty, QUICK, 3, unique_id="1")
    assert "What the video was to begin from is not used" in shown[0][0]


def test_prompts_that_bring_their_own_start_are_not_told_of_that_of_the_latent(model, parts):
    """As where two prompts share the size of one LATENT, or a node has copied a conditioning with all that is in it."""
    picture = {"vae": parts.vae, "start_image": torch.rand(1, 64, 64, 3)}
    going_on = {"previous": sample(model, QUICK), "history_long": 40}
    for start in (picture, going_on):
        positive, _, latent = inputs(**start)
        again, *_ = inputs(**start)
        [combined] = nodes.ConditioningCombine().combine(conditioning(oracle.prompts()[0]), positive)
        given = (positive, again, copy.deepcopy(positive), combined)
        assert [source_warning(each, latent) for each in given] == [None] * len(given)
        assert source_warning(positive, nodes.RepeatLatentBatch().repeat(latent, 2)[0]) is None


def test_prompts_of_another_link_of_a_chain_are_told(model, parts):
    """As where a group of nodes was copied, and its sampler kept the prompts of the first."""
    first = sample(model, QUICK)
    positive, negative, latent = inputs(frames=33, previous=first)
    [second] = run_node(HeliosChunkedSampler, model, positive, negative, latent, QUICK, 3)
    *_, third = inputs(frames=33, previous=second)
    pictured, *_ = inputs(vae=parts.vae, start_image=torch.rand(1, 64, 64, 3))
    for wrong in (positive, pictured):
        assert "What the video was to begin from is not used" in source_warning(wrong, third)


def test_a_noise_mask_is_refused(model):
    positive, negative, empty = inputs()
    [masked] = nodes.SetLatentNoiseMask().set_mask(empty, torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="has a noise mask"):
        run_node(HeliosChunkedSampler, model, positive, negative, masked, QUICK, 3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return streams.make_parts(tmp_path_factory.mktemp("parts"))


def test_trim_goes_by_the_length_alone(model, parts, shown):
    """A flipped or upscaled video has the frames that were asked for."""
    positive, negative, empty = inputs(frames=60)
    [made] = run_node(HeliosChunkedSampler, model, positive, negative, empty, QUICK, 3)
    [flipped] = nodes.LatentFlip().flip(made, "x-axis: vertically")
    images, _ = run_node(HeliosChunkedVAEDecode, flipped, parts.vae, True, unique_id="flipped")
    assert len(images) == 60
    assert shown == []


def test_a_latent_that_was_never_sampled_is_told(parts, shown):
    """As behind a sampler that is bypassed."""
    *_, empty = inputs(frames=33)
    run_node(HeliosChunkedVAEDecode, empty, parts.vae, False, unique_id="1")
    assert "this LATENT was never sampled" in shown[0][0]


def test_a_trim_that_cannot_be_is_told(model, parts, shown):
    latent = {"samples": torch.zeros(1, 16, 18, 8, 8)}  # as Load Latent has it
    images, _ = run_node(HeliosChunkedVAEDecode, latent, parts.vae, True, unique_id="loaded")
    assert len(images) == 66
    assert "Not trimmed: the LATENT does not say how many frames were asked for" in shown[0][0]
    run_node(HeliosChunkedVAEDecode, latent, parts.vae, False, unique_id="loaded")
    assert shown[-1][0] == messages.NOTHING
