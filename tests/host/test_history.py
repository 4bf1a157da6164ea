"""Everything a person can compose with Helios History Injection and the sampler, inside the host."""

from dataclasses import replace
from fractions import Fraction

import comfy.latent_formats
import pytest
import torch
from comfy_api.latest import InputImpl, Types

from comfyui_helios.helios_core.drift import AntiDrift
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID
from comfyui_helios.helios_core.video import PromptTrack
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.sockets.conditioning import START_KEY, TRACK_KEY
from comfyui_helios.host.sockets.latent import video_state
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from comfyui_helios.nodes.schedule import HeliosAntiDrift
from harness import oracle
from harness.errors import difference
from nodes import ConditioningAverage, ConditioningCombine, ConditioningZeroOut
from support.runs import run_node
from support.videos import SEED, TOLERANCE, Case, below, reference_video

SIZE = (64, 128)
CASES = {
    "base": Case(replace(BASE, steps=(4,)), SIZE),
    "mid": Case(below(MID, steps=(3, 2, 2)), SIZE),
    "distilled": Case(below(DISTILLED), SIZE),
}
AMPLIFIED = replace(DISTILLED, steps=(1, 1, 1))
WAN = comfy.latent_formats.Wan21()


@pytest.fixture(scope="module")
def reference():
    return oracle.transformer(0)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    reference.save_pretrained(path / "transformer")
    return load_model(str(path / "transformer"), "fp32")


