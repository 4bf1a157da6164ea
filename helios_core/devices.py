"""What devices can and cannot do, by their type as torch has it, and what people call them."""

from __future__ import annotations

import torch

TWO_THREADS = ("cpu", "cuda")  # may be used by two at a time; Apple's ends the process, the others were never tried
COMPLEX = ("cpu", "cuda")  # compute with complex numbers
NO_FLOAT64 = ("mps", "xpu", "privateuseone")  # Apple, Intel, DirectML


def name_of(device: torch.device) -> str:
    """For people: `privateuseone` says nothing to who uses DirectML."""
    return {"privateuseone": "DirectML"}.get(device.type, device.type)


def too_old_for_triton(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton is not to be tried on this CUDA card in a dtype, where it may end the process; None on newer ones."""
    needed, what = ((8, 0), "Triton in bf16") if dtype == torch.bfloat16 else ((7, 0), "Triton")
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    return f"{what} needs a GPU of compute capability {needed[0]}.0, this one has {capability[0]}.{capability[1]}."
