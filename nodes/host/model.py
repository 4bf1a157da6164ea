"""Helios as a native MODEL: the core's transformer inside the host's BaseModel and ModelPatcher."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...helios_core.checkpoint import Checkpoint, open_checkpoint, target_dtypes
from ...helios_core.config import TransformerConfig, Variant
from ...helios_core.history import History, HistoryLayout, Memory
from ...helios_core.layers import Block, Modulation
from ...helios_core.prepared import PreparedText
from ...helios_core.regular_file import FileFacts
from ...helios_core.safetensors_file import read_tensors
from ...helios_core.schedule import TRAIN_STEPS
from ...helios_core.transformer import LONG_POOL, MID_POOL, BlockText, HeliosTransformer
from .cache import CACHE_KEY, RunCache, text_bytes_per_token
from .memory import Offloading, OffloadPatcher

DtypeChoice = Literal["auto", "bf16", "fp16", "fp32", "fp8_e4m3fn"]
DTYPE_CHOICES: tuple[DtypeChoice, ...] = get_args(DtypeChoice)
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}
SUPPORTED_DTYPES = [torch.bfloat16, torch.float16, torch.float32]

MAY_BE_CONVERTED = 0.05  # of the bytes, while weights still count as being on disk

# Names of the history's forward arguments, and how much coarser than the noisy chunk each is patchified.
HISTORY_LONG, HISTORY_MID, HISTORY_SHORT = "history_long", "history_mid", "history_short"
MEMORY_KEY = "helios_memory"  # of a cond, while the host sizes memory
TEXT_CACHED_KEY = "helios_text_cached"  # of a cond whose keys and values are to be kept, likewise
HISTORY = {HISTORY_LONG: LONG_POOL, HISTORY_MID: MID_POOL, HISTORY_SHORT: 1}


class HeliosNetwork(HeliosTransformer):
    """The core's transformer with the host's calling convention, attention backends, wrappers and block patches."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, device: Any = None, operations: Any = None, **_):
        super().__init__(config, dtype=dtype, device=device, operations=operations)

    def forward(  # type: ignore[override]  # the host calls it by these names
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timestep, context, control, options, **kwargs)

    def _predict(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any,
        transformer_options: dict[str, Any],
        *,
        history_long: Tensor | None = None,
        history_mid: Tensor | None = None,
        history_short: Tensor | None = None,
        history_layout: HistoryLayout | None = None,
        **_: Any,
    ) -> Tensor:
        if history_long is None or history_mid is None or history_short is None or history_layout is None:
            raise ValueError(
                "A Helios model got no history. It cannot be sampled with KSampler: use Helios Chunked Sampler."
            )
        history = History(history_long, history_mid, history_short, history_layout.indices)
        # A whole network under torch.compile uses none: newer hosts leave transformer_options out of its guards.
        cache: RunCache | None = None if torch.compiler.is_compiling() else transformer_options.get(CACHE_KEY)
        prompt = context if cache is None else cache.text(self, transformer_options.get("uuids", ()), context)
        past = history if cache is None else cache.history(self, history)
        transformer_options["total_blocks"] = len(self.blocks)
        transformer_options["block_type"] = "double"
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return comfy.ldm.modules.attention.optimized_attention(
                query.flatten(2),
                key.flatten(2),
                value.flatten(2),
                heads=query.shape[2],
                transformer_options=transformer_options,
            )

        def run_block(
            i: int, block: Block, x: Tensor, text: BlockText, time: Modulation, rope: Tensor, noisy_only: bool
        ) -> Tensor:
            transformer_options["block_index"] = i
            replacement = replacements.get(("double_block", i))
            if replacement is None:
                return block(x, text, time, rope, attend, noisy_only)

            def original(args: dict[str, Any]) -> dict[str, Any]:
                return {"img": block(args["img"], args["txt"], args["vec"], args["pe"], attend)}

            tokens = prompt.tokens if isinstance(prompt, PreparedText) else text  # a replaced block may change them
            args = {"img": x, "txt": tokens, "vec": time, "pe": rope, "transformer_options": transformer_options}
            return replacement(args, {"original_block": original})["img"]

        return super().forward(x, timestep, prompt, past, attend, run_block)


class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """A model_sampling that hands latents and flow through: the core's solvers do the rest.

    To the host a step's sigma is its timestep / 1000. Within a pyramid stage the flow runs between other points: what
    the network is told, and what turns flow into denoised latents, is set for each step.
    """

    exact_timestep: float | None = None  # of the running step
    denoise_sigma: float | None = None  # set while functions of the MODEL expect denoised latents, not flow

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * TRAIN_STEPS if self.exact_timestep is None else torch.full_like(sigma, self.exact_timestep)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output if self.denoise_sigma is None else model_input - self.denoise_sigma * model_output


