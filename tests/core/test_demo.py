"""`make demo`: which workflow it runs on which models, and the contact sheet that it ends with."""

from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

import demo

COLOURS = np.random.default_rng(0).integers(0, 256, (25, 3))


@pytest.fixture
def video(tmp_path):
    """25 frames, each of one colour, 128x64."""
    path = tmp_path / "out" / "video" / "a.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for colour in COLOURS:
            frame = np.broadcast_to(colour.astype(np.uint8), (64, 128, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())
    return path


def test_a_contact_sheet_shows_frames_from_the_first_to_the_last_row_by_row(video):
    sheet = Image.open(demo.save_contact_sheet(video, 25))
    assert sheet.size == (6 * 192, 2 * 96)
    shown = [sheet.getpixel((96 + 192 * (tile % 6), 48 + 96 * (tile // 6))) for tile in range(12)]
    wanted = [0, 2, 4, 7, 9, 11, 13, 15, 17, 20, 22, 24]
    assert np.abs(np.array(shown) - COLOURS[wanted]).max() < 12


def test_the_end_names_each_video_and_its_sheet(video):
    run = SimpleNamespace(files=lambda: [{"filename": "a.mp4", "subfolder": "video", "type": "output"}])
    lines = demo.describe(run, SimpleNamespace(output=video.parents[1]))
    assert lines == [f"video: {video} (25 frames, 24 fps, 128x64)", f"sheet: {video.with_suffix('.png')}"]


@pytest.mark.parametrize("models", ["", "a folder"])
def test_models_of_ones_own_run_the_workflow_for_them(tmp_path, monkeypatch, capsys, models):
    monkeypatch.setenv("HELIOS_MODELS", models and str(tmp_path))
    monkeypatch.delenv("HELIOS_WORKFLOW", raising=False)
    found = demo.find_models()
    loaders = [n for n in demo.read_workflow(found is not None)["nodes"] if n["type"] == "HeliosDiffusersLoader"]
    expected = (tmp_path, "Helios-Distilled") if models else (None, "Helios-Tiny-Distilled")
    assert [(found, loader["widgets_values"][0]) for loader in loaders] == [expected]
    assert ("Helios-Tiny" in capsys.readouterr().out) == (not models)
