"""Mistakes that crash nothing, each made in one place. `make sabotage` runs this suite once with each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import comfy.latent_formats
import pytest
import torch

from comfyui_helios.helios_core import schedule
from comfyui_helios.helios_core.config import CHUNK_FRAMES, CHUNK_LATENTS
from comfyui_helios.helios_core.history import HistoryLayout, Memory
from comfyui_helios.host.model.run_cache import RunCache
from comfyui_helios.nodes import decode

Patch = pytest.MonkeyPatch


def rope_indices(patch: Patch) -> None:
    """The chunk is told that it stands where its history does."""
    indices = HistoryLayout.indices.fget
    wrong = property(lambda self: replace(indices(self), noisy=tuple(range(CHUNK_LATENTS))))
    patch.setattr(HistoryLayout, "indices", wrong)


def anchor_off(patch: Patch) -> None:
    """No chunk is shown the first frame."""
    history = Memory.history
    patch.setattr(Memory, "history", lambda self: history(replace(self, anchor=None)))


def _show_in_order(patch: Patch, order: Callable[[Memory], list[int]]) -> None:
    history = Memory.history
    patch.setattr(Memory, "history", lambda self: history(replace(self, latents=self.latents[:, :, order(self)])))


def mid_and_long_swapped(patch: Patch) -> None:
    """The two frames that are shown in detail are the oldest ones, and long has those after them."""

    def order(memory: Memory) -> list[int]:
        long, mid, short = memory.layout.split
        return [*range(mid, mid + long), *range(mid), *range(mid + long, mid + long + short)]

    _show_in_order(patch, order)


def shuffled_history(patch: Patch) -> None:
    """The past is shown in another order, the same for every chunk."""
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(HistoryLayout().frames, generator=rng).tolist()
    _show_in_order(patch, lambda memory: order)


def shifts_exchanged(patch: Patch) -> None:
    """The smallest stage takes its steps where the largest ought to, and the other way round."""
    tokens = schedule.stage_tokens
    patch.setattr(schedule, "stage_tokens", lambda plan, index, *size: tokens(plan, len(plan.steps) - 1 - index, *size))


def decoded_as_one(patch: Patch) -> None:
    """All chunks go through the VAE as one clip, which is cut to the length that is asked for."""

    def as_one(latent, vae, *_):
        samples = latent["samples"]
        return vae.decode(samples)[0][: samples.shape[2] // CHUNK_LATENTS * CHUNK_FRAMES]

    patch.setattr(decode, "decode_chunks", as_one)


def another_prompts_cache(patch: Patch) -> None:
    """The prompt that a network was asked first is kept for all that it is asked later."""
    known = {}
    text = RunCache.text

    def first(self, network, conds, context):
        return known.setdefault((network, context.shape), text(self, network, conds, context))

    patch.setattr(RunCache, "text", first)


def latents_not_denormalised(patch: Patch) -> None:
    """Latents leave the sampler in the core's space, as if it were the VAE's."""
    patch.setattr(comfy.latent_formats.Wan21, "process_out", lambda self, latent: latent)


BREAKS = {
    break_it.__name__: break_it
    for break_it in (
        rope_indices,
        anchor_off,
        mid_and_long_swapped,
        shifts_exchanged,
        decoded_as_one,
        another_prompts_cache,
        latents_not_denormalised,
        shuffled_history,
    )
}
