"""Who gets the fused kernels. What they give in Triton's interpreter is part of what test_gpu_command.py rehearses."""

import sys
from types import SimpleNamespace

import pytest
import torch

from comfyui_helios.helios_core import elementwise


@pytest.fixture(autouse=True)
def _found_out_anew():
    elementwise._fused.cache_clear()
    yield
    elementwise._fused.cache_clear()


def test_a_processor_has_none():
    with torch.inference_mode():
        assert elementwise.fused_where_possible(torch.zeros(1, 2, 4)) is elementwise


@pytest.mark.parametrize(
    ("hip", "capability", "dtype", "runs"),
    [
        (None, (6, 1), torch.float16, False),
        (None, (7, 5), torch.float16, True),
        (None, (7, 5), torch.bfloat16, False),
        (None, (8, 0), torch.bfloat16, True),
        ("6.4", (9, 4), torch.float16, False),
    ],
)
def test_a_card_has_them_where_triton_does_not_end_the_process(monkeypatch, hip, capability, dtype, runs):
    fused = pytest.importorskip("comfyui_helios.helios_core.fused")
    tried = []
    monkeypatch.setattr(fused, "try_out", tried.append)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype, stride=lambda dim: 1)
    with torch.inference_mode():
        assert elementwise.fused_where_possible(x) is (fused if runs else elementwise)
    assert tried == [x.device] * runs


def test_without_triton_there_are_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", None)
    with torch.inference_mode():
        assert elementwise.fused_where_possible(torch.zeros(1, 2, 4)) is elementwise
