"""The kernels in Triton's interpreter, and who gets them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from comfyui_helios.helios_core import elementwise

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_give_what_plain_torch_gives():
    """tests/gpu/test_fused.py in a process of its own: Triton decides when it is imported that it interprets."""
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "--rootdir", "tests", "-q"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "tests/gpu/test_fused.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


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
