"""torch.compile for the blocks of a Helios MODEL, through the host's own wrapper."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ...helios_core.devices import name_of, too_old_for_triton
from ..compat import static_clone
from ..messages import Notes
from .base_model import HeliosModel, check_model
from .quantised import NOT_TRACED

TIMING_KEY = "helios_compile_time"
COMPILERS = ("g++", "c++", "clang++", "cl", "icpx")

# All blocks share their compiled code: one graph for each stage, batch and size, and one more for the last block, which
# leaves the history out. Torch's own limit of 8 is two sizes of a pyramid; beyond it, it runs eager without a word.
RECOMPILE_LIMIT = 64


def why_not(device: torch.device, backend: str) -> str | None:
    """What compiling for this device lacks on this machine; None if it can be done."""
    if backend == "cudagraphs" and device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the model runs on {name_of(device)}."
    if backend != "inductor":
        return None
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"compiling was never tried on {name_of(device)}."
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: pip install triton-windows)."
    if device.type == "cuda":
        return too_old_for_triton(device)
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS)):
        return f"there is no C++ compiler ({', '.join(COMPILERS)})."
    return None


def not_traced(model: HeliosModel) -> str | None:
    """What of a model's weights torch.compile would end with an error at; None if nothing."""
    formats = {str(settings["format"]) for settings in model.model_config.quantised.values()}
    found = next((name for name in NOT_TRACED if name in formats), None)
    return found and f"torch.compile cannot see into products in {found}."


def compile_blocks(patcher: Any, backend: str, mode: str, node_id: str | None) -> Any:
    """A clone of a Helios MODEL whose blocks are compiled when they first run; what that took is told on the node.

    Where it cannot be done the node says so, and the MODEL comes back as it is. Raises ValueError for other models.
    """
    check_model("Helios Compile", patcher)
    notes = Notes(node_id)
    if reason := why_not(patcher.load_device, backend) or not_traced(patcher.model):
        notes.warn(f"Not compiled: {reason} The model runs as it is, with the same result.")
        return patcher
    clone = static_clone(patcher)  # compiled code does not follow weights that are streamed in
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), RECOMPILE_LIMIT))
    set_torch_compile_wrapper(
        clone,
        backend=backend,
        mode=None if mode == "default" or backend != "inductor" else mode,
        dynamic=False,
        keys=[f"diffusion_model.blocks.{i}" for i in range(len(patcher.model.diffusion_model.blocks))],
    )

    def timed(executor: Any, *args: Any, **kwargs: Any) -> Any:
        before = compile_seconds()
        try:
            return executor(*args, **kwargs)
        finally:
            if took := round(compile_seconds() - before):
                notes.inform(f"Compiling took {took} s of this run. The next ones of this size and batch go without.")

    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, TIMING_KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, TIMING_KEY, timed)
    return clone


def compile_seconds() -> float:
    """How long torch has compiled in this process."""
    return float(torch._dynamo.utils.calculate_time_spent().get("total_wall_time", 0.0))