class HeliosModel(comfy.model_base.BaseModel):
    """What MODEL sockets carry. `variant` is what the checkpoint says of itself, if it does."""

    variant: Variant | None = None
    files: Collection[FileFacts] = ()  # that its weights were read from, and may still be mapped to

    def __init__(self, model_config: HeliosModelConfig, device: Any = None):
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=HeliosNetwork)
        self.model_sampling = FlowSampling()

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """Before sampling the host sizes memory by these and by the noise; a cond then carries the memory it has."""
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


class HeliosModelConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = SUPPORTED_DTYPES
    memory_usage_factor = 1.0

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


def choose_dtype(choice: DtypeChoice, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype weights are kept in. `auto` asks the host, which prefers bf16 wherever the device can."""
    if choice not in DTYPE_CHOICES:  # the host (0.3.75) lets any value of a V3 combo pass
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_CHOICES)}, got {choice!r}.")
    if choice != "auto":
        return DTYPES[choice]
    parameters: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        parameters[tensor.dtype] += math.prod(tensor.shape)
    return comfy.model_management.unet_dtype(
        model_params=parameters.total(),
        supported_dtypes=SUPPORTED_DTYPES,
        weight_dtype=parameters.most_common(1)[0][0],
    )


def converted_on_reading(path: str, dtype: DtypeChoice) -> str | None:
    """What to say where most weights cannot be used as they lie on disk, stored in another dtype."""
    checkpoint = open_checkpoint(Path(path))
    targets = target_dtypes(checkpoint.config, choose_dtype(dtype, checkpoint))
    sizes = {name: math.prod(tensor.shape) * targets[name].itemsize for name, tensor in checkpoint.tensors.items()}
    total = sum(sizes.values())
    converted = sum(sizes[name] for name, tensor in checkpoint.tensors.items() if tensor.dtype != targets[name])
    if converted <= MAY_BE_CONVERTED * total:
        return None
    used = choose_dtype(dtype, checkpoint)
    name = next((name for name, known in DTYPES.items() if known == used), str(used))
    convert = "" if used == torch.float32 else f", or make a file with scripts/convert_checkpoint.py --dtype {name}"
    return (
        f"{100 * converted / total:.0f} % of the weights are stored in another dtype than they are used in ({name}), "
        f"and stay in memory. To run from disk, choose the dtype they are stored in{convert}."
    )


def load_model(
    path: str, dtype: DtypeChoice = "auto", offloading: Offloading | None = None, *, disable_dynamic: bool = False
) -> Any:
    """Read a checkpoint (a file or an official folder) into a host ModelPatcher, or into one of ours that offloads.

    Weights stay memory-mapped where they are stored in the dtype they are used in; otherwise they are converted one
    by one, so loading takes no more than the weights in that dtype.
    """
    management = comfy.model_management
    checkpoint = open_checkpoint(Path(path))
    weight_dtype = choose_dtype(dtype, checkpoint)
    load_device = management.get_torch_device()
    offload_device = management.unet_offload_device()

    config = HeliosModelConfig({"image_model": "helios", "config": checkpoint.config})
    config.set_inference_dtype(weight_dtype, management.unet_manual_cast(weight_dtype, load_device, SUPPORTED_DTYPES))
    model = config.get_model(None, device="meta")
    model.variant, model.files = checkpoint.variant, checkpoint.files
    # Not from the module itself: newer hosts on Windows make a Linear's weights only when they are loaded.
    targets = target_dtypes(checkpoint.config, weight_dtype)

    bar = comfy.utils.ProgressBar(len(checkpoint.tensors))
    weights = {}
    for name, tensor in read_tensors(checkpoint.tensors, targets.__getitem__):
        weights[name] = tensor
        bar.update(1)
    model.diffusion_model.load_state_dict(weights, assign=True)
    model.diffusion_model.requires_grad_(False)

    model.device = offload_device
    make_patcher = comfy.model_patcher.ModelPatcher
    if offloading is not None:
        make_patcher = OffloadPatcher
    elif not disable_dynamic:  # newer hosts stream weights through their own patcher
        make_patcher = getattr(comfy.model_patcher, "CoreModelPatcher", make_patcher)
    patcher = make_patcher(model, load_device=load_device, offload_device=offload_device)
    if offloading is not None:
        patcher.offload(offloading)
    # How newer hosts make a second, independent patcher (torch.compile, multi-GPU).
    patcher.cached_patcher_init = (load_model, (path, dtype, offloading))
    return patcher
