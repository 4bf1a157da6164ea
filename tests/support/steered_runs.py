"""Runs that are steered: pages that ask for prompts while chunks are decoded, and what such a run leaves behind."""

from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from safetensors.torch import load_file

from comfyui_helios.host.sockets.latent import to_vae_space
from comfyui_helios.host.sockets.prompt_changes import Change
from comfyui_helios.host.stream import run_folder
from comfyui_helios.host.stream.live_sessions import sessions
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.prompts import HeliosPromptSchedule
from comfyui_helios.nodes.text import HeliosTextEncode
from support.runs import QUICK, run_node
from support.streams import Parts, cleaned_up, graph, stream_video

SIZE = {"width": 64, "height": 64}
FIRST, SECOND, THIRD = "A red fox.", "A blue lake in the mountains.", "White snow falls at night."
CHUNKS = 5


class Killed(BaseException):
    pass


class Pages:
    """A VAE at whose decoding of a chunk pages ask for what `asked` has under the number of chunks made until then."""

    def __init__(self, asked, finish_after=None, killed_after=None, cancelled_after=None, batch=1):
        self.asked, self.made, self.step = asked, 0, 1 / batch
        self.finish_after, self.killed_after, self.cancelled_after = finish_after, killed_after, cancelled_after

    def decode(self, samples):
        self.made += self.step
        if sessions():
            steering = sessions()[-1].steering
            for change in self.asked.get(self.made, []):
                steering.ask(change)
            if self.made == self.finish_after:
                steering.finish()
        if self.made == self.killed_after:
            raise Killed
        if self.made == self.cancelled_after:
            comfy.model_management.interrupt_current_processing()
        return torch.rand((1, 33, *(8 * side for side in samples.shape[3:]), 3))


def beginning(clip, chunks=CHUNKS, batch=1):
    prompts = run_node(HeliosTextEncode, clip, FIRST, "blurry")
    return run_node(HeliosHistoryInjection, *prompts, frames=33 * chunks, batch_size=batch, **SIZE)


def stream(model, clip, pages, schedule=QUICK, start=None, prompts=None, **settings):
    """(video, latents of all chunks, tail) of a run with `live`; resume is on, and its folder is emptied before.

    prompts: the node of the graph that they come from.
    """
    settings = {"live": True, "clip": clip, "overlap_decode": "off", "resume": True, **settings}
    start = start or beginning(clip)
    prompt = graph(seed=5, clip=["1", 1])
    del prompt["4"]["inputs"]["start_image"], prompt["3"]
    prompt["2"] = prompts or prompt["2"]
    try:
        [video, *_], tail = stream_video(
            Parts(model, pages), start, schedule, 5, unique_id="5", prompt=prompt, **settings
        )
    finally:
        cleaned_up()
    return Path(video.get_stream_source()), saved_latents(), tail


def saved_latents():
    files = sorted((Path(folder_paths.output_directory) / run_folder.FOLDER).rglob("*.safetensors"))
    return to_vae_space(torch.cat([load_file(file)["latents"] for file in files], dim=2))


def scheduled(clip, steered, batch=1):
    """(what a video begins with, summary) by Helios Prompt Schedule with a JSON in `steered`, as `beginning` else."""
    widgets = {w.id: w.default for w in HeliosPromptSchedule.define_schema().inputs if w.id not in ("clip", "before")}
    *prompts, frames, summary = run_node(
        HeliosPromptSchedule, clip, **{**widgets, "negative": "blurry", "steered": steered}
    )
    return run_node(HeliosHistoryInjection, *prompts, frames=frames, batch_size=batch, **SIZE), summary


def script(video):
    return video.with_suffix(".json").read_text(encoding="utf-8")


def events(steering):
    return {entry["after_chunk"]: Change(entry["prompt"], entry["transition"]) for entry in steering["applied"]}


def of_chunks(latents, first, end):
    return latents[:, :, 9 * first : 9 * end]
