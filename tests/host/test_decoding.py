"""Chunks decoded to frames: kept apart, trimmed, dropped, crossfaded."""

import pytest
import torch

from comfyui_helios.helios_core.video import VideoState
from comfyui_helios.host.sockets.decoding import decode_chunks


class FakeVAE:
    """Decodes a chunk to frames that tell which latents they came from."""

    def decode(self, latents):
        assert latents.shape[2] == 9
        value = latents.mean() + torch.arange(33) / 100
        return value.view(1, 33, 1, 1, 1).expand(1, 33, 8, 8, 3)


@pytest.mark.parametrize(("trim", "frames"), [(False, 66), (True, 40)])
def test_decoding_keeps_chunks_apart_and_trims_exactly(trim, frames):
    samples = torch.arange(4.0).view(2, 1, 2, 1, 1, 1).expand(2, 16, 2, 9, 1, 1).reshape(2, 16, 18, 1, 1)
    images = decode_chunks({"samples": samples, "helios": VideoState(40)}, FakeVAE(), trim)
    assert images.shape == (2 * frames, 8, 8, 3)
    expected = torch.cat([torch.arange(33) / 100, 1 + torch.arange(33) / 100])[:frames]
    torch.testing.assert_close(images[:frames, 0, 0, 0], expected)
    torch.testing.assert_close(images[frames:, 0, 0, 0], expected + 2)


def two_chunks():
    """Latents of one item whose chunks decode to 0.00 ... 0.32 and 1.00 ... 1.32."""
    return {"samples": torch.arange(2.0).view(1, 1, 2, 1, 1, 1).expand(1, 16, 2, 9, 1, 1).reshape(1, 16, 18, 1, 1)}


@pytest.mark.parametrize("drop", [0, 1, 32, 33, 40, 65])
def test_dropping_the_first_frames(drop):
    expected = torch.cat([torch.arange(33) / 100, 1 + torch.arange(33) / 100])[drop:]
    torch.testing.assert_close(decode_chunks(two_chunks(), FakeVAE(), drop_first=drop)[:, 0, 0, 0], expected)


def test_crossfade_comes_out_of_the_last_frame_before_the_seam():
    plain = decode_chunks(two_chunks(), FakeVAE())[:, 0, 0, 0]
    faded = decode_chunks(two_chunks(), FakeVAE(), crossfade=3)[:, 0, 0, 0]
    mixed = [plain[32] + (plain[33 + i] - plain[32]) * (i + 1) / 4 for i in range(3)]
    torch.testing.assert_close(faded, torch.cat([plain[:33], torch.stack(mixed), plain[36:]]))


def test_dropping_everything_is_refused():
    with pytest.raises(ValueError, match="drop_first is 66, but the video has 66 frames"):
        decode_chunks(two_chunks(), FakeVAE(), drop_first=66)
