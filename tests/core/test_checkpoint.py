"""What `helios_core.checkpoint` reads and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfyui_helios.helios_core.checkpoint import Checkpoint, open_checkpoint, published_name
from comfyui_helios.helios_core.config import TransformerConfig
from comfyui_helios.helios_core.quoting import quoted
from comfyui_helios.helios_core.regular_file import CheckpointError
from comfyui_helios.helios_core.safetensors_file import read_headers, read_tensors
from support.checkpoints import ODD_HEADS, REPACK, SMALL, assert_same, make_weights, write_json

LAYOUTS = {
    "diffusers": {},
    "older": {"norm_out.scale_shift_table": "scale_shift_table"},
    "repack": REPACK,
    "as in memory": {"scale_shift_table": "scale_shift_table.weight"},
}
PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "transformer."]
DISK_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def rename(weights: dict[str, Tensor], names: dict[str, str], prefix: str = "") -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[prefix + name] = tensor
    return renamed


def read(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {published_name(name): tensor for name, tensor in read_tensors(checkpoint.tensors, lambda name: dtype)}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value)


# What is read


@pytest.mark.parametrize(
    ("layout", "prefix", "dtype"),
    [
        *((layout, prefix, torch.float32) for layout in LAYOUTS for prefix in PREFIXES),
        *(("diffusers", "", dtype) for dtype in DISK_DTYPES[1:]),
    ],
    ids=str,
)
def test_every_layout_prefix_and_dtype_reads_the_same(tmp_path, layout, prefix, dtype):
    weights = make_weights(dtype=dtype)
    file = tmp_path / "helios.safetensors"
    save_file(rename(weights, LAYOUTS[layout], prefix), file)
    checkpoint = open_checkpoint(file)
    assert checkpoint.config == SMALL  # from the shapes alone
    assert checkpoint.variant is None
    assert_same(read(checkpoint), {name: x.float() for name, x in weights.items()})


def test_the_official_folder_is_read_and_transformer_ode_is_not(official):
    checkpoint = open_checkpoint(official)
    assert checkpoint.config == ODD_HEADS
    assert checkpoint.variant == "distilled"
    assert {x.file.parent for x in checkpoint.tensors.values()} == {official / "transformer"}
    assert_same(read(checkpoint), load_file(official / "expected.safetensors.keep"))


def test_a_transformer_folder_is_read_as_one_file_or_in_shards(official, tmp_path):
    expected = load_file(official / "expected.safetensors.keep")
    assert_same(read(open_checkpoint(official / "transformer")), expected)
    save_file(expected, tmp_path / "any name.safetensors")
    (tmp_path / "config.json").write_text((official / "transformer" / "config.json").read_text())
    assert_same(read(open_checkpoint(tmp_path)), expected)


def test_shards_may_be_links_into_a_download_cache(official, tmp_path):
    for file in (official / "transformer").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert len(open_checkpoint(tmp_path).tensors) == len(load_file(official / "expected.safetensors.keep"))


def test_keys_of_an_unused_norm_are_ignored(tmp_path):
    weights = make_weights()
    save_file(weights | {"blocks.0.attn2.norm_added_q.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    assert read(open_checkpoint(tmp_path / "a.safetensors")).keys() == weights.keys()


@pytest.mark.parametrize("mode", ["scalar", "per_head"])
def test_amplified_history_is_told_from_the_shapes(tmp_path, mode):
    config = TransformerConfig(
        num_attention_heads=2, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=1, is_amplify_history=True,
        history_scale_mode=mode, cross_attn_norm=False,
    )  # fmt: skip
    save_file(make_weights(config), tmp_path / "a.safetensors")
    assert open_checkpoint(tmp_path / "a.safetensors").config == config


@pytest.mark.parametrize(
    ("index", "schedule", "variant"),
    [
        ({"_class_name": "HeliosPipeline"}, {"_class_name": "HeliosScheduler", "stages": 1}, "base"),
        ({"_class_name": "HeliosPyramidPipeline", "is_distilled": False}, {"stages": 3}, "mid"),
        ({"_class_name": "HeliosPyramidPipeline", "is_distilled": True}, None, "distilled"),
        (None, {"_class_name": "HeliosDMDScheduler", "stages": 3}, "distilled"),
        (None, {"_class_name": "HeliosScheduler", "stages": 3}, "mid"),
        (None, None, None),
    ],
)
def test_the_variant_comes_from_the_pipeline_and_the_scheduler(tmp_path, index, schedule, variant):
    (tmp_path / "transformer").mkdir()
    save_file(make_weights(), tmp_path / "transformer" / "a.safetensors")
    if index is not None:
        write_json(tmp_path / "model_index.json", index)
    if schedule is not None:
        write_json(tmp_path / "scheduler" / "scheduler_config.json", schedule)
    assert open_checkpoint(tmp_path).variant == variant


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(make_weights(), file)
    before = file.read_bytes()
    for _, tensor in read_tensors(open_checkpoint(file).tensors, lambda name: torch.float32):
        tensor.zero_()
    assert file.read_bytes() == before


def test_tensors_outlive_their_file_and_need_no_alignment(tmp_path):
    weights = make_weights()
    file = tmp_path / "a.safetensors"
    save_file(weights, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    found = read(open_checkpoint(file))
    half = read(open_checkpoint(file), torch.bfloat16)
    file.unlink()
    assert all(x.data_ptr() % x.element_size() == 0 for x in found.values())
    assert_same(found, weights)
    assert_same(half, {name: x.bfloat16() for name, x in weights.items()})


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on maps is Linux's")
def test_a_file_larger_than_ram_and_swap_is_mapped(tmp_path):
    """A sparse file: `safe_open` fails on it with 'unable to mmap ... Cannot allocate memory'."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    room = sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    file = tmp_path / "a.safetensors"
    values, end = torch.randn(50), room + 2**30
    header = {
        "small": {"dtype": "F32", "shape": [50], "data_offsets": [0, 200]},
        "huge": {"dtype": "F8_E4M3", "shape": [end - 200], "data_offsets": [200, end]},
    }
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
        stream.truncate(8 + len(text) + end)
    stored, _ = read_headers([file])
    assert torch.equal(dict(read_tensors(stored, lambda name: stored[name].dtype))["small"], values)


