"""From a sampling node's inputs to a guider that is ready to run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS, SPATIAL_SCALE
from ...helios_core.generate import Run
from ...helios_core.history import Memory
from ...helios_core.schedule import Schedule
from ...helios_core.video import EncodedPast, VideoStart, VideoState
from ..compat import noise_scale
from ..model.base_model import FlowSampling, check_model
from ..model.foreign_patches import check_model_options, node_of
from ..out_of_memory import check_room
from ..sockets.conditioning import TRACK_KEY, check_conditioning, find_history, is_changed, without_changed_tracks
from ..sockets.latent import STATE_KEY, carried_state, check_latent, is_empty
from ..sockets.schedule import check_schedule
from .guider import HeliosGuider

UNSUPPORTED = {
    "area": "area conditioning",
    "mask": "masked conditioning",
    "control": "ControlNet",
    "gligen": "GLIGEN",
}
# What the host's nodes for other video models put pictures into a prompt with, as WanImageToVideo does.
PICTURES = (
    "concat_latent_image",
    "clip_vision_output",
    "reference_latents",
    "time_dim_concat",
    "vace_frames",
    "control_video",
    "pose_video_latent",
)


def prepare(
    node: str,
    model: Any,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    schedule: Schedule,
    seed: int,
    seed_mode: str,
) -> HeliosGuider:
    """Check the inputs of the node of this name and draw what comes before the first chunk. Nothing is loaded yet.

    Raises ValueError for what cannot be sampled.
    """
    samples = check_latent(latent, "latent", values=False)
    if latent.get("noise_mask") is not None:
        raise ValueError(
            f"The LATENT of {node} has a noise mask (as from Set Latent Noise Mask), and Helios cannot denoise "
            "a part of a picture. Take that node out."
        )
    check_sampled_model(node, model)
    check_schedule(schedule)
    for socket, conditioning in (("positive", positive), ("negative", negative)):
        check_prompt(node, conditioning, socket, model.model.diffusion_model.config.text_dim)
    batch, _, frames, height, width = samples.shape
    schedule.check_size(height * SPATIAL_SCALE, width * SPATIAL_SCALE)
    chunks = frames // CHUNK_LATENTS
    check_tracks(node, positive, chunks)
    check_memory(model, samples)

    start = find_history(positive)
    rng = make_rng(start, seed, seed_mode)
    memory = start.memory(batch, height, width, rng)
    run = Run(schedule, memory, chunks, rng, start.first_index, start.skip_first_chunk)
    guider = HeliosGuider(model, run)
    guider.set_conds(positive, without_changed_tracks(negative))
    return guider


def check_sampled_model(node: str, model_patcher: Any) -> None:
    """Raise ValueError for a MODEL that the node of this name cannot sample with."""
    check_model(node, model_patcher)
    check_model_options(node, model_patcher)
    if not isinstance(sampling := model_patcher.get_model_object("model_sampling"), FlowSampling):
        raise ValueError(
            f"The MODEL went through {node_of(type(sampling))}, which replaces its sampling. Take that node out: the "
            "shift of Helios is part of its schedule."
        )
    if (scale := noise_scale(sampling)) != 1.0:
        raise ValueError(
            f"The MODEL went through ModelNoiseScale, which multiplies its noise by {scale:g}. Take that node out: "
            "Helios begins with noise as it is."
        )


def check_prompt(node: str, conditioning: list, socket: str, width: int) -> None:
    """Raise ValueError for a conditioning that a model of this text_dim cannot be sampled with."""
    check_conditioning(conditioning, socket)
    if found := _carried(conditioning, UNSUPPORTED):
        raise ValueError(f"{node} does not support {UNSUPPORTED[found]} ({socket}). Take it out of the graph.")
    if picture := _carried(conditioning, PICTURES):
        raise ValueError(
            f"The {socket} conditioning went through a node for other models, such as WanImageToVideo, and brings a "
            f"picture ({picture}) that Helios would not see. Take that node out, and connect the image to "
            "start_image, or the frames to video, of Helios History Injection."
        )
    wrong = next((tuple(embedding.shape) for embedding, _ in conditioning if embedding.shape[-1] != width), None)
    if wrong:
        raise ValueError(
            f"The {socket} conditioning is {wrong[-1]} wide, the model expects {width}. Encode the prompt with the "
            "UMT5-XXL text encoder (CLIPLoader of type wan, or Helios Diffusers Loader)."
        )


def _carried(conditioning: list, keys: Iterable[str]) -> str | None:
    """The first of these that an entry has; None where none has one."""
    return next((key for _, values in conditioning for key in keys if key in values), None)


def check_tracks(node: str, positive: list, chunks: int) -> None:
    """Raise ValueError for prompts in a row that a node has changed, or that outlast a video of so many chunks."""
    for embedding, values in positive:
        if (track := values.get(TRACK_KEY)) is None:
            continue
        if is_changed(track, embedding):
            raise ValueError(
                f"A node before {node} changes the embedding that comes from Helios Prompt Schedule "
                "(ConditioningAverage, for one), and the prompts there would take the place of what it makes. Take it "
                "out of the graph."
            )
        if (lasts := sum(track.chunks)) > chunks:
            raise ValueError(
                f"The prompts last {lasts} chunks, but the video has {chunks} ({chunks * CHUNK_FRAMES} frames). "
                "Connect the prompt schedule's frames to Helios History Injection, or shorten the prompts."
            )


def check_memory(model_patcher: Any, latents: Tensor) -> None:
    """Raise ValueError for latents (B, 16, 9k, H, W) of which the device cannot hold one chunk at work.

    Counted without weights, history and guidance: what is refused here is out of all proportion.
    """
    batch, channels, _, height, width = latents.shape
    needed = model_patcher.model.memory_required((batch, channels, CHUNK_LATENTS, height, width))
    size = f"{width * SPATIAL_SCALE}x{height * SPATIAL_SCALE} in a batch of {batch}"
    check_room(f"A chunk of {size}", needed, model_patcher.load_device)


def make_rng(start: VideoStart, seed: int, seed_mode: str) -> torch.Generator:
    """The generator of a run, on the CPU: the one of the video that goes on, or a new one."""
    rng = torch.Generator().manual_seed(seed)
    if seed_mode == "continue" and start.rng_state is not None:
        rng.set_state(start.rng_state)
    return rng


def latent_warning(latent: dict[str, Any]) -> str | None:
    """The samplers' warning of a LATENT with something in it, as for a second pass; None for an empty one."""
    if is_empty(latent["samples"]):
        return None
    return (
        "What is in `latent` is not used, only its size: every video begins from noise. To go on from it, connect it "
        "to `previous` of Helios History Injection; a second pass over it (denoise below 1) does not exist."
    )


