"""Who gets the fused kernels. What they give in Triton's interpreter is part of what test_gpu_command.py rehearses."""

import sys

import torch

from comfyui_helios.helios_core import elementwise


def test_a_processor_has_none():
    with torch.inference_mode():
        assert elementwise.fused_where_possible(torch.zeros(1, 2, 4)) is elementwise


def test_without_triton_there_are_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", None)
    elementwise._fused.cache_clear()
    with torch.inference_mode():
        assert elementwise.fused_where_possible(torch.zeros(1, 2, 4)) is elementwise
    elementwise._fused.cache_clear()
