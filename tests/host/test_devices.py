"""The sampling nodes on a pretended card, through all of the host's machinery: what goes up and down, and how often."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.conds import CONDCrossAttn
from comfy.patcher_extension import WrappersMP

from comfyui_helios.helios_core.checkpoint import published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.drift import AntiDrift
from comfyui_helios.helios_core.schedule import BASE, MID
from comfyui_helios.helios_core.video import PromptTrack
from comfyui_helios.host.model.loading import DTYPES, load_model
from comfyui_helios.host.progress import SamplingProgress
from comfyui_helios.host.sockets.conditioning import set_track
from comfyui_helios.host.stream import resuming
from comfyui_helios.host.stream.mp4 import VideoFile
from comfyui_helios.host.stream.saved_chunks import SavedRun
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from comfyui_helios.nodes.stream import HeliosStreamVideo
from harness import oracle
from support.pretended_card import (
    CARD,
    check_step,
    needs_cuda_build,
    pretended_card,
    watch_dtypes,
    without_wide_numbers,
)
from support.quantised import block_layers, write_scaled
from support.runs import QUICK, conditioning, run_node
from support.streams import SETTINGS

pytestmark = needs_cuda_build

management = comfy.model_management
HOST = Path(management.__file__).parents[1]
ROOM = 64 * 1024**3
CHUNKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    oracle.transformer(0).save_pretrained(path / "transformer")
    return str(path / "transformer")


# What hosts from 0.24 on ask torch's own idea of a card, and the answers.
NEWER_ASK = {"synchronize": None, "current_device": 0, "set_device": None}


@pytest.fixture
def card(monkeypatch):
    """A card in the host's eyes: what it asks torch or the driver about one is answered here, and nothing else."""

    def memory(device=None, torch_free_too=False, torch_total_too=False):
        return (ROOM, ROOM) if torch_free_too or torch_total_too else ROOM

    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "get_torch_device", lambda: CARD)
    monkeypatch.setattr(management, "get_free_memory", memory)
    monkeypatch.setattr(management, "get_total_memory", memory)
    monkeypatch.setattr(management, "current_loaded_models", [])
    for name, answer in NEWER_ASK.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0, name="pretended")
    )

    def checked(self, step, original=SamplingProgress.__call__):
        check_step(step)
        original(self, step)

    monkeypatch.setattr(SamplingProgress, "__call__", checked)
    with torch.inference_mode(), pretended_card(HOST) as card:
        yield card


class StubVAE:
    """In place of a VAE, on the CPU as the host's takes and gives."""

    latent_channels = 16

    def __init__(self):
        self.threads = []  # that have decoded

    def encode(self, pixels):
        return torch.zeros(1, 16, (len(pixels) - 1) // 4 + 1, pixels.shape[1] // 8, pixels.shape[2] // 8)

    def decode(self, samples):
        assert samples.device.type == "cpu"
        self.threads.append(threading.current_thread())
        return torch.zeros(1, 33, *(8 * size for size in samples.shape[-2:]), 3)


class LoadedVAE(StubVAE):
    """One that the host loads beside the model."""

    vae_dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(4, 4), CARD, torch.device("cpu"))

    def memory_used_decode(self, shape, dtype):
        return 1


def load(folder, dtype):
    model = load_model(folder, dtype)
    assert model.load_device == CARD
    watch_dtypes(model.model.diffusion_model, DTYPES[dtype])
    return model


def begin(batch=1, positive=None, **source):
    prompt, negative = (conditioning(embedding) for embedding in oracle.prompts(batch=batch))
    return run_node(
        HeliosHistoryInjection,
        positive or prompt,
        negative,
        frames=33 * CHUNKS,
        batch_size=batch,
        vae=StubVAE(),
        width=64,
        height=64,
        **source,
    )


def sample(model, start, schedule):
    return run_node(HeliosChunkedSampler, model, *start, schedule, 3)[0]


def crossings(schedule, anchored=False, prompts=2):
    """What a run may send up and down: by what does it, and how often."""
    stages = len(schedule.steps)
    renoise = {"up: renoise": CHUNKS * (stages - 1)} if stages > 1 else {}
    return {
        "up: HeliosGuider.denoise > ModelPatcher.load": None,  # the weights
        "up: HeliosTransformer._apply": None,  # likewise
        "up: HeliosGuider.denoise > CFGGuider.outer_sample": 3,  # the host's noise, latents, sigmas
        "up: HeliosGuider.inner_sample": prompts,  # once a run
        "up: Memory.to": 1 + anchored,  # the history a run begins with
        "up: generate": CHUNKS,  # each chunk's noise: from the CPU, so that a seed is the same everywhere
        **renoise,  # each stage's
        "up: HeliosTransformer.rope": 3 + stages,  # once a model
        "wait: check_finite": CHUNKS,
        "down: to_vae_space": CHUNKS,  # finished chunks
        "down: Memory.to": 2,  # history and anchor at the end
    }