def latents(seed, frames):
    return torch.randn((1, 16, frames, SIZE[0] // 8, SIZE[1] // 8), generator=torch.Generator().manual_seed(seed))


class GivenVAE:
    """Encodes to latents that are known: `single` for one frame, the next of `chunks` for 33."""

    def __init__(self, single, chunks):
        self.single, self.chunks = single, list(chunks)

    def encode(self, frames):
        return WAN.process_out(self.single if len(frames) == 1 else self.chunks.pop(0))

    def decode(self, samples):
        raise AssertionError("asked to decode")


def inputs(frames=33, batch_size=1, positive=None, **sources):
    prompts = oracle.prompts(batch=batch_size)
    return run_node(
        HeliosHistoryInjection,
        positive or [[prompts[0], {}]],
        [[prompts[1], {}]],
        width=SIZE[1],
        height=SIZE[0],
        frames=frames,
        batch_size=batch_size,
        **sources,
    )


def sample(model, schedule, frames=33, seed=SEED, seed_mode="continue", **sources):
    return run_node(HeliosChunkedSampler, model, *inputs(frames, **sources), schedule, seed, seed_mode)[0]


def normalised(latent):
    return WAN.process_in(latent["samples"])


def test_an_empty_latent_of_any_length_takes_no_memory():
    samples = inputs(frames=33 * 44)[2]["samples"]
    assert samples.shape == (1, 16, 9 * 44, SIZE[0] // 8, SIZE[1] // 8)
    assert samples.untyped_storage().nbytes() == samples.element_size()
    assert not samples.any()


def test_image_to_video_equals_the_reference(model, reference):
    case = CASES["mid"]
    image, repeated = latents(1, 1), latents(2, 9)
    vae = GivenVAE(image, [repeated])
    video = sample(model, case.schedule, 66, vae=vae, start_image=torch.rand(1, *SIZE, 3), skip_first_chunk=True)
    expected = reference_video(
        case,
        reference,
        *oracle.prompts(),
        frames=66,
        image_latents=image,
        fake_image_latents=repeated[:, :, -1:],
        is_skip_first_chunk=True,
    )
    assert difference(normalised(video), expected[:, :, 1:]) <= TOLERANCE


@pytest.mark.parametrize(("name", "chunks"), [("base", 2), ("distilled", 5)])
def test_video_to_video_equals_the_reference(model, reference, name, chunks):
    """Of a long video only what the history reaches is encoded: the last three chunks."""
    case = CASES[name]
    first, past = latents(1, 1), latents(2, 9 * chunks)
    vae = GivenVAE(first, past.split(9, dim=2)[-3:])
    video = sample(model, case.schedule, 33, vae=vae, video=torch.rand(33 * chunks + 4, *SIZE, 3))
    assert not vae.chunks
    expected = reference_video(
        case,
        reference,
        *oracle.prompts(),
        frames=33,
        image_latents=first,
        video_latents=past,
        add_noise_to_image_latents=False,
    )
    assert difference(normalised(video), expected[:, :, 9 * chunks :]) <= TOLERANCE


def test_of_a_video_at_another_rate_those_frames_are_encoded_that_it_shows():
    """At 48 fps every other one: the first, and of four chunks the last three."""
    seen, count = [], 2 * 33 * 4

    class Watching(GivenVAE):
        def encode(self, frames):
            seen.extend((frames[:, 0, 0, 0] * count).round().int().tolist())
            return super().encode(frames)

    images = (torch.arange(count) / count)[:, None, None, None].expand(-1, *SIZE, 3)
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=Fraction(48)))
    inputs(vae=Watching(latents(1, 1), latents(2, 27).split(9, dim=2)), video=video)
    assert seen == [1, *range(2 * 33 + 1, count, 2)]


def test_a_batch_of_images_makes_a_batch_of_videos(model):
    images = [latents(i, 1) for i in range(2)]
    chunks = [latents(10 + i, 9) for i in range(2)]

    class Each(GivenVAE):
        def __init__(self):
            self.calls = iter([images[0], chunks[0], images[1], chunks[1]])

        def encode(self, frames):
            return WAN.process_out(next(self.calls))

    pictures = torch.rand(2, *SIZE, 3)
    prompts = oracle.prompts()
    positive = [[prompts[0], {}]]
    both = sample(model, AMPLIFIED, vae=Each(), start_image=pictures, batch_size=1, positive=positive, add_noise=False)
    assert both["samples"].shape[0] == 2
    assert not torch.allclose(both["samples"][0], both["samples"][1])
    state = video_state(both)
    torch.testing.assert_close(state.memory.anchor, torch.cat(images), rtol=1e-5, atol=1e-5)


def test_frames_that_each_begin_a_video_are_told(shown):
    """As of a whole video on `start_image`, which is for one image, or for some on purpose."""
    vae = GivenVAE(latents(0, 1), [latents(1, 9)] * 3)
    inputs(vae=vae, start_image=torch.rand(1, *SIZE, 3), unique_id="1")
    assert shown == []
    inputs(vae=vae, start_image=torch.rand(2, *SIZE, 3), unique_id="1")
    assert "2 images: each begins a video of its own" in shown[0][0]


@pytest.mark.parametrize(("name", "drift"), [("base", False), ("distilled", True)])
def test_going_on_equals_one_run(model, name, drift):
    """Two chunks, then one more from their LATENT, against three in one run: exactly equal."""
    schedule = CASES[name].schedule
    if drift:
        schedule = run_node(HeliosAntiDrift, schedule, 0.9, 0.9, 0.0, 0.0, 0.1)[0]
    whole = sample(model, schedule, 99)["samples"]
    first = sample(model, schedule, 66)
    second = sample(model, schedule, 33, seed=999, previous=first)
    assert torch.equal(first["samples"], whole[:, :, :18])
    torch.testing.assert_close(second["samples"], whole[:, :, 18:], rtol=0, atol=0)
    assert video_state(second).next_chunk == 3


def test_new_seed_mode_draws_from_its_own_seed(model):
    first = sample(model, AMPLIFIED, 33)
    runs = [sample(model, AMPLIFIED, 33, seed=seed, seed_mode="new", previous=first)["samples"] for seed in (5, 5, 6)]
    going_on = sample(model, AMPLIFIED, 33, seed=5, previous=first)["samples"]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert not torch.allclose(runs[0], going_on)


def test_what_is_done_to_a_first_chunk_is_done_once_per_video(model):
    """Twelve steps for the amplified first chunk of [2, 2, 2], six for every other, in whatever run it comes."""
    steps = []
    clone = model.clone()
    import comfy.patcher_extension

    def count(executor, *args, **kwargs):
        steps.append(args[0].shape[-1])
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", count)
    first = sample(clone, DISTILLED, 33)
    assert len(steps) == 12
    second = sample(clone, DISTILLED, 33, previous=first)
    assert len(steps) == 18
    assert torch.equal(video_state(second).memory.anchor, video_state(first).memory.anchor)


def test_a_latent_that_lost_its_key_goes_on_from_its_last_frames_with_a_warning(model, caplog):
    first = sample(model, AMPLIFIED, 66)
    lost = {"samples": first["samples"]}
    result = sample(model, AMPLIFIED, 33, seed=5, seed_mode="new", previous=lost)
    assert "has lost what Helios adds" in caplog.text
    kept = sample(model, AMPLIFIED, 33, seed=5, seed_mode="new", previous=first)
    assert difference(result["samples"], kept["samples"]) < 1e-4  # the same history and anchor, through VAE space
    assert video_state(result).next_chunk == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [({"keep_first_frame": False}, {}), ({}, {"history_long": 40}), ({"history_long": 1, "history_mid": 1}, {})],
    ids=["anchor", "longer", "as usual after short"],
)
def test_going_on_with_more_history_shows_what_the_latent_holds(model, before, after):
    """As one that lost its key does: neither zeros for frames that are there, nor a video without its beginning."""
    first = sample(model, AMPLIFIED, 165, **before)
    going_on = {"frames": 33, "seed": 5, "seed_mode": "new", **after}
    with_key = sample(model, AMPLIFIED, previous=first, **going_on)
    lost = sample(model, AMPLIFIED, previous={"samples": first["samples"]}, **going_on)
    assert difference(with_key["samples"], lost["samples"]) < 1e-4


