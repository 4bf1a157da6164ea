"""A video that is steered while it is made: by the same prompts at the same chunks it is made again, exactly."""

import errno
import itertools
import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode

from comfyui_helios.helios_core.schedule import BASE
from comfyui_helios.host.files.text_encoder import load_text_encoder
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.host.sampling.guider import HeliosGuider
from comfyui_helios.host.sockets.prompt_changes import Change, SteeredPrompts
from comfyui_helios.host.stream import live_sessions, plain_files, prompt_turns, run_folder, video_writer
from comfyui_helios.host.stream.live_sessions import sessions
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from harness.tiny import make_official_folder
from support.runs import QUICK, run_node
from support.steered_runs import (
    CHUNKS,
    FIRST,
    SECOND,
    THIRD,
    Killed,
    Pages,
    beginning,
    events,
    of_chunks,
    scheduled,
    script,
    stream,
)
from support.streams import WatchedVAE, temporary_files

GUIDED = replace(BASE, steps=(2,), guidance_scale=3.0)
ASKED = {1: [Change("Nobody sees this.", 0), Change(SECOND, 3)], 3: [Change(THIRD, 2)]}  # by the chunks before it
APPLIED = {1: Change(SECOND, 3), 3: Change(THIRD, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "Helios-Distilled"
    make_official_folder(path, "distilled")
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "fp32")


@pytest.fixture(scope="module")
def clip(folder):
    return load_text_encoder(folder, torch.float32)


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """An output folder of its own, no session, and the host's temp folder empty."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(live_sessions, "_sessions", {})
    for name in temporary_files():
        (Path(folder_paths.get_temp_directory()) / name).unlink()
    return tmp_path / run_folder.FOLDER


@pytest.fixture(scope="module")
def steered(model, clip, tmp_path_factory):
    """(JSON beside the video, all latents) of a run that nothing has cut off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(tmp_path_factory.mktemp("steered")))
        video, latents, _ = stream(model, clip, Pages(ASKED))
        return script(video), latents


@pytest.mark.parametrize(("schedule", "batch"), [(QUICK, 1), (GUIDED, 2)], ids=["distilled", "guided batch"])
def test_the_same_seed_and_prompts_give_the_same_latents(model, clip, schedule, batch):
    video, latents, tail = stream(model, clip, Pages(ASKED, batch=batch), schedule, beginning(clip, batch=batch))
    assert events(sessions()[-1].describe()["steering"]) == APPLIED
    assert json.loads(script(video))["seed"] == 5
    [kept] = (Path(folder_paths.get_output_directory()) / "helios_prompts").iterdir()
    assert kept.read_text(encoding="utf-8") == script(video)

    start, summary = scheduled(clip, script(video), batch)
    assert summary.endswith("total: 5 chunks (6.9 s) | steered after chunk 1, 3")
    [made_again] = run_node(HeliosChunkedSampler, model, *start, schedule, 5)
    assert torch.equal(made_again["samples"], latents)
    assert torch.equal(made_again["samples"][:, :, -9:], tail["samples"])


def test_a_video_that_is_made_again_and_steered_anew_is_written_with_what_it_was_made_from(model, clip, steered):
    """So that its JSON may take the place of the first in `steered`."""
    start, _ = scheduled(clip, steered[0])
    node = {"class_type": "HeliosPromptSchedule", "inputs": {"prompt_1": "A fox.", "steered": steered[0]}}
    last = Change("A green hill.", 2)
    video, latents, _ = stream(model, clip, Pages({2: [last]}), start=start, prompts=node)
    assert SteeredPrompts.from_json(script(video)) == SteeredPrompts(FIRST, CHUNKS, {1: APPLIED[1], 2: last})
    start, _ = scheduled(clip, script(video))
    [made_again] = run_node(HeliosChunkedSampler, model, *start, QUICK, 5)
    assert torch.equal(made_again["samples"], latents)


