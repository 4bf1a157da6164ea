"""Helios as the host's MODEL: the same videos as the reference, through everything the host puts around a model."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import comfy.cli_args
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import pytest
import torch

from comfyui_helios.helios_core.checkpoint import open_checkpoint
from comfyui_helios.helios_core.schedule import BASE, MID
from comfyui_helios.host.model.loading import DTYPES, choose_dtype, load_model
from comfyui_helios.host.model.network import CastTable, lending
from comfyui_helios.host.sockets.latent import video_state
from harness import oracle
from harness.errors import difference
from support.runs import QUICK, conditioning, make_distilled, sample
from support.videos import CASES, CHUNKS, TOLERANCE, reference_video


@pytest.fixture(scope="module")
def reference():
    return oracle.transformer(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_distilled(tmp_path_factory.mktemp("models") / "Helios-Distilled")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "fp32")


def normalised(latent):
    return comfy.latent_formats.Wan21().process_in(latent["samples"])


@pytest.mark.parametrize(
    "name", ["base unipc guided", "base euler", "mid", "mid with plain guidance", "distilled 2, 2, 2 amplified"]
)
def test_equals_the_reference(model, reference, name):
    """One of each kind; all of CASES are tests/core/test_generate.py's."""
    case = CASES[name]
    video = normalised(sample(model, case.schedule, case.size, CHUNKS))
    assert difference(video, reference_video(case, reference, *oracle.prompts())) <= TOLERANCE


def test_equals_the_reference_in_batches(model, reference):
    case = CASES["mid"]
    video = normalised(sample(model, case.schedule, case.size, CHUNKS, batch=2))
    assert difference(video, reference_video(case, reference, *oracle.prompts(batch=2))) <= TOLERANCE


def test_state_is_all_that_is_needed_to_go_on(model):
    latent = sample(model, QUICK, chunks=2)
    state = video_state(latent)
    assert (state.frames, state.next_chunk) == (66, 2)
    assert latent["samples"].dtype == state.memory.latents.dtype == torch.float32
    assert state.memory.latents.device.type == latent["samples"].device.type == "cpu"
    torch.testing.assert_close(state.memory.latents[:, :, -9:], normalised(latent)[:, :, -9:])
    torch.testing.assert_close(state.memory.anchor, normalised(latent)[:, :, :1])


