"""The LATENT socket: whole chunks, and the state of a video that travels with them."""

import pytest
import torch

from comfyui_helios.helios_core.history import Memory
from comfyui_helios.helios_core.video import VideoState
from comfyui_helios.host.sockets.latent import video_state
from comfyui_helios.nodes.history import HeliosHistoryInjection
from harness import oracle
from support.runs import conditioning, run_node


@pytest.mark.parametrize("frames", [1, 33, 34, 264])
def test_frames_are_rounded_up_to_chunks(frames):
    prompts = map(conditioning, oracle.prompts())
    result = run_node(HeliosHistoryInjection, *prompts, width=640, height=384, frames=frames, batch_size=2)
    latent = result[2]
    assert latent["samples"].shape == (2, 16, 9 * -(-frames // 33), 48, 80)
    assert video_state(latent) == VideoState(frames)


def test_state_of_changed_samples_is_ignored():
    latent = {"samples": torch.zeros(1, 16, 9, 8, 8), "helios": VideoState(40)}
    assert video_state(latent) is None
    latent = {"samples": torch.zeros(1, 16, 18, 8, 8), "helios": VideoState(40)}
    assert video_state(latent).frames == 40
    upscaled = {"samples": torch.zeros(1, 16, 9, 16, 16), "helios": VideoState(33, memory=Memory.empty(1, 8, 8))}
    assert video_state(upscaled) is None
