"""What `pip install '.[core]'` gives to a script, and what ComfyUI installs for the pack."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import helios_core
from helios_core.generate import Run, generate
from helios_core.history import Memory
from helios_core.schedule import DISTILLED
assert helios_core.__path__[0].startswith(sys.argv[1])
bind = lambda index, history: lambda latents, timestep, sigma: torch.zeros_like(latents)
[chunk] = generate(bind, Run(DISTILLED, Memory.empty(1, 8, 8), 1, torch.Generator()))
assert chunk.latents.shape == (1, 16, 9, 8, 8)
assert not {"comfy", "folder_paths"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    [path] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return Path(path)


def test_the_wheel_holds_the_core_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"helios_core/{path.name}" for path in (ROOT / "helios_core").glob("*.py")}


def test_a_script_makes_a_chunk_with_the_wheel_alone(wheel, tmp_path):
    subprocess.run([sys.executable, "-I", "-c", SCRIPT, wheel], cwd=tmp_path, check=True)


def test_both_ways_of_installing_want_the_same(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert project["project"]["dependencies"] == wanted


def test_what_comfyui_brings_is_in_the_extra_alone(project):
    """An installer that put another torch over ComfyUI's would break it."""
    extra = project["project"]["optional-dependencies"]
    assert [re.split("[<>=]", line)[0] for line in extra["core"]] == ["numpy", "torch"]
    assert not [line for line in project["project"]["dependencies"] if line.startswith(("torch", "numpy"))]


def test_one_version_of_python_everywhere(project):
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
