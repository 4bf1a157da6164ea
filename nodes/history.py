"""How a video begins: its size and length, and the history that its first chunk sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..helios_core.config import (
    CHUNK_LATENTS,
    HISTORY_SIZES,
    LATENT_CHANNELS,
    NATIVE_HEIGHT,
    NATIVE_WIDTH,
    PATCH,
    SPATIAL_SCALE,
    check_multiple,
    num_chunks,
)
from ..helios_core.history import HistoryLayout
from ..helios_core.schedule import DISTILLED
from ..helios_core.video import NOISE_SIGMAS, VideoStart, VideoState
from ..host.compat import advanced, schema
from ..host.messages import Notes
from ..host.sockets.conditioning import check_conditioning, set_history
from ..host.sockets.images import Fit, encode_image, encode_video, needed_frames, prepare_images, video_frames
from ..host.sockets.latent import STATE_KEY, follow
from ..host.sockets.vae import check_vae


def sigma_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return advanced(io.Float.Input, name, default=default, min=0.0, max=1.0, step=0.001, optional=True, tooltip=tooltip)


def history_input(name: str, default: int, tooltip: str) -> io.Int.Input:
    return advanced(io.Int.Input, name, default=default, min=1, max=64, optional=True, tooltip=tooltip)


class HeliosHistoryInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosHistoryInjection",
            display_name="Helios History Injection",
            category="Helios",
            description=(
                "Sets the size and length of a video and what it begins from, by what is connected: nothing is "
                "text-to-video, start_image image-to-video, video video-to-video, and previous goes on from a video "
                "that was sampled before."
            ),
            search_aliases=["helios", "text to video", "image to video", "video to video", "extend video"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="From Helios Text Encode or Helios Prompt Schedule."),
                io.Conditioning.Input("negative", tooltip="From the same node."),
                io.Vae.Input("vae", optional=True, tooltip="The Wan 2.1 VAE; needed for start_image and video."),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The video begins with this image. A batch of images makes a batch of videos.",
                ),
                io.MultiType.Input(
                    "video",
                    types=[io.Image, io.Video],
                    optional=True,
                    tooltip=(
                        "The new video goes on from this one: at least 33 frames, of which the last whole chunks of 33 "
                        "are used. A VIDEO of another frame rate is resampled to 24 fps; frames are taken as they are."
                    ),
                ),
                io.Latent.Input(
                    "previous",
                    optional=True,
                    tooltip=(
                        "Go on from this latent of a Helios Chunked Sampler, under any prompt, LoRA or schedule. The "
                        "size comes from it; width, height and batch_size are not used."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=NATIVE_WIDTH,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="The models were trained at 640x384 only; other sizes run, and look worse.",
                ),
                io.Int.Input("height", default=NATIVE_HEIGHT, min=64, max=2048, step=64, tooltip="See width."),
                io.Int.Input(
                    "frames",
                    default=264,
                    min=1,
                    max=99_999,
                    tooltip=(
                        "New frames, at 24 a second; rounded up to whole chunks of 33. Trained up to 1452 (a minute)."
                    ),
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made at once."),
                advanced(
                    io.Combo.Input,
                    "fit",
                    options=["crop", "pad", "stretch"],
                    default="crop",
                    optional=True,
                    tooltip=(
                        "How start_image and video get the size. crop: fill it and cut what stands over. pad: fit "
                        "inside, with black bars. stretch: ignore the proportions."
                    ),
                ),
                advanced(
                    io.Boolean.Input,
                    "skip_first_chunk",
                    default=False,
                    optional=True,
                    tooltip="Anchor the video on its second chunk instead of its beginning: a cure for image-to-video "
                    "that stays static.",
                ),
                advanced(
                    io.Boolean.Input,
                    "keep_first_frame",
                    default=True,
                    optional=True,
                    tooltip="Always show the network the first frame (the anchor), which keeps colours and identity.",
                ),
                advanced(
                    io.Boolean.Input,
                    "add_noise",
                    default=True,
                    optional=True,
                    tooltip="Mix noise into start_image or video, as in training. Off: closer to the source, less "
                    "motion.",
                ),
                sigma_input("image_sigma_min", NOISE_SIGMAS[0], "Least noise in the first frame. More: more motion."),
                sigma_input("image_sigma_max", NOISE_SIGMAS[1], "Most noise in the first frame."),
                sigma_input("video_sigma_min", NOISE_SIGMAS[0], "Least noise in the frames before the video."),
                sigma_input("video_sigma_max", NOISE_SIGMAS[1], "Most noise in the frames before the video."),
                history_input("history_long", HISTORY_SIZES[0], "Latent frames of the coarsest, oldest history."),
                history_input("history_mid", HISTORY_SIZES[1], "Latent frames of the history between the two."),
                history_input("history_short", HISTORY_SIZES[2], "Latent frames of the newest history."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        positive: list,
        negative: list,
        width: int,
        height: int,
        frames: int,
        batch_size: int,
        vae: Any = None,
        start_image: Any = None,
        video: Any = None,
        previous: Any = None,
        fit: Fit = "crop",
        skip_first_chunk: bool = False,
        keep_first_frame: bool = True,
        add_noise: bool = True,
        image_sigma_min: float = NOISE_SIGMAS[0],
        image_sigma_max: float = NOISE_SIGMAS[1],
        video_sigma_min: float = NOISE_SIGMAS[0],
        video_sigma_max: float = NOISE_SIGMAS[1],
        history_long: int = HISTORY_SIZES[0],
        history_mid: int = HISTORY_SIZES[1],
        history_short: int = HISTORY_SIZES[2],
    ) -> io.NodeOutput:
        notes = Notes(cls.hidden.unique_id)
        check_conditioning(positive, "positive")
        check_conditioning(negative, "negative")
        check_multiple(width, height, SPATIAL_SCALE * PATCH, "a video can have", advised=DISTILLED.size_multiple)
        check_sources(vae, start_image=start_image, video=video, previous=previous)
        chunks = num_chunks(frames)
        start = VideoStart(
            layout=HistoryLayout((history_long, history_mid, history_short), keep_first_frame),
            skip_first_chunk=skip_first_chunk,
            add_noise=add_noise,
            image_sigmas=(image_sigma_min, image_sigma_max),
            video_sigmas=(video_sigma_min, video_sigma_max),
        )
        size = [height // SPATIAL_SCALE, width // SPATIAL_SCALE]
        if start_image is not None:
            images = prepare_images(start_image, width, height, fit)
            if batch_size == 1 < len(images):
                notes.inform(
                    f"start_image holds {len(images)} images: each begins a video of its own, all made at once. The "
                    "frames of one video belong on `video`."
                )
            batch_size = batch_of(len(images), batch_size)
            start = replace(start, source=encode_image(vae, images))
        elif video is not None:
            images, shown = video_frames(video)
            begin, skipped = needed_frames(len(shown), start.layout.frames)
            first, last = (prepare_images(images, width, height, fit, part) for part in (shown[:1], shown[begin:]))
            start = replace(start, source=encode_video(vae, first, last, skipped))
        elif previous is not None:
            start, memory, carried = follow(start, previous)
            if not carried:
                notes.warn(
                    "The LATENT on `previous` has lost what Helios adds to it (Save Latent drops it): the video goes "
                    "on from its last frames, with new noise and its first latent for the anchor."
                )
            batch_size, _, _, *size = memory.latents.shape
        # Only its shape counts: one zero, so that a long video takes no memory before it is made.
        samples = torch.zeros(()).expand(batch_size, LATENT_CHANNELS, chunks * CHUNK_LATENTS, *size)
        return io.NodeOutput(
            set_history(positive, start),
            set_history(negative, start),
            {"samples": samples, STATE_KEY: VideoState(frames, source=start.source)},
        )


def check_sources(vae: Any, **sources: Any) -> None:
    """Raise ValueError for inputs that exclude each other, or a picture without the VAE to encode it."""
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are connected, and a video can begin from one thing only. Disconnect all but one."
        )
    if given and given[0] != "previous":
        if vae is None:
            raise ValueError(f"{given[0]} is connected without a VAE to encode it. Connect the Wan 2.1 VAE to `vae`.")
        check_vae(vae)


def batch_of(images: int, batch_size: int) -> int:
    """Videos to make of that many start images."""
    if images > 1 and batch_size not in (1, images):
        raise ValueError(
            f"start_image holds {images} images, and batch_size is {batch_size}. Set batch_size to 1 or {images} for a "
            "video of each image, or connect one image."
        )
    return max(images, batch_size)


NODES = [HeliosHistoryInjection]