def test_prompts_show_in_the_chunks_after_them_and_in_no_earlier_one(model, clip, steered):
    _, latents, _ = stream(model, clip, Pages({}))
    assert torch.equal(of_chunks(steered[1], 0, 1), of_chunks(latents, 0, 1))
    for chunk in range(1, CHUNKS):
        moved = of_chunks(steered[1], chunk, chunk + 1) - of_chunks(latents, chunk, chunk + 1)
        assert moved.abs().max() > 0.1
    assert not list(Path(folder_paths.get_temp_directory()).glob("*.json"))  # nobody has steered it


@pytest.mark.parametrize("made", [2, 4])
def test_a_steered_run_that_was_killed_goes_on_to_the_same_latents(model, clip, steered, made):
    """What was asked for, and had not taken effect when it died, is asked for anew."""
    with pytest.raises(Killed):
        stream(model, clip, Pages(ASKED, killed_after=made))
    later = {position: changes for position, changes in ASKED.items() if position >= made}
    video, latents, _ = stream(model, clip, Pages(later))
    assert torch.equal(latents, steered[1])
    assert script(video) == steered[0]


def test_what_still_shows_cannot_go_on_without_its_text_encoder(model, clip):
    start = beginning(clip)
    with pytest.raises(Killed):
        stream(model, clip, Pages(ASKED, killed_after=3), start=start)
    with pytest.raises(ValueError, match=r"changed on the way \(after chunk 1\).*Connect `clip`, or switch resume off"):
        stream(model, None, Pages({}), start=start)


def test_a_whole_one_is_encoded_again_without_it(model, clip, steered):
    start = beginning(clip)
    stream(model, clip, Pages(ASKED), start=start)
    failing = model.clone()
    failing.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", lambda *_, **__: pytest.fail("it was sampled"))
    video, latents, _ = stream(failing, None, Pages({}), start=start, live=False)
    assert torch.equal(latents, steered[1])
    assert script(video) == steered[0]


@pytest.mark.parametrize(("finish_after", "chunks"), [(1, 2), (3, 4)])
def test_it_goes_on_until_somebody_says_finish_and_makes_what_was_asked_at_least(model, clip, finish_after, chunks):
    """`finish` comes while a chunk is decoded, when the next is decided: it is the last."""
    settings = {"until_finished": True, "start": beginning(clip, 2)}
    _, latents, tail = stream(model, clip, Pages({}, finish_after), trim=True, **settings)
    assert latents.shape[2] == 9 * chunks
    assert tail["helios"].next_chunk == chunks
    told = sessions()[-1].describe()
    assert (told["frames"], told["written"], told["steering"]["finishing"]) == (None, 33 * chunks, True)
    _, again, _ = stream(model, clip, Pages({}), **settings)  # it has its end
    assert torch.equal(again, latents)


def test_where_nothing_is_trimmed_nobody_is_told_that_it_cannot_be(model, clip, shown):
    positive, negative, latent = beginning(clip, 1)
    start = positive, negative, {"samples": latent["samples"]}
    stream(model, clip, Pages({}, finish_after=1), start=start, until_finished=True, trim=True)
    assert not any("Not trimmed" in text for text, _ in shown)


def test_a_cache_of_steps_counts_all_chunks_of_a_run_without_an_end(model, clip, caplog):
    caplog.set_level(logging.INFO)
    [cached] = EasyCacheNode.execute(model.clone(), 1e9, 0.0, 1.0, False).result
    schedule = replace(BASE, steps=(8,), zero_init=False)
    stream(cached, clip, Pages({}, finish_after=3), schedule, beginning(clip, 1), until_finished=True)
    assert "EasyCache - skipped 6/8 steps (4.00x speedup)." in caplog.messages  # a chunk's, on average


