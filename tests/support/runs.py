"""Runs of the pack's nodes outside of a server."""

import json

from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from harness import oracle
from harness.nodes import run_node as run_node
from support.core_videos import QUICK as QUICK
from support.videos import SEED


def make_distilled(folder):
    """Write an official folder of Helios-Distilled with the oracle's transformer only; returns the folder."""
    oracle.transformer(0).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "HeliosPyramidPipeline", "is_distilled": True, "is_cfg_zero_star": False})
    )
    return folder


def conditioning(embedding, **values):
    return [[embedding, values]]


def sample(model, schedule, size=(64, 64), chunks=1, seed=SEED, positive=None, negative=None, batch=1):
    """What the sampler node returns for an empty latent of this pixel size."""
    prompts = oracle.prompts(batch=batch)
    inputs = run_node(
        HeliosHistoryInjection,
        positive or conditioning(prompts[0]),
        negative or conditioning(prompts[1]),
        width=size[1],
        height=size[0],
        frames=33 * chunks,
        batch_size=batch,
    )
    return run_node(HeliosChunkedSampler, model, *inputs, schedule, seed)[0]