def test_anti_drift_corrects_the_history_and_not_the_video(model):
    plain = sample(model, AMPLIFIED, 66)["samples"]
    schedule = run_node(HeliosAntiDrift, AMPLIFIED, 0.9, 0.9, 0.15, 0.15, 0.1)[0]
    assert schedule.anti_drift == AntiDrift()
    always = replace(schedule, anti_drift=AntiDrift(mean_threshold=-1.0, var_threshold=-1.0))
    corrected = sample(model, always, 66)["samples"]
    assert torch.equal(corrected[:, :, :9], plain[:, :, :9])
    assert not torch.allclose(corrected[:, :, 9:], plain[:, :, 9:])


def test_each_chunk_gets_its_prompt(model):
    """A track of two prompts against runs of either: equal before the change, different after."""
    one, two = oracle.prompts()[0], oracle.prompts(seed=7)[0]
    track = PromptTrack((one, two), (1, 2), blend=0)
    mixed = sample(model, AMPLIFIED, 99, positive=[[one, {TRACK_KEY: track}]])["samples"]
    only_one = sample(model, AMPLIFIED, 99, positive=[[one, {}]])["samples"]
    assert torch.equal(mixed[:, :, :9], only_one[:, :, :9])
    assert difference(mixed[:, :, 9:18], only_one[:, :, 9:18]) > 1e-2

    same = PromptTrack((one, one), (1, 2), blend=0)
    assert torch.equal(sample(model, AMPLIFIED, 99, positive=[[one, {TRACK_KEY: same}]])["samples"], only_one)
    first = sample(model, AMPLIFIED, 33, positive=[[one, {}]])
    going_on = sample(model, AMPLIFIED, 33, previous=first, positive=[[two, {TRACK_KEY: PromptTrack((two,), (1,), 0)}]])
    assert difference(going_on["samples"], mixed[:, :, 9:18]) < 1e-6  # a track counts from its own beginning


def test_prompts_in_a_row_that_were_zeroed_are_no_negative_prompt(model):
    """ConditioningZeroOut hands on what is beside an embedding: the negative was the positive, and guided nothing."""
    one, two = oracle.prompts()[0], oracle.prompts(seed=7)[0]
    track = {TRACK_KEY: PromptTrack((one, two), (1, 1), blend=0)}
    [zeroed] = ConditioningZeroOut().zero_out([[one, track]])
    positive, _, latent = inputs(66, positive=[[one, track]])
    guided = [
        run_node(HeliosChunkedSampler, model, positive, negative, latent, replace(BASE, steps=(2,)), SEED)[0]["samples"]
        for negative in (zeroed, [[torch.zeros_like(one), {}]])
    ]
    assert torch.equal(*guided)


