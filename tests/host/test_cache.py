"""What a run computes once: never another result, never another prompt's, and nothing left behind."""

import gc
import threading
import uuid
import weakref
from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from comfyui_helios.helios_core.generate import Run
from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.schedule import BASE, MID
from comfyui_helios.helios_core.video import PromptTrack
from comfyui_helios.host.model import run_cache as cache_module
from comfyui_helios.host.model.base_model import MEMORY_KEY, TEXT_CACHED_KEY
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.network import HeliosNetwork
from comfyui_helios.host.model.offload_patcher import offloading
from comfyui_helios.host.model.run_cache import CACHE_KEY, COMPILE_KEY, RunCache, can_cache
from comfyui_helios.host.sampling import guider as guider_module
from comfyui_helios.host.sampling.guider import HeliosGuider
from comfyui_helios.host.sampling.whole_video import collect
from comfyui_helios.host.sockets.conditioning import set_track
from harness import oracle
from support.runs import QUICK

GUIDED = replace(BASE, steps=(3,))
WIDTH, LAYERS, LENGTH = 48, 2, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.transformer(0).save_pretrained(path / "transformer")
    return str(path / "transformer")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, "fp32")


@pytest.fixture
def prepared(monkeypatch):
    """What the network was asked to prepare."""
    calls = []
    originals = {name: getattr(HeliosNetwork, name) for name in ("prepare_text", "prepare_history")}
    for name, original in originals.items():

        def counting(self, value, original=original, name=name):
            calls.append(name)
            return original(self, value)

        monkeypatch.setattr(HeliosNetwork, name, counting)
    return calls


def off(monkeypatch):
    monkeypatch.setattr(guider_module, "can_cache", lambda *args: False)


def make_guider(model, schedule=QUICK, chunks=2, positive=None, negative=None, batch=1, **values):
    prompts = oracle.prompts(batch=batch)
    guider = HeliosGuider(model, Run(schedule, Memory.empty(batch, 8, 8), chunks, torch.Generator().manual_seed(0)))
    guider.set_conds(positive or [[prompts[0], values]], negative or [[prompts[1], {}]])
    return guider


def sample(model, *args, **kwargs):
    return collect(make_guider(model, *args, **kwargs))


def lora(target):
    rng = torch.Generator().manual_seed(1)
    return {
        f"diffusion_model.{target}.lora_A.weight": torch.randn(4, WIDTH, generator=rng),
        f"diffusion_model.{target}.lora_B.weight": torch.randn(WIDTH, 4, generator=rng),
    }


def track(blend):
    first, second = oracle.prompts(seed=5)
    return set_track([[first, {}]], PromptTrack((first, second), (blend + 1, blend + 1), blend))


def halves():
    first, second = oracle.prompts()
    return [[first, {"start_percent": 0.0, "end_percent": 0.5}], [second, {"start_percent": 0.5, "end_percent": 1.0}]]