def test_a_run_without_an_end_that_was_killed_goes_on_from_where_it_was(model, clip):
    settings = {"until_finished": True, "start": beginning(clip, 2)}
    _, whole, _ = stream(model, clip, Pages(ASKED, finish_after=4), **settings)
    for file in Path(folder_paths.output_directory).rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(Killed):
        stream(model, clip, Pages(ASKED, killed_after=3), **settings)
    _, latents, _ = stream(model, clip, Pages({3: ASKED[3]}, finish_after=4), **settings)
    assert torch.equal(latents, whole)


def test_it_ends_by_itself_before_the_disk_is_full(model, clip, monkeypatch, shown):
    room = itertools.chain([2**40, 2**40, 1000], itertools.repeat(2**40))
    monkeypatch.setattr(video_writer, "disk_usage", lambda folder: type("Usage", (), {"free": next(room)}))
    _, latents, _ = stream(model, clip, Pages({}), until_finished=True, start=beginning(clip, 1))
    assert latents.shape[2] == 9 * 4
    assert any("The disk is nearly full" in text for text, _ in shown)
    # Somebody has made room.
    _, more, _ = stream(model, clip, Pages({}, finish_after=5), until_finished=True, start=beginning(clip, 1))
    assert more.shape[2] == 9 * 6
    assert torch.equal(of_chunks(more, 0, 4), latents)


def test_a_prompt_that_cannot_be_had_does_not_end_the_run(model, clip, shown):
    class Failing:
        """Encodes as the text encoder does, but for the second prompt."""

        tokenizer, calls = clip.tokenizer, []

        def encode_from_tokens_scheduled(self, tokens):
            self.calls.append(tokens)
            if len(self.calls) == 1:
                raise torch.OutOfMemoryError("injected: CUDA out of memory")
            [[embedding, values]] = clip.encode_from_tokens_scheduled(tokens)
            return [[embedding[..., :-1] if len(self.calls) == 2 else embedding, values]]

    asked = {1: [Change(SECOND, 0)], 2: [Change(SECOND, 0)], 3: [Change(THIRD, 0)]}
    stream(model, Failing(), Pages(asked), start=beginning(clip))
    assert events(sessions()[-1].describe()["steering"]) == {3: Change(THIRD, 0)}
    said = shown[-1][0]
    assert "not applied after chunk 1. The text encoder ran out of memory. Load it on the CPU" in said
    assert "not applied after chunk 2. The text encoder on `clip` is 31 wide, the model expects 32" in said
    assert SECOND not in said


def test_what_is_written_has_its_name_once_it_is_whole_and_is_said_to_be_too_much(model, clip, shown, monkeypatch):
    def look(part, target):
        if target.suffix == ".json":
            seen.append((part.name, target.exists(), SteeredPrompts.from_json(part.read_text("utf-8")).changes))
        put_in_place(part, target)

    seen, put_in_place = [], plain_files.put_in_place
    monkeypatch.setattr(plain_files, "put_in_place", look)
    monkeypatch.setattr(prompt_turns, "MOST_CHANGES", 1)
    video, *_ = stream(model, clip, Pages(ASKED))
    assert seen == [(part, False, APPLIED) for part in (f"{video.stem}.json.part", "steered_00001_.json.part")]
    assert "`steered` does not take so many: 2 prompts of at most 1" in shown[-1][0]


def test_prompts_that_a_full_disk_does_not_take_are_not_kept_in_part(model, clip, shown, monkeypatch):
    def write_half(path, text, **kwargs):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system's, without a name

    monkeypatch.setattr(Path, "write_text", write_half)
    video, *_ = stream(model, clip, Pages({1: [Change(SECOND, 0)]}), start=beginning(clip))
    assert f"could not be written to {video.with_suffix('.json')} (No space left on device)" in shown[-1][0]
    assert [name for name in temporary_files() if ".json" in name] == []


