"""What a video goes on from means as much as its prompt: an image, a video, a latent, another prompt, its own past."""

import numpy as np
import pytest
from detect import find, truth
from world import FRAMES_PER_CHUNK, MOTIONS, Act, Clip, render

from comfyui_helios.nodes.prompts import SLOTS, HeliosPromptSchedule
from harness.meaning import QUICK, SIZE, ask, decode, load, sample
from harness.nodes import run_node

FIRST_COLOUR_GOAL = ("blue",)
FIRST_COLOUR_ASSERTED = ("blue", "cyan")  # half way back from green


def distilled():
    return load("distilled").in_steps(*QUICK["distilled"])


def clip_of(colour, shape, motion, phase=0.2):
    """A big thing on black, for a chunk."""
    caption = f"A big {colour} {shape} {MOTIONS[motion]} on a black background."
    return Clip(shape, "big", "black", (Act(colour, motion, caption),), phase, (0.5, 0.5))


def drawn(clip, frames):
    """The first frames of a clip, as IMAGE sockets have them."""
    return render(clip, 0, frames, SIZE).permute(0, 2, 3, 1)


def going_on(clip, **start):
    """A chunk that follows on what is given under the caption of this clip."""
    tiny = distilled()
    return decode(tiny, sample(tiny, ask(tiny, clip.acts[0].caption), 1, seed=1, **start))


def place(frame):
    """How far to the right the thing in a frame (H, W, 3) is, 0..1."""
    columns = (np.ptp(frame, axis=-1) > 0.4).sum(0)
    return columns @ np.linspace(0, 1, len(columns)) / columns.sum()


def test_a_video_of_an_image_keeps_its_thing_where_it_is_and_moves_it_as_told():
    clip = clip_of("blue", "ball", "swing", phase=0.75)  # where it turns at the left
    image = drawn(clip, 1)
    video = going_on(clip, start_image=image)
    assert find(video) == truth(clip, 0)
    assert abs(place(video[0]) - place(image[0].numpy())) < 0.15


@pytest.mark.parametrize("motion", ["orbit_right", "orbit_left"])
def test_a_video_goes_on_with_the_motion_of_the_one_before(motion):
    """Which way a ball circles does not come out of the prompt: as often as not, it is the other way without a past."""
    clip = clip_of("red", "ball", motion)
    assert find(going_on(clip, video=drawn(clip, FRAMES_PER_CHUNK))) == truth(clip, 0)


def test_a_video_goes_on_with_the_motion_of_a_latent():
    tiny, prompts = distilled(), ask(distilled(), clip_of("red", "ball", "orbit_right").acts[0].caption)
    before = sample(tiny, prompts, 1, seed=3)
    after = sample(tiny, prompts, 1, seed=4, previous=before)
    assert find(decode(tiny, before)) == find(decode(tiny, after))


def in_a_row(tiny, prompts, blend, seed):
    """The LATENT of a video with these prompts, {caption: chunks}."""
    texts, lengths = [*prompts, "", "", ""], [*map(float, prompts.values()), 0.0, 0.0, 0.0]
    slots = {f"prompt_{slot}": text for slot, text in zip(SLOTS, texts, strict=False)}
    slots |= {f"length_{slot}": length for slot, length in zip(SLOTS, lengths, strict=False)}
    positive, negative, frames, _ = run_node(HeliosPromptSchedule, tiny.clip, "chunks", blend, "", **slots)
    return sample(tiny, (positive, negative), frames // FRAMES_PER_CHUNK, seed)


def swinging(colour):
    return f"A big {colour} swings from side to side on a black background."


def test_prompts_in_a_row_turn_red_into_blue_within_the_blend_and_not_before():
    red, blue = swinging("red square"), swinging("blue square")
    tiny = distilled()
    latent = in_a_row(tiny, {red: 3, blue: 3}, blend=2, seed=0)
    first_of_blend, last_of_blend = np.split(decode(tiny, latent, [3, 4]), 2)
    shown = [find(frames) for frames in (first_of_blend, last_of_blend[-24:])]
    assert [found.colour for found in shown] == ["red", "blue"]
    assert {(found.shape, found.motion) for found in shown} == {("square", "swing")}


def test_the_first_colour_is_not_forgotten():
    """The colour between the two is shown for longer than a history reaches: the anchor alone knows the first one."""
    tiny = distilled()
    things = {"blue square": 1, "green square": 4, "square in its first colour": 1}
    latent = in_a_row(tiny, {swinging(thing): chunks for thing, chunks in things.items()}, blend=0, seed=2)
    assert find(decode(tiny, latent, [5])).colour in FIRST_COLOUR_ASSERTED
