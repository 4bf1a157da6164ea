"""A Helios MODEL without weights: its forwards are computed by worker processes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...helios_core.history import History
from ...helios_core.parallel import Shares
from ..model.base_model import HeliosModel
from ..model.foreign_patches import node_of
from ..model.network import HeliosNetwork
from ..model.offload_patcher import OffloadPatcher, is_compiled
from .patches import REFUSED, check_patches
from .wire import taken_apart
from .workers import Job, Workers

# Fields of a patcher that belong to its model, or say which patchers share one; the last two are of newer hosts.
OF_A_MODEL = {
    *("model", "size", "backup", "object_patches_backup", "pinned", "cached_patcher_init"),
    *("backup_buffers", "clone_base_uuid"),
}


class Kept:
    """A prompt or a history that the workers have prepared, and keep as long as this lives.

    Others may have taken their place meanwhile, for the host unloads models to decode a chunk: they prepare it again.
    """

    nbytes = 0  # on the server

    def __init__(self, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]):
        self._asked = {"do": what, **header}, dict(tensors)
        self._workers: Callable[[], Workers | None] = lambda: None
        self._number = 0

    def number_at(self, workers: Workers) -> int:
        if self._workers() is not workers:
            self._workers, self._number = weakref.ref(workers), workers.remember(self)
            header, tensors = self._asked
            workers.ask({**header, "number": self._number}, tensors)
        return self._number


class RemoteNetwork(HeliosNetwork):
    """Has all names and sizes of a network, and asks the workers for its flow."""

    workers: Workers | None = None

    def prepare_text(self, text: Tensor) -> Any:
        kept = Kept("prepare_text", {}, {"text": text})
        kept.number_at(self._workers)
        return kept

    def prepare_history(self, history: History) -> Any:
        kept = Kept("prepare_history", *taken_apart(history))
        kept.number_at(self._workers)
        return kept

    def _flow(self, x: Tensor, timestep: Tensor, prompt: Any, past: Any, transformer_options: dict[str, Any]) -> Tensor:
        Shares.of(0, math.prod(self.token_grid(x)), self._workers.degree)  # before it ends the workers
        header: dict[str, Any] = {"do": "flow", "text": None, "history": None}
        tensors = {"latents": x, "timestep": timestep}
        if isinstance(prompt, Kept):
            header["text"] = prompt.number_at(self._workers)
        else:
            tensors["text"] = prompt
        if isinstance(past, Kept):
            header["history"] = past.number_at(self._workers)
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
    memory = 0.0  # as it was last asked for

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        """On one of the cards."""
        self.memory = super().memory_required(input_shape, cond_shapes) / self.degree
        return self.memory


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
        self._refuse_what_does_not_travel()
        workers = self.model.diffusion_model.workers
        if workers is not None and workers.alive and workers.job == self.job:
            workers.job = self.job  # its patience may be another
            if self.model.current_weight_patches_uuid != self.patches_uuid:
                self._load_again(workers)
        else:
            self.unpatch_model()
        return super().partially_load(device_to, extra_memory)

    def _load_again(self, workers: Workers) -> None:
        """With other LoRAs, where the host would unload the model first."""
        try:
            workers.load(self.patches, self.model.memory)
        except BaseException:
            self.unpatch_model()
            raise
        self.model.current_weight_patches_uuid = self.patches_uuid

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        self.unpatch_hooks()
        self.model.diffusion_model.workers = Workers(self.job, self.patches, self.model.memory)
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, 0, False, True)

    def get_key_patches(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("Take Helios Multi-GPU out to merge a model: its weights are with the workers.")

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
        elif self.get_additional_models_with_key("multigpu"):
            what = "a model that MultiGPU CFG Split has shared out already"
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


_of_source: weakref.WeakKeyDictionary[HeliosModel, ClusterPatcher] = weakref.WeakKeyDictionary()


def on_several_cards(
    patcher: Any, cards: tuple[str | None, ...], patience: float = 0.0, address: str = ""
) -> ClusterPatcher:
    """A MODEL that has this one's files, LoRAs and options, and computes on these cards; patience, address: see `Job`.

    Asked again, of the same model with other LoRAs, it has the same workers.
    """
    if isinstance(patcher, ClusterPatcher):
        raise ValueError("This model went through Helios Multi-GPU already. Take one of the two nodes out.")
    source = patcher.model
    path, dtype, _ = source.recipe
    # From disk, that is mapped: else each worker would gather a copy of its own.
    how = astuple(replace(patcher.how, weights_in="disk")) if isinstance(patcher, OffloadPatcher) else None
    job = Job(path, dtype, how, cards, patience, address)
    bare = _of_source.get(source)
    if bare is None or bare.job != job:
        bare = _of_source[source] = _without_loras(patcher, job)

    clone: Any = bare.clone()
    given = patcher.clone()  # the host's clone has every field of its own that there is to take over
    vars(clone).update({name: value for name, value in vars(given).items() if name not in OF_A_MODEL})
    clone.parent, clone.job = bare, job
    return clone


def _without_loras(patcher: Any, job: Job) -> ClusterPatcher:
    source = patcher.model
    model = RemoteModel(source.model_config, device="meta")
    model.variant, model.files, model.recipe = source.variant, source.files, source.recipe
    model.degree = len(job.cards)
    model.device = patcher.offload_device
    # Newer hosts make a Linear's parameters only when weights are loaded, and LoRAs go by their names and shapes.
    weights = source.diffusion_model.named_parameters()
    shapes = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights}
    model.diffusion_model.load_state_dict(shapes, assign=True, strict=False)  # quantised layers have scales beside
    model.diffusion_model.requires_grad_(False)
    bare = ClusterPatcher(model, patcher.load_device, patcher.offload_device, patcher.model_size())
    bare.job = job
    return bare
