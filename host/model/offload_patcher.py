"""Group offloading inside the host: a patcher whose model runs through the core's `Offloader`."""

from __future__ import annotations

import copy
import functools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...helios_core.offload import KEEP_BELOW, Level, Offloader
from ...helios_core.quoting import quoted
from ..compat import is_dynamic, lora_compute_dtype, room_to_pin, rounding_seed, static_clone
from ..printable import printable_log

log = printable_log(__name__)

GroupOffload = Literal["off", "block", "leaf"]
WeightsIn = Literal["host", "disk"]
GROUP_OFFLOAD: tuple[GroupOffload, ...] = get_args(GroupOffload)
WEIGHTS_IN: tuple[WeightsIn, ...] = get_args(WeightsIn)

OFFLOADER = "helios_offloader"  # attribute of a model
VAE_TILE, VAE_OVERLAP = 32, 8  # latents, in height and width
MIB = 1024 * 1024


@dataclass(frozen=True)
class Offloading:
    """How a model is offloaded. `host` gathers its weights in memory, `disk` leaves them where they are."""

    level: Level
    blocks_per_group: int = 1
    weights_in: WeightsIn = "host"


def offloading(group_offload: str, blocks_per_group: int = 1, weights_in: str = "host") -> Offloading | None:
    """The offloading that three widgets ask for; None for `off`. Raises ValueError for other values than theirs."""
    if group_offload not in GROUP_OFFLOAD or weights_in not in WEIGHTS_IN or blocks_per_group < 1:
        raise ValueError(
            f"group_offload must be {' or '.join(GROUP_OFFLOAD)}, weights_in {' or '.join(WEIGHTS_IN)} and "
            f"blocks_per_group at least 1, got {quoted(group_offload)}, {quoted(weights_in)} and {blocks_per_group}."
        )
    if group_offload == "off":
        return None
    return Offloading(group_offload, blocks_per_group, weights_in)


class OffloadPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that is loaded by hooking its model for group offloading.

    To the host it is as large as what it takes on the device. LoRA patches are applied to weights as they arrive there.
    """

    how: Offloading
    dtype: torch.dtype | None = None  # as `Offloader` takes it

    def offload(self, how: Offloading, dtype: torch.dtype | None = None) -> None:
        self.how, self.dtype = how, dtype
        self.offload_device = torch.device("cpu")  # with --highvram the host keeps models on the device
        self.patches_uuid = uuid.uuid4()  # what another patcher has loaded of this model does not count

    @property
    def offloader(self) -> Offloader:
        """Of the model: its clones share it, as they share the weights. Made when it is first needed."""
        settings = (self.how, self.dtype, self.load_device)
        known, offloader = getattr(self.model, OFFLOADER, (None, None))
        if offloader is None or known != settings:
            if offloader is not None:
                offloader.remove()
            offloader = Offloader(
                self.model,
                self.load_device,
                level=self.how.level,
                blocks_per_group=self.how.blocks_per_group,
                gather=self.how.weights_in == "host",
                dtype=self.dtype,
                keep_below=KEEP_BELOW,
            )
            setattr(self.model, OFFLOADER, (settings, offloader))
        return offloader

    def clone(self, *args: Any, **kwargs: Any) -> OffloadPatcher:
        n = super().clone(*args, **kwargs)
        n.how, n.dtype = self.how, self.dtype
        return n

    def model_size(self) -> int:
        """Bytes it takes on the device: weights that stay, buffers, and room to compute the largest LoRA patch."""
        weights = (self.model.get_parameter(key) for key in self.patches)
        return self.offloader.device_size + max((2 * 4 * weight.numel() for weight in weights), default=0)

    def get_ram_usage(self) -> int:
        whole = comfy.model_management.module_size(self.model)
        return whole if self.how.weights_in == "host" else self.offloader.kept_size

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        if force_patch_weights and self.patches:
            raise ValueError("Set group_offload to off to save a model with its LoRAs: offloaded weights are without.")
        return super().partially_load(device_to, extra_memory, force_patch_weights)

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **newer) -> None:
        self._refuse_what_does_not_mix()
        offloader = self.offloader
        with self.use_ejected():
            self.unpatch_hooks()
            self._forget_quantised_patches()
            offloader.transforms = {}
            for key in self.patches:
                patched = functools.partial(self._patched, key)
                if isinstance(self.model.get_parameter(key), QuantizedTensor):  # its layer asks once it has decoded it
                    self.model.get_submodule(key.rpartition(".")[0]).weight_function = [patched]
                else:
                    offloader.transforms[key] = patched
            offloader.pin_limit = room_to_pin()
            offloader.install()
            self.model.device = device_to
            self.model.model_lowvram = False
            self.model.model_loaded_weight_memory = self.model_size()
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)
        log.info(
            "Group offloading of %s: %d groups; on the device %.0f MiB that stay and %.0f MiB of buffers.",
            type(self.model).__name__,
            len(offloader.groups),
            offloader.kept_size / MIB,
            (offloader.device_size - offloader.kept_size) / MIB,
        )

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        return 0  # all or nothing: the host then detaches it

    def unpatch_model(self, device_to=None, unpatch_weights=True) -> None:
        if unpatch_weights:
            self.offloader.remove()
            self.offloader.transforms = {}  # they hold on to this patcher and its LoRAs
            self._forget_quantised_patches()
        super().unpatch_model(device_to, unpatch_weights)

    def _refuse_what_does_not_mix(self) -> None:
        conflict = None
        if is_compiled(self):
            conflict = "compiled code, which does not see weights move. Take the compile node out"
        elif self.hook_patches:
            conflict = "LoRA hooks (Create Hook LoRA and the like). Use a LoRA loader"
        elif self.weight_wrapper_patches:
            conflict = f"a node that wraps weights ({next(iter(self.weight_wrapper_patches))}). Take it out"
        elif replaced := [key for key in self.object_patches if key.endswith(".forward")]:
            conflict = f"a node that replaces how a layer computes ({replaced[0]}). Take it out"
        elif scaled := [key for key in self.patches if self._is_scaled(key)]:
            conflict = f"a LoRA on weights with scales of this kind ({scaled[0]}). Use weights in bf16 or fp16"
        if conflict:
            raise ValueError(f"Group offloading does not work with {conflict}, or set group_offload to off.")

    def _is_scaled(self, key: str) -> bool:
        """Whether a layer keeps a scale beside a weight that is a plain tensor, as older text encoders' do."""
        weight, set_weight, convert_weight = comfy.model_patcher.get_key_weight(self.model, key)
        return not isinstance(weight, QuantizedTensor) and (set_weight or convert_weight) is not None

    def _forget_quantised_patches(self) -> None:
        for module in self.model.modules():
            if isinstance(getattr(module, "weight", None), QuantizedTensor):
                module.weight_function = []

    def _patched(self, key: str, weight: Tensor) -> Tensor:
        """A weight with its LoRA patches, as the host itself computes it on the device."""
        values = weight.to(lora_compute_dtype(weight.device), copy=True)
        values = comfy.lora.calculate_weight(self.patches[key], values, key)
        return comfy.float.stochastic_rounding(values, weight.dtype, seed=rounding_seed(key))


