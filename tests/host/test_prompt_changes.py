"""Prompts that took over: their JSON, what of them still shows, and Helios Prompt Schedule made from them."""

import json
import logging

import pytest
import torch

from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.sockets.conditioning import find_track
from comfyui_helios.host.sockets.prompt_changes import Change, SteeredPrompts, still_shown
from comfyui_helios.host.sockets.text_encoding import encode_prompt
from comfyui_helios.nodes.prompts import HeliosPromptSchedule
from harness.tiny import make_official_folder
from support.runs import run_node

CHANGES = {0: Change("“Grün”\n\\ {a: 1}", 0), 4: Change("A blue lake.", 3)}


def text(**changed):
    return json.dumps({**json.loads(SteeredPrompts("A red fox.", 7, CHANGES).to_json(42)), **changed})


def test_it_comes_back_from_one_line_as_it_was():
    for begins_with in ("A red fox.", "", None):  # a video may begin with an empty prompt
        prompts = SteeredPrompts(begins_with, 7, CHANGES)
        line = prompts.to_json(42)
        assert "\n" not in line and json.loads(line)["seed"] == 42
        assert SteeredPrompts.from_json(line) == prompts


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("A red fox.", "Expecting value"),
        ("[]", "it holds no object"),
        ("{}", "its format is None instead of 'helios prompts 1'"),
        ("[" * 100_000, "nested more than"),
        (text(chunks=0), "`chunks` is a whole number from 1 to 99999, got 0"),
        (text(chunks=True), "`chunks` is a whole number"),
        (text(begins_with="A" * 100_001), "A prompt is a text"),
        (text(begins_with=["A"]), "A prompt is a text"),
        (text(prompts={}), "`prompts` is no list"),
        (text(prompts=[{}] * 2001), "it has 2001 prompts of at most 2000"),
        (" " * (16 * 2**20 + 1), "it has 16777217 characters of at most 16777216"),
        (" " * (16 * 2**20 + 1), "characters of at most 16777216"),
        (text(prompts=["A"]), "one of `prompts` is 'A'"),
        (text(prompts=[{"after_chunk": 1, "prompt": "A"}]), "has a prompt and a transition"),
        (text(prompts=[{"after_chunk": 1, "prompt": " ", "transition": 0}]), "has at least a word, got ' '. Paste"),
        (text(prompts=[{"after_chunk": -1, "prompt": "A", "transition": 0}]), "`after_chunk` is a whole number"),
        (text(prompts=[{"after_chunk": 1, "prompt": "A", "transition": 1e9}]), "A transition is a whole number"),
        (text(prompts=[{"after_chunk": 1, "prompt": "A", "transition": 0}] * 2), "two prompts come after chunk 1"),
        ('{"format": NaN}', "NaN is no number"),
    ],
)
def test_what_is_none_is_refused_with_the_reason(broken, why):
    with pytest.raises(ValueError, match="`steered` holds no prompts of a steered video: ") as error:
        SteeredPrompts.from_json(broken)
    assert why in str(error.value)
    assert "Paste what is in a .json file of output/helios_prompts" in str(error.value)


A, B, C = Change("a", 3), Change("b", 4), Change("c", 0)


@pytest.mark.parametrize(
    ("changes", "chunk", "shown"),
    [
        ({}, 5, {}),
        ({1: A}, 1, {}),
        ({1: A}, 2, {1: A}),
        ({1: A, 3: B}, 5, {1: A, 3: B}),
        ({1: A, 4: B}, 5, {1: A, 4: B}),  # the first was alone in chunk 3, from which the second goes on
        ({1: A, 4: B}, 8, {4: B}),
        ({1: A, 4: B, 5: C}, 6, {5: C}),
        ({1: C, 2: B, 3: A}, 5, {1: C, 2: B, 3: A}),
    ],
)
def test_what_still_shows_reaches_back_to_the_newest_that_was_alone(changes, chunk, shown):
    assert still_shown(changes, chunk) == shown


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("steered") / "Helios-Distilled"
    make_official_folder(path, "distilled")
    return load_text_encoder(path, torch.float32)


def schedule(clip, begins_with, **widgets):
    defaults = {w.id: w.default for w in HeliosPromptSchedule.define_schema().inputs if w.id not in ("clip", "before")}
    widgets = {"steered": SteeredPrompts(begins_with, 30, {4: Change("A blue lake.", 3)}).to_json(0), **widgets}
    positive, _, frames, _ = run_node(HeliosPromptSchedule, clip, **{**defaults, **widgets})
    return find_track(positive), frames


def test_a_schedule_is_as_long_as_the_video_and_begins_as_it_did(clip, caplog):
    caplog.set_level(logging.INFO)
    track, frames = schedule(clip, "A red fox.")
    assert "`steered` has the first prompt: those above, and `before`, are not used." in caplog.messages
    assert (track.chunks, frames) == ((30,), 990)
    assert torch.equal(track.at(3), encode_prompt(clip, "A red fox.")[0][0])
    assert torch.equal(track.at(6), encode_prompt(clip, "A blue lake.")[0][0])


def test_where_the_first_prompt_is_not_known_the_nodes_own_come_first(clip):
    plain, _ = schedule(clip, None, steered="")
    track, frames = schedule(clip, None)
    assert (track.chunks, frames) == ((7, 7, 16), 990)  # the last one stays
    assert torch.equal(track.at(3), plain.at(3))
    assert not torch.equal(track.at(4), plain.at(4))


def test_steered_is_the_last_input_and_empty():
    last = HeliosPromptSchedule.define_schema().inputs[-1]
    assert (last.id, last.default, last.optional) == ("steered", "", True)