IMAGE = {"start_image": torch.rand(1, 64, 64, 3)}
VIDEO = {"video": torch.rand(33, 64, 64, 3)}
GUIDED = replace(BASE, steps=(2,))


@pytest.mark.parametrize(
    ("source", "schedule", "dtype"),
    [
        ({}, GUIDED, "fp32"),
        ({}, replace(QUICK, amplify_first_chunk=True), "bf16"),
        (IMAGE, replace(MID, steps=(3, 1, 1)), "bf16"),
        (IMAGE, replace(BASE, steps=(2,), guidance_scale=1.0, solver="euler"), "bf16"),
        (VIDEO, QUICK, "fp32"),
        (VIDEO, GUIDED, "bf16"),
        ({"batch": 2}, replace(MID, steps=(3, 1, 1)), "fp32"),
    ],
    ids=["t2v base", "t2v distilled", "i2v mid", "i2v base by Euler", "v2v distilled", "v2v base", "t2v mid, a batch"],
)
def test_a_run(folder, card, source, schedule, dtype):
    latent = sample(load(folder, dtype), begin(**source), schedule)
    for x in (latent["samples"], latent["helios"].memory.latents, latent["helios"].memory.anchor):
        assert (x.device.type, x.dtype) == ("cpu", torch.float32)
    card.check(crossings(schedule, anchored=bool({"start_image", "video"} & set(source))))


@pytest.mark.parametrize("schedule", [GUIDED, replace(MID, steps=(3, 1, 1)), QUICK], ids=["base", "mid", "distilled"])
def test_a_run_on_a_card_without_float64_and_complex_numbers(folder, card, schedule):
    with without_wide_numbers(card):
        sample(load(folder, "bf16"), begin(**IMAGE), schedule)
    card.check(crossings(schedule, anchored=True))


def test_a_run_of_scaled_fp8(card, tmp_path):
    published = {published_name(name): x for name, x in oracle.weights(oracle.transformer(0)).items()}
    config = TransformerConfig(**oracle.TINY)
    file = write_scaled(tmp_path / "a.safetensors", published, block_layers(published), config=config)
    sample(load_model(str(file), "bf16"), begin(), QUICK)
    weights = {f"up: InEitherMode._apply{of}": None for of in ("", " > _quantized_apply", " > mixed_precision_ops")}
    card.check(crossings(QUICK) | weights)


def test_a_video_that_goes_on(folder, card):
    model = load(folder, "bf16")
    latent = sample(model, begin(), QUICK)
    card.crossings.clear()
    sample(model, begin(previous=latent), QUICK)
    card.check(crossings(QUICK, anchored=True) | {"up: HeliosTransformer.rope": 0})


def stream(model, vae, overlap="auto", **settings):
    return run_node(
        HeliosStreamVideo, model, *begin(), QUICK, vae, seed=3, overlap_decode=overlap, **SETTINGS, **settings
    )


@pytest.fixture
def written(monkeypatch):
    """How many frames the video files were given; no file is made."""
    frames = []
    monkeypatch.setattr(VideoFile, "write", lambda self, x: frames.append(len(x)))
    monkeypatch.setattr(VideoFile, "finish", lambda self: self.target)
    return frames


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_streaming(folder, card, written, overlap):
    stream(load(folder, "bf16"), StubVAE(), overlap)
    assert written == [33, 33]
    card.check(crossings(QUICK))


def test_pictures_come_down_on_the_nodes_thread(folder, card, written, monkeypatch):
    """With --gpu-only the host leaves them on the card, which may be for one thread at a time."""
    vae, given = StubVAE(), []
    monkeypatch.setattr(vae, "decode", lambda samples: torch.zeros(1, 33, 64, 64, 3, device=CARD))
    monkeypatch.setattr(VideoFile, "write", lambda self, x: given.append(x.device.type))
    stream(load(folder, "bf16"), vae)
    assert given == ["cpu", "cpu"]
    card.check(crossings(QUICK) | {"down: VideoWriter.decode": CHUNKS})


def test_streaming_with_the_vae_beside(folder, card, written):
    vae = LoadedVAE()
    stream(load(folder, "bf16"), vae)
    assert threading.main_thread() not in vae.threads
    assert written == [33, 33]
    card.check(crossings(QUICK))


