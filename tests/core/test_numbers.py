"""Numbers that are the same on every machine: against a file, as this machine computes and as older ones would."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_helios.helios_core import pyramid
from comfyui_helios.helios_core.schedule import DISTILLED, MID, stages
from support import recorded

ROOT = Path(__file__).resolve().parents[2]
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
MACHINES = {
    "two threads": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},  # spinning takes minutes on a busy machine
    "AVX2": {**AVX2, "OMP_NUM_THREADS": "1"},
    "MKL_CBWR": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    "no AVX": {**OLDEST, "OMP_NUM_THREADS": "1"},
}


def test_numbers_are_those_of_the_file():
    assert not recorded.misfits(recorded.compare())


@pytest.mark.parametrize("settings", MACHINES.values(), ids=MACHINES.keys())
def test_another_processor_computes_the_same(settings):
    """This one, held to what others have."""
    if settings.get("ATEN_CPU_CAPABILITY") == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2")
    env = {
        **os.environ,
        **settings,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]),
    }
    command = [sys.executable, recorded.__file__]
    differences = json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    print(recorded.largest(differences))
    assert not recorded.misfits(differences)


def test_a_factor_of_rounding_noise_shows(monkeypatch):
    """The last pivot squared as Intel's float32 makes it of 4e-8: it moves every pyramid, and the base schedule not."""
    factor = pyramid.block_factor(1 / 3)
    factor[3, 3] = math.sqrt(1.79e-7)
    monkeypatch.setattr(pyramid, "block_factor", lambda gamma: factor)
    moved = {name.rpartition(".")[0] for name in recorded.misfits(recorded.compare()) if name.startswith("run.")}
    assert moved == {"run.mid", "run.distilled"}


def test_the_file_is_small_and_says_where_it_was_made():
    assert recorded.FILE.stat().st_size <= 1_000_000
    assert recorded.load()[2].keys() == {"processor", "torch", "capability", "threads", "command"}


@pytest.mark.parametrize("schedule", [MID, DISTILLED], ids=lambda schedule: schedule.variant)
def test_no_timestep_is_near_a_whole_number(schedule):
    """A pyramid truncates them, so one that a last bit could lift over a whole number would be another elsewhere.

    A last bit is 1e-13 here. By hand for all sizes up to 2048 x 2048 and 200 steps: none within 4e-8.
    """
    sides = (4, 6, 8, 10, 12, 16, 20)  # of 64 pixels
    for area in sorted({a * b for a in sides for b in sides}):
        for steps in range(1, 21):
            for stage in stages(replace(schedule, steps=(steps,) * 3), 8, 8 * area, first_chunk=False):
                assert (stage.timesteps - stage.timesteps.round()).abs().min() > 1e-8