def test_prompts_in_a_row_that_a_node_has_changed_are_refused(model):
    """Not made as if that node were not there."""
    one, two = oracle.prompts()[0], oracle.prompts(seed=7)[0]
    row = [[one, {TRACK_KEY: PromptTrack((one, two), (1, 1), blend=0)}]]
    [mixed] = ConditioningAverage().addWeighted(row, [[two, {}]], 0.5)
    [beside] = ConditioningCombine().combine(row, mixed)
    for changed in (mixed, beside):
        with pytest.raises(ValueError, match="changes the embedding that comes from Helios Prompt Schedule"):
            sample(model, AMPLIFIED, 66, positive=changed)


def test_more_prompt_chunks_than_video_chunks_are_refused(model):
    one = oracle.prompts()[0]
    combined = [[one, {TRACK_KEY: PromptTrack((one, one), chunks, blend=0)}] for chunks in ((1, 1), (4, 4))]
    with pytest.raises(ValueError, match=r"prompts last 8 chunks, but the video has 2 \(66 frames\)"):
        sample(model, AMPLIFIED, 66, positive=combined)


IMAGE, VIDEO = torch.rand(1, *SIZE, 3), torch.rand(33, *SIZE, 3)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"start_image": IMAGE, "video": VIDEO, "vae": GivenVAE(None, ())}, "start_image and video are connected"),
        ({"start_image": IMAGE, "previous": {}, "vae": GivenVAE(None, ())}, "start_image and previous are connected"),
        ({"start_image": IMAGE}, "start_image is connected without a VAE"),
        ({"video": VIDEO}, "video is connected without a VAE"),
        (
            {"start_image": IMAGE.expand(3, -1, -1, -1), "batch_size": 2, "vae": GivenVAE(None, ())},
            "3 images, and batch_size is 2",
        ),
        ({"video": VIDEO[:20], "vae": GivenVAE(None, ())}, "20 frames"),
        ({"video": VIDEO[:1], "vae": GivenVAE(None, ())}, "single image to start_image"),
        ({"start_image": IMAGE * float("nan"), "vae": GivenVAE(None, ())}, "NaN"),
        ({"image_sigma_min": 0.5}, "min 0.5 and max 0.135"),
        ({"history_long": 0}, "whole number from 1 to 64"),
        ({"frames": 0}, "`frames` is 0; expected a whole number from 1"),
    ],
)
def test_what_cannot_begin_a_video_is_refused_on_the_node(sources, message):
    with pytest.raises(ValueError, match=message):
        inputs(**sources)


def test_a_latent_that_was_never_sampled_is_no_previous():
    with pytest.raises(ValueError, match="never sampled"):
        inputs(previous=inputs()[2])
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        inputs(previous={"samples": torch.zeros(1, 4, 8, 8)})


def test_other_history_sizes_and_no_anchor(model):
    for options in ({"history_long": 8, "history_mid": 4, "history_short": 2}, {"keep_first_frame": False}):
        latent = sample(model, AMPLIFIED, 66, **options)
        assert torch.isfinite(latent["samples"]).all()
        assert difference(latent["samples"], sample(model, AMPLIFIED, 66)["samples"]) > 1e-3


def test_an_edited_latent_is_followed_as_it_is_now(model, caplog):
    """The host's latent nodes keep our key; what they changed must not be undone."""
    first = sample(model, AMPLIFIED, 66)
    flipped = {**first, "samples": first["samples"].flip(-1)}
    assert video_state(first).memory is not None
    assert video_state(flipped) is None
    going_on = sample(model, AMPLIFIED, 33, seed=5, seed_mode="new", previous=flipped)
    assert "has lost what Helios adds" in caplog.text
    lost = sample(model, AMPLIFIED, 33, seed=5, seed_mode="new", previous={"samples": flipped["samples"]})
    assert torch.equal(going_on["samples"], lost["samples"])
    one_of_two = {**sample(model, AMPLIFIED, 33, batch_size=2)}
    one_of_two["samples"] = one_of_two["samples"][:1]
    assert inputs(previous=one_of_two)[2]["samples"].shape[0] == 1


def test_a_longer_history_reaches_back_as_far_as_the_latent_does():
    lost = {"samples": WAN.process_out(latents(1, 54))}
    positive, _, _ = inputs(previous=lost, history_long=40)
    [seed] = [values[START_KEY] for _, values in positive]
    torch.testing.assert_close(seed.source.latents, latents(1, 54)[:, :, -43:], rtol=1e-4, atol=1e-4)
