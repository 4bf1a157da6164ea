"""Helios-Tiny, which comes with the pack: behind the user's own folders, whole, and known by its files."""

import json
import os
import shutil

import folder_paths
import pytest
import torch

from comfyui_helios.helios_core.config import LATENT_CHANNELS
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.host.files import shipped
from comfyui_helios.host.files.named_files import fingerprint
from comfyui_helios.host.files.official import find_folder, list_folders
from comfyui_helios.host.files.vae import load_vae
from comfyui_helios.host.sockets.text_encoding import tokenize
from comfyui_helios.host.stream.graph_key import graph_key
from comfyui_helios.nodes.load import HeliosDiffusersLoader
from support.runs import run_node

VARIANTS = ("distilled", "base", "mid")
NAMES = ["Helios-Tiny-Distilled", "Helios-Tiny-Base", "Helios-Tiny-Mid"]
UNKNOWN = 2  # the tokenizer's piece for what it does not know


@pytest.fixture
def users(tmp_path, monkeypatch):
    """models/diffusers of a user, empty."""
    folder = tmp_path / "diffusers"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(folder)], {"folder"}))
    return folder


@pytest.fixture
def copied(users, tmp_path, monkeypatch):
    """A copy of what the pack ships, which a test may spoil."""
    monkeypatch.setattr(shipped, "MODELS", shutil.copytree(shipped.MODELS, tmp_path / "models"))
    return shipped.MODELS


def put(folder):
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "HeliosTransformer3DModel"}))
    return folder


def graph(name):
    return {"1": {"class_type": "HeliosDiffusersLoader", "inputs": {"folder": name, "dtype": "auto"}}}


def test_the_first_run_of_a_new_user_takes_the_distilled_one(users):
    assert HeliosDiffusersLoader.define_schema().inputs[0].options == NAMES


def test_all_that_the_user_has_comes_first(users):
    put(users / "zoo" / "Helios-Base")
    put(users / "Helios-Distilled")
    assert list_folders() == ["Helios-Distilled", "zoo/Helios-Base", *NAMES]


def test_the_users_folder_of_that_name_wins(users):
    mine = put(users / "Helios-Tiny-Mid")
    assert find_folder("Helios-Tiny-Mid") == mine
    assert list_folders() == ["Helios-Tiny-Mid", "Helios-Tiny-Distilled", "Helios-Tiny-Base"]


@pytest.mark.parametrize("name", ["Helios-Tiny", "Helios-Tiny/vae", "../models/Helios-Tiny-Mid", str(shipped.MODELS)])
def test_nothing_else_of_the_pack_is_a_model(users, name):
    with pytest.raises(ValueError, match=r"found: Helios-Tiny-Distilled, Helios-Tiny-Base, Helios-Tiny-Mid[;)]"):
        find_folder(name)


@torch.inference_mode()
@pytest.mark.parametrize(("name", "variant"), zip(NAMES, VARIANTS, strict=True))
def test_each_variant_loads_whole(users, name, variant):
    model, clip, vae, schedule = run_node(HeliosDiffusersLoader, name, "fp32")
    assert (model.model.diffusion_model.config.text_dim, schedule.variant) == (64, variant)
    [[tokens]] = tokenize(clip, "A small red ball circles counterclockwise on a black background.").values()
    assert UNKNOWN not in [token for token, _ in tokens]
    assert clip.encode_from_tokens(tokenize(clip, "red")).shape == (1, 512, 64)
    frames = torch.full((1, 64, 64, 3), 0.06)  # the toy's black, and a red square
    frames[:, 20:44, 20:44] = torch.tensor([0.90, 0.10, 0.12])
    latents = vae.encode(frames)
    assert latents.shape == (1, LATENT_CHANNELS, 1, 8, 8)
    assert (vae.decode(latents)[0] - frames).abs().mean() < 0.05


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_a_link_to_a_variant_loads_too(users):
    (users / "mine").symlink_to(shipped.MODELS / "Helios-Tiny-Mid")
    assert load_vae(find_folder("mine")).latent_channels == LATENT_CHANNELS


@pytest.mark.parametrize("part", ["Helios-Tiny/vae", "Helios-Tiny/text_encoder", "Helios-Tiny/tokenizer"])
def test_what_the_variants_share_counts_for_each_of_them(copied, part):
    before = [(fingerprint(name), graph_key(graph(name), "1")) for name in NAMES]
    file = next(file for file in (copied / part).iterdir() if file.suffix in (".model", ".safetensors"))
    os.utime(file, ns=(0, 10**18))
    after = [(fingerprint(name), graph_key(graph(name), "1")) for name in NAMES]
    assert not {part for pair in before for part in pair} & {part for pair in after for part in pair}


def test_what_one_variant_has_alone_counts_for_it_alone(copied):
    before = [fingerprint(name) for name in NAMES]
    os.utime(copied / NAMES[1] / "transformer" / "diffusion_pytorch_model.safetensors", ns=(0, 10**18))
    after = [fingerprint(name) for name in NAMES]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_a_part_that_is_not_there_is_named_where_it_ought_to_be(copied):
    shutil.rmtree(copied / "Helios-Tiny" / "vae")
    with pytest.raises(
        CheckpointError, match=r"models/Helios-Tiny has no folder 'vae'.*Helios-Tiny is in this node pack"
    ):
        load_vae(find_folder("Helios-Tiny-Base"))