RUNS = {
    "one prompt": {},
    "guided": {"schedule": GUIDED},
    "guided, zero star": {"schedule": replace(MID, steps=(3, 2, 2))},
    "batch": {"schedule": GUIDED, "batch": 2},
    "prompts in turn": {"chunks": 2, "positive": track(0)},
    "prompts blended, guided": {"chunks": 7, "positive": track(3), "schedule": replace(BASE, steps=(2,))},
    "timestep ranges": {"positive": halves()},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_the_same_video_to_the_last_bit(model, monkeypatch, prepared, run):
    cached = sample(model, **run)
    assert "prepare_text" in prepared
    assert "prepare_history" in prepared
    off(monkeypatch)
    prepared.clear()
    assert torch.equal(sample(model, **run), cached)
    assert "prepare_text" not in prepared


def test_prompts_are_prepared_once_and_histories_once_a_chunk(model, prepared):
    sample(model, chunks=3)
    assert (prepared.count("prepare_text"), prepared.count("prepare_history")) == (1, 3)
    prepared.clear()
    sample(model, GUIDED, chunks=3)
    assert (prepared.count("prepare_text"), prepared.count("prepare_history")) == (1, 3)
    prepared.clear()
    sample(model, chunks=7, positive=track(3))  # the first, half-way, the second: a weight of 0 is still the first
    assert prepared.count("prepare_text") == 3
    prepared.clear()
    sample(model, positive=halves())
    assert prepared.count("prepare_text") == 2


def test_prompts_make_different_videos(model):
    """Without which the comparisons above would say nothing."""
    first, second = oracle.prompts(seed=5)
    one = sample(model, positive=[[first, {}]])
    assert not torch.allclose(one, sample(model, positive=[[second, {}]]), atol=1e-3)
    turned = sample(model, positive=track(0))
    assert torch.equal(turned[:, :, :9], one[:, :, :9])
    assert not torch.allclose(turned[:, :, 9:], one[:, :, 9:], atol=1e-3)


@pytest.mark.parametrize("target", ["blocks.1.attn2.to_k", "condition_embedder.text_embedder.linear_2"])
def test_a_lora_between_two_runs_is_seen(model, monkeypatch, target):
    plain = sample(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora(target), 1.0, 0.0)
    changed, again = sample(patched), sample(model)
    off(monkeypatch)
    assert torch.equal(changed, sample(patched))
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(again, plain)


def test_a_replaced_block_can_change_the_prompt(model, monkeypatch, prepared):
    def swap(args, extra):
        return extra["original_block"]({**args, "txt": args["txt"] * -2})

    clone = model.clone()
    for block in range(LAYERS):
        clone.set_model_patch_replace(swap, "dit", "double_block", block)
    changed = sample(clone)
    assert "prepare_text" in prepared
    assert not torch.allclose(changed, sample(model), atol=1e-3)
    off(monkeypatch)
    assert torch.equal(changed, sample(clone))


def test_a_wrapper_can_change_the_prompt_from_step_to_step(model):
    """Half of the steps see another prompt, though the host's ids stay the same."""
    other, count = oracle.prompts(seed=9)[0], []

    def swap(executor, x, timestep, context, *args, **kwargs):
        count.append(1)
        return executor(x, timestep, other if len(count) % 2 else context, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "swap", swap)
    assert not torch.allclose(sample(clone), sample(model), atol=1e-3)


def test_it_does_not_go_by_addresses(model):
    """The same memory with other values is another prompt; other memory with the same values is the same."""
    network, run_cache, cond = model.model.diffusion_model, RunCache(1e9), uuid.uuid4()
    first, second = oracle.prompts()
    buffer = first.clone()
    run_cache.start_chunk({cond: buffer})
    one = run_cache.text(network, [cond], buffer)
    run_cache.start_chunk({cond: first.clone()})
    assert run_cache.text(network, [cond], first.clone()) is one
    buffer.copy_(second)
    run_cache.start_chunk({cond: buffer})
    two = run_cache.text(network, [cond], buffer)
    assert torch.equal(two.tokens, network.prepare_text(second).tokens)
    assert len(run_cache.texts) == 1  # what is no longer asked for is gone


def test_a_batch_is_known_by_who_is_in_it_and_in_which_order(model):
    network, run_cache = model.model.diffusion_model, RunCache(1e9)
    ids, (first, second) = [uuid.uuid4(), uuid.uuid4()], oracle.prompts()
    run_cache.start_chunk(dict(zip(ids, (first, second), strict=True)))
    forward = run_cache.text(network, ids, torch.cat([first, second]))
    backward = run_cache.text(network, ids[::-1], torch.cat([second, first]))
    assert not torch.equal(forward.tokens, backward.tokens)
    assert torch.equal(forward.tokens.flip(0), backward.tokens)
    stranger = torch.randn_like(first)
    assert run_cache.text(network, [uuid.uuid4()], stranger) is stranger
    assert run_cache.text(network, [], stranger) is stranger


def test_it_holds_no_more_than_it_may(model):
    network, (first, second) = model.model.diffusion_model, oracle.prompts()
    ids, size = [uuid.uuid4(), uuid.uuid4()], network.prepare_text(first).nbytes
    run_cache = RunCache(size)
    run_cache.start_chunk(dict(zip(ids, (first, second), strict=True)))
    one = run_cache.text(network, ids[:1], first)
    run_cache.text(network, ids[1:], second)
    assert sum(text.nbytes for text in run_cache.texts.values()) == size
    assert run_cache.text(network, ids[:1], first) is not one
    both = torch.cat([first, second])
    assert run_cache.text(network, ids, both) is both  # larger than all there is


def test_two_cards_may_ask_at_once(model):
    """The second one comes while the first looks at how much there is: MultiGPU CFG Split has a thread for each."""

    class Held:
        @property
        def nbytes(self):
            if second.ident is None:
                second.start()
                second.join(0.2)
            return 1

    network, prompts, ids = model.model.diffusion_model, oracle.prompts(), [uuid.uuid4(), uuid.uuid4()]
    run_cache = RunCache(1e9)
    run_cache.start_chunk(dict(zip(ids, prompts, strict=True)))
    run_cache.texts["another"] = Held()
    second = threading.Thread(target=lambda: run_cache.text(network, ids[1:], prompts[1]))
    run_cache.text(network, ids[:1], prompts[0])
    run_cache.texts.pop("another")
    second.join()
    assert len(run_cache.texts) == 2


def test_prompts_are_left_out_where_there_is_no_room(model, monkeypatch, prepared):
    expected = sample(model)
    prepared.clear()
    right = comfy.model_management.get_free_memory
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 1000)
    assert torch.equal(sample(model), expected)
    assert "prepare_text" not in prepared
    assert right() > 1000


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_after_a_run(model, monkeypatch, fails):
    caches = []

    class Watched(RunCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(guider_module, "RunCache", Watched)
    guider = make_guider(model)
    if fails:

        def stop(chunk):
            raise RuntimeError("no room on the disk")

        with pytest.raises(RuntimeError, match="no room"):
            guider.denoise(stop)
    else:
        collect(guider)
    assert guider.cache is None
    assert CACHE_KEY not in guider.options["transformer_options"]
    gc.collect()
    assert [cache() for cache in caches] == [None]


def hooked(model):
    hooks = comfy.hooks.create_hook_lora(lora=lora("blocks.0.attn1.to_q"), strength_model=1.0, strength_clip=0.0)
    return model, {"hooks": hooks}


def wrapped(kind):
    def make(model):
        clone = model.clone()
        clone.add_wrapper_with_key(kind, "other", lambda executor, *args, **kwargs: executor(*args, **kwargs))
        return clone, {}

    return make


def with_function(name):
    def make(model):
        clone = model.clone()
        if name == "post_cfg":
            clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
        elif name == "unet":
            clone.set_model_unet_function_wrapper(
                lambda apply, args: apply(args["input"], args["timestep"], **args["c"])
            )
        else:
            clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "other", lambda *arguments: None)
        return clone, {}

    return make


