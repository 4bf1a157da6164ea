"""What tests of Helios Multi-GPU share: a short video, a LoRA, whether a process has ended."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import torch

from support.runs import QUICK, sample

ON_CPU = (None, None)  # cards of two workers


def video(model, schedule=QUICK, **more):
    return sample(model, schedule, chunks=2, **more)["samples"]


def lora(model, seed):
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.model.diffusion_model.named_parameters():
        if name.endswith(("to_q.weight", "proj.weight")) and parameter.ndim == 2:
            for side, shape in (("A", (4, parameter.shape[1])), ("B", (parameter.shape[0], 4))):
                key = f"diffusion_model.{name.removesuffix('.weight')}.lora_{side}.weight"
                weights[key] = 0.2 * torch.randn(shape, generator=rng)
    return weights


def with_lora(model, strength=0.8, seed=0):
    return comfy.sd.load_lora_for_models(model, None, lora(model, seed), strength, 0)[0]


def gone(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
