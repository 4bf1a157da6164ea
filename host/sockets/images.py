"""Images and videos from the graph: brought to the video's size and rate, and encoded into what a video begins from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import comfy.utils
import torch
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, FRAME_RATE, LATENT_CHANNELS, SPATIAL_SCALE
from ...helios_core.video import EncodedPast
from ..out_of_memory import check_room
from ..progress import check_interrupt
from .latent import is_plain, normalise
from .vae import WANTED

Fit = Literal["crop", "pad", "stretch"]
MOST_FRAMES = 10**6  # of a video at 24 fps: eleven hours
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)


def check_images(images: Any) -> None:
    """Raise ValueError for what is no batch of images (F, H, W, 1..4 channels)."""
    if not is_plain(images):
        raise ValueError(
            f"The images are a value of the type {type(images).__name__}; expected an IMAGE. Connect the IMAGE output "
            "of a node such as Load Image."
        )
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] > 4:
        raise ValueError(
            f"The images have the shape {tuple(images.shape)}; expected (frames, height, width, 1 to 4 channels), none "
            "of them 0. Connect the IMAGE output of a node such as Load Image."
        )
    if images.dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"The images are {images.dtype}; expected float in 0..1 or uint8 in 0..255. Convert them before this node."
        )


def prepare_images(images: Tensor, width: int, height: int, fit: Fit, picked: Sequence[int] | None = None) -> Tensor:
    """Images (F, H, W, 1..4 channels), float in 0..1 or 8 bit -> (F, height, width, 3) float32 in 0..1.

    picked: which of them; None for all. crop fills the size and cuts the centre, pad puts the whole image between black
    bars, stretch ignores the aspect ratio. Grey becomes RGB and alpha is dropped. Raises ValueError for what is no
    image, NaN and inf included.
    """
    check_images(images)
    picked = range(len(images)) if picked is None else picked
    shape = (len(picked), height, width, 3)
    needed = math.prod(shape) * torch.float32.itemsize
    check_room(f"{len(picked)} images of {width}x{height}", needed, images.device)
    prepared = torch.zeros(shape, device=images.device)
    # One by one: a long video in its own size may not fit into memory a second time.
    for index, canvas in zip(picked, prepared, strict=True):
        check_interrupt()
        frame = _rgb(images[index], index + 1)
        if fit == "crop":
            frame = _centre(frame, *_inside(frame, canvas))
        elif fit == "pad":
            canvas = _centre(canvas, *_inside(canvas, frame))
        canvas.copy_(_resized(frame, *canvas.shape[:2]))
    return prepared


def _rgb(image: Tensor, number: int) -> Tensor:
    """(H, W, C) of any kind -> (H, W, 3) float32 in 0..1."""
    color = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(-1, -1, 3)
    if color.dtype == torch.uint8:
        return color.float() / 255
    if not color.isfinite().all():
        raise ValueError(
            f"Image {number} holds NaN or infinite values; expected numbers in 0..1. Repair what makes it: often that "
            "is a VAE in half precision."
        )
    return color.clamp(0, 1).float()


def _inside(outer: Tensor, like: Tensor) -> tuple[int, int]:
    """Height and width of the largest area in (H, W, C) that has the aspect ratio of another, at least a pixel."""
    (height, width), (h, w) = outer.shape[:2], like.shape[:2]
    if width * h > height * w:
        return height, max(1, round(height * w / h))
    return max(1, round(width * h / w)), width


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    """A view of the middle of (H, W, C)."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[:2] == (height, width):
        return image
    # Without the host's own crop: of a picture that is a pixel high it may leave nothing.
    scaled = comfy.utils.common_upscale(image.movedim(-1, 0)[None], width, height, "lanczos", "disabled")
    return scaled[0].movedim(0, -1)


