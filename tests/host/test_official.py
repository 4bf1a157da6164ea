"""Official folders below models/diffusers: which are listed, and the schedule their files describe."""

import json
import shutil

import folder_paths
import pytest

from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.helios_core.schedule import DISTILLED
from comfyui_helios.host.files.official import find_folder, list_folders, read_schedule
from harness.tiny import make_official_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusers")
    make_official_folder(root / "BestWishYsh" / "Helios-Distilled", "distilled")
    other = root / "FLUX.1-dev" / "transformer"
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    folder_paths.add_model_folder_path("diffusers", str(root))
    return root


def test_only_helios_folders_are_listed(models, nothing_shipped):
    assert list_folders() == ["BestWishYsh/Helios-Distilled"]
    assert find_folder("BestWishYsh/Helios-Distilled") == models / "BestWishYsh" / "Helios-Distilled"


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": null}'])
def test_a_damaged_config_keeps_no_folder_from_being_listed(models, text):
    config = models / "Helios-Broken" / "transformer" / "config.json"
    config.parent.mkdir(parents=True)
    try:
        config.write_text(text)
        assert "BestWishYsh/Helios-Distilled" in list_folders()
    finally:
        shutil.rmtree(config.parents[1])


@pytest.mark.parametrize("name", ["FLUX.1-dev", "..", "/etc", ""])
def test_other_names_are_refused(models, name):
    with pytest.raises(ValueError, match="Put a copy of BestWishYsh/Helios-Distilled there"):
        find_folder(name)


def test_a_transformer_alone_is_not_to_be_downloaded_again(tmp_path):
    """As `hf download --include "transformer/*"` leaves it, 57 GB."""
    (tmp_path / "transformer").mkdir()
    with pytest.raises(CheckpointError, match="no model_index.json.*Download it from.*convert_checkpoint.py"):
        read_schedule(tmp_path)


def test_an_unknown_scheduler_file_warns_and_gives_the_usual_schedule(models):
    folder = models / "BestWishYsh" / "Helios-Distilled"
    file = folder / "scheduler" / "scheduler_config.json"
    kept = file.read_text()
    schedule, warning = read_schedule(folder)
    assert warning is None
    assert (schedule.solver, schedule.time_shift) == ("dmd", "linear")
    try:
        file.write_text(json.dumps({**json.loads(kept), "prediction_type": "epsilon"}))
        schedule, warning = read_schedule(folder)
    finally:
        file.write_text(kept)
    assert schedule == DISTILLED
    assert "prediction_type 'epsilon'" in warning
