"""Who gets the fused kernels. What they give in Triton's interpreter is part of what test_gpu_command.py rehearses."""

import sys

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
    ("hip", "capability", "dtype"),
    [(None, (6, 1), torch.float16), (None, (7, 5), torch.bfloat16), ("6.4", (9, 4), torch.float16)],
    ids=["Pascal", "Turing in bf16", "AMD"],
)
def test_cards_on_which_triton_may_end_the_process_have_none(monkeypatch, hip, capability, dtype):
    fused = pytest.importorskip("comfyui_helios.helios_core.fused")
    monkeypatch.setattr(fused, "try_out", lambda device: pytest.fail("tried out"))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert elementwise._fused(torch.device("cuda:0"), dtype) is None


def test_without_triton_there_are_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.runtime.errors", None)
    with torch.inference_mode():
        assert elementwise.fused_where_possible(torch.zeros(1, 2, 4)) is elementwise