def test_a_run_that_was_cut_off_and_goes_on(folder, card, written, monkeypatch, tmp_path):
    run = tmp_path / "run"
    monkeypatch.setattr(resuming, "open_run", lambda key, kind, note: nullcontext(SavedRun(run, kind)))
    monkeypatch.setattr(resuming, "graph_key", lambda *args: "key")
    resume = {"resume": True, "prompt": {"5": {}}, "unique_id": "5"}
    model = load(folder, "bf16")
    stream(model, StubVAE(), **resume)
    a_chunk = {"latents", "memory", "anchor"}
    card.check(crossings(QUICK) | {"down: _to_tensors": len(a_chunk) * CHUNKS})

    (run / "chunk_00001.safetensors").unlink()
    card.crossings.clear()
    stream(model, StubVAE(), **resume)
    again = {
        "up: generate": 1,
        "wait: check_finite": 1,
        "up: renoise": 2,
        "down: to_vae_space": 1,
        "down: _to_tensors": len(a_chunk),
    }
    card.check(crossings(QUICK, anchored=True) | again | {"up: HeliosTransformer.rope": 0})


def test_several_prompts_go_up_with_their_chunks(folder, card):
    prompts = oracle.prompts()
    track = set_track(conditioning(prompts[0]), PromptTrack(prompts, (1, 1), 0))
    sample(load(folder, "bf16"), begin(positive=track), QUICK)
    card.check(crossings(QUICK, prompts=1) | {"up: HeliosGuider.bind_chunk": CHUNKS})


def test_where_other_nodes_look_in_and_nothing_is_kept(folder, card):
    model = load(folder, "bf16")
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", lambda executor, *args, **kw: executor(*args, **kw))
    sample(model, begin(), GUIDED)
    card.check(crossings(GUIDED))


def test_guidance_by_a_function_of_the_model(folder, card):
    model, schedule = load(folder, "bf16"), replace(MID, steps=(3, 1, 1))
    model.set_model_sampler_cfg_function(lambda args: args["uncond"] + 5 * (args["cond"] - args["uncond"]))
    sample(model, begin(), schedule)
    card.check(crossings(schedule))


def test_drift_is_judged_once_a_chunk(folder, card):
    drifting = replace(QUICK, anti_drift=AntiDrift())
    sample(load(folder, "bf16"), begin(), drifting)
    card.check(
        crossings(drifting)
        | {"wait: AntiDrift.observe": 2 * CHUNKS, "up: AntiDrift.correct": CHUNKS - 1, "down: Memory.to": 4}
    )


def test_a_preview_comes_down_with_every_step_where_they_are_on(folder, card, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    sample(load(folder, "bf16"), begin(), QUICK)
    previews = {
        "down: SamplingProgress.__call__ > preview_to_image": 3 * CHUNKS,
        "up: SamplingProgress.__call__ > Latent2RGBPreviewer.decode_latent_to_preview": 2,  # colours, once a run
    }
    card.check(crossings(QUICK) | previews)


def test_the_host_asks_for_the_step_of_prompts_with_a_range(folder, card):
    """In every sampler of its own as here; without a range nothing is asked."""
    first = conditioning(oracle.prompts()[0], start_percent=0.0, end_percent=0.5)
    sample(load(folder, "bf16"), begin(positive=first), GUIDED)
    asked = {"wait: BoundStep.predict > get_area_and_mult": len(GUIDED.steps) * GUIDED.steps[0] * CHUNKS}
    card.check(crossings(GUIDED) | asked)


def test_a_mistake_in_the_host_is_noticed_with_the_way_to_it(folder, card, monkeypatch):
    """The prompt as the host would send it: with every step."""
    model = load(folder, "bf16")
    original = comfy.samplers.calc_cond_batch

    def stale(inner_model, conds, x, *args):
        conds = [
            [
                {**c, "model_conds": {**c["model_conds"], "c_crossattn": CONDCrossAttn(c["cross_attn"])}}
                for c in group or ()
            ]
            for group in conds
        ]
        return original(inner_model, conds, x, *args)

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", stale)
    sample(model, begin(), GUIDED)
    with pytest.raises(AssertionError) as caught:
        card.check(crossings(GUIDED))
    told = str(caught.value)
    assert "up: BoundStep.predict > cast_to, 4 times, 0 expected: aten.copy_.default of (2, 12, 32)" in told
    assert "in BaseModel._apply_model: context = comfy.model_management.cast_to_device(context" in told
