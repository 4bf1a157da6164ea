"""The workflow that a new user runs first, as it is, on the model that comes with the pack."""

import av
import numpy as np
import pytest

from harness.client import run_workflow
from harness.small import FIRST_RUN, read_workflow
from harness.workflow import to_api

SIZE, SCALE = 128, 3


@pytest.fixture(scope="module")
def video(server, info):
    """Its frames, (99, 128, 128, 3) in 0..255: the enlarged ones at every third point."""
    [file] = run_workflow(server.url, to_api(read_workflow(FIRST_RUN), info)).files()
    with av.open(str(server.output / file["subfolder"] / file["filename"])) as container:
        assert container.streams.video[0].average_rate == 24
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (99, SCALE * SIZE, SCALE * SIZE, 3)
    return frames[:, 1::SCALE, 1::SCALE].astype(int)


@pytest.fixture(scope="module")
def red(video):
    """Where the frames are red."""
    return (video[..., 0] > 140) & (video[..., 1] < 100) & (video[..., 2] < 100)


def test_the_background_is_black(video):
    assert np.percentile(video, 80, axis=(1, 2, 3)).max() < 50


def test_something_small_and_red_is_on_it(red):
    assert 0.01 < np.median(red.mean((1, 2))) < 0.06  # the ball of the prompt covers 3.5 %


def test_it_goes_around(red):
    seen = [np.argwhere(frame).mean(0) / SIZE for frame in red if frame.any()]
    assert np.ptp(seen, axis=0).min() > 0.25  # its circle is 0.42 wide