def source_warning(positive: list, latent: dict[str, Any]) -> str | None:
    """The samplers' warning of a LATENT made for a video that begins from something, where `positive` came past the
    node that says so; None where the two belong together."""
    state = carried_state(latent)
    source = None if state is None else state.source
    if source is None or _begins_alike(source, find_history(positive).source):
        return None
    return (
        "What the video was to begin from is not used: `latent` comes from the Helios History Injection that has it "
        "(start_image, video or previous), and `positive` does not. Connect that node's positive and negative too."
    )


def _begins_alike(source: EncodedPast | Memory, other: EncodedPast | Memory | None) -> bool:
    """Whether both begin from pictures, or both go on from the same frame.

    Compared by value: nodes copy conditioning. A picture that the prompts bring themselves counts, whichever it is: the
    LATENT of another then gives the size, as where one picture begins two videos.
    """
    if isinstance(source, Memory) and isinstance(other, Memory):
        return torch.equal(source.latents[:, :, -1], other.latents[:, :, -1])
    return type(source) is type(other)


def variant_warning(model: Any, schedule: Schedule) -> str | None:
    """The samplers' warning of a schedule for another variant than the model's; None where it fits or none is known."""
    variant = model.model.variant
    if variant in (None, schedule.variant):
        return None
    return (
        f"Wrong schedule: connect Helios-{variant.title()}'s, or the loader's own. This is Helios-"
        f"{schedule.variant.title()}'s, and the model is Helios-{variant.title()}."
    )


def sampled(samples: Tensor, frames: int, guider: HeliosGuider) -> dict[str, Any]:
    """The LATENT after a run: its last chunks in VAE space, and what is needed to go on after them."""
    state = VideoState(
        frames=frames,
        next_chunk=guider.next_index,
        memory=guider.memory,
        rng_state=guider.run.rng.get_state(),
    )
    return {"samples": samples, STATE_KEY: state}
