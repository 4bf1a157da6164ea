"""Helios as a native MODEL: the core's transformer inside the host's BaseModel and ModelPatcher."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.supported_models_base
import torch
from torch import Tensor

from ...helios_core.checkpoint import CONFIG_KEY, HEAD_DIM, published_name
from ...helios_core.config import Variant
from ...helios_core.history import History, HistoryLayout, Memory
from ...helios_core.lora_names import lora_names
from ...helios_core.regular_file import FileFacts
from ...helios_core.schedule import TRAIN_STEPS
from ...helios_core.transformer import LONG_POOL, MID_POOL
from ..compat import Settings, as_bytes, quantised_for_saving
from .network import HeliosNetwork
from .run_cache import text_bytes_per_token

SUPPORTED_DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# Names of the history's forward arguments, and how much coarser than the noisy chunk each is patchified.
HISTORY_LONG, HISTORY_MID, HISTORY_SHORT = "history_long", "history_mid", "history_short"
MEMORY_KEY = "helios_memory"  # of a cond, while the host sizes memory
TEXT_CACHED_KEY = "helios_text_cached"  # of a cond whose keys and values are to be kept, likewise
HISTORY = {HISTORY_LONG: LONG_POOL, HISTORY_MID: MID_POOL, HISTORY_SHORT: 1}


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """A model_sampling that hands latents and flow through: the core's solvers do the rest.

    To the host a step's sigma is its timestep / 1000. Within a pyramid stage the flow runs between other points: what
    the network is told, and what turns flow into denoised latents, holds for as long as `at` and `denoising` last.
    """

    _timestep: float | None = None
    _sigma: float | None = None

    @contextmanager
    def at(self, timestep: float) -> Iterator[None]:
        """During one step of the loop: `timestep` answers with exactly this one."""
        self._timestep = timestep
        try:
            yield
        finally:
            self._timestep = None

    @contextmanager
    def denoising(self, sigma: float) -> Iterator[None]:
        """While other nodes' functions on the MODEL are called: they are given denoised latents in place of flow."""
        self._sigma = sigma
        try:
            yield
        finally:
            self._sigma = None

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * TRAIN_STEPS if self._timestep is None else torch.full_like(sigma, self._timestep)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output if self._sigma is None else model_input - self._sigma * model_output


class HeliosModel(comfy.model_base.BaseModel):
    """What MODEL sockets carry. `variant` is what the checkpoint says of itself, if it does."""

    network_class: type[HeliosNetwork] = HeliosNetwork
    variant: Variant | None = None
    recipe: tuple[Any, ...] = ()  # arguments of `load_model` that make it again
    _history: Mapping[str, Any] = {}
    files: Collection[FileFacts] = ()  # that its weights were read from, and may still be mapped to

    def __init__(self, model_config: HeliosModelConfig, device: Any = None):
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=self.network_class)
        self.model_sampling = FlowSampling()

    @contextmanager
    def showing(self, history: Mapping[str, Any]) -> Iterator[None]:
        """During one step of a chunk: conds that other nodes make of their own, as Perp-Neg does, get its history."""
        self._history = history
        try:
            yield
        finally:
            self._history = {}

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return {**super().extra_conds(**kwargs), **self._history}

    def helios_lora_names(self) -> dict[str, str]:
        """Modules as LoRA files spell them, and the weight of each in this model: what `offer_lora_names` asks for."""
        names = lora_names(dict(self.diffusion_model.named_parameters()))
        return {spelled: f"diffusion_model.{weight}" for spelled, weight in names.items()}

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """Shapes by which the host sizes memory before sampling, beside the noise's; a cond then carries a Memory."""
        memory: Memory | None = kwargs.get(MEMORY_KEY)
        if memory is None:
            return {}
        shapes = history_shapes(memory)
        if kwargs.get(TEXT_CACHED_KEY):
            shapes[TEXT_CACHED_KEY] = [memory.latents.shape[0], kwargs["cross_attn"].shape[1]]
        return shapes

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] | None = None) -> float:
        """Bytes of activations of one forward, for a noisy chunk (B, 16, 9, h, w) and the histories in cond_shapes."""
        network: HeliosNetwork = self.diffusion_model
        config = network.config
        batch = input_shape[0]
        tokens = batch * network.count_tokens(input_shape)
        for name, pool in HISTORY.items():
            tokens += sum(shape[0] * network.count_tokens(shape, pool) for shape in (cond_shapes or {}).get(name, ()))
        dtype = self.manual_cast_dtype or network.dtype
        element = dtype.itemsize
        prompts = sum(batch * length for batch, length in (cond_shapes or {}).get(TEXT_CACHED_KEY, ()))
        # Live at once: the residual stream, its norm, q, k, v and what the attention makes of them, some in fp32 while
        # they are normed or rotated; or the hidden layer of the feed-forward beside what goes in and comes out.
        attention = config.inner_dim * (6 * element + 3 * 4)
        feed_forward = config.inner_dim * (4 * element + 4) + config.ffn_dim * element
        return tokens * max(attention, feed_forward) + prompts * text_bytes_per_token(network, dtype)


def check_model(node: str, model_patcher: Any) -> None:
    """Raise ValueError for a MODEL that is not one of ours, with the name of the node that got it."""
    model = getattr(model_patcher, "model", model_patcher)
    if not isinstance(model, HeliosModel):
        raise ValueError(
            f"{node} needs a Helios model, got {type(model).__name__}. "
            "Load one with Helios Model Loader or Helios Diffusers Loader."
        )


class HeliosModelConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = SUPPORTED_DTYPES
    quantised: Settings = {}

    def process_unet_state_dict_for_saving(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = quantised_for_saving(state_dict, self.quantised)
        named = {published_name(k): x for k, x in weights.items()}
        config = self.unet_config["config"]
        if config.attention_head_dim != HEAD_DIM:  # which shapes would not tell, and the host writes no metadata
            named[CONFIG_KEY] = as_bytes(config.to_dict())
        return super().process_unet_state_dict_for_saving(named)

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> HeliosModel:
        return HeliosModel(self, device=device)


def history_conds(history: History, layout: HistoryLayout) -> dict[str, comfy.conds.CONDRegular]:
    """A chunk's history as model_conds: forward arguments, so that compiled code sees them change."""
    return {
        HISTORY_LONG: comfy.conds.CONDRegular(history.long),
        HISTORY_MID: comfy.conds.CONDRegular(history.mid),
        HISTORY_SHORT: comfy.conds.CONDRegular(history.short),
        "history_layout": comfy.conds.CONDConstant(layout),
    }


def history_shapes(memory: Memory) -> dict[str, list[int]]:
    """Shapes of `history_conds` for this memory."""
    batch, channels, _, height, width = memory.latents.shape
    frames = dict(zip(HISTORY, memory.layout.split, strict=True))
    frames[HISTORY_SHORT] += memory.layout.keep_first_frame
    return {name: [batch, channels, count, height, width] for name, count in frames.items()}