def video_frames(video: Any) -> tuple[Tensor, Sequence[int]]:
    """Images (F, H, W, C), and which of them a VIDEO shows at 24 fps; of an IMAGE batch, which has no rate, all.

    They are not copied, since few of a long video are needed. A VIDEO of another rate keeps its duration: each new
    frame is what the video shows in the middle of its time.
    """
    if isinstance(video, Tensor):
        check_images(video)
        return video, range(len(video))
    if not callable(getattr(video, "get_components", None)):
        raise ValueError(
            f"`video` got a value of the type {type(video).__name__}; expected a VIDEO or IMAGE. Connect the output of "
            "a node such as Load Video."
        )
    components = video.get_components()
    images, rate = components.images, _frame_rate(components.frame_rate)
    check_images(images)
    if rate == FRAME_RATE:
        return images, range(len(images))
    step = rate / FRAME_RATE
    count = max(1, round(len(images) / step))
    if count > MOST_FRAMES:
        raise ValueError(
            f"The video has {count} frames at {FRAME_RATE} a second; expected at most {MOST_FRAMES}. Cut it, or "
            "correct its frame rate."
        )
    return images, [min(int((i + Fraction(1, 2)) * step), len(images) - 1) for i in range(count)]


def _frame_rate(rate: Any) -> Fraction:
    try:
        exact = Fraction(rate)
    except (TypeError, ValueError, OverflowError):  # None, NaN, infinity
        exact = Fraction(0)
    if exact <= 0:
        raise ValueError(
            f"The video has {rate} frames a second; expected more than 0. Connect its frames as IMAGE instead."
        )
    return exact


def encode_image(vae: Any, images: Tensor) -> EncodedPast:
    """Prepared images (B, H, W, 3), each encoded alone -> what an image-to-video begins from, in a batch of B.

    Raises ValueError if the VAE is not of Wan 2.1's shape.
    """
    bar = comfy.utils.ProgressBar(2 * len(images))
    anchors, lasts = [], []
    for image in images.split(1):  # the VAE would take a batch for the frames of one video
        anchors.append(_encode(vae, image, bar))
        lasts.append(_encode(vae, image.expand(CHUNK_FRAMES, -1, -1, -1), bar)[:, :, -1:])
    return EncodedPast(torch.cat(anchors), torch.cat(lasts))


def needed_frames(count: int, latents: int) -> tuple[int, int]:
    """Of a video of so many frames at 24 fps: where its last whole chunks of 33 begin that a history of so many latent
    frames reaches, and how many whole chunks there are before those.

    Raises ValueError for fewer than 33 frames.
    """
    if count < CHUNK_FRAMES:
        raise ValueError(
            f"The video has {count} frame{'s' if count > 1 else ''} at {FRAME_RATE} fps; expected at least "
            f"{CHUNK_FRAMES}. Connect a longer video, or a single image to start_image."
        )
    chunks = count // CHUNK_FRAMES
    kept = min(chunks, math.ceil(latents / CHUNK_LATENTS))
    return count - kept * CHUNK_FRAMES, chunks - kept


def encode_video(vae: Any, first: Tensor, last: Tensor, skipped: int = 0) -> EncodedPast:
    """Prepared parts of a video, its first frame and its last chunks -> what a video-to-video begins from.

    Raises ValueError if the VAE is not of Wan 2.1's shape.
    """
    chunks = last.split(CHUNK_FRAMES)
    bar = comfy.utils.ProgressBar(1 + len(chunks))
    anchor = _encode(vae, first, bar)
    return EncodedPast(anchor, torch.cat([_encode(vae, chunk, bar) for chunk in chunks], dim=2), skipped)


def _encode(vae: Any, frames: Tensor, bar: comfy.utils.ProgressBar) -> Tensor:
    """1 or 33 frames (F, H, W, 3) -> normalised latents (1, 16, 1 or 9, H / 8, W / 8), float32 on the CPU."""
    check_interrupt()
    latents = vae.encode(frames)
    length = CHUNK_LATENTS if len(frames) == CHUNK_FRAMES else 1
    expected = (1, LATENT_CHANNELS, length, *(side // SPATIAL_SCALE for side in frames.shape[1:3]))
    if tuple(latents.shape) != expected:
        raise ValueError(
            f"The VAE made latents of the shape {tuple(latents.shape)}; expected {expected}. Connect {WANTED}."
        )
    bar.update(1)
    return normalise(latents)
