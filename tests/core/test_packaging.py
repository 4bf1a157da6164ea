"""What `pip install '.[core]'` gives to a script, what ComfyUI installs for the pack, what the registry has."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from pathspec import GitIgnoreSpec
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NO_NAME = re.compile(r'.*[<>:"|?*\\].*|.*[ .]|(con|nul|aux|prn|com\d|lpt\d)(\..*)?', re.I)  # on Windows
ROOM = 150  # characters of its 260, beside the folder that ComfyUI is in
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


def test_the_registry_learns_who_we_are_and_where_to_ask(project):
    """The registry's own check passes empty fields."""
    about, comfy = project["project"], project["tool"]["comfy"]
    address = "https://github.com/ComfyUI-Helios/ComfyUI-Helios"
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", about["name"])
    assert "comfyui" not in about["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert 20 < len(about["description"]) <= 200
    assert about["urls"] == {
        "Repository": address,
        "Documentation": f"{address}/blob/main/docs/guide.md",
        "Bug Tracker": f"{address}/issues",
    }
    assert (ROOT / about["license"]["file"]).is_file()
    assert {"Operating System :: OS Independent", "Environment :: GPU :: NVIDIA CUDA"} <= set(about["classifiers"])
    assert comfy["PublisherId"] == "comfyui-helios"
    assert comfy["DisplayName"] == "ComfyUI-Helios"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


@pytest.mark.parametrize(("field", "widest", "shape"), [("Icon", 400, 1), ("Banner", 1920, 21 / 9)])
def test_the_pictures_of_the_registry_are_files_of_this_repository(project, field, widest, shape):
    address = project["tool"]["comfy"][field]
    root, _, name = address.partition("/main/")
    assert root == "https://raw.githubusercontent.com/ComfyUI-Helios/ComfyUI-Helios"
    with Image.open(ROOT / name) as picture:
        width, height = picture.size
    assert width <= widest
    assert width / height == pytest.approx(shape, rel=0.01)
    assert (ROOT / name).stat().st_size < 100_000


@pytest.fixture(scope="module")
def archive():
    """What the registry hands out, as comfy-cli packs it: the files of the checkout that .comfyignore does not name."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    left_out = GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines())
    return {name for name in names if not left_out.match_file(name)}


def test_the_archive_holds_the_pack_and_its_weights_but_not_their_making(archive):
    weights = [Path(name).parts[:3] for name in archive if name.endswith(".safetensors")]
    transformers = [("models", f"Helios-Tiny-{variant}", "transformer") for variant in ("Base", "Distilled", "Mid")]
    assert sorted(weights) == [("models", "Helios-Tiny", part) for part in ("text_encoder", "vae")] + transformers
    assert {"models/Helios-Tiny/tokenizer/spiece.model", "workflows/helios_first_run.json", "__init__.py"} <= archive
    assert not {name.split("/")[0] for name in archive} & {"training", "tests", "benchmarks"}


def test_a_program_that_is_shipped_comes_with_what_it_imports(archive):
    programs = {name for name in archive if re.fullmatch(r"scripts/.*\.py", name)}
    assert "scripts/convert_checkpoint.py" in programs
    assert not [name for name in programs if re.search(r"^from harness\b", (ROOT / name).read_text("utf-8"), re.M)]


def test_every_file_has_a_name_that_windows_can_keep_and_tells_from_all_others(archive):
    assert not [name for name in archive if len(name) > ROOM or any(map(NO_NAME.fullmatch, name.split("/")))]
    assert len({name.lower() for name in archive}) == len(archive)


def test_no_link_is_shipped(archive):
    """They do not survive a zip file, nor Windows."""
    assert not [name for name in archive if (ROOT / name).is_symlink()]