# What is refused


def save_with(file: Path, **changes: Tensor | None) -> Path:
    """A good file with some tensors replaced, added, or (None) left out; `__` in a name stands for a dot."""
    weights = make_weights() | {name.replace("__", "."): x for name, x in changes.items()}
    save_file({name: x for name, x in weights.items() if x is not None}, file)
    return file


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    assert "nowhere.safetensors does not exist" in refusal(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"12345", "no safetensors file"),
        (b"PK\x03\x04" + bytes(99), "a pickle saved by torch"),
        (b"\x80\x02}q\x00." + bytes(99), "a pickle"),
        (b"GGUF" + bytes(99), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        ((10**7).to_bytes(8, "little") + b'{"a": 1', "is truncated"),
        ((7).to_bytes(8, "little") + b"{oh no}", "damaged"),
        ((9).to_bytes(8, "little") + b'{"a": 1} ', "damaged"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content, message):
    file = tmp_path / "helios.safetensors"
    file.write_bytes(content)
    assert f"{file}" in refusal(file)
    assert message in refusal(file)


def test_a_truncated_file_is_refused_before_a_tensor_is_read(tmp_path):
    file = save_with(tmp_path / "helios.safetensors")
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    assert f"helios.safetensors is truncated: {size - 1} bytes are there of at least {size}" in refusal(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickle_is_refused_by_its_name(tmp_path, suffix):
    file = save_with(tmp_path / f"helios{suffix}")
    assert f"helios{suffix} is a pickle" in refusal(file)
    assert f"pickles only (helios{suffix})" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("blocks.0.self_attn.q.weight", "Wan 2.1"),
        ("model.diffusion_model.blocks.0.self_attn.q.weight", "Wan 2.1"),
        ("blocks.0.attn1.to_q.weight", "Wan model in diffusers' layout"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("decoder.head.0.gamma", "VAE"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "text encoder"),
        ("diffusion_model.blocks.0.attn1.to_q.lora_A.weight", "LoRA"),
        ("something.else", "It begins with something.else"),
    ],
)
def test_another_models_file_is_refused_and_named(tmp_path, key, message):
    save_file({key: torch.ones(2)}, tmp_path / "other.safetensors")
    assert "other.safetensors is no Helios model" in refusal(tmp_path / "other.safetensors")
    assert message in refusal(tmp_path / "other.safetensors")


def test_another_models_folder_is_refused(tmp_path):
    save_with(tmp_path / "a.safetensors")
    write_json(tmp_path / "config.json", {"_class_name": "WanTransformer3DModel"})
    assert "config.json is not the configuration of a Helios transformer: it describes a 'Wan" in refusal(tmp_path)


def test_missing_and_unexpected_keys_are_counted_and_ten_are_listed(tmp_path):
    weights = make_weights()
    removed = [name for name in weights if name.startswith("blocks.1.")][:14]
    added = {f"extra.{i:02}": torch.ones(1) for i in range(12)}
    save_file({k: x for k, x in weights.items() if k not in removed} | added, tmp_path / "a.safetensors")
    message = refusal(tmp_path / "a.safetensors")
    assert f"14 of {len(weights)} tensors are missing" in message
    assert [name in message for name in removed] == [True] * 10 + [False] * 4
    assert "12 are unexpected" in message
    assert [name in message for name in added] == [True] * 10 + [False] * 2
    assert "and 4 more" in message
    assert "and 2 more" in message


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    file = save_with(tmp_path / "a.safetensors", blocks__1__attn1__to_q__weight=torch.ones(128, 64))
    assert "1 tensors of another shape" in refusal(file)
    assert "blocks.1.attn1.to_q.weight (128, 64) for (128, 128)" in refusal(file)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    file = save_with(tmp_path / "a.safetensors", scale_shift_table=torch.ones(1, 2, 128))
    assert "holds 'norm_out.scale_shift_table' twice" in refusal(file)


def test_integer_weights_are_refused(tmp_path):
    ints = torch.ones(64, dtype=torch.int8)
    file = save_with(tmp_path / "a.safetensors", blocks__0__ffn__net__0__proj__bias=ints)
    assert "stores 1 tensors in a type that is none of F32, F16, BF16, F8_E4M3: blocks.0.ffn" in refusal(file)


def test_a_width_that_does_not_tell_its_heads_is_refused(tmp_path):
    save_file(make_weights(ODD_HEADS), tmp_path / "a.safetensors")
    assert "Give the folder with its config.json" in refusal(tmp_path / "a.safetensors")


def test_a_configuration_that_is_no_json_is_named_where_it_is(tmp_path):
    save_file(make_weights(), tmp_path / "a.safetensors", {"helios_config": "{"})
    message = refusal(tmp_path / "a.safetensors")
    assert f"metadata 'helios_config' of {tmp_path / 'a.safetensors'} is not the configuration" in message
    assert message.endswith(". Download it again.")


@pytest.mark.parametrize(("key", "value"), [("helios_variant", "turbo"), ("helios_config", '{"rope_dim": [1, 1, 1]}')])
def test_metadata_that_makes_no_sense_is_refused(tmp_path, key, value):
    save_file(make_weights(), tmp_path / "a.safetensors", {key: value})
    assert "a.safetensors" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "'model.diffusion_model.helios_config' of"),
        (b'{"rope_dim": [1, 1, 1]}', "is not the configuration of a Helios transformer"),
        (b" " * 5000, "in the shape (5000,), which is no text of settings"),
    ],
)
def test_a_configuration_among_the_tensors_that_makes_no_sense_is_refused(tmp_path, text, said):
    weights = make_weights() | {"helios_config": torch.tensor(list(text), dtype=torch.uint8)}
    save_file(rename(weights, {}, "model.diffusion_model."), tmp_path / "a.safetensors")
    assert said in refusal(tmp_path / "a.safetensors")


