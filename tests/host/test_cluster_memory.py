"""A worker whose memory runs out: told in the words of every lack of memory here, and the next run goes well."""

from __future__ import annotations

import sys

import comfy.model_management
import psutil
import pytest
import torch

from comfyui_helios.host.cluster.remote_model import on_several_cards
from comfyui_helios.host.model.loading import load_model
from support.runs import QUICK, make_distilled, sample

ROOM = 40_000_000  # bytes beside what a worker has: enough for the small video, and half of what the large one takes


def workers():
    """The first is the one that was started first."""
    children = sorted(psutil.Process().children(), key=lambda child: child.create_time())
    return [child for child in children if any(word.endswith("entry.py") for word in child.cmdline())]


def limit_memory(worker):
    """As on a card that is nearly full: what it asks for from now on, beyond this, it does not get."""
    worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + ROOM, psutil.RLIM_INFINITY))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of another process")
def test_a_worker_out_of_memory_is_told_and_the_next_run_goes_well(tmp_path):
    model = on_several_cards(load_model(str(make_distilled(tmp_path)), "fp32"), (None, None))
    expected = sample(model, QUICK)["samples"]
    for short in range(2):
        before = workers()
        assert len(before) == 2
        limit_memory(before[short])
        assert torch.equal(sample(model, QUICK)["samples"], expected)  # which does not need more
        message = rf"^Helios Multi-GPU: worker {short + 1} of 2 ran out of memory.* Make the video smaller.* The next"
        with pytest.raises(comfy.model_management.OOM_EXCEPTION, match=message):
            sample(model, QUICK, size=(512, 1024))
        assert workers() == []
        assert torch.equal(sample(model, QUICK)["samples"], expected)
    comfy.model_management.unload_all_models()