def test_a_prompt_that_no_chunk_comes_after_is_said_to_be_lost(model, clip, shown):
    stream(model, clip, Pages({2: [Change(SECOND, 0)]}), start=beginning(clip, 2))
    assert "was not applied: no chunk has come after it" in shown[-1][0]


@pytest.mark.parametrize("positive", ["another length", "another text encoder"])
def test_what_cannot_be_steered_is_refused_before_any_work(model, clip, positive):
    if positive == "another length":
        start = beginning(clip)
        start[0][0][0] = start[0][0][0][:, :77]
        with pytest.raises(ValueError, match="has 77 tokens, and a prompt that is to take over on the way has 512"):
            stream(model, clip, Pages({}), start=start)
    else:
        with pytest.raises(ValueError, match="Helios reads prompts with UMT5-XXL"):
            stream(model, object(), Pages({}), start=beginning(clip))


@pytest.mark.parametrize("overlap", ["off", "auto"])
def test_the_text_encoder_has_the_card_to_itself_and_the_model_comes_back(model, clip, folder, monkeypatch, overlap):
    """With "auto" a thread decodes while the next chunk is denoised, but not while a prompt is encoded."""
    log, vae = [], load_vae(folder)

    class Decoder(WatchedVAE):
        def decode(self, samples):
            log.append("decode")
            time.sleep(0.2)
            frames = super().decode(samples)
            log.append("decoded")
            return frames

    def ask(call):
        if call == 1:
            sessions()[-1].steering.ask(Change(SECOND, 0))

    def wrapper(executor, *args, **kwargs):
        if log[-1] != "predict":
            log.append("predict")
        return executor(*args, **kwargs)

    def load_again(self):
        log.append("load")
        original(self)

    class Encoder:
        tokenizer = clip.tokenizer

        def encode_from_tokens_scheduled(self, tokens):
            log.append("encode")
            return clip.encode_from_tokens_scheduled(tokens)

    original = HeliosGuider.load_again
    monkeypatch.setattr(HeliosGuider, "load_again", load_again)
    logged = model.clone()
    logged.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    log.append("begin")
    stream(logged, Encoder(), Decoder(vae, ask), start=beginning(clip, 3), overlap_decode=overlap)
    at = log.index("encode")
    assert log[at - 1 : at + 3] == ["decoded", "encode", "load", "predict"]
    assert log.count("encode") == 1


def test_with_group_offloading_it_is_the_same(folder, clip, steered):
    offloaded = load_model(str(folder), "fp32", offloading=Offloading("block", 1, "host"))
    _, latents, _ = stream(offloaded, clip, Pages(ASKED))
    assert torch.equal(latents, steered[1])


@pytest.mark.parametrize("batch", [1, 2])
def test_cancel_keeps_what_is_finished_and_names_it(model, clip, shown, batch):
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(model, clip, Pages(ASKED, cancelled_after=3, batch=batch), start=beginning(clip, batch=batch))
    [session] = sessions()
    assert (session.state, session.describe()["file"], session.file.frames) == ("stopped", True, 99)
    prompts = SteeredPrompts.from_json(script(session.file.target))
    assert (prompts.begins_with, prompts.chunks, prompts.changes) == (FIRST, 3, {1: APPLIED[1]})
    assert any(f"Cancelled. What was finished is in {session.file.target}" in text for text, _ in shown)
    assert sum(name.endswith(".mp4") for name in temporary_files()) == batch


def test_the_prompt_of_a_chunk_that_was_cancelled_is_not_beside_the_video(model, clip):
    def cancel(executor, *args, **kwargs):
        if len(sessions()[-1].steering.applied) == len(APPLIED):
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)

    cancelled = model.clone()
    cancelled.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream(cancelled, clip, Pages(ASKED))
    [session] = sessions()
    prompts = SteeredPrompts.from_json(script(session.file.target))
    assert (prompts.chunks, prompts.changes) == (3, {1: APPLIED[1]})
    assert events(session.describe()["steering"]) == {1: APPLIED[1]}
