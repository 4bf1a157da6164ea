"""How videos begin and go on: image-to-video, video-to-video, continuing, changing prompts, anti-drifting."""

from dataclasses import replace

import pytest
import torch

from comfyui_helios.helios_core.config import num_chunks
from comfyui_helios.helios_core.drift import AntiDrift
from comfyui_helios.helios_core.generate import Run, denoise_chunk, generate
from comfyui_helios.helios_core.history import HistoryLayout, Memory
from comfyui_helios.helios_core.schedule import BASE, DISTILLED, MID
from comfyui_helios.helios_core.video import EncodedPast, PromptTrack, Turn, VideoStart
from harness import oracle
from harness.errors import difference
from support.videos import TOLERANCE, Case, below, guided, our_transformer, reference_video

SIZE = (64, 128)
CASES = {
    "base": Case(replace(BASE, steps=(4,)), SIZE),
    "mid": Case(below(MID, steps=(3, 2, 2)), SIZE),
    "distilled": Case(below(DISTILLED), SIZE),
}


@pytest.fixture(scope="module")
def models():
    reference = oracle.transformer(0)
    return reference, our_transformer(reference)


def latents(seed, frames, batch=1):
    shape = (batch, 16, frames, SIZE[0] // 8, SIZE[1] // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bind_to(model, schedule, batch=1):
    return guided(model, schedule, *oracle.prompts(batch=batch))


@torch.no_grad()
def run(model, schedule, seed, chunks, batch=1):
    rng = torch.Generator().manual_seed(3)
    memory = seed.memory(batch, SIZE[0] // 8, SIZE[1] // 8, rng)
    bind = bind_to(model, schedule, batch)
    made = list(generate(bind, Run(schedule, memory, chunks, rng, skip_first_chunk=seed.skip_first_chunk)))
    return torch.cat([chunk.latents for chunk in made], dim=2), made[-1].memory, rng


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip first chunk"])
def test_image_to_video_equals_the_reference(models, case, skip):
    reference, ours = models
    image, last = latents(1, 1), latents(2, 1)
    seed = VideoStart(EncodedPast(image, last), skip_first_chunk=skip)
    video, _, _ = run(ours, case.schedule, seed, 3)
    expected = reference_video(
        case, reference, *oracle.prompts(), image_latents=image, fake_image_latents=last, is_skip_first_chunk=skip
    )
    assert difference(video, expected[:, :, 1:]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("frames", [9, 27])
def test_video_to_video_equals_the_reference(models, case, frames):
    reference, ours = models
    first, past = latents(1, 1), latents(2, frames)
    video, _, _ = run(ours, case.schedule, VideoStart(EncodedPast(first, past)), 2)
    expected = reference_video(
        case,
        reference,
        *oracle.prompts(),
        frames=66,
        image_latents=first,
        video_latents=past,
        add_noise_to_image_latents=False,
    )
    assert difference(video, expected[:, :, frames:]) <= TOLERANCE


@pytest.mark.parametrize("kind", ["image", "video"])
def test_without_noise_and_with_other_sigmas(models, kind):
    reference, ours = models
    first, past = latents(1, 1), latents(2, 1 if kind == "image" else 9)
    source = EncodedPast(first, past)
    given = {"fake_image_latents": past} if kind == "image" else {"video_latents": past}
    case = CASES["distilled"]

    video, _, _ = run(ours, case.schedule, VideoStart(source, add_noise=False), 1)
    off = {"add_noise_to_image_latents": False, "add_noise_to_video_latents": False}
    expected = reference_video(case, reference, *oracle.prompts(), frames=33, image_latents=first, **given, **off)
    assert difference(video, expected[:, :, past.shape[2] :]) <= TOLERANCE

    seed = VideoStart(source, image_sigmas=(0.2, 0.3), video_sigmas=(0.4, 0.5))
    video, _, _ = run(ours, case.schedule, seed, 1)
    sigmas = {"image_noise_sigma_min": 0.2, "image_noise_sigma_max": 0.3}
    sigmas |= {"video_noise_sigma_min": 0.4, "video_noise_sigma_max": 0.5}
    if kind == "video":
        sigmas["add_noise_to_image_latents"] = False
    expected = reference_video(case, reference, *oracle.prompts(), frames=33, image_latents=first, **given, **sigmas)
    assert difference(video, expected[:, :, past.shape[2] :]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "image", "video", "previous"])
def test_a_batch_is_what_its_items_are_alone(models, kind):
    """The same noise given to a batch of 2 and to two runs of 1."""
    _, ours = models
    first, past = latents(1, 1, batch=2), latents(2, 1 if kind == "image" else 9, batch=2)
    memory = Memory(latents(3, 19, batch=2), first)

    def source(item):
        pick = slice(item, item + 1) if item is not None else slice(None)
        return {
            "text": None,
            "image": EncodedPast(first[pick], past[pick]),
            "video": EncodedPast(first[pick], past[pick]),
            "previous": Memory(memory.latents[pick], memory.anchor[pick]),
        }[kind]

    def sample(item, batch):
        seed = VideoStart(source(item), add_noise=False)
        schedule = replace(BASE, steps=(3,), guidance_scale=1.0)
        start = seed.memory(batch, SIZE[0] // 8, SIZE[1] // 8, torch.Generator())
        positive = oracle.prompts(batch=2)[0]
        if item is not None:
            positive = positive[item : item + 1]
        noise = latents(9, 9, batch=2) if item is None else latents(9, 9, batch=2)[item : item + 1]
        predict = guided(ours, schedule, positive, positive)(0, start.history())
        return denoise_chunk(predict, schedule, noise, torch.Generator(), 0, lambda step: None)

    together = sample(None, 2)
    for item in range(2):
        assert difference(sample(item, 1), together[item : item + 1]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("anti_drift", [None, AntiDrift(mean_threshold=0.0, var_threshold=0.0)], ids=["", "corrected"])
def test_going_on_equals_one_run(models, name, anti_drift):
    """Two chunks, then two more from what they left, against four in one run: exactly equal."""
    _, ours = models
    schedule = replace(CASES[name].schedule, anti_drift=anti_drift)
    whole, _, _ = run(ours, schedule, VideoStart(), 4)
    first, memory, rng = run(ours, schedule, VideoStart(), 2)
    state = rng.get_state()

    rng = torch.Generator()
    rng.set_state(state)
    again = VideoStart(memory.to("cpu")).memory(1, SIZE[0] // 8, SIZE[1] // 8, rng)
    with torch.no_grad():
        rest = generate(bind_to(ours, schedule), Run(schedule, again, 2, rng, first_index=2))
        second = torch.cat([chunk.latents for chunk in rest], dim=2)
    assert torch.equal(torch.cat([first, second], dim=2), whole)


def test_a_history_of_another_size_is_refused():
    for source in (EncodedPast(latents(1, 1), latents(2, 1)), Memory(latents(1, 19), latents(2, 1))):
        with pytest.raises(ValueError, match="history is 128x64 in a batch of 1, but the video is 64x64"):
            VideoStart(source).memory(1, 8, 8, torch.Generator())
    two = EncodedPast(latents(1, 1, batch=2), latents(2, 1, batch=2))
    with pytest.raises(ValueError, match="batch of 2, but the video is 128x64 in a batch of 3"):
        VideoStart(two).memory(3, 8, 16, torch.Generator())
    with pytest.raises(ValueError, match="min <= max"):
        VideoStart(image_sigmas=(0.3, 0.2))


@pytest.mark.parametrize("layout", [HistoryLayout(keep_first_frame=False), HistoryLayout((8, 2, 1)), HistoryLayout()])
def test_memory_fits_another_layout(layout):
    memory = Memory(latents(1, 19), latents(2, 1)).with_layout(layout)
    assert memory.latents.shape[2] == layout.frames
    kept = min(19, layout.frames)
    assert torch.equal(memory.latents[:, :, -kept:], latents(1, 19)[:, :, -kept:])
    assert not memory.latents[:, :, : layout.frames - kept].any()
    memory.history()


def test_runs_without_an_anchor(models):
    """diffusers' own pipelines fail there: the split of the history is made before its size is raised."""
    seed = VideoStart(layout=HistoryLayout(keep_first_frame=False))
    video, memory, _ = run(models[1], replace(DISTILLED, steps=(1, 1, 1)), seed, 3)
    assert memory.history().short.shape[2] == 2
    assert torch.equal(memory.anchor, video[:, :, :1])  # for a run that goes on and shows it
    assert memory.latents.shape[2] == 20
    assert torch.isfinite(video).all()


def prompt(value):
    return torch.full((1, 2, 4), float(value))


def shown(track, count):
    return [track.at(index).unique().item() for index in range(count)]


@pytest.mark.parametrize(
    ("chunks", "blend", "expected"),
    [
        ((4, 4, 4), 3, [[0, 0, 0, 0], [0, 5, 10, 10], [10, 15, 20, 20], [20, 20]]),
        ((2, 3), 0, [[0, 0], [10, 10, 10], [10]]),
        ((2, 3), 1, [[0, 0], [0, 10, 10], [10]]),
        ((3, 3), 2, [[0, 0, 0], [0, 10, 10], [10]]),
        ((6, 6), 5, [[0] * 6, [0, 2.5, 5, 7.5, 10, 10], [10]]),
        ((4,), 3, [[0] * 4, [0, 0]]),
    ],
)
def test_each_later_prompt_begins_with_a_linear_blend_and_the_last_one_stays(chunks, blend, expected):
    """By the authors' rule. The last group is after the end."""
    track = PromptTrack(tuple(prompt(10 * number) for number in range(len(chunks))), chunks, blend)
    flat = [value for values in expected for value in values]
    assert shown(track, len(flat)) == flat


def test_a_prompt_that_is_no_longer_than_the_blend_is_refused():
    with pytest.raises(ValueError, match="Prompt 1 lasts 2 chunks of 33 frames, and blending takes 2"):
        PromptTrack((prompt(1), prompt(10)), (2, 2), blend=2)


def test_prompts_of_two_text_encoders_are_refused():
    """Before anything is sampled, and not in the chunk where they meet."""
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 8\) tokens and width.*Connect the same one"):
        PromptTrack((torch.rand(1, 3, 4), torch.rand(1, 3, 8)), (2, 2), blend=0)


SCHEDULED = PromptTrack((prompt(0), prompt(10)), (4, 4), blend=3)  # 0 0 0 0, 0 5 10 10


@pytest.mark.parametrize(
    ("turns", "values"),
    [
        ([(2, 100, 0)], [0, 0, 100, 100, 100, 100]),
        ([(2, 100, 1)], [0, 0, 100, 100, 100, 100]),
        ([(1, 100, 4)], [0, 25, 50, 75, 100, 100]),
        ([(0, 100, 2)], [50, 100, 100]),
        ([(6, 105, 2)], [0, 0, 0, 0, 0, 5, 55, 105, 105]),  # within the schedule's own blend, which then ends
        ([(1, 100, 4), (3, 150, 2)], [0, 25, 50, 100, 150, 150]),  # from the mixture reached
        ([(1, 100, 2), (2, 200, 0), (4, 0, 4)], [0, 50, 200, 200, 150, 100, 50, 0, 0]),
        ([(1, 100, 4), (1, 200, 4)], [0, 50, 100, 150, 200]),  # nobody has seen the first
    ],
)
def test_a_turn_begins_at_the_mixture_that_is_reached(turns, values):
    turns = [Turn(chunk, prompt(value), transition) for chunk, value, transition in turns]
    assert shown(replace(SCHEDULED, turns=tuple(turns)), len(values)) == pytest.approx(values)


def test_a_track_that_is_turned_on_the_way_says_the_same_and_stays_small():
    torch.manual_seed(0)
    base = PromptTrack(tuple(torch.randn(2, 1, 3, 4)), (4, 4), blend=3)
    turns = tuple(Turn(chunk, torch.randn(1, 3, 4), n) for chunk, n in ((2, 3), (3, 4), (6, 0), (7, 5)))
    whole, steered = replace(base, turns=turns), base
    for index in range(14):
        for turn in turns:
            if turn.chunk == index:
                steered = steered.turned(turn)
                assert (len(steered.embeddings), len(steered.turns)) == (1, 1)
        assert torch.equal(steered.at(index), whole.at(index))


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_turn_takes_the_place_of_another_at_its_chunk(chunk):
    first, second = (Turn(chunk, prompt(value), 2) for value in (100, 200))
    alone = shown(replace(SCHEDULED, turns=(second,)), 5)
    assert shown(replace(SCHEDULED, turns=(first,)).turned(second), 5) == alone


def chunk_of(mean, std):
    """A chunk whose channels all have this mean and (sample) deviation."""
    values = torch.tensor([-1.0, 1.0]).repeat(9 * 4 * 4 // 2)
    values = mean + std * values / values.std()
    return values.view(1, 1, 9, 4, 4).expand(1, 16, -1, -1, -1).contiguous()


def test_drift_is_judged_by_running_averages():
    """By hand: 16 channels alike, so a distance d per channel is 4 d in all; the average moves by a tenth first."""
    anti_drift = AntiDrift()
    memory = anti_drift.observe(Memory.empty(1, 4, 4), chunk_of(0.0, 1.0))
    assert not memory.drifted  # the first chunk is the average
    torch.testing.assert_close(memory.statistics.mean, torch.zeros(1, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(memory.statistics.var, torch.ones(1, 16), atol=1e-5, rtol=0)

    far = anti_drift.observe(memory, chunk_of(1.0, 2.0))
    torch.testing.assert_close(far.statistics.mean, torch.full((1, 16), 0.1), atol=1e-5, rtol=0)
    torch.testing.assert_close(far.statistics.var, torch.full((1, 16), 0.9 + 0.4), atol=1e-4, rtol=0)
    assert far.drifted

    # mean 0.04: 4 * 0.9 * 0.04 = 0.144 < 0.15; mean 0.05: 0.18. Both distances must exceed the threshold.
    assert not anti_drift.observe(memory, chunk_of(0.04, 2.0)).drifted
    assert anti_drift.observe(memory, chunk_of(0.05, 2.0)).drifted
    assert not anti_drift.observe(memory, chunk_of(5.0, 1.0)).drifted


def test_correction_touches_the_newest_chunk_of_the_memory_only():
    anti_drift = AntiDrift()
    memory = Memory(latents(1, 19), latents(2, 1))
    assert anti_drift.correct(memory, torch.Generator()) is memory
    corrected = anti_drift.correct(replace(memory, drifted=True), torch.Generator().manual_seed(5))
    noise = torch.randn(latents(1, 9).shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(corrected.latents[:, :, :10], memory.latents[:, :, :10])
    torch.testing.assert_close(corrected.latents[:, :, 10:], memory.latents[:, :, 10:] + 0.1 * noise)
    assert corrected.anchor is memory.anchor
    assert not corrected.drifted


def test_correction_shows_in_later_chunks_only(models):
    always = AntiDrift(mean_threshold=-1.0, var_threshold=-1.0)
    schedule = replace(DISTILLED, steps=(1, 1, 1))
    plain, _, _ = run(models[1], schedule, VideoStart(), 1)
    corrected, memory, _ = run(models[1], replace(schedule, anti_drift=always), VideoStart(), 1)
    assert torch.equal(plain, corrected)
    assert torch.equal(memory.latents[:, :, -9:], corrected)  # nothing is drawn after the last chunk


@pytest.mark.parametrize("frames", [0, -1])
def test_no_frames_are_refused(frames):
    with pytest.raises(ValueError, match="at least 1 frame"):
        num_chunks(frames)
