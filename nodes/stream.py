"""Sampler, decoder and video file in one."""

from __future__ import annotations

import sys
import uuid
from contextlib import nullcontext
from dataclasses import replace

from comfy_api.latest import io

from ..helios_core.config import CHUNK_FRAMES, SPATIAL_SCALE
from ..host.compat import advanced, schema
from ..host.messages import Notes
from ..host.model.offload_patcher import GROUP_OFFLOAD, offloaded_vae, offloading
from ..host.sampling.inputs import latent_warning, prepare, sampled, source_warning, variant_warning
from ..host.sockets.decoding import shown_frames, trim_warning
from ..host.sockets.vae import check_vae
from ..host.stream.live_sessions import Watched, on_air, workflow_id
from ..host.stream.mp4 import BIT_DEPTHS, check_target, finished_video
from ..host.stream.one_pass import OnePass
from ..host.stream.prompt_turns import PromptTurns, check_steerable, given_prompts
from ..host.stream.resuming import pick_up
from ..host.stream.run_folder import FOLDER, KEPT_RUNS
from ..host.stream.steering import Steering
from ..host.stream.video_writer import VideoWriter, video_folder
from .inputs import DECODE_TOOLTIP, frame_inputs, model_inputs, seed_input, seed_mode_input

OVERLAP = ("auto", "off")


class HeliosStreamVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="HeliosStreamVideo",
            display_name="Helios Stream Video",
            category="Helios",
            description=(
                "Denoises, decodes and encodes a video chunk by chunk, straight into an mp4 file: memory does not grow "
                "with its length. In place of Helios Chunked Sampler, VAE Decode and Create Video."
            ),
            search_aliases=["helios", "long video", "resume", "video sampler", "stream"],
            inputs=[
                *model_inputs(),
                io.Vae.Input("vae", tooltip="The Wan 2.1 VAE."),
                seed_input(),
                io.Float.Input(
                    "fps", default=24.0, min=1.0, max=120.0, step=1.0, tooltip="The models make 24 a second."
                ),
                io.Int.Input(
                    "crf",
                    default=18,
                    min=0,
                    max=51,
                    tooltip=(
                        "Quality of the h264 file: lower is better and larger. 18 is hard to tell from the frames, 23 "
                        "is what Create Video and Save Video use, each 6 more halves the size."
                    ),
                ),
                io.Combo.Input(
                    "bit_depth",
                    options=list(BIT_DEPTHS),
                    default=BIT_DEPTHS[0],
                    tooltip="10 has smoother gradients; some players and phones cannot show it.",
                ),
                *frame_inputs(),
                seed_mode_input(),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    optional=True,
                    tooltip=(
                        f"Save each finished chunk in output/{FOLDER}, and go on after the last one when the same "
                        "graph runs again, after a crash, a full disk or Cancel. Everything upstream must be as it "
                        f"was: set the seed to fixed. The {KEPT_RUNS} newest runs and those of the last day are kept."
                    ),
                ),
                advanced(
                    io.Combo.Input,
                    "overlap_decode",
                    options=list(OVERLAP),
                    default=OVERLAP[0],
                    optional=True,
                    tooltip=(
                        "auto: encode a chunk while the next one is denoised, and decode it then too where model and "
                        "VAE fit on the device together. off: one after the other. The video is the same."
                    ),
                ),
                io.Combo.Input(
                    "vae_offload", options=list(GROUP_OFFLOAD), default="off", optional=True, tooltip=DECODE_TOOLTIP
                ),
                io.Boolean.Input(
                    "live",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Play the video on this node while it is made, from its first finished chunk on. The file "
                        "becomes larger for the same crf. Of a batch, item 1 plays."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "With live: the text encoder that the prompt was encoded with. The player then takes new "
                        "prompts while the video is made."
                    ),
                ),
                io.Boolean.Input(
                    "until_finished",
                    default=False,
                    optional=True,
                    tooltip=(
                        "With live: go on until `finish` is pressed on the player, and make at least the frames asked "
                        "for. Nothing is trimmed at the end."
                    ),
                ),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video",
                    is_output_list=True,
                    tooltip="A finished h264 file, one for each item of a batch. Save Video copies it as it is.",
                ),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The last chunk, to go on from: connect it to `previous` of Helios History Injection.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, live=False, **inputs) -> str:
        return uuid.uuid4().hex if live else ""  # somebody may steer it another way

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        schedule,
        vae,
        seed,
        fps,
        crf,
        bit_depth,
        trim,
        drop_first=0,
        seed_mode="continue",
        resume=False,
        overlap_decode="auto",
        vae_offload="off",
        live=False,
        clip=None,
        until_finished=False,
    ) -> io.NodeOutput:
        check_vae(vae)
        if until_finished and not live:
            raise ValueError("`until_finished` needs `live`, on whose player `finish` is. Switch `live` on.")
        guider = prepare("Helios Stream Video", model, positive, negative, latent, schedule, seed, seed_mode)
        *_, height, width = (side * SPATIAL_SCALE for side in guider.run.chunk_shape)
        check_target(video_folder(), width, height)
        if live and clip is not None:
            check_steerable(clip, positive)
        trim = trim and not until_finished
        first, end = shown_frames(latent, guider.run.chunks, trim, drop_first)
        least = end - first
        steering = Steering(prompts=clip is not None, endless=until_finished)
        if until_finished:
            end, guider.run = sys.maxsize, replace(guider.run, more=steering.goes_on)
        how = offloading(vae_offload, weights_in="disk")
        notes = Notes(cls.hidden.unique_id)
        notes.warn(
            variant_warning(model, schedule),
            latent_warning(latent),
            source_warning(positive, latent),
            trim_warning(latent, trim),
        )
        prompt, node_id = cls.hidden.prompt, cls.hidden.unique_id
        prompts = PromptTurns(guider, clip, steering, notes, given_prompts(prompt or {}, node_id))
        picked_up = pick_up(guider, prompt, node_id, notes) if resume else nullcontext()
        with picked_up as saved, offloaded_vae(vae, how) as decoder:
            writer = VideoWriter(decoder, guider.run.chunk_shape[0], (first, end), fps, crf, bit_depth, live)
            watched = Watched(node_id, workflow_id(cls.hidden.extra_pnginfo), least)
            with on_air(writer.live, watched, steering) if writer.live else nullcontext():
                files, tail = OnePass(guider, writer, overlap_decode == "auto", saved, prompts).run()
        return io.NodeOutput([finished_video(file) for file in files], sampled(tail, CHUNK_FRAMES, guider))


NODES = [HeliosStreamVideo]