def copy_official(official: Path, target: Path) -> tuple[Path, dict]:
    for file in (official / "transformer").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    index = target / "diffusion_pytorch_model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_a_missing_shard_is_named(official, tmp_path):
    _, index = copy_official(official, tmp_path)
    shard = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / shard).unlink()
    assert f"lacks 1 of {len(set(index['weight_map'].values()))} shards: {shard}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/a.safetensors", "..\\a.safetensors", "C:a.safetensors", "a.bin"]
)
def test_an_index_that_points_elsewhere_is_not_followed(official, tmp_path, name):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_with(tmp_path / "a.safetensors")
    file, index = copy_official(official, folder)
    index["weight_map"][next(iter(index["weight_map"]))] = name
    write_json(file, index)
    assert f"names {quoted(name)}, which is no .safetensors file in its own folder" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_a_folder_that_holds_no_weights_or_several_is_refused(tmp_path):
    assert "holds no .safetensors file" in refusal(tmp_path)
    save_with(tmp_path / "a.safetensors")
    save_with(tmp_path / "b.safetensors")
    assert "holds several files (a.safetensors, b.safetensors)" in refusal(tmp_path)


def test_transformer_ode_is_refused_when_it_is_asked_for(official):
    assert "Give the folder that holds transformer_ode" in refusal(official / "transformer_ode")


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e5, torch.float16), (500.0, torch.float8_e4m3fn), (float("nan"), torch.float16)]
)
def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path, value, dtype):
    file = save_with(tmp_path / "a.safetensors", proj_out__bias=torch.tensor([value] + [0.0] * 63))
    assert torch.isfinite(read(open_checkpoint(file), torch.bfloat16)["proj_out.weight"]).all()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the values of 'proj_out.bias'"):
        read(open_checkpoint(file), dtype)
