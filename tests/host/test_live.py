"""Helios Stream Video with live on: the same latents, a plain file at the end, and a table of what can be watched."""

from pathlib import Path

import comfy.model_management
import pytest
import torch

from comfyui_helios.host.stream import live_sessions, video_writer
from comfyui_helios.host.stream.live_file import LiveFile
from comfyui_helios.host.stream.live_sessions import KEPT, Watched, find_session, on_air, sessions, workflow_id
from comfyui_helios.host.stream.steering import Steering
from comfyui_helios.host.stream.video_writer import VideoWriter
from comfyui_helios.nodes.stream import HeliosStreamVideo
from support.streams import beginning, make_parts, planes, stream_video, temporary_files, watched


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("models") / "Helios-Distilled")


@pytest.fixture(autouse=True)
def empty_table(monkeypatch):
    monkeypatch.setattr(live_sessions, "_sessions", {})


@pytest.mark.parametrize("overlap", ["auto", "off"])
def test_the_latents_are_the_same_and_item_1_is_shown(parts, overlap):
    start = beginning(66, batch_size=2)
    _, expected = stream_video(parts, start)
    videos, tail = stream_video(parts, start, live=True, overlap_decode=overlap)
    assert torch.equal(tail["samples"], expected["samples"])
    assert [len(planes(video.get_stream_source())) for video in videos] == [66, 66]
    [session] = sessions()
    assert session.file.target == Path(videos[0].get_stream_source())
    told = session.describe()
    assert (told["state"], told["frames"], told["written"], told["fps"]) == ("finished", 66, 66, 24)


def test_a_cancelled_run_leaves_no_file_and_says_so_in_the_table(parts):
    before = temporary_files()
    both, _ = watched(parts, lambda call: comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream_video(both, beginning(99), live=True)
    assert temporary_files() == before
    assert [session.state for session in sessions()] == ["stopped"]


def test_without_live_nothing_is_to_be_watched_and_nobody_could_finish_it(parts):
    stream_video(parts, beginning(33))
    assert sessions() == []
    with pytest.raises(ValueError, match="`until_finished` needs `live`"):
        stream_video(parts, beginning(33), until_finished=True)


def test_its_inputs_came_last_and_are_off():
    *_, live, clip, until_finished = HeliosStreamVideo.define_schema().inputs
    assert (live.id, live.default, live.optional) == ("live", False, True)
    assert (clip.id, clip.optional) == ("clip", True)
    assert (until_finished.id, until_finished.default, until_finished.optional) == ("until_finished", False, True)


def test_with_live_it_runs_again_where_nothing_has_changed():
    """Somebody may steer it another way."""
    fingerprints = [HeliosStreamVideo.fingerprint_inputs(live=live, seed=3) for live in (True, True, False, False)]
    assert fingerprints[0] != fingerprints[1]
    assert fingerprints[2] == fingerprints[3]


def test_the_table_forgets_the_oldest_that_have_ended_and_never_one_that_runs(tmp_path):
    def session():
        return on_air(
            LiveFile(tmp_path, 24, 18, "8"), Watched("5:12", None, 33), Steering(prompts=False, endless=False)
        )

    with session() as running:
        ended = []
        for _ in range(KEPT + 2):
            with session() as one:
                ended.append(one.id)
        assert [one.id for one in sessions()] == [running.id, *ended[2:]]
        assert find_session(running.id) is running
        assert find_session(ended[0]) is None


@pytest.mark.parametrize(
    ("sent", "known"),
    [({"workflow": {"id": "a-b"}}, "a-b"), ({"workflow": {}}, None), ({"workflow": {"id": 3}}, None), ({}, None)],
)
def test_a_workflow_is_known_by_the_id_that_the_page_sends(sent, known):
    assert workflow_id(sent) == known


def test_a_graph_that_no_page_has_queued_has_no_id():
    assert workflow_id(None) is None


def test_a_temp_folder_that_is_gone_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(video_writer, "video_folder", lambda: tmp_path / "gone")
    with (
        VideoWriter(None, 1, (0, 33), 24, 18, "8", live=True) as writer,
        pytest.raises(OSError, match=r"The video cannot be written to .*gone.*run it again"),
    ):
        writer.is_short_of_room()
