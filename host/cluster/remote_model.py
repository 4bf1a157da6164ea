"""A Helios MODEL without weights: its forwards are computed by worker processes."""

from __future__ import annotations

import functools
from dataclasses import astuple, replace
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...helios_core.history import History
from ..model.base_model import HeliosModel
from ..model.foreign_patches import node_of
from ..model.network import HeliosNetwork
from ..model.offload_patcher import OffloadPatcher, is_compiled
from .patches import REFUSED, check_patches, write_patches
from .wire import taken_apart
from .workers import Job, Workers

# Fields of a patcher that belong to its model, or say which patchers share one; the last two are of newer hosts.
OF_A_MODEL = {
    *("model", "size", "parent", "backup", "object_patches_backup", "pinned", "patches_uuid", "cached_patcher_init"),
    *("backup_buffers", "clone_base_uuid"),
}


class Kept:
    """A prompt or a history that the workers have prepared, and keep as long as this lives."""

    nbytes = 0  # on the server

    def __init__(self, workers: Workers):
        self.number = workers.remember(self)


class RemoteNetwork(HeliosNetwork):
    """Has all names and sizes of a network, and asks the workers for its flow."""

    workers: Workers | None = None

    def prepare_text(self, text: Tensor) -> Any:
        kept = Kept(self._workers)
        self._workers.ask({"do": "prepare_text", "number": kept.number}, {"text": text})
        return kept

    def prepare_history(self, history: History) -> Any:
        kept = Kept(self._workers)
        header, tensors = taken_apart(history)
        self._workers.ask({"do": "prepare_history", "number": kept.number, **header}, tensors)
        return kept

    def _flow(self, x: Tensor, timestep: Tensor, prompt: Any, past: Any, transformer_options: dict[str, Any]) -> Tensor:
        header: dict[str, Any] = {"do": "flow", "text": None, "history": None}
        tensors = {"latents": x, "timestep": timestep}
        if isinstance(prompt, Kept):
            header["text"] = prompt.number
        else:
            tensors["text"] = prompt
        if isinstance(past, Kept):
            header["history"] = past.number
        else:
            indices, parts = taken_apart(past)
            header |= indices
            tensors |= parts
        return self._workers.ask(header, tensors)["flow"].to(x.device)

    @property
    def _workers(self) -> Workers:
        assert self.workers is not None  # the host has loaded the model
        return self.workers


class RemoteModel(HeliosModel):
    network_class = RemoteNetwork
    diffusion_model: RemoteNetwork
    degree = 1

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """On one of the cards."""
        return super().memory_required(input_shape, cond_shapes) / self.degree


class ClusterPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that is loaded by starting workers, and unloaded by ending them.

    To the host it is as large as what one worker takes on its card: the first works on the host's own.
    """

    job: Job

    def clone(self, *args: Any, **kwargs: Any) -> ClusterPatcher:
        n = super().clone(*args, **kwargs)
        n.job = self.job
        return n

    def get_ram_usage(self) -> int:
        return 0

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        if force_patch_weights:
            raise ValueError("Take Helios Multi-GPU out to save a model: its weights are with the workers.")
        workers = self.model.diffusion_model.workers
        if workers is not None and not (workers.alive and workers.job == self.job):
            self.unpatch_model()
        return super().partially_load(device_to, extra_memory)

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        self._refuse_what_does_not_travel()
        self.unpatch_hooks()
        writer = functools.partial(write_patches, patches=self.patches) if self.patches else None
        workers = Workers(self.job, writer)
        self.model.diffusion_model.workers = workers
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, 0, False, True)

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        return 0  # all or nothing: the host then detaches it

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        workers = self.model.diffusion_model.workers
        if unpatch_weights and workers is not None:
            self.model.diffusion_model.workers = None
            workers.close()
        super().unpatch_model(None, unpatch_weights)  # there are no weights that could go anywhere
        if unpatch_weights and device_to is not None:
            self.model.device = device_to

    def _refuse_what_does_not_travel(self) -> None:
        options = self.model_options.get("transformer_options", {})
        what = None
        if is_compiled(self):
            what = "compiled code"
        elif self.hook_patches:
            what = "LoRA hooks (Create Hook LoRA and the like)"
        elif self.weight_wrapper_patches:
            what = f"what wraps weights ({next(iter(self.weight_wrapper_patches))})"
        elif replaced := [key for key in self.object_patches if key.startswith("diffusion_model.")]:
            what = f"a replaced part of the network ({replaced[0]})"
        elif blocks := options.get("patches_replace", {}).get("dit"):
            what = f"a replaced block, of {node_of(next(iter(blocks.values())))}"
        elif override := options.get("optimized_attention_override"):
            what = f"an attention of its own, of {node_of(override)}"
        if what:
            raise ValueError(REFUSED.format(what=what))
        check_patches(self.patches)


def on_several_cards(patcher: Any, cards: tuple[str | None, ...], patience: float = 0.0) -> Any:
    """A MODEL that has this one's files, LoRAs and options, and computes on these cards; patience: see `Job`."""
    if isinstance(patcher, ClusterPatcher):
        raise ValueError("This model went through Helios Multi-GPU already. Take one of the two nodes out.")
    source = patcher.model
    model = RemoteModel(source.model_config, device="meta")
    model.variant, model.files, model.recipe, model.degree = source.variant, source.files, source.recipe, len(cards)
    model.device = patcher.offload_device
    model.diffusion_model.requires_grad_(False)
    path, dtype, _ = source.recipe
    # From disk, that is mapped: else each worker would gather a copy of its own.
    how = astuple(replace(patcher.how, weights_in="disk")) if isinstance(patcher, OffloadPatcher) else None

    clone = patcher.clone()
    clone.__class__ = ClusterPatcher  # the host's clone has every field of its own that there is to take over
    fresh = vars(ClusterPatcher(model, patcher.load_device, patcher.offload_device, patcher.model_size()))
    vars(clone).update({name: value for name, value in fresh.items() if name in OF_A_MODEL})
    clone.job = Job(path, dtype, how, cards, patience)
    return clone
