"""Prompts that change on the way, and prompts from a file."""

import asyncio
import json
import math
import os
import threading
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy.sampler_helpers import convert_cond

from comfyui_helios.host.files import prompt_file as prompts_file
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.guard import guarded
from comfyui_helios.host.sockets.conditioning import find_track
from comfyui_helios.host.sockets.text_encoding import encode_prompt
from comfyui_helios.nodes import prompts as prompt_nodes
from comfyui_helios.nodes.prompts import NODES, HeliosPromptFromFile, HeliosPromptSchedule
from harness.tiny import make_official_folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "Helios-Distilled"
    make_official_folder(path, "distilled")
    return load_text_encoder(path, torch.float32)


@pytest.fixture(autouse=True)
def on_a_node(monkeypatch, shown):
    for node in NODES:
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"))


def run(clip, *prompts, unit="chunks", blend=0, before=None, defaults=False):
    """The results of a HeliosPromptSchedule with these (text, length) from its first slot on."""
    widgets = {w.id: w.default for w in HeliosPromptSchedule.define_schema().inputs if w.id not in ("clip", "before")}
    if not defaults:
        slots = [*prompts, *[("", 0.0)] * (4 - len(prompts))]
        for number, (text, length) in enumerate(slots, start=1):
            widgets |= {f"prompt_{number}": text, f"length_{number}": length}
        widgets |= {"unit": unit, "blend": blend, "negative": "blurry"}
    return guarded(HeliosPromptSchedule).execute(clip, **widgets, before=before).result


class NeverUsed:
    """A CLIP of which nothing may be asked."""


# HeliosPromptSchedule


def test_defaults_run_and_are_three_prompts_of_seven_chunks(clip):
    positive, negative, frames, summary = run(clip, defaults=True)
    track = find_track(positive)
    assert (track.chunks, track.blend, frames) == ((7, 7, 7), 3, 21 * 33)
    assert summary.startswith("1: 7 chunks (9.6 s) | 2: 7 chunks (9.6 s) | 3: 7 chunks (9.6 s)")
    assert all(embedding[0, 511].abs().max() == 0 for embedding in track.embeddings)  # fits into 512 tokens
    assert find_track(negative) is None


def test_every_prompt_is_encoded_in_its_order(clip):
    texts = ("a red fox", "a blue lake", "white snow")
    positive, negative, _, _ = run(clip, *((text, 4.0) for text in texts), blend=3)
    track = find_track(positive)
    for embedding, text in zip(track.embeddings, texts, strict=True):
        assert torch.equal(embedding, encode_prompt(clip, text)[0][0])
    assert (track.embeddings[0] - track.embeddings[1]).abs().max() > 0.1
    assert torch.equal(negative[0][0], encode_prompt(clip, "blurry")[0][0])


def test_other_samplers_see_the_first_prompt_alone(clip):
    [[embedding, extras]] = run(clip, ("a red fox", 2.0), ("a blue lake", 2.0))[0]
    [[expected, expected_extras]] = encode_prompt(clip, "a red fox")
    assert torch.equal(embedding, expected)
    assert extras.keys() - {"helios_prompts"} == expected_extras.keys()
    assert torch.equal(convert_cond([[embedding, extras]])[0]["cross_attn"], expected)


def test_of_a_text_encoder_that_makes_several_embeddings_the_first_is_for_all_steps(clip, monkeypatch):
    """As one does whose LoRA has keyframes: the sampler takes what lies beside prompts in a row for unchanged."""

    def twice(*args, **more):
        [[embedding, values]] = encode_prompt(*args, **more)
        halves = [{"clip_start_percent": start, "clip_end_percent": start + 0.5} for start in (0.0, 0.5)]
        return [[times * embedding, values | half] for times, half in zip((1, 2), halves, strict=True)]

    monkeypatch.setattr(prompt_nodes, "encode_prompt", twice)
    positive = run(clip, ("a red fox", 2.0), ("a blue lake", 2.0))[0]
    expected = encode_prompt(clip, "a red fox")[0][0]
    assert [torch.equal(embedding, expected) for embedding, _ in positive] == [True, True]
    assert [values["clip_start_percent"] for _, values in positive] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("unit", "length", "chunks"),
    [
        ("seconds", 1.375, 1),
        ("seconds", 0.1, 1),
        ("seconds", 2.0, 1),  # 1.45
        ("seconds", 2.1, 2),  # 1.53
        ("seconds", 10.0, 7),  # 7.27
        ("seconds", 60.0, 44),  # 43.6
        ("chunks", 5.0, 5),
        ("chunks", 5.4, 5),
        ("chunks", 2.5, 3),
        ("chunks", 0.2, 1),
    ],
)
def test_lengths_become_whole_chunks_and_at_least_one(clip, unit, length, chunks):
    positive, _, frames, _ = run(clip, ("a fox", length), unit=unit)
    assert find_track(positive).chunks == (chunks,)
    assert frames == chunks * 33


