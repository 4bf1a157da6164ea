"""What judges the videos sees what is there: on drawn clips, and on what the VAE leaves of them."""

import numpy as np
import torch
from detect import count_right, find, truth
from world import FRAMES_PER_CHUNK, render

from harness.meaning import SIZE, clips, load


def drawn(clip):
    """(T, H, W, 3) in 0..1."""
    return render(clip, size=SIZE).permute(0, 2, 3, 1)


def right(videos, truths):
    return count_right([(find(np.asarray(video)), truth(clip, 0)) for video, clip in zip(videos, truths, strict=True)])


def test_it_sees_what_was_drawn():
    seen = clips(50, held_out=False)
    assert min(right(map(drawn, seen), seen).values()) >= 0.99


@torch.inference_mode()
def test_it_sees_what_comes_out_of_the_vae():
    vae, seen = load("base").vae, clips(6, held_out=True)[1::2]  # a ball, a square and a triangle

    def there_and_back(clip):
        return torch.cat([vae.decode(vae.encode(chunk))[0] for chunk in drawn(clip).split(FRAMES_PER_CHUNK)])

    assert right(map(there_and_back, seen), seen)["together"] == 1
