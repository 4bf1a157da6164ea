"""Runs of the pack's nodes outside of a server."""

import json
from dataclasses import replace
from types import SimpleNamespace

import torch

from comfyui_helios.helios_core.schedule import DISTILLED
from comfyui_helios.nodes.history import HeliosHistoryInjection
from comfyui_helios.nodes.sample import HeliosChunkedSampler
from harness import oracle
from support.videos import SEED

QUICK = replace(DISTILLED, steps=(1, 1, 1), amplify_first_chunk=False)


def make_distilled(folder):
    """Write an official folder of Helios-Distilled with the oracle's transformer only; returns the folder."""
    oracle.transformer(0).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "HeliosPyramidPipeline", "is_distilled": True, "is_cfg_zero_star": False})
    )
    return folder


def conditioning(embedding, **values):
    return [[embedding, values]]


def run_node(node, *args, unique_id=None, prompt=None, **kwargs):
    """Its outputs, run as the host runs it: without gradients, on this node of this graph, or on none."""
    hidden = SimpleNamespace(unique_id=unique_id, prompt=prompt)
    with torch.inference_mode():
        return type("Node", (node,), {"hidden": hidden}).execute(*args, **kwargs).result


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
