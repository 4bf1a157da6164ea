"""A ComfyUI in this process, as for tests/host; with HELIOS_BREAK=<name>, one of breaks.py for all tests."""

from __future__ import annotations

import os
import tempfile

import pytest

from harness.pack import keep_memory, load_comfyui, load_training

base = tempfile.TemporaryDirectory(prefix="helios-meaning-")  # removed when the tests' process ends
load_comfyui(base.name)
load_training()
keep_memory()


@pytest.fixture(scope="session", autouse=True)
def broken():
    """Nothing, or what `make sabotage` asks for."""
    if not (name := os.environ.get("HELIOS_BREAK")):
        yield
        return
    from meaning.breaks import BREAKS

    with pytest.MonkeyPatch.context() as patch:
        BREAKS[name](patch)
        yield
