"""Whether diffusion model and VAE fit on their devices, on one together or on two, both at work."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import comfy.model_management
import torch

from ...helios_core.devices import TWO_THREADS
from ..compat import is_dynamic
from ..sampling.guider import HeliosGuider

SPARE = 1.1  # the host's own factor on what it frees for weights
WHOLE = 0.98  # the host does not count parameters outside of leaf modules


def may_fit(guider: HeliosGuider, vae: Any) -> bool:
    """Before anything is loaded: whether the devices are large enough for both, if nothing else were on them."""
    if not hasattr(vae, "memory_used_decode") or not hasattr(vae, "patcher"):
        return False  # not the host's kind of VAE: how much it takes is not known
    if any("hooks" in cond for conds in guider.original_conds.values() for cond in conds):
        return False  # they swap weights between predictions
    patchers = (guider.model_patcher, vae.patcher)
    if any(patcher.load_device.type not in TWO_THREADS for patcher in patchers):
        return False
    needed = _at_work(guider, vae)
    for patcher in patchers:
        needed[patcher.load_device] += patcher.model_size() * SPARE
    return all(size < comfy.model_management.get_total_memory(device) for device, size in needed.items())


def fits_now(guider: HeliosGuider, vae: Any) -> bool:
    """Between two predictions: whether both are loaded whole and decoding would not make the host unload anything."""
    model = guider.model_patcher
    if not _is_whole(model) or not _is_whole(vae.patcher):
        return False
    needed = _at_work(guider, vae)
    return all(size < comfy.model_management.get_free_memory(device) for device, size in needed.items())


def already_loaded(vae: Any) -> Any:
    """A loaded VAE whose decoding asks the host for no room, so that the model at work beside it stays loaded."""
    if "decode" in vars(vae):  # it is offloaded, and asks for little
        return vae
    beside = copy.copy(vae)
    beside.memory_used_decode = lambda shape, dtype: 1
    return beside


def _is_whole(patcher: Any) -> bool:
    """Whether all weights stay on the device. Where the host streams some in, two threads share its buffers."""
    if comfy.model_management.is_device_cpu(patcher.load_device):
        return True
    if is_dynamic(patcher):
        return False
    return not patcher.model.model_lowvram and patcher.loaded_size() >= WHOLE * patcher.model_size()


def _at_work(guider: HeliosGuider, vae: Any) -> defaultdict[torch.device, float]:
    """Bytes that a prediction and the decoding of one item's chunk need at the same time, weights aside."""
    management = comfy.model_management
    item = (1, *guider.run.chunk_shape[1:])
    decode = vae.memory_used_decode(item, vae.vae_dtype) + management.extra_reserved_memory()
    needed: defaultdict[torch.device, float] = defaultdict(float)
    needed[guider.model_patcher.load_device] += guider.sampling_memory()[0]
    needed[vae.patcher.load_device] += max(decode * SPARE, management.minimum_inference_memory())
    return needed
