"""Helios LoRA Loader: what it puts on a model, what it says of a file, and what it refuses."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from comfyui_helios.host.model import offload_patcher
from comfyui_helios.host.model.compiled import compile_blocks
from comfyui_helios.host.model.loading import load_model
from comfyui_helios.host.model.offload_patcher import Offloading
from comfyui_helios.nodes.lora import HeliosLoraLoader
from harness.errors import difference
from support.loras import IN_BLOCKS, LAYOUTS, RANK, added, in_layout, matrices, merged, product, training_metadata
from support.runs import QUICK, make_distilled, run_node, sample

CLOSE = 1e-5
ONE = "blocks.1.attn1.to_v"
TRAINED = LAYOUTS["Helios' training"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_distilled(tmp_path_factory.mktemp("lora") / "Helios-Distilled"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, "fp32")


@pytest.fixture(scope="module")
def plain(model):
    return sample(model, QUICK)["samples"]


@dataclass
class Loras:
    """models/loras, and what the node says."""

    folder: os.PathLike
    said: list[str]

    def load(self, model, tensors, strength=1.0, metadata=None):
        self.said.clear()
        save_file(tensors, self.folder / "a.safetensors", metadata)
        return run_node(HeliosLoraLoader, model, "a.safetensors", strength, unique_id="1")[0]

    def refusal(self, model, tensors, name="a.safetensors"):
        save_file(tensors, self.folder / name)
        with pytest.raises(ValueError) as error:
            run_node(HeliosLoraLoader, model, name, 1.0)
        return str(error.value)


@pytest.fixture
def loras(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors", ".pt"}))
    said = []
    monkeypatch.setattr("comfyui_helios.host.messages.tell", lambda text, node_id: text and said.append(text))
    return Loras(tmp_path, said)


def with_merged(tmp_path, parts, scale=1.0):
    """The video of a model with these matrices merged by hand; scale: one for all, or by module."""
    scales = scale if isinstance(scale, dict) else dict.fromkeys(parts, scale)
    deltas = {module: scales[module] * product(*pair) for module, pair in parts.items()}
    return sample(merged(tmp_path / "merged", added(deltas)), QUICK)["samples"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_takes_every_layout_and_says_which(model, loras, tmp_path, name):
    parts = matrices()
    video = sample(loras.load(model, in_layout(LAYOUTS[name], parts, alpha=2.0), 0.5), QUICK)["samples"]
    assert difference(video, with_merged(tmp_path, parts, 0.5 * 2.0 / RANK)) <= CLOSE
    whose = "Wan" if name.startswith(("Wan", "musubi")) else "Helios"
    total = 3 * len(parts)
    assert loras.said == [
        f"{total} of {total} tensors of a.safetensors take effect: a LoRA of rank 4, in the names of {whose}."
    ]


@pytest.mark.parametrize(
    ("more", "scales"),
    [
        ({}, {None: 6.0 / RANK}),
        ({"alpha_pattern": {"attn1.to_q": 1.0}}, {None: 6.0 / RANK, "attn1.to_q": 1.0 / RANK}),
        ({"use_rslora": True}, {None: 6.0 / math.sqrt(RANK)}),
    ],
    ids=["alpha", "by module", "rank-stabilised"],
)
def test_takes_alpha_from_the_metadata_of_helios_training(model, loras, tmp_path, more, scales):
    parts = matrices(IN_BLOCKS)
    metadata = training_metadata(parts, 6.0, **more)
    video = sample(loras.load(model, in_layout(TRAINED, parts), metadata=metadata), QUICK)["samples"]
    by_module = {module: scales.get(module.split(".", 2)[2], scales[None]) for module in parts}
    assert difference(video, with_merged(tmp_path, parts, by_module)) <= CLOSE


def test_alpha_of_a_tensor_goes_before_that_of_the_metadata(model, loras, tmp_path):
    parts = matrices([ONE])
    tensors = in_layout(TRAINED, parts, alpha=2.0)
    video = sample(loras.load(model, tensors, metadata=training_metadata(parts, 100.0)), QUICK)["samples"]
    assert difference(video, with_merged(tmp_path, parts, 2.0 / RANK)) <= CLOSE


def test_strengths_add_up_and_go_below_zero(model, loras, plain):
    tensors = in_layout(TRAINED, matrices())
    once = loras.load(model, tensors, 0.75)
    assert difference(sample(loras.load(once, tensors, -0.75), QUICK)["samples"], plain) <= CLOSE
    twice = sample(loras.load(loras.load(model, tensors, 0.25), tensors, 0.5), QUICK)["samples"]
    assert difference(twice, sample(once, QUICK)["samples"]) <= CLOSE
    assert difference(twice, plain) > 1e-3
    assert torch.equal(sample(model, QUICK)["samples"], plain)  # the MODEL it was put on is as it was


def test_strength_0_is_the_model_itself(model, loras):
    assert loras.load(model, in_layout(TRAINED, matrices()), 0.0) is model
    assert loras.said == ["a.safetensors has no effect at strength 0."]


@pytest.mark.parametrize("how", [Offloading("block"), Offloading("leaf", weights_in="disk")], ids=str)
def test_under_group_offloading(folder, loras, model, how, monkeypatch):
    monkeypatch.setattr(offload_patcher, "KEEP_BELOW", 0)
    tensors = in_layout(TRAINED, matrices(), alpha=2.0)
    expected = sample(loras.load(model, tensors), QUICK)["samples"]
    offloaded = loras.load(load_model(folder, "fp32", how), tensors)
    assert torch.equal(sample(offloaded, QUICK)["samples"], expected)


def test_on_fp8_weights(folder, loras, model, plain):
    """Rounding to 8 bits aside, the LoRA does what it does to float32 weights."""
    tensors = in_layout(TRAINED, matrices())
    change = sample(loras.load(model, tensors), QUICK)["samples"] - plain
    quantised = load_model(folder, "fp8_e4m3fn")
    found = sample(loras.load(quantised, tensors), QUICK)["samples"] - sample(quantised, QUICK)["samples"]
    assert (found - change).square().mean() < 0.25 * change.square().mean()


def test_before_and_after_compiling(loras, model):
    tensors = in_layout(TRAINED, matrices())
    expected = sample(loras.load(model, tensors), QUICK)["samples"]
    torch.compiler.reset()
    before = compile_blocks(loras.load(model, tensors), "aot_eager", "default", None)
    assert difference(sample(before, QUICK)["samples"], expected) <= CLOSE
    after = loras.load(compile_blocks(model, "aot_eager", "default", None), tensors)
    assert difference(sample(after, QUICK)["samples"], expected) <= CLOSE


def test_tells_what_is_left_out_and_why(model, loras, tmp_path):
    parts = matrices([ONE])
    strangers = {
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.ones(4, 48),
        "transformer.blocks.0.attn2.add_k_proj.lora_B.weight": torch.ones(48, 4),
        "transformer.patch_embedding.lora_A.weight": torch.ones(4, 36, 1, 2, 2),
        "transformer.patch_embedding.lora_B.weight": torch.ones(48, 4, 1, 1, 1),
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 48),
        "transformer.blocks.0.attn1.to_k.lora_magnitude_vector": torch.ones(48),
    }
    video = sample(loras.load(model, in_layout(TRAINED, parts) | strangers), QUICK)["samples"]
    assert difference(video, with_merged(tmp_path, parts)) <= CLOSE
    [said] = loras.said[-1:]
    assert said.startswith("2 of 8 tensors of a.safetensors take effect")
    assert "6 of 8 tensors were left out: 2 read an image" in said
    assert "4 have another shape than the model, lack a part, or go with one that no host applies, such as" in said


def test_whole_weights_take_the_place_of_the_models(model, loras, tmp_path):
    weight = torch.rand(48, generator=torch.Generator().manual_seed(0))
    patched = loras.load(model, {"diffusion_model.blocks.0.norm2.bias.set_weight": weight}, 0.1)
    expected = merged(tmp_path, lambda name, x: weight if name == "blocks.0.norm2.bias" else x)
    assert difference(sample(patched, QUICK)["samples"], sample(expected, QUICK)["samples"]) <= CLOSE
    assert "whatever the strength" in loras.said[-1]


def pair(name, width, down="lora_A.weight", up="lora_B.weight"):
    return {f"{name}.{down}": torch.ones(2, width), f"{name}.{up}": torch.ones(width, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            pair("diffusion_model.blocks.0.self_attn.q", 1536),
            "is a LoRA for Wan 2.1 1.3B: none of its 2 tensors has",
        ),
        (pair("transformer.blocks.0.attn1.to_q", 3072), "is a LoRA for Wan 2.2 5B"),
        (pair("transformer.blocks.0.attn1.to_q", 64), "is a LoRA for a Wan model of another size"),
        (pair("lora_unet_double_blocks_0_img_attn_qkv", 64), "is a LoRA for Flux or HunyuanVideo"),
        (pair("lora_unet_down_blocks_0_attn1_to_q", 64), "is a LoRA for Stable Diffusion"),
        (
            pair("something", 64),
            "is a LoRA for another model: none of its 2 tensors has a name that Helios has.",
        ),
        ({"x": torch.ones(2)}, "is no LoRA: none of its 1 tensors has the name of a LoRA's. It begins with x."),
        (
            {"patch_short.weight": torch.ones(2), "proj_out.weight": torch.ones(2)},
            "is a whole Helios model, no LoRA. Load it with Helios Model Loader.",
        ),
        ({"patch_short.weight": torch.ones(2)}, "has whole weights of a training, no LoRA. scripts/convert_lora.py"),
        ({f"{ONE}.lora_A.weight": torch.ones(2, 48)}, "none of its 1 tensors has the shape"),
        ({f"{ONE}.alpha": torch.ones(2, dtype=torch.int64)}, "in a type that is none of F32, F16, BF16, F8_E4M3"),
        ({f"{ONE}.diff": torch.ones(2), f"transformer.{ONE}.diff": torch.ones(2)}, "which are the same. Remove one."),
    ],
)
def test_refuses_a_file_that_does_not_fit(model, loras, tensors, message):
    assert message in loras.refusal(model, tensors)


def test_refuses_pickles_damaged_files_and_names_of_none(model, loras):
    assert "opening one can run any code" in loras.refusal(model, pair(ONE, 48), "a.pt")
    save_file(pair(ONE, 48), loras.folder / "b.safetensors")
    os.truncate(loras.folder / "b.safetensors", 300)
    for name, message in (("b.safetensors", "is truncated"), ("c.safetensors", "There is no LoRA 'c.safetensors'")):
        with pytest.raises(ValueError, match=message):
            run_node(HeliosLoraLoader, model, name, 1.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [("{", "is damaged"), ('{"transformer.lora_alpha": "1"}', "which is no number")],
)
def test_refuses_metadata_that_says_nothing_of_alpha(model, loras, metadata, message):
    with pytest.raises(ValueError, match=message):
        loras.load(model, pair(f"transformer.{ONE}", 48), metadata={"lora_adapter_metadata": metadata})


def test_refuses_other_models(loras):
    with pytest.raises(ValueError, match="Helios LoRA Loader needs a Helios model, got int"):
        loras.load(3, pair(ONE, 48))


def test_a_file_that_is_replaced_is_read_again(loras):
    save_file(pair(ONE, 48), loras.folder / "a.safetensors")
    before = HeliosLoraLoader.fingerprint_inputs(lora_name="a.safetensors", strength=1.0)
    save_file(pair(ONE, 64), loras.folder / "a.safetensors")
    assert HeliosLoraLoader.fingerprint_inputs(lora_name="a.safetensors", strength=1.0) != before
