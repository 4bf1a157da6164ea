"""A worker whose memory runs out: told in the words of every lack of memory here, and the next run goes well."""

from __future__ import annotations

import sys
from pathlib import Path

import comfy.model_management
import pytest
import torch

from comfyui_helios.host.cluster.remote_model import on_several_cards
from comfyui_helios.host.model.loading import load_model
from support.runs import QUICK, make_distilled, sample

resource = pytest.importorskip("resource")  # which Windows is without

ROOM = 40_000_000  # bytes beside what a worker has: enough for the small video, and half of what the large one takes


def limit_memory(pid):
    """As a card that is nearly full: what a worker asks for from now on, beyond this, it does not get."""
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of another process")
@pytest.mark.parametrize("short", [0, 1])
def test_a_worker_out_of_memory_is_told_and_the_next_run_goes_well(tmp_path, caplog, short):
    model = on_several_cards(load_model(str(make_distilled(tmp_path)), "fp32"), (None, None))
    expected = sample(model, QUICK)["samples"]
    before = [process.pid for process in model.model.diffusion_model.workers.processes]
    limit_memory(before[short])
    assert torch.equal(sample(model, QUICK)["samples"], expected)  # which does not need more
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=r"ran out of memory.* Make the video smaller"):
        sample(model, QUICK, size=(512, 1024))
    assert f"the log of worker {short + 1} of 2 ends in" in caplog.text
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)
    assert torch.equal(sample(model, QUICK)["samples"], expected)
    comfy.model_management.unload_all_models()
