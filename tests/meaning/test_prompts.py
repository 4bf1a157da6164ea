"""A video shows what its prompt says: held-out prompts through the nodes, read off the frames by training/detect.py."""

from functools import cache

import numpy as np
import pytest
from detect import count_right, find, truth
from world import sample_clip

from harness.meaning import MEASURING, QUICK, ask, decode, load, needed_chunks, sample

PARTS = ("colour", "shape", "motion")
PROMPTS = 4
RIGHT = 3  # of them at least; today it is all, and one is to spare for another processor's rounding


@cache
def held_out_clips():
    """By seed, the first clip of every other motion: none that circles, of which either way is as good."""
    clips = {}
    for number in range(40):
        clip = sample_clip(MEASURING + number, 1, held_out=True)
        clips.setdefault(clip.acts[0].motion, clip)
    return dict(list(enumerate(clips.values()))[1 : 2 * PROMPTS : 2])


@cache
def found_by(variant):
    """What a video of each clip's caption shows."""
    tiny = load(variant).in_steps(*QUICK[variant])
    return [
        find(decode(tiny, sample(tiny, ask(tiny, clip.acts[0].caption), needed_chunks(clip), seed)))
        for seed, clip in held_out_clips().items()
    ]


def wanted():
    return [truth(clip, 0) for clip in held_out_clips().values()]


def shares(found, truths):
    return count_right(list(zip(found, truths, strict=True)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("variant", QUICK)
def test_a_video_shows_what_its_prompt_says(variant, part):
    assert shares(found_by(variant), wanted())[part] >= RIGHT / PROMPTS, found_by(variant)


@pytest.mark.parametrize("variant", QUICK)
def test_a_video_does_not_show_what_another_prompt_says(variant):
    others = [shares(found_by(variant), np.roll(wanted(), shift)) for shift in range(1, PROMPTS)]
    chance = {part: np.mean([other[part] for other in others]) for part in (*PARTS, "together")}
    assert chance["colour"] < 0.5
    assert chance["motion"] < 0.3
    assert chance["together"] < 0.1
