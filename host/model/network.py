"""The core's transformer in the host's calling convention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
import comfy.patcher_extension
import torch
from torch import Tensor

from ...helios_core.attention import Attention
from ...helios_core.config import TransformerConfig
from ...helios_core.history import History, HistoryLayout
from ...helios_core.layers import Block
from ...helios_core.modulation import Modulation, Table
from ...helios_core.prepared import PreparedHistory, PreparedText
from ...helios_core.transformer import BlockText, HeliosTransformer
from .foreign_patches import check_foreign
from .run_cache import CACHE_KEY, RunCache


class CastTable(Table, comfy.ops.CastWeightBiasOp):
    """One that the host may leave where it is and patch as it is used, like its own layers: a module without this is
    left unpatched where a model does not fit whole."""

    bias = None

    def forward(self, device: torch.device) -> Tensor:
        weight, bias, stream = comfy.ops.cast_bias_weight(self, dtype=torch.float32, device=device, offloadable=True)
        try:
            return weight.clone()  # once given back it may be taken away at once, or what it lies in be used again
        finally:  # under dynamic VRAM a weight that is not given back stays on the device for good
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)


def lending(norm: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """This norm of the host's, whose weights a kernel may have that norms and does more: see `helios_core.fused`."""

    class Lending(norm):  # type: ignore[misc, valid-type]
        @contextmanager
        def lend(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
            weight, bias, stream = comfy.ops.cast_bias_weight(
                self, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
            )
            try:
                yield weight, bias
            finally:
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    return Lending


def host_attention(transformer_options: dict[str, Any]) -> Attention:
    """By whatever backend the user runs, and what other nodes have put into these options."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return comfy.ldm.modules.attention.optimized_attention(
            query.flatten(2),
            key.flatten(2),
            value.flatten(2),
            heads=query.shape[2],
            transformer_options=transformer_options,
        )

    return attend


class HeliosNetwork(HeliosTransformer):
    """The core's transformer with the host's calling convention, attention backends, wrappers and block patches."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, device: Any = None, operations: Any = None, **_):
        norms = {name: lending(getattr(operations, name)) for name in ("LayerNorm", "RMSNorm")}
        ours = type("Operations", (operations,), {"Table": CastTable, **norms})
        super().__init__(config, dtype=dtype, device=device, operations=ours)
        self.in_channels = config.in_channels  # other nodes look it up here

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
                "A Helios model cannot be sampled with KSampler and the like, which give it no history: use Helios "
                "Chunked Sampler."
            )
        history = History(history_long, history_mid, history_short, history_layout.indices)
        # A whole network under torch.compile uses none: newer hosts leave transformer_options out of its guards.
        cache: RunCache | None = None if torch.compiler.is_compiling() else transformer_options.get(CACHE_KEY)
        prompt = context if cache is None else cache.text(self, transformer_options.get("uuids", ()), context)
        past = history if cache is None else cache.history(self, history)
        check_foreign(transformer_options)
        return self._flow(x, timestep, prompt, past, transformer_options)

    def _flow(
        self,
        x: Tensor,
        timestep: Tensor,
        prompt: Tensor | PreparedText,
        past: History | PreparedHistory,
        transformer_options: dict[str, Any],
    ) -> Tensor:
        transformer_options["total_blocks"] = len(self.blocks)
        transformer_options["block_type"] = "double"
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})

        attend = host_attention(transformer_options)

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