def test_same_seed_same_latents(model):
    first, again, other = (sample(model, QUICK, chunks=2, seed=seed)["samples"] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def count_calls(model, wrapper_type):
    """A clone of model with a counting wrapper, as extensions add them."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(args)
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(wrapper_type, "test", wrapper)
    return clone, calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [("DIFFUSION_MODEL", 6), ("APPLY_MODEL", 6), ("CALC_COND_BATCH", 6), ("PREDICT_NOISE", 6), ("OUTER_SAMPLE", 1)],
)
def test_wrappers_run(model, name, expected):
    """Two chunks of three steps: the network's wrappers for each, the sampler's once for the whole video."""
    clone, calls = count_calls(model, getattr(comfy.patcher_extension.WrappersMP, name))
    sample(clone, QUICK, chunks=2)
    assert len(calls) == expected


def test_positive_and_negative_go_in_one_batch_and_no_negative_without_guidance(model):
    def batches(schedule):
        clone, calls = count_calls(model, comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL)
        sample(clone, schedule)
        return {args[0].shape[0] for args in calls}

    assert batches(replace(BASE, steps=(2,))) == {2}
    assert batches(replace(BASE, steps=(2,), guidance_scale=1.0)) == {1}


def test_block_patches_replace_a_block(model):
    clone, seen = model.clone(), []

    def skip(args, extra):
        seen.append(args["transformer_options"]["block_index"])
        return {"img": args["img"]}

    def keep(args, extra):
        return extra["original_block"](args)

    plain = sample(model, QUICK)["samples"]
    clone.set_model_patch_replace(keep, "dit", "double_block", 1)
    assert difference(sample(clone, QUICK)["samples"], plain) <= TOLERANCE  # the last computes all rows then
    clone.set_model_patch_replace(skip, "dit", "double_block", 1)
    assert not torch.allclose(sample(clone, QUICK)["samples"], plain)
    assert seen == [1, 1, 1]


def test_attention_override_gets_every_attention(model):
    clone, calls = model.clone(), []

    def override(function, *args, **kwargs):
        calls.append(kwargs["heads"])
        return function(*args, **kwargs)

    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(sample(clone, QUICK)["samples"], sample(model, QUICK)["samples"])
    assert calls == [2] * (3 * 2 * 2)  # steps x blocks x (self, cross)


def test_lora_changes_the_video_and_is_taken_off_again(model):
    plain = sample(model, QUICK)["samples"]
    rng = torch.Generator().manual_seed(0)
    lora = {
        "diffusion_model.blocks.0.attn1.to_q.lora_A.weight": torch.randn(4, 48, generator=rng),
        "diffusion_model.blocks.0.attn1.to_q.lora_B.weight": torch.randn(48, 4, generator=rng),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    changed = sample(patched, QUICK)["samples"]
    assert (changed - plain).abs().max() > 0.01
    assert torch.equal(sample(model, QUICK)["samples"], plain)


def test_lora_equals_merged_weights(model, reference, tmp_path):
    rng = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 48, generator=rng), torch.randn(48, 4, generator=rng)
    name = "blocks.1.attn2.to_k"
    lora = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)
    merged = oracle.transformer(0)
    merged.get_submodule(name).weight.data += 0.5 * up @ down
    merged.save_pretrained(tmp_path / "transformer")
    expected = sample(load_model(str(tmp_path / "transformer"), "fp32"), QUICK)["samples"]
    torch.testing.assert_close(sample(patched, QUICK)["samples"], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("schedule", [replace(BASE, steps=(3,)), replace(MID, steps=(3, 2, 2))], ids=["cfg", "zero*"])
def test_a_cfg_function_that_does_plain_cfg_changes_nothing(model, schedule):
    def plain(args):
        return args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])

    clone = model.clone()
    clone.set_model_sampler_cfg_function(plain)
    result, expected = sample(clone, schedule)["samples"], sample(model, schedule)["samples"]
    assert difference(result, expected) < 1e-4


def test_post_cfg_function_sees_denoised_latents(model):
    seen = []

    def post(args):
        seen.append((args["sigma"][0].item(), args["denoised"].std().item()))
        return args["denoised"] * 0.5

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post)
    assert not torch.allclose(sample(clone, QUICK)["samples"], sample(model, QUICK)["samples"])
    assert [sigma for sigma, _ in seen] == pytest.approx([0.998, 0.742, 0.385], abs=1e-3)  # timestep / 1000


@pytest.mark.parametrize(
    "schedule", [replace(BASE, steps=(3,)), replace(MID, steps=(3, 2, 2)), QUICK], ids=["cfg", "zero*", "distilled"]
)
def test_functions_of_the_model_can_ask_the_network_again(model, schedule):
    """As skip-layer guidance does: the same question, at the sigma it is given, has the same denoised answer."""

    def post(args):
        options = args["model_options"].copy()
        [again] = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        assert difference(again, args["cond_denoised"]) < 1e-5
        return args["denoised"] + 3 * (again - args["cond_denoised"])

    def batch(args):
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    expected = sample(model, schedule)["samples"]
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(post)
    assert difference(sample(clone, schedule)["samples"], expected) < 1e-4
    clone = model.clone()
    clone.model_options["sampler_calc_cond_batch_function"] = batch
    assert difference(sample(clone, schedule)["samples"], expected) < 1e-4


def test_hook_keyframes_run_in_every_chunk(model):
    """A LoRA that is on for the first steps only is so in each chunk, since each is denoised from noise again."""
    import comfy.hooks

    rng = torch.Generator().manual_seed(0)
    lora = {
        "diffusion_model.blocks.0.attn1.to_q.lora_A.weight": torch.randn(4, 48, generator=rng),
        "diffusion_model.blocks.0.attn1.to_q.lora_B.weight": torch.randn(48, 4, generator=rng),
    }
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.3))
    hooks.set_keyframes_on_hooks(hook_kf=keyframes)
    strengths = []
    clone = model.clone()

    def watch(executor, *args, **kwargs):
        strengths.append(hooks.hooks[0].strength)
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "watch", watch)
    positive, negative = oracle.prompts()
    sample(
        clone,
        replace(BASE, steps=(4,), guidance_scale=1.0),
        chunks=3,
        positive=conditioning(positive, hooks=hooks),
        negative=conditioning(negative),
    )
    assert strengths == strengths[:4] * 3
    assert set(strengths) == {0.0, 1.0}


def test_easycache_runs_in_every_chunk(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    [cached] = EasyCacheNode.execute(model.clone(), 0.2, 0.15, 0.95, False).result
    for schedule in (replace(BASE, steps=(8,)), replace(MID, steps=(4, 4, 4))):
        assert torch.isfinite(sample(cached, schedule, chunks=3)["samples"]).all()


def test_timestep_ranges_of_conditioning_are_kept(model):
    """The second half of the schedule under another prompt; positive conditioning in the host's own form."""
    first, second = oracle.prompts()
    halves = [[first, {"start_percent": 0.0, "end_percent": 0.5}], [second, {"start_percent": 0.5, "end_percent": 1.0}]]
    mixed = sample(model, QUICK, positive=halves)["samples"]
    only_first = sample(model, QUICK, positive=conditioning(first))["samples"]
    only_second = sample(model, QUICK, positive=conditioning(second))["samples"]
    assert difference(mixed, only_first) > 1e-3
    assert difference(mixed, only_second) > 1e-3


@pytest.mark.parametrize("choice", DTYPES)
def test_storage_dtypes(folder, reference, choice):
    """What the weights are kept in, and how far the result is from float32 (bf16 compute on this CPU is float32's)."""
    loaded = load_model(str(folder), choice)
    dtypes = {name: p.dtype for name, p in loaded.model.diffusion_model.named_parameters()}
    for name, dtype in dtypes.items():
        if "scale_shift_table" in name or "time_embedder" in name or ".norm2." in name:
            assert dtype == torch.float32, name
    in_blocks = {d for n, d in dtypes.items() if n.startswith("blocks.") and n.endswith("to_q.weight")}
    assert in_blocks == {DTYPES[choice]}
    if choice == "fp8_e4m3fn":
        assert {d for n, d in dtypes.items() if n.endswith("to_q.bias")} == {torch.bfloat16}
        assert {d for n, d in dtypes.items() if ".norm_q." in n} == {torch.float32}
    exact = sample(load_model(str(folder), "fp32"), QUICK)["samples"]
    result = sample(loaded, QUICK)["samples"]
    error = ((result - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert error <= {"fp32": 0.0, "fp16": 0.01, "bf16": 0.05, "fp8_e4m3fn": 0.3}[choice]


@pytest.fixture
def without_float8(monkeypatch):
    """A device like Apple's, in the host's words."""
    plain = (torch.float32, torch.float16, torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype in plain)


def test_float8_on_a_device_without_it_is_refused(folder, without_float8, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("privateuseone"))
    with pytest.raises(ValueError, match="is fp8_e4m3fn, and DirectML has no such numbers. Choose auto, bf16 or fp16"):
        load_model(str(folder), "fp8_e4m3fn")


def test_auto_takes_weights_in_float8_for_others_there(folder, without_float8, monkeypatch):
    asked = []

    def unet_dtype(weight_dtype=None, **_):
        asked.append(weight_dtype)
        return weight_dtype or torch.bfloat16

    monkeypatch.setattr(comfy.model_management, "unet_dtype", unet_dtype)
    stored = open_checkpoint(folder)
    in_float8 = {name: replace(x, dtype=torch.float8_e4m3fn) for name, x in stored.tensors.items()}
    assert choose_dtype("auto", replace(stored, tensors=in_float8)) == torch.bfloat16
    assert choose_dtype("auto", stored) == torch.float32
    assert asked == [None, torch.float32]


def test_auto_asks_the_host(folder):
    assert load_model(str(folder), "auto").model.diffusion_model.dtype == comfy.model_management.unet_dtype(
        supported_dtypes=[torch.bfloat16, torch.float16, torch.float32]
    )


def test_variant_comes_with_the_model(model):
    assert model.model.variant == "distilled"


def test_a_second_patcher_can_be_made(model):
    """Newer hosts make one for torch.compile and for other GPUs."""
    factory, args = model.cached_patcher_init
    second = factory(*args, disable_dynamic=True)
    assert second.model is not model.model
    assert torch.equal(sample(second, QUICK)["samples"], sample(model, QUICK)["samples"])


class PatcherThatAsks(comfy.model_patcher.ModelPatcher):
    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=False):
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.told = fast_disk


@pytest.mark.parametrize("flag", [False, True])
def test_fast_disk_reaches_newer_hosts_which_ask_for_each_model(folder, monkeypatch, flag):
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", PatcherThatAsks, raising=False)
    monkeypatch.setattr(comfy.cli_args.args, "fast_disk", flag, raising=False)
    assert load_model(str(folder), "fp32").told is flag


def test_compiled_code_sees_every_chunks_history(model):
    """With the network compiled (eager backend), a stale history would repeat the first chunk's."""
    clone = model.clone()
    compiled = torch.compile(model.model.diffusion_model, backend="eager")
    clone.add_object_patch("diffusion_model", compiled)
    assert difference(sample(clone, QUICK, chunks=3)["samples"], sample(model, QUICK, chunks=3)["samples"]) < 1e-5


@pytest.mark.parametrize("wrong", [BASE, MID])
def test_warns_of_a_schedule_the_checkpoint_contradicts(model, caplog, wrong):
    sample(model, replace(wrong, steps=(1,) * len(wrong.steps)))
    assert "Wrong schedule: connect Helios-Distilled's" in caplog.text
    caplog.clear()
    sample(model, QUICK)
    assert "Wrong schedule" not in caplog.text


def use_table():
    CastTable(torch.zeros(1))(torch.device("cpu"))


def use_norm():
    with lending(comfy.ops.manual_cast.RMSNorm)(1, eps=1e-6).lend(torch.device("cpu"), torch.float32) as (weight, _):
        weight.clone()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("use", [use_table, use_norm])
def test_what_the_host_lends_is_given_back(monkeypatch, use, fails):
    """Under dynamic VRAM it would else stay on the card for good."""

    def clone():
        used.append(len(given_back))
        if fails:
            raise torch.OutOfMemoryError

    lent, used, given_back = (SimpleNamespace(clone=clone), None, "a stream"), [], []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *_, **__: lent)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda module, *what: given_back.append(what))
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        use()
    assert (used, given_back) == ([0], [lent])