CHANGERS = {
    "hooks on a prompt": hooked,
    **{f"{kind} wrapper": wrapped(kind) for kind in cache_module.WRAPPERS},
    **{name: with_function(name) for name in ("post_cfg", "unet", "prepare_state")},
}


@pytest.mark.parametrize("change", CHANGERS.values(), ids=CHANGERS.keys())
def test_it_keeps_out_of_the_way_of_what_can_change_inputs(model, prepared, change):
    patcher, values = change(model)
    sample(patcher, chunks=1, **values)
    assert "prepare_text" not in prepared


def test_offloaded_weights_are_not_reached_for(folder, prepared):
    patcher = load_model(folder, "fp32", offloading=offloading("block"))
    assert not can_cache(patcher, patcher.model_options, {})


def test_the_hosts_compile_wrapper_is_no_obstacle(model):
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, lambda executor, *args: executor(*args))
    assert can_cache(clone, clone.model_options, {})


def test_the_host_is_told_how_much_it_takes(model):
    def required(**kwargs):
        guider = make_guider(**kwargs)
        with_cache, _ = guider.sampling_memory()
        guider.sizes = lambda name: {MEMORY_KEY: guider.memory, TEXT_CACHED_KEY: False}
        return with_cache - guider.sampling_memory()[0]

    prompt = LENGTH * WIDTH * (2 * LAYERS + 1) * 4
    assert required(model=model) == prompt  # without guidance the negative is not asked for
    assert required(model=model, schedule=GUIDED) == 2 * prompt
    assert required(model=model, schedule=GUIDED, batch=3) == 6 * prompt
    assert required(model=hooked(model)[0], **hooked(model)[1]) == 0