def is_compiled(patcher: Any) -> bool:
    """Whether a torch.compile node was put on a MODEL: through the host's wrapper, or by replacing modules."""
    wrappers = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    replaced = patcher.object_patches.values()
    return bool(wrappers.get("torch.compile")) or any(
        isinstance(module, torch._dynamo.eval_frame.OptimizedModule) for module in replaced
    )


def release(patcher: Any) -> None:
    """Take an offloaded model off the device and the hooks off its layers. Any other patcher is left to the host."""
    if isinstance(patcher, OffloadPatcher):
        patcher.detach()


@contextmanager
def offloaded_clip(clip: Any, how: Offloading | None) -> Iterator[Any]:
    """A CLIP that runs offloaded while the context lasts; the one given, if `how` is None."""
    if how is None:
        yield clip
        return
    offloaded = copy.copy(clip)
    offloaded.patcher = _offloaded(clip.patcher, how)
    offloaded.cond_stage_model = offloaded.patcher.model
    try:
        yield offloaded
    finally:
        release(offloaded.patcher)


@contextmanager
def offloaded_vae(vae: Any, how: Offloading | None) -> Iterator[Any]:
    """A VAE that runs offloaded while the context lasts; the one given, if `how` is None.

    A VAE's memory goes to its activations: it computes in bf16 where the device can, and decodes in tiles.
    """
    if how is None:
        yield vae
        return
    half = vae.vae_dtype == torch.float32 and comfy.model_management.should_use_bf16(vae.device)
    dtype = torch.bfloat16 if half else vae.vae_dtype
    offloaded = copy.copy(vae)
    offloaded.patcher = _offloaded(vae.patcher, how)
    offloaded.first_stage_model = offloaded.patcher.model
    # Where the host casts weights as it streams them in (dynamic VRAM), those of a file are still in the file's dtype.
    if any(weight.dtype != dtype for weight in offloaded.first_stage_model.parameters()):
        offloaded.patcher.offload(how, dtype)
    offloaded.vae_dtype = dtype

    def memory_used_decode(shape: Any, dtype: torch.dtype) -> float:
        return vae.memory_used_decode((*shape[:3], *(min(size, VAE_TILE) for size in shape[3:])), dtype)

    offloaded.memory_used_decode = memory_used_decode
    offloaded.decode = functools.partial(offloaded.decode_tiled, tile_x=VAE_TILE, tile_y=VAE_TILE, overlap=VAE_OVERLAP)
    try:
        yield offloaded
    finally:
        del offloaded.decode  # it refers to what it belongs to
        release(offloaded.patcher)


def _offloaded(patcher: Any, how: Offloading) -> OffloadPatcher:
    """A clone of a host's patcher that offloads."""
    if is_dynamic(patcher) and patcher.cached_patcher_init is None:
        raise ValueError(
            "Group offloading needs a copy of this model without ComfyUI's dynamic VRAM, and its loader does not "
            "say how to make one. Use another loader, or set group_offload to off."
        )
    clone = static_clone(patcher)
    clone.__class__ = OffloadPatcher  # the host's clone has every field of its own that there is to take over
    clone.offload(how)
    return clone