def test_the_node_shows_what_it_made_of_seconds(clip, shown):
    summary = run(clip, ("a fox", 7.0), ("a lake", 1.0), unit="seconds")[3]
    assert summary == "1: 5 chunks (6.9 s) | 2: 1 chunk (1.4 s) | total: 6 chunks (8.2 s)"
    assert shown[-1] == (summary, "7")


def test_before_puts_the_prompts_of_another_node_first(clip):
    first = run(clip, ("a red fox", 4.0), ("a blue lake", 5.0), blend=1)[0]
    positive, _, frames, summary = run(clip, ("white snow", 6.0), blend=3, before=first)
    track = find_track(positive)
    assert (track.chunks, track.blend, frames) == ((4, 5, 6), 3, 15 * 33)
    assert "3: 6 chunks" in summary
    for embedding, text in zip(track.embeddings, ("a red fox", "a blue lake", "white snow"), strict=True):
        assert torch.equal(embedding, encode_prompt(clip, text)[0][0])
    [[embedding, _]] = positive
    assert torch.equal(embedding, encode_prompt(clip, "a red fox")[0][0])
    assert find_track(first).chunks == (4, 5)  # which the other node's own users still see


REFUSED = {
    "no prompt": ([], {}, r"no prompt"),
    "blank text": ([(" \n", 3.0)], {}, r"Prompt 1 of this node is empty, but lasts 3"),
    "empty text between": ([("a", 3.0), ("", 2.0), ("c", 3.0)], {}, r"Prompt 2 of this node is empty, but lasts 2"),
    "gap": ([("a", 3.0), ("", 0.0), ("c", 3.0)], {}, r"Prompt 2 of this node is empty, but a later one is used"),
    "text without length": ([("a", 3.0), ("b", 0.0), ("c", 3.0)], {}, r"Prompt 2 .* has a text, but its length is 0"),
    "last text without length": ([("a", 3.0), ("b", 0.0)], {}, r"Prompt 2 .* has a text, but its length is 0"),
    "as long as the blend": ([("a", 4.0), ("b", 3.0)], {"blend": 3}, r"Prompt 2 lasts 3 chunks.*blending takes 3"),
    "seconds shorter than the blend": ([("a", 4.0)], {"blend": 3, "unit": "seconds"}, r"Prompt 1 lasts 3 chunks"),
    "before without prompts": ([("a", 4.0)], {"before": [[torch.zeros(1, 2, 3), {}]]}, r"'before' carries no prompts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_video_is_refused_before_anything_is_encoded(case):
    prompts, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(NeverUsed(), *prompts, **options)


def test_a_blend_too_long_for_the_prompts_before_is_refused(clip):
    first = run(clip, ("a", 3.0))[0]
    with pytest.raises(ValueError, match="Prompt 1 lasts 3 chunks"):
        run(NeverUsed(), ("b", 9.0), blend=3, before=first)


# HeliosPromptFromFile


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(folder))
    return folder


def validated(name):
    return asyncio.run(HeliosPromptFromFile.validate_inputs(name))


def take(name, index=0):
    assert validated(name) is True
    return tuple(guarded(HeliosPromptFromFile).execute(name, index).result)


def refusal(name):
    """The message of a file that cannot be used, the same before the graph runs and while it does."""
    with pytest.raises(ValueError) as error:
        guarded(HeliosPromptFromFile).execute(name, 0)
    assert validated(name) == str(error.value)
    return str(error.value)


def test_queued_runs_walk_through_the_file_and_start_over(inputs, shown):
    (inputs / "p.txt").write_text("a fox\na lake\nsnow", encoding="utf-8")
    assert [take("p.txt", index) for index in (0, 1, 2, 3, 7)] == [
        ("a fox", 3, 0),
        ("a lake", 3, 1),
        ("snow", 3, 2),
        ("a fox", 3, 0),
        ("a lake", 3, 1),
    ]
    assert shown[1] == ("2 of 3: a lake", "7")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_blank_lines_and_comments_are_skipped(inputs, mark, end):
    lines = ["# mine", "", " ein Fuchs, 狐狸 ", "  # not this", "\t", "a lake # kept\u2028as one line", ""]
    (inputs / "p.txt").write_bytes(mark + end.join(line.encode() for line in lines))
    assert take("p.txt", 0) == ("ein Fuchs, 狐狸", 2, 0)
    assert take("p.txt", 1) == ("a lake # kept\u2028as one line", 2, 1)


@pytest.mark.parametrize("content", ["", "\ufeff", "\n \n# only this\n"], ids=["empty", "BOM alone", "comments"])
def test_a_file_without_prompts_is_refused(inputs, content):
    (inputs / "p.txt").write_text(content, encoding="utf-8")
    assert "'p.txt' holds no prompt" in refusal("p.txt")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_other_encodings_are_refused(inputs, encoding):
    (inputs / "p.txt").write_text("a café, a fox", encoding=encoding)
    assert "'p.txt' is not UTF-8" in refusal("p.txt")


@pytest.mark.parametrize(
    "name",
    [
        "missing.txt",
        "../secret.txt",
        "sub/../../secret.txt",
        "..\\secret.txt",
        "{outside}/secret.txt",
        "secret.txt [output]",
        "sub/inner.txt",
        "notes.md",
        "folder.txt",
        ".hidden.txt",
        "",
        ".",
        "p.txt\0",
    ],
)
def test_only_text_files_of_the_input_folder_are_read(inputs, name):
    (inputs.parent / "secret.txt").write_text("secret")
    (inputs / "sub").mkdir()
    (inputs / "sub" / "inner.txt").write_text("inner")
    (inputs / "folder.txt").mkdir()
    for other in ("p.txt", "notes.md", ".hidden.txt"):
        (inputs / other).write_text("a fox")
    assert f"in {inputs}" in refusal(name.format(outside=inputs.parent))


def test_a_file_too_large_for_prompts_is_refused_without_reading_it_all(inputs):
    with (inputs / "p.txt").open("wb") as file:
        file.truncate(10**12)  # takes no room, and would take all memory
    assert "'p.txt' is larger than 10 MB" in refusal("p.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_pipes_and_devices_are_no_text_files(inputs):
    os.mkfifo(inputs / "pipe.txt")
    (inputs / "device.txt").symlink_to("/dev/zero")
    assert HeliosPromptFromFile.define_schema().inputs[0].options == []
    for name in ("pipe.txt", "device.txt"):
        assert "There is no text file" in refusal(name)


def test_a_file_is_checked_while_the_host_serves_others(inputs, monkeypatch):
    """The host asks on its event loop."""
    (inputs / "p.txt").write_text("a fox")
    others = threading.Event()
    read = prompts_file.read_prompts
    monkeypatch.setattr("comfyui_helios.nodes.prompts.read_prompts", lambda name: others.wait(30) and read(name))

    async def both():
        check = asyncio.create_task(HeliosPromptFromFile.validate_inputs("p.txt"))
        await asyncio.sleep(0.01)
        others.set()
        return await check

    assert asyncio.run(both()) is True


def test_a_long_prompt_of_a_row_is_told_by_its_number(clip, shown, caplog):
    with caplog.at_level("DEBUG"):
        run(clip, ("a fox", 4.0), ("a blue lake " * 400, 4.0))
    assert shown[-1][0].startswith("Prompt 2 has ")
    assert shown[-1][0].endswith("\n1: 4 chunks (5.5 s) | 2: 4 chunks (5.5 s) | total: 8 chunks (11.0 s)")
    assert "a blue lake" not in caplog.text


def test_the_node_lists_the_text_files_there_are_now(inputs):
    for name in ("b.txt", "A.TXT", "c.json"):
        (inputs / name).write_text("a fox")
    assert HeliosPromptFromFile.define_schema().inputs[0].options == ["A.TXT", "b.txt"]
    assert take("A.TXT") == ("a fox", 1, 0)
    inputs.joinpath("b.txt").unlink()
    assert HeliosPromptFromFile.define_schema().inputs[0].options == ["A.TXT"]


def test_the_schema_needs_no_input_folder(inputs):
    inputs.rmdir()
    assert HeliosPromptFromFile.define_schema().inputs[0].options == []


def test_a_changed_file_runs_again_and_an_unchanged_one_does_not(inputs):
    path = inputs / "p.txt"
    path.write_text("a fox")
    before = HeliosPromptFromFile.fingerprint_inputs("p.txt", 0)
    assert HeliosPromptFromFile.fingerprint_inputs("p.txt", 0) == before
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    touched = HeliosPromptFromFile.fingerprint_inputs("p.txt", 0)
    path.write_text("a fox and a lake")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert len({before, touched, HeliosPromptFromFile.fingerprint_inputs("p.txt", 0)}) == 3


def test_a_linked_file_is_checked_when_it_is_known_and_read_in_every_run():
    assert validated(None) is True
    assert math.isnan(HeliosPromptFromFile.fingerprint_inputs(None, 0))  # which equals no other, nor itself


def test_what_the_page_is_told_of_the_index_is_plain_json(inputs):
    options = HeliosPromptFromFile.define_schema().inputs[1].as_dict()
    assert json.loads(json.dumps(options["control_after_generate"])) in (True, "increment")
