"""What a sampling run computes once instead of at every step: its prompts' keys and values, its chunks' history."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from threading import Lock
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...helios_core.history import History
from ...helios_core.prepared import PreparedHistory, PreparedText
from ...helios_core.transformer import HeliosTransformer
from .offload_patcher import OffloadPatcher

CACHE_KEY = "helios_cache"  # in transformer_options
COMPILE_KEY = "torch.compile"  # of the host's own wrapper, which leaves the network's inputs alone

# Places where other nodes can change what the network is given, or its weights, between two steps.
WRAPPERS = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
GUIDANCE_FUNCTIONS = (
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
)
OPTIONS = (*GUIDANCE_FUNCTIONS, "model_function_wrapper", "context_handler")

# MultiGPU CFG Split (0.33) has a thread for each card. Not the cache's own: other nodes may copy what it lies in.
_one_at_a_time = Lock()


class RunCache:
    """The prepared prompts and histories of one run of the guider, during which weights do not change.

    A batch is known by the host's ids of the conds in it and by what prompt the guider has given each of them, never by
    a tensor or its address: the host puts every batch together anew.
    """

    def __init__(self, text_bytes: float):
        self.text_bytes = text_bytes  # how much the prompts may take
        self.prompts: dict[Hashable, tuple[int, Tensor]] = {}  # by a cond's id: version and embedding
        self.texts: dict[Hashable, PreparedText] = {}  # least recently used first
        self.histories: dict[Hashable, PreparedHistory] = {}

    def start_chunk(self, prompts: Mapping[Hashable, Tensor]) -> None:
        """Drop the last chunk's history, and prepared prompts if one has changed; prompts: embeddings by cond id."""
        self.histories.clear()
        changed = False
        for cond, prompt in prompts.items():
            version, known = self.prompts.get(cond, (0, None))
            if known is None or known.shape != prompt.shape or not torch.equal(known, prompt):
                self.prompts[cond] = (version + 1, prompt.clone())  # its memory may be written to again
                changed = changed or known is not None
        if changed:
            self.texts.clear()

    def text(self, network: HeliosTransformer, conds: Iterable[Hashable], context: Tensor) -> Tensor | PreparedText:
        """The prompts of a batch of conds, context (B, L, text_dim): prepared, or raw where they take too much."""
        conds = tuple(conds)
        if not conds or any(cond not in self.prompts for cond in conds):
            return context
        key = (tuple((cond, self.prompts[cond][0]) for cond in conds), context.shape, context.dtype, context.device)
        with _one_at_a_time:
            prepared = self.texts.pop(key, None)
            if prepared is None:
                needed = context.shape[0] * context.shape[1] * text_bytes_per_token(network, context.dtype)
                if needed > self.text_bytes:
                    return context
                while self.texts and needed + sum(text.nbytes for text in self.texts.values()) > self.text_bytes:
                    del self.texts[next(iter(self.texts))]
                prepared = network.prepare_text(context)
            self.texts[key] = prepared
            return prepared

    def history(self, network: HeliosTransformer, history: History) -> PreparedHistory:
        """The chunk's history, prepared; the guider gives the same to all conds."""
        key = (history.short.shape, history.short.dtype, history.short.device, history.indices)
        if key not in self.histories:
            self.histories[key] = network.prepare_history(history)
        return self.histories[key]


def text_bytes_per_token(network: HeliosTransformer, dtype: torch.dtype) -> int:
    """Bytes of a prepared prompt for each of its tokens: the token, and a key and a value in every block."""
    config = network.config
    return (2 * config.num_layers + 1) * config.inner_dim * dtype.itemsize


def can_cache(patcher: Any, model_options: Mapping[str, Any], conds: Mapping[str, Iterable[Mapping[str, Any]]]) -> bool:
    """Whether nothing in the graph may change prompts, history or weights between two steps of a chunk."""
    if isinstance(patcher, OffloadPatcher):  # its weights are there only while their block runs
        return False
    if any(cond.get("hooks") for group in conds.values() for cond in group):
        return False
    if any(model_options.get(option) for option in OPTIONS) or patcher.get_all_callbacks(CallbacksMP.ON_PREPARE_STATE):
        return False
    options = model_options.get("transformer_options", {})
    return not any(
        functions
        for wrappers in (options.get("wrappers", {}), patcher.wrappers)
        for kind in WRAPPERS
        for key, functions in wrappers.get(kind, {}).items()
        if key != COMPILE_KEY
    )
